"""The clips and Scale against NumPy: whole windows, micro-batches, slices, units, heads, dtypes.

With SGD at a learning rate of one, what an update takes off the weights is the gradient that
the chain has made.
"""

import functools
import itertools

import cases
import numpy as np
import pytest
import references
import tensorflow as tf
import tf_keras
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tf_keras import layers

import ga_transform as ga
from ga_transform.stages import apply_stages

#: For float64: what a sum of a few dozen rounded squares, and a quotient, may be off.
ROUNDING = 1e-12


def sequential(*parts, shape=(4,), dtype=None):
    """A built model of layers in a row."""
    return tf_keras.Sequential([tf_keras.Input(shape, dtype=dtype), *parts])


def two_layers():
    """A linear network, whose gradients `references.two_layer_gradients` knows."""
    return sequential(layers.Dense(3, name="hidden"), layers.Dense(2, name="head"))


def compiled(model, **arguments):
    model.compile(tf_keras.optimizers.SGD(1.0), "mse", **{"run_eagerly": True, **arguments})
    return model


def converted(model, *transforms, **arguments):
    return ga.make_accumulating(compiled(model, **arguments), transforms=list(transforms))


def assert_close(ours, theirs, tolerance=ROUNDING):
    """Within `tolerance` of the largest element, array by array."""
    assert len(ours) == len(theirs)
    for one, other in zip(map(references.array, ours), map(references.array, theirs)):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * np.max(np.abs(other)))


def assert_same_bits(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs):
        assert np.asarray(one).dtype == np.asarray(other).dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def random_like(variables, seed=0, size=1.0):
    """Gradients whose elements differ by orders of magnitude, so that clips reach some units."""
    rng = np.random.default_rng(seed)
    return [
        tf.constant(
            size * rng.normal(size=variable.shape) * np.exp(rng.normal(size=variable.shape)),
            variable.dtype,
        )
        for variable in variables
    ]


def randomise(model, seed=1):
    """Weights, and biases too, that are not zero."""
    rng = np.random.default_rng(seed)
    model.set_weights([rng.normal(size=weight.shape) for weight in model.get_weights()])
    return model


def names_of(variables):
    return [variable.name.split(":")[0] for variable in variables]


# ---- a window's mean gradient, and each micro-batch's ------------------------------------------

#: Windows by the rows of their micro-batches.
WINDOWS = [[3, 1], [2, 5]]


def two_layer_agc(gradients, weights, **arguments):
    """AGC on `two_layers`: units are columns and whole biases; the head's kernel is exempt."""
    axes = [(0,), (0,), None, (0,)]
    return [
        g if a is None else references.clip_by_agc(g, w, a, **arguments)
        for g, w, a in zip(gradients, weights, axes)
    ]


#: By name: a stage, and what it makes of gradients (and weights) in NumPy.
STAGES = {
    "ClipByGlobalNorm": (
        ga.ClipByGlobalNorm(0.3),
        lambda gradients, _: references.clip_by_global_norm(gradients, 0.3),
    ),
    "ClipByNorm": (
        ga.ClipByNorm(0.2),
        lambda gradients, _: references.clip_by_norm(gradients, 0.2),
    ),
    "ClipByValue": (
        ga.ClipByValue(0.1),
        lambda gradients, _: references.clip_by_value(gradients, 0.1),
    ),
    "Scale": (
        ga.Scale(-0.7),
        lambda gradients, _: references.scale(gradients, -0.7),
    ),
    "ClipByAGC": (
        ga.ClipByAGC(0.05, eps=0.1),
        lambda gradients, weights: two_layer_agc(gradients, weights, clip_factor=0.05, eps=0.1),
    ),
}
#: Stages that leave the gradients of these tests as they are.
WIDE = {
    "ClipByGlobalNorm": ga.ClipByGlobalNorm(1e4),
    "ClipByNorm": ga.ClipByNorm(1e4),
    "ClipByValue": ga.ClipByValue(1e4),
    "Scale": ga.Scale(1.0),
    "ClipByAGC": ga.ClipByAGC(1e4, eps=1.0),
}


def micro_batches(seed=2):
    """For each window, its micro-batches, on which gradients are of the order of one."""
    rng = np.random.default_rng(seed)
    return [
        [(rng.normal(size=[rows, 4]), 3 * rng.normal(size=[rows, 2])) for rows in window]
        for window in WINDOWS
    ]


def train(model, windows):
    for batch in itertools.chain.from_iterable(windows):
        model.train_on_batch(*batch)
    return model.get_weights()


def two_layer_training(weights, windows, micro_batch_stage=None, update_stage=None):
    """Weights after the updates of some windows, in NumPy; every stage must change something."""

    def staged(stage, gradients):
        if stage is None:
            return gradients
        result = stage(gradients, weights)
        assert any(np.max(np.abs(g - r)) > 1e-3 for g, r in zip(gradients, result))
        return result

    for window in windows:
        rows = [len(x) for x, _ in window]
        parts = [
            staged(micro_batch_stage, references.two_layer_gradients(weights, x, y))
            for x, y in window
        ]
        mean = [np.average(gradients, axis=0, weights=rows) for gradients in zip(*parts)]
        weights = [w - g for w, g in zip(weights, staged(update_stage, mean))]
    return weights


@pytest.mark.parametrize("name", STAGES)
def test_after_accumulate_a_stage_acts_on_the_windows_mean_gradient(float64, name):
    """A stage after `Accumulate` changes the mean gradient of each window, once an update."""
    stage, reference = STAGES[name]
    model = converted(randomise(two_layers()), ga.Accumulate(2), stage)
    expected = two_layer_training(model.get_weights(), micro_batches(), update_stage=reference)
    assert_close(train(model, micro_batches()), expected)


@pytest.mark.parametrize("name", STAGES)
def test_before_accumulate_a_stage_acts_on_each_micro_batch(float64, name):
    """A stage before `Accumulate` changes each micro-batch's gradient, before it is weighed."""
    stage, reference = STAGES[name]
    model = converted(randomise(two_layers()), stage, ga.Accumulate(2))
    expected = two_layer_training(model.get_weights(), micro_batches(), micro_batch_stage=reference)
    assert_close(train(model, micro_batches()), expected)


@pytest.mark.parametrize("name", STAGES)
def test_without_accumulate_a_stage_acts_on_each_batch(float64, name):
    """In a chain without `Accumulate` every batch is an update, and the stage acts on it."""
    stage, reference = STAGES[name]
    model = converted(randomise(two_layers()), stage)
    batches = [[batch] for window in micro_batches() for batch in window]
    expected = two_layer_training(model.get_weights(), batches, update_stage=reference)
    assert_close(train(model, batches), expected)


def test_fit_carries_out_a_chain_of_all_stages(float64):
    """In the graph of `fit`, stages on both sides of `Accumulate` act in the order written."""
    names = list(STAGES)
    before, after = names[:2], names[2:]
    model = converted(
        randomise(two_layers()),
        *[STAGES[name][0] for name in before],
        ga.Accumulate(2),
        *[STAGES[name][0] for name in after],
        run_eagerly=False,
    )

    def fold(some):
        def stages(gradients, weights):
            for name in some:
                gradients = STAGES[name][1](gradients, weights)
            return gradients

        return stages

    expected = two_layer_training(model.get_weights(), micro_batches(), fold(before), fold(after))
    model.fit(cases.dataset(itertools.chain.from_iterable(micro_batches())), verbose=0)
    assert_close(model.get_weights(), expected)


@pytest.mark.parametrize("where", ["after", "before"])
@pytest.mark.parametrize("name", WIDE)
def test_a_gradient_under_the_bound_trains_to_the_same_bits(name, where):
    """Where no bound is reached, the weights are those of the chain without the clip, bitwise."""
    source = randomise(two_layers())

    def trained(stage):
        chain = [ga.Accumulate(2), stage] if where == "after" else [stage, ga.Accumulate(2)]
        return train(converted(source, *chain), micro_batches()[:1])

    assert_same_bits(trained(WIDE[name]), trained(ga.Scale(1.0)))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", WIDE)
def test_a_gradient_under_the_bound_is_unchanged_to_the_bit(name, dtype):
    """A stage hands on the very numbers of a gradient that is within its bound."""
    tf_keras.backend.set_floatx(dtype)
    model = randomise(two_layers())
    gradients = random_like(model.trainable_variables)
    result = apply_stages([WIDE[name]], gradients, model.trainable_variables, model)
    assert_same_bits(result, gradients)


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 3.0])
def test_a_gradient_at_the_bound_is_unchanged_to_the_bit(max_norm):
    """A norm that equals the bound is no norm above it."""
    model = sequential(layers.Dense(1, use_bias=False), shape=[2])
    gradients = [tf.constant([[max_norm], [0.0]])]
    for stage in (ga.ClipByGlobalNorm(max_norm), ga.ClipByNorm(max_norm), ga.ClipByValue(max_norm)):
        result = apply_stages([stage], gradients, model.trainable_variables, model)
        assert_same_bits(result, gradients)


