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
    """By their names; of two of a kind, with their places."""
    clips = [ga.ClipByValue(0.3), ga.ClipByNorm(1.0), ga.ClipByNorm(0.5)]
    model = ga.make_accumulating(build(), transforms=[ga.Accumulate(STEPS), *clips])
    shares = {name: value for name, value in logged(model, batches()).items() if "share" in name}
    assert shares.keys() == {
        "clipped_share_ClipByValue", "clipped_share_ClipByNorm_1", "clipped_share_ClipByNorm_2"
    }  # fmt: skip
    assert shares["clipped_share_ClipByNorm_2"] >= shares["clipped_share_ClipByNorm_1"]


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
    """Two optimizers, one a layer, of which the second has ten times the gradient."""

    def __init__(self):
        super().__init__()
        self.parts = [own_models.dense(1), own_models.dense(1)]
        self.optimizers = [tf_keras.optimizers.SGD(0.0), tf_keras.optimizers.SGD(0.0)]

    def train_step(self, data):
        x, y = data
        for part, optimizer, scale in zip(self.parts, self.optimizers, (1.0, 10.0)):
            with tf.GradientTape() as tape:
                loss = scale * tf.reduce_mean((part(x) - y) ** 2)
            variables = part.trainable_variables
            optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables))
        return {"loss": loss}


def test_several_optimizers_have_logs_of_their_own(float64):
    """The second's end in `_1`."""
    model = Two()
    model.compile()
    ga.make_accumulating(model, 2, inplace=True)
    for part in model.parts:
        part.build([None, 4])
    model.parts[1].set_weights(model.parts[0].get_weights())
    history = logged(model, [(x, y[:, :1]) for x, y in batches([2, 2, 2])])
    assert history["updates"] == history["updates_1"] == [2]
    ratio = history["gradient_norm_1"][0] / history["gradient_norm"][0]
    np.testing.assert_allclose(ratio, 10.0)


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


def test_figures_of_something_else_are_refused():
    """On one line."""
    with pytest.raises(ValueError, match=r"^plot_log\.log must hold .*; got loss\. Pass Acc"):
        ga.plot_log({"loss": [1.0]})
    with pytest.raises(TypeError, match=r"^plot_log\.log must be what fit returned"):
        ga.plot_log(3)
