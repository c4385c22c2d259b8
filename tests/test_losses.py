"""What weighs a micro-batch: means, sums, masks, weights; each against the large batch."""

import warnings

import cases
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from tf_keras import layers

import ga_transform as ga

Reduction = tf_keras.losses.Reduction
SGD = cases.OPTIMIZERS["momentum"]


def one_output(loss, **dense):
    model = tf_keras.Sequential(
        [tf_keras.Input([4]), layers.Dense(5, "tanh", **dense), layers.Dense(2, **dense)]
    )
    return cases.Case(
        model,
        {"loss": loss},
        lambda rng, rows: (rng.normal(size=[rows, 4]), rng.normal(size=[rows, 2])),
    )


def two_outputs(first, second, loss_weights=None, activity=None):
    inputs = tf_keras.Input([4])
    hidden = layers.Dense(5, "tanh", kernel_regularizer="l2", activity_regularizer=activity)(inputs)
    outputs = [layers.Dense(2, name="a")(hidden), layers.Dense(3, name="b")(hidden)]
    return cases.Case(
        tf_keras.Model(inputs, outputs),
        {"loss": [first, second], "loss_weights": loss_weights},
        lambda rng, rows: (
            rng.normal(size=[rows, 4]),
            (rng.normal(size=[rows, 2]), rng.normal(size=[rows, 3])),
        ),
    )


def mse(reduction):
    return tf_keras.losses.MeanSquaredError(reduction=reduction)


def scalar_mean(y_true, y_pred):
    """A loss that has taken the mean over its rows itself."""
    return tf.reduce_mean(tf.square(y_true - y_pred))


def row_loss(y_true, y_pred):
    return tf.reduce_mean(tf.square(y_true - y_pred), -1)


@tf.custom_gradient
def forget_shape(loss):
    """The same numbers; what is known of their shape is forgotten."""
    forgotten = tf.numpy_function(lambda x: x, [loss], loss.dtype)
    return forgotten, lambda gradient: tf.reshape(gradient, tf.shape(loss))


LOSSES = {
    "unknown rank, by row": lambda: one_output(lambda y, p: forget_shape(row_loss(y, p))),
    "unknown rank, one number": lambda: one_output(lambda y, p: forget_shape(scalar_mean(y, p))),
    "mean": lambda: one_output(mse(Reduction.SUM_OVER_BATCH_SIZE), kernel_regularizer="l2"),
    "scalar": lambda: one_output(scalar_mean, kernel_regularizer="l2"),
    "sum": lambda: one_output(mse(Reduction.SUM)),
    "unreduced": lambda: one_output(mse(Reduction.NONE)),
    "sum and regularisers": lambda: one_output(mse(Reduction.SUM), kernel_regularizer="l2"),
    "sum and activity regularisers": lambda: one_output(
        mse(Reduction.SUM), kernel_regularizer="l2", activity_regularizer="l2"
    ),
    "sum and mean": lambda: two_outputs(mse(Reduction.SUM), "mae", [0.3, 2.0]),
    "mean and sum and add_loss": lambda: two_outputs("mae", mse(Reduction.SUM), None, "l2"),
    "two sums": lambda: two_outputs(mse(Reduction.SUM), mse(Reduction.SUM), [0.3, 2.0]),
    "one output without a loss": lambda: two_outputs("mse", None),
}


@pytest.mark.parametrize("windows", ["uneven", "partial"])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_reduction(float64, loss, windows):
    """Means, sums, and both in one model, with regularisers that count once an update."""
    cases.assert_law(LOSSES[loss](), SGD, cases.WINDOWS[windows], 1e-9)


def test_a_sum_without_its_target(float64):
    """An output whose target is absent has no loss, as in plain tf_keras."""
    case = two_outputs("mse", mse(Reduction.SUM))
    case.model.compile(SGD(), case.compile["loss"])
    model = ga.make_accumulating(case.model, 1)
    x, (a, _) = case.batch(np.random.default_rng(0), 4)
    start = cases.weights_of(model)
    for each in (model, case.model):
        each.train_on_batch(x, {"a": a})
    cases.assert_same_weights(model, case.model, start, 1e-9)


def sequences(masked=True):
    """Sequences of differing lengths, masked, or not masked and of one length a micro-batch."""
    inputs = tf_keras.Input([None, 3])
    hidden = layers.Masking()(inputs) if masked else inputs
    return tf_keras.Model(inputs, layers.Dense(2, "tanh")(hidden))


