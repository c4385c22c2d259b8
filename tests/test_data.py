"""Batches of any structure, and what a micro-batch weighs where the loss is the model's own."""

import cases
import numpy as np
import own_models
import pytest
import tensorflow as tf
import tf_keras
from tf_keras import layers

import ga_transform as ga

WORDS = np.array(["one", "two", "three", "four"])


def assert_trains_alike(plain, model, windows):
    """A converted model in windows, and a plain one on the concatenation of each."""
    plain.fit(cases.dataset(map(cases.concatenate, windows)), verbose=0)
    model.fit(cases.dataset(sum(windows, [])), verbose=0)
    for ours, theirs in zip(model.get_weights(), plain.get_weights()):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9)


class Step(tf_keras.Model):
    """A loss of its own, a mean over rows, of whatever `predict` makes of a batch."""

    def __init__(self, predict):
        super().__init__()
        self.predict_rows = predict
        self.top = own_models.dense(1)

    def call(self, data):
        return self.top(self.predict_rows(data))

    def train_step(self, data):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((self(data) - 1.0) ** 2)
        self.optimizer.minimize(loss, self.trainable_variables, tape=tape)
        return {"loss": loss}


def test_what_weighs_nothing_adds_nothing(float64):
    """A loss of its own that is 0 / 0 where the counting function says 0."""

    class Masked(own_models.TwoLayers):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                valid = tf.cast(y[:, 0] > 0, x.dtype)
                losses = tf.reduce_mean((self(x) - y) ** 2, -1)
                loss = tf.reduce_sum(losses * valid) / tf.reduce_sum(valid)
            self.optimizer.minimize(loss, self.trainable_variables, tape=tape)
            return {"loss": loss}

    plain, model = Masked(), Masked()
    for each in (plain, model):
        each.compile(own_models.momentum())
    weighting = lambda data: tf.math.count_nonzero(data[1][:, 0] > 0)  # noqa: E731
    ga.make_accumulating(model, transforms=[ga.Accumulate(3, weighting=weighting)], inplace=True)
    windows = []
    for empty in (0, 1, 2):
        rng = np.random.default_rng(empty)
        windows.append([own_models.regression(rng, rows) for rows in (4, 2, 3)])
        windows[-1][empty][1][:] = -1.0
    assert_trains_alike(plain, model, windows)


class Coordinates(tf.experimental.BatchableExtensionType):
    """A type of the user's own."""

    left: tf.Tensor
    right: tf.Tensor


def ragged(rng, rows):
    lengths = rng.integers(1, 4, size=rows)
    return tf.RaggedTensor.from_row_lengths(rng.normal(size=lengths.sum()), lengths)


def sparse(rng, rows):
    return tf.sparse.from_dense(rng.normal(size=[rows, 3]) * rng.integers(0, 2, size=[rows, 3]))


def normal(rng, rows):
    return tf.constant(rng.normal(size=[rows, 3]))


#: What a batch is, and what its step takes of it. Shape: [rows, features].
DATA = {
    "a tensor": (normal, lambda x: x),
    "a tuple of one": (lambda rng, rows: (normal(rng, rows),), lambda data: data[0]),
    "targets": (
        lambda rng, rows: (normal(rng, rows), normal(rng, rows)),
        lambda data: data[0] * data[1],
    ),
    "four views": (
        lambda rng, rows: tuple(normal(rng, rows) for _ in range(4)),
        tf.add_n,
    ),
    "a nest": (
        lambda rng, rows: {"a": [normal(rng, rows), None], "b": {"c": (normal(rng, rows),)}},
        lambda data: data["a"][0] + data["b"]["c"][0],
    ),
    "scalars first": (
        lambda rng, rows: {"a": tf.constant(2.0, tf.float64), "x": normal(rng, rows)},
        lambda data: data["a"] * data["x"],
    ),
    "ragged": (ragged, lambda x: x.to_tensor(shape=[None, 4])),
    "sparse": (sparse, tf.sparse.to_dense),
    "strings": (
        lambda rng, rows: tf.constant(rng.choice(WORDS, size=[rows, 2])),
        lambda x: tf.cast(tf.strings.length(x), tf.float64) / 5.0,
    ),
    "a type of its own": (
        lambda rng, rows: (
            Coordinates(normal(rng, rows), normal(rng, rows)),
            tf.zeros([rows], tf.float64),
        ),
        lambda data: data[0].left * data[0].right,
    ),
}


