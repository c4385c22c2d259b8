"""A snapshot: what a file must hold of a training beside what tf_keras keeps in it.

That is the partial windows, and whatever the format loses of the optimizers. A snapshot is a
layout and the values that belong there, which each format has its own place for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
import tensorflow as tf

from ga_transform import _keras
from ga_transform.layouts import OptimizerLayout, StateLayout, not_as_written
from ga_transform.optimizer_state import build_for, positions_built_for
from ga_transform.windows import Windows

__all__ = ["Snapshot", "put_back", "take_snapshot"]


#: Among a model's assets.
_FOLDER = "ga_transform"


class Snapshot(NamedTuple):
    """The state of a training: where it belongs, and the values in that order."""

    layout: StateLayout
    #: Variables where it is taken, arrays or variables where it is read.
    values: Sequence[Any]

    # ---- in a folder, as the assets of a .keras file are -------------------------------------

    def write(self, folder: str) -> None:
        """Write the layout as JSON, and each value as an array."""
        own_folder = Path(folder) / _FOLDER
        own_folder.mkdir()
        (own_folder / "layout.json").write_text(json.dumps(self.layout.to_config()), "utf-8")
        for number, variable in enumerate(self.values):
            # What is kept since it was read is an array already.
            array = variable.numpy() if isinstance(variable, tf.Variable) else variable
            np.save(own_folder / f"{number}.npy", _as_numpy_alone(array))

    @classmethod
    def read(cls, folder: str) -> Optional[Snapshot]:
        """What `write` wrote; None where there is nothing."""
        own_folder = Path(folder) / _FOLDER
        if not own_folder.exists():
            return None
        numbers = range(len(list(own_folder.glob("*.npy"))))
        try:
            config = json.loads((own_folder / "layout.json").read_text("utf-8"))
            values = [np.load(own_folder / f"{number}.npy") for number in numbers]
        except (EOFError, OSError, RecursionError, ValueError) as error:
            raise not_as_written("JSON and arrays are expected", type(error).__name__) from error
        return cls(StateLayout.from_config(config), values)

    # ---- as an object that a SavedModel tracks -------------------------------------------------

    def tracked(self, copied: Sequence[tf.Variable] = ()) -> Any:
        """An object that holds layout and variables, for a SavedModel to write with the model.

        Args:
            copied: Of these the object holds copies: TensorFlow has the slots of a legacy
                optimizer depend on nothing else. All others are in the file once.
        """
        holder = _keras.AutoTrackable()
        holder.layout = tf.Variable(json.dumps(self.layout.to_config()), trainable=False)
        identities = set(map(id, copied))
        for number, variable in enumerate(self.values):
            if id(variable) in identities:
                variable = tf.Variable(variable, trainable=False)
            setattr(holder, f"value_{number}", variable)
        return holder

    @classmethod
    def from_tracked(cls, holder: Any) -> Snapshot:
        """From what a SavedModel brings back of `tracked`."""
        try:
            config = json.loads(holder.layout.numpy())
        except (AttributeError, RecursionError, ValueError) as error:
            raise not_as_written("JSON is expected", type(error).__name__) from error
        layout = StateLayout.from_config(config)
        count = sum(name.startswith("value_") for name in vars(holder))
        return cls(layout, [getattr(holder, f"value_{position}") for position in range(count)])

    # ---- in a config -------------------------------------------------------------------------

    def to_config(self) -> dict[str, Any]:
        """In JSON's types: for numbers, not for arrays."""
        values = [value.numpy().item() for value in self.values]
        return {"layout": self.layout.to_config(), "values": values}

    @classmethod
    def from_config(cls, config: Any) -> Snapshot:
        """What `to_config` gave."""
        if not isinstance(config, Mapping) or not isinstance(config.get("values"), list):
            raise not_as_written("a layout and values are expected", config)
        return cls(StateLayout.from_config(config.get("layout")), config["values"])


def take_snapshot(
    model: Any, windows: Windows, listed: Callable[[Any], list[tf.Variable]], *, keeps_windows: bool
) -> Snapshot:
    """What is to be written of a model's training.

    Args:
        model: A converted model.
        windows: Its windows.
        listed: What of an optimizer is to be written.
        keeps_windows: Whether the windows are to be, or only how much they hold.
    """
    layout = windows.written()
    if not keeps_windows:
        layout = layout._replace(windows=[], pools=[])
    values = windows.state(layout)
    optimizers = []
    positions = _keras.positions_of(model)
    for place, optimizer, variables in _by_optimizer(model, listed):
        built_for = positions_built_for(optimizer, positions)
        if variables and built_for is not None:
            name = type(optimizer).__name__
            optimizers.append(OptimizerLayout(place, name, built_for, len(variables)))
            values += variables
    return Snapshot(layout._replace(optimizers=optimizers), values)


