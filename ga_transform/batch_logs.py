"""What a batch logs that is run in slices: what the plain model logs of the whole batch.

Metrics that count rows take slices as they come. What else there is counts batches: the loss's
own metrics, and means of one number a batch. Those hear of the batch when its slices are done,
or of each slice as its share of the rows.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import tensorflow as tf
from tf_keras import metrics as keras_metrics

from ga_transform import _graphs, _keras
from ga_transform.loss_terms import SUM, LossCall, LossTerm, is_by_rows

__all__ = ["Kept", "keep_logs", "keep_loss", "take_slices"]

#: The operations that call a function.
_CALLS = ("PartitionedCall", "StatefulPartitionedCall")

#: What becomes of a tensor of a slice, when all slices are done.
Whole = Callable[[], Any]


class Kept:
    """The tensors that are kept of each slice: to be added up, or replaced by the next one's."""

    def __init__(self) -> None:
        self.sums: list[tf.Tensor] = []
        self.latest: list[tf.Tensor] = []

    def add_up(self, tensor: tf.Tensor) -> Whole:
        """Keep the sum over the slices."""
        self.sums.append(tensor)
        position = len(self.sums) - 1
        return lambda: self.sums[position]

    @staticmethod
    def as_it_is(value: Any) -> Whole:
        """What no slice has made."""
        return lambda: value

    def replace(self, tensor: Any) -> Whole:
        """Keep the last slice's; of ragged and sparse tensors, too."""
        parts = tf.nest.flatten(tensor, expand_composites=True)
        start = len(self.latest)
        self.latest.extend(parts)
        spec = tf.type_spec_from_value(tensor)

        def whole() -> Any:
            latest = self.latest[start : start + len(parts)]
            return tf.nest.pack_sequence_as(spec, latest, expand_composites=True)

        return whole


def keep_loss(
    call: LossCall, kept: Kept, share: tf.Tensor, batch_rows: tf.Tensor
) -> Callable[[], None]:
    """Keep what a call of the compiled loss gave for a slice.

    Args:
        call: Its metrics have not been told of it.
        kept: Where to.
        share: Of the batch's rows, those of the slice. Shape: scalar, float64.
        batch_rows: The batch's rows, seen from outside. Shape: scalar.

    Returns:
        Tells the metrics of the batch.
    """
    terms = [_keep_term(term, kept, share) for term in call.terms]
    # Means over rows, and what is the same for all of them.
    losses = [] if call.regularization is None else [call.regularization]
    regularization = [kept.add_up(_times(loss, share)) for loss in losses]

    def tell() -> None:
        call._replace(
            terms=[whole() for whole in terms],
            regularization=regularization[0]() if regularization else None,
            rows=None if call.rows is None else tf.cast(batch_rows, tf.float64),
        ).tell_metrics()

    return tell


def _keep_term(term: LossTerm, kept: Kept, share: tf.Tensor) -> Callable[[], LossTerm]:
    if term.value.shape.rank != 0:
        value = kept.add_up(tf.reduce_sum(term.value))
        elements = kept.add_up(tf.cast(tf.size(term.value), tf.float64))
        # tf_keras takes the mean of its elements, each of which weighs the rows of its batch.
        return lambda: term._replace(value=_quotient(value(), elements()), elements=elements())
    if term.kind == SUM:
        value = kept.add_up(term.value)
    elif term.divided_by is None or is_by_rows(term):
        value = kept.add_up(_times(term.value, share))
    else:
        total = kept.add_up(_times(term.value, term.divided_by))
        count = kept.add_up(term.divided_by)
        return lambda: term._replace(value=_quotient(total(), count()))
    return lambda: term._replace(value=value())


def _times(value: tf.Tensor, weight: tf.Tensor) -> tf.Tensor:
    # What has no rows may be 0 / 0.
    return tf.math.multiply_no_nan(value, tf.cast(weight, value.dtype))


def _quotient(value: tf.Tensor, divisor: tf.Tensor) -> tf.Tensor:
    return tf.math.divide_no_nan(value, tf.cast(divisor, value.dtype))


def keep_logs(
    logs: Any,
    model: Any,
    kept: Kept,
    share: tf.Tensor,
    late: Collection[tf.Variable],
    warn_of_lateness: Callable[[], None],
) -> Whole:
    """Keep what `train_step` returned for a slice.

    Args:
        logs: Its results. Those of metrics are taken again when all slices are done, other
            numbers are means over rows, and the last slice's is kept of everything else, and of
            numbers that a graph computes from the state of metrics.
        model: The model, with its metrics.
        kept: Where to.
        share: Of the batch's rows, those of the slice. Shape: scalar, float64.
        late: The state of metrics that hear of the batch when all slices are done.
        warn_of_lateness: Called where a number is computed from these.

    Returns:
        Makes the logs of the batch.
    """
    results = _results(model)
    states = [state for metric in _keras.metrics_of(model) for state in metric.variables]
    by_name: dict[Any, Whole] = {metric.name: metric.result for metric in model.metrics}
    names = {id(leaf): name for name, leaf in logs.items()} if isinstance(logs, Mapping) else {}

    def keep(leaf: Any) -> Whole:
        if id(leaf) in results:
            return results[id(leaf)]
        if isinstance(leaf, tf.Variable):
            return leaf.read_value  # type: ignore[no-any-return]  # after the update
        if not tf.is_tensor(leaf):
            return kept.as_it_is(leaf)
        if _is_made_of(leaf, states):
            if _is_made_of(leaf, late):
                warn_of_lateness()
        elif leaf.dtype.is_floating and leaf.shape.rank == 0:
            mean = kept.add_up(_times(leaf, share))
            result = by_name.get(names.get(id(leaf)))
            return mean if result is None or not _is_taken_elsewhere(leaf, result) else result
        return kept.replace(leaf)

    leaves = [keep(leaf) for leaf in tf.nest.flatten(logs)]
    return lambda: tf.nest.pack_sequence_as(logs, [whole() for whole in leaves])


