"""The loss of a whole batch, taken in slices: exact for every loss of a model's outputs."""

import contextlib
import re

import cases
import coupled
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from tf_keras import layers

import ga_transform as ga

ROWS = 4
#: Rows of the batches: they divide by the slice or do not, and one is smaller.
BATCHES = [11, 8, 3]
WHOLE = {"micro_batch_size": ROWS, "whole_batch_loss": True}


def dense(regularizer="l2"):
    return tf_keras.Sequential(
        [
            tf_keras.Input([5]),
            layers.Dense(
                6, "tanh", kernel_regularizer=regularizer, activity_regularizer=regularizer
            ),
            layers.Dense(3),
        ]
    )


def train_both(model, batches, arguments=WHOLE, tolerance=1e-9, epochs=2, plain=None):
    """Plain on whole batches, and in slices: the same weights, counts and logs."""
    start = cases.weights_of(model)
    ours = ga.make_accumulating(model, **arguments)
    logs = ours.fit(cases.dataset(batches), epochs=epochs, verbose=0).history
    expected = model.fit(cases.dataset(plain or batches), epochs=epochs, verbose=0).history
    cases.assert_same_weights(ours, model, start, tolerance)
    assert int(ours.optimizer.iterations) == int(model.optimizer.iterations)
    if plain is None:
        assert logs.keys() == expected.keys()
        for name in logs:
            np.testing.assert_allclose(logs[name], expected[name], rtol=1e-9, err_msg=name)
    return ours


# ---- the law ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", coupled.LOSSES)
def test_every_loss(float64, name):
    """Any loss of the outputs, with weights of rows: weights and logs of plain fit."""
    loss, targets = coupled.LOSSES[name]
    model = dense(None if "of rows" in name else "l2")  # tf_keras adds none to unreduced losses
    model.compile("adam", loss(), metrics=["mae"], weighted_metrics=["mse"])
    train_both(model, coupled.batches(targets, BATCHES, with_weights="variance" in name))


def test_slices_alone_are_not_exact(float64):
    """What the losses of the table are there for: without whole_batch_loss they are off."""
    for loss, targets in coupled.LOSSES.values():
        model = dense(None)
        model.compile(tf_keras.optimizers.SGD(0.1), loss())
        start = cases.weights_of(model)
        ours = ga.make_accumulating(model, micro_batch_size=ROWS)
        for batch in coupled.batches(targets, [11]):
            ours.train_on_batch(*batch)
            model.train_on_batch(*batch)
        assert max(distance for _, distance in cases.distances(ours, model, start)) > 1e-4


@pytest.mark.parametrize("name", cases.MODELS)
def test_every_model(float64, name):
    """Masks, regularisers, add_loss, several inputs and outputs, sparse gradients."""
    case = cases.MODELS[name]()
    case.model.compile("adam", **case.compile)
    (batches,) = cases.make_batches(case, [[9, 8, 3]])
    train_both(case.model, batches)


@pytest.mark.parametrize(
    "how",
    [
        {"run_eagerly": True},
        pytest.param({"jit_compile": True}, marks=pytest.mark.long),
        {"steps_per_execution": 3},
    ],
    ids=str,
)
def test_every_way_to_run_a_step(float64, how):
    model = dense()
    model.compile("adam", coupled.in_batch_softmax, metrics=["mae"], **how)
    train_both(model, coupled.batches(coupled.LOSSES["correlation"][1], BATCHES))


class Towers(tf_keras.Model):
    """Two towers and a learned temperature, with a loss of its own."""

    def __init__(self):
        super().__init__()
        self.query = layers.Dense(4, kernel_regularizer="l2")
        self.item = tf_keras.Sequential([layers.Embedding(9, 4), layers.Dense(4, "tanh")])
        self.temperature = self.add_weight(name="temperature", initializer="ones")

    def call(self, inputs):
        query = self.query(inputs["query"])
        self.add_loss(tf.reduce_mean(query**2))
        return {"query": query, "item": self.item(inputs["item"]), "kept": inputs["item"]}

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        scores = tf.matmul(y_pred["query"], y_pred["item"], transpose_b=True) * self.temperature
        twice = tf.cast(y_pred["kept"][:, None] == x["item"][None], scores.dtype)
        scores -= 9 * (twice - tf.eye(tf.shape(scores)[0], dtype=scores.dtype))
        own = tf.range(tf.shape(scores)[0])
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(own, scores)
        return tf.reduce_mean(losses * y) + tf.add_n(self.losses) ** 2


