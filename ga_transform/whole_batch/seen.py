"""The rows that a loss sees: those of its replica, or those of all replicas."""

from __future__ import annotations

from typing import Any, Optional

import tensorflow as tf

from ga_transform.replicas import count_replicas, gathered, index_of_replica, summed
from ga_transform.rows import count_rows

__all__ = ["Seen"]


class Seen:
    """The rows of a batch, as its loss sees them.

    Args:
        rows: Of the batch, on this replica. Shape: scalar, int32.
        of_all: Whether the rows of all replicas are seen by each.
    """

    def __init__(self, rows: tf.Tensor, *, of_all: bool) -> None:
        #: Whether there are rows of other replicas among them.
        self.is_gathered = of_all and count_replicas() > 1
        self._own_rows = rows
        self._rows = self.sum([tf.cast(rows, tf.float64)])[0]

    def share(self, x: Any) -> tf.Tensor:
        """Of the rows that are seen, those of a slice. Shape: scalar, float64."""
        rows = count_rows(x)
        one = tf.ones([], tf.float64)
        return one if rows is None else tf.math.divide_no_nan(rows, self._rows)

    def sum(self, tensors: list[tf.Tensor]) -> list[tf.Tensor]:
        """Of tensors that are sums over the rows of a replica, those over all that are seen."""
        return summed(tensors) if self.is_gathered and tensors else tensors

    def gather(self, data: Any) -> Any:
        """Tensors in a structure, with all rows that are seen.

        Raises:
            TypeError: Some cannot be sent from replica to replica.
        """
        return tf.nest.map_structure(_gathered, data) if self.is_gathered else data

    def own(self, rows: Optional[tf.Tensor]) -> Optional[tf.Tensor]:
        """Of all rows, those of this replica."""
        if rows is None or not self.is_gathered:
            return rows
        counts = gathered(self._own_rows[tf.newaxis])
        index = index_of_replica()
        start = tf.reduce_sum(counts[:index])
        return rows[start : start + counts[index]]


def _gathered(leaf: Any) -> Any:
    """The rows of all replicas; what has no rows as it is."""
    if not tf.is_tensor(leaf) or leaf.shape.rank == 0:
        return leaf
    if not isinstance(leaf, tf.Tensor) or leaf.dtype == tf.string:
        kind = "strings" if leaf.dtype == tf.string else type(leaf).__name__
        raise TypeError(
            "A loss with whole_batch_loss='gathered' must see dense tensors of numbers, which "
            f"replicas can send each other; got {kind}. Use whole_batch_loss=True."
        )
    rows = gathered(leaf)
    mask = getattr(leaf, "_keras_mask", None)
    if mask is not None:
        rows._keras_mask = gathered(mask)
    return rows
