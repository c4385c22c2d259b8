"""Batch normalisation in a window: what becomes of the moving statistics.

The layer runs as ever. While a micro-step runs, its moves of the moving statistics are diverted:
the statistics of the micro-batch go to a pool (`batch_statistics.py`), which moves them once an
update. Outside of micro-steps it is the plain layer.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import tensorflow as tf

from ga_transform import _keras
from ga_transform.diversion import current_step
from ga_transform.errors import InexactWarning
from ga_transform.rewrites.rewritten import Rewritten, stand_before
from ga_transform.specs import BatchNorm

__all__ = [
    "PooledBatchNorm",
    "Statistics",
    "batch_norms_of",
    "check_batch_norm",
    "rewrite_batch_norm",
    "warn_of_batch_norm",
]

_threads = threading.local()


class Statistics(NamedTuple):
    """Of the rows of one pass through a layer."""

    #: How many numbers the mean is of; 0 where the layer does not train. Shape: as the mean.
    elements: tf.Tensor
    #: Shape: as the layer's moving mean.
    mean: tf.Tensor
    #: Divided by the elements, whatever the layer makes of it. Shape: as the moving variance.
    variance: tf.Tensor


def batch_norms_of(model: Any) -> list[Any]:
    """The batch normalisation layers of a model, nested ones included, each once."""
    layers = _keras.flatten_layers(model)
    return [layer for layer in layers if isinstance(layer, _keras.BatchNormalizationBase)]


def warn_of_batch_norm(model: Any) -> None:
    """Say, of layers that keep to tf_keras's ways, that these are not those of the large batch."""
    names = [layer.name for layer in batch_norms_of(model) if layer.trainable]
    if names:
        warnings.warn(
            f"{model.name}: batch normalisation takes its statistics from each micro-batch, so "
            f"updates are not those of the large batch; layers: {', '.join(names)}. Choose "
            "batch_norm='pooled' (moving statistics of all rows of a window), 'momentum' (moved "
            "once an update) or 'freeze' (not moved, and normalised by); 'keep' moves them with "
            "each micro-batch.",
            InexactWarning,
            stacklevel=4,
        )


def check_batch_norm(spec: BatchNorm, model: Any) -> None:
    """Refuse layers whose statistics are not those of a batch."""
    if spec.mode not in _MIXINS or spec.mode == "freeze":
        return
    for layer in batch_norms_of(model):
        for option in ("renorm", "virtual_batch_size"):
            if getattr(layer, option, None):
                raise ValueError(
                    f"BatchNorm.mode {spec.mode!r} must be given layers without {option}; got "
                    f"{layer.name!r} in {model.name!r}. Use 'keep' or 'freeze'."
                )


def rewrite_batch_norm(spec: BatchNorm, model: Any) -> None:
    """Have the layers of a model do what is asked for."""
    if spec.mode == "keep":
        return
    mixin = _FrozenAffine if not spec.trainable else _MIXINS[spec.mode]
    for layer in batch_norms_of(model):
        stand_before(mixin, layer)


