"""Train with accumulation in float32, float16 and bfloat16, and see that it ends the same.

The data are scikit-learn's 1,797 handwritten digits, which come with the package.
"""

import argparse
import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow as tf
import tf_keras
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import ga_transform as ga

PRECISIONS = {
    "float32": None,
    # So short a run sees the loss scale move only if it may grow sooner than after 2,000 updates.
    "float16": ga.Precision("mixed_float16", growth_steps=25),
    "bfloat16": "mixed_bfloat16",
}


def load():
    """Images in [0, 1], [rows, 8, 8, 1], and labels, split for training and testing."""
    digits = load_digits()
    images = (digits.images / 16.0).astype("float32")[..., np.newaxis]
    return train_test_split(images, digits.target, test_size=360, random_state=0)


def build(seed):
    """A small convolutional network in float32, compiled as any other."""
    tf_keras.utils.set_random_seed(seed)
    model = tf_keras.Sequential(
        [
            tf_keras.Input([8, 8, 1]),
            tf_keras.layers.Conv2D(32, 3, activation="relu"),
            tf_keras.layers.Conv2D(32, 3, activation="relu"),
            tf_keras.layers.Flatten(),
            tf_keras.layers.Dense(64, activation="relu"),
            tf_keras.layers.Dense(10),
        ]
    )
    model.compile(
        optimizer=tf_keras.optimizers.Adam(2e-3),
        loss=tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


class Clock(tf_keras.callbacks.Callback):
    """Notes the seconds of each epoch."""

    def __init__(self):
        super().__init__()
        self.seconds = []

    def on_epoch_begin(self, epoch, logs=None):
        """Start."""
        self._start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        """Stop."""
        self.seconds.append(time.perf_counter() - self._start)


def main():
    """Train models of each precision from the same seeds, and compare them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10, help="epochs, from 2 on (default: 10)")
    parser.add_argument("--seeds", type=int, default=4, help="models a precision (default: 4)")
    arguments = parser.parse_args()
    if arguments.epochs < 2 or arguments.seeds < 1:
        parser.error(
            "2 epochs at least (the first, in which graphs are made, is not timed), 1 seed"
        )
    train_x, test_x, train_y, test_y = load()

    models = {name: [] for name in PRECISIONS}
    seconds = {name: [] for name in PRECISIONS}
    for seed in range(arguments.seeds):
        for name, precision in PRECISIONS.items():
            model = ga.make_accumulating(build(seed), accum_steps=4, precision=precision)
            clock = Clock()
            model.fit(
                train_x,
                train_y,
                batch_size=32,
                epochs=arguments.epochs,
                callbacks=[clock],
                verbose=0,
            )
            models[name].append(model)
            seconds[name] += clock.seconds[1:]
            print(f"seed {seed}: {model.transforms}")

    print(f"\n{'':10}{'updates':>9}{'skipped':>9}{'test accuracy':>19}{'test loss':>19}{'time':>8}")
    for name, group in models.items():
        updates = sum(int(model.optimizer.iterations) for model in group)
        skipped = sum(model.skipped_windows for model in group)
        results = [model.evaluate(test_x, test_y, verbose=0) for model in group]
        (loss, accuracy), spreads = np.mean(results, axis=0), np.std(results, axis=0)
        ratio = np.median(seconds[name]) / np.median(seconds["float32"])
        print(
            f"{name:10}{updates:9}{skipped:9}{accuracy:10.4f} +- {spreads[1]:.4f}"
            f"{loss:10.4f} +- {spreads[0]:.4f}{ratio:7.1f}x"
        )

    scales = [f"{float(model.optimizer.loss_scale):.0f}" for model in models["float16"]]
    print(f"\nLoss scales of float16 at the end, from 32768 on: {', '.join(scales)}")
    layers = [
        f"{type(layer).__name__} {layer.compute_dtype}" for layer in models["float16"][-1].layers
    ]
    print(f"Layers of float16: {', '.join(layers)}")
    if not tf.config.list_physical_devices("GPU"):
        print(
            "Times are those of a CPU. 16 bits are made for GPUs and TPUs: a CPU that does not "
            "compute in them converts every number, and takes longer."
        )


if __name__ == "__main__":
    main()
