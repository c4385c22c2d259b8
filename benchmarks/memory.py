"""memory: the peak of a whole process that trains, beside one that trains plainly."""

from __future__ import annotations

import math
from typing import Any

from benchmarks.processes import ask_or_note
from benchmarks.report import Figure, Outcome, figure_of_rounds, median_figure

__all__ = ["MICRO_BATCH_SIZE", "peak", "run"]

MICRO_BATCH_SIZE = 16
LARGE_BATCH_SIZE = 256
WIDE = "wider MLP"

#: By contender, what is trained and the rows of a batch of the pipeline.
CONTENDERS = {
    "plain at 16": ("plain", MICRO_BATCH_SIZE),
    "converted at 16": ("converted", MICRO_BATCH_SIZE),
    "split at 256": ("split", LARGE_BATCH_SIZE),
    "plain at 256": ("plain", LARGE_BATCH_SIZE),
}


def run(is_quick: bool) -> Outcome:
    """All contenders on a model that is large and on one whose rows are."""
    repeats, updates = (1, 2) if is_quick else (3, 4)
    figures, notes, raw = [], [], {}
    for model in ("CNN",) if is_quick else ("CNN", WIDE):
        raw[model] = measured = {name: [] for name in CONTENDERS}
        for _ in range(repeats):
            for name, (way, batch_size) in CONTENDERS.items():
                found = ask_or_note(
                    notes,
                    f"{model}, {name}",
                    peak,
                    model=model,
                    way=way,
                    batch_size=batch_size,
                    rows=updates * LARGE_BATCH_SIZE,
                )
                measured[name] += [] if found is None else [found]
        figures += _figures(model, measured)
        if measured["plain at 16"]:
            megabytes = measured["plain at 16"][0]["weight_bytes"] / 1e6
            notes.append(f"{model}: {megabytes:.1f} MB of trainable weights")
    return Outcome(figures, notes, raw)


def _figures(model: str, measured: dict[str, list[dict[str, int]]]) -> list[Figure]:
    peaks = {name: [each["peak_bytes"] for each in found] for name, found in measured.items()}
    names = [name for name in CONTENDERS if name != "plain at 16"]
    figures = [figure_of_rounds(model, peaks, name, "plain at 16") for name in names]
    if model == WIDE:  # the weights of the others are less than the noise of a process
        extra = [
            (ours["peak_bytes"] - its["peak_bytes"]) / its["weight_bytes"]
            for ours, its in zip(measured["converted at 16"], measured["plain at 16"])
        ]
        figures.append(median_figure(model, "(converted - plain at 16) / weights", extra))
    return figures


def peak(
    model: str, way: str, batch_size: int, rows: int, has_coupled_loss: bool = False
) -> dict[str, Any]:
    """The highest resident memory of this process, which trains for one epoch.

    Args:
        model: The name of a workload.
        way: "plain"; "converted", to update every `LARGE_BATCH_SIZE` rows; "split", into slices
            of `MICRO_BATCH_SIZE`; or "whole_batch_loss", so split. A model is converted in place,
            so that there is one.
        batch_size: Rows a batch of the pipeline.
        rows: Rows an epoch.
        has_coupled_loss: Whether the loss couples the rows of a batch.

    Returns:
        ``peak_bytes`` of all that is resident; ``baseline_bytes`` of it after the imports;
        ``weight_bytes`` of the trainable weights; ``output_bytes`` of what the model makes of a
        batch.
    """
    import ga_transform as ga
    from benchmarks.data import endless_batches
    from benchmarks.machine import resident_bytes
    from benchmarks.timing import seconds_of_epoch
    from benchmarks.workloads import WORKLOADS

    baseline_bytes = resident_bytes("VmRSS")
    workload = WORKLOADS[model]
    compiled = workload.compiled_with_coupled_loss if has_coupled_loss else workload.compiled
    trained = compiled()
    if way == "converted":
        steps = LARGE_BATCH_SIZE // batch_size
        ga.make_accumulating(trained, accum_steps=steps, inplace=True)
    elif way in ("split", "whole_batch_loss"):
        ga.make_accumulating(
            trained,
            micro_batch_size=MICRO_BATCH_SIZE,
            whole_batch_loss=way == "whole_batch_loss",
            inplace=True,
        )
    batches = endless_batches(workload.rows(rows), batch_size)
    seconds_of_epoch(trained, batches, rows // batch_size)
    return {
        "peak_bytes": resident_bytes("VmHWM"),
        "baseline_bytes": baseline_bytes,
        "weight_bytes": sum(
            weight.shape.num_elements() * weight.dtype.size for weight in trained.trainable_weights
        ),
        "output_bytes": 4 * batch_size * math.prod(trained.output_shape[1:]),
    }
