"""A converted model is saved and loaded as SavedModel, HDF5 and .keras."""

import copy
import subprocess
import sys

import attrs
import cases
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import ga_transform as ga
from ga_transform import models

CHAIN = ga.Chain(ga.Accumulate(3, remainder="carry"), ga.ClipByAGC(0.5), ga.ClipByGlobalNorm(9.0))


def small(steps=3, **arguments):
    """A converted model that is quickly saved."""
    model = tf_keras.Sequential([tf_keras.Input([2]), tf_keras.layers.Dense(1)])
    model.compile(**{"optimizer": "adam", "loss": "mse", **arguments})
    return ga.make_accumulating(model, steps)


X, Y = np.ones([4, 2], "float32"), np.ones([4, 1], "float32")


def in_a_fresh_process(script, *arguments):
    """What a script prints, run by a Python of its own."""
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with two converted models, in all formats, in the midst of a window."""
    folder = tmp_path_factory.mktemp("files")
    models = {}
    for name in ("dense", "branches"):
        case = cases.MODELS[name]()
        case.model.compile("adam", **case.compile, metrics=["mae"] if name == "dense" else None)
        model = ga.make_accumulating(case.model, transforms=CHAIN)
        (batches,) = cases.make_batches(case, [[4, 4]])
        for batch in batches:
            model.train_on_batch(*batch)
        (folder / name).mkdir()
        model.save(folder / name / "model.keras")
        model.save(folder / name / "savedmodel")
        with pytest.warns(UserWarning, match="HDF5 holds no partial window; 2 pending"):
            model.save(folder / name / "model.h5")
        (folder / name / "model.json").write_text(model.to_json())
        models[name] = model, batches[0][0]
    return folder, models


# ---- without the library ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dense", "branches"])
def test_a_saved_model_serves(saved, name):
    """TensorFlow alone loads it and calls its signature, as that of a plain model."""
    folder, models = saved
    model, x = models[name]
    served = tf.saved_model.load(str(folder / name / "savedmodel"))
    assert list(served.signatures) == ["serving_default"]
    signature = served.signatures["serving_default"]
    inputs = x if isinstance(x, dict) else {next(iter(signature.structured_input_signature[1])): x}
    predicted = signature(**{key: tf.constant(value, tf.float32) for key, value in inputs.items()})
    if name == "dense":
        (predicted,) = predicted.values()
    tf.nest.map_structure(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7),
        predicted,
        model.predict(x, verbose=0),
    )


def test_what_tf_keras_loads_without_the_library(saved):
    """A SavedModel, as a plain model that trains; HDF5 and JSON say what is to be imported.

    A `.keras` file names the module of its class, which tf_keras imports by itself.
    """
    folder, models = saved
    script = """
import pathlib, sys
import numpy as np, tf_keras
folder = pathlib.Path(sys.argv[1])
inputs = {"dense": np.ones([2, 5]), "branches": {"left": np.ones([2, 4]), "right": np.ones([2, 4])}}
targets = {"dense": np.ones([2, 2]), "branches": {"score": np.ones([2, 1]), "kind": np.ones([2, 1])}}
for name in inputs:
    model = tf_keras.models.load_model(folder / name / "savedmodel")
    model.fit(inputs[name], targets[name], verbose=0)
    print(type(model).__module__.split(".")[0], len(model.weights))
    for load, text in (
        (tf_keras.models.load_model, str(folder / name / "model.h5")),
        (tf_keras.models.model_from_json, (folder / name / "model.json").read_text()),
    ):
        try:
            load(text)
        except (TypeError, ValueError) as error:
            print("ga_transform" in str(error).splitlines()[0])
