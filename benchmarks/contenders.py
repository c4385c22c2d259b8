"""The ways of training on a window of eight micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ga_transform as ga
from benchmarks import by_hand
from benchmarks.workloads import Workload

__all__ = ["ACCUM_STEPS", "CONTENDERS", "Contender"]

#: Micro-batches a window.
ACCUM_STEPS = 8


@dataclass(frozen=True)
class Contender:
    """A way of training."""

    build: Callable[[Workload], Any]
    #: What it takes from the iterator at a time: one micro-batch, or the rows of a window.
    micro_batches_a_batch: int = 1


def _plain(workload: Workload) -> Any:
    return workload.compiled()


def _converted(workload: Workload) -> Any:
    return ga.make_accumulating(workload.compiled(), accum_steps=ACCUM_STEPS)


def _window_a_call(workload: Workload) -> Any:
    model = workload.compiled(steps_per_execution=ACCUM_STEPS)
    return ga.make_accumulating(model, accum_steps=ACCUM_STEPS)


def _split(workload: Workload) -> Any:
    return ga.make_accumulating(workload.compiled(), micro_batch_size=workload.micro_batch_size)


def _by_hand(workload: Workload) -> Any:
    model = workload.compiled(steps_per_execution=ACCUM_STEPS)  # so many does a call take
    model.train_function = by_hand.train_on_micro_batches(model, ACCUM_STEPS)
    return model


def _by_hand_slicing(workload: Workload) -> Any:
    model = workload.compiled()
    model.train_function = by_hand.train_on_slices(model, ACCUM_STEPS)
    return model


def _ancestor(workload: Workload) -> Any:
    from gradient_accumulator import GradientAccumulateModel

    model = workload.build()
    return workload.compiled(
        GradientAccumulateModel(accum_steps=ACCUM_STEPS, inputs=model.input, outputs=model.output)
    )


CONTENDERS: dict[str, Contender] = {
    "plain": Contender(_plain),
    "converted": Contender(_converted),
    "window a call": Contender(_window_a_call),
    "split": Contender(_split, ACCUM_STEPS),
    "by hand": Contender(_by_hand),
    "by hand, slicing": Contender(_by_hand_slicing, ACCUM_STEPS),
    "ancestor": Contender(_ancestor),
    "full batch": Contender(_plain, ACCUM_STEPS),
}