@pytest.mark.parametrize("name", STAGES)
def test_a_gradient_of_zeros_stays_zeros(name):
    """No stage divides by the norm of a gradient of zeros."""
    model = two_layers()
    gradients = [tf.zeros(variable.shape) for variable in model.trainable_variables]
    result = apply_stages([STAGES[name][0]], gradients, model.trainable_variables, model)
    for one, other in zip(result, gradients):
        np.testing.assert_array_equal(one, other)  # -0.0 is a zero too


@pytest.mark.parametrize(
    ("chain", "printed"),
    [
        (
            [ga.Accumulate(3), ga.ClipByNorm(0.2)],
            "Chain(Accumulate(steps=3) -> ClipByNorm(max_norm=0.2))",
        ),
        (
            [ga.ClipByNorm(0.2), ga.Accumulate(3)],
            "Chain(ClipByNorm(max_norm=0.2) -> Accumulate(steps=3))",
        ),
        (
            [ga.Scale(2.0), ga.Accumulate(3), ga.ClipByAGC(eps=0.1), ga.ClipByValue(1.0)],
            (
                "Chain(Scale(factor=2.0) -> Accumulate(steps=3) -> ClipByAGC(eps=0.1) -> "
                "ClipByValue(max_value=1.0))"
            ),
        ),
        ([ga.ClipByGlobalNorm(1.0)], "Chain(ClipByGlobalNorm(max_norm=1.0))"),
    ],
)
def test_the_printed_chain_shows_what_a_stage_acts_on(chain, printed):
    """Stages are printed on the side of `Accumulate` on which they act."""
    assert repr(converted(two_layers(), *chain).transforms) == printed


def test_weight_decay_is_not_clipped(float64):
    """A clip bounds the gradient; the optimizer's weight decay is added to what it leaves."""
    model = randomise(two_layers())
    model.compile(tf_keras.optimizers.SGD(1.0, weight_decay=0.5), "mse", run_eagerly=True)
    model = ga.make_accumulating(model, transforms=[ga.Accumulate(2), STAGES["ClipByAGC"][0]])
    weights, window = model.get_weights(), micro_batches()[0]
    clipped = [
        before - after
        for before, after in zip(
            weights, two_layer_training(weights, [window], update_stage=STAGES["ClipByAGC"][1])
        )
    ]
    assert_close(train(model, [window]), [w - 0.5 * w - g for w, g in zip(weights, clipped)])


def test_frozen_weights_count_in_no_norm(float64):
    """The global norm is that of the weights which are trained."""
    source = randomise(two_layers())
    source.get_layer("hidden").trainable = False
    model = converted(source, ga.Accumulate(2), ga.ClipByGlobalNorm(0.3))
    window = micro_batches()[0]
    x, y = (np.concatenate(part) for part in zip(*window))
    weights = model.get_weights()
    gradients = references.two_layer_gradients(weights, x, y)[2:]
    assert references.norm(*gradients) > 0.6
    clipped = references.clip_by_global_norm(gradients, 0.3)
    expected = weights[:2] + [w - g for w, g in zip(weights[2:], clipped)]
    assert_close(train(model, [window]), expected)


# ---- slices --------------------------------------------------------------------------------------

#: Rows of a table of nine, some of them twice and more, not in order.
ROWS = [5, 2, 5, 0, 2, 5, 7]
TOUCHED = [0, 2, 5, 7]

SPARSE = {
    **{name: stage for name, (stage, _) in STAGES.items()},
    "AGC on rows": ga.ClipByAGC(0.05, axes={"*/embeddings": (1,)}),
    "AGC on columns": ga.ClipByAGC(0.05, axes={"*/embeddings": (0,)}),
    "AGC on the table": ga.ClipByAGC(0.05, axes={"*/embeddings": (0, 1)}),
    "AGC on elements": ga.ClipByAGC(0.05, axes={"*/embeddings": ()}),
    "AGC on rows, counted from the end": ga.ClipByAGC(0.05, axes={"*/embeddings": (-1,)}),
    "AGC on columns, counted from the end": ga.ClipByAGC(0.05, axes={"*/embeddings": (-2,)}),
}
SPARSE_AXES = {
    "AGC on columns": (0,),
    "AGC on columns, counted from the end": (0,),
    "AGC on the table": (0, 1),
    "AGC on elements": (),
}


def table_of_words():
    """An embedding of nine rows, pooled, and a head."""
    return randomise(
        sequential(
            layers.Embedding(9, 3),
            layers.GlobalAveragePooling1D(),
            layers.Dense(1),
            shape=[7],
            dtype="int32",
        )
    )


def slices_of(rows, width, dtype="float64", height=9, seed=3):
    values = np.random.default_rng(seed).normal(size=[len(rows), *width])
    return tf.IndexedSlices(
        tf.constant(values, dtype), tf.constant(rows, tf.int64), tf.constant([height, *width])
    )


def sparse_reference(name, gradients, weights):
    """What a stage of `SPARSE` makes of the dense equivalents, in NumPy."""
    if not isinstance(SPARSE[name], ga.ClipByAGC):
        return STAGES[name][1](gradients, weights)
    axes = [SPARSE_AXES.get(name, (1,)), None, (0,)]
    eps = SPARSE[name].eps
    return [
        references.array(g) if a is None else references.clip_by_agc(g, w, a, 0.05, eps)
        for g, w, a in zip(gradients, weights, axes)
    ]


@pytest.mark.parametrize("name", SPARSE)
def test_slices_with_repeated_rows_are_treated_as_their_dense_equivalent(float64, name):
    """Rows that occur several times are summed before a stage measures them."""
    model = table_of_words()
    gradients = [slices_of(ROWS, [3]), *random_like(model.trainable_variables[1:])]
    result = apply_stages([SPARSE[name]], gradients, model.trainable_variables, model)
    dense = [tf.convert_to_tensor(references.array(gradient)) for gradient in gradients]
    expected = sparse_reference(name, gradients, model.get_weights())
    assert np.max(np.abs(expected[0] - dense[0])) > 1e-3
    assert_close(result, expected)
    assert_close(result, apply_stages([SPARSE[name]], dense, model.trainable_variables, model))


@pytest.mark.parametrize("name", SPARSE)
def test_slices_stay_slices_of_the_rows_that_were_touched(float64, name):
    """A stage makes slices of slices, each touched row once, and adds no row."""
    model = table_of_words()
    gradients = [slices_of(ROWS, [3]), *random_like(model.trainable_variables[1:])]
    result = apply_stages([SPARSE[name]], gradients, model.trainable_variables, model)[0]
    assert isinstance(result, tf.IndexedSlices)
    assert sorted(result.indices.numpy()) == TOUCHED
    assert result.values.shape == [len(TOUCHED), 3]
    assert result.dense_shape.numpy().tolist() == [9, 3]


@pytest.mark.parametrize(
    ("width", "axes"), [([], (0,)), ([3, 2], (0,)), ([3, 2, 2], (0, 1, 2))], ids=str
)
def test_slices_of_an_unknown_layers_weight_have_its_ranks_units(float64, width, axes):
    """AGC takes the units of slices, too, from the rank where the layer is not known."""
    model = sequential(Weighted([9, *width]))
    variables = model.trainable_variables
    randomise(model)
    slices = slices_of(ROWS, width)
    result = apply_stages([ga.ClipByAGC(0.1)], [slices], variables, model)
    assert isinstance(result[0], tf.IndexedSlices)
    expected = references.clip_by_agc(slices, model.get_weights()[0], axes, 0.1)
    assert_close(result, [expected])


@pytest.mark.parametrize("name", WIDE)
def test_slices_under_the_bound_are_unchanged_to_the_bit(name):
    """Slices within the bound, with each row once, pass as they are."""
    model = table_of_words()
    gradients = [
        slices_of(TOUCHED, [3], "float32"),
        *random_like(model.trainable_variables[1:]),
    ]
    result = apply_stages([WIDE[name]], gradients, model.trainable_variables, model)
    assert_same_bits(
        [result[0].values, result[0].indices], [gradients[0].values, gradients[0].indices]
    )


