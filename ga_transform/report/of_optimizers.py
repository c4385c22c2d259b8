"""What is exact of optimizers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import tf_keras

from ga_transform import _keras
from ga_transform.report.finding import OPTIMIZER, TRY_IT, Finding

__all__ = ["of_optimizers"]


def of_optimizers(model: Any) -> Iterator[Finding]:
    """Of each optimizer, and of several together."""
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
    names = (called,)
    if _keras.has_own_gradients(optimizer):
        return Finding(
            OPTIMIZER,
            names,
            "depends",
            "it computes gradients itself: exact where what it does is a mean over rows; noise "
            "is drawn for each micro-batch",
        )
    if isinstance(optimizer, _keras.BaseLossScaleOptimizer):
        return Finding(
            OPTIMIZER,
            names,
            "exact",
            "the loss scale is taken off each micro-batch's gradient, and moves once an update",
        )
    if type(inner or optimizer) is tf_keras.optimizers.Nadam:
        return Finding(
            OPTIMIZER,
            names,
            "approximate",
            "its steps depend on how often a function was traced, in plain training too",
            "tf_keras.optimizers.legacy.Nadam counts in a variable",
        )
    clips = [each for each in ("clipnorm", "global_clipnorm") if getattr(optimizer, each, None)]
    embeddings = [each.name for each in _embeddings(model)]
    if clips and embeddings:
        return Finding(
            OPTIMIZER,
            (*names, *embeddings),
            "approximate",
            f"its {clips[0]} takes the norm of an embedding's slices before repeated rows are "
            "added up, so that it depends on how often a row occurs",
            "ClipByNorm or ClipByGlobalNorm in the chain, which add them up first",
        )
    if not _keras.is_of_keras(optimizer):
        return Finding(
            OPTIMIZER,
            names,
            "depends",
            "it is handed the mean gradients of windows, once an update: exact unless it counts "
            "or gathers something by itself beside its apply_gradients",
            TRY_IT,
        )
    return Finding(OPTIMIZER, names, "exact", "it sees updates, and counts nothing else")


def _embeddings(model: Any) -> Iterable[Any]:
    return (
        layer
        for layer in _keras.flatten_layers(model)
        if isinstance(layer, tf_keras.layers.Embedding) and layer.trainable
    )
