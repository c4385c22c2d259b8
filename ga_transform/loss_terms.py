"""The terms of the compiled loss: what each was, and by what number its mean was divided.

tf_keras takes the mean of a loss over its elements, or over the valid ones where there is a
mask, and never over the sum of sample weights. That number is counted where the loss is
reduced: here.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Optional

import tensorflow as tf
from tf_keras.losses import Reduction

from ga_transform import _keras
from ga_transform.replicas import count_replicas
from ga_transform.rows import count_rows

__all__ = [
    "MEAN",
    "SUM",
    "LossCall",
    "LossTerm",
    "disagreeing",
    "is_by_rows",
    "record_losses",
    "stop_recording",
    "total_of",
    "widened_outputs",
]

#: A mean over elements: micro-batches are weighted by their counts, and divided by their sum.
MEAN = "mean"
#: A sum over elements: micro-batches are added up, and nothing is divided.
SUM = "sum"

_ROWS = "rows"

_threads = threading.local()


class LossTerm(NamedTuple):
    """One output's part of the compiled loss."""

    output: str
    kind: str
    #: Shape: scalar (or as the loss, where nothing reduces it).
    value: tf.Tensor
    #: What the total loss multiplies it by.
    loss_weight: Any
    #: The elements, or valid elements, that its mean divided by; None where the loss came as
    #: one number, and of nothing that has rows. Shape: scalar, float64.
    divided_by: Optional[tf.Tensor]
    #: What the count is proportional to: equal extents have counts of a constant ratio.
    extent: Hashable
    #: Of tf_keras, for the logs; None where there is one output only.
    metric: Any
    #: Of how many elements the value is the mean, where nothing reduces the loss.
    elements: Optional[tf.Tensor] = None

    @property
    def weighted(self) -> tf.Tensor:
        """The term as it stands in the total loss."""
        return self.value if self.loss_weight is None else self.value * self.loss_weight


class LossCall(NamedTuple):
    """One call of the compiled loss, of which its metrics have not been told."""

    container: Any
    terms: list[LossTerm]
    #: Regularisers and `add_loss`. Shape: scalar.
    regularization: Optional[tf.Tensor]
    #: Of the targets. Shape: scalar, float64.
    rows: Optional[tf.Tensor]

    @property
    def metrics(self) -> list[Any]:
        """The metrics that are to be told."""
        of_terms = [term.metric for term in self.terms if term.metric is not None]
        return [self.container._total_loss_mean, *of_terms]

    @property
    def is_by_rows(self) -> bool:
        """Whether metrics that are told of parts of a batch have heard of all of it."""
        numbers = all(is_by_rows(term) and term.value.shape.rank == 0 for term in self.terms)
        return self.rows is not None and numbers

    def tell_metrics(self, *, is_of_all: bool = False) -> None:
        """Update the metrics of the loss as tf_keras does: a batch weighs its rows.

        Args:
            is_of_all: Whether each replica has the loss of the rows of all, and no part of it.
        """
        weight = self.rows
        # One part a replica, which metrics take the mean of.
        parts_of_sums = 1 if is_of_all else count_replicas()
        terms = [
            term._replace(value=term.value * parts_of_sums) if _is_reduced_sum(term) else term
            for term in self.terms
        ]
        for term in terms:
            weight = self.rows
            if term.elements is not None and weight is not None:
                weight *= term.elements
            if term.metric is not None:
                term.metric.update_state(term.value, sample_weight=weight)
        parts = [term.weighted for term in terms]
        parts += [] if self.regularization is None else [self.regularization]
        if parts:
            self.container._total_loss_mean.update_state(total_of(parts), sample_weight=weight)


def _is_reduced_sum(term: LossTerm) -> bool:
    return term.kind == SUM and term.elements is None


