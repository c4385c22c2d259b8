"""Split: every batch is cut into slices inside the graph, and is one batch to everything else."""

from pathlib import Path

import cases
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from tf_keras import layers

import ga_transform as ga

#: Rows of the batches: they divide by the slice or do not, and one is smaller.
BATCHES = [8, 7, 3, 9]
ROWS = 4


def train_both(model, data, epochs=2, arguments=None, fit=None, tolerance=1e-9):
    """Plain and split on the same batches: the same weights, counts and logs."""
    start = cases.weights_of(model)
    split = ga.make_accumulating(model, **{"micro_batch_size": ROWS, **(arguments or {})})
    ours = split.fit(data(), epochs=epochs, verbose=0, **(fit or {})).history
    theirs = model.fit(data(), epochs=epochs, verbose=0, **(fit or {})).history
    cases.assert_same_weights(split, model, start, tolerance)
    assert int(split.optimizer.iterations) == int(model.optimizer.iterations)
    assert_same_logs(theirs, ours)
    return split


def assert_same_logs(theirs, ours):
    assert theirs.keys() == ours.keys()
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-9, err_msg=name)


def batches_of(case, rows=BATCHES):
    (batches,) = cases.make_batches(case, [rows])
    return lambda: cases.dataset(batches)


def compiled(name, optimizer="adam", **compile_arguments):
    case = cases.MODELS[name]()
    case.model.compile(cases.OPTIMIZERS[optimizer](), **{**case.compile, **compile_arguments})
    return case


# ---- the law ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", cases.MODELS)
def test_every_model(float64, name):
    """Any model, batches that divide or not, smaller ones too: weights and logs of plain fit."""
    case = compiled(name)
    train_both(case.model, batches_of(case))


@pytest.mark.parametrize(
    "optimizer", ["momentum", "adagrad", "adafactor", "legacy ftrl", "legacy adam", "legacy sgd"]
)
def test_slices_reach_optimizers_that_are_lazy_with_them(float64, optimizer):
    """Rows of an embedding that no slice has touched do not move, where plain ones do not."""
    case = compiled("words", optimizer)
    train_both(case.model, batches_of(case))


