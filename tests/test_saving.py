"""A converted model is saved and loaded as SavedModel, HDF5 and .keras."""

import json
import subprocess
import sys

import attrs
import cases
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import ga_transform as ga

FORMATS = {"keras": "model.keras", "h5": "model.h5", "savedmodel": "model"}
CHAIN = ga.Chain(ga.Accumulate(3, remainder="carry"), ga.ClipByAGC(0.5), ga.ClipByGlobalNorm(9.0))


def trained(name):
    case = cases.MODELS[name]()
    case.model.compile("adam", **case.compile, metrics=["mae"] if name == "dense" else None)
    model = ga.make_accumulating(case.model, transforms=CHAIN)
    batches = cases.make_batches(case, [[4, 4, 4]])[0]
    for batch in batches:
        model.train_on_batch(*batch)
    return model, batches


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Each model in each format, with its predictions, loaded by one fresh process."""
    folder = tmp_path_factory.mktemp("files")
    expected = {}
    for name in ("dense", "branches", "tokens"):
        model, batches = trained(name)
        (folder / name).mkdir()
        for file in FORMATS.values():
            model.save(folder / name / file)
            x = batches[0][0]
            expected[f"{name}/{file}"] = (model, batches, model.predict(x, verbose=0))
    script = """
import json, sys, ga_transform
assert "tensorflow" not in sys.modules
import tf_keras
found = {}
for path in sys.argv[1:]:
    model = tf_keras.models.load_model(path)
    found[path] = [type(model).__name__, repr(model.transforms), int(model.optimizer.iterations)]
print(json.dumps(found))
"""
    paths = [str(folder / key) for key in expected]
    done = subprocess.run(
        [sys.executable, "-c", script, *paths], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, expected, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("name", ["dense", "branches", "tokens"])
def test_a_fresh_process_loads_every_format(files, name, format_):
    """Class, chain and (where plain tf_keras keeps it) iterations are back after an import."""
    folder, expected, found = files
    key = f"{name}/{FORMATS[format_]}"
    model, _, _ = expected[key]
    kind, chain, iterations = found[str(folder / key)]
    assert (kind, chain) == (type(model).__name__, repr(CHAIN))
    assert iterations == (0 if format_ == "savedmodel" else 1)


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("name", ["dense", "branches", "tokens"])
def test_a_loaded_model_predicts_and_trains_on(files, name, format_):
    """Predictions are the same, and training goes on in windows."""
    folder, expected, _ = files
    _, batches, predictions = expected[f"{name}/{FORMATS[format_]}"]
    loaded = tf_keras.models.load_model(folder / name / FORMATS[format_])
    assert loaded.transforms == CHAIN
    tf.nest.map_structure(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7),
        loaded.predict(batches[0][0], verbose=0),
        predictions,
    )
    before = int(loaded.optimizer.iterations)
    for batch in batches:
        loaded.train_on_batch(*batch)
    assert (loaded.pending_micro_batches, int(loaded.optimizer.iterations)) == (0, before + 1)


@pytest.mark.parametrize("name", ["dense", "branches"])
def test_a_saved_model_serves(files, name):
    """TensorFlow alone loads it and calls its signature, as that of a plain model."""
    folder, expected, _ = files
    _, batches, predictions = expected[f"{name}/model"]
    served = tf.saved_model.load(str(folder / name / "model"))
    assert list(served.signatures) == ["serving_default"]
    signature = served.signatures["serving_default"]
    x = batches[0][0]
    inputs = x if isinstance(x, dict) else {next(iter(signature.structured_input_signature[1])): x}
    predicted = signature(**{key: tf.constant(value, tf.float32) for key, value in inputs.items()})
    if name == "dense":
        (predicted,) = predicted.values()
    tf.nest.map_structure(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), predicted, predictions
    )


def test_weights_move_between_plain_and_converted(tmp_path):
    """Weight files and lists of weights fit both ways: accumulators are no weights."""
    case = cases.dense()
    case.model.compile("adam", "mse")
    model = ga.make_accumulating(case.model, 3)
    for each in (model, case.model):
        each.train_on_batch(*case.batch(np.random.default_rng(0), 4))
    for one, other in ((model, case.model), (case.model, model)):
        one.set_weights([w + 1 for w in one.get_weights()])
        one.save_weights(tmp_path / "w.weights.h5")
        other.load_weights(tmp_path / "w.weights.h5")
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
    """It goes on with the next step; a flush before that says what it needs."""
    case = cases.dense()
    case.model.compile("adam", "mse")
    batches = cases.make_batches(case, [[4, 3]])[0]
    one, other, third = (ga.make_accumulating(case.model, 2) for _ in range(3))
    fresh = tf.train.Checkpoint(one).save(str(tmp_path / "fresh"))
    one.train_on_batch(*batches[0])
    path = tf.train.Checkpoint(one).save(str(tmp_path / "partial"))
    tf.train.Checkpoint(other).restore(path)
    assert other.pending_micro_batches == 1
    with pytest.raises(RuntimeError, match="flush must follow a training step; got 1 micro-batch"):
        other.flush()
    for model in (one, other):
        model.train_on_batch(*batches[1])
    tf.nest.map_structure(np.testing.assert_array_equal, one.get_weights(), other.get_weights())
    third.train_on_batch(*batches[0])
    tf.train.Checkpoint(third).restore(fresh)
    assert third.pending_micro_batches == 0


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
