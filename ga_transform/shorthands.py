"""The arguments of a conversion, as the chain that they stand for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ga_transform.chain import Chain
from ga_transform.errors import wrong_type
from ga_transform.specs import Accumulate, BatchNorm, ClipByAGC, Precision, Split, Transform

__all__ = ["chain_of"]

#: What each shorthand is where nothing is asked for.
_DEFAULTS: Mapping[str, Any] = {
    "accum_steps": None,
    "micro_batch_size": None,
    "agc": None,
    "precision": None,
    "batch_norm": None,
    "remainder": "flush",
    "whole_batch_loss": False,
}
#: Shorthands that say how, and the one that says what.
_COMPANIONS = {"remainder": "accum_steps", "whole_batch_loss": "micro_batch_size"}


def chain_of(
    owner: str, transforms: Any, *, spelled: Callable[[str], str] = str, **shorthands: Any
) -> Chain:
    """The chain of `transforms`, or else of the shorthands.

    Args:
        owner: Who is called, for errors.
        transforms: A chain or a list of specs; None where there are shorthands.
        spelled: How the caller writes the name of an argument, for errors.
        **shorthands: All of those of `make_accumulating`, by name.

    Raises:
        TypeError, ValueError: Something has a wrong type or breaks a rule, both ways are used,
            or nothing is asked for.
    """
    if shorthands["agc"] is False:
        shorthands["agc"] = None
    given = [name for name, default in _DEFAULTS.items() if _differs(shorthands[name], default)]
    if transforms is None:
        for name, needed in _COMPANIONS.items():
            if name in given and needed not in given:
                raise ValueError(
                    f"{owner} must be given {spelled(needed)} with {spelled(name)}; got "
                    f"{spelled(name)}={shorthands[name]!r} alone. Give {spelled(needed)} too."
                )
        chain = Chain(*_specs(**shorthands))
    else:
        if given:
            whole = spelled("transforms")
            raise ValueError(
                f"{owner} must be given {whole} or shorthands, not both; got {whole} and "
                f"{', '.join(map(spelled, given))}. Put all of it into {whole}."
            )
        if not isinstance(transforms, (list, tuple, Chain)):
            raise wrong_type(
                f"{owner}.transforms",
                "a Chain or a list of specs",
                transforms,
                "For example [Accumulate(steps=8), ClipByAGC()].",
            )
        chain = Chain(*transforms)
    if not len(chain):
        raise ValueError(
            f"{owner} must be asked for something to do; got nothing. For example "
            f"{spelled('accum_steps')}=8."
        )
    return chain


def _differs(value: Any, default: Any) -> bool:
    # Types first: what NumPy compares is no bool.
    return type(value) is not type(default) or value != default


def _specs(
    accum_steps: Any,
    micro_batch_size: Any,
    agc: Any,
    precision: Any,
    batch_norm: Any,
    remainder: Any,
    whole_batch_loss: Any,
) -> Iterator[Transform]:
    """What each shorthand stands for, in the order of a chain."""
    if precision is not None:
        yield precision if isinstance(precision, Precision) else Precision(precision)
    if batch_norm is not None:
        yield batch_norm if isinstance(batch_norm, BatchNorm) else BatchNorm(batch_norm)
    if micro_batch_size is not None:
        yield Split(micro_batch_size, whole_batch_loss)
    if accum_steps is not None:
        yield Accumulate(accum_steps, remainder=remainder)
    if agc is True:
        yield ClipByAGC()
    elif agc is not None:
        yield agc if isinstance(agc, ClipByAGC) else ClipByAGC(agc)
