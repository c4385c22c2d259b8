"""What is not finite: windows that are skipped, micro-batches that are left out of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tensorflow as tf

from ga_transform.numerics import Gradient, all_finite

__all__ = ["Skips"]


class Skips:
    """Of one window: whether its update is made, and how many were not.

    Its counts are no variables of a checkpoint: the layout of the window carries them.

    Args:
        guards_updates: Whether an update that is not finite is skipped.
        leaves_out: Whether a micro-batch that is not finite is left out.
        lower_scale: Is called where something was not finite, once a window.
    """

    def __init__(
        self, *, guards_updates: bool, leaves_out: bool, lower_scale: Callable[[], None]
    ) -> None:
        self.leaves_out = leaves_out
        self._guards_updates = guards_updates
        self._lower_scale = lower_scale
        with tf.init_scope():
            self._windows = tf.Variable(0, trainable=False, dtype=tf.int64)
            self._micro_batches = tf.Variable(0, trainable=False, dtype=tf.int64)
            #: Of the window that is filled now.
            self._left_out = tf.Variable(0, trainable=False, dtype=tf.int64)

    @property
    def counts(self) -> tuple[int, int, int]:
        """Skipped windows, and micro-batches left out: of all windows, and of the present one."""
        with tf.init_scope():
            windows, micro_batches, left_out = self._variables()
            return int(windows.numpy()), int(micro_batches.numpy()), int(left_out.numpy())

    @counts.setter
    def counts(self, counts: Sequence[int]) -> None:
        for variable, count in zip(self._variables(), counts):
            variable.assign(count)

    def leave_out(self) -> None:
        """Count a micro-batch that is left out."""
        self._micro_batches.assign_add(1)
        self._left_out.assign_add(1)

    @property
    def left_out(self) -> tf.Tensor:
        """How many micro-batches of this window are left out. Shape: scalar, int64."""
        return self._left_out.read_value()

    def skip(self) -> None:
        """Count a window whose update is not made."""
        self._windows.assign_add(1)
        self._lower_scale()

    def guard(self, gradients: Sequence[Gradient], make: Callable[[], None]) -> None:
        """Make an update, if its gradients are finite.

        Args:
            gradients: Of the update, before any stage.
            make: Makes it.
        """
        if not self._guards_updates:
            make()
            return

        def made() -> tf.Tensor:
            make()
            if self.leaves_out:
                tf.cond(self.left_out > 0, lambda: _done(self._lower_scale), _nothing)
            return tf.constant(0)

        tf.cond(all_finite(gradients), made, lambda: _done(self.skip))

    def begin(self, is_new: tf.Tensor) -> None:
        """Begin another window, where this one has ended."""
        if self.leaves_out:
            count = self._left_out
            count.assign(tf.where(is_new, tf.zeros_like(count), count))

    def _variables(self) -> list[tf.Variable]:
        return [self._windows, self._micro_batches, self._left_out]


def _nothing() -> tf.Tensor:
    return tf.constant(0)


def _done(action: Callable[[], None]) -> tf.Tensor:
    action()
    return tf.constant(0)
