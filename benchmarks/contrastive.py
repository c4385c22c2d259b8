"""What contrastive training comes to, by micro-batch size: where slices see their own rows only.

As SimCLR (Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual
Representations"): of two augmented views of each image, each is to be found by the other among
all views of the batch. The images are scikit-learn's handwritten digits.
"""

from __future__ import annotations

from typing import Any, Optional

import numpy as np
import tensorflow as tf
import tf_keras
from scipy import ndimage
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

import ga_transform as ga

__all__ = ["train"]

TRAINED_IMAGES = 1280  # of 1,797; the others test
TEMPERATURE = 0.1


def train(
    seed: int, epochs: int, batch_size: int, micro_batch_sizes: list[int]
) -> dict[str, dict[str, float]]:
    """What is reached from the same weights with the same views.

    Args:
        seed: Of the weights, the order and the views.
        epochs: Of `TRAINED_IMAGES` rows.
        batch_size: Rows a batch, of which each makes an update.
        micro_batch_sizes: Rows a slice, with `whole_batch_loss` and without.

    Returns:
        By "full batch", "split at ..." and "whole_batch_loss at ...", what `_tested` tells.
    """
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    images, labels = digits.images[order] / 16, digits.target[order]
    random = np.random.default_rng(seed)
    rows = np.concatenate(
        [_views(random.permutation(images[:TRAINED_IMAGES]), random) for _ in range(epochs)]
    )
    tf_keras.utils.set_random_seed(seed)
    weights = _build().get_weights()

    def reached(micro_batch_size: Optional[int], whole_batch_loss: bool = False) -> Any:
        model = _build()
        model.set_weights(weights)
        model.compile(tf_keras.optimizers.Adam(2e-3), _nt_xent)
        if micro_batch_size is not None:
            ga.make_accumulating(
                model,
                micro_batch_size=micro_batch_size,
                whole_batch_loss=whole_batch_loss,
                inplace=True,
            )
        targets = np.zeros(len(rows))  # which the loss does not look at
        model.fit(rows, targets, batch_size=batch_size, shuffle=False, verbose=0)
        return _tested(model, images, labels)

    found = {"full batch": reached(None)}
    for size in micro_batch_sizes:
        found[f"split at {size}"] = reached(size)
        found[f"whole_batch_loss at {size}"] = reached(size, whole_batch_loss=True)
    return found


def _views(images: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Two of each image: turned, stretched, moved, with noise. Shape: [images, 2, 8, 8]."""
    views = np.empty([len(images), 2, 8, 8], "float32")
    centre = np.array([3.5, 3.5])
    for image, pair in zip(images, views):
        for view in pair:
            angle, factor = np.radians(random.uniform(-15, 15)), random.uniform(0.9, 1.1)
            cosine, sine = factor * np.cos(angle), factor * np.sin(angle)
            matrix = np.array([[cosine, -sine], [sine, cosine]])
            offset = centre - matrix @ centre + random.uniform(-0.75, 0.75, 2)
            view[:] = ndimage.affine_transform(image, matrix, offset, order=1)
    return views + random.normal(0, 0.05, views.shape).astype("float32")


def _build() -> Any:
    """An encoder and its head, each row with both views. Output shape: [batch, 2, 16]."""
    layers = tf_keras.layers
    return tf_keras.Sequential(
        [
            tf_keras.Input([2, 8, 8]),
            layers.Reshape([2, 64]),
            layers.Dense(256, activation="relu"),
            layers.Dense(64, activation="relu", name="features"),
            layers.Dense(64, activation="relu"),
            layers.Dense(16),
        ]
    )


def _nt_xent(_: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
    """Each view's own partner against all other views of the batch. Shape: [batch]."""
    pairs = tf.math.l2_normalize(y_pred, -1)
    rows = tf.shape(pairs)[0]
    views = tf.concat([pairs[:, 0], pairs[:, 1]], 0)
    scores = tf.matmul(views, views, transpose_b=True) / TEMPERATURE - 1e9 * tf.eye(2 * rows)
    partners = tf.concat([tf.range(rows) + rows, tf.range(rows)], 0)
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(partners, scores)
    return (losses[:rows] + losses[rows:]) / 2


def _tested(model: Any, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Per cent, on images that were not trained on.

    "views found": how often a view of an image is nearest to the other view of it, among those of
    all images. "linear probe": digits told by a linear classifier of the encoder's features.
    """
    views = _views(images[TRAINED_IMAGES:], np.random.default_rng(1))
    embedded = tf.math.l2_normalize(model.predict(views, verbose=0), -1).numpy()
    scores = embedded[:, 0] @ embedded[:, 1].T
    own = np.arange(len(scores))
    found = [np.mean(scores.argmax(axis) == own) for axis in (0, 1)]

    encoder = tf_keras.Model(model.input, model.get_layer("features").output)
    features = encoder.predict(np.stack([images, images], 1), verbose=0)[:, 0]
    probe = LogisticRegression(max_iter=2000)
    probe.fit(features[:TRAINED_IMAGES], labels[:TRAINED_IMAGES])
    told = probe.score(features[TRAINED_IMAGES:], labels[TRAINED_IMAGES:])
    return {"views found": 100 * float(np.mean(found)), "linear probe": 100 * float(told)}
