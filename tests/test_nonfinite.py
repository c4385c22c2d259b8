"""What is not finite: windows that are skipped, and micro-batches that are left out of them."""

import cases
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from tf_keras import layers

import ga_transform as ga

#: Row counts of the micro-batches of four windows, and which of them are poisoned.
SIZES = [[4, 2, 3], [1, 4, 4], [2, 2, 2], [3, 3, 1]]
POISONED = {(1, 1), (2, 0), (2, 1), (2, 2), (3, 0)}
POLICIES = [None, "mixed_float16", "mixed_bfloat16"]
WAYS = ["graph", "eager", pytest.param("jit", marks=pytest.mark.long)]


def model_of(optimizer=None, way="graph", loss="mse"):
    model = tf_keras.Sequential(
        [tf_keras.Input([4]), layers.Dense(5, "tanh"), layers.Dense(2, kernel_regularizer="l2")]
    )
    optimizer = optimizer or tf_keras.optimizers.Adam(0.02)
    how = {"graph": {}, "eager": {"run_eagerly": True}, "jit": {"jit_compile": True}}[way]
    model.compile(optimizer, loss, **how)
    return model


def windows(poisoned, dtype="float64"):
    """By window, micro-batches as (x, y, whether it is poisoned)."""
    rng = np.random.default_rng(0)
    made = []
    for window, sizes in enumerate(SIZES):
        batches = []
        for number, rows in enumerate(sizes):
            x, y = rng.normal(size=[rows, 4]).astype(dtype), rng.normal(size=[rows, 2])
            is_poisoned = (window, number) in poisoned
            if is_poisoned:
                y[0, 0] = np.nan if number else np.inf
            batches.append((x, y.astype(dtype), is_poisoned))
        made.append(batches)
    return made


def train(model, batches):
    for x, y, _ in batches:
        model.train_on_batch(x, y)


def put_together(batches):
    """What is left of a window, as one batch."""
    return cases.concatenate([batch[:2] for batch in batches])


# ---- skipped windows -----------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("split", [False, True], ids=["across", "split"])
def test_a_poisoned_window_is_skipped(float64, split, way):
    """Weights, slots and iterations are those of a plain training without these windows."""
    source = model_of(way=way)
    start = cases.weights_of(source)
    chain = [*([ga.Split(2)] if split else []), ga.Accumulate(3)]
    model = ga.make_accumulating(source, transforms=chain)
    for batches in windows(POISONED):
        train(model, batches)
        if not any(batch[2] for batch in batches):
            source.train_on_batch(*put_together(batches))
    assert (model.skipped_windows, model.skipped_micro_batches) == (3, 0)
    assert int(model.optimizer.iterations) == int(source.optimizer.iterations) == 1
    train(model, windows(set())[0])
    source.train_on_batch(*put_together(windows(set())[0]))
    cases.assert_same_weights(model, source, start, 1e-9)


@pytest.mark.parametrize("policy", POLICIES)
def test_windows_are_skipped_in_every_precision(policy):
    """The buffer is cleared, the scale of float16 halves, and the next window is as ever."""
    rewrite = [] if policy is None else [ga.Precision(policy, initial_scale=64.0)]
    model = ga.make_accumulating(model_of(), transforms=[*rewrite, ga.Accumulate(3)])
    seen = []
    for batches in windows(POISONED, "float32"):
        train(model, batches)
        scale = float(getattr(model.optimizer, "loss_scale", 0.0))
        seen.append((int(model.optimizer.iterations), model.skipped_windows, scale))
    scales = [64.0, 32.0, 16.0, 8.0] if policy == "mixed_float16" else [0.0] * 4
    assert seen == list(zip([1, 1, 1, 1], [0, 1, 2, 3], scales))
    assert all(np.isfinite(weight).all() for weight in model.get_weights())


def test_a_fixed_scale_does_not_move():
    """A window is skipped all the same; plain tf_keras would let it through."""
    spec = ga.Precision("mixed_float16", initial_scale=64.0, dynamic=False)
    model = ga.make_accumulating(model_of(), transforms=[spec, ga.Accumulate(3)])
    train(model, windows(POISONED, "float32")[1])
    assert (model.skipped_windows, float(model.optimizer.loss_scale)) == (1, 64.0)
    assert int(model.optimizer.iterations) == 0


