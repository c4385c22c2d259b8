"""A finding: one thing about a model under its chain, in words that data can be asked for."""

from __future__ import annotations

from collections.abc import Collection

import attrs

__all__ = [
    "BATCH_NORM",
    "NOT_FINITE",
    "NO_UPDATE",
    "OPTIMIZER",
    "RANDOMNESS",
    "TRY_IT",
    "VERDICTS",
    "WEIGHTING",
    "WHOLE_BATCH",
    "Finding",
    "of_unknown_cause",
]

#: From bad to good. "outside": no accumulation equals the large batch. "approximate": close to it.
#: "depends": exact under a condition, which is told.
VERDICTS = ("outside", "approximate", "depends", "exact")

#: How many names a text holds.
_NAMED = 8
#: Subjects of findings.
RANDOMNESS, BATCH_NORM = "random numbers", "batch normalisation"
WEIGHTING, OPTIMIZER = "weighting", "optimizer"
#: The remedy where nobody but a trial knows.
TRY_IT = "verify_equivalence(model, x, y) tells"
#: The remedy for a loss that sees more than one row, and its price.
WHOLE_BATCH = (
    "micro_batch_size with whole_batch_loss=True is exact for every loss of the outputs, for one "
    "forward pass more and the memory of a batch's outputs"
)


@attrs.frozen
class Finding:
    """One thing about a model, under its chain."""

    #: What it is about.
    subject: str
    #: The layers, outputs, losses or optimizers concerned; none where it is the whole model.
    names: tuple[str, ...]
    #: One of `VERDICTS`.
    verdict: str
    #: The reason, or the condition.
    why: str
    #: What can be done about it; empty where there is nothing to do, or nothing that helps.
    remedy: str = ""

    def __str__(self) -> str:
        named = ", ".join(self.names[:_NAMED])
        more = f" and {len(self.names) - _NAMED} more" if self.names[_NAMED:] else ""
        return (
            f"{self.subject} ({named}{more}): {self.why}"
            if named
            else f"{self.subject}: {self.why}"
        )


NOT_FINITE = Finding(
    "gradients that are not finite",
    (),
    "outside",
    "updates with them are skipped, or lead to NaN, and show nothing",
    "data without NaN and infinity, a smaller loss or learning rate",
)
NO_UPDATE = Finding(
    "no update",
    (),
    "outside",
    "no weight has moved on the large batches, so that there is nothing to compare",
    "a learning rate above 0, and weights that train",
)


def of_unknown_cause(suspects: Collection[str]) -> Finding:
    """A difference that stays without suspects, and of which nothing else is known."""
    stays = f"the difference stays without {' and '.join(sorted(suspects))}; " if suspects else ""
    return Finding(
        "not found out",
        (),
        "outside",
        f"{stays}a loss or a layer may couple the rows of a batch, draw random numbers by itself, "
        "or take a mean over something else than rows",
        "Accumulate(weighting=...) for such a mean",
    )
