"""From what a window holds to one update of an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Optional

import tensorflow as tf

from ga_transform._keras import reference_of
from ga_transform.loss_terms import MEAN
from ga_transform.numerics import Gradient, added, map_values, widened
from ga_transform.replicas import count_replicas, decide, summed
from ga_transform.stages.books import Share

__all__ = ["Update", "make_update"]

#: Applies the gradients of an update; None where a variable has none.
Update = Callable[[list[Optional[Gradient]], list[tf.Variable]], None]


def make_update(
    variables: Sequence[tf.Variable],
    shares: Sequence[Share],
    update: Update,
    otherwise: Optional[Callable[[], None]] = None,
) -> None:
    """Add up what the replicas hold, and make the update, if there is anything to make it of.

    Without rows, or without a valid one, there is not.

    Args:
        variables: What the optimizer was handed, with a gradient or without.
        shares: What a window holds, one share for each kind of loss.
        update: Makes the update.
        otherwise: Is called where there is nothing.
    """
    shares = _of_all_replicas(shares)
    weighs_anything = tf.add_n([share.weight for share in shares]) > 0
    decide(weighs_anything, lambda: _make(variables, shares, update), otherwise)


def _of_all_replicas(shares: Sequence[Share]) -> list[Share]:
    """The sums of all replicas, exchanged together."""
    if count_replicas() == 1:
        return list(shares)
    # Where nothing weighs anything, gradients are whatever was in memory.
    shares = [share.times(tf.cast(share.weight > 0, tf.float64)) for share in shares]
    gradients = [gradient for share in shares for gradient in share.gradients.values()]
    # In a dtype of theirs, so that weights need no exchange of their own.
    dtype = gradients[0].dtype if gradients else tf.float64
    weights = [tf.cast(share.weight, dtype) for share in shares]
    totals = iter(summed([*weights, *gradients]))
    weights = [tf.cast(next(totals), tf.float64) for _ in shares]
    return [
        share._replace(gradients={each: next(totals) for each in share.gradients}, weight=weight)
        for share, weight in zip(shares, weights)
    ]


def _make(variables: Sequence[tf.Variable], shares: Sequence[Share], update: Update) -> None:
    """Divide what is to be divided, add up the kinds, and make the update."""
    gradients: dict[Any, Gradient] = {}
    for share in shares:
        divide = _division(share)
        for reference, gradient in share.gradients.items():
            gradient = divide(gradient)
            if reference in gradients:
                gradient = added(gradients[reference], gradient, reference.deref())
            gradients[reference] = gradient
    handed = {reference_of(variable): variable for variable in variables}
    for reference in gradients:
        handed.setdefault(reference, reference.deref())
    update([gradients.get(reference) for reference in handed], list(handed.values()))


def _division(share: Share) -> Callable[[Gradient], Gradient]:
    """What makes means of a share's sums."""
    if share.kind != MEAN:
        return lambda gradient: gradient
    # Where only another kind weighs anything, the sums of this one are zeros.
    weight = tf.where(share.weight > 0, share.weight, tf.ones_like(share.weight))
    divisors = dict[tf.DType, tf.Tensor]()  # AutoGraph refuses an annotation here

    def divide(gradient: Gradient) -> Gradient:
        gradient = widened(gradient)
        if gradient.dtype not in divisors:
            divisors[gradient.dtype] = tf.cast(weight, gradient.dtype)
        return map_values(lambda values: values / divisors[values.dtype], gradient)

    return divide
