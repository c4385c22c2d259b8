"""What of a model is exact under a chain and what is not, why, and what mends it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ga_transform.report.finding import VERDICTS, Finding
from ga_transform.report.of_layers import (
    of_batch_norm,
    of_own_layers,
    of_precision,
    of_randomness,
    of_states,
)
from ga_transform.report.of_loss import of_loss, of_metrics, of_outputs, of_weighting
from ga_transform.report.of_optimizers import of_optimizers

__all__ = ["findings_of"]


def findings_of(model: Any) -> tuple[Finding, ...]:
    """All that is to be said of a converted model, from bad to good."""
    chain = model._accumulating_chain
    found = [*of_precision(model)]
    if chain.gathers:
        of_windows = (
            of_loss, of_weighting, of_outputs, of_metrics, of_batch_norm, of_randomness,
            of_states, of_own_layers, of_optimizers, _of_training,
        )  # fmt: skip
        found += [each for about in of_windows for each in about(model)]
        if not model.built:
            found.append(
                Finding(
                    "layers",
                    (),
                    "depends",
                    "the model is not built: what its first step makes is not looked at",
                    "call it on a batch",
                )
            )
        if chain.micro_batch_stages:
            names = tuple(type(spec).__name__ for spec in chain.micro_batch_stages)
            found.append(
                Finding(
                    "stages before Accumulate",
                    names,
                    "outside",
                    "they act on each micro-batch's gradient, of which the large batch has none",
                    "move them behind Accumulate",
                )
            )
    else:
        found.append(Finding("windows", (), "exact", "every batch is an update, as without them"))
    return tuple(sorted(found, key=lambda each: VERDICTS.index(each.verdict)))


def _of_training(model: Any) -> Iterator[Finding]:
    """What training has warned of, beside what is known without it."""
    windows = vars(model).get("_accumulation")
    for about, text in getattr(windows, "said", {}).items():
        if about not in ("couplings", "fit"):
            _, _, why = text.partition(": ")
            yield Finding("found in training", (), "approximate", why)