class Recorder(tf_keras.optimizers.SGD):
    """SGD that notes the gradients it is handed."""

    def apply_gradients(self, grads_and_vars, *args, **kwargs):
        pairs = list(grads_and_vars)
        self.handed = [gradient for gradient, _ in pairs]
        return super().apply_gradients(pairs, *args, **kwargs)


@pytest.mark.parametrize("where", ["after", "before"])
@pytest.mark.parametrize("name", ["ClipByGlobalNorm", "ClipByAGC"])
def test_the_optimizer_is_handed_slices(float64, name, where):
    """From an embedding to the optimizer, a clipped window stays sparse."""
    model = table_of_words()
    model.compile(Recorder(1.0), "mse", run_eagerly=True)
    stage = STAGES[name][0]
    chain = [ga.Accumulate(2), stage] if where == "after" else [stage, ga.Accumulate(2)]
    model = ga.make_accumulating(model, transforms=chain, inplace=True)
    before = model.get_weights()[0]
    for words in ([5, 2, 5, 5, 2, 2, 2], [5, 5, 5, 0, 0, 0, 7]):
        model.train_on_batch(np.array([words], "int32"), np.ones([1, 1]))
    handed = model.optimizer.handed[0]
    assert isinstance(handed, tf.IndexedSlices)
    assert set(handed.indices.numpy()) == set(TOUCHED)
    moved = np.any(model.get_weights()[0] != before, axis=1)
    assert np.flatnonzero(moved).tolist() == TOUCHED


@pytest.mark.parametrize("where", ["after", "before"])
@pytest.mark.parametrize("name", ["ClipByGlobalNorm", "ClipByNorm", "ClipByAGC", "AGC on columns"])
def test_an_embedding_trains_by_the_clipped_gradient(float64, name, where):
    """The table's rows move by what NumPy makes of the dense gradient, window or micro-batch."""
    source = compiled(table_of_words())
    rng = np.random.default_rng(4)
    window = [
        (rng.integers(0, 7, size=[rows, 7]).astype("int32"), 5 * rng.normal(size=[rows, 1]))
        for rows in (2, 3)
    ]
    weights = source.get_weights()

    def gradients(x, y):
        """By hand: a word's row gets a seventh of ``2 (p - y) B / rows`` each time it occurs."""
        table, kernel, bias = weights
        pooled = table[x].mean(1)
        by_output = 2 * (pooled @ kernel + bias - y) / y.size
        by_table = np.zeros_like(table)
        for row, words in zip(by_output @ kernel.T, x):
            np.add.at(by_table, words, row / 7)
        return [by_table, pooled.T @ by_output, by_output.sum(0)]

    if where == "after":
        chain = [ga.Accumulate(2), SPARSE[name]]
        mean = gradients(*cases.concatenate(window))
        expected = sparse_reference(name, mean, weights)
    else:
        chain = [SPARSE[name], ga.Accumulate(2)]
        parts = [sparse_reference(name, gradients(*batch), weights) for batch in window]
        expected = [(2 * one + 3 * other) / 5 for one, other in zip(*parts)]
    model = ga.make_accumulating(source, transforms=chain)
    assert_close(train(model, [window]), [w - g for w, g in zip(weights, expected)])


# ---- AGC: the formula ----------------------------------------------------------------------------


def agc(spec, model, gradients):
    return apply_stages([spec], gradients, model.trainable_variables, model)


def test_agc_on_a_dense_kernel_by_hand():
    """Each column is limited to clip_factor times its weights' norm, or to that of eps."""
    # clip_factor 0.05, eps 0.001; units are the columns of a kernel (in, out).
    #   unit 0: ||W|| = 5, limit 0.25;            ||G|| = 0.5   -> times 0.25 / 0.5 = 0.5
    #   unit 1: ||W|| = 0, limit 0.05 * 0.001;    ||G|| = 5     -> times 0.00005 / 5 = 0.00001
    #   unit 2: ||W|| = 1, limit 0.05;            ||G|| = 0.005 -> as it is
    kernel = np.array([[3.0, 0.0, 0.6], [4.0, 0.0, 0.8]], "float32")
    gradient = np.array([[0.3, 3.0, 0.003], [0.4, 4.0, 0.004]], "float32")
    clipped = np.array([[0.15, 0.00003, 0.003], [0.2, 0.00004, 0.004]], "float32")
    model = compiled(sequential(layers.Dense(3, use_bias=False), shape=[2]))
    model.set_weights([kernel])
    spec = ga.ClipByAGC(0.05, eps=0.001, exclude_head=False)
    result = agc(spec, model, [tf.constant(gradient)])
    np.testing.assert_allclose(result[0], clipped, rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(result[0])[:, 2], gradient[:, 2])


def test_agc_by_hand_through_training():
    """The numbers worked out by hand are those by which an update moves a kernel."""
    # Inputs are the rows of the identity and the loss is linear, so that the gradient of
    # the kernel is the targets over the rows: 2 * G / 2. Each row is a micro-batch.
    model = sequential(layers.Dense(2, use_bias=False), shape=[2])
    model.set_weights([np.array([[3.0, 0.0], [4.0, 0.0]])])
    model.compile(
        tf_keras.optimizers.SGD(1.0), lambda y, p: tf.reduce_sum(y * p, -1), run_eagerly=True
    )
    spec = ga.ClipByAGC(0.05, eps=0.001, exclude_head=False)
    model = ga.make_accumulating(model, transforms=[ga.Accumulate(2), spec])
    model.train_on_batch(np.array([[1.0, 0.0]]), 2 * np.array([[0.3, 3.0]]))
    model.train_on_batch(np.array([[0.0, 1.0]]), 2 * np.array([[0.4, 4.0]]))
    moved = np.array([[3.0, 0.0], [4.0, 0.0]]) - model.get_weights()[0]
    np.testing.assert_allclose(moved, [[0.15, 0.00003], [0.2, 0.00004]], rtol=1e-5)


def test_agc_divides_by_a_millionth_at_least():
    """A gradient norm under 1e-6 that is above its limit is divided by 1e-6."""
    # ||W|| = 0, limit 0.0001 * 0.001 = 1e-7; ||G|| = 5e-7 -> times 1e-7 / 1e-6 = 0.1
    model = sequential(layers.Dense(1, use_bias=False, kernel_initializer="zeros"), shape=[2])
    spec = ga.ClipByAGC(0.0001, eps=0.001, exclude_head=False)
    result = agc(spec, model, [tf.constant([[3e-7], [4e-7]])])
    np.testing.assert_allclose(result[0], [[3e-8], [4e-8]], rtol=1e-6)


def test_agcs_defaults_are_the_papers():
    """By default clip_factor is 0.01, eps is 0.001 and the head is left out."""
    model = randomise(two_layers())
    gradients = random_like(model.trainable_variables)
    ours = agc(ga.ClipByAGC(), model, gradients)
    named = ga.ClipByAGC(clip_factor=0.01, eps=0.001, exclude_head=True)
    assert_same_bits(ours, agc(named, model, gradients))
    assert_close(ours, two_layer_agc(gradients, model.get_weights()), 1e-6)


# ---- AGC: units by layer -------------------------------------------------------------------------


class Weighted(layers.Layer):
    """A layer the library does not know, with a weight of any shape."""

    def __init__(self, shape, weight_name="weight"):
        super().__init__()
        self._weight_shape, self._weight_name = shape, weight_name

    def build(self, _):
        weight = self.add_weight(name=self._weight_name, shape=self._weight_shape)
        setattr(self, self._weight_name, weight)

    def call(self, inputs):
        return inputs


class Block(layers.Layer):
    """A layer of a user's own, made of known layers."""

    def __init__(self):
        super().__init__()
        self.up = layers.Conv1DTranspose(3, 2)
        self.rest = [layers.Dense(5), {"last": layers.SeparableConv1D(6, 2)}]

    def call(self, inputs):
        return self.rest[1]["last"](self.rest[0](self.up(inputs)))


class OwnDense(layers.Dense):
    """A subclass of a known layer."""


class OwnTranspose(layers.Conv2DTranspose):
    """A subclass of a known layer whose base is another known layer."""


class OwnModel(tf_keras.Model):
    """A subclassed model, with a weight of its own."""

    def __init__(self):
        super().__init__()
        self.up = layers.Conv1DTranspose(3, 2)
        self.out = layers.Dense(2)
        self.gain = tf.Variable(tf.ones([3, 4, 2, 2], tf_keras.backend.floatx()), name="gain")

    def call(self, inputs):
        return self.out(self.up(inputs)) * tf.reduce_sum(self.gain)


