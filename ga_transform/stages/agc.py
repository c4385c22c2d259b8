"""Adaptive gradient clipping, unit by unit; what a unit is, is a matter of the layer.

Source: Brock, De, Smith and Simonyan, "High-Performance Large-Scale Image Recognition
Without Normalization", 2021.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import tensorflow as tf
from tf_keras import layers

from ga_transform._keras import flatten_layers, output_layers, reference_of
from ga_transform.errors import did_you_mean, wrong_value
from ga_transform.numerics import Gradient, map_values, unitwise_norm, values_of
from ga_transform.specs import ClipByAGC
from ga_transform.stages.registry import register_transform

__all__ = ["clip_by_agc", "unit_axes"]

Axes = tuple[int, ...]


def check_patterns(spec: ClipByAGC, model: Any) -> None:
    """Refuse names and globs that match nothing, and axes that a variable does not have."""
    if not model.built:
        return
    named = list(_named_variables(model))
    known = {name for names, _ in named for name in names}
    for field, patterns in (("exclude", spec.exclude), ("axes", spec.axes)):
        for pattern in patterns:
            if not any(_matches(names, [pattern]) for names, _ in named):
                raise wrong_value(
                    f"ClipByAGC.{field}",
                    "names or globs of this model's layers or variables",
                    pattern,
                    did_you_mean(pattern, known),
                )
    for names, variable in named:
        rank = variable.shape.rank
        for pattern, axes in spec.axes.items():
            inside = all(-rank <= axis < rank for axis in axes)
            if _matches(names, [pattern]) and not (
                inside and len({axis % rank for axis in axes}) == len(axes)
            ):
                raise wrong_value(
                    f"ClipByAGC.axes[{pattern!r}]",
                    f"axes of {variable.name}, which has {rank}",
                    axes,
                    "Count them from 0, each once.",
                )


def count_units(
    spec: ClipByAGC,
    before: Sequence[Gradient],
    after: Sequence[Gradient],
    variables: Sequence[tf.Variable],
    model: Any,
) -> tuple[tf.Tensor, tf.Tensor]:
    """How many units were clipped, of those that the spec does not leave out."""
    axes_of = unit_axes(spec, model)
    clipped, units = [tf.zeros([], tf.int64)], [tf.zeros([], tf.int64)]
    for given, made, variable in zip(before, after, variables):
        axes = axes_of.get(reference_of(variable), _axes_by_rank(variable))
        if axes is not None:
            differs = tf.not_equal(values_of(given), values_of(made))
            of_units = tf.reduce_any(differs, axis=list(axes))
            clipped.append(tf.math.count_nonzero(of_units))
            units.append(tf.size(of_units, tf.int64))
    return tf.add_n(clipped), tf.add_n(units)


@register_transform(ClipByAGC, check=check_patterns, count_clipped=count_units)
def clip_by_agc(
    spec: ClipByAGC, gradients: Sequence[Gradient], variables: Sequence[tf.Variable], model: Any
) -> list[Gradient]:
    """Clip each unit's gradient to `spec.clip_factor` times the norm of its weights."""
    check_patterns(spec, model)  # a model that was not built at conversion is built by now
    axes_of = unit_axes(spec, model)
    clipped = []
    for gradient, variable in zip(gradients, variables):
        axes = axes_of.get(reference_of(variable), _axes_by_rank(variable))
        clipped.append(gradient if axes is None else _clip_units(spec, gradient, variable, axes))
    return clipped


def _clip_units(spec: ClipByAGC, gradient: Gradient, variable: tf.Variable, axes: Axes) -> Gradient:
    """``G_i * limit / max(||G_i||, 1e-6)`` where ``||G_i|| > limit``, else ``G_i``."""
    if isinstance(gradient, tf.IndexedSlices):
        values = gradient.values
        # Each row is a unit of its own unless the norm runs over rows: then the weights are
        # read whole, while the gradient's missing rows add nothing to its norm.
        rows_are_units = 0 not in axes
        weights = tf.gather(variable, gradient.indices) if rows_are_units else variable
    else:
        values, weights = gradient, variable
    weight_norm = unitwise_norm(tf.cast(weights, values.dtype), axes)
    limit = spec.clip_factor * tf.maximum(weight_norm, spec.eps)
    norm = unitwise_norm(values, axes)
    scale = tf.where(norm > limit, limit / tf.maximum(norm, 1e-6), tf.ones_like(norm))
    return map_values(lambda values: values * scale, gradient)


