"""Slices: a batch of any structure, cut into micro-batches of so many rows. Tensors only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import tensorflow as tf

from ga_transform.errors import wrong_type
from ga_transform.rows import rows_of

__all__ = ["Slices"]


class Slices:
    """The slices of a batch, of which the last may have fewer rows.

    What has no rows (a scalar, None, a Python value) goes along with each slice. The batch stays
    on the host: a device is given slices.

    Attributes:
        rows: Of the batch. Shape: scalar, int32, as all of these.
        size: Rows a slice.
        count: Slices that `take` takes.
        total: Slices with the remainder.
        rows_a_slice: Of each slice, where all have as many and the number is known; an int.

    Args:
        batch: Tensors or arrays in a structure; dense, ragged or sparse, all of as many rows.
        micro_batch_size: Rows a slice, >= 1.
        has_fixed_size: Whether slices must have a size that is known when a graph is compiled;
            the last one is `remainder` then.

    Raises:
        ValueError: Two tensors have different numbers of rows. Where the numbers are known only
            when the graph runs, that raises `tf.errors.InvalidArgumentError`.
        TypeError: A tensor is neither dense, ragged nor sparse.
    """

    def __init__(self, batch: Any, micro_batch_size: int, *, has_fixed_size: bool = False) -> None:
        leaves = [_as_tensor(leaf) for leaf in tf.nest.flatten(batch)]
        self._cut = [position for position, leaf in enumerate(leaves) if _has_rows(leaf)]
        self._leaves = leaves
        self._structure = batch
        tensors = [leaves[position] for position in self._cut]
        with _on_host():
            self.rows = _common_rows(tensors)
            self.size: Any = micro_batch_size
            if has_fixed_size:
                self.size = tf.minimum(self.size, self.rows)
            # A batch without rows is a slice without rows, as it is a batch to plain tf_keras.
            self.total = tf.maximum(-(-self.rows // self.size), 1)
            self.count = self.rows // self.size if has_fixed_size else self.total
        self.micro_batch_size = micro_batch_size
        self._has_fixed_size = has_fixed_size
        rows = {_static_rows(tensor) for tensor in tensors} - {None}
        known = rows.pop() if len(rows) == 1 else None
        self.rows_a_slice = _rows_a_slice(known, micro_batch_size)

    @property
    def may_have_remainder(self) -> bool:
        """Whether rows may be left over from slices of a fixed size."""
        return self._has_fixed_size and self.rows_a_slice is None

    def take(self, index: Any) -> list[Any]:
        """The tensors of one slice, in the order of `pack`."""
        with _on_host():
            start = index * self.size
            size = self.size
            if not self._has_fixed_size:
                size = tf.minimum(size, self.rows - start)
            return [self._slice(self._leaves[position], start, size) for position in self._cut]

    def remainder(self) -> list[Any]:
        """The rows that are left over, of which there may be none."""
        with _on_host():
            start = self.count * self.size
            size = self.rows - start
            return [self._slice(self._leaves[position], start, size) for position in self._cut]

    def specs(self, rows: Optional[int] = None) -> list[Any]:
        """What `take` returns, as type specs, in which the number of rows may be open.

        Args:
            rows: Of another slice than these.
        """
        rows = rows or self.rows_a_slice
        return [self._spec(self._leaves[position], rows) for position in self._cut]

    def pack(self, tensors: Sequence[Any]) -> Any:
        """A slice in the structure of the batch."""
        leaves = list(self._leaves)
        for position, tensor in zip(self._cut, tensors):
            leaves[position] = tensor
        return tf.nest.pack_sequence_as(self._structure, leaves)

    def _spec(self, tensor: Any, rows: Optional[int]) -> Any:
        shape = [rows, *tensor.shape[1:]] if tensor.shape.rank is not None else None
        if isinstance(tensor, tf.RaggedTensor):
            return tf.RaggedTensorSpec(
                shape,
                tensor.dtype,
                tensor.ragged_rank,
                tensor.row_splits.dtype,
                tensor.flat_values.shape if tensor.flat_values.shape.rank is None else None,
            )
        if isinstance(tensor, tf.SparseTensor):
            return tf.SparseTensorSpec(shape, tensor.dtype)
        return tf.TensorSpec(shape, tensor.dtype)

    def _slice(self, tensor: Any, start: Any, size: Any) -> Any:
        if isinstance(tensor, tf.RaggedTensor):
            return tensor[start : start + size]
        if isinstance(tensor, tf.SparseTensor):
            others = tensor.dense_shape[1:]
            start, size = tf.cast(start, tf.int64), tf.cast(size, tf.int64)
            return tf.sparse.slice(
                tensor,
                tf.concat([[start], tf.zeros_like(others)], 0),
                tf.concat([[size], others], 0),
            )
        if tensor.shape.rank is None:
            return tensor[start : start + size]
        others = tensor.shape.rank - 1
        cut = tf.slice(tensor, [start, *[0] * others], [size, *[-1] * others])
        return tf.ensure_shape(cut, [self.rows_a_slice, *tensor.shape[1:]])


def _on_host() -> Any:
    return tf.device("CPU:0")


def _as_tensor(leaf: Any) -> Any:
    """Arrays as tensors; everything else as it is."""
    is_array = hasattr(leaf, "shape") and not tf.is_tensor(leaf)
    return tf.convert_to_tensor(leaf) if is_array else leaf


def _has_rows(leaf: Any) -> bool:
    if not tf.is_tensor(leaf):
        return False
    if isinstance(leaf, (tf.RaggedTensor, tf.SparseTensor)):
        return True
    if not isinstance(leaf, tf.Tensor):
        raise wrong_type(
            "A batch that micro_batch_size cuts",
            "made of dense, ragged and sparse tensors",
            leaf,
            "Use accum_steps, which takes batches as they are.",
        )
    return bool(leaf.shape.rank != 0)


def _static_rows(tensor: Any) -> Optional[int]:
    return None if tensor.shape.rank is None else tensor.shape[0]


def _common_rows(tensors: Sequence[Any]) -> tf.Tensor:
    """The number of rows of all tensors. Shape: scalar, int32."""
    if not tensors:
        return tf.constant(0)
    known = list(dict.fromkeys(map(_static_rows, tensors)))
    different = [str(rows) for rows in known if rows is not None]
    rule = (
        "A batch that micro_batch_size cuts must be of tensors with as many rows each; got {}. "
        "Use accum_steps, which takes batches as they are."
    )
    if len(different) > 1:
        raise ValueError(rule.format(" and ".join(different)))
    if len(tensors) == 1 or len(known) == len(different):
        return tf.cast(rows_of(tensors[0]), tf.int32)
    counts = tf.stack([tf.cast(rows_of(tensor), tf.int32) for tensor in tensors])
    are_same = tf.reduce_all(counts == counts[0])
    failing = tf.debugging.Assert(
        are_same, [rule.format("their numbers of rows:"), counts], len(tensors)
    )
    with tf.control_dependencies([] if failing is None else [failing]):
        # No rows, so that it is this line that is heard of, not that of an op that has failed too.
        return tf.where(are_same, counts[0], 0)


def _rows_a_slice(rows: Optional[int], micro_batch_size: int) -> Optional[int]:
    """How many rows every slice has, if they have as many and it is known."""
    if rows is None:
        return None
    if rows <= micro_batch_size:
        return rows
    return micro_batch_size if rows % micro_batch_size == 0 else None