def self_attention(*arguments, **keywords):
    layer = layers.MultiHeadAttention(*arguments, **keywords)
    return lambda x: layer(x, x)


def nested(x):
    """A sequential model inside a functional one inside the model."""
    inner = sequential(layers.Conv1DTranspose(3, 2), layers.Dense(5), shape=[6, 4])
    inputs = tf_keras.Input([6, 4])
    return tf_keras.Model(inputs, layers.LSTM(2)(inner(inputs)))(x)


def biased(*kernel_axes):
    """A kernel of these axes, and a bias that is a vector."""
    return {"/kernel": kernel_axes, "/bias": (0,)}


VECTORS = {"/gamma": (0,), "/beta": (0,)}
RECURRENT = {"/kernel": (0,), "/recurrent_kernel": (0,), "/bias": (0,)}
GRU = {**RECURRENT, "/bias": (0, 1)}
SEPARABLE_1D = {"/depthwise_kernel": (0,), "/pointwise_kernel": (0, 1), "/bias": (0,)}
ATTENTION = {
    **{f"{part}/kernel": (0,) for part in ("query", "key", "value")},
    **{f"{part}/bias": (0, 1) for part in ("query", "key", "value")},
    "attention_output/kernel": (0, 1),
    "attention_output/bias": (0,),
}

#: By equation: the shape of the output, the axes of the bias, the shape of the input, and the
#: axes of the kernel that are contracted. A bias of any rank is one unit.
EQUATIONS = {
    "ab,bc->ac": ([3], "c", [4], (0,)),
    "abc,cd->abd": ([None, 3], "d", [5, 4], (0,)),
    "abc,cde->abde": ([None, 2, 3], "de", [5, 4], (0,)),
    "abcd,cde->abe": ([None, 5], "e", [6, 2, 3], (0, 1)),
    "abc,dc->abd": ([None, 3], "d", [5, 4], (1,)),
    "abc,bcd->abd": ([5, 3], "bd", [5, 4], (1,)),
    "abc,dbec->ade": ([2, 3], "de", [5, 4], (1, 3)),
    "...x,xy->...y": ([3], "y", [5, 4], (0,)),
    "...x,yx->...y": ([3], "y", [5, 4], (1,)),
    "...xy,xzy->...z": ([3], "z", [5, 4], (0, 2)),
    "ab...,bc->ac...": ([3, 5], "c", [4, 5], (0,)),
}
EINSUMS = {
    f"EinsumDense {equation}": (
        functools.partial(layers.EinsumDense, equation, output, bias_axes=bias),
        shape,
        {"/kernel": axes, "/bias": tuple(range(len(bias)))},
    )
    for equation, (output, bias, shape, axes) in EQUATIONS.items()
}

#: By name: what makes a layer, the shape of its input, and by the end of a weight's path the
#: axes over which its units' norms are taken.
LAYERS = {
    "Dense": (lambda: layers.Dense(3), [4], biased(0)),
    "Dense of sequences": (lambda: layers.Dense(3), [5, 4], biased(0)),
    "own Dense": (lambda: OwnDense(3), [4], biased(0)),
    "LSTM": (lambda: layers.LSTM(3), [5, 4], RECURRENT),
    "GRU": (lambda: layers.GRU(3), [5, 4], GRU),
    "GRU of one bias": (lambda: layers.GRU(3, reset_after=False), [5, 4], RECURRENT),
    "SimpleRNN": (lambda: layers.SimpleRNN(3), [5, 4], RECURRENT),
    "stacked cells": (
        lambda: layers.RNN([layers.LSTMCell(3), layers.GRUCell(2, reset_after=False)]),
        [5, 4],
        RECURRENT,
    ),
    "Conv1D": (lambda: layers.Conv1D(3, 2), [6, 4], biased(0, 1)),
    "Conv2D": (lambda: layers.Conv2D(3, (2, 5)), [6, 6, 4], biased(0, 1, 2)),
    "Conv3D": (lambda: layers.Conv3D(3, 2), [4, 4, 4, 5], biased(0, 1, 2, 3)),
    "Conv1D, grouped": (lambda: layers.Conv1D(6, 3, groups=2), [6, 4], biased(0, 1)),
    "Conv2D, grouped": (lambda: layers.Conv2D(6, 3, groups=3), [6, 6, 6], biased(0, 1, 2)),
    "Conv1DTranspose": (lambda: layers.Conv1DTranspose(3, 2), [6, 4], biased(0, 2)),
    "Conv2DTranspose": (lambda: layers.Conv2DTranspose(3, 2), [6, 6, 4], biased(0, 1, 3)),
    "own Conv2DTranspose": (lambda: OwnTranspose(3, 2), [6, 6, 4], biased(0, 1, 3)),
    "Conv3DTranspose": (lambda: layers.Conv3DTranspose(3, 2), [4, 4, 4, 5], biased(0, 1, 2, 4)),
    "DepthwiseConv1D": (
        lambda: layers.DepthwiseConv1D(3, depth_multiplier=2),
        [6, 4],
        {"/depthwise_kernel": (0,), "/bias": (0,)},
    ),
    "DepthwiseConv2D": (
        lambda: layers.DepthwiseConv2D(3, depth_multiplier=2),
        [6, 6, 4],
        {"/depthwise_kernel": (0, 1), "/bias": (0,)},
    ),
    "SeparableConv1D": (
        lambda: layers.SeparableConv1D(5, 3, depth_multiplier=2),
        [6, 4],
        SEPARABLE_1D,
    ),
    "SeparableConv2D": (
        lambda: layers.SeparableConv2D(5, 3, depth_multiplier=2),
        [6, 6, 4],
        {"/depthwise_kernel": (0, 1), "/pointwise_kernel": (0, 1, 2), "/bias": (0,)},
    ),
    "MultiHeadAttention": (lambda: self_attention(2, 3, value_dim=5), [6, 4], ATTENTION),
    "MultiHeadAttention over two axes": (
        lambda: self_attention(3, 2, attention_axes=(1, 2), output_shape=[7]),
        [3, 2, 4],
        ATTENTION,
    ),
    **EINSUMS,
    "Embedding": (lambda: layers.Embedding(9, 3), [5], {"/embeddings": (1,)}),
    "BatchNormalization": (layers.BatchNormalization, [4], VECTORS),
    "LayerNormalization": (layers.LayerNormalization, [4], VECTORS),
    "unknown, rank 0": (lambda: Weighted([]), [4], {"/weight": ()}),
    "unknown, rank 1": (lambda: Weighted([6]), [4], {"/weight": (0,)}),
    "unknown, rank 2": (lambda: Weighted([3, 4]), [4], {"/weight": (0,)}),
    "unknown, rank 3": (lambda: Weighted([3, 4, 5]), [4], {"/weight": (0,)}),
    "unknown, rank 4": (lambda: Weighted([3, 4, 5, 2]), [4], {"/weight": (0, 1, 2)}),
    "unknown, rank 5": (lambda: Weighted([3, 2, 4, 2, 3]), [4], {"/weight": (0, 1, 2, 3)}),
    "unknown, though it says kernel": (
        lambda: Weighted([3, 4, 5], "kernel"),
        [4],
        {"/kernel": (0,)},
    ),
    "own layer of known ones": (
        Block,
        [6, 4],
        {
            "conv1d_transpose/kernel": (0, 2),
            "dense/kernel": (0,),
            "/depthwise_kernel": (0,),
            "/pointwise_kernel": (0, 1),
            "/bias": (0,),
        },
    ),
    "TimeDistributed Dense": (lambda: layers.TimeDistributed(layers.Dense(3)), [5, 4], biased(0)),
    "TimeDistributed Conv2DTranspose": (
        lambda: layers.TimeDistributed(layers.Conv2DTranspose(3, 2)),
        [2, 6, 6, 4],
        biased(0, 1, 3),
    ),
    "TimeDistributed model": (
        lambda: layers.TimeDistributed(sequential(layers.Conv1DTranspose(3, 2), shape=[6, 4])),
        [2, 6, 4],
        biased(0, 2),
    ),
    "Bidirectional LSTM": (lambda: layers.Bidirectional(layers.LSTM(3)), [5, 4], RECURRENT),
    "Bidirectional GRU": (lambda: layers.Bidirectional(layers.GRU(3)), [5, 4], GRU),
    "nested models": (
        lambda: nested,
        [6, 4],
        {
            "conv1d_transpose/kernel": (0, 2),
            "dense/kernel": (0,),
            "lstm_cell/kernel": (0,),
            "/recurrent_kernel": (0,),
            "/bias": (0,),
        },
    ),
    "subclassed model": (
        OwnModel,
        [6, 4],
        {
            "conv1d_transpose/kernel": (0, 2),
            "dense/kernel": (0,),
            "/bias": (0,),
            "gain": (0, 1, 2),
        },
    ),
}


