"""Files that are written in the midst of a window: training ends with the weights of a run that was
never interrupted, on as many replicas, on fewer, or on more.
"""

import contextlib
import functools

import cases
import feeding
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from tf_keras import layers

import ga_transform as ga

STEPS = 3
ACROSS = {"accum_steps": STEPS}
PLACES = ["same", "one", "none"]


@pytest.fixture(scope="session")
def places(strategy):
    """By name, the strategies under which a model is made, or none."""
    return {"same": strategy, "one": tf.distribute.MirroredStrategy(["CPU:0"]), "none": None}


def scope_of(place):
    return contextlib.nullcontext() if place is None else place.scope()


def words():
    """Gradients that are slices, and dense ones."""
    model = cases.words().model
    optimizer = tf_keras.optimizers.Adagrad(0.5)
    loss = tf_keras.losses.BinaryCrossentropy(from_logits=True)
    model.compile(optimizer, loss, run_eagerly=True)
    return model


def dense():
    model = tf_keras.Sequential(
        [tf_keras.Input([4]), layers.Dense(5, "tanh"), layers.Dense(2, kernel_regularizer="l2")]
    )
    model.compile(tf_keras.optimizers.Adam(0.05), "mse", run_eagerly=True)
    return model


def normed():
    model = tf_keras.Sequential(
        [tf_keras.Input([4]), layers.BatchNormalization(momentum=0.75), layers.Dense(2)]
    )
    model.compile(tf_keras.optimizers.SGD(0.1), "mse", run_eagerly=True)
    return model


def batch(rng, rows):
    dtype = tf_keras.backend.floatx()
    return rng.normal(size=[rows, 4]).astype(dtype), rng.normal(size=[rows, 2]).astype(dtype)


def windows_of(strategy, batch, shape="empty"):
    return feeding.make_windows(batch, feeding.rows_of(strategy, shape, steps=(STEPS,) * 2))


def made(place, make, weights=None, **way):
    with scope_of(place):
        model = make()
        if weights is not None:
            model.set_weights(weights)
        return ga.make_accumulating(model, **way)


@functools.lru_cache(maxsize=4)
def stepping(place, model):
    def run(values):
        return place.run(model.train_step, args=(values,))

    return run if model.run_eagerly else tf.function(run, reduce_retracing=True)


def train(place, model, steps):
    """Train on steps; a window that is not at its end stays pending."""
    for step in steps:
        if place is None:
            model.train_on_batch(*feeding.joined([step]))
            continue
        is_whole = len(step) == place.num_replicas_in_sync
        parts = step if is_whole else [feeding.joined([step])]
        stepping(place, model)(feeding.per_replica(place, parts))


def save(model, path):
    if path.name == "checkpoint":
        tf.train.Checkpoint(model).write(str(path))
    elif path.name == "weights":
        model.save_weights(str(path))
    else:
        model.save(path)


def load(place, path, make, **way):
    if path.name not in {"checkpoint", "weights"}:
        with scope_of(place):
            model = tf_keras.models.load_model(path)
        model.run_eagerly = True
        return model
    model = made(place, make, **way)
    if path.name == "checkpoint":
        tf.train.Checkpoint(model).read(str(path))
    else:
        model.load_weights(str(path))
    return model


def train_plain(make, weights, windows):
    """A plain model that has trained on each window as one batch."""
    plain = make()
    plain.set_weights(weights)
    plain.run_eagerly = True
    for window in windows:
        plain.train_on_batch(*feeding.joined(window))
    return plain


def assert_goes_on(path, source, target, make, windows, way, tolerance=1e-9):
    """Save in the midst of a window, load elsewhere, and train on, here and there.

    Args:
        path: Where to, by whose name the format is known.
        source, target: Strategies, or None.
        make: Makes a compiled model.
        windows: Two of them.
        way: What `make_accumulating` is given.
        tolerance: Of the distance that plain tf_keras has travelled.
    """
    model = made(source, make, **way)
    start = model.get_weights()
    train(source, model, windows[0][:-1])
    for _ in range(2):  # to write it changes nothing
        save(model, path)
    loaded = load(target, path, make, **way)
    assert loaded.pending_micro_batches == model.pending_micro_batches > 0
    plain = train_plain(make, start, windows)
    for place, each in ((source, model), (target, loaded)):
        train(place, each, [*windows[0][-1:], *windows[1]])
        assert each.pending_micro_batches == 0
        assert feeding.updates(each) == 2
        cases.assert_same_weights(each, plain, start, tolerance)
    return model, loaded


# ---- the formats -------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["checkpoint", "weights", "model.keras", "savedmodel"])
def written(request, strategy, tmp_path_factory):
    """A file that is written in the midst of a second window, with all that it is of."""
    tf_keras.backend.set_floatx("float64")
    windows = feeding.make_windows(
        cases.words().batch, feeding.rows_of(strategy, "empty", steps=(STEPS,) * 3)
    )
    model = made(strategy, words, **ACROSS)
    start = model.get_weights()
    train(strategy, model, [*windows[0], *windows[1][:-1]])
    path = tmp_path_factory.mktemp("files") / request.param
    for _ in range(2 if request.param == "checkpoint" else 1):
        save(model, path)
    train(strategy, model, [*windows[1][-1:], *windows[2]])
    return path, model, start, windows


def test_to_write_changes_nothing(written, float64):
    """The model that is saved goes on as if it had not been."""
    _, model, start, windows = written
    plain = train_plain(words, start, windows)
    cases.assert_same_weights(model, plain, start, 1e-9)
    assert (model.pending_micro_batches, feeding.updates(model)) == (0, 3)


