"""What is exact of layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import tf_keras

from ga_transform import _keras
from ga_transform.report.finding import BATCH_NORM, RANDOMNESS, TRY_IT, Finding
from ga_transform.rewrites.batch_norm import batch_norms_of
from ga_transform.specs import BatchNorm, Precision

__all__ = [
    "of_batch_norm",
    "of_own_layers",
    "of_precision",
    "of_randomness",
    "of_states",
    "random_layers",
    "stateful_layers",
]

_MOVES = {
    "keep": "moving statistics move with each micro-batch",
    "momentum": "moving statistics move once an update, towards an average of the micro-batches'",
    "pooled": "moving statistics move once an update, towards those of all rows of the window",
}


def random_layers(model: Any) -> list[Any]:
    """The layers of tf_keras, and those derived from them, that draw random numbers in training."""
    layers = [each for each in _keras.flatten_layers(model) if _draws(each)]
    cells = {id(getattr(layer, "cell", None)) for layer in layers}
    return [layer for layer in layers if id(layer) not in cells]


def stateful_layers(model: Any) -> list[Any]:
    """The layers that go on from the states which the batch before has left."""
    layers = _keras.flatten_layers(model)
    return [each for each in layers if isinstance(each, tf_keras.layers.RNN) and each.stateful]


def _draws(layer: Any) -> bool:
    """Whether a layer draws numbers: it may have been made with nothing to draw, as Dropout(0)."""
    if not isinstance(layer, _keras.BaseRandomLayer):
        return False
    # The names of tf_keras's arguments; layers without any of them (RandomFlip) always draw, and
    # a rate that is no number (of RandomZoom's kind) is taken for one above zero.
    rates = [getattr(layer, name, None) for name in ("rate", "dropout", "recurrent_dropout")]
    rates.append(getattr(layer, "stddev", None))
    numbers = [rate for rate in rates if isinstance(rate, (int, float))]
    return not numbers or any(numbers)


def of_batch_norm(model: Any) -> Iterator[Finding]:
    """Of batch normalisation: what it normalises by, and when its statistics move."""
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


def of_randomness(model: Any) -> Iterator[Finding]:
    """Of layers that draw random numbers."""
    names = tuple(layer.name for layer in random_layers(model))
    if names:
        yield Finding(
            RANDOMNESS,
            names,
            "outside",
            "micro-batches draw other numbers than the large batch, of the same distribution",
        )


def of_states(model: Any) -> Iterator[Finding]:
    """Of layers that go on from the batch before."""
    names = tuple(layer.name for layer in stateful_layers(model))
    if names:
        yield Finding(
            "states",
            names,
            "outside",
            "each micro-batch goes on from the states that the one before has left; of a large "
            "batch, rows know nothing of each other",
            "stateful=False, or reset_states() before every batch",
        )


def of_own_layers(model: Any) -> Iterator[Finding]:
    """Of layers whose code is not known."""
    found = []
    for layer in _keras.flatten_layers(model):
        coder = _coder_of(layer)
        if not (coder is None or isinstance(layer, tf_keras.metrics.Metric) or _draws(layer)):
            found.append(layer.name if coder is tf_keras.layers.Lambda else coder.__name__)
    if found:
        yield Finding(
            "layers from outside tf_keras",
            tuple(dict.fromkeys(found)),
            "depends",
            "exact if they draw no random numbers by themselves, and what they make of a row "
            "depends on that row alone",
            TRY_IT,
        )


def _coder_of(layer: Any) -> Any:
    """The class that a layer has its code from, if that is somebody's own."""
    known = ("tensorflow", "tf_keras")
    for each in type(layer).__mro__:
        package = each.__module__.split(".")[0]
        if "call" in vars(each) and package != "ga_transform":
            is_known = package in known and each is not tf_keras.layers.Lambda
            return None if is_known else each
    return None


def of_precision(model: Any) -> Iterator[Finding]:
    """Of layers that compute in 16 bits."""
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
