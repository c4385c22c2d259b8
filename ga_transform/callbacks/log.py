"""AccumulationLog: what accumulation does, in logs, in a table and in TensorBoard."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple, Union

from tf_keras import callbacks as keras_callbacks

from ga_transform import _keras
from ga_transform.callbacks.rows import Summaries, Table
from ga_transform.errors import wrong_type, wrong_value
from ga_transform.fields import check_count
from ga_transform.measures import Sums
from ga_transform.optimizer_state import updates_of

__all__ = ["AccumulationLog"]


class AccumulationLog(keras_callbacks.Callback):  # type: ignore[misc]
    """Log what the updates of a converted model are like.

    Into the logs of each epoch it puts, over the epoch's updates:

    - `updates`: how many were made;
    - `gradient_norm`: the mean of the joint L2 norm of all gradients, before any stage;
    - `clipped_gradient_norm`: the same after the stages, where the chain has any;
    - `clipped_share`: of the units that a clip may clip, those that it has clipped, from 0 to 1
      (`ClipByAGC`: units of weights; `ClipByNorm`: gradients; `ClipByGlobalNorm`: updates;
      `ClipByValue`: elements). With several clips, `clipped_share_ClipByAGC` and so on; of two of
      a kind, `clipped_share_stage_2_ClipByNorm`, where the update's second stage is one;
    - `micro_batches_per_update`: their mean number, those included that were left out;
    - `partial_windows`: how many were flushed;
    - `skipped_windows`: updates that were not made, because their gradients were not finite;
    - `skipped_micro_batches`: those that were left out of their windows.

    They stand in `fit(...).history`, and callbacks after this one (CSVLogger, TensorBoard) write
    them. Of several optimizers that are handed gradients, the names of the second and later ones
    end in `_1`, `_2`, ... Without this callback nothing of it is computed; each fit with it traces
    the training function once more, and so does the first fit after.

    Args:
        csv: A file for a table with a row for each `every` updates, written over. A window that
            comes later than the first row adds its columns to the table.
        tensorboard: A folder for summaries of the same.
        every: Updates a row, >= 1: counts are their sums, all else is their mean. A row is
            written when a batch ends, so one that ends an epoch, or a call of several steps, may
            be of fewer or more.
        append: Whether to go on with the table that is there, as where a run is resumed. What is
            done over again then stands in it twice.

    Raises:
        TypeError: An argument has a wrong type; or, in `fit`, the model is not converted.
        ValueError: `every` is < 1, or a path is empty.
        OSError: In `fit`, before it trains: a file cannot be written.

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
        append: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("csv", csv), ("tensorboard", tensorboard)):
            owner, rule, remedy = f"AccumulationLog.{name}", "a path", "None writes none."
            if value is not None and not isinstance(value, (str, os.PathLike)):
                raise wrong_type(owner, rule, value, remedy)
            if value == "":
                raise wrong_value(owner, rule, value, remedy)
        check_count("AccumulationLog.every", every, "The default is 1.")
        if not isinstance(append, bool):
            raise wrong_type(
                "AccumulationLog.append", "True or False", append, "The default is False."
            )
        self._every, self._append = every, append
        self._csv, self._tensorboard = csv, tensorboard
        self._writers: list[Union[Table, Summaries]] = []

    def on_train_begin(self, logs: Any = None) -> None:
        """Open the files, and begin to measure."""
        if getattr(self.model, "_open_windows", None) is None:
            raise wrong_type(
                "AccumulationLog", "given to fit of a converted model", self.model,
                "Convert it with make_accumulating.",
            )  # fmt: skip
        self._writers = []
        if self._csv is not None:
            self._writers.append(Table(self._csv, append=self._append))
        if self._tensorboard is not None:
            self._writers.append(Summaries(self._tensorboard))
        #: By window, what its names end in.
        self._suffixes: dict[Any, str] = {}
        self._read()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Know where the epoch begins, and its first row: by now, a backup has been restored."""
        self._epoch = epoch
        self._of_epoch = self._of_row = self._read()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Write a row, if it is time."""
        if self._writers:
            self._write_row(self._every)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Write what is left, and log what has been in the epoch."""
        if self._writers:
            self._write_row(1)
        if logs is not None:
            logs.update(self._read().since(self._of_epoch))

    def on_train_end(self, logs: Any = None) -> None:
        """Measure no more."""
        self.model._open_windows().measure(is_on=False)
        self._writers = []

    def _read(self) -> _Reading:
        windows = self.model._open_windows()
        measures = windows.measure(is_on=True)
        for key in measures:  # those that come later come last, so that no name changes
            self._suffixes.setdefault(key, f"_{len(self._suffixes)}" if self._suffixes else "")
        sums = {self._suffixes[key]: each.read() for key, each in measures.items()}
        # Their own counts go on where a run is resumed; an optimizer made of others may have none.
        counts = [updates_of(optimizer) for optimizer in _keras.optimizers_within(self.model)]
        counts += [int(each.updates) for each in sums.values()]
        return _Reading(max(counts, default=0), sums, *windows.skipped)

    def _write_row(self, every: int) -> None:
        """Write what has been since the last row, if it is of so many updates."""
        now = self._read()
        if now.windows - self._of_row.windows < every:
            return
        row = {"epoch": self._epoch, "update": now.updates, **now.since(self._of_row)}
        self._of_row = now
        for writer in self._writers:
            writer.write(row)


class _Reading(NamedTuple):
    """All that has been counted up to a moment."""

    #: Of the optimizer that has made the most.
    updates: int
    #: Of each window, by what its names end in.
    sums: Mapping[str, Sums]
    skipped_windows: int
    skipped_micro_batches: int

    @property
    def windows(self) -> int:
        """The windows that have ended."""
        return self.updates + self.skipped_windows

    def since(self, earlier: _Reading) -> dict[str, Union[int, float]]:
        """What is logged of the time since an earlier reading."""
        logs: dict[str, Union[int, float]] = {}
        for suffix, sums in self.sums.items():
            changes = sums.since(earlier.sums.get(suffix))
            logs.update((f"{name}{suffix}", value) for name, value in changes.items())
        for name in ("skipped_windows", "skipped_micro_batches"):
            logs[name] = getattr(self, name) - getattr(earlier, name)
        return logs