def model_of(make, shape):
    inputs = tf_keras.Input(shape)
    return randomise(tf_keras.Model(inputs, make()(inputs)))


def axes_of(variables, by_suffix):
    """For each variable the axes of the one line of the table that its path ends in."""
    found = []
    for name in names_of(variables):
        suffixes = [suffix for suffix in by_suffix if name.endswith(suffix)]
        assert len(suffixes) == 1, f"{name} is named by {suffixes}"
        found += suffixes
    assert set(found) == set(by_suffix), "a line of the table names no weight"
    return [by_suffix[suffix] for suffix in found]


def agc_of_all(gradients, variables, all_axes, clip_factor, eps=1e-3):
    return [
        references.clip_by_agc(gradient, variable.numpy(), axes, clip_factor, eps)
        for gradient, variable, axes in zip(gradients, variables, all_axes)
    ]


@pytest.mark.parametrize("name", LAYERS)
def test_the_unit_is_a_matter_of_the_layer(float64, name):
    """AGC measures each weight over the axes of its layer, wherever the layer stands."""
    make, shape, by_suffix = LAYERS[name]
    model = model_of(make, shape)
    variables = model.trainable_variables
    gradients = random_like(variables)
    expected = agc_of_all(gradients, variables, axes_of(variables, by_suffix), 0.3)
    clipped = agc(ga.ClipByAGC(0.3, exclude_head=False), model, gradients)
    for variable, gradient, ours, theirs in zip(variables, gradients, clipped, expected):
        assert np.max(np.abs(gradient - theirs)) > 1e-3, f"{variable.name}: nothing to clip"
        np.testing.assert_allclose(ours, theirs, rtol=ROUNDING, err_msg=variable.name)


def test_a_weight_of_no_layer_of_the_model_has_its_ranks_units(float64):
    """A variable that the model does not hold is clipped by its rank."""
    outside = tf.Variable(np.random.default_rng(0).normal(size=[3, 4, 2, 5]))
    gradients = random_like([outside])
    clipped = apply_stages([ga.ClipByAGC(0.3)], gradients, [outside], two_layers())
    assert_close(clipped, agc_of_all(gradients, [outside], [(0, 1, 2)], 0.3))


def many_layers():
    """Words to a score, through layers whose units all lie on other axes."""
    inputs = tf_keras.Input([6], dtype="int32")
    hidden = layers.Embedding(9, 4)(inputs)
    hidden = layers.Bidirectional(layers.GRU(2, return_sequences=True))(hidden)
    hidden = layers.MultiHeadAttention(2, 3)(hidden, hidden)
    hidden = sequential(layers.Conv1DTranspose(3, 2), shape=[6, 4])(hidden)
    hidden = layers.TimeDistributed(layers.Dense(5))(hidden)
    hidden = layers.SeparableConv1D(4, 2)(hidden)
    hidden = layers.GlobalAveragePooling1D()(hidden)
    return tf_keras.Model(inputs, layers.Dense(1, name="head")(hidden))


MANY_AXES = {
    "/embeddings": (1,),
    **{f"gru_cell/{end}": (0,) for end in ("kernel", "recurrent_kernel")},
    "gru_cell/bias": (0, 1),
    **ATTENTION,
    "conv1d_transpose/kernel": (0, 2),
    "conv1d_transpose/bias": (0,),
    "time_distributed/kernel": (0,),
    "time_distributed/bias": (0,),
    "/depthwise_kernel": (0,),
    "/pointwise_kernel": (0, 1),
    "separable_conv1d/bias": (0,),
    "head/kernel": None,
    "head/bias": (0,),
}


def test_agc_trains_a_model_of_many_layers(float64):
    """One update on micro-batches moves every weight by the clipped gradient of the window."""
    source = compiled(randomise(many_layers()))
    rng = np.random.default_rng(5)
    window = [(rng.integers(0, 9, [rows, 6]), 9 * rng.normal(size=[rows, 1])) for rows in (1, 4, 3)]
    variables, before = source.trainable_variables, source.get_weights()
    all_axes = axes_of(variables, MANY_AXES)
    model = ga.make_accumulating(source, transforms=[ga.Accumulate(3), ga.ClipByAGC(0.01)])
    with tf.GradientTape() as tape:
        x, y = cases.concatenate(window)
        loss = tf.reduce_mean(tf.square(source(x) - y))
    gradients = tape.gradient(loss, variables)
    expected = [
        references.array(g) if axes is None else references.clip_by_agc(g, w, axes)
        for g, w, axes in zip(gradients, before, all_axes)
    ]
    clipped = [np.max(np.abs(references.array(g) - e)) > 0 for g, e in zip(gradients, expected)]
    assert sum(clipped) > len(clipped) / 2
    assert_close(
        train(model, [window]), [weight - gradient for weight, gradient in zip(before, expected)]
    )


def test_a_shared_layer_is_clipped_as_one(float64):
    """A layer that is called twice has one gradient, clipped once."""
    inputs, shared = tf_keras.Input([4]), layers.Dense(4, name="shared")
    source = randomise(tf_keras.Model(inputs, layers.Dense(1)(shared(shared(inputs)))))
    variables, gradients = source.trainable_variables, random_like(source.trainable_variables)
    expected = agc_of_all(gradients[:2], variables[:2], [(0,), (0,)], 0.3)
    assert_close(agc(ga.ClipByAGC(0.3), source, gradients)[:2], expected)


# ---- AGC: the head -------------------------------------------------------------------------------


def untouched(spec, model):
    """The paths of the weights whose gradients, far above any limit, pass unchanged."""
    gradients = [tf.fill(v.shape, tf.constant(1e3, v.dtype)) for v in model.trainable_variables]
    clipped = agc(spec, model, gradients)
    return {
        name
        for name, before, after in zip(names_of(model.trainable_variables), gradients, clipped)
        if np.array_equal(before, after)
    }


def functional(make, *shapes):
    """A functional model; `make` takes as many inputs as there are shapes."""
    inputs = [tf_keras.Input(shape) for shape in shapes]
    return tf_keras.Model(inputs, make(*inputs))


def hidden(x, name="hidden"):
    return layers.Dense(4, name=name)(x)


def head(x, name="head", units=2):
    return layers.Dense(units, name=name)(x)


def classifier(shape=(4,), name="classifier"):
    """A model that ends in a head of its own."""
    return tf_keras.Sequential(
        [tf_keras.Input(shape), layers.Dense(4), layers.Dense(2, name="head")], name=name
    )


class Subclassed(tf_keras.Model):
    def __init__(self):
        super().__init__(name="own")
        self.first = layers.Dense(4, name="first")
        self.head = layers.Dense(2, name="head")
        self.activate = layers.Softmax()

    def call(self, inputs):
        return self.activate(self.head(self.first(inputs)))


def called(model, shape):
    model(np.zeros([1, *shape]))
    return model


def two_heads(x):
    x = hidden(x)
    return {"score": head(x, "score"), "kind": layers.Softmax()(head(x, "kind"))}


def two_heads_nested(x):
    inputs = tf_keras.Input([4])
    inner = tf_keras.Model(inputs, [head(inputs, "one"), layers.ReLU()(head(inputs, "two"))])
    return inner(hidden(x))


def shared_head(left, right):
    shared, softmax = layers.Dense(2, name="head"), layers.Softmax()
    return softmax(shared(hidden(left, "left"))), softmax(shared(hidden(right, "right")))


def one_head_after_another(x):
    """Of two outputs, one is made of the other."""
    first = head(x, "first", units=4)
    return first, head(first, "second")


def backbone(x):
    """A nested model of two outputs: features, of which a head is made, and a head."""
    inputs = tf_keras.Input([4])
    features = layers.Dense(4, name="features")(inputs)
    inner = tf_keras.Model(inputs, [features, head(features, "score")])
    features, score = inner(x)
    return score, head(features, "kind")


def masked(mask, x):
    return layers.Multiply()([mask, head(hidden(x))])


def masked_by_where(mask, x):
    return tf.where(mask > 0, head(hidden(x)), -1e9)


def residual(x):
    x = hidden(x)
    return layers.Add()([x, head(x, units=4)])


def concatenated(x):
    x = hidden(x)
    return layers.Concatenate()([head(x, "score"), head(x, "kind")])


