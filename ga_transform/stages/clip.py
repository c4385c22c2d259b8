"""Clips by norm, by global norm and by value.

The scale of a clip is ``max_norm / max(norm, max_norm)``: one below the limit, so that a
gradient within it passes unchanged, to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from ga_transform.numerics import Gradient, global_norm, map_values, squared_norm, values_of
from ga_transform.specs import ClipByGlobalNorm, ClipByNorm, ClipByValue
from ga_transform.stages.registry import register_transform

__all__ = ["clip_by_global_norm", "clip_by_norm", "clip_by_value"]


def count_all(
    spec: Any, before: Sequence[Gradient], after: Sequence[Gradient], *_: Any
) -> tuple[Any, Any]:
    """All gradients together are one unit."""
    changed = [tf.reduce_any(_differ(*pair)) for pair in zip(before, after)]
    return tf.cast(tf.reduce_any(changed), tf.int64), 1


def count_gradients(
    spec: Any, before: Sequence[Gradient], after: Sequence[Gradient], *_: Any
) -> tuple[Any, Any]:
    """Each gradient is a unit."""
    changed = [tf.reduce_any(_differ(*pair)) for pair in zip(before, after)]
    return tf.math.count_nonzero(changed), len(changed)


def count_elements(
    spec: Any, before: Sequence[Gradient], after: Sequence[Gradient], *_: Any
) -> tuple[Any, Any]:
    """Each element is a unit."""
    changed = [tf.math.count_nonzero(_differ(*pair)) for pair in zip(before, after)]
    sizes = [tf.size(values_of(gradient), tf.int64) for gradient in before]
    return tf.add_n(changed), tf.add_n(sizes)


@register_transform(ClipByGlobalNorm, count_clipped=count_all)
def clip_by_global_norm(
    spec: ClipByGlobalNorm,
    gradients: Sequence[Gradient],
    variables: Sequence[tf.Variable],
    model: Any,
) -> list[Gradient]:
    """Scale all gradients together so that their joint norm is at most `spec.max_norm`."""
    norm = global_norm(gradients)
    return [_limited(gradient, norm, spec.max_norm) for gradient in gradients]


@register_transform(ClipByNorm, count_clipped=count_gradients)
def clip_by_norm(
    spec: ClipByNorm, gradients: Sequence[Gradient], variables: Sequence[tf.Variable], model: Any
) -> list[Gradient]:
    """Scale each gradient so that its own norm is at most `spec.max_norm`."""
    return [
        _limited(gradient, tf.sqrt(squared_norm(gradient)), spec.max_norm) for gradient in gradients
    ]


@register_transform(ClipByValue, count_clipped=count_elements)
def clip_by_value(
    spec: ClipByValue, gradients: Sequence[Gradient], variables: Sequence[tf.Variable], model: Any
) -> list[Gradient]:
    """Limit each element to [-spec.max_value, spec.max_value]."""
    return [
        map_values(
            lambda values: tf.clip_by_value(values, -spec.max_value, spec.max_value), gradient
        )
        for gradient in gradients
    ]


def _differ(before: Gradient, after: Gradient) -> tf.Tensor:
    """Which elements a clip has changed. Shape: that of the values."""
    return tf.not_equal(values_of(before), values_of(after))


def _limited(gradient: Gradient, norm: tf.Tensor, max_norm: float) -> Gradient:
    limit = max_norm / tf.maximum(norm, max_norm)
    return map_values(lambda values: values * tf.cast(limit, values.dtype), gradient)
