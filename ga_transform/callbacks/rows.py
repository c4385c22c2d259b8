"""Where the rows of a log are written: a table in CSV, summaries for TensorBoard."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Union

import tensorflow as tf

__all__ = ["Row", "Summaries", "Table"]

Row = Mapping[str, Union[int, float]]


class Table:
    """A file in CSV, which gets the columns that its rows have.

    Args:
        path: Where it is.
        append: Whether to go on with what is there.
    """

    def __init__(self, path: Union[str, os.PathLike[str]], *, append: bool) -> None:
        self._path = Path(path)
        with self._path.open("a+" if append else "w+", newline="", encoding="utf-8") as file:
            file.seek(0)
            text = file.read()
            if text and not text.endswith("\n"):  # a run was ended while it wrote
                file.write("\r\n")
        self._names = next(csv.reader(text.lstrip("\ufeff").splitlines()), [])

    def write(self, row: Row) -> None:
        """Write a row. The file is open no longer than that, however the run ends."""
        if not row.keys() <= set(self._names):
            self._add_columns(row)
        with self._path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._names).writerow(row)

    def _add_columns(self, row: Row) -> None:
        """Write the table anew, with the columns that a row has and the table has not."""
        with self._path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
        self._names += [name for name in row if name not in self._names]
        with self._path.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, self._names, extrasaction="ignore")  # a line too long
            table.writeheader()
            table.writerows(rows)


class Summaries:
    """Scalars for TensorBoard, at the count of updates.

    Args:
        folder: Where their file is made.
    """

    def __init__(self, folder: Union[str, os.PathLike[str]]) -> None:
        self._writer = tf.summary.create_file_writer(os.fspath(folder))

    def write(self, row: Row) -> None:
        """Write a row."""
        with self._writer.as_default(step=row["update"]):
            for name, value in row.items():
                if name not in ("epoch", "update"):
                    tf.summary.scalar(f"accumulation/{name}", value)
        self._writer.flush()
