"""The compile arguments and the state of the optimizers, copied from a model to its clone."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import tensorflow as tf
import tf_keras

from ga_transform import _keras
from ga_transform.errors import REMEDY_OF_COPY as REMEDY
from ga_transform.errors import not_copied
from ga_transform.optimizer_state import copy_optimizer_state

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
    own_variables = {_keras.reference_of(v): own for v, own in pairs if isinstance(v, tf.Variable)}
    optimizers, own_optimizers = _keras.optimizers_of(model), _keras.optimizers_of(copy)
    if [type(item) for item in optimizers] != [type(item) for item in own_optimizers]:
        raise not_copied(model, "its compile makes other optimizers")
    for optimizer, own in zip(optimizers, own_optimizers):
        copy_optimizer_state(optimizer, own, own_variables)


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
