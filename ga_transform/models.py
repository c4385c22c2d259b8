"""The model classes: a mixin in front of a base, and the chain in their config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ga_transform import _keras
from ga_transform.chain import Chain
from ga_transform.diversion import release
from ga_transform.loss_terms import stop_recording
from ga_transform.training import Accumulating

__all__ = [
    "AccumulatingFunctional",
    "AccumulatingModel",
    "AccumulatingSequential",
    "become_accumulating",
    "become_plain",
    "plain_class_of",
]


class AccumulatingModel(Accumulating):
    """A converted model of any class: `isinstance(model, AccumulatingModel)` tells one."""

    #: Of the base, which stands behind the mixin.
    name: str
    #: A SavedModel whose layers are not registered is refused, where tf_keras would revive it
    #: as a model that cannot accumulate.
    _must_restore_from_config = True

    def get_config(self) -> dict[str, Any]:
        """The config of the base, with the chain."""
        config = super().get_config()  # type: ignore[misc]
        return {**config, "transforms": self.transforms.to_config()}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], custom_objects: Any = None) -> Any:
        """A converted model from a config that `get_config` gave."""
        rest = dict(config)
        chain = Chain.from_config(rest.pop("transforms", None))
        model = super().from_config(rest, custom_objects)  # type: ignore[misc]
        _set_chain(model, chain)
        return model


class AccumulatingFunctional(AccumulatingModel, _keras.Functional):  # type: ignore[misc]
    """A functional model whose updates are made of windows."""


class AccumulatingSequential(AccumulatingModel, _keras.Sequential):  # type: ignore[misc]
    """A Sequential model whose updates are made of windows."""


def become_accumulating(model: Any, chain: Chain) -> None:
    """Convert a model itself: its class changes, its weights and its compile state stay."""
    model.__class__ = _accumulating_class(type(model))
    _set_chain(model, chain)
    model.train_function = None  # what is traced already does not accumulate
    if model._is_compiled:
        model._open_windows()  # so that a checkpoint taken before any step holds a count


def become_plain(model: Any) -> None:
    """Undo `become_accumulating`."""
    release(model)
    stop_recording(model.compiled_loss)
    model.__class__ = plain_class_of(model)
    for name in ("_chain", "_accumulation"):
        if name in vars(model):
            delattr(model, name)
    model.train_function = None


def plain_class_of(model: Any) -> type:
    """The class that a model had before it was converted, or has."""
    if not isinstance(model, AccumulatingModel):
        return type(model)
    return type(model).__mro__[type(model).__mro__.index(Accumulating) + 1]


def _set_chain(model: Any, chain: Chain) -> None:
    # Past Keras's own __setattr__, which looks for layers and variables in what it is given.
    object.__setattr__(model, "_chain", chain)


#: The converted class of each plain one.
_CLASSES: dict[type, type] = {
    _keras.Functional: AccumulatingFunctional,
    _keras.Sequential: AccumulatingSequential,
}


def _accumulating_class(base: type) -> type:
    if base not in _CLASSES:
        namespace = {"__module__": base.__module__, "__doc__": base.__doc__}
        name = f"Accumulating{base.__name__}"
        _CLASSES[base] = type(name, (AccumulatingModel, base), namespace)
    return _CLASSES[base]
