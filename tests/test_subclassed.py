"""Models of people's own classes: copied, converted in place, saved, and given back."""

import json
import subprocess
import sys

import cases
import numpy as np
import own_models
import pytest
import tensorflow as tf
import tf_keras
from tf_keras import layers

import ga_transform as ga

rng = np.random.default_rng(5)
X, Y = rng.normal(size=[12, 4]).astype("float32"), rng.normal(size=[12, 2]).astype("float32")


@tf_keras.utils.register_keras_serializable("tests")
class Configured(own_models.TwoLayers):
    """It can be made from its config, and compiled with arguments of its own."""

    def __init__(self, width=5, **kwargs):
        super().__init__(width, **kwargs)
        self.width = width

    def get_config(self):
        return {"width": self.width, "name": self.name}

    def compile(self, optimizer, penalty=0.0, tuners=(), **kwargs):
        super().compile(optimizer, **kwargs)
        self.penalty = penalty
        self.tuners = list(tuners)

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = self.compute_loss(x, y, y_pred) + self.penalty * tf.reduce_mean(y_pred**2)
        variables = self.trainable_variables
        gradients = tape.gradient(loss, variables)
        self.optimizer.apply_gradients(zip(gradients[:2], variables[:2]))
        self.tuners[0].apply_gradients(zip(gradients[2:], variables[2:]))
        return {"loss": loss}


def configured():
    model = Configured(width=3)
    model.compile(
        own_models.momentum(), 0.3, [tf_keras.optimizers.Adam(0.02)], loss="mse", metrics=["mae"]
    )
    return model


def train(model, epochs=1, **kwargs):
    return model.fit(X, Y, batch_size=2, shuffle=False, epochs=epochs, verbose=0, **kwargs)


@pytest.mark.parametrize("trained", [False, True])
def test_a_model_with_a_config_is_copied(trained):
    """Its class, weights, arguments of compile and every optimizer's state; nothing is shared."""
    model, twin = configured(), configured()
    if trained:
        train(model)
        train(twin)
    copy = ga.make_accumulating(model, accum_steps=1)
    assert isinstance(copy, Configured)
    assert (copy.width, copy.penalty, type(copy.tuners[0])) == (3, 0.3, tf_keras.optimizers.Adam)
    train(copy)
    assert len(model.weights) == len(twin.weights)
    for ours, theirs in zip(model.weights, twin.weights):
        np.testing.assert_array_equal(ours, theirs)
    train(model)
    for ours, theirs in zip(copy.get_weights(), model.get_weights()):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert int(copy.tuners[0].iterations) == int(model.tuners[0].iterations) > 0
    stripped = ga.strip_accumulating(copy)
    assert type(stripped) is Configured
    assert stripped.penalty == 0.3


def test_what_a_copy_cannot_know_is_named():
    """An argument of compile that is no attribute, or a network among them."""

    class Forgetful(Configured):
        def compile(self, optimizer, secret):
            super().compile(optimizer)

    model = Forgetful()
    model.compile("sgd", 3)
    with pytest.raises(ValueError, match=r"without one named 'secret'. Pass inplace=True"):
        ga.make_accumulating(model, 2)
    model = Configured()
    model.compile("sgd", penalty=tf.Variable(0.1, trainable=False))
    with pytest.raises(
        ValueError, match=r"'penalty' of its compile is a ResourceVariable. Pass inplace=True"
    ):
        ga.make_accumulating(model, 2)


