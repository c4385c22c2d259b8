"""Saved models: found, loaded, and written whole or not at all."""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import sys
import tempfile
import traceback
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ga_transform.cli.speech import PROGRAM, REFUSALS, Refusal, refusing

__all__ = ["FORMATS", "REMEDIES", "check_target", "format_of", "load", "own_modules", "save"]

#: By the end of a name, the format in which it is written; any other is a SavedModel's folder.
FORMATS = {".keras": "keras", ".h5": "h5", ".hdf5": "h5"}
#: By what a loader says, what can be done about it.
REMEDIES = {
    "safe_mode": "On the command line that is --unsafe.",
    r"\['optional'\]": "A later tf_keras wrote it: load it where TensorFlow and tf_keras are as new.",
    "No model config": "It holds weights alone: load them into a model that its code has made.",
    "batch_shape": "Keras 3 wrote it: build the model with tf_keras, and save it by that.",
    "Unknown |Could not|of class Layer|class is known": (
        "If a module of yours defines what is missing, name it with --import."
    ),
}
#: Endings of names that promise a file, and under which tf_keras would write a folder.
_MISLEADING = {*FORMATS, ".pb", ".zip"}
#: What tf_keras writes into the folder of a SavedModel.
_PARTS = {
    "assets",
    "assets.extra",
    "fingerprint.pb",
    "keras_metadata.pb",
    "saved_model.pb",
    "variables",
}


@refusing("OUT cannot be looked at", (OSError,))
def check_target(source: Path, target: Path, is_forced: bool) -> Path:
    """The file or folder that is to be written, if it may be.

    Raises:
        Refusal: Of either.
    """
    format_of(source)
    # What a link names is written, and the link stays.
    real_source, real_target = Path(os.path.realpath(source)), Path(os.path.realpath(target))
    if real_target.is_symlink():  # after all of them have been followed
        raise Refusal(f"OUT must not be a link to itself; got {target}. Remove it.")
    if not real_target.parent.is_dir():
        folder = real_target.parent if target.is_symlink() else target.parent
        raise Refusal(f"OUT must be in a folder that exists; got {target}. Make {folder}.")
    if real_target.suffix not in FORMATS:
        _check_folder_name(target, real_target.suffix)
    if real_target in real_source.parents or real_source in real_target.parents:
        raise Refusal(f"OUT must not be in IN, or around it; got {target}. Take another name.")
    if not real_target.exists():
        return real_target
    if not (real_target.is_file() or real_target.is_dir()):
        raise Refusal(
            f"OUT must be new, a file or a folder; got {target}, which is something else. Take "
            "another name."
        )
    if not is_forced:
        which = "is IN" if real_source == real_target else "exists"
        raise Refusal(f"OUT must be new; got {target}, which {which}. --force writes over it.")
    if real_target.is_dir():
        parts = _PARTS if _is_saved_model(real_target) else set()
        others = sorted({path.name for path in real_target.iterdir()} - parts)
        if others:
            raise Refusal(
                "OUT must be new, a file, or a SavedModel to be written over; got "
                f"{target}, a folder that holds {', '.join(others[:3])}. Take another name."
            )
    return real_target


def _check_folder_name(target: Path, suffix: str) -> None:
    """Refuse the name of a SavedModel that is for a file, or that TensorFlow cannot load."""
    if suffix.lower() in _MISLEADING:
        raise Refusal(
            f"OUT must end in {', '.join(FORMATS)} in small letters, or be the name of a "
            f"SavedModel's folder; got {target}. Take another name."
        )
    found = [character for character in "*?[\\" if character in str(target)]
    if found:
        raise Refusal(
            f"OUT must be without {' '.join(found)} where it is a SavedModel's folder, since "
            f"TensorFlow would look for it as for a pattern; got {target}. Take another name."
        )


@refusing("The model cannot be read", (OSError,))
def format_of(path: Path) -> str:
    """The format of a saved model, by what it holds."""
    if path.is_dir():
        if _is_saved_model(path):
            return "SavedModel"
        raise Refusal(f"{path} must be a saved model; got a folder without saved_model.pb.")
    if not path.exists():
        raise Refusal(f"{path} must be a saved model; there is none of this name.")
    if not path.is_file():  # to read a pipe is to wait
        raise Refusal(f"{path} must be a saved model; got neither a file nor a folder.")
    with path.open("rb") as file:
        is_zip = zipfile.is_zipfile(file)
    if is_zip:
        if path.suffix == ".keras":
            return ".keras"
        raise Refusal(f"{path} must be named .keras, if that is what it is. Rename it.")
    with refusing():
        if importlib.import_module("h5py").is_hdf5(path):
            return "HDF5"
    raise Refusal(f"{path} must be a saved model; got a file that is neither .keras nor HDF5.")


def _is_saved_model(path: Path) -> bool:
    return (path / "saved_model.pb").is_file()


