"""Loss scaling for float16: the optimizers that a model is compiled with, wrapped, and the scale.

tf_keras's wrapper multiplies the loss before it is differentiated, and takes the scale off the
gradients at once: what windows store is unscaled, in float32, whatever the scale does meanwhile.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from ga_transform import _keras
from ga_transform.chain import Chain
from ga_transform.specs import Precision

__all__ = [
    "forget_wrapper",
    "hand_on_scaling",
    "has_scaled",
    "is_in_float16",
    "is_scaled",
    "is_wrapped",
    "lower_scale",
    "mark_as_wrapped",
    "scale_losses",
    "undo_scaling",
]

#: The attribute that says whether the wrapper is ours, and goes with the conversion.
_WRAPPED = "_wraps_optimizer"


def is_in_float16(chain: Chain) -> bool:
    """Whether a chain has a model compute in float16."""
    spec = chain.find(Precision)
    return spec is not None and spec.policy == "mixed_float16"


def scale_losses(model: Any, chain: Chain) -> None:
    """Wrap the optimizers that a model is compiled with, but for those that are wrapped."""
    if not (is_in_float16(chain) and model._is_compiled):
        return
    spec: Any = chain.find(Precision)
    wrapped = False

    def wrap(optimizer: Any) -> Any:
        nonlocal wrapped
        if not _keras.is_of_keras(optimizer) or is_scaled(optimizer):
            return optimizer
        wrapped = True
        growth_steps = spec.growth_steps if spec.dynamic else None
        return _keras.BaseLossScaleOptimizer(
            optimizer, spec.dynamic, spec.initial_scale, growth_steps
        )

    optimizer = tf.nest.map_structure(wrap, model.optimizer)
    if wrapped:
        model.optimizer = optimizer
        mark_as_wrapped(model)


def mark_as_wrapped(model: Any) -> None:
    """Note that the wrapper of a model's optimizer is ours, and goes with the conversion."""
    vars(model)[_WRAPPED] = True


def has_scaled(optimizer: Any) -> bool:
    """Whether an optimizer scales its loss, and has been asked to."""
    return is_scaled(optimizer) and optimizer._loss_has_been_scaled


def forget_wrapper(model: Any) -> None:
    """Note that no wrapper of a model's optimizer is ours."""
    vars(model).pop(_WRAPPED, None)


def hand_on_scaling(model: Any, copy: Any) -> None:
    """Have a copy of a model know whose its wrapper is."""
    if is_wrapped(model):
        mark_as_wrapped(copy)


def is_wrapped(model: Any) -> bool:
    """Whether the wrapper of a model's optimizer goes with the conversion."""
    return _WRAPPED in vars(model)


def is_scaled(optimizer: Any) -> bool:
    """Whether an optimizer scales its loss."""
    return isinstance(optimizer, _keras.BaseLossScaleOptimizer)


def undo_scaling(model: Any) -> None:
    """Give a model the optimizers within wrappers, if these are ours."""

    def unwrap(optimizer: Any) -> Any:
        if not is_scaled(optimizer):
            return optimizer
        inner = optimizer.inner_optimizer
        inner._is_wrapped_by_loss_scale_optimizer = False
        _keras.untrack(inner, "loss_scale")  # the wrapper tracks its scale there
        return inner

    if is_wrapped(model):
        forget_wrapper(model)
        model.optimizer = tf.nest.map_structure(unwrap, model.optimizer)
        _keras.replace_in_compile_config(model, model.optimizer)


def lower_scale(optimizer: Any) -> None:
    """Halve a dynamic scale, as after an update that is not finite."""
    if not (is_scaled(optimizer) and optimizer.dynamic):
        return
    state = optimizer._loss_scale
    state.counter.assign(0)
    lower = state.current_loss_scale / state.multiplier
    state.current_loss_scale.assign(tf.maximum(lower, tf.ones_like(lower)))
