"""What workers exchange: the collective operations of a training function, and those that ran."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from unittest import mock

import cases
import numpy as np
import tensorflow as tf
import tf_keras
from tensorflow.python.ops import collective_ops

import ga_transform as ga
from workers import laws

STEPS, WINDOWS = 3, 2


class Way(NamedTuple):
    """What is trained, with what is asked of `make_accumulating`."""

    options: Mapping[str, Any]
    case: Callable[[], cases.Case] = cases.dense
    #: Whether the plain model can be trained on workers at all.
    has_plain: bool = True


def two_dtypes():
    """Weights of float32, and of float64, which tf_keras does not add up over workers."""
    layers = [
        tf_keras.Input([4]),
        tf_keras.layers.Dense(3, "tanh", dtype="float64"),
        tf_keras.layers.Dense(2, dtype="float32"),
    ]
    return cases.Case(
        tf_keras.Sequential(layers),
        {"loss": "mse"},
        lambda rng, rows: (rng.normal(size=[rows, 4]), rng.normal(size=[rows, 2])),
    )


WAYS = {
    "batches": Way({"accum_steps": STEPS}),
    "both": Way({"accum_steps": STEPS, "micro_batch_size": 2}),
    "clips": Way({"transforms": [ga.Accumulate(STEPS), ga.ClipByAGC(), ga.ClipByGlobalNorm(0.1)]}),
    "sparse": Way({"accum_steps": STEPS}, cases.words),
    "two dtypes": Way({"accum_steps": STEPS}, two_dtypes, has_plain=False),
    "loss scale": Way({"accum_steps": STEPS, "precision": "mixed_float16"}),
    "left out": Way({"transforms": [ga.Accumulate(STEPS, on_nonfinite="micro_batch")]}),
}


def exchanged(strategy, name):
    """For the plain model and the converted one, what is in the graph and what ran in each step."""
    way = WAYS[name]
    law = laws.Law(way.case, batches=[STEPS] * WINDOWS)
    batches = sum(laws.batches_of(law, strategy.num_replicas_in_sync), [])
    found = {}
    for kind in ("plain", "converted") if way.has_plain else ("converted",):
        with strategy.scope():
            model = laws.build(law, law.optimizer, metrics=["mae"])
            if kind == "converted":
                model = ga.make_accumulating(model, **way.options)
        step = model.make_train_function()
        data = iter(laws.of_worker(strategy, batches))
        with counting() as count:
            for _ in range(STEPS):  # the first traces, and makes the optimizer's variables
                step(data)
            ran = executed(lambda step=step, data=data: step(data), count, len(batches))
            graph = step.get_concrete_function(data).graph
        found[kind] = {
            "graph": list(collectives(graph)),
            "ran": ran,
            "dtypes": sorted({tf.as_dtype(w.dtype).name for w in model.trainable_weights}),
            "trained": sum(int(np.prod(weight.shape)) for weight in model.trainable_weights),
        }
    return found


def collectives(graph, is_in_branch=False):
    """Of a graph and the functions it calls: dtype, number of elements, whether in a branch."""
    for operation in graph.get_operations():
        if operation.type.startswith("Collective"):
            elements = operation.inputs[0].shape.num_elements()
            yield operation.inputs[0].dtype.name, elements, is_in_branch
        branches = operation.type in ("If", "StatelessIf", "Case", "StatelessCase")
        for name in called(operation):
            yield from collectives(function_of(graph, name), is_in_branch or branches)


def called(operation):
    """The names of the functions that an operation calls."""
    for value in operation.node_def.attr.values():
        yield from [value.func.name] if value.HasField("func") else []
        yield from (function.name for function in value.list.func)


def function_of(graph, name):
    """The graph of a function that is called in a graph."""
    while not graph._is_function(name):
        graph = graph.outer_graph
    return graph._get_function(name).graph


@contextlib.contextmanager
def counting():
    """Have operations that are traced here count how often they run, each when its result is there.

    Gives a function that returns the count.
    """
    ran = tf.Variable(0, dtype=tf.int64, trainable=False)

    def counted(own):
        def call(*args, **kwargs):
            result = own(*args, **kwargs)
            with tf.control_dependencies([result]), tf.control_dependencies([ran.assign_add(1)]):
                return tf.identity(result)

        return call

    with contextlib.ExitStack() as stack:
        for name, own in vars(collective_ops).items():
            if name.startswith("all_"):
                stack.enter_context(mock.patch.object(collective_ops, name, counted(own)))
        yield lambda: int(ran.numpy())


def executed(step, count, steps):
    """How often something was counted in each of some steps."""
    counts = [count()]
    for _ in range(steps):
        step()
        counts.append(count())
    return np.diff(counts).tolist()
