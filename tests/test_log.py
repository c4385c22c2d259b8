"""AccumulationLog: what it logs is what NumPy finds, and nothing is computed without it."""

import csv
import math

import cases
import numpy as np
import own_models
import pytest
import tensorflow as tf
import tf_keras
from tf_keras import layers

import ga_transform as ga

#: By epoch, the rows of each micro-batch: two windows of three, and a partial one.
SIZES = [4, 2, 3, 5, 1, 2, 3, 4]
STEPS = 3


def build(optimizer=None):
    tf_keras.utils.set_random_seed(3)
    model = tf_keras.Sequential(
        [tf_keras.Input([4]), layers.Dense(5, "tanh", name="hidden"), layers.Dense(2, name="head")]
    )
    model.compile(optimizer or tf_keras.optimizers.SGD(0.0), "mse")  # gradients stay as they are
    return model


def batches(sizes=SIZES):
    rng = np.random.default_rng(0)
    return [(rng.normal(size=[n, 4]), 3 * rng.normal(size=[n, 2])) for n in sizes]


def gradients_of(model, window):
    """Of the mean over the rows of a window, by plain TensorFlow; by weight, in NumPy."""
    x, y = cases.concatenate(window)
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean((model(x) - y) ** 2)
    return [each.numpy() for each in tape.gradient(loss, model.trainable_variables)]


def windows_of(data, steps=STEPS):
    return [data[start : start + steps] for start in range(0, len(data), steps)]


def norm(gradients):
    return math.sqrt(sum(np.sum(each**2) for each in gradients))


def logged(model, data, log=None, **arguments):
    log = log or ga.AccumulationLog()
    return model.fit(cases.dataset(data), verbose=0, callbacks=[log], **arguments).history


def test_norms_and_counts_are_those_of_the_updates(float64):
    """The mean over an epoch's updates, the partial one included."""
    plain, data = build(), batches()
    history = logged(ga.make_accumulating(plain, STEPS), data, epochs=2)
    norms = [norm(gradients_of(plain, window)) for window in windows_of(data)]
    np.testing.assert_allclose(history["gradient_norm"], [np.mean(norms)] * 2, rtol=1e-9)
    assert history["updates"] == [3, 3]
    assert history["partial_windows"] == [1, 1]
    np.testing.assert_allclose(history["micro_batches_per_update"], [8 / 3] * 2)
    assert history["skipped_windows"] == history["skipped_micro_batches"] == [0, 0]
    assert not [name for name in history if "clipped" in name]


@pytest.mark.parametrize(
    ("arguments", "per_update"),
    [({"micro_batch_size": 2}, 2.5), ({"accum_steps": 2, "micro_batch_size": 2}, 5.0), ({"agc": True}, 1.0)],
    ids=["split", "both", "neither"],
)  # fmt: skip
def test_slices_are_micro_batches(float64, arguments, per_update):
    """Whatever a window is made of, it is counted, and its norm is that of its rows."""
    plain, data = build(), batches([4, 6, 5, 3])
    history = logged(ga.make_accumulating(plain, **arguments), data)
    windows = windows_of(data, arguments.get("accum_steps", 1))
    norms = [norm(gradients_of(plain, window)) for window in windows]
    np.testing.assert_allclose(history["gradient_norm"], [np.mean(norms)], rtol=1e-9)
    assert history["micro_batches_per_update"] == [per_update]


def agc_share(gradients, weights, factor=1.0):
    """The share of units above their limit; the head's kernel has none."""
    found = []
    for gradient, weight, axes in zip(gradients, weights, (0, None, "head", None)):
        if axes != "head":
            limit = factor * np.maximum(np.linalg.norm(weight, axis=axes), 1e-3)
            found.append(np.atleast_1d(np.linalg.norm(gradient, axis=axes) > limit))
    return np.concatenate(found).mean()


SHARES = {
    "agc": (ga.ClipByAGC(1.0), agc_share),
    "global norm": (ga.ClipByGlobalNorm(3.0), lambda g, w: norm(g) > 3.0),
    "norm": (
        ga.ClipByNorm(1.0),
        lambda g, w: np.mean([np.linalg.norm(each) > 1.0 for each in map(np.ravel, g)]),
    ),
    "value": (
        ga.ClipByValue(0.3),
        lambda g, w: np.mean(np.abs(np.concatenate([each.ravel() for each in g])) > 0.3),
    ),
}


