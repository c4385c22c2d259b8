"""Accumulate: the window of one optimizer, kept in variables between calls.

The first micro-batch of a window writes its gradients, without a look at what is stored; the
others add theirs, each as soon as it is there, so that no more of a micro-batch's gradients are in
memory than need be. The update reads the sums when the window's last batch is done.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any, Optional, Union

import tensorflow as tf

from ga_transform._graphs import is_compiled
from ga_transform._keras import AutoTrackable
from ga_transform.layouts import SumLayout
from ga_transform.loss_terms import MEAN
from ga_transform.numerics import all_finite
from ga_transform.replicas import count_replicas, decide, local_variable, summed
from ga_transform.stages.books import Book, Share
from ga_transform.stages.skips import Skips
from ga_transform.stages.update import Update, make_update

__all__ = ["Window"]


class Window(AutoTrackable):  # type: ignore[misc]
    """The micro-batches whose gradients make one update of one optimizer.

    Args:
        steps: Batches a window, or a schedule by updates.
        is_split: Whether each batch is several micro-batches, and not one.
        keep_size: Whether weighted gradients must keep their usual size, which is all that
            float16 can hold.
        skips: What is done about gradients that are not finite.
    """

    def __init__(
        self,
        steps: Union[int, Mapping[int, int]],
        *,
        is_split: bool,
        keep_size: bool,
        skips: Skips,
    ) -> None:
        schedule = steps if isinstance(steps, Mapping) else {0: steps}
        # Tuples, because a list or dict would be wrapped for tracking.
        self._starts = tuple(sorted(schedule))
        self._steps = tuple(schedule[start] for start in self._starts)
        self._is_split = is_split
        self._keep_size = keep_size
        self.skips = self._no_dependency(skips)
        self._books = self._no_dependency({})
        with tf.init_scope():
            self.micro_batches = local_variable(0, tf.int64, of_all="first")
            self.reference = local_variable(0, tf.float64, of_all="first")
            if is_split and self.crosses_batches:
                self.batches = local_variable(0, tf.int64, of_all="first")
            if len(self._steps) > 1:
                self.updates = local_variable(0, tf.int64, of_all="first")

    @property
    def holds(self) -> int:
        """The micro-batches that wait for another batch, also while a function is traced."""
        with tf.init_scope():
            return int(self.micro_batches.numpy())

    @property
    def bytes_held(self) -> int:
        """The memory of its sums, on each replica."""
        return sum(book.bytes_held for book in self._books.values())

    def size_with(self, slices: Optional[tf.Tensor]) -> tf.Tensor:
        """The micro-batches that it holds, with those of a batch. Shape: scalar, int64.

        Args:
            slices: As in `end_batch`.
        """
        held = self.micro_batches.read_value()
        return held if slices is None else held + tf.cast(slices, tf.int64)

    @property
    def is_single(self) -> bool:
        """Whether every micro-batch is a window, so that nothing need be stored."""
        return not (self._is_split or self.crosses_batches)

    @property
    def weighs_alike(self) -> bool:
        """Whether a micro-batch is all that an update is made of, so that its weight is none."""
        return self.is_single and count_replicas() == 1

    @property
    def crosses_batches(self) -> bool:
        """Whether a window may be of several batches."""
        return set(self._steps) != {1}

    def is_empty(self, slice_index: Optional[tf.Tensor] = None) -> tf.Tensor:
        """Whether the next micro-batch is the window's first. Shape: scalar, bool.

        Args:
            slice_index: Which slice of its batch that is, where it can be seen from here.
        """
        if slice_index is None:
            return tf.equal(self.micro_batches, 0)
        is_first_slice = tf.equal(slice_index, 0)
        return (
            is_first_slice & tf.equal(self.batches, 0) if self.crosses_batches else is_first_slice
        )

    def stores_nothing(self, slice_index: Optional[tf.Tensor] = None) -> tf.Tensor:
        """Whether all that the window was given weighed nothing. Shape: scalar, bool.

        Args:
            slice_index: As in `is_empty`.
        """
        weights = [book.weight.read_value() for book in self._books.values()]
        return self.is_empty(slice_index) | (tf.add_n(weights) <= 0 if weights else False)

    def relative(self, weight: tf.Tensor, slice_index: Optional[tf.Tensor] = None) -> tf.Tensor:
        """A weight in units of the window: of one element, or of its first micro-batch.

        Shape: scalar.
        """
        if self.weighs_alike:
            return tf.cast(weight > 0, weight.dtype)
        if not self._keep_size:
            return weight
        return weight / _positive(
            tf.where(self.stores_nothing(slice_index), weight, self.reference)
        )

    def lacking(self, present: Container[Any]) -> list[tf.Variable]:
        """The variables that other batches of a window may have a gradient for.

        Args:
            present: References of those that this batch has one for.
        """
        if not self.crosses_batches:
            return []
        known = dict.fromkeys(ref for book in self._books.values() for ref in book.awake())
        return [reference.deref() for reference in known if reference not in present]

    def begin_batch(self) -> None:
        """Prepare for the slices of a batch."""
        if not self.crosses_batches:
            self.micro_batches.assign(0)  # a batch that failed may have left some
            self.skips.begin()

    def add(
        self,
        variables: Sequence[tf.Variable],
        shares: Sequence[Share],
        weight: tf.Tensor,
        slice_index: Optional[tf.Tensor] = None,
    ) -> bool:
        """Store one micro-batch: write the first over what is stored, add the others to it.

        Args:
            variables: What the optimizer was handed, with a gradient or without.
            shares: What the micro-batch gives, one share for each kind of loss.
            weight: The micro-batch's weight, of which `relative` was taken.
            slice_index: As in `is_empty`; slices so known are counted when all are done.

        Returns:
            Whether a variable that had no gradient in earlier traces has one in this, of which
            those know nothing.
        """
        given = {share.kind: share for share in shares}
        has_grown = self._open(shares, variables)

        def put() -> tf.Tensor:
            if self._keep_size:
                self.reference.assign(weight)
            for book in self._books.values():
                book.put(given.get(book.kind))
            return tf.constant(0)

        def add() -> tf.Tensor:
            for share in shares:
                self._books[share.kind].add(share)
            return tf.constant(0)

        def leave_out() -> tf.Tensor:
            for book in self._books.values():
                book.weight.assign(tf.where(is_empty, tf.zeros_like(book.weight), book.weight))
            return tf.constant(0)

        is_empty = self.is_empty(slice_index)
        # Gradients of no rows are whatever was in memory, of some operations.
        counts = tf.add_n([share.weight for share in shares]) > 0
        if self.skips.leaves_out:
            gradients = [each for share in shares for each in share.gradients.values()]
            is_finite = all_finite(gradients)
            self.skips.leave_out(counts & ~is_finite)
            counts &= is_finite
        place = tf.where(counts, tf.where(self.stores_nothing(slice_index), 0, 1), 2)
        tf.switch_case(place, [put, add, leave_out])
        if slice_index is None:
            self.micro_batches.assign_add(1)
        return has_grown

    def end_batch(
        self,
        variables: Sequence[tf.Variable],
        iterations: Any,
        update: Update,
        slices: Optional[tf.Tensor] = None,
        present: Optional[Container[Any]] = None,
    ) -> None:
        """Where the batch is the window's last, make the update.

        Args:
            variables: What the optimizer was handed, with a gradient or without.
            iterations: The optimizer's count of updates, for a schedule.
            update: Makes the update, if the window weighs anything.
            slices: How many slices `add` has been given an index of.
            present: References of the variables that have a gradient in these.
        """
        if slices is not None and self.crosses_batches:
            self.micro_batches.assign_add(tf.cast(slices, tf.int64))
        is_last = tf.constant(True)
        if slices is None or self.crosses_batches:
            is_last = self.micro_batches > 0  # the step may have handed over nothing
        if self.crosses_batches:
            batches = self.micro_batches
            if self._is_split:
                batches = self.batches
                batches.assign_add(tf.cast(is_last, tf.int64))
            is_last &= batches >= self.steps_at(iterations)
            present = None  # others may have them
        # Counts of replicas differ after a batch that failed on one of them: whatever ends a window
        # is decided in common, so that theirs ends with it.
        decide(is_last, lambda: self._end(variables, present, update))

    def flush(self, update: Update) -> None:
        """Make the update of what is stored, with its own weights.

        Args:
            update: As in `end_batch`.
        """
        self._end([], None, update)

    def discard(self) -> None:
        """Forget what the window holds."""
        for count in self._counts():
            count.assign(0)
        self.skips.begin()

    def _end(
        self,
        variables: Sequence[tf.Variable],
        present: Optional[Container[Any]],
        update: Update,
    ) -> None:
        """Make the update, and begin another window."""
        totals = [book.total(present) for book in self._books.values()]
        totals = self.in_common_units(totals, self.reference.read_value())
        make_update(variables, totals, update, self.skips.skip_if_left_out)
        self.discard()
        if len(self._steps) > 1:
            self.updates.assign_add(1)

    def in_common_units(self, shares: Sequence[Share], reference: tf.Tensor) -> list[Share]:
        """What replicas can add up: of means whose weights keep their size, each has its own unit.

        Args:
            shares: Of this replica.
            reference: The weight that theirs are relative to. Shape: scalar, float64.
        """
        if not self._keep_size or count_replicas() == 1:
            return list(shares)
        unit = _positive(reference)
        return [share.times(unit) if share.kind == MEAN else share for share in shares]

    # ---- in files --------------------------------------------------------------------------

    def spread(self) -> None:
        """Divide what all replicas hold evenly among them, so that files can add it up."""
        unit = tf.ones([], tf.float64)
        if self._keep_size:
            own = _positive(self.reference.read_value())
            (total,) = summed([own])
            common = total / count_replicas()
            unit = own / common
            self.reference.assign(common)
        for book in self._books.values():
            book.spread(unit)

    def layout(self, positions: Mapping[Any, int]) -> Optional[dict[str, list[SumLayout]]]:
        """By kind, the sums that are stored; none where the window holds no micro-batch.

        Args:
            positions: By reference, where the variables stand among the model's weights.

        Returns:
            None, if one of the variables has no position.
        """
        if not self.holds:
            return {}
        books = {kind: book.layout(positions) for kind, book in self._books.items()}
        return None if None in books.values() else books

    def arrange(self, layout: Mapping[str, Sequence[SumLayout]], weights: Sequence[Any]) -> None:
        """Make the sums of a layout, for values that are to be restored.

        Args:
            layout: As the method of that name returned.
            weights: The model's weights, in the order of the layout's positions.
        """
        for kind, sums in layout.items():
            self._book(kind).arrange(sums, weights)

    def state(
        self, layout: Mapping[str, Sequence[SumLayout]], weights: Sequence[Any]
    ) -> list[tf.Variable]:
        """The variables in the order of a layout."""
        counts = [*self._counts(), self.reference]
        if len(self._steps) > 1:
            counts.append(self.updates)
        books = [self._books[kind].state(sums, weights) for kind, sums in layout.items()]
        return counts + [variable for book in books for variable in book]

    def _trackable_children(self, save_type: str = "checkpoint", **kwargs: Any) -> dict[str, Any]:
        # An empty window's sums are what the next one writes over: no checkpoint carries them.
        children: dict[str, Any] = super()._trackable_children(save_type, **kwargs)
        if self.holds:
            return children
        return {name: child for name, child in children.items() if not isinstance(child, Book)}

    # ----------------------------------------------------------------------------------------

    def _counts(self) -> list[tf.Variable]:
        """The variables that count what the window holds."""
        has_batches = self._is_split and self.crosses_batches
        return [self.micro_batches, *([self.batches] if has_batches else [])]

    def steps_at(self, iterations: Any) -> tf.Tensor:
        """How many batches make the window that is filled now. Shape: scalar, int64."""
        if len(self._steps) == 1:
            return tf.constant(self._steps[0], tf.int64)
        # An optimizer that is made of others may have no count of its own, or one that rests.
        count = 0 if iterations is None else tf.cast(iterations, tf.int64)
        updates = tf.maximum(self.updates, count)
        started = tf.cast(updates >= tf.constant(self._starts, tf.int64), tf.int32)
        return tf.gather(tf.constant(self._steps, tf.int64), tf.reduce_sum(started) - 1)

    def _open(self, shares: Sequence[Share], variables: Sequence[tf.Variable]) -> bool:
        """See to it that there is a book for each kind, with a sum for each gradient.

        Returns:
            Whether a book has been in use without one of them.
        """
        has_grown = False
        for share in shares:
            # The rows of slices vary in number, which XLA does not allow of a variable.
            keep_sparse = not is_compiled()
            has_grown |= self._book(share.kind).open(share, variables, keep_sparse)
        return has_grown

    def _book(self, kind: str) -> Book:
        if kind not in self._books:
            self._books[kind] = Book(kind)
            setattr(self, f"{kind}_book", self._books[kind])  # checkpointed under this name
        return self._books[kind]  # type: ignore[no-any-return]


def _positive(weight: tf.Tensor) -> tf.Tensor:
    """A weight to be relative to: itself, or one."""
    return tf.where(weight > 0, weight, tf.ones_like(weight))
