"""What is left by a training that was killed, and by a file that was cut off or forged."""

import copy
import json
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import saved_models
import tensorflow as tf
import tf_keras
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ga_transform as ga

# ---- killed ------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("way", ["backup", "checkpoints", "files"])
def test_a_killed_training_ends_with_the_same_bits(tmp_path, way):
    """Killed 8 times, in steps, in windows and in saves, and started again until it is done."""
    script = Path(__file__).with_name("crashing.py")
    done = subprocess.run(
        [sys.executable, script, tmp_path, way, "8", "1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "8 True"


@pytest.mark.parametrize("remainder", ["flush", "drop", "carry"])
def test_a_backup_at_the_last_batch_of_an_epoch(tmp_path, remainder):
    """What the end of the epoch would have done is done when training goes on after it."""

    def stop(batch, logs):
        if batch == 4:
            raise RuntimeError

    x, y = np.random.default_rng(0).normal(size=[2, 10, 4]).astype("float32")
    options = {"batch_size": 2, "epochs": 3, "shuffle": False, "verbose": 0}

    def trained(*callbacks):
        tf_keras.utils.set_random_seed(3)
        model = tf_keras.Sequential([tf_keras.Input([4]), tf_keras.layers.Dense(4)])
        model.compile("adam", "mse")
        model = ga.make_accumulating(model, 3, remainder=remainder)
        model.fit(x, y, callbacks=list(callbacks), **options)
        return model

    undisturbed = trained()
    backups = (tf_keras.callbacks.BackupAndRestore(str(tmp_path), save_freq=1) for _ in range(2))
    with pytest.raises(RuntimeError):
        trained(next(backups), tf_keras.callbacks.LambdaCallback(on_train_batch_end=stop))
    restarted = trained(next(backups))
    for ours, other in zip(restarted.get_weights(), undisturbed.get_weights()):
        np.testing.assert_array_equal(ours, other)
    assert restarted.pending_micro_batches == undisturbed.pending_micro_batches
    assert int(restarted.optimizer.iterations) == int(undisturbed.optimizer.iterations)


@pytest.mark.parametrize("file", ["model.keras", "model.h5", "w.weights.h5", "w.h5"])
def test_a_save_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch, file):
    """A file is written beside the one of its name, and takes its place when it is whole."""
    model = saved_models.made("own transform")
    save = model.save_weights if file.startswith("w") else model.save
    save(tmp_path / file)
    before = (tmp_path / file).read_bytes()

    def fail(*args, **kwargs):
        raise RuntimeError

    monkeypatch.setattr(h5py.Group, "create_dataset", fail)  # in the midst of writing
    with pytest.raises(RuntimeError):
        save(tmp_path / file)
    assert (tmp_path / file).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [file]


# ---- cut off -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A model in the midst of a window, in each kind of file."""
    folder = tmp_path_factory.mktemp("whole")
    model = saved_models.train(saved_models.made("own transform"), "own transform", 0, 4)
    model.save(folder / "model.keras")
    model.save(folder / "savedmodel", save_traces=False)
    model.flush()
    model.save(folder / "model.h5")
    model.save_weights(folder / "w.weights.h5")
    model.save_weights(folder / "w.h5")
    return folder


def cut(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


PARTS = [
    "model.keras",
    "model.h5",
    "savedmodel/saved_model.pb",
    "savedmodel/variables/variables.index",
    "savedmodel/variables/variables.data-00000-of-00001",
]


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("part", PARTS)
def test_a_model_that_was_cut_off_is_not_loaded(tmp_path, whole, part, share):
    """Whatever is missing, there is an error, and it is one line."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    cut(tmp_path / part, share)
    with pytest.raises((IndexError, OSError, ValueError, tf.errors.OpError)) as error:
        tf_keras.models.load_model(tmp_path / part.split("/")[0])
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("file", ["w.weights.h5", "w.h5", "model.keras"])
def test_weights_that_were_cut_off_change_nothing(tmp_path, whole, file, share):
    """The error is one line, and the model in memory is as it was."""
    shutil.copy(whole / file, tmp_path)
    cut(tmp_path / file, share)
    assert_not_loaded(tmp_path / file, "must be given a whole file of weights that fit; got")


@pytest.mark.parametrize("file", ["w.weights.h5", "w.h5"])
def test_weights_of_another_model_change_nothing(tmp_path, file):
    """Also where some of the layers fit."""
    other = saved_models.made("sequential")
    other.save_weights(tmp_path / file)
    assert_not_loaded(tmp_path / file, "Nothing has changed: ")


def assert_not_loaded(path, text):
    model = saved_models.train(saved_models.made("own transform"), "own transform", 0, 4)
    before = saved_models.state_of(model, "own transform"), model.get_weights()
    with pytest.raises(ValueError, match=text) as error:
        model.load_weights(str(path))
    assert len(str(error.value).splitlines()) == 1
    assert saved_models.state_of(model, "own transform") == before[0]
    for ours, other in zip(model.get_weights(), before[1]):
        np.testing.assert_array_equal(ours, other)


def test_weights_that_are_not_there():
    """The error is that of the system."""
    with pytest.raises(FileNotFoundError):
        saved_models.made("own transform").load_weights("nowhere.weights.h5")


# ---- forged ------------------------------------------------------------------------------------


def rewritten(path, target, change):
    """A copy of a `.keras` file whose JSON parts have gone through `change`."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith(("config.json", "layout.json")):
                content = json.dumps(change(name, json.loads(content))).encode()
            new.writestr(name, content)


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 99),
    st.floats(),
    st.text(max_size=4),
    st.lists(st.integers(-1, 3), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


def places_in(value, path=()):
    """The places of all values in nested JSON."""
    yield path
    items = enumerate(value) if isinstance(value, list) else getattr(value, "items", list)()
    for key, item in items:
        yield from places_in(item, (*path, key))


def replaced(value, path, junk):
    """A copy with one value replaced."""
    value = copy.deepcopy(value)
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = junk
    return value


@pytest.mark.long
@given(data=st.data())
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_forged_layout_is_refused_or_fits(tmp_path_factory, whole, data):
    """What a file says of the training state is checked: an error of one line, or the same state.

    Another state may be as good as the one that was written: a flag, or a name that nobody reads.
    """
    found = {}

    def note(name, config):
        found[name] = config
        return config

    folder = tmp_path_factory.mktemp("forged")
    rewritten(whole / "model.keras", folder / "same.keras", note)
    (name,) = (name for name in found if name.endswith("layout.json"))
    place = data.draw(st.sampled_from([path for path in places_in(found[name]) if path]))
    junk = data.draw(JUNK)

    def change(part, config):
        return replaced(config, place, junk) if part == name else config

    rewritten(whole / "model.keras", folder / "forged.keras", change)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of micro-batches that are dropped
            model = tf_keras.models.load_model(folder / "forged.keras")
    except ValueError as error:
        assert len(str(error).splitlines()) == 1
        assert "training state must be" in str(error)
    else:
        assert model.pending_micro_batches in (0, 1)
        saved_models.train(model, "own transform", 4, 6)


@pytest.mark.long
@given(data=st.data())
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_forged_chain_is_refused(tmp_path_factory, whole, data):
    """A chain of a file is checked as if it were typed by hand: one line says what is wrong."""
    model = saved_models.made("own transform")
    config = model.get_config()
    places = [path for path in places_in(config["ga_transform"]["transforms"]) if path]
    place = data.draw(st.sampled_from(places))
    own = config["ga_transform"]
    forged = {**own, "transforms": replaced(own["transforms"], place, data.draw(JUNK))}
    try:
        other = type(model).from_config({**config, "ga_transform": forged})
    except (TypeError, ValueError) as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert ga.Chain.from_config(other.transforms.to_config()) == other.transforms


@pytest.mark.parametrize(
    ("forged", "text"),
    [
        (
            {"version": 2, "transforms": []},
            "Chain config version must be an int from 1 to 1; got 2",
        ),
        (
            {"version": 1, "transforms": [{"kind": "os.system", "version": 1}]},
            "a registered transf",
        ),
        ({"version": 1, "transforms": [{"kind": "saved>Halved", "version": 1}]}, "saved>Halve"),
    ],
)
def test_a_file_whose_chain_is_unknown(tmp_path, whole, forged, text):
    """Another version, what is no transform, and one that is not registered are refused."""

    def change(name, config):
        if name == "config.json":
            config["config"]["ga_transform"]["transforms"] = forged
        return config

    rewritten(whole / "model.keras", tmp_path / "model.keras", change)
    with pytest.raises(ValueError, match=text) as error:
        tf_keras.models.load_model(tmp_path / "model.keras")
    assert len(str(error.value).splitlines()) == 1


def test_a_lambda_is_not_run(tmp_path):
    """`safe_mode` holds for converted models, of classes of users' own, too."""
    inputs = tf_keras.Input([4])
    outputs = tf_keras.layers.Lambda(lambda x: x * 2)(tf_keras.layers.Dense(1)(inputs))
    for make in (tf_keras.Model, saved_models.Network):
        model = make(inputs, outputs)
        model.compile("sgd", "mse")
        ga.make_accumulating(model, 2, inplace=True).save(tmp_path / "model.keras")
        with pytest.raises(ValueError, match="safe_mode=False"):
            tf_keras.models.load_model(tmp_path / "model.keras")
        tf_keras.models.load_model(tmp_path / "model.keras", safe_mode=False)
