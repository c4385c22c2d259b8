"""The command line: saved models converted, looked at and stripped; what is refused changes nothing."""

import errno
import hashlib
import json
import logging
import os
import re
import shlex
import signal
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import tf_keras

import ga_transform as ga
from ga_transform.cli import main
from ga_transform.cli.files import REMEDIES
from ga_transform.cli.speech import Refusal, refusing, said_on_one_line
from ga_transform.models import AccumulatingModel
from ga_transform.optimizer_state import state_of

layers = tf_keras.layers

#: Names of files, and what their formats are called.
FORMATS = {"model.keras": ".keras", "model.h5": "HDF5", "saved": "SavedModel"}
FILES = list(FORMATS)
CHAIN = ga.Chain(ga.Accumulate(2), ga.ClipByAGC(0.5))
OPTIONS = ["--accum-steps", "2", "--agc", "0.5"]
X = np.random.default_rng(0).normal(size=[8, 3]).astype("float32")
Y = X.sum(axis=1, keepdims=True)


def warning(path, how="loads a"):
    """What is said of a plain SavedModel."""
    return (
        f"{path}: tf_keras {how} plain SavedModel with a new optimizer, whose updates start at 0. "
        "Save it as .keras or .h5 to keep the optimizer."
    )


def made(*more):
    model = tf_keras.Sequential([tf_keras.Input([3]), *more, layers.Dense(1)])
    model.compile("adam", "mse")
    return model


def load(path):
    return tf_keras.models.load_model(str(path))


def train(model):
    model.fit(X, Y, batch_size=2, shuffle=False, verbose=0)
    return model


def tree(folder):
    """All that a folder holds, hidden files too: names, permissions and contents."""
    return {
        str(path.relative_to(folder)): (
            path.lstat().st_mode,
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None,
        )
        for path in sorted(Path(folder).rglob("*"))
    }


def assert_same_training(model, other):
    """Weights and all that the optimizers have gathered are equal."""
    for ours, theirs in zip(model.get_weights(), other.get_weights()):
        np.testing.assert_array_equal(ours, theirs)
    states = [[v.numpy() for v in state_of(each.optimizer)] for each in (model, other)]
    assert len(states[0]) == len(states[1])
    for ours, theirs in zip(*states):
        np.testing.assert_array_equal(ours, theirs)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a plain and a converted model, in all formats, in the midst of training.

    Nothing is written into it.
    """
    folder = tmp_path_factory.mktemp("models")
    tf_keras.utils.set_random_seed(3)
    model = train(made())
    accumulating = ga.make_accumulating(model, transforms=CHAIN)
    accumulating.train_on_batch(X[:2], Y[:2])
    for name in sorted(FILES, key="model.h5".__eq__):
        model.save(folder / name)
        if name == "model.h5":  # which holds no window
            accumulating.discard()
        accumulating.save(folder / f"large_{name}")
    before = tree(folder)
    yield folder
    assert tree(folder) == before


# ---- convert and strip -----------------------------------------------------------------------


@pytest.mark.parametrize("target", FILES)
@pytest.mark.parametrize("source", FILES)
def test_convert(files, tmp_path, capsys, source, target):
    """From any format to any, a file is the conversion of the model that was loaded."""
    place = tmp_path / target
    assert main(["convert", str(files / source), str(place), *OPTIONS]) == 0
    said = capsys.readouterr()
    assert said.out == f"{place}: {FORMATS[target]} of Sequential, {CHAIN}\n"
    is_new = source == "saved"
    assert said.err == (f"ga-transform: warning: {warning(files / source)}\n" if is_new else "")
    assert [path.name for path in tmp_path.iterdir()] == [target]
    assert place.is_dir() == (target == "saved")
    model = load(place)
    expected = ga.make_accumulating(load(files / source), transforms=CHAIN)
    assert isinstance(model, AccumulatingModel)
    assert model.transforms == CHAIN
    assert int(model.optimizer.iterations) == (0 if source == "saved" else 4)
    for ours, theirs in zip(model.get_weights(), expected.get_weights()):
        np.testing.assert_array_equal(ours, theirs)
    if source != "saved":  # where tf_keras makes no slots, until it loads them from OUT
        assert_same_training(model, expected)
    assert_same_training(train(model), train(expected))


@pytest.mark.parametrize(("source", "target"), [*zip(FILES, FILES[1:] + FILES[:1])])
def test_strip(files, tmp_path, capsys, source, target):
    """The plain model comes back, as it is loaded where it was never converted."""
    place = tmp_path / target
    assert main(["strip", str(files / f"large_{source}"), str(place)]) == 0
    said = capsys.readouterr()
    assert said.out == f"{place}: {FORMATS[target]} of Sequential, plain\n"
    warned = []
    if source != "model.h5":
        warned.append(
            "strip_accumulating leaves out 1 pending micro-batches of 'sequential'. Call "
            "model.flush() first to apply them."
        )
    if target == "saved":
        warned.append(warning(place, "will load this"))
    assert said.err == "".join(f"ga-transform: warning: {text}\n" for text in warned)
    model = load(place)
    assert type(model) is tf_keras.Sequential
    expected = load(files / target)  # the same weights: the window has made no update
    assert_same_training(train(model), train(expected))


def test_convert_by_a_chain_file(files, tmp_path, capsys):
    """--chain is the chain of a file."""
    chain = ga.Chain(ga.Split(4), ga.Accumulate({0: 1, 5: 2}, "equal"), ga.ClipByGlobalNorm(1.0))
    (tmp_path / "chain.json").write_text(json.dumps(chain.to_config()), "utf-8")
    place = tmp_path / "large.keras"
    options = ["--chain", str(tmp_path / "chain.json")]
    assert main(["convert", str(files / "model.keras"), str(place), *options]) == 0
    assert load(place).transforms == chain


def test_convert_by_all_shorthands(files, tmp_path, capsys):
    """Each shorthand is that of `make_accumulating`."""
    place = tmp_path / "large.keras"
    options = "--accum-steps 0:1,1000:8 --micro-batch-size 4 --agc --precision mixed_bfloat16"
    options += " --batch-norm pooled --remainder carry --whole-batch-loss gathered"
    assert main(["convert", str(files / "model.keras"), str(place), *options.split()]) == 0
    assert load(place).transforms == ga.Chain(
        ga.Precision("mixed_bfloat16"),
        ga.BatchNorm("pooled"),
        ga.Split(4, whole_batch_loss="gathered"),
        ga.Accumulate({0: 1, 1000: 8}, remainder="carry"),
        ga.ClipByAGC(),
    )


# ---- inspect ---------------------------------------------------------------------------------


def test_inspect(files, capsys):
    """A converted model: what it is, and then what `explain` says of it."""
    path = files / "large_model.keras"
    assert main(["inspect", str(path)]) == 0
    assert capsys.readouterr() == (
        f"""\