@pytest.mark.parametrize("clip", SHARES)
def test_the_share_of_clipped_units(float64, clip):
    """Of the units that a clip acts on, those that are above its limit."""
    spec, share = SHARES[clip]
    plain, data = build(), batches()
    model = ga.make_accumulating(plain, transforms=[ga.Accumulate(STEPS), spec])
    history = logged(model, data)
    weights = [each.numpy() for each in plain.trainable_variables]
    gradients = [gradients_of(plain, window) for window in windows_of(data)]
    shares = [share(each, weights) for each in gradients]
    assert 0 < np.mean(shares) < 1
    np.testing.assert_allclose(history["clipped_share"], [np.mean(shares)])
    norms = [norm(each) for each in gradients]
    np.testing.assert_allclose(history["gradient_norm"], [np.mean(norms)], rtol=1e-9)
    assert history["clipped_gradient_norm"][0] < np.mean(norms)
    if clip == "global norm":
        clipped = np.minimum(norms, 3.0).mean()
        np.testing.assert_allclose(history["clipped_gradient_norm"], [clipped], rtol=1e-9)


def test_several_clips_have_a_share_each():
    """By their names; of two of a kind, with their stages of the update, counted from one."""
    clips = [ga.ClipByValue(0.3), ga.ClipByNorm(1.0), ga.ClipByNorm(0.5)]
    model = ga.make_accumulating(build(), transforms=[ga.Accumulate(STEPS), *clips])
    shares = {name: value for name, value in logged(model, batches()).items() if "share" in name}
    assert shares.keys() == {
        "clipped_share_ClipByValue",
        "clipped_share_stage_2_ClipByNorm",
        "clipped_share_stage_3_ClipByNorm",
    }
    first, second = (shares[f"clipped_share_stage_{stage}_ClipByNorm"] for stage in (2, 3))
    assert second >= first


def test_slices_of_embeddings(float64):
    """Rows that occur twice are added up before a norm is taken, as in the large batch."""
    case = cases.words()
    case.model.compile(tf_keras.optimizers.SGD(0.0), **case.compile)
    (window,) = cases.make_batches(case, [[4, 4]])
    chain = [ga.Accumulate(2), ga.ClipByAGC(1e-9, exclude_head=False)]
    history = logged(ga.make_accumulating(case.model, transforms=chain), window)
    x, y = cases.concatenate(window)
    with tf.GradientTape() as tape:
        loss = case.model.compiled_loss(tf.constant(y), case.model(x))
    gradients = [
        tf.convert_to_tensor(each).numpy()
        for each in tape.gradient(loss, case.model.trainable_variables)
    ]
    np.testing.assert_allclose(history["gradient_norm"], [norm(gradients)], rtol=1e-9)
    assert history["clipped_share"] == [1.0]


def test_windows_that_are_skipped_are_no_updates():
    """Their norms, which are not finite, are in no mean."""
    data = batches([2, 2, 2, 2])
    data[1][0][:] = np.inf
    history = logged(ga.make_accumulating(build(), 2), data)
    assert (history["updates"], history["skipped_windows"]) == ([1], [1])
    assert np.isfinite(history["gradient_norm"][0])
    history = logged(ga.make_accumulating(build(), 2), data[:2])
    assert (history["updates"], history["skipped_windows"]) == ([0], [1])
    assert np.isnan(history["gradient_norm"][0])


class Two(tf_keras.Model):
    """Two optimizers, one a layer, of which the second has ten times the gradient.

    As in many a GAN, there is a third, which `compile` makes if it is given none, and which rests.
    """

    #: The layers that are trained.
    trained = (0, 1)

    def __init__(self):
        super().__init__()
        self.parts = [own_models.dense(1), own_models.dense(1)]

    def compile(self):
        super().compile()
        self.optimizers = [tf_keras.optimizers.SGD(0.0), tf_keras.optimizers.SGD(0.0)]

    def train_step(self, data):
        x, y = data
        for place in self.trained:
            part, scale = self.parts[place], (1.0, 10.0)[place]
            with tf.GradientTape() as tape:
                loss = scale * tf.reduce_mean((part(x) - y) ** 2)
            variables = part.trainable_variables
            self.optimizers[place].apply_gradients(zip(tape.gradient(loss, variables), variables))
        return {"loss": loss}


def build_two(kind=Two):
    model = kind()
    model.compile()
    for part in model.parts:
        part.build([None, 4])
    model.parts[1].set_weights(model.parts[0].get_weights())
    return ga.make_accumulating(model, 2, inplace=True)