@contextmanager
def record_losses(
    container: Any,
    note: Callable[[LossTerm], None],
    withhold: Optional[Callable[[LossCall], None]] = None,
    *,
    widens: bool = False,
) -> Iterator[None]:
    """Hear of the terms of every call of a compiled loss, which itself runs as ever.

    Args:
        container: `model.compiled_loss`; None has no terms.
        note: Is called with each term.
        withhold: Is called with each call, and sees to it that the loss's metrics are told.
        widens: Whether outputs in 16 bits are given to it in float32.
    """
    if type(container) is _keras.LossesContainer:
        container.__class__ = _RecordedLosses
    recorded = isinstance(container, _RecordedLosses)
    if not recorded:
        yield
        return
    earlier = _listener_of(container)
    # Of the thread, because replicas have one each, and are traced by turns.
    vars(_threads)[str(id(container))] = note, withhold, widens
    try:
        yield
    finally:
        vars(_threads)[str(id(container))] = earlier
        if earlier is None:
            del vars(_threads)[str(id(container))]


def _listener_of(container: Any) -> Any:
    """Who listens to a compiled loss in this thread, and how; or None."""
    return vars(_threads).get(str(id(container)))


def stop_recording(container: Any) -> None:
    """Make a compiled loss what it was before it was first recorded."""
    if isinstance(container, _RecordedLosses):
        container.__class__ = _keras.LossesContainer


class _RecordedLosses(_keras.LossesContainer):  # type: ignore[misc]
    """A compiled loss that tells its terms to whoever listens."""

    _losses: Any
    _per_output_metrics: Any
    _total_loss_mean: Any

    def __call__(
        self,
        y_true: Any,
        y_pred: Any,
        sample_weight: Any = None,
        regularization_losses: Any = None,
    ) -> Any:
        listener = _listener_of(self)
        if listener is None:
            return super().__call__(y_true, y_pred, sample_weight, regularization_losses)
        tell, withhold, widens = listener
        if widens:
            y_pred = widened_outputs(y_pred)
        if not self._built:
            self.build(y_pred)
        terms = list[LossTerm]()  # AutoGraph refuses annotations of what a function changes

        def note(term: LossTerm) -> None:
            terms.append(term)
            tell(term)

        losses, metrics, mean = self._losses, self._per_output_metrics, self._total_loss_mean
        self._losses = [
            None if loss is None else _RecordedLoss(loss, name, weight, metric, note)
            for loss, name, weight, metric in zip(
                losses, self._output_names, self._loss_weights, metrics
            )
        ]
        if withhold is not None:
            self._per_output_metrics, self._total_loss_mean = [None] * len(metrics), _Deaf()
        try:
            loss = super().__call__(y_true, y_pred, sample_weight, regularization_losses)
        finally:
            self._losses, self._per_output_metrics, self._total_loss_mean = losses, metrics, mean
        if withhold is not None:
            regularization = total_of(regularization_losses) if regularization_losses else None
            rows = count_rows(y_true) if terms else None
            withhold(LossCall(self, terms, regularization, rows))
        return loss


class _Deaf:
    """Stands in for a metric that is told later."""

    def update_state(self, *args: Any, **kwargs: Any) -> None:
        pass


class _RecordedLoss:
    """A loss that gives the value it always gave, and notes what its mean divided by.

    It takes the loss unreduced and reduces it itself, as tf_keras does. So a micro-batch
    without a single valid element has a loss of zero, where tf_keras has 0 / 0.
    """

    def __init__(
        self,
        loss: Any,
        output: str,
        weight: Any,
        metric: Any,
        note: Callable[[LossTerm], None],
    ) -> None:
        self.reduction = loss.reduction
        self._loss = loss
        self._output = output
        self._weight = weight
        self._metric = metric
        self._note = note

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> tf.Tensor:
        elements, mask = self._unreduced(y_true, y_pred, sample_weight)
        if self.reduction == Reduction.NONE:
            value, kind = elements, SUM
        else:
            value = tf.reduce_sum(elements)
            kind = SUM if self.reduction == Reduction.SUM else MEAN
        count, extent = _count(elements, mask)
        if kind == MEAN:
            value = tf.math.divide_no_nan(value, tf.cast(count, value.dtype))
        if mask is None:
            count, extent = _where_one_number(elements, y_true, count, extent)
        self._note(LossTerm(self._output, kind, value, self._weight, count, extent, self._metric))
        return value

    def _unreduced(
        self, y_true: Any, y_pred: Any, sample_weight: Any
    ) -> tuple[tf.Tensor, tf.Tensor | None]:
        """The weighted, masked elements of the loss, and its mask."""
        unreduced = copy.copy(self._loss)
        unreduced.reduction = Reduction.NONE
        masks = [getattr(y_pred, "_keras_mask", None)]
        call = unreduced.call

        def noted(y_true: Any, y_pred: Any) -> Any:
            losses = call(y_true, y_pred)
            masks.append(getattr(losses, "_keras_mask", None))
            return losses

        unreduced.call = noted
        elements = unreduced(y_true, y_pred, sample_weight=sample_weight)
        present = [mask for mask in masks if mask is not None]
        if not present:
            return elements, None
        return elements, present[0] if len(present) == 1 else present[0] & present[1]


