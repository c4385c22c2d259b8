"""Writes the files of one version, for all later ones to load: `python tests/golden/write.py`.

Run it once for each version that is published, on the oldest TensorFlow that it supports.
"""

import json
from pathlib import Path

import numpy as np
import tensorflow as tf
import tf_keras

import ga_transform as ga


def batch(number):
    rng = np.random.default_rng(number)
    return rng.normal(size=[3, 4]).astype("float32"), rng.normal(size=[3, 1]).astype("float32")


def build():
    inputs = tf_keras.Input([4])
    hidden = tf_keras.layers.Dense(3, "tanh", name="first")(inputs)
    model = tf_keras.Model(inputs, tf_keras.layers.Dense(1, name="second")(hidden))
    model.compile(tf_keras.optimizers.Adam(0.02), "mse")
    chain = [
        ga.Accumulate({0: 2, 1: 3}, weighting="equal", remainder="carry", on_nonfinite="window"),
        ga.ClipByAGC(
            0.5, eps=1e-2, exclude_head=False, exclude=("second/*",), axes={"first/kernel": (0,)}
        ),
        ga.ClipByGlobalNorm(2.0),
        ga.ClipByNorm(1.5),
        ga.ClipByValue(0.9),
        ga.Scale(0.75),
    ]
    return ga.make_accumulating(model, transforms=chain)


def write(folder):
    tf_keras.utils.set_random_seed(0)
    model = build()
    for number in range(4):  # the second of three in its window
        model.train_on_batch(*batch(number))
    model.save(folder / "model.keras")
    model.save(folder / "savedmodel", save_traces=False)
    model.save(folder / "model.h5")
    model.save_weights(folder / "w.weights.h5")
    tf.train.Checkpoint(model).write(str(folder / "checkpoint"))
    (folder / "chain.json").write_text(json.dumps(model.transforms.to_config(), indent=2) + "\n")
    found = {"chain": repr(model.transforms), "predictions": model(batch(9)[0]).numpy().tolist()}
    for number in range(4, 8):
        model.train_on_batch(*batch(number))
    found["end"] = [weight.tolist() for weight in model.get_weights()]
    (folder / "expected.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    target = Path(__file__).parent / ga.__version__
    target.mkdir()
    write(target)
