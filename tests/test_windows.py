"""When updates happen: counting, remainders, sources of data, callbacks, interruptions."""

import cases
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from tf_keras import layers

import ga_transform as ga


def plain(optimizer="sgd", **compile_arguments):
    model = tf_keras.Sequential([tf_keras.Input([3]), layers.Dense(2, "tanh"), layers.Dense(1)])
    model.compile(optimizer, "mse", **compile_arguments)
    return model


def converted(steps=4, optimizer="sgd", remainder="flush", **compile_arguments):
    model = plain(optimizer, **compile_arguments)
    return ga.make_accumulating(model, steps, remainder=remainder)


def rows(count, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=[count, 3]), rng.normal(size=[count, 1])


def updates(model):
    return int(model.optimizer.iterations)


# ---- counting ------------------------------------------------------------------------------


def test_every_way_to_train_counts_alike():
    """`fit`, `train_on_batch` and a loop of one's own fill the same window."""
    model = converted(4, remainder="carry")
    x, y = rows(2)
    model.train_on_batch(x, y)
    model.fit(x, y, batch_size=1, verbose=0)
    assert (model.pending_micro_batches, updates(model)) == (3, 0)

    @tf.function
    def step(data):
        return model.train_step(data)

    step((tf.constant(x), tf.constant(y)))
    assert (model.pending_micro_batches, updates(model)) == (0, 1)


def test_weights_rest_within_a_window():
    """Between updates the weights are as they were, to the bit."""
    model = converted(3, "adam")
    before = model.get_weights()
    for _ in range(2):
        model.train_on_batch(*rows(2))
        tf.nest.map_structure(np.testing.assert_array_equal, before, model.get_weights())
    model.train_on_batch(*rows(2))
    assert any(np.any(a != b) for a, b in zip(before, model.get_weights()))


def test_a_schedule_of_steps_counts_updates():
    """`{update: steps}` takes effect at that update, and resumes where iterations stand."""
    model = converted({0: 1, 2: 3, 3: 2})
    seen = []
    for _ in range(9):
        model.train_on_batch(*rows(2))
        seen.append(updates(model))
    assert seen == [1, 2, 2, 2, 3, 3, 4, 4, 5]
    again = ga.make_accumulating(ga.strip_accumulating(model), {0: 1, 5: 2})
    again.train_on_batch(*rows(2))
    assert (again.pending_micro_batches, updates(again)) == (1, 5)


def test_a_schedule_of_steps_is_exact(float64):
    """Windows of one and of more, in one run, equal the large batches."""
    case = cases.dense()
    case.model.compile(cases.OPTIMIZERS["adam"](), "mse")
    start = cases.weights_of(case.model)
    copy = ga.make_accumulating(case.model, {0: 1, 1: 2, 2: 3})
    windows = cases.make_batches(case, [[4], [3, 5], [1, 2, 3], [4, 4, 1]])
    for window in windows:
        for batch in window:
            copy.train_on_batch(*batch)
        case.model.train_on_batch(*cases.concatenate(window))
    cases.assert_same_weights(copy, case.model, start, 1e-9)


def test_a_hundred_steps_are_traced_once():
    """`fit` traces the training function once, whatever part of a window a step is."""
    traces = []

    class Counted(layers.Layer):
        def call(self, inputs):
            traces.append(1)
            return inputs

    model = tf_keras.Sequential([tf_keras.Input([3]), Counted(), layers.Dense(1)])
    model.compile("adam", "mse")
    model = ga.make_accumulating(model, accum_steps=8)
    x, y = rows(200)
    model.train_on_batch(x[:2], y[:2])
    traces.clear()
    model.fit(x, y, batch_size=2, verbose=0)
    model.fit(x, y, batch_size=2, verbose=0)
    assert len(traces) == 0
    assert updates(model) == 13 + 13


