"""verify_equivalence: the law, tried on the user's own model and data."""

from __future__ import annotations

import functools
import inspect
import itertools
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import attrs
import numpy as np
import tensorflow as tf

from ga_transform import _keras
from ga_transform.chain import Chain
from ga_transform.conversion import make_accumulating, strip_accumulating
from ga_transform.errors import REMEDY_OF_COPY, shown, wrong_type
from ga_transform.fields import check_count
from ga_transform.optimizer_state import iterations_of
from ga_transform.replicas import scope_of
from ga_transform.report.explanation import check_converted
from ga_transform.report.findings import BATCH_NORM, RANDOMNESS, findings_of, random_layers
from ga_transform.report.text import paragraph, table
from ga_transform.rewrites.batch_norm import batch_norms_of
from ga_transform.specs import Accumulate, BatchNorm, Split, Transform

__all__ = ["Equivalence", "VariableDifference", "verify_equivalence"]

#: A variable that hardly moves is measured by this share of what all have travelled.
_FLOOR = 1e-3
#: What rounding may add up to, by the dtypes that layers compute in; more has another cause.
_TOLERANCES = {"float64": 1e-9, "float32": 1e-3, "float16": 0.1, "bfloat16": 0.1}


@attrs.frozen
class VariableDifference:
    """How far a weight ends from where the large batch takes it."""

    name: str
    #: The largest difference of an element.
    absolute: float
    #: The same, in units of the distance that the weight has travelled on the large batch (its L2
    #: norm; of a weight that hardly moves, of a thousandth of what all weights have travelled).
    relative: float


@attrs.frozen
class Equivalence:
    """What `verify_equivalence` has found; `print` shows it."""

    #: The model's name.
    model: str
    chain: Chain
    #: By update, the rows of its micro-batches (of each batch, where `Split` cuts it).
    windows: tuple[tuple[int, ...], ...]
    #: All weights, in the model's order.
    variables: tuple[VariableDifference, ...]
    #: What `largest` may be of rounding alone.
    tolerance: float
    #: Where it is more: why, as far as that could be found out.
    causes: tuple[str, ...]

    @property
    def largest(self) -> float:
        """The largest relative difference of any weight."""
        return max((each.relative for each in self.variables), default=0.0)

    @property
    def is_exact(self) -> bool:
        """Whether no weight differs by more than rounding explains."""
        return self.largest <= self.tolerance

    def __str__(self) -> str:
        count = len(self.windows)
        rows = sum(map(sum, self.windows))
        lines = [
            f"{self.model}: {self.chain}",
            "",
            f"{count} update{'s' * (count > 1)} on {rows} rows, in micro-batches and on large batches",
            f"largest relative difference {self.largest:.1e}: "
            + ("the same but for rounding" if self.is_exact else "NOT the same"),
        ]
        for cause in self.causes:
            lines += paragraph(cause, "cause: ")
        rows_of_table = [("weight", "relative", "absolute")]
        rows_of_table += [
            (each.name, f"{each.relative:.1e}", f"{each.absolute:.1e}") for each in self.variables
        ]
        return "\n".join([*lines, "", *table(rows_of_table)])


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
        law holds. Else `report.causes` names layers that draw random numbers, or that normalise
        batches, if the difference vanishes without them; or all that may be a cause.

    Raises:
        TypeError: The model is not converted, or the data have no rows.
        ValueError: It is not compiled or not built, or cannot be copied; or there are too few rows.

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
    check_count(f"{owner}.updates", updates, "The default is 3.")
    data = x, y, sample_weight
    windows = _deal(owner, model, _rows_of(owner, data), updates)
    trial = _Trial(model, windows, data)
    differences = trial.run()
    report = Equivalence(
        model=model.name,
        chain=model._accumulating_chain,
        windows=tuple(tuple(batch.stop - batch.start for batch in window) for window in windows),
        variables=differences,
        tolerance=_tolerance_of(model),
        causes=(),
    )
    return (
        report
        if report.is_exact
        else attrs.evolve(report, causes=tuple(trial.causes(report.tolerance)))
    )


def _tolerance_of(model: Any) -> float:
    dtypes = {layer.compute_dtype for layer in _keras.flatten_layers(model) if layer.weights}
    return max(_TOLERANCES[dtype] for dtype in dtypes if dtype in _TOLERANCES)


# ---- the rows ----------------------------------------------------------------------------------


def _rows_of(owner: str, data: Any) -> int:
    """The number of rows that all parts of the data have."""
    parts = [part for part in tf.nest.flatten(data) if part is not None]
    for part in parts:
        if not hasattr(part, "shape") or not hasattr(part, "__getitem__"):
            raise wrong_type(
                f"{owner}.x, y and sample_weight", "arrays or tensors", part,
                "Of a dataset, pass the rows of some batches.",
            )  # fmt: skip
    counts = {int(part.shape[0]) if len(part.shape) else -1 for part in parts}
    if len(counts) != 1 or counts == {-1}:
        found = ", ".join(shown(part.shape) for part in parts)
        raise ValueError(
            f"{owner}.x, y and sample_weight must have as many rows each; got shapes {found}. "
            "Pass the rows of one data set."
        )
    return counts.pop()


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
    count = iterations_of(model.optimizer)
    for update in itertools.count(0 if count is None else int(count)):
        yield steps[max(start for start in steps if start <= update)]


