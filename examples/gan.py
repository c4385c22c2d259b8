"""Train a GAN with two optimizers and a `train_step` of its own, on micro-batches.

Converted in place, the object stays of its class, and each optimizer has windows and counts
updates of its own. A step that takes all its gradients before it applies any ends where batches
of 256 lead. A step whose generator looks at a discriminator that has just been updated cannot:
it sees that update in the window's last micro-batch only, where the large batch would see it in
all. Cut into slices, it sees none: weights move when all slices are done.

    python examples/gan.py --epochs 10

The data are scikit-learn's 1,797 handwritten digits, which come with the package. Noise is part
of the data here, so that all models are given the same.
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow as tf
import tf_keras
from sklearn.datasets import load_digits

import ga_transform as ga


class GAN(tf_keras.Model):
    """A generator of images and a discriminator, each with its optimizer."""

    def __init__(self, *, in_turn):
        super().__init__()
        self.in_turn = in_turn
        dense = tf_keras.layers.Dense
        self.generator = tf_keras.Sequential(
            [tf_keras.Input([16]), dense(128, "relu"), dense(64, "sigmoid")]
        )
        self.discriminator = tf_keras.Sequential(
            [tf_keras.Input([64]), dense(128, tf.nn.leaky_relu), dense(1)]
        )

    def compile(self, generator_optimizer, discriminator_optimizer):
        """As any model's, with two optimizers."""
        super().compile()
        self.generator_optimizer = generator_optimizer
        self.discriminator_optimizer = discriminator_optimizer
        self.cross_entropy = tf_keras.losses.BinaryCrossentropy(from_logits=True)

    def generator_loss(self, noise):
        """How surely generated images are told apart."""
        scores = self.discriminator(self.generator(noise))
        return self.cross_entropy(tf.ones_like(scores), scores)

    def discriminator_loss(self, images, noise):
        """How badly they are."""
        scores = self.discriminator(images)
        generated = self.discriminator(self.generator(noise))
        return 0.5 * self.cross_entropy(tf.ones_like(scores), scores) + 0.5 * self.cross_entropy(
            tf.zeros_like(generated), generated
        )

    def train_step(self, data):
        """A step of both, as somebody wrote it who knew of no micro-batches."""
        images, noise = data
        with tf.GradientTape() as tape:
            discriminator_loss = self.discriminator_loss(images, noise)
        variables = self.discriminator.trainable_variables
        of_discriminator = zip(tape.gradient(discriminator_loss, variables), variables)
        if self.in_turn:
            self.discriminator_optimizer.apply_gradients(of_discriminator)
        with tf.GradientTape() as tape:
            generator_loss = self.generator_loss(noise)
        variables = self.generator.trainable_variables
        of_generator = zip(tape.gradient(generator_loss, variables), variables)
        if not self.in_turn:
            self.discriminator_optimizer.apply_gradients(of_discriminator)
        self.generator_optimizer.apply_gradients(of_generator)
        return {"discriminator": discriminator_loss, "generator": generator_loss}


def load(epochs):
    """Images in [0, 1], [rows, 64], again and again, and as many rows of new noise, [rows, 16]."""
    images = np.tile((load_digits().data / 16.0).astype("float32"), [epochs, 1])
    return images, np.random.default_rng(0).normal(size=[len(images), 16]).astype("float32")


def build(*, in_turn=False):
    """A GAN, compiled as its class would have it."""
    tf_keras.utils.set_random_seed(0)
    model = GAN(in_turn=in_turn)
    adam = tf_keras.optimizers.Adam
    model.compile(adam(1e-3, beta_1=0.5), adam(1e-3, beta_1=0.5))
    return model


def main():
    """Train each kind of step in batches of 256 and on micro-batches of 32, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10, help="epochs of training (default: 10)")
    images, noise = load(parser.parse_args().epochs)

    def fit(model, batch_size=256):
        model.fit(images, noise, batch_size=batch_size, shuffle=False, verbose=0)
        return model

    def converted(model, **how):
        return ga.make_accumulating(model, inplace=True, **how)

    plain, plain_in_turn = fit(build()), fit(build(in_turn=True))
    windows = fit(converted(build(), accum_steps=8), 32)
    slices = fit(converted(build(), micro_batch_size=32))
    windows_in_turn = fit(converted(build(in_turn=True), accum_steps=8), 32)
    slices_in_turn = fit(converted(build(in_turn=True), micro_batch_size=32))

    print("Updates: of the generator (G), of the discriminator (D). Difference: the largest of a")
    print(
        f"weight from the large batch of the same step.\n\n{'':33}{'G':>6}{'D':>6}{'difference':>12}"
    )
    for name, model, reference in (
        ("gradients first, 256", plain, plain),
        ("gradients first, 8 x 32", windows, plain),
        ("gradients first, slices of 32", slices, plain),
        ("in turn, 256", plain_in_turn, plain_in_turn),
        ("in turn, 8 x 32", windows_in_turn, plain_in_turn),
        ("in turn, slices of 32", slices_in_turn, plain),
    ):
        optimizers = model.generator_optimizer, model.discriminator_optimizer
        counts = "".join(f"{int(optimizer.iterations):6}" for optimizer in optimizers)
        pairs = zip(model.get_weights(), reference.get_weights())
        difference = max(np.max(np.abs(ours - theirs)) for ours, theirs in pairs)
        print(f"{name:33}{counts}{difference:12.1e}")


if __name__ == "__main__":
    main()
