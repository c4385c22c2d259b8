"""Accumulation as a good engineer writes it for one model: what the library is held against.

Each function takes the place of the training function that `fit` calls, so that callbacks,
metrics and iterators cost it what they cost all others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

__all__ = ["pass_forward", "train_on_micro_batches", "train_on_slices"]


def train_on_micro_batches(model: Any, accum_steps: int) -> Callable[[Any], Any]:
    """A training function that takes a window of micro-batches from the iterator."""
    window = _Window(model, accum_steps)

    @tf.function
    def train(iterator: Any) -> Any:
        for _ in tf.range(accum_steps):
            x, y = next(iterator)
            window.add(x, y)
        return window.update()

    return train


def train_on_slices(model: Any, slices: int) -> Callable[[Any], Any]:
    """A training function that takes one batch from the iterator, and cuts it."""
    window = _Window(model, slices)

    @tf.function
    def train(iterator: Any) -> Any:
        # Cut by a new first axis: the shapes of slices are known when the loop is traced.
        x, y = (tf.reshape(each, [slices, -1, *each.shape[1:]]) for each in next(iterator))
        for place in tf.range(slices):
            window.add(x[place], y[place])
        return window.update()

    return train


def pass_forward(model: Any, slices: int) -> Callable[[Any], Any]:
    """A function that takes one batch, cuts it, and passes slices through the model: no more."""

    @tf.function
    def pass_(iterator: Any) -> Any:
        x, _ = next(iterator)
        x = tf.reshape(x, [slices, -1, *x.shape[1:]])
        total = tf.zeros([])
        for place in tf.range(slices):
            total += tf.reduce_sum(model(x[place], training=True))
        return {"sum": total}

    return pass_


class _Window:
    """Sums of gradients, a dense one for each weight, and the update from their mean."""

    def __init__(self, model: Any, micro_batches: int) -> None:
        self._model = model
        self._micro_batches = micro_batches
        self._sums = [
            tf.Variable(tf.zeros_like(weight), trainable=False)
            for weight in model.trainable_variables
        ]

    def add(self, x: tf.Tensor, y: tf.Tensor) -> None:
        """Add a micro-batch's gradients, and have the metrics see it."""
        model = self._model
        with tf.GradientTape() as tape:
            y_pred = model(x, training=True)
            loss = model.compiled_loss(y, y_pred, regularization_losses=model.losses)
        gradients = tape.gradient(loss, model.trainable_variables)
        for total, gradient in zip(self._sums, gradients):
            if isinstance(gradient, tf.IndexedSlices):
                total.scatter_add(gradient)
            else:
                total.assign_add(gradient)
        model.compiled_metrics.update_state(y, y_pred)

    def update(self) -> dict[str, tf.Tensor]:
        """Apply the mean, begin anew, and return what `fit` shows."""
        model = self._model
        means = [total / self._micro_batches for total in self._sums]
        model.optimizer.apply_gradients(zip(means, model.trainable_variables))
        for total in self._sums:
            total.assign(tf.zeros_like(total))
        return {metric.name: metric.result() for metric in model.metrics}
