"""What is not finite: windows that are skipped, micro-batches that are left out of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tensorflow as tf

from ga_transform.numerics import Gradient, all_finite
from ga_transform.replicas import all_together, decide, local_variable, sum_here, summed

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
            self._windows = local_variable(0, tf.int64, of_all="first", is_shared=True)
            # What a replica leaves out is its own; a file's sum is divided among replicas.
            self._micro_batches = local_variable(0, tf.float64, of_all="sum", is_shared=True)
            #: Of the window that is filled now.
            self._left_out = local_variable(0, tf.float64, of_all="sum")

    @property
    def counts_here(self) -> tuple[int, int]:
        """Skipped windows, and micro-batches left out by the replicas of this process."""
        with tf.init_scope():
            return int(self._windows.numpy()), round(sum_here(self._micro_batches))

    @property
    def counts(self) -> tuple[int, int, int]:
        """Skipped windows, and micro-batches left out: of all windows, and of the present one.

        Of all replicas: where some may leave micro-batches out, all processes have to ask.
        """
        if not self.leaves_out:
            return (*self.counts_here, 0)
        with tf.init_scope():
            windows, micro_batches, left_out = (int(each.numpy()) for each in self._variables())
            return windows, micro_batches, left_out

    @counts.setter
    def counts(self, counts: Sequence[int]) -> None:
        for variable, count in zip(self._variables(), counts):
            variable.assign(count)

    def leave_out(self, is_left_out: tf.Tensor) -> None:
        """Count a micro-batch, if it is left out."""
        for count in (self._micro_batches, self._left_out):
            count.assign_add(tf.cast(is_left_out, count.dtype))

    def skip(self) -> None:
        """Count a window whose update is not made."""
        self._windows.assign_add(1)
        all_together(self._lower_scale)

    def skip_if_left_out(self) -> None:
        """Count a window of which nothing is left, if it has been given something."""
        self._if_left_out(self.skip)

    def guard(self, gradients: Sequence[Gradient], make: Callable[[], None]) -> None:
        """Make an update, if its gradients are finite.

        Args:
            gradients: Of the update, before any stage.
            make: Makes it.
        """
        if not self._guards_updates:
            make()
            return

        def made() -> None:
            make()
            self._if_left_out(lambda: all_together(self._lower_scale))

        decide(all_finite(gradients), made, self.skip)

    def begin(self) -> None:
        """Begin another window."""
        if self.leaves_out:
            self._left_out.assign(tf.zeros_like(self._left_out))

    def _if_left_out(self, action: Callable[[], None]) -> None:
        """Do something if a replica has left out a micro-batch of this window."""
        if self.leaves_out:
            (left_out,) = summed([self._left_out.read_value()])
            decide(left_out > 0, action)

    def _variables(self) -> list[tf.Variable]:
        return [self._windows, self._micro_batches, self._left_out]
