"""explain: what a chain does to this very model, as data and as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Optional

import attrs
import numpy as np
import tf_keras

from ga_transform import _keras
from ga_transform.chain import Chain
from ga_transform.errors import wrong_type
from ga_transform.models import AccumulatingModel
from ga_transform.report.finding import Finding
from ga_transform.report.findings import findings_of
from ga_transform.report.of_loss import adds_up_losses
from ga_transform.report.text import paragraph, table
from ga_transform.rewrites.batch_norm import batch_norms_of
from ga_transform.rewrites.precision import choices_of
from ga_transform.specs import Accumulate, BatchNorm, Precision, Split

__all__ = ["Explanation", "LayerPrecision", "check_converted", "explain"]

_REMAINDERS = {
    "flush": "a partial window at the end of an epoch is applied with its own weights",
    "carry": "a partial window goes on in the next epoch",
    "drop": "a partial window at the end of an epoch is discarded",
}


@attrs.frozen
class LayerPrecision:
    """In what a layer computes."""

    name: str
    #: The name of its class.
    kind: str
    #: The policy that it was made with.
    before: str
    #: The policy that it has.
    after: str
    #: Why it is left as it was; empty where it has changed.
    reason: str


@attrs.frozen
class Explanation:
    """What a chain does to a model; `print` shows it."""

    #: The model's name.
    model: str
    chain: Chain
    #: How a window is filled, and what becomes of a partial one.
    window: str
    #: The stages, each with what it acts on.
    stages: tuple[str, ...]
    #: What is exact and what is not, from bad to good.
    findings: tuple[Finding, ...]
    #: Bytes that the sums of gradients take, on each replica; None before the model is built.
    memory: Optional[int]
    #: Whether it may be more, which is known after a training step.
    is_memory_least: bool
    #: The layers whose sums are as large as the rows that were touched, and in no figure before
    #: training.
    sparse: tuple[str, ...]
    #: The layers that compute something, in their order; none without `Precision`.
    layers: tuple[LayerPrecision, ...]
    #: The batch normalisation layers that train.
    batch_norms: tuple[str, ...]
    #: What their moving statistics do.
    batch_norm_mode: str

    @property
    def changed(self) -> tuple[LayerPrecision, ...]:
        """The layers that compute in another precision than before."""
        return tuple(layer for layer in self.layers if layer.before != layer.after)

    @property
    def is_exact(self) -> bool:
        """Whether nothing was found that is not exact."""
        return all(finding.verdict == "exact" for finding in self.findings)

    def __str__(self) -> str:
        lines = [f"{self.model}: {self.chain}", "", *paragraph(self.window, "window  ")]
        for stage in self.stages:
            lines += paragraph(stage, "stage   ")
        lines += paragraph(self._memory(), "memory  ")
        lines.append("")
        for finding in self.findings:
            lines += paragraph(str(finding), f"{finding.verdict:13}")
            if finding.remedy:
                lines += paragraph(finding.remedy, f"{'':7}mend: ")
        if self.layers:
            lines += ["", f"precision: {len(self.changed)} of {len(self.layers)} layers changed"]
            rows = [("layer", "class", "before", "now", "left as it was, because")]
            rows += [
                (each.name, each.kind, each.before, each.after, each.reason) for each in self.layers
            ]
            lines += table(rows)
        elif self.chain.find(Precision) is not None:
            lines += ["", "precision: layers change in the first training step, which builds them"]
        return "\n".join(lines)

    def _memory(self) -> str:
        if self.memory is None:
            return "not known before the model is built"
        sparse = ", ".join(self.sparse)
        least = "at least " if self.is_memory_least else ""
        more = f"; and the rows touched of {sparse}" if sparse else ""
        return f"{least}{self.memory:,} bytes of sums{more}"


def explain(model: Any) -> Explanation:
    """What its chain does to a converted model: what is exact, what is not and why.

    Args:
        model: A converted model. What only a training step can tell (layers that are made late,
            losses that come as one number) is known after one.

    Returns:
        Data that prints as text.

    Raises:
        TypeError: The model is not converted.

    Example:
        >>> import tf_keras, ga_transform as ga
        >>> layers = [tf_keras.Input([4]), tf_keras.layers.Dense(8), tf_keras.layers.Dense(2)]
        >>> model = tf_keras.Sequential(layers, name="small")
        >>> model.compile("adam", "mse")
        >>> print(ga.explain(ga.make_accumulating(model, accum_steps=8)))
        small: Chain(Accumulate(steps=8))
        <BLANKLINE>
        window  an update every 8 batches; a partial window at the end of an epoch is applied with its
                own weights
        memory  232 bytes of sums
        <BLANKLINE>
        exact        compiled losses (mse): each micro-batch weighs what its mean divided by; sums are
                     added up
        exact        optimizer (Adam): it sees updates, and counts nothing else
    """
    check_converted("explain.model", model)
    chain = model._accumulating_chain
    norms = batch_norms_of(model) if chain.gathers else []
    memory = _memory_of(model)
    return Explanation(
        model=model.name,
        chain=chain,
        window=_window_of(chain),
        stages=_stages_of(chain),
        findings=findings_of(model),
        memory=memory.of_sums,
        is_memory_least=memory.is_least,
        sparse=memory.sparse,
        layers=tuple(
            LayerPrecision(each.layer.name, type(each.layer).__name__, *each[1:])
            for each in choices_of(model)
        ),
        batch_norms=tuple(layer.name for layer in norms if layer.trainable),
        batch_norm_mode=(chain.find(BatchNorm) or BatchNorm("keep")).mode,
    )


def check_converted(owner: str, model: Any) -> None:
    """Refuse what is no converted model."""
    if not isinstance(model, AccumulatingModel):
        raise wrong_type(owner, "a converted model", model, "Pass what make_accumulating returned.")


def _window_of(chain: Chain) -> str:
    accumulate, split = chain.find(Accumulate), chain.find(Split)
    parts = []
    if split is not None:
        parts.append(f"every batch is cut into slices of {split.micro_batch_size} rows")
    if accumulate is None or accumulate.steps == 1:
        return "; ".join([*parts, "an update every batch"])
    steps = accumulate.steps
    if isinstance(steps, Mapping):
        starts = [
            f"{_batches(count)} from update {start} on" for start, count in sorted(steps.items())
        ]
        parts.append(f"an update every {', '.join(starts)}")
    else:
        parts.append(f"an update every {_batches(steps)}")
    return "; ".join([*parts, _REMAINDERS[accumulate.remainder]])


def _batches(count: int) -> str:
    return "batch" if count == 1 else f"{count} batches"


def _stages_of(chain: Chain) -> tuple[str, ...]:
    of_updates = "on the mean gradient of the window" if chain.gathers else "on the gradient"
    return (
        *(f"{spec}: on the gradient of each micro-batch" for spec in chain.micro_batch_stages),
        *(f"{spec}: {of_updates}" for spec in chain.update_stages),
    )


class _Memory(NamedTuple):
    """As the fields of an `Explanation`."""

    of_sums: Optional[int]
    is_least: bool = False
    sparse: tuple[str, ...] = ()


def _memory_of(model: Any) -> _Memory:
    """The bytes that sums take, or will take; and layers whose sums are not in that figure."""
    windows = vars(model).get("_accumulation")
    held = getattr(windows, "bytes_held", 0)
    if held or not model._accumulating_chain.gathers:
        return _Memory(held)
    if not model.built:
        return _Memory(None)
    tables = {
        _keras.reference_of(layer.embeddings): layer.name
        for layer in _keras.flatten_layers(model)
        if isinstance(layer, tf_keras.layers.Embedding) and layer.built and not model.jit_compile
    }
    trained = {_keras.reference_of(each): each for each in model.trainable_variables}
    sums = [
        int(np.prod(each.shape)) * max(4, each.dtype.size)
        for reference, each in trained.items()
        if reference not in tables
    ]
    sparse = tuple(name for reference, name in tables.items() if reference in trained)
    # A table may also be used otherwise than by its rows; sums beside means are kept apart from
    # them; and a step of the model's own may take a gradient of a weight more than once.
    is_least = bool(sparse) or adds_up_losses(model) or not model._has_usual_step()
    return _Memory(sum(sums), is_least, sparse)
