"""Segment with the Dice of a batch of 64, in slices of 4, and end with the same weights.

A small network marks the zeros in scenes of digits. Most scenes have none, so Dice is taken of all
pixels of the batch together: twice what is marked rightly, by what is marked and what is there. A
slice of 4 often has no zero, and the mean of 16 slices' Dice is another thing than the batch's.
`whole_batch_loss=True` takes the batch's.

    python examples/dice.py --updates 120

Scenes are put together of scikit-learn's handwritten digits, which come with the package, so
that the class of each pixel is known.
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow as tf
import tf_keras
from sklearn.datasets import load_digits

import ga_transform as ga

BATCH, SLICE, SIDE = 64, 4, 16  # scenes, scenes, pixels a side
TRAINED = 1437  # digits; the others are in the scenes that are held out


def load(scenes, of_digits, seed):
    """Scenes of 3 digits, and which pixels are a zero's; both [scenes, 16, 16, 1]."""
    digits, rng = load_digits(), np.random.default_rng(seed)
    images, marks = np.zeros([2, scenes, SIDE, SIDE, 1], "float32")
    for scene in range(scenes):
        for corner in rng.permutation(4)[:3]:
            index = rng.integers(of_digits.start, of_digits.stop)
            digit = digits.images[index][..., np.newaxis] / 16.0
            top, left = np.array([corner // 2, corner % 2]) * 7 + rng.integers(2, size=2)
            place = (scene, slice(top, top + 8), slice(left, left + 8))
            images[place] = np.maximum(images[place], digit)
            marks[place] = np.where(digit > 0.4, digits.target[index] == 0, marks[place])
    return images, marks


def dice_loss(y_true, y_pred):
    """1 - Dice of the batch; the ones are for batches in which there is nothing to mark."""
    overlap = 2 * tf.reduce_sum(y_true * y_pred)
    return 1 - (overlap + 1) / (tf.reduce_sum(y_true) + tf.reduce_sum(y_pred) + 1)


def build():
    """A small U-Net, compiled as any other."""
    tf_keras.utils.set_random_seed(0)
    layers = tf_keras.layers

    def convolved(x, filters, side):
        # Smooth, since a kink that rounding crosses leads plain training elsewhere, too.
        return layers.Conv2D(filters, side, padding="same", activation="swish")(x)

    inputs = tf_keras.Input([SIDE, SIDE, 1])
    fine = convolved(inputs, 8, 3)
    coarse = convolved(convolved(layers.AveragePooling2D()(fine), 32, 5), 32, 3)
    joined = layers.Concatenate()([layers.UpSampling2D()(coarse), fine])
    outputs = layers.Conv2D(1, 1, activation="sigmoid")(convolved(joined, 16, 3))
    model = tf_keras.Model(inputs, outputs)
    model.compile(tf_keras.optimizers.Adam(0.003), dice_loss)
    return model


def dice(model, images, marks):
    """Dice of the pixels that a model marks, of all scenes together."""
    marked = model.predict(images, verbose=0) > 0.5
    return 2 * np.sum(marks * marked) / (np.sum(marks) + np.sum(marked))


def main():
    """Train all ways, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=120, help="updates (default: 120)")
    arguments = parser.parse_args()
    images, marks = load(BATCH * arguments.updates, range(TRAINED), seed=0)
    held_out = load(512, range(TRAINED, 1797), seed=1)
    with_zero = marks.any((1, 2, 3))
    slices = with_zero.reshape(-1, SLICE).any(1)
    print(
        f"Without a zero: {1 - with_zero.mean():.0%} of scenes, {1 - slices.mean():.0%} of slices\n"
    )

    ways = {
        "plain, 64": {},
        "slices of 4": {"micro_batch_size": SLICE},
        "slices of 4, whole batch": {"micro_batch_size": SLICE, "whole_batch_loss": True},
    }
    print(f"{'':26}{'updates':>9}{'Dice':>10}{'largest difference of a weight':>32}")
    reference = None
    for way, how in ways.items():
        model = build()
        model = ga.make_accumulating(model, **how) if how else model
        model.fit(images, marks, batch_size=BATCH, shuffle=False, verbose=0)
        weights, updates = model.get_weights(), int(model.optimizer.iterations)
        reference = reference or weights
        difference = max(np.max(np.abs(a - b)) for a, b in zip(weights, reference))
        found = dice(model, *held_out)
        print(f"{way:26}{updates:9}{found:10.3f}{difference:32.1e}", flush=True)


if __name__ == "__main__":
    main()