assert "ga_transform" not in sys.modules
print(tf_keras.models.load_model(folder / "dense" / "model.keras").transforms)
"""
    expected = []
    for model, _ in models.values():
        expected += [f"tf_keras {len(model.weights)}", "True", "True"]
    assert in_a_fresh_process(script, folder).splitlines() == [*expected, str(CHAIN)]


@pytest.mark.long
def test_importing_in_any_order():
    """The classes are registered whether tf_keras comes before or after."""
    for script in ("import ga_transform, tf_keras", "import tf_keras, ga_transform"):
        in_a_fresh_process(
            f"{script}\nassert 'AccumulatingSequential' in tf_keras.utils.get_custom_objects()"
        )


# ---- weights -----------------------------------------------------------------------------------


def test_weights_move_between_plain_and_converted(tmp_path):
    """Weight files and lists of weights fit both ways: accumulators are no weights."""
    case = cases.dense()
    case.model.compile("adam", "mse")
    model = ga.make_accumulating(case.model, 3)
    for each in (model, case.model):
        for _ in range(3):
            each.train_on_batch(*case.batch(np.random.default_rng(0), 4))
    for one, other in ((model, case.model), (case.model, model)):
        one.set_weights([w + 1 for w in one.get_weights()])
        for file in ("w.weights.h5", "w.h5", "w"):
            one.save_weights(tmp_path / file)
            other.load_weights(tmp_path / file)
        tf.nest.map_structure(np.testing.assert_array_equal, one.get_weights(), other.get_weights())


def test_checkpoints_keep_a_partial_window(tmp_path):
    """A checkpoint restores the gradients that are pending, their weights and their count."""
    case = cases.words()
    case.model.compile("adam", **case.compile)
    batches = cases.make_batches(case, [[4, 3, 5]])[0]
    one, other = (ga.make_accumulating(case.model, 3) for _ in range(2))
    for batch in batches[:2]:
        one.train_on_batch(*batch)
    path = tf.train.Checkpoint(one).save(str(tmp_path / "checkpoint"))
    other.train_on_batch(*batches[2])  # so that there are variables to restore
    tf.train.Checkpoint(other).restore(path)
    assert other.pending_micro_batches == 2
    for model in (one, other):
        model.train_on_batch(*batches[2])
    tf.nest.map_structure(np.testing.assert_array_equal, one.get_weights(), other.get_weights())


def test_a_window_restored_before_any_step(tmp_path):
    """It is flushed, or goes on with the next step, as if nothing had been."""
    model = small(2)
    fresh = tf.train.Checkpoint(model).write(str(tmp_path / "fresh"))
    others = [small(2) for _ in range(3)]
    for other in others:
        other.set_weights(model.get_weights())
    model.train_on_batch(X, Y)
    path = tf.train.Checkpoint(model).write(str(tmp_path / "partial"))
    for other in others:
        tf.train.Checkpoint(other).read(path).assert_existing_objects_matched()
        assert other.pending_micro_batches == 1
    tf.train.Checkpoint(others[2]).read(fresh)
    assert others[2].pending_micro_batches == 0
    others[0].flush()
    others[1].train_on_batch(X, Y)
    model.train_on_batch(X, Y)
    cases.assert_same_weights(others[1], model, others[2].get_weights(), 0)
    model.set_weights(others[2].get_weights())
    assert int(others[0].optimizer.iterations) == 1


def test_a_checkpoint_of_an_empty_window_carries_no_sums(tmp_path):
    """What the next window writes over is in no checkpoint, and is not missed at restoring."""
    model, other = small(2), small(2)
    for each in (model, other):
        each.train_on_batch(X, Y)
    model.train_on_batch(X, Y)
    path = tf.train.Checkpoint(model).write(str(tmp_path / "checkpoint"))
    sizes = {name: np.prod(shape) for name, shape in tf.train.list_variables(path)}
    assert max(size for name, size in sizes.items() if "_accumulation" in name) == 1
    tf.train.Checkpoint(other).read(path).assert_consumed()
    assert other.pending_micro_batches == 0


def test_looking_for_tf_keras_does_not_undo_the_registration():
    """Whoever asks where tf_keras is, before it is imported, changes nothing."""
    script = """
import ga_transform, importlib.util, pkgutil
assert importlib.util.find_spec("tf_keras") is not None
import tf_keras
assert "AccumulatingSequential" in tf_keras.utils.get_custom_objects()
assert pkgutil.get_data("tf_keras", "__init__.py")
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def count_rows(batch):
    return tf.shape(batch[0])[0]


def test_a_weighting_function_must_be_registered_to_be_saved(tmp_path):
    """Any function trains; saving one that is not registered says what to do."""
    case = cases.dense()
    case.model.compile("sgd", "mse")
    model = ga.make_accumulating(case.model, transforms=[ga.Accumulate(2, weighting=count_rows)])
    model.train_on_batch(*case.batch(np.random.default_rng(0), 4))
    with pytest.raises(ValueError, match="must be registered to be saved"):
        model.save(tmp_path / "model.keras")


