"""Pools: the statistics that batch normalisation layers have of a window's micro-batches.

Statistics of parts are put together as Chan, Golub and LeVeque do it (1983): of two parts with
weights in the ratio (1 - r) : r and means that differ by d, the mean moves by r d, and the variance
is (1 - r) v1 + r v2, within the parts, plus r (1 - r) d^2, between them.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from ga_transform._keras import AutoTrackable
from ga_transform.layouts import PoolLayout
from ga_transform.numerics import rarely
from ga_transform.replicas import count_replicas, decide, held_here, local_variable, summed
from ga_transform.rewrites.batch_norm import PooledBatchNorm, Statistics, batch_norms_of

__all__ = ["Pools"]


class Pool(AutoTrackable):  # type: ignore[misc]
    """The statistics of one layer, of those rows of a window that went through it so far.

    Args:
        layer: A layer with moving statistics.
    """

    def __init__(self, layer: Any) -> None:
        self._layer = self._no_dependency(layer)
        self.pools_between: bool = layer.pools_between
        with tf.init_scope():
            nothing = tf.zeros(layer.moving_mean.shape, tf.float64)
            self.elements = local_variable(nothing, of_all="sum")
            self.weight = local_variable(nothing, of_all="sum")
            empty = tf.zeros(layer.moving_mean.shape, layer.moving_mean.dtype)
            self.mean = local_variable(empty, of_all="mean")
            self.variance = local_variable(empty, of_all="mean")

    @property
    def state(self) -> list[tf.Variable]:
        """The variables in one order."""
        return [self.elements, self.weight, self.mean, self.variance]

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing in it, also while a function is traced.

        Here, which is everywhere: in windows that have ended, and where replicas hold even parts.
        """
        with tf.init_scope():
            return not any(each.numpy().any() for each in held_here(self.elements))

    def add(self, statistics: Statistics, share: tf.Tensor) -> None:
        """Take in the statistics of a micro-batch.

        Args:
            statistics: What is not finite, or of no elements, adds nothing.
            share: Of a whole window, what the micro-batch is. Shape: scalar, float64.
        """
        elements, mean, variance = statistics
        counts = elements > 0
        finite = tf.math.is_finite(mean) & tf.math.is_finite(variance)
        counts &= tf.reduce_all(finite | ~counts)  # of no elements, a mean is 0 / 0
        if self.pools_between:
            decay, gain = tf.ones([], tf.float64), elements
        else:  # as if the moving statistics themselves moved with each micro-batch
            decay = (1.0 - self._gain(tf.float64)) ** share
            gain = tf.maximum(1.0 - decay, 1e-12)  # of a momentum of 1, all weigh alike
        weight = decay * self.weight + gain
        dtype = self.mean.dtype
        ratio = tf.cast(gain / weight, dtype)
        difference = mean - self.mean
        between = ratio * (1 - ratio) * tf.square(difference) if self.pools_between else 0.0
        spread = self.variance + ratio * (variance - self.variance) + between
        changes = [
            (self.elements, self.elements + elements),
            (self.weight, weight),
            (self.variance, spread),
            (self.mean, self.mean + ratio * difference),
        ]
        values = [tf.where(counts, value, variable) for variable, value in changes]
        for (variable, _), value in zip(changes, values):
            variable.assign(value)

    def totals(self) -> list[tf.Tensor]:
        """What is added up over replicas first. Shape: each as the mean, float64."""
        mean = tf.cast(self.mean, tf.float64)
        return [self.elements.read_value(), self.weight.read_value(), self.weight * mean]

    def spreads(self, weight: tf.Tensor, weighed_mean: tf.Tensor) -> tf.Tensor:
        """What is added up next: variances, about the mean of all replicas, times weights."""
        variance = tf.cast(self.variance, tf.float64)
        if self.pools_between:
            mean = tf.math.divide_no_nan(weighed_mean, weight)
            variance += tf.square(tf.cast(self.mean, tf.float64) - mean)
        return self.weight * variance

    def take(
        self, elements: tf.Tensor, weight: tf.Tensor, weighed_mean: tf.Tensor, spread: tf.Tensor
    ) -> None:
        """Hold an even part of what all replicas have found."""
        dtype = self.mean.dtype
        self.elements.assign(elements / count_replicas())
        self.weight.assign(weight / count_replicas())
        self.mean.assign(tf.cast(tf.math.divide_no_nan(weighed_mean, weight), dtype))
        self.variance.assign(tf.cast(tf.math.divide_no_nan(spread, weight), dtype))

    def move(self) -> None:
        """Move the layer's statistics towards those of the pool, as of one batch; and empty it.

        Replicas hold even parts.
        """
        layer, dtype = self._layer, self.mean.dtype
        elements = self.elements * count_replicas()
        holds = elements > 0
        of_layer = elements / tf.maximum(elements - layer.degrees_taken, 1.0)
        found = (self.mean, self.variance * tf.cast(of_layer, dtype))
        gain = tf.where(holds, self._gain(dtype), 0)
        for variable, value in zip((layer.moving_mean, layer.moving_variance), found):
            variable.assign_add(gain * (value - variable))
        self.clear()

    def _gain(self, dtype: tf.DType) -> tf.Tensor:
        """How far one batch moves the statistics, rounded as tf_keras does it. Shape: scalar."""
        return tf.cast(1.0 - vars(self._layer)["momentum"], dtype)

    def clear(self) -> None:
        """Hold nothing."""
        for variable in self.state:
            variable.assign(tf.zeros_like(variable))

    def _trackable_children(self, save_type: str = "checkpoint", **kwargs: Any) -> dict[str, Any]:
        children: dict[str, Any] = super()._trackable_children(save_type, **kwargs)
        return {} if self.is_empty else children


