"""Models, formats and moments of saving; and, run as a script, the process that goes on from them.

The script imports nothing but the library and the classes of the models themselves.
"""

import json
import pickle
import sys
import warnings
from pathlib import Path

import attrs
import numpy as np
import tensorflow as tf
import tf_keras
from tf_keras import layers

import ga_transform as ga

optimizers = tf_keras.optimizers

STEPS, WINDOWS = 3, 3
BATCHES = STEPS * WINDOWS
#: By moment, how many batches the model has been trained on.
MOMENTS = {"new": 0, "within a window": 5, "between windows": 6}


@tf_keras.utils.register_keras_serializable("tests")
class Tower(tf_keras.Model):
    """A subclassed model that defines `get_config`, with a layer made late."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.hidden = layers.Dense(units, "tanh")

    def build(self, shape):
        self.head = layers.Dense(1)
        super().build(shape)

    def call(self, x):
        return self.head(self.hidden(x))

    def get_config(self):
        return {**super().get_config(), "units": self.units}


@tf_keras.utils.register_keras_serializable("tests")
class Network(tf_keras.Model):
    """A functional model of a class of its own."""


@attrs.frozen
class Halve(ga.Transform):
    times: int = 1


@ga.register_transform(Halve, package="saved")
def halve(spec, gradients, variables, model):
    return [gradient * 0.5**spec.times for gradient in gradients]


def _sequential():
    """With a frozen layer, an embedding, and averages of the weights."""
    model = tf_keras.Sequential(
        [
            tf_keras.Input([4], dtype="int32"),
            layers.Embedding(9, 3),
            layers.Dense(3, "tanh", trainable=False),
            layers.GlobalAveragePooling1D(),
            layers.Dense(1),
        ]
    )
    model.compile(optimizers.Adam(0.02, use_ema=True), "mse", metrics=["mae"])
    return ga.make_accumulating(model, STEPS, agc=0.5)


def _branches():
    """Two inputs, two outputs, a shared layer, a nested model; a legacy optimizer."""
    left, right = tf_keras.Input([4], name="left"), tf_keras.Input([4], name="right")
    shared = layers.Dense(3, "tanh", kernel_regularizer="l2")
    nested = tf_keras.Sequential([tf_keras.Input([6]), layers.Dense(3, "elu")], name="nested")
    hidden = nested(layers.Concatenate()([shared(left), shared(right)]))
    outputs = {"a": layers.Dense(1, name="a")(hidden), "b": layers.Dense(2, name="b")(hidden)}
    model = tf_keras.Model({"left": left, "right": right}, outputs)
    model.compile(optimizers.legacy.Adam(0.02), {"a": "mse", "b": "huber"})
    return ga.make_accumulating(model, transforms=[ga.Accumulate(STEPS), ga.ClipByGlobalNorm(1.0)])


def _subclassed():
    model = Tower(3)
    model.compile(optimizers.SGD(0.05, momentum=0.9), "mse")
    model(np.zeros([1, 4], "float32"))
    return ga.make_accumulating(model, STEPS, inplace=True)


def _own_network():
    """Of a class of its own, with a schedule of steps and of the learning rate."""
    inputs = tf_keras.Input([4])
    model = Network(inputs, layers.Dense(1)(layers.Dense(3, "tanh")(inputs)))
    decay = optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)
    model.compile(optimizers.Adam(decay), "mse")
    return ga.make_accumulating(model, {0: 2, 1: 4, 2: 3}, inplace=True)


def _own_transform():
    model = tf_keras.Sequential([tf_keras.Input([4]), layers.Dense(1)])
    model.compile("adam", "mse")
    return ga.make_accumulating(model, transforms=[ga.Accumulate(STEPS), Halve(2)])


def _mixed_float16():
    """With a loss scale that moves at every update."""
    policy = tf_keras.mixed_precision.Policy("mixed_float16")
    hidden = layers.Dense(3, "tanh", dtype=policy)
    model = tf_keras.Sequential([tf_keras.Input([4]), hidden, layers.Dense(1, dtype="float32")])
    scaled = tf_keras.mixed_precision.LossScaleOptimizer(
        optimizers.Adam(0.02), initial_scale=64, dynamic_growth_steps=2
    )
    model.compile(scaled, "mse")
    return ga.make_accumulating(model, STEPS)


def _rewritten():
    """In float16 and with pooled statistics, of a class of its own; the loss scale moves."""
    inputs = tf_keras.Input([4])
    hidden = layers.BatchNormalization(momentum=0.5)(layers.Dense(3, "tanh")(inputs))
    model = Network(inputs, layers.Dense(1)(hidden))
    model.compile(optimizers.Adam(0.02), "mse")
    precision = ga.Precision("mixed_float16", initial_scale=64, growth_steps=2)
    chain = [precision, ga.BatchNorm("pooled"), ga.Accumulate(STEPS, on_nonfinite="micro_batch")]
    return ga.make_accumulating(model, transforms=chain, inplace=True)


MODELS = {
    "sequential": _sequential,
    "branches": _branches,
    "subclassed": _subclassed,
    "own network": _own_network,
    "own transform": _own_transform,
    "mixed_float16": _mixed_float16,
    "rewritten": _rewritten,
}


def batch(name, number):
    """A batch of a model's data; the one that is pending has more rows than the others."""
    rng = np.random.default_rng(number)
    rows = 3 if number == 4 else 2  # each number of rows is a trace
    if name == "sequential":
        return rng.integers(0, 9, [rows, 4]).astype("int32"), rng.normal(size=[rows, 1])
    x, y = rng.normal(size=[rows, 4]).astype("float32"), rng.normal(size=[rows, 1])
    if name == "branches":
        return {"left": x, "right": -x}, {"a": y, "b": np.tile(y, [1, 2])}
    return x, y


