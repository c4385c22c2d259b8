"""The copies of a model that a trial compares: their chains, and what is left out of them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any

import attrs
import numpy as np
import tf_keras

from ga_transform import _keras
from ga_transform.chain import Chain
from ga_transform.conversion import make_accumulating, strip_accumulating
from ga_transform.errors import REMEDY_OF_COPY
from ga_transform.models import AccumulatingModel
from ga_transform.optimizer_state import keys_built_for
from ga_transform.replicas import scope_of
from ga_transform.report.finding import BATCH_NORM, RANDOMNESS, WEIGHTING
from ga_transform.report.of_layers import random_layers
from ga_transform.rewrites.loss_scale import is_scaled
from ga_transform.specs import Accumulate, BatchNorm, Precision, Transform

__all__ = [
    "LEFT_OUT",
    "can_rest",
    "copies_of",
    "copy_of",
    "gradients_of",
    "is_in_16_bits",
    "skipped_by",
    "values_of",
]

#: What can be left out of copies, by the subjects of findings.
LEFT_OUT = frozenset({RANDOMNESS, BATCH_NORM, WEIGHTING})


def copies_of(model: Any, without: Collection[str], *, at_rest: bool = False) -> list[Any]:
    """A copy that is to be trained in micro-batches, and one for large batches; both in 32 bits.

    Args:
        model: A converted model.
        without: What of `LEFT_OUT` is left out of both.
        at_rest: As in `copy_of`.
    """
    specs: list[Transform] = list(model._accumulating_chain)
    if WEIGHTING in without:
        specs = [_weighing_exactly(spec) for spec in specs]
    if BATCH_NORM in without:
        specs = _frozen(specs)
    if is_in_16_bits(model):
        others = [spec for spec in specs if not isinstance(spec, Precision)]
        specs = [Precision("float32"), *others]
    copies = [
        copy_of(model, each, at_rest=at_rest)
        for each in (specs, _of_large_batch(model, Chain(*specs)))
    ]
    for each in copies if RANDOMNESS in without else ():
        _quieten(each)
    return copies


def copy_of(model: Any, specs: Sequence[Transform], *, at_rest: bool = False) -> Any:
    """A copy with another chain, or a plain one.

    Args:
        model: A converted model.
        specs: Of the chain.
        at_rest: Whether its weights stay where they are, and its optimizer gathers gradients.
    """
    with scope_of(model):
        try:
            copy = strip_accumulating(model)
        except ValueError as error:
            reason = str(error).replace(f" {REMEDY_OF_COPY}", "")
            raise ValueError(
                f"verify_equivalence.model must be one that can be copied; got {model.name!r}: "
                f"{reason} Give its class a get_config, or try a smaller model of the same parts."
            ) from error
        # It is given one batch at a time.
        copy.autotune_steps_per_execution, copy.steps_per_execution = False, 1
        if at_rest:
            copy.optimizer = tf_keras.optimizers.Adam(0.0)
        return make_accumulating(copy, transforms=Chain(*specs), inplace=True) if specs else copy


def is_in_16_bits(model: Any) -> bool:
    """Whether a layer computes in 16 bits, with weights in 32."""
    return any(
        layer.compute_dtype in ("float16", "bfloat16") and layer.variable_dtype == "float32"
        for layer in _keras.flatten_layers(model)
    )


def can_rest(model: Any) -> bool:
    """Whether another optimizer can stand in for that of a converted model."""
    optimizers = _keras.optimizers_of(model)
    if len(optimizers) != 1 or not _keras.is_of_keras(*optimizers):
        return False
    (optimizer,) = optimizers
    return (
        optimizer is model.optimizer
        and not _keras.has_own_gradients(optimizer)
        and (model._has_usual_step() or not is_scaled(optimizer))
    )


def gradients_of(copy: Any) -> list[Any]:
    """By weight of a copy at rest, the moving average of its gradients; zero of those without."""
    averages = dict(zip(keys_built_for(copy.optimizer), copy.optimizer._momentums))
    weights = map(_keras.without_autocast, _keras.weights_of(copy))
    keyed = [(_keras.variable_key(copy.optimizer, weight), weight) for weight in weights]
    return [
        averages[key].numpy() if key in averages else np.zeros(weight.shape)
        for key, weight in keyed
    ]


def skipped_by(copy: Any) -> int:
    """The updates and micro-batches that a copy has skipped; a plain one skips none."""
    if not isinstance(copy, AccumulatingModel):
        return 0
    # Of the mixin, since a model may use these names itself.
    kinds = AccumulatingModel.skipped_windows, AccumulatingModel.skipped_micro_batches
    return sum(kind.__get__(copy) for kind in kinds)


def values_of(copy: Any) -> list[Any]:
    """The weights of a copy, as arrays of their own."""
    return [np.array(weight.numpy()) for weight in _keras.weights_of(copy)]


# ---- chains ------------------------------------------------------------------------------------


def _of_large_batch(model: Any, chain: Chain) -> list[Transform]:
    """What stays of a chain where a window is one batch; nothing, if that is a plain model."""
    rewrites = [
        spec
        for spec in chain
        if spec.role == "rewrite" and not (isinstance(spec, BatchNorm) and spec.mode != "freeze")
    ]
    # Plain tf_keras averages the means of replicas, whatever rows they have.
    has_replicas = model.distribute_strategy.num_replicas_in_sync > 1
    if not (rewrites or chain.update_stages or has_replicas):
        return []
    single = attrs.evolve(chain.find(Accumulate) or Accumulate(1), steps=1)
    return [*rewrites, single, *chain.update_stages]


def _frozen(specs: Sequence[Transform]) -> list[Transform]:
    """A chain that freezes batch normalisation."""
    others = [spec for spec in specs if not isinstance(spec, BatchNorm)]
    place = sum(spec.role == "rewrite" for spec in others)
    return [*others[:place], BatchNorm("freeze"), *others[place:]]


def _weighing_exactly(spec: Transform) -> Transform:
    return attrs.evolve(spec, weighting="exact") if isinstance(spec, Accumulate) else spec


# ---- layers ------------------------------------------------------------------------------------


def _quieten(model: Any) -> None:
    """Have layers that draw random numbers be called as in inference."""
    for layer in random_layers(model):
        layer.call = _as_in_inference(layer.call)


def _as_in_inference(call: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(call)

    @functools.wraps(call)
    def quiet(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.arguments["training"] = False
        return call(*bound.args, **bound.kwargs)

    return quiet
