"""The model classes: a mixin in front of a base, and the chain in their config."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import tf_keras

from ga_transform import _keras
from ga_transform.chain import Chain
from ga_transform.classes import as_plain, class_behind, plain_class_of
from ga_transform.diversion import release
from ga_transform.errors import wrong_type
from ga_transform.loss_terms import stop_recording
from ga_transform.neighbours import WRITERS_OF_CLASS
from ga_transform.persistence import Persistent
from ga_transform.repeating import release_generators
from ga_transform.rewrites import apply_rewrites, build_for_plain, undo_rewrites
from ga_transform.rewrites.loss_scale import (
    is_wrapped,
    mark_as_wrapped,
    scale_losses,
    undo_scaling,
)
from ga_transform.rewrites.rewritten import as_plain as as_plain_layers
from ga_transform.training import Accumulating

__all__ = [
    "AccumulatingFunctional",
    "AccumulatingModel",
    "AccumulatingSequential",
    "become_accumulating",
    "become_plain",
    "taken_names",
]

#: What is ours in the config of a converted model.
_KEY = "ga_transform"
#: Methods that people set on the object.
_OWN_METHODS = ("train_step", "fit")
#: What a converted model has beside its own.
_PUBLIC_NAMES = (
    "transforms",
    "pending_micro_batches",
    "skipped_windows",
    "skipped_micro_batches",
    "flush",
    "discard",
)


class AccumulatingModel(Persistent, Accumulating):
    """A converted model of any class: `isinstance(model, AccumulatingModel)` tells one.

    The config of one of the user's own class holds the plain model's, and the chain. One
    registered name stands for all of these, so that a process that has converted nothing yet
    can load them.
    """

    def get_config(self) -> dict[str, Any]:
        """The class and the config of the plain model, with the chain."""
        plain_class = plain_class_of(self)
        with as_plain(self), as_plain_layers([self]):
            config = self.get_config()
        model = {
            "module": plain_class.__module__,
            "class_name": plain_class.__name__,
            "registered_name": tf_keras.utils.get_registered_name(plain_class),
        }
        if isinstance(self, _keras.Functional) and "layers" in config:
            # Loaders that know nothing of this package make a functional model of the layers.
            return {**config, _KEY: {"model": model, **self._config_beside()}}
        return {_KEY: {"model": {**model, "config": config}, **self._config_beside()}}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], custom_objects: Any = None) -> Any:
        """A converted model from a config that `get_config` gave."""
        behind: Any = class_behind(cls)
        if _KEY not in config:  # one of the plain model's own
            return behind.from_config(config)
        rest = dict(config)
        own = _read_own(rest.pop(_KEY))
        inner = {"class_name": "", "module": "", "registered_name": "", **own["model"]}
        with tf_keras.utils.custom_object_scope(custom_objects or {}):
            known = behind if behind.__name__ == inner["class_name"] else _class_in(inner)
            model = known.from_config(dict(inner.get("config", rest)))
        become_accumulating(model, Chain.from_config(own["transforms"]))
        _keep_beside(model, own)
        return model

    def _config_beside(self) -> dict[str, Any]:
        scaling = {"wraps_optimizer": True} if is_wrapped(self) else {}
        chain = self._accumulating_chain.to_config()
        return {"transforms": chain, **scaling, **self._config_of_training()}

    @property
    def _trackable_saved_model_saver(self) -> Any:
        saver = super()._trackable_saved_model_saver  # type: ignore[misc]
        if not isinstance(self, _keras.Functional):
            return saver
        own = saver._python_properties_internal

        def properties() -> Any:
            written = own()
            # A network whose classes are not known is refused at loading, where tf_keras would
            # revive it as one that cannot accumulate. Set on the model itself, this would leave
            # out the functions that serve predictions, too.
            written["must_restore_from_config"] = True
            # What is frozen stands in the config. A loader that sets the model's own flag would
            # set that of every layer.
            written["trainable"] = None if written["trainable"] else False
            return written

        saver._python_properties_internal = properties
        return saver


class _AccumulatingNetwork(AccumulatingModel):
    """A model of layers that tf_keras itself can make anew: their config, with the chain."""

    def get_config(self) -> dict[str, Any]:
        """The config of the base, with the chain."""
        config = super(Accumulating, self).get_config()  # type: ignore[misc]
        return {**config, _KEY: self._config_beside()}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], custom_objects: Any = None) -> Any:
        """A converted model from a config that `get_config` gave."""
        rest = dict(config)
        own = _read_own(rest.pop(_KEY, None))
        chain = Chain.from_config(own["transforms"])
        model = super(Accumulating, cls).from_config(rest, custom_objects)  # type: ignore[misc]
        _set_chain(model, chain)
        apply_rewrites(chain, model)
        _keep_beside(model, own)
        return model


class AccumulatingFunctional(_AccumulatingNetwork, _keras.Functional):  # type: ignore[misc]
    """A functional model whose updates are made of windows."""


class AccumulatingSequential(_AccumulatingNetwork, _keras.Sequential):  # type: ignore[misc]
    """A Sequential model whose updates are made of windows."""


class _OwnClass(AccumulatingModel):
    """A converted model of a class of the user's own."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Nothing: the user's own is for their classes."""


def become_accumulating(model: Any, chain: Chain) -> None:
    """Convert a model itself: its class changes, its weights and its compile state stay."""
    model.__class__ = _accumulating_class(type(model), taken_names(model))
    _set_chain(model, chain)
    apply_rewrites(chain, model)
    scale_losses(model, chain)
    build_for_plain(model)
    for name in _OWN_METHODS:
        if name in vars(model):  # set on the object, where it would hide that of the class
            method = vars(model)[name]
            delattr(model, name)
            object.__setattr__(model, f"_own_{name}", method)
    model.train_function = None  # what is traced already does not accumulate
    _keras.forget_traces(model)
    if model._is_compiled:
        model._open_windows()  # so that a checkpoint taken before any step holds a count


def become_plain(model: Any) -> None:
    """Undo `become_accumulating`."""
    release(model)
    undo_rewrites(model)
    undo_scaling(model)
    stop_recording(model.compiled_loss)
    release_generators(model)
    model.__class__ = plain_class_of(model)
    for name in ("_accumulating_chain", "_kept"):
        vars(model).pop(name, None)
    for name in ("_accumulation", "_accumulating_state"):
        if name in vars(model):
            model._delete_tracking(name)
            delattr(model, name)
    for name in _OWN_METHODS:
        method = vars(model).pop(f"_own_{name}", None)
        if method is not None:
            setattr(model, name, method)
    model.train_function = None
    _keras.forget_traces(model)


def taken_names(model: Any) -> frozenset[str]:
    """The public names of a converted model that a plain one uses itself."""
    missing = object()
    return frozenset(
        name
        for name in _PUBLIC_NAMES
        if inspect.getattr_static(model, name, missing) is not missing
    )


def _read_own(config: Any) -> Mapping[str, Any]:
    """What is ours of a config, checked."""
    parts: dict[str, Any] = {
        "model": Mapping,
        "transforms": Mapping,
        "training": (Mapping, type(None)),
        "wraps_optimizer": bool,
    }
    if isinstance(config, Mapping):
        read = {"model": {}, "training": None, "wraps_optimizer": False, **config}
        if read.keys() == parts.keys() and all(isinstance(read[p], parts[p]) for p in parts):
            return read
    raise wrong_type(
        f"A config's {_KEY!r}",
        "a dict with 'transforms' and what goes with them",
        config,
        "Pass what get_config returned.",
    )


def _keep_beside(model: Any, own: Mapping[str, Any]) -> None:
    """Keep what stands beside the chain in a config, until the model is compiled."""
    model._keep_of_config(own["training"])
    if own["wraps_optimizer"]:
        mark_as_wrapped(model)


def _set_chain(model: Any, chain: Chain) -> None:
    # Past Keras's own __setattr__, which looks for layers and variables in what it is given.
    object.__setattr__(model, "_accumulating_chain", chain)


#: The converted class of each plain one, and of the names that are its own.
_CLASSES: dict[tuple[type, frozenset[str]], type] = {
    (_keras.Functional, frozenset()): AccumulatingFunctional,
    (_keras.Sequential, frozenset()): AccumulatingSequential,
}


def _accumulating_class(base: Any, taken: frozenset[str]) -> type:
    if (base, taken) in _CLASSES:
        return _CLASSES[base, taken]
    namespace: dict[str, Any] = {"__module__": base.__module__, "__doc__": base.__doc__}
    # What is the model's own stays so; None gives way to what is set on the object.
    namespace.update((name, inspect.getattr_static(base, name, None)) for name in taken)
    if base.compile is not _keras.Model.compile:
        namespace["compile"] = _with_arguments_of(base.compile, Persistent.compile)
    writers = [name for name in WRITERS_OF_CLASS if hasattr(base, name)]
    namespace.update((name, _written_as_plain(name)) for name in writers)

    def new(converted_class: type, *args: Any, **kwargs: Any) -> Any:
        # What a converted class makes of new is plain; `make_accumulating` converts it.
        if converted_class is made:
            return base(*args, **kwargs)
        return super(made, converted_class).__new__(converted_class, *args, **kwargs)

    made: Any = type(
        f"Accumulating{base.__name__}", (_OwnClass, base), {**namespace, "__new__": new}
    )
    _keras.register_under(made, tf_keras.utils.get_registered_name(AccumulatingModel))
    _CLASSES[base, taken] = made
    return _CLASSES[base, taken]


def _with_arguments_of(shown: Callable[..., Any], method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that shows the arguments and the docstring of another."""

    @functools.wraps(shown)
    def as_shown(self: Any, *args: Any, **kwargs: Any) -> Any:
        return method(self, *args, **kwargs)

    return as_shown


def _written_as_plain(name: str) -> Callable[..., Any]:
    """A method of a model that writes down the name of its class."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        with as_plain(self):
            return getattr(self, name)(*args, **kwargs)

    return method


def _class_in(config: Mapping[str, Any]) -> Any:
    """The plain class of a config: registered, or found in its module."""
    name = config["class_name"]
    for known in (config["registered_name"], name):
        found = tf_keras.utils.get_registered_object(known)
        if found is not None:
            return found
    with contextlib.suppress(ImportError):
        found = vars(importlib.import_module(config["module"])).get(name)
    if isinstance(found, type) and issubclass(found, _keras.Model):
        return found
    raise ValueError(
        f"A converted model must be loaded where its class is known; got {name!r} of module "
        f"{config['module']!r}, which is not. Pass custom_objects={{{name!r}: {name}}}."
    )
