"""The registry of stages: a stage is a spec and a function; here they are joined."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Optional, TypeVar

import tensorflow as tf

from ga_transform.chain import register_kind
from ga_transform.errors import shown, wrong_type
from ga_transform.numerics import Gradient, sum_repeated_rows, widened
from ga_transform.specs import Transform

__all__ = [
    "apply_stages",
    "check_stages",
    "counter_of",
    "register_transform",
]

#: ``(spec, gradients, variables, model) -> gradients``
StageFunction = Callable[[Any, Sequence[Gradient], Sequence[tf.Variable], Any], Sequence[Gradient]]
Check = Callable[[Any, Any], None]
#: ``(spec, before, after, variables, model) -> (clipped, units)``, two scalars
Count = Callable[..., tuple[Any, Any]]
#: ``(place, spec, before, after, variables, model)``
Watch = Callable[..., None]
Function = TypeVar("Function", bound=StageFunction)


class _Stage(NamedTuple):
    function: StageFunction
    check: Optional[Check]
    count_clipped: Optional[Count]


_STAGES: dict[type[Transform], _Stage] = {}


def register_transform(
    spec_class: type[Transform],
    *,
    package: str = "custom",
    check: Optional[Check] = None,
    count_clipped: Optional[Count] = None,
) -> Callable[[Function], Function]:
    """Decorate the function that carries out a transform of your own.

    The function takes ``(spec, gradients, variables, model)`` and returns as many gradients.
    Each gradient is a `tf.Tensor` of its variable's shape or a `tf.IndexedSlices` in which
    no row occurs twice, in float32 or wider; none is None. It is traced into the training
    function: after `Accumulate` it sees the window's mean gradients once an update, before
    it each micro-batch's.

    Args:
        spec_class: A frozen attrs subclass of `Transform`; its fields are its config.
        package: What stands before ``>ClassName`` in a saved chain.
        check: ``check(spec, model)`` is called at conversion, and raises what is wrong.
        count_clipped: ``count_clipped(spec, before, after, variables, model)`` returns how many
            units a clip has changed, and of how many: two scalars, for `AccumulationLog`.

    Raises:
        TypeError: `spec_class` is no frozen attrs subclass of `Transform`.

    Example:
        >>> import attrs, tensorflow as tf, ga_transform as ga
        >>> @attrs.frozen
        ... class Centralize(ga.Transform):
        ...     min_rank: int = 2
        >>> @ga.register_transform(Centralize, package="my_lab")
        ... def centralize(spec, gradients, variables, model):
        ...     return [
        ...         g if g.shape.rank < spec.min_rank or isinstance(g, tf.IndexedSlices)
        ...         else g - tf.reduce_mean(g, axis=list(range(g.shape.rank - 1)), keepdims=True)
        ...         for g in gradients
        ...     ]
        >>> ga.Chain(ga.Accumulate(8), Centralize())
        Chain(Accumulate(steps=8) -> Centralize())
    """
    is_spec = isinstance(spec_class, type) and issubclass(spec_class, Transform)
    # attrs.frozen replaces __setattr__; a subclass that was not decorated has no own fields.
    if not is_spec or "__attrs_attrs__" not in vars(spec_class):
        raise wrong_type(
            "register_transform spec_class",
            "a subclass of ga_transform.Transform made with @attrs.frozen",
            spec_class,
            "Write @attrs.frozen above 'class MyTransform(ga_transform.Transform):'.",
        )

    def register(function: Function) -> Function:
        _STAGES[spec_class] = _Stage(function, check, count_clipped)
        register_kind(spec_class, package)
        return function

    return register


def check_stages(specs: Iterable[Transform], model: Any) -> None:
    """Refuse, before anything is changed, a stage that has no function or does not fit."""
    for spec in specs:
        if type(spec) not in _STAGES:
            raise ValueError(
                f"{type(spec).__name__} must have a function; got none. "
                "Decorate one with ga_transform.register_transform."
            )
        check = _STAGES[type(spec)].check
        if check is not None:
            check(spec, model)


def apply_stages(
    specs: Sequence[Transform],
    gradients: Sequence[Gradient],
    variables: Sequence[tf.Variable],
    model: Any,
    watch: Optional[Watch] = None,
) -> list[Gradient]:
    """Fold the gradients through the stages, in order.

    Args:
        specs, gradients, variables, model: As for the function of a stage.
        watch: Is called after each stage with its place, what it was given and what it made.
    """
    if not specs or not gradients:
        return list(gradients)
    current = [sum_repeated_rows(widened(gradient)) for gradient in gradients]
    for place, spec in enumerate(specs):
        before = current
        current = list(_STAGES[type(spec)].function(spec, before, variables, model))
        if len(current) != len(variables):
            raise ValueError(
                f"{type(spec).__name__} must return a gradient for each of the "
                f"{len(variables)} variables; got {shown(len(current))}. Return them in order."
            )
        if watch is not None:
            watch(place, spec, before, current, variables, model)
    return current


def counter_of(spec: Transform) -> Optional[Count]:
    """What counts the units that a stage has clipped; None where it is no clip that counts."""
    return _STAGES[type(spec)].count_clipped