def load(path: Path, is_unsafe: bool) -> Any:
    """The model of a file; lambdas, which are code, only if they are trusted, in any format."""
    tf, tf_keras = _import_tensorflow()
    from ga_transform import _keras
    from ga_transform.models import AccumulatingModel

    # What a file that is not whole, or not a model's, is met with.
    broken = (AttributeError, EOFError, LookupError, zipfile.BadZipFile, tf.errors.OpError)
    kinds = (*REFUSALS, *broken)
    with (
        refusing(f"{path} cannot be loaded", kinds, REMEDIES),
        _keras.SafeModeScope(not is_unsafe),
    ):
        model = tf_keras.models.load_model(str(path), safe_mode=not is_unsafe)
    if not isinstance(model, tf_keras.Model):
        what = "a file whose config is not that of a model"
        if path.is_dir():
            what = "a SavedModel of something else, as model.export writes it"
        raise Refusal(
            f"{path} must be a model saved by tf_keras; got {what}. Take what model.save wrote."
        )
    # Layers that a SavedModel's graph stands in for predict; saved again, they are lost.
    unknown = {
        type(e).__name__ for e in _keras.flatten_layers(model) if isinstance(e, _keras.REVIVED)
    }
    if unknown:
        raise Refusal(
            f"{path} must be loaded where its classes are known; got {', '.join(sorted(unknown))}, "
            "not known here. Name the module that registers them with --import; for lambdas, add "
            "--unsafe if you trust the file."
        )
    if path.is_dir() and model._is_compiled and not isinstance(model, AccumulatingModel):
        warnings.warn(
            f"{path}: tf_keras loads a plain SavedModel with a new optimizer, whose updates start "
            "at 0. Save it as .keras or .h5 to keep the optimizer.",
            stacklevel=2,
        )
    return model


def save(model: Any, target: Path, is_forced: bool) -> None:
    """Write beside the place, and take it when all is written.

    Whoever is stopped in between finds there what was there. The exception: a folder takes the
    place of another in two renames, and a process that is killed between them, with no way to put
    the old one back, leaves it beside, as ``.ga-transform-*/old``.
    """
    tf, _ = _import_tensorflow()
    kinds = (*REFUSALS, RuntimeError, tf.errors.OpError)  # h5py raises them, of a full disk too
    with refusing(f"{target} cannot be written", kinds), contextlib.ExitStack() as stack:
        # In a folder of its own, so that whatever a format leaves behind goes with it.
        beside = tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{PROGRAM}-")
        folder = Path(stack.enter_context(beside))
        written = folder / "new" / target.name
        written.parent.mkdir()
        model.save(str(written), save_format=FORMATS.get(target.suffix, "tf"))
        if target.exists() and not is_forced:  # which it did not before
            raise FileExistsError("another process has written it. --force writes over it.")
        _put(written, target, folder / "old")


def _put(written: Path, target: Path, aside: Path) -> None:
    """Put a file or folder in its place, and what is there aside."""
    if target.is_file() and written.is_file():
        shutil.copymode(target, written)
        written.replace(target)
        return
    try:  # folders cannot be replaced in one step
        if target.exists():
            target.rename(aside)
        written.rename(target)
    except BaseException:
        if aside.exists() and not target.exists():
            aside.rename(target)
        raise


def _import_tensorflow() -> tuple[Any, Any]:
    """TensorFlow and tf_keras, without what they write to stderr as they look for devices."""
    if "tensorflow" not in sys.modules:
        # No accelerator is needed, and none is taken from a training that runs.
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
        # Some lines come in spite of it; whoever asks for more than errors gets them all.
        if os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3") in ("2", "3"):
            with _without_stderr():
                importlib.import_module("tensorflow").config.list_physical_devices()
    return importlib.import_module("tensorflow"), importlib.import_module("tf_keras")


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """Have nobody write there, be it C++, for a while."""
    if sys.stderr is None:  # closed; its number may be that of another file by now
        yield
        return
    sys.stderr.flush()
    own = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(own, 2)
        os.close(own)


@contextlib.contextmanager
def own_modules(names: Sequence[str]) -> Iterator[None]:
    """The user's modules, from the current folder too, so that what they register is known."""
    path = list(sys.path)
    if names:
        _import_tensorflow()  # before they do
        sys.path.insert(0, str(Path.cwd()))
    try:
        for name in names:
            _import_own(name)
        yield
    finally:
        sys.path[:] = path


def _import_own(name: str) -> None:
    try:
        importlib.import_module(name)
    except Exception as error:  # whatever the user's own code raises
        text = str(error).strip(" .") or type(error).__name__
        if not isinstance(error, ImportError):
            text = f"{type(error).__name__}: {text}"
        # The line of the module, or of one that it imports, that was being run.
        frames = traceback.extract_tb(error.__traceback__)
        places = [
            f" ({each.filename}, line {each.lineno})" for each in frames if each.name == "<module>"
        ]
        raise Refusal(f"--import {name}: {text}{''.join(places[-1:])}.") from error