class Key(NamedTuple):
    """One pass of a layer in a step: its place among the batch normalisation layers, and which."""

    layer: int
    turn: int


class Pools(AutoTrackable):  # type: ignore[misc]
    """The pools of a model's layers: one for each time that a step passes through one.

    Args:
        model: The converted model.
    """

    def __init__(self, model: Any) -> None:
        self._model = self._no_dependency(weakref.ref(model))
        self._pools: dict[Key, Pool] = self._no_dependency({})
        self._places: dict[int, int] = self._no_dependency({})
        self.prepare()

    @property
    def are_there(self) -> bool:
        """Whether any layer's statistics are pooled."""
        return bool(self._pools)

    def has(self, layer: Any) -> bool:
        """Whether a layer's statistics are pooled here."""
        if id(layer) not in self._places:  # it may have been made, or rewritten, since
            self._places.update((id(each), place) for place, each in enumerate(self._layers()))
        return isinstance(layer, PooledBatchNorm) and id(layer) in self._places

    @property
    def statistics(self) -> list[tf.Variable]:
        """The moving statistics that are moved from here."""
        layers = [layer for layer in self._layers() if layer.built and self.has(layer)]
        return [each for layer in layers for each in (layer.moving_mean, layer.moving_variance)]

    def _layers(self) -> list[Any]:
        return batch_norms_of(self._model())

    def add(self, layer: Any, turn: int, statistics: Statistics, share: tf.Tensor) -> None:
        """Take in what a layer has found in a micro-batch.

        Args:
            layer: One that these pools have.
            turn: How many passes through it were before this in the step.
            statistics: Of the micro-batch.
            share: As in `Pool.add`.
        """
        self._of(Key(self._places[id(layer)], turn)).add(statistics, share)

    def prepare(self) -> None:
        """Make a pool for each layer that is built, while a first trace may make variables."""
        for layer in self._layers():
            if layer.built and self.has(layer):
                self._of(Key(self._places[id(layer)], 0))

    def begin_batch(self, is_begun: tf.Tensor) -> None:
        """Forget what a batch that failed has left, if no window goes on with this one.

        Args:
            is_begun: Whether one does. Shape: scalar, bool.
        """
        if self._pools:
            rarely(~is_begun, self.clear)

    def end_batch(self, is_begun: tf.Tensor) -> None:
        """Move the moving statistics, if no window of any optimizer goes on after this batch.

        Args:
            is_begun: Whether one does. Shape: scalar, bool.
        """
        if self._pools:
            decide(~is_begun, self.move)

    def spread(self) -> None:
        """Have each replica hold an even part of what all have found."""
        pools = list(self._pools.values())
        if count_replicas() == 1 or not pools:
            return
        totals = summed([total for pool in pools for total in pool.totals()])
        elements, weights, means = totals[::3], totals[1::3], totals[2::3]
        spreads = summed([pool.spreads(*each) for pool, *each in zip(pools, weights, means)])
        for pool, *of_all in zip(pools, elements, weights, means, spreads):
            pool.take(*of_all)

    def move(self) -> None:
        """Move the moving statistics towards what is pooled, pass by pass."""
        self.spread()
        for _, pool in sorted(self._pools.items()):
            pool.move()

    def clear(self) -> None:
        """Forget what is pooled."""
        for pool in self._pools.values():
            pool.clear()

    # ---- in files --------------------------------------------------------------------------

    def layout(self) -> list[PoolLayout]:
        """The pools that hold something."""
        return [
            PoolLayout(*key, pool.pools_between)
            for key, pool in sorted(self._pools.items())
            if not pool.is_empty
        ]

    def arrange(self, layouts: Sequence[PoolLayout]) -> None:
        """Make the pools of a layout that there are layers for; all others hold nothing."""
        self.clear()
        for each in self._fitting(layouts):
            self._of(Key(each.layer, each.turn))

    def state(self, layouts: Sequence[PoolLayout]) -> list[tf.Variable]:
        """The variables in the order of layouts that are arranged."""
        pools = [self._of(Key(each.layer, each.turn)) for each in self._fitting(layouts)]
        return [variable for pool in pools for variable in pool.state]

    def _fitting(self, layouts: Sequence[PoolLayout]) -> list[PoolLayout]:
        """Without those of layers that pool in another way here, or not at all."""
        layers = dict(enumerate(self._layers()))
        modes = {place: getattr(layer, "pools_between", None) for place, layer in layers.items()}
        return [each for each in layouts if modes.get(each.layer) == each.pools_between]

    def _of(self, key: Key) -> Pool:
        if key not in self._pools:
            self._pools[key] = Pool(self._layers()[key.layer])
            setattr(self, f"pool_{key.layer}_{key.turn}", self._pools[key])  # in checkpoints
        return self._pools[key]
