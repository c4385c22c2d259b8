"""Run the benchmarks and print their tables: ``python -m benchmarks``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import conversion, growth, memory, plot, scaling, sparse, speed, whole_batch
from benchmarks.machine import machine, versions
from benchmarks.report import Outcome, printed, record

FOLDER = Path(__file__).parent
BENCHMARKS = (
    "speed",
    "sparse",
    "memory",
    "conversion",
    "growth",
    "scaling",
    "whole_batch",
    "plot",
)


def main() -> None:
    """Parse the arguments, measure, print, and write."""
    arguments = _arguments()
    runs: dict[str, Callable[[bool], Outcome]] = {
        "speed": speed.run,
        "sparse": sparse.run,
        "memory": memory.run,
        "conversion": conversion.run,
        "growth": growth.run,
        "scaling": scaling.run,
        "whole_batch": partial(whole_batch.run, path=arguments.whole_batch_plot),
        "plot": partial(plot.run, path=arguments.plot),
    }
    about: dict[str, Any] = {
        "versions": versions(),
        "machine": machine(),
        "is_quick": arguments.quick,
    }
    for each in ("versions", "machine"):
        print(", ".join(f"{name} {value}" for name, value in about[each].items()))
    print("Quick: sizes and rounds are too small for conclusions.\n" if arguments.quick else "")
    records: dict[str, Any] = {}
    for name in arguments.only:
        outcome = runs[name](arguments.quick)
        records[name] = record(name, outcome)
        print(printed(name, outcome), flush=True)
        if arguments.json is not None:  # at once, so that what is measured is not lost
            arguments.json.write_text(json.dumps({**about, "benchmarks": records}, indent=1))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=BENCHMARKS,
        default=BENCHMARKS,
        metavar="NAME",
        help=f"some of {', '.join(BENCHMARKS)} (default: all)",
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything, raw, as JSON")
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        default=FOLDER / "batch_size.png",
        help="where the picture of the benchmark plot goes (default: benchmarks/batch_size.png)",
    )
    parser.add_argument(
        "--whole-batch-plot",
        type=Path,
        metavar="FILE",
        default=FOLDER / "whole_batch.png",
        help="where that of whole_batch goes (default: benchmarks/whole_batch.png)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
