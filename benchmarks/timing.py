"""Seconds of training, taken so that contenders can be compared."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Optional

import tf_keras

__all__ = ["interleaved", "seconds_of_epoch", "steps_that_take"]


class _EpochClock(tf_keras.callbacks.Callback):
    """The seconds from an epoch's begin to its end.

    What `fit` does around an epoch is left out: it is the same for all, and closing an iterator
    may sleep for as long as the epoch took.
    """

    seconds: Optional[float] = None

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._begin = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.seconds = time.perf_counter() - self._begin


def seconds_of_epoch(model: Any, batches: Any, steps: int) -> float:
    """Train for an epoch of so many steps.

    Args:
        model: Compiled.
        batches: A dataset without an end.
        steps: Batches an epoch.
    """
    clock = _EpochClock()
    model.fit(batches, epochs=1, steps_per_epoch=steps, verbose=0, callbacks=[clock])
    if clock.seconds is None:
        raise RuntimeError(f"fit of {model.name!r} has ended no epoch.")
    return clock.seconds


def steps_that_take(seconds: float, run: Callable[[int], float]) -> int:
    """How many steps take so long: doubled until they nearly do, then by proportion.

    Args:
        seconds: How long.
        run: Makes so many steps, and returns the seconds.
    """
    steps, taken = 1, run(1)
    while taken < seconds / 2:
        steps *= 2
        taken = run(steps)
    return max(1, math.ceil(steps * seconds / taken))


def interleaved(runs: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Every contender once a round, each round beginning with another.

    Args:
        runs: By contender, what runs it once and returns its seconds.
        rounds: How many.

    Returns:
        By contender, its seconds in each round.
    """
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % max(1, len(names))
        for name in [*names[first:], *names[:first]]:
            seconds[name].append(runs[name]())
    return seconds