def towers_batches(rows=BATCHES):
    rng = np.random.default_rng(0)
    return [
        (
            {"query": rng.normal(size=[each, 3]), "item": rng.integers(0, 9, size=each)},
            rng.random(each),
        )
        for each in rows
    ]


@pytest.mark.parametrize("eager", [False, True])
def test_a_loss_of_the_models_own(float64, eager):
    """compute_loss that uses weights and inputs directly, and whatever it likes of `losses`.

    The model is built by its first batch.
    """
    batches = towers_batches()
    model, reference = Towers(), Towers()
    for each in (model, reference):
        each.compile("adam", run_eagerly=eager)
    ours = ga.make_accumulating(model, **WHOLE, inplace=True)
    ours.train_on_batch(*batches[0])
    reference.train_on_batch(*batches[0])
    ours.set_weights(reference.get_weights())
    start = cases.weights_of(reference)
    for each in (ours, reference):
        each.compile("adam", run_eagerly=eager)
        each.fit(cases.dataset(batches), verbose=0)
    cases.assert_same_weights(ours, reference, start, 1e-9)


def test_masks_that_differ_by_output(float64):
    """Two outputs, one of them masked, weighted, and with weights of rows of their own."""
    words, numbers = tf_keras.Input([6], dtype="int32"), tf_keras.Input([3])
    hidden = layers.Embedding(7, 4, mask_zero=True)(words)
    tags = layers.Dense(3, name="tags")(layers.LSTM(4, return_sequences=True)(hidden))
    score = layers.Dense(3, name="score")(numbers)
    model = tf_keras.Model([words, numbers], [tags, score])
    model.compile(
        "adam",
        [tf_keras.losses.SparseCategoricalCrossentropy(True), coupled.correlation],
        loss_weights=[0.3, 2.0],
        weighted_metrics=[["accuracy"], []],
    )
    rng = np.random.default_rng(0)
    batches = [
        (
            (rng.integers(0, 7, size=[rows, 6]).astype("int32"), rng.normal(size=[rows, 3])),
            (rng.integers(0, 3, size=[rows, 6]), rng.normal(size=[rows, 3])),
            (rng.random(rows), rng.random(rows)),
        )
        for rows in BATCHES
    ]
    train_both(model, batches)


