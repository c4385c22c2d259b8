"""What the command line says: reports, errors and warnings, each on one line."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Optional

__all__ = ["PROGRAM", "REFUSALS", "Refusal", "refusing", "report", "said_on_one_line", "say"]

PROGRAM = "ga-transform"
#: What files, converting and saving raise where the request is at fault, and not the program.
REFUSALS = (ImportError, NotImplementedError, OSError, TypeError, ValueError)
#: Of what TensorFlow logs, this tells of something lost.
_LOSSES = ("freshly initialized optimizer", "Unable to restore")


class Refusal(Exception):  # noqa: N818  (what is refused is no error of the program)
    """What was asked for cannot be done; the text says why, on one line."""


def report(text: str) -> None:
    """Print what was asked for.

    Raises:
        Refusal: stdout is closed or full, or cannot write it in its encoding.
        BrokenPipeError: Whoever read it has gone, as `head` does.
    """
    if sys.stdout is None:
        raise Refusal("stdout must be open for the report; it is closed.")
    try:
        print(text, flush=True)  # noqa: T201  (as promised)
    except (OSError, UnicodeError) as error:
        if isinstance(error, OSError):
            # What is left of it would be written when the process ends, and fail again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise
        raise Refusal(f"The report cannot be written to stdout: {error}.") from error


def say(kind: str, text: object) -> None:
    """Tell on stderr what went wrong, or may."""
    if sys.stderr is not None:  # which it is where it was closed
        print(f"{PROGRAM}: {kind}: {' '.join(str(text).split())}", file=sys.stderr)  # noqa: T201


@contextlib.contextmanager
def refusing(
    what: Optional[str] = None,
    kinds: tuple[type[Exception], ...] = REFUSALS,
    remedies: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[None]:
    """Have what is raised here be the answer to what was asked for.

    Args:
        what: What went wrong, where the error does not say that itself.
        kinds: What may be raised.
        remedies: By patterns of what an error says, what can be done about it.
    """
    try:
        yield
    except kinds as error:
        if what is None:
            raise Refusal(str(error)) from error
        text = str(error).split("Full object config")[0].strip(" .")
        if not isinstance(error, REFUSALS):  # whose text is a bare word, often
            text = f"{type(error).__name__}: {text}"
        found = [remedy for pattern, remedy in remedies.items() if re.search(pattern, text)]
        raise Refusal(" ".join([f"{what}: {text}.", *found[:1]])) from error


@contextlib.contextmanager
def said_on_one_line(is_quiet: bool) -> Iterator[None]:
    """Warnings on one line each, once; of TensorFlow's logs only errors and what tells of a loss."""
    said: set[str] = set()

    def warn(text: str) -> None:
        if not is_quiet and text not in said:
            said.add(text)
            say("warning", text)

    def is_shown(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if record.levelno >= logging.ERROR or any(loss in text for loss in _LOSSES):
            warn(text)
        return False  # and never as it is, which may be a traceback

    loggers = [logging.getLogger(name) for name in ("tensorflow", "absl")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        warnings.filterwarnings("ignore", "You are saving your model as an HDF5 file")
        warnings.showwarning = lambda message, *_, **__: warn(str(message))
        for logger in loggers:
            logger.setLevel(logging.WARNING)  # whatever it was: filters are asked of what passes
            logger.addFilter(is_shown)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels):
                logger.setLevel(level)
                logger.removeFilter(is_shown)
