"""Weights that cast themselves: float32 variables that a layer in 16 bits reads in 16 bits.

A layer that is made under a 16-bit policy makes its weights so. Here it is done for weights that
there are already: the variable stays the one that optimizers, checkpoints and people know.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tf_keras import layers

from ga_transform import _keras

__all__ = ["fit_weights"]

#: What makes weights that do not cast themselves, because it casts where it computes.
_CASTING = (_keras.BatchNormalizationBase, layers.LayerNormalization, layers.Embedding)


def fit_weights(model: Any, changed: Sequence[Any]) -> None:
    """Have the weights of layers whose policy has changed cast themselves, or stop doing so.

    Args:
        model: Of several layers that share a weight, all hold the same object.
        changed: The layers whose policy has changed.
    """
    fitting: dict[int, Any] = {}
    for layer in changed:
        policy = layer._dtype_policy
        casts = policy.compute_dtype != policy.variable_dtype and not isinstance(layer, _CASTING)
        for weight in (*layer._trainable_weights, *layer._non_trainable_weights):
            fitted = _keras.with_autocast(weight) if casts else _keras.without_autocast(weight)
            if fitted is not weight:
                fitting[id(weight)] = fitted
    if fitting:
        for layer in _keras.flatten_layers(model):
            _replace_weights(layer, fitting)


def _replace_weights(layer: Any, fitting: dict[int, Any]) -> None:
    """Have a layer hold other objects for the same variables, in the same places."""
    for weights in (layer._trainable_weights, layer._non_trainable_weights):
        weights[:] = [fitting.get(id(weight), weight) for weight in weights]
    for name, value in list(vars(layer).items()):
        if id(value) in fitting:
            # Past Keras's own __setattr__, which would change the order of the weights.
            object.__setattr__(layer, name, fitting[id(value)])
    _keras.retrack(layer, fitting)
