"""The sums of a variable's gradients that a window stores: dense, or the slices themselves."""

from __future__ import annotations

import tensorflow as tf

from ga_transform._keras import AutoTrackable
from ga_transform.numerics import Gradient, as_dense, as_slices, map_values

__all__ = ["DenseSum", "SparseSum"]


class DenseSum(AutoTrackable):  # type: ignore[misc]
    """A sum of gradients of a variable's whole shape."""

    def __init__(self, shape: tf.TensorShape, dtype: tf.DType) -> None:
        self.values = tf.Variable(tf.zeros(shape, dtype), trainable=False)

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
            self.values.scatter_add(gradient)
        else:
            self.values.assign_add(gradient)

    def read(self) -> Gradient:
        """What is stored."""
        return tf.convert_to_tensor(self.values)

    def _cast(self, gradient: Gradient) -> Gradient:
        return map_values(lambda values: tf.cast(values, self.values.dtype), gradient)


class SparseSum(AutoTrackable):  # type: ignore[misc]
    """A sum of slices, kept as the slices themselves: no pass over the table they are of."""

    def __init__(self, shape: tf.TensorShape, dtype: tf.DType) -> None:
        row = shape[1:]
        self._dense_shape = tuple(shape)
        # By another name than a dense sum's, for which a checkpoint must not take it.
        self.slices = tf.Variable(tf.zeros([0, *row], dtype), trainable=False, shape=[None, *row])
        self.rows = tf.Variable(tf.zeros([0], tf.int64), trainable=False, shape=[None])

    def state(self) -> list[tf.Variable]:
        """The variables in one order."""
        return [self.slices, self.rows]

    def clear(self) -> None:
        """Store nothing."""
        self._write(self.slices[:0], self.rows[:0])

    def put(self, gradient: Gradient) -> None:
        """Write a gradient over whatever is stored."""
        self._write(*self._parts(gradient))

    def add(self, gradient: Gradient) -> None:
        """Add a gradient to what is stored."""
        slices = self.plus(gradient)
        self._write(slices.values, slices.indices)

    def plus(self, gradient: Gradient) -> tf.IndexedSlices:
        """What is stored together with a gradient, which is not stored."""
        values, rows = self._parts(gradient)
        return self._slices(tf.concat([self.slices, values], 0), tf.concat([self.rows, rows], 0))

    def read(self) -> Gradient:
        """What is stored."""
        return self._slices(self.slices.read_value(), self.rows.read_value())

    def _write(self, values: tf.Tensor, rows: tf.Tensor) -> None:
        self.slices.assign(values)
        self.rows.assign(rows)

    def _parts(self, gradient: Gradient) -> tuple[tf.Tensor, tf.Tensor]:
        slices = as_slices(gradient)
        return tf.cast(slices.values, self.slices.dtype), tf.cast(slices.indices, tf.int64)

    def _slices(self, values: tf.Tensor, rows: tf.Tensor) -> tf.IndexedSlices:
        return tf.IndexedSlices(values, rows, tf.constant(self._dense_shape, tf.int64))
