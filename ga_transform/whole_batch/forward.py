"""The first step: all slices of a batch are passed through the model, and their outputs kept."""

from __future__ import annotations

from typing import Any, NamedTuple, Optional

import tensorflow as tf

from ga_transform import _graphs, _keras
from ga_transform.batch_logs import take_slices
from ga_transform.loops import SliceFunction, fold, with_remainder
from ga_transform.loss_terms import widened_outputs
from ga_transform.repeating import (
    State,
    changed_eagerly,
    unrepeatable_layers,
    unrepeatable_operations,
)
from ga_transform.rows import count_rows
from ga_transform.slices import Slices
from ga_transform.whole_batch.outputs import (
    array_from,
    checked_outputs,
    concatenated,
    coupled_outputs,
    masks_of,
    may_be_coupled,
    put_rows,
    with_room_for,
    write_rows,
)
from ga_transform.whole_batch.seen import Seen
from ga_transform.windows import Windows

__all__ = ["Forward", "activations_of", "pass_forward"]


class Forward(NamedTuple):
    """What a model has made of a batch."""

    #: With their masks, in the structure that the model returns.
    outputs: Any
    #: What activity regularisers and `add_loss` gave. Shape: scalars.
    activations: list[tf.Tensor]
    #: What the variables were that have changed.
    state: State


class _Layout(NamedTuple):
    """How the tensors of a slice make up what the model returned for it."""

    structure: Any
    #: By output; None where it is None.
    shapes: list[Optional[tf.TensorShape]]
    has_mask: list[bool]

    def pack(self, tensors: list[tf.Tensor]) -> Any:
        """Outputs, with their masks, of tensors that are outputs and then masks."""
        ahead = iter(tensors)
        outputs: list[Any] = [None if shape is None else next(ahead) for shape in self.shapes]
        for output, has_mask in zip(outputs, self.has_mask):
            if has_mask:
                output._keras_mask = next(ahead)
        return tf.nest.pack_sequence_as(self.structure, outputs)


#: Outputs and then masks of a slice; and its activity losses.
_Kept = tuple[list[tf.Tensor], list[tf.Tensor]]


def activations_of(model: Any, share: tf.Tensor) -> list[tf.Tensor]:
    """What activity regularisers and `add_loss` gave for a slice, times its share of the rows.

    They are taken for means over rows, as they must be in a plain model to mean the same for
    batches of any size.
    """
    losses = widened_outputs(_keras.activation_losses(model))
    return [loss * tf.cast(share, loss.dtype) for loss in losses]


def pass_forward(model: Any, windows: Windows, slices: Slices, seen: Seen) -> Forward:
    """Pass all slices of a batch through the model, without keeping what is between.

    Args:
        model: The converted model.
        windows: The windows of its optimizers.
        slices: Of the inputs of the batch.
        seen: The rows that its loss will see.

    Raises:
        ValueError, TypeError: An output does not stand row by row.
    """
    layouts: list[_Layout] = []

    def run(index: tf.Tensor, tensors: list[Any]) -> _Kept:
        x = slices.pack(tensors)
        share = seen.share(x)
        if not tf.executing_eagerly():
            windows.hold_pass_counters(index)
        with take_slices(model, lambda: share):
            y_pred = model(x, training=True)
        given = tf.nest.flatten(y_pred)
        outputs = checked_outputs(given, count_rows(x), slices.rows_a_slice)
        masks = masks_of(given)
        layouts.append(
            _Layout(
                tf.nest.map_structure(lambda _: None, y_pred),
                [None if each is None else each.shape for each in outputs],
                [each is not None for each in masks],
            )
        )
        tensors = [each for each in (*outputs, *masks) if each is not None]
        return tensors, activations_of(model, share)

    if tf.executing_eagerly():
        state = State(changed_eagerly(model, windows.draws))
        with _graphs.noting_operations() as kinds:
            tensors, activations = _run_eagerly(slices, run)
        _warn_of_draws(model, windows, unrepeatable_operations(kinds))
    else:
        function = SliceFunction(slices, run)
        _check_rows_stand_alone(model, slices, layouts[-1])
        _warn_of_draws(model, windows, unrepeatable_layers(model, function.traced))
        state = State(_graphs.written_by(function.traced))
        tensors, activations = _run_in_graph(slices, function)
    return Forward(layouts[-1].pack(tensors), seen.sum(activations), state)


def _run_eagerly(slices: Slices, run: Any) -> _Kept:
    of_slices = [run(index, slices.take(index)) for index in tf.range(slices.total)]
    return (
        [concatenated(rows) for rows in zip(*(each[0] for each in of_slices))],
        [tf.add_n(losses) for losses in zip(*(each[1] for each in of_slices))],
    )


def _run_in_graph(slices: Slices, function: SliceFunction) -> _Kept:
    def write(so_far: Any, index: tf.Tensor, tensors: list[Any]) -> Any:
        rows, losses = function(index, tensors)
        each = zip(so_far[0], rows, first)
        arrays = [write_rows(array, index, part, like) for array, part, like in each]
        return arrays, list(map(tf.add, so_far[1], losses))

    def put(so_far: Any, index: tf.Tensor, tensors: list[Any]) -> Any:
        rows, losses = function(index, tensors)
        start = index * slices.size
        whole = [put_rows(each, start, part) for each, part in zip(so_far[0], rows)]
        return whole, list(map(tf.add, so_far[1], losses))

    # The first slice stands before the loop, which must know the shapes of what it carries: a
    # list of slices, as rows that are put into a batch cost a copy of it.
    first, losses = function(tf.zeros_like(slices.count), slices.take(0))
    arrays = [array_from(each, slices.count) for each in first]
    _, (arrays, losses) = fold(slices, write, (arrays, losses), first=1)
    outputs = [array.concat() for array in arrays]
    if slices.may_have_remainder:
        outputs = [with_room_for(each, slices.rows) for each in outputs]
    return with_remainder(slices, put, (outputs, losses))  # type: ignore[no-any-return]


# ---- what cannot be, or not twice --------------------------------------------------------------


def _check_rows_stand_alone(model: Any, slices: Slices, layout: _Layout) -> None:
    """Refuse outputs that couple the rows of a slice, as far as shapes can tell."""
    known = slices.rows_a_slice
    if not may_be_coupled(layout.shapes, known):
        return
    found = list[list[Optional[tf.TensorShape]]]()  # AutoGraph refuses an annotation

    def call(index: tf.Tensor, tensors: list[Any]) -> None:
        outputs = tf.nest.flatten(model(slices.pack(tensors), training=True))
        found.append([None if output is None else output.shape for output in outputs])

    rows = known or slices.micro_batch_size
    for each in (rows, 2 * rows):  # a model may take rows in pairs, or in groups
        SliceFunction(slices, call, each)
    coupled = coupled_outputs(*found[-2:])
    if coupled:
        raise ValueError(
            "Split.whole_batch_loss must be given a model whose rows stand alone; got "
            f"{model.name!r}, whose output {coupled[0]} is of all rows of a slice for each of "
            "them. Return what is of each row (embeddings), and take their scores in the loss."
        )


def _warn_of_draws(model: Any, windows: Windows, drawing: list[str]) -> None:
    """Say, once, where a second pass cannot draw as the first."""
    if drawing:
        windows.warn_once(
            "draws",
            f"{model.name}: {', '.join(drawing)} draws random numbers that cannot be drawn again, "
            "and whole_batch_loss passes each slice through the model twice, so gradients are of "
            "other draws than the loss. Draw by a tf.random.Generator that the layer holds, or by "
            "layers of tf_keras.",
        )
