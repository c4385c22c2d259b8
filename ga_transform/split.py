"""Split: a batch that is run slice by slice inside the graph, and is one batch to the rest.

Each slice is a micro-step (`micro_step.py`), whose gradients go into the windows like those of
any micro-batch. When all are done, windows that end with the batch make their updates, and the
logs are those of the batch (`batch_logs.py`). The slice's step is traced once, as a function
that the loop calls, however many slices there are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Iterator
from typing import Any, NamedTuple, Optional

import tensorflow as tf

from ga_transform import _graphs
from ga_transform.batch_logs import Kept, keep_logs, keep_loss, take_slices
from ga_transform.loops import SliceFunction, fold, with_remainder
from ga_transform.loss_terms import LossCall
from ga_transform.rows import count_rows
from ga_transform.slices import Slices
from ga_transform.windows import Handed, Windows

__all__ = ["Slice", "train_in_slices"]


class Slice:
    """What is known of a slice while it is a micro-step, and what waits for the others.

    Args:
        model: The converted model.
        data: The rows of the slice, in the structure of the batch.
        index: Which slice of the batch it is. Shape: scalar, int32.
        batch: All slices.
        windows: The windows of the model's optimizers.
    """

    def __init__(
        self, model: Any, data: Any, index: tf.Tensor, batch: Slices, windows: Windows
    ) -> None:
        self.index = index
        self._model = model
        self._windows = windows
        self._batch = batch
        self._graph = _graphs.current_graph()
        rows = count_rows(data)
        total = tf.cast(batch.rows, tf.float64)
        #: Of the batch's rows, those of the slice. Shape: scalar, float64.
        self.share = tf.ones_like(total) if rows is None else tf.math.divide_no_nan(rows, total)
        self._handed: list[Handed] = []
        self._calls: list[LossCall] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Have metrics that count batches take the slice for a part of one."""
        with take_slices(self._model, self.share_seen_from_here):
            yield

    def publish_share(self) -> None:
        """Let functions that the step calls know the share, though they may capture no tensor."""
        self._windows.slice_share.assign(self.share)

    def share_seen_from_here(self) -> tf.Tensor:
        """The share, also in functions that the step calls. Shape: scalar, float64."""
        is_within_reach = _graphs.current_graph() is self._graph
        return self.share if is_within_reach else self._windows.slice_share.read_value()

    def hand_over(self, handed: Handed, present: Optional[Container[Any]]) -> None:
        """Note a window that the slice has gone into, and how its update is made.

        Args:
            handed: The call of an optimizer.
            present: References of the variables that have a gradient; None, if the window has
                not been told which slice this is.
        """
        if present is None:
            self._windows.remember(handed)
        else:
            handed = handed._replace(slices=self._batch.total, present=present)
        self._handed.append(handed)

    def withhold(self, call: LossCall) -> None:
        """Keep a call of the compiled loss from its metrics until they can be told of the batch.

        They are told at once where that comes to the same, so that a step which computes
        something of their results has those of the batch in the end; and where the call cannot
        be seen from outside.
        """
        if call.is_by_rows or _graphs.current_graph() is not self._graph:
            call.tell_metrics()
        else:
            self._calls.append(call)

    def outcome(self, logs: Any) -> _Outcome:
        """What is kept of the slice, and what is made of it when all slices are done."""
        kept = Kept()
        calls = [keep_loss(call, kept, self.share, self._batch.rows) for call in self._calls]
        metrics = [metric for call in self._calls for metric in call.metrics]
        late = [state for metric in metrics for state in metric.variables]
        whole_logs = keep_logs(logs, self._model, kept, self.share, late, self._warn_of_lateness)
        arguments = [self._keep_arguments(handed, kept) for handed in self._handed]

        def finish() -> Any:
            for tell in calls:
                tell()
            for handed, whole in zip(self._handed, arguments):
                args, kwargs = whole()
                self._windows.end_batch(handed._replace(args=args, kwargs=kwargs))
            self._windows.end_others(self._handed)
            return whole_logs()

        return _Outcome(kept, finish)

    def _warn_of_lateness(self) -> None:
        self._windows.warn_once(
            "lateness",
            f"{self._model.name}: train_step computes a number from results of its compiled loss, "
            "which is masked or a sum: with micro_batch_size they are those of the batch before. "
            "Compute it in a callback.",
        )

    def _keep_arguments(self, handed: Handed, kept: Kept) -> Callable[[], Any]:
        """What the model passes to an optimizer beside the gradients: the last slice's."""
        given = handed.args, handed.kwargs
        leaves: list[Callable[[], Any]] = []
        for leaf in tf.nest.flatten(given):
            if not _graphs.is_symbolic(leaf):
                leaves.append(kept.as_it_is(leaf))
            elif leaf.graph is self._graph:
                leaves.append(kept.replace(leaf))
            else:
                raise NotImplementedError(
                    f"{self._model.name}: apply_gradients must not be given tensors in a function "
                    f"that train_step calls, with micro_batch_size; got {leaf.name!r}. Call it in "
                    "train_step itself."
                )
        return lambda: tf.nest.pack_sequence_as(given, [whole() for whole in leaves])


