"""Scale: multiply every gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from ga_transform.numerics import Gradient, map_values
from ga_transform.specs import Scale
from ga_transform.stages.registry import register_transform

__all__ = ["scale"]


@register_transform(Scale)
def scale(
    spec: Scale, gradients: Sequence[Gradient], variables: Sequence[tf.Variable], model: Any
) -> list[Gradient]:
    """Multiply every gradient by `spec.factor`."""
    return [map_values(lambda values: values * spec.factor, gradient) for gradient in gradients]