def test_loss_scaling_alone_does_not_count_what_it_skips():
    """Without windows too, iterations count updates that were made."""
    spec = ga.Precision("mixed_float16", initial_scale=64.0)
    model = ga.make_accumulating(model_of(), precision=spec)
    train(model, windows(POISONED, "float32")[1])
    assert int(model.optimizer.iterations) == 2
    assert model.skipped_windows == 1
    assert float(model.optimizer.loss_scale) == 32.0


def test_a_poisoned_partial_window_is_skipped_by_flush():
    """A flush judges what it holds, as an update does."""
    model = ga.make_accumulating(model_of(), 3)
    before = model.get_weights()
    train(model, windows(POISONED, "float32")[1][:2])
    assert model.flush() == 2
    assert model.skipped_windows == 1
    for ours, theirs in zip(model.get_weights(), before):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("on_nonfinite", ["window", "micro_batch"])
@pytest.mark.parametrize("steps", [1, 2])
def test_a_clip_of_micro_batches_hides_nothing(on_nonfinite, steps):
    """What was infinite is so after a clip that makes it finite, and costs what it costs."""
    chain = [ga.ClipByValue(1.0), ga.Accumulate(steps, on_nonfinite=on_nonfinite)]
    model = ga.make_accumulating(model_of(), transforms=chain)
    before = model.get_weights()
    x, y = np.ones([2, 4], "float32"), np.ones([2, 2], "float32")
    for _ in range(steps):
        model.train_on_batch(x, 3e38 * y)
    assert model.skipped_windows == 1
    for ours, theirs in zip(model.get_weights(), before):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("on_nonfinite", ["window", "micro_batch"])
def test_slices_of_a_table_are_judged_too(on_nonfinite):
    """An infinite row of a sparse gradient costs what one of a dense gradient does."""
    model = tf_keras.Sequential(
        [tf_keras.Input([2], dtype="int32"), layers.Embedding(5, 3), layers.Flatten()]
    )
    model.compile("sgd", "mse")
    chain = [ga.Accumulate(2, on_nonfinite=on_nonfinite)]
    model = ga.make_accumulating(model, transforms=chain)
    before = model.get_weights()[0]
    x, y = np.array([[0, 1]], "int32"), np.ones([1, 6], "float32")
    model.train_on_batch(x, y)
    model.train_on_batch(x + 2, np.inf * y)
    moved = np.abs(model.get_weights()[0] - before).max(1) > 0
    assert moved.tolist() == [on_nonfinite == "micro_batch"] * 2 + [False] * 3


# ---- micro-batches that are left out -------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("split", [False, True], ids=["across", "split"])
@pytest.mark.parametrize("loss", ["mse", tf_keras.losses.MeanSquaredError(reduction="sum")])
def test_a_poisoned_micro_batch_is_left_out(float64, loss, split, way):
    """The window is the rest of it: weights are those of the large batch of what remains."""
    source = model_of(way=way, loss=loss)
    start = cases.weights_of(source)
    accumulate = ga.Accumulate(3, on_nonfinite="micro_batch")
    # Slices as large as the batches, so that as much is left out.
    chain = [*([ga.Split(4)] if split else []), accumulate]
    model = ga.make_accumulating(source, transforms=chain)
    for batches in windows(POISONED):
        train(model, batches)
        rest = [batch for batch in batches if not batch[2]]
        if rest:
            source.train_on_batch(*put_together(rest))
    assert (model.skipped_windows, model.skipped_micro_batches) == (1, len(POISONED))
    assert int(model.optimizer.iterations) == int(source.optimizer.iterations) == 3
    cases.assert_same_weights(model, source, start, 1e-9)


def test_slices_are_left_out_one_by_one(float64):
    """With split, what is left out is the slice, and not the batch."""
    source = model_of(tf_keras.optimizers.SGD(0.1))
    start = cases.weights_of(source)
    chain = [ga.Split(2), ga.Accumulate(1, on_nonfinite="micro_batch")]
    model = ga.make_accumulating(source, transforms=chain)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=[7, 4]), rng.normal(size=[7, 2])
    source.train_on_batch(np.delete(x, [2, 3], 0), np.delete(y, [2, 3], 0))
    y[3] = np.inf
    model.train_on_batch(x, y)
    assert model.skipped_micro_batches == 1
    cases.assert_same_weights(model, source, start, 1e-9)


