"""The strategies of `tf.distribute` that a converted model may be under."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from ga_transform import _keras
from ga_transform.chain import Chain
from ga_transform.specs import Accumulate, Split

__all__ = ["check_strategy"]

#: Those whose replicas make updates together.
_SYNCHRONOUS = (
    tf.distribute.OneDeviceStrategy,
    tf.distribute.MirroredStrategy,
    tf.distribute.MultiWorkerMirroredStrategy,
    tf.distribute.TPUStrategy,
    tf.distribute.experimental.TPUStrategy,
)


def check_strategy(owner: str, model: Any, chain: Chain) -> None:
    """Refuse a model whose devices cannot do what is asked for.

    Args:
        owner: Who is at fault, in the error.
        model: A plain model.
        chain: What is to be done to it.

    Raises:
        ValueError: The model was built outside of the scope that it is converted in, or has
            layers that cannot be run in slices on several replicas.
        NotImplementedError: The strategy, or accumulation under it, is not supported.
    """
    strategy = model.distribute_strategy
    if tf.distribute.has_strategy() and not _keras.is_built_under(
        model, tf.distribute.get_strategy()
    ):
        raise ValueError(
            f"{owner} must be built under the strategy in whose scope it is converted; got "
            f"{model.name!r}, built outside of {type(tf.distribute.get_strategy()).__name__}. "
            "Build it within 'with strategy.scope():', too."
        )
    if _is_laid_out(model):
        raise NotImplementedError(
            f"{owner} must not be laid out by DTensor; got {model.name!r}. Build it under a "
            "MirroredStrategy or MultiWorkerMirroredStrategy of tf.distribute."
        )
    if isinstance(strategy, tf.distribute.ParameterServerStrategy):
        accumulate = chain.find(Accumulate)
        if accumulate is not None and accumulate.steps not in (1, {0: 1}):
            raise NotImplementedError(
                f"Accumulate.steps must be 1 under ParameterServerStrategy; got "
                f"{accumulate.steps} for {model.name!r}: workers update the weights without "
                "waiting for each other, so that no window of several batches is of the same "
                "weights. Use micro_batch_size, which makes each batch a window."
            )
    elif not (isinstance(strategy, _SYNCHRONOUS) or _keras.is_default(strategy)):
        raise NotImplementedError(
            f"{owner} must be under a strategy that is known here; got {model.name!r} under "
            f"{type(strategy).__name__}. Build it under MirroredStrategy, MultiWorkerMirroredStrategy, TPUStrategy, "
            "OneDeviceStrategy or (with micro_batch_size) ParameterServerStrategy."
        )
    _check_replicas_are_free(model, chain)


def _check_replicas_are_free(model: Any, chain: Chain) -> None:
    """Layers that wait for those of other replicas cannot do so amidst slices."""
    if chain.find(Split) is None or model.distribute_strategy.num_replicas_in_sync == 1:
        return
    layers = _keras.flatten_layers(model)
    names = [layer.name for layer in layers if getattr(layer, "synchronized", False)]
    if names:
        raise ValueError(
            "Split must be given a model without synchronized batch normalisation where there are "
            f"several replicas; got {', '.join(names)} in {model.name!r}. Use accum_steps, or "
            "synchronized=False with batch_norm='pooled'."
        )


def _is_laid_out(model: Any) -> bool:
    """Whether DTensor has a part in a model: in its strategy, its optimizers or its weights."""
    holders = [model.distribute_strategy, *_keras.optimizers_of(model)]
    return any(getattr(holder, "_mesh", None) is not None for holder in holders) or any(
        isinstance(weight, tf.experimental.dtensor.DVariable) for weight in _keras.weights_of(model)
    )
