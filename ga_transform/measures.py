"""Measures: what the updates of a window were like, counted where they are made.

There are none unless somebody asks (`AccumulationLog` does): then the training function is traced
with them, and without them again afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Union

import tensorflow as tf

from ga_transform.chain import Chain
from ga_transform.numerics import Gradient, global_norm, sum_repeated_rows, widened
from ga_transform.replicas import local_variable
from ga_transform.specs import Transform
from ga_transform.stages import counter_of

__all__ = ["UPDATES", "Measures"]

UPDATES, PARTIAL_WINDOWS, MICRO_BATCHES = "updates", "partial_windows", "micro_batches"
NORM, CLIPPED_NORM = "gradient_norm", "clipped_gradient_norm"
PER_UPDATE = "micro_batches_per_update"


class Measures:
    """Sums over the updates of one window, since they were begun.

    Args:
        chain: Of the model.
    """

    def __init__(self, chain: Chain) -> None:
        #: By their places among the stages of an update.
        self._clips = {
            place: spec for place, spec in enumerate(chain.update_stages) if counter_of(spec)
        }
        self._has_stages = bool(chain.update_stages)
        names = [UPDATES, PARTIAL_WINDOWS, MICRO_BATCHES, NORM, CLIPPED_NORM]
        with tf.init_scope():
            self._sums = {name: _variable() for name in names}
            #: By clip, the units that were clipped, and all.
            self._units = {place: (_variable(), _variable()) for place in self._clips}
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
        self._sums[PARTIAL_WINDOWS].assign_add(1)

    def note_update(self, gradients: Sequence[Gradient], staged: Sequence[Gradient]) -> None:
        """Hear of an update, as it is made.

        Args:
            gradients: The means over its window.
            staged: What the stages have made of them.
        """
        self._sums[UPDATES].assign_add(1)
        self._sums[MICRO_BATCHES].assign_add(self._size)
        self._sums[NORM].assign_add(_norm(gradients))
        if self._has_stages:
            self._sums[CLIPPED_NORM].assign_add(_norm(staged))

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
            for total, count in zip(self._units[place], counts):
                total.assign_add(tf.cast(count, tf.float64))

    def read(self) -> dict[str, float]:
        """The sums so far, by name; those of a clip as "clipped" and "units", and its place."""
        sums = {name: float(variable.numpy()) for name, variable in self._sums.items()}
        for place, (clipped, units) in self._units.items():
            sums[f"clipped {place}"] = float(clipped.numpy())
            sums[f"units {place}"] = float(units.numpy())
        return sums

    @property
    def names(self) -> list[str]:
        """What `summary` may hold."""
        stages = [CLIPPED_NORM] if self._has_stages else []
        shares = self._names_of_shares().values()
        return [UPDATES, PARTIAL_WINDOWS, PER_UPDATE, NORM, *stages, *shares]

    def summary(
        self, sums: Mapping[str, float], before: Mapping[str, float]
    ) -> dict[str, Union[int, float]]:
        """What is logged of the updates between two readings; NaN for means of none."""
        change = {name: value - before.get(name, 0.0) for name, value in sums.items()}
        updates = change[UPDATES]
        logs: dict[str, Union[int, float]] = {
            UPDATES: int(updates),
            PARTIAL_WINDOWS: int(change[PARTIAL_WINDOWS]),
            PER_UPDATE: _mean(change[MICRO_BATCHES], updates),
            NORM: _mean(change[NORM], updates),
        }
        if self._has_stages:
            logs[CLIPPED_NORM] = _mean(change[CLIPPED_NORM], updates)
        for place, name in self._names_of_shares().items():
            logs[name] = _mean(change[f"clipped {place}"], change[f"units {place}"])
        return logs

    def _names_of_shares(self) -> dict[int, str]:
        """By clip, the name of its share in logs."""
        kinds = [type(clip).__name__ for clip in self._clips.values()]
        if len(kinds) == 1:
            return dict.fromkeys(self._clips, "clipped_share")
        return {
            place: f"clipped_share_{kind}" + (f"_{place}" if kinds.count(kind) > 1 else "")
            for place, kind in zip(self._clips, kinds)
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
