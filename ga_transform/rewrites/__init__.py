"""Rewrites: model -> model, done at conversion, and again where a converted model is loaded.

A rewrite changes the layers themselves, so that it is the same for copies and in place, for
functional, Sequential and subclassed models. Configs stay those of the plain model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ga_transform import _keras
from ga_transform.chain import Chain
from ga_transform.optimizer_state import build_for
from ga_transform.rewrites.autocast import fit_weights
from ga_transform.rewrites.batch_norm import check_batch_norm, rewrite_batch_norm
from ga_transform.rewrites.precision import (
    check_precision,
    choices_of,
    forget_choices,
    rewrite_precision,
)
from ga_transform.rewrites.rewritten import as_plain, restore
from ga_transform.specs import BatchNorm, Precision

__all__ = ["apply_rewrites", "build_for_plain", "check_rewrites", "undo_rewrites"]


class _Rewrite(NamedTuple):
    #: Refuses, before anything is changed, a model that it does not fit.
    check: Callable[[Any, Any], None]
    #: Changes layers, and only those that it has not changed already.
    apply: Callable[[Any, Any], None]


_REWRITES: Mapping[type, _Rewrite] = {
    Precision: _Rewrite(check_precision, rewrite_precision),
    BatchNorm: _Rewrite(check_batch_norm, rewrite_batch_norm),
}


def check_rewrites(chain: Chain, model: Any) -> None:
    """Refuse, before anything is changed, a rewrite that there is not or that does not fit."""
    for spec in chain:
        if spec.role != "rewrite":
            continue
        if type(spec) not in _REWRITES:
            raise ValueError(
                f"{type(spec).__name__}.role must be 'stage' in a transform of your own; got "
                "'rewrite'. Leave it out of the class."
            )
        _REWRITES[type(spec)].check(spec, model)


def apply_rewrites(chain: Chain, model: Any) -> None:
    """Rewrite the layers of a model; those that are rewritten already stay as they are."""
    specs = [spec for spec in chain if spec.role == "rewrite"]
    if not specs:
        return
    classes = [type(layer) for layer in _keras.flatten_layers(model)]
    for spec in specs:
        _REWRITES[type(spec)].apply(spec, model)
    if classes != [type(layer) for layer in _keras.flatten_layers(model)]:
        _keras.forget_inference(model)


def build_for_plain(model: Any) -> None:
    """Have the compiled optimizer make slots for what the plain model trains, if it has none yet.

    What a rewrite rests (gamma and beta) trains again on the way back, and in a file the plain
    model's slots are expected.
    """
    optimizer = getattr(model, "optimizer", None)
    if not (model._is_compiled and model.built and _keras.is_of_keras(optimizer)):
        return
    layers = _keras.flatten_layers(model)
    trained = len(model.trainable_weights)
    with as_plain(layers):
        variables = list(model.trainable_weights)
    if trained != len(variables):
        build_for(optimizer, variables)


def undo_rewrites(model: Any) -> None:
    """Make the layers of a model what they were."""
    for layer in _keras.flatten_layers(model):
        restore(layer)
    fit_weights(model, [each.layer for each in choices_of(model) if each.before != each.after])
    forget_choices(model)
    _keras.forget_inference(model)
