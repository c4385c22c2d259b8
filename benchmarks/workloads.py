"""The models that are trained, each with its data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np
import tensorflow as tf
import tf_keras
from tf_keras import layers

__all__ = ["WORKLOADS", "Workload"]

Inputs = Callable[[np.random.Generator, int], np.ndarray]


def _same_class_attracts(y_true: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
    """Rows of a class against all others of the batch (supervised contrastive learning)."""
    classes, embedded = tf.reshape(y_true, [-1, 1]), tf.math.l2_normalize(y_pred, -1)
    own = tf.eye(tf.shape(embedded)[0])
    scores = tf.matmul(embedded, embedded, transpose_b=True) / 0.1 - 1e9 * own
    pairs = tf.cast(classes == tf.transpose(classes), tf.float32) - own
    likelihood = tf.reduce_sum(pairs * tf.nn.log_softmax(scores), -1)
    return -tf.math.divide_no_nan(likelihood, tf.reduce_sum(pairs, -1))


def _dice(y_true: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
    """One minus the overlap of each class in the batch."""
    predicted = tf.nn.softmax(y_pred)
    truth = tf.one_hot(tf.cast(y_true, tf.int32), y_pred.shape[-1])
    overlap = tf.reduce_sum(truth * predicted, [0, 1, 2])
    return 1 - tf.reduce_mean(2 * overlap / tf.reduce_sum(truth + predicted, [0, 1, 2]))


@dataclass(frozen=True)
class Workload:
    """A classifier, and rows to train it on."""

    #: Makes a fresh model. No seed is set: that would empty TensorFlow's cache of kernels, and the
    #: models that were made before would have to get warm again.
    build: Callable[[], Any]
    #: Random inputs of so many rows.
    inputs: Inputs
    micro_batch_size: int
    classes: int = 10
    optimizer: Callable[[], Any] = tf_keras.optimizers.Adam
    #: Of the labels of a row.
    label_shape: tuple[int, ...] = ()
    #: Couples the rows of a batch.
    coupled_loss: Callable[[tf.Tensor, tf.Tensor], tf.Tensor] = _same_class_attracts

    def compiled(self, model: Optional[Any] = None, steps_per_execution: int = 1) -> Any:
        """A model, compiled: a fresh one if none is given."""
        model = self.build() if model is None else model
        model.compile(
            optimizer=self.optimizer(),
            loss=tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
            steps_per_execution=steps_per_execution,
        )
        return model

    def compiled_with_coupled_loss(self) -> Any:
        """A fresh model, whose outputs are embeddings; of which accuracy would say nothing."""
        model = self.build()
        model.compile(optimizer=self.optimizer(), loss=self.coupled_loss)
        return model

    def rows(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and labels of so many rows, the same each time."""
        random = np.random.default_rng(0)
        inputs = self.inputs(random, count)
        return inputs, random.integers(0, self.classes, [count, *self.label_shape])


def _normal(*shape: int) -> Inputs:
    return lambda random, rows: random.normal(size=[rows, *shape]).astype("float32")


def _ids(vocabulary: int, length: int) -> Inputs:
    return lambda random, rows: random.integers(0, vocabulary, [rows, length])


def _mlp(*widths: int) -> Any:
    hidden = [layers.Dense(width, activation="relu") for width in widths[1:]]
    return tf_keras.Sequential([tf_keras.Input([widths[0]]), *hidden, layers.Dense(10)])


def _cnn() -> Any:
    def convolution(filters: int) -> Any:
        return layers.Conv2D(filters, 3, padding="same", activation="relu")

    return tf_keras.Sequential(
        [
            tf_keras.Input([64, 64, 3]),
            convolution(16),
            convolution(16),
            layers.MaxPooling2D(),
            convolution(32),
            convolution(32),
            layers.GlobalAveragePooling2D(),
            layers.Dense(10),
        ]
    )


def _segmenter() -> Any:
    def convolution(filters: int, **options: Any) -> Any:
        return layers.Conv2D(filters, 3, padding="same", **options)

    return tf_keras.Sequential(
        [
            tf_keras.Input([64, 64, 3]),
            *(convolution(16, activation="relu") for _ in range(4)),
            convolution(10),
        ]
    )


