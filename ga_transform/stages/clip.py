"""Clips by norm, by global norm and by value.

The scale of a clip is ``max_norm / max(norm, max_norm)``: one below the limit, so that a
gradient within it passes unchanged, to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from ga_transform.numerics import Gradient, global_norm, map_values, squared_norm
from ga_transform.specs import ClipByGlobalNorm, ClipByNorm, ClipByValue
from ga_transform.stages.registry import register_transform

__all__ = ["clip_by_global_norm", "clip_by_norm", "clip_by_value"]


@register_transform(ClipByGlobalNorm)
def clip_by_global_norm(
    spec: ClipByGlobalNorm,
    gradients: Sequence[Gradient],
    variables: Sequence[tf.Variable],
    model: Any,
) -> list[Gradient]:
    """Scale all gradients together so that their joint norm is at most `spec.max_norm`."""
    norm = global_norm(gradients)
    return [_limited(gradient, norm, spec.max_norm) for gradient in gradients]


@register_transform(ClipByNorm)
def clip_by_norm(
    spec: ClipByNorm, gradients: Sequence[Gradient], variables: Sequence[tf.Variable], model: Any
) -> list[Gradient]:
    """Scale each gradient so that its own norm is at most `spec.max_norm`."""
    return [
        _limited(gradient, tf.sqrt(squared_norm(gradient)), spec.max_norm) for gradient in gradients
    ]


@register_transform(ClipByValue)
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


def _limited(gradient: Gradient, norm: tf.Tensor, max_norm: float) -> Gradient:
    limit = max_norm / tf.maximum(norm, max_norm)
    return map_values(lambda values: values * tf.cast(limit, values.dtype), gradient)