@tf_keras.utils.register_keras_serializable("tests")
class Pair(tf_keras.Model):
    """Two networks, trained by its step; it is never called itself."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.left = tf_keras.Sequential([tf_keras.Input([4]), layers.Dense(2)])
        self.scale = None

    def get_config(self):
        return {}

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            scale = 1.0 if self.scale is None else self.scale
            loss = own_models.mean_square(y, scale * self.left(x))
        self.optimizer.minimize(loss, self.left.trainable_variables, tape=tape)
        return {"loss": loss}


def test_a_model_that_is_never_called_is_copied():
    """Its weights, its optimizer's state, and an array that was set on it."""
    model = Pair()
    model.compile(own_models.momentum())
    model.scale = np.array([0.5, 2.0], "float32")
    train(model)
    copy = ga.make_accumulating(model, accum_steps=1)
    for each in (model, copy):
        train(each)
    for ours, theirs in zip(copy.left.get_weights(), model.left.get_weights()):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert int(copy.optimizer.iterations) == int(model.optimizer.iterations) == 12


def test_what_a_copy_would_share_or_lose_is_named():
    """Layers that a config hands on, methods set on the object, averages of weights."""

    class Sharing(ByArguments):
        def __init__(self, top):
            tf_keras.Model.__init__(self)
            self.top = top

        def get_config(self):
            return {"top": self.top}

    model = Sharing(layers.Dense(2))
    model(X)
    with pytest.raises(ValueError, match="its config hands on the layers themselves"):
        ga.make_accumulating(model, 2)
    model = tf_keras.Sequential([tf_keras.Input([4]), layers.Dense(2)])
    model.compile("sgd", "mse")
    model.train_step = model.train_step
    with pytest.raises(ValueError, match="its 'train_step' is set on the object"):
        ga.make_accumulating(model, 2)
    model = configured()
    model.average = tf.train.ExponentialMovingAverage(0.5)
    model(X)
    model.average.apply(model.trainable_variables)
    with pytest.raises(ValueError, match="a moving average of its weights is in no config"):
        ga.make_accumulating(model, 2)


def test_one_optimizer_in_two_places_is_one_in_the_copy():
    """It is copied once, built or not."""
    optimizer = own_models.momentum()
    model = Configured()
    model.compile(optimizer, tuners=[optimizer], loss="mse")
    copy = ga.make_accumulating(model, 2)
    assert copy.tuners[0] is copy.optimizer is not optimizer


def test_nothing_is_left_behind():
    """A model that was converted and stripped in place is what it was, and trains as it did."""

    class Decorated(own_models.TwoLayers):
        @tf.function
        def train_step(self, data):
            return super().train_step(data)

    models = []
    for convert in (False, True):
        model = Decorated()
        model.compile(tf_keras.optimizers.legacy.SGD(0.125), "mse")
        model(X)
        train(model, epochs=1)
        if convert:
            attributes = {*vars(model)}
            ga.make_accumulating(model, 2, inplace=True)
            before = model.get_weights()
            train(model, epochs=1)
            assert int(model.optimizer.iterations) == 6 + 3
            model.set_weights(before)
            model.optimizer.iterations.assign(6)
            ga.strip_accumulating(model, inplace=True)
            assert {*vars(model)} == attributes
            assert "_accumulation" not in model._trackable_children()
        train(model, epochs=1)
        assert int(model.optimizer.iterations) == 12
        models.append(model)
    plain, model = models
    for ours, theirs in zip(model.get_weights(), plain.get_weights()):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


class OwnFit(own_models.TwoLayers):
    """A `fit` of its own, with an argument of its own, that drops or passes on callbacks."""

    def fit(self, x, y, rounds=1, **kwargs):
        for _ in range(rounds):
            history = super().fit(x, y, **kwargs)
        return history


class Dropping(own_models.TwoLayers):
    def fit(self, x, y, batch_size, callbacks=None):
        return super().fit(x, y, batch_size=batch_size, verbose=0, epochs=2)


def test_a_fit_of_its_own():
    """Its arguments are its own; where it drops callbacks the window is settled at its end."""
    model = OwnFit()
    model.compile("sgd", "mse")
    ga.make_accumulating(model, 4, inplace=True)
    model.fit(X, Y, rounds=2, batch_size=2, verbose=0)
    assert int(model.optimizer.iterations) == 4
    model = Dropping()
    model.compile("sgd", "mse")
    ga.make_accumulating(model, 5, inplace=True)
    with pytest.warns(ga.InexactWarning, match="its fit does not call the callbacks"):
        model.fit(X, Y, 2)
    assert int(model.optimizer.iterations) == 3
    assert model.pending_micro_batches == 0


