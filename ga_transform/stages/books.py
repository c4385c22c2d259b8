"""The books of a window: for each kind of loss, the sums of gradients and of weights."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Optional

import tensorflow as tf

from ga_transform._keras import AutoTrackable, reference_of
from ga_transform.layouts import SumLayout
from ga_transform.loss_terms import MEAN
from ga_transform.numerics import Gradient, times, widened
from ga_transform.replicas import held_here, local_variable
from ga_transform.stages.sums import DenseSum, SparseSum

__all__ = ["Book", "Share"]


class Share(NamedTuple):
    """What one micro-batch gives to a window, of one kind of loss."""

    #: `MEAN` or `SUM`: whether the window's sum is divided by its weight.
    kind: str
    #: By variable reference; multiplied by `weight` already, where the kind is `MEAN`.
    gradients: Mapping[Any, Gradient]
    #: In units of the window. Shape: scalar, float64.
    weight: tf.Tensor

    def times(self, factor: tf.Tensor) -> Share:
        """The share in other units."""
        gradients = {each: times(gradient, factor) for each, gradient in self.gradients.items()}
        return self._replace(gradients=gradients, weight=self.weight * factor)


class Book(AutoTrackable):  # type: ignore[misc]
    """The sums of one kind of loss: of gradients, by variable, and of weights."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._sums = self._no_dependency({})
        self._idle = self._no_dependency(set())
        with tf.init_scope():
            self.weight = local_variable(0, tf.float64, of_all="sum")

    def open(self, share: Share, variables: Sequence[tf.Variable], keep_sparse: bool) -> bool:
        """See to it that each gradient of the share has a sum.

        A variable without a gradient gets one too, which idles: variables can be made in the
        first trace of a function only, and another trace may have a gradient for it.

        Returns:
            Whether a sum that idled in earlier traces does so no more.
        """
        for variable in variables:
            reference = reference_of(variable)
            if reference in self._sums:
                continue
            gradient = share.gradients.get(reference)
            self._make_sum(
                variable,
                widened(variable if gradient is None else gradient).dtype,
                is_sparse=keep_sparse and isinstance(gradient, tf.IndexedSlices),
                is_idle=gradient is None,
            )
        woken = self._idle & share.gradients.keys()
        self._idle.difference_update(woken)
        return bool(woken)

    def awake(self) -> list[Any]:
        """References of the variables that have had a gradient."""
        return [reference for reference in self._sums if reference not in self._idle]

    @property
    def bytes_held(self) -> int:
        """The memory of the sums, on each replica."""
        variables = [
            held_here(each)[0] for stored in self._sums.values() for each in stored.state()
        ]
        return sum(int(tf.size(each)) * int(each.dtype.size) for each in variables)

    def put(self, share: Optional[Share]) -> None:
        """Write a share over whatever is stored."""
        self.weight.assign(0 if share is None else share.weight)
        for reference, stored in self._sums.items():
            gradient = None if share is None else share.gradients.get(reference)
            stored.clear() if gradient is None else stored.put(gradient)

    def add(self, share: Share) -> None:
        """Add a share to what is stored."""
        self.weight.assign_add(share.weight)
        for reference, gradient in share.gradients.items():
            self._sums[reference].add(gradient)

    def total(self, present: Optional[Container[Any]] = None) -> Share:
        """What is stored: of all variables, or of those with these references."""
        gradients = {
            reference: self._sums[reference].read()
            for reference in self.awake()
            if present is None or reference in present
        }
        return Share(self.kind, gradients, self.weight.read_value())

    def spread(self, unit: tf.Tensor) -> None:
        """Have what replicas hold be such that files can add it up.

        Args:
            unit: In which this replica has stored it, relative to all. Shape: scalar, float64.
        """
        if self.kind != MEAN:  # sums are in no unit
            unit = tf.ones_like(unit)
        # Where nothing weighs anything, what is stored is of another window.
        factor = tf.where(self.weight > 0, unit, tf.zeros_like(unit))
        for stored in self._sums.values():
            stored.spread(factor)
        self.weight.assign(self.weight * unit)

    def layout(self, positions: Mapping[Any, int]) -> Optional[list[SumLayout]]:
        """Where the sums belong; None, if it cannot be said of one of them."""
        if not self._sums.keys() <= positions.keys():
            return None
        return [
            SumLayout(
                positions[reference],
                stored.state()[0].dtype.name,
                isinstance(stored, SparseSum),
                reference in self._idle,
            )
            for reference, stored in self._sums.items()
        ]

    def arrange(self, sums: Iterable[SumLayout], weights: Sequence[Any]) -> None:
        """Make the sums that there are not yet."""
        for position, dtype, is_sparse, is_idle in sums:
            variable = weights[position]
            if reference_of(variable) not in self._sums:
                self._make_sum(variable, tf.as_dtype(dtype), is_sparse=is_sparse, is_idle=is_idle)
            elif not is_idle:
                self._idle.discard(reference_of(variable))

    def state(self, sums: Iterable[SumLayout], weights: Sequence[Any]) -> list[tf.Variable]:
        """The variables in the order of a layout."""
        stored = [self._sums[reference_of(weights[each.position])] for each in sums]
        return [self.weight, *(variable for each in stored for variable in each.state())]

    def _make_sum(
        self, variable: tf.Variable, dtype: tf.DType, *, is_sparse: bool, is_idle: bool
    ) -> None:
        with tf.init_scope():
            made = (SparseSum if is_sparse else DenseSum)(variable.shape, dtype)
        setattr(self, f"sum_{len(self._sums)}", made)  # checkpointed under this name
        self._sums[reference_of(variable)] = made
        if is_idle:
            self._idle.add(reference_of(variable))