class Own(tf_keras.Model):
    """A model of functions: its layer, what it makes of it, and its loss."""

    def __init__(self, outputs, loss, metrics=None, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(12)
        self.table = layers.Embedding(7, 12)
        self.outputs_of, self.loss_of, self.metrics_of = outputs, loss, metrics
        self.calls = self.add_weight(
            name="calls", shape=[], initializer="zeros", dtype="float64", trainable=False
        )
        self.seen = tf_keras.metrics.Mean(name="seen")

    def call(self, x):
        self.calls.assign_add(1.0)
        return self.outputs_of(self, x)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        return self.loss_of(self, x, y, y_pred)

    def compute_metrics(self, x, y, y_pred, sample_weight):
        if self.metrics_of:
            self.seen.update_state(self.metrics_of(self, y_pred))
        return super().compute_metrics(x, y, y_pred, sample_weight)


def spectrum(model, x):
    hidden = model.dense(x)
    return {"spectrum": tf.signal.fft(tf.cast(hidden, tf.complex128)), "hidden": hidden}


def conditional(model, x):
    hidden = model.dense(x)
    if tf.shape(x)[0] > 0:
        hidden += 1.0
    return hidden, None


def reshaped(model, x):
    hidden = tf.reshape(model.dense(x), [-1, 4, 3])
    return tf.reshape(hidden, [tf.shape(x)[0], -1])


def penalised(model, x):
    hidden = model.dense(x)
    model.add_loss(tf.reduce_mean(hidden**2))
    return hidden


def pairs(model, x, y, y_pred):
    """Of some rows, that an index of the batch finds."""
    found = tf.gather(y_pred, tf.argsort(y[:, 0])[:2])
    return tf.reduce_mean(found[0] * found[1])


def twice(model, x, y, y_pred):
    """The model's own call, with another view of the batch."""
    return tf.reduce_mean((y_pred[0] - model(x * 2, training=True)[0]) ** 2)


def negatives(model, x, y, y_pred):
    """Rows of a table that the model itself does not look up."""
    scores = tf.matmul(y_pred[0], model.table(tf.constant([1, 3, 3])), transpose_b=True)
    return tf.reduce_mean(tf.nn.softplus(scores)) + tf.math.reduce_variance(scores)


#: By name: outputs, loss, and what its own metrics see.
OWN = {
    "complex": (spectrum, lambda model, x, y, p: tf.reduce_mean(tf.abs(p["spectrum"]) ** 4)),
    "gathered rows": (reshaped, pairs),
    "condition": (conditional, lambda model, x, y, p: tf.math.reduce_variance(p[0])),
    "called again": (conditional, twice),
    "sampled negatives": (conditional, negatives),
    "metrics of losses": (
        penalised,
        lambda model, x, y, p: tf.add_n(model.losses) ** 2,
        lambda model, p: tf.add_n(model.losses),
    ),
}


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("name", OWN)
def test_what_models_and_losses_do(float64, name, eager):
    """Whatever stands in the code of a model: weights, states and logs of plain fit."""
    batches = coupled.batches(coupled.LOSSES["trimmed"][1], BATCHES)
    model, reference = Own(*OWN[name], name="own"), Own(*OWN[name], name="own")
    for each in (model, reference):
        each(batches[0][0])
        each.table(tf.constant([0]))
        # Which moves the rows of a table that are found, and no others.
        each.compile(tf_keras.optimizers.legacy.SGD(0.01, momentum=0.9), run_eagerly=eager)
    model.set_weights(reference.get_weights())
    start = cases.weights_of(reference)
    ours = ga.make_accumulating(model, **WHOLE, inplace=True)
    logs = [each.fit(cases.dataset(batches), verbose=0).history for each in (ours, reference)]
    calls = [each.calls.numpy() - 1 for each in (ours, reference)]
    for each in (ours, reference):
        each.calls.assign(0.0)
    cases.assert_same_weights(ours, reference, start, 1e-9)
    np.testing.assert_allclose(logs[0]["seen"], logs[1]["seen"], rtol=1e-9)
    # Of three slices, two and one; and the calls of a loss.
    assert calls[0] - calls[1] == 3


def test_a_mask_that_all_rows_share(float64):
    class Odd(layers.Layer):
        def call(self, inputs):
            return inputs

        def compute_mask(self, inputs, mask=None):
            return tf.constant([[True, True, False, True, True]])

    inputs = tf_keras.Input([5])
    model = tf_keras.Model(inputs, Odd()(layers.Dense(5)(inputs)))
    model.compile("adam", lambda y_true, y_pred: (y_pred - 1) ** 2)
    train_both(model, coupled.batches(lambda rng, rows: np.ones([rows, 5]), BATCHES))


@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "sum"])
def test_together_with_accum_steps(float64, reduction):
    """A window of several batches is the mean of their losses (or the sum), each a whole one."""
    model = dense()
    model.compile("adam", coupled.ByVariance(reduction=reduction))
    reference = tf_keras.models.clone_model(model)
    reference.set_weights(model.get_weights())
    optimizer = tf_keras.optimizers.Adam()
    batches = coupled.batches(coupled.LOSSES["trimmed"][1], [11, 8, 3, 6])
    start = cases.weights_of(model)
    ours = ga.make_accumulating(model, accum_steps=2, **WHOLE)
    ours.fit(cases.dataset(batches), verbose=0)
    for window in (batches[:2], batches[2:]):
        rows = sum(len(x) for x, _ in window)
        with tf.GradientTape() as tape:
            losses = [coupled.ByVariance(reduction="none")(y, reference(x)) for x, y in window]
            total = tf.add_n([tf.reduce_sum(each) for each in losses])
            hidden = [reference.layers[0](x) for x, _ in window]
            activity = tf.add_n([0.01 * tf.reduce_sum(each**2) for each in hidden]) / rows
            of_weights = 0.01 * tf.reduce_sum(reference.layers[0].kernel ** 2)
            loss = (total if reduction == "sum" else total / rows) + activity + of_weights
        variables = reference.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables))
    cases.assert_same_weights(ours, reference, start, 1e-9)


