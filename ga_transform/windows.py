"""The windows of a model's optimizers, and how each optimizer makes its updates."""

from __future__ import annotations

import functools
import json
import warnings
import weakref
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, NamedTuple, Optional, Union

import tensorflow as tf

from ga_transform import _graphs, _keras
from ga_transform.batch_statistics import Pools
from ga_transform.chain import Chain
from ga_transform.diversion import running, undiverted
from ga_transform.errors import InexactWarning
from ga_transform.layouts import Call, OptimizerLayout, StateLayout, Turn, WindowLayout, plain_call
from ga_transform.measures import Measures
from ga_transform.neighbours import couplings_of, pass_counters_of
from ga_transform.numerics import Gradient, multiplied
from ga_transform.optimizer_state import (
    build_for,
    iterations_of,
    mend_wrapper,
    positions_built_for,
)
from ga_transform.repeating import Draws
from ga_transform.replicas import (
    apply_summed,
    count_replicas,
    is_summed,
    local_variable,
    run_on_replicas,
    scope_of,
)
from ga_transform.rewrites.loss_scale import is_in_float16, is_scaled, lower_scale
from ga_transform.specs import Accumulate, Split
from ga_transform.stages import apply_stages
from ga_transform.stages.accumulate import Window
from ga_transform.stages.skips import Skips
from ga_transform.stages.update import Update

__all__ = ["Handed", "Windows"]


class Handed(NamedTuple):
    """A call of an optimizer in a step, whose update comes where a window ends with the batch."""

    optimizer: Any
    turn: Turn
    #: What it was handed, with a gradient or without.
    variables: Sequence[tf.Variable]
    #: What the model passes to `apply_gradients` beside the gradients.
    args: Any
    kwargs: Any
    #: Of how many slices, if the window has been told their indices.
    slices: Optional[tf.Tensor] = None
    #: References of the variables that have a gradient in these.
    present: Optional[Container[Any]] = None