@attrs.frozen
class Halve(ga.Transform):
    times: int = 1


@ga.register_transform(Halve, package="tests")
def halve(spec, gradients, variables, model):
    assert all(not isinstance(gradient, tf.IndexedSlices) for gradient in gradients)
    return [gradient * 0.5**spec.times for gradient in gradients]


def test_a_transform_of_ones_own_has_the_same_rights(tmp_path, float64):
    """It stands in chains, acts where it stands, and is saved and loaded."""
    case = cases.dense()
    case.model.compile(tf_keras.optimizers.SGD(0.1), "mse")
    start = case.model.get_weights()
    models = {
        times: ga.make_accumulating(case.model, transforms=[ga.Accumulate(1), Halve(times)])
        for times in (0, 2)
    }
    batch = case.batch(np.random.default_rng(0), 4)
    for model in models.values():
        model.train_on_batch(*batch)
    constrained = 4  # the kernel with a constraint does not move in proportion
    for position, before in enumerate(start):
        if position != constrained:
            moved = [model.get_weights()[position] - before for model in models.values()]
            np.testing.assert_allclose(moved[1], moved[0] / 4, atol=1e-12)
    models[2].save(tmp_path / "model.keras")
    loaded = tf_keras.models.load_model(tmp_path / "model.keras")
    assert loaded.transforms == ga.Chain(ga.Accumulate(1), Halve(2))


# ---- what saving leaves alone, and other ways to save ------------------------------------------


def test_saving_changes_nothing_in_memory(tmp_path):
    """Whatever the format, the window, its count and the optimizer are as they were."""
    model = small()
    model.train_on_batch(X, Y)
    optimizer = model.optimizer
    model.save(tmp_path / "without", include_optimizer=False)
    model.save(tmp_path / "with")
    model.save(tmp_path / "model.keras")
    with pytest.warns(UserWarning, match="1 pending micro-batches are left out"):
        model.save(tmp_path / "model.h5")
    model.export(tmp_path / "exported")
    model.to_json()
    assert copy.deepcopy(model).pending_micro_batches == 1
    assert type(model) is models.AccumulatingSequential
    assert model.optimizer is optimizer
    assert model.pending_micro_batches == 1
    for _ in range(2):
        model.train_on_batch(X, Y)
    assert (model.pending_micro_batches, int(optimizer.iterations)) == (0, 1)


def test_what_a_saved_model_weighs(tmp_path):
    """A SavedModel holds each variable once; an empty window adds a few numbers."""

    def size(model, name):
        model.save(tmp_path / name)
        return (tmp_path / name / "variables" / "variables.data-00000-of-00001").stat().st_size

    plain = tf_keras.Sequential([tf_keras.Input([300]), tf_keras.layers.Dense(100)])
    plain.compile("adam", "mse")
    x, y = np.ones([2, 300]), np.ones([2, 100])
    plain.train_on_batch(x, y)
    model = ga.make_accumulating(plain, 2)
    usual = size(plain, "plain")
    assert size(model, "empty") < usual + 4000
    model.train_on_batch(x, y)
    weights = 4 * plain.count_params()
    assert usual + weights < size(model, "begun") < usual + weights + 4000


def test_an_export_serves(tmp_path):
    """`model.export` writes what it writes of the plain model."""
    model = small()
    model.train_on_batch(X, Y)
    model.export(tmp_path / "exported")
    served = tf.saved_model.load(str(tmp_path / "exported"))
    np.testing.assert_allclose(served.serve(X), model(X), atol=1e-6)
    names = {
        name for name, _ in tf.train.list_variables(f"{tmp_path}/exported/variables/variables")
    }
    assert not any("accumulat" in name for name in names)


