"""Training under a `ParameterServerStrategy`: run as a script by `test_strategies.py`.

The process is a cluster: it serves as workers and as a parameter server, and coordinates them.
"""

import contextlib
import re
import socket
import sys
import warnings

import numpy as np
import tensorflow as tf
import tf_keras

import ga_transform as ga

ROWS, WIDTH = 12, 4


def strategy_of(workers):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(workers + 1)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        addresses = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
    jobs = {"worker": addresses[:-1], "ps": addresses[-1:]}
    cluster = tf.train.ClusterSpec(jobs)
    # Of the default, one a core, all may come to wait for each other.
    config = tf.compat.v1.ConfigProto(inter_op_parallelism_threads=2 * len(addresses))
    for job, tasks in jobs.items():
        for task in range(len(tasks)):
            tf.distribute.Server(cluster, job, task, protocol="grpc", config=config)
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(cluster, rpc_layer="grpc")
    return tf.distribute.ParameterServerStrategy(resolver)


def variance(y_true, y_pred):
    """A loss that couples the rows of a batch."""
    return tf.math.reduce_variance(y_true - y_pred) + tf.reduce_mean(y_pred) ** 2


def network(loss):
    layers = [
        tf_keras.Input([WIDTH], dtype="int32"),
        tf_keras.layers.Embedding(9, 3),
        tf_keras.layers.Flatten(),
        tf_keras.layers.Dense(5, "tanh", kernel_regularizer="l2"),
        tf_keras.layers.Dense(2),
    ]
    model = tf_keras.Sequential(layers)
    model.compile(tf_keras.optimizers.Adam(0.05), loss, metrics=["mae"], steps_per_execution=2)
    return model


def endless(x, y):
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(ROWS).repeat()
    return data.with_options(options)


def assert_the_law(strategy, loss, **way):
    """With one worker, which takes the batches in their order: the weights of the plain model."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 9, size=[3 * ROWS, WIDTH])
    y = rng.normal(size=[3 * ROWS, 2])
    plain = network(loss)
    with strategy.scope():
        model = network(loss)
        model.set_weights(plain.get_weights())
        model = ga.make_accumulating(model, micro_batch_size=5, **way)
    plain.fit(x, y, batch_size=ROWS, epochs=2, shuffle=False, verbose=0)
    history = model.fit(endless(x, y), steps_per_epoch=3, epochs=2, verbose=0).history
    assert model.optimizer.iterations.numpy() == 6
    for ours, theirs in zip(model.get_weights(), plain.get_weights()):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)
    again = plain.history.history
    assert {name: np.round(values, 9).tolist() for name, values in history.items()} == {
        name: np.round(values, 9).tolist() for name, values in again.items()
    }


def assert_rewrites_and_skips(strategy):
    """Pooled statistics are those of the large batch; what is not finite is skipped and counted."""
    rng = np.random.default_rng(1)
    x, y = rng.normal(2, 3, size=[3 * ROWS, WIDTH]), rng.normal(size=[3 * ROWS, 2])
    y[ROWS + 1] = np.inf

    def normed():
        norm = tf_keras.layers.BatchNormalization(momentum=0.8)
        model = tf_keras.Sequential([tf_keras.Input([WIDTH]), norm, tf_keras.layers.Dense(2)])
        model.compile("sgd", "mse")
        return model

    plain = normed()
    for start in range(0, 3 * ROWS, ROWS):
        plain(x[start : start + ROWS], training=True)
    with strategy.scope():
        model = ga.make_accumulating(normed(), micro_batch_size=5, batch_norm="pooled")
    model.fit(endless(x, y), steps_per_epoch=3, verbose=0)
    for ours, theirs in zip(model.get_weights()[2:4], plain.get_weights()[2:4]):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9)
    # A chain without Accumulate guards no update: tf_keras takes what is not finite, too.
    assert not np.isfinite(model.get_weights()[0]).all()
    with strategy.scope():
        chain = [ga.Split(5), ga.Accumulate(1, on_nonfinite="micro_batch")]
        model = ga.make_accumulating(normed(), transforms=chain)
    model.fit(endless(x, y), steps_per_epoch=3, verbose=0)
    assert np.isfinite(model.get_weights()[0]).all()
    assert model.optimizer.iterations.numpy() == 3
    assert (model.skipped_windows, model.skipped_micro_batches) == (0, 1)


def assert_no_worker_sees_the_gradients_of_another(strategy):
    """Of a loss that is linear in the weights the order of updates does not matter."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=[2 * ROWS, WIDTH]), rng.normal(size=[2 * ROWS, 1])
    with strategy.scope():
        layers = [tf_keras.Input([WIDTH]), tf_keras.layers.Dense(1, use_bias=False)]
        model = tf_keras.Sequential(layers)
        model.compile(tf_keras.optimizers.SGD(0.1), lambda true, given: true * given)
        model = ga.make_accumulating(model, micro_batch_size=1)
    start = model.get_weights()[0]
    model.fit(endless(x, y), steps_per_epoch=80, verbose=0)
    assert model.optimizer.iterations.numpy() == 80
    # How often each of the two batches was taken is up to the workers: 80 times together.
    gradients = (x * y).reshape([2, ROWS, WIDTH]).mean(1)
    moved = (start - model.get_weights()[0])[:, 0] / 0.1
    times = np.linalg.lstsq(gradients.T, moved, rcond=None)[0]
    np.testing.assert_allclose(times, np.round(times), atol=1e-9)
    np.testing.assert_allclose(times @ gradients, moved, atol=1e-9)
    assert round(times.sum()) == 80


def assert_refused_across_batches(strategy):
    with strategy.scope():
        model = tf_keras.Sequential([tf_keras.Input([2]), tf_keras.layers.Dense(1)], name="net")
        model.compile("sgd", "mse")
    text = (
        "Accumulate.steps must be 1 under ParameterServerStrategy; got 4 for 'net': workers update "
        "the weights without waiting for each other, so that no window of several batches is of "
        "the same weights. Use micro_batch_size, which makes each batch a window."
    )
    try:
        ga.make_accumulating(model, 4)
    except NotImplementedError as error:
        assert re.fullmatch(re.escape(text), str(error)), error
    else:
        raise AssertionError("it was converted")


def main(workers):
    tf_keras.backend.set_floatx("float64")
    tf_keras.utils.set_random_seed(0)
    warnings.simplefilter("ignore")
    strategy = strategy_of(workers)
    if workers == 1:
        assert_the_law(strategy, "mse")
        assert_the_law(strategy, variance, whole_batch_loss=True)
        assert_rewrites_and_skips(strategy)
        assert_refused_across_batches(strategy)
    assert_no_worker_sees_the_gradients_of_another(strategy)
    print("all hold")


if __name__ == "__main__":
    main(int(sys.argv[1]))
