"""A model and the whole state of its training, copied.

`clone_model` copies layers. What it leaves out is here: weights and vocabularies, frozen
layers, attributes, objects that were never registered; and `training_state.py` copies the
compile arguments and the state of the optimizers.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras

from ga_transform import _keras
from ga_transform.errors import REMEDY_OF_COPY as REMEDY
from ga_transform.errors import not_copied
from ga_transform.training_state import UNFIT, compile_like, copy_training_state

__all__ = ["clone_with_state"]

#: What every model holds, whatever its class.
_KERAS_OWN = {*vars(_keras.Model(name="bare")), "history"}
#: Methods that a function set on the object would stand in for.
_METHODS = ("train_step", "compute_loss", "compute_metrics", "make_train_function", "fit")


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
        if model._is_compiled:
            compile_like(model, copy)
        _copy_attributes(model, copy)
        _copy_layer_state(model, copy)
        if model._is_compiled:
            copy_training_state(model, copy)
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
            f"{plain_class.__name__} {model.name!r} without one. {REMEDY}"
        )
    try:
        return plain_class.from_config(plain_class.get_config(model))
    except UNFIT as error:
        raise ValueError(
            f"A model must be made from its config to be copied; got {plain_class.__name__} "
            f"{model.name!r}, which cannot. {REMEDY}"
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
            own_layer = type(layer).from_config({**config, **functions})
        except UNFIT:
            own_layer = type(layer).from_config(config)
    except UNFIT as error:
        raise ValueError(
            f"A model must have layers that can be made from their configs to be copied; got "
            f"{type(layer).__name__} {layer.name!r}, which cannot. {REMEDY}"
        ) from error
    if isinstance(layer, _keras.BatchNormalizationBase):
        # Stand in no config, and take other statistics.
        own_layer.fused, own_layer.synchronized = layer.fused, layer.synchronized
    return own_layer


def _is_own(value: Any) -> bool:
    """Whether a value is a function from outside TensorFlow and tf_keras."""
    return inspect.isfunction(value) and not _is_known(value)


def _is_known(function_or_class: Any) -> bool:
    """Whether tf_keras finds it by its name."""
    return function_or_class.__module__.split(".")[0] in ("tensorflow", "tf_keras")


def _copy_layer_state(model: Any, copy: Any) -> None:
    weights = _keras.weights_of(model)
    if weights and not _keras.weights_of(copy):
        _build_like(model, copy)
    layers, copies = _keras.flatten_layers(model), _keras.flatten_layers(copy)
    if [type(layer) for layer in layers[1:]] != [type(layer) for layer in copies[1:]]:
        raise not_copied(model, "its layers come out of their configs in another structure")
    if set(map(id, weights)) & set(map(id, _keras.weights_of(copy))):
        raise not_copied(model, "its config hands on the layers themselves")
    for layer, own in zip(layers, copies):
        if len(layer._callable_losses) != len(own._callable_losses):
            reason = f"a function passed to add_loss of {layer.name!r} is in no config"
            raise not_copied(model, reason)
        if layer is not model and not _is_known(type(layer)):
            _copy_plain_values(layer, own)
    for layer, own in zip(layers, copies):
        own.trainable = layer.trainable  # parents first, so that each layer has the last word
    if weights:
        _copy_weights(model, copy)
        for layer, own in zip(layers, copies):
            _copy_what_is_no_weight(layer, own)


def _build_like(model: Any, copy: Any) -> None:
    """Make the weights of a model of the user's own class, from the shapes that it has seen."""
    specs = model.save_spec(dynamic_batch=False)
    try:
        if specs is None:
            copy.build(model._build_input_shape)
        else:
            args, kwargs = tf.nest.map_structure(_zeros_like_spec, specs)
            copy(*args, **kwargs)
    except Exception as error:  # whatever the user's own code raises
        raise not_copied(model, "it cannot be built from the shapes that it has seen") from error


def _zeros_like_spec(spec: Any) -> Any:
    if not isinstance(spec, tf.TensorSpec):
        return spec
    return tf.zeros([1 if size is None else size for size in spec.shape], spec.dtype)


def _copy_weights(model: Any, copy: Any) -> None:
    if _shapes(model) != _shapes(copy):
        raise not_copied(model, "its weights have other shapes, or another number, after cloning")
    for variable, own in zip(model.trainable_variables, copy.trainable_variables):
        if (variable.constraint is None) != (own.constraint is None):
            raise not_copied(model, f"its config differs in the constraint of {variable.name!r}")
    copy.set_weights(model.get_weights())


def _copy_what_is_no_weight(layer: Any, own: Any) -> None:
    if hasattr(own, "finalize_state"):  # statistics of preprocessing layers, from their weights
        own.finalize_state()
    if getattr(layer, "stateful", False) and hasattr(layer, "states"):
        for state, own_state in zip(*map(tf.nest.flatten, (layer.states, own.states))):
            own_state.assign(state)


def _copy_attributes(model: Any, copy: Any) -> None:
    """What was set on a model and is in no config: plain values."""
    for name in _METHODS:
        if name in vars(model) or f"_own_{name}" in vars(model):
            raise not_copied(model, f"its {name!r} is set on the object")
    if any(average._averages for average in _keras.averages_of(model)):
        raise not_copied(model, "a moving average of its weights is in no config")
    _copy_plain_values(model, copy)
    if type(copy) in (_keras.Functional, _keras.Sequential):
        return
    for name in sorted(vars(model).keys() - vars(copy).keys() - _KERAS_OWN):
        if not name.startswith("_"):
            raise not_copied(model, f"its attribute {name!r} is in no config")


def _copy_plain_values(layer: Any, own: Any) -> None:
    """Numbers, texts, arrays and functions, and containers of them, that have another value."""
    for name in sorted(vars(layer).keys() - _KERAS_OWN):
        if isinstance(own, (_keras.Functional, _keras.Sequential)) and name.startswith("_"):
            continue  # tf_keras's own book-keeping
        try:
            setattr(own, name, _plain(vars(layer)[name]))
        except _NotPlainError:
            continue


class _NotPlainError(Exception):
    pass


def _plain(value: Any) -> Any:
    """A copy of a value, if all of it is plain."""
    if value is None or isinstance(value, (bool, int, float, str, bytes, np.generic)):
        return value
    if isinstance(value, np.ndarray):
        return value.copy()
    if inspect.isfunction(value) or (tf.is_tensor(value) and hasattr(value, "numpy")):
        if isinstance(value, tf.Variable):
            raise _NotPlainError
        return value
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if type(value) is tuple:
        return tuple(_plain(item) for item in value)
    raise _NotPlainError


def _shapes(model: Any) -> list[Any]:
    return [getattr(weight, "shape", None) for weight in model.weights]  # vocabularies have none


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
