"""plot_log: what `AccumulationLog` has logged, as a figure."""

from __future__ import annotations

import csv
import itertools
import math
import os
import textwrap
from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, Union

from ga_transform.errors import wrong_type

__all__ = ["plot_log"]

#: By panel, its title and the names that it draws, or begins with.
_PANELS = (
    ("gradient norm", ("gradient_norm", "clipped_gradient_norm")),
    ("share of units clipped", ("clipped_share",)),
    ("micro-batches an update", ("micro_batches_per_update",)),
    ("windows", ("partial_windows", "skipped_windows", "skipped_micro_batches")),
)

#: Of the lines of a panel, by turns.
_STYLES = ("-", "--", ":")

_COUNTS = ("micro-batches an update", "windows")


def plot_log(log: Any, path: Union[None, str, os.PathLike[str]] = None) -> Any:
    """Draw what `AccumulationLog` has logged: norms, clipped shares, sizes of windows, skips.

    Args:
        log: What `fit` returned, its `history`, or the path of a table: of
            `AccumulationLog(csv=...)`, or of a CSVLogger that came after it. Lines that a table
            breaks off in are left out, and what is no number is a gap.
        path: Where to save the figure, if anywhere; its suffix tells the format.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        TypeError: `log` is none of these.
        ValueError: Nothing of `AccumulationLog` is in it.

    Example:
        >>> import ga_transform as ga
        >>> logged = {"gradient_norm": [3.0, 2.0], "micro_batches_per_update": [8.0, 8.0]}
        >>> figure = ga.plot_log(logged)
        >>> [axes.get_title(loc="left") for axes in figure.axes]
        ['gradient norm', 'micro-batches an update']
    """
    series, places, unit = _series_of(log)
    series = {name: values for name, values in series.items() if len(values)}
    panels = [
        (title, {name: values for name, values in series.items() if _belongs(name, names)})
        for title, names in _PANELS
    ]
    panels = [(title, lines) for title, lines in panels if lines]
    if not panels:
        names = textwrap.shorten(", ".join(series), 60, placeholder="...") or "nothing"
        raise ValueError(
            f"plot_log.log must hold what AccumulationLog logs; got {names}. "
            "Pass AccumulationLog() in the callbacks of fit."
        )
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "plot_log must have matplotlib to draw with; it is not installed. "
            "pip install 'ga-transform[plot]'"
        ) from error
    figure = Figure(figsize=(8, 2.2 * len(panels)), layout="constrained")
    all_axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for axes, (title, lines) in zip(all_axes, panels):
        # Lines that lie on each other are all seen, and so is an update between two gaps.
        for style, (name, values) in zip(itertools.cycle(_STYLES), lines.items()):
            label = name.replace("_", " ").replace("micro b", "micro-b")
            size = 6 if len(values) < 50 else 3
            where = places[len(places) - len(values) :]  # what was logged later lacks the beginning
            axes.plot(where, values, style, label=label, marker=".", markersize=size)
        axes.set_title(title, loc="left", fontsize="medium")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        # From zero, with at least one above it, for lines that are flat.
        numbers = [value for values in lines.values() for value in values if math.isfinite(value)]
        highest = max(numbers, default=0)
        axes.set_ylim(0, 1.08 * (max(1, highest) if title in _COUNTS else highest or 1))
        if title in _COUNTS:
            axes.yaxis.set_major_locator(MaxNLocator("auto", integer=True))
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    all_axes[-1].set_xlabel(unit)
    all_axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _belongs(name: str, names: Sequence[str]) -> bool:
    """Whether a name is one of these, or one of another optimizer or clip."""
    return any(name == each or name.startswith(f"{each}_") for each in names)


def _series_of(log: Any) -> tuple[Mapping[str, Sequence[float]], Sequence[float], str]:
    """Numbers by name, where they stand, and what that counts."""
    if isinstance(log, (str, os.PathLike)):
        with Path(log).open(newline="", encoding="utf-8", errors="replace") as file:
            names, *rows = list(csv.reader(file)) or [[]]
        whole = [row for row in rows if len(row) == len(names)]
        series = {name: [_number(row[at]) for row in whole] for at, name in enumerate(names)}
        unit = "update" if "update" in series else "epoch"
        return series, series.get(unit, range(len(whole))), unit
    history = getattr(log, "history", log)
    if not isinstance(history, Mapping) or not all(
        isinstance(values, Sized) for values in history.values()
    ):
        raise wrong_type(
            "plot_log.log", "what fit returned, its history, or a path", log,
            "Pass model.fit(..., callbacks=[AccumulationLog()]).",
        )  # fmt: skip
    epochs = max((len(values) for values in history.values()), default=0)
    return dict(history), range(1, epochs + 1), "epoch"


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return math.nan