def test_a_step_with_arguments_of_its_own():
    """A training function of its own may call the step with more than a batch."""

    class Stepping(own_models.TwoLayers):
        def train_step(self, x, y, factor=1.0):
            with tf.GradientTape() as tape:
                loss = factor * own_models.mean_square(y, self(x))
            self.optimizer.minimize(loss, self.trainable_variables, tape=tape)
            return {"loss": loss}

    model = Stepping()
    model.compile("sgd")
    ga.make_accumulating(model, 2, inplace=True)
    for _ in range(4):
        model.train_step(X, Y, factor=0.5)
    assert int(model.optimizer.iterations) == 2


def test_a_model_without_a_config_is_sent_to_inplace():
    """The line names the way out, and this copies nothing."""
    model = own_models.TwoLayers()
    model.compile("sgd", "mse")
    model(X)
    with pytest.raises(
        ValueError,
        match=r"^A model must define get_config to be copied; got TwoLayers 'two_layers' without "
        r"one. Pass inplace=True: it copies nothing.$",
    ):
        ga.make_accumulating(model, 2)
    kernel = model.hidden.kernel
    assert ga.make_accumulating(model, 2, inplace=True) is model
    assert model.hidden.kernel is kernel


def test_the_class_is_theirs_too():
    """A name a person understands, their class, methods and attributes; and back."""

    class Flux(own_models.TwoLayers):
        """Theirs."""

        unit = "mm"

        def twice(self, x):
            return 2 * self(x)

    model = Flux()
    model.compile("sgd", "mse")
    model.note = "mine"
    ga.make_accumulating(model, 2, inplace=True)
    assert type(model).__name__ == "AccumulatingFlux"
    assert type(model).__module__ == Flux.__module__
    assert type(model).__doc__ == "Theirs."
    assert isinstance(model, Flux)
    assert (model.note, model.unit, model.twice(X).shape) == ("mine", "mm", (12, 2))
    assert type(ga.make_accumulating(Flux(), 2, inplace=True)) is type(model)
    assert type(ga.strip_accumulating(model, inplace=True)) is Flux
    train(model)
    assert int(model.optimizer.iterations) == 6


def test_a_converted_class_makes_plain_models():
    """What its constructor and its own class methods make is theirs, not converted by itself."""
    model = ga.make_accumulating(own_models.TwoLayers(), 2, inplace=True)
    other = type(model)(width=3)
    assert type(other) is own_models.TwoLayers
    other.compile("sgd", "mse")
    train(other)
    assert int(other.optimizer.iterations) == 6


@pytest.mark.parametrize("where", ["class", "object"])
def test_names_of_their_own_stay_theirs(where):
    """A model that has a `flush` or `transforms` keeps it, and a warning says where ours are."""

    class Named(own_models.TwoLayers):
        if where == "class":
            transforms = "theirs"

            def flush(self):
                return "theirs"

    model = Named()
    if where == "object":
        model.transforms = "theirs"
        model.flush = lambda: "theirs"
    model.compile("sgd", "mse")
    with pytest.warns(UserWarning, match="flush, transforms of Named stay its own"):
        ga.make_accumulating(model, 4, inplace=True)
    train(model)
    assert (model.transforms, model.flush()) == ("theirs", "theirs")
    assert int(model.optimizer.iterations) == 2  # the partial window was applied
    model.train_on_batch(X, Y)
    assert ga.models.AccumulatingModel.flush(model) == 1


def test_built_within_fit(float64):
    """A model whose first build happens inside `fit`, converted unbuilt and uncompiled."""
    plain, model = own_models.TwoLayers(), own_models.TwoLayers()
    ga.make_accumulating(model, 3, inplace=True)
    for each in (plain, model):
        each.compile(own_models.momentum(), "mse")
    plain.fit(X, Y, batch_size=6, shuffle=False, verbose=0)
    train(model)
    for ours, theirs in zip(model.get_weights(), plain.get_weights()):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9)


