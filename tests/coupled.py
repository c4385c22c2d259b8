"""Losses that couple the rows of a batch, each with the targets that it takes."""

import numpy as np
import tensorflow as tf
import tf_keras


def in_batch_softmax(y_true, y_pred):
    """Retrieval: each row's own target against those of all other rows."""
    scores = tf.matmul(tf.nn.l2_normalize(y_pred, 1), tf.nn.l2_normalize(y_true, 1), False, True)
    own = tf.range(tf.shape(scores)[0])
    return tf.nn.sparse_softmax_cross_entropy_with_logits(own, scores / 0.1)


def dice(y_true, y_pred):
    """One minus the overlap of all rows together."""
    overlap = tf.reduce_sum(y_true * tf.sigmoid(y_pred))
    return 1 - 2 * overlap / tf.reduce_sum(y_true**2 + tf.sigmoid(y_pred) ** 2)


def jaccard(y_true, y_pred):
    p = tf.sigmoid(y_pred)
    overlap = tf.reduce_sum(y_true * p, 0)
    return 1 - tf.reduce_mean(overlap / (tf.reduce_sum(y_true**2 + p, 0) - overlap))


def correlation(y_true, y_pred):
    """Pearson's, over the rows."""
    a, b = y_true - tf.reduce_mean(y_true, 0), y_pred - tf.reduce_mean(y_pred, 0)
    norms = tf.norm(a, axis=0) * tf.norm(b, axis=0)
    return -tf.reduce_mean(tf.reduce_sum(a * b, 0) / norms)


def trimmed(y_true, y_pred):
    """The mean of the larger half of the errors: a quantile of the batch decides."""
    errors = tf.sort(tf.reduce_sum((y_true - y_pred) ** 2, 1))
    return tf.reduce_mean(errors[tf.shape(errors)[0] // 2 :])


def ranking(y_true, y_pred):
    """A hinge over all pairs of rows that stand in the wrong order."""
    gaps = y_pred[:, tf.newaxis] - y_pred[tf.newaxis]
    is_above = tf.cast(y_true[:, tf.newaxis] > y_true[tf.newaxis], y_pred.dtype)
    return tf.reduce_sum(is_above * tf.nn.relu(1 - gaps)) / tf.reduce_sum(is_above)


def decorrelation(y_true, y_pred):
    """The covariance of the outputs away from its diagonal, as in Barlow twins."""
    centred = y_pred - tf.reduce_mean(y_pred, 0)
    covariance = tf.matmul(centred, centred, transpose_a=True)
    return tf.reduce_sum((covariance - tf.linalg.diag(tf.linalg.diag_part(covariance))) ** 2)


class ByVariance(tf_keras.losses.Loss):
    """Squared errors in units of the targets' variance in the batch."""

    def call(self, y_true, y_pred):
        return tf.reduce_mean((y_true - y_pred) ** 2, 1) / tf.math.reduce_variance(y_true)


def _numbers(rng, rows):
    return rng.normal(size=[rows, 3])


def _marks(rng, rows):
    return rng.integers(0, 2, size=[rows, 3]).astype(float)


#: By name: a function that makes the loss, and one that makes targets.
LOSSES = {
    "in-batch softmax": (lambda: in_batch_softmax, _numbers),
    "dice": (lambda: dice, _marks),
    "jaccard": (lambda: jaccard, _marks),
    "correlation": (lambda: correlation, _numbers),
    "trimmed": (lambda: trimmed, _numbers),
    "ranking": (lambda: ranking, _numbers),
    "decorrelation": (lambda: decorrelation, _numbers),
    "by variance": (ByVariance, _numbers),
    "by variance, summed": (lambda: ByVariance(reduction="sum"), _numbers),
    "by variance, of rows": (lambda: ByVariance(reduction="none"), _numbers),
}


def batches(targets, rows, seed=0, with_weights=False):
    """Batches of so many rows each: inputs of 5 numbers, targets, and weights of rows."""
    rng = np.random.default_rng(seed)
    made = [(rng.normal(size=[count, 5]), targets(rng, count)) for count in rows]
    return [(*batch, rng.random(len(batch[0]))) if with_weights else batch for batch in made]
