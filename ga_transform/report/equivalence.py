"""verify_equivalence: the law, tried on the user's own model and data."""

from __future__ import annotations

import contextlib
import itertools
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Optional

import attrs
import numpy as np
import tensorflow as tf

from ga_transform import _keras
from ga_transform.chain import Chain
from ga_transform.errors import shown, wrong_type
from ga_transform.fields import check_count
from ga_transform.optimizer_state import updates_of
from ga_transform.report.copies import is_in_16_bits
from ga_transform.report.differences import VariableDifference, largest_of
from ga_transform.report.explanation import check_converted
from ga_transform.report.finding import Finding
from ga_transform.report.of_layers import stateful_layers
from ga_transform.report.text import paragraph, table
from ga_transform.report.trial import Trial
from ga_transform.specs import Accumulate, Split

__all__ = ["Equivalence", "verify_equivalence"]

#: What rounding may add up to, by the dtypes of weights; more has another cause. (What computes in
#: 16 bits with weights in 32 is tried in 32.)
_TOLERANCES = {"float64": 1e-9, "float32": 1e-3, "float16": 0.1, "bfloat16": 0.1}


@attrs.frozen
class Equivalence:
    """What `verify_equivalence` has found; `print` shows it."""

    #: The model's name.
    model: str
    chain: Chain
    #: The class of its optimizer.
    optimizer: str
    #: By update, the rows of its micro-batches (of each batch, where `Split` cuts it).
    windows: tuple[tuple[int, ...], ...]
    #: All weights, in the model's order.
    variables: tuple[VariableDifference, ...]
    #: What `largest` may be of rounding alone.
    tolerance: float
    #: Where it is more, or nothing could be compared: why, as far as that was found out.
    causes: tuple[Finding, ...] = ()
    #: Of an exact model that computes in 16 bits: how far these take a weight, at most, from where
    #: float32 does, in units of its way. All other figures are those of float32.
    of_16_bits: Optional[float] = None

    @property
    def largest(self) -> float:
        """The largest relative difference of any weight; NaN where one has become NaN."""
        return largest_of(self.variables)

    @property
    def is_exact(self) -> bool:
        """Whether updates were made, all of them, and no weight differs but for rounding."""
        return not self.causes

    def __str__(self) -> str:
        count = len(self.windows)
        rows = sum(map(sum, self.windows))
        lines = [
            f"{self.model}: {self.chain}",
            "",
            f"{count} update{'s' * (count > 1)} on {rows} rows, in micro-batches and on large batches",
            f"largest relative difference {self.largest:.1e}: " + self._verdict(),
        ]
        uncounted = [each.name for each in self.variables if each.uncounted]
        if uncounted:
            lines += paragraph(
                f"rounding, which {self.optimizer} enlarges in {', '.join(uncounted)}: gradients "
                "there are zero but for it",
                "not counted: ",
            )
        if self.of_16_bits is not None:
            lines.append(f"tried in float32, from where 16 bits differ by {self.of_16_bits:.1e}")
        for cause in self.causes:
            lines += paragraph(str(cause), "cause: ")
            if cause.remedy:
                lines += paragraph(cause.remedy, "mend:  ")
        rows_of_table = [("weight", "relative", "absolute")]
        rows_of_table += [
            (each.name, f"{each.relative:.1e}", f"{each.absolute:.1e}") for each in self.variables
        ]
        return "\n".join([*lines, "", *table(rows_of_table)])

    def _verdict(self) -> str:
        if self.is_exact:
            return "the same but for rounding"
        return "this shows NOTHING" if self.largest <= self.tolerance else "NOT the same"