@pytest.mark.parametrize("file", ["model.keras", "savedmodel"])
def test_a_model_that_is_compiled_by_hand_after_loading(tmp_path, file):
    """Its window starts again, as its optimizer does, with a warning; saved before, it is kept."""
    model = small()
    model.train_on_batch(X, Y)
    model.save(tmp_path / file)
    loaded = tf_keras.models.load_model(tmp_path / file, compile=False)
    loaded.save(tmp_path / "again.keras")
    with pytest.warns(UserWarning, match="strip_accumulating leaves out 1 pending"):
        assert type(ga.strip_accumulating(loaded)) is tf_keras.Sequential
    with pytest.warns(UserWarning, match="had 1 pending micro-batches, which are dropped"):
        loaded.compile("adam", "mse")
    assert (loaded.pending_micro_batches, int(loaded.optimizer.iterations)) == (0, 0)


@tf_keras.utils.register_keras_serializable("tests")
class OwnCompile(tf_keras.Model):
    """With a `compile` that loaders do not call, and an optimizer of its own name."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.layer = tf_keras.layers.Dense(1)

    def call(self, x):
        return self.layer(x)

    def compile(self, layer_optimizer):
        super().compile()
        self.layer_optimizer = layer_optimizer

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((self(x) - y) ** 2)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.layer_optimizer.apply_gradients(zip(gradients, self.trainable_variables))
        return {"loss": loss}


def test_a_compile_of_ones_own_after_loading(tmp_path):
    """The window goes on once the optimizers are there."""
    model = OwnCompile()
    model(X)
    model.compile(tf_keras.optimizers.SGD(0.1))
    ga.make_accumulating(model, 3, inplace=True)
    for _ in range(2):
        model.train_on_batch(X, Y)
    model.save(tmp_path / "model.keras")
    loaded = tf_keras.models.load_model(tmp_path / "model.keras")
    assert loaded.pending_micro_batches == 0
    loaded.compile(tf_keras.optimizers.SGD(0.1))
    assert loaded.pending_micro_batches == 2
    for each in (model, loaded):
        each.train_on_batch(2 * X, Y)
    np.testing.assert_allclose(loaded.get_weights()[0], model.get_weights()[0], rtol=1e-6)


@tf_keras.utils.register_keras_serializable("tests")
class FrozenPair(tf_keras.layers.Layer):
    """Two layers of one shape, whose order among the weights changes with what is frozen."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.one, self.two = tf_keras.layers.Dense(2), tf_keras.layers.Dense(2)

    def call(self, x):
        return self.two(self.one(x))


def pair(**arguments):
    model = tf_keras.Sequential([tf_keras.Input([2]), FrozenPair()])
    model.layers[0].one.trainable = False
    model.compile("adam", "mse")
    return ga.make_accumulating(model, **{"accum_steps": 3, "inplace": True, **arguments})


@pytest.mark.parametrize("file", ["model.keras", "savedmodel", "checkpoint"])
def test_what_is_frozen_does_not_move(tmp_path, file):
    """A window goes to the weights that it came from; where others are trained, it is dropped.

    tf_keras forgets that a layer within a layer is frozen.
    """
    model = pair()
    model.train_on_batch(X, X[:, :1])
    if file == "checkpoint":
        loaded = pair()
        loaded.layers[0].one.trainable = True
        loaded.compile("adam", "mse")
        loaded.train_on_batch(X, X[:, :1])
        path = tf.train.Checkpoint(model).write(str(tmp_path / file))
        tf.train.Checkpoint(loaded).read(path)
        with pytest.warns(UserWarning, match="1 pending micro-batches, which are dropped"):
            assert loaded.flush() == 0
    else:
        model.save(tmp_path / file)
        with pytest.warns(UserWarning, match="had 1 pending micro-batches, which are dropped"):
            loaded = tf_keras.models.load_model(tmp_path / file)
    before = loaded.get_weights()
    assert loaded.flush() == 0
    tf.nest.map_structure(np.testing.assert_array_equal, loaded.get_weights(), before)
    loaded.train_on_batch(X, X[:, :1])  # as a model that trains all its weights does
    assert loaded.pending_micro_batches == 1


