"""The specs: what is to be done, as frozen values that print, compare and serialise.

A spec holds no tensor and no behaviour. It checks its fields when it is made, so that a
spec that exists is a spec that is right. This module does not import TensorFlow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Union

import attrs

from ga_transform import fields
from ga_transform.errors import wrong_value

__all__ = [
    "Accumulate",
    "BatchNorm",
    "ClipByAGC",
    "ClipByGlobalNorm",
    "ClipByNorm",
    "ClipByValue",
    "Precision",
    "Scale",
    "Split",
    "Transform",
]


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
    """Rewrite: compute in 16 bits, or back in 32; weights stay float32.

    The layers that end the model stay in float32, and so do those that are not safe in 16 bits.
    With float16, gradients pass through a scaled loss, or the small ones would become zero.

    Args:
        policy: "mixed_float16", "mixed_bfloat16" or "float32".
        initial_scale: The loss scale that float16 starts with, > 0.
        dynamic: Whether the loss scale adapts: it halves where an update is not finite.
        growth_steps: Finite updates after which a dynamic scale doubles, >= 1.
        keep: Names or globs of layers to leave as they are, with all that is in them.

    Raises:
        ValueError, TypeError: A field breaks its rule.

    Source: Micikevicius et al., "Mixed Precision Training", 2018.

    Example:
        >>> import ga_transform as ga
        >>> print(ga.Precision("mixed_bfloat16", keep=("head_*",)))
        Precision(policy='mixed_bfloat16', keep=('head_*',))
    """

    role: ClassVar[str] = "rewrite"
    repeatable: ClassVar[bool] = False

    policy: str = attrs.field(validator=fields.one_of("mixed_float16", "mixed_bfloat16", "float32"))
    initial_scale: float = attrs.field(
        default=2.0**15,
        converter=fields.to_float,
        validator=fields.positive("The default is 2**15."),
    )
    dynamic: bool = attrs.field(default=True, validator=fields.flag)
    growth_steps: int = attrs.field(
        default=2000, converter=fields.to_int, validator=fields.count("The default is 2000.")
    )
    keep: tuple[str, ...] = attrs.field(
        default=(), converter=fields.to_names, validator=fields.names
    )


@attrs.frozen
class BatchNorm(Transform):
    """Rewrite: what batch normalisation does in a window.

    In training it normalises each micro-batch by its own statistics, whatever is asked for here
    ("freeze" by none): it couples rows, so no accumulation equals the large batch. What can be
    chosen is what becomes of the moving statistics, by which the model predicts.

    Args:
        mode: "keep" moves them with each micro-batch, as tf_keras does: k times as fast as with
            the large batch. "momentum" moves them once an update, towards an average of the
            micro-batches' statistics: as if momentum were taken to the power 1 / steps. "pooled"
            moves them once an update, towards the mean and the total variance (within and between
            micro-batches) of all rows of the window: the statistics of the large batch. "freeze"
            normalises by the moving statistics, which rest.
        trainable: Whether gamma and beta are trained; False goes with "freeze" only.

    Raises:
        ValueError, TypeError: A field breaks its rule.

    Source: Ioffe and Szegedy, "Batch Normalization", 2015; the merging of means and variances is
    that of Chan, Golub and LeVeque, 1983.

    Example:
        >>> import ga_transform as ga
        >>> print(ga.BatchNorm("pooled"))
        BatchNorm(mode='pooled')
    """

    role: ClassVar[str] = "rewrite"
    repeatable: ClassVar[bool] = False

    mode: str = attrs.field(validator=fields.one_of("keep", "momentum", "pooled", "freeze"))
    trainable: bool = attrs.field(default=True, validator=fields.flag)

    def __attrs_post_init__(self) -> None:
        if not self.trainable and self.mode != "freeze":
            raise wrong_value(
                "BatchNorm.trainable",
                "True unless mode is 'freeze'",
                self.trainable,
                "To train neither gamma nor beta, write BatchNorm('freeze', trainable=False).",
            )


@attrs.frozen
class Split(Transform):
    """Cut every batch into micro-batches inside the graph; one batch stays one update.

    Args:
        micro_batch_size: Rows a slice, an int >= 1. The last slice of a batch may have fewer.
        whole_batch_loss: True takes the loss on the outputs of all slices together, so that it
            may couple the rows of a batch: each slice is passed through the model a second time,
            to pull the gradient of its outputs back (Gao et al. 2021, gradient caching).
            "gathered" takes it on the outputs of all replicas.

    Raises:
        ValueError, TypeError: A field breaks its rule.

    Example:
        >>> import ga_transform as ga
        >>> print(ga.Split(32), ga.Split(32, whole_batch_loss=True))
        Split(micro_batch_size=32) Split(micro_batch_size=32, whole_batch_loss=True)
    """

    role: ClassVar[str] = "window"
    repeatable: ClassVar[bool] = False

    micro_batch_size: int = attrs.field(
        converter=fields.to_int,
        validator=fields.count("It is the number of rows that fit in memory."),
    )
    whole_batch_loss: Union[bool, str] = attrs.field(
        default=False, validator=fields.flag_or("gathered")
    )


@attrs.frozen
class Accumulate(Transform):
    """Sum the gradients of `steps` micro-batches, then update once with their mean.

    Args:
        steps: Micro-batches an update, an int >= 1; or a schedule ``{update: steps}``, as
            ``{0: 1, 1000: 8}``, whose keys count updates (``optimizer.iterations``).
        weighting: "exact" weighs each micro-batch by what its mean loss divided by (the
            elements of the loss, or the valid ones); "equal" by one; a function of the
            batch, as `train_step` receives it, by the count that it returns. "sum" adds them
            up and divides by nothing, for a loss of the model's own that is a sum.
        remainder: What becomes of a partial window at the end of an epoch: "flush" applies
            it with its own weights, "carry" keeps it, "drop" discards it.
        on_nonfinite: What a gradient that is not finite (NaN, infinite) costs: "window" skips the
            update of its window, which is not counted; "micro_batch" leaves that micro-batch out,
            and the window is the mean of the others.

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

    steps: Union[int, Mapping[int, int]] = attrs.field(
        converter=fields.to_steps, validator=fields.steps, metadata={"decode": fields.decode_steps}
    )
    weighting: Union[str, Callable[[Any], Any]] = attrs.field(
        default="exact",
        validator=fields.weighting,
        metadata={"encode": fields.encode_weighting, "decode": fields.decode_weighting},
    )
    remainder: str = attrs.field(default="flush", validator=fields.one_of("flush", "carry", "drop"))
    on_nonfinite: str = attrs.field(
        default="window", validator=fields.one_of("window", "micro_batch")
    )


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
        converter=fields.to_float,
        validator=fields.number("a finite number", lambda _: True, "Use 1.0 to change nothing."),
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
        default=0.01, converter=fields.to_float, validator=fields.positive("The paper's is 0.01.")
    )
    eps: float = attrs.field(
        default=1e-3, converter=fields.to_float, validator=fields.positive("The paper's is 1e-3.")
    )
    exclude_head: bool = attrs.field(default=True, validator=fields.flag)
    exclude: tuple[str, ...] = attrs.field(
        default=(), converter=fields.to_names, validator=fields.names
    )
    axes: Mapping[str, tuple[int, ...]] = attrs.field(
        factory=fields.FrozenDict, converter=fields.to_axes, validator=fields.axes
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
        converter=fields.to_float, validator=fields.positive("Leave the clip out to clip nothing.")
    )


@attrs.frozen
class ClipByNorm(Transform):
    """Scale each variable's gradient so that its L2 norm is at most `max_norm`.

    Args:
        max_norm: > 0.
    """

    max_norm: float = attrs.field(
        converter=fields.to_float, validator=fields.positive("Leave the clip out to clip nothing.")
    )


@attrs.frozen
class ClipByValue(Transform):
    """Limit each element of each gradient to [-max_value, max_value].

    Args:
        max_value: > 0.
    """

    max_value: float = attrs.field(
        converter=fields.to_float, validator=fields.positive("Leave the clip out to clip nothing.")
    )