HEADS = [
    pytest.param(make, kernels, id=name)
    for name, make, kernels in [
        ("sequential", lambda: sequential(layers.Dense(4), layers.Dense(2, name="head")), ["head"]),
        (
            "layers without weights after it",
            lambda: sequential(
                layers.Dense(4),
                layers.Dense(2, name="head"),
                layers.Reshape([1, 2]),
                layers.Activation("tanh"),
                layers.Softmax(),
                layers.Dropout(0.5),
                layers.Flatten(),
            ),
            ["head"],
        ),
        ("activation of its own", lambda: sequential(layers.Dense(2, "softmax", name="h")), ["h"]),
        (
            "built by a call",
            lambda: called(tf_keras.Sequential([layers.Dense(3), layers.Dense(2, name="h")]), [4]),
            ["h"],
        ),
        ("functional", lambda: functional(lambda x: head(hidden(x)), [4]), ["head"]),
        (
            "operations after it",
            lambda: functional(lambda x: tf.nn.softmax(head(hidden(x)) / 3.0)[:, 0], [4]),
            ["head"],
        ),
        ("two outputs", lambda: functional(two_heads, [4]), ["score", "kind"]),
        (
            "an output made of another",
            lambda: functional(one_head_after_another, [4]),
            ["first", "second"],
        ),
        ("shared by two outputs", lambda: functional(shared_head, [4], [4]), ["head"]),
        (
            "nested model at the end",
            lambda: functional(lambda x: classifier()(hidden(x)), [4]),
            ["head"],
        ),
        (
            "nested model, then layers without weights",
            lambda: functional(lambda x: layers.Flatten()(layers.Softmax()(classifier()(x))), [4]),
            ["head"],
        ),
        (
            "nested twice",
            lambda: sequential(layers.Dense(4), sequential(layers.Dense(4), classifier())),
            ["head"],
        ),
        ("nested model of two heads", lambda: functional(two_heads_nested, [4]), ["one", "two"]),
        (
            "nested model without weights",
            lambda: functional(
                lambda x: sequential(layers.Softmax(), shape=[2])(head(hidden(x))), [4]
            ),
            ["head"],
        ),
        (
            "nested model before it",
            lambda: functional(lambda x: head(classifier()(x), "last"), [4]),
            ["last"],
        ),
        (
            "TimeDistributed",
            lambda: sequential(
                layers.LSTM(3, return_sequences=True),
                layers.TimeDistributed(layers.Dense(2), name="each"),
                layers.Softmax(),
                shape=[5, 4],
            ),
            ["each"],
        ),
        (
            "TimeDistributed model",
            lambda: sequential(
                layers.TimeDistributed(classifier([6, 4]), name="each"), shape=[5, 6, 4]
            ),
            ["head"],
        ),
        (
            "convolution",
            lambda: sequential(
                layers.Conv2D(3, 2),
                layers.Conv2D(2, 1, name="head"),
                layers.GlobalAveragePooling2D(),
                layers.Softmax(),
                shape=[6, 6, 2],
            ),
            ["head"],
        ),
        (
            "transposed convolution",
            lambda: sequential(
                layers.Conv2D(3, 2), layers.Conv2DTranspose(2, 2, name="head"), shape=[6, 6, 2]
            ),
            ["head"],
        ),
        (
            "EinsumDense",
            lambda: sequential(
                layers.Dense(4), layers.EinsumDense("ab,bc->ac", 3, bias_axes="c", name="head")
            ),
            ["head"],
        ),
        ("subclassed", lambda: called(Subclassed(), [4]), ["own/head"]),
        (
            "subclassed, nested",
            lambda: functional(lambda x: layers.Softmax()(Subclassed()(hidden(x))), [4]),
            ["own/head"],
        ),
        (
            "mask after it",
            lambda: functional(lambda x, m: layers.Multiply()([head(hidden(x)), m]), [4], [2]),
            ["head"],
        ),
        ("mask before it", lambda: functional(masked, [2], [4]), ["head"]),
        ("tf.where", lambda: functional(masked_by_where, [2], [4]), ["head"]),
        ("two heads, concatenated", lambda: functional(concatenated, [4]), ["score", "kind"]),
        ("residual around it", lambda: functional(residual, [4]), ["head"]),
        (
            "nested model of features and a head",
            lambda: functional(backbone, [4]),
            ["score", "kind"],
        ),
    ]
]


@pytest.mark.parametrize(("make", "kernels"), HEADS)
def test_the_kernel_of_the_final_linear_layer_is_exempt(make, kernels):
    """Of each output's last linear layer the kernel passes, and the bias is clipped."""
    assert untouched(ga.ClipByAGC(), make()) == {f"{name}/kernel" for name in kernels}


@pytest.mark.parametrize(
    "make",
    [
        two_layers,
        lambda: functional(two_heads, [4]),
        lambda: functional(lambda x: layers.Softmax()(classifier()(x)), [4]),
    ],
    ids=["sequential", "two outputs", "nested"],
)
def test_exclude_head_false_clips_the_head_too(make):
    """With `exclude_head=False` no weight is exempt."""
    assert untouched(ga.ClipByAGC(exclude_head=False), make()) == set()


def test_a_model_that_ends_in_no_linear_layer_has_no_head():
    """Where the output is a recurrent state, every weight is clipped."""
    model = sequential(layers.Dense(3), layers.LSTM(2), shape=[5, 4])
    assert untouched(ga.ClipByAGC(), model) == set()


# ---- AGC: exclude and axes -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def named_layers():
    """Two blocks, a nested model and a wrapper, all with names, in float64."""
    tf_keras.backend.set_floatx("float64")
    model = tf_keras.Sequential(
        [
            tf_keras.Input([5, 4]),
            layers.Dense(4, name="block_1"),
            layers.Dense(3, name="block_2"),
            tf_keras.Sequential([tf_keras.Input([5, 3]), layers.Dense(4, name="inner")], "tail"),
            layers.TimeDistributed(layers.Dense(3), name="each"),
            layers.Flatten(),
            layers.Dense(2, name="head"),
        ]
    )
    tf_keras.backend.set_floatx("float32")
    return randomise(model)


def both(*names):
    return {f"{name}/{end}" for name in names for end in ("kernel", "bias")}


EXCLUDED = [
    ("block_1", both("block_1")),
    (["block_1", "inner"], both("block_1", "inner")),
    ("block_*", both("block_1", "block_2")),
    ("block_?", both("block_1", "block_2")),
    ("block_[2-9]", both("block_2")),
    ("block_1/kernel:0", {"block_1/kernel"}),
    ("block_1/kernel", {"block_1/kernel"}),
    ("block_*/kernel", {"block_1/kernel", "block_2/kernel"}),
    ("*/bias", {f"{name}/bias" for name in ("block_1", "block_2", "inner", "each", "head")}),
    ("*/bias:0", {f"{name}/bias" for name in ("block_1", "block_2", "inner", "each", "head")}),
    ("tail", both("inner")),
    ("inner", both("inner")),
    ("each", both("each")),
    ("head", both("head")),
    (("block_1/bias", "ea*"), {"block_1/bias", *both("each")}),
    ("*", both("block_1", "block_2", "inner", "each", "head")),
]


@pytest.mark.parametrize(("exclude", "names"), EXCLUDED, ids=[str(line[0]) for line in EXCLUDED])
def test_what_exclude_names_is_left_out(named_layers, exclude, names):
    """`exclude` takes layers' names, variables' paths, and globs of both, beside the head."""
    spec = ga.ClipByAGC(exclude=exclude)
    assert untouched(spec, named_layers) == {*names, "head/kernel"}


#: Overrides, and by path the axes that result where they are not the layer's own.
OVERRIDES = [
    ({"block_1/kernel": (1,)}, {"block_1/kernel": (1,)}),
    ({"block_1/kernel:0": (1,)}, {"block_1/kernel": (1,)}),
    ({"block_1/kernel": (-1,)}, {"block_1/kernel": (1,)}),
    ({"block_1/kernel": (-2, -1)}, {"block_1/kernel": (0, 1)}),
    ({"block_1/kernel": ()}, {"block_1/kernel": ()}),
    ({"block_1/bias": ()}, {"block_1/bias": ()}),
    ({"block_1": ()}, {"block_1/kernel": (), "block_1/bias": ()}),
    ({"tail": (-1,)}, {"inner/kernel": (1,)}),
    ({"block_*/kernel": [0, 1]}, {"block_1/kernel": (0, 1), "block_2/kernel": (0, 1)}),
    (
        {"*/kernel": (1,), "inner/kernel": (0, 1), "*/bias": ()},
        {
            **{f"{name}/kernel": (1,) for name in ("block_1", "block_2", "each", "head")},
            "inner/kernel": (0, 1),
            **{f"{name}/bias": () for name in ("block_1", "block_2", "inner", "each", "head")},
        },
    ),
]


