"""AccumulationLog: what accumulation does, in logs, in a table and in TensorBoard."""

from __future__ import annotations

import contextlib
import csv as csv_files
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Union

import tensorflow as tf
from tf_keras import callbacks as keras_callbacks

from ga_transform.errors import wrong_type
from ga_transform.fields import check_count
from ga_transform.measures import UPDATES, Measures
from ga_transform.optimizer_state import iterations_of

__all__ = ["AccumulationLog"]

_SKIPPED = ("skipped_windows", "skipped_micro_batches")


class AccumulationLog(keras_callbacks.Callback):  # type: ignore[misc]
    """Log what the updates of a converted model are like.

    Into the logs of each epoch it puts, over the epoch's updates:

    - `updates`: how many were made;
    - `gradient_norm`: the mean of the joint L2 norm of all gradients, before any stage;
    - `clipped_gradient_norm`: the same after the stages, where the chain has any;
    - `clipped_share`: of the units that a clip may clip, those that it has clipped, from 0 to 1
      (`ClipByAGC`: units of weights; `ClipByNorm`: gradients; `ClipByGlobalNorm`: updates;
      `ClipByValue`: elements). With several clips, `clipped_share_ClipByAGC` and so on;
    - `micro_batches_per_update`: their mean number;
    - `partial_windows`: how many were flushed;
    - `skipped_windows`: updates that were not made, because their gradients were not finite;
    - `skipped_micro_batches`: those that were left out of their windows.

    They stand in `fit(...).history`, and callbacks after this one (CSVLogger, TensorBoard) write
    them. Of several optimizers, the names of the second and later ones end in `_1`, `_2`, ...
    Without this callback nothing of it is computed; with it, the training function is traced
    once more.

    Args:
        csv: A file for a table with a row for each `every` updates, written over.
        tensorboard: A folder for summaries of the same.
        every: Updates that a row is the mean of, >= 1. A row is written when a batch ends, so one
            that ends an epoch, or a call of several steps, may be of fewer or more.

    Raises:
        TypeError: An argument has a wrong type; or, in `fit`, the model is not converted.
        ValueError: `every` is < 1.

    Example:
        >>> import numpy as np, tf_keras, ga_transform as ga
        >>> model = tf_keras.Sequential([tf_keras.Input([2]), tf_keras.layers.Dense(1)])
        >>> model.compile("sgd", "mse")
        >>> model = ga.make_accumulating(model, accum_steps=2)
        >>> x, y = np.ones([12, 2]), np.ones([12, 1])
        >>> x[0] = np.inf
        >>> log = ga.AccumulationLog()
        >>> arguments = {"batch_size": 2, "shuffle": False, "verbose": 0}
        >>> history = model.fit(x, y, callbacks=[log], **arguments).history
        >>> history["updates"], history["skipped_windows"], history["micro_batches_per_update"]
        ([2], [1], [2.0])
    """

    def __init__(
        self,
        csv: Union[None, str, os.PathLike[str]] = None,
        tensorboard: Union[None, str, os.PathLike[str]] = None,
        every: int = 1,
    ) -> None:
        super().__init__()
        for name, value in (("csv", csv), ("tensorboard", tensorboard)):
            if value is not None and not isinstance(value, (str, os.PathLike)):
                raise wrong_type(f"AccumulationLog.{name}", "a path", value, "None writes none.")
        check_count("AccumulationLog.every", every, "The default is 1.")
        self._every = every
        self._csv, self._tensorboard = csv, tensorboard
        self._files = contextlib.ExitStack()
        self._writers: list[Callable[[dict[str, Any]], None]] = []

    def on_train_begin(self, logs: Any = None) -> None:
        """Begin to measure."""
        if getattr(self.model, "_open_windows", None) is None:
            raise wrong_type(
                "AccumulationLog", "given to fit of a converted model", self.model,
                "Convert it with make_accumulating.",
            )  # fmt: skip
        self._of_epoch = self._of_row = self._read()
        self._writers = []
        if self._csv is not None:
            self._writers.append(self._table_writer(self._csv))
        if self._tensorboard is not None:
            self._writers.append(self._summary_writer(self._tensorboard))

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Know the epoch of the rows."""
        self._epoch = epoch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Write a row, if it is time."""
        if self._writers:
            self._write_row(self._every)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Write what is left, and log what has been since the last epoch."""
        if self._writers:
            self._write_row(1)
        now = self._read()
        if logs is not None:
            logs.update(now.since(self._of_epoch))
        self._of_epoch = now

    def on_train_end(self, logs: Any = None) -> None:
        """Measure no more."""
        self.model._open_windows().measure(is_on=False)
        self._files.close()

    def _read(self) -> _Reading:
        windows = self.model._open_windows()
        measures = windows.measure(is_on=True)
        return _Reading(measures, [each.read() for each in measures], windows.skipped)

    def _write_row(self, every: int) -> None:
        """Write what has been since the last row, if it is of so many updates."""
        now = self._read()
        if now.windows - self._of_row.windows < every:
            return
        count = iterations_of(self.model.optimizer)  # goes on where a run is resumed
        update = now.updates if count is None else int(count)
        row = {"epoch": self._epoch, "update": update, **now.since(self._of_row)}
        self._of_row = now
        for write in self._writers:
            write(row)

    def _table_writer(self, path: Union[str, os.PathLike[str]]) -> Callable[[Any], None]:
        opened = Path(path).open("w", newline="", encoding="utf-8")  # noqa: SIM115 (of a whole fit)
        file = self._files.enter_context(opened)
        table = csv_files.DictWriter(file, ["epoch", "update", *self._of_row.names])
        table.writeheader()

        def write(row: dict[str, Any]) -> None:
            table.writerow(row)
            file.flush()

        return write

    def _summary_writer(self, folder: Union[str, os.PathLike[str]]) -> Callable[[Any], None]:
        writer = tf.summary.create_file_writer(os.fspath(folder))
        self._files.callback(writer.close)

        def write(row: dict[str, Any]) -> None:
            with writer.as_default(step=row["update"]):
                for name, value in row.items():
                    if name not in ("epoch", "update"):
                        tf.summary.scalar(f"accumulation/{name}", value)

        return write


class _Reading(NamedTuple):
    """All that has been counted up to a moment."""

    measures: Sequence[Measures]
    #: Of each window's measures.
    sums: Sequence[Mapping[str, float]]
    #: Windows and micro-batches that were skipped.
    skipped: tuple[int, int]

    @property
    def updates(self) -> int:
        """The updates that were made."""
        return sum(int(sums[UPDATES]) for sums in self.sums)

    @property
    def windows(self) -> int:
        """The windows that have ended."""
        return self.updates + self.skipped[0]

    @property
    def names(self) -> list[str]:
        """All that can be logged."""
        return [name for names in self._names() for name in names.values()] + list(_SKIPPED)

    def since(self, earlier: _Reading) -> dict[str, float]:
        """What is logged of the time since an earlier reading."""
        logs: dict[str, float] = {}
        sums_before = [*earlier.sums, *[{}] * (len(self.sums) - len(earlier.sums))]
        for each, names, sums, before in zip(self.measures, self._names(), self.sums, sums_before):
            summary = each.summary(sums, before)
            logs.update((names[name], value) for name, value in summary.items())
        counts = zip(_SKIPPED, self.skipped, earlier.skipped)
        return {**logs, **{name: now - before for name, now, before in counts}}

    def _names(self) -> list[dict[str, str]]:
        """By window, what its measures are called in logs."""
        return [
            {name: f"{name}_{place}" if place else name for name in each.names}
            for place, each in enumerate(self.measures)
        ]