@pytest.mark.parametrize("kind", DATA)
def test_rows_are_found_in_data_of_any_shape(float64, kind):
    """A mean over rows of the model's own weighs by rows, which are found wherever they are."""
    batch, predict = DATA[kind]
    model = Step(predict)
    model.compile(tf_keras.optimizers.SGD(0.1))
    rng = np.random.default_rng(0)
    batches = [batch(rng, rows) for rows in (4, 1, 3)]
    for data in batches:
        model(data)
    features = np.concatenate([np.asarray(predict(data)) for data in batches])
    kernel, bias = model.get_weights()
    ga.make_accumulating(model, 3, inplace=True)
    step = tf.function(model.train_step)
    for data in batches:
        step(data)
    residual = 2 * (features @ kernel + bias - 1.0) / 8
    np.testing.assert_allclose(model.top.kernel, kernel - 0.1 * features.T @ residual, atol=1e-9)
    np.testing.assert_allclose(model.top.bias, bias - 0.1 * residual.sum(0), atol=1e-9)


def test_a_batch_without_rows_asks_what_it_weighs():
    """Where no tensor has rows each micro-batch counts as one, and a warning asks for more."""
    model = Step(lambda x: tf.reshape(x, [1, 1]))
    model.compile("sgd")
    ga.make_accumulating(model, 2, inplace=True)
    with pytest.warns(ga.InexactWarning, match="no tensor whose rows could be counted"):
        model.train_step(tf.constant(1.0))


def test_tensors_of_different_lengths_ask_what_they_weigh():
    """Nodes, edges and graphs: the first counts, a warning says so, and a function has its way."""
    data = {"edges": tf.zeros([7, 2]), "nodes": tf.zeros([4, 3])}
    for weighting, warns in (("exact", True), (lambda data: tf.shape(data["nodes"])[0], False)):
        model = Step(lambda data: data["nodes"])
        model.compile("sgd")
        transforms = [ga.Accumulate(2, weighting=weighting)]
        ga.make_accumulating(model, transforms=transforms, inplace=True)
        if warns:
            with pytest.warns(ga.InexactWarning, match="first dimensions of 7 and 4; its rows are"):
                model.train_step(data)
        else:
            model.train_step(data)


@pytest.mark.parametrize(
    ("weighting", "weights"),
    [("exact", [4, 1, 3]), ("equal", [1, 1, 1]), (lambda x: tf.reduce_sum(x[:, 0]), None)],
    ids=["rows", "equal", "a function"],
)
def test_what_weighs_a_loss_of_its_own(float64, weighting, weights):
    """Rows by default; equally; or by what a function of the batch returns."""
    rng = np.random.default_rng(1)
    batches = [np.abs(rng.normal(size=[rows, 3])) for rows in (4, 1, 3)]
    weights = weights or [x[:, 0].sum() for x in batches]
    model = Step(lambda x: x)
    model.compile(tf_keras.optimizers.SGD(0.1))
    model(batches[0])
    kernel, bias = model.get_weights()
    transforms = [ga.Accumulate(3, weighting=weighting)]
    ga.make_accumulating(model, transforms=transforms, inplace=True)
    for x in batches:
        model.train_step(x)
    gradient = sum(
        weight * x.T @ (2 * (x @ kernel + bias - 1.0) / len(x))
        for weight, x in zip(weights, batches)
    )
    np.testing.assert_allclose(
        model.top.kernel, kernel - 0.1 * gradient / sum(weights), rtol=0, atol=1e-9
    )


