"""The tables the laws run over: models with their data, optimizers, windows; and the law itself.

A model case returns an uncompiled model, the arguments of its `compile`, and a function that
makes a batch of so many rows.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras
from tf_keras import layers

import ga_transform as ga

optimizers = tf_keras.optimizers
legacy = tf_keras.optimizers.legacy

#: Windows by the row counts of their micro-batches. The last one is left to the end of the epoch.
EQUAL = [[4, 4, 4], [4, 4, 4]]
UNEVEN = [[4, 1, 6], [2, 5, 3]]
PARTIAL = [[3, 4, 2], [5, 1]]
WINDOWS = {"equal": EQUAL, "uneven": UNEVEN, "partial": PARTIAL}
STEPS = 3


@dataclasses.dataclass
class Case:
    model: Any
    compile: dict[str, Any]
    batch: Callable[[np.random.Generator, int], tuple]


# ---- models --------------------------------------------------------------------------------


def dense():
    """Regression with regularisers, a constraint, a frozen layer and sample weights."""
    model = tf_keras.Sequential(
        [
            tf_keras.Input([5]),
            layers.Dense(6, "tanh", kernel_regularizer="l2"),
            layers.Dense(6, "tanh", trainable=False),
            layers.Dense(4, "tanh", kernel_constraint=tf_keras.constraints.MaxNorm(0.9)),
            layers.Dense(2, bias_regularizer="l1"),
        ]
    )
    return Case(
        model,
        {"loss": "mse"},
        lambda rng, rows: (
            rng.normal(size=[rows, 5]),
            rng.normal(size=[rows, 2]),
            rng.random(rows),
        ),
    )


def tokens():
    """A masked tagger: its mean counts valid tokens."""
    inputs = tf_keras.Input([None], dtype="int32")
    hidden = layers.Embedding(11, 4, mask_zero=True)(inputs)
    hidden = layers.SimpleRNN(5, return_sequences=True)(hidden)
    model = tf_keras.Model(inputs, layers.Dense(3)(hidden))

    def batch(rng, rows, length=7):
        lengths = rng.integers(1, length + 1, size=[rows, 1])
        words = rng.integers(1, 11, size=[rows, length]) * (np.arange(length) < lengths)
        return words.astype("int32"), rng.integers(0, 3, size=[rows, length])

    return Case(model, {"loss": tf_keras.losses.SparseCategoricalCrossentropy(True)}, batch)


def conv():
    """Images to class probabilities, with label smoothing."""
    model = tf_keras.Sequential(
        [
            tf_keras.Input([6, 6, 2]),
            layers.Conv2D(3, 3, activation="gelu"),
            layers.DepthwiseConv2D(2, depth_multiplier=2),
            layers.GlobalAveragePooling2D(),
            layers.Dense(3, "softmax"),
        ]
    )
    return Case(
        model,
        {"loss": tf_keras.losses.CategoricalCrossentropy(label_smoothing=0.1)},
        lambda rng, rows: (
            rng.normal(size=[rows, 6, 6, 2]),
            np.eye(3)[rng.integers(0, 3, size=rows)],
        ),
    )


def branches():
    """Two inputs, two outputs, a shared layer, a nested model, add_loss, an idle weight."""
    left, right = tf_keras.Input([4], name="left"), tf_keras.Input([4], name="right")
    shared = layers.Dense(5, "tanh", activity_regularizer="l2")
    nested = tf_keras.Sequential([tf_keras.Input([10]), layers.Dense(6, "elu")], name="nested")
    hidden = nested(layers.Concatenate()([shared(left), shared(right)]))
    score = layers.Dense(1, name="score")(hidden)
    kind = layers.Dense(3, "softmax", name="kind")(hidden)
    model = tf_keras.Model({"left": left, "right": right}, {"score": score, "kind": kind})
    model.add_loss(tf.reduce_mean(tf.square(hidden)) * 0.1)
    return Case(
        model,
        {
            "loss": {"score": "huber", "kind": "sparse_categorical_crossentropy"},
            "loss_weights": {"score": 0.3, "kind": 1.7},
        },
        lambda rng, rows: (
            {"left": rng.normal(size=[rows, 4]), "right": rng.normal(size=[rows, 4])},
            {"score": rng.normal(size=[rows, 1]), "kind": rng.integers(0, 3, size=[rows, 1])},
        ),
    )


def words():
    """An embedding whose gradients are slices, with rows that repeat."""
    model = tf_keras.Sequential(
        [
            tf_keras.Input([4], dtype="int32"),
            layers.Embedding(9, 3),
            layers.GlobalAveragePooling1D(),
            layers.Dense(1),
        ]
    )
    return Case(
        model,
        {"loss": tf_keras.losses.BinaryCrossentropy(from_logits=True)},
        lambda rng, rows: (
            rng.integers(0, 7, size=[rows, 4]).astype("int32"),
            rng.integers(0, 2, size=[rows, 1]),
        ),
    )


MODELS = {case.__name__: case for case in (dense, tokens, conv, branches, words)}

# ---- optimizers ----------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": lambda: optimizers.SGD(0.1),
    "momentum": lambda: optimizers.SGD(0.1, momentum=0.9, nesterov=True),
    "adam": lambda: optimizers.Adam(0.02),
    "amsgrad": lambda: optimizers.Adam(0.02, amsgrad=True),
    "adamw": lambda: optimizers.AdamW(0.02, weight_decay=0.01),
    "adamax": lambda: optimizers.Adamax(0.02),
    "nadam": lambda: optimizers.Nadam(0.02),
    "rmsprop": lambda: optimizers.RMSprop(0.02, momentum=0.5, centered=True),
    "adagrad": lambda: optimizers.Adagrad(0.1),
    "adadelta": lambda: optimizers.Adadelta(1.0),
    "adafactor": lambda: optimizers.Adafactor(0.02),
    "ftrl": lambda: optimizers.Ftrl(0.1, l1_regularization_strength=0.001),
    "lion": lambda: optimizers.Lion(0.02),
    "legacy sgd": lambda: legacy.SGD(0.1, momentum=0.9, decay=0.1),
    "legacy adam": lambda: legacy.Adam(0.02, amsgrad=True),
    "legacy adamax": lambda: legacy.Adamax(0.02),
    "legacy nadam": lambda: legacy.Nadam(0.02),
    "legacy rmsprop": lambda: legacy.RMSprop(0.02, momentum=0.5),
    "legacy adagrad": lambda: legacy.Adagrad(0.1),
    "legacy adadelta": lambda: legacy.Adadelta(1.0),
    "legacy ftrl": lambda: legacy.Ftrl(0.1),
}

#: What is set on an optimizer; on dense gradients, where tf_keras's own clips are sound.
OPTIONS = {
    "ema": lambda: optimizers.Adam(0.02, use_ema=True, ema_momentum=0.7, ema_overwrite_frequency=3),
    "weight decay": lambda: optimizers.SGD(0.1, weight_decay=0.05),
    "clipnorm": lambda: optimizers.SGD(0.5, clipnorm=0.05),
    "global clipnorm": lambda: optimizers.Adam(0.02, global_clipnorm=0.1),
    "clipvalue": lambda: optimizers.SGD(0.5, clipvalue=0.01),
    "legacy clipnorm": lambda: legacy.SGD(0.5, clipnorm=0.05),
    "schedule": lambda: optimizers.Adam(optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)),
    "legacy schedule": lambda: legacy.Adam(
        optimizers.schedules.PiecewiseConstantDecay([2], [0.1, 0.01])
    ),
    "loss scale": lambda: tf_keras.mixed_precision.LossScaleOptimizer(optimizers.Adam(0.02)),
}

# ---- the law -------------------------------------------------------------------------------


def concatenate(batches):
    """One batch of the rows of several."""
    return tf.nest.map_structure(lambda *parts: np.concatenate(parts), *batches)


def make_batches(case, windows, seed=0):
    """For each window, its micro-batches."""
    return batches_of(case.batch, windows, seed)


def batches_of(batch, windows, seed=0):
    """For each window, its micro-batches, of a function that makes one."""
    rng = np.random.default_rng(seed)
    return [[batch(rng, rows) for rows in window] for window in windows]


def dataset(batches):
    """A pipeline of batches of different sizes, as one signature, of known length."""
    batches = list(batches)

    def spec(*parts):
        dims = [
            None if len({p.shape[i] for p in parts}) > 1 else parts[0].shape[i]
            for i in range(parts[0].ndim)
        ]
        return tf.TensorSpec([None, *dims[1:]], parts[0].dtype)

    signature = tf.nest.map_structure(spec, *batches)
    data = tf.data.Dataset.from_generator(lambda: iter(batches), output_signature=signature)
    return data.apply(tf.data.experimental.assert_cardinality(len(batches)))


def weights_of(model):
    return [np.array(weight, np.float64) for weight in model.get_weights()]


def weights_of_variables(model):
    """Those that are variables, and no table of words."""
    return [np.array(weight, np.float64) for weight in model.trainable_weights]


def distances(model, reference, start):
    """By weight, the distance from the reference, in units of that which was travelled."""
    travelled = np.sqrt(sum(np.sum((a - b) ** 2) for a, b in zip(weights_of(reference), start)))
    assert travelled > 1e-4, "the reference has not moved: the test could not fail"
    worst = [
        np.max(np.abs(ours - theirs), initial=0.0) / travelled
        for ours, theirs in zip(weights_of(model), weights_of(reference))
    ]
    return [(variable.name, each) for variable, each in zip(reference.weights, worst)]


def assert_same_weights(model, reference, start, tolerance):
    """Every weight as in the reference, within `tolerance` of the distance that was travelled."""
    for name, distance in distances(model, reference, start):
        assert distance <= tolerance, f"{name}: {distance:.2e}"


def assert_law(case, optimizer, windows, tolerance, epochs=2, transforms=None, **compile_arguments):
    """k micro-batches against one batch: after as many updates, the same weights.

    The reference is plain tf_keras, which is given each window as one batch.
    """
    arguments = {**case.compile, **compile_arguments}
    case.model.compile(optimizer(), **arguments)
    start = weights_of(case.model)
    model = ga.make_accumulating(
        case.model, **({"accum_steps": STEPS} if transforms is None else {"transforms": transforms})
    )
    batches = make_batches(case, windows)
    model.fit(dataset(sum(batches, [])), epochs=epochs, verbose=0)
    case.model.fit(dataset(map(concatenate, batches)), epochs=epochs, verbose=0)
    assert_same_weights(model, case.model, start, tolerance)
    assert (
        int(model.optimizer.iterations)
        == int(case.model.optimizer.iterations)
        == epochs * len(windows)
    )
    return model
