"""What can go wrong, in words: who, the rule, the value, the remedy, on one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, Optional

__all__ = [
    "REMEDY_OF_COPY",
    "InexactWarning",
    "did_you_mean",
    "not_copied",
    "shown",
    "wrong_type",
    "wrong_value",
]

REMEDY_OF_COPY = "Pass inplace=True: it copies nothing."


class InexactWarning(UserWarning):
    """Training will not equal plain training on the large batch; the text says where and why."""


def wrong_value(owner: str, rule: str, value: object, remedy: str) -> ValueError:
    """A value of the right type that breaks the rule.

    >>> str(wrong_value("Accumulate.steps", "an int >= 1", 0, "Use 1 to update on every batch."))
    'Accumulate.steps must be an int >= 1; got 0. Use 1 to update on every batch.'
    """
    return ValueError(f"{owner} must be {rule}; got {value!r}. {remedy}")


def wrong_type(owner: str, rule: str, value: object, remedy: str) -> TypeError:
    """A value whose type alone breaks the rule."""
    return TypeError(f"{owner} must be {rule}; got {shown(value)}. {remedy}")


def not_copied(model: Any, reason: str) -> ValueError:
    """A model that is more than what can be made anew."""
    return ValueError(
        f"A model must be what its configs describe to be copied; got {model.name!r}, "
        f"where {reason}. {REMEDY_OF_COPY}"
    )


def shown(value: object) -> str:
    """A value as it stands in an error: short, on one line, with its type.

    >>> shown(2.5)
    '2.5 (float)'
    """
    text = " ".join(repr(value).split())
    if len(text) > 60:
        text = text[:57] + "..."
    return f"{text} ({type(value).__name__})"


def did_you_mean(word: object, known: Iterable[str], otherwise: Optional[str] = None) -> str:
    """A remedy that offers the nearest known word, or else another one, or else all of them.

    >>> did_you_mean("Acumulate", ["Accumulate", "Scale"])
    "Did you mean 'Accumulate'?"
    """
    known = sorted(known)
    close = [each for each in known if each.endswith(f"_{word}")]  # float16, of mixed_float16
    close = close or difflib.get_close_matches(str(word), known, n=1)
    if close:
        return f"Did you mean {close[0]!r}?"
    if otherwise is not None:
        return otherwise
    if not known:
        return "There is none."
    shown_words = ", ".join(known[:10]) + (f" and {len(known) - 10} more" if known[10:] else "")
    return f"Known: {shown_words}."
