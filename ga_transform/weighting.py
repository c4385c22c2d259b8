"""What a micro-batch weighs: the number by which its mean loss was divided.

Of micro-batches with means m_i over c_i elements, the mean over all elements is
``sum(c_i * m_i) / sum(c_i)``; the same holds of their gradients. Sums over elements are just
added up. The c_i are those of the compiled loss (`loss_terms.py`); where a model's loss is its
own they are the rows, or what a function of the user's says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

import tensorflow as tf

from ga_transform import _graphs, _keras
from ga_transform.errors import wrong_value
from ga_transform.loss_terms import MEAN, SUM, LossTerm, disagreeing, is_by_rows, total_of
from ga_transform.rows import count_rows, known_lengths
from ga_transform.windows import Windows

__all__ = ["Weighting"]


class Weighting:
    """Weighs one micro-batch.

    Args:
        model: The converted model.
        windows: Its windows, which know what the user has asked for.
        data: A batch, as Keras gives it to `train_step`.
        keeps_kinds_apart: Whether sums and means are differentiated one by one.
        is_own_step: Whether the step is the model's own, and may call functions of TensorFlow.
        share: Of its batch's rows, those of the micro-batch, where it is a slice.
    """

    def __init__(
        self,
        model: Any,
        windows: Windows,
        data: Any,
        *,
        keeps_kinds_apart: bool,
        is_own_step: bool,
        share: Optional[tf.Tensor] = None,
    ) -> None:
        self._model = model
        self._windows = windows
        self._data = data
        self._share = tf.ones([], tf.float64) if share is None else share
        self._graph = _graphs.current_graph()
        self._terms: list[LossTerm] = []
        self._spent = 0
        self._has_loss_weight = False
        self._has_rows = True
        self._keeps_kinds_apart = keeps_kinds_apart
        self._weighting = windows.accumulate.weighting
        self._matters = windows.chain.gathers
        self._is_own_step = is_own_step and self._matters
        self._batch_weight = self._weigh_batch() if self._is_own_step else None
        if self._is_own_step:
            windows.batch_weight.assign(self._batch_weight)

    # ---- what the loss was -----------------------------------------------------------------

    def note(self, term: LossTerm) -> None:
        """Take in a term of the compiled loss."""
        self._terms.append(term)
        is_counted = term.kind == MEAN and term.divided_by is not None
        if self._is_own_step and is_counted and not self._is_nested():
            self._windows.loss_weight.assign(term.divided_by)
            self._has_loss_weight = True

    def terms(self) -> list[LossTerm]:
        """The terms of the loss that is differentiated here.

        Of several losses in a step it is the latest; those of another branch of the graph, or
        of outside the function that is traced, cannot be reckoned with.
        """
        latest = self._within_reach(self._terms[self._spent :])
        return latest or self._within_reach(self._terms)

    def losses_by_kind(self, is_first: Optional[Callable[[], tf.Tensor]]) -> dict[str, tf.Tensor]:
        """The loss of the terms as a sum and a mean, with all that is added to it.

        A mean over the window is divided by what is known at its end only, a sum never: the
        gradient of both together could not be put right afterwards.

        Args:
            is_first: Whether the window holds nothing, where that can be known.
        """
        share = _keras.shared_by_replicas
        terms = self.terms()
        sums = [term.weighted for term in terms if term.kind == SUM]
        means = [share(term.weighted) for term in terms if term.kind == MEAN]
        means += [share(loss) for loss in _keras.activation_losses(self._model)]
        of_weights = [share(loss) for loss in _keras.weight_losses(self._model)]
        if of_weights and not means and is_first is not None:
            # Once a window, and beside a sum nothing divides it: the first brings it along.
            first = is_first()
            sums += [tf.where(first, loss, tf.zeros_like(loss)) for loss in of_weights]
            of_weights = []
        means += of_weights
        # A target may be absent.
        by_kind = {SUM: total_of([tf.reduce_sum(loss) for loss in sums])} if sums else {}
        if means:
            by_kind[MEAN] = total_of(means)
        return by_kind

    def spend_terms(self) -> None:
        """What comes after this is another loss."""
        self._spent = len(self._terms)

    def kind(self, optimizer: Any) -> str:
        """Whether an optimizer's gradients are those of a sum or of a mean."""
        if self._weighting == "sum":
            return SUM
        if self._is_own_step and callable(self._weighting):
            return MEAN  # it says what the mean divided by
        terms = self.terms() or self._terms
        if _keras.has_own_gradients(optimizer):
            # One that is given the loss of each row takes the mean of what it makes of them.
            terms = [term for term in terms if term.value.shape.rank == 0]
        return SUM if {term.kind for term in terms} == {SUM} else MEAN

    def _within_reach(self, terms: list[LossTerm]) -> list[LossTerm]:
        graphs = _graphs.graphs_within(self._graph)
        functions = [graph for graph in graphs if _graphs.is_function(graph)]
        outermost = graphs.index(functions[0]) + 1 if functions else len(graphs)
        reach = [*graphs[:outermost], *([] if functions else [self._graph])]
        return [
            term
            for term in terms
            # What has no graph has a value, which a function would keep for good.
            if (not functions and not hasattr(term.value, "graph"))
            or any(getattr(term.value, "graph", None) is graph for graph in reach)
        ]

    def _is_nested(self) -> bool:
        """Whether a function is traced that the step calls."""
        return any(map(_graphs.is_function, _graphs.graphs_within(self._graph)))

    # ---- what it weighs --------------------------------------------------------------------

    def weight(self, kind: str) -> tf.Tensor:
        """The count that a loss of a kind divided by. Shape: scalar, float64."""
        if self._weighting in ("equal", "sum") or callable(self._weighting):
            if self._weighting == "sum":
                self._warn_of_regularisers()
            return self._of_batch()
        terms = self.terms()
        self._warn_where_inexact(terms)
        if kind == MEAN:
            for term in [term for term in terms if term.kind == MEAN] or terms:
                if term.divided_by is not None:
                    return term.divided_by
            if not terms and self._has_loss_weight and self._is_nested():
                return self._windows.loss_weight.read_value()
            # Of one row, every loss is one number.
            if terms and self._matters and 1 not in known_lengths(self._data):
                self._windows.warn_once(
                    "reduced",
                    f"{self._model.name}: its loss comes to the compiled one as one number, which "
                    "is read as a mean over rows. If it is a mean over something else (tokens), "
                    "say what it divides by: Accumulate(weighting=...).",
                )
        weight = self._of_batch()
        if kind == MEAN and self._matters:
            self._warn_of_unknown_rows()
        return weight

    def _of_batch(self) -> tf.Tensor:
        if self._is_own_step and self._is_nested():
            return self._windows.batch_weight.read_value()
        return self._weigh_batch() if self._batch_weight is None else self._batch_weight

    def _weigh_batch(self) -> tf.Tensor:
        """What the batch weighs, whatever its loss was. Shape: scalar, float64."""
        if callable(self._weighting):
            weight = tf.cast(self._weighting(self._data), tf.float64)
            if weight.shape.rank != 0:
                raise wrong_value(
                    "What Accumulate.weighting returns",
                    "a scalar >= 0",
                    f"a tensor of shape {weight.shape}",
                    "Return the count that the batch's mean loss divides by.",
                )
            return weight
        if self._weighting == "sum":
            return tf.ones([], tf.float64)
        if self._weighting == "equal":
            return self._share  # batches are alike
        # A mean over rows is one over those of the targets, where there are any.
        has_targets = isinstance(self._data, tuple) and len(self._data) in (2, 3)
        rows = count_rows((self._data[1] if has_targets else None, self._data))
        self._has_rows = rows is not None
        return tf.ones([], tf.float64) if rows is None else rows

    # ---- what cannot be exact --------------------------------------------------------------

    def _warn_of_unknown_rows(self) -> None:
        if not self._has_rows:
            self._warn_of_rows(
                "no tensor whose rows could be counted, so each micro-batch counts as one"
            )
        lengths = known_lengths(self._data)
        if len(lengths) > 1:
            self._warn_of_rows(
                f"tensors with first dimensions of {' and '.join(map(str, lengths))}; its rows are "
                "taken to be those of the targets, or else of the first tensor"
            )

    def _warn_of_regularisers(self) -> None:
        if self._matters and _keras.weight_losses(self._model):
            self._windows.warn_once(
                "kinds",
                f"{self._model.name}: regularisers beside a sum of the model's own count once a "
                "micro-batch, not once an update.",
            )

    def _warn_of_rows(self, what: str) -> None:
        self._windows.warn_once(
            "rows",
            f"{self._model.name}: the batch has {what}. Say what a micro-batch weighs: "
            "Accumulate(weighting=...).",
        )

    def _warn_where_inexact(self, terms: list[LossTerm]) -> None:
        """Say, once, where one number cannot weigh a micro-batch."""
        if not self._matters:
            return
        activations = bool(_keras.activation_losses(self._model))
        if self._spent == len(self._terms) and not all(map(is_by_rows, terms)):
            self._windows.warn_once(
                "later",
                f"{self._model.name}: gradients are handed over after others of the same step, and "
                "are weighed as the compiled loss before them. Updates are exact if they are "
                "gradients of it, too.",
            )
        outputs = disagreeing(terms, activations)
        if outputs:
            self._windows.warn_once(
                "counts",
                f"{self._model.name}: the means of {' and '.join(outputs)} divide by counts "
                "whose ratio may change from one micro-batch to the next (their masks or "
                "lengths differ), and one number weighs a micro-batch: the count of "
                f"{outputs[0]}. Updates are exact for it, and for the others where the ratio "
                "stays the same.",
            )
        held = [] if terms else _keras.held_sum_losses(self._model)
        if held:
            self._windows.warn_once(
                "held sums",
                f"{self._model.name}: {type(held[0]).__name__} with reduction SUM is used by a loss "
                "of the model's own, which is read as a mean over rows. If that loss is a sum, say "
                "so: Accumulate(weighting='sum').",
            )
        if self._is_own_step and any(term.value.shape.rank != 0 for term in terms):
            self._windows.warn_once(
                "unreduced",
                f"{self._model.name}: the loss of each row goes into a train_step of the model's "
                "own, whose gradients are read as their sum. If it takes their mean, say what that "
                "divides by: Accumulate(weighting=...).",
            )
        sums = [term.output for term in terms if term.kind == SUM]
        if not sums or self._keeps_kinds_apart:
            return
        if len(sums) < len(terms) or activations or _keras.weight_losses(self._model):
            self._windows.warn_once(
                "kinds",
                f"{self._model.name}: the SUM loss of output {sums[0]!r} stands beside means or "
                "regularisers in a train_step or compute_loss of the model's own, where they "
                "cannot be kept apart. Updates are exact where all losses are means.",
            )