# ---- the trial ---------------------------------------------------------------------------------


class _Trial(NamedTuple):
    """Two copies of a model, trained and compared."""

    model: Any
    windows: Sequence[Sequence[slice]]
    data: Any

    def run(self, without: Collection[str] = ()) -> tuple[VariableDifference, ...]:
        """How far the copies end from each other.

        Args:
            without: What is left out of both: `RANDOMNESS`, `BATCH_NORM`, or both of these.
        """
        chain = self.model._accumulating_chain
        with warnings.catch_warnings():  # the user has seen those of the model itself
            warnings.simplefilter("ignore")
            copies = [
                _copy(self.model, _frozen(specs) if BATCH_NORM in without else specs)
                for specs in (list(chain), _of_large_batch(self.model))
            ]
            start = [np.array(each) for each in _values(copies[0])]
            for each in copies if RANDOMNESS in without else ():
                _quieten(each)
            in_micro_batches, on_large_batches = copies
            for window in self.windows:
                for batch in window:
                    self._train(in_micro_batches, batch)
                self._train(on_large_batches, slice(window[0].start, window[-1].stop))
        return _differences(self.model, in_micro_batches, on_large_batches, start)

    def _train(self, model: Any, rows: slice) -> None:
        x, y, sample_weight = (
            None if part is None else tf.nest.map_structure(lambda each: each[rows], part)
            for part in self.data
        )
        model.train_on_batch(x, y, sample_weight)

    def causes(self, tolerance: float) -> Iterator[str]:
        """What makes a difference, found by leaving it out of both copies."""
        random = [layer.name for layer in random_layers(self.model)]
        norms = [each.name for each in batch_norms_of(self.model) if each.trainable]
        suspects = {RANDOMNESS} if random else set()
        suspects |= {BATCH_NORM} if norms else set()

        def differ(without: Collection[str]) -> bool:
            return max(each.relative for each in self.run(without)) > tolerance

        findings = [each for each in findings_of(self.model) if each.verdict != "exact"]
        if suspects and not differ(suspects):
            # Each is to blame if there is a difference without the other.
            to_blame = {
                each for each in suspects if len(suspects) == 1 or differ(suspects - {each})
            }
            findings = [each for each in findings if each.subject in to_blame]
        yield from map(str, findings)
        if not findings:
            yield (
                "not found out. A loss or a layer may couple the rows of a batch, draw random "
                "numbers by itself, or take a mean over something else than rows "
                "(Accumulate(weighting=...))"
            )


def _of_large_batch(model: Any) -> list[Transform]:
    """What stays of a chain where a window is one batch; nothing, if that is a plain model."""
    chain = model._accumulating_chain
    rewrites = [
        spec
        for spec in chain
        if spec.role == "rewrite" and not (isinstance(spec, BatchNorm) and spec.mode != "freeze")
    ]
    # Plain tf_keras averages the means of replicas, whatever rows they have.
    has_replicas = model.distribute_strategy.num_replicas_in_sync > 1
    if not (rewrites or chain.update_stages or has_replicas):
        return []
    single = attrs.evolve(chain.find(Accumulate) or Accumulate(1), steps=1)
    return [*rewrites, single, *chain.update_stages]


def _frozen(specs: Sequence[Transform]) -> list[Transform]:
    """A chain that freezes batch normalisation."""
    others = [spec for spec in specs if not isinstance(spec, BatchNorm)]
    place = sum(spec.role == "rewrite" for spec in others)
    return [*others[:place], BatchNorm("freeze"), *others[place:]]


def _copy(model: Any, specs: Sequence[Transform]) -> Any:
    """A copy with another chain, or a plain one."""
    with scope_of(model):
        try:
            copy = strip_accumulating(model)
        except ValueError as error:
            reason = str(error).replace(f" {REMEDY_OF_COPY}", "")
            raise ValueError(
                f"verify_equivalence.model must be one that can be copied; got {model.name!r}: "
                f"{reason} Give its class a get_config, or try a smaller model of the same parts."
            ) from error
        return make_accumulating(copy, transforms=Chain(*specs), inplace=True) if specs else copy


def _quieten(model: Any) -> None:
    """Have layers that draw random numbers be called as in inference."""
    for layer in random_layers(model):
        layer.call = _as_in_inference(layer.call)


def _as_in_inference(call: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(call)

    @functools.wraps(call)
    def quiet(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.arguments["training"] = False
        return call(*bound.args, **bound.kwargs)

    return quiet


# ---- the differences ---------------------------------------------------------------------------


def _values(model: Any) -> list[Any]:
    return [weight.numpy() for weight in _keras.weights_of(model)]


def _differences(
    model: Any, ours: Any, theirs: Any, start: Sequence[Any]
) -> tuple[VariableDifference, ...]:
    named = [weight.name for weight in _keras.weights_of(model)]
    ends = [[np.asarray(value, np.float64) for value in _values(each)] for each in (ours, theirs)]
    travelled = [np.linalg.norm((end - value).ravel()) for end, value in zip(ends[1], start)]
    floor = _FLOOR * np.linalg.norm(travelled)
    found = []
    for name, own, other, distance in zip(named, *ends, travelled):
        absolute = float(np.max(np.abs(own - other), initial=0.0))
        unit = max(distance, floor)
        relative = absolute / unit if unit else absolute
        found.append(VariableDifference(name, absolute, float(relative)))
    return tuple(found)
