"""The graphs of TensorFlow that are traced: which they are, and what stands in them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Optional

import tensorflow as tf
from tensorflow.python.framework import op_callbacks
from tensorflow.python.framework.auto_control_deps_utils import (
    get_read_only_resource_input_indices_graph,
)
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext
from tensorflow.python.ops.control_flow_v2_func_graphs import (
    CondBranchFuncGraph,
    ControlFlowFuncGraph,
    WhileBodyFuncGraph,
)
from tensorflow.python.ops.resource_variable_ops import get_eager_safe_handle_data

__all__ = [
    "branch_of",
    "condition_of",
    "current_graph",
    "dtype_of",
    "graphs_within",
    "is_compiled",
    "is_function",
    "is_loop",
    "is_symbolic",
    "nodes_of",
    "noting_operations",
    "trace_again",
    "written_by",
]


def current_graph() -> Any:
    """The graph that is traced, or the eager context's."""
    return tf.compat.v1.get_default_graph()


def graphs_within(outer: Any) -> list[Any]:
    """The graphs from the one that is traced out to an outer one, which is left out."""
    graphs = []
    graph = current_graph()
    while graph is not None and graph is not outer:
        graphs.append(graph)
        graph = getattr(graph, "outer_graph", None)
    return graphs


def is_compiled() -> bool:
    """Whether XLA compiles what is traced, for this machine or for a TPU."""
    return bool(GraphOrParentsInXlaContext(current_graph()))


def is_function(graph: Any) -> bool:
    """Whether a graph is that of a function, not of a branch or a loop."""
    return not isinstance(graph, ControlFlowFuncGraph)


def is_loop(graph: Any) -> bool:
    """Whether a graph is the body of a loop of TensorFlow."""
    return isinstance(graph, WhileBodyFuncGraph)


def branch_of(graphs: Sequence[Any]) -> Any:
    """The innermost branch of a condition among nested graphs, up to the first function."""
    for graph in graphs:
        if is_function(graph):
            return None
        if isinstance(graph, CondBranchFuncGraph):
            return graph
    return None


def condition_of(branch: Any) -> str:
    """The name of the condition that a graph is a branch of: its branches exclude each other."""
    return re.sub(r"_(true|false|branch\d+)_\d+$", "", branch.name)


def is_symbolic(value: Any) -> bool:
    """Whether a value is a tensor of a graph."""
    return tf.is_tensor(value) and hasattr(value, "graph")


@contextmanager
def noting_operations() -> Iterator[set[str]]:
    """Note the kinds of the operations that are run eagerly."""
    kinds: set[str] = set()

    def note(kind: str, *_: Any, **__: Any) -> None:
        kinds.add(kind)

    op_callbacks.add_op_callback(note)
    try:
        yield kinds
    finally:
        op_callbacks.remove_op_callback(note)


def trace_again() -> None:
    """Have the function that is traced for the first time be traced again: it makes a variable."""
    with tf.init_scope():
        tf.Variable(0, trainable=False)


def written_by(function: Any) -> list[tf.Tensor]:
    """The handles of the variables, from outside of a concrete function, that it may change."""
    graph = function.graph
    read_only = set(get_read_only_resource_input_indices_graph(graph))
    positions = {id(placeholder): position for position, placeholder in enumerate(graph.inputs)}
    return [
        outer
        for outer, inner in graph.captures
        if dtype_of(outer) is not None and positions[id(inner)] not in read_only
    ]


def dtype_of(handle: tf.Tensor) -> Optional[tf.DType]:
    """The dtype of the variable that a handle is of; None if it is of something else."""
    if handle.dtype != tf.resource:
        return None
    data = get_eager_safe_handle_data(handle)
    if data is None or not data.is_set or not data.shape_and_type:
        return None
    return tf.as_dtype(data.shape_and_type[0].dtype)


def nodes_of(graph: Any) -> Iterator[Any]:
    """The nodes of a graph and of the functions that it calls, as they are written down."""
    definition = graph.as_graph_def()
    yield from definition.node
    for function in definition.library.function:
        yield from function.node_def
