"""Callbacks that count with the updates."""

from __future__ import annotations

from typing import Any, TypeVar

from tf_keras import callbacks as keras_callbacks

from ga_transform.errors import wrong_type

__all__ = ["per_update"]

Callback = TypeVar("Callback")


def per_update(callback: Callback) -> Callback:
    """Have the batch hooks of a callback called once an update, as on the large batch.

    A callback that counts batches for itself (to prune, to anneal a weight of the loss) would
    count micro-batches; so it counts updates. `on_train_batch_begin` comes with the first
    micro-batch of a window, `on_train_batch_end` with its last, or with the flush of a partial
    window; `batch` is the update's number in the epoch. Where `steps_per_execution` puts
    several windows into a call, they count as one, as batches do. A callback that reads
    `model.optimizer.iterations` counts updates without this.

    Args:
        callback: A `tf_keras.callbacks.Callback`. On a plain model it does what it did.

    Returns:
        The callback itself.

    Raises:
        TypeError: It is none.

    Example:
        >>> import numpy as np, tf_keras, ga_transform as ga
        >>> class Anneal(tf_keras.callbacks.Callback):
        ...     steps = 0
        ...     def on_train_batch_end(self, batch, logs=None):
        ...         self.steps += 1
        >>> anneal = ga.per_update(Anneal())
        >>> model = tf_keras.Sequential([tf_keras.Input([2]), tf_keras.layers.Dense(1)])
        >>> model.compile("sgd", "mse")
        >>> model = ga.make_accumulating(model, accum_steps=4)
        >>> x, y = np.ones([12, 2]), np.ones([12, 1])
        >>> _ = model.fit(x, y, batch_size=1, verbose=0, callbacks=[anneal])
        >>> anneal.steps
        3
    """
    if not isinstance(callback, keras_callbacks.Callback):
        raise wrong_type(
            "per_update.callback",
            "a tf_keras.callbacks.Callback",
            callback,
            "Wrap each one, not a list.",
        )
    own_class = type(callback)
    if not issubclass(own_class, _PerUpdate):
        callback.__class__ = type(own_class.__name__, (_PerUpdate, own_class), {})
    return callback


class _PerUpdate:
    """Stands in front of a callback's class."""

    model: Any
    #: Whether a window has begun, and not ended.
    _in_window = False
    _updates = 0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._updates = 0
        super().on_epoch_begin(epoch, logs)  # type: ignore[misc]

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if not self._in_window:
            self._in_window = True
            super().on_train_batch_begin(self._updates, logs)  # type: ignore[misc]

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self._in_window and not self._pending():
            self._in_window = False
            super().on_train_batch_end(self._updates, logs)  # type: ignore[misc]
            self._updates += 1

    def on_test_begin(self, logs: Any = None) -> None:
        self.on_train_batch_end(self._updates)  # a partial window has been flushed
        super().on_test_begin(logs)  # type: ignore[misc]

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.on_train_batch_end(self._updates)  # likewise, where there is no validation
        super().on_epoch_end(epoch, logs)  # type: ignore[misc]

    def _pending(self) -> int:
        windows = getattr(self.model, "_open_windows", None)
        return windows().pending if windows else 0
