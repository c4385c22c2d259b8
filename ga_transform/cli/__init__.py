"""ga-transform: saved models converted, looked at and stripped without a script.

Nothing here imports TensorFlow before a file has to be loaded, so that help, wrong usage, paths
that cannot be and chains that break a rule are answered at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
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
        SystemExit: 2 for a wrong usage, 0 for help and version, as argparse does.

    Example:
        >>> from ga_transform.cli import main
        >>> main(["inspect", "no_such_file.keras"])  # the error is on stderr
        1
    """
    options = make_parser().parse_args(arguments)
    try:
        with said_on_one_line(options.quiet), own_modules(options.modules):
            options.run(options)
            sys.stdout.flush()
    except Refusal as refusal:
        say("error", refusal)
        return 1
    except KeyboardInterrupt:
        say("error", "interrupted.")
        return 130
    except BrokenPipeError:  # whoever read the report has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # flushed at the end, too
        return 141
    return 0
