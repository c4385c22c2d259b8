"""growth: whether a process that trains for long traces again, or grows."""

from __future__ import annotations

from typing import Any

from benchmarks.processes import ask_or_note
from benchmarks.report import Figure, Outcome

__all__ = ["run"]

STEPS_AN_EPOCH = 200
WAYS = ("plain", "converted", "split")


def run(is_quick: bool) -> Outcome:
    """Thousands of steps in one process, for each way of training."""
    epochs = 3 if is_quick else 25
    figures, notes, raw = [], [], {}
    for way in WAYS:
        raw[way] = found = ask_or_note(notes, way, train, way=way, epochs=epochs)
        traced = grown = None
        if found is not None:
            traced = found["traces"][-1] - found["traces"][0]
            grown = (found["resident_bytes"][-1] - found["resident_bytes"][0]) / 1e6
        figures += [
            Figure(way, "traces after the first epoch", traced, "traces"),
            Figure(way, "growth of resident memory", grown, "MB"),
        ]
    first, last = STEPS_AN_EPOCH, STEPS_AN_EPOCH * epochs
    notes.append(f"from step {first:,} to step {last:,}, in epochs of {STEPS_AN_EPOCH}")
    return Outcome(figures, notes, raw)


def train(way: str, epochs: int) -> dict[str, Any]:
    """Traces and resident memory at the end of each epoch.

    Args:
        way: "plain", "converted" or "split".
        epochs: How many.
    """
    import tf_keras

    from benchmarks.contenders import CONTENDERS
    from benchmarks.data import endless_batches
    from benchmarks.machine import resident_bytes
    from benchmarks.workloads import WORKLOADS

    traces: list[int] = []
    resident: list[int] = []

    class Books(tf_keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            traces.append(self.model.train_tf_function.experimental_get_tracing_count())
            resident.append(resident_bytes("VmRSS"))

    workload, contender = WORKLOADS["tiny MLP"], CONTENDERS[way]
    batch_size = contender.micro_batches_a_batch * workload.micro_batch_size
    contender.build(workload).fit(
        endless_batches(workload.rows(16 * batch_size), batch_size),
        epochs=epochs,
        steps_per_epoch=STEPS_AN_EPOCH,
        verbose=0,
        callbacks=[Books()],
    )
    return {"traces": traces, "resident_bytes": resident}
