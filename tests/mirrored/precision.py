"""Sixteen bits and what is not finite, on replicas: one window, which all of them share."""

import cases
import feeding
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from tf_keras import layers

import ga_transform as ga

STEPS = 2


def make(optimizer=None, loss="mse"):
    model = tf_keras.Sequential(
        [tf_keras.Input([4]), layers.Dense(5, "tanh"), layers.Dense(2, kernel_regularizer="l2")]
    )
    model.compile(optimizer or tf_keras.optimizers.SGD(0.1), loss)
    return model


def batch(rng, rows):
    dtype = tf_keras.backend.floatx()
    return rng.normal(size=[rows, 4]).astype(dtype), rng.normal(size=[rows, 2]).astype(dtype)


def windows_of(strategy, shape="empty", steps=(STEPS, STEPS)):
    return feeding.make_windows(batch, feeding.rows_of(strategy, shape, steps=steps))


def poison(batch):
    batch[1][0, 0] = np.inf


def converted(strategy, like, *chain, make=make):
    model = feeding.mirrored(strategy, make, like)
    return feeding.convert(strategy, model, transforms=list(chain))


def scale_of(model):
    return float(model.optimizer.loss_scale.numpy())


# ---- sixteen bits ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "split"),
    [("mixed_float16", False), ("mixed_float16", True), ("mixed_bfloat16", True)],
)
def test_near_one_device(strategy, policy, split):
    """To what the rounding of rows, and of the loss, amounts to."""
    like = make()
    start = cases.weights_of(like)
    precision = ga.Precision(policy, initial_scale=2.0**10)
    chain = [precision, *([ga.Split(2)] if split else []), ga.Accumulate(STEPS)]
    model = converted(strategy, like, *chain)
    windows = windows_of(strategy, steps=(STEPS, STEPS, STEPS - 1))
    feeding.fit(strategy, model, windows, epochs=2)
    alone = ga.make_accumulating(like, transforms=[precision, ga.Accumulate(1)])
    feeding.fit_plain(alone, windows, epochs=2)
    tolerance = {"mixed_float16": 5e-3, "mixed_bfloat16": 4e-2}[policy]
    cases.assert_same_weights(model, alone, start, tolerance)
    assert feeding.updates(model) == feeding.updates(alone) == 6
    assert model.skipped_windows == 0
    feeding.assert_mirrored(model)


@pytest.mark.parametrize("chain", [[ga.Accumulate(STEPS)], []], ids=["windows", "none"])
@pytest.mark.parametrize("loss", ["mse", tf_keras.losses.MeanSquaredError(reduction="sum")])
def test_units_of_replicas(strategy, chain, loss):
    """Weights are relative to a replica's own first rows; a sum has none, and all rows count alike."""

    def small():
        return make(tf_keras.optimizers.SGD(0.01), loss)

    like = small()
    start = cases.weights_of(like)
    precision = ga.Precision("mixed_float16", initial_scale=2.0**8)
    model = converted(strategy, like, precision, *chain, make=small)
    windows = windows_of(strategy, "uneven")
    windows = windows if chain else feeding.single(windows)
    feeding.fit(strategy, model, windows)
    alone = ga.make_accumulating(like, transforms=[precision, ga.Accumulate(1)])
    feeding.fit_plain(alone, windows)
    cases.assert_same_weights(model, alone, start, 5e-3)


class Late(tf_keras.Model):
    """Its weights are made in its first step."""

    def __init__(self):
        super().__init__()
        seeds = iter(range(3))
        self.parts = [
            layers.Dense(width, kernel_initializer=tf_keras.initializers.GlorotUniform(next(seeds)))
            for width in (5, 4, 2)
        ]

    def call(self, inputs):
        for part in self.parts:
            inputs = part(inputs)
        return inputs


@pytest.mark.parametrize("eager", [False, True], ids=["graph", "eager"])
def test_layers_that_are_made_in_the_first_step(strategy, eager):
    """All replicas train the rewritten model, and none what it was before."""

    def make_late():
        model = Late()
        model.compile(tf_keras.optimizers.SGD(0.1), "mse", run_eagerly=eager)
        return model

    chain = {"transforms": [ga.Precision("mixed_bfloat16"), ga.Accumulate(STEPS)]}
    with strategy.scope():
        model = ga.make_accumulating(make_late(), **chain, inplace=True)
    alone = ga.make_accumulating(
        make_late(), transforms=[ga.Precision("mixed_bfloat16"), ga.Accumulate(1)], inplace=True
    )
    alone.build([None, 4])
    start = cases.weights_of(alone)
    windows = windows_of(strategy)
    feeding.fit(strategy, model, windows)
    feeding.fit_plain(alone, windows)
    assert [part.compute_dtype for part in model.parts] == ["bfloat16", "bfloat16", "float32"]
    cases.assert_same_weights(model, alone, start, 4e-2)
    feeding.assert_mirrored(model)


def test_small_gradients_do_not_vanish(strategy):
    """Weights of micro-batches keep their usual size, whatever the rows of other replicas."""
    policy = ga.Precision("mixed_float16", initial_scale=2.0**10)
    like = make(tf_keras.optimizers.SGD(1000.0))
    start = cases.weights_of(like)
    model = converted(
        strategy,
        like,
        policy,
        ga.Accumulate(STEPS),
        make=lambda: make(tf_keras.optimizers.SGD(1e3)),
    )
    windows = windows_of(strategy)
    for window in windows:
        for step in window:
            for x, y in step:
                x *= 1e-2
                y *= 1e-2
    alone = ga.make_accumulating(like, transforms=[policy, ga.Accumulate(1)])
    feeding.fit(strategy, model, windows[:1])
    feeding.fit_plain(alone, windows[:1])
    cases.assert_same_weights(model, alone, start, 2e-2)