@pytest.mark.parametrize(
    ("overrides", "changed"), OVERRIDES, ids=[str(line[0]) for line in OVERRIDES]
)
def test_axes_of_your_own_take_the_place_of_the_layers(named_layers, overrides, changed):
    """`axes` says by path or glob over what a norm is taken; the last that fits counts."""
    variables = named_layers.trainable_variables
    gradients = random_like(variables)
    all_axes = [changed.get(name, (0,)) for name in names_of(variables)]
    expected = agc_of_all(gradients, variables, all_axes, 0.3)
    spec = ga.ClipByAGC(0.3, exclude_head=False, axes=overrides)
    assert_close(agc(spec, named_layers, gradients), expected)


def test_what_is_excluded_stays_so_whatever_its_axes(named_layers):
    """A variable named by both `exclude` and `axes` is not clipped; nor is the head's kernel."""
    spec = ga.ClipByAGC(exclude=["block_1/kernel"], axes={"*/kernel": ()})
    assert untouched(spec, named_layers) == {"block_1/kernel", "head/kernel"}


def test_exclude_and_axes_hold_in_training(float64):
    """A converted model's names are its source's: what they leave out moves by all its gradient."""
    source = randomise(two_layers())
    spec = ga.ClipByAGC(0.05, exclude_head=False, exclude="*/bias", axes={"hidden/kernel": (1,)})
    model = converted(source, ga.Accumulate(2), spec)

    def reference(gradients, weights):
        return [
            references.clip_by_agc(gradients[0], weights[0], (1,), 0.05),
            gradients[1],
            references.clip_by_agc(gradients[2], weights[2], (0,), 0.05),
            gradients[3],
        ]

    expected = two_layer_training(source.get_weights(), micro_batches(), update_stage=reference)
    assert_close(train(model, micro_batches()), expected)


KNOWN = ", ".join(
    f"{layer}{weight}"
    for layer in ("head", "hidden")
    for weight in ("", "/bias", "/bias:0", "/kernel", "/kernel:0")
)
NAMES = "names or globs of this model's layers or variables"

REFUSED = [
    ({"exclude": "haed"}, f"ClipByAGC.exclude must be {NAMES}; got 'haed'. Did you mean 'head'?"),
    (
        {"exclude": ["head", "hiden"]},
        f"ClipByAGC.exclude must be {NAMES}; got 'hiden'. Did you mean 'hidden'?",
    ),
    (
        {"exclude": "hidden/kernel:1"},
        (
            f"ClipByAGC.exclude must be {NAMES}; got 'hidden/kernel:1'. Did you mean "
            "'hidden/kernel:0'?"
        ),
    ),
    (
        {"exclude": "HEAD"},
        f"ClipByAGC.exclude must be {NAMES}; got 'HEAD'. Known: {KNOWN}.",
    ),
    ({"exclude": "zz*"}, f"ClipByAGC.exclude must be {NAMES}; got 'zz*'. Known: {KNOWN}."),
    (
        {"axes": {"head/kernle": (1,)}},
        f"ClipByAGC.axes must be {NAMES}; got 'head/kernle'. Did you mean 'head/kernel'?",
    ),
    ({"axes": {"zz*": (1,)}}, f"ClipByAGC.axes must be {NAMES}; got 'zz*'. Known: {KNOWN}."),
    (
        {"axes": {"hidden/kernel": (2,)}},
        (
            "ClipByAGC.axes['hidden/kernel'] must be axes of hidden/kernel:0, which has 2; got (2,). "
            "Count them from 0, each once."
        ),
    ),
    (
        {"axes": {"hidden/kernel": (0, -3)}},
        (
            "ClipByAGC.axes['hidden/kernel'] must be axes of hidden/kernel:0, which has 2; "
            "got (0, -3). Count them from 0, each once."
        ),
    ),
    (
        {"axes": {"head": (1,)}},
        (
            "ClipByAGC.axes['head'] must be axes of head/bias:0, which has 1; got (1,). "
            "Count them from 0, each once."
        ),
    ),
]


@pytest.mark.parametrize(("arguments", "text"), REFUSED, ids=[str(line[0]) for line in REFUSED])
@pytest.mark.parametrize("where", ["after", "before"])
def test_names_that_match_nothing_are_refused(arguments, text, where):
    """The conversion says which name or axis does not fit the model, and what it may have meant."""
    spec = ga.ClipByAGC(**arguments)
    chain = [ga.Accumulate(2), spec] if where == "after" else [spec, ga.Accumulate(2)]
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        ga.make_accumulating(two_layers(), transforms=chain)
    assert str(caught.value) == text


@pytest.mark.parametrize("axes", [(0, 0), (0, -2)])
def test_an_axis_named_twice_is_refused(axes):
    """Axes of which two are the same are refused at conversion, as those that are not there."""
    with pytest.raises(ValueError, match=r"^ClipByAGC\.axes\['hidden/kernel'\] must be "):
        converted(two_layers(), ga.ClipByAGC(axes={"hidden/kernel": axes}))


def test_names_are_checked_once_a_deferred_model_is_built():
    """A model that is not yet built when it is converted refuses names that match nothing later."""
    model = compiled(tf_keras.Sequential([layers.Dense(3), layers.Dense(2, name="head")]))
    ga.make_accumulating(model, transforms=[ga.ClipByAGC(exclude="haed")], inplace=True)
    with pytest.raises(ValueError, match=r"^ClipByAGC\.exclude must be .* Did you mean 'head'\?$"):
        model.train_on_batch(np.ones([2, 4]), np.ones([2, 2]))


# ---- the algebra of stages -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    """A model of two kernels and two biases in float64, shared by the examples of the laws."""
    tf_keras.backend.set_floatx("float64")
    model = two_layers()
    tf_keras.backend.set_floatx("float32")
    return model


SHAPES = [(4, 3), (3,), (3, 2), (2,)]
law = settings(max_examples=40, deadline=None, database=None, derandomize=True)
positive = st.floats(1e-3, 1e3)
factors = st.floats(1e-3, 1e3) | st.floats(-1e3, -1e-3) | st.just(0.0)


def floats(limit):
    """Numbers whose squares are neither lost nor too large."""
    return st.just(0.0) | st.floats(1e-6, limit) | st.floats(-limit, -1e-6)


tensors = st.tuples(*[arrays(np.float64, shape, elements=floats(1e6)) for shape in SHAPES])
weights_drawn = st.tuples(*[arrays(np.float64, shape, elements=floats(10)) for shape in SHAPES])
norm_clips = st.builds(ga.ClipByNorm, positive) | st.builds(ga.ClipByGlobalNorm, positive)
agcs = st.builds(
    ga.ClipByAGC, st.floats(1e-3, 1.0), eps=st.floats(1e-3, 1.0), exclude_head=st.booleans()
)
clips = norm_clips | st.builds(ga.ClipByValue, positive) | agcs
stages = clips | st.builds(ga.Scale, factors)


def staged(model, specs, gradients):
    """What a chain makes of gradients, as arrays."""
    gradients = [tf.convert_to_tensor(gradient) for gradient in gradients]
    result = apply_stages(specs, gradients, model.trainable_variables, model)
    return [np.asarray(gradient) for gradient in result]


@law
@given(gradients=tensors, weights=weights_drawn, clip=clips)
def test_a_clip_is_idempotent(small, gradients, weights, clip):
    """What has been clipped is within the bound, to rounding, and is clipped no further."""
    small.set_weights(weights)
    once = staged(small, [clip], gradients)
    for one, two in zip(once, staged(small, [clip], once)):
        np.testing.assert_allclose(two, one, rtol=ROUNDING)


@law
@given(gradients=tensors, max_norm=positive)
def test_clipped_norms_are_within_the_bound(small, gradients, max_norm):
    """Norms and elements are at most the bound, with `ROUNDING` for the scaled norms' last bits."""
    clipped = staged(small, [ga.ClipByGlobalNorm(max_norm)], gradients)
    assert references.norm(*clipped) <= max_norm * (1 + ROUNDING)
    for gradient in staged(small, [ga.ClipByNorm(max_norm)], gradients):
        assert references.norm(gradient) <= max_norm * (1 + ROUNDING)
    for gradient in staged(small, [ga.ClipByValue(max_norm)], gradients):
        assert np.max(np.abs(gradient)) <= max_norm