def put_back(
    model: Any,
    windows: Windows,
    snapshot: Snapshot,
    listed: Optional[Callable[[Any], list[tf.Variable]]],
) -> bool:
    """Restore a snapshot in a model that is compiled.

    Args:
        model: A converted model.
        windows: Its windows.
        snapshot: What was taken of a model of the same config.
        listed: What of an optimizer it holds, as for `take_snapshot`; None to restore the
            windows alone.

    Returns:
        Whether the model has the optimizers and weights that the snapshot speaks of. Else no
        value changes.

    Raises:
        ValueError: The values are not those of the layout.
    """
    layout, values = snapshot
    if not _fits(model, layout) or not windows.takes(layout):
        return False
    windows.arrange(layout)
    variables = windows.state(layout)
    if listed is None:
        values = values[: len(variables)]
    else:
        of_optimizers = _made(model, layout, listed)
        if of_optimizers is None:
            return False
        variables += of_optimizers
    if len(variables) != len(values):
        raise not_as_written(f"{len(variables)} values are expected", len(values))
    fitting = [_fitting(value, variable) for value, variable in zip(values, variables)]
    for variable, value in zip(variables, fitting):
        variable.assign(value)
    if layout.windows and windows.pending != layout.pending:
        raise not_as_written(f"{layout.pending} micro-batches are expected", windows.pending)
    return True


def _fits(model: Any, layout: StateLayout) -> bool:
    """Whether a model has the optimizers of a layout, which train the weights that they did."""
    names = [type(optimizer).__name__ for optimizer in _keras.optimizers_within(model)]
    count = len(_keras.weights_of(model))
    is_built = any(each.built_for for each in layout.optimizers)
    if is_built and layout.trained != _keras.trained_positions(model):
        return False
    return all(
        each.optimizer < len(names)
        and names[each.optimizer] == each.class_name
        and max(each.built_for, default=-1) < count
        for each in layout.optimizers
    )


def _made(
    model: Any, layout: StateLayout, listed: Callable[[Any], list[tf.Variable]]
) -> Optional[list[tf.Variable]]:
    """The variables of a layout's optimizers, made if need be.

    None, if one of them has another number: another version of it was written.
    """
    optimizers, weights = _keras.optimizers_within(model), _keras.weights_of(model)
    for each in layout.optimizers:
        build_for(optimizers[each.optimizer], [weights[place] for place in each.built_for])
    found = {place: variables for place, _, variables in _by_optimizer(model, listed)}
    states = [found.get(each.optimizer, []) for each in layout.optimizers]
    if [len(state) for state in states] != [each.variables for each in layout.optimizers]:
        return None
    return [variable for state in states for variable in state]


def _by_optimizer(
    model: Any, listed: Callable[[Any], list[tf.Variable]]
) -> Iterator[tuple[int, Any, list[tf.Variable]]]:
    """The optimizers of tf_keras with their places and variables, each variable once."""
    seen: set[int] = set()
    for place, optimizer in enumerate(_keras.optimizers_within(model)):
        if _keras.is_of_keras(optimizer):
            variables = [variable for variable in listed(optimizer) if id(variable) not in seen]
            seen.update(map(id, variables))
            yield place, optimizer, variables


def _fitting(value: Any, variable: tf.Variable) -> Any:
    """A value as its variable takes it."""
    dtype = variable.dtype.as_numpy_dtype
    if isinstance(value, tf.Variable):
        array = value
    elif isinstance(value, np.ndarray):
        array = value.view(dtype) if value.dtype.kind == "V" else value
    elif isinstance(value, (int, float)):
        array = np.asarray(value, dtype)
    else:
        raise not_as_written("a value must be an array or a number", value)
    if not variable.shape.is_compatible_with(array.shape) or array.dtype != variable.dtype:
        rule = f"a value must be of shape {variable.shape} and {variable.dtype.name}"
        raise not_as_written(rule, f"{array.dtype} {array.shape}")
    return array


def _as_numpy_alone(array: np.ndarray) -> np.ndarray:
    """An array without a dtype that only TensorFlow knows, such as bfloat16."""
    return array.view(f"V{array.dtype.itemsize}") if array.dtype.kind == "V" else array