def test_the_rows_of_targets_count_before_those_of_features(float64):
    """Many nodes, few graphs: a mean over graphs weighs by graphs."""
    model = Step(lambda data: tf.math.segment_sum(*data[0]))
    model.compile(tf_keras.optimizers.SGD(0.1))
    rng = np.random.default_rng(1)
    batches = []
    for graphs in (3, 1):
        of_graph = np.sort(np.concatenate([np.arange(graphs), rng.integers(0, graphs, size=4)]))
        nodes = rng.normal(size=[len(of_graph), 3])
        batches.append((tuple(map(tf.constant, (nodes, of_graph))), tf.zeros([graphs])))
    features = np.concatenate([model.predict_rows(data) for data in batches])
    model(batches[0])
    kernel, bias = model.get_weights()
    ga.make_accumulating(model, 2, inplace=True)
    step = tf.function(model.train_step, reduce_retracing=True)
    with pytest.warns(ga.InexactWarning, match="its rows are taken to be those of the targets"):
        step(batches[0])
    step(batches[1])
    residual = 2 * (features @ kernel + bias - 1.0) / 4
    np.testing.assert_allclose(model.top.kernel, kernel - 0.1 * features.T @ residual, atol=1e-9)


class Task(tf_keras.layers.Layer):
    """A loss object inside a layer, as recommenders have it."""

    def __init__(self, reduction):
        super().__init__()
        self.loss = tf_keras.losses.MeanSquaredError(reduction=reduction)

    def call(self, y, y_pred):
        return self.loss(y, y_pred)


class Tasked(own_models.TwoLayers):
    def __init__(self, reduction):
        super().__init__()
        self.hidden.kernel_regularizer = None
        self.task = Task(reduction)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        return self.task(y, y_pred)


@pytest.mark.parametrize(
    ("reduction", "weighting"), [("sum", "sum"), ("sum_over_batch_size", "exact")]
)
def test_a_sum_of_its_own(float64, reduction, weighting):
    """`weighting="sum"` adds up and divides by nothing, in partial windows as well."""
    plain, model = Tasked(reduction), Tasked(reduction)
    for each in (plain, model):
        each.compile(tf_keras.optimizers.SGD(0.01, momentum=0.9))
    ga.make_accumulating(model, transforms=[ga.Accumulate(3, weighting=weighting)], inplace=True)
    windows = cases.batches_of(own_models.regression, cases.PARTIAL, 3)
    assert_trains_alike(plain, model, windows)


def test_losses_by_row_in_a_step_of_its_own(float64):
    """Unreduced losses whose mean the step takes: a counting function says so, and is asked for."""

    class Mean(own_models.TwoLayers):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(self.compiled_loss(y, self(x)))
            self.optimizer.minimize(loss, self.trainable_variables, tape=tape)
            return {"loss": loss}

    loss = tf_keras.losses.MeanSquaredError(reduction="none")
    plain, model, warned = Mean(), Mean(), Mean()
    for each in (plain, model, warned):
        each.hidden.kernel_regularizer = None
        each.compile(own_models.momentum(), loss)
    transforms = [ga.Accumulate(3, weighting=lambda data: tf.shape(data[1])[0])]
    ga.make_accumulating(model, transforms=transforms, inplace=True)
    windows = cases.batches_of(own_models.regression, cases.UNEVEN, 3)
    assert_trains_alike(plain, model, windows)
    ga.make_accumulating(warned, 3, inplace=True)
    with pytest.warns(ga.InexactWarning, match="gradients are read as their sum"):
        warned.train_on_batch(*windows[0][0])


def test_a_sum_that_would_be_taken_for_a_mean_is_named():
    """A loss object with reduction SUM that a model's own loss uses: a warning says what to say."""
    model = Tasked("sum")
    model.compile("sgd")
    ga.make_accumulating(model, 2, inplace=True)
    with pytest.warns(ga.InexactWarning, match="MeanSquaredError with reduction SUM is used"):
        model.fit(*own_models.regression(np.random.default_rng(0), 4), verbose=0)


