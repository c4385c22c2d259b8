"""ga-transform: saved models converted, looked at and stripped without a script.

Nothing here imports TensorFlow before a file has to be loaded, so that help, wrong usage, paths
that cannot be and chains that break a rule are answered at once.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Optional

from ga_transform.cli.files import own_modules
from ga_transform.cli.parser import make_parser
from ga_transform.cli.speech import Refusal, said_on_one_line, say

__all__ = ["main"]


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run the command line.

    Args:
        arguments: Those of the command, without its name; None takes the process's.

    Returns:
        The exit code: 0 done, 1 what was asked for cannot be done, 130 interrupted,
        141 the report was not read to its end.

    Raises:
        SystemExit: 2 for a wrong usage, 0 for help and version, as argparse does; 128 + n for a
            signal n that ends the process.

    Example:
        >>> from ga_transform.cli import main
        >>> main(["inspect", "no_such_file.keras"])  # the error is on stderr
        1
    """
    options = make_parser().parse_args(arguments)
    try:
        with _unwinding(), said_on_one_line(options.quiet), own_modules(options.modules):
            options.run(options)
    except Refusal as refusal:
        say("error", refusal)
        return 1
    except KeyboardInterrupt:
        say("error", "interrupted.")
        return 130
    except BrokenPipeError:
        return 141
    return 0


@contextlib.contextmanager
def _unwinding() -> Iterator[None]:
    """Have a signal that ends the process leave nothing behind, as Ctrl-C does."""

    def stop(number: int, frame: object) -> None:
        sys.exit(128 + number)

    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    numbers = [getattr(signal, name) for name in names]
    # Others stay with whoever has taken them: nohup, or a program that calls this.
    ours = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():  # which alone may take them
        ours = []
    for number in ours:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)
