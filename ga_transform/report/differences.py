"""How far the weights of two copies of a model end from each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import attrs
import numpy as np

__all__ = ["VariableDifference", "differences_of", "largest_of"]

#: A variable that hardly moves is measured by this share of what all have travelled.
_FLOOR = 1e-3


@attrs.frozen
class VariableDifference:
    """How far a weight ends from where the large batch takes it."""

    name: str
    #: The largest difference of an element.
    absolute: float
    #: The L2 norm of the difference, in units of that of the way which the weight has travelled on
    #: the large batch (of a weight that hardly moves, of a thousandth of the way of all weights).
    relative: float
    #: The share of its elements that are in neither number: their gradient is zero but for
    #: rounding, of which an optimizer makes steps as long as any others.
    uncounted: float = 0.0


def differences_of(
    names: Sequence[str],
    ends: Sequence[Any],
    others: Sequence[Any],
    start: Sequence[Any],
    counted: Optional[Sequence[Any]] = None,
) -> tuple[VariableDifference, ...]:
    """By weight, how far ends are from others.

    Args:
        names: Of the weights.
        ends, others: Arrays of the weights' shapes.
        start: From where the others were reached.
        counted: Which elements count; all, if it is left out.
    """
    ways = [np.linalg.norm(_gap(*pair).ravel()) for pair in zip(others, start)]
    floor = _FLOOR * np.linalg.norm(ways)
    found = []
    for place, (name, way) in enumerate(zip(names, ways)):
        counts = True if counted is None else counted[place]
        gap = np.where(counts, _gap(ends[place], others[place]), 0.0)
        unit = np.maximum(way, floor)  # NaN is the larger
        found.append(
            VariableDifference(
                name,
                absolute=float(np.max(np.abs(gap), initial=0.0)),
                relative=float(np.linalg.norm(gap.ravel()) / (unit or 1.0)),
                uncounted=1.0 - float(np.mean(counts)),
            )
        )
    return tuple(found)


def largest_of(differences: Sequence[VariableDifference]) -> float:
    """The largest relative difference of any weight; NaN if any is."""
    return float(np.max([each.relative for each in differences], initial=0.0))


def _gap(own: Any, other: Any) -> Any:
    """The difference in float64; zero where both are the same infinity."""
    own, other = np.asarray(own, np.float64), np.asarray(other, np.float64)
    with np.errstate(invalid="ignore"):
        return np.where(own == other, 0.0, own - other)