def test_stages_act_on_the_update(float64):
    """A clip after it sees the gradient of the whole batch."""
    batches = coupled.batches(coupled.LOSSES["dice"][1], BATCHES)
    model = dense()
    model.compile(tf_keras.optimizers.SGD(1.0, global_clipnorm=0.01), coupled.dice)
    ours = dense()
    ours.set_weights(model.get_weights())
    ours.compile(tf_keras.optimizers.SGD(1.0), coupled.dice)
    start = cases.weights_of(model)
    chain = [ga.Split(ROWS, whole_batch_loss=True), ga.ClipByGlobalNorm(0.01)]
    ours = ga.make_accumulating(ours, transforms=chain)
    for each in (model, ours):
        each.fit(cases.dataset(batches), verbose=0)
    cases.assert_same_weights(ours, model, start, 1e-9)


@pytest.mark.parametrize(
    ("policy", "tolerance"), [("mixed_float16", 0.05), ("mixed_bfloat16", 0.2)]
)
def test_together_with_precision(policy, tolerance):
    """The loss is taken in float32; gradients come as near to float32's as 16 bits can."""
    tf_keras.utils.set_random_seed(0)
    model = dense()
    model.compile(tf_keras.optimizers.SGD(0.1), coupled.in_batch_softmax)
    ours = ga.make_accumulating(model, precision=policy, **WHOLE)
    start = cases.weights_of(model)
    batches = [
        tuple(part.astype("float32") for part in batch)
        for batch in coupled.batches(coupled.LOSSES["correlation"][1], BATCHES)
    ]
    for each in (model, ours):
        each.fit(cases.dataset(batches), epochs=2, verbose=0)
    cases.assert_same_weights(ours, model, start, tolerance)


def test_a_small_loss_in_float16(float64):
    """The loss scale is there where its gradient passes through 16 bits on the way to outputs."""
    tf_keras.backend.set_floatx("float32")

    def loss_of(model, x, y, y_pred):
        again = tf.cast(model(x * 1.5, training=True)[0], tf.float32)
        return 1e-4 * tf.reduce_mean(
            (tf.stop_gradient(tf.cast(y_pred[0], tf.float32)) - again) ** 2
        )

    (batch,) = [
        tuple(part.astype("float32") for part in each)
        for each in coupled.batches(coupled.LOSSES["trimmed"][1], [1024])
    ]
    moved = []
    for arguments in ({"micro_batch_size": 256, "whole_batch_loss": True}, {"accum_steps": 1}):
        tf_keras.utils.set_random_seed(0)
        model = Own(conditional, loss_of, name="own")
        model(batch[0])
        model.compile(tf_keras.optimizers.SGD(1.0))
        start = cases.weights_of(model)
        ours = ga.make_accumulating(model, **arguments, precision="mixed_float16", inplace=True)
        ours.train_on_batch(*batch)
        ways = [b - a for a, b in zip(start, cases.weights_of(ours))][:2]  # of the dense layer
        moved.append(np.concatenate([each.ravel() for each in ways]))
    whole, plain = moved
    assert np.abs(plain).max() > 1e-6
    np.testing.assert_allclose(whole, plain, atol=0.02 * np.abs(plain).max())


