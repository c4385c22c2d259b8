"""The mixin: how a batch becomes a micro-step, a place in a window, and an update.

The path of a gradient:

1. `Accumulating.train_step`, here, runs the model's own `train_step` as a `MicroStep`: once, or
   on each slice of the batch (`split.py`).
2. `Accumulating.compute_loss`, here, has the micro-step weigh the loss.
3. The model hands its gradients to its optimizer, which hands them to the micro-step
   (`micro_step.py`), and this to the optimizer's `Window` (`stages/accumulate.py`).
4. The window stores them. With its last batch it makes the update: the sums of all replicas
   (`replicas.py`), the stages (`stages/`), then the optimizer itself (`windows.py`).

With `whole_batch_loss` the loss comes first, of all slices together; the micro-step of each slice
then pulls its part of that gradient back (`whole_batch/`).
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Optional

import tensorflow as tf
from tf_keras import callbacks as keras_callbacks

from ga_transform import _graphs, _keras
from ga_transform.chain import Chain
from ga_transform.diversion import current_step
from ga_transform.loss_terms import widened_outputs
from ga_transform.micro_step import MicroStep
from ga_transform.replicas import all_together, scope_of
from ga_transform.rewrites import apply_rewrites, build_for_plain
from ga_transform.specs import Accumulate, Precision, Split
from ga_transform.split import Slice, train_in_slices
from ga_transform.whole_batch import check_gradients_are_usual, train_on_whole_batch
from ga_transform.windows import Windows

__all__ = ["Accumulating"]


class _Shown:
    """A property that gives way to an attribute which a model of the user's own sets later."""

    def __init__(self, get: Callable[[Any], Any]) -> None:
        self._get = get
        functools.update_wrapper(self, get)  # type: ignore[arg-type]

    def __get__(self, model: Any, owner: Any = None) -> Any:
        return self if model is None else self._get(model)


