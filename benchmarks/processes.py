"""Functions in fresh processes, so that what is measured first leaves nothing to what follows.

Run as ``python -m benchmarks.processes MODULE FUNCTION ARGUMENTS`` by `ask`, and by nobody else.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["ask_or_note", "line_of"]

ROOT = Path(__file__).parent.parent

ENVIRONMENT = {
    # The ancestor is written for tf.keras, which has to be tf_keras for all to be comparable.
    "TF_USE_LEGACY_KERAS": "1",
    "TF_CPP_MIN_LOG_LEVEL": "2",
    # Imports find byte code, as those of an installed package do.
    "PYTHONDONTWRITEBYTECODE": "",
}


class ProcessFailedError(RuntimeError):
    """What a function raised in its process, in a line."""


def ask(function: Callable[..., Any], **arguments: Any) -> Any:
    """What a function returns in a process of its own.

    Args:
        function: One of the top level of a module; it imports TensorFlow by itself.
        **arguments: As JSON has them, and so is what is returned.
    """
    shown = ", ".join(str(argument) for argument in arguments.values())
    print(f"  {function.__module__}.{function.__name__}({shown})", file=sys.stderr, flush=True)
    question = [function.__module__, function.__name__, json.dumps(arguments)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.processes", *question],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise ProcessFailedError(lines[-1].strip())
    return json.loads(done.stdout.splitlines()[-1])


def ask_or_note(notes: list[str], case: str, function: Callable[..., Any], **arguments: Any) -> Any:
    """What `ask` returns; or None, and a note of what went wrong.

    Args:
        notes: Takes the note.
        case: What the note begins with.
        function, **arguments: As for `ask`.
    """
    try:
        return ask(function, **arguments)
    except ProcessFailedError as error:
        notes.append(f"{case}: {error}")
        return None


def line_of(error: Exception) -> str:
    """An error as a line of a note."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def _answer(module: str, function: str, arguments: str) -> None:
    result = getattr(importlib.import_module(module), function)(**json.loads(arguments))
    print(json.dumps(result))


if __name__ == "__main__":
    _answer(*sys.argv[1:])
