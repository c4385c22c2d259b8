"""A gradient transform of one's own: a spec, a function, and it saves like the others.

Gradient centralisation (Yong et al., 2020) takes from each unit's gradient its mean.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import tempfile
from pathlib import Path

import attrs
import tensorflow as tf
import tf_keras
from sklearn.datasets import load_diabetes

import ga_transform as ga


@attrs.frozen
class Centralize(ga.Transform):
    """Take the mean over all axes but the last from gradients of at least `min_rank`."""

    min_rank: int = 2


@ga.register_transform(Centralize, package="my_lab")
def centralize(spec, gradients, variables, model):
    """Centralise what is dense and of enough rank; leave the rest as it is."""

    def centralized(gradient):
        if isinstance(gradient, tf.IndexedSlices) or gradient.shape.rank < spec.min_rank:
            return gradient
        axes = list(range(gradient.shape.rank - 1))
        return gradient - tf.reduce_mean(gradient, axis=axes, keepdims=True)

    return [centralized(gradient) for gradient in gradients]


def main():
    """Train with it, save, load."""
    x, y = load_diabetes(return_X_y=True)
    tf_keras.utils.set_random_seed(0)
    model = tf_keras.Sequential(
        [
            tf_keras.Input([10]),
            tf_keras.layers.Dense(32, activation="relu"),
            tf_keras.layers.Dense(1),
        ]
    )
    model.compile("adam", "mae")
    model = ga.make_accumulating(
        model, transforms=[ga.Accumulate(4), Centralize(), ga.ClipByGlobalNorm(5.0)]
    )
    model.fit(x, y, batch_size=32, epochs=3)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.keras"
        model.save(path)
        print(tf_keras.models.load_model(path).transforms)


if __name__ == "__main__":
    main()