class _Outcome(NamedTuple):
    """Of one slice; of all, when `kept` has been filled with what was kept of them."""

    kept: Kept
    finish: Callable[[], Any]


Run = Callable[[tf.Tensor, list[Any]], _Outcome]


def train_in_slices(
    model: Any,
    windows: Windows,
    batch: Any,
    micro_batch_size: int,
    micro_step: Callable[[Any, Slice], Any],
) -> Any:
    """Run a training step on each slice of a batch, and make the updates that end with it.

    Args:
        model: The converted model.
        windows: The windows of its optimizers.
        batch: Tensors in any structure.
        micro_batch_size: Rows a slice.
        micro_step: Runs the step on the data of a slice, and returns its logs.

    Returns:
        The logs of the batch.
    """
    slices = Slices(batch, micro_batch_size, has_fixed_size=_graphs.is_compiled())

    def run(index: tf.Tensor, tensors: list[Any]) -> _Outcome:
        data = slices.pack(tensors)
        slice_ = Slice(model, data, index, slices, windows)
        with slice_.running():
            logs = micro_step(data, slice_)
        return slice_.outcome(logs)

    if tf.executing_eagerly():
        return _run_eagerly(windows, slices, run)
    return _run_in_graph(windows, slices, run)


def _run_eagerly(windows: Windows, slices: Slices, run: Run) -> Any:
    windows.begin_batch()
    sums: Optional[list[tf.Tensor]] = None
    try:
        for index in tf.range(slices.total):
            kept, finish = run(index, slices.take(index))
            # A step that is run eagerly may do other things with each slice.
            if sums is not None and len(sums) == len(kept.sums):
                kept.sums[:] = map(tf.add, sums, kept.sums)
            sums = kept.sums
    except BaseException:
        windows.begin_batch()  # what was done of the batch is forgotten
        raise
    return finish()


def _run_in_graph(windows: Windows, slices: Slices, run: Run) -> Any:
    outcomes = []

    def step(index: tf.Tensor, tensors: list[Any]) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
        outcomes.append(run(index, tensors))
        return outcomes[-1].kept.sums, outcomes[-1].kept.latest

    # Traced before the loop, which must know what it carries.
    function = SliceFunction(slices, step)
    kept, finish = outcomes[-1]

    def add(so_far: Any, index: tf.Tensor, tensors: list[Any]) -> Any:
        sums, latest = function(index, tensors)
        return [one + other for one, other in zip(so_far[0], sums)], latest

    with tf.control_dependencies([slices.count]):  # not before there is a batch
        windows.begin_batch()
    begun = [tf.zeros([], each.dtype) for each in kept.sums]
    empty = [tf.zeros(_smallest(each.shape), each.dtype) for each in kept.latest]
    shapes = [each.shape for each in begun], [each.shape for each in kept.latest]
    end, result = fold(slices, add, (begun, empty), shapes)
    kept.sums[:], kept.latest[:] = with_remainder(slices, add, result)
    with tf.control_dependencies([end]):
        return finish()


def _smallest(shape: tf.TensorShape) -> list[int]:
    """A shape that a tensor may have which is never looked at."""
    return [] if shape.rank is None else [size or 0 for size in shape]
