"""The loss of a whole batch on replicas: of the rows of each, or of all of them gathered."""

import cases
import coupled
import feeding
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from tf_keras import layers

pytestmark = pytest.mark.usefixtures("float64")

ROWS = 2


def make(loss=coupled.in_batch_softmax, **arguments):
    inputs = tf_keras.Input([5])
    hidden = layers.Dense(4, "tanh", kernel_regularizer="l2", activity_regularizer="l2")(inputs)
    model = tf_keras.Model(inputs, layers.Dense(3)(hidden))
    model.compile(tf_keras.optimizers.Adam(0.05), loss, **arguments)
    return model


def batch(rng, rows):
    return rng.normal(size=[rows, 5]), rng.normal(size=[rows, 3])


def train(strategy, shape, way, make=make):
    """A converted model on the replicas, and a plain one of the same weights; and what to feed."""
    plain = make()
    model = feeding.convert(strategy, feeding.mirrored(strategy, make, plain), **way)
    windows = feeding.make_windows(batch, feeding.rows_of(strategy, shape, steps=(1, 1, 1)))
    start = cases.weights_of(plain)
    logs = feeding.fit(strategy, model, windows)
    return model, plain, windows, start, logs


@pytest.mark.parametrize("shape", ["equal", "uneven"])
@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "sum"])
def test_gathered_rows_are_one_batch(strategy, shape, reduction):
    """As plain tf_keras on one device, on the rows of all replicas, whatever the loss."""

    def make_one(**arguments):
        return make(coupled.ByVariance(reduction=reduction), **arguments)

    way = {"micro_batch_size": ROWS, "whole_batch_loss": "gathered"}
    model, plain, windows, start, logs = train(strategy, shape, way, make_one)
    expected = feeding.fit_plain(plain, windows)
    cases.assert_same_weights(model, plain, start, 1e-9)
    np.testing.assert_allclose(logs["loss"], expected["loss"], rtol=1e-9)


def test_gathered_softmax(strategy):
    """Contrastive training against the items of all replicas."""
    way = {"micro_batch_size": ROWS, "whole_batch_loss": "gathered"}
    model, plain, windows, start, _ = train(strategy, "uneven", way)
    feeding.fit_plain(plain, windows)
    cases.assert_same_weights(model, plain, start, 1e-9)


def test_each_replica_its_own_rows(strategy):
    """As the mean of the losses that each replica has of its own rows, weighed by these."""
    way = {"micro_batch_size": ROWS, "whole_batch_loss": True}
    model, plain, windows, start, _ = train(strategy, "uneven", way)
    optimizer = plain.optimizer
    for ((*of_replicas,),) in windows:
        with tf.GradientTape() as tape:
            parts = []
            for x, y in of_replicas:
                loss = tf.reduce_mean(coupled.in_batch_softmax(y, plain(x)))
                parts.append((loss + plain.losses[0]) * len(x))  # the activity's, of its rows
            loss = tf.add_n(parts) / sum(len(x) for x, _ in of_replicas) + plain.losses[1]
        variables = plain.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables))
    cases.assert_same_weights(model, plain, start, 1e-9)


def test_strings_are_not_gathered(strategy):
    """What replicas cannot send each other is refused in words."""

    def make_named():
        inputs = tf_keras.Input([5])
        names = layers.Lambda(lambda x: tf.as_string(x[:, 0]))(inputs)
        model = tf_keras.Model(inputs, [layers.Dense(3)(inputs), names])
        model.compile("sgd", [coupled.in_batch_softmax, None])
        return model

    with strategy.scope():
        model = make_named()
    model = feeding.convert(
        strategy, model, micro_batch_size=ROWS, whole_batch_loss="gathered", inplace=True
    )
    windows = feeding.make_windows(batch, feeding.rows_of(strategy, "equal", steps=(1,)))
    with pytest.raises(TypeError, match="must see dense tensors of numbers"):
        feeding.fit(strategy, model, windows)


def test_replicas_draw_differently(strategy):
    """Rows that are alike are masked each in its own way, also where a layer has a seed."""
    kept = []

    def loss(y_true, y_pred):
        seen = tf.numpy_function(lambda rows: kept.append(rows) or 0.0, [y_pred], tf.float64)
        return tf.reduce_sum(y_pred) + seen

    with strategy.scope():
        model = tf_keras.Sequential([tf_keras.Input([64]), layers.Dropout(0.5, seed=1)])
        model.compile("sgd", loss)
    model = feeding.convert(strategy, model, micro_batch_size=ROWS, whole_batch_loss=True)
    step = [(np.ones([3, 64]), np.ones([3, 64]))] * strategy.num_replicas_in_sync
    feeding.fit(strategy, model, [[step]])
    rows = np.concatenate(kept)
    assert len({tuple(row) for row in rows}) == len(rows) == 3 * strategy.num_replicas_in_sync


def test_eagerly(strategy):
    """Replicas that run by turns, in Python."""
    way = {"micro_batch_size": ROWS, "whole_batch_loss": "gathered"}
    plain = make()
    model = feeding.mirrored(strategy, lambda: make(run_eagerly=True), plain)
    model = feeding.convert(strategy, model, **way)
    windows = feeding.make_windows(batch, feeding.rows_of(strategy, "uneven", steps=(1, 1)))
    start = cases.weights_of(plain)
    feeding.fit(strategy, model, windows)
    feeding.fit_plain(plain, windows)
    cases.assert_same_weights(model, plain, start, 1e-9)
