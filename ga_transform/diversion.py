"""The diversion: while a micro-step runs, what its model hands to an optimizer goes to it.

A dispatcher is put on the optimizer object once. It asks its thread for the micro-step that
runs, and where there is none the optimizer does what it always did. All else is its own.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Optional

from ga_transform import _keras

if TYPE_CHECKING:
    from ga_transform.micro_step import MicroStep

__all__ = ["current_step", "divert", "release", "running", "undiverted"]

_threads = threading.local()


def current_step() -> Optional[MicroStep]:
    """The micro-step of this thread; each replica of a strategy has a thread of its own."""
    return getattr(_threads, "step", None)


@contextmanager
def running(step: Optional[MicroStep]) -> Iterator[None]:
    """Have a micro-step run in this thread.

    None for the length of an update: an optimizer that is made of others calls theirs then.
    """
    outer = current_step()
    _threads.step = step
    try:
        yield
    finally:
        _threads.step = outer


def divert(model: Any) -> None:
    """Let a model's optimizers hand over to the micro-step that runs, and averages follow it."""
    for optimizer in _keras.optimizers_within(model):
        _put_on(_Optimizer, optimizer)
    for average in _keras.averages_of(model):
        _put_on(_Average, average)


def release(model: Any) -> None:
    """Undo `divert`."""
    for diverted in [*_keras.optimizers_within(model), *_keras.averages_of(model)]:
        for name in ("apply_gradients", "apply"):
            dispatcher = getattr(diverted, name, None)
            if not isinstance(dispatcher, _Dispatcher):
                continue
            delattr(diverted, name)
            if getattr(diverted, name) != dispatcher.own:  # it was set on the object
                setattr(diverted, name, dispatcher.own)


def undiverted(optimizer: Any) -> Any:
    """An optimizer's own `apply_gradients`."""
    method = optimizer.apply_gradients
    return method.own if isinstance(method, _Dispatcher) else method


class _Dispatcher:
    """Stands before a method of one object. Copied and pickled together with it."""

    name: str

    def __init__(self, diverted: Any) -> None:
        self.diverted = diverted
        self.own = getattr(diverted, self.name)
        functools.update_wrapper(self, self.own)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        step = current_step()
        return self.own(*args, **kwargs) if step is None else self._divert(step, args, kwargs)

    def _divert(self, step: MicroStep, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError


class _Optimizer(_Dispatcher):
    name = "apply_gradients"

    def _divert(self, step: MicroStep, args: Any, kwargs: Any) -> Any:
        if "grads_and_vars" in kwargs:
            kwargs = dict(kwargs)
            args = (kwargs.pop("grads_and_vars"), *args)
        return step.hand_over(self.diverted, args[0], args[1:], kwargs)


class _Average(_Dispatcher):
    """A moving average of weights moves when they do: with an update."""

    name = "apply"

    def _divert(self, step: MicroStep, args: Any, kwargs: Any) -> Any:
        variables = args[0] if args else kwargs.get("var_list") or ()
        return step.after_update(
            self.diverted, variables, functools.partial(self.own, *args, **kwargs)
        )


def _put_on(dispatcher: type[_Dispatcher], diverted: Any) -> None:
    if isinstance(getattr(diverted, dispatcher.name), _Dispatcher):
        return
    try:
        setattr(diverted, dispatcher.name, dispatcher(diverted))
    except AttributeError as error:
        raise TypeError(
            f"An optimizer must take attributes to be accumulated; got {type(diverted).__name__} "
            "with __slots__. Derive it from tf_keras.optimizers.Optimizer."
        ) from error
