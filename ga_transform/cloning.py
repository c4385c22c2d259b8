"""A model and the whole state of its training, copied: layers, weights, compile, optimizer.

`clone_model` copies layers. What it leaves out is here: weights and vocabularies, frozen
layers, objects that were never registered, the compile arguments, the optimizer's slots.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import tensorflow as tf
import tf_keras

from ga_transform import _keras

__all__ = ["clone_with_state"]

#: What a config that does not fit its class raises.
_UNFIT = (AttributeError, KeyError, NotImplementedError, TypeError, ValueError)
_REMEDY = "Pass inplace=True: it copies nothing."


def clone_with_state(model: Any, plain_class: Any) -> Any:
    """A plain model of `plain_class` with layers, weights and training state of its own.

    Args:
        model: A built or unbuilt, compiled or uncompiled model.
        plain_class: Its class, or the one it had before it was converted.

    Raises:
        ValueError: A part of the model cannot be copied. The text names it.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(model.distribute_strategy.scope())
        stack.enter_context(tf_keras.utils.custom_object_scope(_unregistered_objects(model)))
        stack.enter_context(warnings.catch_warnings())
        # Of lambdas, whose code get_config writes; here they are taken as they are.
        warnings.filterwarnings("ignore", "The object being serialized includes a `lambda`")
        copy = _clone_layers(model, plain_class, {})
        _copy_layer_state(model, copy)
        if model._is_compiled:
            _compile_like(model, copy)
        if type(copy) not in (_keras.Functional, _keras.Sequential):
            _copy_attributes(model, copy)
        if model._is_compiled:
            _copy_compile_state(model, copy)
    return copy


# ---- layers and weights --------------------------------------------------------------------


def _clone_layers(model: Any, plain_class: Any, clones: dict[int, Any]) -> Any:
    """The model's layers, fresh, in a model of `plain_class`.

    Args:
        clones: By the layer's id, what is cloned already: a layer that stands in several nested
            models is one layer in the copy, too.
    """
    if issubclass(plain_class, _keras.Functional) and _keras.has_functional_init(plain_class):
        clone = functools.partial(_clone_layer, clones=clones)
        copy = tf_keras.models.clone_model(model, clone_function=clone)
        if type(copy) is not plain_class:
            copy.__class__ = plain_class
        return copy
    if plain_class.get_config is _keras.Model.get_config:
        raise ValueError(
            f"A model must define get_config to be copied; got "
            f"{plain_class.__name__} {model.name!r} without one. {_REMEDY}"
        )
    try:
        return plain_class.from_config(plain_class.get_config(model))
    except _UNFIT as error:
        raise ValueError(
            f"A model must be made from its config to be copied; got {plain_class.__name__} "
            f"{model.name!r}, which cannot. {_REMEDY}"
        ) from error


def _clone_layer(layer: Any, clones: dict[int, Any]) -> Any:
    if id(layer) not in clones:
        if isinstance(layer, (_keras.Functional, tf_keras.Sequential)):
            # By its objects and not by its config, so that layers need not be registered.
            clones[id(layer)] = _clone_layers(layer, type(layer), clones)
        else:
            clones[id(layer)] = _clone_from_config(layer)
    return clones[id(layer)]


def _clone_from_config(layer: Any) -> Any:
    if type(layer) is tf_keras.layers.Lambda:
        config = layer.get_config()
        return tf_keras.layers.Lambda(
            layer.function,
            output_shape=layer._output_shape,
            mask=layer.mask,
            arguments=layer.arguments,
            **{name: config[name] for name in ("name", "trainable", "dtype")},
        )
    try:
        config = layer.get_config()
        # Functions as they are: a config holds the name, or the code, of a lambda.
        own = {name: getattr(layer, name, None) for name in config}
        functions = {name: value for name, value in own.items() if _is_own(value)}
        try:
            return type(layer).from_config({**config, **functions})
        except _UNFIT:
            return type(layer).from_config(config)
    except _UNFIT as error:
        raise ValueError(
            f"A model must have layers that can be made from their configs to be copied; got "
            f"{type(layer).__name__} {layer.name!r}, which cannot. {_REMEDY}"
        ) from error


def _is_own(value: Any) -> bool:
    """Whether a value is a function from outside TensorFlow and tf_keras."""
    return inspect.isfunction(value) and not _is_known(value)


def _is_known(function_or_class: Any) -> bool:
    """Whether tf_keras finds it by its name."""
    return function_or_class.__module__.split(".")[0] in ("tensorflow", "tf_keras")


def _copy_layer_state(model: Any, copy: Any) -> None:
    if model.built and not copy.built:
        _build_like(model, copy)
    layers, copies = _keras.flatten_layers(model), _keras.flatten_layers(copy)
    if [type(layer) for layer in layers[1:]] != [type(layer) for layer in copies[1:]]:
        raise _not_copied(model, "its layers come out of their configs in another structure")
    for layer, own in zip(layers, copies):
        if len(layer._callable_losses) != len(own._callable_losses):
            reason = f"a function passed to add_loss of {layer.name!r} is in no config"
            raise _not_copied(model, reason)
    for layer, own in zip(layers, copies):
        own.trainable = layer.trainable  # parents first, so that each layer has the last word
    if model.built:
        _copy_weights(model, copy)
        for layer, own in zip(layers, copies):
            _copy_what_is_no_weight(layer, own)


def _build_like(model: Any, copy: Any) -> None:
    """Make the weights of a model of the user's own class, from the shapes that it has seen."""
    specs = model.save_spec(dynamic_batch=False)
    if specs is None:
        copy.build(model._build_input_shape)
        return
    args, kwargs = tf.nest.map_structure(_zeros_like_spec, specs)
    copy(*args, **kwargs)


