"""Batch normalisation in a window: what moves the moving statistics, and what does not.

Where a batch normalisation layer is first in its model, what it sees does not depend on weights: its
moving statistics can be held against those of the plain layer that is given the large batch.
"""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import cases
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from hypothesis import given, settings
from hypothesis import strategies as st
from tf_keras import layers

import ga_transform as ga

#: A number that float32 holds, as tf_keras has it in float64 too.
MOMENTUM = 0.75
#: Relative to how far the statistics have moved, by their dtype.
TOLERANCE = {"float64": 1e-9, "float32": 1e-5}
#: How a window is filled, and how many batches it is then.
WAYS = {
    "across": {"accum_steps": 3},
    "within": {"micro_batch_size": 4},
    "both": {"accum_steps": 3, "micro_batch_size": 2},
}
HOWS = [
    {},
    {"steps_per_execution": 3},
    pytest.param({"jit_compile": True}, marks=pytest.mark.long),
]
EAGERLY = {"run_eagerly": True}
POOLING = ("pooled", "momentum")
MODES = ("keep", *POOLING, "freeze")


# ---- models, windows, statistics ---------------------------------------------------------------


def norm(name="norm", **arguments):
    return layers.BatchNormalization(name=name, **{"momentum": MOMENTUM, **arguments})


def sequential(shape, layer=None, **compile_arguments):
    """A model that begins with batch normalisation, and is compiled."""
    model = tf_keras.Sequential(
        [tf_keras.Input(shape), layer or norm(), layers.Flatten(), layers.Dense(1)]
    )
    return compiled(model, **compile_arguments)


def compiled(model, **compile_arguments):
    model.compile(tf_keras.optimizers.SGD(0.01), "mse", **compile_arguments)
    return model


def pair():
    """Images to two layers side by side: fused in float32, and not fused in float64."""
    images = tf_keras.Input([2, 2, 3])
    sides = [norm("fused")(images), norm("not_fused", fused=False, dtype="float64")(images)]
    hidden = layers.Flatten()(layers.Concatenate(dtype="float32")(sides))
    return tf_keras.Model(images, layers.Dense(1)(hidden))


def convert(model, mode, transforms=None, inplace=False, **way):
    if transforms is not None:
        transforms = [ga.BatchNorm(mode), *transforms]
        return ga.make_accumulating(model, transforms=transforms, inplace=inplace)
    return ga.make_accumulating(model, batch_norm=mode, inplace=inplace, **way)


def rows(shape, seed=0):
    """A function that makes batches whose rows have other means and variances, one by one."""

    def batch(rng, count):
        spread = rng.random([count] + [1] * len(shape)) + 0.5
        drift = rng.normal(size=[count] + [1] * len(shape)) * 2
        return rng.normal(size=[count, *shape]) * spread + drift, rng.normal(size=[count, 1])

    return batch


def batches_of(shape, windows, seed=0):
    return cases.batches_of(rows(shape), windows, seed)


def windows_of(way, windows):
    """Rows of batches by windows, where a window may be one batch."""
    is_one_batch = "accum_steps" not in way
    return [[count] for window in windows for count in window] if is_one_batch else windows


def norms_of(model):
    found = [layer for layer in model._flatten_layers() if hasattr(layer, "moving_mean")]
    assert found, "there is no batch normalisation: the test could not fail"
    return found


def statistics(model):
    """The moving means and variances of a model."""
    return [
        variable.numpy()
        for layer in norms_of(model)
        for variable in (layer.moving_mean, layer.moving_variance)
    ]


def assert_same_statistics(model, expected, start, tolerance=None):
    """Each moving statistic as expected, within a tolerance of what it has moved."""
    names = [layer.name for layer in norms_of(model) for _ in range(2)]
    for name, ours, theirs, before in zip(names, statistics(model), expected, start):
        travelled = np.max(np.abs(np.asarray(theirs, np.float64) - before))
        assert travelled > 1e-3, "the reference has not moved: the test could not fail"
        worst = np.max(np.abs(np.asarray(ours, np.float64) - theirs))
        allowed = (tolerance or TOLERANCE[ours.dtype.name]) * travelled
        assert worst <= allowed, f"{name}: {worst / travelled:.2e}"


def assert_rested(before, after):
    for one, other in zip(before, after):
        np.testing.assert_array_equal(one, other)


def train(model, windows):
    """Train on all batches, one by one; apply what is left."""
    for window in windows:
        for batch in window:
            model.train_on_batch(*batch)
    model.flush()


def run_plain(model, batches):
    """Have a plain model see batches in training, which moves its statistics only."""
    for x, _ in batches:
        model(tf.nest.map_structure(tf.constant, x), training=True)
    return statistics(model)


def run_large(model, windows):
    """Have a plain model see each window as one batch."""
    return run_plain(model, map(cases.concatenate, windows))


def assert_pooled(model, way, windows, run=train, **compile_arguments):
    """A converted model's statistics are those of the plain one that sees large batches."""
    compiled(model, **compile_arguments)
    start = statistics(model)
    converted = convert(model, "pooled", **way)
    run(converted, windows)
    assert_same_statistics(converted, run_large(model, windows), start)
    return converted


def fit(model, windows):
    model.fit(cases.dataset(sum(windows, [])), epochs=1, verbose=0)


# ---- pooled ------------------------------------------------------------------------------------


@dataclasses.dataclass
class Layer:
    make: Callable[[], Any]
    shape: list[int]
    dtype: str = "float64"


