"""The outputs of a model for the slices of a batch, put together row by row. Tensors only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import tensorflow as tf

from ga_transform.errors import wrong_type

__all__ = [
    "array_from",
    "checked_outputs",
    "concatenated",
    "coupled_outputs",
    "masks_of",
    "may_be_coupled",
    "put_rows",
    "with_room_for",
    "write_rows",
]

_OWNER = "An output of a model with whole_batch_loss"
_REMEDY = "Return what the loss takes of each row, or leave whole_batch_loss out."


def checked_outputs(
    outputs: Sequence[Any], rows: Optional[tf.Tensor], known_rows: Optional[int]
) -> list[Optional[tf.Tensor]]:
    """The outputs for a slice, each of which must have a row for each row of it, or be None.

    Args:
        outputs: Of a model.
        rows: Of the slice; None, if its inputs have none. Shape: scalar, float64.
        known_rows: These, as far as a graph knows them.

    Raises:
        TypeError: An output is not dense.
        ValueError: An output has other rows, or none. Where that is known only when the graph
            runs, it raises `tf.errors.InvalidArgumentError`.
    """
    return [None if each is None else _checked(each, rows, known_rows) for each in outputs]


def _checked(output: Any, rows: Optional[tf.Tensor], known_rows: Optional[int]) -> tf.Tensor:
    if not isinstance(output, tf.Tensor):
        raise wrong_type(_OWNER, "a dense tensor", output, "Leave whole_batch_loss out.")
    shape = output.shape
    rule = f"{_OWNER} must have a row for each row of the batch; got"
    if not shape.rank:
        raise ValueError(f"{rule} one of shape {shape}. {_REMEDY}")
    if tf.executing_eagerly():
        known_rows = None if rows is None else int(rows)
    if shape[0] not in (None, known_rows):
        raise ValueError(f"{rule} one of shape {shape}. {_REMEDY}")
    if rows is None or shape[0] is not None:
        return tf.identity(output)
    found = tf.shape(output)[0]
    told = [f"{rule} another number of them. {_REMEDY} Rows of it and of the slice:", found, rows]
    failing = tf.debugging.Assert(tf.equal(tf.cast(found, tf.float64), rows), told)
    with tf.control_dependencies([failing]):
        return tf.identity(output)


def masks_of(outputs: Sequence[Any]) -> list[Optional[tf.Tensor]]:
    """The masks of outputs, each with a row for each row of its output."""

    def mask_of(output: Any) -> Optional[tf.Tensor]:
        mask = getattr(output, "_keras_mask", None)
        if mask is None:
            return None
        # One that is the same for all rows may have one row.
        return tf.broadcast_to(mask, tf.concat([tf.shape(output)[:1], tf.shape(mask)[1:]], 0))

    return list(map(mask_of, outputs))


def may_be_coupled(shapes: Sequence[Optional[tf.TensorShape]], rows: Optional[int]) -> bool:
    """Whether shapes of outputs for a slice may have its number of rows in another axis, too."""
    return any(shape is not None and {None, rows} & set(shape.as_list()[1:]) for shape in shapes)


def coupled_outputs(
    shapes: Sequence[Optional[tf.TensorShape]], others: Sequence[Optional[tf.TensorShape]]
) -> list[int]:
    """The outputs whose rows are made of all the rows of a slice, as a matrix of scores is.

    Args:
        shapes: Of the outputs for a slice.
        others: Of those for a slice of another number of rows.
    """
    return [
        position
        for position, (shape, other) in enumerate(zip(shapes, others))
        if shape is not None
        and other is not None
        and any(
            one is not None and two is not None and one != two
            for one, two in zip(shape.as_list()[1:], other.as_list()[1:])
        )
    ]


def array_from(rows: tf.Tensor, size: tf.Tensor) -> tf.TensorArray:
    """A list of as many slices, of which these are the first's rows."""
    shape = [None, *rows.shape[1:]]
    array = tf.TensorArray(rows.dtype, size, element_shape=shape, infer_shape=False)
    return array.write(0, rows)


def write_rows(
    array: tf.TensorArray, index: tf.Tensor, rows: tf.Tensor, first: tf.Tensor
) -> tf.TensorArray:
    """A list of slices with one more.

    Args:
        array: The list.
        index: Of the slice.
        rows: Of the slice.
        first: The rows of the first slice.
    """
    with tf.control_dependencies(_alike(first, rows)):
        return array.write(index, rows)


def with_room_for(tensor: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
    """A tensor, lengthened to so many rows."""
    shape = tf.shape(tensor)
    missing = tf.maximum(rows - shape[0], 0)  # an output that is refused may have too many
    rest = tf.zeros(tf.concat([[missing], shape[1:]], 0), tensor.dtype)
    return tf.concat([tensor, rest], 0)


def put_rows(tensor: tf.Tensor, start: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
    """A tensor with other rows, from one of them on."""
    with tf.control_dependencies(_alike(tensor, rows)):
        places = start + tf.range(tf.shape(rows)[0])
    return tf.tensor_scatter_nd_update(tensor, places[:, tf.newaxis], rows)


def concatenated(parts: Sequence[tf.Tensor]) -> tf.Tensor:
    """The rows of slices, one after the other."""
    with tf.control_dependencies([each for part in parts for each in _alike(parts[0], part)]):
        return tf.concat(parts, 0)


def _alike(tensor: tf.Tensor, rows: tf.Tensor) -> list[Any]:
    """Assertions that rows of slices can be put together."""
    if None not in rows.shape[1:] and not tf.executing_eagerly():
        return []
    shapes = tf.shape(tensor)[1:], tf.shape(rows)[1:]
    told = f"{_OWNER} must be as long for every slice of a batch. Pad them. Lengths of two slices:"
    failing = tf.debugging.Assert(tf.reduce_all(tf.equal(*shapes)), [told, *shapes])
    return [] if failing is None else [failing]
