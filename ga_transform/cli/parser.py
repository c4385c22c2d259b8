"""What can be asked for on the command line, and how that is told."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, Union

import ga_transform
from ga_transform.cli import commands as verbs
from ga_transform.cli.speech import PROGRAM, say

__all__ = ["make_parser"]

_DESCRIPTION = """\
Converts saved tf_keras models to exact gradient accumulation, and back.
A model is a .keras file, an HDF5 file (.h5, .hdf5) or a SavedModel's folder."""

_EXAMPLES = """\
examples:
  ga-transform convert model.keras large.keras --accum-steps 8
  ga-transform inspect large.keras
  ga-transform strip large.keras model.keras

ga-transform COMMAND --help shows the options of a command.
"""

_CODES = """\
Exit codes: 0 done; 1 what was asked for cannot be done, and the reason is on stderr; 2 wrong usage;
130 interrupted; 128 + n ended by signal n. After 1 and 2 OUT is as it was, after a signal it is that
or all of the new one."""

_CONVERT = """\
Loads the plain model IN, and saves as OUT one that trains on micro-batches as IN would on the large
batch. OUT's name says in which format: .keras, .h5 or .hdf5, and else a SavedModel's folder.
Training goes on where it was, if IN's format kept the optimizer."""

_CONVERT_EXAMPLES = """\
examples:
  ga-transform convert model.keras large.keras --accum-steps 8
  ga-transform convert model.h5 large.keras --micro-batch-size 32 --precision mixed_bfloat16
  ga-transform convert saved_model large --accum-steps 0:1,1000:8 --agc 0.02 --import my_layers
"""

_INSPECT = """\
Prints what a saved model is: format, class, updates made, and of a converted one its chain, the
micro-batches that are pending, and what is done to which layer."""

_INSPECT_EXAMPLES = """\
examples:
  ga-transform inspect large.keras
  ga-transform inspect large.keras --json
"""

_STRIP = """\
Loads the converted model IN, and saves as OUT the plain one: same weights, compile and optimizer
state, layers as they were before. Pending micro-batches are left out, with a warning."""

_STRIP_EXAMPLES = """\
example:
  ga-transform strip large.keras model.keras
"""


class _Parser(argparse.ArgumentParser):
    """A parser that says on one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        say("error", f"{message.rstrip('.')}. See {self.prog} --help.")
        self.exit(2)


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line, whose options know what to `run`."""
    parser = _Parser(
        prog=PROGRAM,
        description=_DESCRIPTION,
        epilog=f"{_EXAMPLES}\n{_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--version", action="version", version=f"{PROGRAM} {ga_transform.__version__}"
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(
        name: str,
        run: Callable[[argparse.Namespace], None],
        short: str,
        text: str,
        examples: str,
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=short,
            description=text,
            epilog=f"{examples}\n{_CODES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.set_defaults(run=run)
        return command

    convert = add(
        "convert",
        verbs.convert,
        "a plain model to one that accumulates",
        _CONVERT,
        _CONVERT_EXAMPLES,
    )
    _add_places(convert, "a plain model")
    _add_transforms(convert)
    inspect = add("inspect", verbs.inspect, "what a saved model is", _INSPECT, _INSPECT_EXAMPLES)
    inspect.add_argument("source", metavar="FILE", type=_path, help="a saved model")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    strip = add("strip", verbs.strip, "a converted model to the plain one", _STRIP, _STRIP_EXAMPLES)
    _add_places(strip, "a converted model")
    for command in (convert, inspect, strip):
        quiet = "no warnings" if command is inspect else "no report and no warnings"
        _add_common(command, quiet)
    return parser


def _add_places(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument("source", metavar="IN", type=_path, help=what)
    command.add_argument("target", metavar="OUT", type=_path, help="where to save; must be new")
    command.add_argument("--force", action="store_true", help="write over OUT")


def _add_transforms(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("what to do (at least one)")
    group.add_argument(
        "--accum-steps",
        type=_steps,
        metavar="STEPS",
        help="batches an update; or a schedule update:steps, as 0:1,1000:8",
    )
    group.add_argument(
        "--micro-batch-size",
        type=int,
        metavar="ROWS",
        help="rows a slice, into which every batch is cut",
    )
    group.add_argument(
        "--whole-batch-loss",
        nargs="?",
        const=True,
        default=False,
        metavar="gathered",
        help="take the loss of all slices together; with 'gathered', of all replicas",
    )
    group.add_argument(
        "--agc",
        nargs="?",
        const=True,
        type=_clip_factor,
        metavar="FACTOR",
        help="adaptive gradient clipping of each update; the factor is 0.01 if left out",
    )
    group.add_argument(
        "--precision", metavar="POLICY", help="mixed_float16, mixed_bfloat16 or float32"
    )
    group.add_argument(
        "--batch-norm",
        metavar="MODE",
        help="what moving statistics do: keep, momentum, pooled or freeze",
    )
    group.add_argument(
        "--remainder",
        default="flush",
        metavar="WHAT",
        help="what becomes of a partial window at the end of an epoch: flush (apply it; the "
        "default), carry or drop; with --accum-steps",
    )
    group.add_argument(
        "--chain",
        type=_path,
        metavar="FILE",
        help="the whole chain as JSON, as Chain.to_config gives it, instead of the above",
    )


def _add_common(command: argparse.ArgumentParser, quiet: str) -> None:
    command.add_argument(
        "--import",
        dest="modules",
        action="append",
        default=[],
        type=_module,
        metavar="MODULE",
        help="import a module first, which registers layers, losses or transforms; the current "
        "folder is searched, too (repeatable)",
    )
    command.add_argument(
        "--unsafe",
        action="store_true",
        help="run the code of lambdas that the file holds; only if you trust it",
    )
    command.add_argument("--quiet", action="store_true", help=quiet)


def _path(text: str) -> Path:
    if not text:  # which would be the current folder
        raise argparse.ArgumentTypeError("must be a path; got ''")
    return Path(text)


def _module(text: str) -> str:
    if text.endswith(".py") or Path(text).name != text:
        raise argparse.ArgumentTypeError(
            f"must be the name of a module; got {text!r}, a path. Name it {Path(text).stem}, where "
            "its folder is the current one, or on PYTHONPATH."
        )
    return text


def _steps(text: str) -> Union[int, dict[int, int]]:
    """A count, or a schedule.

    >>> _steps("0:1,1000:8")
    {0: 1, 1000: 8}
    """
    with contextlib.suppress(ValueError):
        if ":" not in text:
            return int(text)
        pairs = [part.split(":") for part in text.split(",")]
        schedule = {int(update): int(steps) for update, steps in pairs}
        if len(schedule) == len(pairs):
            return schedule
    raise argparse.ArgumentTypeError(
        f"must be an int, or a schedule update:steps as 0:1,1000:8; got {text!r}"
    )


def _clip_factor(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be a number, or left out; got {text!r}. Write --agc after IN and OUT."
        ) from None
