"""The mixin: how a batch becomes a micro-step, a place in a window, and an update.

The path of a gradient, from top to bottom of this file:

1. `Accumulating.train_step` runs the model's own `train_step` as a `_MicroStep`.
2. `compute_loss` multiplies the loss by the micro-batch's weight before it is
   differentiated, which costs nothing.
3. The model hands its gradients to its optimizer, whose `apply_gradients` passes them on to
   the micro-step (`_divert`), which adds them to the optimizer's `Window`.
4. The window's last micro-batch makes the update: stages, then the optimizer itself.
"""

from __future__ import annotations

import functools
import inspect
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Optional

import tensorflow as tf
from tf_keras import callbacks as keras_callbacks

from ga_transform import _keras
from ga_transform.chain import Chain
from ga_transform.errors import InexactWarning
from ga_transform.numerics import Gradient, added, map_values, widened
from ga_transform.specs import Accumulate
from ga_transform.stages import apply_stages
from ga_transform.stages.accumulate import Share, Update, Window
from ga_transform.weighting import (
    MEAN,
    SUM,
    LossTerm,
    count_rows,
    disagreeing,
    record_losses,
)

__all__ = ["Accumulating", "release_optimizers"]


class Accumulating:
    """Stands in front of a tf_keras model class: its optimizers see windows, not batches."""

    #: Set once, at conversion.
    _chain: Chain

    @property
    def transforms(self) -> Chain:
        """What is done to this model, as a printable, comparable chain."""
        return self._chain

    # ---- one micro-batch ---------------------------------------------------------------

    def train_step(self, data: Any) -> Any:
        """The model's own `train_step`, its gradients gathered into windows.

        Args:
            data: A batch, as Keras gives it.

        Returns:
            What the model's own `train_step` returns.
        """
        with _MicroStep(self, data) as step:
            if step.has_sum_losses:
                return self._train_step_by_kind(step, data)
            return super().train_step(data)  # type: ignore[misc]

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own loss; while it trains, times the weight of the micro-batch."""
        step = _current_step()
        loss = super().compute_loss(*args, **kwargs)  # type: ignore[misc]
        return loss if step is None or step.model is not self else step.weighed(loss)

    def _train_step_by_kind(self, step: _MicroStep, data: Any) -> Any:
        """tf_keras's own `train_step`, with the gradients of sums and of means apart.

        A mean over the window is divided by what is known at its end only, a sum never: one
        gradient for both could not be put right afterwards.
        """
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
        return max((int(w.micro_batches.numpy()) for w in self._state.windows), default=0)

    def flush(self) -> int:
        """Apply a partial window now, with its own weights.

        Returns:
            How many micro-batches it held; 0 changes nothing.

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
        pending = self.pending_micro_batches
        if pending:
            self._state.flush()
        return pending

    def discard(self) -> int:
        """Forget a partial window.

        Returns:
            How many micro-batches it held.
        """
        pending = self.pending_micro_batches
        for window in self._state.windows:
            window.discard()
        return pending

    @property
    def _state(self) -> _State:
        """The windows of the present `compile`; compiling again starts new ones."""
        state = vars(self).get("_accumulation")
        if not isinstance(state, _State) or state.compiled_loss is not self.compiled_loss:  # type: ignore[attr-defined]
            state = self._accumulation = _State(self)
        return state

    # ---- epochs ------------------------------------------------------------------------

    @functools.wraps(_keras.Model.fit)
    def fit(self, *args: Any, **kwargs: Any) -> Any:
        own_fit = super().fit  # type: ignore[misc]
        accumulate = self._chain.find(Accumulate)
        if accumulate is None or accumulate.remainder == "carry":
            return own_fit(*args, **kwargs)
        call = inspect.signature(own_fit).bind_partial(*args, **kwargs)
        end_of_epoch = _EndOfEpoch(self.flush if accumulate.remainder == "flush" else self.discard)
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


