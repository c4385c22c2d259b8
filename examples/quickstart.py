"""Train on micro-batches of 32 as if the batch were 256, and see that it is the same.

The data are scikit-learn's 1,797 handwritten digits, which come with the package.
"""

import argparse
import os
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tf_keras
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import ga_transform as ga


def load():
    """Images in [0, 1], [rows, 8, 8, 1], and labels, split for training and testing."""
    digits = load_digits()
    images = (digits.images / 16.0).astype("float32")[..., np.newaxis]
    return train_test_split(images, digits.target, test_size=360, random_state=0)


def build():
    """A small convolutional network, compiled as any other."""
    tf_keras.utils.set_random_seed(0)
    model = tf_keras.Sequential(
        [
            tf_keras.Input([8, 8, 1]),
            tf_keras.layers.Conv2D(32, 3, activation="relu", kernel_regularizer="l2"),
            tf_keras.layers.Flatten(),
            tf_keras.layers.Dense(64, activation="relu"),
            tf_keras.layers.Dense(10),
        ]
    )
    model.compile(
        optimizer=tf_keras.optimizers.Adam(3e-3),
        loss=tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def main():
    """Train both, compare them, save one and load it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10, help="epochs of training (default: 10)")
    epochs = parser.parse_args().epochs
    train_x, test_x, train_y, test_y = load()

    print(f"Plain tf_keras, batches of 256 of {len(train_x)} rows:")
    plain = build()
    plain.fit(train_x, train_y, batch_size=256, epochs=epochs, shuffle=False)

    print("\nConverted, micro-batches of 32, an update every 8:")
    model = ga.make_accumulating(build(), accum_steps=8)
    print(model.transforms)
    model.fit(train_x, train_y, batch_size=32, epochs=epochs, shuffle=False)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "digits.keras"
        model.save(path)
        reloaded = tf_keras.models.load_model(path)

    rows = [("plain, batch 256", plain), ("converted, 8 x 32", model), ("reloaded", reloaded)]
    print(f"\n{'':20}{'updates':>9}{'test accuracy':>15}{'largest difference of a weight':>33}")
    for name, each in rows:
        _, accuracy = each.evaluate(test_x, test_y, verbose=0)
        pairs = zip(each.get_weights(), plain.get_weights())
        difference = max(np.max(np.abs(ours - theirs)) for ours, theirs in pairs)
        print(f"{name:20}{int(each.optimizer.iterations):9}{accuracy:15.4f}{difference:33.1e}")
    print(f"\nReloaded as {type(reloaded).__name__}: {reloaded.transforms}")


if __name__ == "__main__":
    main()
