"""The micro-step: one forward and backward pass, from the batch to the window.

While it is traced, its thread knows it (`current_step`). Through that the loss is weighed
before it is differentiated, which costs nothing, and the gradients are taken at the moment
the model hands them to its optimizer, whatever the model did to get them.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Optional

import tensorflow as tf

from ga_transform import _keras
from ga_transform.errors import wrong_value
from ga_transform.numerics import Gradient, added, map_values, widened
from ga_transform.stages import apply_stages
from ga_transform.stages.accumulate import Share
from ga_transform.weighting import (
    MEAN,
    SUM,
    LossTerm,
    count_rows,
    disagreeing,
    record_losses,
)
from ga_transform.windows import Windows

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["MicroStep", "current_step", "release_optimizers"]

_running = threading.local()


def current_step() -> Optional[MicroStep]:
    """The micro-step of this thread; each replica of a strategy has a thread of its own."""
    stack = getattr(_running, "stack", None)
    return stack[-1] if stack else None


class MicroStep:
    """What is known of a micro-batch while it is traced.

    Args:
        model: The converted model.
        windows: The windows of its optimizers.
        data: A batch, as Keras gives it to `train_step`.
        is_usual: Whether `train_step` and `compute_loss` are tf_keras's own.
        differentiates_loss: Whether `train_step` is, so that what `compute_loss` returns is
            differentiated as it is, and shown to nobody.
    """

    def __init__(
        self, model: Any, windows: Windows, data: Any, *, is_usual: bool, differentiates_loss: bool
    ) -> None:
        self.model = model
        #: The kind of loss that is differentiated at present, where kinds are kept apart.
        self.kind: Optional[str] = None
        #: Whether the losses are to be differentiated kind by kind.
        self.has_kinds = is_usual and _keras.has_sum_losses(model)
        self._differentiates_loss = differentiates_loss
        self._windows = windows
        self._data = data
        self._recorder = record_losses(model.compiled_loss)
        self._terms: list[LossTerm] = []
        #: The weight by which the loss is multiplied, and that in units of its window's first.
        self._weighed_by: Optional[tuple[tf.Tensor, tf.Tensor]] = None
        self._held: Optional[_Held] = None
        #: How often each optimizer has been handed gradients in this step.
        self._turns: dict[int, int] = {}

    def __enter__(self) -> Self:
        for optimizer in _keras.optimizers_of(self.model):
            _divert(optimizer)
        self._terms = self._recorder.__enter__()
        if not hasattr(_running, "stack"):
            _running.stack = []
        _running.stack.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        _running.stack.pop()
        self._recorder.__exit__(*error)  # type: ignore[arg-type]
        if not self._turns and error[0] is None:
            self._windows.warn_once(
                f"{self.model.name}: train_step has handed no gradients to an optimizer of the "
                "model, so that there is nothing to accumulate. Keep its optimizers as "
                "attributes of the model or of its layers."
            )

    # ---- the loss ------------------------------------------------------------------------

    def weighed(self, loss: Any) -> Any:
        """The loss times the micro-batch's weight, where that may be done before its gradient.

        A clip of micro-batches needs their own gradients, and a `train_step` of the model's
        own may add to the loss or log it: there the gradients are weighed, in `hand_over`.
        """
        if loss is None or not self._differentiates_loss or self.has_kinds:
            return loss
        if loss.shape.rank != 0:  # what is differentiated is the sum of its elements
            self.kind = SUM
        window = self._windows.open(self.model.optimizer)
        if self._kind() == SUM or window.is_single or self._windows.chain.micro_batch_stages:
            return loss
        weight = self._weight()
        # Rounded as the loss is, so that sum and divisor hold the same weights.
        relative = tf.cast(window.relative(weight), loss.dtype)
        self._weighed_by = weight, tf.cast(relative, tf.float64)
        return loss * relative

    def losses_by_kind(self) -> dict[str, tf.Tensor]:
        """The loss as a sum and a mean, each weighed as its kind demands.

        A mean over the window is divided by what is known at its end only, a sum never: the
        gradient of both together could not be put right afterwards.
        """
        share = _keras.shared_by_replicas
        sums = [term.value for term in self._terms if term.kind == SUM]
        means = [share(term.value) for term in self._terms if term.kind == MEAN]
        means += [share(loss) for loss in _keras.activation_losses(self.model)]
        of_weights = [share(loss) for loss in _keras.weight_losses(self.model)]
        window = self._windows.open(self.model.optimizer)
        if of_weights and not means:
            # Once a window, and beside a sum nothing divides it: the first brings it along.
            first = tf.equal(window.micro_batches, 0)
            sums += [tf.where(first, loss, tf.zeros_like(loss)) for loss in of_weights]
        by_kind = {SUM: _total(sums)} if sums else {}  # a target may be absent
        if means:
            if self._windows.chain.micro_batch_stages:
                raise ValueError(
                    "A chain with stages before Accumulate must have losses of one kind; got "
                    "SUM losses beside means (or beside add_loss and activity regularisers). "
                    "Move the stages after Accumulate."
                )
            weight = self._weight()
            relative = window.relative(weight)
            self._weighed_by = weight, relative
            mean = _total(means + of_weights)
            by_kind[MEAN] = mean * tf.cast(relative, mean.dtype)
        return by_kind

    # ---- the gradients -------------------------------------------------------------------

    @contextmanager
    def together(self) -> Iterator[None]:
        """Take what is handed over kind by kind into the window as one micro-batch."""
        self._held = _Held()
        yield
        held, self._held = self._held, None
        held.add(held.shares)

    @tf.autograph.experimental.do_not_convert  # type: ignore[untyped-decorator]
    def hand_over(
        self, optimizer: Any, grads_and_vars: Iterable[Any], args: Any, kwargs: Any
    ) -> tf.Variable:
        """Take the gradients that the model hands to an optimizer into its window."""
        pairs = list(grads_and_vars)
        present = [variable for gradient, variable in pairs if gradient is not None]
        turn = self._turns.setdefault(id(optimizer), 0)
        if self._held is None:
            self._turns[id(optimizer)] += 1
        window = self._windows.open(optimizer, turn)
        if self._weighed_by is None:
            weight = self._weight()
            relative = window.relative(weight)
        else:
            weight, relative = self._weighed_by
        gradients = apply_stages(
            self._windows.chain.micro_batch_stages,
            [gradient for gradient, _ in pairs if gradient is not None],
            present,
            self.model,
        )
        kind = self._kind()
        if kind == MEAN and self._weighed_by is None and not window.is_single:
            gradients = [_times(gradient, relative) for gradient in gradients]
        by_reference: dict[Any, Gradient] = {}
        for gradient, variable in zip(gradients, present):
            earlier = by_reference.get(variable.ref())
            if earlier is not None:
                gradient = added(earlier, gradient, variable)
            by_reference[variable.ref()] = gradient
        update = self._windows.update_of(optimizer, turn, args, kwargs)

        def add(shares: list[Share]) -> None:
            variables = [variable for _, variable in pairs]
            if window.add(variables, shares, weight, optimizer.iterations, update):
                self._windows.trace_again()

        share = Share(kind, by_reference, relative)
        if self._held is None:
            add([share])
        else:
            self._held.shares.append(share)
            self._held.add = add
        return optimizer.iterations

    def _kind(self) -> str:
        """Whether what is handed over are gradients of a sum or of a mean."""
        if self.kind is not None:
            return self.kind
        return SUM if {term.kind for term in self._terms} == {SUM} else MEAN

    def _weight(self) -> tf.Tensor:
        """What the micro-batch weighs: the count its mean divided by. Shape: scalar, float64."""
        weighting = self._windows.accumulate.weighting
        if callable(weighting):
            weight = tf.cast(weighting(self._data), tf.float64)
            if weight.shape.rank != 0:
                raise wrong_value(
                    "What Accumulate.weighting returns",
                    "a scalar >= 0",
                    f"a tensor of shape {weight.shape}",
                    "Return the count that the batch's mean loss divides by.",
                )
            return weight
        if weighting == "equal":
            return tf.ones([], tf.float64)
        self._warn_where_inexact()
        means = [term for term in self._terms if term.kind == MEAN]
        if means:
            return means[0].count
        x, _, _ = _keras.unpack_x_y_sample_weight(self._data)
        return count_rows(x)

    def _warn_where_inexact(self) -> None:
        """Say, once, where one number cannot weigh a micro-batch."""
        if self._windows.accumulate.steps == 1:
            return
        activations = bool(_keras.activation_losses(self.model))
        outputs = disagreeing(self._terms, activations)
        if outputs:
            self._windows.warn_once(
                f"{self.model.name}: the means of {' and '.join(outputs)} divide by counts "
                "whose ratio may change from one micro-batch to the next (their masks or "
                "lengths differ), and one number weighs a micro-batch: the count of "
                f"{outputs[0]}. Updates are exact for it, and for the others where the ratio "
                "stays the same."
            )
        sums = [term.output for term in self._terms if term.kind == SUM]
        if not sums or self.has_kinds:
            return
        if len(sums) < len(self._terms) or activations or _keras.weight_losses(self.model):
            self._windows.warn_once(
                f"{self.model.name}: the SUM loss of output {sums[0]!r} stands beside means or "
                "regularisers in a train_step or compute_loss of the model's own, where they "
                "cannot be kept apart. Updates are exact where all losses are means."
            )


class _Held:
    """Shares that wait for the others of their micro-batch."""

    def __init__(self) -> None:
        self.shares: list[Share] = []
        self.add: Callable[[list[Share]], None]


def _times(gradient: Gradient, weight: tf.Tensor) -> Gradient:
    return map_values(lambda values: values * tf.cast(weight, values.dtype), widened(gradient))


def _total(losses: list[tf.Tensor]) -> tf.Tensor:
    if len(losses) == 1:
        return losses[0]
    widest = max((loss.dtype for loss in losses), key=lambda dtype: dtype.size)
    return tf.add_n([tf.cast(tf.reduce_sum(loss), widest) for loss in losses])


# ---- the optimizer's side ------------------------------------------------------------------


def _divert(optimizer: Any) -> None:
    """Let `apply_gradients` hand over to the micro-step of its thread, where there is one.

    All else is the optimizer's own, and outside a micro-step this is too. Put on once.
    """
    if hasattr(optimizer.apply_gradients, "undiverted"):
        return
    apply_gradients = optimizer.apply_gradients

    @functools.wraps(apply_gradients)
    def diverted(grads_and_vars: Iterable[Any], *args: Any, **kwargs: Any) -> Any:
        step = current_step()
        if step is None:
            return apply_gradients(grads_and_vars, *args, **kwargs)
        return step.hand_over(optimizer, grads_and_vars, args, kwargs)

    diverted.undiverted = apply_gradients  # type: ignore[attr-defined]
    optimizer.apply_gradients = diverted


def release_optimizers(model: Any) -> None:
    """Give a model's optimizers back their own `apply_gradients`."""
    for optimizer in _keras.optimizers_of(model):
        own = getattr(optimizer.apply_gradients, "undiverted", None)
        if own is not None:
            del optimizer.apply_gradients
            if optimizer.apply_gradients != own:  # it was set on the object
                optimizer.apply_gradients = own