class _EndOfEpoch(keras_callbacks.Callback):  # type: ignore[misc]
    """Settles a partial window when an epoch's batches are done.

    `fit` runs its validation before `on_epoch_end`, and hands it its own callbacks; a user's
    `evaluate` in the middle of an epoch has others, and settles nothing.
    """

    def __init__(self, settle: Callable[[], int]) -> None:
        super().__init__()
        self._settle = settle

    def on_test_begin(self, logs: Any = None) -> None:
        self._settle()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._settle()


# ---- the micro-step: what is known of a micro-batch while it is traced --------------------

_running = threading.local()


def _current_step() -> Optional[_MicroStep]:
    """The micro-step of this thread; each replica of a strategy has a thread of its own."""
    stack = getattr(_running, "stack", None)
    return stack[-1] if stack else None


class _MicroStep:
    """One forward and backward pass, from the batch to the window.

    Args:
        model: The converted model.
        data: A batch, as Keras gives it to `train_step`.
    """

    def __init__(self, model: Any, data: Any) -> None:
        self.model = model
        #: The kind of loss that is differentiated at present, where kinds are kept apart.
        self.kind: Optional[str] = None
        self._data = data
        self._state: _State = model._state
        self._recorder = record_losses(model.compiled_loss)
        self._terms: list[LossTerm] = []
        self._loss_weight: Optional[tf.Tensor] = None
        self._held: Optional[_Held] = None

    def __enter__(self) -> _MicroStep:
        for optimizer in _keras.optimizers_of(self.model):
            self._state.open_window(optimizer)
            _divert(optimizer)
        self._terms = self._recorder.__enter__()
        if not hasattr(_running, "stack"):
            _running.stack = []
        _running.stack.append(self)
        return self

    def __exit__(self, *error: Any) -> None:
        _running.stack.pop()
        self._recorder.__exit__(*error)

    @property
    def has_sum_losses(self) -> bool:
        """Whether sums, alone or among means, are what tf_keras's own step differentiates."""
        return self._is_usual and _keras.has_sum_losses(self.model)

    @property
    def _is_usual(self) -> bool:
        """Whether `train_step` is tf_keras's own, so that it differentiates our loss as it is."""
        return _keras.has_own_train_step(self.model, Accumulating)

    def weighed(self, loss: tf.Tensor) -> tf.Tensor:
        """The loss times the micro-batch's weight, where it is that loss whose gradient counts.

        A clip of micro-batches needs their own gradients; those are weighed afterwards. So
        are those of a `train_step` of the model's own, which may add to the loss or log it.
        """
        window = self._state.window_of(self.model.optimizer)
        if loss is None or not self._is_usual or self.has_sum_losses:
            return loss
        if loss.shape.rank != 0:  # what tf_keras differentiates is its sum
            self.kind = SUM
            return loss
        if window.is_single or self._state.chain.micro_batch_stages:
            return loss
        # Rounded as the loss is, so that sum and divisor hold the same weights.
        weight = tf.cast(window.relative(self._weight()), loss.dtype)
        self._loss_weight = tf.cast(weight, tf.float64)
        return loss * weight

    def losses_by_kind(self) -> dict[str, tf.Tensor]:
        """The loss in its sums and its means; each is weighed as its kind demands."""
        sums = [term.value for term in self._terms if term.kind == SUM]
        means = [_keras.shared_by_replicas(t.value) for t in self._terms if t.kind == MEAN]
        means += map(_keras.shared_by_replicas, _keras.activation_losses(self.model))
        of_weights = [_keras.shared_by_replicas(loss) for loss in _keras.weight_losses(self.model)]
        window = self._state.window_of(self.model.optimizer)
        if of_weights and not means:
            # Once a window, and beside a sum nothing divides it: the first brings it along.
            first = tf.equal(window.micro_batches, 0)
            sums += [tf.where(first, loss, tf.zeros_like(loss)) for loss in of_weights]
        parts = {SUM: _total(sums)}
        if means:
            if self._state.chain.micro_batch_stages:
                raise ValueError(
                    "A chain with stages before Accumulate must have losses of one kind; got "
                    "SUM losses beside means (or beside add_loss and activity regularisers). "
                    "Move the stages after Accumulate."
                )
            weight = window.relative(self._weight())
            parts[MEAN] = _total(means + of_weights)
            parts[MEAN] *= tf.cast(weight, parts[MEAN].dtype)
            self._loss_weight = weight
        return parts

    @contextmanager
    def together(self) -> Iterator[None]:
        """Hand over several shares of the same micro-batch as one."""
        self._held = _Held()
        yield
        held, self._held = self._held, None
        held.add_to_window()

    @tf.autograph.experimental.do_not_convert
    def hand_over(
        self, optimizer: Any, grads_and_vars: Iterable[Any], args: Any, kwargs: Any
    ) -> tf.Variable:
        """Take the gradients that the model hands to its optimizer into their window."""
        pairs = list(grads_and_vars)
        variables = [variable for _, variable in pairs]
        present = [(g, variable) for g, variable in pairs if g is not None]
        window = self._state.window_of(optimizer)
        kind = self.kind or self._kind_of_terms()
        gradients = apply_stages(
            self._state.chain.micro_batch_stages,
            [gradient for gradient, _ in present],
            [variable for _, variable in present],
            self.model,
        )
        weight = self._weight()
        relative = window.relative(weight) if self._loss_weight is None else self._loss_weight
        if kind == MEAN and self._loss_weight is None and not window.is_single:
            gradients = [_times(gradient, relative) for gradient in gradients]
        by_reference: dict[Any, Gradient] = {}
        for gradient, (_, variable) in zip(gradients, present):
            earlier = by_reference.get(variable.ref())
            by_reference[variable.ref()] = (
                gradient if earlier is None else added(earlier, gradient, variable)
            )
        share = Share(kind, by_reference, relative)
        update = self._state.set_update(optimizer, args, kwargs)

        def add_to_window(shares: list[Share]) -> None:
            window.add(variables, shares, weight, optimizer.iterations, update)

        if self._held is None:
            add_to_window([share])
        else:
            self._held.shares.append(share)
            self._held.add = add_to_window
        return optimizer.iterations

    def _kind_of_terms(self) -> str:
        kinds = {term.kind for term in self._terms}
        return SUM if kinds == {SUM} else MEAN

    def _weight(self) -> tf.Tensor:
        """What the micro-batch weighs: the count its mean divided by. Shape: scalar, float64."""
        weighting = self._state.accumulate.weighting
        if callable(weighting):
            return tf.cast(weighting(self._data), tf.float64)
        if weighting == "equal":
            return tf.ones([], tf.float64)
        means = [term for term in self._terms if term.kind == MEAN]
        has_activation_losses = bool(means) and bool(_keras.activation_losses(self.model))
        outputs = disagreeing(means, has_activation_losses)
        if outputs and not self._state.window_of(self.model.optimizer).is_single:
            self._state.warn_once(
                f"{self.model.name}: the means of {' and '.join(outputs)} divide by counts "
                "whose ratio may change from one micro-batch to the next (their masks or "
                "lengths differ), and one number weighs a micro-batch: the count of "
                f"{outputs[0]}. Updates are exact for it, and for the others where the ratio "
                "stays the same."
            )
        if means:
            return means[0].count
        x, _, _ = _keras.unpack_x_y_sample_weight(self._data)
        return count_rows(x)


