"""Transient variables: each run of a function of TensorFlow has its own, which end with it.

Workers of a `ParameterServerStrategy` run the same function at the same time, each on a batch of
its own, and share all variables that are kept between runs. What a window holds within a batch is
theirs alone.
"""

from __future__ import annotations

import weakref
from typing import Any

import tensorflow as tf
from tensorflow.python.ops.resource_variable_ops import BaseResourceVariable

__all__ = ["TransientVariable"]

#: With this name, each run of the operation makes a resource that no other has.
_ANONYMOUS = "cd2c89b7-88b7-44c8-ad83-06c2a9158347"


class TransientVariable(BaseResourceVariable):  # type: ignore[misc]
    """A variable that holds its initial value at the beginning of each run of a function.

    Checkpoints hold none of it. Outside of functions it is a variable like others.

    Args:
        value: At the beginning of each run.
        dtype: Of the variable.
        shape: Where it may change.
    """

    def __init__(self, value: Any, dtype: Any = None, shape: Any = None) -> None:
        with tf.init_scope():
            self._initial = tf.convert_to_tensor(value, dtype)
        shape = tf.TensorShape(self._initial.shape if shape is None else shape)
        super().__init__(trainable=False, shape=shape, dtype=self._initial.dtype, name="transient")
        self._handle: Any
        self._handles = weakref.WeakKeyDictionary[Any, Any]()

    @classmethod
    def _variable_call(cls, *args: Any, **kwargs: Any) -> None:
        """None: no strategy has a say in how it is made."""

    @property
    def handle(self) -> Any:
        """That of the run, or of the variable outside of all."""
        graph = tf.compat.v1.get_default_graph()
        if not graph.building_function:
            if self._handle is None:
                self._handle = self._make()
            return self._handle
        while graph.outer_graph.building_function:
            graph = graph.outer_graph
        if graph not in self._handles:
            with graph.as_default(), tf.control_dependencies(None):
                self._handles[graph] = self._make()
        return self._handles[graph]

    def _make(self) -> tf.Tensor:
        handle = tf.raw_ops.VarHandleOp(dtype=self.dtype, shape=self.shape, shared_name=_ANONYMOUS)
        tf.raw_ops.AssignVariableOp(resource=handle, value=self._initial)
        return handle

    def _gather_saveables_for_checkpoint(self) -> dict[str, Any]:
        return {}

    def _serialize_to_tensors(self) -> dict[str, Any]:
        return {}

    def _restore_from_tensors(self, restored_tensors: dict[str, Any]) -> None:
        """Nothing: no checkpoint holds any."""
