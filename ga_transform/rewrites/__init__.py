"""Rewrites: model -> model, done at conversion, and again where a converted model is loaded.

A rewrite changes the layers themselves, so that it is the same for copies and in place, for
functional, Sequential and subclassed models. Configs stay those of the plain model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ga_transform import _keras
from ga_transform.chain import Chain
from ga_transform.rewrites.autocast import fit_weights
from ga_transform.rewrites.batch_norm import check_batch_norm, rewrite_batch_norm
from ga_transform.rewrites.precision import (
    check_precision,
    choices_of,
    forget_choices,
    rewrite_precision,
)
from ga_transform.rewrites.rewritten import restore
from ga_transform.specs import BatchNorm, Precision

__all__ = ["apply_rewrites", "check_rewrites", "undo_rewrites"]


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
    """Rewrite the layers of a model that is built; those that are rewritten stay as they are.

    Before, it is not known which layers there will be, nor which of them end the model.
    """
    specs = [spec for spec in chain if spec.role == "rewrite"]
    if not (specs and model.built):
        return
    classes = [type(layer) for layer in _keras.flatten_layers(model)]
    for spec in specs:
        _REWRITES[type(spec)].apply(spec, model)
    if classes != [type(layer) for layer in _keras.flatten_layers(model)]:
        _keras.forget_inference(model)


def undo_rewrites(model: Any) -> None:
    """Make the layers of a model what they were."""
    for layer in _keras.flatten_layers(model):
        restore(layer)
    fit_weights(model, [each.layer for each in choices_of(model) if each.before != each.after])
    forget_choices(model)
    _keras.forget_inference(model)
