"""The law, tried: two copies of a model are trained, and what makes them differ is looked for."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple, Optional

import attrs
import numpy as np
import tensorflow as tf

from ga_transform import _keras
from ga_transform.report.copies import (
    LEFT_OUT,
    can_rest,
    copies_of,
    copy_of,
    gradients_of,
    skipped_by,
    values_of,
)
from ga_transform.report.differences import VariableDifference, differences_of, largest_of
from ga_transform.report.finding import (
    BATCH_NORM,
    NO_UPDATE,
    NOT_FINITE,
    OPTIMIZER,
    RANDOMNESS,
    TRY_IT,
    Finding,
    of_unknown_cause,
)
from ga_transform.report.findings import findings_of

__all__ = ["Outcome", "Trial"]

#: How often a window is tried that float16 skips: its loss scale is halved each time.
_TRIES = 24


class Outcome(NamedTuple):
    """What a trial has shown."""

    differences: tuple[VariableDifference, ...]
    #: By weight, where the copy in micro-batches ends.
    ends: Sequence[Any]
    #: Updates and micro-batches that the copies have skipped.
    skipped: int
    #: Whether any weight has moved on the large batches.
    has_moved: bool
    #: Whether the gradients of windows are those of the large batches; None where nobody asked.
    gradients_agree: Optional[bool] = None


class Trial:
    """Trains copies of a model, and compares them.

    Args:
        model: A converted model.
        windows: By update, the rows of its batches.
        data: x, y and sample_weight.
        tolerance: What a relative difference may be of rounding alone.
    """

    def __init__(
        self, model: Any, windows: Sequence[Sequence[slice]], data: Any, tolerance: float
    ) -> None:
        self.tolerance = tolerance
        self._model = model
        self._windows = windows
        self._data = data
        self._names = [weight.name for weight in _keras.weights_of(model)]
        self._findings = [
            attrs.evolve(each, remedy="") if each.remedy == TRY_IT else each
            for each in findings_of(model)
            if each.verdict != "exact"
        ]
        #: What may make a difference here, and can be left out.
        self._suspects = {each.subject for each in self._findings} & LEFT_OUT

    def run(self, without: Collection[str] = ()) -> Outcome:
        """How far the copies end from each other.

        Args:
            without: What of `LEFT_OUT` is left out of both.
        """
        copies = copies_of(self._model, without)
        start = values_of(copies[0])
        self._train(*copies)
        ends, others = map(values_of, copies)
        outcome = Outcome(
            differences_of(self._names, ends, others, start),
            ends,
            skipped=sum(map(skipped_by, copies)),
            has_moved=not all(map(np.array_equal, start, others)),
        )
        # Of what is known to differ with each micro-batch, gradients do not agree.
        is_in_doubt = not (self._suspects & {RANDOMNESS, BATCH_NORM}) - {*without}
        is_valid = not outcome.skipped and np.isfinite(largest_of(outcome.differences))
        if is_valid and is_in_doubt and self._differs(outcome) and can_rest(self._model):
            return self._without_rounding(outcome, others, start, without)
        return outcome

    def causes(self, outcome: Outcome) -> Iterator[Finding]:
        """Why a trial does not show the law, found by leaving suspects out of both copies."""
        if outcome.skipped or not np.isfinite(largest_of(outcome.differences)):
            yield NOT_FINITE
        elif not outcome.has_moved:
            yield NO_UPDATE
        elif self._differs(outcome):
            suspects = self._suspects
            bare = self.run(suspects) if suspects else outcome
            if self._differs(bare):
                yield from self._of_the_rest(bare)
            elif len(suspects) > 1:  # each is to blame if there is a difference without the others
                suspects = {each for each in suspects if self._differs(self.run(suspects - {each}))}
            yield from (each for each in self._findings if each.subject in suspects)

    def of_16_bits(self, outcome: Outcome) -> float:
        """How far the model's own precision takes weights, at most, from where float32 does."""
        copy = copy_of(self._model, list(self._model._accumulating_chain))
        start = values_of(copy)
        for window in self._windows:
            for _ in range(_TRIES):
                skipped = skipped_by(copy)
                self._train_on(copy, window)
                if skipped_by(copy) == skipped:
                    break
        return largest_of(differences_of(self._names, values_of(copy), outcome.ends, start))

    def _differs(self, outcome: Outcome) -> bool:
        """Whether a difference is more than rounding explains; NaN is."""
        return not largest_of(outcome.differences) <= self.tolerance

    def _of_the_rest(self, bare: Outcome) -> Sequence[Finding]:
        """What may make the difference that stays without suspects."""
        others = [each for each in self._findings if each.subject not in self._suspects]
        if bare.gradients_agree:
            return [each for each in others if each.subject == OPTIMIZER] or [
                Finding(
                    OPTIMIZER,
                    (type(self._model.optimizer).__name__,),
                    "outside",
                    "gradients of windows are those of the large batches; what it makes of them "
                    "is not",
                )
            ]
        return others or [of_unknown_cause(self._suspects)]

    def _train(self, in_micro_batches: Any, on_large_batches: Any) -> None:
        for window in self._windows:
            self._train_on(in_micro_batches, window)
            self._train_on(on_large_batches, [slice(window[0].start, window[-1].stop)])

    def _train_on(self, copy: Any, batches: Sequence[slice]) -> None:
        def cut(rows: slice) -> Any:
            return tf.nest.map_structure(
                lambda part: None if part is None else part[rows], self._data
            )

        for rows in batches:
            copy.train_on_batch(*cut(rows))

    def _without_rounding(
        self,
        outcome: Outcome,
        others: Sequence[Any],
        start: Sequence[Any],
        without: Collection[str],
    ) -> Outcome:
        """An outcome in which elements do not count whose gradient is nothing but rounding.

        A gradient may be zero by symmetry, as that of a bias before a normalisation. What is left
        of it is tiny and of any sign, and Adam makes a step of it that is as long as any other.
        So the gradients themselves are compared, with weights at rest: if they agree, elements in
        which they still differ by more than a share of themselves are such ones.
        """
        copies = copies_of(self._model, without, at_rest=True)
        self._train(*copies)
        own, large = map(gradients_of, copies)
        at_zero = [np.zeros_like(each) for each in large]
        if not largest_of(differences_of(self._names, own, large, at_zero)) <= self.tolerance:
            return outcome._replace(gradients_agree=False)
        counted = [
            np.abs(one - other) <= self.tolerance * np.abs(other) for one, other in zip(own, large)
        ]
        differences = differences_of(self._names, outcome.ends, others, start, counted)
        return outcome._replace(differences=differences, gradients_agree=True)
