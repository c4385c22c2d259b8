"""Replicas: what accumulation asks of `tf.distribute`.

Each replica of a model sums the gradients of its own micro-batches, in variables of its own, so
that nothing is exchanged between updates. With the last batch of a window the sums of all
replicas are added up, once; what an optimizer does with them concerns all replicas together.

On one device everything here is what it would be without it.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Optional

import tensorflow as tf

from ga_transform.numerics import Gradient, multiplied, rarely
from ga_transform.transient import TransientVariable

__all__ = [
    "all_together",
    "apply_summed",
    "count_replicas",
    "decide",
    "gathered",
    "held_here",
    "here",
    "index_of_replica",
    "is_summed",
    "local_variable",
    "run_on_replicas",
    "scope_of",
    "sum_here",
    "summed",
]

Action = Callable[[], Any]

#: How optimizers, new and legacy, are told that gradients are summed already.
_SKIPS, _AGGREGATES = "skip_gradients_aggregation", "experimental_aggregate_gradients"

#: What a file holds of the variables that replicas have of their own.
_AGGREGATIONS = {
    "sum": tf.VariableAggregation.SUM,
    "mean": tf.VariableAggregation.MEAN,
    "first": tf.VariableAggregation.ONLY_FIRST_REPLICA,
}


def local_variable(
    value: Any,
    dtype: Optional[tf.DType] = None,
    *,
    of_all: str,
    shape: Any = None,
    is_shared: bool = False,
) -> tf.Variable:
    """A variable that each replica has of its own, and each worker of parameter servers.

    Args:
        value: At the beginning, on each replica.
        dtype: Of the variable.
        of_all: What is read outside of replicas, and written in files: the "sum" of what they
            hold, the "mean", or that of the "first", where all hold the same. What is assigned
            there, or restored, is divided among them so that the same would be read again.
        shape: Where it may change.
        is_shared: Whether workers of parameter servers share it after all.
    """
    has_servers = isinstance(tf.distribute.get_strategy(), tf.distribute.ParameterServerStrategy)
    if has_servers and not is_shared:
        return TransientVariable(value, dtype, shape)
    return tf.Variable(
        value,
        trainable=False,
        dtype=dtype,
        shape=shape,
        synchronization=tf.VariableSynchronization.ON_READ,
        aggregation=_AGGREGATIONS[of_all],
    )


def here(variable: Any) -> Any:
    """Of a variable that each replica has of its own, that of the replica which runs."""
    get = getattr(variable, "_get_on_device_or_primary", None)
    return variable if get is None else get()


def sum_here(variable: Any) -> float:
    """The sum of what the replicas of this process have, which waits for no other process."""
    return sum(float(each.numpy()) for each in held_here(variable))


def held_here(variable: Any) -> Sequence[tf.Variable]:
    """Of a variable that each replica has of its own, those of this process."""
    return getattr(variable, "values", [variable])  # type: ignore[no-any-return]


def count_replicas() -> int:
    """Among how many replicas the rows of a batch are divided."""
    return int(tf.distribute.get_strategy().num_replicas_in_sync)


def index_of_replica() -> Any:
    """Which of the replicas runs. Shape: scalar, int32; or an int."""
    return tf.distribute.get_replica_context().replica_id_in_sync_group


def scope_of(model: Any) -> contextlib.AbstractContextManager[Any]:
    """Have variables be made as those of a model, also while it is run on replicas."""
    if tf.distribute.has_strategy():
        return contextlib.nullcontext()
    return model.distribute_strategy.scope()  # type: ignore[no-any-return]


def run_on_replicas(model: Any, function: Action) -> None:
    """Run a function on each replica of a model, from outside."""
    model.distribute_strategy.run(function)


def decide(condition: tf.Tensor, then: Action, otherwise: Optional[Action] = None) -> None:
    """Do one thing or another, on all replicas alike.

    Optimizers and `all_reduce` bring the replicas together, which they cannot within a condition
    of one of them: so the replicas come together first, and decide in common. Where they have no
    need to, each takes its own condition for that of all.

    Args:
        condition: Of several replicas, the first one's counts. Shape: scalar, bool.
        then, otherwise: Change variables, and return nothing.
    """
    context = tf.distribute.get_replica_context()
    if _needs_no_merge(context):
        if otherwise is None:
            rarely(condition, then)
        else:
            tf.cond(condition, lambda: _done(then), lambda: _done(otherwise))
        return
    if not tf.executing_eagerly() and tf.get_static_value(condition):
        then()
        return

    def merge(strategy: Any, condition: Any, then: Any, otherwise: Any) -> None:
        def on_replicas(action: Any) -> tf.Tensor:
            if action is not None:
                strategy.extended.call_for_each_replica(_call, args=(action,))
            return tf.constant(0)

        common = strategy.experimental_local_results(condition)[0]
        tf.cond(common, lambda: on_replicas(then), lambda: on_replicas(otherwise))

    context.merge_call(merge, args=(condition, then, otherwise))


def all_together(action: Action) -> Any:
    """Do something once for all replicas, when they have all come here; returns the result."""
    context = tf.distribute.get_replica_context()
    return action() if _needs_no_merge(context) else context.merge_call(lambda _: action())


def summed(gradients: Sequence[Gradient]) -> list[Gradient]:
    """Gradients and other tensors, summed over the replicas, in one exchange for each dtype."""
    if count_replicas() == 1:
        return list(gradients)
    context = tf.distribute.get_replica_context()
    # Placed on the replica's device, from which TensorFlow tells where the sums are to be.
    gradients = [tf.nest.map_structure(tf.identity, g, expand_composites=True) for g in gradients]
    found: dict[int, Gradient] = {}
    places = sorted(range(len(gradients)), key=lambda place: gradients[place].dtype.name)
    for _, group in itertools.groupby(places, key=lambda place: gradients[place].dtype.name):
        same = list(group)
        found.update(zip(same, _all_reduced(context, [gradients[place] for place in same])))
    return [found[place] for place in range(len(gradients))]


def _all_reduced(context: Any, tensors: list[Gradient]) -> Sequence[Gradient]:
    """Tensors of one dtype, summed over the replicas.

    As `ReplicaContext.all_reduce` does it, without a gradient of its own that SavedModels trace.
    """
    if _needs_no_merge(context):
        add_up = context.strategy.extended._replica_ctx_all_reduce
        return add_up(tf.distribute.ReduceOp.SUM, tensors)  # type: ignore[no-any-return]

    def merge(strategy: Any, *tensors: Any) -> Any:
        # Of one replica a process they are tensors, whose devices say where the sums are to be.
        pairs = [(t, t.device if isinstance(t, tf.Tensor) else t) for t in tensors]
        return strategy.extended.batch_reduce_to(tf.distribute.ReduceOp.SUM, pairs)

    return context.merge_call(merge, args=tensors)  # type: ignore[no-any-return]


def is_summed(apply_gradients: Callable[..., Any], args: Any, kwargs: Any) -> bool:
    """Whether a call of an optimizer says that its gradients are summed over replicas already.

    Args:
        apply_gradients: The optimizer's own method.
        args, kwargs: What it is given beside the gradients.
    """
    if not tf.distribute.has_strategy():
        return False
    given = inspect.signature(apply_gradients).bind(None, *args, **kwargs)
    said = {**given.arguments, **given.arguments.get("kwargs", {})}
    return bool(said.get(_SKIPS)) or said.get(_AGGREGATES) is False


def apply_summed(
    apply_gradients: Callable[..., Any],
    grads_and_vars: Sequence[tuple[Optional[Gradient], tf.Variable]],
    args: Any,
    kwargs: Any,
) -> None:
    """Call an optimizer with gradients that are summed over replicas already.

    Args:
        apply_gradients: The optimizer's own method.
        grads_and_vars: The same on all replicas.
        args, kwargs: What it is given beside them.
    """
    if tf.distribute.has_strategy() and not is_summed(apply_gradients, args, kwargs):
        signature = inspect.signature(apply_gradients)
        call = signature.bind(None, *args, **kwargs)
        if _SKIPS in signature.parameters:
            call.arguments[_SKIPS] = True
        elif _AGGREGATES in signature.parameters:
            call.arguments[_AGGREGATES] = False
        else:  # it adds up what all replicas hand it
            grads_and_vars = [
                (None if g is None else multiplied(g, 1 / count_replicas()), v)
                for g, v in grads_and_vars
            ]
        args, kwargs = call.args[1:], call.kwargs
    apply_gradients(grads_and_vars, *args, **kwargs)


def gathered(rows: tf.Tensor) -> tf.Tensor:
    """The rows that all replicas have, one after the other."""
    if count_replicas() == 1:
        return rows
    return tf.distribute.get_replica_context().all_gather(rows, axis=0)


def _needs_no_merge(context: Any) -> bool:
    """Whether replicas need not be brought together in Python to do something in common."""
    strategy = context.strategy
    if isinstance(strategy, tf.distribute.OneDeviceStrategy) or not tf.distribute.has_strategy():
        return True
    return not strategy.extended._use_merge_call()


def _call(action: Action) -> None:
    action()


def _done(action: Action) -> tf.Tensor:
    action()
    return tf.constant(0)
