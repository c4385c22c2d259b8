"""The law on replicas: the weights of plain tf_keras on one device, on all replicas' rows."""

import cases
import feeding
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from tf_keras import layers

import ga_transform as ga

pytestmark = pytest.mark.usefixtures("float64")


def windows_for(strategy, batch, shape, way):
    windows = feeding.make_windows(batch, feeding.rows_of(strategy, shape))
    return feeding.single(windows) if feeding.is_split_only(way) else windows


# ---- models and ways ---------------------------------------------------------------------------


#: Those of which the logs are means over rows, also where there are none.
LOGGED = ("dense", "conv", "words")


@pytest.mark.parametrize(
    ("name", "way"),
    [(name, way) for name in cases.MODELS for way in ("across", "both")]
    + [("dense", "split"), ("words", "split")],
)
def test_every_model_and_way(strategy, name, way):
    """Replicas with different numbers of rows, one without any; a window that is cut short."""
    metrics = {"metrics": ["mae"], "weighted_metrics": ["mse"]} if name in LOGGED else {}
    make, batch = feeding.maker(name, cases.OPTIMIZERS["momentum"], **metrics)
    way = feeding.WAYS[way]
    windows = windows_for(strategy, batch, "empty", way)
    _, ours, theirs = feeding.assert_law(strategy, make, windows, way)
    if name in LOGGED:
        feeding.assert_same_logs(ours, theirs)


def test_equal_rows(strategy):
    make, batch = feeding.maker("dense", cases.OPTIMIZERS["adam"])
    way = feeding.WAYS["across"]
    feeding.assert_law(strategy, make, windows_for(strategy, batch, "equal", way), way)


def test_batches_that_are_no_windows(strategy):
    """With one step a window, an update is of all rows, not of the replicas' means."""
    make, batch = feeding.maker("dense", cases.OPTIMIZERS["adam"])
    way = {"accum_steps": 1}
    windows = feeding.single(windows_for(strategy, batch, "empty", way))
    feeding.assert_law(strategy, make, windows, way, epochs=1)


# ---- optimizers --------------------------------------------------------------------------------

OPTIMIZERS = {**cases.OPTIMIZERS, **cases.OPTIONS}


@pytest.mark.parametrize(
    "optimizer",
    [
        "adam",
        "adamw",
        "legacy adam",
        "loss scale",
        "ema",
        "global clipnorm",
        "schedule",
    ],
)
def test_optimizers(strategy, optimizer):
    """EMA, decay, clips, schedules and scaling see updates, of all replicas' gradients."""
    make, batch = feeding.maker("dense", OPTIMIZERS[optimizer])
    way = feeding.WAYS["across"]
    windows = windows_for(strategy, batch, "empty", way)
    feeding.assert_law(strategy, make, windows, way)


def test_an_optimizer_that_is_lazy_with_slices(strategy):
    """Rows of an embedding that no replica has touched do not move."""
    make, batch = feeding.maker("words", OPTIMIZERS["adagrad"])
    way = feeding.WAYS["both"]
    feeding.assert_law(strategy, make, windows_for(strategy, batch, "empty", way), way)


# ---- replicas without rows ---------------------------------------------------------------------


def rows_without(strategy, place):
    """Row counts of two windows, in which one replica has none: at first, or at all."""
    rows = [[[2, 3, 1, 4][: strategy.num_replicas_in_sync] for _ in range(3)] for _ in range(2)]
    for window, steps in ((0, [0]), (1, [0, 1, 2])):
        for step in steps:
            rows[window][step][place] = 0
    return rows


@pytest.mark.parametrize(("way", "place"), [("across", 0), ("both", 0), ("split", -1)])
def test_a_replica_without_rows(strategy, way, place):
    """In a window's first batch, or in all of them: it has a part in the updates all the same."""
    make, batch = feeding.maker("dense", cases.OPTIMIZERS["adam"])
    windows = feeding.make_windows(batch, rows_without(strategy, place))
    way = feeding.WAYS[way]
    if feeding.is_split_only(way):
        windows = feeding.single(windows)
    feeding.assert_law(strategy, make, windows, way, epochs=1)