def test_a_masked_mean_counts_valid_elements(float64):
    """Micro-batches of other lengths and other shares of padding weigh what is valid in them."""
    model = sequences()
    model.compile(SGD(), "mse")
    start = cases.weights_of(model)
    copy = ga.make_accumulating(model, accum_steps=3)
    rng = np.random.default_rng(0)
    x = rng.normal(size=[9, 6, 3])
    lengths = np.array([6, 6, 5, 1, 1, 2, 3, 3, 3])
    x[np.arange(6) >= lengths[:, None]] = 0.0
    y, weight = rng.normal(size=[9, 6, 2]), rng.random([9, 6])
    for rows in (slice(0, 3), slice(3, 6), slice(6, 9)):
        longest = lengths[rows].max()  # micro-batches are padded to lengths of their own
        copy.train_on_batch(x[rows, :longest], y[rows, :longest], weight[rows, :longest])
    model.train_on_batch(x, y, weight)
    cases.assert_same_weights(copy, model, start, 1e-9)


def test_an_unmasked_mean_counts_elements(float64):
    """Of micro-batches with other sequence lengths, each weighs rows times length."""
    model = sequences(masked=False)
    model.compile(tf_keras.optimizers.SGD(0.1), "mse")
    copy = ga.make_accumulating(model, accum_steps=2)
    rng = np.random.default_rng(0)
    batches = [
        (rng.normal(size=[r, t, 3]), rng.normal(size=[r, t, 2])) for r, t in ((2, 5), (4, 1))
    ]
    for batch in batches:
        copy.train_on_batch(*batch)
    # The mean over all 14 elements, and one step of SGD on it, in NumPy.
    kernel, bias = cases.weights_of(model)
    total = [np.zeros_like(kernel), np.zeros_like(bias)]
    for x, y in batches:
        out = np.tanh(x @ kernel + bias)
        slope = (out - y) * (1 - out**2)  # d mean over 2 units of (out - y)^2
        total[0] += np.einsum("bti,bto->io", x, slope)
        total[1] += slope.sum((0, 1))
    for ours, before, gradient in zip(cases.weights_of(copy), (kernel, bias), total):
        np.testing.assert_allclose(ours, before - 0.1 * gradient / 14, rtol=1e-12)


def test_ignored_classes_do_not_count(float64):
    """A loss that masks its own elements (ignore_class) is divided by the others."""
    inputs = tf_keras.Input([4], dtype="int32")
    model = tf_keras.Model(inputs, layers.Dense(3)(layers.Embedding(7, 5)(inputs)))
    loss = tf_keras.losses.SparseCategoricalCrossentropy(True, ignore_class=-100)

    def batch(rng, rows):
        labels = rng.integers(0, 3, size=[rows, 4])
        labels[rng.random([rows, 4]) < 0.4] = -100
        return rng.integers(0, 7, size=[rows, 4]).astype("int32"), labels

    cases.assert_law(cases.Case(model, {"loss": loss}, batch), SGD, cases.UNEVEN, 1e-9)


def test_class_weights(float64):
    """Class weights scale a row's loss, and do not change what its mean divides by."""
    case = cases.conv()
    case.model.compile(SGD(), **case.compile)
    start = cases.weights_of(case.model)
    copy = ga.make_accumulating(case.model, accum_steps=3)
    x, y = case.batch(np.random.default_rng(0), 10)
    weights = {0: 0.1, 1: 3.0, 2: 1.0}
    case.model.fit(x, y, batch_size=10, class_weight=weights, verbose=0)
    copy.fit(x, y, batch_size=4, class_weight=weights, shuffle=False, verbose=0)
    cases.assert_same_weights(copy, case.model, start, 1e-9)


def test_logs_are_those_of_the_same_rows(float64):
    """Losses and metrics in the logs, training and validation, equal the plain model's."""
    case = cases.branches()
    metrics = {"score": ["mae"], "kind": tf_keras.metrics.SparseCategoricalAccuracy()}
    case.model.compile(SGD(), **case.compile, metrics=metrics, weighted_metrics={"score": "mse"})
    copy = ga.make_accumulating(case.model, accum_steps=3)
    x, y = case.batch(np.random.default_rng(0), 24)
    options = {"shuffle": False, "verbose": 0, "epochs": 2, "validation_data": (x, y)}
    plain = case.model.fit(x, y, batch_size=12, **options).history
    ours = copy.fit(x, y, batch_size=4, **options).history
    assert list(ours) == list(plain)
    for key, values in plain.items():
        np.testing.assert_allclose(ours[key], values, rtol=1e-9, err_msg=key)


# ---- windows that weigh nothing ------------------------------------------------------------


def masked_batch(valid):
    x = np.ones([2, 3, 3]) if valid else np.zeros([2, 3, 3])
    return x, np.ones([2, 3, 2])


def test_a_micro_batch_without_valid_elements_changes_nothing(float64):
    """It adds nothing to its window, and no NaN."""
    model = sequences()
    model.compile(SGD(), "mse")
    start = cases.weights_of(model)
    copy = ga.make_accumulating(model, accum_steps=3)
    for valid in (False, True, False):
        logs = copy.train_on_batch(*masked_batch(valid))
        assert np.isfinite(logs)
    model.train_on_batch(*masked_batch(True))
    cases.assert_same_weights(copy, model, start, 1e-9)


