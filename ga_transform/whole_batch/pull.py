"""The third step: the gradient of a batch's loss, pulled back to the weights slice by slice."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from ga_transform.loss_terms import total_of, widened_outputs
from ga_transform.micro_step import MicroStep
from ga_transform.split import Slice, train_in_slices
from ga_transform.whole_batch.forward import activations_of
from ga_transform.whole_batch.loss import Gradient, OfKind
from ga_transform.whole_batch.seen import Seen
from ga_transform.windows import Windows

__all__ = ["pull_back"]


def pull_back(
    model: Any, windows: Windows, seen: Seen, gradient: Gradient, x: Any, micro_batch_size: int
) -> None:
    """Bring the gradient of a batch's loss to the weights, and make updates that end with it.

    Args:
        model: The converted model.
        windows: The windows of its optimizers.
        seen: The rows that the loss has seen.
        gradient: Of the loss.
        x: The inputs of the batch.
        micro_batch_size: Rows a slice.
    """
    of_outputs = {kind: each.outputs for kind, each in gradient.by_kind.items()}

    def micro_step(data: Any, slice_: Slice) -> dict[str, Any]:
        x, outputs = data
        share = seen.share(x)
        step = MicroStep(
            model, windows, (x,), is_usual=False, differentiates_loss=True, slice_=slice_
        )
        with step:
            with tf.GradientTape(persistent=len(outputs) > 1) as tape:
                y_pred = tf.nest.flatten(widened_outputs(model(x, training=True)))
                parts = {}
                for kind, each in gradient.by_kind.items():
                    part = _part(model, y_pred, each._replace(outputs=outputs[kind]), share)
                    parts[kind] = step.part_of_batch(part, kind, gradient.weight, share)
            step.minimize(parts, tape)
        return {}

    train_in_slices(model, windows, (x, of_outputs), micro_batch_size, micro_step)


def _part(model: Any, y_pred: list[Any], gradient: OfKind, share: tf.Tensor) -> tf.Tensor:
    """A number of a slice whose gradient is the slice's part of that of the batch's loss.

    It is the product of what the loss was a function of and its gradient with respect to that.
    """
    pairs = [*zip(y_pred, gradient.outputs)]
    pairs += zip(activations_of(model, share), gradient.activations)
    # What the loss makes of weights directly is shared out among the slices.
    for variable, direct in zip(model.trainable_variables, gradient.variables):
        if isinstance(direct, tf.IndexedSlices):  # and so are they to the optimizer
            rows = tf.gather(variable, direct.indices)
            pairs.append((rows, direct.values * tf.cast(share, direct.values.dtype)))
        elif direct is not None:
            pairs.append((variable, direct * tf.cast(share, direct.dtype)))
    parts = [_product(of, each) for of, each in pairs if each is not None]
    return total_of(parts) if parts else tf.zeros([])


def _product(values: tf.Tensor, gradient: tf.Tensor) -> tf.Tensor:
    """The sum of products. Shape: scalar, real."""
    if gradient.dtype.is_complex:
        return tf.reduce_sum(tf.math.real(tf.math.conj(gradient) * values))
    return tf.reduce_sum(gradient * tf.cast(values, gradient.dtype))
