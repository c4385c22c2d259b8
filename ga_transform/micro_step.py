"""The micro-step: one forward and backward pass, from the batch to the window.

While it is traced, its thread knows it (`diversion.py`). Through that the loss is weighed
before it is differentiated, which costs nothing, and the gradients are taken at the moment
the model hands them to its optimizer, whatever the model did to get them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Optional

import tensorflow as tf

from ga_transform import _graphs, _keras
from ga_transform.diversion import divert, running, undiverted
from ga_transform.layouts import Turn
from ga_transform.loss_terms import MEAN, SUM, record_losses
from ga_transform.numerics import (
    Gradient,
    added,
    all_finite,
    map_values,
    multiplied,
    times,
    values_of,
    widened,
)
from ga_transform.optimizer_state import iterations_of
from ga_transform.replicas import count_replicas, decide, is_summed
from ga_transform.rewrites.batch_norm import Statistics
from ga_transform.rewrites.loss_scale import has_scaled, is_in_float16
from ga_transform.specs import Precision
from ga_transform.stages import apply_stages
from ga_transform.stages.accumulate import Window
from ga_transform.stages.books import Share
from ga_transform.stages.update import make_update
from ga_transform.weighting import Weighting
from ga_transform.windows import Handed, Windows

if TYPE_CHECKING:
    from typing_extensions import Self

    from ga_transform.split import Slice

__all__ = ["MicroStep"]


class MicroStep:
    """What is known of a micro-batch while it is traced.

    Args:
        model: The converted model.
        windows: The windows of its optimizers.
        data: A batch, as Keras gives it to `train_step`.
        is_usual: Whether `train_step` and `compute_loss` are tf_keras's own.
        differentiates_loss: Whether `train_step` is, so that what `compute_loss` returns is
            differentiated as it is, and shown to nobody.
        slice_: Where the micro-batch is one of a batch, what waits for the others.
    """

    def __init__(
        self,
        model: Any,
        windows: Windows,
        data: Any,
        *,
        is_usual: bool,
        differentiates_loss: bool,
        slice_: Optional[Slice] = None,
    ) -> None:
        self.model = model
        #: The kind of loss that is differentiated at present, where kinds are kept apart.
        self.kind: Optional[str] = None
        takes_loss_as_it_is = not _keras.has_own_gradients(getattr(model, "optimizer", None))
        #: Whether the losses are to be differentiated kind by kind.
        self.has_kinds = is_usual and takes_loss_as_it_is and _keras.has_sum_losses(model)
        self._is_keras_step = differentiates_loss
        self._differentiates_loss = differentiates_loss and takes_loss_as_it_is
        self._windows = windows
        self._data = data
        self._slice = slice_
        self._scope = contextlib.ExitStack()
        self._weighting: Weighting
        #: The weight by which the loss is multiplied, and that in units of its window's first.
        self._weighed_by: Optional[tuple[tf.Tensor, tf.Tensor]] = None
        #: What is differentiated, if `train_step` is tf_keras's own.
        self._loss: Optional[tf.Tensor] = None
        self._held: Optional[_Held] = None
        #: How often each optimizer has been handed gradients in each function of this step.
        self._turns: dict[Any, int] = {}
        #: The variables of each of these calls.
        self._trained: dict[Any, set[Any]] = {}
        #: How often each layer that pools its statistics has been passed through.
        self._passes: dict[int, int] = {}
        #: The windows that have been handed gradients in this step, and of what variables.
        self._handed: list[tuple[Window, set[Any]]] = []

    def __enter__(self) -> Self:
        self._windows.has_stepped = True
        divert(self.model)
        self._graph = _graphs.current_graph()
        self._windows.hold_pass_counters(self._slice_index())
        self._weighting = Weighting(
            self.model,
            self._windows,
            self._data,
            keeps_kinds_apart=self.has_kinds,
            is_own_step=not self._is_keras_step,
            share=None if self._slice is None else self._slice.share,
        )
        if self._slice is not None:
            self._slice.publish_share()
        withhold = None if self._slice is None else self._slice.withhold
        recording = record_losses(
            self.model.compiled_loss,
            self._weighting.note,
            withhold,
            widens=self._windows.chain.find(Precision) is not None,
        )
        self._scope.enter_context(recording)
        self._scope.enter_context(running(self))
        return self

    def __exit__(self, *error: object) -> None:
        self._scope.__exit__(*error)  # type: ignore[arg-type]
        # Eagerly, a step may hand over nothing and the next one something.
        if error[0] is None and not self._turns and not tf.executing_eagerly():
            self._windows.warn_of_silence()

    # ---- the loss ------------------------------------------------------------------------
    #
    # Losses of replicas are divided by their number, for optimizers to add up. What windows hold is
    # free of that, so that it may go on with another number of replicas.

    def weighed(self, loss: Any) -> Any:
        """The loss times the micro-batch's weight, where that may be done before its gradient.

        A clip of micro-batches needs their own gradients, and so does an optimizer that works
        on them; a `train_step` of the model's own may add to the loss or log it: there the
        gradients are weighed, in `hand_over`.
        """
        if loss is None or not self._differentiates_loss or self.has_kinds:
            return loss
        self._loss = loss
        if loss.shape.rank not in (0, None):  # what is differentiated is the sum of its elements
            self.kind = SUM
        optimizer = self.model.optimizer
        window = self._windows.open(optimizer)
        is_sum = self._kind(optimizer) == SUM
        if is_sum or window.weighs_alike or self._windows.chain.micro_batch_stages:
            return loss
        weight = self._weighting.weight(MEAN)
        # Rounded as the loss is, so that sum and divisor hold the same weights.
        relative = tf.cast(window.relative(weight, self._slice_index()), loss.dtype)
        self._weighed_by = weight, tf.cast(relative, tf.float64)
        return loss * (relative * count_replicas())

    def losses_by_kind(self) -> dict[str, tf.Tensor]:
        """The loss as a sum and a mean, each weighed as its kind demands."""
        window = self._windows.open(self.model.optimizer)

        def is_first() -> tf.Tensor:
            return window.stores_nothing(self._slice_index())

        # Of several replicas, which may have no rows, none would know that it is the first.
        by_kind = self._weighting.losses_by_kind(is_first if count_replicas() == 1 else None)
        if MEAN in by_kind:
            if self._windows.chain.micro_batch_stages:
                raise ValueError(
                    "A chain with stages before Accumulate must have losses of one kind; got "
                    "SUM losses beside means (or beside add_loss and activity regularisers). "
                    "Move the stages after Accumulate."
                )
            weight = self._weighting.weight(MEAN)
            relative = window.relative(weight, self._slice_index())
            self._weighed_by = weight, relative
            mean = by_kind[MEAN]
            by_kind[MEAN] = mean * tf.cast(relative * count_replicas(), mean.dtype)
        return by_kind

    def part_of_batch(
        self, part: tf.Tensor, kind: str, weight: tf.Tensor, share: tf.Tensor
    ) -> tf.Tensor:
        """A slice's part of the loss of its whole batch, weighed as that is, and as nothing else.

        Args:
            part: Of those whose gradients add up to the batch's over its slices.
            kind: Of the batch's loss.
            weight: Of the batch. Shape: scalar, float64, as the next.
            share: Of the weight, what the slice brings along.
        """
        window = self._windows.open(self.model.optimizer)
        relative = window.relative(weight, self._slice_index())
        self._weighed_by = weight, relative * share
        self._loss = part
        return part * tf.cast(relative, part.dtype) if kind == MEAN else part

    def minimize(self, by_kind: Mapping[str, tf.Tensor], tape: tf.GradientTape) -> None:
        """Have the model's optimizer take the gradients of sums and of means one by one."""
        with self.together():
            for self.kind, loss in by_kind.items():
                self.model.optimizer.minimize(loss, self.model.trainable_variables, tape=tape)

    # ---- the statistics of batch normalisation ---------------------------------------------

    def pools(self, layer: Any) -> bool:
        """Whether the statistics that a layer finds are pooled over the window."""
        return self._windows.chain.gathers and self._windows.pools.has(layer)

    def pool(self, layer: Any, statistics: Statistics) -> None:
        """Take in the statistics that a layer has found in this micro-batch."""
        turn = self._passes.get(id(layer), 0)
        self._passes[id(layer)] = turn + 1
        share = self._windows.share_of_batch()
        if self._slice is not None:
            share *= self._slice.share_seen_from_here()
        self._windows.pools.add(layer, turn, statistics, share)

    # ---- the gradients -------------------------------------------------------------------

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Take what is handed over kind by kind into the window as one micro-batch."""
        self._held = _Held()
        yield
        held, self._held = self._held, None
        held.add(held.shares)

    @tf.autograph.experimental.do_not_convert  # type: ignore[untyped-decorator]
    def hand_over(
        self, optimizer: Any, grads_and_vars: Iterable[Any], args: Any, kwargs: Any
    ) -> Any:
        """Take the gradients that the model hands to an optimizer into its window."""
        graphs = _graphs.graphs_within(self._graph)
        self._warn_of_call(graphs, args, kwargs)
        pairs = list(grads_and_vars)
        present = [variable for gradient, variable in pairs if gradient is not None]
        trained = {_keras.reference_of(variable) for _, variable in pairs}
        turn = self._turn(optimizer, graphs, trained)
        self._warn_of_scale(optimizer)
        window = self._windows.open(optimizer, turn)
        self._handed.append((window, trained))
        kind = self._kind(optimizer)
        if self._weighed_by is None:
            weight = self._weighting.weight(kind)
            relative = window.relative(weight, self._slice_index())
        else:
            weight, relative = self._weighed_by
        gradients = [gradient for gradient, _ in pairs if gradient is not None]
        divided_by = count_replicas() if kind == MEAN else 1
        if self._windows.chain.micro_batch_stages:
            if not is_summed(undiverted(optimizer), args, kwargs):
                # Stages see the mean of the replica's own rows.
                gradients = [multiplied(gradient, divided_by) for gradient in gradients]
                divided_by = 1
            gradients = self._staged(gradients, present)
        if kind == MEAN and self._weighed_by is None and not window.weighs_alike:
            # What weighs nothing adds nothing: its own mean may have been 0 / 0.
            gradients = [times(widened(each), relative * divided_by) for each in gradients]
        handed = Handed(optimizer, turn, [variable for _, variable in pairs], args, kwargs)

        def add(shares: list[Share]) -> None:
            self._add(window, handed, shares, weight)

        share = Share(kind, _by_reference(gradients, present), relative)
        if self._held is None:
            add([share])
            self._weighting.spend_terms()
        else:
            self._held.shares.append(share)
            self._held.add = add
        return iterations_of(optimizer)

    def _staged(self, gradients: list[Gradient], variables: list[tf.Variable]) -> list[Gradient]:
        """What the stages before `Accumulate` make of a micro-batch's gradients."""
        stages = self._windows.chain.micro_batch_stages
        staged = apply_stages(stages, gradients, variables, self.model)
        if not gradients:
            return staged
        # What is not finite stays so, whatever a clip makes of it: a window skips it.
        blemish = tf.where(all_finite(gradients), 0.0, float("nan"))
        return [map_values(lambda v: v + tf.cast(blemish, v.dtype), each) for each in staged]

    def _add(self, window: Window, handed: Handed, shares: list[Share], weight: tf.Tensor) -> None:
        """Store a micro-batch, and make the update if its window ends with the batch."""
        # When a pipeline runs out in the middle of a call, whatever does not depend on its data
        # has been run by then, and must not have changed a window.
        with tf.control_dependencies(self._ready_with(shares)):
            if window.is_single:
                update = self._windows.update_of(
                    handed.optimizer, handed.turn, handed.args, handed.kwargs
                )
                make_update(handed.variables, window.in_common_units(shares, weight), update)
                return
            index = self._slice_index()
            if window.add(handed.variables, shares, weight, index):
                self._windows.trace_again()
        present = {reference for share in shares for reference in share.gradients}
        self._warn_of_zeros(window.lacking(present))
        if self._slice is None:
            self._windows.end_batch(handed)
        else:
            self._slice.hand_over(handed, None if index is None else present)

    def _ready_with(self, shares: list[Share]) -> list[tf.Tensor]:
        """What must be there before a window changes: the loss, or else all gradients.

        With the loss, what commonly fails in a step has been done; and gradients need not wait
        for each other, in memory.
        """
        if self._loss is not None and getattr(self._loss, "graph", None) is _graphs.current_graph():
            return [self._loss]
        return [values_of(g) for share in shares for g in share.gradients.values()]

    def _slice_index(self) -> Optional[tf.Tensor]:
        """Which slice of its batch this is, where a graph can see it."""
        # Eagerly, a slice that hands over nothing may be the last.
        is_seen = not tf.executing_eagerly() and _graphs.current_graph() is self._graph
        if self._slice is None or not is_seen:
            return None
        return self._slice.index

    def after_update(
        self, follower: Any, variables: Iterable[tf.Variable], action: Callable[[], Any]
    ) -> tf.Tensor:
        """Do what follows the optimizer in this step only where the weights have moved.

        That is where a window has just been emptied; or, before the optimizer is called, where
        none is begun.

        Args:
            follower: Whose action it is.
            variables: The weights that it looks at.
            action: What it does.

        Returns:
            Something that others may depend on.
        """
        windows = [
            window
            for window, handed in self._handed
            if any(_keras.reference_of(variable) in handed for variable in variables)
        ]

        def act() -> None:
            with running(None):
                action()

        if windows:
            self._windows.follow(windows[-1], follower, act)
        if not windows or self._slice is None:  # else the update comes after the slices
            index = self._slice_index()
            begun = windows[-1].micro_batches > 0 if windows else self._windows.is_begun(index)
            decide(~begun, act)
        return tf.constant(0)

    def _turn(self, optimizer: Any, graphs: list[Any], variables: set[Any]) -> Turn:
        """Which call of an optimizer this is, of those that a step makes.

        Functions that are called in a step may be traced several times: their names tell them.
        Branches of a condition exclude each other: their calls are the same ones, if they
        train the same variables.
        """
        functions = list(filter(_graphs.is_function, graphs))
        place = id(optimizer), functions[0] if functions else None
        count = self._turns.setdefault(place, 0)
        branch = _graphs.branch_of(graphs)
        if branch is not None:
            first = self._turns.setdefault((*place, _graphs.condition_of(branch)), count)
            turn = self._turns.get((*place, branch), first)
            if self._trained.get((*place, turn), variables) == variables:
                count = turn
        if self._held is None:
            self._turns[place] = max(self._turns[place], count + 1)
            self._trained[(*place, count)] = variables
            if branch is not None:
                self._turns[(*place, branch)] = count + 1
        return *(function.name for function in functions), count

    def _warn_of_call(self, graphs: list[Any], args: Any, kwargs: Any) -> None:
        """Say, once, where a call of an optimizer cannot be taken for what it is."""
        if any(map(_graphs.is_loop, graphs)):
            self._windows.warn_once(
                "loop",
                f"{self.model.name}: train_step calls apply_gradients in a loop of TensorFlow, "
                "where each pass counts as a micro-batch. Loop in Python (range for tf.range) to "
                "have a window for each pass.",
            )
        if any(map(_graphs.is_symbolic, tf.nest.flatten((args, kwargs)))):
            self._windows.warn_once(
                "arguments",
                f"{self.model.name}: train_step passes tensors to apply_gradients beside the "
                "gradients. An update is given those of its last micro-batch only.",
            )

    def _warn_of_scale(self, optimizer: Any) -> None:
        """Say, once, that gradients in float16 have come of a loss that was not scaled."""
        if not is_in_float16(self._windows.chain) or has_scaled(optimizer):
            return
        self._windows.warn_once(
            "scale",
            f"{self.model.name}: the loss of {type(optimizer).__name__} is not scaled, so small "
            "gradients become zero in float16. Call optimizer.minimize, or get_scaled_loss and "
            "get_unscaled_gradients, of a LossScaleOptimizer; or use mixed_bfloat16.",
        )

    def _warn_of_zeros(self, variables: list[tf.Variable]) -> None:
        """Say, once, that a window may have gradients for variables which this batch has not."""
        if variables:
            names = ", ".join(variable.name for variable in variables)
            self._windows.warn_once(
                "zeros",
                f"{self.model.name}: some batches give no gradient to {names}. Where all of a "
                "window give none, the optimizer is handed zeros, which moments and weight decay "
                "see; plain tf_keras leaves such variables out.",
            )

    def _kind(self, optimizer: Any) -> str:
        return self._weighting.kind(optimizer) if self.kind is None else self.kind


class _Held:
    """Shares that wait for the others of their micro-batch."""

    def __init__(self) -> None:
        self.shares: list[Share] = []
        self.add: Callable[[list[Share]], None]


def _by_reference(
    gradients: Iterable[Gradient], variables: Iterable[tf.Variable]
) -> dict[Any, Gradient]:
    """Gradients by their variables; those of a variable that is handed twice are added up."""
    found: dict[Any, Gradient] = {}
    for gradient, variable in zip(gradients, variables):
        earlier = found.get(_keras.reference_of(variable))
        found[_keras.reference_of(variable)] = (
            gradient if earlier is None else added(earlier, gradient, variable)
        )
    return found
