"""Loops: a function of one slice of a batch, traced once, and run on all slices in a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

import tensorflow as tf

from ga_transform import _keras
from ga_transform.slices import Slices

__all__ = ["SliceFunction", "fold", "with_remainder"]


class SliceFunction:
    """A function of a slice, of which a graph has one, however many slices there are.

    Args:
        slices: Of a batch.
        function: Is given the index of a slice and its tensors; returns tensors in a structure.
        rows: Of another slice than these, which is never run.

    Attributes:
        traced: The concrete function.
    """

    def __init__(
        self,
        slices: Slices,
        function: Callable[[tf.Tensor, list[Any]], Any],
        rows: Optional[int] = None,
    ) -> None:
        specs = slices.specs(rows)
        # Layers within are converted by AutoGraph if they would be without slices; we are not.
        context = tf.__internal__.autograph.control_status_ctx()

        def run(index: tf.Tensor, *parts: tf.Tensor) -> Any:
            with context:
                tensors = tf.nest.pack_sequence_as(specs, parts, expand_composites=True)
                return function(index, tensors)

        index_spec = tf.TensorSpec([], slices.count.dtype)
        with _keras.tracing_once():
            function_of_parts = tf.function(run, autograph=False)
            self.traced = function_of_parts.get_concrete_function(index_spec, *_parts(specs))

    def __call__(self, index: tf.Tensor, tensors: list[Any]) -> Any:
        """What the function returns for a slice."""
        return self.traced(index, *_parts(tensors))


Add = Callable[[Any, tf.Tensor, list[Any]], Any]


def fold(
    slices: Slices, add: Add, begun: Any, shapes: Any = None, first: int = 0
) -> tuple[tf.Tensor, Any]:
    """Add one slice after the other to something, without a remainder.

    Args:
        slices: Of a batch.
        add: Is given what has come of the slices before, and a slice's index and tensors; returns
            what comes of both, in the same structure.
        begun: Tensors in a structure, to which the first slice is added.
        shapes: Theirs, open where they may change; None, if none does.
        first: The index of the first slice.

    Returns:
        How many slices were taken, which is there when all were; and what has come of them.
    """
    start = tf.zeros_like(slices.count)
    return tf.while_loop(  # type: ignore[no-any-return]
        lambda index, _: index < slices.count,
        lambda index, so_far: (index + 1, add(so_far, index, slices.take(index))),
        (start + first, begun),
        shape_invariants=None if shapes is None else (start.shape, shapes),
        parallel_iterations=1,
    )


def with_remainder(slices: Slices, add: Add, so_far: Any) -> Any:
    """Add the rows that are left over from slices of a fixed size, if there are any.

    Args:
        slices, add: As for `fold`.
        so_far: What has come of all slices of that size.
    """
    if not slices.may_have_remainder:
        return so_far
    rest = slices.remainder()
    return tf.cond(
        slices.total > slices.count, lambda: add(so_far, slices.count, rest), lambda: so_far
    )


def _parts(tensors: Any) -> list[Any]:
    """Tensors or specs, and what ragged and sparse ones are made of."""
    return tf.nest.flatten(tensors, expand_composites=True)  # type: ignore[no-any-return]
