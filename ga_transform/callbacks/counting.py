"""per_update: callbacks that count batches count updates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
        # Hooks that are set on the object (as LambdaCallback does) would hide those of the class.
        own_hooks = {name: vars(callback).pop(name) for name in _HOOKS if name in vars(callback)}
        callback.__class__ = type(own_class.__name__, (_PerUpdate, own_class), {})
        callback._own_hooks = own_hooks
    return callback


_HOOKS = (
    "on_epoch_begin",
    "on_train_batch_begin",
    "on_train_batch_end",
    "on_test_begin",
    "on_epoch_end",
)


class _PerUpdate:
    """Stands in front of a callback's class."""

    model: Any
    _own_hooks: Mapping[str, Callable[..., Any]]
    #: Whether a window has begun, and not ended.
    _in_window = False
    _updates = 0
    #: Those of the latest batch.
    _logs: Any = None

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._updates = 0
        self._own("on_epoch_begin", super())(epoch, logs)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if not self._in_window:
            self._in_window = True
            self._own("on_train_batch_begin", super())(self._updates, logs)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._logs = logs
        if self._in_window and not self._pending():
            self._in_window = False
            self._own("on_train_batch_end", super())(self._updates, logs)
            self._updates += 1

    def on_test_begin(self, logs: Any = None) -> None:
        self.on_train_batch_end(self._updates, self._logs)  # a partial window has been flushed
        self._own("on_test_begin", super())(logs)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.on_train_batch_end(self._updates, self._logs)  # likewise, without validation
        self._own("on_epoch_end", super())(epoch, logs)

    def _own(self, name: str, behind: Any) -> Callable[..., Any]:
        return self._own_hooks.get(name) or getattr(behind, name)

    def _pending(self) -> int:
        windows = getattr(self.model, "_open_windows", None)
        return windows().pending if windows else 0
