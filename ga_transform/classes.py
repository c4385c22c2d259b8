"""The classes of a converted model: the plain one behind it, and the one that its files name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import tf_keras

from ga_transform import _keras
from ga_transform.training import Accumulating

__all__ = ["as_plain", "as_registered", "class_behind", "plain_class_of"]

#: By a converted class and a kind of file, the class that writes it.
_WRITERS: dict[tuple[type, str], type] = {}


def class_behind(converted_class: type) -> type:
    """The class that stands behind the mixin."""
    return converted_class.__mro__[converted_class.__mro__.index(Accumulating) + 1]


def plain_class_of(model: Any) -> type:
    """The class that a model had before it was converted, or has."""
    return class_behind(type(model)) if isinstance(model, Accumulating) else type(model)


@contextlib.contextmanager
def as_plain(model: Any) -> Iterator[None]:
    """Have a converted model be of its own class for a while, for whoever writes that down."""
    with _of_class(model, plain_class_of(model)):
        yield


@contextlib.contextmanager
def as_registered(model: Any, kind: str) -> Iterator[None]:
    """Have a model be of a class that is called as it is registered, for a file to name it so.

    One registered class stands for all converted classes of users' own, and a file that names it
    is read where those have not been made. `.keras` files name its module, too, which tf_keras
    then imports; HDF5 files hold nothing but a name, which so says what to import.
    """
    converted_class = type(model)
    if (converted_class, kind) not in _WRITERS:
        registered_name = tf_keras.utils.get_registered_name(converted_class)
        name = registered_name if kind == "h5" else registered_name.split(">")[-1]
        writer: Any = type(name, (converted_class,), {"__module__": "ga_transform.models"})
        _keras.register_under(writer, registered_name)
        _WRITERS[converted_class, kind] = writer
    with _of_class(model, _WRITERS[converted_class, kind]):
        yield


@contextlib.contextmanager
def _of_class(model: Any, other: type) -> Iterator[None]:
    own_class = type(model)
    model.__class__ = other
    try:
        yield
    finally:
        model.__class__ = own_class
