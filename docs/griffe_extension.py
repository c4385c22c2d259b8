"""What griffe does not read out of this source by itself: attrs classes, `Example:` and `#:`."""  # noqa: INP001  (mkdocs loads this file by its path)

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any

import griffe

_NORMAL = griffe.ParameterKind.positional_or_keyword


class OfThisPackage(griffe.Extension):
    """Give attrs classes the arguments that their fields stand for, and docstrings their form."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Bring docstrings into the form that is read: `Examples:`, arguments' names on one line."""
        if obj.docstring is not None:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            text = re.sub(r"^( +(?:\w+, )+\w+,)\n +", r"\1 ", text, flags=re.MULTILINE)
            obj.docstring.value = text

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        """Add the `__init__` that attrs will make; or, of results, say what their fields are."""
        if not any(str(each.value).startswith("attrs.frozen") for each in cls.decorators):
            return
        fields = [each for each in cls.attributes.values() if _is_field(each)]
        if cls.docstring is None or "Args:" in cls.docstring.value or not fields:
            cls.set_member("__init__", _init_of(cls, fields))
        else:
            cls.docstring.value += "\n\nAttributes:\n" + "\n".join(_told(cls))


def _init_of(cls: griffe.Class, fields: list[griffe.Attribute]) -> griffe.Function:
    parameters = [griffe.Parameter("self", kind=_NORMAL)]
    for each in fields:
        default = _default_of(each)
        annotation = each.annotation
        parameters.append(
            griffe.Parameter(each.name, annotation=annotation, kind=_NORMAL, default=default)
        )
    return griffe.Function("__init__", parameters=griffe.Parameters(*parameters), parent=cls)


def _told(cls: griffe.Class) -> Iterator[str]:
    """For each field and property, a line of an `Attributes:` section."""
    for each in cls.attributes.values():
        if not each.is_public or each.lineno is None:
            continue
        if each.docstring is not None:
            text = each.docstring.value.splitlines()[0]
        else:
            above = each.module.lines_collection[each.module.filepath][: each.lineno - 1]
            lines = itertools.takewhile(_is_told, map(str.strip, reversed(above)))
            text = " ".join(line[2:].strip() for line in reversed([*lines]))
        yield f"    {each.name} ({each.annotation}): {text or f'The {each.name}.'}"


def _is_told(line: str) -> bool:
    return line.startswith("#:")


def _is_field(attribute: griffe.Attribute) -> bool:
    # What is annotated as a ClassVar is an attribute of the class only.
    return attribute.annotation is not None and "instance-attribute" in attribute.labels


def _default_of(attribute: griffe.Attribute) -> Any:
    """The default that is written in `attrs.field(...)`, or as a plain value."""
    value = attribute.value
    if not isinstance(value, griffe.ExprCall):
        return value
    given = {
        argument.name: argument.value
        for argument in value.arguments
        if isinstance(argument, griffe.ExprKeyword)
    }
    return "{}" if "factory" in given else given.get("default")