class _Held:
    """Shares that wait for the others of their micro-batch."""

    def __init__(self) -> None:
        self.shares: list[Share] = []
        self.add: Callable[[list[Share]], None]

    def add_to_window(self) -> None:
        self.add(self.shares)


def _times(gradient: Gradient, weight: tf.Tensor) -> Gradient:
    return map_values(lambda values: values * tf.cast(weight, values.dtype), widened(gradient))


def _total(losses: list[tf.Tensor]) -> tf.Tensor:
    if len(losses) == 1:
        return losses[0]
    widest = max((loss.dtype for loss in losses), key=lambda dtype: dtype.size)
    return tf.add_n([tf.cast(tf.reduce_sum(loss), widest) for loss in losses])


# ---- the optimizer's side -------------------------------------------------------------------


def _divert(optimizer: Any) -> None:
    """Let `apply_gradients` hand over to the micro-step of its thread, where there is one.

    All else is the optimizer's own, and outside a micro-step this is too. Put on once.
    """
    if hasattr(optimizer.apply_gradients, "undiverted"):
        return
    apply_gradients = optimizer.apply_gradients

    @functools.wraps(apply_gradients)
    def diverted(grads_and_vars: Iterable[Any], *args: Any, **kwargs: Any) -> Any:
        step = _current_step()
        if step is None:
            return apply_gradients(grads_and_vars, *args, **kwargs)
        return step.hand_over(optimizer, grads_and_vars, args, kwargs)

    diverted.undiverted = apply_gradients  # type: ignore[attr-defined]
    optimizer.apply_gradients = diverted


