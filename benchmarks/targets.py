"""What the figures should be: the one place where it stands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

__all__ = ["Target", "target_of"]


@dataclass(frozen=True)
class Target:
    """A bound that a figure stays within."""

    bound: float
    is_itself_met: bool = True

    def is_met_by(self, value: float) -> bool:
        """Whether a figure stays within."""
        return value <= self.bound if self.is_itself_met else value < self.bound

    def __str__(self) -> str:
        return f"{'≤' if self.is_itself_met else '<'} {self.bound:g}"


def below(bound: float) -> Target:
    """A bound that is missed by a figure that equals it."""
    return Target(bound, is_itself_met=False)


#: By benchmark and figure, and by case where one has a target of its own.
TARGETS: dict[tuple[str, ...], Target] = {
    ("speed", "converted / plain"): Target(1.03),
    ("speed", "converted / plain", "wide MLP"): below(0.6),
    ("speed", "converted / plain", "embedding"): below(0.6),
    ("speed", "window a call / by hand"): Target(1.05),
    ("speed", "split / by hand, slicing"): Target(1.05),
    ("speed", "converted / ancestor"): below(1.0),
    ("speed", "split / full batch"): Target(1.1),
    ("sparse", "large table / small table"): Target(1.3),
    ("memory", "split at 256 / plain at 16"): Target(1.15),
    ("memory", "(converted - plain at 16) / weights"): Target(1.0),
    ("conversion", "import ga_transform"): below(100.0),
    ("conversion", "import ga_transform.conversion"): below(100.0),
    ("conversion", "in place"): below(0.5),
    ("conversion", "copy / clone_model + set_weights"): Target(1.3),
    # of the first trace
    ("conversion", "converted / plain"): Target(1.3),
    ("conversion", "split / plain"): Target(1.3),
    ("conversion", "graph nodes, most / fewest"): Target(1.0),
    ("scaling", "gradient reductions an update, converted"): Target(1.0),
    ("whole_batch", "whole_batch_loss / split"): Target(1.4),
    ("whole_batch", "whole_batch_loss / split + forward"): Target(1.1),
    # of those models whose outputs are small
    **{
        ("whole_batch", "whole_batch_loss at 256 / split at 256", f"{model}, memory"): Target(1.1)
        for model in ("CNN", "transformer", "wide MLP")
    },
    ("growth", "traces after the first epoch"): Target(0.0),
}


def target_of(benchmark: str, compared: str, case: str) -> Optional[Target]:
    """The target of a figure, if it has one."""
    return TARGETS.get((benchmark, compared, case), TARGETS.get((benchmark, compared)))
