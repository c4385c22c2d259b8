"""The sums of a variable's gradients that a window stores: dense, or the slices themselves."""

from __future__ import annotations

import tensorflow as tf

from ga_transform._keras import AutoTrackable
from ga_transform.numerics import Gradient, as_dense, as_slices, map_values, rarely, times
from ga_transform.replicas import count_replicas, gathered, here, local_variable

__all__ = ["DenseSum", "SparseSum"]


class DenseSum(AutoTrackable):  # type: ignore[misc]
    """A sum of gradients of a variable's whole shape."""

    def __init__(self, shape: tf.TensorShape, dtype: tf.DType) -> None:
        self.values = local_variable(tf.zeros(shape, dtype), of_all="sum")

    def state(self) -> list[tf.Variable]:
        """The variables in one order."""
        return [self.values]

    def clear(self) -> None:
        """Store nothing."""
        self.values.assign(tf.zeros_like(self.values))

    def put(self, gradient: Gradient) -> None:
        """Write a gradient over whatever is stored."""
        self.values.assign(as_dense(self._cast(gradient), self.values))

    def add(self, gradient: Gradient) -> None:
        """Add a gradient to what is stored."""
        gradient = self._cast(gradient)
        if isinstance(gradient, tf.IndexedSlices):
            here(self.values).scatter_add(gradient)
        else:
            self.values.assign_add(gradient)

    def read(self) -> Gradient:
        """What is stored."""
        return tf.convert_to_tensor(self.values)

    def spread(self, factor: tf.Tensor) -> None:
        """Turn what is stored into units of all replicas; files add it up."""
        self.values.assign(times(self.values, factor))

    def _cast(self, gradient: Gradient) -> Gradient:
        return map_values(lambda values: tf.cast(values, self.values.dtype), gradient)


class SparseSum(AutoTrackable):  # type: ignore[misc]
    """A sum of slices, kept as the slices themselves: no pass over the table they are of.

    Each micro-batch writes its slices behind those before it, into variables that have room for
    the longest window so far.
    """

    def __init__(self, shape: tf.TensorShape, dtype: tf.DType) -> None:
        row = shape[1:]
        self._dense_shape = tuple(shape)
        # By another name than a dense sum's, for which a checkpoint must not take it.
        self.slices = local_variable(tf.zeros([0, *row], dtype), of_all="sum", shape=[None, *row])
        self.rows = local_variable(tf.zeros([0], tf.int64), of_all="first", shape=[None])
        self.held = local_variable(0, tf.int64, of_all="first")

    def state(self) -> list[tf.Variable]:
        """The variables in one order."""
        return [self.slices, self.rows, self.held]

    def clear(self) -> None:
        """Store nothing."""
        self.held.assign(0)

    def put(self, gradient: Gradient) -> None:
        """Write a gradient over whatever is stored."""
        self._write(gradient, tf.constant(0, tf.int64))

    def add(self, gradient: Gradient) -> None:
        """Add a gradient to what is stored."""
        self._write(gradient, self.held.read_value())

    def read(self) -> Gradient:
        """What is stored."""
        # Gathered, because to read the variables whole would copy them whole.
        held = tf.range(self.held)
        values, rows = tf.gather(here(self.slices), held), tf.gather(here(self.rows), held)
        return tf.IndexedSlices(values, rows, tf.constant(self._dense_shape, tf.int64))

    def spread(self, factor: tf.Tensor) -> None:
        """Have all replicas hold the same slices, in units of all: of each its part."""
        held = self.read()
        rows = gathered(held.indices)
        self.slices.assign(gathered(times(held.values, factor)) / count_replicas())
        self.rows.assign(rows)
        self.held.assign(tf.size(rows, tf.int64))

    def _write(self, gradient: Gradient, start: tf.Tensor) -> None:
        """Write a gradient behind the first slices."""
        slices = as_slices(gradient)
        end = start + tf.size(slices.indices, tf.int64)
        room = tf.raw_ops.VariableShape(input=here(self.rows).handle, out_type=tf.int64)[0]
        rarely(end > room, lambda: self._make_room(start, tf.maximum(end, 2 * room)))
        places = tf.range(start, end)
        for variable, values in ((self.slices, slices.values), (self.rows, slices.indices)):
            values = tf.cast(values, variable.dtype)
            here(variable).scatter_update(tf.IndexedSlices(values, places))
        self.held.assign(end)

    def _make_room(self, held: tf.Tensor, room: tf.Tensor) -> None:
        for variable in (self.slices, self.rows):
            kept = tf.gather(here(variable), tf.range(held))
            free = tf.zeros([room - held, *variable.shape[1:]], variable.dtype)
            variable.assign(tf.concat([kept, free], 0))