def train(model, name, start, stop):
    for number in range(start, stop):
        model.train_on_batch(*batch(name, number))
    return model


def made(name):
    tf_keras.backend.clear_session()
    tf_keras.utils.set_random_seed(1)
    return MODELS[name]()


# ---- formats -------------------------------------------------------------------------------


def _pickled(model, path):
    path.write_bytes(pickle.dumps(model))


def _unpickled(path, name):
    return pickle.loads(path.read_bytes())


def _loaded(path, name):
    return tf_keras.models.load_model(path)


def _with_weights(path, name):
    model = made(name)
    model.load_weights(str(path))
    return model


def _with_checkpoint(path, name):
    model = made(name)
    tf.train.Checkpoint(model).read(str(path)).assert_existing_objects_matched()
    return model


#: How a model is saved, and how it is had again.
FORMATS = {
    "model.keras": (lambda model, path: model.save(path), _loaded),
    "model.h5": (lambda model, path: model.save(path), _loaded),
    "savedmodel": (lambda model, path: model.save(path), _loaded),
    "pickle": (_pickled, _unpickled),
    "checkpoint": (lambda model, path: tf.train.Checkpoint(model).write(path), _with_checkpoint),
    "weights": (lambda model, path: model.save_weights(path), _with_weights),
    "w.weights.h5": (lambda model, path: model.save_weights(path), _with_weights),
}
#: Those that hold the state of the training, and so a partial window.
WHOLE = ["model.keras", "savedmodel", "pickle", "checkpoint", "weights"]


def path_of(folder, name, moment, file):
    path = Path(folder) / name / moment / file
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def keys(name):
    """The moments and formats in which a model is saved."""
    for moment in MOMENTS:
        for file in FORMATS:
            # tf_keras writes models of users' own classes as HDF5 only if they are functional.
            if not (name == "subclassed" and file == "model.h5"):
                yield moment, file


def inputs_of(name):
    return batch(name, 0)[0]


def write(folder, name):
    """Save a model at each moment in each format; return what it was then, and in the end."""
    found = {}
    model = made(name)
    done = 0
    for moment, count in MOMENTS.items():
        train(model, name, done, count)
        done = count
        for file in (file for at, file in keys(name) if at == moment):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                FORMATS[file][0](model, path_of(folder, name, moment, file))
        found[moment] = state_of(model, name)
    train(model, name, done, BATCHES)
    return found, model.get_weights()


def state_of(model, name):
    predictions = tf.nest.flatten(model.predict(inputs_of(name), verbose=0))
    return {
        "class": type(model).__name__,
        "chain": repr(model.transforms),
        "pending": model.pending_micro_batches,
        "iterations": int(model.optimizer.iterations),
        "predictions": [np.asarray(each, float).tolist() for each in predictions],
        "scale": float(getattr(model.optimizer, "loss_scale", 0)),
        "trainable": [layer.trainable for layer in model.layers],
    }


def go_on(folder, name):
    """Load each file of a model, train on, and write down what it was and became."""
    found = {}
    for moment, file in keys(name):
        path = path_of(folder, name, moment, file)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = FORMATS[file][1](path, name)
        state = state_of(model, name)
        state["warnings"] = [str(each.message) for each in caught if "pending" in str(each.message)]
        found[f"{moment}/{file}"] = state
        if MOMENTS[moment]:
            train(model, name, MOMENTS[moment], BATCHES)
            np.savez(f"{path}.end.npz", *model.get_weights())
    return found


if __name__ == "__main__":
    print(json.dumps(go_on(*sys.argv[1:])))