class Accumulating:
    """Stands in front of a tf_keras model class: its optimizers see windows, not batches."""

    #: Set once, at conversion.
    _accumulating_chain: Chain

    @_Shown
    def transforms(self) -> Chain:
        """What is done to this model, as a printable, comparable chain."""
        return self._accumulating_chain

    # ---- one micro-batch ---------------------------------------------------------------

    def train_step(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own `train_step`, its gradients gathered into windows.

        Args:
            *args, **kwargs: A batch, as Keras gives it; and what the model's own step takes.

        Returns:
            What the model's own `train_step` returns.
        """
        if tf.executing_eagerly():
            self._build_ahead(args)
            self._rewrite()  # layers that were made since
            return self._step(self._open_windows(), args, kwargs)
        # Replicas are traced by turns, and must all see the layers as they were before any step.
        parts, is_built = all_together(self._looked_through)
        with _keras.tracing_once(_keras.optimizers_within(self)):
            logs = self._step(self._open_windows(), args, kwargs)
        all_together(lambda: self._take_into_view(parts, is_built))
        return logs

    def _looked_through(self) -> tuple[int, bool]:
        """How many parts the model has, rewritten as far as it is built; and whether it is."""
        self._rewrite()  # layers that were made since
        return _keras.count_parts(self), self.built  # type: ignore[attr-defined]

    def _take_into_view(self, parts: int, is_built: bool) -> None:
        """Have a step that has made parts be traced again: it must see them from its beginning."""
        is_rewritten = not is_built and self._rewrite()
        self._open_windows().pools.prepare()
        if is_rewritten or _keras.count_parts(self) > parts:
            _graphs.trace_again()

    def _build_ahead(self, args: Any) -> None:
        """Have the layers that a first eager step makes be there before it, to be rewritten."""
        # A rewrite, and what is set back after a pass, must see them.
        needs_layers = self._has_rewrites() or self._accumulating_chain.takes_whole_batches
        is_ready = self.built or not needs_layers  # type: ignore[attr-defined]
        if is_ready or not self._has_usual_step():
            return
        self(_keras.unpack_x_y_sample_weight(args[0])[0])  # type: ignore[operator]
        self._open_windows().pools.prepare()

    def _has_usual_step(self) -> bool:
        """Whether `train_step` is tf_keras's own."""
        return "_own_train_step" not in vars(self) and _keras.is_keras_own(
            self, Accumulating, "train_step"
        )

    def _rewrite(self) -> bool:
        """Rewrite the layers that there are; whether the chain rewrites any."""
        if not self._has_rewrites():  # an eager step looks at no layer for nothing
            return False
        apply_rewrites(self._accumulating_chain, self)
        build_for_plain(self)
        return True

    def _has_rewrites(self) -> bool:
        return any(spec.role == "rewrite" for spec in self._accumulating_chain)

    def _step(self, windows: Windows, args: Any, kwargs: Any) -> Any:
        split = self._accumulating_chain.find(Split)
        if split is None:
            logs = self._micro_step(windows, args, kwargs)
        elif split.whole_batch_loss:
            logs = self._whole_batch_step(windows, split, *args, **kwargs)
        else:
            logs = train_in_slices(
                self,
                windows,
                (args, kwargs),
                split.micro_batch_size,
                lambda data, slice_: self._micro_step(windows, data[0], data[1], slice_),
            )
        windows.end_statistics()
        return logs

    def _micro_step(
        self, windows: Windows, args: Any, kwargs: Any, slice_: Optional[Slice] = None
    ) -> Any:
        own_step: Any = vars(self).get("_own_train_step", super().train_step)  # type: ignore[misc]
        usual_step = self._has_usual_step()
        usual_loss = _keras.is_keras_own(self, Accumulating, "compute_loss")
        given = (*args, *kwargs.values())
        data = given[0] if len(given) == 1 else given
        with MicroStep(
            self,
            windows,
            data,
            is_usual=usual_step and usual_loss,
            differentiates_loss=usual_step,
            slice_=slice_,
        ) as step:
            if step.has_kinds:
                return self._train_step_by_kind(step, data)
            return own_step(*args, **kwargs)

    def _whole_batch_step(self, windows: Windows, split: Split, data: Any) -> Any:
        check_gradients_are_usual(self.optimizer)  # type: ignore[attr-defined]
        usual_loss = _keras.is_keras_own(self, Accumulating, "compute_loss")
        return train_on_whole_batch(self, windows, data, split, is_usual_loss=usual_loss)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own loss; while it trains, times the weight of the micro-batch."""
        step = current_step()
        if self._accumulating_chain.find(Precision) is not None:
            args, kwargs = _with_wide_outputs(args, kwargs)
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
        step.minimize(by_kind, tape)
        return self.compute_metrics(x, y, y_pred, sample_weight)  # type: ignore[attr-defined]

    # ---- what is pending ---------------------------------------------------------------

    @_Shown
    def pending_micro_batches(self) -> int:
        """How many micro-batches are accumulated and not yet applied."""
        windows = vars(self).get("_accumulation")  # to look at them opens none
        if not isinstance(windows, Windows) or not windows.belong_to(self):
            return 0
        return windows.pending

    @_Shown
    def skipped_windows(self) -> int:
        """How many updates were not made, because their gradients were not finite.

        With several optimizers, of all of them. Compiling again starts at 0.
        """
        return self._skipped(0)

    @_Shown
    def skipped_micro_batches(self) -> int:
        """How many micro-batches were left out of their windows (`on_nonfinite="micro_batch"`).

        Of several workers, each knows its own.
        """
        return self._skipped(1)

    def _skipped(self, kind: int) -> int:
        windows = vars(self).get("_accumulation")
        return windows.skipped[kind] if isinstance(windows, Windows) else 0

    def flush(self) -> int:
        """Apply a partial window now, with its own weights.

        Returns:
            How many micro-batches it held; 0 changes nothing.

        Raises:
            RuntimeError: It is called while a `tf.function` is traced; or before any training
                step, on a restored window whose update only a step can show (a moving average
                follows it, or tensors are passed to `apply_gradients`).

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
            reason = (
                "a checkpoint of a model with other weights to train, other steps or another "
                f"compile has brought {self.name!r} {known.pending} pending micro-batches, which "  # type: ignore[attr-defined]
                "are dropped. Call flush() before saving it."
                if known.is_misfit
                else f"compile has discarded {known.pending} pending micro-batches of "
                f"{self.name!r}. Call flush() before compile() to apply them."  # type: ignore[attr-defined]
            )
            warnings.warn(reason, stacklevel=4)
        if known is not None:
            _keras.forget_traces(self)
        with scope_of(self):
            self._accumulation = Windows(self)
        return self._accumulation

    # ---- epochs ------------------------------------------------------------------------

    @functools.wraps(_keras.Model.fit)
    def fit(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102  (it is that of `wraps`)
        # The model's own, with partial windows settled at the end of each epoch.
        own_fit: Any = vars(self).get("_own_fit", super().fit)  # type: ignore[misc]
        accumulate = self._accumulating_chain.find(Accumulate)
        end_of_epoch = _EndOfEpoch(self, "flush" if accumulate is None else accumulate.remainder)
        result = _fit_with(end_of_epoch, own_fit, args, kwargs)
        if not end_of_epoch.was_called:  # by a fit of the model's own
            end_of_epoch.settle()
            self._open_windows().warn_once(
                "fit",
                f"{self.name}: its fit does not call the callbacks that it is given, so that "  # type: ignore[attr-defined]
                "windows run on from epoch to epoch. Pass callbacks on to tf_keras's fit.",
            )
        return result


def _with_wide_outputs(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments of `compute_loss`, with outputs as losses want them."""
    if len(args) > 2:
        args = (*args[:2], widened_outputs(args[2]), *args[3:])
    elif kwargs.get("y_pred") is not None:
        kwargs = {**kwargs, "y_pred": widened_outputs(kwargs["y_pred"])}
    return args, kwargs


def _fit_with(callback: Any, own_fit: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """A model's `fit` with one callback more, before all others."""
    signature = inspect.signature(own_fit)
    if "callbacks" not in signature.parameters:
        kinds = {parameter.kind for parameter in signature.parameters.values()}
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            return own_fit(*args, **kwargs)
        if inspect.Parameter.VAR_POSITIONAL not in kinds:
            given = kwargs.get("callbacks")
            return own_fit(
                *args, **{**kwargs, "callbacks": [callback, *tf.nest.flatten(given or [])]}
            )
        signature = inspect.signature(functools.partial(_keras.Model.fit, None))
    call = signature.bind_partial(*args, **kwargs)
    given = call.arguments.get("callbacks")
    if not isinstance(given, keras_callbacks.CallbackList):
        # First of all, so that every other callback sees the weights of whole epochs.
        call.arguments["callbacks"] = [callback, *tf.nest.flatten(given or [])]
        return own_fit(*call.args, **call.kwargs)
    given.callbacks.insert(0, callback)
    try:
        return own_fit(*args, **kwargs)
    finally:
        given.callbacks.remove(callback)


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

    def __init__(self, accumulating: Accumulating, remainder: str) -> None:
        super().__init__()
        self._accumulating = accumulating
        self._remainder = remainder
        self._is_first_epoch = True
        self.was_called = False

    def settle(self) -> None:
        """Do with a partial window what was asked for."""
        _SETTLING[self._remainder](self._accumulating)

    def on_train_begin(self, logs: Any = None) -> None:
        self.was_called = True
        # An AccumulationLog of a fit that broke off; that of this fit comes later.
        self._accumulating._open_windows().measure(is_on=False)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        # A backup at an epoch's last batch was made before the epoch was settled; training goes
        # on from it with the next epoch.
        if self._is_first_epoch and _keras.epoch_of_backup(self._accumulating) == epoch - 1:
            self.settle()
        self._is_first_epoch = False

    def on_test_begin(self, logs: Any = None) -> None:
        self.settle()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.settle()
        if logs:
            self._accumulating._open_windows().warn_of_silence()