@law
@given(gradients=tensors, clip=norm_clips)
def test_a_clip_by_norm_keeps_the_direction(small, gradients, clip):
    """A clipped gradient is the gradient times a number of (0, 1], one for all with global norm."""
    clipped = staged(small, [clip], gradients)
    joint = isinstance(clip, ga.ClipByGlobalNorm)
    for one, other in zip(clipped, gradients):
        ours, theirs = (clipped, gradients) if joint else ([one], [other])
        whole = references.norm(*theirs)
        factor = references.norm(*ours) / whole if whole else 1.0
        assert 0 < factor <= 1 + ROUNDING
        np.testing.assert_allclose(one, other * factor, rtol=ROUNDING)


@law
@given(gradients=tensors, max_value=positive)
def test_a_clip_by_value_keeps_signs_and_what_is_within(small, gradients, max_value):
    """Elements within the bound are unchanged to the bit, and the others are at it."""
    for one, other in zip(staged(small, [ga.ClipByValue(max_value)], gradients), gradients):
        within = np.abs(other) <= max_value
        np.testing.assert_array_equal(one[within], other[within])
        np.testing.assert_array_equal(one[~within], np.sign(other[~within]) * max_value)


@law
@given(gradients=tensors, weights=weights_drawn, spec=agcs)
def test_agc_bounds_every_unit(small, gradients, weights, spec):
    """No unit's norm is above clip_factor times its weights', or eps; its direction is kept."""
    small.set_weights(weights)
    clipped = staged(small, [spec], gradients)
    for index, (one, other, weight) in enumerate(zip(clipped, gradients, weights)):
        if index == 2 and spec.exclude_head:
            np.testing.assert_array_equal(one, other)
            continue
        for unit in references.units(one.shape, (0,)):
            limit = spec.clip_factor * max(references.norm(weight[unit]), spec.eps)
            before, after = references.norm(other[unit]), references.norm(one[unit])
            assert after <= min(limit, before) * (1 + ROUNDING)
            if before <= limit * (1 - ROUNDING):
                np.testing.assert_array_equal(one[unit], other[unit])
            np.testing.assert_allclose(one[unit] * before, other[unit] * after, rtol=ROUNDING)


@law
@given(gradients=tensors, one=factors, other=factors)
def test_scales_multiply(small, gradients, one, other):
    """`Scale(a)` then `Scale(b)` is `Scale(a * b)`."""
    apart = staged(small, [ga.Scale(one), ga.Scale(other)], gradients)
    for left, right in zip(apart, staged(small, [ga.Scale(one * other)], gradients)):
        np.testing.assert_allclose(left, right, rtol=ROUNDING)


@law
@given(gradients=tensors, weights=weights_drawn, chain=st.lists(stages, min_size=1, max_size=4))
def test_a_chain_is_its_stages_one_after_the_other(small, gradients, weights, chain):
    """Stages applied together give, to the bit, what each gives of the result of the last."""
    small.set_weights(weights)
    by_hand = [np.asarray(gradient) for gradient in gradients]
    for stage in chain:
        by_hand = staged(small, [stage], by_hand)
    assert_same_bits(staged(small, chain, gradients), by_hand)


def test_no_stages_change_nothing(small):
    """The chain without stages hands on the gradients it is given."""
    gradients = random_like(small.trainable_variables)
    assert_same_bits(staged(small, [], gradients), gradients)


# ---- dtypes --------------------------------------------------------------------------------------

#: By the dtype of gradients: the dtype in which they are clipped, and its tolerance.
DTYPES = {
    "float16": ("float32", 2e-6),
    "bfloat16": ("float32", 2e-6),
    "float32": ("float32", 2e-6),
    "float64": ("float64", ROUNDING),
}
#: Stages for gradients whose squares are above what float16 can hold.
LARGE = {
    "ClipByGlobalNorm": (
        ga.ClipByGlobalNorm(3.0),
        lambda gradients, _: references.clip_by_global_norm(gradients, 3.0),
    ),
    "ClipByNorm": (
        ga.ClipByNorm(3.0),
        lambda gradients, _: references.clip_by_norm(gradients, 3.0),
    ),
    "ClipByValue": (
        ga.ClipByValue(100.1),
        lambda gradients, _: references.clip_by_value(gradients, 100.1),
    ),
    "Scale": (ga.Scale(0.3), lambda gradients, _: references.scale(gradients, 0.3)),
    "ClipByAGC": (ga.ClipByAGC(), two_layer_agc),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LARGE)
def test_a_clip_computes_in_float32_or_wider(name, dtype):
    """16-bit gradients are clipped in float32, where squares fit; float64 ones in float64."""
    wide, tolerance = DTYPES[dtype]
    tf_keras.backend.set_floatx("float64" if dtype == "float64" else "float32")
    model = randomise(two_layers())
    gradients = [tf.cast(g, dtype) for g in random_like(model.trainable_variables, size=300.0)]
    assert references.norm(*gradients) > 300
    stage, reference = LARGE[name]
    result = apply_stages([stage], gradients, model.trainable_variables, model)
    assert {gradient.dtype.name for gradient in result} == {wide}
    assert_close(result, reference(gradients, model.get_weights()), tolerance)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["ClipByNorm", "ClipByAGC"])
def test_slices_of_16_bits_are_summed_in_float32(name, dtype):
    """Rows that repeat are added up where their sum fits: in float32."""
    model = table_of_words()
    slices = tf.IndexedSlices(
        tf.constant([[40000.0], [1.0], [40000.0]], dtype) * tf.ones([1, 3], dtype),
        tf.constant([5, 2, 5]),
        tf.constant([9, 3]),
    )
    stage = {"ClipByNorm": ga.ClipByNorm(3.0), "ClipByAGC": ga.ClipByAGC()}[name]
    result = apply_stages([stage], [slices], model.trainable_variables[:1], model)
    expected = {
        "ClipByNorm": lambda: references.clip_by_norm([slices], 3.0)[0],
        "ClipByAGC": lambda: references.clip_by_agc(slices, model.get_weights()[0], (1,)),
    }[name]()
    assert result[0].dtype == tf.float32
    assert_close(result, [expected], 2e-6)


def test_a_global_norm_over_several_dtypes_is_taken_in_the_widest():
    """Gradients of several dtypes have one norm, in float64, and keep each its own, widened."""
    model = two_layers()
    gradients = [
        tf.cast(gradient, dtype)
        for gradient, dtype in zip(
            random_like(model.trainable_variables, size=300.0),
            ["float16", "float32", "float64", "bfloat16"],
        )
    ]
    stage = ga.ClipByGlobalNorm(3.0)
    result = apply_stages([stage], gradients, model.trainable_variables, model)
    assert [gradient.dtype.name for gradient in result] == [
        "float32", "float32", "float64", "float32",
    ]  # fmt: skip
    expected = references.clip_by_global_norm(gradients, 3.0)
    assert_close(result, expected, 2e-6)
    np.testing.assert_allclose(result[2], expected[2], rtol=2e-7)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_of_16_bits_train_by_gradients_clipped_in_float32(dtype):
    """A layer in 16 bits is updated by the clipped gradient, rounded once, at the end."""
    # Inputs are the rows of the identity and the loss is linear: the gradient of the kernel
    # is the targets over the rows, 300 everywhere, whose squares float16 cannot hold.
    model = sequential(
        layers.Dense(2, use_bias=False, dtype=dtype, kernel_initializer="zeros"), shape=[2]
    )
    model.compile(
        tf_keras.optimizers.SGD(1.0),
        lambda y, p: tf.reduce_sum(tf.cast(y, p.dtype) * p, -1),
        run_eagerly=True,
    )
    model = ga.make_accumulating(model, transforms=[ga.Accumulate(2), ga.ClipByNorm(3.0)])
    for row in np.eye(2):
        model.train_on_batch(row[np.newaxis], np.full([1, 2], 600.0))
    # Four elements of 300 have a norm of 600: each becomes 300 * 3 / 600 = 1.5.
    np.testing.assert_array_equal(np.asarray(model.get_weights()[0], "float32"), -1.5)


def test_mixed_precision_layers_are_known_by_their_weights():
    """Under a mixed policy, units and head are found behind the variables that cast themselves."""
    model = sequential(
        layers.Dense(3, name="hidden", dtype="mixed_bfloat16"),
        layers.Dense(2, name="head", dtype="mixed_bfloat16"),
    )
    randomise(model)
    gradients = random_like(model.trainable_variables)
    expected = two_layer_agc(gradients, model.get_weights(), clip_factor=0.05)
    assert_close(agc(ga.ClipByAGC(0.05), model, gradients), expected, 2e-6)