@pytest.mark.parametrize("settings", [{"steps": 1}, {"jit_compile": True}, {"steps": {0: 2, 5: 3}}])
def test_a_checkpoint_of_other_windows(tmp_path, settings):
    """Where its window cannot go on, it is dropped with a warning; else it ends with the new steps."""

    def words(steps=3, **arguments):
        embedding = tf_keras.layers.Embedding(9, 3)
        pooling = tf_keras.layers.GlobalAveragePooling1D()
        model = tf_keras.Sequential([tf_keras.Input([4], dtype="int32"), embedding, pooling])
        model.compile("sgd", "mse", **arguments)
        return ga.make_accumulating(model, steps)

    x, y = np.ones([2, 4], "int32"), np.ones([2, 3], "float32")
    model, other = words(), words(**settings)
    for _ in range(2):
        model.train_on_batch(x, y)
    path = tf.train.Checkpoint(model).write(str(tmp_path / "checkpoint"))
    for trained in (0, 1):  # before and after its function is traced
        for _ in range(trained):
            other.train_on_batch(x, y)
        tf.train.Checkpoint(other).read(path)
        updates = int(other.optimizer.iterations)
        if isinstance(settings.get("steps"), dict):
            assert other.pending_micro_batches == 2
            other.train_on_batch(x, y)
        else:
            with pytest.warns(UserWarning, match="2 pending micro-batches, which are dropped"):
                other.train_on_batch(x, y)
        is_last = settings.get("steps") is not None
        assert int(other.optimizer.iterations) == updates + is_last
        assert other.pending_micro_batches == (0 if is_last else 1)


def test_weights_that_are_no_variables(tmp_path):
    """A vocabulary is among the weights of its layer: files of weights are loaded all the same."""

    def text():
        words = tf_keras.layers.TextVectorization(output_sequence_length=3)
        words.adapt(["one two three"])
        inputs = tf_keras.Input([], dtype=tf.string)
        hidden = tf_keras.layers.Embedding(9, 2)(words(inputs))
        model = tf_keras.Model(inputs, tf_keras.layers.Flatten()(hidden))
        model.compile("sgd", "mse")
        return ga.make_accumulating(model, 2, inplace=True)

    model, other = text(), text()
    model.save_weights(tmp_path / "w.weights.h5")
    other.load_weights(tmp_path / "w.weights.h5")
    x = tf.constant(["two one"])
    np.testing.assert_allclose(other(x), model(x))


def test_configs_and_clones(tmp_path):
    """They hold the chain, and nothing of the training."""
    case = cases.branches()
    case.model.compile("adam", **case.compile)
    model = ga.make_accumulating(case.model, transforms=CHAIN)
    for other in (
        type(model).from_config(model.get_config()),
        tf_keras.models.clone_model(model),
        tf_keras.models.model_from_json(model.to_json()),
    ):
        assert type(other) is type(model)
        assert other.transforms == CHAIN
        assert len(other.weights) == len(model.weights)
        assert other.optimizer is None


def test_weights_by_name(tmp_path):
    """HDF5 weights are taken by the names of layers, as in tf_keras."""
    source = tf_keras.Sequential([tf_keras.Input([2]), tf_keras.layers.Dense(1, name="one")])
    source.save_weights(tmp_path / "w.h5")
    target = tf_keras.Sequential(
        [
            tf_keras.Input([2]),
            tf_keras.layers.Dense(2, name="other"),
            tf_keras.layers.Dense(1, name="one"),
        ]
    )
    target.compile("adam", "mse")
    model = ga.make_accumulating(target, 2)
    model.load_weights(tmp_path / "w.h5", by_name=True)
    np.testing.assert_array_equal(model.layers[1].kernel, source.layers[0].kernel)
    with pytest.raises(ValueError, match="Nothing has changed"):
        model.load_weights(tmp_path / "w.h5")


def test_checkpoints_that_are_written_in_the_background(tmp_path):
    """Asynchronous checkpoints hold the window as it was when they were taken."""
    options = tf.train.CheckpointOptions(experimental_enable_async_checkpoint=True)
    model = small()
    checkpoint = tf.train.Checkpoint(model=model)
    paths = []
    for step in range(5):
        model.train_on_batch(X, step * Y)
        paths.append(checkpoint.save(str(tmp_path / "checkpoint"), options))
    checkpoint.sync()
    other = small()
    tf.train.Checkpoint(model=other).restore(paths[-1]).assert_existing_objects_matched()
    assert other.pending_micro_batches == 2
    for each in (model, other):
        each.train_on_batch(X, Y)
    tf.nest.map_structure(np.testing.assert_array_equal, model.get_weights(), other.get_weights())