@pytest.mark.parametrize("file", ["m.keras", "m.h5", "m"])
def test_files_carry_it(float64, tmp_path, file):
    """Saved, loaded and trained on, as if it had not been."""
    batches = coupled.batches(coupled.LOSSES["dice"][1], BATCHES)
    model = dense()
    model.compile(tf_keras.optimizers.SGD(0.1), coupled.dice)
    ours = ga.make_accumulating(model, **WHOLE)
    ours.fit(cases.dataset(batches), verbose=0)
    ours.save(tmp_path / file)
    again = tf_keras.models.load_model(tmp_path / file, custom_objects={"dice": coupled.dice})
    assert again.transforms == ours.transforms
    start = cases.weights_of(ours)
    for each in (ours, again):
        each.fit(cases.dataset(batches), verbose=0)
    cases.assert_same_weights(again, ours, start, 1e-9)


# ---- the two passes --------------------------------------------------------------------------


class Scaled(layers.Layer):
    """Multiplies by one weight."""

    def build(self, shape):
        self.weight = self.add_weight(name="weight", shape=[], initializer="ones")

    def call(self, inputs):
        return inputs * self.weight


class Thrown(layers.Layer):
    """Random numbers of its own: by a generator that it holds, or by TensorFlow's state."""

    def __init__(self, is_held, **kwargs):
        super().__init__(**kwargs)
        seed = tf.random.uniform([], maxval=2**30, dtype=tf.int32)  # follows the global one
        self.generator = tf.random.Generator.from_seed(seed) if is_held else tf.random

    def call(self, inputs):
        return inputs * self.generator.uniform(tf.shape(inputs), dtype=inputs.dtype)


NOISES = {
    "dropout": lambda: layers.Dropout(0.5),
    "spatial dropout": lambda: layers.SpatialDropout1D(0.5),
    "gaussian noise": lambda: layers.GaussianNoise(1.0),
    "gaussian dropout": lambda: layers.GaussianDropout(0.5),
    "alpha dropout": lambda: layers.AlphaDropout(0.5),
    "seeded dropout": lambda: layers.Dropout(0.5, seed=3),
    "random zoom": lambda: tf_keras.Sequential(
        [layers.Reshape([6, 4, 1]), layers.RandomZoom(0.4), layers.Reshape([6, 4])]
    ),
    "random flip": lambda: tf_keras.Sequential(
        [layers.Reshape([6, 4, 1]), layers.RandomFlip(), layers.Reshape([6, 4])]
    ),
    "own generator": lambda: Thrown(True),
}


def half_square(y_true, y_pred):
    """Half a square, whose gradient is linear: it tells whether two passes drew alike."""
    return tf.reduce_sum((y_true * y_pred) ** 2) / 2


def train_noisy(noise, batches, seed=0, **how):
    """Of some batches, the losses, and the gradients with respect to the one weight."""
    tf_keras.utils.set_random_seed(seed)
    model = tf_keras.Sequential([tf_keras.Input([6, 4]), noise(), Scaled()])
    model.compile(tf_keras.optimizers.SGD(1.0), half_square, **how)
    ours = ga.make_accumulating(model, micro_batch_size=2, whole_batch_loss=True, inplace=True)
    weight = ours.layers[-1].weight
    losses, gradients = [], []
    for x in batches:
        weight.assign(1.0)
        losses.append(ours.train_on_batch(x, x))
        gradients.append(1.0 - float(weight))
    return np.array(losses), np.array(gradients)


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("name", NOISES)
def test_the_second_pass_draws_as_the_first(float64, name, eager):
    """Of outputs w n the loss is (w n)^2 / 2, and its gradient at w = 1 twice that.

    With other draws in the second pass it would be the product of both.
    """
    batches = [np.random.default_rng(0).normal(size=[7, 6, 4])] * 3
    losses, gradients = train_noisy(NOISES[name], batches, run_eagerly=eager)
    np.testing.assert_allclose(gradients, 2 * losses, rtol=1e-9)
    assert len(set(losses)) == 3  # each step draws anew
    again, _ = train_noisy(NOISES[name], batches, run_eagerly=eager)
    np.testing.assert_array_equal(again, losses)
    others, _ = train_noisy(NOISES[name], batches, seed=1, run_eagerly=eager)
    assert set(others).isdisjoint(losses)


