"""Callbacks and layers that count: with the updates, as on the large batch."""

import cases
import numpy as np
import own_models
import pytest
import tensorflow as tf
import tf_keras

import ga_transform as ga


class Annealed(own_models.TwoLayers):
    """Its loss has a weight that a callback sets, step by step."""

    def __init__(self):
        super().__init__()
        self.alpha = tf.Variable(1.0, trainable=False, dtype="float64")

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        return self.alpha * super().compute_loss(x, y, y_pred, sample_weight)


class Anneal(tf_keras.callbacks.Callback):
    """Counts the batches, and notes what it is called with."""

    def __init__(self):
        super().__init__()
        self.steps = 0
        self.calls = []

    def on_batch_begin(self, batch, logs=None):
        self.model.alpha.assign(1.0 / (1 + self.steps))
        self.calls.append(("begin", batch))

    def on_train_batch_end(self, batch, logs=None):
        self.steps += 1
        self.calls.append(("end", batch))

    def on_epoch_end(self, epoch, logs=None):
        self.calls.append(("epoch", epoch))


@pytest.mark.parametrize("validates", [False, True])
def test_a_callback_that_counts_batches_counts_updates(float64, validates):
    """Its batch hooks come once a window, a partial one at the end of the epoch included."""
    rng = np.random.default_rng(0)
    windows = [[own_models.regression(rng, n) for n in window] for window in cases.PARTIAL]
    validation = windows[0][0] if validates else None
    models, callbacks = [], []
    for convert in (False, True):
        model, anneal = Annealed(), Anneal()
        model.compile(own_models.momentum(), "mse")
        if convert:
            ga.make_accumulating(model, cases.STEPS, inplace=True)
        model.fit(
            cases.dataset(sum(windows, []) if convert else map(cases.concatenate, windows)),
            epochs=2,
            verbose=0,
            callbacks=[ga.per_update(anneal)],
            validation_data=validation,
        )
        models.append(model)
        callbacks.append(anneal)
    for ours, theirs in zip(models[1].get_weights(), models[0].get_weights()):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9)
    assert callbacks[1].calls == callbacks[0].calls
    assert isinstance(anneal, Anneal)


def test_a_window_that_is_carried_goes_on():
    """It begins in one epoch and ends in the next."""
    model, anneal = Annealed(), Anneal()
    model.compile("sgd", "mse")
    model.alpha = tf.Variable(1.0, trainable=False)
    ga.make_accumulating(model, 2, remainder="carry", inplace=True)
    x, y = own_models.regression(np.random.default_rng(0), 3)
    model.fit(x, y, batch_size=1, epochs=2, verbose=0, callbacks=[ga.per_update(anneal)])
    begin, end = ("begin", 0), ("end", 0)
    assert anneal.calls == [
        begin, end, ("begin", 1), ("epoch", 0), end, ("begin", 1), ("end", 1), ("epoch", 1)
    ]  # fmt: skip


def test_hooks_that_are_set_on_the_object():
    """`LambdaCallback` keeps its functions on itself; they are called once an update, with logs."""
    calls = []
    callback = tf_keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: calls.append((batch, "loss" in logs)),
        on_epoch_end=lambda epoch, logs: calls.append("epoch"),
    )
    model = own_models.TwoLayers()
    model.compile("sgd", "mse")
    ga.make_accumulating(model, 2, inplace=True)
    x, y = own_models.regression(np.random.default_rng(0), 3)
    model.fit(x, y, batch_size=1, verbose=0, callbacks=[ga.per_update(callback)])
    assert calls == [(0, True), (1, True), "epoch"]


def test_what_is_no_callback_is_refused():
    """One line that says what to pass."""
    with pytest.raises(
        TypeError,
        match=r"^per_update.callback must be a tf_keras.callbacks.Callback; got \[\] \(list\). "
        r"Wrap each one, not a list.$",
    ):
        ga.per_update([])


def known(package, name, base, **namespace):
    """A class as another package has it, by its name."""
    return type(name, (base,), {"__module__": f"{package}.somewhere", **namespace})


class Counting(tf_keras.layers.Layer):
    """Counts the passes of training, and scales by what it has counted."""

    def build(self, shape):
        self.pruning_step = tf.Variable(0, trainable=False, dtype="int64")

    def call(self, x, training=False):
        if training:
            self.pruning_step.assign_add(1)
        return x * (1.0 / tf.cast(self.pruning_step + 1, x.dtype))


def test_layers_that_count_passes_count_updates(float64):
    """A pruning step that its layer advances in each forward pass is advanced once a window."""
    layer = known("tensorflow_model_optimization", "PruneLowMagnitude", Counting)
    models = []
    for _ in range(2):
        model = tf_keras.Sequential([tf_keras.Input([4]), layer(), own_models.dense(2)])
        model.compile(own_models.momentum(), "mse")
        models.append(model)
    plain, model = models
    ga.make_accumulating(model, cases.STEPS, inplace=True)
    rng = np.random.default_rng(0)
    windows = [[own_models.regression(rng, n) for n in window] for window in cases.PARTIAL]
    plain.fit(cases.dataset(map(cases.concatenate, windows)), epochs=2, verbose=0)
    model.fit(cases.dataset(sum(windows, [])), epochs=2, verbose=0)
    assert int(model.layers[0].pruning_step) == int(plain.layers[0].pruning_step) == 4
    for ours, theirs in zip(model.get_weights(), plain.get_weights()):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9)


def coupled():
    """Losses, layers and models that are known to couple rows, and how a model holds them."""
    loss = known("tensorflow_similarity", "MetricLoss", tf_keras.losses.MeanSquaredError)
    derived = type("CircleLoss", (loss,), {"__module__": "tensorflow_similarity.losses"})
    retrieval = known("tensorflow_recommenders", "Retrieval", tf_keras.layers.Layer)

    def npairs_loss(y_true, y_pred):
        return tf.reduce_mean(tf.square(y_true - y_pred))

    npairs_loss.__module__ = "tensorflow_addons.losses.npairs"
    attribute = own_models.TwoLayers()
    attribute.loss_fn = derived()
    task = own_models.TwoLayers()
    task.task = retrieval()
    yield own_models.TwoLayers(), derived(), "CircleLoss of tensorflow_similarity"
    yield own_models.TwoLayers(), npairs_loss, "npairs_loss of tensorflow_addons"
    yield attribute, "mse", "CircleLoss of tensorflow_similarity"
    yield task, "mse", "Retrieval of tensorflow_recommenders"
    yield (
        own_models.TwoLayers(),
        tf_keras.metrics.MeanSquaredError(),
        "MeanSquaredError of tf_keras",
    )


@pytest.mark.parametrize("which", range(5))
def test_losses_that_couple_rows_are_named(which):
    """Known ones in a warning, at conversion; nothing is said where windows hold one batch."""
    model, loss, name = list(coupled())[which]
    model.compile("sgd", loss, metrics=["mae", tf_keras.metrics.MeanSquaredError()])
    ga.strip_accumulating(ga.make_accumulating(model, 1, inplace=True), inplace=True)
    with pytest.warns(ga.InexactWarning, match=f"^{model.name}: {name} couples the rows"):
        ga.make_accumulating(model, 2, inplace=True)


def test_usual_losses_are_not_named():
    """No loss of tf_keras, and no metric, is said to couple rows."""
    model = own_models.TwoLayers()
    model.compile("sgd", ["mse"], metrics=["mae", tf_keras.metrics.MeanSquaredError()])
    model.tracker = tf_keras.metrics.Mean()
    ga.make_accumulating(model, 2, inplace=True)
