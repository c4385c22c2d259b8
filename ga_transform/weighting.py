"""What a micro-batch weighs: the number by which its mean loss was divided.

Of micro-batches with means m_i over c_i elements, the mean over all elements is
``sum(c_i * m_i) / sum(c_i)``; the same holds of their gradients. Sums over elements are just
added up. The c_i are those of the compiled loss (`loss_terms.py`); where a model's loss is its
own they are the rows, or what a function of the user's says.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from ga_transform import _keras
from ga_transform.errors import wrong_value
from ga_transform.loss_terms import MEAN, SUM, LossTerm, disagreeing
from ga_transform.rows import count_rows, known_lengths
from ga_transform.windows import Windows

__all__ = ["Weighting"]


class Weighting:
    """Weighs one micro-batch.

    Args:
        model: The converted model.
        windows: Its windows, which know what the user has asked for.
        data: A batch, as Keras gives it to `train_step`.
        terms: The terms of the compiled loss; they come in while the micro-step is traced.
        keeps_kinds_apart: Whether sums and means are differentiated one by one.
    """

    def __init__(
        self,
        model: Any,
        windows: Windows,
        data: Any,
        terms: list[LossTerm],
        *,
        keeps_kinds_apart: bool,
    ) -> None:
        self._model = model
        self._windows = windows
        self._data = data
        self._terms = terms
        self._spent = 0
        self._keeps_kinds_apart = keeps_kinds_apart

    def terms(self) -> list[LossTerm]:
        """The terms of the loss that is differentiated here.

        Of several losses in a step it is the latest; those of another branch of the graph
        cannot be reckoned with.
        """
        latest = self._within_reach(self._terms[self._spent :])
        return latest or self._within_reach(self._terms)

    @staticmethod
    def _within_reach(terms: list[LossTerm]) -> list[LossTerm]:
        return [term for term in terms if _keras.is_within_reach(term.value)]

    def spend_terms(self) -> None:
        """What comes after this is another loss."""
        self._spent = len(self._terms)

    def kind(self, optimizer: Any) -> str:
        """Whether an optimizer's gradients are those of a sum or of a mean."""
        if self._windows.accumulate.weighting == "sum":
            return SUM
        terms = self.terms()
        if _keras.has_own_gradients(optimizer):
            # One that is given the loss of each row takes the mean of what it makes of them.
            terms = [term for term in terms if term.value.shape.rank == 0]
        return SUM if {term.kind for term in terms} == {SUM} else MEAN

    def weight(self, kind: str) -> tf.Tensor:
        """The count that a loss of a kind divided by. Shape: scalar, float64."""
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
        if weighting in ("equal", "sum"):
            return tf.ones([], tf.float64)
        terms = self.terms()
        self._warn_where_inexact(terms)
        if kind == MEAN:
            for term in [term for term in terms if term.kind == MEAN] or terms:
                if term.divided_by is not None:
                    return term.divided_by
            # Of one row, every loss is one number.
            if terms and self._windows.accumulate.steps != 1 and 1 not in known_lengths(self._data):
                self._windows.warn_once(
                    "reduced",
                    f"{self._model.name}: its loss comes to the compiled one as one number, which "
                    "is read as a mean over rows. If it is a mean over something else (tokens), "
                    "say what it divides by: Accumulate(weighting=...).",
                )
        return self._rows(kind)

    def _rows(self, kind: str) -> tf.Tensor:
        # A mean over rows is one over those of the targets, where there are any.
        has_targets = isinstance(self._data, tuple) and len(self._data) in (2, 3)
        targets = self._data[1] if has_targets else None
        rows = count_rows((targets, self._data))
        matters = kind == MEAN and self._windows.accumulate.steps != 1
        if rows is None:
            if matters:
                self._warn_of_rows(
                    "no tensor whose rows could be counted, so each micro-batch counts as one"
                )
            return tf.ones([], tf.float64)
        lengths = known_lengths(self._data)
        if matters and len(lengths) > 1:
            self._warn_of_rows(
                f"tensors with first dimensions of {' and '.join(map(str, lengths))}; its rows are "
                "taken to be those of the targets, or else of the first tensor"
            )
        return rows

    def _warn_of_rows(self, what: str) -> None:
        self._windows.warn_once(
            "rows",
            f"{self._model.name}: the batch has {what}. Say what a micro-batch weighs: "
            "Accumulate(weighting=...).",
        )

    def _warn_where_inexact(self, terms: list[LossTerm]) -> None:
        """Say, once, where one number cannot weigh a micro-batch."""
        if self._windows.accumulate.steps == 1:
            return
        activations = bool(_keras.activation_losses(self._model))
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
