"""explain: what a chain does to this very model, as data and as a table."""

from __future__ import annotations

from typing import Any

import attrs

from ga_transform.chain import Chain
from ga_transform.errors import wrong_type
from ga_transform.models import AccumulatingModel
from ga_transform.rewrites.batch_norm import batch_norms_of
from ga_transform.rewrites.precision import choices_of
from ga_transform.specs import BatchNorm, Precision

__all__ = ["Explanation", "LayerPrecision", "explain"]

#: By mode, what becomes of moving statistics.
_MODES = {
    "keep": "move with each micro-batch",
    "momentum": "move once an update, towards an average of the micro-batches'",
    "pooled": "move once an update, towards those of all rows of the window",
    "freeze": "rest, and normalise",
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
    """What a chain does to a model; `print` shows it as a table."""

    model: str
    chain: Chain
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

    def __str__(self) -> str:
        lines = [f"{self.model}: {self.chain}"]
        if self.layers:
            lines.append(f"\nPrecision: {len(self.changed)} of {len(self.layers)} layers changed")
            rows = [("layer", "class", "before", "now", "left as it was, because")]
            rows += [
                (each.name, each.kind, each.before, each.after, each.reason) for each in self.layers
            ]
            widths = [max(map(len, column)) for column in zip(*rows)]
            lines += [
                "  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip()
                for row in rows
            ]
        elif self.chain.find(Precision) is not None:
            lines.append("\nPrecision: layers change in the first training step, which builds them")
        if self.batch_norms:
            lines.append(
                f"\nBatch normalisation: in training by each micro-batch's own statistics; moving "
                f"statistics {_MODES[self.batch_norm_mode]} ({self.batch_norm_mode!r})"
            )
            lines.append("layers: " + ", ".join(self.batch_norms))
        return "\n".join(lines)


def explain(model: Any) -> Explanation:
    """What its chain does to a converted model: which layers are rewritten, and how.

    Args:
        model: A converted model. Layers that are made late are known after a training step.

    Returns:
        Data that prints as a table.

    Raises:
        TypeError: The model is not converted.

    Example:
        >>> import tf_keras, ga_transform as ga
        >>> layers = [tf_keras.Input([4]), tf_keras.layers.Dense(8), tf_keras.layers.Dense(2)]
        >>> model = tf_keras.Sequential(layers)
        >>> model.compile("adam", "mse")
        >>> model = ga.make_accumulating(model, accum_steps=8, precision="mixed_bfloat16")
        >>> [layer.after for layer in ga.explain(model).layers]
        ['mixed_bfloat16', 'float32']
        >>> ga.explain(model).layers[1].reason
        'it ends the model'
    """
    if not isinstance(model, AccumulatingModel):
        raise wrong_type(
            "explain.model",
            "a converted model",
            model,
            "Pass what make_accumulating returned.",
        )
    chain = model._accumulating_chain
    norms = batch_norms_of(model) if chain.gathers else []
    return Explanation(
        model=model.name,
        chain=chain,
        layers=tuple(
            LayerPrecision(each.layer.name, type(each.layer).__name__, *each[1:])
            for each in choices_of(model)
        ),
        batch_norms=tuple(layer.name for layer in norms if layer.trainable),
        batch_norm_mode=(chain.find(BatchNorm) or BatchNorm("keep")).mode,
    )