file                   {path}
format                 .keras
class                  Sequential
name                   sequential
weights                4
compiled               yes
optimizer              Adam
updates                4
converted              yes
chain                  {CHAIN}
pending micro batches  1

{ga.explain(load(path))}
""",
        "",
    )


@pytest.mark.parametrize("name", FILES)
def test_inspect_as_json(files, capsys, name):
    """The same as data, of a plain model too, which is told to be plain."""
    found = []
    for path in (files / name, files / f"large_{name}"):
        assert main(["inspect", str(path), "--json"]) == 0
        said = capsys.readouterr()
        is_new = path == files / "saved"
        assert said.err == (f"ga-transform: warning: {warning(path)}\n" if is_new else "")
        found.append(json.loads(said.out))
    plain, converted = found
    facts = {
        "format": FORMATS[name],
        "class": "Sequential",
        "name": "sequential",
        "weights": 4,
        "compiled": True,
        "optimizer": "Adam",
    }
    assert plain == {
        **facts,
        "file": str(files / name),
        "updates": 0 if name == "saved" else 4,
        "converted": False,
        "chain": None,
        "pending_micro_batches": None,
        "explanation": None,
    }
    explanation = converted.pop("explanation")
    assert converted == {
        **facts,
        "file": str(files / f"large_{name}"),
        "updates": 4,
        "converted": True,
        "chain": CHAIN.to_config(),
        "pending_micro_batches": 0 if name == "model.h5" else 1,
    }
    assert explanation["model"] == "sequential"
    assert explanation["chain"] == CHAIN.to_config()


def test_inspect_a_model_that_is_not_compiled(files, tmp_path, capsys):
    """What it has not got is a dash; its window waits until it is compiled."""
    model = tf_keras.models.load_model(files / "large_model.keras", compile=False)
    model.save(tmp_path / "bare.keras")
    assert main(["inspect", str(tmp_path / "bare.keras")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[-1].strip() for line in lines[5:11]] == [
        "no", "-", "-", "yes", str(CHAIN), "1"
    ]  # fmt: skip


# ---- what is refused ---------------------------------------------------------------------------


@pytest.fixture
def folder(files, tmp_path, monkeypatch):
    """The current folder, with files of all sorts."""
    monkeypatch.chdir(tmp_path)
    plain = (files / "model.keras").read_bytes()
    for name, content in {
        "model.keras": plain,
        "large.keras": (files / "large_model.keras").read_bytes(),
        "cut.keras": plain[: len(plain) // 2],
        "cut.h5": (files / "model.h5").read_bytes()[:5000],
        "named.zip": plain,
        "empty.h5": b"",
        "text.json": b"no JSON",
        "bytes.json": b"\xff\xfe\x80",
        "list.json": b"[]",
        "kind.json": b'{"version": 1, "transforms": [{"kind": "Scales", "version": 1}]}',
        "scale.json": b'{"version": 1, "transforms": [{"kind": "Scale", "version": 1, "factor": 2.0}]}',
    }.items():
        Path(name).write_bytes(content)
    Path("things").mkdir()
    Path("things/notes.txt").write_text("mine", "utf-8")
    Path("kept").mkdir()
    Path("kept/saved_model.pb").write_bytes(b"old")
    Path("kept/notes.txt").write_text("mine", "utf-8")
    os.mkfifo("pipe")
    Path("gone.h5").symlink_to("none/large.h5")
    Path("circle.h5").symlink_to("circle.h5")
    return tmp_path


OUT = "large.h5 --accum-steps 2"
REFUSED = {
    f"convert none.keras {OUT}": "none.keras must be a saved model; there is none of this name.",
    f"convert things {OUT}": ("things must be a saved model; got a folder without saved_model.pb."),
    f"convert cut.keras {OUT}": (
        "cut.keras must be a saved model; got a file that is neither .keras nor HDF5."
    ),
    f"convert empty.h5 {OUT}": (
        "empty.h5 must be a saved model; got a file that is neither .keras nor HDF5."
    ),
    f"convert named.zip {OUT}": "named.zip must be named .keras, if that is what it is. Rename it.",
    f"convert large.keras {OUT}": (
        "make_accumulating.model must be a plain model; got 'sequential', converted already to "
        f"{CHAIN}. Call strip_accumulating first."
    ),
    "strip model.keras plain.h5": (
        "strip_accumulating.model must be a converted model; got Sequential 'sequential'. It is "
        "plain already."
    ),
    "convert model.keras large.keras --accum-steps 2": (
        "OUT must be new; got large.keras, which exists. --force writes over it."
    ),
    "convert model.keras model.keras --accum-steps 2": (
        "OUT must be new; got model.keras, which is IN. --force writes over it."
    ),
    "convert model.keras things --accum-steps 2 --force": (
        "OUT must be new, a file, or a SavedModel to be written over; got things, a folder that "
        "holds notes.txt. Take another name."
    ),
    "convert model.keras kept --accum-steps 2 --force": (
        "OUT must be new, a file, or a SavedModel to be written over; got kept, a folder that "
        "holds notes.txt. Take another name."
    ),
    "convert model.keras pipe --accum-steps 2 --force": (
        "OUT must be new, a file or a folder; got pipe, which is something else. Take another name."
    ),
    f"convert pipe {OUT}": "pipe must be a saved model; got neither a file nor a folder.",
    "convert model.keras circle.h5 --accum-steps 2 --force": (
        "OUT must not be a link to itself; got circle.h5. Remove it."
    ),
    "convert model.keras 'a[b]' --accum-steps 2": (
        "OUT must be without [ where it is a SavedModel's folder, since TensorFlow would look for "
        "it as for a pattern; got a[b]. Take another name."
    ),
    **{
        f"convert model.keras {name} --accum-steps 2": (
            "OUT must end in .keras, .h5, .hdf5 in small letters, or be the name of a SavedModel's "
            f"folder; got {name}. Take another name."
        )
        for name in ("large.KERAS", "large.H5", "large.pb", "large.zip")
    },
    "convert model.keras . --accum-steps 2 --force": (
        "OUT must not be in IN, or around it; got .. Take another name."
    ),
    "convert model.keras none/large.h5 --accum-steps 2": (
        "OUT must be in a folder that exists; got none/large.h5. Make none."
    ),
    "convert model.keras large.h5": (
        "convert must be asked for something to do; got nothing. For example --accum-steps=8."
    ),
    "convert model.keras large.h5 --accum-steps 0": (
        "Accumulate.steps must be an int >= 1; got 0. Use 1 to update on every batch."
    ),
    "convert model.keras large.h5 --remainder drop": (
        "convert must be given --accum-steps with --remainder; got --remainder='drop' alone. Give "
        "--accum-steps too."
    ),
    "convert model.keras large.h5 --chain scale.json --agc": (
        "convert must be given --chain or shorthands, not both; got --chain and --agc. Put all of "
        "it into --chain."
    ),
    "convert model.keras large.h5 --chain none.json": (
        "--chain none.json cannot be read: [Errno 2] No such file or directory: 'none.json'."
    ),
    "convert model.keras large.h5 --chain things": (
        "--chain things cannot be read: [Errno 21] Is a directory: 'things'."
    ),
    "convert model.keras large.h5 --chain bytes.json": (
        "--chain must be a file of JSON; got bytes.json, which is none: 'utf-8' codec can't decode "
        "byte 0xff in position 0: invalid start byte"
    ),
    "convert model.keras large.h5 --chain text.json": (
        "--chain must be a file of JSON; got text.json, which is none: Expecting value: line 1 "
        "column 1 (char 0)"
    ),
    "convert model.keras large.h5 --chain list.json": (
        "Chain.from_config must be given a dict with a list of transforms; got [] (list). Pass "
        "what Chain.to_config returned."
    ),
    "convert model.keras large.h5 --chain kind.json": (
        "Chain.from_config kind must be a registered transform; got 'Scales'. Did you mean 'Scale'?"
    ),
    f"convert model.keras {OUT} --import no_such_module": (
        "--import no_such_module: No module named 'no_such_module'."
    ),
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_refused(folder, capsys, arguments):
    """What cannot be done is said in a line, and nothing changes on disk."""
    before = tree(folder)
    assert main(shlex.split(arguments)) == 1
    assert capsys.readouterr() == ("", f"ga-transform: error: {REFUSED[arguments]}\n")
    assert tree(folder) == before


def test_a_link_into_a_folder_that_is_not_there(folder, capsys):
    """The folder that is to be made is that of what the link names."""
    assert main(["convert", "model.keras", "gone.h5", *OPTIONS]) == 1
    assert capsys.readouterr().err == (
        "ga-transform: error: OUT must be in a folder that exists; got gone.h5. Make "
        f"{os.path.realpath('none')}.\n"
    )


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ("inspect locked", "The model"),
        ("convert locked large.h5 --agc", "The model"),
        ("convert model.keras locked --agc", "OUT"),
    ],
)
def test_what_may_not_be_looked_at(folder, monkeypatch, capsys, arguments, what):
    """A folder that is not the user's is one line, too."""
    is_dir = Path.is_dir

    def refuse(path):
        if path.name == "locked":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return is_dir(path)

    monkeypatch.setattr(Path, "is_dir", refuse)
    Path("locked").mkdir()
    assert main([*arguments.split(), *(["--force"] if what == "OUT" else [])]) == 1
    said = capsys.readouterr().err
    how = "looked at" if what == "OUT" else "read"
    assert said.startswith(f"ga-transform: error: {what} cannot be {how}: [Errno {errno.EACCES}] ")
    assert said.count("\n") == 1