# ---- the end of an epoch -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("remainder", "expected"), [("flush", (0, 6)), ("carry", (2, 5)), ("drop", (0, 4))]
)
def test_remainders(remainder, expected):
    """Of 11 batches in two epochs at 4 a window, a partial window is applied, kept or dropped."""
    model = converted(4, remainder=remainder)
    x, y = rows(11)
    model.fit(x, y, batch_size=1, epochs=2, verbose=0)
    assert (model.pending_micro_batches, updates(model)) == expected


def test_validation_and_callbacks_see_the_flushed_weights(float64):
    """A partial window is applied before validation, and before any callback sees the weights."""
    model = plain()
    copy = ga.make_accumulating(model, 4)
    x, y = rows(6)
    seen = []
    look = tf_keras.callbacks.LambdaCallback(
        on_test_begin=lambda logs: seen.append(updates(copy)),
        on_epoch_end=lambda epoch, logs: seen.append(updates(copy)),
    )
    ours = copy.fit(
        x, y, batch_size=1, validation_data=(x, y), shuffle=False, verbose=0, callbacks=[look]
    )
    assert seen == [2, 2]
    for part in (slice(0, 4), slice(4, 6)):
        model.train_on_batch(x[part], y[part])
    np.testing.assert_allclose(
        ours.history["val_loss"][0], model.evaluate(x, y, verbose=0), rtol=1e-9
    )


def test_evaluating_within_an_epoch_settles_nothing():
    """A callback that evaluates in the middle of an epoch leaves the window as it is."""
    model = converted(4)
    x, y = rows(8)
    pending = []

    def evaluate(batch, logs):
        model.evaluate(x, y, verbose=0)
        pending.append(model.pending_micro_batches)

    model.fit(x, y, batch_size=1, verbose=0,
              callbacks=[tf_keras.callbacks.LambdaCallback(on_train_batch_end=evaluate)])  # fmt: skip
    assert pending == [1, 2, 3, 0, 1, 2, 3, 0]


def test_a_callback_list_is_handed_back_as_it_was():
    """A `CallbackList` of the user's works, and is not changed by it."""
    model = converted(4)
    x, y = rows(6)
    given = tf_keras.callbacks.CallbackList([tf_keras.callbacks.History()], model=model)
    before = list(given.callbacks)
    model.fit(x, y, batch_size=1, verbose=0, callbacks=given)
    assert updates(model) == 2
    assert given.callbacks == before


def test_flush_and_discard_by_hand(float64):
    """`flush` applies what is pending with its own weights; `discard` forgets it."""
    model = plain()
    copy = ga.make_accumulating(model, 4)
    start = cases.weights_of(model)
    x, y = rows(7)
    copy.train_on_batch(x, y)
    assert copy.discard() == 1
    assert copy.flush() == 0
    copy.train_on_batch(x[:5], y[:5])
    copy.train_on_batch(x[5:], y[5:])
    assert copy.flush() == 2
    model.train_on_batch(x, y)
    cases.assert_same_weights(copy, model, start, 1e-9)
    assert (copy.pending_micro_batches, updates(copy)) == (0, 1)


# ---- sources of data -----------------------------------------------------------------------


class Batches(tf_keras.utils.Sequence):
    def __len__(self):
        return 6

    def __getitem__(self, position):
        return rows(2, position)


def generator():
    for position in range(6):
        yield rows(2, position)


def pipeline():
    return tf.data.Dataset.from_generator(
        generator, output_signature=(tf.TensorSpec([None, 3]), tf.TensorSpec([None, 1]))
    )