@pytest.mark.parametrize("place", [0, -1], ids=["first", "last"])
def test_a_skipped_window_lowers_the_scale_once(strategy, place):
    """Though only one replica has found it; it is no update."""
    spec = ga.Precision("mixed_float16", initial_scale=64.0)
    model = converted(strategy, make(), spec, ga.Accumulate(STEPS))
    before = model.get_weights()
    windows = windows_of(strategy, "uneven", steps=(STEPS, STEPS))
    poison(windows[0][1][place])
    feeding.fit(strategy, model, windows[:1])
    assert (feeding.updates(model), model.skipped_windows, scale_of(model)) == (0, 1, 32.0)
    tf.nest.map_structure(np.testing.assert_array_equal, model.get_weights(), before)
    feeding.fit(strategy, model, windows[1:])
    assert (feeding.updates(model), model.skipped_windows, scale_of(model)) == (1, 1, 32.0)
    feeding.assert_mirrored(model)


def test_the_scale_grows(strategy):
    """With updates, as many as were asked for."""
    spec = ga.Precision("mixed_float16", initial_scale=64.0, growth_steps=2)
    model = converted(strategy, make(), spec, ga.Accumulate(STEPS))
    windows = windows_of(strategy, "uneven", steps=(STEPS, STEPS, STEPS))
    feeding.fit(strategy, model, windows)
    assert (feeding.updates(model), scale_of(model)) == (3, 128.0)


# ---- what is not finite ------------------------------------------------------------------------


@pytest.mark.parametrize(("split", "place"), [(False, -1), (True, 0)])
def test_a_window_is_skipped(strategy, float64, split, place):
    """If one replica has what is not finite, and in one of its batches."""
    like = make()
    start = cases.weights_of(like)
    model = converted(strategy, like, *([ga.Split(2)] if split else []), ga.Accumulate(STEPS))
    windows = windows_of(strategy, "uneven", steps=(STEPS, STEPS, STEPS - 1))
    poison(windows[1][0][place])
    feeding.fit(strategy, model, windows)
    kept = [windows[0], windows[2]]
    feeding.fit_plain(like, kept)
    cases.assert_same_weights(model, like, start, 1e-9)
    assert (feeding.updates(model), model.skipped_windows, model.skipped_micro_batches) == (2, 1, 0)
    feeding.assert_mirrored(model)


@pytest.mark.parametrize(("split", "loss"), [(False, "mean"), (True, "mean"), (False, "sum")])
def test_a_micro_batch_is_left_out(strategy, float64, split, loss):
    """That of one replica; the others' rows are all that the window has.

    One replica has nothing left of the second window, and none has of the third.
    """
    loss = "mse" if loss == "mean" else tf_keras.losses.MeanSquaredError(reduction="sum")

    def make_it():
        return make(loss=loss)

    like = make_it()
    start = cases.weights_of(like)
    accumulate = ga.Accumulate(STEPS, on_nonfinite="micro_batch")
    # Slices as large as the batches, so that as much is left out.
    chain = [*([ga.Split(8)] if split else []), accumulate]
    model = converted(strategy, like, *chain, make=make_it)
    windows = windows_of(strategy, "uneven", steps=(STEPS,) * 4)
    poisoned = [windows[0][1][0], *(step[-1] for step in windows[1])]
    poisoned += [batch for step in windows[2] for batch in step]
    for each in poisoned:
        poison(each)
    feeding.fit(strategy, model, windows)
    for window in windows:
        rest = [each for step in window for each in step if np.isfinite(each[1]).all()]
        if rest:
            like.train_on_batch(*cases.concatenate(rest))
    assert model.skipped_micro_batches == len(poisoned)
    assert (feeding.updates(model), model.skipped_windows) == (3, 1)
    cases.assert_same_weights(model, like, start, 1e-9)
    feeding.assert_mirrored(model)


def test_what_is_left_out_lowers_the_scale_once(strategy):
    """With the update, though several replicas have left something out."""
    spec = ga.Precision("mixed_float16", initial_scale=64.0)
    accumulate = ga.Accumulate(STEPS, on_nonfinite="micro_batch")
    model = converted(strategy, make(), spec, accumulate)
    windows = windows_of(strategy, "uneven", steps=(STEPS, STEPS))
    for place, step in enumerate(windows[0]):
        poison(step[place])
    feeding.fit(strategy, model, windows)
    assert (feeding.updates(model), model.skipped_windows, scale_of(model)) == (2, 0, 32.0)
    assert model.skipped_micro_batches == 2


def test_the_logs_say_what_was_skipped(strategy):
    """Once for all replicas."""
    model = converted(strategy, make(), ga.Accumulate(STEPS))
    windows = windows_of(strategy, "uneven")
    poison(windows[0][0][-1])
    logs = feeding.fit(strategy, model, windows, epochs=2, callbacks=[ga.AccumulationLog()])
    assert logs["skipped_windows"] == [1, 1]
