"""whole_batch: what a loss of the whole batch costs in slices, and what slices without it lose."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.memory import LARGE_BATCH_SIZE, peak
from benchmarks.processes import ask_or_note, line_of
from benchmarks.report import Figure, Outcome, figure_of_rounds, median_figure

__all__ = ["run"]

MODELS = ("CNN", "segmenter", "transformer", "wide MLP")
QUICK_MODELS = ("transformer",)
#: Batches in the data, which are repeated.
BATCHES = 4

CONTENDERS = ("split", "whole_batch_loss", "full batch", "forward")
#: Of memory, what is trained, as `memory.peak` has it.
AT_PEAK = {
    f"split at {LARGE_BATCH_SIZE}": "split",
    f"whole_batch_loss at {LARGE_BATCH_SIZE}": "whole_batch_loss",
    f"plain at {LARGE_BATCH_SIZE}": "plain",
}

MICRO_BATCH_SIZES = (2, 4, 8, 16, 32, 64, 128)
QUICK_MICRO_BATCH_SIZES = (32, 128)
METRICS = {
    "views found": "The other view of an image, found among 517",
    "linear probe": "Digits, by a linear classifier of the features",
}
COLOURS = {"split": "#c2502e", "whole_batch_loss": "#1f5fa8"}
LABELS = {"split": "micro_batch_size alone", "whole_batch_loss": "with whole_batch_loss"}
BATCH_SIZE = 256


def run(is_quick: bool, path: Path) -> Outcome:
    """Time, memory, and contrastive training by micro-batch size.

    Args:
        is_quick: Small sizes, few rounds.
        path: Where the picture of contrastive training goes.
    """
    models = QUICK_MODELS if is_quick else MODELS
    parts = [
        _times(models, *((3, 0.05) if is_quick else (9, 0.4))),
        _peaks(models, *((1, 2) if is_quick else (3, 4))),
        _contrastive(path, *((1, 2, QUICK_MICRO_BATCH_SIZES) if is_quick else (5, 60))),
    ]
    return Outcome(
        [figure for part in parts for figure in part.figures],
        [note for part in parts for note in part.notes],
        dict(zip(("seconds", "memory", "contrastive"), (part.raw for part in parts))),
    )


# ---- time --------------------------------------------------------------------------------


def _times(models: Sequence[str], rounds: int, seconds: float) -> Outcome:
    figures, notes, raw = [], [], {}
    for model in models:
        case = f"{model}, time"
        raw[model] = found = ask_or_note(
            notes, case, measure, model=model, rounds=rounds, seconds_a_run=seconds
        )
        measured = dict(found or {})
        # What there is to do, if the first pass is all that comes on top.
        measured["split + forward"] = [
            sum(both) for both in zip(measured.get("split", []), measured.get("forward", []))
        ]
        pairs = [(name, "split") for name in ("whole_batch_loss", "split + forward", "full batch")]
        pairs.append(("whole_batch_loss", "split + forward"))
        figures += [figure_of_rounds(case, measured, *pair) for pair in pairs]
    return Outcome(figures, notes, raw)


def measure(model: str, rounds: int, seconds_a_run: float) -> dict[str, list[float]]:
    """The seconds of each contender in each round, all on as many batches of eight slices.

    Args:
        model: The name of a workload, which is trained with its coupled loss.
        rounds: How often each contender is run.
        seconds_a_run: How long the split one trains in a round, about.
    """
    import ga_transform as ga
    from benchmarks import by_hand
    from benchmarks.contenders import ACCUM_STEPS
    from benchmarks.data import endless_batches
    from benchmarks.timing import interleaved, seconds_of_epoch, steps_that_take
    from benchmarks.workloads import WORKLOADS

    workload = WORKLOADS[model]
    batch_size = ACCUM_STEPS * workload.micro_batch_size
    batches = endless_batches(workload.rows(BATCHES * batch_size), batch_size)

    def prepared(name: str) -> Callable[[int], float]:
        trained = workload.compiled_with_coupled_loss()
        if name == "forward":
            trained.train_function = by_hand.pass_forward(trained, ACCUM_STEPS)
        elif name != "full batch":
            ga.make_accumulating(
                trained,
                micro_batch_size=workload.micro_batch_size,
                whole_batch_loss=name == "whole_batch_loss",
                inplace=True,
            )
        train = partial(seconds_of_epoch, trained, batches)
        train(2)
        return train

    ready = {name: prepared(name) for name in CONTENDERS}
    steps = steps_that_take(seconds_a_run, ready["split"])
    return interleaved({name: partial(train, steps) for name, train in ready.items()}, rounds)


# ---- memory ------------------------------------------------------------------------------


def _peaks(models: Sequence[str], repeats: int, updates: int) -> Outcome:
    split, whole, plain = AT_PEAK
    figures, notes, raw = [], [], {}
    for model in models:
        case = f"{model}, memory"
        raw[model] = measured = {name: [] for name in AT_PEAK}
        for _ in range(repeats):
            for name, way in AT_PEAK.items():
                found = ask_or_note(
                    notes,
                    f"{case}, {name}",
                    peak,
                    model=model,
                    way=way,
                    batch_size=LARGE_BATCH_SIZE,
                    rows=updates * LARGE_BATCH_SIZE,
                    has_coupled_loss=True,
                )
                measured[name] += [] if found is None else [found]
        peaks = {name: [each["peak_bytes"] for each in found] for name, found in measured.items()}
        figures += [figure_of_rounds(case, peaks, name, split) for name in (whole, plain)]
        if model == "segmenter":  # the outputs of the others are less than the noise of a process
            extra = [
                (ours["peak_bytes"] - its["peak_bytes"]) / its["output_bytes"]
                for ours, its in zip(measured[whole], measured[split])
            ]
            figures.append(median_figure(case, f"({whole} - {split}) / outputs", extra))
            if measured[split]:
                megabytes = measured[split][0]["output_bytes"] / 1e6
                notes.append(f"{model}: {megabytes:.1f} MB of outputs a batch")
    return Outcome(figures, notes, raw)


# ---- contrastive training ----------------------------------------------------------------


def train_contrastively(**arguments: Any) -> Any:
    """`contrastive.train`, in whose module scikit-learn is imported."""
    from benchmarks import contrastive

    return contrastive.train(**arguments)


def _contrastive(
    path: Path, seeds: int, epochs: int, micro_batch_sizes: Sequence[int] = MICRO_BATCH_SIZES
) -> Outcome:
    notes: list[str] = []
    raw = []
    for seed in range(seeds):
        found = ask_or_note(
            notes,
            "contrastive",
            train_contrastively,
            seed=seed,
            epochs=epochs,
            batch_size=BATCH_SIZE,
            micro_batch_sizes=micro_batch_sizes,
        )
        raw += [] if found is None else [found]
    if not raw:
        return Outcome([Figure("contrastive", metric) for metric in METRICS], notes, {})
    reached = {
        metric: {name: [each[name][metric] for each in raw] for name in raw[0]}
        for metric in METRICS
    }
    figures = [
        median_figure(f"contrastive, {metric}", name, values, "%")
        for metric, by_name in reached.items()
        for name, values in by_name.items()
    ]
    notes.append(f"contrastive: {len(raw)} seeds, {epochs} epochs of 5 updates")
    try:
        _draw(path, micro_batch_sizes, reached)
    except ImportError as error:
        notes.append(f"no picture: {line_of(error)}")
    else:
        notes.append(f"drawn in {path}")
    return Outcome(figures, notes, reached)


def _draw(
    path: Path,
    micro_batch_sizes: Sequence[int],
    reached: Mapping[str, Mapping[str, Sequence[float]]],
) -> None:
    """A panel for each metric, over micro-batch sizes in powers of two: means, and all in between."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, places = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    figure.get_layout_engine().set(wspace=0.08)
    figure.suptitle(
        f"Contrastive training on digits, an update each {BATCH_SIZE} rows", fontsize=13
    )
    for axes, (metric, by_name) in zip(places, reached.items()):
        for way, colour in COLOURS.items():
            values = [by_name[f"{way} at {size}"] for size in micro_batch_sizes]
            lowest, highest = [min(each) for each in values], [max(each) for each in values]
            means = [statistics.mean(each) for each in values]
            axes.fill_between(
                micro_batch_sizes, lowest, highest, color=colour, alpha=0.15, linewidth=0
            )
            axes.plot(
                micro_batch_sizes, means, color=colour, marker="o", linewidth=2, label=LABELS[way]
            )
        full = statistics.mean(by_name["full batch"])
        axes.axhline(full, color="0.2", linewidth=1.2, linestyle="--", label="full batch, plain")
        axes.set_title(METRICS[metric], loc="left", fontsize=11)
        axes.set_xscale("log", base=2)
        axes.set_xticks(micro_batch_sizes, map(str, micro_batch_sizes))
        axes.set_xlabel("micro-batch size (rows)")
        axes.set_ylabel("% of images not trained on")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.92")
    places[0].set_ylim(bottom=0)
    places[1].set_ylim(90, 100)
    places[0].legend(loc="lower right", frameon=False)
    figure.savefig(path, dpi=100)
    plt.close(figure)