def test_files_that_are_not_whole_or_hold_no_model(folder, files, capsys):
    """Whatever tf_keras meets in them, is one line."""
    train(made()).save_weights("alone.weights.h5")
    made().export("served")
    with zipfile.ZipFile("model.keras") as plain, zipfile.ZipFile("list.keras", "w") as file:
        for name in plain.namelist():
            file.writestr(name, b"[]" if name == "config.json" else plain.read(name))
    with h5py.File("keras3.h5", "w") as file:
        layer = {"class_name": "InputLayer", "config": {"batch_shape": [None, 3]}}
        config = {"class_name": "Sequential", "config": {"name": "of_3", "layers": [layer]}}
        file.attrs["model_config"] = json.dumps(config)
    for kind, cut in (
        ("data", "variables/variables.data-00000-of-00001"),
        ("graph", "saved_model.pb"),
    ):
        for path in (each for each in (files / "saved").rglob("*") if each.is_file()):
            copy = folder / kind / path.relative_to(files / "saved")
            copy.parent.mkdir(parents=True, exist_ok=True)
            content = path.read_bytes()
            copy.write_bytes(content[: len(content) // 2] if copy.match(cut) else content)
    capsys.readouterr()
    before = tree(folder)
    for name, start, end in (
        ("cut.h5", "cut.h5 cannot be loaded: ", "."),
        ("data", "data cannot be loaded: ", "."),
        ("graph", "graph cannot be loaded: ", "."),
        (
            "alone.weights.h5",
            "alone.weights.h5 cannot be loaded: No model config found in the file",
            ". It holds weights alone: load them into a model that its code has made.",
        ),
        (
            "keras3.h5",
            "keras3.h5 cannot be loaded: ",
            ". Keras 3 wrote it: build the model with tf_keras, and save it by that.",
        ),
        (
            "served",
            "served must be a model saved by tf_keras; got a SavedModel of something else",
            ", as model.export writes it. Take what model.save wrote.",
        ),
        (
            "list.keras",
            "list.keras must be a model saved by tf_keras; got a file whose config is not that",
            " of a model. Take what model.save wrote.",
        ),
    ):
        assert main(["inspect", name]) == 1
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith(f"ga-transform: error: {start}")
        assert said.err.endswith(f"{end}\n")
        assert said.err.count("\n") == 1
    assert tree(folder) == before


WRONG = {
    "": "the following arguments are required: COMMAND",
    "inspect": "the following arguments are required: FILE",
    "convert model.keras large.h5 --accum-steps 0:1,0:2": (
        "argument --accum-steps: must be an int, or a schedule update:steps as 0:1,1000:8; got "
        "'0:1,0:2'"
    ),
    "convert model.keras large.h5 --accum-steps many": (
        "argument --accum-steps: must be an int, or a schedule update:steps as 0:1,1000:8; got "
        "'many'"
    ),
    "convert model.keras large.h5 --accum-steps 0:1:2": (
        "argument --accum-steps: must be an int, or a schedule update:steps as 0:1,1000:8; got "
        "'0:1:2'"
    ),
    "convert model.keras large.h5 --micro-batch-size 1.5": (
        "argument --micro-batch-size: invalid int value: '1.5'"
    ),
    "convert --agc model.keras large.h5": (
        "argument --agc: must be a number, or left out; got 'model.keras'. Write --agc after IN "
        "and OUT"
    ),
    "convert '' large.h5 --agc": "argument IN: must be a path; got ''",
    "convert model.keras '' --agc": "argument OUT: must be a path; got ''",
    "inspect model.keras --import ./own.py": (
        "argument --import: must be the name of a module; got './own.py', a path. Name it own, "
        "where its folder is the current one, or on PYTHONPATH"
    ),
    "convert model.keras large.h5 --accum 2": "unrecognized arguments: --accum 2",
}


@pytest.mark.parametrize("arguments", WRONG)
def test_wrong_usage(folder, capsys, arguments):
    """Exit code 2, and one line, which says where help is."""
    before = tree(folder)
    with pytest.raises(SystemExit) as exit_of:
        main(shlex.split(arguments))
    assert exit_of.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"ga-transform: error: {WRONG[arguments]}. See ga-transform ")
    assert said.err.endswith(" --help.\n")
    assert said.err.count("\n") == 1
    assert tree(folder) == before


# ---- writing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["new.keras", "new", "large.keras", "old"])
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left"),
        RuntimeError("unable to extend file"),  # as h5py says it
        KeyboardInterrupt(),
        signal.SIGTERM,
    ],
)
def test_a_save_that_stops_midway(folder, files, monkeypatch, capsys, target, error):
    """OUT is as it was, a file or a folder, new or old, and nothing is left beside it."""
    (folder / "old").mkdir()
    (folder / "old" / "saved_model.pb").write_bytes(b"old")

    def save(model, path, **kwargs):
        Path(path).write_bytes(b"half")
        Path(path).with_name("more").mkdir()
        if isinstance(error, signal.Signals):
            signal.raise_signal(error)
        raise error

    monkeypatch.setattr(AccumulatingModel, "save", save)
    before = tree(folder)
    try:
        code = main(["convert", "model.keras", target, "--accum-steps", "2", "--force"])
    except SystemExit as exit_of:
        code = exit_of.code
    said = capsys.readouterr()
    assert said.out == ""
    if isinstance(error, Exception):
        assert code == 1
        place = os.path.realpath(target)
        kind = "RuntimeError: " if isinstance(error, RuntimeError) else ""
        assert said.err == f"ga-transform: error: {place} cannot be written: {kind}{error}.\n"
    elif isinstance(error, KeyboardInterrupt):
        assert (code, said.err) == (130, "ga-transform: error: interrupted.\n")
    else:
        assert (code, said.err) == (128 + error, "")
        assert signal.getsignal(error) is signal.SIG_DFL
    assert tree(folder) == before