@pytest.mark.parametrize(
    "how",
    [
        {"run_eagerly": True},
        pytest.param({"jit_compile": True}, marks=pytest.mark.long),
        {"steps_per_execution": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["branches", "words"])
def test_every_way_to_run_a_step(float64, name, how):
    """Eagerly, compiled by XLA, and several batches a call."""
    case = compiled(name, **how)
    train_both(case.model, batches_of(case))


class Conditional(layers.Layer):
    """Has a condition on tensors in its code, which AutoGraph makes one of the graph's."""

    def call(self, inputs):
        if tf.reduce_sum(inputs) > 0:
            inputs *= 2.0
        return inputs


def test_layers_are_converted_by_autograph(float64):
    """A slice's layers have conditions as those of a plain step."""
    model = tf_keras.Sequential([tf_keras.Input([5]), Conditional(), layers.Dense(2)])
    model.compile("adam", "mse")
    rng = np.random.default_rng(0)
    # Of all slices, and of the batch, the sum has one sign.
    batches = [(np.abs(rng.normal(size=[rows, 5])), rng.normal(size=[rows, 2])) for rows in BATCHES]
    train_both(model, lambda: cases.dataset(batches))


@pytest.mark.long
def test_a_fixed_batch_size(float64):
    """Batches whose size is known when the step is traced: divisible, and not."""
    for rows in (8, 7):
        case = compiled("dense", jit_compile=rows == 7)
        (batches,) = cases.make_batches(case, [[rows] * 3])
        whole = tf.data.Dataset.from_tensor_slices(cases.concatenate(batches))
        data = whole.batch(rows, drop_remainder=True)
        train_both(case.model, lambda data=data: data)


@pytest.mark.parametrize(
    "how",
    [{}, {"run_eagerly": True}, pytest.param({"jit_compile": True}, marks=pytest.mark.long)],
    ids=str,
)
def test_together_with_accum_steps(float64, how):
    """A window of several batches, each cut into slices; the last one is partial."""
    case = compiled("dense", **how)
    start = cases.weights_of(case.model)
    model = ga.make_accumulating(case.model, accum_steps=3, micro_batch_size=ROWS)
    batches = cases.make_batches(case, [[8, 7, 3], [9, 2]])
    model.fit(cases.dataset(sum(batches, [])), epochs=2, verbose=0)
    case.model.fit(cases.dataset(map(cases.concatenate, batches)), epochs=2, verbose=0)
    cases.assert_same_weights(model, case.model, start, 1e-9)
    assert int(model.optimizer.iterations) == 4
    model.train_on_batch(*batches[0][0])
    assert model.pending_micro_batches == 2  # slices of one batch
    assert model.discard() == 2


def test_stages_act_on_updates_and_on_slices(float64):
    """A clip stands after Accumulate for updates, before it for each slice."""
    case = cases.dense()
    case.model.compile(cases.optimizers.SGD(0.1), **case.compile)
    start = case.model.get_weights()
    ((batch,),) = cases.make_batches(case, [[8]])
    halves = [tuple(part[rows] for part in batch) for rows in (slice(0, 4), slice(4, 8))]

    def steps(*transforms, of=(batch,)):
        moves = []
        for rows in of:
            case.model.set_weights(start)
            model = ga.make_accumulating(case.model, transforms=list(transforms))
            model.train_on_batch(*rows)
            moves.append([new - old for new, old in zip(model.get_weights(), start)])
        return [np.mean(parts, axis=0) for parts in zip(*moves)]

    clip = ga.ClipByGlobalNorm(0.01)
    of_update = steps(ga.Split(4), clip)
    for ours, plain in zip(of_update, steps(clip)):
        np.testing.assert_allclose(ours, plain, atol=1e-12)
    of_slices = steps(ga.Split(4), clip, ga.Accumulate(1))
    for ours, plain in zip(of_slices, steps(clip, of=halves)):
        np.testing.assert_allclose(ours, plain, atol=1e-12)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_losses_that_are_no_means(float64, reduction):
    """Sums are added up in weights and logs; regularisers beside them count once."""
    model = tf_keras.Sequential(
        [tf_keras.Input([3]), layers.Dense(2, kernel_regularizer="l2"), layers.Dense(1)]
    )
    model.compile(cases.optimizers.SGD(0.01), tf_keras.losses.MeanSquaredError(reduction))
    rng = np.random.default_rng(0)
    batches = [(rng.normal(size=[rows, 3]), rng.normal(size=[rows, 1])) for rows in BATCHES]
    if reduction == "none":  # to which tf_keras adds no regularisers
        inputs = tf_keras.Input([3])
        model = tf_keras.Model(inputs, [layers.Dense(1)(inputs), layers.Dense(1)(inputs)])
        losses = [tf_keras.losses.MeanSquaredError(reduction)] * 2
        model.compile(cases.optimizers.SGD(0.01), losses)
        batches = [(x, (y, -y)) for x, y in batches]
    train_both(model, lambda: cases.dataset(batches))


# ---- logs ------------------------------------------------------------------------------------


def test_metrics_are_those_of_the_batch(float64):
    """Weighted ones, streaming ones, and functions that return one number for all rows."""

    def of_rows(y_true, y_pred):
        return tf.abs(y_true - y_pred)

    def of_batch(y_true, y_pred):
        return tf.reduce_mean(tf.abs(y_true - y_pred))

    case = cases.dense()
    case.model.compile(
        cases.optimizers.SGD(0.1),
        "mse",
        metrics=["mae", of_rows, of_batch, tf_keras.metrics.RootMeanSquaredError()],
        weighted_metrics=["mse"],
    )
    train_both(case.model, batches_of(case))


def test_class_weights(float64):
    """Class weights, which tf_keras makes sample weights of."""
    case = compiled("conv", metrics=["accuracy"])
    train_both(case.model, batches_of(case), fit={"class_weight": {0: 0.5, 1: 2.0, 2: 1.0}})


# ---- steps of the model's own ----------------------------------------------------------------


class Own(tf_keras.Model):
    """A step of its own, with a tracker of one number a batch and a loss that it returns."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out = layers.Dense(4, "tanh"), layers.Dense(1)
        self.tracker = tf_keras.metrics.Mean(name="tracked")

    def call(self, x):
        return self.out(self.hidden(x))

    def gradients(self, x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((self(x) - y) ** 2)
        return loss, tape.gradient(loss, self.trainable_variables)

    def train_step(self, data):
        loss, gradients = self.gradients(*data)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables))
        self.tracker.update_state(loss)
        return {"tracked": self.tracker.result(), "raw": loss, "rows": tf.shape(data[0])}


class Traced(Own):
    """The whole step is a function of TensorFlow's."""

    @tf.function
    def train_step(self, data):
        return Own.train_step(self, data)


class Inside(Own):
    """The compiled loss is taken in a function of TensorFlow's, and counts are summed up."""

    def __init__(self):
        super().__init__()
        self.seen = tf_keras.metrics.Sum(name="seen")

    @tf.function(reduce_retracing=True)
    def move(self, x, y):
        with tf.GradientTape() as tape:
            loss = self.compiled_loss(y, self(x, training=True))
        self.optimizer.minimize(loss, self.trainable_variables, tape=tape)

    def train_step(self, data):
        self.move(*data)
        self.seen.update_state(tf.shape(data[0])[0])
        return {metric.name: metric.result() for metric in self.metrics}


class Compiled(Own):
    """The compiled loss and metrics, in a step and a compute_loss of its own."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        return super().compute_loss(x, y, y_pred, sample_weight) * 2.0

    def move(self, x, y):
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = self.compute_loss(x, y, y_pred)
        self.optimizer.minimize(loss, self.trainable_variables, tape=tape)
        return y_pred, loss

    def train_step(self, data):
        x, y = data
        y_pred, _ = self.move(x, y)
        return self.compute_metrics(x, y, y_pred, None)


class Averaged(Own):
    """A moving average follows its updates, and the optimizer is given a tensor."""

    def __init__(self):
        super().__init__()
        self.average = tf.train.ExponentialMovingAverage(0.5)
        self.shadow = None

    def train_step(self, data):
        loss, gradients = self.gradients(*data)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables))
        self.average.apply([self.out.kernel])
        return {"raw": loss}


def own_data(rows=BATCHES):
    rng = np.random.default_rng(3)
    batches = [(rng.normal(size=[n, 3]), rng.normal(size=[n, 1])) for n in rows]
    return lambda: cases.dataset(batches)


def own_pair(model_class, **compile_arguments):
    """The same model twice: plain, and split in place."""
    pair = []
    for _ in range(2):
        tf_keras.utils.set_random_seed(1)
        model = model_class()
        model(np.zeros([1, 3]))
        model.compile(cases.optimizers.Adam(0.05), **compile_arguments)
        pair.append(model)
    return pair[0], ga.make_accumulating(pair[1], micro_batch_size=ROWS, inplace=True)


@pytest.mark.parametrize("how", [{}, {"run_eagerly": True}], ids=str)
@pytest.mark.parametrize(
    ("model_class", "compile_arguments"),
    [
        (Own, {}),
        (Traced, {}),
        (Averaged, {}),
        (Inside, {"loss": "mse"}),
        (Compiled, {"loss": "mse", "metrics": ["mae"]}),
    ],
)
def test_steps_of_its_own(float64, model_class, compile_arguments, how):
    """Weights, trackers and returned numbers are those of the batch."""
    plain, split = own_pair(model_class, **compile_arguments, **how)
    start, data = cases.weights_of(plain), own_data()
    theirs = plain.fit(data(), epochs=2, verbose=0).history
    ours = split.fit(data(), epochs=2, verbose=0).history
    cases.assert_same_weights(split, plain, start, 1e-9)
    for name in set(theirs) - {"rows"}:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-9, err_msg=name)
    if model_class is Averaged:
        kernels = [model.average.average(model.out.kernel) for model in (split, plain)]
        np.testing.assert_allclose(*kernels, rtol=1e-9)


def logs_of_both(model_class, **compile_arguments):
    """What both log of each batch of an epoch."""
    logs = []
    for model in own_pair(model_class, **compile_arguments):
        seen = tf_keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda _, logs, model=model: model.seen.append(dict(logs))
        )
        model.seen = []
        model.fit(own_data()(), callbacks=[seen], verbose=0)
        logs.append({name: [each[name] for each in model.seen] for name in model.seen[0]})
    return logs


def test_numbers_made_of_metrics(float64):
    """Not means over slices: what they are when the metrics have seen the whole batch."""

    class Model(Compiled):
        def train_step(self, data):
            logs = super().train_step(data)
            both = tf.cond(logs["mae"] > 0, lambda: logs["mae"] ** 2, lambda: logs["loss"])
            return {**logs, "root": tf.sqrt(logs["loss"]), "both": both}

    assert_same_logs(*logs_of_both(Model, loss="mse", metrics=["mae"]))


def test_numbers_made_of_a_summed_loss(float64):
    """A sum is told when all slices are done: what is made of it before is said to be late."""

    class Model(Compiled):
        def train_step(self, data):
            logs = super().train_step(data)
            return {**logs, "root": tf.sqrt(logs["loss"])}

    loss = tf_keras.losses.MeanSquaredError(reduction="sum")
    with pytest.warns(ga.InexactWarning, match="those of the batch before"):
        theirs, ours = logs_of_both(Model, loss=loss)
    np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-5)
    np.testing.assert_allclose(ours["root"][1:], theirs["root"][:-1], rtol=1e-5)


@pytest.mark.parametrize("how", [{}, {"run_eagerly": True}], ids=str)
def test_a_number_under_the_name_of_a_metric(float64, how):
    """The batch's loss, which is not the mean over the epoch that the metric has."""

    class Model(Compiled):
        def train_step(self, data):
            _, loss = self.move(*data)
            return {"loss": loss}

    assert_same_logs(*logs_of_both(Model, loss="mse", **how))


def test_a_loss_that_updates_the_metrics_of_compile(float64):
    """Which the first step has made."""

    class Model(Compiled):
        def train_step(self, data):
            x, y = data
            y_pred, loss = self.move(x, y)
            for metric in self.metrics:
                given = (loss,) if metric.name in ("loss", "tracked") else (y, y_pred)
                metric.update_state(*given)
            return {metric.name: metric.result() for metric in self.metrics}

    assert_same_logs(*logs_of_both(Model, loss="mse", metrics=["mae"]))


@pytest.mark.parametrize("arguments", [{"micro_batch_size": 4}, {"accum_steps": 2}], ids=str)
def test_what_the_first_step_makes(float64, arguments):
    """Metrics, layers and a moving average: in view of the trace that trains."""

    class Made(layers.Layer):
        def build(self, shape):
            self.dense = layers.Dense(1)

        def call(self, inputs):
            outputs = self.dense(inputs)
            self.add_metric(tf.reduce_mean(outputs**2), name="power")
            return outputs

    class Model(tf_keras.Model):
        def __init__(self):
            super().__init__()
            self.made, self.average = Made(), None

        def call(self, inputs):
            return self.made(inputs)

        def train_step(self, data):
            logs = super().train_step(data)
            if self.average is None:
                self.average = tf.train.ExponentialMovingAverage(0.5)
            self.average.apply(self.trainable_variables)
            return logs

    batches = list(own_data([9, 9])().as_numpy_iterator())
    averages, logs = [], []
    for kind in ({}, arguments):
        tf_keras.utils.set_random_seed(1)
        model = Model()
        model.compile(cases.optimizers.Adam(0.05), "mse")
        whole = kind == {} and "accum_steps" in arguments
        data = cases.dataset([cases.concatenate(batches)] if whole else batches)
        if kind:
            model = ga.make_accumulating(model, inplace=True, **kind)
        logs.append(model.fit(data, epochs=2, verbose=0).history)
        averages.append(model.average.average(model.trainable_variables[0]).numpy())
    np.testing.assert_allclose(*averages, rtol=1e-9)
    assert_same_logs(*logs)


class Sometimes(tf_keras.Model):
    """A layer takes part in some batches only."""

    def __init__(self):
        super().__init__()
        self.always, self.sometimes = layers.Dense(1), layers.Dense(1, name="sometimes")

    def call(self, inputs):
        both = self.always(inputs["x"])
        return both + self.sometimes(inputs["x"]) if "z" in inputs else both


def train_sometimes(arguments):
    """Plain and converted on batches with the layer, without it, and with it: two of each."""
    rng, results = np.random.default_rng(0), []
    pairs = [(rng.normal(size=[7, 3]), rng.normal(size=[7, 1])) for _ in range(6)]
    for kind in ({}, arguments):
        tf_keras.utils.set_random_seed(1)
        model = Sometimes()
        model({"x": pairs[0][0], "z": 0})
        model.compile(cases.optimizers.AdamW(0.05), "mse")
        if kind:
            model = ga.make_accumulating(model, inplace=True, **kind)
        start = cases.weights_of(model)
        for place, (x, y) in enumerate(pairs):
            has_both = place // 2 != 1
            model.train_on_batch({"x": x, **({"z": x} if has_both else {})}, y)
        results.append(model)
    return *results, start


def test_a_variable_without_a_gradient_in_some_batches_rests(float64):
    """It is left out of updates without it, as in plain tf_keras, and not handed zeros."""
    plain, split, start = train_sometimes({"micro_batch_size": 4})
    cases.assert_same_weights(split, plain, start, 1e-9)


def test_windows_that_may_hold_zeros_are_named():
    with pytest.warns(ga.InexactWarning, match="some batches give no gradient to .*sometimes"):
        train_sometimes({"accum_steps": 2})


def test_a_tensor_that_the_optimizer_is_given(float64):
    """What apply_gradients is given beside the gradients reaches it: that of the last slice."""

    class Scaled(tf_keras.optimizers.SGD):
        def apply_gradients(self, grads_and_vars, factor=1.0, **kwargs):
            scaled = [(gradient * factor, variable) for gradient, variable in grads_and_vars]
            return super().apply_gradients(scaled, **kwargs)

    class Model(Own):
        def train_step(self, data):
            loss, gradients = self.gradients(*data)
            factor = tf.reduce_max(data[0]) * 0.0 + 0.5
            self.optimizer.apply_gradients(zip(gradients, self.trainable_variables), factor=factor)
            return {"raw": loss}

    plain, split = own_pair(Model)
    for model in (plain, split):
        model.compile(Scaled(0.1))
    start, data = cases.weights_of(plain), own_data()
    plain.fit(data(), verbose=0)
    with pytest.warns(ga.InexactWarning, match="passes tensors to apply_gradients"):
        split.fit(data(), verbose=0)
    cases.assert_same_weights(split, plain, start, 1e-9)


def test_a_slice_that_hands_over_nothing(float64):
    """Run eagerly, a step may leave out a slice, the last one too; the others make the update."""

    class Picky(Own):
        def train_step(self, data):
            if bool(tf.reduce_all(data[1] < 0)):
                return {"raw": tf.constant(0.0, tf.float64)}
            return super().train_step(data)

    _, split = own_pair(Picky, run_eagerly=True)
    before = split.get_weights()
    split.train_on_batch(np.ones([8, 3]), np.repeat([[1.0], [-1.0]], 4, 0))
    assert int(split.optimizer.iterations) == 1
    assert np.abs(split.get_weights()[0] - before[0]).max() > 0.01


def test_equal_weighting_is_of_batches(float64):
    """Batches weigh alike, whatever their rows; within a batch rows do."""
    case = compiled("dense", "momentum")
    start = cases.weights_of(case.model)
    chain = [ga.Split(ROWS), ga.Accumulate(1, weighting="equal")]
    model = ga.make_accumulating(case.model, transforms=chain)
    for each in (model, case.model):
        each.fit(batches_of(case)(), verbose=0)
    cases.assert_same_weights(model, case.model, start, 1e-9)


def test_a_checkpoint_goes_on_only_where_batches_are_counted_alike(tmp_path):
    """Slices are micro-batches, and no batches: else the window is dropped with a warning."""
    case = compiled("conv")
    (batches,) = cases.make_batches(case, [[4, 4]])
    ways = [{"accum_steps": 3}, {"accum_steps": 3, "micro_batch_size": 2}]
    for number, (one, other) in enumerate([ways, ways[::-1]]):
        model, loaded = (ga.make_accumulating(case.model, **way) for way in (one, other))
        model.train_on_batch(*batches[0])
        path = tf.train.Checkpoint(model).write(str(tmp_path / str(number)))
        tf.train.Checkpoint(loaded).read(path)
        with pytest.warns(UserWarning, match="pending micro-batches, which are dropped"):
            loaded.train_on_batch(*batches[1])


# ---- batches of every structure --------------------------------------------------------------


def test_ragged_and_sparse_tensors(float64):
    """They are sliced by row, in nested structures, with scalars that go along."""

    class Model(tf_keras.Model):
        def __init__(self):
            super().__init__()
            self.words, self.out = layers.Embedding(9, 3), layers.Dense(1)

        def call(self, inputs):
            ragged, sparse = inputs["ragged"], inputs["deep"]["sparse"]
            pooled = tf.reduce_sum(self.words(ragged.to_tensor(shape=[None, 5])), axis=1)
            return self.out(tf.concat([pooled, tf.sparse.to_dense(sparse)], 1)) * inputs["scale"]

    rng = np.random.default_rng(0)

    def batch(rows):
        lengths = rng.integers(1, 6, size=rows)
        ragged = tf.ragged.constant([list(rng.integers(1, 9, size=n)) for n in lengths], tf.int32)
        dense = rng.normal(size=[rows, 4]) * (rng.random([rows, 4]) < 0.5)
        inputs = {
            "ragged": ragged,
            "deep": {"sparse": tf.sparse.from_dense(dense)},
            "scale": tf.constant(0.5, tf.float64),
        }
        return inputs, rng.normal(size=[rows, 1])

    batches = [batch(rows) for rows in BATCHES]
    models = []
    for is_split in (False, True):
        tf_keras.utils.set_random_seed(1)
        model = Model()
        model(batches[0][0])
        model.compile(cases.optimizers.SGD(0.1), "mse")
        if is_split:
            ga.make_accumulating(model, micro_batch_size=ROWS, inplace=True)
        step = tf.function(model.train_step, reduce_retracing=True)
        start = cases.weights_of(model)
        for x, y in batches:
            step((x, tf.constant(y)))
        models.append(model)
    cases.assert_same_weights(models[1], models[0], start, 1e-9)


def test_tensors_of_other_kinds_are_refused_by_name():
    """One line says what cannot be cut, and what to do."""
    case = compiled("dense")
    model = ga.make_accumulating(case.model, micro_batch_size=2)
    slices = tf.IndexedSlices(tf.zeros([2, 5]), tf.constant([0, 1]), tf.constant([4, 5]))
    with pytest.raises(
        TypeError,
        match="A batch that micro_batch_size cuts must be made of dense, ragged and sparse tensors",
    ):
        model.train_step((slices, tf.zeros([4, 2])))


def test_rows_that_differ_are_refused():
    """As many rows everywhere: seen when traced, or else when run; the weights do not move."""
    case = compiled("dense")
    model = ga.make_accumulating(case.model, micro_batch_size=2)
    before = model.get_weights()
    line = "A batch that micro_batch_size cuts must be of tensors with as many rows each"
    with pytest.raises(ValueError, match=f"{line}; got 4 and 3"):
        model.train_step((tf.zeros([4, 5]), tf.zeros([3, 2])))
    signature = [tf.TensorSpec([None, 5]), tf.TensorSpec([None, 2])]
    step = tf.function(lambda x, y: model.train_step((x, y)), input_signature=signature)
    with pytest.raises(tf.errors.InvalidArgumentError, match=line):
        step(tf.zeros([4, 5]), tf.zeros([3, 2]))
    for ours, theirs in zip(model.get_weights(), before):
        np.testing.assert_array_equal(ours, theirs)


def test_layers_with_a_state_of_rows_are_refused():
    """A stateful RNN has a state for each row of a batch, which slices would mix up."""
    model = tf_keras.Sequential(
        [layers.SimpleRNN(3, stateful=True, batch_input_shape=[4, 2, 1], name="memory")]
    )
    model.compile("sgd", "mse")
    with pytest.raises(
        ValueError, match="Split must be given a model without stateful layers; got memory in"
    ):
        ga.make_accumulating(model, micro_batch_size=2)


def test_a_batch_without_rows_changes_nothing(float64):
    """As a window that weighs nothing."""
    case = compiled("dense")
    model = ga.make_accumulating(case.model, micro_batch_size=2)
    before = model.get_weights()
    model.train_on_batch(np.zeros([0, 5]), np.zeros([0, 2]))
    for ours, theirs in zip(model.get_weights(), before):
        np.testing.assert_array_equal(ours, theirs)
    assert int(model.optimizer.iterations) == 0


@pytest.mark.parametrize("how", [{}, {"run_eagerly": True}], ids=str)
def test_a_batch_that_fails_leaves_nothing(float64, how):
    """An error in a late slice: no update, nothing pending, and the next batch is exact."""
    case = compiled("words", "momentum", **how)
    start = cases.weights_of(case.model)
    model = ga.make_accumulating(case.model, micro_batch_size=2)
    ((good, bad),) = cases.make_batches(case, [[6, 6]])
    bad[0][5, 0] = 99  # no such word
    with pytest.raises(tf.errors.InvalidArgumentError):
        model.train_on_batch(*bad)
    assert model.pending_micro_batches == 0
    model.train_on_batch(*good)
    case.model.train_on_batch(*good)
    cases.assert_same_weights(model, case.model, start, 1e-9)


# ---- the graph -------------------------------------------------------------------------------


def nodes(model):
    """The number of nodes of the traced training function, with all functions inside."""
    (*_, concrete) = model.train_tf_function._list_all_concrete_functions()
    graph = concrete.graph.as_graph_def()
    return sum(map(len, [graph.node, *(each.node_def for each in graph.library.function)]))


def trained(arguments, rows=(12,), **compile_arguments):
    case = compiled("dense", metrics=["mae"], **compile_arguments)
    model = ga.make_accumulating(case.model, **arguments)
    model.fit(batches_of(case, list(rows))(), verbose=0)
    return model


@pytest.mark.long
def test_the_graph_does_not_grow():
    """Not with the slices of a batch, and not with the batches of a window."""
    by_slices = {nodes(trained({"micro_batch_size": m}, rows=[7, 12])) for m in (1, 3, 6)}
    by_steps = {nodes(trained({"accum_steps": k}, rows=[7, 12])) for k in (2, 8, 64)}
    assert (len(by_slices), len(by_steps)) == (1, 1)


@pytest.mark.parametrize("arguments", [{"micro_batch_size": 3}, {"accum_steps": 3}], ids=str)
def test_all_batch_sizes_are_one_trace(arguments):
    """No more traces than plain fit has."""
    case = compiled("dense")
    data = batches_of(case, [12, 7, 1, 9, 2])
    model = ga.make_accumulating(case.model, **arguments)
    for each in (model, case.model):
        each.fit(data(), epochs=2, verbose=0)
    counts = [
        each.train_tf_function.experimental_get_tracing_count() for each in (model, case.model)
    ]
    assert counts[0] <= counts[1]


@pytest.mark.parametrize("arguments", [{"micro_batch_size": 3}, {"accum_steps": 3}], ids=str)
def test_a_first_step_is_traced_once(arguments):
    """Though it makes the variables of optimizer, metrics and windows, which has tf.function
    trace a plain step twice."""
    traces = []

    class Traced(layers.Dense):
        def call(self, inputs):
            traces.append(inputs)
            return super().call(inputs)

    model = tf_keras.Sequential([layers.Input([3]), Traced(1)])
    model.compile("adam", "mse", metrics=["mae"])
    model = ga.make_accumulating(model, inplace=True, **arguments)
    traces.clear()
    model.fit(np.zeros([6, 3]), np.zeros([6, 1]), batch_size=6, epochs=2, verbose=0)
    assert len(traces) == 1


def test_an_update_is_one_op_on_micro_steps():
    """What an optimizer does stands in a function of its own, which a micro-step does not run."""
    model = trained({"accum_steps": 3}, rows=[4, 4, 4, 4])
    (*_, concrete) = model.train_tf_function._list_all_concrete_functions()
    conditionals = [op for op in concrete.graph.get_operations() if op.type == "If"]
    ends = [op for op in conditionals if not op.get_attr("_lower_using_switch_merge")]
    assert len(ends) == 1
    # The optimizer's count moves there and nowhere else.
    count = model.optimizer.iterations.handle
    taken = [op for op in concrete.graph.get_operations() if op.type.startswith("AssignAdd")]
    captured = {id(inner): outer for outer, inner in concrete.graph.captures}
    assert not any(captured.get(id(op.inputs[0])) is count for op in taken)


def test_slices_are_cut_on_the_host():
    """So that slices, not batches, are what a device is given."""
    model = trained({"micro_batch_size": 3}, rows=[7, 12])
    (*_, concrete) = model.train_tf_function._list_all_concrete_functions()
    library = concrete.graph.as_graph_def().library.function
    cuts = [node for each in library for node in each.node_def if node.op == "Slice"]
    assert len(cuts) == 3  # inputs, targets, sample weights
    assert all("CPU:0" in node.device for node in cuts)


@pytest.mark.parametrize("arguments", [{"micro_batch_size": 2}, {"accum_steps": 2}], ids=str)
@pytest.mark.parametrize("kind", ["new", "legacy"])
def test_slices_reach_the_optimizer(arguments, kind):
    """Gradients of an embedding arrive as slices, however many micro-batches they are of."""
    seen = []
    base = {"new": cases.optimizers.SGD, "legacy": cases.legacy.SGD}[kind]

    class Seeing(base):
        def apply_gradients(self, grads_and_vars, **kwargs):
            pairs = list(grads_and_vars)
            seen.append({variable.name: type(gradient) for gradient, variable in pairs})
            return super().apply_gradients(pairs, **kwargs)

    case = cases.words()
    case.model.compile(Seeing(0.1), **case.compile)
    model = ga.make_accumulating(case.model, inplace=True, **arguments)
    model.fit(batches_of(case, [4, 4])(), verbose=0)
    assert seen
    assert all(types["embedding/embeddings:0"] is tf.IndexedSlices for types in seen)


@pytest.mark.long
@pytest.mark.parametrize("arguments", [{"micro_batch_size": 4}, {"accum_steps": 4}], ids=str)
def test_nothing_grows(arguments):
    """5,000 steps: no new trace, and after the first 200 no more memory."""
    case = compiled("words")
    model = ga.make_accumulating(case.model, **arguments)
    (batches,) = cases.make_batches(case, [[8, 7, 6, 5]])
    data = cases.dataset(batches).cache().repeat()

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

    model.fit(data, steps_per_epoch=200, verbose=0)
    traces, before = model.train_tf_function.experimental_get_tracing_count(), resident()
    model.fit(data, steps_per_epoch=4800, verbose=0)
    assert model.train_tf_function.experimental_get_tracing_count() == traces
    assert resident() - before < 32


# ---- files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["model.keras", "model.h5", "model"])
def test_a_saved_model_goes_on(tmp_path, file):
    """Split models are saved and loaded; with accum_steps, in the middle of a window."""
    case = compiled("conv")
    arguments = {"micro_batch_size": 2} if file == "model.h5" else {"accum_steps": 3}
    model = ga.make_accumulating(case.model, **{"micro_batch_size": 2, **arguments})
    (batches,) = cases.make_batches(case, [[5, 4, 6, 3]])
    for batch in batches[:2]:
        model.train_on_batch(*batch)
    model.save(tmp_path / file)
    loaded = tf_keras.models.load_model(tmp_path / file)
    assert loaded.transforms == model.transforms
    assert loaded.pending_micro_batches == model.pending_micro_batches
    for each in (model, loaded):
        for batch in batches[2:]:
            each.train_on_batch(*batch)
    assert int(loaded.optimizer.iterations) == int(model.optimizer.iterations)
    for ours, theirs in zip(loaded.get_weights(), model.get_weights()):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
