"""Chain: specs in order. What it checks, how it prints, how it becomes JSON and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import attrs

from ga_transform import specs
from ga_transform.errors import did_you_mean, shown, wrong_type, wrong_value
from ga_transform.fields import encode
from ga_transform.specs import Accumulate, Split, Transform

__all__ = ["Chain", "register_kind"]

Spec = TypeVar("Spec", bound=Transform)

_VERSION = 1
_SPECS = [getattr(specs, name) for name in specs.__all__]
#: The name of a spec in a config -> its class. Only these can be read from a file.
_KINDS: dict[str, type[Transform]] = {
    spec.__name__: spec for spec in _SPECS if spec is not Transform
}


def register_kind(spec_class: type[Transform], package: str) -> None:
    """Let configs name `spec_class`, as ``package>ClassName``.

    A class that is defined again (a notebook cell run twice) takes the place of the first.
    """
    if spec_class in _SPECS:
        return
    _KINDS[f"{package}>{spec_class.__name__}"] = spec_class


def _kind(spec_class: type[Transform]) -> str:
    for kind, known in _KINDS.items():
        if known is spec_class:
            return kind
    raise ValueError(
        f"{spec_class.__name__} must be registered to be saved; got an unregistered class. "
        "Pass it to ga_transform.register_transform."
    )


class Chain:
    """An immutable sequence of specs, in the order in which they act.

    Rewrites stand first, then `Split`, and the stages around `Accumulate`: a clip after it
    acts on the window's mean gradient, a clip before it on each micro-batch's.

    Args:
        *transforms: Specs, or one list or tuple of them.

    Raises:
        TypeError: Something in it is no spec.
        ValueError: The order or the number of its specs breaks a rule.

    Example:
        >>> import ga_transform as ga
        >>> ga.Chain(ga.Accumulate(steps=8), ga.ClipByAGC(clip_factor=0.02))
        Chain(Accumulate(steps=8) -> ClipByAGC(clip_factor=0.02))
    """

    __slots__ = ("_transforms",)
    _transforms: tuple[Transform, ...]

    def __init__(self, *transforms: Transform | Iterable[Transform]) -> None:
        if len(transforms) == 1 and isinstance(transforms[0], (list, tuple, Chain)):
            transforms = tuple(transforms[0])
        for position, transform in enumerate(transforms):
            if not isinstance(transform, Transform):
                raise wrong_type(
                    f"Chain[{position}]",
                    "a transform",
                    transform,
                    "Write an instance, as ga_transform.Accumulate(steps=8).",
                )
        _check_order(transforms)  # type: ignore[arg-type]
        object.__setattr__(self, "_transforms", transforms)

    def __setattr__(self, name: str, value: object = None) -> None:
        raise AttributeError("a Chain cannot be changed; make another")

    __delattr__ = __setattr__

    def __reduce__(self) -> tuple[Any, ...]:
        return (Chain, self._transforms)

    def __iter__(self) -> Iterator[Transform]:
        return iter(self._transforms)

    def __len__(self) -> int:
        return len(self._transforms)

    def __getitem__(self, position: int) -> Transform:
        return self._transforms[position]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Chain) and self._transforms == other._transforms

    def __hash__(self) -> int:
        return hash(self._transforms)

    def __repr__(self) -> str:
        return f"Chain({' -> '.join(str(transform) for transform in self)})"

    def find(self, spec_class: type[Spec]) -> Spec | None:
        """The first spec of a class, or None."""
        return next((spec for spec in self if isinstance(spec, spec_class)), None)

    @property
    def gathers(self) -> bool:
        """Whether an update may be of several micro-batches."""
        accumulate = self.find(Accumulate)
        return self.find(Split) is not None or (accumulate is not None and accumulate.steps != 1)

    @property
    def takes_whole_batches(self) -> bool:
        """Whether the loss is taken of whole batches, that are cut into slices."""
        split = self.find(Split)
        return split is not None and bool(split.whole_batch_loss)

    @property
    def micro_batch_stages(self) -> tuple[Transform, ...]:
        """The stages before `Accumulate`, which act on each micro-batch's gradient."""
        return self._stages()[0]

    @property
    def update_stages(self) -> tuple[Transform, ...]:
        """The stages after `Accumulate` (all, where there is none): they act once an update."""
        return self._stages()[1]

    def _stages(self) -> tuple[tuple[Transform, ...], tuple[Transform, ...]]:
        before: list[Transform] = []
        after: list[Transform] = []
        for spec in self:
            if isinstance(spec, Accumulate):
                before, after = after, []
            elif spec.role == "stage":
                after.append(spec)
        return tuple(before), tuple(after)

    def to_config(self) -> dict[str, Any]:
        """The chain in JSON's types, with versions; `from_config` gives back an equal chain.

        Raises:
            ValueError: A spec's class, or a weighting function, is not registered.

        Example:
            >>> import ga_transform as ga
            >>> ga.Chain(ga.Scale(2.0)).to_config()
            {'version': 1, 'transforms': [{'kind': 'Scale', 'version': 1, 'factor': 2.0}]}
        """
        return {"version": _VERSION, "transforms": [_spec_to_config(spec) for spec in self]}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Chain:
        """The chain of a config, every field checked as if it were typed by hand.

        Raises:
            ValueError, TypeError: The config names an unknown kind, field or version, or a
                field's value breaks its rule.
        """
        if not isinstance(config, Mapping) or not isinstance(config.get("transforms"), list):
            raise wrong_type(
                "Chain.from_config",
                "given a dict with a list of transforms",
                config,
                "Pass what Chain.to_config returned.",
            )
        _check_version("Chain", config.get("version"), _VERSION)
        return cls(*[_spec_from_config(item) for item in config["transforms"]])


