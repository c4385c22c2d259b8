"""The second step: the loss of the outputs of a whole batch, and its gradient."""

from __future__ import annotations

from typing import Any, NamedTuple, Optional, Union

import tensorflow as tf

from ga_transform import _keras, numerics
from ga_transform.loss_terms import MEAN, SUM, LossCall, record_losses, widened_outputs
from ga_transform.replicas import count_replicas
from ga_transform.rewrites.loss_scale import is_scaled
from ga_transform.specs import Precision
from ga_transform.weighting import Weighting
from ga_transform.whole_batch.forward import Forward
from ga_transform.whole_batch.seen import Seen
from ga_transform.windows import Windows

__all__ = ["Gradient", "OfKind", "differentiate"]


class OfKind(NamedTuple):
    """The gradient of a kind of loss with respect to all that it is a function of; None is zero."""

    #: By output. Shape: as the output.
    outputs: list[Optional[tf.Tensor]]
    #: By activity regulariser and `add_loss`. Shape: scalar.
    activations: list[Optional[tf.Tensor]]
    #: By trainable variable, where the loss uses it directly. Shape: as the variable.
    variables: list[Union[None, tf.Tensor, tf.IndexedSlices]]


class Gradient(NamedTuple):
    """The gradient of the loss of a batch."""

    #: Of what is summed in the loss, and of what is a mean, which windows treat differently.
    by_kind: dict[str, OfKind]
    #: Of the batch in its window. Shape: scalar, float64.
    weight: tf.Tensor


def differentiate(
    model: Any,
    windows: Windows,
    seen: Seen,
    forward: Forward,
    x: Any,
    y: Any,
    sample_weight: Any,
    *,
    is_usual_loss: bool,
) -> Gradient:
    """Take the loss of a batch as tf_keras does, and its gradient.

    Args:
        model: The converted model.
        windows: The windows of its optimizers.
        seen: The rows that the loss sees.
        forward: What the model has made of the batch.
        x, y, sample_weight: The batch.
        is_usual_loss: Whether `compute_loss` is tf_keras's own.
    """
    is_rewritten = windows.chain.find(Precision) is not None
    y_pred = forward.outputs
    if is_usual_loss or is_rewritten:  # another one may want them as they are
        y_pred = widened_outputs(y_pred)
    y, y_pred, sample_weight = seen.gather((y, y_pred, sample_weight))
    if not is_usual_loss:  # tf_keras's own does not look at the inputs
        x = seen.gather(x)
    watched = [each if _has_gradient(each) else None for each in tf.nest.flatten(y_pred)]
    activations = forward.activations
    _keras.place_activation_losses(model, activations)
    weighting = Weighting(
        model, windows, (x, y, sample_weight), keeps_kinds_apart=is_usual_loss, is_own_step=False
    )
    calls: list[LossCall] = []
    recording = record_losses(
        model.compiled_loss,
        weighting.note,
        calls.append if seen.is_gathered else None,
        widens=is_rewritten,
    )
    with tf.GradientTape(persistent=True) as tape, recording:
        tape.watch([*(each for each in watched if each is not None), *activations])
        loss = model.compute_loss(x, y, y_pred, sample_weight)
        model._validate_target_and_loss(y, loss)
        by_kind, weight = _by_kind(model, windows, seen, loss, weighting, is_usual_loss)
        # The way from the loss back may lead through 16 bits, too.
        scale = model.optimizer.loss_scale if is_scaled(model.optimizer) else None
        if scale is not None:
            by_kind = {kind: part * tf.cast(scale, part.dtype) for kind, part in by_kind.items()}
    for call in calls:  # tf_keras would take a sum for one of the replica's rows
        call.tell_metrics(is_of_all=True)
    sources = [each for each in watched if each is not None], activations
    gradients = {}
    for kind, part in by_kind.items():
        of_watched, of_activations, variables = [
            [_unscaled(each, scale) for each in gradients_of]
            for gradients_of in tape.gradient(part, [*sources, model.trainable_variables])
        ]
        ahead = iter(of_watched)
        outputs = [None if each is None else seen.own(_dense(next(ahead))) for each in watched]
        gradients[kind] = OfKind(outputs, of_activations, variables)
    return Gradient(gradients, weight)


def _by_kind(
    model: Any,
    windows: Windows,
    seen: Seen,
    loss: tf.Tensor,
    weighting: Weighting,
    is_usual_loss: bool,
) -> tuple[dict[str, tf.Tensor], tf.Tensor]:
    """The loss by kind, and the weight of the batch in its window."""
    is_window = not windows.open(model.optimizer).crosses_batches
    one = tf.ones([], tf.float64)
    if is_window and count_replicas() == 1:  # nothing is added to it, or divides it
        return {SUM: loss}, one
    if is_usual_loss and _keras.has_sum_losses(model):
        by_kind = weighting.losses_by_kind(None)
    elif loss.shape.rank not in (0, None):  # what is differentiated is the sum of its elements
        by_kind = {SUM: loss}
    else:
        by_kind = {weighting.kind(model.optimizer): loss}
    if MEAN in by_kind:
        # tf_keras has divided it, for the optimizer to add up those of all replicas; here the
        # weights of all batches and replicas divide it at the update.
        by_kind[MEAN] *= count_replicas()
    if is_window and seen.is_gathered:  # all replicas have the same loss
        return by_kind, one
    return by_kind, weighting.weight(MEAN if MEAN in by_kind else SUM)


def _has_gradient(output: Any) -> bool:
    return output is not None and (output.dtype.is_floating or output.dtype.is_complex)


def _unscaled(
    gradient: Optional[numerics.Gradient], scale: Optional[tf.Tensor]
) -> Optional[numerics.Gradient]:
    """A gradient of a loss that was scaled, in float32 or wider."""
    if gradient is None or scale is None:
        return gradient
    return numerics.times(numerics.widened(gradient), 1 / scale)


def _dense(gradient: Union[None, tf.Tensor, tf.IndexedSlices]) -> Optional[tf.Tensor]:
    """A gradient that slices can be cut from: a loss may have gathered rows."""
    return None if gradient is None else tf.convert_to_tensor(gradient)