def _count(elements: tf.Tensor, mask: tf.Tensor | None) -> tuple[tf.Tensor, Hashable]:
    if isinstance(elements, tf.RaggedTensor):
        return _float64(tf.size(elements.flat_values)), None
    size = _float64(tf.size(elements))
    if elements.shape.rank is None:
        return size, None
    if mask is not None:
        # A mask of fewer axes than the loss stands for all elements along the missing ones.
        valid = tf.reduce_sum(tf.cast(mask, tf.float64))
        share = tf.math.divide_no_nan(valid, _float64(tf.size(mask)))
        return share * size, id(mask)
    # Eagerly every length is known, and none is fixed.
    fixed = elements.shape.rank == 1 or not (
        tf.executing_eagerly() or None in elements.shape[1:].as_list()
    )
    return size, _ROWS if fixed else None


def _where_one_number(
    elements: tf.Tensor, y_true: Any, count: tf.Tensor, extent: Hashable
) -> tuple[Optional[tf.Tensor], Hashable]:
    """What is counted instead where a loss is one number already: the rows it is the mean of.

    None where it was reduced before it came here, so that the targets are one number too.
    """
    if isinstance(elements, tf.RaggedTensor):
        return count, extent
    rows = count_rows(y_true)
    if elements.shape.rank is None and rows is not None:
        return tf.where(tf.rank(elements) > 0, count, rows), None
    if elements.shape.num_elements() != 1:
        return count, extent
    sizes = [tf.TensorShape(item.shape).num_elements() for item in tf.nest.flatten(y_true)]
    return None if set(sizes) == {1} else rows, _ROWS


def disagreeing(terms: list[LossTerm], has_activation_losses: bool) -> list[str]:
    """The outputs whose counts no one number stands for, with what they are; else nothing."""
    parts = [(f"output {term.output!r}", term.extent) for term in terms if term.kind == MEAN]
    if has_activation_losses:
        parts.append(("add_loss and activity regularisers", _ROWS))
    extents = {extent for _, extent in parts}
    if len(parts) < 2 or (len(extents) == 1 and None not in extents):
        return []
    return list(dict.fromkeys(name for name, _ in parts))


def widened_outputs(y_pred: Any) -> Any:
    """Outputs of a model, those of 16 bits in float32: a loss takes sums and exponents of them."""

    def widened(output: Any) -> Any:
        if not tf.is_tensor(output) or output.dtype not in (tf.float16, tf.bfloat16):
            return output
        wide = tf.cast(output, tf.float32)
        mask = getattr(output, "_keras_mask", None)
        if mask is not None:
            wide._keras_mask = mask
        return wide

    return tf.nest.map_structure(widened, y_pred)


def total_of(losses: list[tf.Tensor]) -> tf.Tensor:
    """The sum of losses of any dtypes, in the widest."""
    widest = max((loss.dtype for loss in losses), key=lambda dtype: dtype.size)
    return tf.add_n([tf.cast(loss, widest) for loss in losses])


def is_by_rows(term: LossTerm) -> bool:
    """Whether a term is a mean whose count goes with the rows."""
    return term.kind == MEAN and term.extent == _ROWS


def _float64(number: tf.Tensor) -> tf.Tensor:
    return tf.cast(number, tf.float64)
