"""What is known of other packages, by name: none of them is imported."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import tensorflow as tf
import tf_keras

from ga_transform import _keras

__all__ = ["WRITERS_OF_CLASS", "couplings_of", "pass_counters_of"]

#: Methods of models that write down the name of the class.
WRITERS_OF_CLASS = ("save_pretrained",)

#: By package, the classes and functions that couple the rows of a batch.
_COUPLINGS = {
    "keras_cv": ("SimCLRLoss",),
    "segmentation_models": ("DiceLoss", "JaccardLoss"),
    "tensorflow_addons": (
        "LiftedStructLoss",
        "NpairsLoss",
        "NpairsMultilabelLoss",
        "TripletHardLoss",
        "TripletSemiHardLoss",
        "WeightedKappaLoss",
        "lifted_struct_loss",
        "npairs_loss",
        "npairs_multilabel_loss",
        "triplet_hard_loss",
        "triplet_semihard_loss",
    ),
    # Moving averages of the range of a batch.
    "tensorflow_model_optimization": ("QuantizeLayer", "QuantizeWrapperV2"),
    "tensorflow_recommenders": ("Retrieval",),
    "tensorflow_similarity": ("Barlow", "MetricLoss", "SimCLRLoss", "VicReg"),
    # A metric is taken over all the rows that it has seen.
    "tf_keras": ("Metric",),
    "transformers": (
        "TFBlipModel",
        "TFCLIPModel",
        "TFGroupViTModel",
        "TFVisionTextDualEncoderModel",
    ),
}

#: By package, the classes of layers that count the passes of training, and their counters.
_PASS_COUNTERS = {("tensorflow_model_optimization", "PruneLowMagnitude"): "pruning_step"}


def couplings_of(model: Any, *, of_losses: bool = True) -> list[str]:
    """The names of a model's losses and layers that are known to couple the rows of a batch.

    Args:
        model: Compiled or not.
        of_losses: Whether losses are looked at, and not layers only.
    """
    losses = tf.nest.flatten(getattr(model.compiled_loss, "_user_losses", None))
    losses += [getattr(loss, "fn", None) for loss in losses]
    parts = [part for part in _keras.held_by(model, _is_loss) if not _is_metric(part)]
    layers = [layer for layer in _keras.flatten_layers(model) if not _is_metric(layer)]
    items = [*losses, *parts, *layers] if of_losses else layers
    names = [name for item in items for name in _known(item)]
    return list(dict.fromkeys(names))


def pass_counters_of(model: Any) -> list[tf.Variable]:
    """The variables that count the forward passes of training, to be taken for updates."""
    counters = []
    for layer in _keras.flatten_layers(model):
        for each in type(layer).__mro__:
            name = _PASS_COUNTERS.get((_package(each), each.__name__))
            if name is not None:
                counters.append(getattr(layer, name))
    return counters


def _is_loss(item: Any) -> bool:
    return isinstance(item, tf_keras.losses.Loss) or inspect.isfunction(item)


def _is_metric(item: Any) -> bool:
    return isinstance(item, tf_keras.metrics.Metric)


def _known(item: Any) -> Iterator[str]:
    is_function = inspect.isfunction(item)
    for each in (item,) if is_function else type(item).__mro__:
        if each.__name__ in _COUPLINGS.get(_package(each), ()):
            # A model may be converted already: its own class is meant.
            named = each if is_function or isinstance(item, _keras.Model) else type(item)
            yield f"{named.__name__} of {_package(named)}"


def _package(function_or_class: Any) -> str:
    return str(function_or_class.__module__).split(".", maxsplit=1)[0]