@pytest.mark.parametrize("way", feeding.WAYS)
def test_a_replica_without_rows_of_a_sum(strategy, way):
    """Beside a sum, its part of the regularisers is not lost."""
    loss = tf_keras.losses.MeanSquaredError(reduction="sum")
    make, batch = feeding.maker("dense", cases.OPTIMIZERS["sgd"], loss=loss)
    windows = feeding.make_windows(batch, rows_without(strategy, -1))
    way = feeding.WAYS[way]
    if feeding.is_split_only(way):
        windows = feeding.single(windows)
    feeding.assert_law(strategy, make, windows, way, epochs=1)


def test_no_replica_has_rows(strategy):
    """Such batches change nothing, and are batches of their windows all the same."""
    make, batch = feeding.maker("dense", cases.OPTIMIZERS["adam"])
    plain = make()
    model = feeding.convert(strategy, feeding.mirrored(strategy, make, plain), accum_steps=2)
    replicas = strategy.num_replicas_in_sync
    rows = [[[0] * replicas] * 2]
    before = model.get_weights()
    feeding.fit(strategy, model, feeding.make_windows(batch, rows))
    tf.nest.map_structure(np.testing.assert_array_equal, model.get_weights(), before)
    assert feeding.updates(model) == 0


# ---- losses ------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["across", "both"])
def test_sums_beside_means(strategy, way):
    """A SUM loss is added up over replicas; means, regularisers and add_loss are not."""
    losses = {
        "score": tf_keras.losses.Huber(reduction="sum"),
        "kind": tf_keras.losses.SparseCategoricalCrossentropy(),
    }
    make, batch = feeding.maker("branches", cases.OPTIMIZERS["sgd"], loss=losses)
    way = feeding.WAYS[way]
    feeding.assert_law(strategy, make, windows_for(strategy, batch, "empty", way), way, epochs=1)


def test_a_custom_loss_function(strategy):
    """It is a mean, whose weights are sample weights."""

    def make():
        inputs = tf_keras.Input([3])
        model = tf_keras.Model(inputs, layers.Dense(2, kernel_regularizer="l1")(inputs))
        model.compile(tf_keras.optimizers.SGD(0.1), lambda true, given: tf.abs(true - given) ** 1.5)
        return model

    def batch(rng, rows):
        return rng.normal(size=[rows, 3]), rng.normal(size=[rows, 2]), rng.random([rows])

    way = feeding.WAYS["both"]
    feeding.assert_law(strategy, make, windows_for(strategy, batch, "empty", way), way)


@tf.autograph.experimental.do_not_convert
def squared_rows(batch):
    return tf.cast(tf.shape(batch[0])[0], tf.float64) ** 2


@pytest.mark.parametrize("weighting", ["equal", squared_rows], ids=["equal", "function"])
def test_weighting(strategy, weighting):
    """The micro-batches of all replicas weigh alike, or what a function says.

    The reference weighs their rows so.
    """
    make, batch = feeding.maker("dense", cases.OPTIMIZERS["momentum"])
    plain = make()
    start = cases.weights_of(plain)
    chain = [ga.Accumulate(feeding.STEPS, weighting=weighting)]
    model = feeding.convert(strategy, feeding.mirrored(strategy, make, plain), transforms=chain)
    windows = windows_for(strategy, batch, "uneven", feeding.WAYS["across"])
    feeding.fit(strategy, model, windows)
    for window in windows:
        counts = [len(batch[0]) for step in window for batch in step]
        wanted = [1 if weighting == "equal" else count**2 for count in counts]
        factors = [
            weight / sum(wanted) * sum(counts) / count for weight, count in zip(wanted, counts)
        ]
        x, y, weights = feeding.joined(window)
        plain.train_on_batch(x, y, weights * np.repeat(factors, counts))
    cases.assert_same_weights(model, plain, start, 1e-9)


