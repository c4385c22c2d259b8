"""Measures: what the updates of a window were like, counted where they are made.

There are none unless somebody asks (`AccumulationLog` does): then the training function is traced
with them, and without them again afterwards.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional, Union

import tensorflow as tf

from ga_transform.chain import Chain
from ga_transform.numerics import Gradient, global_norm, sum_repeated_rows, widened
from ga_transform.replicas import local_variable
from ga_transform.specs import Transform
from ga_transform.stages import counter_of

__all__ = ["Measures", "Sums"]

NORM, CLIPPED_NORM = "gradient_norm", "clipped_gradient_norm"


class Units(NamedTuple):
    """What a clip may clip: variables, or what they hold."""

    clipped: Any
    all: Any


class Sums(NamedTuple):
    """What is counted of a window's updates: variables, or what they hold at a moment."""

    updates: Any
    partial_windows: Any
    micro_batches: Any
    #: By their names in logs.
    norms: dict[str, Any]
    #: By the names of their shares in logs.
    units: dict[str, Units]

    def since(self, before: Optional[Sums]) -> dict[str, Union[int, float]]:
        """What is logged of the updates since an earlier moment, or the first; NaN for means of none.

        Args:
            before: The numbers of that moment.
        """
        change = self if before is None else tf.nest.map_structure(operator.sub, self, before)
        updates = change.updates
        norms = {name: _mean(norm, updates) for name, norm in change.norms.items()}
        shares = {name: _mean(*units) for name, units in change.units.items()}
        return {
            "updates": int(updates),
            "partial_windows": int(change.partial_windows),
            "micro_batches_per_update": _mean(change.micro_batches, updates),
            **norms,
            **shares,
        }


class Measures:
    """Sums over the updates of one window, since they were begun.

    Args:
        chain: Of the model.
    """

    def __init__(self, chain: Chain) -> None:
        stages = chain.update_stages
        #: By the places of clips among the stages of an update, the names of their shares in logs.
        self._shares = _names_of_shares(stages)
        with tf.init_scope():
            self._sums = Sums(
                updates=_variable(),
                partial_windows=_variable(),
                micro_batches=_variable(),
                norms={name: _variable() for name in ([NORM, CLIPPED_NORM] if stages else [NORM])},
                units={name: Units(_variable(), _variable()) for name in self._shares.values()},
            )
            #: The micro-batches of the window that ends now; one, where all are windows.
            self._size = _variable(1)

    def end_window(self, micro_batches: Any) -> None:
        """Hear of a window that ends, before its update is made, or is not.

        Args:
            micro_batches: How many it holds. Shape: scalar.
        """
        self._size.assign(tf.cast(micro_batches, tf.float64))

    def note_partial(self) -> None:
        """Hear that the window that ends is a partial one."""
        self._sums.partial_windows.assign_add(1)

    def note_update(self, gradients: Sequence[Gradient], staged: Sequence[Gradient]) -> None:
        """Hear of an update, as it is made.

        Args:
            gradients: The means over its window.
            staged: What the stages have made of them.
        """
        self._sums.updates.assign_add(1)
        self._sums.micro_batches.assign_add(self._size)
        self._sums.norms[NORM].assign_add(_norm(gradients))
        if CLIPPED_NORM in self._sums.norms:
            self._sums.norms[CLIPPED_NORM].assign_add(_norm(staged))

    def note_stage(
        self,
        place: int,
        spec: Transform,
        before: Sequence[Gradient],
        after: Sequence[Gradient],
        variables: Sequence[tf.Variable],
        model: Any,
    ) -> None:
        """Hear what a stage has done in an update."""
        count_clipped = counter_of(spec)
        if count_clipped is not None:
            counts = count_clipped(spec, before, after, variables, model)
            for total, count in zip(self._sums.units[self._shares[place]], counts):
                total.assign_add(tf.cast(count, tf.float64))

    def read(self) -> Sums:
        """The numbers so far."""
        numbers: Sums = tf.nest.map_structure(lambda each: float(each.numpy()), self._sums)
        return numbers


def _names_of_shares(stages: Sequence[Transform]) -> dict[int, str]:
    """By the place of each clip, the name of its share in logs: with its stage, where it must be."""
    clips = {place: type(spec).__name__ for place, spec in enumerate(stages) if counter_of(spec)}
    kinds = list(clips.values())
    if len(kinds) == 1:
        return dict.fromkeys(clips, "clipped_share")
    return {
        place: f"clipped_share_stage_{place + 1}_{kind}"
        if kinds.count(kind) > 1
        else f"clipped_share_{kind}"
        for place, kind in clips.items()
    }


def _variable(value: int = 0) -> tf.Variable:
    return local_variable(value, tf.float64, of_all="first", is_shared=True)


def _norm(gradients: Sequence[Gradient]) -> tf.Tensor:
    """The norm of all gradients together. Shape: scalar, float64."""
    if not gradients:
        return tf.zeros([], tf.float64)
    norm = global_norm([sum_repeated_rows(widened(gradient)) for gradient in gradients])
    return tf.cast(norm, tf.float64)


def _mean(total: float, count: float) -> float:
    return total / count if count else float("nan")
