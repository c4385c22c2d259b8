"""Batch normalisation on replicas: pooled statistics are those of the layer on one device that
sees all rows of a window in one batch.

The layer stands first in its model, so that what it sees does not depend on weights.
"""

import cases
import feeding
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from tf_keras import layers

import ga_transform as ga

MOMENTUM = 0.75
TOLERANCE = {"float64": 1e-9, "float32": 1e-5}


def norm(name="norm", **arguments):
    return layers.BatchNormalization(name=name, **{"momentum": MOMENTUM, **arguments})


def compiled(inputs, hidden, **arguments):
    outputs = layers.Dense(1)(layers.Flatten()(hidden))
    model = tf_keras.Model(inputs, outputs)
    model.compile(tf_keras.optimizers.SGD(0.01), "mse", **arguments)
    return model


def pair(**arguments):
    """Images to two layers side by side: fused in float32, and not fused in float64."""
    inputs = tf_keras.Input([2, 2, 3])
    sides = [norm("fused")(inputs), norm("not_fused", fused=False, dtype="float64")(inputs)]
    return compiled(inputs, layers.Concatenate(dtype="float32")(sides), **arguments)


def masked():
    inputs = tf_keras.Input([5, 2])
    return compiled(inputs, norm()(layers.Masking()(inputs)))


def twice():
    inputs, shared = tf_keras.Input([3]), norm()
    return compiled(inputs, layers.Concatenate()([shared(inputs), shared(inputs * 2.0 + 1.0)]))


def small(**arguments):
    inputs = tf_keras.Input([3])
    return compiled(inputs, norm(**arguments)(inputs))


def rows(shape):
    """A function that makes batches whose rows have other means and variances, one by one."""

    def batch(rng, count):
        spread = rng.random([count] + [1] * len(shape)) + 0.5
        drift = rng.normal(size=[count] + [1] * len(shape)) * 2
        return rng.normal(size=[count, *shape]) * spread + drift, rng.normal(size=[count, 1])

    return batch


def windows_of(strategy, shape, way, kind="empty", steps=(feeding.STEPS, feeding.STEPS - 1)):
    made = feeding.make_windows(rows(shape), feeding.rows_of(strategy, kind, steps=steps))
    return feeding.single(made) if feeding.is_split_only(way) else made


def norms_of(model):
    return [layer for layer in model._flatten_layers() if hasattr(layer, "moving_mean")]


def statistics(model):
    return [
        np.array(variable.numpy())
        for layer in norms_of(model)
        for variable in (layer.moving_mean, layer.moving_variance)
    ]


def assert_same_statistics(model, expected, start, *, is_mirrored=True):
    """Each statistic as expected, within a tolerance of what it has moved; on all replicas.

    Those that move with each batch are the replicas' own, of which tf_keras takes the mean.
    """
    for ours, theirs, before in zip(statistics(model), expected, start):
        travelled = np.max(np.abs(np.float64(theirs) - before))
        assert travelled > 1e-3, "the reference has not moved: the test could not fail"
        worst = np.max(np.abs(np.float64(ours) - theirs))
        assert worst <= TOLERANCE[ours.dtype.name] * travelled, f"{worst / travelled:.2e}"
    if is_mirrored:
        feeding.assert_mirrored(model)


def run_plain(model, batches):
    """Have a plain model see batches in training, which moves its statistics only."""
    for x, *_ in batches:
        model(tf.constant(x), training=True)
    return statistics(model)


def converted(strategy, make, like, mode, way):
    model = feeding.mirrored(strategy, make, like)
    return feeding.convert(strategy, model, batch_norm=mode, **way)


def assert_pooled(strategy, make, windows, way):
    like = make()
    start = statistics(like)
    model = converted(strategy, make, like, "pooled", way)
    feeding.fit(strategy, model, windows)
    expected = run_plain(like, map(feeding.joined, windows))
    assert_same_statistics(model, expected, start)
    return model


# ---- pooled ------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", feeding.WAYS)
def test_pooled(strategy, way):
    """Fused and not, uneven rows and none, a window that is cut short."""
    way = feeding.WAYS[way]
    assert_pooled(strategy, pair, windows_of(strategy, [2, 2, 3], way), way)


def test_pooled_eagerly(strategy):
    way = feeding.WAYS["both"]
    windows = windows_of(strategy, [2, 2, 3], way)
    assert_pooled(strategy, lambda: pair(run_eagerly=True), windows, way)


def test_pooled_counts_valid_elements(strategy, float64):
    """Those of all replicas."""
    way = feeding.WAYS["both"]
    windows = windows_of(strategy, [5, 2], way)
    rng = np.random.default_rng(1)
    for window in windows:
        for step in window:
            for x, _ in step:
                x *= (np.arange(5) < rng.integers(1, 6, size=[len(x), 1]))[:, :, None]
    assert_pooled(strategy, masked, windows, way)


def test_pooled_of_a_layer_that_is_passed_twice(strategy, float64):
    """Each pass is pooled by itself."""
    way = feeding.WAYS["across"]
    assert_pooled(strategy, twice, windows_of(strategy, [3], way), way)