class Windows(_keras.AutoTrackable):  # type: ignore[misc]
    """What accumulation keeps between calls: checkpointed with the model, none of its weights.

    Args:
        model: The converted model, compiled. Compiling it again asks for new windows.
    """

    def __init__(self, model: Any) -> None:
        self.chain: Chain = model._accumulating_chain
        self.accumulate = self.chain.find(Accumulate) or Accumulate(1)
        self._is_asked_to_skip = self.chain.find(Accumulate) is not None
        self._is_split = self.chain.find(Split) is not None
        self._compiled_loss = self._no_dependency(model.compiled_loss)
        self._jit_compile = model.jit_compile
        self._model = self._no_dependency(weakref.ref(model))
        self._windows = self._no_dependency({})
        self._updates = self._no_dependency({})
        #: How each optimizer is called, where that can be written down.
        self._calls: dict[tuple[int, Turn], Optional[Call]] = self._no_dependency({})
        self._flushes = self._no_dependency({})
        self._followers = self._no_dependency({})
        self._from_functions: dict[tuple[int, Turn], Handed] = self._no_dependency({})
        with tf.init_scope():
            #: What the step's batch and its latest compiled loss weigh, and the share of a batch
            #: that its slice is, for functions that the step calls: these keep what they have
            #: captured, and must capture no tensor of it.
            self.batch_weight = self._no_dependency(local_variable(1.0, tf.float64, of_all="first"))
            self.loss_weight = self._no_dependency(local_variable(1.0, tf.float64, of_all="first"))
            self.slice_share = self._no_dependency(local_variable(1.0, tf.float64, of_all="first"))
        #: By window, where updates are measured.
        self._measures: Optional[dict[tuple[int, Turn], Measures]] = None
        #: Whether a step of the model has come here.
        self.has_stepped = False
        #: What could not be exact, as it was said, by what it is about.
        self.said: dict[str, str] = self._no_dependency({})
        #: Whether a checkpoint has restored what cannot go on here.
        self.is_misfit = False
        self.written_layout = _Layout(self)  # checkpointed under this name
        optimizers = _keras.optimizers_of(model)
        self._optimizers = frozenset(map(id, optimizers))
        self._first = self._no_dependency(optimizers[0] if optimizers else None)
        for optimizer in optimizers:
            mend_wrapper(optimizer)
            self.open(optimizer)
        self.pools = Pools(model)  # checkpointed under this name
        if self.chain.takes_whole_batches:
            #: What random layers draw by in passes that are repeated.
            self.draws = self._no_dependency(Draws())
        self._pass_counters = self._no_dependency(pass_counters_of(model))
        # A batch that is a window has its loss as a whole; one of several batches has not.
        is_whole = self.chain.takes_whole_batches and self.accumulate.steps in (1, {0: 1})
        couplings = couplings_of(model, of_losses=not is_whole)
        if couplings and self.chain.gathers:
            self.warn_once(
                "couplings",
                f"{model.name}: {', '.join(couplings)} couples the rows of a batch, so updates "
                "are not those of the large batch. If that is a loss of the model's outputs, "
                "micro_batch_size with whole_batch_loss=True takes it of the whole batch.",
            )

    @property
    def bytes_held(self) -> int:
        """The memory of the sums, on each replica."""
        return sum(window.bytes_held for window in self._windows.values())

    def belong_to(self, model: Any) -> bool:
        """Whether the model is compiled as it was, with optimizers that it still has."""
        return (
            not self.is_misfit
            and self._compiled_loss is model.compiled_loss
            and self._jit_compile == model.jit_compile
            and self._optimizers <= set(map(id, _keras.optimizers_of(model)))
        )

    def hold_pass_counters(self, slice_index: Optional[tf.Tensor] = None) -> None:
        """Have what counts the passes of training count windows: all but their first pass.

        Args:
            slice_index: As in `Window.is_empty`.
        """
        if self._pass_counters and self.chain.gathers:
            is_begun = self.is_begun(slice_index)
            for counter in self._pass_counters:
                counter.assign_sub(tf.cast(is_begun, counter.dtype))

    @property
    def pending(self) -> int:
        """The micro-batches of the fullest window."""
        return max((window.holds for window in self._windows.values()), default=0)

    @property
    def skipped(self) -> tuple[int, int]:
        """Windows whose update was skipped, and micro-batches that were left out, here."""
        counts = [window.skips.counts_here for window in self._windows.values()]
        return sum(each[0] for each in counts), sum(each[1] for each in counts)

    def is_begun(self, slice_index: Optional[tf.Tensor] = None) -> tf.Tensor:
        """Whether any window holds micro-batches. Shape: scalar, bool.

        Args:
            slice_index: As in `Window.is_empty`.
        """
        empty = [window.is_empty(slice_index) for window in self._windows.values()]
        return ~tf.reduce_all(empty) if empty else tf.constant(False)

    def share_of_batch(self) -> tf.Tensor:
        """Of a window of the model's first optimizer, what a batch is. Shape: scalar, float64."""
        if self._first is None:
            return tf.ones([], tf.float64)
        steps = self.open(self._first).steps_at(iterations_of(self._first))
        return 1.0 / tf.cast(steps, tf.float64)

    def end_statistics(self) -> None:
        """Have moving statistics move, if the windows have ended with this batch."""
        self.pools.end_batch(self.is_begun())

    def warn_of_silence(self) -> None:
        """Say, once, where nothing has come here that could be accumulated."""
        name = self._model().name
        if not self.has_stepped:
            self.warn_once(
                "step",
                f"{name}: its training function does not call train_step, so that there is nothing "
                "to accumulate. Have make_train_function call self.train_step.",
            )
        elif not self._updates:
            self.warn_once(
                "optimizers",
                f"{name}: train_step has handed no gradients to apply_gradients of an optimizer of "
                "the model, so that there is nothing to accumulate. Keep its optimizers as "
                "attributes of the model or of its layers, and convert it before it trains.",
            )

    def open(self, optimizer: Any, turn: Turn = (0,)) -> Window:
        """The window of an optimizer.

        Args:
            optimizer: An optimizer of the model.
            turn: Which of a step's calls of it this is; each has its own window.
        """
        key = (id(optimizer), turn)
        if key not in self._windows:
            window = Window(
                self.accumulate.steps,
                is_split=self._is_split,
                keep_size=is_in_float16(self.chain) or _keras.computes_in_float16(self._model()),
                skips=Skips(
                    guards_updates=self._is_asked_to_skip or is_scaled(optimizer),
                    leaves_out=self.accumulate.on_nonfinite == "micro_batch",
                    lower_scale=functools.partial(lower_scale, optimizer),
                ),
            )
            place = self._places().get(id(optimizer), "new")
            name = "_".join(map(str, ("window", place, *turn)))
            setattr(self, name, window)  # checkpointed under this name
            self._windows[key] = window
        return self._windows[key]  # type: ignore[no-any-return]

    def update_of(self, optimizer: Any, turn: Turn, args: Any, kwargs: Any) -> Update:
        """How an optimizer makes an update: through the stages, then by itself.

        Args:
            optimizer: Its own `apply_gradients` is called.
            turn: As in `open`.
            args, kwargs: What the model passes to `apply_gradients` beside the gradients. A
                later flush passes the same.
        """
        skips = self.open(optimizer, turn).skips

        def update(
            gradients: Sequence[Optional[Gradient]], variables: Sequence[tf.Variable]
        ) -> None:
            pairs = [(g, variable) for g, variable in zip(gradients, variables) if g is not None]
            present = [variable for _, variable in pairs]
            given = [gradient for gradient, _ in pairs]
            if is_summed(undiverted(optimizer), args, kwargs):  # and has been summed again
                given = [multiplied(gradient, 1 / count_replicas()) for gradient in given]

            def make() -> None:
                measures = self._measures_of((id(optimizer), turn))
                stages = self.chain.update_stages
                watch = None if measures is None else measures.note_stage
                staged = apply_stages(stages, given, present, self._model(), watch)
                if measures is not None:
                    measures.note_update(given, staged)
                final = {
                    _keras.reference_of(v): _as_handed(g, v.dtype) for g, v in zip(staged, present)
                }
                # Variables without a gradient go along, and are left out as tf_keras does it.
                handed = [
                    (final.get(_keras.reference_of(variable)), variable) for variable in variables
                ]
                # An optimizer made of others calls theirs; and a replica may be in another thread
                # here than its step, which has none of what that has entered.
                with running(None), _keras.tracing_once([optimizer]):
                    apply_summed(undiverted(optimizer), handed, args, kwargs)

            skips.guard(given, make)

        self._updates[id(optimizer), turn] = update
        self._calls[id(optimizer), turn] = plain_call(args, kwargs)
        return update

    def begin_batch(self) -> None:
        """Prepare for the slices of a batch."""
        for window in self._windows.values():
            window.begin_batch()
        self.pools.begin_batch(self.is_begun())

    def end_batch(self, handed: Handed) -> None:
        """Make the update of a window, if it ends with this batch."""
        optimizer, turn, variables, args, kwargs, slices, present = handed
        window = self.open(optimizer, turn)
        measures = self._measures_of((id(optimizer), turn))
        if measures is not None:
            measures.end_window(window.size_with(slices))
        update = self.update_of(optimizer, turn, args, kwargs)
        followers = self._followers.get(id(window), {}).values() if self._is_split else ()

        def update_and_follow(gradients: Any, variables: Any) -> None:
            update(gradients, variables)
            for follow in followers:
                follow()

        iterations = iterations_of(optimizer)
        window.end_batch(variables, iterations, update_and_follow, slices, present)

    def remember(self, handed: Handed) -> None:
        """Keep a call that stands in a function which a step of slices calls.

        It fills its window again when the function runs without being traced.
        """
        self._from_functions[id(handed.optimizer), handed.turn] = handed

    def end_others(self, handed: Sequence[Handed]) -> None:
        """Make the updates of windows that functions have filled which were traced before.

        Args:
            handed: The calls whose updates are made already.
        """
        seen = {(id(each.optimizer), each.turn) for each in handed}
        for key, each in self._from_functions.items():
            if key not in seen:
                self.end_batch(each)

    def follow(self, window: Window, follower: Any, action: Callable[[], Any]) -> None:
        """Have what follows a window's updates in a step follow its flush, too."""
        followers = self._followers.setdefault(id(window), {})
        if id(follower) not in followers:
            self._flushes.clear()
        followers[id(follower)] = action

    def trace_again(self) -> None:
        """Have functions traced anew: a variable has its first gradient in a later trace."""
        model = self._model()
        if model.train_function is None:
            self.warn_once(
                "trace",
                f"{model.name}: a variable has its first gradient in a later trace of train_step. "
                "Functions of your own that were traced before leave it out: make them anew.",
            )
        self._forget_traces()

    def _forget_traces(self) -> None:
        """Make functions anew, for traces as things are now."""
        self._flushes.clear()
        model = self._model()
        if model.train_function is not None:  # that fit calls next
            with tf.init_scope():
                model.train_function = None
                model.train_function = model.make_train_function()

    def measure(self, *, is_on: bool) -> Mapping[tuple[int, Turn], Measures]:
        """Have updates be measured from here on, or no more, in functions that are traced anew.

        Returns:
            By window, the measures of those that have been handed gradients.
        """
        if is_on != (self._measures is not None):
            self._measures = self._no_dependency({}) if is_on else None
            _keras.forget_traces(self._model())
            self._forget_traces()
        with scope_of(self._model()):
            found = {key: self._measures_of(key) for key in self._windows}
        return {key: each for key, each in found.items() if each and key in self._updates}

    def _measures_of(self, key: tuple[int, Turn]) -> Optional[Measures]:
        """Of a window; None where nobody asks."""
        if self._measures is None:
            return None
        if key not in self._measures:
            self._measures[key] = Measures(self.chain)
        return self._measures[key]

    def flush(self) -> None:
        """Make the updates of partial windows."""
        for key, window in self._windows.items():
            if not window.holds:
                continue
            if key not in self._updates:
                raise RuntimeError(
                    f"flush must follow a training step; got {self.pending} micro-batches that "
                    "were restored before any, and an update that a step must show. Train on a "
                    "batch first, or call discard()."
                )
            if key not in self._flushes:
                self._flushes[key] = self._flush_function(key, window)
            self._flushes[key]()
        if self.pools.are_there:
            run_on_replicas(self._model(), self.pools.move)

    def _flush_function(self, key: tuple[int, Turn], window: Window) -> Callable[[], None]:
        update, measures = self._updates[key], self._measures_of(key)

        def flush() -> None:
            if measures is not None:
                measures.end_window(window.size_with(None))
                measures.note_partial()
            window.flush(update)
            for follow in self._followers.get(id(window), {}).values():
                follow()

        return self._on_replicas(flush)

    def _on_replicas(self, action: Callable[[], None]) -> Callable[[], None]:
        """What does something on each replica, as the model runs: in a graph or eagerly."""
        model = self._model()
        run = functools.partial(run_on_replicas, model, action)
        if model.run_eagerly:
            return run
        return tf.function(run, jit_compile=model.jit_compile, autograph=False)  # type: ignore[no-any-return]

    def spread(self) -> None:
        """Divide what the replicas hold evenly among them, so that files can add it up."""

        def spread() -> None:
            for window in self._windows.values():
                window.spread()
            self.pools.spread()

        if self._model().distribute_strategy.num_replicas_in_sync > 1 and self.pending:
            self._on_replicas(spread)()

    def discard(self) -> None:
        """Forget partial windows."""
        for window in self._windows.values():
            window.discard()
        self.pools.clear()

    # ---- in files --------------------------------------------------------------------------

    def _trackable_children(self, save_type: str = "checkpoint", **kwargs: Any) -> dict[str, Any]:
        if tf.executing_eagerly():
            self.spread()  # before any variable is read
        children: dict[str, Any] = super()._trackable_children(save_type, **kwargs)
        return children

    def written(self) -> StateLayout:
        """The layout of the windows, and of what the optimizers have slots for.

        Windows that train what is no weight of the model are left out.
        """
        self.spread()
        places, positions = self._places(), _keras.positions_of(self._model())
        layouts = []
        for key, window in self._windows.items():
            place, turn, books = places.get(key[0]), key[1], window.layout(positions)
            if place is not None and books is not None:
                # What follows an update is known when a step has been traced.
                call = None if self._followers.get(id(window)) else self._calls.get(key)
                layouts.append(WindowLayout(place, turn, call, books, window.skips.counts))
        trained = _keras.trained_positions(self._model())
        return StateLayout(
            layouts, trained, self.pending, self._built(), self._is_split, self.pools.layout()
        )

    def _built(self) -> list[OptimizerLayout]:
        """What the optimizers have slots for, but for those that train other variables, too."""
        positions, built = _keras.positions_of(self._model()), []
        for place, optimizer in enumerate(_keras.optimizers_within(self._model())):
            built_for = positions_built_for(optimizer, positions)
            if built_for:
                built.append(OptimizerLayout(place, type(optimizer).__name__, built_for, 0))
        return built

    def takes(self, layout: StateLayout) -> bool:
        """Whether windows of a layout can go on here, with the gradients that they hold."""
        model = self._model()
        optimizers, weights = _keras.optimizers_within(model), _keras.weights_of(model)
        begun = [window for window in layout.windows if window.books]
        sums = [each for window in begun for book in window.books.values() for each in book]
        return (
            all(window.optimizer < len(optimizers) for window in layout.windows)
            and all(each.optimizer < len(optimizers) for each in layout.optimizers)
            and all(each.position < len(weights) for each in sums)
            and not (self._jit_compile and any(each.is_sparse for each in sums))
            # What is frozen since must not move, and a window of one stores nothing.
            and (not begun or layout.trained == _keras.trained_positions(model))
            and (not begun or self.accumulate.steps != 1)
            and (not begun or layout.is_split == self._is_split)
        )

    def arrange(self, layout: StateLayout) -> None:
        """Make the windows and pools of a layout, and the sums in them; all others hold nothing."""
        with scope_of(self._model()):
            self._arrange(layout)

    def _arrange(self, layout: StateLayout) -> None:
        model = self._model()
        optimizers, weights = _keras.optimizers_within(model), _keras.weights_of(model)
        named = set()
        for each in layout.windows:
            optimizer = optimizers[each.optimizer]
            key = id(optimizer), each.turn
            named.add(key)
            window = self.open(optimizer, each.turn)
            window.arrange(each.books, weights)
            window.skips.counts = each.skips
            if each.call is not None and key not in self._updates:
                self.update_of(optimizer, each.turn, *each.call)
        for key in self._windows.keys() - named:
            self._windows[key].discard()
        self.pools.arrange(layout.pools)

    def restored(self, layout: StateLayout) -> None:
        """Prepare for values that a checkpoint is about to restore."""
        model = self._model()
        optimizers, weights = _keras.optimizers_within(model), _keras.weights_of(model)
        if not weights:
            return  # not built: variables are restored as they are made
        self.is_misfit = not self.takes(layout)
        if self.is_misfit:
            model.train_function = None  # has the next step find out
            return
        self.arrange(layout)
        # Else their slots would be made at the end of the window, when newer checkpoints may have
        # taken the place of this.
        if layout.trained == _keras.trained_positions(model):
            with scope_of(model):
                for each in layout.optimizers:
                    variables = [weights[place] for place in each.built_for]
                    build_for(optimizers[each.optimizer], variables)

    def state(self, layout: StateLayout) -> list[tf.Variable]:
        """The variables in the order of a layout that is arranged."""
        model = self._model()
        optimizers, weights = _keras.optimizers_within(model), _keras.weights_of(model)
        states = [
            self.open(optimizers[each.optimizer], each.turn).state(each.books, weights)
            for each in layout.windows
        ]
        states.append(self.pools.state(layout.pools))
        return [variable for state in states for variable in state]

    def _places(self) -> dict[int, int]:
        """By identity, the optimizers' places in the model."""
        optimizers = _keras.optimizers_within(self._model())
        return {id(optimizer): place for place, optimizer in enumerate(optimizers)}

    # ----------------------------------------------------------------------------------------

    def warn_once(self, about: str, text: str) -> None:
        """Say what cannot be exact, the first time that it is about this."""
        if about not in self.said:
            self.said[about] = text
            warnings.warn(text, InexactWarning, stacklevel=2)


class _Layout(tf.train.experimental.PythonState):  # type: ignore[misc]
    """In a checkpoint, what has windows made before their values are restored."""

    def __init__(self, windows: Windows) -> None:
        self._windows = windows

    def serialize(self) -> str:
        return json.dumps(self._windows.written().to_config())

    def deserialize(self, text: Union[bytes, str]) -> None:
        self._windows.restored(StateLayout.from_config(json.loads(text)))


def _as_handed(gradient: Gradient, dtype: tf.DType) -> Gradient:
    """A gradient in its variable's dtype, and in the graph of the update like all others.

    Optimizers reduce gradients over replicas in one call, which takes them of one graph only.
    """
    if isinstance(gradient, tf.IndexedSlices):
        values, indices = _here(tf.cast(gradient.values, dtype)), _here(gradient.indices)
        return tf.IndexedSlices(values, indices, gradient.dense_shape)
    return _here(tf.cast(gradient, dtype))


def _here(tensor: tf.Tensor) -> tf.Tensor:
    is_here = getattr(tensor, "graph", None) is _graphs.current_graph()
    return tensor if is_here else tf.identity(tensor)