def _residual_cnn() -> Any:
    """Residual blocks with batch normalisation, as a ResNet has them."""
    inputs = tf_keras.Input([32, 32, 3])
    x = layers.Conv2D(16, 3, padding="same", use_bias=False)(inputs)
    for filters in (16, 16, 32, 32, 64, 64):
        stride = 1 if filters == x.shape[-1] else 2
        around = x if stride == 1 else layers.Conv2D(filters, 1, strides=2, use_bias=False)(x)
        for strides in (stride, 1):
            x = layers.Activation("relu")(layers.BatchNormalization()(x))
            x = layers.Conv2D(filters, 3, strides=strides, padding="same", use_bias=False)(x)
        x = layers.Add()([x, around])
    x = layers.GlobalAveragePooling2D()(layers.Activation("relu")(layers.BatchNormalization()(x)))
    return tf_keras.Model(inputs, layers.Dense(10)(x))


def _resnet50() -> Any:
    return tf_keras.applications.ResNet50(weights=None, classifier_activation=None)


def _lstm() -> Any:
    return tf_keras.Sequential([tf_keras.Input([20, 16]), layers.LSTM(64), layers.Dense(10)])


def _embedding(vocabulary: int) -> Any:
    return tf_keras.Sequential(
        [
            tf_keras.Input([20], dtype="int64"),
            layers.Embedding(vocabulary, 64),
            layers.GlobalAveragePooling1D(),
            layers.Dense(10),
        ]
    )


def _transformer() -> Any:
    inputs = tf_keras.Input([32], dtype="int64")
    x = layers.Embedding(1000, 64)(inputs)
    for _ in range(2):
        attended = layers.MultiHeadAttention(num_heads=4, key_dim=16)(x, x)
        x = layers.LayerNormalization()(layers.Add()([x, attended]))
        hidden = layers.Dense(256, activation="gelu")(x)
        x = layers.LayerNormalization()(layers.Add()([x, layers.Dense(64)(hidden)]))
    return tf_keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling1D()(x)))


def _table(vocabulary: int, optimizer: Callable[[], Any]) -> Workload:
    """An embedding of which only the first 10,000 rows are ever touched."""
    return Workload(lambda: _embedding(vocabulary), _ids(10_000, 20), 64, optimizer=optimizer)


_SPARSE_OPTIMIZERS = {
    "Adagrad": tf_keras.optimizers.Adagrad,
    "legacy SGD": tf_keras.optimizers.legacy.SGD,
}

WORKLOADS: dict[str, Workload] = {
    "tiny MLP": Workload(lambda: _mlp(16, 32, 32), _normal(16), 32),
    # Its optimizer has more to do at an update than its layers have with eight rows.
    "wide MLP": Workload(lambda: _mlp(256, 2048, 2048), _normal(256), 8),
    "CNN": Workload(_cnn, _normal(64, 64, 3), 16),
    "LSTM": Workload(_lstm, _normal(20, 16), 32),
    # Adam moves the whole table at each update.
    "embedding": Workload(lambda: _embedding(200_000), _ids(200_000, 20), 32),
    "transformer": Workload(_transformer, _ids(1000, 32), 16),
    # Its outputs are larger than its inputs.
    "segmenter": Workload(
        _segmenter, _normal(64, 64, 3), 8, label_shape=(64, 64), coupled_loss=_dice
    ),
    "residual CNN": Workload(_residual_cnn, _normal(32, 32, 3), 8),
    "ResNet50": Workload(_resnet50, _normal(224, 224, 3), 8, classes=1000),
    # Of more than 100 MB of weights.
    "wider MLP": Workload(lambda: _mlp(1024, 4096, 4096, 4096), _normal(1024), 16),
    **{
        f"{name}, {vocabulary:,} rows": _table(vocabulary, optimizer)
        for name, optimizer in _SPARSE_OPTIMIZERS.items()
        for vocabulary in (10_000, 100_000, 1_000_000)
    },
}
