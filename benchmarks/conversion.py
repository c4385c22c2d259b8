"""conversion: what it costs before the first update: imports, converting, tracing."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any

from benchmarks.processes import ask_or_note
from benchmarks.report import Figure, Outcome, figure_of_rounds, median_figure

__all__ = ["run"]

IMPORTS = ("import ga_transform", "import ga_transform.conversion")
CONVERTED = ("ResNet50",)
TRACED = ("transformer", "residual CNN")
QUICK_MODELS = ("tiny MLP",)
#: Micro-batches a window.
WINDOWS = (2, 8, 64)


def run(is_quick: bool) -> Outcome:
    """All of it; each part in a process of its own, imports in several."""
    rounds = 1 if is_quick else 5
    notes: list[str] = []
    # The first may have to write the byte code.
    _, *answers = [ask_or_note(notes, "imports", import_times) for _ in range(1 + rounds)]
    raw: dict[str, Any] = {"imports": [each for each in answers if each is not None]}
    figures = [
        median_figure("fresh process", name, [each[name] for each in raw["imports"]], "ms")
        for name in IMPORTS
    ]
    for measure, to_figures, models, arguments in (
        (conversion_times, _conversion_figures, CONVERTED, {"rounds": rounds}),
        (tracing_times, _tracing_figures, TRACED, {"rounds": rounds}),
        (graph_nodes, _node_figures, TRACED, {}),
    ):
        for model in QUICK_MODELS if is_quick else models:
            part = f"{model}, {measure.__name__}"
            raw[part] = ask_or_note(notes, part, measure, model=model, **arguments)
            figures += to_figures(model, raw[part] or {})
    return Outcome(figures, notes, raw)


def _conversion_figures(model: str, seconds: dict[str, list[float]]) -> list[Figure]:
    return [
        median_figure(model, "in place", seconds.get("in place", []), "s"),
        figure_of_rounds(model, seconds, "copy", "clone_model + set_weights"),
    ]


def _tracing_figures(model: str, seconds: dict[str, list[float]]) -> list[Figure]:
    ways = ("converted", "split")
    return [figure_of_rounds(f"{model}, first trace", seconds, way, "plain") for way in ways]


def _node_figures(model: str, nodes: dict[str, list[int]]) -> list[Figure]:
    windows = ", ".join(map(str, WINDOWS))
    return [
        Figure(f"{model}, {way} of {windows}", "graph nodes, most / fewest", max(of) / min(of))
        for way, of in nodes.items()
    ]


# ---- in processes of their own ---------------------------------------------------------------


def import_times() -> dict[str, float]:
    """Milliseconds of the imports, one after the other, when TensorFlow is there already."""
    import tensorflow as tf
    import tf_keras  # noqa: F401  (its cost is not ours, and it is loaded only now)

    tf.constant(0)

    def milliseconds(module: str) -> float:
        begin = time.perf_counter()
        importlib.import_module(module)
        return (time.perf_counter() - begin) * 1e3

    package = milliseconds("ga_transform")
    # What a user waits for who converts at once.
    whole = package + milliseconds("ga_transform.conversion")
    return dict(zip(IMPORTS, (package, whole)))


def conversion_times(model: str, rounds: int) -> dict[str, list[float]]:
    """The seconds of converting a model in place and with a copy, and of a clone."""
    import tf_keras

    import ga_transform as ga
    from benchmarks.timing import interleaved
    from benchmarks.workloads import WORKLOADS

    plain = WORKLOADS[model].compiled()

    def in_place() -> float:
        seconds = _seconds(lambda: ga.make_accumulating(plain, accum_steps=8, inplace=True))
        ga.strip_accumulating(plain, inplace=True)
        return seconds

    def copy() -> float:
        return _seconds(lambda: ga.make_accumulating(plain, accum_steps=8))

    def clone() -> float:
        return _seconds(lambda: tf_keras.models.clone_model(plain).set_weights(plain.get_weights()))

    importlib.import_module("ga_transform.conversion")
    runs = {"in place": in_place, "copy": copy, "clone_model + set_weights": clone}
    return interleaved(runs, rounds)


def tracing_times(model: str, rounds: int) -> dict[str, list[float]]:
    """How much longer the first `train_on_batch` of a fresh model takes than its second."""
    from benchmarks.contenders import CONTENDERS
    from benchmarks.timing import interleaved
    from benchmarks.workloads import WORKLOADS

    workload = WORKLOADS[model]

    def first_trace(way: str) -> float:
        contender = CONTENDERS[way]
        trained = contender.build(workload)
        rows = workload.rows(contender.micro_batches_a_batch * workload.micro_batch_size)
        first, second = (_seconds(lambda: trained.train_on_batch(*rows)) for _ in range(2))
        return first - second

    first_trace("plain")  # what TensorFlow sets up once
    return interleaved(
        {way: lambda way=way: first_trace(way) for way in ("plain", "converted", "split")}, rounds
    )


def graph_nodes(model: str) -> dict[str, list[int]]:
    """The nodes of the training function's graph, functions within it included.

    Returns:
        By the way of accumulating, the counts for windows of `WINDOWS` micro-batches.
    """
    import ga_transform as ga
    from benchmarks.data import endless_batches
    from benchmarks.workloads import WORKLOADS

    workload = WORKLOADS[model]

    def nodes(batch_size: int, **chain: int) -> int:
        trained = workload.compiled()
        ga.make_accumulating(trained, inplace=True, **chain)
        batches = endless_batches(workload.rows(batch_size), batch_size)
        trained.fit(batches, steps_per_epoch=2, verbose=0)  # the first trace makes variables
        graph = trained.train_tf_function.get_concrete_function(iter(batches)).graph.as_graph_def()
        return len(graph.node) + sum(len(each.node_def) for each in graph.library.function)

    size = 4  # rows: no node depends on them
    return {
        "accum_steps": [nodes(size, accum_steps=steps) for steps in WINDOWS],
        "slices": [nodes(slices * size, micro_batch_size=size) for slices in WINDOWS],
    }


def _seconds(action: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin
