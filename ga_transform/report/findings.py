"""What of a model is exact under a chain and what is not, why, and what mends it."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import attrs
import tensorflow as tf
import tf_keras

from ga_transform import _keras
from ga_transform.neighbours import couplings_of
from ga_transform.rewrites.batch_norm import batch_norms_of
from ga_transform.specs import Accumulate, BatchNorm, Precision
from ga_transform.training import Accumulating

__all__ = [
    "BATCH_NORM",
    "NOT_FINITE",
    "NO_UPDATE",
    "OPTIMIZER",
    "RANDOMNESS",
    "TRY_IT",
    "VERDICTS",
    "WEIGHTING",
    "Finding",
    "adds_up_losses",
    "findings_of",
    "of_unknown_cause",
    "random_layers",
    "stateful_layers",
]

#: From bad to good. "outside": no accumulation equals the large batch. "approximate": close to it.
#: "depends": exact under a condition, which is told.
VERDICTS = ("outside", "approximate", "depends", "exact")

#: How many names a text holds.
_NAMED = 8
#: Subjects of findings.
RANDOMNESS, BATCH_NORM = "random numbers", "batch normalisation"
WEIGHTING, OPTIMIZER = "weighting", "optimizer"
#: The remedy where nobody but a trial knows.
TRY_IT = "verify_equivalence(model, x, y) tells"

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
    #: The layers, outputs, losses or optimizers concerned; none where it is the whole model.
    names: tuple[str, ...]
    #: One of `VERDICTS`.
    verdict: str
    #: The reason, or the condition.
    why: str
    #: What can be done about it; empty where there is nothing to do, or nothing that helps.
    remedy: str = ""

    def __str__(self) -> str:
        named = ", ".join(self.names[:_NAMED])
        more = f" and {len(self.names) - _NAMED} more" if self.names[_NAMED:] else ""
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
            _of_loss, _of_weighting, _of_outputs, _of_metrics, _of_batch_norm, _of_randomness,
            _of_states, _of_own_layers, _of_optimizers, _of_training,
        )  # fmt: skip
        found += [each for about in of_windows for each in about(model)]
        if not model.built:
            found.append(
                Finding(
                    "layers",
                    (),
                    "depends",
                    "the model is not built: what its first step makes is not looked at",
                    "call it on a batch",
                )
            )
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
            TRY_IT,
        )
    usual = tuple(_name_of(loss) for loss in losses if _is_of_keras(loss))
    is_weighed = weighting == "exact" or all(map(_is_sum, losses))
    if usual and is_weighed and not own_step and not any(_of_outputs(model)):
        yield Finding(
            "compiled losses",
            usual,
            "exact",
            "each micro-batch weighs what its mean divided by; sums are added up",
        )
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


def _of_weighting(model: Any) -> Iterator[Finding]:
    """Of a weighting that was asked for, where the compiled loss tells what is right."""
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


def _of_metrics(model: Any) -> Iterator[Finding]:
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


def _of_states(model: Any) -> Iterator[Finding]:
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


def _of_own_layers(model: Any) -> Iterator[Finding]:
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


# ---- what only a trial can tell ----------------------------------------------------------------


NOT_FINITE = Finding(
    "gradients that are not finite",
    (),
    "outside",
    "updates with them are skipped, or lead to NaN, and show nothing",
    "data without NaN and infinity, a smaller loss or learning rate",
)
NO_UPDATE = Finding(
    "no update",
    (),
    "outside",
    "no weight has moved on the large batches, so that there is nothing to compare",
    "a learning rate above 0, and weights that train",
)


def of_unknown_cause(suspects: Collection[str]) -> Finding:
    """A difference that stays without suspects, and of which nothing else is known."""
    stays = f"the difference stays without {' and '.join(sorted(suspects))}; " if suspects else ""
    return Finding(
        "not found out",
        (),
        "outside",
        f"{stays}a loss or a layer may couple the rows of a batch, draw random numbers by itself, "
        "or take a mean over something else than rows",
        "Accumulate(weighting=...) for such a mean",
    )


# ---- what only a step can tell -----------------------------------------------------------------


def _of_training(model: Any) -> Iterator[Finding]:
    """What training has warned of, beside what is known without it."""
    windows = vars(model).get("_accumulation")
    for about, text in getattr(windows, "said", {}).items():
        if about not in ("couplings", "fit"):
            _, _, why = text.partition(": ")
            yield Finding("found in training", (), "approximate", why)
