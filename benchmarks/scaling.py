"""scaling: what an update costs two workers, in time and in reductions of gradients.

Two processes on one machine train by `MultiWorkerMirroredStrategy`; what a network would add is
reckoned from the bytes that an update reduces.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import tensorflow as tf
import tf_keras
from tensorflow.tsl.profiler.protobuf import xplane_pb2

from benchmarks.processes import ask_or_note
from benchmarks.report import Figure, Outcome, figure_of_rounds

__all__ = ["run", "seconds_of_all_reduce"]

WORKERS = 2
MODEL, QUICK_MODEL = "wide MLP", "tiny MLP"
STEPS, QUICK_STEPS = (2, 4, 8, 16), (2, 4)
#: Bits a second of the networks that are reckoned with.
NETWORKS = {"1 Gbit/s": 1e9, "10 Gbit/s": 1e10, "100 Gbit/s": 1e11}
#: Of the clusters that are reckoned with.
RECKONED_WORKERS = 8


def seconds_of_all_reduce(size: float, workers: int, bits_a_second: float) -> float:
    """What a ring spends on the wire: 2 (n - 1) / n of the bytes go over each link.

    Args:
        size: Bytes that are reduced.
        workers: n.
        bits_a_second: Of the slowest link; latency is left out.
    """
    return 2 * (workers - 1) / workers * 8 * size / bits_a_second


def run(is_quick: bool) -> Outcome:
    """For each window, converted beside plain at the same rows an update."""
    model, rounds, updates = (QUICK_MODEL, 3, 4) if is_quick else (MODEL, 7, 4)
    figures, raw = [], {}
    contenders = (
        "plain takes as many batches with an update each; the large batch has as many rows as a "
        "window, and as many reductions as converted"
    )
    formula = f"reductions x 2 (n - 1) / n x 8 x bytes / bandwidth, n = {RECKONED_WORKERS}"
    notes = [
        f"{WORKERS} workers on one machine, {model}; {contenders}",
        f"on the wire: {formula}; reckoned, not measured",
    ]
    for steps in QUICK_STEPS if is_quick else STEPS:
        case = f"accum_steps={steps}"
        arguments = {"model": model, "accum_steps": steps, "rounds": rounds, "updates": updates}
        found = ask_or_note(notes, case, measure, workers=WORKERS, **arguments)
        raw[case] = found
        if found is None:
            continue
        figures.append(figure_of_rounds(case, found["seconds"], "converted", "large batch"))
        figures.append(figure_of_rounds(case, found["seconds"], "converted", "plain"))
        figures += [
            Figure(case, f"gradient reductions an update, {name}", count)
            for name, count in found["reductions"].items()
        ]
        figures += [
            Figure(
                case,
                f"on the wire at {network}: {name}",
                1e3
                * found["reductions"][name]
                * seconds_of_all_reduce(found["bytes"], RECKONED_WORKERS, speed),
                "ms",
            )
            for network, speed in NETWORKS.items()
            for name in ("plain", "converted")
        ]
    return Outcome(figures, notes, raw)


def measure(model: str, accum_steps: int, rounds: int, updates: int) -> dict[str, Any]:
    """Seconds in each round by contender, and what a window's rows had reduced.

    Args:
        model: The name of a workload.
        accum_steps: Batches a window.
        rounds: How often each contender is run.
        updates: Windows a run.
    """
    import ga_transform as ga
    from benchmarks.data import endless_batches
    from benchmarks.timing import interleaved, seconds_of_epoch
    from benchmarks.workloads import WORKLOADS

    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    is_chief = strategy.cluster_resolver.task_id == 0
    workload = WORKLOADS[model]
    rows = workload.rows(8 * accum_steps * workload.micro_batch_size)
    with strategy.scope():
        models = {
            "plain": workload.compiled(),
            "large batch": workload.compiled(),
            "converted": ga.make_accumulating(workload.compiled(), accum_steps),
        }
    batches, steps = {}, {}
    for name in models:
        is_large = name == "large batch"
        size = workload.micro_batch_size * (accum_steps if is_large else 1)
        data = endless_batches(rows, size)
        batches[name] = strategy.distribute_datasets_from_function(lambda _, data=data: data)
        steps[name] = 1 if is_large else accum_steps

    def train(name: str, windows: int) -> float:
        return seconds_of_epoch(models[name], batches[name], windows * steps[name])

    for name in models:
        train(name, 2)
    seconds = interleaved({name: lambda n=name: train(n, updates) for name in models}, rounds)
    counts = {}
    for name, trained in models.items():
        books = CountCollectives(is_counting=is_chief)
        trained.fit(batches[name], steps_per_epoch=steps[name], verbose=0, callbacks=[books])
        counts[name] = books.counts
    # Between updates there are those of metrics alone, which all contenders have with each batch.
    of_metrics = min(counts["converted"]) if is_chief else 0
    weights = models["plain"].trainable_weights
    return {
        "seconds": seconds,
        "reductions": {name: sum(n - of_metrics for n in each) for name, each in counts.items()},
        "bytes": sum(w.shape.num_elements() * w.dtype.size for w in weights),
    }


class CountCollectives(tf_keras.callbacks.Callback):
    """The collective operations that each batch has run, by the profiler of TensorFlow.

    Args:
        is_counting: One process of several is enough.
    """

    def __init__(self, *, is_counting: bool) -> None:
        super().__init__()
        self.counts: list[int] = []
        self._is_counting = is_counting

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if self._is_counting:
            self._folder = tempfile.TemporaryDirectory()
            tf.profiler.experimental.start(self._folder.name)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self._is_counting:
            tf.profiler.experimental.stop()
            self.counts.append(_collectives_in(Path(self._folder.name)))
            self._folder.cleanup()


def _collectives_in(folder: Path) -> int:
    """The runs of collective operations in what the profiler has written."""
    count = 0
    for path in folder.rglob("*.xplane.pb"):
        space = xplane_pb2.XSpace()
        space.ParseFromString(path.read_bytes())
        for plane in space.planes:
            names = (
                plane.event_metadata[e.metadata_id].name
                for line in plane.lines
                for e in line.events
            )
            count += sum(name == "CollectiveOpV2Kernel::Run" for name in names)
    return count
