"""The specs: what is to be done, as frozen values that print, compare and serialise.

A spec holds no tensor and no behaviour. It checks its fields when it is made, so that a
spec that exists is a spec that is right. This module does not import TensorFlow.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, NoReturn, Union

import attrs

from ga_transform.errors import shown, wrong_type, wrong_value

__all__ = [
    "Accumulate",
    "BatchNorm",
    "ClipByAGC",
    "ClipByGlobalNorm",
    "ClipByNorm",
    "ClipByValue",
    "FrozenDict",
    "Precision",
    "Scale",
    "Split",
    "Transform",
]

Schedule = Mapping[int, int]


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


# ---- field checks: each names its owner, the rule, the value and the remedy -------------


def _owner(spec: object, field: attrs.Attribute[Any]) -> str:
    return f"{type(spec).__name__}.{field.name}"


def _to_int(value: Any) -> Any:
    """NumPy integers become ints; whatever is no integer is left for the validator."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        return value
    return operator.index(value)


def _to_float(value: Any) -> Any:
    """Ints and NumPy floats become floats; the rest is left for the validator."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    try:
        return float(value)
    except OverflowError:  # an int beyond the range of floats
        return value


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _count(remedy: str) -> Callable[[Any, attrs.Attribute[Any], Any], None]:
    """An int of at least one."""

    def check(spec: object, field: attrs.Attribute[Any], value: object) -> None:
        if not _is_count(value):
            raise wrong_type(_owner(spec, field), "an int >= 1", value, remedy)
        if value < 1:  # type: ignore[operator]
            raise wrong_value(_owner(spec, field), "an int >= 1", value, remedy)

    return check


def _number(
    rule: str, holds: Callable[[float], bool], remedy: str
) -> Callable[[Any, attrs.Attribute[Any], Any], None]:
    """A finite float for which `holds` is true; `rule` says so in words."""

    def check(spec: object, field: attrs.Attribute[Any], value: object) -> None:
        if not isinstance(value, float):
            raise wrong_type(_owner(spec, field), rule, value, remedy)
        if not (math.isfinite(value) and holds(value)):
            raise wrong_value(_owner(spec, field), rule, value, remedy)

    return check


def _positive(remedy: str) -> Callable[[Any, attrs.Attribute[Any], Any], None]:
    return _number("a finite number > 0", lambda value: value > 0, remedy)


def _one_of(*choices: str) -> Callable[[Any, attrs.Attribute[Any], Any], None]:
    rule = "one of " + ", ".join(repr(choice) for choice in choices)

    def check(spec: object, field: attrs.Attribute[Any], value: object) -> None:
        remedy = f"The default is {field.default!r}."
        if field.default is attrs.NOTHING:
            remedy = f"For example {choices[0]!r}."
        if not isinstance(value, str):
            raise wrong_type(_owner(spec, field), rule, value, remedy)
        if value not in choices:
            raise wrong_value(_owner(spec, field), rule, value, remedy)

    return check


def _flag(spec: object, field: attrs.Attribute[Any], value: object) -> None:
    if not isinstance(value, bool):
        raise wrong_type(
            _owner(spec, field), "True or False", value, f"The default is {field.default}."
        )


def _to_names(value: Any) -> Any:
    """One name or a list of names becomes a tuple of names."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, Iterable) else value


def _names(spec: object, field: attrs.Attribute[Any], value: object) -> None:
    if not isinstance(value, tuple) or not all(isinstance(name, str) for name in value):
        raise wrong_type(
            _owner(spec, field),
            "a tuple of names or globs",
            value,
            "Write ('head',) for one layer or ('*/bias:0',) for a glob on variable paths.",
        )


def _to_steps(value: Any) -> Any:
    if isinstance(value, Mapping):
        return FrozenDict({_to_int(key): _to_int(steps) for key, steps in value.items()})
    return _to_int(value)


_STEPS_REMEDY = "Use 1 to update on every batch."


def _steps(spec: object, field: attrs.Attribute[Any], value: object) -> None:
    if not isinstance(value, FrozenDict):
        _count(_STEPS_REMEDY)(spec, field, value)
        return
    rule = "a schedule {update: steps} that starts at update 0"
    remedy = "For example {0: 1, 1000: 8}: 1 batch an update at first, 8 from update 1000 on."
    owner = _owner(spec, field)
    if not all(_is_count(number) for item in value.items() for number in item):
        raise wrong_type(owner, rule, dict(value), remedy)
    if 0 not in value or min(value) < 0 or min(value.values()) < 1:
        raise wrong_value(owner, rule, dict(value), remedy)