def test_a_schedule_of_steps(strategy):
    """Windows of one, of two and of three batches."""
    make, batch = feeding.maker("words", cases.OPTIMIZERS["adam"])
    rows = feeding.rows_of(strategy, "empty", steps=(1, 2, 3, 3))
    windows = feeding.make_windows(batch, rows)
    feeding.assert_law(strategy, make, windows, {"accum_steps": {0: 1, 1: 2, 2: 3}}, epochs=1)


# ---- NumPy arrays ------------------------------------------------------------------------------


def fit_arrays(strategy, make, arrays, size, way, **options):
    """Train on arrays, in batches of so many rows for all replicas; and on windows as batches.

    The last batch has one row.
    """
    plain = make()
    start = cases.weights_of(plain)
    model = feeding.convert(strategy, feeding.mirrored(strategy, make, plain), **way)
    options = {"shuffle": False, "epochs": 2, "verbose": 0, **options}
    ours = model.fit(*arrays, batch_size=size, **options).history
    large = size * way.get("accum_steps", 1)
    theirs = plain.fit(*arrays, batch_size=large, **options).history
    cases.assert_same_weights(model, plain, start, 1e-9)
    assert feeding.updates(model) == feeding.updates(plain)
    return ours, theirs


@pytest.mark.parametrize("way", [{"accum_steps": 2}, {"accum_steps": 2, "micro_batch_size": 2}])
def test_arrays(strategy, way):
    """`fit` divides each batch among the replicas; the last one has too few rows for all."""
    make, batch = feeding.maker("dense", cases.OPTIMIZERS["adam"], metrics=["mae"])
    size = 3 * strategy.num_replicas_in_sync
    x, y, weights = batch(np.random.default_rng(0), 3 * size + 1)
    fit_arrays(strategy, make, (x, y), size, way, sample_weight=weights)


def test_class_weights(strategy):
    make, batch = feeding.maker("words", cases.OPTIMIZERS["adam"])
    size = 3 * strategy.num_replicas_in_sync
    arrays = batch(np.random.default_rng(0), 3 * size + 1)
    way = {"accum_steps": 2}
    fit_arrays(strategy, make, arrays, size, way, class_weight={0: 0.3, 1: 1.9})


# ---- logs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["across", "split"])
def test_logs_of_outputs(strategy, way):
    """Keys and values are those of plain training on one device."""
    make, batch = feeding.maker(
        "branches", cases.OPTIMIZERS["sgd"], metrics={"score": "mae", "kind": "accuracy"}
    )
    way = feeding.WAYS[way]
    # What `add_loss` is given is a mean over rows: of none it is no number, for plain models, too.
    windows = windows_for(strategy, batch, "uneven", way)
    _, ours, theirs = feeding.assert_law(strategy, make, windows, way)
    feeding.assert_same_logs(ours, theirs)


@pytest.mark.parametrize(
    ("name", "way"), [("tokens", "split"), ("sum", "split"), ("sum", "across")]
)
def test_logs_of_what_is_no_mean_over_rows(strategy, name, way):
    """They are those of the plain model under the same strategy, of the same batch."""
    if name == "sum":
        loss = tf_keras.losses.MeanSquaredError(reduction="sum")
        make, batch = feeding.maker("dense", cases.OPTIMIZERS["sgd"], loss=loss, metrics=["mae"])
    else:
        make, batch = feeding.maker("tokens", cases.OPTIMIZERS["sgd"], metrics=["accuracy"])
    like = make()
    windows = feeding.make_windows(batch, [[[3, 5, 1, 2][: strategy.num_replicas_in_sync]]])
    plain = feeding.mirrored(strategy, make, like)
    model = feeding.mirrored(strategy, make, like)
    model = feeding.convert(strategy, model, **feeding.WAYS[way])
    ours, theirs = (feeding.fit(strategy, each, windows) for each in (model, plain))
    feeding.assert_same_logs(ours, theirs)