def batches_of_one_output(sizes):
    return [(x, y[:, :1]) for x, y in batches(sizes)]


def test_several_optimizers_have_logs_of_their_own(float64, tmp_path):
    """The second's end in `_1`; one that is handed nothing has none. Rows count as they do."""
    log = ga.AccumulationLog(csv=tmp_path / "log.csv")
    history = logged(build_two(), batches_of_one_output([2, 2, 2, 2]), log)
    assert history["updates"] == history["updates_1"] == [2]
    assert "updates_2" not in history
    ratio = history["gradient_norm_1"][0] / history["gradient_norm"][0]
    np.testing.assert_allclose(ratio, 10.0)
    assert [row["update"] for row in rows_of(tmp_path / "log.csv")] == ["1", "2"]


def test_an_optimizer_that_begins_later(float64, tmp_path):
    """Its names come after those of others, in columns that the table gets with its first row."""
    model = build_two()

    def begin(epoch, logs):
        model.trained = [(1,), (0, 1)][epoch]
        model.train_function = None
        model.make_train_function()

    later = tf_keras.callbacks.LambdaCallback(on_epoch_begin=begin)
    path = tmp_path / "log.csv"
    callbacks = [later, ga.AccumulationLog(csv=path)]
    data = cases.dataset(batches_of_one_output([2, 2]))
    history = model.fit(data, epochs=2, verbose=0, callbacks=callbacks).history
    first, second = rows_of(path)
    assert first["gradient_norm"] == second["gradient_norm"]
    assert (first["gradient_norm_1"], first["updates"]) == ("", "1")
    np.testing.assert_allclose(float(second["gradient_norm_1"]), history["gradient_norm"][0] / 10)
    for source, places in ((path, [1, 2]), (history, [2])):
        later_line = ga.plot_log(source).axes[0].get_lines()[1]
        assert list(later_line.get_xdata()) == places


class Turns(Two):
    """One optimizer for both layers, which a step calls twice."""

    def compile(self):
        super().compile()
        self.optimizers = [tf_keras.optimizers.legacy.SGD(0.0)] * 2


def test_calls_of_one_optimizer_have_logs_of_their_own(float64, tmp_path):
    """A step's second call of it has a window of its own, which its trace makes."""
    log = ga.AccumulationLog(csv=tmp_path / "log.csv")
    logged(build_two(Turns), batches_of_one_output([2, 2, 2, 2]), log)
    rows = rows_of(tmp_path / "log.csv")
    assert [(row["update"], row["updates"], row["updates_1"]) for row in rows] == [
        ("2", "1", "1"),
        ("4", "1", "1"),
    ]


class Traced(Two):
    """A step that is a function of TensorFlow, with traces of its own."""

    train_step = tf.function(Two.train_step)


def test_a_step_that_was_traced_before(float64):
    """It is traced again, to be measured."""
    model, data = build_two(Traced), batches_of_one_output([2, 2])
    model.fit(cases.dataset(data), verbose=0)
    history = logged(model, data)
    assert history["updates"] == history["updates_1"] == [1]