def release_optimizers(model: Any) -> None:
    """Give a model's optimizers back their own `apply_gradients`."""
    for optimizer in _keras.optimizers_of(model):
        vars(optimizer).pop("apply_gradients", None)


class _State(_keras.AutoTrackable):  # type: ignore[misc]
    """What accumulation keeps between calls: checkpointed with the model, none of its weights."""

    def __init__(self, model: Any) -> None:
        self.chain: Chain = model.transforms
        self.accumulate = self.chain.find(Accumulate) or Accumulate(1)
        self.compiled_loss = model.compiled_loss
        self._keep_sparse = not model.jit_compile
        self._windows = self._no_dependency({})
        self._updates = self._no_dependency({})
        self._flushes = self._no_dependency({})
        self._model = self._no_dependency(weakref.ref(model))
        self._warned = False

    @property
    def windows(self) -> list[Window]:
        return list(self._windows.values())

    def open_window(self, optimizer: Any) -> None:
        """See to it that the optimizer has a window."""
        if id(optimizer) not in self._windows:
            window = Window(self.accumulate.steps, self._keep_sparse)
            setattr(self, f"window_{len(self._windows)}", window)  # checkpointed under this name
            self._windows[id(optimizer)] = window

    def window_of(self, optimizer: Any) -> Window:
        return self._windows[id(optimizer)]

    def set_update(self, optimizer: Any, args: Any, kwargs: Any) -> Update:
        """How the optimizer makes an update; the arguments are those it was last called with."""

        def update(
            gradients: Sequence[Optional[Gradient]], variables: Sequence[tf.Variable]
        ) -> None:
            present = [(g, v) for g, v in zip(gradients, variables) if g is not None]
            staged = apply_stages(
                self.chain.update_stages,
                [gradient for gradient, _ in present],
                [variable for _, variable in present],
                self._model(),
            )
            final = {
                variable.ref(): map_values(lambda v, d=variable.dtype: tf.cast(v, d), gradient)
                for gradient, (_, variable) in zip(staged, present)
            }
            # Variables without a gradient go along, and are left out as tf_keras does it.
            handed = [(final.get(variable.ref()), variable) for variable in variables]
            optimizer.apply_gradients.undiverted(handed, *args, **kwargs)

        self._updates[id(optimizer)] = update
        return update

    def flush(self) -> None:
        """Make the updates of partial windows."""
        model = self._model()
        for key, window in self._windows.items():
            if not int(window.micro_batches.numpy()):
                continue
            if key not in self._flushes:
                self._flushes[key] = self._flush_function(window, self._updates[key])
            self._flushes[key]()

    def _flush_function(self, window: Window, update: Update) -> Callable[[], None]:
        def flush() -> None:
            window.flush(update)

        model = self._model()
        if model.run_eagerly:
            return flush
        return tf.function(flush, jit_compile=model.jit_compile, autograph=False)

    def warn_once(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(text, InexactWarning, stacklevel=2)
