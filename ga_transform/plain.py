"""The plain class that stands behind a converted one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ga_transform.training import Accumulating

__all__ = ["as_plain", "class_behind", "plain_class_of"]


def class_behind(converted_class: type) -> type:
    """The class that stands behind the mixin."""
    return converted_class.__mro__[converted_class.__mro__.index(Accumulating) + 1]


def plain_class_of(model: Any) -> type:
    """The class that a model had before it was converted, or has."""
    return class_behind(type(model)) if isinstance(model, Accumulating) else type(model)


@contextlib.contextmanager
def as_plain(model: Any) -> Iterator[None]:
    """Have a converted model be of its own class for a while, for whoever writes that down."""
    converted_class = type(model)
    model.__class__ = plain_class_of(model)
    try:
        yield
    finally:
        model.__class__ = converted_class
