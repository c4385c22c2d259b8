"""Precision: the layers that compute in float32 compute in 16 bits, or the other way round."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, Optional

import tensorflow as tf
import tf_keras

from ga_transform import _keras
from ga_transform.errors import did_you_mean, wrong_value
from ga_transform.rewrites.autocast import fit_weights
from ga_transform.rewrites.rewritten import Rewritten, set_policy, stand_before
from ga_transform.rewrites.unsafe import reason_to_keep
from ga_transform.specs import Precision

__all__ = ["Choice", "check_precision", "choices_of", "forget_choices", "rewrite_precision"]

#: The attribute of a converted model that holds them, by the layers' identities.
_CHOICES = "_precision_choices"


class Choice(NamedTuple):
    """What has been chosen for a layer."""

    layer: Any
    #: Names of policies; equal where it is left as it was.
    before: str
    after: str
    #: Why it is left as it was.
    reason: str


def choices_of(model: Any) -> list[Choice]:
    """What has been chosen for the layers of a converted model, in their order."""
    return list(vars(model).get(_CHOICES, {}).values())


def check_precision(spec: Precision, model: Any) -> None:
    """Refuse names and globs that match no layer."""
    names = [layer.name for layer in _keras.flatten_layers(model)]
    for pattern in spec.keep if model.built else ():
        if not any(fnmatchcase(name, pattern) for name in names):
            raise wrong_value(
                "Precision.keep",
                "names or globs of this model's layers",
                pattern,
                did_you_mean(pattern, names),
            )


def rewrite_precision(spec: Precision, model: Any) -> None:
    """Give the policy to every layer that has none of its own, and is safe in it.

    Called again, it does the same for layers that have been made since. Before a model is built, it
    is not known which layers there will be, nor which of them end it.
    """
    if not model.built:
        return
    check_precision(spec, model)
    choices: dict[int, Choice] = vars(model).setdefault(_CHOICES, {})
    layers = [layer for layer in _computing_layers(model) if id(layer) not in choices]
    if not layers:
        return
    reasons = _reasons_to_keep(spec, model, layers)
    changed = []
    for layer in layers:
        before = layer._dtype_policy.name
        reason = reasons[id(layer)]
        after = before if reason else spec.policy
        choices[id(layer)] = Choice(layer, before, after, reason or "")
        if isinstance(layer, _keras.OpLayer) and layer.compute_dtype in _CASTABLE:
            stand_before(_CastingOp, layer)  # it may meet tensors of both kinds
        if not reason:
            set_policy(layer, spec.policy)
            changed.append(layer)
            if layer is not model:
                stand_before(Rewritten, layer)
    fit_weights(model, changed)


def forget_choices(model: Any) -> None:
    """Forget what has been chosen, when it is undone."""
    vars(model).pop(_CHOICES, None)


def _computing_layers(model: Any) -> list[Any]:
    """The layers that compute something by themselves."""
    containers = (_keras.Functional, _keras.Sequential, tf_keras.layers.InputLayer)
    return [
        layer
        for layer in _keras.flatten_layers(model)
        if not isinstance(layer, (*containers, tf_keras.metrics.Metric))
    ]


def _reasons_to_keep(
    spec: Precision, model: Any, layers: Iterable[Any]
) -> dict[int, Optional[str]]:
    """By identity, why layers are left as they are; None where they are not."""
    kept = {
        id(inner)
        for layer in _keras.flatten_layers(model)
        if any(fnmatchcase(layer.name, pattern) for pattern in spec.keep)
        for inner in _keras.flatten_layers(layer)
    }
    is_back = spec.policy == "float32"
    ending = set() if is_back else {id(layer) for layer in _keras.ending_layers(model)}

    def reason(layer: Any) -> Optional[str]:
        policy = layer._dtype_policy
        if policy.name == spec.policy:
            return "it computes so already"
        if policy.variable_dtype != "float32" or (not is_back and policy.name != "float32"):
            return f"it has a policy of its own, {policy.name}"
        if id(layer) in kept:
            return "it is named in keep"
        if is_back:
            return None
        return "it ends the model" if id(layer) in ending else reason_to_keep(layer)

    found = {id(layer): reason(layer) for layer in layers}
    for layer in layers:  # what is unsafe is so with all that is in it
        if found[id(layer)] and not isinstance(layer, _keras.Model):
            for inner in _keras.flatten_layers(layer):
                if id(inner) in found and found[id(inner)] is None:
                    found[id(inner)] = f"it is in {layer.name!r}, which is left as it was"
    return found


class _CastingOp(Rewritten):
    """Stands before an op on tensors, which takes tensors of one precision only."""

    def call(self, args: Any, kwargs: Any) -> Any:  # of a class method's layer
        args, kwargs = self._cast((args, kwargs))
        return super().call(args, kwargs)  # type: ignore[misc]

    def _call_wrapper(self, *args: Any, **kwargs: Any) -> Any:  # of a function's layer
        args, kwargs = self._cast((args, kwargs))
        return super()._call_wrapper(*args, **kwargs)  # type: ignore[misc]

    def _cast(self, arguments: Any) -> Any:
        dtype = self._compute_dtype_object  # type: ignore[attr-defined]

        def cast(item: Any) -> Any:
            is_cast = tf.is_tensor(item) and item.dtype.name in _CASTABLE and item.dtype != dtype
            return tf.cast(item, dtype) if is_cast else item

        return tf.nest.map_structure(cast, arguments)


_CASTABLE = ("float16", "bfloat16", "float32")
