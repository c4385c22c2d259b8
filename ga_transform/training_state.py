"""The compile arguments and the state of the optimizers, copied from a model to its clone."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import tensorflow as tf
import tf_keras

from ga_transform import _keras
from ga_transform.errors import REMEDY_OF_COPY as REMEDY
from ga_transform.errors import not_copied

__all__ = ["UNFIT", "compile_like", "copy_training_state"]

#: What a config that does not fit its class raises.
UNFIT = (
    AssertionError,
    AttributeError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


def compile_like(model: Any, copy: Any) -> None:
    """Compile a clone with what the model was compiled with.

    Raises:
        ValueError: Some of it cannot be copied. The text names it.
    """
    losses, metrics = model.compiled_loss, model.compiled_metrics
    arguments = {
        "optimizer": tf.nest.map_structure(_clone_by_config, model.optimizer),
        "loss": losses._user_losses,
        "loss_weights": losses._user_loss_weights,
        "metrics": _clone_metrics(metrics, metrics._user_metrics),
        "weighted_metrics": _clone_metrics(metrics, metrics._user_weighted_metrics),
        "run_eagerly": model._run_eagerly,
        "steps_per_execution": (
            "auto"
            if model.autotune_steps_per_execution
            else int(model._steps_per_execution.numpy())
        ),
        "jit_compile": model.jit_compile,
    }
    if type(copy).compile is _keras.Model.compile:
        # A loaded model's metrics keep their names.
        copy.compile(**arguments, from_serialized=metrics._from_serialized)
    else:
        own_arguments = _own_arguments(model, arguments)
        try:
            copy.compile(**own_arguments)
        except Exception as error:  # whatever the user's own code raises
            raise not_copied(model, "its compile does not take what it was given before") from error
        copy._run_eagerly = model._run_eagerly


def _own_arguments(model: Any, usual: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a `compile` of the model's own, which are attributes of their names."""
    arguments: dict[str, Any] = {}
    # An optimizer that stands in two places is one in the copy, too.
    clones = {id(model.optimizer): usual["optimizer"]}
    parameters = inspect.signature(model.compile).parameters
    for name, parameter in parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            rest = usual.keys() - parameters.keys()
            arguments.update((key, usual[key]) for key in rest if usual[key] is not None)
        elif name in vars(model) and name not in ("optimizer", "loss"):
            arguments[name] = _clone_argument(model, name, vars(model)[name], clones)
        elif name in usual:
            arguments[name] = usual[name]
        elif parameter.kind is not inspect.Parameter.VAR_POSITIONAL:
            raise ValueError(
                "A model must keep the arguments of its own compile as attributes to be copied; "
                f"got {type(model).__name__} {model.name!r} without one named {name!r}. {REMEDY}"
            )
    return arguments


def _clone_argument(model: Any, name: str, value: Any, clones: dict[int, Any]) -> Any:
    is_metric = isinstance(value, tf_keras.metrics.Metric)
    if isinstance(value, (tf.Module, tf.Variable)) and not is_metric:
        raise not_copied(model, f"{name!r} of its compile is a {type(value).__name__}")
    if isinstance(value, Mapping):
        return {key: _clone_argument(model, name, item, clones) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clone_argument(model, name, item, clones) for item in value]
    if not (is_metric or _keras.is_optimizer(value)):
        return value
    if id(value) not in clones:
        clones[id(value)] = _clone_by_config(value)
    return clones[id(value)]


def copy_training_state(model: Any, copy: Any) -> None:
    """What training has gathered beside the weights: what was frozen, and the optimizers' state.

    Raises:
        ValueError: Some of it cannot be copied. The text names it.
    """
    for layer, own in zip(_keras.flatten_layers(model), _keras.flatten_layers(copy)):
        # What was frozen when the model was compiled counts, until it is compiled again.
        if layer in model._compiled_trainable_state:
            copy._compiled_trainable_state[own] = model._compiled_trainable_state[layer]
    if not _keras.weights_of(model):
        return
    pairs = zip(model.variables, copy.variables)
    own_variables = {v.ref(): own for v, own in pairs if isinstance(v, tf.Variable)}
    optimizers, own_optimizers = _keras.optimizers_of(model), _keras.optimizers_of(copy)
    if [type(item) for item in optimizers] != [type(item) for item in own_optimizers]:
        raise not_copied(model, "its compile makes other optimizers")
    for optimizer, own in zip(optimizers, own_optimizers):
        _copy_optimizer_state(optimizer, own, own_variables)