# ---- rows ----------------------------------------------------------------------------------------


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("every", [1, 2])
def test_rows_of_a_table(float64, tmp_path, every):
    """One for so many updates, the end of an epoch with what is left; their means are the epoch's."""
    plain, data = build(), batches()
    path = tmp_path / "log.csv"
    log = ga.AccumulationLog(csv=path, every=every)
    history = logged(ga.make_accumulating(plain, STEPS), data, log, epochs=2)
    rows = rows_of(path)
    norms = [norm(gradients_of(plain, window)) for window in windows_of(data)]
    expected = norms if every == 1 else [np.mean(norms[:2]), norms[2]]
    found = [float(row["gradient_norm"]) for row in rows]
    np.testing.assert_allclose(found, expected * 2, rtol=1e-9)
    updates = [1, 2, 3, 4, 5, 6] if every == 1 else [2, 3, 5, 6]
    assert [int(row["update"]) for row in rows] == updates
    assert [row["epoch"] for row in rows] == ["0"] * (len(rows) // 2) + ["1"] * (len(rows) // 2)
    assert [int(row["partial_windows"]) for row in rows][-1] == 1
    assert history["updates"] == [3, 3]


def test_a_run_that_is_resumed_goes_on_with_its_table(tmp_path):
    """As `append` asks: the table is that of a run without a break, but for a line cut off."""
    data = batches()
    data[1][0][:] = np.inf

    def train(path, stops_at=None):
        def begin(epoch, logs):
            if epoch == stops_at:
                raise KeyboardInterrupt

        callbacks = [
            ga.AccumulationLog(csv=path, append=True),
            tf_keras.callbacks.BackupAndRestore(str(path.with_suffix(""))),
            tf_keras.callbacks.LambdaCallback(on_epoch_begin=begin),
        ]
        model = ga.make_accumulating(build(tf_keras.optimizers.SGD(0.1)), STEPS)
        model.fit(cases.dataset(data), epochs=2, verbose=0, callbacks=callbacks)

    whole, broken = tmp_path / "whole.csv", tmp_path / "broken.csv"
    train(whole)
    with pytest.raises(KeyboardInterrupt):
        train(broken, stops_at=1)
    with broken.open("a") as file:
        file.write("1,3")
    train(broken)
    rows = rows_of(broken)
    assert rows.pop(3)["updates"] is None
    assert rows == rows_of(whole)
    assert [row["skipped_windows"] for row in rows] == ["1", "0", "0"] * 2


def test_summaries_for_tensorboard(tmp_path):
    """The same numbers, at the count of updates."""
    log = ga.AccumulationLog(csv=tmp_path / "log.csv", tensorboard=tmp_path / "runs")
    logged(ga.make_accumulating(build(), STEPS, agc=0.05), batches(), log)
    (path,) = (tmp_path / "runs").iterdir()
    found = {}
    for record in tf.data.TFRecordDataset(str(path)):
        event = tf.compat.v1.Event.FromString(record.numpy())
        for value in event.summary.value:
            found[value.tag, event.step] = float(tf.make_ndarray(value.tensor))
    for row in rows_of(tmp_path / "log.csv"):
        for name in row.keys() - {"epoch", "update"}:
            expected = float(row[name])
            assert found[f"accumulation/{name}", int(row["update"])] == pytest.approx(expected)
    assert len(found) == 3 * 8


# ---- off -----------------------------------------------------------------------------------------


def operations(model):
    graph = model.train_function.get_concrete_function(iter(cases.dataset(batches()))).graph
    functions = [graph, *(each.graph for each in graph._functions.values())]
    return sum(len(each.get_operations()) for each in functions)


def test_nothing_is_computed_without_it():
    """The training function is what it was, before a fit with the log and after it."""
    model = ga.make_accumulating(build(), STEPS, agc=0.05)
    model.fit(cases.dataset(batches()), verbose=0)
    without = operations(model)
    counts = []
    count = tf_keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: counts.append(operations(model))
    )
    model.fit(cases.dataset(batches()), verbose=0, callbacks=[ga.AccumulationLog(), count])
    assert counts[0] > without
    model.fit(cases.dataset(batches()), verbose=0)
    assert operations(model) == without


