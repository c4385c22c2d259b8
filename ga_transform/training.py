"""The mixin: how a batch becomes a micro-step, a place in a window, and an update.

The path of a gradient:

1. `Accumulating.train_step`, here, runs the model's own `train_step` as a `MicroStep`.
2. `Accumulating.compute_loss`, here, has the micro-step weigh the loss.
3. The model hands its gradients to its optimizer, which hands them to the micro-step
   (`micro_step.py`), and this to the optimizer's `Window` (`stages/accumulate.py`).
4. The window's last micro-batch makes the update: the stages (`stages/`), then the optimizer
   itself (`windows.py`).
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf
from tf_keras import callbacks as keras_callbacks

from ga_transform import _keras
from ga_transform.chain import Chain
from ga_transform.diversion import current_step
from ga_transform.micro_step import MicroStep
from ga_transform.specs import Accumulate
from ga_transform.windows import Windows

__all__ = ["Accumulating"]


class Accumulating:
    """Stands in front of a tf_keras model class: its optimizers see windows, not batches."""

    #: Set once, at conversion.
    _accumulating_chain: Chain

    @property
    def transforms(self) -> Chain:
        """What is done to this model, as a printable, comparable chain."""
        return self._accumulating_chain

    # ---- one micro-batch ---------------------------------------------------------------

    def train_step(self, data: Any) -> Any:
        """The model's own `train_step`, its gradients gathered into windows.

        Args:
            data: A batch, as Keras gives it.

        Returns:
            What the model's own `train_step` returns.
        """
        own_step = vars(self).get("_own_train_step")
        usual_step = own_step is None and _keras.is_keras_own(self, Accumulating, "train_step")
        usual_loss = _keras.is_keras_own(self, Accumulating, "compute_loss")
        with MicroStep(
            self,
            self._open_windows(),
            data,
            is_usual=usual_step and usual_loss,
            differentiates_loss=usual_step,
        ) as step:
            if step.has_kinds:
                return self._train_step_by_kind(step, data)
            if own_step is not None:
                return own_step(data)
            return super().train_step(data)  # type: ignore[misc]

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own loss; while it trains, times the weight of the micro-batch."""
        step = current_step()
        loss = super().compute_loss(*args, **kwargs)  # type: ignore[misc]
        return loss if step is None or step.model is not self else step.weighed(loss)

    def _train_step_by_kind(self, step: MicroStep, data: Any) -> Any:
        """tf_keras's own `train_step`, with the gradients of sums and of means kept apart."""
        x, y, sample_weight = _keras.unpack_x_y_sample_weight(data)
        with tf.GradientTape(persistent=True) as tape:
            y_pred = self(x, training=True)  # type: ignore[operator]
            loss = self.compute_loss(x, y, y_pred, sample_weight)
            by_kind = step.losses_by_kind()
        self._validate_target_and_loss(y, loss)  # type: ignore[attr-defined]
        with step.together():
            for kind, part in by_kind.items():
                step.kind = kind
                self.optimizer.minimize(part, self.trainable_variables, tape=tape)  # type: ignore[attr-defined]
        return self.compute_metrics(x, y, y_pred, sample_weight)  # type: ignore[attr-defined]

    # ---- what is pending ---------------------------------------------------------------

    @property
    def pending_micro_batches(self) -> int:
        """How many micro-batches are accumulated and not yet applied."""
        return self._open_windows().pending

    def flush(self) -> int:
        """Apply a partial window now, with its own weights.

        Returns:
            How many micro-batches it held; 0 changes nothing.

        Raises:
            RuntimeError: It is called while a `tf.function` is traced, or on a window that a
                checkpoint has restored and no training step has seen.

        Example:
            >>> import numpy as np, tf_keras, ga_transform as ga
            >>> model = tf_keras.Sequential([tf_keras.Input([2]), tf_keras.layers.Dense(1)])
            >>> model.compile("sgd", "mse")
            >>> model = ga.make_accumulating(model, accum_steps=8)
            >>> _ = model.train_on_batch(np.ones([4, 2]), np.ones([4, 1]))
            >>> model.pending_micro_batches
            1
            >>> model.flush()
            1
            >>> model.pending_micro_batches, int(model.optimizer.iterations)
            (0, 1)
        """
        if not tf.executing_eagerly():
            raise RuntimeError(
                "flush must be called outside a tf.function; got a call while one is traced. "
                "Call it between steps."
            )
        windows = self._open_windows()
        pending = windows.pending
        if pending:
            windows.flush()
        return pending

    def discard(self) -> int:
        """Forget a partial window.

        Returns:
            How many micro-batches it held.
        """
        windows = self._open_windows()
        pending = windows.pending
        windows.discard()
        return pending

    def _open_windows(self) -> Windows:
        """The windows of the present `compile`; compiling again starts new ones."""
        windows = vars(self).get("_accumulation")
        # A SavedModel brings back a holder without a class.
        known = windows if isinstance(windows, Windows) else None
        if known is not None and known.belong_to(self):
            return known
        if known is not None and known.pending:
            warnings.warn(
                f"compile has discarded {known.pending} pending micro-batches of {self.name!r}. "  # type: ignore[attr-defined]
                "Call flush() before compile() to apply them.",
                stacklevel=3,
            )
        self._accumulation = Windows(self)
        return self._accumulation

    # ---- epochs ------------------------------------------------------------------------

    @functools.wraps(_keras.Model.fit)
    def fit(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102  (it is that of `wraps`)
        # The model's own, with partial windows settled at the end of each epoch.
        own_fit = super().fit  # type: ignore[misc]
        accumulate = self._accumulating_chain.find(Accumulate)
        settle = _SETTLING["flush" if accumulate is None else accumulate.remainder]
        signature = inspect.signature(own_fit)
        if "callbacks" not in signature.parameters:
            kinds = {parameter.kind for parameter in signature.parameters.values()}
            if inspect.Parameter.VAR_KEYWORD not in kinds:
                result = own_fit(*args, **kwargs)  # takes none, so it is settled once
                settle(self)
                return result
            signature = inspect.signature(functools.partial(_keras.Model.fit, self))
        call = signature.bind_partial(*args, **kwargs)
        end_of_epoch = _EndOfEpoch(self, settle)
        given = call.arguments.get("callbacks")
        if not isinstance(given, keras_callbacks.CallbackList):
            # First of all, so that every other callback sees the weights of whole epochs.
            call.arguments["callbacks"] = [end_of_epoch, *tf.nest.flatten(given or [])]
            return own_fit(*call.args, **call.kwargs)
        given.callbacks.insert(0, end_of_epoch)
        try:
            return own_fit(*args, **kwargs)
        finally:
            given.callbacks.remove(end_of_epoch)


#: By `Accumulate.remainder`, what becomes of a partial window at the end of an epoch.
_SETTLING: Mapping[str, Callable[[Accumulating], Any]] = {
    "flush": Accumulating.flush,
    "drop": Accumulating.discard,
    "carry": lambda _: None,
}


class _EndOfEpoch(keras_callbacks.Callback):  # type: ignore[misc]
    """Settles a partial window when an epoch's batches are done.

    `fit` runs its validation before `on_epoch_end`, and hands it its own callbacks; a user's
    `evaluate` in the middle of an epoch has others, and settles nothing.
    """

    def __init__(self, accumulating: Accumulating, settle: Callable[[Accumulating], Any]) -> None:
        super().__init__()
        self._accumulating = accumulating
        self._settle = settle

    def on_test_begin(self, logs: Any = None) -> None:
        self._settle(self._accumulating)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._settle(self._accumulating)
        windows = self._accumulating._open_windows()
        if logs and not windows.has_stepped:
            windows.warn_once(
                "step",
                f"{self.model.name}: its training function does not call train_step, so that "
                "there is nothing to accumulate. Have make_train_function call self.train_step.",
            )