@pytest.mark.parametrize("place", PLACES)
def test_from_replicas(written, places, float64, place):
    """Sums of slices and dense ones, of replicas with different numbers of rows."""
    path, _, start, windows = written
    loaded = load(places[place], path, words, **ACROSS)
    assert (loaded.pending_micro_batches, feeding.updates(loaded)) == (STEPS - 1, 1)
    train(places[place], loaded, [*windows[1][-1:], *windows[2]])
    plain = train_plain(words, start, windows)
    cases.assert_same_weights(loaded, plain, start, 1e-9)
    assert (loaded.pending_micro_batches, feeding.updates(loaded)) == (0, 3)


@pytest.mark.parametrize("file", ["checkpoint", "model.keras", "savedmodel"])
def test_to_replicas(tmp_path, strategy, float64, file):
    """What one device has summed is not counted once for each replica."""
    windows = windows_of(strategy, cases.words().batch)
    assert_goes_on(tmp_path / file, None, strategy, words, windows, ACROSS)


@pytest.mark.parametrize("is_source", [True, False])
def test_in_graphs(tmp_path, strategy, float64, is_source):
    """Restored before the step is traced, the window goes on there as it does eagerly."""

    def make():
        model = words()
        model.run_eagerly = False
        return model

    windows = windows_of(strategy, cases.words().batch)
    source, target = (strategy, None) if is_source else (None, strategy)
    assert_goes_on(tmp_path / "checkpoint", source, target, make, windows, ACROSS)


def test_hdf5(tmp_path, strategy, float64):
    """It holds no partial window, and says so; the weights and the optimizer go on."""
    windows = windows_of(strategy, batch)
    model = made(strategy, dense, **ACROSS)
    train(strategy, model, [*windows[0], *windows[1][:-1]])
    with pytest.warns(UserWarning, match=f"{STEPS - 1} pending"):
        model.save(tmp_path / "model.h5")
    with strategy.scope(), pytest.warns(UserWarning, match=f"{STEPS - 1} pending"):
        loaded = tf_keras.models.load_model(tmp_path / "model.h5")
    loaded.run_eagerly = True
    assert (loaded.pending_micro_batches, feeding.updates(loaded)) == (0, 1)
    assert model.discard() == STEPS - 1
    for each in (model, loaded):
        train(strategy, each, windows[1])
        assert feeding.updates(each) == 2
    tf.nest.map_structure(np.testing.assert_array_equal, loaded.get_weights(), model.get_weights())


# ---- what windows hold -------------------------------------------------------------------------

MOVES = [("same", "same"), ("same", "none"), ("none", "same")]


@pytest.mark.parametrize(("source", "target"), MOVES)
def test_slices(tmp_path, strategy, places, float64, source, target):
    """With batches that are cut, windows count batches as well as slices."""
    windows = windows_of(strategy, batch)
    way = {**ACROSS, "micro_batch_size": 2}
    path = tmp_path / "checkpoint"
    assert_goes_on(path, places[source], places[target], dense, windows, way)


@pytest.mark.parametrize(
    ("file", "source", "target"),
    [("checkpoint", *move) for move in MOVES] + [("model.keras", "same", "same")],
)
def test_in_float16(tmp_path, strategy, places, file, source, target):
    """Replicas weigh in units of their own; files hold them in one."""
    windows = windows_of(strategy, batch, "uneven")
    precision = ga.Precision("mixed_float16", initial_scale=2.0**8)
    way = {"transforms": [precision, ga.Accumulate(STEPS)]}
    source, target = places[source], places[target]
    model, loaded = assert_goes_on(tmp_path / file, source, target, dense, windows, way, 0.1)
    start = [weight + 1.0 for weight in cases.weights_of(model)]
    cases.assert_same_weights(loaded, model, start, 1e-3)


@pytest.mark.parametrize(
    ("file", "source", "target"),
    [("checkpoint", *move) for move in MOVES] + [("model.keras", "same", "one")],
)
def test_pooled_statistics(tmp_path, strategy, places, float64, file, source, target):
    """What batch normalisation layers have pooled goes on, too."""
    windows = windows_of(strategy, batch)
    way = {**ACROSS, "batch_norm": "pooled"}
    source, target = places[source], places[target]
    plain = normed()
    model = made(source, normed, plain.get_weights(), **way)
    train(source, model, windows[0][:-1])
    for _ in range(2):
        save(model, tmp_path / file)
    loaded = load(target, tmp_path / file, normed, **way)
    for window in windows:
        plain(feeding.joined(window)[0], training=True)
    for place, each in ((source, model), (target, loaded)):
        train(place, each, [*windows[0][-1:], *windows[1]])
        for name in ("moving_mean", "moving_variance"):
            ours, theirs = (getattr(one.layers[0], name).numpy() for one in (each, plain))
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("target", ["same", "none"])
def test_what_is_left_out(tmp_path, strategy, places, float64, target):
    """Counts of all replicas are read and written as one."""
    way = {"transforms": [ga.Accumulate(STEPS, on_nonfinite="micro_batch")]}
    windows = windows_of(strategy, batch, "uneven")
    model = made(strategy, dense, **way)
    for each in windows[0][0]:
        each[1][0, 0] = np.inf
    replicas = strategy.num_replicas_in_sync
    train(strategy, model, windows[0][:-1])
    save(model, tmp_path / "checkpoint")
    loaded = load(places[target], tmp_path / "checkpoint", dense, **way)
    for place, each in ((strategy, model), (places[target], loaded)):
        assert (each.pending_micro_batches, each.skipped_micro_batches) == (STEPS - 1, replicas)
        train(place, each, windows[0][-1:])
        assert (each.skipped_windows, each.skipped_micro_batches) == (0, replicas)
    start = [weight + 1.0 for weight in cases.weights_of(model)]
    cases.assert_same_weights(loaded, model, start, 1e-9)
