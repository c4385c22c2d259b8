"""What of a model is exact under a chain and what is not, why, and what mends it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import attrs
import tensorflow as tf
import tf_keras

from ga_transform import _keras
from ga_transform.neighbours import couplings_of
from ga_transform.rewrites.batch_norm import batch_norms_of
from ga_transform.specs import BatchNorm, Precision
from ga_transform.training import Accumulating

__all__ = ["BATCH_NORM", "RANDOMNESS", "VERDICTS", "Finding", "findings_of", "random_layers"]

#: From bad to good. "outside": no accumulation equals the large batch. "approximate": close to it.
#: "depends": exact under a condition, which is told.
VERDICTS = ("outside", "approximate", "depends", "exact")

#: How many layers a text names.
_NAMED = 8
#: Subjects of findings.
RANDOMNESS, BATCH_NORM = "random numbers", "batch normalisation"

_MOVES = {
    "keep": "moving statistics move with each micro-batch",
    "momentum": "moving statistics move once an update, towards an average of the micro-batches'",
    "pooled": "moving statistics move once an update, towards those of all rows of the window",
}


@attrs.frozen
class Finding:
    """One thing about a model, under its chain."""

    #: What it is about.
    subject: str
    #: The names of the layers or outputs concerned; none where it is the whole model.
    layers: tuple[str, ...]
    #: One of `VERDICTS`.
    verdict: str
    #: The reason, or the condition.
    why: str
    #: What can be done about it; empty where there is nothing to do, or nothing that helps.
    remedy: str = ""

    def __str__(self) -> str:
        named = ", ".join(self.layers[:_NAMED])
        more = f" and {len(self.layers) - _NAMED} more" if self.layers[_NAMED:] else ""
        return (
            f"{self.subject} ({named}{more}): {self.why}"
            if named
            else f"{self.subject}: {self.why}"
        )


def findings_of(model: Any) -> tuple[Finding, ...]:
    """All that is to be said of a converted model, from bad to good."""
    chain = model._accumulating_chain
    found = [*_of_precision(model)]
    if chain.gathers:
        of_windows = (
            _of_loss, _of_outputs, _of_batch_norm, _of_randomness, _of_optimizers, _of_training
        )  # fmt: skip
        found += [each for about in of_windows for each in about(model)]
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


def random_layers(model: Any) -> list[Any]:
    """The layers of tf_keras, and those derived from them, that draw random numbers in training."""
    layers = [each for each in _keras.flatten_layers(model) if _draws(each)]
    cells = {id(getattr(layer, "cell", None)) for layer in layers}
    return [layer for layer in layers if id(layer) not in cells]


def _draws(layer: Any) -> bool:
    rates = [getattr(layer, name, None) for name in ("rate", "dropout", "recurrent_dropout")]
    rates.append(getattr(layer, "stddev", None))
    numbers = [rate for rate in rates if isinstance(rate, (int, float))]
    return isinstance(layer, _keras.BaseRandomLayer) and (not numbers or any(numbers))


# ---- the loss ----------------------------------------------------------------------------------


def _of_loss(model: Any) -> Iterator[Finding]:
    couplings = tuple(couplings_of(model))
    if couplings:
        yield Finding(
            "losses that couple rows",
            couplings,
            "outside",
            "the value for one row depends on the other rows of its micro-batch",
            "make micro-batches as large as memory allows",
        )
    if not model._is_compiled:
        yield Finding("loss", (), "depends", "the model is not compiled", "compile it")
        return
    own_step = not model._has_usual_step()
    if own_step or not _keras.is_keras_own(model, Accumulating, "compute_loss"):
        yield Finding(
            f"{'train_step' if own_step else 'compute_loss'} of the model's own",
            (),
            "depends",
            "exact for the compiled loss and for means over rows; a mean over something else "
            "(tokens, pixels) must say what it divides by",
            "Accumulate(weighting=function) for such a mean, weighting='sum' for a sum",
        )
    losses = tf.nest.flatten(getattr(model.compiled_loss, "_user_losses", None))
    own = tuple(_name_of(loss) for loss in losses if loss is not None and not _is_of_keras(loss))
    if own:
        yield Finding(
            "losses from outside tf_keras",
            own,
            "depends",
            "exact if the value for a row depends on that row alone",
            "verify_equivalence(model, x, y) tells",
        )
    usual = tuple(_name_of(loss) for loss in losses if loss is not None and _is_of_keras(loss))
    if usual and not own_step and not any(_of_outputs(model)):
        yield Finding(
            "compiled losses",
            usual,
            "exact",
            "each micro-batch weighs what its mean divided by; sums are added up",
        )
    if any(layer._callable_losses for layer in _keras.flatten_layers(model)):
        yield Finding("regularisers", (), "exact", "they count once an update")


def _name_of(loss: Any) -> str:
    if isinstance(loss, str):
        return loss
    function = getattr(loss, "fn", None)
    return str(getattr(function or loss, "__name__", None) or type(loss).__name__)


def _is_of_keras(loss: Any) -> bool:
    if isinstance(loss, str):  # it may name a function of the user's
        loss = tf_keras.losses.get(loss)
    loss = getattr(loss, "fn", loss)
    kind = loss if inspect.isfunction(loss) else type(loss)
    return str(kind.__module__).split(".")[0] in ("tf_keras", "tensorflow")


def _of_outputs(model: Any) -> Iterator[Finding]:
    """Of several outputs whose means may divide by numbers of no fixed ratio."""
    outputs = tf.nest.flatten(getattr(model, "outputs", None) or [])
    if len(outputs) < 2 or not model._is_compiled or not model._has_usual_step():
        return
    masks = [None] * len(outputs)
    if any(getattr(output, "_keras_mask", None) is not None for output in outputs):
        masks = _keras.masks_of_outputs(model)
    if len({_extent_of(*each) for each in zip(outputs, masks)}) == 1:
        return
    weighing, *_ = model.output_names
    yield Finding(
        "outputs whose masks or lengths differ",
        tuple(model.output_names),
        "approximate",
        "one number weighs a micro-batch, the count of one output "
        f"({weighing!r}, if it has a mean loss); for the others updates are exact where the "
        "ratio of their counts stays the same from one micro-batch to the next",
        "reduce those losses to one number a row, or sum them (reduction='sum')",
    )


def _extent_of(output: Any, mask: Any) -> Any:
    """What the count of a mean over an output goes with: None for its rows alone."""
    if mask is not None:
        return id(mask)
    return id(output) if None in output.shape[1:-1] else None


# ---- layers ------------------------------------------------------------------------------------


def _of_batch_norm(model: Any) -> Iterator[Finding]:
    layers = batch_norms_of(model)
    mode = (model._accumulating_chain.find(BatchNorm) or BatchNorm("keep")).mode
    names = tuple(layer.name for layer in layers if layer.trainable)
    if names and mode == "freeze":
        why = "it normalises by the moving statistics, which rest"
        yield Finding(BATCH_NORM, names, "exact", why)
    elif names:
        yield Finding(
            BATCH_NORM,
            names,
            "outside",
            "in training it normalises each micro-batch by that micro-batch's own statistics; "
            f"{_MOVES[mode]} ({mode!r})",
            "batch_norm='freeze' is exact; "
            + ("" if mode == "pooled" else "'pooled' moves statistics as the large batch does; ")
            + "or use layers that do not couple rows (LayerNormalization, GroupNormalization)",
        )
    rests = tuple(layer.name for layer in layers if not layer.trainable)
    if rests:
        yield Finding(BATCH_NORM, rests, "exact", "it is frozen")


def _of_randomness(model: Any) -> Iterator[Finding]:
    names = tuple(layer.name for layer in random_layers(model))
    if names:
        yield Finding(
            RANDOMNESS,
            names,
            "outside",
            "micro-batches draw other numbers than the large batch, of the same distribution",
        )


def _of_precision(model: Any) -> Iterator[Finding]:
    halves = {
        layer.name: layer.compute_dtype
        for layer in _keras.flatten_layers(model)
        if layer is not model and layer.compute_dtype in ("float16", "bfloat16")
    }
    if halves:
        is_asked = model._accumulating_chain.find(Precision) is not None
        yield Finding(
            "16 bits",
            tuple(halves),
            "approximate",
            f"activations and gradients are rounded to {', '.join(sorted(set(halves.values())))}; "
            "sums over the window are float32",
            "Precision(keep=...) for layers that suffer" if is_asked else "precision='float32'",
        )


# ---- optimizers --------------------------------------------------------------------------------


def _of_optimizers(model: Any) -> Iterator[Finding]:
    optimizers = _keras.optimizers_of(model)
    for optimizer in optimizers:
        yield _of_optimizer(model, optimizer)
    if len(optimizers) > 1:
        yield Finding(
            "several optimizers",
            tuple(type(each).__name__ for each in optimizers),
            "depends",
            "exact where a step takes all its gradients before it applies any; else a loss that "
            "is taken after another's update sees that update in the window's last micro-batch only",
            "take the gradients first, then apply them",
        )


def _of_optimizer(model: Any, optimizer: Any) -> Finding:
    inner = getattr(optimizer, "inner_optimizer", None)
    name = type(optimizer).__name__
    called = f"{name} of {type(inner).__name__}" if inner is not None else name
    subject, layers = "optimizer", (called,)
    if _keras.has_own_gradients(optimizer):
        return Finding(
            subject,
            layers,
            "depends",
            "it computes gradients itself: exact where what it does is a mean over rows; noise "
            "is drawn for each micro-batch",
        )
    if isinstance(optimizer, _keras.BaseLossScaleOptimizer):
        return Finding(
            subject,
            layers,
            "exact",
            "the loss scale is taken off each micro-batch's gradient, and moves once an update",
        )
    if type(inner or optimizer) is tf_keras.optimizers.Nadam:
        return Finding(
            subject,
            layers,
            "approximate",
            "its steps depend on how often a function was traced, in plain training too",
            "tf_keras.optimizers.legacy.Nadam counts in a variable",
        )
    clips = [each for each in ("clipnorm", "global_clipnorm") if getattr(optimizer, each, None)]
    embeddings = [each.name for each in _embeddings(model)]
    if clips and embeddings:
        return Finding(
            subject,
            (*layers, *embeddings),
            "approximate",
            f"its {clips[0]} takes the norm of an embedding's slices before repeated rows are "
            "added up, so that it depends on how often a row occurs",
            "ClipByNorm or ClipByGlobalNorm in the chain, which add them up first",
        )
    if not _keras.is_of_keras(optimizer):
        return Finding(
            subject,
            layers,
            "depends",
            "it is handed the mean gradients of windows, once an update: exact unless it counts "
            "or gathers something by itself beside its apply_gradients",
            "verify_equivalence(model, x, y) tells",
        )
    return Finding(subject, layers, "exact", "it sees updates, and counts nothing else")


def _embeddings(model: Any) -> Iterable[Any]:
    return (
        layer
        for layer in _keras.flatten_layers(model)
        if isinstance(layer, tf_keras.layers.Embedding) and layer.trainable
    )


# ---- what only a step can tell -----------------------------------------------------------------


def _of_training(model: Any) -> Iterator[Finding]:
    """What training has warned of, beside what is known without it."""
    windows = vars(model).get("_accumulation")
    for about, text in getattr(windows, "said", {}).items():
        if about not in ("couplings", "fit"):
            _, _, why = text.partition(": ")
            yield Finding("found in training", (), "approximate", why)
