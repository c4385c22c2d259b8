"""plot: time a row and peak memory against the batch size, plain beside split."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from benchmarks.memory import MICRO_BATCH_SIZE, peak
from benchmarks.processes import ask_or_note, line_of
from benchmarks.report import Figure, Outcome, figure_of_rounds

__all__ = ["run"]

MODEL = "CNN"
BATCH_SIZES = (16, 32, 64, 128, 256, 512)
COLOURS = {"plain": "#c2502e", "split": "#1f5fa8"}
TITLES = ("time a row", "peak memory of the process")


def run(is_quick: bool, path: Path) -> Outcome:
    """Measure both, and draw them.

    Args:
        is_quick: Take the two smallest batch sizes only.
        path: Where the picture goes.
    """
    batch_sizes = BATCH_SIZES[:2] if is_quick else BATCH_SIZES
    rows = 2 * batch_sizes[-1]
    rounds = 2 if is_quick else 5
    notes: list[str] = []
    seconds = ask_or_note(
        notes, TITLES[0], epoch_times, batch_sizes=batch_sizes, rows=rows, rounds=rounds
    )
    peaks: dict[str, list[int]] = {}
    for way, batch_size in _pairs(batch_sizes):
        name = _name(way, batch_size)
        found = ask_or_note(
            notes, name, peak, model=MODEL, way=way, batch_size=batch_size, rows=rows
        )
        peaks[name] = [] if found is None else [found["peak_bytes"]]
    base = _name("plain", batch_sizes[0])
    panels = [
        {
            pair: figure_of_rounds(title, measured, _name(*pair), base)
            for pair in _pairs(batch_sizes)
        }
        for title, measured in zip(TITLES, (seconds or {}, peaks))
    ]
    try:
        _draw(path, batch_sizes, panels)
    except ImportError as error:
        notes.append(f"no picture: {line_of(error)}")
    else:
        notes.append(f"drawn in {path}")
    figures = [panel[pair] for panel in panels for pair in list(panel)[1:]]  # the first is 1
    return Outcome(figures, notes, {"seconds": seconds, "peak_bytes": peaks})


def _pairs(batch_sizes: Sequence[int]) -> list[tuple[str, int]]:
    return [(way, batch_size) for way in COLOURS for batch_size in batch_sizes]


def _name(way: str, batch_size: int) -> str:
    return f"{way} at {batch_size}"


def _draw(
    path: Path, batch_sizes: Sequence[int], panels: Sequence[Mapping[tuple[str, int], Figure]]
) -> None:
    """Two panels, over batch sizes in powers of two; all relative to the plain smallest batch."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    labels = {"plain": "plain", "split": f"split into slices of {MICRO_BATCH_SIZE}"}
    figure, places = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    figure.get_layout_engine().set(wspace=0.08)
    figure.suptitle("A small convolutional network, batch by batch", fontsize=13)
    for axes, title, panel in zip(places, TITLES, panels):
        for way, colour in COLOURS.items():
            ratios = [panel[way, batch_size].value for batch_size in batch_sizes]
            known = [(size, ratio) for size, ratio in zip(batch_sizes, ratios) if ratio is not None]
            if not known:
                continue
            axes.plot(*zip(*known), color=colour, marker="o", linewidth=2)
            rank = 1 if _is_upper(panel, way, known[-1][0]) else -1
            axes.annotate(
                labels[way],
                known[-1],
                xytext=(0, 14 * rank),
                textcoords="offset points",
                color=colour,
                ha="right",
                va="bottom" if rank > 0 else "top",
            )
        axes.axhline(1, color="0.75", linewidth=1, zorder=0)
        axes.set_title(title[0].upper() + title[1:], loc="left", fontsize=11)
        axes.set_xscale("log", base=2)
        axes.set_xticks(batch_sizes, map(str, batch_sizes))
        axes.set_xlabel("batch size (rows)")
        axes.set_ylabel(f"relative to plain at {batch_sizes[0]}")
        axes.set_ylim(0, 1.2 * axes.get_ylim()[1])
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.92")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _is_upper(panel: Mapping[tuple[str, int], Figure], way: str, batch_size: int) -> bool:
    """Whether a curve ends above the other one, so that its label does, too."""
    ends = {each: panel[each, batch_size].value or 0 for each in COLOURS}
    return ends[way] == max(ends.values())


def epoch_times(batch_sizes: list[int], rows: int, rounds: int) -> dict[str, list[float]]:
    """The seconds of an epoch in each round, by the way of training and the batch size.

    Args:
        batch_sizes: Rows a batch.
        rows: Rows an epoch, the same for all.
        rounds: How often each is run.
    """
    import ga_transform as ga
    from benchmarks.data import endless_batches
    from benchmarks.timing import interleaved, seconds_of_epoch
    from benchmarks.workloads import WORKLOADS

    workload = WORKLOADS[MODEL]

    def prepared(way: str, batch_size: int) -> Callable[[], float]:
        model = workload.compiled()
        if way == "split":
            ga.make_accumulating(model, micro_batch_size=MICRO_BATCH_SIZE, inplace=True)
        batches = endless_batches(workload.rows(rows), batch_size)
        seconds_of_epoch(model, batches, 2)
        return partial(seconds_of_epoch, model, batches, rows // batch_size)

    runs = {_name(*pair): prepared(*pair) for pair in _pairs(batch_sizes)}
    return interleaved(runs, rounds)
