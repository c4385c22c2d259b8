"""The fields of specs: what they may be, in words, and how they become JSON and back.

Converters (`to_...`) bring a right value into its one form and leave a wrong one alone;
checks then refuse it, naming owner, rule, value and remedy. No TensorFlow in this module.
"""

from __future__ import annotations

import contextlib
import math
import numbers
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

import attrs

from ga_transform.errors import did_you_mean, shown, wrong_type, wrong_value

__all__ = [
    "FrozenDict",
    "axes",
    "count",
    "decode_steps",
    "decode_weighting",
    "encode",
    "encode_weighting",
    "flag",
    "flag_or",
    "names",
    "number",
    "one_of",
    "positive",
    "steps",
    "to_axes",
    "to_float",
    "to_int",
    "to_names",
    "to_steps",
    "weighting",
]

Check = Callable[[Any, "attrs.Attribute[Any]", Any], None]


class FrozenDict(dict[Any, Any]):
    """A dict that can be hashed and not be changed: what a spec needs of a mapping."""

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise TypeError("a spec cannot be changed; use attrs.evolve to make another")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[Any, ...]:
        return (FrozenDict, (dict(self),))


# ---- converters and checks -------------------------------------------------------------------


def _owner(spec: object, field: attrs.Attribute[Any]) -> str:
    return f"{type(spec).__name__}.{field.name}"


def to_int(value: Any) -> Any:
    """NumPy integers become ints; whatever is no integer is left for the validator."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        return value
    return operator.index(value)


def to_float(value: Any) -> Any:
    """Ints and NumPy floats become floats; the rest is left for the validator."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    try:
        return float(value)
    except OverflowError:  # an int beyond the range of floats
        return value


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def count(remedy: str) -> Check:
    """An int of at least one."""

    def check(spec: object, field: attrs.Attribute[Any], value: object) -> None:
        check_count(_owner(spec, field), value, remedy)

    return check


def check_count(owner: str, value: object, remedy: str) -> None:
    """Refuse what is no int of at least one."""
    if not _is_count(value):
        raise wrong_type(owner, "an int >= 1", value, _count_of(value) or remedy)
    if value < 1:  # type: ignore[operator]
        raise wrong_value(owner, "an int >= 1", value, remedy)


def _count_of(value: object) -> str:
    """A remedy for a count that is written as a float or a string; "" for what is no count."""
    if isinstance(value, (float, str)):
        with contextlib.suppress(ValueError):
            number = float(value)
            if number >= 1 and number.is_integer():
                return f"Write {number:.0f}."
    return ""


def number(rule: str, holds: Callable[[float], bool], remedy: str) -> Check:
    """A finite float for which `holds` is true; `rule` says so in words."""

    def check(spec: object, field: attrs.Attribute[Any], value: object) -> None:
        if not isinstance(value, float):
            raise wrong_type(_owner(spec, field), rule, value, remedy)
        if not (math.isfinite(value) and holds(value)):
            raise wrong_value(_owner(spec, field), rule, value, remedy)

    return check


def positive(remedy: str) -> Check:
    """A finite float above zero."""
    return number("a finite number > 0", lambda value: value > 0, remedy)


def one_of(*choices: str) -> Check:
    """One of a few words."""
    rule = "one of " + ", ".join(repr(choice) for choice in choices)

    def check(spec: object, field: attrs.Attribute[Any], value: object) -> None:
        remedy = f"The default is {field.default!r}."
        if field.default is attrs.NOTHING:
            remedy = f"For example {choices[0]!r}."
        if not isinstance(value, str):
            name = getattr(value, "name", None)
            if name in choices:
                remedy = f"Pass its name, {name!r}."
            raise wrong_type(_owner(spec, field), rule, value, remedy)
        if value not in choices:
            remedy = did_you_mean(value, choices, otherwise=remedy)
            raise wrong_value(_owner(spec, field), rule, value, remedy)

    return check


def flag(spec: object, field: attrs.Attribute[Any], value: object) -> None:
    """True or False, and nothing that only counts as either."""
    if not isinstance(value, bool):
        raise wrong_type(
            _owner(spec, field), "True or False", value, f"The default is {field.default}."
        )


def flag_or(word: str) -> Check:
    """True, False, or a word that says more than True."""

    def check(spec: object, field: attrs.Attribute[Any], value: object) -> None:
        if isinstance(value, bool) or value == word:
            return
        refuse = wrong_value if isinstance(value, str) else wrong_type
        rule = f"True, False or {word!r}"
        raise refuse(_owner(spec, field), rule, value, f"The default is {field.default}.")

    return check


