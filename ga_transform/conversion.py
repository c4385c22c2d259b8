"""The conversion: from a model to one that accumulates, and back."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Optional, TypeVar, Union

import tf_keras

from ga_transform import (
    _keras,
    saving,  # noqa: F401  (converted models can be saved from here on)
)
from ga_transform.chain import Chain
from ga_transform.classes import plain_class_of
from ga_transform.cloning import clone_with_state
from ga_transform.errors import wrong_type
from ga_transform.models import (
    AccumulatingModel,
    become_accumulating,
    become_plain,
    taken_names,
)
from ga_transform.replicas import scope_of
from ga_transform.rewrites import check_rewrites
from ga_transform.rewrites.batch_norm import warn_of_batch_norm
from ga_transform.rewrites.loss_scale import hand_on_scaling, undo_scaling
from ga_transform.rewrites.rewritten import as_plain
from ga_transform.shorthands import chain_of
from ga_transform.specs import (
    BatchNorm,
    ClipByAGC,
    Precision,
    Split,
    Transform,
)
from ga_transform.stages import check_stages
from ga_transform.strategies import check_strategy
from ga_transform.whole_batch import check_gradients_are_usual

__all__ = ["accumulating", "make_accumulating", "strip_accumulating"]

Steps = Union[int, Mapping[int, int]]
Builder = TypeVar("Builder", bound=Callable[..., Any])


def make_accumulating(
    model: Any,
    accum_steps: Optional[Steps] = None,
    *,
    micro_batch_size: Optional[int] = None,
    agc: Union[None, bool, float, ClipByAGC] = None,
    precision: Union[None, str, Precision] = None,
    batch_norm: Union[None, str, BatchNorm] = None,
    transforms: Union[None, Chain, Sequence[Transform]] = None,
    remainder: str = "flush",
    whole_batch_loss: Union[bool, str] = False,
    inplace: bool = False,
) -> Any:
    """A model that trains on micro-batches as `model` would on the large batch.

    The new model has weights, compile state and optimizer state of its own, equal to those
    of `model`, which is not touched. At least one thing to do must be asked for.

    Args:
        model: A `tf_keras.Model`, compiled or not, new or in the midst of its training.
        accum_steps: Batches an update, >= 1; or a schedule ``{update: steps}``.
        micro_batch_size: Rows a slice, >= 1, into which every batch is cut inside the graph; the
            last slice may have fewer. One batch is one update (with `accum_steps`, so many are).
        agc: Adaptive gradient clipping of each update: True, a clip factor > 0, or a
            `ClipByAGC`.
        precision: "mixed_float16", "mixed_bfloat16", "float32", or a `Precision`.
        batch_norm: What moving statistics do in a window: "keep" (move with each micro-batch,
            with a warning), "momentum" (once an update), "pooled" (once an update, to those of all
            its rows), "freeze" (rest), or a `BatchNorm`.
        transforms: The whole chain instead of the arguments above.
        remainder: What becomes of a partial window at the end of an epoch: "flush" applies
            it with its own weights, "carry" keeps it, "drop" discards it.
        whole_batch_loss: True takes the loss on the outputs of all slices of a batch together, so
            that it may couple its rows, for one forward pass more; "gathered" on those of all
            replicas. With `micro_batch_size`.
        inplace: Convert the object itself, whatever its class, and return it.

    Returns:
        The converted model. `fit`, callbacks, metrics and saving are as before.

    Raises:
        TypeError: The model is no `tf_keras.Model`, or an argument has a wrong type.
        ValueError: An argument or the chain breaks a rule, or the model is converted already
            or cannot be copied.
        NotImplementedError: This version does not carry out what is asked for under the
            model's strategy.

    Example:
        >>> import tf_keras, ga_transform as ga
        >>> model = tf_keras.Sequential([tf_keras.Input([4]), tf_keras.layers.Dense(1)])
        >>> model.compile("adam", "mse")
        >>> ga.make_accumulating(model, accum_steps=8, agc=0.02).transforms
        Chain(Accumulate(steps=8) -> ClipByAGC(clip_factor=0.02))
    """
    chain = chain_of(
        "make_accumulating",
        transforms,
        accum_steps=accum_steps,
        micro_batch_size=micro_batch_size,
        agc=agc,
        precision=precision,
        batch_norm=batch_norm,
        remainder=remainder,
        whole_batch_loss=whole_batch_loss,
    )
    if not isinstance(inplace, bool):
        raise wrong_type(
            "make_accumulating.inplace", "True or False", inplace, "The default is False."
        )
    return _convert("make_accumulating.model", model, chain, inplace)


def accumulating(
    accum_steps: Optional[Steps] = None,
    *,
    micro_batch_size: Optional[int] = None,
    agc: Union[None, bool, float, ClipByAGC] = None,
    precision: Union[None, str, Precision] = None,
    batch_norm: Union[None, str, BatchNorm] = None,
    transforms: Union[None, Chain, Sequence[Transform]] = None,
    remainder: str = "flush",
    whole_batch_loss: Union[bool, str] = False,
) -> Callable[[Builder], Builder]:
    """Decorate a function that builds a model: the model it returns is converted in place.

    Args:
        accum_steps, micro_batch_size, agc, precision, batch_norm, transforms, remainder,
            whole_batch_loss: As for `make_accumulating`.

    Returns:
        A decorator; what it returns has the function's own signature, name and docstring.

    Raises:
        TypeError, ValueError: As `make_accumulating`; arguments are checked at decoration,
            the model when it is built.

    Example:
        >>> import tf_keras, ga_transform as ga
        >>> @ga.accumulating(accum_steps=8)
        ... def build_model(width):
        ...     model = tf_keras.Sequential([tf_keras.Input([4]), tf_keras.layers.Dense(width)])
        ...     model.compile("adam", "mse")
        ...     return model
        >>> build_model(3).transforms
        Chain(Accumulate(steps=8))
    """
    if callable(accum_steps):
        raise wrong_type(
            "accumulating.accum_steps",
            "an int >= 1 or a schedule",
            accum_steps,
            "Write the arguments, as @accumulating(accum_steps=8).",
        )
    chain = chain_of(
        "accumulating",
        transforms,
        accum_steps=accum_steps,
        micro_batch_size=micro_batch_size,
        agc=agc,
        precision=precision,
        batch_norm=batch_norm,
        remainder=remainder,
        whole_batch_loss=whole_batch_loss,
    )

    def decorate(build: Builder) -> Builder:
        if not callable(build) or isinstance(build, tf_keras.Model):
            raise wrong_type(
                "accumulating",
                "put above a function that returns a model",
                build,
                "Pass a model to make_accumulating(model, ..., inplace=True).",
            )
        name = getattr(build, "__name__", "the builder")

        @functools.wraps(build)
        def build_accumulating(*args: Any, **kwargs: Any) -> Any:
            model = build(*args, **kwargs)
            return _convert(f"The model of {name}", model, chain, inplace=True)

        return build_accumulating  # type: ignore[return-value]

    return decorate


def strip_accumulating(model: Any, *, inplace: bool = False) -> Any:
    """The way back: a plain model with the weights, compile and optimizer state of `model`.

    Args:
        model: A converted model. Micro-batches that are pending are not taken along, and a
            warning says how many: call `model.flush()` first to apply them.
        inplace: Turn the object itself back into what it was.

    Returns:
        A model of the class that was converted.

    Raises:
        TypeError: `model` is no model.
        ValueError: `model` is not converted, or cannot be copied.

    Example:
        >>> import tf_keras, ga_transform as ga
        >>> model = tf_keras.Sequential([tf_keras.Input([4]), tf_keras.layers.Dense(1)])
        >>> type(ga.strip_accumulating(ga.make_accumulating(model, accum_steps=8))).__name__
        'Sequential'
    """
    _check_model("strip_accumulating.model", model)
    if not isinstance(model, AccumulatingModel):
        raise ValueError(
            f"strip_accumulating.model must be a converted model; got {type(model).__name__} "
            f"{model.name!r}. It is plain already."
        )
    pending = model._kept_micro_batches() or model.pending_micro_batches
    if pending:
        warnings.warn(
            f"strip_accumulating leaves out {pending} pending micro-batches of {model.name!r}. "
            "Call model.flush() first to apply them.",
            stacklevel=2,
        )
    if inplace:
        become_plain(model)
        return model
    with as_plain(_keras.flatten_layers(model)):
        copy = clone_with_state(model, plain_class_of(model))
    hand_on_scaling(model, copy)
    undo_scaling(copy)
    return copy


# ---- from a model to one that accumulates ----------------------------------------------------


def _convert(owner: str, model: Any, chain: Chain, inplace: bool) -> Any:
    """Check everything, then change something."""
    _check_model(owner, model)
    if isinstance(model, AccumulatingModel):
        raise ValueError(
            f"{owner} must be a plain model; got {model.name!r}, converted already to "
            f"{model._accumulating_chain}. Call strip_accumulating first."
        )
    for layer in _keras.flatten_layers(model):
        if isinstance(layer, AccumulatingModel):
            raise ValueError(
                f"{owner} must hold no converted model; got {layer.name!r} in {model.name!r}. "
                "Call strip_accumulating on it first."
            )
    check_strategy(owner, model, chain)
    _check_has_usual_step(model, chain)
    _check_rows_are_free(model, chain)
    check_rewrites(chain, model)
    check_stages([*chain.micro_batch_stages, *chain.update_stages], model)
    if chain.gathers and (chain.find(BatchNorm) or BatchNorm("keep")).mode == "keep":
        warn_of_batch_norm(model)
    _warn_of_taken_names(model)
    with scope_of(model):
        if not inplace:
            model = clone_with_state(model, type(model))
        become_accumulating(model, chain)
        _check_precisions_agree(model, chain)
    return model


def _check_model(owner: str, model: Any) -> None:
    if isinstance(model, tf_keras.Model):
        return
    remedy = "Pass a model, as tf_keras.Sequential([...]) returns it."
    if isinstance(model, type):
        remedy = "Pass an instance, not the class."
    elif inspect.isroutine(model):
        remedy = "Call it, and pass the model that it returns."
    elif hasattr(model, "apply_gradients"):
        remedy = "Pass the model that is compiled with it."
    packages = {base.__module__.split(".")[0] for base in type(model).__mro__}
    if "keras" in packages and hasattr(model, "fit"):
        version = importlib.import_module("keras").__version__
        raise TypeError(
            f"{owner} must be a tf_keras.Model; got {type(model).__name__} of the package keras "
            f"{version}. Build it with tf_keras ('import tf_keras' for 'import keras'), or set "
            "TF_USE_LEGACY_KERAS=1 before TensorFlow is imported if it is built with tf.keras."
        )
    raise wrong_type(owner, "a tf_keras.Model", model, remedy)


def _check_has_usual_step(model: Any, chain: Chain) -> None:
    """Only of tf_keras's own step is it known where the loss is taken of the outputs."""
    if not chain.takes_whole_batches:
        return
    own_step = getattr(model.train_step, "__func__", model.train_step)
    if own_step is not tf_keras.Model.train_step:
        raise ValueError(
            "Split.whole_batch_loss must be given a model with tf_keras's own train_step; got "
            f"{model.name!r}, whose train_step is that of {type(model).__name__}. Put its loss into "
            "compile or compute_loss, or leave whole_batch_loss out."
        )
    check_gradients_are_usual(getattr(model, "optimizer", None))