def test_a_loss_that_is_reduced_before_it_is_compiled_weighs_by_rows(float64):
    """`compiled_loss` of one number stands for the rows of the batch."""

    class Internal(own_models.TwoLayers):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = own_models.mean_square(y, self(x))[tf.newaxis]
                loss = self.compiled_loss(loss, loss)
            self.optimizer.minimize(loss, self.trainable_variables, tape=tape)
            return {"loss": loss}

    plain, model = Internal(), Internal()
    for each in (plain, model):
        each.compile(own_models.momentum(), loss=lambda y_true, y_pred: y_pred)
    ga.make_accumulating(model, 3, inplace=True)
    x, y = own_models.regression(np.random.default_rng(2), 8)
    plain.train_on_batch(x, y)
    with pytest.warns(ga.InexactWarning, match="as one number, which is read as a mean over rows"):
        model.train_on_batch(x[:4], y[:4])
    for rows in (slice(4, 5), slice(5, 8)):
        model.train_on_batch(x[rows], y[rows])
    for ours, theirs in zip(model.get_weights(), plain.get_weights()):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9)


def variational():
    """No targets and no compiled loss: all of it by `add_loss`, in rows and of weights."""
    inputs = tf_keras.Input([4])
    code = layers.Dense(2, "tanh", kernel_regularizer="l2")(inputs)
    model = tf_keras.Model(inputs, layers.Dense(4)(code))
    model.add_loss(tf.reduce_mean(tf.square(inputs - model.output)))
    model.add_loss(tf.reduce_mean(tf.abs(code)))
    return cases.Case(model, {}, lambda rng, rows: (rng.normal(size=[rows, 4]),))


def test_data_without_targets(float64):
    """A functional model whose losses are added to it: the law, on features alone."""
    cases.assert_law(variational(), own_models.momentum, cases.PARTIAL, 1e-9)


def test_losses_of_branches_of_the_graph(float64):
    """A compiled loss that is taken in one branch of a condition weighs nothing in another."""

    class Branching(own_models.TwoLayers):
        def train_step(self, data):
            def one(factor):
                x, y = data
                with tf.GradientTape() as tape:
                    loss = factor * self.compiled_loss(y, self(x))
                self.optimizer.minimize(loss, self.trainable_variables, tape=tape)
                return loss

            return {
                "loss": tf.cond(
                    self.optimizer.iterations < 1, lambda: one(1.0), lambda: one(0.5)
                )
            }  # fmt: skip

    plain, model = Branching(), Branching()
    for each in (plain, model):
        each.compile(own_models.momentum(), "mse")
    ga.make_accumulating(model, 3, inplace=True)
    windows = cases.batches_of(own_models.regression, cases.UNEVEN, 3)
    assert_trains_alike(plain, model, windows)


class InFunctions(own_models.TwoLayers):
    """Its step is a function of TensorFlow, and calls two more."""

    @tf.function
    def train_step(self, data):
        return {"loss": self.first(*data) + self.second(*data)}

    @tf.function
    def first(self, x, y):
        with tf.GradientTape() as tape:
            loss = own_models.mean_square(y, self(x))
        variables = self.top.trainable_variables
        self.optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables))
        return loss

    @tf.function
    def second(self, x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.abs(self.hidden(x)))
        variables = self.hidden.trainable_variables
        self.optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables))
        return loss