def _zeros_like_spec(spec: Any) -> Any:
    if not isinstance(spec, tf.TensorSpec):
        return spec
    return tf.zeros([1 if size is None else size for size in spec.shape], spec.dtype)


def _copy_weights(model: Any, copy: Any) -> None:
    if _shapes(model) != _shapes(copy):
        raise _not_copied(model, "its weights have other shapes, or another number, after cloning")
    for variable, own in zip(model.trainable_variables, copy.trainable_variables):
        if (variable.constraint is None) != (own.constraint is None):
            raise _not_copied(model, f"its config differs in the constraint of {variable.name!r}")
    copy.set_weights(model.get_weights())


def _copy_what_is_no_weight(layer: Any, own: Any) -> None:
    if hasattr(own, "finalize_state"):  # statistics of preprocessing layers, from their weights
        own.finalize_state()
    if getattr(layer, "stateful", False) and hasattr(layer, "states"):
        for state, own_state in zip(*map(tf.nest.flatten, (layer.states, own.states))):
            own_state.assign(state)


def _copy_attributes(model: Any, copy: Any) -> None:
    """What was set on a model of the user's own class and is in no config: plain values only."""
    keras_own = {*vars(_keras.Model()), "history"}
    for name in sorted(vars(model).keys() - keras_own):
        value = vars(model)[name]
        if isinstance(value, (bool, int, float, str, bytes, type(None))):
            setattr(copy, name, value)
        elif name not in vars(copy) and not name.startswith("_"):
            raise _not_copied(model, f"its attribute {name!r} is in no config")


def _shapes(model: Any) -> list[Any]:
    return [getattr(weight, "shape", None) for weight in model.weights]  # vocabularies have none


def _not_copied(model: Any, reason: str) -> ValueError:
    return ValueError(
        f"A model must be what its configs describe to be copied; got {model.name!r}, "
        f"where {reason}. {_REMEDY}"
    )


def _unregistered_objects(model: Any) -> dict[str, Any]:
    """The functions and classes that configs of this model may name, by that name."""
    owners = [*_keras.flatten_layers(model), *_keras.optimizers_of(model)]
    owners += [owner.inner_optimizer for owner in owners if hasattr(owner, "inner_optimizer")]
    values = [value for owner in owners for value in (owner, *vars(owner).values())]
    functions = [value for value in values if inspect.isfunction(value)]
    classes = [type(value) for value in values if hasattr(value, "get_config")]
    return {
        tf_keras.utils.get_registered_name(own): own
        for own in (*functions, *classes)
        if not _is_known(own)
    }


# ---- compile -------------------------------------------------------------------------------


def _compile_like(model: Any, copy: Any) -> None:
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
        copy.compile(**_own_arguments(model, arguments))


def _own_arguments(model: Any, usual: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a `compile` of the model's own, which are attributes of their names."""
    arguments: dict[str, Any] = {}
    parameters = inspect.signature(model.compile).parameters
    for name, parameter in parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            rest = usual.keys() - parameters.keys()
            arguments.update((key, usual[key]) for key in rest if usual[key] is not None)
        elif name in vars(model) and name != "optimizer":
            arguments[name] = _clone_argument(model, name, vars(model)[name])
        elif name in usual:
            arguments[name] = usual[name]
        elif parameter.kind is not inspect.Parameter.VAR_POSITIONAL:
            raise ValueError(
                "A model must keep the arguments of its own compile as attributes to be copied; "
                f"got {type(model).__name__} {model.name!r} without one named {name!r}. {_REMEDY}"
            )
    return arguments


def _clone_argument(model: Any, name: str, value: Any) -> Any:
    is_metric = isinstance(value, tf_keras.metrics.Metric)
    if isinstance(value, (tf.Module, tf.Variable)) and not is_metric:
        raise _not_copied(model, f"{name!r} of its compile is a {type(value).__name__}")
    if isinstance(value, Mapping):
        return {key: _clone_argument(model, name, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clone_argument(model, name, item) for item in value]
    return _clone_by_config(value) if hasattr(value, "get_config") else value


def _copy_compile_state(model: Any, copy: Any) -> None:
    for layer, own in zip(_keras.flatten_layers(model), _keras.flatten_layers(copy)):
        # What was frozen when the model was compiled counts, until it is compiled again.
        if layer in model._compiled_trainable_state:
            copy._compiled_trainable_state[own] = model._compiled_trainable_state[layer]
    if not model.built:
        return
    pairs = zip(model.variables, copy.variables)
    own_variables = {v.ref(): own for v, own in pairs if isinstance(v, tf.Variable)}
    optimizers, own_optimizers = _keras.optimizers_of(model), _keras.optimizers_of(copy)
    if [type(item) for item in optimizers] != [type(item) for item in own_optimizers]:
        raise _not_copied(model, "its optimizers come out of its compile in another order")
    for optimizer, own in zip(optimizers, own_optimizers):
        _copy_optimizer_state(optimizer, own, own_variables)


def _clone_by_config(item: Any) -> Any:
    try:
        return type(item).from_config(item.get_config())
    except _UNFIT as error:
        name = getattr(item, "name", None) or getattr(item, "_name", "")
        raise ValueError(
            "A model must be compiled with objects that can be made from their configs to be "
            f"copied; got {type(item).__name__} {name!r}, which cannot. {_REMEDY}"
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
            f"cloning. {_REMEDY}"
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
            f"{foreign[0]!r}. {_REMEDY}"
        )
    return [by_key[key] for key in keys]


def _variable_attributes(optimizer: Any) -> list[tf.Variable]:
    items = sorted(vars(optimizer).items())
    return [value for _, value in items if isinstance(value, tf.Variable)]