def test_slices_draw_differently(float64):
    """Rows that are alike are masked each in its own way, in one slice and in another."""
    model = tf_keras.Sequential([tf_keras.Input([64]), layers.Dropout(0.5)])
    seen = []

    def loss(y_true, y_pred):
        seen.append(tf.numpy_function(lambda rows: kept.append(rows) or 0.0, [y_pred], tf.float64))
        return tf.reduce_sum(y_pred) + seen[-1]

    kept = []
    model.compile("sgd", loss)
    ours = ga.make_accumulating(model, micro_batch_size=2, whole_batch_loss=True, inplace=True)
    for _ in range(2):
        ours.train_on_batch(np.ones([6, 64]), np.ones([6, 64]))
    rows = {tuple(row) for batch in kept for row in batch}
    assert len(kept) == 2
    assert len(rows) == 12


@pytest.mark.parametrize(("eager", "name"), [(False, "thrown"), (True, "RandomUniform")])
def test_what_cannot_draw_again_is_named(float64, eager, name):
    """The layer, or in an eager step its operation."""
    with pytest.warns(ga.InexactWarning, match=f"{name} draws random numbers that cannot be"):
        train_noisy(lambda: Thrown(False, name="thrown"), [np.ones([3, 6, 4])], run_eagerly=eager)


@pytest.mark.parametrize("eager", [False, True])
def test_layers_that_the_first_batch_makes_draw_alike(float64, eager):
    model = tf_keras.Sequential([layers.Dropout(0.5), Scaled()])
    model.compile(tf_keras.optimizers.SGD(1.0), half_square, run_eagerly=eager)
    ours = ga.make_accumulating(model, micro_batch_size=2, whole_batch_loss=True, inplace=True)
    loss = ours.train_on_batch(np.ones([5, 6]), np.ones([5, 6]))
    np.testing.assert_allclose(1 - float(ours.layers[-1].weight), 2 * loss, rtol=1e-9)


class Counting(layers.Layer):
    """Counts its calls, and multiplies by the count."""

    def build(self, shape):
        self.calls = self.add_weight(name="calls", shape=[], initializer="zeros", trainable=False)
        self.weight = self.add_weight(name="weight", shape=[], initializer="ones")

    def call(self, inputs):
        self.add_metric(tf.reduce_mean(inputs), name="level")
        return inputs * self.weight * tf.cast(self.calls.assign_add(1.0), inputs.dtype)


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("mode", ["keep", "momentum", "pooled"])
def test_state_changes_once(float64, mode, eager):
    """For a loss that is a mean over rows, slices with and without: the same in every state."""
    model = tf_keras.Sequential(
        [
            tf_keras.Input([5]),
            Counting(),
            layers.BatchNormalization(momentum=0.7),
            layers.Dense(3, activity_regularizer="l2"),
        ]
    )
    model.compile("adam", "mse", metrics=["mae", tf_keras.metrics.AUC()], run_eagerly=eager)
    batches = coupled.batches(coupled.LOSSES["dice"][1], BATCHES)
    with pytest.warns(ga.InexactWarning) if mode == "keep" else contextlib.nullcontext():
        slices = ga.make_accumulating(model, micro_batch_size=ROWS, batch_norm=mode)
        whole = ga.make_accumulating(model, **WHOLE, batch_norm=mode)
    start = cases.weights_of(model)
    logs = [each.fit(cases.dataset(batches), verbose=0).history for each in (slices, whole)]
    cases.assert_same_weights(whole, slices, start, 1e-9)
    assert logs[0].keys() == logs[1].keys()
    for name in logs[0]:
        np.testing.assert_allclose(logs[1][name], logs[0][name], rtol=1e-9, err_msg=name)


