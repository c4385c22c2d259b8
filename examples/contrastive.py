"""Learn images without labels in batches of 256, in slices of 8, and end with the same weights.

Each image is shown in two views: turned, moved, lighter or darker (SimCLR). The loss, NT-Xent, asks
of each view which of all others in the batch is of the same image. So rows see each other, and a
slice of 8 is an easier question than a batch of 256. `whole_batch_loss=True` asks the batch's.

    python examples/contrastive.py --epochs 16

The digits come with scikit-learn. What was learned is judged by a linear classifier that sees the
labels of 100 images. After Chen et al. 2020, "A Simple Framework for Contrastive Learning of
Visual Representations".
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow as tf
import tf_keras
from scipy import ndimage
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

import ga_transform as ga

BATCH, SLICE, TRAINED, LABELLED = 256, 8, 1437, 100  # images
TEMPERATURE = 0.2


def view(image, rng):
    """An image, [8, 8], turned, moved, lighter or darker."""
    angle, middle = np.radians(rng.uniform(-25, 25)), np.array([3.5, 3.5])
    turn = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    turn = rng.uniform(0.8, 1.2) * np.array(turn)
    offset = middle - turn @ middle + rng.uniform(-1, 1, size=2)
    turned = ndimage.affine_transform(image, turn, offset, order=1)
    return turned * rng.uniform(0.6, 1.4) + rng.normal(scale=0.1, size=[8, 8])


def dataset(images, epochs):
    """Batches of pairs of views, [rows, 2, 8, 8]: others each epoch, the same for all ways."""
    rng = np.random.default_rng(0)
    orders = [rng.permutation(len(images)) for _ in range(epochs)]
    pairs = [[view(images[index], rng) for _ in range(2)] for index in np.concatenate(orders)]
    return tf.data.Dataset.from_tensor_slices(np.array(pairs, "float32")).batch(BATCH)


class SimCLR(tf_keras.Model):
    """A model of pairs of views, with a loss of its own: NT-Xent."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        """The cross-entropy of finding a view's other one among all views of the batch."""
        rows = tf.shape(y_pred)[0]
        views = tf.math.l2_normalize(tf.concat([y_pred[:, 0], y_pred[:, 1]], 0), 1)
        scores = tf.matmul(views, views, transpose_b=True) / TEMPERATURE
        scores -= 1e9 * tf.eye(2 * rows)  # no view is its own other
        other = tf.concat([tf.range(rows, 2 * rows), tf.range(rows)], 0)
        return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(other, scores))


def build():
    """An encoder of images, and the model that trains it."""
    tf_keras.utils.set_random_seed(0)
    layers = tf_keras.layers
    encoder = tf_keras.Sequential(
        [
            tf_keras.Input([8, 8]),
            layers.Reshape([8, 8, 1]),
            layers.Rescaling(6.0),
            # Smooth, since a kink that rounding crosses leads plain training elsewhere, too.
            layers.Conv2D(16, 3, padding="same", activation="swish"),
            layers.AveragePooling2D(),
            layers.Conv2D(32, 3, padding="same", activation="swish"),
            layers.Flatten(),
            layers.Dense(64, activation="swish"),
        ]
    )
    head, pairs = layers.Dense(32), tf_keras.Input([2, 8, 8])
    first, second = (head(encoder(pairs[:, index])) for index in range(2))
    model = SimCLR(pairs, layers.Lambda(lambda both: tf.stack(both, 1))([first, second]))
    model.compile(tf_keras.optimizers.Adam(0.005, epsilon=1e-5))
    return encoder, model


def accuracy(encoder, images, labels):
    """Of a linear classifier of embeddings, on images that nothing was trained with."""
    embeddings = encoder.predict(images, verbose=0)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    classifier = LogisticRegression(max_iter=1000).fit(embeddings[:LABELLED], labels[:LABELLED])
    return classifier.score(embeddings[TRAINED:], labels[TRAINED:])


def main():
    """Train all ways, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=16, help="epochs (default: 16)")
    arguments = parser.parse_args()
    digits = load_digits()
    images = digits.images / 16.0
    data = dataset(images[:TRAINED], arguments.epochs)

    ways = {
        "plain, 256": {},
        "slices of 8": {"micro_batch_size": SLICE},
        "slices of 8, whole batch": {"micro_batch_size": SLICE, "whole_batch_loss": True},
    }
    print(f"Accuracy before training: {accuracy(build()[0], images, digits.target):.3f}\n")
    print(f"{'':26}{'updates':>9}{'accuracy':>10}{'largest difference of a weight':>32}")
    reference = None
    for way, how in ways.items():
        encoder, model = build()
        model = ga.make_accumulating(model, **how, inplace=True) if how else model
        model.fit(data, verbose=0)
        weights, updates = model.get_weights(), int(model.optimizer.iterations)
        reference = reference or weights
        difference = max(np.max(np.abs(a - b)) for a, b in zip(weights, reference))
        found = accuracy(encoder, images, digits.target)
        print(f"{way:26}{updates:9}{found:10.3f}{difference:32.1e}", flush=True)


if __name__ == "__main__":
    main()
