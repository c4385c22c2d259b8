"""The state of an optimizer, new, legacy or wrapped for loss scaling, as variables in one order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Optional

import tensorflow as tf
import tf_keras

from ga_transform import _keras
from ga_transform.errors import REMEDY_OF_COPY as REMEDY

__all__ = [
    "beside_lists",
    "build_for",
    "copy_optimizer_state",
    "is_legacy",
    "iterations_of",
    "keys_built_for",
    "mend_wrapper",
    "positions_built_for",
    "state_of",
    "updates_of",
]


def state_of(optimizer: Any) -> list[tf.Variable]:
    """All that an optimizer has gathered: iterations, slots, and what is in no list of it."""
    return [*_listed(optimizer), *beside_lists(optimizer)]


def iterations_of(optimizer: Any) -> Optional[tf.Variable]:
    """An optimizer's count of updates, if it has one."""
    with tf.init_scope():  # legacy ones make it when they are first asked
        return getattr(optimizer, "iterations", None)


def updates_of(optimizer: Any) -> int:
    """How many updates an optimizer has made, by its own count; 0, if it has none."""
    count = iterations_of(optimizer)
    return 0 if count is None else int(count.numpy())  # int() takes no variable of replicas


def beside_lists(optimizer: Any) -> list[tf.Variable]:
    """The variables of an optimizer that tf_keras lists, and so saves, nowhere.

    They are a dynamic loss scale, a schedule's latest value, Nadam's product.
    """
    listed = {id(variable) for variable in _listed(optimizer)}
    attributes = sorted(vars(_inner(optimizer)).items())
    variables = [value for _, value in attributes if isinstance(value, tf.Variable)]
    scale = getattr(optimizer, "_loss_scale", None)
    if hasattr(scale, "current_loss_scale"):  # a dynamic one
        variables += [scale.current_loss_scale, scale.counter]  # type: ignore[union-attr]
    return [variable for variable in variables if id(variable) not in listed]


def keys_built_for(optimizer: Any) -> list[str]:
    """The keys of the variables that an optimizer has made slots for, in its order."""
    optimizer = _inner(optimizer)
    if is_legacy(optimizer):
        return list(optimizer._slots)
    if not getattr(optimizer, "_built", False):
        return []
    return sorted(optimizer._index_dict, key=optimizer._index_dict.get)


def positions_built_for(optimizer: Any, positions: Mapping[Any, int]) -> Optional[list[int]]:
    """Where the variables stand that an optimizer has slots for; None, if one stands nowhere.

    Args:
        optimizer: An optimizer of tf_keras; of another, nothing is known.
        positions: By reference, the positions of a model's weights.
    """
    if not _keras.is_of_keras(optimizer):
        return None
    by_key = {
        _keras.variable_key(optimizer, reference.deref()): position
        for reference, position in positions.items()
    }
    keys = keys_built_for(optimizer)
    return [by_key[key] for key in keys] if by_key.keys() >= set(keys) else None


def build_for(optimizer: Any, variables: Sequence[tf.Variable]) -> None:
    """Have an optimizer make its slots for variables, in their order, if it has none yet."""
    optimizer = _inner(optimizer)
    if is_legacy(optimizer):
        if variables:
            optimizer._create_all_weights(variables)
    elif variables and not getattr(optimizer, "_built", False):
        optimizer.build(variables)


def mend_wrapper(optimizer: Any) -> None:
    """Give tf_keras's wrapper for loss scaling what its loaders ask of it, and it lacks.

    Loaders of HDF5 set its weights, which it cannot; that of `.keras` names it in a warning.
    """
    inner = _inner(optimizer)
    if inner is not optimizer and not is_legacy(optimizer):
        optimizer.set_weights = inner.set_weights
        optimizer.name = inner.name


def copy_optimizer_state(optimizer: Any, own: Any, own_variables: dict[Any, Any]) -> None:
    """Iterations, slots and whatever else an optimizer has gathered.

    Args:
        optimizer: Any optimizer of tf_keras, new, legacy or wrapped for loss scaling.
        own: Its copy, not built yet.
        own_variables: By reference, the copies of the variables that it trains.
    """
    inner, own_inner = _inner(optimizer), _inner(own)
    by_key = {
        _keras.variable_key(inner, reference.deref()): variable
        for reference, variable in own_variables.items()
    }
    build_for(own, _in_order(keys_built_for(optimizer), by_key))
    if is_legacy(inner):
        if inner.weights:
            own_inner.iterations.assign(inner.iterations)  # made where it is first asked for
        own_inner.gradient_transformers = inner.gradient_transformers
        own_inner.gradient_aggregator = inner.gradient_aggregator
    else:
        excluded = getattr(inner, "_exclude_from_weight_decay", None)
        if excluded is not None:
            own_inner._exclude_from_weight_decay = [
                own_inner._var_key(by_key[key]) for key in excluded
            ]
        if hasattr(inner, "_exclude_from_weight_decay_names"):
            own_inner._exclude_from_weight_decay_names = inner._exclude_from_weight_decay_names
    state, own_state = state_of(optimizer), state_of(own)
    if len(state) != len(own_state):
        raise ValueError(
            f"A model must have an optimizer that its config describes to be copied; got "
            f"{type(inner).__name__} with {len(state)} variables, {len(own_state)} after "
            f"cloning. {REMEDY}"
        )
    for variable, own_variable in zip(state, own_state):
        own_variable.assign(variable)


def _inner(optimizer: Any) -> Any:
    """The optimizer within a wrapper for loss scaling."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def is_legacy(optimizer: Any) -> bool:
    """Whether an optimizer is a legacy one, or wraps one."""
    optimizer = _inner(optimizer)
    return isinstance(optimizer, tf_keras.optimizers.legacy.Optimizer)


def _listed(optimizer: Any) -> list[tf.Variable]:
    optimizer = _inner(optimizer)
    return list(optimizer.weights if is_legacy(optimizer) else optimizer.variables)


def _in_order(keys: Iterable[str], by_key: dict[str, Any]) -> list[Any]:
    """The copies of the variables that an optimizer has built slots for."""
    keys = list(keys)
    foreign = [key for key in keys if key not in by_key]
    if foreign:
        raise ValueError(
            f"A model must have its optimizer to itself to be copied; got one that also trains "
            f"{foreign[0]!r}. {REMEDY}"
        )
    return [by_key[key] for key in keys]