@pytest.mark.parametrize("mode", ["momentum", "pooled"])
def test_statistics_are_those_of_the_slices(float64, mode):
    """Those that are pooled move once a batch, also where the loss calls the model again."""

    def build(loss):
        tf_keras.utils.set_random_seed(0)
        model = Own(lambda model, x: model.norm(x), loss, name="own")
        model.norm = layers.BatchNormalization(momentum=0.7)
        model(np.ones([2, 5]))
        model.compile("sgd")
        return ga.make_accumulating(model, **WHOLE, batch_norm=mode, inplace=True)

    once = build(lambda model, x, y, p: tf.reduce_mean(p**2))
    again = build(lambda model, x, y, p: tf.reduce_mean((p - model(x * 2, training=True)) ** 2))
    for batch in coupled.batches(coupled.LOSSES["trimmed"][1], [11, 8]):
        once.train_on_batch(*batch)
        again.train_on_batch(*batch)
    np.testing.assert_allclose(again.norm.moving_mean, once.norm.moving_mean, rtol=1e-12)
    assert np.abs(once.norm.moving_mean).max() > 1e-3


@pytest.mark.parametrize("eager", [False, True])
def test_what_the_first_batch_makes_moves_once(float64, eager):
    """A model that is not built, whose layers have states."""
    moved = []
    for arguments in (WHOLE, {"micro_batch_size": ROWS}):
        model = tf_keras.Sequential([layers.BatchNormalization(momentum=0.7), layers.Dense(3)])
        model.compile("sgd", "mse", run_eagerly=eager)
        with pytest.warns(ga.InexactWarning):
            model = ga.make_accumulating(model, **arguments, inplace=True)
        (batch,) = coupled.batches(coupled.LOSSES["trimmed"][1], [11])
        model.train_on_batch(*batch)
        moved.append(model.layers[0].moving_mean.numpy())
    np.testing.assert_allclose(*moved, rtol=1e-12)


@pytest.mark.parametrize("eager", [False, True])
def test_tables_of_words(float64, eager):
    """Layers whose weights are no variables."""
    words = layers.TextVectorization(output_sequence_length=4, vocabulary=["a", "b", "c"])
    model = tf_keras.Sequential([words, layers.Embedding(9, 3), layers.Flatten(), layers.Dense(3)])
    model.compile("sgd", coupled.trimmed, run_eagerly=eager)
    x = tf.constant([["a b"], ["c"], ["b a c"], ["c c"], ["a"], ["b"]])
    model(x)
    start = cases.weights_of_variables(model)
    ours = ga.make_accumulating(model, **WHOLE)
    y = np.random.default_rng(0).normal(size=[6, 3])
    for each in (ours, model):
        each.train_on_batch(x, y)
    for own, other, first in zip(*map(cases.weights_of_variables, (ours, model)), start):
        np.testing.assert_allclose(own, other, rtol=1e-9)
        assert np.abs(other - first).max() > 0


def test_stripping_gives_back_the_model(float64):
    """A plain model again, whose layers draw as those of one that never was converted."""

    def train(is_converted):
        tf_keras.utils.set_random_seed(0)
        model = tf_keras.Sequential([tf_keras.Input([5]), layers.Dropout(0.5), layers.Dense(3)])
        model.compile("sgd", "mse")
        (batch,) = coupled.batches(coupled.LOSSES["dice"][1], [8])
        weights = model.get_weights()
        if is_converted:
            model = ga.make_accumulating(model, **WHOLE, inplace=True)
            model.train_on_batch(*batch)
            model = ga.strip_accumulating(model)
            model.set_weights(weights)
        tf_keras.utils.set_random_seed(1)
        return model.train_on_batch(*batch)

    assert train(True) == train(False)


# ---- what cannot be --------------------------------------------------------------------------


class OwnStep(tf_keras.Sequential):
    def train_step(self, data):
        return super().train_step(data)


def scores(inputs):
    return tf.matmul(inputs, inputs, transpose_b=True)