def test_a_fit_that_breaks_off_leaves_nothing_on(tmp_path):
    """A later fit without the log is what it was; of a file that cannot be written, none begins."""
    model = ga.make_accumulating(build(), STEPS, agc=0.05)
    model.fit(cases.dataset(batches()), verbose=0)
    without = operations(model)
    log = ga.AccumulationLog(csv=tmp_path / "nowhere" / "log.csv")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        model.fit(cases.dataset(batches()), verbose=0, callbacks=[log])
    assert operations(model) == without

    def interrupt(batch, logs):
        raise KeyboardInterrupt

    stop = tf_keras.callbacks.LambdaCallback(on_train_batch_end=interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.fit(cases.dataset(batches()), verbose=0, callbacks=[ga.AccumulationLog(), stop])
    assert operations(model) > without
    model.fit(cases.dataset(batches()), verbose=0)
    assert operations(model) == without


def test_a_loop_of_ones_own():
    """Around `train_on_batch`: what the log changes in the model is nothing to warn of."""
    model = ga.make_accumulating(build(), 2)
    log = ga.AccumulationLog()
    callbacks = tf_keras.callbacks.CallbackList([log], add_history=True, model=model)
    callbacks.on_train_begin()
    callbacks.on_epoch_begin(0)
    for batch, (x, y) in enumerate(batches([2, 2, 2, 2])):
        callbacks.on_train_batch_begin(batch)
        model.train_on_batch(x, y)
        callbacks.on_train_batch_end(batch)
    callbacks.on_epoch_end(0)
    callbacks.on_train_end()
    assert model.history.history["updates"] == [2]
    assert ga.explain(model).is_exact


def test_it_changes_nothing():
    """Weights and other logs are those of a run without it, to the bit."""
    ends = []
    for callbacks in ([], [ga.AccumulationLog()]):
        model = ga.make_accumulating(build(tf_keras.optimizers.Adam(0.01)), STEPS, agc=0.05)
        fitted = model.fit(cases.dataset(batches()), epochs=2, verbose=0, callbacks=callbacks)
        ends.append((model.get_weights(), fitted.history["loss"]))
    for one, other in zip(*(weights for weights, _ in ends)):
        np.testing.assert_array_equal(one, other)
    assert ends[0][1] == ends[1][1]


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"every": 0}, ValueError, r"every must be an int >= 1; got 0\. The default is 1\."),
        ({"every": 1.5}, TypeError, r"every must be an int >= 1; got 1\.5 \(float\)\."),
        ({"csv": 3}, TypeError, r"csv must be a path; got 3 \(int\)\. None writes none\."),
        ({"csv": ""}, ValueError, r"csv must be a path; got ''\. None writes none\."),
        ({"append": 1}, TypeError, r"append must be True or False; got 1 \(int\)\. The default"),
    ],
)
def test_what_it_cannot_be_given(arguments, error, text):
    with pytest.raises(error, match=rf"^AccumulationLog\.{text}"):
        ga.AccumulationLog(**arguments)


def test_a_plain_model_has_no_log():
    """It is told before training begins."""
    with pytest.raises(TypeError, match=r"^AccumulationLog must be given to fit of a converted"):
        logged(build(), batches())


# ---- figures -------------------------------------------------------------------------------------


def test_a_figure_of_a_history_and_of_a_table(tmp_path):
    """A panel for each thing that was logged; the file is an image."""
    log = ga.AccumulationLog(csv=tmp_path / "log.csv")
    model = ga.make_accumulating(build(), STEPS, agc=0.05)
    fitted = model.fit(cases.dataset(batches()), epochs=2, verbose=0, callbacks=[log])
    titles = ["gradient norm", "share of units clipped", "micro-batches an update", "windows"]
    for source, points in ((fitted, 2), (fitted.history, 2), (tmp_path / "log.csv", 6)):
        figure = ga.plot_log(source, tmp_path / "log.png")
        assert [axes.get_title(loc="left") for axes in figure.axes] == titles
        line = figure.axes[0].get_lines()[0]
        assert len(line.get_ydata()) == points
        assert (tmp_path / "log.png").read_bytes().startswith(b"\x89PNG")


def test_a_figure_of_the_table_of_a_csv_logger(tmp_path):
    """By its epochs; what is no number is a gap, and a line that was cut off is left out."""
    path = tmp_path / "epochs.csv"
    path.write_text("epoch,gradient_norm,loss,val_loss\n0,3.0,1.0,NA\n1,NA,1.0,2.0\n2,2.0,1")
    (axes,) = ga.plot_log(path).axes
    (line,) = axes.get_lines()
    assert axes.get_xlabel() == "epoch"
    assert list(line.get_xdata()) == [0, 1]
    np.testing.assert_array_equal(line.get_ydata(), [3.0, np.nan])


def test_updates_between_gaps_are_seen():
    """However many there are, each has a marker; and no line hides another."""
    values = [math.nan, 1.0] * 50
    figure = ga.plot_log({"gradient_norm": values, "clipped_gradient_norm": values})
    lines = figure.axes[0].get_lines()
    assert {line.get_marker() for line in lines} == {"."}
    assert len({line.get_linestyle() for line in lines}) == 2


def test_figures_of_something_else_are_refused(tmp_path):
    """On one line."""
    with pytest.raises(ValueError, match=r"^plot_log\.log must hold .*; got loss\. Pass Acc"):
        ga.plot_log({"loss": [1.0]})
    for wrong in (3, {"gradient_norm": 3.0}):
        with pytest.raises(TypeError, match=r"^plot_log\.log must be what fit returned"):
            ga.plot_log(wrong)
    path = tmp_path / "something.bin"
    for content in (b"", b"epoch,update,gradient_norm\n", bytes(range(1, 256)) * 9):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"^plot_log\.log must hold .*; got .{,99}\. Pass Acc"):
            ga.plot_log(path)
