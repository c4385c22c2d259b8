"""The loss of a whole batch, in the memory of a slice of it: gradient caching.

Where a loss couples the rows of a batch, it is no mean of its slices' losses. Its gradient can be
had in slices nevertheless, as it comes to the weights through the outputs of the model only:

1. All slices are passed through the model, and nothing but their outputs is kept.
2. The loss is taken of the outputs of the whole batch, and its gradient with respect to these.
3. Each slice is passed through the model again, and the gradient of its outputs pulled back to
   the weights. The slices are micro-steps of one batch (`split.py`), whose gradients add up.

The second pass finds all that the first one found (`repeating.py`). After Gao et al. 2021,
"Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from ga_transform import _graphs, _keras
from ga_transform.batch_logs import take_slices
from ga_transform.loss_terms import MEAN, SUM, record_losses, total_of, widened_outputs
from ga_transform.micro_step import MicroStep
from ga_transform.outputs import (
    checked_outputs,
    coupled_outputs,
    may_be_coupled,
    put_rows,
    with_room_for,
)
from ga_transform.repeating import State, unrepeatable_layers
from ga_transform.replicas import count_replicas, gathered, index_of_replica, summed
from ga_transform.rows import count_rows
from ga_transform.slices import Slices
from ga_transform.specs import Precision, Split
from ga_transform.split import Slice, train_in_slices
from ga_transform.weighting import Weighting
from ga_transform.windows import Windows

__all__ = ["train_on_whole_batch"]


class _Pulls(NamedTuple):
    """The gradient of one kind of loss, with respect to all that comes of the model."""

    #: By output; None where the loss does not see it. Shape: as the output.
    outputs: list[tf.Tensor | None]
    #: By activity regulariser and `add_loss`. Shape: scalar.
    activations: list[tf.Tensor | None]
    #: By trainable variable, of what the loss makes of it directly. Shape: as the variable.
    variables: list[tf.Tensor | None]


def train_on_whole_batch(
    model: Any, windows: Windows, data: Any, split: Split, *, is_usual_loss: bool
) -> Any:
    """Run tf_keras's training step with the loss of a whole batch, slice by slice.

    Args:
        model: The converted model, whose `train_step` is tf_keras's own.
        windows: The windows of its optimizers.
        data: A batch, as Keras gives it to `train_step`.
        split: How many rows a slice has, and whose rows the loss sees.
        is_usual_loss: Whether `compute_loss` is tf_keras's own.

    Returns:
        The logs of the batch.
    """
    x, y, sample_weight = _keras.unpack_x_y_sample_weight(data)
    batch = _Batch(model, windows, x, split)
    with windows.draws.of_batch(model):
        outputs, activations, state = batch.pass_forward()
        pulls, weight = batch.differentiate(
            outputs, activations, y, sample_weight, is_usual_loss=is_usual_loss
        )
        state.restore()
        batch.pull_back(pulls, weight)
    return model.compute_metrics(x, y, outputs, sample_weight)


class _Batch:
    """The inputs of a batch, cut into slices.

    Args:
        model: The converted model.
        windows: The windows of its optimizers.
        x: The inputs, in any structure.
        split: How many rows a slice has, and whose rows the loss sees.
    """

    def __init__(self, model: Any, windows: Windows, x: Any, split: Split) -> None:
        self._model = model
        self._windows = windows
        self._x = x
        self._size = split.micro_batch_size
        self._slices = Slices(x, self._size, has_fixed_size=_graphs.is_compiled())
        #: Whether the loss sees the rows of all replicas.
        self._is_gathered = split.whole_batch_loss == "gathered" and count_replicas() > 1
        rows = tf.cast(self._slices.rows, tf.float64)
        #: That the loss sees. Shape: scalar, float64.
        self._rows = summed([rows])[0] if self._is_gathered else rows
        #: What the model has returned for a slice, without its values.
        self._structure: Any = None
        #: Of its outputs, the shapes, and which have a mask.
        self._shapes: list[tf.TensorShape] = []
        self._masked: list[int] = []

    def _share(self, x: Any) -> tf.Tensor:
        """Of the rows that the loss sees, those of a slice. Shape: scalar, float64."""
        rows = count_rows(x)
        one = tf.ones([], tf.float64)
        return one if rows is None else tf.math.divide_no_nan(rows, self._rows)

    # ---- first, the outputs --------------------------------------------------------------

    def pass_forward(self) -> tuple[Any, list[tf.Tensor], State]:
        """Pass all slices through the model.

        Returns:
            The outputs of the batch, with their masks; its activity regularisers and `add_loss`
            terms; and what the variables were that have changed.
        """
        if tf.executing_eagerly():
            run, changed = self._run, self._changed_eagerly()
        else:
            run = self._traced()
            changed = _graphs.written_by(run)
        state = State(changed)
        tensors, activations = self._run_all(run)
        outputs = tensors[: len(tensors) - len(self._masked)]
        for position, mask in zip(self._masked, tensors[len(outputs) :]):
            outputs[position]._keras_mask = mask
        if self._is_gathered and activations:
            activations = summed(activations)
        return tf.nest.pack_sequence_as(self._structure, outputs), activations, state

    def _run(self, index: tf.Tensor, *parts: Any) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
        """Outputs and masks of a slice; and activity losses, times its share of the rows."""
        x = self._packed(parts)
        share = self._share(x)
        if not tf.executing_eagerly():
            self._windows.hold_pass_counters(index)
        with take_slices(self._model, lambda: share):
            y_pred = self._model(x, training=True)
        outputs = tf.nest.flatten(y_pred)
        masks = [getattr(output, "_keras_mask", None) for output in outputs]
        self._structure = tf.nest.map_structure(lambda _: None, y_pred)
        self._masked = [place for place, mask in enumerate(masks) if mask is not None]
        outputs = checked_outputs(outputs, count_rows(x), self._slices.rows_a_slice)
        self._shapes = [output.shape for output in outputs]
        masks = [masks[place] for place in self._masked]
        return outputs + masks, self._activations(share)

    def _activations(self, share: tf.Tensor) -> list[tf.Tensor]:
        """What activity regularisers and `add_loss` gave for a slice, times its share of the rows.

        They are taken for means over rows, as they must be in a plain model to mean the same for
        batches of any size.
        """
        losses = widened_outputs(_keras.activation_losses(self._model))
        return [loss * tf.cast(share, loss.dtype) for loss in losses]

    def _packed(self, parts: Sequence[tf.Tensor]) -> Any:
        """The inputs of a slice."""
        specs = self._slices.specs()
        return self._slices.pack(tf.nest.pack_sequence_as(specs, parts, expand_composites=True))

    def _traced(self) -> Any:
        """`_run` as a function of the graph, of which there is one however many slices."""
        specs = _components(self._slices.specs())
        index_spec = tf.TensorSpec([], self._slices.count.dtype)
        with _keras.tracing_once():
            run = tf.function(self._run, autograph=False).get_concrete_function(index_spec, *specs)
        self._check_rows_stand_alone()
        layers = unrepeatable_layers(self._model, run)
        if layers:
            self._windows.warn_once(
                "draws",
                f"{self._model.name}: {', '.join(layers)} draws random numbers that cannot be "
                "drawn again, and whole_batch_loss passes each slice through the model twice, so "
                "gradients are of other draws than the loss. Draw by a tf.random.Generator that "
                "the layer holds, or by layers of tf_keras.",
            )
        return run

    def _check_rows_stand_alone(self) -> None:
        """Refuse outputs that couple the rows of a slice, as far as shapes can tell."""
        known = self._slices.rows_a_slice
        if not may_be_coupled(self._shapes, known):
            return
        found: list[tf.TensorShape] = []

        def call(*parts: Any) -> None:
            outputs = tf.nest.flatten(self._model(self._packed(parts), training=True))
            found.extend(output.shape for output in outputs)

        specs = self._slices.specs((known or self._size) + 1)
        with _keras.tracing_once():
            tf.function(call, autograph=False).get_concrete_function(*_components(specs))
        coupled = coupled_outputs(self._shapes, found)
        if coupled:
            raise ValueError(
                "Split.whole_batch_loss must be given a model whose rows stand alone; got "
                f"{self._model.name!r}, whose output {coupled[0]} is of all rows of a slice for "
                "each of them. Return what is of each row (embeddings), and take their scores in "
                "the loss."
            )

    def _changed_eagerly(self) -> list[tf.Tensor]:
        """The handles of all that a pass may change."""
        held = [each._generator for each in _keras.random_generators_of(self._model)]
        held += _keras.held_by(self._model, lambda item: isinstance(item, tf.random.Generator))
        states = [generator.state for generator in held if generator is not None]
        variables = [*self._model.variables, *states]
        return [*(variable.handle for variable in variables), *self._windows.draws.handles]

    def _run_all(self, run: Callable[..., Any]) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
        """`_run` on each slice: its tensors one after the other, its activity losses added up."""
        slices = self._slices

        def take(index: tf.Tensor) -> Any:
            return run(index, *_components(slices.take(index)))

        start = tf.zeros_like(slices.count)
        if tf.executing_eagerly():
            of_slices = [take(index) for index in tf.range(slices.total)]
            return (
                [tf.concat(rows, 0) for rows in zip(*(each[0] for each in of_slices))],
                [tf.add_n(losses) for losses in zip(*(each[1] for each in of_slices))],
            )
        tensors, activations = take(start)
        tensors = [with_room_for(each, slices.rows) for each in tensors]

        def put(index: tf.Tensor, tensors: Any, activations: Any, of_slice: Any) -> Any:
            begin = index * slices.size
            return (
                [put_rows(whole, begin, rows) for whole, rows in zip(tensors, of_slice[0])],
                [tf.add(sum_, each) for sum_, each in zip(activations, of_slice[1])],
            )

        def body(index: tf.Tensor, tensors: Any, activations: Any) -> Any:
            return index + 1, *put(index, tensors, activations, take(index))

        shapes = (
            [tf.TensorShape([None, *each.shape[1:]]) for each in tensors],
            [each.shape for each in activations],
        )
        _, tensors, activations = tf.while_loop(
            lambda index, *_: index < slices.count,
            body,
            (start + 1, tensors, activations),
            shape_invariants=(start.shape, *shapes),
            parallel_iterations=1,
        )
        if slices.may_have_remainder:
            rest = _components(slices.remainder())
            tensors, activations = tf.cond(
                slices.total > slices.count,
                lambda: put(slices.count, tensors, activations, run(slices.count, *rest)),
                lambda: (tensors, activations),
            )
        return tensors, activations

    # ---- then the loss -------------------------------------------------------------------

    def differentiate(
        self,
        outputs: Any,
        activations: list[tf.Tensor],
        y: Any,
        sample_weight: Any,
        *,
        is_usual_loss: bool,
    ) -> tuple[dict[str, _Pulls], tf.Tensor]:
        """The gradients of the loss of the batch.

        Args:
            outputs: Of the batch.
            activations: Of the batch, as `pass_forward` returned them.
            y, sample_weight: Of the batch.
            is_usual_loss: Whether `compute_loss` is tf_keras's own.

        Returns:
            By kind of loss, its gradient; and the weight of the batch in its window.
        """
        model = self._model
        x, (y, y_pred, sample_weight) = (
            self._x,
            self._seen((y, widened_outputs(outputs), sample_weight)),
        )
        if not is_usual_loss:  # tf_keras's own does not look at the inputs
            x = self._seen(x)
        of_outputs = tf.nest.flatten(y_pred)
        floating = [output for output in of_outputs if output.dtype.is_floating]
        variables = model.trainable_variables
        weighting = Weighting(
            model,
            self._windows,
            (x, y, sample_weight),
            keeps_kinds_apart=is_usual_loss,
            is_own_step=False,
        )
        recording = record_losses(
            model.compiled_loss,
            weighting.note,
            widens=self._windows.chain.find(Precision) is not None,
        )
        _keras.place_activation_losses(model, activations)
        with tf.GradientTape(persistent=True) as tape, recording:
            tape.watch([*floating, *activations])
            loss = model.compute_loss(x, y, y_pred, sample_weight)
            by_kind, weight = self._by_kind(loss, weighting, is_usual_loss)
        model._validate_target_and_loss(y, loss)
        pulls = {}
        for kind, part in by_kind.items():
            of_floating, of_activations, of_variables = tape.gradient(
                part, [floating, activations, variables]
            )
            by_output = dict(zip(map(id, floating), of_floating))
            pulls[kind] = _Pulls(
                [self._own(by_output.get(id(output))) for output in of_outputs],
                of_activations,
                [None if g is None else tf.convert_to_tensor(g) for g in of_variables],
            )
        return pulls, weight

    def _by_kind(
        self, loss: tf.Tensor, weighting: Weighting, is_usual_loss: bool
    ) -> tuple[dict[str, tf.Tensor], tf.Tensor]:
        """The loss by kind, and the weight of the batch."""
        optimizer = self._model.optimizer
        is_window = not self._windows.open(optimizer).crosses_batches
        if is_window and count_replicas() == 1:
            return {SUM: loss}, tf.ones([], tf.float64)
        if is_usual_loss and _keras.has_sum_losses(self._model):
            by_kind = weighting.losses_by_kind(None)
        else:
            is_number = loss.shape.rank in (0, None)
            by_kind = {weighting.kind(optimizer) if is_number else SUM: loss}
        if MEAN in by_kind:
            by_kind[MEAN] *= count_replicas()  # by which tf_keras divides it
        if is_window and self._is_gathered:  # all replicas have the same loss
            return by_kind, tf.ones([], tf.float64)
        return by_kind, weighting.weight(MEAN if MEAN in by_kind else SUM)

    def _seen(self, data: Any) -> Any:
        """What the loss sees of a batch: of several replicas, their rows one after the other."""
        return tf.nest.map_structure(_gathered, data) if self._is_gathered else data

    def _own(self, gradient: tf.Tensor | None) -> tf.Tensor | None:
        """Of a gradient for what the loss sees, the rows of this replica."""
        if gradient is None or not self._is_gathered:
            return gradient
        counts = gathered(self._slices.rows[tf.newaxis])
        index = index_of_replica()
        start = tf.reduce_sum(counts[:index])
        return gradient[start : start + counts[index]]

    # ---- and its gradient, pulled back ---------------------------------------------------

    def pull_back(self, pulls: dict[str, _Pulls], weight: tf.Tensor) -> None:
        """Bring the gradient of a loss to the weights, and make the updates that end with it."""
        outputs = {kind: pull.outputs for kind, pull in pulls.items()}

        def micro_step(data: Any, slice_: Slice) -> dict[str, Any]:
            x, of_outputs = data
            step = MicroStep(
                self._model,
                self._windows,
                (x,),
                is_usual=False,
                differentiates_loss=True,
                slice_=slice_,
            )
            share = self._share(x)
            with step:
                with tf.GradientTape(persistent=len(pulls) > 1) as tape:
                    y_pred = tf.nest.flatten(widened_outputs(self._model(x, training=True)))
                    parts = {
                        kind: step.part_of_batch(
                            self._part(y_pred, pull._replace(outputs=of_outputs[kind]), share),
                            kind,
                            weight,
                            share,
                        )
                        for kind, pull in pulls.items()
                    }
                step.minimize(parts, tape)
            return {}

        train_in_slices(self._model, self._windows, (self._x, outputs), self._size, micro_step)

    def _part(self, y_pred: list[tf.Tensor], pulls: _Pulls, share: tf.Tensor) -> tf.Tensor:
        """What has, in a slice, the gradient of the loss of the batch."""
        pairs = [*zip(y_pred, pulls.outputs), *zip(self._activations(share), pulls.activations)]
        # What the loss makes of weights directly is shared out among the slices.
        for variable, pull in zip(self._model.trainable_variables, pulls.variables):
            if pull is not None:
                pairs.append((variable, pull * tf.cast(share, pull.dtype)))
        parts = [tf.reduce_sum(of * pull) for of, pull in pairs if pull is not None]
        return total_of(parts) if parts else tf.zeros([])


def _components(tensors: Any) -> list[Any]:
    """Tensors, or their specs; those that ragged and sparse ones are made of."""
    return tf.nest.flatten(tensors, expand_composites=True)  # type: ignore[no-any-return]


def _gathered(leaf: Any) -> Any:
    """The rows of all replicas; what has no rows as it is."""
    if not tf.is_tensor(leaf) or leaf.shape.rank == 0:
        return leaf
    rows = gathered(leaf)
    mask = getattr(leaf, "_keras_mask", None)
    if mask is not None:
        rows._keras_mask = gathered(mask)
    return rows
