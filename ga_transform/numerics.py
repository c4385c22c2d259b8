"""Measures of gradients and sums of sparse ones. Tensors only: no model, no optimizer.

A gradient is a `tf.Tensor` or a `tf.IndexedSlices`. Norms of slices are right only where
no row occurs twice; `sum_repeated_rows` sees to that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Union

import tensorflow as tf
from tensorflow.core.framework.attr_value_pb2 import AttrValue

__all__ = [
    "Gradient",
    "added",
    "all_finite",
    "as_dense",
    "as_slices",
    "global_norm",
    "map_values",
    "multiplied",
    "rarely",
    "squared_norm",
    "sum_repeated_rows",
    "times",
    "unitwise_norm",
    "values_of",
    "widened",
]

Gradient = Union[tf.Tensor, tf.IndexedSlices]


def values_of(gradient: Gradient) -> tf.Tensor:
    """The numbers of a gradient: itself, or the values of its rows."""
    return gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient


def map_values(function: Callable[[tf.Tensor], tf.Tensor], gradient: Gradient) -> Gradient:
    """Apply an element-wise function to a gradient, dense or sparse.

    Example:
        >>> import tensorflow as tf
        >>> slices = tf.IndexedSlices(tf.constant([[1.0]]), tf.constant([7]), tf.constant([9, 1]))
        >>> float(map_values(lambda values: 2 * values, slices).values[0, 0])
        2.0
    """
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(function(gradient.values), gradient.indices, gradient.dense_shape)
    return function(gradient)


def sum_repeated_rows(gradient: Gradient) -> Gradient:
    """The same gradient with each row at most once; dense ones are returned as they are."""
    if not isinstance(gradient, tf.IndexedSlices):
        return gradient
    rows, positions = tf.unique(gradient.indices)
    values = tf.math.unsorted_segment_sum(gradient.values, positions, tf.size(rows))
    return tf.IndexedSlices(values, rows, gradient.dense_shape)


def as_dense(gradient: Gradient, variable: tf.Variable) -> tf.Tensor:
    """A gradient as a tensor of its variable's shape."""
    if not isinstance(gradient, tf.IndexedSlices):
        return gradient
    shape = tf.shape(variable, out_type=gradient.indices.dtype)
    return tf.scatter_nd(gradient.indices[:, tf.newaxis], gradient.values, shape)


def as_slices(gradient: Gradient) -> tf.IndexedSlices:
    """A gradient as slices; a dense one becomes a slice of each of its rows."""
    if isinstance(gradient, tf.IndexedSlices):
        return gradient
    rows = tf.range(tf.shape(gradient, out_type=tf.int64)[0])
    return tf.IndexedSlices(gradient, rows, tf.shape(gradient, out_type=tf.int64))


def added(one: Gradient, other: Gradient, variable: tf.Variable) -> Gradient:
    """The sum of two gradients of a variable; of two sparse ones it is sparse."""
    if isinstance(one, tf.IndexedSlices) and isinstance(other, tf.IndexedSlices):
        return tf.IndexedSlices(
            tf.concat([one.values, other.values], 0),
            tf.concat([one.indices, other.indices], 0),
            one.dense_shape,
        )
    return as_dense(one, variable) + as_dense(other, variable)


def widened(gradient: Gradient) -> Gradient:
    """A 16-bit gradient in float32; wider ones as they are."""
    if gradient.dtype in (tf.float16, tf.bfloat16):
        return map_values(lambda values: tf.cast(values, tf.float32), gradient)
    return gradient


def multiplied(gradient: Gradient, number: float) -> Gradient:
    """A gradient times a number that is known when a graph is made; itself, if that is one."""
    return gradient if number == 1 else map_values(lambda values: values * number, gradient)


def times(gradient: Gradient, factor: tf.Tensor) -> Gradient:
    """A gradient times a number; zeros where that is zero, whatever the gradient is."""
    return map_values(
        lambda values: tf.math.multiply_no_nan(values, tf.cast(factor, values.dtype)), gradient
    )


def all_finite(gradients: Sequence[Gradient]) -> tf.Tensor:
    """Whether no number of any gradient is NaN or infinite. Shape: scalar, bool."""
    found = [tf.reduce_all(tf.math.is_finite(values_of(gradient))) for gradient in gradients]
    return tf.reduce_all(found) if found else tf.constant(True)


def squared_norm(gradient: Gradient) -> tf.Tensor:
    """The sum of squares of a gradient. Shape: scalar."""
    return tf.reduce_sum(tf.square(values_of(gradient)))


def global_norm(gradients: Sequence[Gradient]) -> tf.Tensor:
    """The L2 norm of all gradients together, in the widest of their dtypes. Shape: scalar."""
    squares = [squared_norm(gradient) for gradient in gradients]
    widest = max((square.dtype for square in squares), key=lambda dtype: dtype.size)
    return tf.sqrt(tf.add_n([tf.cast(square, widest) for square in squares]))


def unitwise_norm(tensor: tf.Tensor, axes: Sequence[int]) -> tf.Tensor:
    """The L2 norm of each unit, with the axes kept at size one so that it broadcasts.

    Args:
        tensor: Any shape.
        axes: The axes the norm is taken over. With none, each element is a unit.

    Example:
        >>> import tensorflow as tf
        >>> unitwise_norm(tf.constant([[3.0, 0.0], [4.0, 1.0]]), axes=(0,)).numpy().tolist()
        [[5.0, 1.0]]
    """
    return tf.sqrt(tf.reduce_sum(tf.square(tensor), axis=list(axes), keepdims=True))


def rarely(condition: tf.Tensor, action: Callable[[], None]) -> None:
    """Do something where a condition holds, at the cost of one op where it does not.

    `tf.cond` is inlined, so that each op of the branch not taken is visited all the same, which
    for an update takes as long as a small model's step.

    Args:
        condition: Shape: scalar, bool.
        action: Changes variables, and returns nothing.
    """

    def act() -> tf.Tensor:
        action()
        return tf.constant(0)

    if tf.get_static_value(condition):
        action()
        return
    done = tf.cond(condition, act, lambda: tf.constant(0))
    conditional = None if tf.executing_eagerly() else done.op.inputs[0].op
    if conditional is not None and conditional.type == "If":
        conditional._set_attr("_lower_using_switch_merge", AttrValue(b=False))