class Helped(own_models.TwoLayers):
    """Its step hands the gradients to a function of TensorFlow, which applies them."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            compiled = self.compiled_loss is not None and self.compiled_loss._user_losses
            loss = self.compiled_loss(y, y_pred) if compiled else own_models.mean_square(y, y_pred)
        self.hand(tape.gradient(loss, self.trainable_variables))
        return {"loss": loss}

    @tf.function
    def hand(self, gradients):
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables))


class Decorated(own_models.TwoLayers):
    @tf.function
    def train_step(self, data):
        return super().train_step(data)


@pytest.mark.parametrize("how", [{}, {"run_eagerly": True}, {"steps_per_execution": 2}], ids=str)
@pytest.mark.parametrize(
    ("model_class", "loss"), [(Helped, None), (Helped, "mse"), (Decorated, "mse")]
)
def test_functions_in_a_step_weigh_each_micro_batch(float64, model_class, loss, how):
    """They are traced once, and each micro-batch has a weight of its own all the same."""
    plain, model = model_class(), model_class()
    for each in (plain, model):
        each.compile(tf_keras.optimizers.legacy.SGD(0.125), loss, **how)
    ga.make_accumulating(model, 3, inplace=True)
    windows = cases.batches_of(own_models.regression, cases.UNEVEN, 4)
    plain.fit(cases.dataset(map(cases.concatenate, windows)), verbose=0)
    model.fit(cases.dataset(sum(windows, [])), verbose=0)
    traced_with = plain.compiled_loss  # the plain function goes on with its metrics
    model.compile(model.optimizer, loss, **how)  # what is traced is made anew
    plain.compile(plain.optimizer, loss, **how)
    plain.fit(cases.dataset(map(cases.concatenate, windows)), verbose=0)
    model.fit(cases.dataset(sum(windows, [])), verbose=0)
    ga.strip_accumulating(model, inplace=True)
    for each in (plain, model):
        each.fit(cases.dataset(windows[0]), verbose=0)
    del traced_with
    assert int(model.optimizer.iterations) == int(plain.optimizer.iterations) == 7
    for ours, theirs in zip(model.get_weights(), plain.get_weights()):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9)


def test_branches_that_exclude_each_other_share_a_window(float64):
    """One optimizer, called in this branch or in that one: an update every so many batches."""

    class Either(own_models.TwoLayers):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = own_models.mean_square(y, self(x))
            gradients = tape.gradient(loss, self.trainable_variables)
            self.seen.assign_add(1)

            def apply(factor):
                scaled = [factor * gradient for gradient in gradients]
                self.optimizer.apply_gradients(zip(scaled, self.trainable_variables))
                return factor

            factor = tf.cond(self.seen % 2 == 0, lambda: apply(1.0), lambda: apply(2.0))
            self.optimizer.apply_gradients([(0.1 * gradients[0], self.trainable_variables[0])])
            return {"loss": loss, "factor": factor}

    results = []
    for how in ({}, {"run_eagerly": True}):
        model = Either()
        model.seen = tf.Variable(0, trainable=False)
        model.compile(own_models.momentum(), **how)
        ga.make_accumulating(model, 2, inplace=True)
        rng = np.random.default_rng(4)
        model.fit(cases.dataset([own_models.regression(rng, 3) for _ in range(6)]), verbose=0)
        assert int(model.optimizer.iterations) == 6
        results.append(model.get_weights())
    for traced, eager in zip(*results):
        np.testing.assert_allclose(traced, eager, rtol=0, atol=1e-9)


def test_a_step_of_functions(float64):
    """Functions within the step, which are traced more than once: a window for each call."""
    plain, model = InFunctions(), InFunctions()
    windows = cases.batches_of(own_models.regression, cases.PARTIAL, 4)
    for each in (plain, model):
        each.compile(tf_keras.optimizers.legacy.SGD(0.125))
    ga.make_accumulating(model, 3, inplace=True)
    assert_trains_alike(plain, model, windows)


def test_a_loop_of_tensorflow_is_named():
    """Each pass of it counts as a micro-batch, and a warning says so."""

    class Looping(own_models.TwoLayers):
        @tf.function
        def train_step(self, data):
            x, y = data
            for _ in tf.range(2):
                with tf.GradientTape() as tape:
                    loss = own_models.mean_square(y, self(x))
                self.optimizer.minimize(loss, self.trainable_variables, tape=tape)
            return {"loss": 0.0}

    model = Looping()
    model.compile("sgd", "mse")
    x, y = own_models.regression(np.random.default_rng(0), 2)
    model(x)
    model.optimizer.build(model.trainable_variables)
    ga.make_accumulating(model, 2, inplace=True)
    with pytest.warns(ga.InexactWarning, match="in a loop of TensorFlow, where each pass counts"):
        model.fit(x, y, verbose=0)
    assert int(model.optimizer.iterations) == 1