def _weighting(spec: object, field: attrs.Attribute[Any], value: object) -> None:
    if callable(value):
        return
    rule = "'exact', 'equal' or a function of the batch"
    remedy = "'exact' weighs each micro-batch by what its mean loss divided by."
    if not isinstance(value, str):
        raise wrong_type(_owner(spec, field), rule, value, remedy)
    if value not in ("exact", "equal"):
        raise wrong_value(_owner(spec, field), rule, value, remedy)


def _to_axes(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return FrozenDict(
        {name: tuple(map(_to_int, _to_names(axes))) if isinstance(axes, Iterable) else axes
         for name, axes in value.items()}
    )  # fmt: skip


def _axes(spec: object, field: attrs.Attribute[Any], value: object) -> None:
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


def _encode(value: Any) -> Any:
    """A field's value in JSON's types. Int keys become strings, tuples become lists."""
    if isinstance(value, Mapping):
        return {str(key): _encode(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_encode(item) for item in value]
    return value


def _encode_weighting(value: Any) -> Any:
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


def _decode_weighting(value: Any) -> Any:
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


def _decode_steps(value: Any) -> Any:
    """JSON's keys are strings: digits become ints, the rest is left for the validator."""
    if not isinstance(value, Mapping):
        return value
    return {int(key) if str(key).isdecimal() else key: steps for key, steps in value.items()}


@attrs.frozen
class Transform:
    """The base of every spec, and of a user's own.

    A subclass is a frozen attrs class; its fields, and nothing else, are its config.

    Example:
        >>> import attrs, ga_transform as ga
        >>> @attrs.frozen
        ... class SignOnly(ga.Transform):
        ...     scale: float = 1.0
        >>> SignOnly(scale=0.5)
        SignOnly(scale=0.5)
    """

    #: "rewrite": of the model, at conversion. "window": fills one. "stage": of gradients.
    role: ClassVar[str] = "stage"
    #: Whether a chain may hold more than one.
    repeatable: ClassVar[bool] = True
    #: The version of the fields in a config; raised when their meaning changes.
    version: ClassVar[int] = 1

    def __str__(self) -> str:
        """What the spec requires, and what differs from its defaults."""
        shown_fields = []
        for field in attrs.fields(type(self)):
            value = getattr(self, field.name)
            default = field.default
            if isinstance(default, attrs.Factory):  # type: ignore[arg-type]
                default = default.factory(self) if default.takes_self else default.factory()
            if default is attrs.NOTHING or value != default:
                text = getattr(value, "__name__", None) if callable(value) else None
                shown_fields.append(f"{field.name}={text or repr(value)}")
        return f"{type(self).__name__}({', '.join(shown_fields)})"


@attrs.frozen
class Precision(Transform):
    """Rewrite: compute in 16 bits (or back in 32), weights stay float32.

    Args:
        policy: "mixed_float16", "mixed_bfloat16" or "float32".
        initial_scale: The loss scale float16 starts with.
        dynamic: Whether the loss scale adapts.
        growth_steps: Finite updates after which a dynamic scale doubles.
    """

    role: ClassVar[str] = "rewrite"
    repeatable: ClassVar[bool] = False

    policy: str = attrs.field(validator=_one_of("mixed_float16", "mixed_bfloat16", "float32"))
    initial_scale: float = attrs.field(
        default=2.0**15, converter=_to_float, validator=_positive("The default is 2**15.")
    )
    dynamic: bool = attrs.field(default=True, validator=_flag)
    growth_steps: int = attrs.field(
        default=2000, converter=_to_int, validator=_count("The default is 2000.")
    )


@attrs.frozen
class BatchNorm(Transform):
    """Rewrite: what batch normalisation does in a window.

    Args:
        mode: "keep", "momentum", "pooled" or "freeze".
    """

    role: ClassVar[str] = "rewrite"
    repeatable: ClassVar[bool] = False

    mode: str = attrs.field(validator=_one_of("keep", "momentum", "pooled", "freeze"))


@attrs.frozen
class Split(Transform):
    """Cut every batch into micro-batches inside the graph.

    Args:
        micro_batch_size: Rows a slice, an int >= 1.
        whole_batch_loss: Take the loss on the outputs of all slices together.
    """

    role: ClassVar[str] = "window"
    repeatable: ClassVar[bool] = False

    micro_batch_size: int = attrs.field(
        converter=_to_int, validator=_count("It is the number of rows that fit in memory.")
    )
    whole_batch_loss: bool = attrs.field(default=False, validator=_flag)


@attrs.frozen
class Accumulate(Transform):
    """Sum the gradients of `steps` micro-batches, then update once with their mean.

    Args:
        steps: Micro-batches an update, an int >= 1; or a schedule ``{update: steps}``, as
            ``{0: 1, 1000: 8}``, whose keys count updates (``optimizer.iterations``).
        weighting: "exact" weighs each micro-batch by what its mean loss divided by (the
            elements of the loss, or the valid ones); "equal" by one; a function of the
            batch, as `train_step` receives it, by the count that it returns.
        remainder: What becomes of a partial window at the end of an epoch: "flush" applies
            it with its own weights, "carry" keeps it, "drop" discards it.
        on_nonfinite: "window" treats a gradient that is not finite as the optimizer would
            on the large batch; "micro_batch" leaves that micro-batch out.

    Raises:
        ValueError, TypeError: A field breaks its rule.

    Example:
        >>> import ga_transform as ga
        >>> ga.Accumulate(8, remainder="carry")
        Accumulate(steps=8, weighting='exact', remainder='carry', on_nonfinite='window')
        >>> print(ga.Accumulate(8, remainder="carry"))
        Accumulate(steps=8, remainder='carry')
    """

    role: ClassVar[str] = "window"
    repeatable: ClassVar[bool] = False

    steps: Union[int, Schedule] = attrs.field(
        converter=_to_steps, validator=_steps, metadata={"decode": _decode_steps}
    )
    weighting: Union[str, Callable[[Any], Any]] = attrs.field(
        default="exact",
        validator=_weighting,
        metadata={"encode": _encode_weighting, "decode": _decode_weighting},
    )
    remainder: str = attrs.field(default="flush", validator=_one_of("flush", "carry", "drop"))
    on_nonfinite: str = attrs.field(default="window", validator=_one_of("window", "micro_batch"))


@attrs.frozen
class Scale(Transform):
    """Multiply every gradient.

    Args:
        factor: A finite number.

    Example:
        >>> import ga_transform as ga
        >>> ga.Scale(0.5)
        Scale(factor=0.5)
    """

    factor: float = attrs.field(
        converter=_to_float,
        validator=_number("a finite number", lambda _: True, "Use 1.0 to change nothing."),
    )


@attrs.frozen
class ClipByAGC(Transform):
    """Adaptive gradient clipping: each unit's gradient is kept in proportion to its weights.

    For each unit (a row of outputs) i: where ``||G_i||`` is above
    ``limit = clip_factor * max(||W_i||, eps)``, it becomes
    ``G_i * limit / max(||G_i||, 1e-6)``. What a unit is, is a matter of the layer.

    Args:
        clip_factor: The largest ratio of gradient norm to weight norm, > 0.
        eps: The smallest weight norm that is reckoned with, > 0; it lets zero weights move.
        exclude_head: Leave out the kernel of the final linear layer, as the paper does.
        exclude: Names or globs of layers or variable paths to leave out.
        axes: Names or globs of variable paths to the axes their norms are taken over, where
            the layer's own are not wanted.

    Source: Brock, De, Smith and Simonyan, "High-Performance Large-Scale Image Recognition
    Without Normalization", 2021.

    Example:
        >>> import ga_transform as ga
        >>> print(ga.ClipByAGC(0.02))
        ClipByAGC(clip_factor=0.02)
    """

    clip_factor: float = attrs.field(
        default=0.01, converter=_to_float, validator=_positive("The paper's is 0.01.")
    )
    eps: float = attrs.field(
        default=1e-3, converter=_to_float, validator=_positive("The paper's is 1e-3.")
    )
    exclude_head: bool = attrs.field(default=True, validator=_flag)
    exclude: tuple[str, ...] = attrs.field(default=(), converter=_to_names, validator=_names)
    axes: Mapping[str, tuple[int, ...]] = attrs.field(
        factory=FrozenDict, converter=_to_axes, validator=_axes
    )


@attrs.frozen
class ClipByGlobalNorm(Transform):
    """Scale all gradients together so that their joint L2 norm is at most `max_norm`.

    Args:
        max_norm: > 0.

    Source: Pascanu, Mikolov and Bengio, "On the difficulty of training recurrent neural
    networks", 2013.
    """

    max_norm: float = attrs.field(
        converter=_to_float, validator=_positive("Leave the clip out to clip nothing.")
    )


@attrs.frozen
class ClipByNorm(Transform):
    """Scale each variable's gradient so that its L2 norm is at most `max_norm`.

    Args:
        max_norm: > 0.
    """

    max_norm: float = attrs.field(
        converter=_to_float, validator=_positive("Leave the clip out to clip nothing.")
    )


@attrs.frozen
class ClipByValue(Transform):
    """Limit each element of each gradient to [-max_value, max_value].

    Args:
        max_value: > 0.
    """

    max_value: float = attrs.field(
        converter=_to_float, validator=_positive("Leave the clip out to clip nothing.")
    )
