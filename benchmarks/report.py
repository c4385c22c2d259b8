"""Figures, and the tables they are printed in."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Optional

from benchmarks.targets import target_of

__all__ = ["Figure", "Outcome", "figure_of_rounds", "median_figure", "printed", "record"]


@dataclass(frozen=True)
class Figure:
    """A number that has been measured, or could not be."""

    case: str
    compared: str
    value: Optional[float] = None
    #: Empty for a ratio.
    unit: str = ""
    #: The quartiles of the repetitions, where there are several.
    quartiles: Optional[tuple[float, float]] = None


@dataclass(frozen=True)
class Outcome:
    """What a benchmark has found."""

    figures: Sequence[Figure]
    #: What went wrong, and where figures are missing.
    notes: Sequence[str] = ()
    #: Everything that was measured.
    raw: Mapping[str, Any] = field(default_factory=dict)


def median_figure(case: str, compared: str, values: Sequence[float], unit: str = "") -> Figure:
    """The median of repetitions; no value if there are none."""
    if not values:
        return Figure(case, compared, unit=unit)
    quartiles = None
    if len(values) > 1:
        lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
        quartiles = (lower, upper)
    return Figure(case, compared, statistics.median(values), unit, quartiles)


def figure_of_rounds(
    case: str, rounds: Mapping[str, Sequence[float]], name: str, reference: str
) -> Figure:
    """The median over rounds of the ratio within a round.

    Args:
        case: What was run.
        rounds: By contender, its seconds in each round.
        name, reference: The contenders that are compared.
    """
    pairs = zip(rounds.get(name, []), rounds.get(reference, []))
    return median_figure(case, f"{name} / {reference}", [ours / theirs for ours, theirs in pairs])


def printed(benchmark: str, outcome: Outcome) -> str:
    """A table in Markdown, with its notes."""
    header = ["case", "figure", "measured", "quartiles", "target", ""]
    rows = [header, *(_cells(benchmark, figure) for figure in outcome.figures)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = [_line(row, widths) for row in rows]
    lines.insert(1, _line(["-" * width for width in widths], widths))
    notes = [f"- {note}" for note in dict.fromkeys(outcome.notes)]
    return "\n".join([f"### {benchmark}", "", *lines, *([""] if notes else []), *notes, ""])


def _cells(benchmark: str, figure: Figure) -> list[str]:
    target = target_of(benchmark, figure.compared, figure.case)
    value, verdict, quartiles = "-", "", ""
    if figure.value is not None:
        value = f"{_number(figure.value, figure.unit)} {figure.unit}".rstrip()
        if target is not None:
            verdict = "met" if target.is_met_by(figure.value) else "missed"
    if figure.quartiles is not None:
        quartiles = " to ".join(_number(quartile, figure.unit) for quartile in figure.quartiles)
    bound = "" if target is None else f"{target} {figure.unit}".rstrip()
    return [figure.case, figure.compared, value, quartiles, bound, verdict]


def _number(value: float, unit: str) -> str:
    if unit in ("", "s"):
        return f"{value:.3f}"
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [cell.ljust(width) for cell, width in zip(cells, widths)]
    return f"| {' | '.join(padded)} |"


def record(benchmark: str, outcome: Outcome) -> dict[str, Any]:
    """An outcome as JSON has it."""
    figures = []
    for figure in outcome.figures:
        target = target_of(benchmark, figure.compared, figure.case)
        is_met = None
        if target is not None and figure.value is not None:
            is_met = target.is_met_by(figure.value)
        shown = None if target is None else str(target)
        figures.append({**asdict(figure), "target": shown, "is_met": is_met})
    return {"figures": figures, "notes": list(outcome.notes), "raw": outcome.raw}