def unit_axes(spec: ClipByAGC, model: Any) -> dict[Any, Axes | None]:
    """For each variable of the model, by reference, the axes of its norm; None: not clipped."""
    by_layer: dict[Any, Axes] = {}
    for layer in flatten_layers(model):
        for variable, axes in _axes_by_layer(layer):
            by_layer.setdefault(reference_of(variable), axes)
    head = {reference_of(kernel) for kernel in _head_kernels(model)} if spec.exclude_head else set()

    chosen: dict[Any, Axes | None] = {}
    for names, variable in _named_variables(model):
        reference = reference_of(variable)
        chosen[reference] = by_layer.get(reference, _axes_by_rank(variable))
        for pattern, axes in spec.axes.items():
            if _matches(names, [pattern]):
                chosen[reference] = tuple(axis % variable.shape.rank for axis in axes)
        if reference in head or _matches(names, spec.exclude):
            chosen[reference] = None
    return chosen


# ---- which axes, by layer ----------------------------------------------------------------


def _all(rank: int) -> Axes:
    return tuple(range(rank))


def _first(rank: int) -> Axes:
    return (0,)


def _second(rank: int) -> Axes:
    return (1,)


def _all_but_last(rank: int) -> Axes:
    return tuple(range(rank - 1))


def _all_but_last_but_one(rank: int) -> Axes:
    return (*range(rank - 2), rank - 1)


def _spatial(rank: int) -> Axes:
    return tuple(range(rank - 2))


#: Layers, a weight's name, and its axes given its rank. Subclasses stand before their bases.
_LAYERS: list[tuple[tuple[type, ...], dict[str, Callable[[int], Axes]]]] = [
    (
        (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose),
        {"kernel": _all_but_last_but_one},
    ),
    ((layers.DepthwiseConv1D, layers.DepthwiseConv2D), {"depthwise_kernel": _spatial}),
    (
        (layers.SeparableConv1D, layers.SeparableConv2D),
        {"depthwise_kernel": _spatial, "pointwise_kernel": _all_but_last},
    ),
    ((layers.Conv1D, layers.Conv2D, layers.Conv3D), {"kernel": _all_but_last}),
    (
        (layers.Dense, layers.LSTMCell, layers.GRUCell, layers.SimpleRNNCell),
        {"kernel": _first, "recurrent_kernel": _first},
    ),
    ((layers.Embedding,), {"embeddings": _second}),
]


def _axes_by_layer(layer: Any) -> Iterator[tuple[tf.Variable, Axes]]:
    """The weights of a layer that is known, with the axes of their norms."""
    rules: dict[str, Callable[[int], Axes]] = {}
    if isinstance(layer, layers.EinsumDense):
        # The units of an equation are its outputs: what it contracts is what feeds one.
        kernel, output = layer.equation.replace(" ", "").split(",")[1].split("->")
        contracted = tuple(i for i, letter in enumerate(kernel) if letter not in output)
        rules = {"kernel": lambda _: contracted}
    for classes, layer_rules in _LAYERS:
        if isinstance(layer, classes):
            rules = layer_rules
            break
    if not rules:
        return
    for name, axes in {**rules, "bias": _all}.items():
        variable = getattr(layer, name, None)
        if isinstance(variable, tf.Variable):
            yield variable, axes(variable.shape.rank)


def _axes_by_rank(variable: tf.Variable) -> Axes:
    """For a layer that is not known, what the reference assumes of its rank."""
    rank = variable.shape.rank
    if rank <= 1:
        return _all(rank)
    return (0,) if rank <= 3 else _all_but_last(rank)


# ---- which variables are meant -----------------------------------------------------------


def _named_variables(model: Any) -> Iterator[tuple[set[str], tf.Variable]]:
    """Each variable with the names it can be called by: its layers' and its path."""
    names: dict[Any, set[str]] = {}
    variables: dict[Any, tf.Variable] = {}
    for layer in flatten_layers(model):
        for variable in layer.variables:
            variables.setdefault(reference_of(variable), variable)
            called = names.setdefault(
                reference_of(variable), {variable.name, variable.name.split(":")[0]}
            )
            if layer is not model:
                called.add(layer.name)
    for reference, variable in variables.items():
        yield names[reference], variable


def _matches(names: Iterable[str], patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns for name in names)


def _head_kernels(model: Any) -> Iterator[tf.Variable]:
    """The kernels of the last linear layer before each output; weightless layers are passed."""
    for layer in output_layers(model):
        if isinstance(getattr(layer, "kernel", None), tf.Variable):
            yield layer.kernel