FUSED = "float32"  # it computes in nothing wider
LAYERS = {
    "2D": Layer(norm, [3]),
    "3D": Layer(norm, [4, 3]),
    "4D fused": Layer(norm, [3, 4, 2], FUSED),
    "4D not fused": Layer(lambda: norm(fused=False), [3, 4, 2]),
    "5D fused": Layer(norm, [2, 3, 2, 3], FUSED),
    "5D not fused": Layer(lambda: norm(fused=False), [2, 3, 2, 3]),
    "axis 1 of 3D": Layer(lambda: norm(axis=1), [3, 4]),
    "axis 1 of 4D": Layer(lambda: norm(axis=1, fused=False), [2, 3, 4]),
    "axis 1 of 4D, fused": Layer(lambda: norm(axis=1), [2, 3, 4], FUSED),
    "axis 2 of 4D": Layer(lambda: norm(axis=2), [2, 3, 4]),
    "axes 1 and 2 of 4D": Layer(lambda: norm(axis=[1, 2]), [2, 3, 4]),
    "axes 1 and 3 of 4D": Layer(lambda: norm(axis=[1, 3]), [2, 3, 4]),
    "all axes but rows": Layer(lambda: norm(axis=[1, 2]), [2, 3]),
    "no beta": Layer(lambda: norm(center=False), [3]),
    "no gamma": Layer(lambda: norm(scale=False), [3]),
    "neither, fused": Layer(lambda: norm(center=False, scale=False), [3, 4, 2], FUSED),
    "momentum 0.9": Layer(lambda: norm(momentum=0.9), [3]),
    "momentum 0.99": Layer(lambda: norm(momentum=0.99), [3]),
    "momentum 0.5, fused": Layer(lambda: norm(momentum=0.5), [3, 4, 2], FUSED),
    "momentum 0": Layer(lambda: norm(momentum=0.0), [3]),
    "synchronized": Layer(lambda: norm(synchronized=True), [3, 4, 2]),
    "SyncBatchNormalization": Layer(
        lambda: layers.experimental.SyncBatchNormalization(name="norm", momentum=MOMENTUM), [3, 4]
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_pooled_statistics_are_those_of_the_large_batch(name):
    """Of every layer, in windows of batches that are cut into slices, to the rounding of its dtype."""
    layer = LAYERS[name]
    tf_keras.backend.set_floatx(layer.dtype)
    model = sequential(layer.shape, layer.make())
    windows = batches_of(layer.shape, [[5, 4], [2, 7], [3]])
    converted = assert_pooled(model, {"accum_steps": 2, "micro_batch_size": 3}, windows, **EAGERLY)
    assert norms_of(converted)[0].moving_mean.dtype == layer.dtype


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("windows", cases.WINDOWS)
def test_pooled_windows_of_all_shapes(way, windows):
    """Equal, uneven and partial windows; across batches, within them, and both."""
    windows = batches_of([2, 2, 3], windows_of(WAYS[way], cases.WINDOWS[windows]))
    assert_pooled(pair(), WAYS[way], windows, **EAGERLY)


@pytest.mark.parametrize("how", HOWS, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_pooled_in_every_way_to_run_a_step(way, how):
    """In a graph, several batches a call, and compiled by XLA; a remainder is flushed by fit."""
    windows = batches_of([2, 2, 3], windows_of(WAYS[way], cases.PARTIAL))
    assert_pooled(pair(), WAYS[way], windows, run=fit, **how)


@pytest.mark.parametrize("how", [{}, EAGERLY], ids=str)
def test_pooled_under_a_schedule_of_steps(how):
    """Each window is pooled over as many batches as it has."""
    windows = batches_of([2, 2, 3], [[4, 3], [2, 5, 3], [1, 6]])
    assert_pooled(pair(), {"accum_steps": {0: 2, 1: 3}}, windows, run=fit, **how)


def test_pooled_variance_has_what_is_between_micro_batches(float64):
    """Of micro-batches that differ by their means alone, that is all the variance there is."""
    model = sequential([1], norm(momentum=0.0), **EAGERLY)
    converted = convert(model, "pooled", accum_steps=3)
    y = np.zeros([2, 1])
    for value in (-10.0, 0.0, 10.0):
        converted.train_on_batch(np.full([2, 1], value), y)
    # (100 + 0 + 100) / 3; the mean of the micro-batches' variances is zero.
    mean, variance = statistics(converted)
    np.testing.assert_allclose(mean, [0.0], atol=1e-12)
    np.testing.assert_allclose(variance, [200 / 3], rtol=1e-12)
    means = convert(model, "momentum", accum_steps=3)
    for value in (-10.0, 0.0, 10.0):
        means.train_on_batch(np.full([2, 1], value), y)
    np.testing.assert_allclose(statistics(means)[1], [0.0], atol=1e-12)


def masked(**arguments):
    steps = tf_keras.Input([5, 2])
    hidden = norm(**arguments)(layers.Masking()(steps))
    return tf_keras.Model(steps, layers.Dense(1)(layers.GlobalAveragePooling1D()(hidden)))


def with_masked_steps(windows, keep):
    """The windows, with those time steps of rows at zero that are not to be kept."""
    rng = np.random.default_rng(1)
    for window in windows:
        for x, _ in window:
            x *= keep(rng, len(x))[:, :, None]
    return windows


@pytest.mark.parametrize("how", [{}, EAGERLY], ids=str)
@pytest.mark.parametrize("arguments", [{}, {"synchronized": True}], ids=str)
def test_pooled_counts_the_valid_elements(float64, arguments, how):
    """What a mask leaves out has no part in a micro-batch's statistics, nor in its weight."""
    windows = with_masked_steps(
        batches_of([5, 2], [[3, 4], [5, 2]]),
        lambda rng, count: np.arange(5) < rng.integers(1, 6, size=[count, 1]),
    )
    way = {"accum_steps": 2, "micro_batch_size": 3}
    assert_pooled(masked(**arguments), way, windows, **how)


def test_pooled_counts_valid_elements_by_channel(float64):
    """Where the axis is that of the mask, each channel has a count of its own."""
    windows = with_masked_steps(
        batches_of([5, 2], [[3, 4], [5, 2]]),
        lambda rng, count: (rng.random([count, 5]) < 0.5) | (np.arange(count)[:, None] == 0),
    )
    assert_pooled(masked(axis=1), {"accum_steps": 2}, windows, **EAGERLY)


def test_pooled_where_a_micro_batch_has_no_valid_element(float64):
    """It adds nothing."""
    windows = batches_of([5, 2], [[3, 2, 4]])
    windows[0][1][0][:] = 0
    model = compiled(masked(), **EAGERLY)
    start = statistics(model)
    converted = convert(model, "pooled", transforms=[ga.Accumulate(3, on_nonfinite="micro_batch")])
    train(converted, windows)
    assert_same_statistics(converted, run_large(model, windows), start)


@pytest.mark.parametrize("how", [{}, EAGERLY], ids=str)
@pytest.mark.parametrize("mode", POOLING)
def test_a_layer_that_is_passed_twice(float64, mode, how):
    """Each pass has a pool of its own, and moves the statistics once an update, in its turn."""
    inputs, shared = tf_keras.Input([3]), norm()
    passes = layers.Concatenate()([shared(inputs), shared(inputs * 2.0 + 1.0)])
    model = compiled(tf_keras.Model(inputs, layers.Dense(1)(passes)), **how)
    start = statistics(model)
    (batch,) = batches_of([3], [[4]])[0]
    windows = batches_of([3], [[4, 2], [5, 1]]) if mode == "pooled" else [[batch] * 2] * 2
    converted = convert(model, mode, accum_steps=2)
    train(converted, windows)
    assert_same_statistics(converted, run_large(model, windows), start)


class Subclassed(tf_keras.Model):
    def __init__(self):
        super().__init__()
        self.blocks = [norm("first"), layers.Dense(1)]
        self.side = tf_keras.Sequential([norm("second")])

    def call(self, inputs, training=None):
        hidden = inputs
        for block in self.blocks:
            hidden = block(hidden)
        return hidden + self.side(inputs * 3.0, training=training)[:, :1]


class Block(layers.Layer):
    """Makes its layers when it is built, as many do."""

    def build(self, input_shape):
        self.norm = norm()
        super().build(input_shape)

    def call(self, inputs, training=None):
        return self.norm(inputs, training=training)


def functional():
    inputs = tf_keras.Input([3])
    return tf_keras.Model(inputs, layers.Dense(1)(norm()(inputs)))


def nested():
    inner = tf_keras.Sequential([tf_keras.Input([3]), norm("inner"), layers.Dense(2)])
    inputs = tf_keras.Input([3])
    hidden = layers.Concatenate()([inner(inputs), norm("outer")(inputs)])
    return tf_keras.Model(inputs, layers.Dense(1)(hidden))


KINDS = {
    "functional": functional,
    "nested": nested,
    "subclassed": Subclassed,
    "in a layer": lambda: tf_keras.Sequential([tf_keras.Input([3]), Block(), layers.Dense(1)]),
    "in TimeDistributed": lambda: tf_keras.Sequential(
        [layers.Reshape([1, 3], input_shape=[3]), layers.TimeDistributed(norm()), layers.Dense(1)]
    ),
    "without shapes": lambda: tf_keras.Sequential([norm(), layers.Dense(1)]),
    "in a layer, without shapes": lambda: tf_keras.Sequential([Block(), layers.Dense(1)]),
}


@pytest.mark.parametrize("how", [{}, EAGERLY], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_pooled_in_models_of_all_kinds(float64, kind, how):
    """Converted in place, with layers that are made, nested and called in any way."""
    windows = batches_of([3], [[4, 2], [5, 1]])
    model, plain = KINDS[kind](), KINDS[kind]()
    for each in (model, plain):
        each.build([None, 3])
    start = statistics(plain)
    converted = convert(compiled(model, **how), "pooled", accum_steps=2, inplace=True)
    train(converted, windows)
    assert_same_statistics(converted, run_large(plain, windows), start)


@pytest.mark.parametrize("how", [{}, EAGERLY], ids=str)
@pytest.mark.parametrize("kind", ["subclassed", "without shapes", "in a layer, without shapes"])
@pytest.mark.parametrize("mode", ["pooled", "freeze"])
def test_layers_that_are_built_in_the_first_step(float64, mode, kind, how):
    """The choice counts from the first micro-batch on, also where layers are made by it."""
    windows = batches_of([3], [[4, 2], [5, 1]])
    model, plain = KINDS[kind](), KINDS[kind]()
    plain.build([None, 3])
    start = statistics(plain)
    converted = convert(compiled(model, **how), mode, accum_steps=2, inplace=True)
    assert not converted.built
    train(converted, windows)
    if mode == "freeze":
        assert_rested(start, statistics(converted))
    else:
        assert_same_statistics(converted, run_large(plain, windows), start)


class AlwaysTraining(tf_keras.Model):
    def __init__(self):
        super().__init__()
        self.norm, self.out = norm(), layers.Dense(1)

    def call(self, inputs):
        return self.out(self.norm(inputs, training=True))


class OwnStep(tf_keras.Model):
    def __init__(self):
        super().__init__()
        self.block, self.out = Block(), layers.Dense(1)

    def call(self, inputs, training=None):
        return self.out(self.block(inputs, training=training))

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((self(x, training=True) - y) ** 2)
        self.optimizer.minimize(loss, self.trainable_variables, tape=tape)
        return {"loss": loss}


@pytest.mark.parametrize("made", [AlwaysTraining, OwnStep])
def test_a_first_step_that_makes_layers_moves_nothing_beside(float64, made):
    """Whatever makes them, a window that it begins moves the statistics once, by its own rows."""
    windows = batches_of([3], [[4, 2]])
    model, plain = compiled(made()), made()
    converted = convert(model, "pooled", accum_steps=2, inplace=True)
    assert not converted.built
    train(converted, windows)
    plain.build([None, 3])
    for layer in norms_of(plain):  # what builds may have moved them
        layer.moving_mean.assign(tf.zeros_like(layer.moving_mean))
        layer.moving_variance.assign(tf.ones_like(layer.moving_variance))
    start = statistics(plain)
    plain(
        cases.concatenate(windows[0])[0], **({} if made is AlwaysTraining else {"training": True})
    )
    assert_same_statistics(converted, statistics(plain), start)


@pytest.mark.parametrize("is_built", [True, False], ids=["built", "not built"])
def test_pooled_in_a_function_that_an_eager_step_calls(float64, is_built):
    """A graph within an eager step pools as the step does."""

    class Mixed(tf_keras.Model):
        def __init__(self):
            super().__init__()
            self.norm, self.out = norm(), layers.Dense(1)

        @tf.function
        def normalized(self, inputs, training):
            return self.norm(inputs, training=training)

        def call(self, inputs, training=None):
            return self.out(self.normalized(inputs, training))

    windows = batches_of([3], [[4, 2], [5, 1]])
    model, plain = Mixed(), Mixed()
    for each in (model, plain)[0 if is_built else 1 :]:
        each(windows[0][0][0])
    start = statistics(plain)
    converted = convert(compiled(model, **EAGERLY), "pooled", accum_steps=2, inplace=True)
    train(converted, windows)
    assert_same_statistics(converted, run_large(plain, windows), start)


class OnlyInputs(layers.BatchNormalization):
    def call(self, inputs):
        return super().call(inputs, training=True)


class Doubling(layers.BatchNormalization):
    def call(self, inputs, training=None):
        return super().call(inputs * 2.0, training=training)


@pytest.mark.parametrize("made", [OnlyInputs, Doubling])
def test_pooled_of_a_class_of_ones_own(float64, made):
    """A layer that derives from batch normalisation is called as its own `call` takes it."""
    model = sequential([3], made(momentum=MOMENTUM), **EAGERLY)
    assert_pooled(model, {"accum_steps": 2}, batches_of([3], [[4, 2], [5, 1]]), **EAGERLY)


@pytest.mark.parametrize("how", [{}, EAGERLY], ids=str)
def test_pooled_in_a_step_of_ones_own(float64, how):
    """Passes in training are pooled, those by the moving statistics are not."""

    class Own(tf_keras.Model):
        def __init__(self):
            super().__init__()
            self.norm, self.out = norm(), layers.Dense(1)

        def call(self, inputs, training=None):
            return self.out(self.norm(inputs, training=training))

        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                self(x + 100.0, training=False)
                loss = tf.reduce_mean((self(x, training=True) - y) ** 2)
                loss += tf.reduce_mean(self(x * 2.0 + 1.0, training=True) ** 2)
            self.optimizer.minimize(loss, self.trainable_variables, tape=tape)
            return {"loss": loss}

    windows = batches_of([3], [[4, 2], [5, 1]])
    model, plain = compiled(Own(), **how), Own()
    for each in (model, plain):
        each.build([None, 3])
    start = statistics(plain)
    converted = convert(model, "pooled", accum_steps=2, inplace=True)
    train(converted, windows)
    for x, _ in map(cases.concatenate, windows):
        plain(x, training=True)
        plain(x * 2.0 + 1.0, training=True)
    assert_same_statistics(converted, statistics(plain), start)


@pytest.fixture(scope="module")
def poolers():
    """Two converted models for all examples: one is flushed, one cuts batches itself."""
    tf_keras.backend.set_floatx("float64")
    model = sequential([2], norm(momentum=0.0), **EAGERLY)
    made = {size: convert(model, "pooled", micro_batch_size=size) for size in (1, 2, 5)}
    made[None] = convert(model, "pooled", accum_steps=99)
    tf_keras.backend.set_floatx("float32")
    return made


@settings(max_examples=15, deadline=None)
@given(cuts=st.sets(st.integers(1, 9)), slices=st.sampled_from([None, 1, 2, 5]))
def test_pooling_is_associative(poolers, cuts, slices):
    """However ten rows are cut into micro-batches, their statistics are the same."""
    tf_keras.backend.set_floatx("float64")
    ((batch,),) = batches_of([2], [[10]])
    x, y = batch
    model = poolers[slices]
    if slices is None:
        edges = [0, *sorted(cuts), 10]
        for begin, end in zip(edges, edges[1:]):
            model.train_on_batch(x[begin:end], y[begin:end])
        assert model.flush() == len(edges) - 1
    else:
        model.train_on_batch(x, y)
    mean, variance = statistics(model)
    np.testing.assert_allclose(mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(variance, x.var(0), rtol=1e-12)


# ---- momentum ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "way",
    [
        {"accum_steps": 3},
        {"accum_steps": {0: 2, 1: 3}},
        {"micro_batch_size": 2},
        {"accum_steps": 2, "micro_batch_size": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("how", [{}, EAGERLY], ids=str)
def test_momentum_of_equal_micro_batches_is_that_of_the_large_batch(way, how):
    """Of micro-batches with equal statistics, also in partial windows and under a schedule."""
    ((slice_,),) = batches_of([2, 2, 3], [[2]])
    batch = cases.concatenate([slice_] * 3)  # three slices, which are alike
    counts = {"accum_steps": [2, 3, 1] if isinstance(way.get("accum_steps"), dict) else [3, 2]}
    windows = [[batch] * count for count in counts["accum_steps"]]
    if way.get("accum_steps") == 2:
        windows = [[batch] * 2, [batch]]
    if "accum_steps" not in way:
        windows = [[batch], [batch]]
    model = compiled(pair(), **how)
    start = statistics(model)
    converted = convert(model, "momentum", **way)
    fit(converted, windows)
    assert_same_statistics(converted, run_large(model, windows), start)


def decayed(start, micro_batches, momentum, shares):
    """NumPy: statistics that decay with momentum ** share at each micro-batch.

    The variance is the micro-batch's own, divided by its rows: what lies between micro-batches has
    no part in it.
    """
    mean, variance = start
    for x, share in zip(micro_batches, shares):
        axes = tuple(range(x.ndim - 1))
        decay = momentum**share
        mean = decay * mean + (1 - decay) * x.mean(axes)
        variance = decay * variance + (1 - decay) * x.var(axes)
    return [mean, variance]


def test_momentum_decays_by_its_root_across_batches(float64):
    """At each micro-batch with momentum ** (1 / steps), however many rows it has."""
    model = sequential([3], **EAGERLY)
    start = statistics(model)
    windows = batches_of([3], cases.UNEVEN)
    converted = convert(model, "momentum", accum_steps=3)
    train(converted, windows)
    expected = decayed(start, [x for x, _ in sum(windows, [])], MOMENTUM, [1 / 3] * 6)
    assert_same_statistics(converted, expected, start)


def test_momentum_decays_by_rows_within_a_batch(float64):
    """At each slice with momentum to the power of its share of the batch."""
    model = sequential([3], **EAGERLY)
    start = statistics(model)
    batches = sum(batches_of([3], [[5, 4]]), [])
    converted = convert(model, "momentum", micro_batch_size=2)
    train(converted, [batches])
    slices = [x[begin : begin + 2] for x, _ in batches for begin in range(0, len(x), 2)]
    expected = decayed(start, slices, MOMENTUM, [2 / 5, 2 / 5, 1 / 5, 1 / 2, 1 / 2])
    assert_same_statistics(converted, expected, start)


def test_momentum_decays_by_batches_and_rows_together(float64):
    """In a window of batches that are cut, to the power of the share of batch and window."""
    model = sequential([3], **EAGERLY)
    start = statistics(model)
    batches = sum(batches_of([3], [[5, 4]]), [])
    converted = convert(model, "momentum", accum_steps=2, micro_batch_size=3)
    train(converted, [batches])
    slices = [x[begin : begin + 3] for x, _ in batches for begin in range(0, len(x), 3)]
    expected = decayed(start, slices, MOMENTUM, [3 / 10, 2 / 10, 3 / 8, 1 / 8])
    assert_same_statistics(converted, expected, start)


def test_momentum_of_a_partial_window_moves_as_far_as_of_a_whole_one(float64):
    """Towards the average of what it has, whose weights are those of a decay."""
    model = sequential([3], **EAGERLY)
    start = statistics(model)
    ((one, other),) = batches_of([3], [[4, 2]])
    converted = convert(model, "momentum", accum_steps=3)
    train(converted, [[one, other]])
    root = MOMENTUM ** (1 / 3)
    older, newer = root / (1 + root), 1 / (1 + root)
    averages = [
        older * take(one[0]) + newer * take(other[0])
        for take in (lambda x: x.mean(0), lambda x: x.var(0))
    ]
    expected = [
        MOMENTUM * before + (1 - MOMENTUM) * average for before, average in zip(start, averages)
    ]
    assert_same_statistics(converted, expected, start)


def test_momentum_of_a_fused_layer_has_the_correction_of_the_large_batch():
    """Bessel's, which tf_keras's fused layers make, counts the elements of the window."""
    model = sequential([2, 2, 3], **EAGERLY)
    start = statistics(model)
    ((one, other),) = batches_of([2, 2, 3], [[3, 2]])
    converted = convert(model, "momentum", accum_steps=2)
    train(converted, [[one, other]])
    mean, variance = decayed([0.0, 0.0], [one[0], other[0]], MOMENTUM, [1 / 2] * 2)
    elements = 5 * 4
    expected = [start[0] * MOMENTUM + mean, start[1] * MOMENTUM + variance * elements / 19]
    assert_same_statistics(converted, expected, start)


@pytest.mark.parametrize("mode", POOLING)
def test_a_momentum_of_one_leaves_statistics_at_rest(mode):
    """As in tf_keras, and without a division by zero."""
    model = sequential([3], norm(momentum=1.0), **EAGERLY)
    converted = convert(model, mode, accum_steps=2)
    train(converted, batches_of([3], [[4, 2]]))
    assert_rested(statistics(model), statistics(converted))


@pytest.mark.parametrize("mode", POOLING)
def test_a_momentum_that_is_set_later_counts(float64, mode):
    """A layer's momentum is the layer's own, also where the layer is rewritten."""
    model = sequential([3], **EAGERLY)
    start = statistics(model)
    converted = convert(model, mode, accum_steps=2)
    for each in (model, converted):
        norms_of(each)[0].momentum = 0.25
    ((batch,),) = batches_of([3], [[4]])
    train(converted, [[batch, batch]])
    assert_same_statistics(converted, run_large(model, [[batch, batch]]), start)
    assert norms_of(converted)[0].get_config()["momentum"] == 0.25


# ---- keep --------------------------------------------------------------------------------------

WARNING = (
    "{}: batch normalisation takes its statistics from each micro-batch, so updates are not those "
    "of the large batch; layers: {}. Choose batch_norm='pooled' (moving statistics of all rows of "
    "a window), 'momentum' (moved once an update) or 'freeze' (not moved, and normalised by); "
    "'keep' moves them with each micro-batch."
)


@pytest.mark.parametrize("mode", [None, "keep", ga.BatchNorm("keep")], ids=str)
def test_keep_is_named_in_one_warning(mode):
    """Chosen or not, it names the layers that train, nested ones too, and the choices."""
    model = nested()
    frozen = norm("frozen", trainable=False)
    model = tf_keras.Sequential([tf_keras.Input([3]), frozen, model], name="whole")
    compiled(model)
    with pytest.warns(ga.InexactWarning) as caught:
        ga.make_accumulating(model, 2, batch_norm=mode)
    names = ", ".join(layer.name for layer in norms_of(model) if layer.name != "frozen")
    texts = [str(each.message) for each in caught if each.category is ga.InexactWarning]
    assert texts == [WARNING.format("whole", names)]
    assert {"inner", "outer"} == set(names.split(", "))


@pytest.mark.parametrize("mode", ["momentum", "pooled", "freeze"])
def test_no_other_choice_warns(mode):
    """What has been chosen is known."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        convert(sequential([3]), mode, accum_steps=2)
    assert not [each for each in caught if issubclass(each.category, UserWarning)]


def test_keep_does_not_warn_where_nothing_is_accumulated():
    """A clip leaves batches what they are."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ga.make_accumulating(sequential([3]), agc=True, batch_norm="keep")
    assert not [each for each in caught if issubclass(each.category, UserWarning)]


@pytest.mark.parametrize("how", [{}, EAGERLY], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_keep_moves_with_each_micro_batch(way, how):
    """As plain tf_keras does on the small batches, on slices too."""
    model = compiled(pair(), **how)
    start = statistics(model)
    with pytest.warns(ga.InexactWarning):
        converted = convert(model, "keep", **WAYS[way])
    batches = sum(batches_of([2, 2, 3], [[5, 4, 2], [3, 1]]), [])
    fit(converted, [batches])
    size = WAYS[way].get("micro_batch_size", 99)
    small = [(x[begin : begin + size], y) for x, y in batches for begin in range(0, len(x), size)]
    assert_same_statistics(converted, run_plain(model, small), start)


# ---- freeze ------------------------------------------------------------------------------------


def deep(**call_arguments):
    """Batch normalisation first and within, under weights that look pretrained."""
    inputs = tf_keras.Input([3])
    hidden = norm("first")(inputs, **call_arguments)
    hidden = layers.Dense(4, "tanh")(hidden)
    hidden = norm("second", scale=False)(hidden, **call_arguments)
    model = tf_keras.Model(inputs, layers.Dense(1)(hidden))
    rng = np.random.default_rng(3)
    model.set_weights([rng.random(weight.shape) + 0.5 for weight in model.get_weights()])
    return model


def compile_with_momentum(*models, **arguments):
    for model in models:
        model.compile(tf_keras.optimizers.SGD(0.1, momentum=0.9), "mse", **arguments)


@pytest.mark.parametrize("how", [{}, EAGERLY], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_freeze_obeys_the_law(float64, way, how):
    """Weights, gamma and beta too, are those of the large batch with layers at inference."""
    model, reference = deep(), deep(training=False)
    compile_with_momentum(model, **how)
    compile_with_momentum(reference, **EAGERLY)
    start, at_rest = cases.weights_of(model), statistics(model)
    converted = convert(model, "freeze", **WAYS[way])
    windows = batches_of([3], windows_of(WAYS[way], cases.PARTIAL))
    fit(converted, windows)
    for window in windows:
        reference.train_on_batch(*cases.concatenate(window))
    cases.assert_same_weights(converted, reference, start, 1e-9)
    assert_rested(at_rest, statistics(converted))
    gamma, beta = norms_of(converted)[0].get_weights()[:2]
    assert np.all(gamma != start[0])
    assert np.all(beta != start[1])


def test_freeze_normalises_by_the_moving_statistics(float64):
    """Whether the model is called in training or not, its outputs are the source's predictions."""
    model = compiled(deep())
    converted = convert(model, "freeze", accum_steps=2)
    (x, _) = batches_of([3], [[4]])[0][0]
    expected = model(x, training=False).numpy()
    assert (
        np.max(np.abs(expected - convert(model, "pooled", accum_steps=2)(x, training=True))) > 0.1
    )
    for training in (True, False, None):
        np.testing.assert_array_equal(converted(x, training=training).numpy(), expected)
    np.testing.assert_allclose(converted.predict(x, verbose=0), expected, rtol=1e-12)
    assert_rested(statistics(model), statistics(converted))


@pytest.mark.parametrize("is_trained", [False, True], ids=["new", "trained before"])
@pytest.mark.parametrize("how", [{}, EAGERLY], ids=str)
def test_freeze_can_leave_gamma_and_beta_at_rest(float64, how, is_trained):
    """Then the law is that of layers that are not trainable; the order of weights is the source's."""
    model, reference = deep(), deep()
    compile_with_momentum(model, reference, **how)
    windows = batches_of([3], cases.PARTIAL)
    if is_trained:  # the optimizer has slots for gamma and beta
        for each in (model, reference):
            each.train_on_batch(*windows[0][0])
    for layer in norms_of(reference):
        layer.trainable = False
    reference.compile(reference.optimizer, "mse", **how)  # what is trainable counts from here on
    start = cases.weights_of(model)
    converted = ga.make_accumulating(model, 3, batch_norm=ga.BatchNorm("freeze", trainable=False))
    fit(converted, windows)
    for window in windows:
        reference.train_on_batch(*cases.concatenate(window))
    assert [weight.name for weight in converted.weights] == [each.name for each in model.weights]
    cases.assert_same_weights(converted, reference, start, 1e-9)
    for layer, source in zip(norms_of(converted), norms_of(model)):
        assert_rested(source.get_weights(), layer.get_weights())
    converted.set_weights(model.get_weights())
    assert_rested(start, cases.weights_of(converted))


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "in place"])
@pytest.mark.parametrize("optimizer", ["adam", "legacy adam"])
def test_gamma_and_beta_train_again_on_the_way_back(optimizer, inplace):
    """A model that is stripped trains all that the source trains."""
    model = deep()
    model.compile(cases.OPTIMIZERS[optimizer](), "mse", **EAGERLY)
    converted = ga.make_accumulating(
        model, 2, batch_norm=ga.BatchNorm("freeze", trainable=False), inplace=inplace
    )
    ((batch,),) = batches_of([3], [[4]])
    for _ in range(2):
        converted.train_on_batch(*batch)
    stripped = ga.strip_accumulating(converted, inplace=inplace)
    before = cases.weights_of(stripped)
    stripped.train_on_batch(*batch)
    assert all(np.any(a != b) for a, b in zip(before, cases.weights_of(stripped)))


# ---- outside of training steps -------------------------------------------------------------------


@pytest.mark.parametrize("mode", POOLING)
def test_outside_of_steps_it_is_the_plain_layer(mode):
    """A call in training moves the statistics at once; `evaluate` and `predict` leave them."""
    model = compiled(pair(), **EAGERLY)
    start = statistics(model)
    converted = convert(model, mode, accum_steps=2)
    ((one, other),) = batches_of([2, 2, 3], [[4, 3]])
    converted.train_on_batch(*one)  # a window is begun
    assert_rested(start, statistics(converted))
    for each in (model, converted):
        each(one[0], training=True)
    assert_same_statistics(converted, statistics(model), start, 1e-7)
    before = statistics(converted)
    np.testing.assert_allclose(
        converted.predict(other[0], verbose=0), model.predict(other[0], verbose=0), rtol=1e-5
    )
    assert np.isclose(
        converted.evaluate(*other, verbose=0), model.evaluate(*other, verbose=0), rtol=1e-5
    )
    assert_rested(before, statistics(converted))
    assert converted.pending_micro_batches == 1


# ---- what is dropped -----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", POOLING)
def test_a_remainder_that_is_dropped_moves_nothing(mode):
    """Statistics are those of the whole windows; the next window knows nothing of the rest."""
    model = compiled(pair(), **EAGERLY)
    windows = batches_of([2, 2, 3], [[4, 3], [5]])
    results = []
    for remainder, epoch in (("drop", windows), ("flush", windows[:1])):
        converted = convert(model, mode, accum_steps=2, remainder=remainder)
        for _ in range(2):
            fit(converted, epoch)
        results.append(statistics(converted))
    assert_rested(*results)
    assert np.any(results[0][0] != statistics(model)[0])


@pytest.mark.parametrize(
    "way", [{"accum_steps": 3}, {"accum_steps": 3, "micro_batch_size": 2}], ids=str
)
@pytest.mark.parametrize("mode", POOLING)
def test_discard_forgets_the_statistics_too(mode, way):
    """They stay as they were, and the next window is as if none had been begun."""
    model = compiled(pair(), **EAGERLY)
    start = statistics(model)
    forgotten, kept = batches_of([2, 2, 3], [[4, 3], [5, 2, 1]])
    converted, reference = (convert(model, mode, **way) for _ in range(2))
    for batch in forgotten:
        converted.train_on_batch(*batch)
    assert converted.discard()
    assert_rested(start, statistics(converted))
    for each in (converted, reference):
        for batch in kept:
            each.train_on_batch(*batch)
    assert_rested(statistics(reference), statistics(converted))
    assert np.any(statistics(converted)[0] != start[0])


@pytest.mark.parametrize("how", [{}, EAGERLY], ids=str)
@pytest.mark.parametrize("on_nonfinite", ["window", "micro_batch"])
def test_a_pass_that_is_not_finite_adds_nothing(on_nonfinite, how):
    """The statistics are those of the other micro-batches, whatever becomes of the update."""
    model = compiled(pair(), **how)
    start = statistics(model)
    ((one, bad, other),) = batches_of([2, 2, 3], [[4, 3, 2]])
    bad[0][1, 0, 0, 0] = np.nan
    converted = convert(model, "pooled", transforms=[ga.Accumulate(3, on_nonfinite=on_nonfinite)])
    train(converted, [[one, bad, other]])
    assert_same_statistics(converted, run_large(model, [[one, other]]), start)


@pytest.mark.parametrize("mode", POOLING)
def test_a_window_of_nothing_finite_moves_nothing(mode):
    """There is nothing to move towards."""
    model = compiled(pair(), **EAGERLY)
    start = statistics(model)
    windows = batches_of([2, 2, 3], [[4, 3]])
    for x, _ in windows[0]:
        x[0] = np.inf
    converted = convert(model, mode, accum_steps=2)
    train(converted, windows)
    assert_rested(start, statistics(converted))
    assert converted.skipped_windows == 1


def test_a_batch_without_rows_moves_nothing(float64):
    """A window of it is as if it had not been."""
    model = sequential([3], **EAGERLY)
    start = statistics(model)
    converted = convert(model, "pooled", micro_batch_size=2)
    converted.train_on_batch(np.zeros([0, 3]), np.zeros([0, 1]))
    assert_rested(start, statistics(converted))


@pytest.mark.parametrize(
    "way",
    [
        {"micro_batch_size": 2},
        {"accum_steps": {0: 1}, "micro_batch_size": 2},
        {"accum_steps": 2, "micro_batch_size": 2},
    ],
    ids=str,
)
def test_a_batch_that_fails_is_in_no_pool(float64, way):
    """Where its gradients are forgotten, so are its statistics."""
    model = tf_keras.Sequential(
        [
            tf_keras.Input([2], dtype="int32"),
            layers.Embedding(9, 3, trainable=False),
            norm(),
            layers.Flatten(),
            layers.Dense(1),
        ]
    )
    compiled(model)
    start = statistics(model)
    rng = np.random.default_rng(0)
    count = way["accum_steps"] if way.get("accum_steps") == 2 else 1
    window = [(rng.integers(0, 9, size=[6, 2]), np.ones([6, 1])) for _ in range(count)]
    bad = window[0][0].copy()
    bad[4:] = 99  # no such words, in the last slice
    converted = convert(model, "pooled", **way)
    with pytest.raises(tf.errors.InvalidArgumentError):
        converted.train_on_batch(bad, np.ones([6, 1]))
    assert converted.pending_micro_batches == 0
    for batch in window:
        converted.train_on_batch(*batch)
    assert converted.pending_micro_batches == 0
    assert_same_statistics(converted, run_large(model, [window]), start)


# ---- what is refused -----------------------------------------------------------------------------

OPTIONS = {"renorm": {"renorm": True}, "virtual_batch_size": {"virtual_batch_size": 2}}


def with_option(option):
    """A layer with an option that is deep within a model."""
    inner = tf_keras.Sequential(
        [tf_keras.Input([3]), layers.Dense(3), norm("special", **OPTIONS[option])], name="inner"
    )
    inputs = tf_keras.Input([3])
    hidden = inner(norm("first")(inputs))
    return compiled(tf_keras.Model(inputs, layers.Dense(1)(hidden), name="whole"), **EAGERLY)


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "in place"])
@pytest.mark.parametrize("mode", POOLING)
@pytest.mark.parametrize("option", OPTIONS)
def test_statistics_that_are_not_those_of_a_batch_are_refused(option, mode, inplace):
    """By name, in one line, before anything is changed."""
    model = with_option(option)
    before = [(type(layer), layer.dtype_policy.name) for layer in model._flatten_layers()]
    optimizer = model.optimizer
    with pytest.raises(ValueError) as error:  # noqa: PT011  (its whole text is compared)
        ga.make_accumulating(model, 2, precision="mixed_float16", batch_norm=mode, inplace=inplace)
    assert str(error.value) == (
        f"BatchNorm.mode '{mode}' must be given layers without {option}; got 'special' in 'whole'. "
        "Use 'keep' or 'freeze'."
    )
    after = [(type(layer), layer.dtype_policy.name) for layer in model._flatten_layers()]
    assert before == after
    assert model.optimizer is optimizer


@pytest.mark.parametrize("option", OPTIONS)
def test_keep_and_freeze_take_every_layer(option):
    """What moves as tf_keras has it, or rests, may be computed in any way."""
    ((one, other),) = batches_of([3], [[4, 2]])
    kept, frozen = with_option(option), with_option(option)
    start = statistics(kept)
    with pytest.warns(ga.InexactWarning, match="special"):
        convert(kept, "keep", accum_steps=2, inplace=True)
    convert(frozen, "freeze", accum_steps=2, inplace=True)
    for converted in (kept, frozen):
        train(converted, [[one, other]])
    assert all(np.any(a != b) for a, b in zip(start, statistics(kept)))
    assert_rested(start, statistics(frozen))


# ---- what is seen of it --------------------------------------------------------------------------


def converted_by(model, mode, **arguments):
    if mode == "keep":
        with pytest.warns(ga.InexactWarning):
            return convert(model, mode, **arguments)
    return convert(model, mode, **arguments)


def summary_of(model):
    lines = []
    model.summary(print_fn=lines.append)
    return [line for line in "\n".join(lines).splitlines() if not line.startswith("Model:")]


@pytest.mark.parametrize("mode", MODES)
def test_the_layers_are_seen_as_the_source_s(mode):
    """Weights and their order, names, class names, configs and the summary do not change."""
    model = compiled(deep())
    converted = converted_by(model, mode, accum_steps=2)
    assert_rested(model.get_weights(), converted.get_weights())
    assert [weight.name for weight in converted.weights] == [each.name for each in model.weights]
    assert summary_of(converted) == summary_of(model)
    assert converted.count_params() == model.count_params()
    for ours, theirs in zip(converted.layers, model.layers):
        assert ours.name == theirs.name
        assert type(ours).__name__ == type(theirs).__name__
        assert ours.get_config() == theirs.get_config()
        assert tf_keras.layers.serialize(ours) == tf_keras.layers.serialize(theirs)
        assert isinstance(ours, type(theirs))
    for ours, theirs in zip(norms_of(converted), norms_of(model)):
        assert (ours.momentum, ours.epsilon) == (theirs.momentum, theirs.epsilon)
        assert_rested(theirs.get_weights(), ours.get_weights())


@pytest.mark.parametrize("mode", MODES)
def test_the_source_is_not_touched(mode):
    """Its layers are plain ones, and training the copy moves none of its weights."""
    model = compiled(deep(), **EAGERLY)
    before = model.get_weights()
    converted = converted_by(model, mode, accum_steps=2)
    train(converted, batches_of([3], [[4, 2]]))
    assert_rested(before, model.get_weights())
    assert {type(layer) for layer in norms_of(model)} == {layers.BatchNormalization}


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "in place"])
@pytest.mark.parametrize("mode", MODES)
def test_stripping_gives_the_plain_layers_back(mode, inplace):
    """Of the very class, with the statistics that were reached; they move as plain ones."""
    model = compiled(deep(), **EAGERLY)
    ((one, other),) = batches_of([3], [[4, 2]])
    converted = converted_by(model, mode, accum_steps=2, inplace=inplace)
    train(converted, [[one, other]])
    reached = converted.get_weights()
    stripped = ga.strip_accumulating(converted, inplace=inplace)
    assert (stripped is model) == inplace
    assert_rested(reached, stripped.get_weights())
    assert {type(layer) for layer in norms_of(stripped)} == {layers.BatchNormalization}
    plain = compiled(tf_keras.models.clone_model(stripped), **EAGERLY)
    plain.set_weights(reached)
    for each in (stripped, plain):
        each.train_on_batch(*one)
    assert_same_statistics(stripped, statistics(plain), reached_statistics(stripped, reached), 1e-6)


def reached_statistics(model, weights):
    twin = tf_keras.models.clone_model(model)
    twin.set_weights(weights)
    return statistics(twin)


# ---- together with precision ---------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("mode", MODES)
def test_outputs_are_of_the_dtype_of_tf_keras_s_own_layer(mode, policy):
    """Under a policy of 16 bits, in training and not; the weights are float32."""
    model = compiled(pair_in_float32())
    converted = converted_by(model, mode, transforms=[ga.Precision(policy), ga.Accumulate(2)])
    for layer in norms_of(converted):
        x = tf.ones([2, 12] if layer.name == "flat" else [2, 2, 2, 3])
        own = layers.BatchNormalization.from_config({**layer.get_config(), "dtype": policy})
        for training in (True, False):
            assert layer(x, training=training).dtype == own(x, training=training).dtype
            assert layer(x, training=training).dtype == policy[len("mixed_") :]
        assert {weight.dtype for weight in layer.weights} == {tf.float32}
        assert {weight.dtype for weight in own.weights} == {tf.float32}


def pair_in_float32():
    """Images to two layers side by side, of which configs say all: fused, and of another rank."""
    images = tf_keras.Input([2, 2, 3])
    sides = [norm("flat")(layers.Flatten()(images)), layers.Flatten()(norm("fused")(images))]
    return tf_keras.Model(images, layers.Dense(1)(layers.Concatenate()(sides)))


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("how", [{}, EAGERLY], ids=str)
def test_pooled_in_16_bits_is_pooled_in_float32(policy, how):
    """Statistics of inputs in 16 bits are computed, and pooled, as wide as tf_keras does it."""
    model = compiled(pair_in_float32(), **how)
    start = statistics(model)
    converted = convert(
        model, "pooled", transforms=[ga.Precision(policy), ga.Split(3), ga.Accumulate(2)]
    )
    windows = batches_of([2, 2, 3], [[4, 5], [3]])
    train(converted, windows)
    plain = [
        layers.BatchNormalization.from_config({**layer.get_config(), "dtype": policy})
        for layer in norms_of(model)
    ]
    for x, _ in map(cases.concatenate, windows):
        for layer in plain:
            seen = x if layer.name == "fused" else x.reshape([-1, 12])
            layer(tf.cast(seen, policy[len("mixed_") :]), training=True)
    expected = [each.numpy() for layer in plain for each in layer.weights[2:]]
    assert_same_statistics(converted, expected, start)


@pytest.mark.parametrize("mode", POOLING)
def test_a_scaled_loss_scales_no_statistics(mode):
    """With the loss scale of float16, statistics move as in bfloat16, to its rounding."""
    results = []
    windows = batches_of([2, 2, 3], [[4, 5], [3]])
    for policy in ("mixed_float16", "mixed_bfloat16"):
        model = compiled(pair_in_float32(), **EAGERLY)
        start = statistics(model)
        transforms = [ga.Precision(policy), ga.Accumulate(2)]
        converted = convert(model, mode, transforms=transforms)
        train(converted, windows)
        results.append(converted)
    assert_same_statistics(results[1], statistics(results[0]), start, 0.02)


# ---- files ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interrupted():
    """By mode, a model in the middle of a window, its batches, and where it would have ended."""
    made = {}
    for mode in POOLING:
        tf_keras.utils.set_random_seed(7)
        windows = batches_of([2, 2, 3], [[4, 3, 2], [5, 1, 6]])
        batches = sum(windows, [])
        model = convert(compiled(pair_in_float32()), mode, accum_steps=3)
        whole = convert(compiled(pair_in_float32()), mode, accum_steps=3)
        whole.set_weights(model.get_weights())
        start = statistics(model)
        for batch in batches[:5]:
            model.train_on_batch(*batch)
        for batch in batches:
            whole.train_on_batch(*batch)
        assert model.pending_micro_batches == 2
        made[mode] = model, batches, statistics(whole), start
    return made


@pytest.mark.long
@pytest.mark.parametrize("file", ["model.keras", "model", "checkpoint"])
@pytest.mark.parametrize("mode", POOLING)
def test_a_pending_window_survives(interrupted, tmp_path, mode, file):
    """Saved and loaded in its middle, it ends with the statistics of the run that went on."""
    model, batches, expected, start = interrupted[mode]
    path = str(tmp_path / file)
    if file == "checkpoint":
        loaded = convert(compiled(pair_in_float32()), mode, accum_steps=3)
        tf.train.Checkpoint(loaded).read(tf.train.Checkpoint(model).write(path)).assert_consumed()
    else:
        model.save(path)
        loaded = tf_keras.models.load_model(path)
    assert loaded.pending_micro_batches == 2
    assert_rested(statistics(model), statistics(loaded))
    loaded.train_on_batch(*batches[5])
    assert loaded.pending_micro_batches == 0
    assert_same_statistics(loaded, expected, start)


@pytest.mark.long
def test_a_window_that_hdf5_drops_leaves_no_statistics(interrupted, tmp_path):
    """Its warnings say so; the next window is pooled by itself."""
    model, batches, _, start = interrupted["pooled"]
    path = str(tmp_path / "model.h5")
    with pytest.warns(UserWarning, match="HDF5 holds no partial window; 2 pending"):
        model.save(path)
    with pytest.warns(UserWarning, match="had 2 pending micro-batches, which are dropped"):
        loaded = tf_keras.models.load_model(path)
    assert_rested(statistics(model), statistics(loaded))
    plain = ga.strip_accumulating(loaded)
    for batch in batches[:3]:
        loaded.train_on_batch(*batch)
    assert_same_statistics(loaded, run_large(plain, [batches[:3]]), start)


def test_an_optimizer_comes_back_where_gamma_and_beta_rest(tmp_path):
    """A `.keras` file holds its count and moments, whatever it was built for before."""
    x, y = np.ones([4, 3], "float32"), np.ones([4, 1])
    source = sequential([3])
    source.compile("adam", "mse")
    source.fit(x, y, verbose=0)
    model = convert(source, ga.BatchNorm("freeze", trainable=False), accum_steps=2)
    model.fit(x, y, batch_size=2, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = tf_keras.models.load_model(tmp_path / "model.keras")
    assert int(loaded.optimizer.iterations) == int(model.optimizer.iterations) == 2
    for ours, theirs in zip(loaded.optimizer.variables, model.optimizer.variables):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("mode", MODES)
def test_a_loaded_model_does_what_was_chosen(tmp_path, mode):
    """Its file names the plain layers, and its chain rewrites them anew."""
    model = compiled(deep(), **EAGERLY)
    converted = converted_by(model, mode, accum_steps=2)
    path = str(tmp_path / "model.keras")
    converted.save(path)
    loaded = tf_keras.models.load_model(path)
    assert loaded.transforms == converted.transforms
    loaded.run_eagerly = True
    for each in (converted, loaded):
        train(each, batches_of([3], [[4, 2], [3]]))
    for ours, theirs in zip(loaded.get_weights(), converted.get_weights()):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    stripped = ga.strip_accumulating(loaded)
    assert {type(layer) for layer in norms_of(stripped)} == {layers.BatchNormalization}
