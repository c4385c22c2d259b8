"""Functions in fresh processes, so that what is measured first leaves nothing to what follows.

Run as ``python -m benchmarks.processes MODULE FUNCTION ARGUMENTS`` by `ask`, and by nobody else.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

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
    _tell(function, arguments)
    return _result(_started(function, arguments), limit=None)


def ask_workers(workers: int, function: Callable[..., Any], **arguments: Any) -> Any:
    """What a function returns in the first of several processes, which all run it.

    Args:
        workers: How many; `tf.distribute` finds them in `TF_CONFIG`.
        function, **arguments: As for `ask`.
    """
    _tell(function, arguments)
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(workers)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        addresses = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
    started = []
    try:
        for index in range(workers):
            task = {"type": "worker", "index": index}
            config = json.dumps({"cluster": {"worker": addresses}, "task": task})
            started.append(_started(function, arguments, TF_CONFIG=config))
        results = [_result(process, limit=1800) for process in started]
        return results[0]
    finally:
        for process in started:
            process.kill()
            process.communicate()


def _tell(function: Callable[..., Any], arguments: dict[str, Any]) -> None:
    shown = ", ".join(str(argument) for argument in arguments.values())
    print(f"  {function.__module__}.{function.__name__}({shown})", file=sys.stderr, flush=True)


def _started(
    function: Callable[..., Any], arguments: dict[str, Any], **environment: str
) -> subprocess.Popen[str]:
    question = [function.__module__, function.__name__, json.dumps(arguments)]
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.processes", *question],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _result(process: subprocess.Popen[str], limit: Optional[float]) -> Any:
    """What a process has printed last.

    Args:
        process: It is waited for.
        limit: For how many seconds.
    """
    try:
        output, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired as error:
        raise ProcessFailedError(f"no result after {error.timeout} s") from error
    if process.returncode:
        lines = errors.strip().splitlines() or [f"exit code {process.returncode}"]
        raise ProcessFailedError(lines[-1].strip())
    return json.loads(output.splitlines()[-1])


def ask_or_note(
    notes: list[str],
    case: str,
    function: Callable[..., Any],
    *,
    workers: Optional[int] = None,
    **arguments: Any,
) -> Any:
    """What `ask` returns; or None, and a note of what went wrong.

    Args:
        notes: Takes the note.
        case: What the note begins with.
        workers: How many run it, as for `ask_workers`; None for `ask`.
        function, **arguments: As for `ask`.
    """
    try:
        if workers is not None:
            return ask_workers(workers, function, **arguments)
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
