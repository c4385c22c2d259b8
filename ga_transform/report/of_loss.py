"""What is exact of losses, their weights, and metrics."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import tensorflow as tf
import tf_keras

from ga_transform import _keras
from ga_transform.neighbours import couplings_of
from ga_transform.report.finding import TRY_IT, WEIGHTING, WHOLE_BATCH, Finding
from ga_transform.specs import Accumulate
from ga_transform.training import Accumulating

__all__ = ["adds_up_losses", "of_loss", "of_metrics", "of_outputs", "of_weighting"]


def of_loss(model: Any) -> Iterator[Finding]:
    """Of losses, compiled or the model's own, and of regularisers."""
    is_whole = _sees_whole_windows(model)
    couplings = tuple(couplings_of(model, of_losses=not is_whole))
    if couplings:
        yield Finding(
            "losses that couple rows",
            couplings,
            "outside",
            "the value for one row depends on the other rows of its micro-batch",
            "; or ".join(
                [*_ways_to_be_whole(model), "make micro-batches as large as memory allows"]
            ),
        )
    if not model._is_compiled:
        yield Finding("loss", (), "depends", "the model is not compiled", "compile it")
        return
    if is_whole:
        yield Finding(
            "losses of the whole batch",
            tuple(map(_name_of, _losses_of(model))),
            "exact",
            "they are taken on the outputs of all slices together, whatever they are; every slice is "
            "passed through the model twice, and outputs are kept for a whole batch",
        )
        yield from _of_regularisers(model)
        return
    own_step = not model._has_usual_step()
    weighting = _weighting_of(model)
    if own_step or not _has_usual_loss(model):
        yield Finding(
            f"{'train_step' if own_step else 'compute_loss'} of the model's own",
            (),
            "depends",
            *_conditions_of(weighting),
        )
    losses = _losses_of(model)
    own = tuple(_name_of(loss) for loss in losses if not _is_of_keras(loss))
    if own:
        yield Finding(
            "losses from outside tf_keras",
            own,
            "depends",
            "exact if the value for a row depends on that row alone",
            "; or ".join([TRY_IT, *_ways_to_be_whole(model)]),
        )
    usual = tuple(_name_of(loss) for loss in losses if _is_of_keras(loss))
    is_weighed = weighting == "exact" or all(map(_is_sum, losses))
    if usual and is_weighed and not own_step and not any(of_outputs(model)):
        yield Finding(
            "compiled losses",
            usual,
            "exact",
            "each micro-batch weighs what its mean divided by; sums are added up",
        )
    yield from _of_regularisers(model)


def _of_regularisers(model: Any) -> Iterator[Finding]:
    if any(layer._callable_losses for layer in _keras.flatten_layers(model)):
        yield Finding("regularisers", (), "exact", "they count once an update")


def _conditions_of(weighting: Any) -> tuple[str, str]:
    """Under which condition a loss of the model's own is exact, and what mends it."""
    if weighting == "sum":
        return "exact if its loss is a sum over rows, as weighting='sum' says", ""
    if callable(weighting):
        return f"exact if its loss is a mean over what {_name_of(weighting)} counts", ""
    why = (
        "exact for the compiled loss and for means over rows; a mean over something else (tokens, "
        "pixels) must say what it divides by"
    )
    return why, "Accumulate(weighting=function) for such a mean, weighting='sum' for a sum"


def of_weighting(model: Any) -> Iterator[Finding]:
    """Of a weighting that was asked for, where the compiled loss tells what is right."""
    if _sees_whole_windows(model):
        return
    weighting = _weighting_of(model)
    is_usual = model._is_compiled and model._has_usual_step() and _has_usual_loss(model)
    if weighting == "exact" or (is_usual and all(map(_is_sum, _losses_of(model)))):
        return
    verdict = "depends"
    if weighting == "equal":
        why = "exact where micro-batches have as many rows, or elements of the loss, each"
    elif not is_usual:  # that of the model's own has its condition already
        return
    elif weighting == "sum":
        verdict = "outside"
        why = (
            "the compiled loss is a mean: of a window, as many are added up as it has "
            "micro-batches, and nothing divides them"
        )
    else:
        why = "exact where it returns what the mean of the compiled loss divides by"
    yield Finding(
        WEIGHTING,
        (_name_of(weighting),),
        verdict,
        why,
        "weighting='exact' counts what a mean loss divides by",
    )


def _sees_whole_windows(model: Any) -> bool:
    """Whether the loss is taken on all rows of a window together."""
    steps = (model._accumulating_chain.find(Accumulate) or Accumulate(1)).steps
    return model._accumulating_chain.takes_whole_batches and steps in (1, {0: 1})


def _ways_to_be_whole(model: Any) -> list[str]:
    """How the loss could be taken on all rows of a window together, if it can."""
    if not model._has_usual_step():
        return []
    if model._accumulating_chain.takes_whole_batches:
        return ["without accum_steps a batch is a window, and has its loss as a whole"]
    return [WHOLE_BATCH]


def adds_up_losses(model: Any) -> bool:
    """Whether a compiled loss is a sum, whose gradients may be kept apart from those of means."""
    return any(map(_is_sum, _losses_of(model)))


def _weighting_of(model: Any) -> Any:
    return (model._accumulating_chain.find(Accumulate) or Accumulate(1)).weighting


def _has_usual_loss(model: Any) -> bool:
    return _keras.is_keras_own(model, Accumulating, "compute_loss")


def _losses_of(model: Any) -> list[Any]:
    """The losses that a model was compiled with."""
    losses = tf.nest.flatten(getattr(model.compiled_loss, "_user_losses", None))
    return [loss for loss in losses if loss is not None]


def _is_sum(loss: Any) -> bool:
    reductions = (tf_keras.losses.Reduction.SUM, tf_keras.losses.Reduction.NONE)
    return getattr(loss, "reduction", None) in reductions


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


def of_outputs(model: Any) -> Iterator[Finding]:
    """Of several outputs whose means may divide by numbers of no fixed ratio."""
    outputs = tf.nest.flatten(getattr(model, "outputs", None) or [])
    is_usual = model._is_compiled and model._has_usual_step()
    if len(outputs) < 2 or not is_usual or _sees_whole_windows(model):
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
        "; or ".join(
            [
                *_ways_to_be_whole(model),
                "reduce those losses to one number a row, or sum them (reduction='sum')",
            ]
        ),
    )


def _extent_of(output: Any, mask: Any) -> Any:
    """What the count of a mean over an output goes with: None for its rows alone."""
    if mask is not None:
        return id(mask)
    return id(output) if None in output.shape[1:-1] else None


def of_metrics(model: Any) -> Iterator[Finding]:
    """Of metrics that are not tf_keras's."""
    if _sees_whole_windows(model):
        return
    metrics = model.compiled_metrics if model._is_compiled else None
    given = [getattr(metrics, name, None) for name in ("_user_metrics", "_user_weighted_metrics")]
    functions = [getattr(each, "_fn", each) for each in tf.nest.flatten(given)]
    names = [
        _name_of(each)
        for each in functions
        if not (each is None or isinstance(each, str) or _is_of_keras(each))
    ]
    if names:
        yield Finding(
            "metrics from outside tf_keras",
            tuple(dict.fromkeys(names)),
            "depends",
            "updates do not depend on them; their values are those of the large batch if that "
            "for a row depends on that row alone",
        )
