"""Train images without normalisation layers at a large learning rate: adaptive gradient clipping.

Each unit's gradient is clipped to a share of the norm of its weights (Brock et al., 2021). That
belongs to the update, not to a micro-batch: with micro-batches of 32, an update every 8, weights
end where clipping the gradients of batches of 256 leads.

    python examples/image_classification.py --epochs 10

The data are scikit-learn's 1,797 handwritten digits, which come with the package.
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tf_keras
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import ga_transform as ga

SMALL, LARGE = 0.05, 0.5  # learning rates
AGC = ga.ClipByAGC(0.01)


def load():
    """Images in [0, 1], [rows, 8, 8, 1], and labels, split for training and testing."""
    digits = load_digits()
    images = (digits.images / 16.0).astype("float32")[..., np.newaxis]
    return train_test_split(images, digits.target, test_size=360, random_state=0)


def build(learning_rate):
    """A small convolutional network that normalises nothing, compiled as any other."""
    tf_keras.utils.set_random_seed(0)
    layers = [tf_keras.Input([8, 8, 1])]
    layers += [
        tf_keras.layers.Conv2D(24, 3, activation="relu", kernel_initializer="he_normal")
        for _ in range(3)
    ]
    layers += [tf_keras.layers.Flatten(), tf_keras.layers.Dense(10)]
    model = tf_keras.Sequential(layers)
    model.compile(
        optimizer=tf_keras.optimizers.SGD(learning_rate, momentum=0.9),
        loss=tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def main():
    """Train with and without clipping, in large batches and in micro-batches, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10, help="epochs of training (default: 10)")
    epochs = parser.parse_args().epochs
    train_x, test_x, train_y, test_y = load()

    def fit(model, batch_size):
        # Not shuffled, so that all models see the same rows in the same order.
        model.fit(train_x, train_y, batch_size=batch_size, epochs=epochs, shuffle=False, verbose=0)
        return model

    clipped = ga.make_accumulating(build(LARGE), accum_steps=8, agc=AGC)
    print(clipped.transforms)
    models = {
        f"plain, 256, rate {SMALL}": fit(build(SMALL), 256),
        f"plain, 256, rate {LARGE}": fit(build(LARGE), 256),
        f"AGC, 256, rate {LARGE}": fit(ga.make_accumulating(build(LARGE), agc=AGC), 256),
        f"AGC, 8 x 32, rate {LARGE}": fit(clipped, 32),
    }
    print(f"\n{'':24}{'updates':>9}{'test accuracy':>15}{'difference from AGC, 256':>26}")
    reference = models[f"AGC, 256, rate {LARGE}"].get_weights()
    for name, model in models.items():
        _, accuracy = model.evaluate(test_x, test_y, verbose=0)
        pairs = zip(model.get_weights(), reference)
        difference = max(np.max(np.abs(ours - theirs)) for ours, theirs in pairs)
        updates = int(model.optimizer.iterations)
        print(f"{name:24}{updates:9}{accuracy:15.4f}{difference:26.1e}")


if __name__ == "__main__":
    main()