def to_names(value: Any) -> Any:
    """One name or a list of names becomes a tuple of names."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, Iterable) else value


def names(spec: object, field: attrs.Attribute[Any], value: object) -> None:
    """Names or globs."""
    if not isinstance(value, tuple) or not all(isinstance(name, str) for name in value):
        raise wrong_type(
            _owner(spec, field),
            "a tuple of names or globs",
            value,
            "Write ('head',) for one, or ('block_*',) for all that match.",
        )


def to_steps(value: Any) -> Any:
    """A count, or a schedule of counts by updates."""
    if isinstance(value, Mapping):
        return FrozenDict({to_int(key): to_int(steps) for key, steps in value.items()})
    return to_int(value)


_STEPS_REMEDY = "Use 1 to update on every batch."


def steps(spec: object, field: attrs.Attribute[Any], value: object) -> None:
    """A count of at least one, or a schedule of such that starts at update 0."""
    if not isinstance(value, FrozenDict):
        count(_STEPS_REMEDY)(spec, field, value)
        return
    rule = "a schedule {update: steps} that starts at update 0"
    remedy = "For example {0: 1, 1000: 8}: 1 batch an update at first, 8 from update 1000 on."
    owner = _owner(spec, field)
    if not all(_is_count(number) for item in value.items() for number in item):
        raise wrong_type(owner, rule, dict(value), remedy)
    if 0 not in value or min(value) < 0 or min(value.values()) < 1:
        raise wrong_value(owner, rule, dict(value), remedy)


def weighting(spec: object, field: attrs.Attribute[Any], value: object) -> None:
    """A known word, or a function."""
    if callable(value):
        return
    rule = "'exact', 'equal', 'sum' or a function of the batch"
    remedy = "'exact' weighs each micro-batch by what its mean loss divided by."
    if not isinstance(value, str):
        raise wrong_type(_owner(spec, field), rule, value, remedy)
    if value not in ("exact", "equal", "sum"):
        raise wrong_value(_owner(spec, field), rule, value, remedy)


def to_axes(value: Any) -> Any:
    """A mapping of names to tuples of axes."""
    if not isinstance(value, Mapping):
        return value
    return FrozenDict(
        {name: tuple(map(to_int, to_names(axes))) if isinstance(axes, Iterable) else axes
         for name, axes in value.items()}
    )  # fmt: skip


def axes(spec: object, field: attrs.Attribute[Any], value: object) -> None:
    """Axes by name; whether a variable has them is seen when there is a model."""
    right = isinstance(value, FrozenDict) and all(
        isinstance(name, str) and isinstance(axes, tuple) and all(map(_is_count, axes))
        for name, axes in value.items()
    )
    if not right:
        raise wrong_type(
            _owner(spec, field),
            "a mapping of names or globs to the axes a norm is taken over",
            dict(value) if isinstance(value, FrozenDict) else value,
            "For example {'embedding/*': (1,)}; () makes every element a unit.",
        )


# ---- to and from JSON: generated from the fields ----------------------------------------


def encode(value: Any) -> Any:
    """A field's value in JSON's types. Int keys become strings, tuples become lists."""
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [encode(item) for item in value]
    return value


def encode_weighting(value: Any) -> Any:
    """A weighting in JSON: a function by the name it is registered under."""
    if not callable(value):
        return value
    # A function that is registered was registered with tf_keras, which is then loaded.
    import tf_keras

    # A callable object has no name to be registered under.
    name = tf_keras.utils.get_registered_name(value) if hasattr(value, "__name__") else ""
    if tf_keras.utils.get_registered_object(name) is not value:
        raise ValueError(
            f"Accumulate.weighting must be registered to be saved; got {shown(value)}. "
            "Decorate it with tf_keras.utils.register_keras_serializable()."
        )
    return {"registered": name}


def decode_weighting(value: Any) -> Any:
    """A weighting from JSON; only what is registered can be named."""
    if not isinstance(value, Mapping):
        return value
    import tf_keras

    name = value.get("registered")
    function = tf_keras.utils.get_registered_object(name) if isinstance(name, str) else None
    if function is None:
        raise wrong_value(
            "Accumulate.weighting",
            "a function that is registered here",
            name,
            "Import the module that registers it before loading.",
        )
    return function


def decode_steps(value: Any) -> Any:
    """JSON's keys are strings: digits become ints, the rest is left for the validator."""
    if not isinstance(value, Mapping):
        return value
    return {int(key) if str(key).isdecimal() else key: steps for key, steps in value.items()}