@pytest.mark.parametrize("rows", [8, 7])
@pytest.mark.parametrize(
    ("output", "error", "text"),
    [
        (scores, ValueError, "must be given a model whose rows stand alone"),
        (tf.reduce_mean, ValueError, "must have a row for each row of the batch; got one of"),
        (
            lambda x: tf.repeat(x, 2, 0),
            (ValueError, tf.errors.InvalidArgumentError),
            "must have a row for each row of the batch",
        ),
        (
            lambda x: tf.reduce_mean(x, 0),
            ValueError,
            "must have a row for each row of the batch; got one of shape (3,)",
        ),
        (
            tf.RaggedTensor.from_tensor,
            TypeError,
            "must be a dense tensor; got",
        ),
    ],
)
def test_outputs_that_are_not_of_rows_are_refused(float64, output, error, text, rows):
    model = tf_keras.Sequential(
        [tf_keras.Input([5]), layers.Dense(3), layers.Lambda(output)], name="small"
    )
    model.compile("sgd", lambda y_true, y_pred: tf.reduce_sum(tf.convert_to_tensor(y_pred)))
    ours = ga.make_accumulating(model, **WHOLE)
    start = cases.weights_of(ours)
    with pytest.raises(error, match=re.escape(text)):
        ours.train_on_batch(np.ones([rows, 5]), np.ones([rows, 3]))
    for now, before in zip(cases.weights_of(ours), start):
        np.testing.assert_array_equal(now, before)


@pytest.mark.parametrize("eager", [False, True])
def test_slices_of_different_lengths_are_refused(float64, eager):
    """As of ragged inputs, which are padded slice by slice."""
    inputs = tf_keras.Input([None, 2], ragged=True)
    model = tf_keras.Model(inputs, layers.Dense(3)(layers.Lambda(lambda x: x.to_tensor())(inputs)))
    model.compile("sgd", lambda y_true, y_pred: tf.reduce_mean(y_pred), run_eagerly=eager)
    ours = ga.make_accumulating(model, **WHOLE)
    x = tf.ragged.constant([[[1.0, 2.0]] * length for length in (1, 2, 1, 2, 5, 1)], ragged_rank=1)
    with pytest.raises(tf.errors.InvalidArgumentError, match="as long for every slice of a batch"):
        ours.train_on_batch(tf.cast(x, tf.float64), np.ones([6, 1]))


class OwnGradients(tf_keras.optimizers.legacy.SGD):
    def _compute_gradients(self, loss, var_list, grad_loss=None, tape=None):
        return super()._compute_gradients(loss, var_list, grad_loss, tape)


def test_an_optimizer_with_gradients_of_its_own_is_refused():
    """At conversion; and in the first step, if it is compiled later."""
    text = "must be given an optimizer that takes the gradient of one loss; got OwnGradients"
    model = tf_keras.Sequential([tf_keras.Input([5]), layers.Dense(3)])
    model.compile(OwnGradients(), "mse")
    with pytest.raises(ValueError, match=text):
        ga.make_accumulating(model, **WHOLE)
    model.compile("sgd", "mse")
    model = ga.make_accumulating(model, **WHOLE, inplace=True)
    model.compile(OwnGradients(), "mse", run_eagerly=True)
    with pytest.raises(ValueError, match=text):
        model.train_on_batch(np.ones([5, 5]), np.ones([5, 3]))


def test_a_step_of_the_models_own_is_refused():
    model = OwnStep([tf_keras.Input([5]), layers.Dense(3)], name="own")
    with pytest.raises(ValueError, match="tf_keras's own train_step; got 'own', whose train_step"):
        ga.make_accumulating(model, **WHOLE)


def test_slices_that_are_left_out_are_refused():
    """The loss has seen their rows."""
    with pytest.raises(ValueError, match="on_nonfinite must be 'window' where Split has whole_"):
        ga.Chain(ga.Split(4, True), ga.Accumulate(2, on_nonfinite="micro_batch"))


def test_a_stage_on_slices_is_refused():
    with pytest.raises(ValueError, match="every stage after Accumulate where Split has whole_"):
        ga.Chain(ga.Split(4, True), ga.ClipByNorm(1.0), ga.Accumulate(2))
