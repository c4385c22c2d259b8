"""Train with batch normalisation on micro-batches of 8 as for a batch of 128, by each choice.

The data are scikit-learn's 1,797 handwritten digits, which come with the package.
"""

import argparse
import os
import warnings

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
    """A small convolutional network, whose first layer normalises the images, pixel by pixel."""
    tf_keras.utils.set_random_seed(0)
    model = tf_keras.Sequential(
        [
            tf_keras.Input([8, 8, 1]),
            tf_keras.layers.BatchNormalization(axis=[1, 2, 3], momentum=0.9),
            tf_keras.layers.Conv2D(16, 3, use_bias=False),
            tf_keras.layers.BatchNormalization(momentum=0.9),
            tf_keras.layers.ReLU(),
            tf_keras.layers.Flatten(),
            tf_keras.layers.Dense(32, use_bias=False),
            tf_keras.layers.BatchNormalization(momentum=0.9),
            tf_keras.layers.ReLU(),
            tf_keras.layers.Dense(10),
        ]
    )
    return compiled(model)


def compiled(model):
    """A model, compiled as any other."""
    model.compile(
        optimizer=tf_keras.optimizers.Adam(3e-3),
        loss=tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def copied(model, *, normalization_is_trainable=True):
    """A plain model with the weights of another, to be trained further."""
    copy = tf_keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    for layer in copy.layers:
        if isinstance(layer, tf_keras.layers.BatchNormalization):
            layer.trainable = normalization_is_trainable
    return compiled(copy)


def converted(model, batch_norm):
    """A model that cuts each batch into slices of 8 rows."""
    with warnings.catch_warnings():
        # "keep" warns that updates are not those of the large batch: here this is to be seen.
        warnings.simplefilter("ignore", ga.InexactWarning)
        return ga.make_accumulating(model, micro_batch_size=8, batch_norm=batch_norm)


def first_statistics(model):
    """The moving statistics of the first layer: of the images alone, whatever the weights are."""
    return [model.layers[0].moving_mean.numpy(), model.layers[0].moving_variance.numpy()]


def print_table(models, test, what, arrays_of):
    """What has become of models, each compared with the first."""
    print(f"\n{'':33}{'updates':>8}{'test accuracy':>15}{'test loss':>11}{what:>33}")
    reference = arrays_of(next(iter(models.values())))
    for name, model in models.items():
        loss, accuracy = model.evaluate(*test, verbose=0)
        pairs = zip(arrays_of(model), reference)
        difference = max(np.max(np.abs(ours - theirs)) for ours, theirs in pairs)
        updates = int(model.optimizer.iterations)
        print(f"{name:33}{updates:8}{accuracy:15.4f}{loss:11.4f}{difference:33.1e}")


def main():
    """Train from scratch by all choices but one, then fine-tune by that one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10, help="epochs of training (default: 10)")
    epochs = parser.parse_args().epochs
    train_x, test_x, train_y, test_y = load()

    def fit(model, images, batch_size=128):
        # Not shuffled, so that all models see the same rows in the same order.
        model.fit(images, train_y, batch_size=batch_size, epochs=epochs, shuffle=False, verbose=0)
        return model

    print(
        f"From scratch ({epochs} x {len(train_x)} rows); converted: batches of 128, in slices of 8"
    )
    plain = fit(build(), train_x)
    models = {
        "plain, batch 128": plain,
        "plain, batch 8": fit(build(), train_x, batch_size=8),
        "converted, keep": fit(converted(build(), "keep"), train_x),
        "converted, momentum": fit(converted(build(), "momentum"), train_x),
        "converted, pooled": fit(converted(build(), "pooled"), train_x),
    }
    difference = "difference of first statistics"
    print_table(models, (test_x, test_y), difference, first_statistics)

    # "freeze" normalises by the moving statistics as they are. In a model that is just made these
    # are mean 0 and variance 1: nothing would be normalised. It is for a model that is trained
    # already. No row is then normalised by another, and updates are those of the large batch.
    print(f"\nThe first of them, fine-tuned on mirrored images ({epochs} x {len(train_x)} rows)")
    mirrored_x, mirrored_test_x = train_x[:, :, ::-1], test_x[:, :, ::-1]
    frozen = ga.BatchNorm("freeze", trainable=False)  # gamma and beta rest, too
    models = {
        "plain, batch 128, layers frozen": fit(
            copied(plain, normalization_is_trainable=False), mirrored_x
        ),
        "converted, freeze, not trainable": fit(converted(copied(plain), frozen), mirrored_x),
        "converted, freeze": fit(converted(copied(plain), "freeze"), mirrored_x),
        "converted, pooled": fit(converted(copied(plain), "pooled"), mirrored_x),
        "not fine-tuned": copied(plain),
    }
    print_table(
        models,
        (mirrored_test_x, test_y),
        "largest difference of a weight",
        lambda model: model.get_weights(),
    )
    print(f"\nOne row of the {len(test_y)} for testing is {1 / len(test_y):.4f} of accuracy.")


if __name__ == "__main__":
    main()
