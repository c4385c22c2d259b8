"""sparse: what a micro-batch costs when the embedding grows, and the rows it touches do not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks.processes import ask_or_note
from benchmarks.report import Outcome, figure_of_rounds

__all__ = ["run"]

SMALL_TABLE = 10_000

#: Those that move the rows that were touched and no others. (tf_keras's new SGD is none of them:
#: it moves the whole table at each update, by momenta of zero, in plain training too.)
OPTIMIZERS = ("Adagrad", "legacy SGD")

#: Micro-batches a call.
STEPS_PER_EXECUTION = (8, 1)


def run(is_quick: bool) -> Outcome:
    """A large table against a small one, for each optimizer that moves touched rows only."""
    large_table = 100_000 if is_quick else 1_000_000
    rounds, seconds = (3, 0.05) if is_quick else (9, 0.4)
    figures, notes, raw = [], [], {}
    for optimizer in OPTIMIZERS[:1] if is_quick else OPTIMIZERS:
        raw[optimizer] = found = ask_or_note(
            notes,
            optimizer,
            measure,
            optimizer=optimizer,
            tables={"small table": SMALL_TABLE, "large table": large_table},
            rounds=rounds,
            seconds_a_run=seconds,
        )
        figures += [
            figure_of_rounds(
                f"{optimizer}, steps_per_execution={steps}",
                (found or {}).get(str(steps), {}),
                "large table",
                "small table",
            )
            for steps in STEPS_PER_EXECUTION
        ]
    notes.append(f"rows of the tables: {large_table:,} and {SMALL_TABLE:,}; both touch the same")
    return Outcome(figures, notes, raw)


def measure(
    optimizer: str, tables: dict[str, int], rounds: int, seconds_a_run: float
) -> dict[int, dict[str, list[float]]]:
    """The seconds of each round, by steps an execution and by table.

    Args:
        optimizer: Of a workload.
        tables: Rows of the embeddings, by name; the speed of the first sets the windows of all.
        rounds: How often each is run.
        seconds_a_run: How long the first one trains in a round, about.
    """
    import ga_transform as ga
    from benchmarks.contenders import ACCUM_STEPS
    from benchmarks.data import endless_batches
    from benchmarks.timing import interleaved, seconds_of_epoch, steps_that_take
    from benchmarks.workloads import WORKLOADS

    def prepared(table: int, steps_per_execution: int) -> Callable[[int], float]:
        workload = WORKLOADS[f"{optimizer}, {table:,} rows"]
        model = workload.compiled(steps_per_execution=steps_per_execution)
        model = ga.make_accumulating(model, accum_steps=ACCUM_STEPS, inplace=True)
        rows = workload.rows(8 * ACCUM_STEPS * workload.micro_batch_size)
        batches = endless_batches(rows, workload.micro_batch_size)

        def train(windows: int) -> float:
            return seconds_of_epoch(model, batches, windows * ACCUM_STEPS)

        train(2)
        return train

    found = {}
    for steps_per_execution in STEPS_PER_EXECUTION:
        ready = {name: prepared(table, steps_per_execution) for name, table in tables.items()}
        windows = steps_that_take(seconds_a_run, next(iter(ready.values())))
        runs = {name: partial(train, windows) for name, train in ready.items()}
        found[steps_per_execution] = interleaved(runs, rounds)
    return found