def _check_rows_are_free(model: Any, chain: Chain) -> None:
    """A stateful RNN has a state for each row of a batch, which slices would mix up."""
    if chain.find(Split) is None:
        return
    layers = _keras.flatten_layers(model)
    names = [
        layer.name for layer in layers if isinstance(layer, tf_keras.layers.RNN) and layer.stateful
    ]
    if names:
        raise ValueError(
            f"Split must be given a model without stateful layers; got {', '.join(names)} in "
            f"{model.name!r}. Use accum_steps, which takes batches as they are."
        )


def _check_precisions_agree(model: Any, chain: Chain) -> None:
    """Refuse a model whose own code mixes tensors of 16 bits with others, and change it back."""
    if chain.find(Precision) is None or not _keras.has_own_code(model):
        return
    try:
        _keras.call_symbolically(model)
    except Exception as error:  # whatever the user's own code raises
        become_plain(model)
        if not _can_be_called(model):  # which has nothing to do with precision
            become_accumulating(model, chain)
            return
        raise ValueError(
            f"{chain.find(Precision)} must be given a model whose own code takes tensors of 16 "
            f"bits; got {model.name!r}, which raises: {_core_of(error)} Cast them there, or "
            "name its layers in Precision(keep=...)."
        ) from error


def _can_be_called(model: Any) -> bool:
    try:
        _keras.call_symbolically(model)
    except Exception:  # noqa: BLE001  (whatever the user's own code raises)
        return False
    return True


def _core_of(error: Exception) -> str:
    """What an error in a model's code says, on one line, without the way there."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if re.match(r"\w+(Error|Exception)\b", line)]
    text = next((line for line in [*told[::-1], *lines] if line), "")
    return f"{text.rstrip('. ')}." if text else f"{type(error).__name__}."


def _warn_of_taken_names(model: Any) -> None:
    """Say how to reach what a model has another thing of its own for."""
    taken = sorted(taken_names(model))
    if taken:
        warnings.warn(
            f"{model.name}: {', '.join(taken)} of {type(model).__name__} stay its own. Those of a "
            "converted model are reached through ga_transform.models.AccumulatingModel, as "
            "AccumulatingModel.flush(model).",
            stacklevel=4,
        )