def _clone_by_config(item: Any) -> Any:
    try:
        return type(item).from_config(item.get_config())
    except UNFIT as error:
        name = getattr(item, "name", None) or getattr(item, "_name", "")
        raise ValueError(
            "A model must be compiled with objects that can be made from their configs to be "
            f"copied; got {type(item).__name__} {name!r}, which cannot. {REMEDY}"
        ) from error


def _clone_metrics(container: Any, given: Any) -> Any:
    """Metrics as they were given to `compile`; those that hold a state are made anew."""
    if isinstance(given, (list, tuple)):
        return [_clone_metrics(container, item) for item in given]
    if isinstance(given, dict):
        return {name: _clone_metrics(container, item) for name, item in given.items()}
    if not isinstance(given, tf_keras.metrics.Metric):
        return given
    own = _clone_by_config(given)
    own._name = _name_given(container, given)
    return own


def _name_given(container: Any, metric: Any) -> str:
    """A metric's name as it was given: of several outputs, tf_keras puts the output's in front."""
    name = str(metric._name)
    if not container.built or container._from_serialized or len(container._output_names) < 2:
        return name
    outputs = zip(container._output_names, container._metrics, container._weighted_metrics)
    for output, unweighted, weighted in outputs:
        if any(other is metric for other in unweighted):
            return name[len(f"{output}_") :]
        if any(other is metric for other in weighted):
            short = name[len(f"{output}_weighted_") :]
            taken = {other._name for other in unweighted if other is not None}
            return short if f"{output}_{short}" in taken else name[len(f"{output}_") :]
    return name


# ---- optimizer -----------------------------------------------------------------------------


def _copy_optimizer_state(optimizer: Any, own: Any, own_variables: dict[Any, Any]) -> None:
    """Iterations, slots and whatever else an optimizer has gathered.

    Args:
        optimizer: Any optimizer of tf_keras, new, legacy or wrapped for loss scaling.
        own: Its copy, not built yet.
        own_variables: By reference, the copies of the variables that it trains.
    """
    scale, own_scale = (getattr(item, "_loss_scale", None) for item in (optimizer, own))
    if hasattr(scale, "current_loss_scale"):
        own_scale.current_loss_scale.assign(scale.current_loss_scale)  # type: ignore[union-attr]
        own_scale.counter.assign(scale.counter)  # type: ignore[union-attr]
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    own = getattr(own, "inner_optimizer", own)

    by_key = {
        _keras.variable_key(optimizer, reference.deref()): variable
        for reference, variable in own_variables.items()
    }
    if isinstance(optimizer, tf_keras.optimizers.legacy.Optimizer):
        state = optimizer.weights
        if state:
            own.iterations.assign(optimizer.iterations)
        if optimizer._slots:
            own._create_all_weights(_in_order(optimizer._slots, by_key))
        own.gradient_transformers = optimizer.gradient_transformers
        own.gradient_aggregator = optimizer.gradient_aggregator
        own_state = own.weights
    else:
        excluded = getattr(optimizer, "_exclude_from_weight_decay", None)
        if excluded is not None:
            own._exclude_from_weight_decay = [own._var_key(by_key[key]) for key in excluded]
        if hasattr(optimizer, "_exclude_from_weight_decay_names"):
            own._exclude_from_weight_decay_names = optimizer._exclude_from_weight_decay_names
        if getattr(optimizer, "_built", False):
            order = sorted(optimizer._index_dict, key=optimizer._index_dict.get)
            own.build(_in_order(order, by_key))
        # Some variables (a schedule's latest value, Nadam's product) are in no list.
        state = [*optimizer.variables, *_variable_attributes(optimizer)]
        own_state = [*own.variables, *_variable_attributes(own)]
    if len(state) != len(own_state):
        raise ValueError(
            f"A model must have an optimizer that its config describes to be copied; got "
            f"{type(optimizer).__name__} with {len(state)} variables, {len(own_state)} after "
            f"cloning. {REMEDY}"
        )
    for variable, own_variable in zip(state, own_state):
        own_variable.assign(variable)


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


def _variable_attributes(optimizer: Any) -> list[tf.Variable]:
    items = sorted(vars(optimizer).items())
    return [value for _, value in items if isinstance(value, tf.Variable)]