@pytest.mark.parametrize("batch", [masked_batch(False), tuple(part[:0] for part in masked_batch(True))],
                         ids=["nothing valid", "no rows"])  # fmt: skip
@pytest.mark.parametrize("steps", [1, 2])
def test_a_window_that_weighs_nothing_makes_no_update(batch, steps):
    """Not the weights, nor the slots, nor the count of updates are changed."""
    model = sequences()
    model.compile(tf_keras.optimizers.Adam(0.1), "mse")
    model = ga.make_accumulating(model, accum_steps=steps)
    for _ in range(steps):
        model.train_on_batch(*masked_batch(True))  # so that there are moments to decay
    before = cases.weights_of(model), [v.numpy() for v in model.optimizer.variables]
    data = tf.data.Dataset.from_tensors(batch).repeat(steps)
    model.fit(data, verbose=0)
    after = cases.weights_of(model), [v.numpy() for v in model.optimizer.variables]
    tf.nest.map_structure(np.testing.assert_array_equal, before, after)
    assert model.pending_micro_batches == 0


# ---- what is not exact is said -------------------------------------------------------------


def test_outputs_with_masks_of_their_own_are_named():
    """Where one number cannot weigh two outputs, one warning names them."""
    inputs = [tf_keras.Input([3, 2], name=name) for name in "ab"]
    outputs = [layers.Dense(1, name=f"out_{x.name}")(layers.Masking()(x)) for x in inputs]
    model = tf_keras.Model(inputs, outputs)
    model.compile("sgd", "mse")
    model = ga.make_accumulating(model, accum_steps=2)
    x, y = [np.ones([2, 3, 2])] * 2, [np.ones([2, 3, 1])] * 2
    with pytest.warns(ga.InexactWarning, match="output 'out_a' and output 'out_b'"):
        model.train_on_batch(x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.train_on_batch(x, y)


def test_outputs_with_the_same_mask_are_exact(float64):
    """One mask for two outputs is one number, and warns of nothing."""
    inputs = tf_keras.Input([3, 2])
    hidden = layers.Masking()(inputs)
    model = tf_keras.Model(inputs, [layers.Dense(1)(hidden), layers.Dense(2)(hidden)])

    def batch(rng, rows):
        x = rng.normal(size=[rows, 3, 2])
        x[rng.random([rows, 3]) < 0.5] = 0.0
        return x, (rng.normal(size=[rows, 3, 1]), rng.normal(size=[rows, 3, 2]))

    cases.assert_law(cases.Case(model, {"loss": "mse"}, batch), SGD, cases.UNEVEN, 1e-9)


def test_clips_of_micro_batches_refuse_two_kinds_of_loss():
    """A clip before Accumulate has no one gradient to clip where sums stand beside means."""
    case = LOSSES["sum and mean"]()
    case.model.compile("sgd", **case.compile)
    model = ga.make_accumulating(case.model, transforms=[ga.ClipByNorm(1.0), ga.Accumulate(2)])
    model.run_eagerly = True  # so that the error is not wrapped
    with pytest.raises(
        ValueError, match="must have losses of one kind; got SUM losses beside means"
    ):
        model.train_on_batch(*case.batch(np.random.default_rng(0), 2))


# ---- weighting by choice -------------------------------------------------------------------


def count_positive(batch):
    """The rows with a positive first feature."""
    return tf.reduce_sum(tf.cast(batch[0][:, 0] > 0, tf.int32))


@pytest.mark.parametrize("weighting", ["equal", count_positive], ids=["equal", "function"])
def test_weighting_by_choice(float64, weighting):
    """The mean gradient is weighed by one each, or by what the function returns."""
    case = one_output("mse")
    case.model.compile(tf_keras.optimizers.SGD(1.0), "mse")
    model = ga.make_accumulating(case.model, transforms=[ga.Accumulate(2, weighting=weighting)])
    batches = cases.make_batches(case, [[3, 8]])[0]
    moves, counts = [], []
    for batch in batches:
        alone = tf_keras.models.clone_model(case.model)
        alone.set_weights(case.model.get_weights())
        alone.compile(tf_keras.optimizers.SGD(1.0), "mse")
        alone.train_on_batch(*batch)
        moves.append([a - b for a, b in zip(alone.get_weights(), case.model.get_weights())])
        counts.append(1 if weighting == "equal" else np.sum(batch[0][:, 0] > 0))
        model.train_on_batch(*batch)
    for before, after, *parts in zip(case.model.get_weights(), model.get_weights(), *moves):
        expected = np.average(parts, axis=0, weights=counts)
        np.testing.assert_allclose(after - before, expected, atol=1e-14)
