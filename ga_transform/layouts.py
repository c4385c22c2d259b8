"""Layouts: where the state of a training belongs, in JSON's types.

A layout names optimizers and weights by their places in the model, so that another process can
make the variables anew before it restores their values. What a file says is checked word by word.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Optional, TypeVar, Union

from ga_transform.errors import shown
from ga_transform.loss_terms import MEAN, SUM

__all__ = [
    "Call",
    "OptimizerLayout",
    "PoolLayout",
    "StateLayout",
    "SumLayout",
    "Turn",
    "WindowLayout",
    "not_as_written",
    "plain_call",
]

Item = TypeVar("Item")

#: A call of an optimizer in a step: the functions it stands in, and how many were before it there.
Turn = tuple[Union[str, int], ...]
#: What `apply_gradients` is given beside the gradients: by position, and by name.
Call = tuple[tuple[Any, ...], dict[str, Any]]

_VERSION = 1
#: Parts that the first files of this version did not have.
_LATER = {"is_split", "pools"}
#: What tf_keras's optimizers take by name beside the gradients.
_ARGUMENTS = {"name", "skip_gradients_aggregation", "experimental_aggregate_gradients"}


class SumLayout(NamedTuple):
    """The sum of a variable's gradients."""

    #: Of the variable, among the model's weights.
    position: int
    dtype: str
    is_sparse: bool
    #: Whether no gradient has come so far.
    is_idle: bool

    @classmethod
    def read(cls, config: Any) -> SumLayout:
        """From JSON's types, checked."""
        position, dtype, is_sparse, is_idle = _list(config, _as_it_is, 4)
        if dtype not in ("float32", "float64"):
            raise not_as_written("a sum must be of float32 or float64", dtype)
        return cls(_count(position), dtype, _flag(is_sparse), _flag(is_idle))


class WindowLayout(NamedTuple):
    """A window, with the sums that it holds."""

    #: Among the model's optimizers.
    optimizer: int
    turn: Turn
    #: None where a flush cannot be made before a step has shown how.
    call: Optional[Call]
    #: By kind of loss; none where it holds no micro-batch.
    books: dict[str, list[SumLayout]]
    #: Windows that were skipped, micro-batches that were left out, and those of this window.
    skips: Sequence[int] = (0, 0, 0)

    @classmethod
    def read(cls, config: Any) -> WindowLayout:
        """From JSON's types, checked."""
        # The first files of this version have no skips.
        first = [*_list(config, _as_it_is), [0, 0, 0]][:5]
        optimizer, turn, call, books, skips = _list(first, _as_it_is, 5)
        if not isinstance(books, Mapping) or not set(books) <= {MEAN, SUM}:
            raise not_as_written(f"a window must hold books of kinds {MEAN} and {SUM}", books)
        return cls(
            _count(optimizer),
            tuple(_list(turn, _word_or_count)),
            None if call is None else _call(call),
            {kind: _list(sums, SumLayout.read) for kind, sums in books.items()},
            _list(skips, _count, 3),
        )


class OptimizerLayout(NamedTuple):
    """An optimizer, with the variables that go with it."""

    #: Among the model's optimizers.
    optimizer: int
    class_name: str
    #: The positions of the weights that it has slots for, in its order.
    built_for: list[int]
    #: How many variables.
    variables: int

    @classmethod
    def read(cls, config: Any) -> OptimizerLayout:
        """From JSON's types, checked."""
        optimizer, class_name, built_for, variables = _list(config, _as_it_is, 4)
        if not isinstance(class_name, str):
            raise not_as_written("an optimizer's class must be a name", class_name)
        return cls(_count(optimizer), class_name, _list(built_for, _count), _count(variables))


class PoolLayout(NamedTuple):
    """The pooled statistics of one pass through a batch normalisation layer."""

    #: Among the batch normalisation layers.
    layer: int
    #: How many passes through it are before this in a step.
    turn: int
    #: Whether its variance is the total one.
    pools_between: bool

    @classmethod
    def read(cls, config: Any) -> PoolLayout:
        """From JSON's types, checked."""
        layer, turn, pools_between = _list(config, _as_it_is, 3)
        return cls(_count(layer), _count(turn), _flag(pools_between))


class StateLayout(NamedTuple):
    """The windows and the optimizers of a model."""

    windows: list[WindowLayout]
    #: The positions of the weights that the model trains.
    trained: list[int]
    #: The micro-batches of the fullest window, be it written or not.
    pending: int
    optimizers: Sequence[OptimizerLayout] = ()
    #: Whether batches were split, so that micro-batches and batches were counted apart.
    is_split: bool = False
    #: What batch normalisation has found in the micro-batches that are pending.
    pools: Sequence[PoolLayout] = ()

    def to_config(self) -> dict[str, Any]:
        """In JSON's types, with a version."""
        return {"version": _VERSION, **self._asdict()}

    @classmethod
    def from_config(cls, config: Any) -> StateLayout:
        """From JSON's types.

        Raises:
            ValueError: It is not what `to_config` returns, or of a later version.
        """
        parts = {"version", *cls._fields}
        if not isinstance(config, Mapping) or not parts - _LATER <= set(config) <= parts:
            raise not_as_written("its parts are " + ", ".join(("version", *cls._fields)), config)
        version = config["version"]
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise not_as_written(f"its version is an int from 1 to {_VERSION}", version)
        if version > _VERSION:
            raise ValueError(
                f"A saved training state must be of version {_VERSION} at most; got {version}. "
                "Load it with the later ga_transform that wrote it."
            )
        return cls(
            _list(config["windows"], WindowLayout.read),
            _list(config["trained"], _count),
            _count(config["pending"]),
            _list(config["optimizers"], OptimizerLayout.read),
            _flag(config.get("is_split", False)),
            _list(config.get("pools", []), PoolLayout.read),
        )


def not_as_written(rule: str, value: object) -> ValueError:
    """What is read is no training state, or not a whole one."""
    return ValueError(
        f"A saved training state must be as it was written: {rule}; got {shown(value)}. Save the "
        "model again, or load another copy of the file."
    )


def _list(value: Any, read: Callable[[Any], Item], length: Optional[int] = None) -> list[Item]:
    if not isinstance(value, (list, tuple)) or length not in (None, len(value)):
        raise not_as_written(
            "a list" if length is None else f"a list of {length} is expected", value
        )
    return [read(item) for item in value]


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise not_as_written("an int >= 0 is expected", value)
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise not_as_written("true or false is expected", value)
    return value


def _word_or_count(value: Any) -> Union[str, int]:
    return value if isinstance(value, str) else _count(value)


def _as_it_is(value: Any) -> Any:
    return value


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def _call(value: Any) -> Call:
    args, kwargs = _list(value, _as_it_is, 2)
    if not isinstance(kwargs, Mapping) or not set(kwargs) <= _ARGUMENTS:
        raise not_as_written(f"arguments are {', '.join(sorted(_ARGUMENTS))}", kwargs)
    for item in (*_list(args, _as_it_is), *kwargs.values()):
        if not _is_plain(item):
            raise not_as_written("arguments must be words and numbers", item)
    return tuple(args), dict(kwargs)


def plain_call(args: Any, kwargs: Any) -> Optional[Call]:
    """The arguments of a call, if they are such that a file can hold them."""
    is_plain = set(kwargs) <= _ARGUMENTS and all(map(_is_plain, (*args, *kwargs.values())))
    return (tuple(args), dict(kwargs)) if is_plain else None