def _check_order(transforms: tuple[Transform, ...]) -> None:
    """Rewrites before all else, one of each that stands once, `Split` before `Accumulate`."""
    seen: list[Transform] = []
    for spec in transforms:
        name = type(spec).__name__
        twin = next((other for other in seen if type(other) is type(spec)), None)
        if twin is not None and not spec.repeatable:
            raise ValueError(
                f"Chain must hold at most one {name}; got two: {twin} and {spec}. Keep one."
            )
        others = [type(other).__name__ for other in seen if other.role != "rewrite"]
        if spec.role == "rewrite" and others:
            raise ValueError(
                f"Chain must hold rewrites before stages; got {name} after {others[-1]}. "
                f"Move {name} to the front."
            )
        if isinstance(spec, Split) and others:
            raise ValueError(
                f"Chain must hold Split before Accumulate and every stage; got Split after "
                f"{others[-1]}. Move Split before {others[0]}."
            )
        split = next((other for other in seen if isinstance(other, Split)), None)
        stages = [type(other).__name__ for other in seen if other.role == "stage"]
        if isinstance(spec, Accumulate) and stages and split and split.whole_batch_loss:
            raise ValueError(
                f"Chain must hold every stage after Accumulate where Split has whole_batch_loss; "
                f"got {stages[0]} before it, and a slice has no loss of its own. Move "
                f"{stages[0]} behind Accumulate."
            )
        leaves_out = isinstance(spec, Accumulate) and spec.on_nonfinite == "micro_batch"
        if leaves_out and split and split.whole_batch_loss:
            raise ValueError(
                "Accumulate.on_nonfinite must be 'window' where Split has whole_batch_loss; got "
                "'micro_batch', and the loss has seen the rows of a slice that is left out. Leave "
                "on_nonfinite out."
            )
        seen.append(spec)


def _spec_to_config(spec: Transform) -> dict[str, Any]:
    config: dict[str, Any] = {"kind": _kind(type(spec)), "version": spec.version}
    for field in attrs.fields(type(spec)):
        if field.init:
            to_json = field.metadata.get("encode", encode)
            config[field.name] = to_json(getattr(spec, field.name))
    return config


def _spec_from_config(config: Any) -> Transform:
    if not isinstance(config, Mapping):
        raise wrong_type("Chain.from_config", "given one dict a transform", config,
                         "Pass what Chain.to_config returned.")  # fmt: skip
    values = dict(config)
    kind, version = values.pop("kind", None), values.pop("version", None)
    spec_class = _KINDS.get(kind) if isinstance(kind, str) else None
    if spec_class is None:
        remedy = did_you_mean(kind, _KINDS)
        if isinstance(kind, str) and ">" in kind:
            remedy += " A transform of your own must be registered before it is loaded."
        raise wrong_value("Chain.from_config kind", "a registered transform", kind, remedy)
    _check_version(kind, version, spec_class.version)
    fields = {field.name: field for field in attrs.fields(spec_class) if field.init}
    for name in values:
        if name not in fields:
            raise ValueError(f"{kind} has no field {shown(name)}. {did_you_mean(name, fields)}")
    for name, field in fields.items():
        if name not in values and field.default is attrs.NOTHING:
            raise ValueError(f"{kind}.{name} must be given; got nothing. Add it to the config.")
    return spec_class(
        **{
            fields[name].alias: fields[name].metadata.get("decode", _decode)(value)
            for name, value in values.items()
        }
    )


def _decode(value: Any) -> Any:
    """A field's value from JSON's types: its lists were tuples."""
    return tuple(map(_decode, value)) if isinstance(value, list) else value


def _check_version(owner: str, version: object, newest: int) -> None:
    if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= newest:
        remedy = "Pass what Chain.to_config returned."
        if isinstance(version, int) and version > newest:
            remedy = "Load it with the later ga_transform that wrote it."
        raise wrong_value(f"{owner} config version", f"an int from 1 to {newest}", version, remedy)