def test_pooled_variance_has_what_is_between_replicas(strategy, float64):
    """Of replicas that differ by their means alone, that is all the variance there is."""

    def make():
        return small(momentum=0.0)

    values = [-10.0, 10.0, 0.0, 4.0][: strategy.num_replicas_in_sync]
    step = [(np.full([2, 3], value), np.zeros([2, 1])) for value in values]
    model = converted(strategy, make, make(), "pooled", {"accum_steps": 2})
    feeding.fit(strategy, model, [[step, step]])
    mean, variance = statistics(model)
    np.testing.assert_allclose(mean, [np.mean(values)] * 3, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(variance, [np.var(values)] * 3, rtol=1e-12)


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
def test_synchronized(strategy, float64, inplace):
    """It takes the statistics of all replicas; with equal rows these are of one large batch.

    In windows of one batch the weights, too, are those of plain tf_keras.
    """

    def make():
        inputs = tf_keras.Input([3])
        hidden = layers.Dense(3, "tanh")(inputs)
        return compiled(inputs, norm(synchronized=True)(hidden))

    like = make()
    start, moved = cases.weights_of(like), statistics(like)
    way = {"accum_steps": {0: 1, 9: 2}, "batch_norm": "pooled", "inplace": inplace}
    model = feeding.convert(strategy, feeding.mirrored(strategy, make, like), **way)
    windows = windows_of(strategy, [3], feeding.WAYS["split"], "equal")
    feeding.fit(strategy, model, windows)
    feeding.fit_plain(like, windows)
    assert_same_statistics(model, statistics(like), moved)
    cases.assert_same_weights(model, like, start, 1e-9)


def test_pooled_synchronized_over_windows(strategy, float64):
    """Layers that take the statistics of all replicas pool them once."""
    like = small(synchronized=True)
    start = statistics(like)
    model = feeding.mirrored(strategy, lambda: small(synchronized=True), like)
    way = {"accum_steps": feeding.STEPS, "batch_norm": "pooled", "inplace": True}
    model = feeding.convert(strategy, model, **way)
    windows = windows_of(strategy, [3], way, "equal")
    feeding.fit(strategy, model, windows)
    expected = run_plain(like, map(feeding.joined, windows))
    assert_same_statistics(model, expected, start)


# ---- the other modes ---------------------------------------------------------------------------


def test_keep(strategy, float64):
    """It warns; the statistics move with each batch, as those of the plain model do there."""
    make = small
    like = make()
    start = statistics(like)
    model = feeding.mirrored(strategy, make, like)
    with pytest.warns(ga.InexactWarning, match="norm"):
        model = feeding.convert(strategy, model, accum_steps=2)
    windows = windows_of(strategy, [3], {"accum_steps": 2}, "equal", steps=(2,))
    feeding.fit(strategy, model, windows)
    plain = feeding.mirrored(strategy, make, like)
    feeding.fit(strategy, plain, windows)
    assert_same_statistics(model, statistics(plain), start, is_mirrored=False)


def test_momentum(strategy, float64):
    """One update moves them as far as one batch of the plain model; equal rows weigh alike."""
    like = small()
    start = statistics(like)
    model = converted(strategy, small, like, "momentum", {"accum_steps": 2})
    windows = windows_of(strategy, [3], {"accum_steps": 2}, "equal", steps=(2,))
    feeding.fit(strategy, model, windows)
    (window,) = windows
    # As if they moved with each step, whose statistics are the means of the replicas'.
    found = [np.mean([[x.mean(0), x.var(0)] for x, _ in step], axis=0) for step in window]
    decay = MOMENTUM**0.5
    expected = [
        decay**2 * before + (1 - decay) * (decay * first + second)
        for before, first, second in zip(start, *found)
    ]
    assert_same_statistics(model, expected, start)


def test_freeze(strategy):
    """The statistics rest, to the bit, and the law holds of the weights."""

    def make():
        inputs = tf_keras.Input([3])
        return compiled(inputs, norm()(layers.Dense(3)(inputs)))

    like = make()
    model = converted(strategy, make, like, "freeze", {"accum_steps": 2})
    before = statistics(model)
    windows = windows_of(strategy, [3], {"accum_steps": 2})
    feeding.fit(strategy, model, windows)
    for one, other in zip(before, statistics(model)):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("how", ["flush", "discard"])
def test_what_is_pending(strategy, float64, how):
    """A partial window is pooled, or is forgotten, with its gradients."""
    like = small()
    start = statistics(like)
    way = {"transforms": [ga.BatchNorm("pooled"), ga.Accumulate(3, remainder="carry")]}
    model = feeding.convert(strategy, feeding.mirrored(strategy, small, like), **way)
    windows = windows_of(strategy, [3], {"accum_steps": 3}, "uneven", steps=(2, 3))
    feeding.fit(strategy, model, windows[:1])
    for one, other in zip(start, statistics(model)):
        np.testing.assert_array_equal(one, other)
    assert getattr(model, how)() == 2
    feeding.fit(strategy, model, windows[1:])
    expected = run_plain(like, map(feeding.joined, windows if how == "flush" else windows[1:]))
    assert_same_statistics(model, expected, start)