class PooledBatchNorm(Rewritten):
    """Batch normalisation whose moving statistics move once an update."""

    #: Whether the pool's variance is the total one, or the mean of the micro-batches'.
    pools_between = True

    def call(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As the plain layer; in a micro-step, with its statistics given to a pool."""
        step = current_step()
        if step is None or not step.pools(self):
            return super().call(inputs, *args, **kwargs)  # type: ignore[misc]
        with _measuring(self) as measured:
            outputs = super().call(inputs, *args, **kwargs)  # type: ignore[misc]
        if "variance" in measured:  # it trains
            step.pool(self, self._statistics(**measured))
        return outputs

    @property
    def momentum(self) -> Any:
        """That of the layer; zero where it is measured: it then moves to the batch's statistics."""
        return 0.0 if _measured_by(self) is not None else vars(self)["momentum"]

    @momentum.setter
    def momentum(self, value: Any) -> None:
        vars(self)["momentum"] = value

    @property
    def degrees_taken(self) -> int:
        """What the layer subtracts from the elements where it divides by them for a variance."""
        return int(bool(self.fused and self._bessels_correction_test_only))  # type: ignore[attr-defined]

    def _assign_moving_average(self, variable: Any, value: Any, *args: Any) -> Any:
        if self._note_move(variable, value):
            return value
        return super()._assign_moving_average(variable, value, *args)  # type: ignore[misc]

    def _assign_new_value(self, variable: Any, value: Any) -> Any:
        if self._note_move(variable, value):
            return value
        return super()._assign_new_value(variable, value)  # type: ignore[misc]

    def _get_training_value(self, training: Any = None) -> Any:
        training = super()._get_training_value(training)  # type: ignore[misc]
        self._note("training", training)
        return training

    def _fused_batch_norm(self, inputs: Any, mask: Any, training: Any) -> Any:
        self._note("elements", tf.size(inputs, tf.int64))
        return super()._fused_batch_norm(inputs, mask, training)  # type: ignore[misc]

    def _calculate_mean_and_var(
        self, inputs: Any, reduction_axes: Any, keep_dims: bool, mask: Any = None
    ) -> Any:
        elements = tf.size(inputs, tf.int64)
        if mask is not None:  # what is valid, of each channel
            valid = tf.broadcast_to(tf.expand_dims(mask, -1), tf.shape(inputs))
            elements = tf.math.count_nonzero(valid, reduction_axes, keepdims=keep_dims)
        self._note("elements", elements)
        own = super()._calculate_mean_and_var  # type: ignore[misc]
        return own(inputs, reduction_axes, keep_dims, mask=mask)

    def _note_move(self, variable: Any, value: Any) -> bool:
        """Note what the layer would move a statistic to, if it is not to be moved."""
        return self._note("mean" if variable is self.moving_mean else "variance", value)  # type: ignore[attr-defined]

    def _note(self, name: str, value: Any) -> bool:
        """Note something, where the layer is measured; else it is not."""
        measured = _measured_by(self)
        if measured is not None:
            measured[name] = value
        return measured is not None

    def _statistics(self, elements: Any, training: Any, mean: Any, variance: Any) -> Statistics:
        dtype = self.moving_mean.dtype  # type: ignore[attr-defined]
        if elements.shape.rank == 0:  # of all channels
            elements //= tf.size(mean, tf.int64)
        counts = tf.cast(elements, tf.float64) + tf.zeros_like(mean, tf.float64)
        divided_by = tf.maximum(counts - self.degrees_taken, 1.0)
        of_all = tf.cast(tf.math.divide_no_nan(divided_by, counts), dtype)
        counts *= tf.cast(training, tf.float64)
        return Statistics(counts, tf.cast(mean, dtype), tf.cast(variance, dtype) * of_all)


class _MomentumBatchNorm(PooledBatchNorm):
    """Batch normalisation whose moving statistics decay once an update."""

    pools_between = False


class _FrozenBatchNorm(Rewritten):
    """Batch normalisation by the moving statistics, which rest."""

    def _get_training_value(self, training: Any = None) -> bool:
        return False


class _FrozenAffine(_FrozenBatchNorm):
    """The same, with gamma and beta at rest."""

    @property
    def trainable_weights(self) -> list[Any]:
        return []

    @property
    def non_trainable_weights(self) -> list[Any]:
        return [*self._trainable_weights, *self._non_trainable_weights]  # type: ignore[attr-defined]


#: By mode, what stands before the class of a layer.
_MIXINS: dict[str, type[Rewritten]] = {
    "momentum": _MomentumBatchNorm,
    "pooled": PooledBatchNorm,
    "freeze": _FrozenBatchNorm,
}


@contextmanager
def _measuring(layer: Any) -> Iterator[dict[str, tf.Tensor]]:
    """Have a layer's moves of its statistics be noted in this thread, and not made."""
    outer = getattr(_threads, "measured", None)
    measured: dict[str, tf.Tensor] = {}
    _threads.measured = layer, measured
    try:
        yield measured
    finally:
        _threads.measured = outer


def _measured_by(layer: Any) -> Any:
    measuring = getattr(_threads, "measured", None)
    return measuring[1] if measuring is not None and measuring[0] is layer else None
