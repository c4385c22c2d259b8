"""What files keep: the state of a training beside what tf_keras writes, in each format's way.

| format | where it is | what it is |
|---|---|---|
| checkpoint | the object graph | the windows (`windows.py`); tf_keras keeps the rest |
| SavedModel | an object that the model tracks | windows, and all of the optimizers |
| .keras | the model's assets | windows, and what tf_keras loses of the optimizers |
| HDF5 | the model's config | numbers that tf_keras loses of the optimizers |
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Optional

import tensorflow as tf
import tf_keras

from ga_transform import _keras
from ga_transform.chain import Chain
from ga_transform.classes import as_plain, as_registered
from ga_transform.optimizer_state import beside_lists, is_legacy, state_of
from ga_transform.rewrites import apply_rewrites, build_for_plain
from ga_transform.rewrites.loss_scale import forget_wrapper, scale_losses
from ga_transform.rewrites.rewritten import as_plain as as_plain_layers
from ga_transform.snapshot import Snapshot, put_back, take_snapshot
from ga_transform.windows import Windows

__all__ = ["Persistent"]


class Persistent:
    """Stands in front of a tf_keras model class: its files hold the state of its training."""

    #: Of the base, which stands behind the mixin.
    name: str
    _is_compiled: bool
    _accumulating_chain: Chain
    _open_windows: Callable[[], Windows]

    # ---- after loading ---------------------------------------------------------------------

    @functools.wraps(_keras.Model.compile)
    def compile(self, *args: Any, **kwargs: Any) -> None:  # noqa: D102  (it is that of `wraps`)
        super().compile(*args, **kwargs)  # type: ignore[misc]
        if not kwargs.get("from_serialized", False):
            forget_wrapper(self)
        self._prepare_optimizers()
        # Loaders of HDF5 and SavedModel compile a model when its weights are in place.
        self._resume(kwargs.get("from_serialized", False))

    def compile_from_config(self, config: Any) -> None:
        """As the plain model does, whose `compile` is not overridden."""
        with as_plain(self), as_plain_layers(_keras.flatten_layers(self)):
            self.compile_from_config(config)
        apply_rewrites(self._accumulating_chain, self)  # it is built by now
        if self._is_compiled:
            self._prepare_optimizers()
            self._open_windows()

    def _prepare_optimizers(self) -> None:
        scale_losses(self, self._accumulating_chain)
        build_for_plain(self)

    def _kept_micro_batches(self) -> int:
        """The pending micro-batches of what was read, and waits for `compile`."""
        if "_accumulating_state" in vars(self):
            return Snapshot.from_tracked(self._accumulating_state).layout.pending  # type: ignore[attr-defined]
        return vars(self)["_kept"][0].layout.pending if "_kept" in vars(self) else 0

    def _keep(self, snapshot: Snapshot, listed: Callable[[Any], list[tf.Variable]]) -> None:
        """Keep what was read until the model is compiled."""
        # Past Keras's own __setattr__, which tracks what it is given.
        object.__setattr__(self, "_kept", (snapshot, listed))

    def _resume(self, is_compiled_by_loader: bool) -> None:
        """Open the windows, and restore in them what was read."""
        windows = self._open_windows()
        if "_accumulating_state" in vars(self):
            self._keep(Snapshot.from_tracked(self._accumulating_state), state_of)  # type: ignore[attr-defined]
            self._delete_tracking("_accumulating_state")  # type: ignore[attr-defined]
            del self._accumulating_state  # type: ignore[attr-defined]
        if "_kept" not in vars(self):
            return
        snapshot, listed = vars(self).pop("_kept")
        # Whoever compiles a model by hand trains it anew; but loaders leave a `compile` of the
        # model's own to its user.
        is_own_compile = not _keras.is_keras_own(self, Persistent, "compile")
        fits = (is_compiled_by_loader or is_own_compile) and put_back(
            self, windows, snapshot, listed if is_compiled_by_loader else None
        )
        dropped = snapshot.layout.pending - windows.pending
        if dropped > 0:
            reason = "the model has other optimizers or other weights to train here"
            if not snapshot.layout.windows:
                reason = "the file does not hold its window"
            elif not is_compiled_by_loader:
                reason = "the model was compiled by hand after it was loaded"
            warnings.warn(
                f"{self.name}: what was loaded had {dropped} pending micro-batches, which are "
                f"dropped, because {reason}. Call flush() before saving to apply them.",
                stacklevel=3,
            )
        elif is_compiled_by_loader and not fits:
            warnings.warn(
                f"{self.name}: what was loaded is of other optimizers, or of other weights to "
                "train, than the model has here. They start as tf_keras loads them.",
                stacklevel=3,
            )

    # ---- .keras ----------------------------------------------------------------------------

    def save_assets(self, folder: str) -> None:
        """Write the state of the training beside the weights of a `.keras` file."""
        own_save = getattr(super(), "save_assets", None)
        if own_save is not None:
            own_save(folder)
        if self._is_compiled:
            self._snapshot(_lost_by_keras).write(folder)
        elif "_kept" in vars(self):
            vars(self)["_kept"][0].write(folder)

    def load_assets(self, folder: str) -> None:
        """Read what `save_assets` wrote."""
        own_load = getattr(super(), "load_assets", None)
        if own_load is not None:
            own_load(folder)
        snapshot = Snapshot.read(folder)
        if snapshot is not None:
            self._keep(snapshot, _lost_by_keras)
            if self._is_compiled:
                self._resume(is_compiled_by_loader=True)

    # ---- SavedModel ------------------------------------------------------------------------

    def _trackable_children(self, save_type: str = "checkpoint", **kwargs: Any) -> dict[str, Any]:
        children: dict[str, Any] = super()._trackable_children(save_type, **kwargs)  # type: ignore[misc]
        if save_type == "savedmodel" and children.pop("_accumulation", None) is not None:
            legacy = filter(is_legacy, _keras.optimizers_within(self))
            slots = [variable for optimizer in legacy for variable in state_of(optimizer)]
            children["_accumulating_state"] = self._snapshot(state_of).tracked(copied=slots)
        return children

    # ---- HDF5 ------------------------------------------------------------------------------

    def _config_of_training(self) -> dict[str, Any]:
        """What the config holds of the training: something only where it is written as HDF5."""
        if not (self._is_compiled and "use_legacy_config" in vars(self)):
            return {}
        return {"training": self._snapshot(_lost_numbers, keeps_windows=False).to_config()}

    def _keep_of_config(self, config: Any) -> None:
        """Keep what `_config_of_training` gave, if anything."""
        if config is not None:
            self._keep(Snapshot.from_config(config), _lost_numbers)

    def _snapshot(
        self, listed: Callable[[Any], list[tf.Variable]], keeps_windows: bool = True
    ) -> Snapshot:
        # As they are: whoever saves without the optimizer takes it from the model for a while.
        windows = vars(self).get("_accumulation") or self._open_windows()
        return take_snapshot(self, windows, listed, keeps_windows=keeps_windows)

    # ---- JSON ------------------------------------------------------------------------------

    def _updated_config(self) -> dict[str, Any]:
        config: dict[str, Any] = super()._updated_config()  # type: ignore[misc]
        name = tf_keras.utils.get_registered_name(type(self))
        # Without a module, loaders that know nothing of the class say so; else they are silent.
        return {**config, "module": None, "class_name": name, "registered_name": name}

    # ---- single files ----------------------------------------------------------------------

    @functools.wraps(_keras.Model.save)
    def save(self, *args: Any, **kwargs: Any) -> None:  # noqa: D102
        own_save = super().save  # type: ignore[misc]
        call, kind = self._file_of("save", own_save, args, kwargs)
        if kind is None:
            own_save(*args, **kwargs)
            return
        if kind == "h5":
            self._warn_of_pending("HDF5")
        with _replacing(call.arguments["filepath"]) as path, as_registered(self, kind):
            call.arguments["filepath"] = path
            own_save(*call.args, **call.kwargs)

    @functools.wraps(_keras.Model.save_weights)
    def save_weights(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        own_save = super().save_weights  # type: ignore[misc]
        call, kind = self._file_of("save_weights", own_save, args, kwargs)
        if kind is None:
            return own_save(*args, **kwargs)
        self._warn_of_pending("A file of weights")
        with _replacing(call.arguments["filepath"]) as path:
            call.arguments["filepath"] = path
            return own_save(*call.args, **call.kwargs)

    @functools.wraps(_keras.Model.load_weights)
    def load_weights(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        own_load = super().load_weights  # type: ignore[misc]
        call, kind = self._file_of("load_weights", own_load, args, kwargs)
        if kind is None:
            return own_load(*args, **kwargs)
        optimizers = filter(_keras.is_of_keras, _keras.optimizers_within(self))
        states = [_keras.weights_of(self), *map(state_of, optimizers)]
        before = [(variable, variable.numpy()) for state in states for variable in state]
        try:
            return own_load(*args, **kwargs)
        except FileNotFoundError:
            raise
        except Exception as error:  # whatever the loader meets in a file
            for variable, value in before:
                variable.assign(value)
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{self.name}.load_weights must be given a whole file of weights that fit; got "
                f"{str(call.arguments['filepath'])!r}. Nothing has changed: {reason}"
            ) from error

    def _file_of(
        self, method: str, own_method: Callable[..., Any], args: Any, kwargs: Any
    ) -> tuple[inspect.BoundArguments, Optional[str]]:
        """A call that writes or reads a file, and the kind of the file.

        Kinds are "h5" and "keras"; None stands for folders, files elsewhere than on this machine,
        those that tf_keras asks about before it writes over them, and methods of the model's own.
        """
        call = inspect.signature(own_method).bind(*args, **kwargs)
        path = call.arguments.get("filepath")
        if not _keras.is_keras_own(self, Persistent, method):
            return call, None
        if not isinstance(path, (str, os.PathLike)) or "://" in str(path):
            return call, None
        if not call.arguments.get("overwrite", True):
            return call, None
        suffix = call.arguments.get("save_format") or Path(path).suffix.lstrip(".")
        kinds = {"h5": "h5", "hdf5": "h5", "keras": "keras"}
        return call, kinds.get(suffix)

    def _warn_of_pending(self, what: str) -> None:
        pending = self._open_windows().pending if self._is_compiled else 0
        if pending:
            warnings.warn(
                f"{self.name}: {what} holds no partial window; {pending} pending micro-batches are "
                "left out. Call flush() first to apply them, or save as .keras or a checkpoint.",
                stacklevel=3,
            )


def _lost_by_keras(optimizer: Any) -> list[tf.Variable]:
    """What a `.keras` file does not hold of an optimizer: of a legacy one, anything."""
    return state_of(optimizer) if is_legacy(optimizer) else beside_lists(optimizer)


def _lost_numbers(optimizer: Any) -> list[tf.Variable]:
    """What an HDF5 file does not hold of an optimizer, and can be written as numbers."""
    return [variable for variable in beside_lists(optimizer) if variable.shape.rank == 0]


@contextlib.contextmanager
def _replacing(path: Any) -> Iterator[str]:
    """A file beside another, which takes its place when it is whole.

    Whoever is killed in between finds the file as it was before.
    """
    target = Path(os.path.realpath(path))
    beside = target.with_name(f".partial-{target.name}")
    try:
        yield str(beside)
        if target.exists():
            shutil.copymode(target, beside)
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)
