"""Segment images in a batch of 64 with the memory of a batch of 4, and the same weights.

A small U-Net tells what each pixel of a scene belongs to. It is trained twice, each time by a
process of its own, whose peak memory is measured: on plain batches of 64, and on the same
batches, cut into slices of 4 rows inside the graph.

    python examples/segmentation.py --updates 6

Scenes are put together of scikit-learn's handwritten digits, which come with the package, so
that the class of each pixel is known. Needs `resource`, which Windows does not have.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tf_keras
from sklearn.datasets import load_digits

import ga_transform as ga

BATCH, SLICE, SIDE = 64, 4, 96  # scenes, scenes, pixels a side
PLAIN, SLICED = "plain, 64", "64, in slices of 4"


def load(scenes):
    """Scenes, [scenes, 96, 96, 1], and their classes, [scenes, 96, 96]: 0, or 1 + the digit."""
    digits, rng = load_digits(), np.random.default_rng(0)
    images = np.zeros([scenes, SIDE, SIDE, 1], "float32")
    classes = np.zeros([scenes, SIDE, SIDE], "int32")
    for scene in range(scenes):
        for _ in range(12):
            index, (top, left) = rng.integers(len(digits.target)), rng.integers(SIDE - 16, size=2)
            digit = np.kron(digits.images[index] / 16.0, np.ones([2, 2]))
            place = (scene, slice(top, top + 16), slice(left, left + 16))
            images[place] = np.maximum(images[place], digit[..., np.newaxis])
            classes[place] = np.where(digit > 0.5, 1 + digits.target[index], classes[place])
    return images, classes


def build():
    """A U-Net of two levels, compiled as any other."""
    tf_keras.utils.set_random_seed(0)
    layers = tf_keras.layers

    def convolved(x, filters):
        for _ in range(2):
            x = layers.Conv2D(filters, 3, padding="same", activation="relu")(x)
        return x

    inputs = tf_keras.Input([SIDE, SIDE, 1])
    fine = convolved(inputs, 16)
    coarse = convolved(layers.MaxPooling2D()(fine), 32)
    joined = layers.Concatenate()([layers.UpSampling2D()(coarse), fine])
    model = tf_keras.Model(inputs, layers.Conv2D(11, 1)(convolved(joined, 16)))
    model.compile(
        optimizer=tf_keras.optimizers.Adam(1e-3),
        loss=tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def megabytes():
    """The most memory that this process has ever had."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def train(way, updates, path):
    """What each process does."""
    model = build()
    if way == SLICED:
        model = ga.make_accumulating(model, micro_batch_size=SLICE)
    images, classes = load(BATCH * updates)
    before = megabytes()
    model.fit(images, classes, batch_size=BATCH, shuffle=False, verbose=0)
    memory = before, megabytes()
    np.savez(path, memory, int(model.optimizer.iterations), *model.get_weights())


def main():
    """Train both ways, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=6, help="batches of 64 (default: 6)")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        way, path = arguments.child
        train(way, arguments.updates, path)
        return

    print(f"{'':20}{'updates':>9}{'MB before':>11}{'MB at most':>12}{'difference of weights':>23}")
    reference = None
    for way in (PLAIN, SLICED):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trained.npz"
            command = [sys.executable, __file__, "--updates", str(arguments.updates), "--child"]
            subprocess.run([*command, way, path], check=True)
            with np.load(path) as file:
                (before, peak), updates, *weights = (file[name] for name in file.files)
        reference = reference or weights
        difference = max(np.max(np.abs(ours - other)) for ours, other in zip(weights, reference))
        print(f"{way:20}{updates:9}{before:11.0f}{peak:12.0f}{difference:23.1e}", flush=True)


if __name__ == "__main__":
    main()
