"""Saved models: found, loaded, and written whole or not at all."""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ga_transform.cli.speech import PROGRAM, REFUSALS, Refusal, refusing

__all__ = ["FORMATS", "check_target", "format_of", "load", "own_modules", "save"]

#: By the end of a name, the format in which it is written; any other is a SavedModel's folder.
FORMATS = {".keras": "keras", ".h5": "h5", ".hdf5": "h5"}
#: By what a loader says, what can be done about it.
_REMEDIES = {
    "safe_mode": "On the command line that is --unsafe.",
    "No model config": "It holds weights alone: load them into a model that its code has made.",
    "batch_shape": "Keras 3 wrote it: build the model with tf_keras, and save it by that.",
    "Unknown |Could not|of class Layer|class is known": (
        "If a module of yours defines what is missing, name it with --import."
    ),
}


def check_target(source: Path, target: Path, is_forced: bool) -> Path:
    """The file or folder that is to be written, if it may be.

    Raises:
        Refusal: Of either.
    """
    format_of(source)
    # What a link names is written, and the link stays.
    real_source, real_target = Path(os.path.realpath(source)), Path(os.path.realpath(target))
    if not real_target.parent.is_dir():
        raise Refusal(f"OUT must be in a folder that exists; got {target}. Make {target.parent}.")
    if real_target in real_source.parents or real_source in real_target.parents:
        raise Refusal(f"OUT must not be in IN, or around it; got {target}. Take another name.")
    if not real_target.exists():
        return real_target
    if not is_forced:
        which = "is IN" if real_source == real_target else "exists"
        raise Refusal(f"OUT must be new; got {target}, which {which}. --force writes over it.")
    if real_target.is_dir() and not _is_saved_model(real_target) and any(real_target.iterdir()):
        raise Refusal(
            f"OUT must be new, a file, or a SavedModel to be written over; got {target}, a folder "
            "of other things. Take another name."
        )
    return real_target


def format_of(path: Path) -> str:
    """The format of a saved model, by what it holds."""
    if path.is_dir():
        if _is_saved_model(path):
            return "SavedModel"
        raise Refusal(f"{path} must be a saved model; got a folder without saved_model.pb.")
    if not path.exists():
        raise Refusal(f"{path} must be a saved model; there is none of this name.")
    with refusing():
        if zipfile.is_zipfile(path):
            if path.suffix == ".keras":
                return ".keras"
            raise Refusal(f"{path} must be named .keras, if that is what it is. Rename it.")
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
        refusing(f"{path} cannot be loaded", kinds, _REMEDIES),
        _keras.SafeModeScope(not is_unsafe),
    ):
        model = tf_keras.models.load_model(str(path), safe_mode=not is_unsafe)
    if not isinstance(model, tf_keras.Model):
        raise Refusal(
            f"{path} must be a model saved by tf_keras; got a SavedModel of something else, as "
            "model.export writes it. Take what model.save wrote."
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

    Whoever is stopped in between finds there what was there.
    """
    tf, _ = _import_tensorflow()
    kinds = (*REFUSALS, tf.errors.OpError)
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
        if "TF_CPP_MIN_LOG_LEVEL" not in os.environ:
            os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # some lines come in spite of it
            with _without_stderr():
                importlib.import_module("tensorflow").config.list_physical_devices()
    return importlib.import_module("tensorflow"), importlib.import_module("tf_keras")


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """Have nobody write there, be it C++, for a while."""
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
            with refusing(f"--import {name}", (ImportError,)):
                importlib.import_module(name)
        yield
    finally:
        sys.path[:] = path