def test_a_window_that_left_something_out_lowers_the_scale():
    """Once, with its update; and a window of which nothing remains lowers it, too."""
    spec = ga.Precision("mixed_float16", initial_scale=64.0, growth_steps=3)
    accumulate = ga.Accumulate(3, on_nonfinite="micro_batch")
    model = ga.make_accumulating(model_of(), transforms=[spec, accumulate])
    seen = []
    for batches in windows(POISONED, "float32"):
        train(model, batches)
        seen.append((int(model.optimizer.iterations), float(model.optimizer.loss_scale)))
    assert seen == [(1, 64.0), (2, 32.0), (2, 16.0), (3, 8.0)]
    assert int(model.optimizer.dynamic_counter) == 0


def test_discard_forgets_what_was_left_out():
    """The next window lowers no scale for it."""
    spec = ga.Precision("mixed_float16", initial_scale=64.0)
    accumulate = ga.Accumulate(3, on_nonfinite="micro_batch")
    model = ga.make_accumulating(model_of(), transforms=[spec, accumulate])
    first, second, *_ = windows(POISONED, "float32")
    train(model, second[:2])
    assert model.discard() == 2
    train(model, first)
    assert (int(model.optimizer.iterations), float(model.optimizer.loss_scale)) == (1, 64.0)


# ---- what can be read ----------------------------------------------------------------------


def test_what_was_skipped_stands_in_the_logs():
    """By epoch, from a callback; also in the history and in what later callbacks get."""
    model = ga.make_accumulating(model_of(), 2)
    x, y = np.ones([12, 4], "float32"), np.ones([12, 2], "float32")
    y[5] = np.nan

    seen = []
    later = tf_keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: seen.append(logs["skipped_windows"])
    )

    history = model.fit(
        x, y, batch_size=2, epochs=2, shuffle=False, verbose=0,
        callbacks=[ga.AccumulationLog(), later],
    ).history  # fmt: skip
    assert history["skipped_windows"] == seen == [1, 1]
    assert history["skipped_micro_batches"] == [0, 0]
    assert model.skipped_windows == 2


def test_the_log_is_for_converted_models():
    """On a plain model it says so in one line."""
    text = "^AccumulationLog must be given to fit of a converted model; got <.*make_accumulating.$"
    with pytest.raises(TypeError, match=text):
        model_of().fit(np.ones([2, 4]), np.ones([2, 2]), callbacks=[ga.AccumulationLog()])


@pytest.mark.parametrize("file", ["model.keras", "savedmodel", "checkpoint"])
def test_counts_survive_in_files(tmp_path, file):
    """In the middle of a window, with what it has left out: the run goes on as if it was not saved."""
    spec = ga.Precision("mixed_float16", initial_scale=64.0)
    accumulate = ga.Accumulate(3, on_nonfinite="micro_batch")

    def make():
        tf_keras.utils.set_random_seed(1)
        return ga.make_accumulating(model_of(), transforms=[spec, accumulate])

    model = make()
    made = windows(POISONED, "float32")
    train(model, [*made[2], *made[1][:2]])
    path = tmp_path / file
    if file == "checkpoint":
        loaded = make()
        tf.train.Checkpoint(loaded).read(tf.train.Checkpoint(model).write(str(path)))
    else:
        model.save(path)
        loaded = tf_keras.models.load_model(path)
    for each in (model, loaded):
        assert (each.skipped_windows, each.skipped_micro_batches) == (1, 4)
        assert each.pending_micro_batches == 2
        train(each, made[1][2:])
        assert float(each.optimizer.loss_scale) == 16.0
    for ours, theirs in zip(loaded.get_weights(), model.get_weights()):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)


def test_several_optimizers_are_counted_together(float64):
    """Each judges its own windows."""

    class Two(tf_keras.Model):
        def __init__(self):
            super().__init__()
            self.parts = [layers.Dense(1), layers.Dense(1)]

        def compile(self):
            super().compile()
            self.optimizers = [tf_keras.optimizers.SGD(0.1), tf_keras.optimizers.SGD(0.1)]

        def train_step(self, x):
            for number, (part, optimizer) in enumerate(zip(self.parts, self.optimizers)):
                with tf.GradientTape() as tape:
                    loss = tf.reduce_mean(part(x[:, number : number + 1]) ** 2)
                optimizer.minimize(loss, part.trainable_variables, tape=tape)
            return {}

    model = Two()
    model.compile()
    ga.make_accumulating(model, 2, inplace=True)
    x = np.ones([4, 2])
    x[0, 1] = np.nan
    model.fit(x, batch_size=1, shuffle=False, verbose=0)
    assert [int(each.iterations) for each in model.optimizers] == [2, 1]
    assert model.skipped_windows == 1