def test_a_signal_that_is_ignored_stays_so(folder, monkeypatch):
    """As nohup has it."""
    seen = []
    monkeypatch.setattr(ga, "explain", lambda model: seen.append(signal.getsignal(signal.SIGHUP)))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert main(["inspect", "large.keras"]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert seen == [signal.SIG_IGN]


def test_a_file_that_another_process_writes_meanwhile(folder, monkeypatch, capsys):
    """OUT that was not there at the start is not written over either."""
    save = AccumulatingModel.save

    def save_late(model, path, **kwargs):
        save(model, path, **kwargs)
        Path("new.keras").write_bytes(b"of another")

    monkeypatch.setattr(AccumulatingModel, "save", save_late)
    before = tree(folder)
    assert main(["convert", "model.keras", "new.keras", "--accum-steps", "2"]) == 1
    assert capsys.readouterr().err == (
        f"ga-transform: error: {os.path.realpath('new.keras')} cannot be written: another process "
        "has written it. --force writes over it.\n"
    )
    assert Path("new.keras").read_bytes() == b"of another"
    Path("new.keras").unlink()
    assert tree(folder) == before


def test_a_folder_that_cannot_take_its_place(folder, monkeypatch, capsys):
    """The old folder, which was put aside, is put back."""
    (folder / "old").mkdir()
    (folder / "old" / "saved_model.pb").write_bytes(b"old")
    rename = Path.rename

    def refuse(path, target):
        if path.parent.name == "new":
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    before = tree(folder)
    assert main(["convert", "model.keras", "old", "--accum-steps", "2", "--force"]) == 1
    assert capsys.readouterr().err == (
        f"ga-transform: error: {os.path.realpath('old')} cannot be written: [Errno {errno.EIO}] "
        "Input/output error.\n"
    )
    assert tree(folder) == before


def test_force(folder, capsys):
    """A file, a folder, a file by a folder and IN itself are written over; the rest stays.

    A link stays one, to what is new; the permissions of a file stay.
    """
    others = {name: each for name, each in tree(folder).items() if name.startswith("things")}
    Path("large.keras").chmod(0o640)
    Path("link.keras").symlink_to("large.keras")
    assert main(["convert", "model.keras", "link.keras", "--agc", "--force"]) == 0
    assert Path("link.keras").is_symlink()
    assert stat.S_IMODE(Path("large.keras").stat().st_mode) == 0o640
    assert load("large.keras").transforms == ga.Chain(ga.ClipByAGC())

    assert main(["convert", "model.keras", "model.keras", "--agc", "0.5", "--force"]) == 0
    assert load("model.keras").transforms == ga.Chain(ga.ClipByAGC(0.5))

    Path("folder").write_bytes(b"a file")
    for source in ("large.keras", "model.keras"):
        assert main(["strip", source, "folder", "--force"]) == 0
        assert type(load("folder")) is tf_keras.Sequential
    left = tree(folder)
    assert others.items() <= left.items()
    assert not [name for name in left if "ga-transform" in name or "partial" in name]


def test_what_nobody_expects_is_not_hidden(folder, monkeypatch):
    """A fault of the program shows where it is."""

    def fail(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr(ga, "make_accumulating", fail)
    with pytest.raises(ZeroDivisionError):
        main(["convert", "model.keras", "large.h5", "--accum-steps", "2"])


# ---- the user's own code -----------------------------------------------------------------------


def test_import(folder, monkeypatch, capsys):
    """A module of the current folder registers what a file needs; without it, the file is refused."""
    Path("own_layers_of_a_user.py").write_text(
        """\
import tf_keras

@tf_keras.utils.register_keras_serializable("test_cli")
class Twice(tf_keras.layers.Layer):
    def call(self, x):
        return 2 * x
""",
        "utf-8",
    )
    path = list(sys.path)
    monkeypatch.syspath_prepend(str(folder))
    import own_layers_of_a_user as module

    model = made(module.Twice())
    places = ["twice.keras", "twice.h5", "twice"]
    for place in places:
        model.save(place)
    del sys.modules["own_layers_of_a_user"]
    names = tf_keras.utils.get_custom_objects()
    del names["test_cli>Twice"]
    monkeypatch.setattr(sys, "path", path)
    for place in places:
        before = tree(folder)
        assert main(["convert", place, "large.h5", "--accum-steps", "2"]) == 1
        said = capsys.readouterr().err
        assert "Twice" in said
        assert "with --import" in said
        assert tree(folder) == before
    for place in places:
        options = ["--import", "json", "--import", "own_layers_of_a_user"]
        assert main(["convert", place, f"large_{place}", "--accum-steps", "2", *options]) == 0
        assert load(f"large_{place}").predict(X, verbose=0).tolist() == pytest.approx(
            model.predict(X, verbose=0), rel=1e-6
        )
    assert sys.path == path
    del names["test_cli>Twice"], sys.modules["own_layers_of_a_user"]


@pytest.mark.parametrize(
    ("code", "text"),
    {
        "\nx = = 1": "SyntaxError: invalid syntax (own_broken.py, line 2)",
        "\n1 / 0": "ZeroDivisionError: division by zero (HERE/own_broken.py, line 2)",
        "import no_such_module": "No module named 'no_such_module' (HERE/own_broken.py, line 1)",
        "import json\njson.loads(5)": (
            "TypeError: the JSON object must be str, bytes or bytearray, not int "
            "(HERE/own_broken.py, line 2)"
        ),
    }.items(),
)
def test_import_of_what_fails(folder, monkeypatch, capsys, code, text):
    """One line says what, and at which line of the user's module."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    Path("own_broken.py").write_text(code, "utf-8")
    assert main(["inspect", "model.keras", "--import", "own_broken"]) == 1
    said = capsys.readouterr()
    text = text.replace("HERE", os.path.realpath("."))
    assert said == ("", f"ga-transform: error: --import own_broken: {text}.\n")


def test_a_model_that_is_not_built(tmp_path, capsys):
    """It has no weights yet; converted, it is built and trains."""
    model = tf_keras.Sequential([layers.Dense(1)])
    model.compile("adam", "mse")
    with pytest.warns(UserWarning, match="has not yet been built"):
        model.save(tmp_path / "late.keras")
    assert main(["inspect", str(tmp_path / "late.keras"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["weights"] == 0
    arguments = [str(tmp_path / "late.keras"), str(tmp_path / "large.keras"), *OPTIONS]
    assert main(["convert", *arguments]) == 0
    assert int(train(load(tmp_path / "large.keras")).optimizer.iterations) == 2


def test_lambdas_run_only_if_trusted(tmp_path, capsys):
    """In any format; a SavedModel's graph would stand in for them, and be lost."""
    model = made(layers.Lambda(lambda x: 2 * x))
    for name in FILES:
        path = tmp_path / name
        model.save(path)
        assert main(["inspect", str(path)]) == 1
        assert "--unsafe" in capsys.readouterr().err
        assert main(["inspect", str(path), "--unsafe"]) == 0
        assert "Sequential" in capsys.readouterr().out


# ---- what is said ------------------------------------------------------------------------------


def test_warnings(files, tmp_path, capsys):
    """Warnings of the library stand on a line each; --quiet leaves them and the report out.

    Not that of `inspect`, which is all that it does.
    """
    made(layers.BatchNormalization(name="norm")).save(tmp_path / "norm.keras")
    arguments = ["convert", str(tmp_path / "norm.keras"), str(tmp_path / "large.keras")]
    assert main([*arguments, "--accum-steps", "2"]) == 0
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("ga-transform: warning: ")
    assert "norm" in said[0]
    assert main([*arguments, "--accum-steps", "2", "--quiet", "--force"]) == 0
    assert capsys.readouterr() == ("", "")
    assert main(["inspect", str(files / "saved"), "--quiet"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("file ")
    assert said.err == ""


def test_nobody_is_told_where_stderr_is_closed(monkeypatch, capsys):
    """What goes wrong is not taken for a report."""
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["inspect", "none.keras"]) == 1
    assert capsys.readouterr().out == ""


def test_a_file_of_a_later_version():
    """TensorFlow 2.15 meets an argument of an input that it does not know."""
    text = (
        "in is no file: Unrecognized keyword arguments: ['optional']. A later tf_keras wrote it: "
    )
    with (
        pytest.raises(Refusal, match=f"^{re.escape(text)}"),
        refusing("in is no file", remedies=REMEDIES),
    ):
        raise ValueError("Unrecognized keyword arguments: ['optional']")


@pytest.mark.parametrize("level", [logging.WARNING, logging.CRITICAL])
def test_a_lost_optimizer_is_told(folder, files, capsys, level):
    """Of what TensorFlow logs, the loss of the optimizer's state is a warning, at any level."""
    logger = logging.getLogger("tensorflow")
    before = logger.level
    logger.setLevel(level)
    Path("model.h5").write_bytes((files / "model.h5").read_bytes())
    with h5py.File("model.h5", "r+") as file:
        group = file["optimizer_weights"]
        name = group.attrs["weight_names"][-1]
        del group[name]
        group[name] = np.zeros([7])
    try:
        assert main(["inspect", "model.h5"]) == 0
        assert logger.level == level
    finally:
        logger.setLevel(before)
    said = capsys.readouterr().err
    assert said.startswith("ga-transform: warning: Error in loading the saved optimizer state.")
    assert said.count("\n") == 1


def test_an_error_that_is_logged(capsys):
    """What TensorFlow logs as an error, with a traceback, is a warning of one line."""
    with said_on_one_line(is_quiet=False):
        logging.getLogger("absl").error("Fingerprint was found,\nbut broken.", exc_info=OSError())
    assert capsys.readouterr().err == (
        "ga-transform: warning: Fingerprint was found, but broken.\n"
    )


def test_help_needs_no_tensorflow(folder):
    """Nor do wrong usage and what is refused at once; help has an example of each command."""
    script = """
import contextlib, io, shlex, sys
from ga_transform.cli import main
out = io.StringIO()
for arguments in sys.argv[1:]:
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        try:
            code = main(shlex.split(arguments))
        except SystemExit as exit_of:
            code = exit_of.code
    print(code, file=sys.stderr)
assert not {"tensorflow", "tf_keras"} & {*sys.modules}
print(out.getvalue())
"""
    codes = {
        "--help": 0,
        "--version": 0,
        "convert --help": 0,
        "inspect --help": 0,
        "strip --help": 0,
    }
    loads = ("convert large.keras", "strip model.keras", "no_such_module")  # to know this
    at_once = [each for each in REFUSED if not any(text in each for text in loads)]
    codes.update({**dict.fromkeys(WRONG, 2), **dict.fromkeys(at_once, 1)})
    done = subprocess.run(
        [sys.executable, "-c", script, *codes], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [int(line) for line in done.stderr.splitlines()] == [*codes.values()]
    for example in (
        f"ga-transform {ga.__version__}\n",
        "ga-transform convert model.keras large.keras --accum-steps 8\n",
        "ga-transform inspect large.keras\n",
        "ga-transform strip large.keras model.keras\n",
    ):
        assert example in done.stdout


def test_from_a_shell(folder):
    """In a process of its own: a report on stdout, and nothing on stderr, of TensorFlow neither.

    The level at which TensorFlow logs makes it no louder.
    """
    removed = ("CUDA_VISIBLE_DEVICES", "TF_CPP_MIN_LOG_LEVEL")
    environment = {name: value for name, value in os.environ.items() if name not in removed}
    module = (
        "import os, sys\nprint('tensorflow' in sys.modules, os.environ['CUDA_VISIBLE_DEVICES'])"
    )
    Path("tells.py").write_text(module, "utf-8")
    command = [sys.executable, "-m", "ga_transform", "convert", "model.keras", "new.keras"]
    command += [*OPTIONS, "--import", "tells"]
    exists = "OUT must be new; got new.keras, which exists. --force writes over it."
    for code, out, err in (
        (0, f"True -1\nnew.keras: .keras of Sequential, {CHAIN}\n", ""),
        (1, "True -1\n", f"ga-transform: error: {exists}\n"),
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert (done.returncode, done.stdout, done.stderr) == (code, out, err)
        environment["TF_CPP_MIN_LOG_LEVEL"] = "3"


def test_a_report_that_is_not_read_to_its_end(folder, monkeypatch, capsys):
    """`head` ends it without a traceback."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", 1) as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(["inspect", "model.keras"]) == 141
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("is_closed", [True, False], ids=["closed", "not to be written"])
def test_a_report_that_cannot_be_written(folder, monkeypatch, capsys, is_closed):
    """That is an error where the report is all; what is saved by then stays saved."""
    text = "stdout must be open for the report; it is closed."
    if not is_closed:
        text = f"The report cannot be written to stdout: {OSError(errno.EBADF, os.strerror(errno.EBADF))}."
    for code, kind, command in (
        (1, "error", ["inspect", "large.keras", "--json"]),
        (1, "error", ["inspect", "large.keras"]),
        (0, "warning", ["convert", "model.keras", "new.keras", *OPTIONS]),
        (0, "warning", ["strip", "large.keras", "new.h5"]),
    ):
        stream = None if is_closed else os.fdopen(os.open("model.keras", os.O_RDONLY), "w")
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(command) == code
        assert capsys.readouterr().err.splitlines()[-1] == f"ga-transform: {kind}: {text}"
        if stream is not None:
            stream.close()
    assert load("new.keras").transforms == CHAIN
    assert type(load("new.h5")) is tf_keras.Sequential
