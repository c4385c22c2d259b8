"""The outputs of a model for the slices of a batch, put together row by row. Tensors only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import tensorflow as tf

from ga_transform.errors import wrong_type

__all__ = ["checked_outputs", "coupled_outputs", "may_be_coupled", "put_rows", "with_room_for"]

_OWNER = "An output of a model with whole_batch_loss"


def checked_outputs(
    outputs: Sequence[Any], rows: Optional[tf.Tensor], known_rows: Optional[int]
) -> list[tf.Tensor]:
    """The outputs for a slice, each of which must have a row for each row of it.

    Args:
        outputs: Of a model.
        rows: Of the slice; None, if its inputs have none. Shape: scalar, float64.
        known_rows: These, as far as a graph knows them.

    Raises:
        TypeError: An output is not dense.
        ValueError: An output has other rows, or none. Where that is known only when the graph
            runs, it raises `tf.errors.InvalidArgumentError`.
    """
    checked = []
    rule = f"{_OWNER} must have a row for each row of the batch; got"
    remedy = "Return what the loss takes of each row, or leave whole_batch_loss out."
    for output in outputs:
        if not isinstance(output, tf.Tensor):
            raise wrong_type(_OWNER, "a dense tensor", output, "Leave whole_batch_loss out.")
        is_fixed = output.shape.rank and output.shape[0] not in (None, known_rows)
        if output.shape.rank == 0 or (is_fixed and not tf.executing_eagerly()):
            raise ValueError(f"{rule} one of shape {output.shape}. {remedy}")
        if rows is not None:
            found = tf.shape(output)[0]
            is_right = tf.equal(tf.cast(found, tf.float64), rows)
            told = [f"{rule} another number of them. {remedy} Rows of it and of the slice:"]
            with tf.control_dependencies([tf.debugging.Assert(is_right, [*told, found, rows])]):
                output = tf.identity(output)
        checked.append(output)
    return checked


def may_be_coupled(shapes: Sequence[tf.TensorShape], rows: Optional[int]) -> bool:
    """Whether shapes of outputs for a slice may have its number of rows in another axis, too."""
    return any(shape.rank and {None, rows} & set(shape.as_list()[1:]) for shape in shapes)


def coupled_outputs(
    shapes: Sequence[tf.TensorShape], others: Sequence[tf.TensorShape]
) -> list[int]:
    """The outputs whose rows are made of all the rows of a slice, as a matrix of scores is.

    Args:
        shapes: Of the outputs for a slice; None where it is not known.
        others: Of those for a slice of another, known number of rows.
    """
    return [
        position
        for position, (shape, other) in enumerate(zip(shapes, others))
        if any(
            of_other is not None and of_this != of_other
            for of_this, of_other in zip(shape.as_list()[1:], other.as_list()[1:])
        )
    ]


def with_room_for(tensor: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
    """A tensor, lengthened to so many rows."""
    shape = tf.shape(tensor)
    missing = tf.maximum(rows - shape[0], 0)  # an output that is refused may have too many
    rest = tf.zeros(tf.concat([[missing], shape[1:]], 0), tensor.dtype)
    return tf.ensure_shape(tf.concat([tensor, rest], 0), [None, *tensor.shape[1:]])


def put_rows(tensor: tf.Tensor, start: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
    """A tensor with other rows, from one of them on."""
    places = start + tf.range(tf.shape(rows)[0])
    return tf.tensor_scatter_nd_update(tensor, places[:, tf.newaxis], rows)
