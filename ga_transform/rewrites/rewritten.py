"""A layer that is rewritten: another class stands before its own, and its config stays the plain one.

So whatever reads configs (files, `clone_model`) makes the plain model of them, which the chain
rewrites anew, and the way back is known at every moment.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import tf_keras

from ga_transform import _keras

__all__ = [
    "Rewritten",
    "as_plain",
    "restore",
    "set_policy",
    "stand_before",
]

#: By what stands before and by the class behind, the class of both.
_CLASSES: dict[tuple[type, type], type] = {}
#: The attribute that holds the policy which a layer was made with, where it has another now.
_PLAIN_POLICY = "_plain_policy"
#: What tf_keras calls a class by in its files.
_NAMES = ("__module__", "__doc__", "__qualname__", "_keras_api_names", "_keras_api_names_v1")


class Rewritten:
    """Stands before the class of a layer."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Nothing: that of the class behind is for whoever derives from it."""

    def get_config(self) -> Any:
        """The config of the plain layer."""
        with as_plain([self]):
            return self.get_config()

    @classmethod
    def from_config(cls, *args: Any, **kwargs: Any) -> Any:
        """A plain layer."""
        return _plain_class(cls).from_config(*args, **kwargs)


def stand_before(mixin: type[Rewritten], layer: Any) -> None:
    """Put a class before that of a layer, if it does not stand there already."""
    own: Any = type(layer)
    if issubclass(own, mixin):
        return
    if (mixin, own) not in _CLASSES:
        names = {name: vars(own)[name] for name in _NAMES if name in vars(own)}
        made = type(own.__name__, (mixin, own), names)
        # Files name the class behind.
        _keras.register_under(made, tf_keras.utils.get_registered_name(own))
        _CLASSES[mixin, own] = made
    layer.__class__ = _CLASSES[mixin, own]


def set_policy(layer: Any, policy: Any) -> None:
    """Have a layer compute in another precision, and remember in which it did."""
    vars(layer).setdefault(_PLAIN_POLICY, layer._dtype_policy)
    layer._set_dtype_policy(policy)


def restore(layer: Any) -> None:
    """Make a layer what it was."""
    if _PLAIN_POLICY in vars(layer):
        layer._set_dtype_policy(vars(layer).pop(_PLAIN_POLICY))
    if isinstance(layer, Rewritten):
        layer.__class__ = _plain_class(type(layer))


@contextlib.contextmanager
def as_plain(layers: Iterable[Any]) -> Iterator[None]:
    """Have layers be what they were for a while, for whoever writes that down."""
    before = [
        (layer, type(layer), layer._dtype_policy, vars(layer).get(_PLAIN_POLICY))
        for layer in layers
    ]
    try:
        for layer, *_ in before:
            restore(layer)
        yield
    finally:
        for layer, own_class, policy, plain_policy in before:
            layer.__class__ = own_class
            if plain_policy is not None:
                layer._set_dtype_policy(policy)
                vars(layer)[_PLAIN_POLICY] = plain_policy


def _plain_class(own: type) -> Any:
    """The class of a layer, without what stands before it."""
    made = set(_CLASSES.values())
    return next(each for each in own.__mro__ if each not in made and not _is_mixin(each))


def _is_mixin(each: type) -> bool:
    return issubclass(each, Rewritten) and not issubclass(each, _keras.Layer)
