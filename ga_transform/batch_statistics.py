"""Pools: the statistics that batch normalisation layers have of a window's micro-batches.

Statistics of parts are put together as Chan, Golub and LeVeque do it (1983): of two parts with
weights in the ratio (1 - r) : r and means that differ by d, the mean moves by r d, and the variance
is (1 - r) v1 + r v2, within the parts, plus r (1 - r) d^2, between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from ga_transform._keras import AutoTrackable, flatten_layers
from ga_transform.layouts import PoolLayout
from ga_transform.numerics import rarely
from ga_transform.rewrites.batch_norm import PooledBatchNorm, Statistics

__all__ = ["Pools"]


class Pool(AutoTrackable):  # type: ignore[misc]
    """The statistics of one layer, of those rows of a window that went through it so far.

    Args:
        layer: A layer with moving statistics.
    """

    def __init__(self, layer: Any) -> None:
        self._layer = self._no_dependency(layer)
        with tf.init_scope():
            self.elements = tf.Variable(0, trainable=False, dtype=tf.float64)
            self.weight = tf.Variable(0, trainable=False, dtype=tf.float64)
            empty = tf.zeros(layer.moving_mean.shape, layer.moving_mean.dtype)
            self.mean = tf.Variable(empty, trainable=False)
            self.variance = tf.Variable(empty, trainable=False)

    @property
    def state(self) -> list[tf.Variable]:
        """The variables in one order."""
        return [self.elements, self.weight, self.mean, self.variance]

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing in it, also while a function is traced."""
        with tf.init_scope():
            return not self.elements.numpy()

    def add(self, statistics: Statistics, share: tf.Tensor) -> None:
        """Take in the statistics of a micro-batch.

        Args:
            statistics: What is not finite, or of no elements, adds nothing.
            share: Of a whole window, what the micro-batch is. Shape: scalar, float64.
        """
        elements, mean, variance = statistics
        finite = tf.reduce_all(tf.math.is_finite(mean) & tf.math.is_finite(variance))
        counts = finite & (elements > 0)
        momentum = tf.cast(vars(self._layer)["momentum"], tf.float64)
        if self._layer.pools_between:
            decay, gain = tf.ones([], tf.float64), elements
        else:  # as if the moving statistics themselves moved with each micro-batch
            decay = momentum**share
            gain = tf.maximum(1.0 - decay, 1e-12)  # of a momentum of 1, all weigh alike
        weight = decay * self.weight + gain
        dtype = self.mean.dtype
        ratio = tf.cast(gain / weight, dtype)
        difference = mean - self.mean
        between = ratio * (1 - ratio) * tf.square(difference) if self._layer.pools_between else 0.0
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

    def move(self) -> None:
        """Move the layer's statistics towards those of the pool, as of one batch; and empty it."""
        layer, dtype = self._layer, self.mean.dtype
        holds = self.elements > 0
        of_layer = self.elements / tf.maximum(self.elements - layer.degrees_taken, 1.0)
        found = (self.mean, self.variance * tf.cast(of_layer, dtype))
        gain = tf.where(holds, 1 - tf.cast(vars(layer)["momentum"], dtype), 0)
        for variable, value in zip((layer.moving_mean, layer.moving_variance), found):
            variable.assign_add(gain * (value - variable))
        self.clear()

    def clear(self) -> None:
        """Hold nothing."""
        self.elements.assign(0)
        for variable in (self.weight, self.mean, self.variance):
            variable.assign(tf.zeros_like(variable))

    def _trackable_children(self, save_type: str = "checkpoint", **kwargs: Any) -> dict[str, Any]:
        children: dict[str, Any] = super()._trackable_children(save_type, **kwargs)
        return {} if self.is_empty else children


class Key(NamedTuple):
    """One pass of a layer in a step."""

    layer: int
    turn: int


class Pools(AutoTrackable):  # type: ignore[misc]
    """The pools of a model's layers: one for each time that a step passes through one.

    Args:
        model: The converted model.
    """

    def __init__(self, model: Any) -> None:
        layers: list[Any] = [
            layer for layer in flatten_layers(model) if isinstance(layer, PooledBatchNorm)
        ]
        self._layers = self._no_dependency(layers)
        self._places = self._no_dependency({id(layer): place for place, layer in enumerate(layers)})
        self._pools: dict[Key, Pool] = self._no_dependency({})
        for layer in layers:
            if layer.built:
                self._of(Key(self._places[id(layer)], 0))

    def has(self, layer: Any) -> bool:
        """Whether a layer's statistics are pooled here."""
        return id(layer) in self._places

    def add(self, layer: Any, turn: int, statistics: Statistics, share: tf.Tensor) -> None:
        """Take in what a layer has found in a micro-batch.

        Args:
            layer: One that these pools have.
            turn: How many passes through it were before this in the step.
            statistics: Of the micro-batch.
            share: As in `Pool.add`.
        """
        self._of(Key(self._places[id(layer)], turn)).add(statistics, share)

    def end_batch(self, is_begun: tf.Tensor) -> None:
        """Move the moving statistics, if no window goes on after this batch.

        Args:
            is_begun: Whether one does. Shape: scalar, bool.
        """
        if self._pools:
            rarely(~is_begun, self.move)

    def move(self) -> None:
        """Move the moving statistics towards what is pooled, pass by pass."""
        for _, pool in sorted(self._pools.items()):
            pool.move()

    def clear(self) -> None:
        """Forget what is pooled."""
        for pool in self._pools.values():
            pool.clear()

    # ---- in files --------------------------------------------------------------------------

    def layout(self) -> list[PoolLayout]:
        """The pools that hold something."""
        return [PoolLayout(*key) for key, pool in sorted(self._pools.items()) if not pool.is_empty]

    def takes(self, layouts: Sequence[PoolLayout]) -> bool:
        """Whether there are layers for all pools of a layout."""
        return all(each.layer < len(self._layers) for each in layouts)

    def arrange(self, layouts: Sequence[PoolLayout]) -> None:
        """Make the pools of a layout; all others hold nothing."""
        self.clear()
        for each in layouts:
            self._of(Key(*each))

    def state(self, layouts: Sequence[PoolLayout]) -> list[tf.Variable]:
        """The variables in the order of layouts that are arranged."""
        return [variable for each in layouts for variable in self._of(Key(*each)).state]

    def _of(self, key: Key) -> Pool:
        if key not in self._pools:
            self._pools[key] = Pool(self._layers[key.layer])
            setattr(self, f"pool_{key.layer}_{key.turn}", self._pools[key])  # in checkpoints
        return self._pools[key]
