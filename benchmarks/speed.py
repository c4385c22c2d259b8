"""speed: what a window of eight micro-batches costs, in each way of training on it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.processes import ask_or_note, line_of
from benchmarks.report import Outcome, figure_of_rounds

__all__ = ["run"]

MODELS = ("tiny MLP", "wide MLP", "CNN", "LSTM", "embedding", "transformer")
QUICK_MODELS = ("tiny MLP",)
COMPARED = (
    ("converted", "plain"),
    ("window a call", "by hand"),
    ("split", "by hand, slicing"),
    ("converted", "ancestor"),
    ("split", "full batch"),
)

#: Windows in the data, which are repeated.
WINDOWS = 8


def run(is_quick: bool) -> Outcome:
    """All contenders on all models, each model in a process of its own."""
    rounds, seconds = (3, 0.05) if is_quick else (9, 0.4)
    figures, notes, raw = [], [], {}
    for model in QUICK_MODELS if is_quick else MODELS:
        found = ask_or_note(
            notes, model, measure, model=model, rounds=rounds, seconds_a_run=seconds
        )
        raw[model] = measured = found or {"seconds": {}, "errors": {}}
        figures += [figure_of_rounds(model, measured["seconds"], *pair) for pair in COMPARED]
        notes += [f"{model}, {name}: {error}" for name, error in measured["errors"].items()]
    return Outcome(figures, notes, raw)


def measure(model: str, rounds: int, seconds_a_run: float) -> dict[str, Any]:
    """The seconds of each contender in each round, all on as many windows.

    Args:
        model: The name of a workload.
        rounds: How often each contender is run.
        seconds_a_run: How long the plain contender trains in a round, about.

    Returns:
        ``windows`` a run, ``seconds`` of each round by contender, ``errors`` of those that fail.
    """
    from benchmarks.contenders import ACCUM_STEPS, CONTENDERS
    from benchmarks.data import endless_batches
    from benchmarks.timing import interleaved, seconds_of_epoch, steps_that_take
    from benchmarks.workloads import WORKLOADS

    workload = WORKLOADS[model]
    rows = workload.rows(WINDOWS * ACCUM_STEPS * workload.micro_batch_size)

    def prepared(name: str) -> Callable[[int], float]:
        """A contender that is built, traced and warm: it trains on so many windows."""
        contender = CONTENDERS[name]
        trained = contender.build(workload)
        batch_size = contender.micro_batches_a_batch * workload.micro_batch_size
        batches = endless_batches(rows, batch_size)
        steps_a_window = ACCUM_STEPS // contender.micro_batches_a_batch

        def train(windows: int) -> float:
            return seconds_of_epoch(trained, batches, windows * steps_a_window)

        train(2)
        return train

    ready, errors = {}, {}
    for name in CONTENDERS:
        try:
            ready[name] = prepared(name)
        except Exception as error:  # noqa: BLE001, PERF203  (a note names it, others go on)
            errors[name] = line_of(error)
    windows = steps_that_take(seconds_a_run, ready["plain"])
    runs = {name: partial(train, windows) for name, train in ready.items()}
    return {"windows": windows, "seconds": interleaved(runs, rounds), "errors": errors}