class Growing(tf_keras.Model):
    """It makes a layer when it has seen so many batches; run eagerly."""

    def __init__(self, late_at):
        super().__init__()
        self.first = own_models.dense(2)
        self.seen, self.late_at = 0, late_at

    def call(self, x, training=False):
        if training:
            self.seen += 1
            if self.seen == self.late_at:
                self.late = own_models.dense(2, seed=1)
        y = self.first(x)
        return self.late(y) if hasattr(self, "late") else y


def test_variables_that_are_made_late(float64):
    """In the middle of a window: its update has their gradients, as means over all its rows."""
    model = Growing(late_at=4)
    optimizer = tf_keras.optimizers.legacy.SGD(0.125)
    model.compile(optimizer, "mse", run_eagerly=True)
    ga.make_accumulating(model, 3, inplace=True)
    x, y = X.astype("float64"), Y.astype("float64")
    for i in range(3):
        model.train_on_batch(x[2 * i : 2 * i + 2], y[2 * i : 2 * i + 2])
    before = model.get_weights()
    for i in range(3, 6):
        model.train_on_batch(x[2 * i : 2 * i + 2], y[2 * i : 2 * i + 2])
    kernel, bias = before
    h = x[6:] @ kernel + bias
    late = own_models.dense(2, seed=1)
    late.build([None, 2])
    residual = 2 * (h @ late.kernel.numpy() - y[6:]) / 12
    np.testing.assert_allclose(
        model.late.kernel, late.kernel - 0.125 * h.T @ residual, rtol=0, atol=1e-9
    )
    np.testing.assert_allclose(
        model.first.bias, bias - 0.125 * (residual @ late.kernel.numpy().T).sum(0), atol=1e-9
    )


def test_the_decorator_converts_in_place():
    """On a function that returns a model of a class of its own."""
    made = []

    @ga.accumulating(accum_steps=2)
    def build(width):
        made.append(own_models.TwoLayers(width))
        made[-1].compile("sgd", "mse")
        return made[-1]

    model = build(3)
    assert model is made[0]
    assert isinstance(model, own_models.TwoLayers)
    train(model)
    assert int(model.optimizer.iterations) == 3


# ---- saving ----------------------------------------------------------------------------------

LOADING = """
import json, sys
import numpy as np
import ga_transform as ga
import tf_keras, test_subclassed
model = tf_keras.models.load_model(sys.argv[1])
x = test_subclassed.X
print(json.dumps([type(model).__name__, str(model.transforms), model.width,
                  isinstance(model, test_subclassed.Configured),
                  model.predict(x, verbose=0).tolist()]))
"""


