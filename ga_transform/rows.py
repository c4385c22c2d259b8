"""How many rows a batch of any structure has. Tensors only."""

from __future__ import annotations

from typing import Any, Optional

import tensorflow as tf

__all__ = ["count_rows", "known_lengths", "rows_of"]


def count_rows(data: Any) -> Optional[tf.Tensor]:
    """The rows of the first tensor of a structure that has any; None where none has.

    Args:
        data: Tensors or arrays in a structure; dense, ragged or sparse, of any dtype.

    Returns:
        Shape: scalar, float64.

    Example:
        >>> import tensorflow as tf
        >>> float(count_rows({"scale": tf.constant(0.5), "x": tf.zeros([3, 2])}))
        3.0
    """
    for item in tf.nest.flatten(data):
        rows = rows_of(item)
        if rows is not None:
            return tf.cast(rows, tf.float64)
    return None


def rows_of(item: Any) -> Optional[tf.Tensor]:
    """The rows of a tensor or an array; None where it has none. Shape: scalar."""
    if isinstance(item, tf.RaggedTensor):
        return item.nrows()
    if isinstance(item, tf.SparseTensor):
        return item.dense_shape[0]
    return None if _shape(item).rank == 0 else tf.shape(item)[0]


def known_lengths(data: Any) -> list[int]:
    """The different first dimensions of a structure's tensors, as far as they are known.

    Example:
        >>> import tensorflow as tf
        >>> known_lengths((tf.zeros([3, 2]), tf.zeros([5]), tf.zeros([3])))
        [3, 5]
    """
    shapes = [_shape(item) for item in tf.nest.flatten(data)]
    lengths = [shape[0] for shape in shapes if shape.rank]
    return list(dict.fromkeys(length for length in lengths if length is not None))


def _shape(item: Any) -> tf.TensorShape:
    """The shape of a tensor or an array; of anything else, that of a scalar, which has no rows."""
    shape = getattr(item, "shape", ())
    try:
        return tf.TensorShape(shape)
    except (TypeError, ValueError):
        return tf.TensorShape([])