def _results(model: Any) -> dict[int, Whole]:
    """By the identity of the metrics' latest results, what takes them again."""
    found: dict[int, Whole] = {}
    for metric in _keras.metrics_of(model):
        latest = getattr(metric, "_call_result", None)
        if isinstance(latest, dict):
            for name, tensor in latest.items():
                found[id(tensor)] = functools.partial(_item_of_result, metric, name)
        elif latest is not None:
            found[id(latest)] = metric.result
    return found


def _is_taken_elsewhere(number: tf.Tensor, result: Whole) -> bool:
    """Whether a number under a metric's name is its result, taken in a function."""
    if not _graphs.is_symbolic(number):
        return bool(tf.reduce_all(tf.equal(number, tf.cast(result(), number.dtype))))
    operation = number.op
    while operation.type in ("Identity", "Cast"):
        operation = operation.inputs[0].op
    return operation.type in _CALLS


def _is_made_of(tensor: tf.Tensor, variables: Collection[tf.Variable]) -> bool:
    """Whether the graph of a tensor reads one of some variables to compute it."""
    if not _graphs.is_symbolic(tensor):
        return False
    handles = {id(variable.handle) for variable in variables}
    wanted = {inner.op.name for outer, inner in tensor.graph.captures if id(outer) in handles}
    seen, ahead = set[str](), [tensor.op]
    while wanted and ahead:
        operation = ahead.pop()
        inputs = [each.op for each in operation.inputs]
        # A function that is called may do anything with them.
        if operation.type not in _CALLS and wanted & {each.name for each in inputs}:
            return True
        if operation.name not in seen:
            seen.add(operation.name)
            ahead += inputs
    return False


def _item_of_result(metric: Any, name: str) -> Any:
    return metric.result()[name]


@contextmanager
def take_slices(model: Any, share: Callable[[], tf.Tensor]) -> Iterator[None]:
    """Have the model's metrics take what they are given for a slice of a batch.

    Means of one number a batch take a slice's as its share of the rows. Results, which are taken
    again after the slices, are those of one replica: none waits for others amidst its slices.

    Args:
        model: Its metrics, also those that `compile` was given and a first batch makes.
        share: Gives, of the batch's rows, those of the slice. Shape: scalar, float64.
    """
    with contextlib.ExitStack() as stack:
        prepared: set[int] = set()

        def prepare(metric: Any) -> None:
            is_mean = isinstance(metric, keras_metrics.Mean)
            replacement = _WEIGHED.get(type(metric).update_state) if is_mean else None
            if replacement is not None:
                update_state = functools.partial(replacement, metric, share)
                stack.enter_context(_replaced(metric, "update_state", update_state))
            if tf.distribute.has_strategy():
                result = functools.partial(_result_of_replica, metric)
                stack.enter_context(_replaced(metric, "result", result))

        def prepare_all() -> None:
            for metric in _keras.metrics_of(model):
                if id(metric) not in prepared:
                    prepared.add(id(metric))
                    prepare(metric)

        def build(own: Callable[..., None], *args: Any) -> None:
            own(*args)
            prepare_all()

        prepare_all()
        for container in (model.compiled_loss, model.compiled_metrics):
            if container is not None:
                stack.enter_context(_replaced(container, "build", build))
        yield


@contextmanager
def _replaced(owner: Any, name: str, replacement: Callable[..., Any]) -> Iterator[None]:
    """Put a function before an object's method, which it is given first."""
    own, is_of_object = getattr(owner, name), name in vars(owner)
    setattr(owner, name, functools.partial(replacement, own))
    try:
        yield
    finally:
        if is_of_object:
            setattr(owner, name, own)
        else:
            delattr(owner, name)


def _result_of_replica(metric: Any, own: Any, *args: Any) -> Any:
    metric._call_result = tf.nest.map_structure(tf.identity, own.__wrapped__(*args))
    return metric._call_result


def _update_mean(
    metric: Any, share: Callable[[], Any], own: Any, values: Any, sample_weight: Any = None
) -> Any:
    if sample_weight is None and tf.convert_to_tensor(values).shape.rank == 0:
        sample_weight = share()
    return own(values, sample_weight=sample_weight)


def _update_mean_of_function(
    metric: Any,
    share: Callable[[], Any],
    own: Any,
    y_true: Any,
    y_pred: Any,
    sample_weight: Any = None,
) -> Any:
    numbers = []

    def noted(function: Any, *args: Any, **kwargs: Any) -> Any:
        matches = function(*args, **kwargs)
        if sample_weight is not None or matches.shape.rank != 0:
            return matches
        numbers.append(matches)
        return matches[tf.newaxis][:0]  # adds nothing

    with _replaced(metric, "_fn", noted):
        own(y_true, y_pred, sample_weight=sample_weight)
    for number in numbers:
        keras_metrics.Mean.update_state(metric, number, sample_weight=share())


#: By the `update_state` of a class, what stands before it: for means of what they are given, and
#: of what their function returns.
_WEIGHED: Mapping[Any, Callable[..., Any]] = {
    keras_metrics.Mean.update_state: _update_mean,
    keras_metrics.MeanMetricWrapper.update_state: _update_mean_of_function,
}
