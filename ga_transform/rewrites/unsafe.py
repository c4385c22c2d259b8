"""The layers that are not safe in 16 bits, each with its reason.

float16 holds no number above 65,504 and none below 6e-8; bfloat16 holds three decimal digits.
A layer that adds up many numbers, or takes their squares or exponents, needs more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

import tensorflow as tf
import tf_keras
from tf_keras import layers

from ga_transform import _keras

__all__ = ["reason_to_keep"]

_SQUARES = "a sum of squares leaves the range of float16"
_ACTIVATIONS = (tf_keras.activations.softmax, tf.nn.softmax, tf.nn.log_softmax)

_MEANS = (
    layers.GlobalAveragePooling1D,
    layers.GlobalAveragePooling2D,
    layers.GlobalAveragePooling3D,
)
_NORMS = (layers.GroupNormalization, layers.SpectralNormalization, layers.UnitNormalization)
_SOFTMAXES = (layers.Softmax, layers.Attention, layers.AdditiveAttention)

#: Ops on tensors that are as safe as they are in a layer: of each element by itself, or moving
#: elements only.
_SAFE_OPS = frozenset(
    (
        "__operators__.add",
        "__operators__.getitem",
        "concat",
        "expand_dims",
        "identity",
        "math.add",
        "math.maximum",
        "math.minimum",
        "math.multiply",
        "math.negative",
        "math.sigmoid",
        "math.subtract",
        "math.tanh",
        "nn.elu",
        "nn.gelu",
        "nn.leaky_relu",
        "nn.relu",
        "nn.relu6",
        "nn.selu",
        "nn.silu",
        "pad",
        "repeat",
        "reshape",
        "reverse",
        "split",
        "squeeze",
        "stack",
        "tile",
        "transpose",
        "unstack",
    )
)


#: What tells a layer, and why it is left in float32.
_REASONS: list[tuple[Callable[[Any], bool], str]] = [
    (lambda layer: isinstance(layer, _SOFTMAXES), "it divides by a sum of exponents"),
    (
        lambda layer: getattr(layer, "activation", None) in _ACTIVATIONS,
        "its softmax divides by a sum of exponents",
    ),
    (lambda layer: isinstance(layer, _NORMS), _SQUARES),
    (lambda layer: isinstance(layer, layers.Dot) and layer.normalize, _SQUARES),
    (
        lambda layer: isinstance(layer, _MEANS),
        "the sum of all positions leaves the range of float16",
    ),
    (
        lambda layer: (
            isinstance(layer, layers.ActivityRegularization)
            or layer._activity_regularizer is not None
        ),
        "its activity regulariser sums over the whole batch",
    ),
    (_keras.is_preprocessing, "its inputs are raw data, which 16 bits may not hold"),
    (lambda layer: isinstance(layer, layers.Lambda), "what it computes is not known"),
    (
        lambda layer: isinstance(layer, layers.RNN) and layer.stateful,
        "its states are kept in float32 from batch to batch",
    ),
    (
        lambda layer: (
            isinstance(layer, _keras.OpLayer) and getattr(layer, "symbol", None) not in _SAFE_OPS
        ),
        "it is an op of TensorFlow's that is not known to be safe",
    ),
    (
        lambda layer: (
            not layer._autocast and not isinstance(layer, (*_keras.OpLayer, layers.Embedding))
        ),
        "it does not cast its inputs",
    ),
    (
        _keras.weights_in_containers,
        "its weights stand in lists or dicts, where they cannot cast themselves",
    ),
]


def reason_to_keep(layer: Any) -> Optional[str]:
    """Why a layer is left in float32; None where it is safe."""
    return next((reason for is_unsafe, reason in _REASONS if is_unsafe(layer)), None)