@pytest.mark.parametrize("suffix", [".keras", ""], ids=[".keras", "SavedModel"])
def test_a_converted_model_of_their_class_is_saved_and_loaded(tmp_path, suffix):
    """In a fresh process: its class, chain and predictions."""
    model = ga.make_accumulating(configured(), 4, agc=True, inplace=True)
    train(model)
    path = str(tmp_path / f"model{suffix}")
    model.save(path)
    result = subprocess.run(
        [sys.executable, "-c", LOADING, path], capture_output=True, text=True, check=False,
        cwd=cases.__file__.rsplit("/", 1)[0],
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    name, chain, width, is_theirs, predictions = json.loads(result.stdout.splitlines()[-1])
    assert (name, chain) == ("AccumulatingConfigured", str(model.transforms))
    assert (width, is_theirs) == (3, True)
    np.testing.assert_allclose(predictions, model.predict(X, verbose=0), atol=1e-6)


class ByArguments(tf_keras.Model):
    """Without `get_config`: tf_keras makes one of the arguments, where they are plain values."""

    def __init__(self, width):
        super().__init__()
        self.top = layers.Dense(width)

    def call(self, x):
        return self.top(x)


def test_what_the_plain_model_can_save_the_converted_one_can(tmp_path):
    """A config that tf_keras makes by itself; and a SavedModel of a class that is not known."""
    model = ByArguments(2)
    model.compile("sgd", "mse")
    ga.make_accumulating(model, 2, inplace=True)
    train(model)
    model.save(tmp_path / "model.keras")
    again = tf_keras.models.load_model(
        tmp_path / "model.keras", custom_objects={"ByArguments": ByArguments}
    )
    assert (str(again.transforms), type(again)) == ("Chain(Accumulate(steps=2))", type(model))
    train(again)
    assert int(again.optimizer.iterations) == 6
    unknown = own_models.TwoLayers()
    unknown.compile("sgd", "mse")
    ga.make_accumulating(unknown, 2, inplace=True)
    train(unknown)
    unknown.save(tmp_path / "unknown")
    revived = tf_keras.models.load_model(tmp_path / "unknown")
    np.testing.assert_allclose(revived(X), unknown(X), atol=1e-6)


class Network(tf_keras.Model):
    """A functional model of a class of its own."""


def test_files_that_name_a_class_by_its_bare_name(tmp_path):
    """HDF5 and JSON of a class of one's own hold the converted model, as `.keras` does."""
    inputs = tf_keras.Input([4])
    model = Network(inputs, layers.Dense(2)(inputs))
    model.compile("sgd", "mse")
    ga.make_accumulating(model, 2, inplace=True)
    model.save(tmp_path / "model.h5")
    custom = {"Network": Network}
    loaded = tf_keras.models.load_model(tmp_path / "model.h5", custom_objects=custom)
    assert type(loaded) is type(model)
    assert loaded.transforms == model.transforms
    np.testing.assert_allclose(loaded(X), model(X), atol=1e-6)
    of_text = tf_keras.models.model_from_json(model.to_json(), custom_objects=custom)
    for other in (of_text, tf_keras.models.clone_model(model)):
        assert type(other) is type(model)
        assert other.transforms == model.transforms


class OwnSave(own_models.TwoLayers):
    def save(self, path, note, with_weights=True):
        self.saved = (path, note, with_weights)


def test_a_save_of_its_own():
    """Its arguments are its own."""
    model = ga.make_accumulating(OwnSave(), 2, inplace=True)
    model.save("somewhere", "a note", with_weights=False)
    assert model.saved == ("somewhere", "a note", False)
    model.save(path="somewhere", note="a note")
    assert model.saved == ("somewhere", "a note", True)


def test_a_class_that_is_not_known_is_named(tmp_path):
    """Loading says which class is missing and how to pass it."""

    class Local(ByArguments):
        pass

    model = ga.make_accumulating(Local(2), 2, inplace=True)
    model(X)
    model.save(tmp_path / "model.keras")
    with pytest.raises(
        ValueError,
        match=r"^A converted model must be loaded where its class is known; got 'Local' of module "
        r"'test_subclassed', which is not. Pass custom_objects=\{'Local': Local\}.$",
    ):
        tf_keras.models.load_model(tmp_path / "model.keras")


def test_weights_move_between_plain_and_converted(tmp_path):
    """By file and by hand, both ways."""
    plain, model = configured(), ga.make_accumulating(configured(), 2, inplace=True)
    train(plain)
    train(model)
    for name in ("weights.h5", "checkpoint"):
        plain.save_weights(tmp_path / name)
        model.load_weights(tmp_path / name)
        np.testing.assert_array_equal(model(X), plain(X))
        train(model)
        model.save_weights(tmp_path / f"back_{name}")
        plain.load_weights(tmp_path / f"back_{name}")
        np.testing.assert_array_equal(model(X), plain(X))
        train(plain)
    model.set_weights(plain.get_weights())
    np.testing.assert_array_equal(model(X), plain(X))