def verify_equivalence(
    model: Any, x: Any, y: Any = None, sample_weight: Any = None, *, updates: int = 3
) -> Equivalence:
    """Try the law: train copies in micro-batches and on the large batch, and compare the weights.

    The model is not touched. One copy is trained as the model would be; the other makes each
    update on the rows of the window at once (with the chain's rewrites, and its stages after
    `Accumulate`). Rows are dealt out in order, as evenly as they go.

    Args:
        model: A converted, compiled and built model that can be copied.
        x, y, sample_weight: Arrays or tensors with as many rows each, or structures of them, as
            for `fit`. All rows are used. With `micro_batch_size`, a batch is as many rows as there
            are for each update, divided by `accum_steps`.
        updates: How many to make, >= 1.

    Returns:
        Data that prints as a table. `report.largest` is small, and `report.is_exact`, where the
        law holds. Else `report.causes` has findings, each with a `subject`, `names`, `why` and
        `remedy`: random numbers, batch normalisation or a weighting, if the difference vanishes
        without them; or all that may be a cause. Nothing is exact where updates were skipped, or
        no weight has moved. What computes in 16 bits is tried in float32, and what 16 bits change
        is told besides.

    Raises:
        TypeError: The model is not converted, or the data have no rows.
        ValueError: It is not compiled or not built, is stateful, or cannot be copied; there are
            too few rows, or not as many in all parts of the data.

    Example:
        >>> import numpy as np, tf_keras, ga_transform as ga
        >>> model = tf_keras.Sequential([tf_keras.Input([4]), tf_keras.layers.Dense(1)])
        >>> model.compile("adam", "mse")
        >>> model = ga.make_accumulating(model, accum_steps=4)
        >>> x, y = np.random.normal(size=[50, 4]), np.random.normal(size=[50, 1])
        >>> report = ga.verify_equivalence(model, x, y)
        >>> assert report.largest < 1e-4, report
    """
    owner = "verify_equivalence"
    check_converted(f"{owner}.model", model)
    if not model._is_compiled or not model.built:
        raise ValueError(
            f"{owner}.model must be compiled and built; got {model.name!r}, which is not. "
            "Compile it, and call it on a batch."
        )
    stateful = ", ".join(layer.name for layer in stateful_layers(model))
    if stateful:
        raise ValueError(
            f"{owner}.model must have no stateful layers; got {stateful} in {model.name!r}. Their "
            "states go from batch to batch, and no large batch does the same: try stateful=False."
        )
    check_count(f"{owner}.updates", updates, "The default is 3.")
    rows = _rows_of(owner, (x, y, sample_weight))
    windows = _deal(owner, model, rows, updates)
    data = x, y, None if sample_weight is None else _filled(sample_weight, rows)
    trial = Trial(model, windows, data, _tolerance_of(model))
    with _unheard():
        outcome = trial.run()
        causes = tuple(trial.causes(outcome))
        has_more = is_in_16_bits(model) and not causes
        of_16_bits = trial.of_16_bits(outcome) if has_more else None
    return Equivalence(
        model=model.name,
        chain=model._accumulating_chain,
        optimizer=type(getattr(model.optimizer, "inner_optimizer", model.optimizer)).__name__,
        windows=tuple(tuple(batch.stop - batch.start for batch in window) for window in windows),
        variables=outcome.differences,
        tolerance=trial.tolerance,
        causes=causes,
        of_16_bits=of_16_bits,
    )


def _tolerance_of(model: Any) -> float:
    dtypes = {layer.variable_dtype for layer in _keras.flatten_layers(model) if layer.weights}
    known = [_TOLERANCES[dtype] for dtype in dtypes if dtype in _TOLERANCES]
    return max(known, default=_TOLERANCES["float32"])


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    """Keep what copies warn of from the user, who has heard it of the model itself."""
    logger = tf.get_logger()
    level = logger.level
    logger.setLevel(logging.ERROR)  # that a function is traced for batches of another size
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


# ---- the rows ----------------------------------------------------------------------------------


def _rows_of(owner: str, data: Any) -> int:
    """The number of rows that all parts of the data have."""
    parts = [part for part in tf.nest.flatten(data) if part is not None]
    for part in parts or [None]:
        # A scalar has no rows, and of a dataset they are not known.
        if not (hasattr(part, "__getitem__") and len(getattr(part, "shape", ()))):
            raise wrong_type(
                f"{owner}.x, y and sample_weight", "arrays or tensors of rows", part,
                "Of a dataset, pass the rows of some batches.",
            )  # fmt: skip
    counts = {int(part.shape[0]) for part in parts}
    if len(counts) != 1:
        found = ", ".join(shown(part.shape) for part in parts)
        raise ValueError(
            f"{owner}.x, y and sample_weight must have as many rows each; got shapes {found}. "
            "Pass the rows of one data set."
        )
    return counts.pop()


def _filled(sample_weight: Any, rows: int) -> Any:
    """Sample weights of all outputs: `train_on_batch` of tf_keras 2.15 takes no None for one."""
    return tf.nest.map_structure(
        lambda each: np.ones(rows) if each is None else each, sample_weight
    )


def _deal(owner: str, model: Any, rows: int, updates: int) -> list[list[slice]]:
    """By update, the rows of its batches."""
    chain = model._accumulating_chain
    steps = list(itertools.islice(_steps_from(model), updates))
    split = chain.find(Split)
    needed = sum(steps) * (1 if split is None else split.micro_batch_size + 1)
    if rows < needed:
        raise ValueError(
            f"{owner}.x must have at least {needed} rows for {updates} updates of {chain}; got "
            f"{rows}. Pass more rows, or ask for fewer updates."
        )
    edges = np.linspace(0, rows, sum(steps) + 1).round().astype(int).tolist()
    batches = iter([slice(*pair) for pair in zip(edges, edges[1:])])
    return [list(itertools.islice(batches, count)) for count in steps]


def _steps_from(model: Any) -> Iterator[int]:
    """The batches of each update from here on."""
    accumulate = model._accumulating_chain.find(Accumulate)
    steps = 1 if accumulate is None else accumulate.steps
    if not isinstance(steps, Mapping):
        yield from itertools.repeat(steps)
        return
    for update in itertools.count(updates_of(model.optimizer)):
        yield steps[max(start for start in steps if start <= update)]