SOURCES = {
    "arrays": lambda: {"x": rows(12)[0], "y": rows(12)[1], "batch_size": 2},
    "known length": lambda: {"x": pipeline().apply(tf.data.experimental.assert_cardinality(6))},
    "unknown length": lambda: {"x": pipeline()},
    "generator": lambda: {"x": generator()},
    "Sequence": lambda: {"x": Batches()},
    "endless": lambda: {"x": pipeline().repeat(), "steps_per_epoch": 6},
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("steps_per_execution", [1, 4, 5])
def test_sources_of_data(source, steps_per_execution):
    """Six batches at four a window make two updates, wherever the batches come from."""
    model = converted(4, steps_per_execution=steps_per_execution)
    arguments = SOURCES[source]()
    if steps_per_execution > 1 and source in ("unknown length", "generator"):
        arguments["steps_per_epoch"] = 6  # tf_keras asks for it
    model.fit(**arguments, verbose=0)
    assert (model.pending_micro_batches, updates(model)) == (0, 2)


@pytest.mark.parametrize("steps", [1, 4, 7])
def test_unknown_length_counts_right_over_epochs(float64, steps):
    """Where a pipeline runs out in the middle of a call, nothing is counted too many."""
    model = plain("adam")
    copies = [ga.make_accumulating(model, steps) for _ in range(2)]
    for copy, source in zip(copies, ("unknown length", "known length")):
        for _ in range(2):
            copy.fit(**SOURCES[source](), verbose=0)
        assert (copy.pending_micro_batches, updates(copy)) == (0, 2 * -(-6 // steps))
    tf.nest.map_structure(
        np.testing.assert_array_equal, copies[0].get_weights(), copies[1].get_weights()
    )
    carrying = converted(steps, remainder="carry")
    carrying.fit(pipeline(), verbose=0)
    assert carrying.pending_micro_batches == 6 % steps


def test_initial_epoch():
    """`initial_epoch` leaves out epochs, and nothing else."""
    model = converted(4)
    model.fit(Batches(), initial_epoch=3, epochs=5, verbose=0)
    assert updates(model) == 4


# ---- Keras's callbacks ---------------------------------------------------------------------


def test_callbacks_see_what_a_plain_model_shows(tmp_path, float64):
    """Each callback of Keras leaves the same traces as on the plain model and large batches."""
    x, y = rows(24)

    def run(model, batch_size, folder):
        callbacks = [
            tf_keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.9),
            tf_keras.callbacks.ReduceLROnPlateau("loss", patience=1, min_delta=10.0),
            tf_keras.callbacks.EarlyStopping(
                "loss", patience=4, min_delta=10.0, restore_best_weights=True
            ),
            tf_keras.callbacks.ModelCheckpoint(
                str(folder / "best.weights.h5"), save_weights_only=True
            ),
            tf_keras.callbacks.TensorBoard(str(folder / "board"), update_freq=1),
            tf_keras.callbacks.CSVLogger(str(folder / "log.csv")),
            tf_keras.callbacks.TerminateOnNaN(),
            tf_keras.callbacks.BackupAndRestore(str(folder / "backup")),
        ]
        history = model.fit(x, y, batch_size=batch_size, epochs=8, shuffle=False, verbose=0,
                            validation_data=(x, y), callbacks=callbacks)  # fmt: skip
        return history.history

    model = plain("adam")
    copy = ga.make_accumulating(model, 3)
    for folder in ("plain", "ours"):
        (tmp_path / folder).mkdir()
    theirs = run(model, 12, tmp_path / "plain")
    ours = run(copy, 4, tmp_path / "ours")
    assert list(ours) == list(theirs)
    for key in theirs:
        np.testing.assert_allclose(ours[key], theirs[key], rtol=1e-9, err_msg=key)
    assert {p.name for p in (tmp_path / "ours").iterdir()} == {
        p.name for p in (tmp_path / "plain").iterdir()
    }
    header = [(tmp_path / f / "log.csv").read_text().splitlines()[0] for f in ("plain", "ours")]
    assert header[0] == header[1]
    model.load_weights(tmp_path / "ours" / "best.weights.h5")


def test_backup_and_restore_goes_on_as_if_undisturbed(tmp_path, float64):
    """A training that dies between epochs and is started again ends with the same weights."""

    class Die(tf_keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise RuntimeError

    x, y = rows(10)
    options = {"batch_size": 2, "epochs": 4, "shuffle": False, "verbose": 0}
    source = plain("adam")
    undisturbed, dying, restarted = (ga.make_accumulating(source, 2) for _ in range(3))
    undisturbed.fit(x, y, **options)
    backup = tf_keras.callbacks.BackupAndRestore(str(tmp_path))
    with pytest.raises(RuntimeError):
        dying.fit(x, y, callbacks=[backup, Die()], **options)
    backup = tf_keras.callbacks.BackupAndRestore(str(tmp_path))
    restarted.fit(x, y, callbacks=[backup], **options)
    tf.nest.map_structure(
        np.testing.assert_array_equal, restarted.get_weights(), undisturbed.get_weights()
    )
    assert updates(restarted) == updates(undisturbed) == 4 * 3


def test_terminate_on_nan_stops():
    """A loss that is no number ends the training at its batch."""
    model = converted(4)
    x, y = rows(8)
    x[2] = np.nan
    stop = tf_keras.callbacks.TerminateOnNaN()
    model.fit(x, y, batch_size=1, epochs=3, shuffle=False, verbose=0, callbacks=[stop])
    assert model.stop_training
    assert int(model._train_counter) == 3


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interruption_leaves_a_model_that_goes_on(float64, error):
    """After Ctrl-C or an exception in an epoch, the window goes on where it was."""
    model = plain()
    copy = ga.make_accumulating(model, 4)
    start = cases.weights_of(model)
    x, y = rows(8)

    def interrupt(batch, logs):
        if batch == 2:
            raise error

    stop = tf_keras.callbacks.LambdaCallback(on_train_batch_end=interrupt)
    with pytest.raises(error):
        copy.fit(x, y, batch_size=1, shuffle=False, verbose=0, callbacks=[stop])
    assert copy.pending_micro_batches == 3
    copy.fit(x[3:], y[3:], batch_size=1, shuffle=False, verbose=0)
    for part in (slice(0, 4), slice(4, 8)):
        model.train_on_batch(x[part], y[part])
    cases.assert_same_weights(copy, model, start, 1e-9)


def test_compiling_again_starts_a_new_window():
    """What is pending when a model is compiled again is dropped, with a warning that says so."""
    model = converted(4)
    model.train_on_batch(*rows(2))
    with pytest.warns(UserWarning, match="discarded 1 pending micro-batches"):
        model.compile("adam", "mae")
    model.fit(*rows(8), batch_size=1, verbose=0)
    assert updates(model) == 2


def test_a_weight_without_a_gradient_is_left_out(float64):
    """A trainable weight without gradient reaches the optimizer as it does in plain tf_keras."""

    class Idle(layers.Layer):
        def build(self, shape):
            self.idle = self.add_weight("idle", [2], initializer="ones")

        def call(self, inputs):
            return inputs

    model = tf_keras.Sequential([tf_keras.Input([3]), Idle(), layers.Dense(1)])
    model.compile(tf_keras.optimizers.AdamW(0.1, weight_decay=0.5), "mse")
    start = cases.weights_of(model)
    copy = ga.make_accumulating(model, 2)
    x, y = rows(6)
    copy.fit(x, y, batch_size=2, shuffle=False, verbose=0)
    for part in (slice(0, 4), slice(4, 6)):
        model.train_on_batch(x[part], y[part])
    cases.assert_same_weights(copy, model, start, 1e-9)
    np.testing.assert_array_equal(copy.layers[0].idle, [1.0, 1.0])


def test_finite_checks_of_a_loss_scale_skip_a_window():
    """With a LossScaleOptimizer, a window with a gradient that is not finite changes no weight."""
    model = plain(tf_keras.mixed_precision.LossScaleOptimizer(tf_keras.optimizers.SGD(0.1)))
    model = ga.make_accumulating(model, 2)
    before = model.get_weights()
    x, y = rows(4)
    model.train_on_batch(x[:2], y[:2])
    model.train_on_batch(np.full([2, 3], np.inf), y[2:])
    tf.nest.map_structure(np.testing.assert_array_equal, before, model.get_weights())
    model.fit(x, y, batch_size=2, verbose=0)
    assert np.all(np.isfinite(np.concatenate([w.ravel() for w in model.get_weights()])))
    assert any(np.any(a != b) for a, b in zip(before, model.get_weights()))


# ---- traces that differ --------------------------------------------------------------------


def two_heads():
    inputs = tf_keras.Input([3])
    heads = {name: layers.Dense(1, name=name)(inputs) for name in "ab"}
    model = tf_keras.Model(inputs, heads)
    model.compile("sgd", {"a": "mse", "b": "mse"})
    return model


def test_a_head_that_gets_its_first_gradient_later(float64):
    """Batches with targets for one head or the other share windows: each head gets its own."""
    model = ga.make_accumulating(two_heads(), 3)
    before = {v.name: v.numpy() for v in model.variables}
    x, y = rows(2)
    model.train_on_batch(x, {"a": y})
    with pytest.warns(ga.InexactWarning, match="some batches give no gradient to a/kernel:0"):
        model.train_on_batch(x, {"b": y})
    model.train_on_batch(x, {"a": y})
    assert updates(model) == 1
    moved = {v.name: v.numpy() - before[v.name] for v in model.variables}
    for name in "ab":
        kernel = before[f"{name}/kernel:0"]
        gradient = 2 * x.T @ (x @ kernel - y) / 2
        share = 2 / 3 if name == "a" else 1 / 3  # of the window's rows
        np.testing.assert_allclose(moved[f"{name}/kernel:0"], -0.01 * share * gradient, rtol=1e-9)
    model.train_on_batch(x, {"b": y})
    model.train_on_batch(x, {"b": y})
    before = {v.name: v.numpy() for v in model.variables}
    model.flush()
    np.testing.assert_array_equal(model.get_layer("a").kernel, before["a/kernel:0"])
    assert np.any(model.get_layer("b").kernel != before["b/kernel:0"])


def test_xla_switched_on_between_epochs():
    """`jit_compile` can be set after training with slices has begun."""
    case = cases.words()
    case.model.compile("adam", **case.compile)
    model = ga.make_accumulating(case.model, 2)
    batch = case.batch(np.random.default_rng(0), 4)
    for jit_compile in (False, True):
        model.jit_compile = jit_compile
        model.fit(*batch, batch_size=2, verbose=0)
    assert updates(model) == 2


def test_another_optimizer_starts_a_new_window():
    """What is pending for an optimizer that is replaced is dropped, and said so."""
    model = converted(4)
    model.train_on_batch(*rows(2))
    model.optimizer = tf_keras.optimizers.Adam()
    assert model.pending_micro_batches == 0
    with pytest.warns(UserWarning, match="discarded 1 pending micro-batches"):
        assert model.flush() == 0


# ---- models of the user's own class --------------------------------------------------------


class OwnFit(tf_keras.Model):
    def fit(self, *args, **kwargs):
        return super().fit(*args, **kwargs)


class FitWithoutCallbacks(tf_keras.Model):
    def fit(self, x, y):
        return super().fit(x, y, batch_size=1, verbose=0)


@pytest.mark.parametrize("model_class", [OwnFit, FitWithoutCallbacks])
def test_a_fit_of_ones_own_is_flushed(model_class):
    """Whatever its signature, a partial window is settled; a warning says where it is but once."""
    inputs = tf_keras.Input([3])
    model = model_class(inputs, layers.Dense(1)(inputs))
    model.compile("sgd", "mse")
    ga.make_accumulating(model, 4, inplace=True)
    if model_class is OwnFit:
        model.fit(*rows(6), batch_size=1, verbose=0)
    else:
        with pytest.warns(ga.InexactWarning, match="its fit does not call the callbacks"):
            model.fit(*rows(6))
    assert (model.pending_micro_batches, updates(model)) == (0, 2)


class TwoTurns(tf_keras.Model):
    """Applies its optimizer to one half of the variables, then to the other."""

    def train_step(self, data):
        x, y = data
        for part in (self.trainable_variables[:2], self.trainable_variables[2:]):
            with tf.GradientTape() as tape:
                loss = self.compute_loss(x, y, self(x, training=True))
            self.optimizer.apply_gradients(zip(tape.gradient(loss, part), part))
        return {"loss": loss}


def test_an_optimizer_that_is_called_twice_a_step(float64):
    """Each call of a step has a window of its own, so that each makes its updates."""

    def build():
        tf_keras.utils.set_random_seed(1)
        inputs = tf_keras.Input([3])
        model = TwoTurns(inputs, layers.Dense(1)(layers.Dense(4, "tanh")(inputs)))
        optimizer = tf_keras.optimizers.SGD(0.1)
        optimizer.build(model.trainable_variables)
        model.compile(optimizer, "mse")
        return model

    model, ours = build(), ga.make_accumulating(build(), 2, inplace=True)
    start = cases.weights_of(model)
    x, y = rows(8)
    ours.fit(x, y, batch_size=2, shuffle=False, verbose=0)
    x, y = tf.constant(x), tf.constant(y)
    # The second gradient of a window is taken before its first update, as in each micro-batch.
    assert (updates(ours), ours.pending_micro_batches) == (4, 0)
    first, second = model.trainable_variables[:2], model.trainable_variables[2:]
    for rows_ in (slice(0, 4), slice(4, 8)):
        middle = [slice(rows_.start, rows_.start + 2), slice(rows_.start + 2, rows_.stop)]
        with tf.GradientTape(persistent=True) as tape:
            loss = model.compute_loss(x[rows_], y[rows_], model(x[rows_]))
            head = model.compute_loss(x[middle[0]], y[middle[0]], model(x[middle[0]])) / 2
        gradients = tape.gradient(loss, first)
        gradients_of_head = tape.gradient(head, second)
        for variable, gradient in zip(first, gradients):
            variable.assign_sub(0.1 * gradient)
        with tf.GradientTape() as tape:
            rest = model.compute_loss(x[middle[1]], y[middle[1]], model(x[middle[1]])) / 2
        for variable, a, b in zip(second, gradients_of_head, tape.gradient(rest, second)):
            variable.assign_sub(0.1 * (a + b))
    cases.assert_same_weights(ours, model, start, 1e-9)


class Hidden(tf_keras.Model):
    """Keeps its optimizer where nobody finds it."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
        gradients = tape.gradient(loss, self.trainable_variables)
        HIDDEN[0].apply_gradients(zip(gradients, self.trainable_variables))
        return {"loss": loss}


HIDDEN = []


def test_a_step_that_hands_over_nothing_is_named():
    """Where no optimizer of the model is handed gradients, a warning says so."""
    HIDDEN[:] = [tf_keras.optimizers.SGD()]
    inputs = tf_keras.Input([3])
    model = Hidden(inputs, layers.Dense(1)(inputs))
    model.compile("sgd", "mse")
    ga.make_accumulating(model, 4, inplace=True)
    with pytest.warns(
        ga.InexactWarning, match="handed no gradients to apply_gradients of an optimizer"
    ):
        model.train_on_batch(*rows(2))


def test_flush_within_a_function_is_refused():
    """`flush` is a call of Python's, and says so inside a `tf.function`."""
    model = converted(4)
    with pytest.raises(RuntimeError, match=r"^flush must be called outside a tf\.function; "):
        tf.function(model.flush, autograph=False)()
