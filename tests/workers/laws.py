"""The law over several workers: what they train, and the plain model that it is compared with.

Every worker has rows of its own in a micro-batch, and another number of them; the plain model has
the rows of all workers and micro-batches of a window as one batch.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cases
import numpy as np
import references
import tensorflow as tf
import tf_keras

import ga_transform as ga

optimizers = tf_keras.optimizers
ALL = -1


@dataclasses.dataclass
class Law:
    """A model that is trained in windows.

    Args:
        case: Makes the model, and what it is compiled with.
        optimizer: Of the model, and of the plain one unless that has its own.
        options: Of `make_accumulating`.
        batches: By window, of how many batches it is.
        most, least: Rows of a worker in a batch.
        short: How many batches at the end of an epoch only the first worker has.
        spoilt: By window and batch, the worker that has an infinite number in it; or `ALL`.
        compile: Further arguments of the model's `compile`.
        plain: The optimizer of the plain model, and further arguments of its `compile`.
        epochs: How often they are trained on.
        feed: How the model is given its data.
        is_long: Whether it is tested only where there is time.
    """

    case: Callable[[], cases.Case] = cases.dense
    optimizer: Callable[[], Any] = cases.OPTIMIZERS["adam"]
    options: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"accum_steps": 3})
    batches: Sequence[int] = (3, 3, 2)
    least: int = 1
    most: int = 6
    short: int = 0
    spoilt: Mapping[tuple[int, int], int] = dataclasses.field(default_factory=dict)
    compile: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    plain: Sequence[Any] = ()
    epochs: int = 2
    feed: str = "fit"
    is_long: bool = False


class ClippedByAGC(optimizers.SGD):
    """Clips by the published formula, in NumPy."""

    def apply_gradients(self, grads_and_vars, **kwargs):
        pairs = [
            (tf.constant(references.clip_by_agc(g, v.numpy(), (0,), 0.02), v.dtype), v)
            for g, v in grads_and_vars
            if g is not None
        ]
        return super().apply_gradients(pairs, **kwargs)


def normed():
    """Batch normalisation of the inputs: its statistics depend on no weight."""
    layers = [
        tf_keras.Input([4]),
        tf_keras.layers.BatchNormalization(momentum=0.7),
        tf_keras.layers.Dense(2),
    ]
    return cases.Case(
        tf_keras.Sequential(layers),
        {"loss": "mse"},
        lambda rng, rows: (
            rng.normal(size=[rows, 4]) * rng.random([rows, 1]) + rng.normal(size=[rows, 1]),
            rng.normal(size=[rows, 2]),
        ),
    )


SPLIT = {"micro_batch_size": 2}
BOTH = {"accum_steps": 2, "micro_batch_size": 2}
SGD, MOMENTUM = cases.OPTIMIZERS["sgd"], cases.OPTIMIZERS["momentum"]

LAWS = {
    "batches": Law(),
    "split": Law(options=SPLIT, batches=[1, 1, 1]),
    "both": Law(options=BOTH, batches=[2, 2, 1]),
    "schedule": Law(
        optimizer=MOMENTUM,
        options={"accum_steps": {0: 2, 2: 3}},
        batches=[2, 2, 3, 3],
        epochs=1,
        is_long=True,
    ),
    "masks": Law(cases.tokens, MOMENTUM, is_long=True),
    "masks, split": Law(cases.tokens, options=BOTH, batches=[2, 1]),
    "sparse": Law(cases.words, SGD),
    "sparse, split": Law(cases.words, SGD, SPLIT, batches=[1, 1, 1]),
    "branches": Law(cases.branches, is_long=True),
    "images": Law(cases.conv, MOMENTUM, BOTH, batches=[2, 1], is_long=True),
    "legacy": Law(optimizer=cases.OPTIMIZERS["legacy adam"], is_long=True),
    "no rows": Law(least=0, most=2),
    "no rows, split": Law(
        cases.tokens, SGD, BOTH, batches=[2, 2, 1], least=0, most=3, is_long=True
    ),
    "carry": Law(options={"accum_steps": 3, "remainder": "carry"}),
    "drop": Law(options={"accum_steps": 3, "remainder": "drop"}),
    "steps_per_execution": Law(compile={"steps_per_execution": 4}, is_long=True),
    "eager": Law(compile={"run_eagerly": True}, batches=[3, 1]),
    "short": Law(feed="short", short=3, epochs=2),
    "short, split": Law(options=BOTH, batches=[2, 2, 1], feed="short", short=3),
    "a loop": Law(feed="loop", epochs=1),
    "train_on_batch": Law(feed="train_on_batch", epochs=1, is_long=True),
    "agc": Law(
        optimizer=lambda: optimizers.SGD(0.1),
        options={"transforms": [ga.Accumulate(3), ga.ClipByAGC(0.02, exclude_head=False)]},
        plain=(lambda: ClippedByAGC(0.1), {"run_eagerly": True}),
    ),
    "global norm": Law(
        optimizer=lambda: optimizers.SGD(0.5, momentum=0.9),
        options={"transforms": [ga.Accumulate(3), ga.ClipByGlobalNorm(0.1)]},
        plain=(lambda: optimizers.SGD(0.5, momentum=0.9, global_clipnorm=0.1), {}),
    ),
    "skipped windows": Law(batches=[3, 3, 3, 2], spoilt={(1, 1): 1, (3, 0): 0}),
    "skipped micro-batches": Law(
        options={"transforms": [ga.Accumulate(3, on_nonfinite="micro_batch")]},
        batches=[3, 3, 2],
        spoilt={(0, 0): 0, (1, 2): 1, (2, 0): 1},
    ),
    "skipped windows, split": Law(
        options={"transforms": [ga.Split(2), ga.Accumulate(2)]},
        batches=[2, 2, 1],
        spoilt={(1, 0): 1},
        is_long=True,
    ),
}


def batches_of(law, workers, seed=0):
    """By window and batch, what each worker has of it."""
    rng = np.random.default_rng(seed)
    made = law.case().batch
    windows, ahead = [], sum(law.batches)
    for window, count in enumerate(law.batches):
        batches = []
        for place in range(count):
            parts = []
            for index in range(workers):
                rows = rng.integers(law.least, law.most + 1)
                part = made(rng, 0 if index and ahead <= law.short else rows)
                if law.spoilt.get((window, place)) in (index, ALL):
                    part[0][0, 0] = np.inf
                parts.append(part)
            batches.append(parts)
            ahead -= 1
        windows.append(batches)
    return windows


def build(law, optimizer, **further):
    """The model, compiled; the same on every worker."""
    tf_keras.utils.set_random_seed(3)
    case = law.case()
    case.model.compile(optimizer(), **{**case.compile, **further})
    return case.model


def windows_of(law, workers):
    """The rows of each window, in the order of training."""
    accumulate = ga.Chain(*law.options.get("transforms", ())).find(ga.Accumulate)
    skips_windows = accumulate is None or accumulate.on_nonfinite == "window"
    windows = []
    for window, batches in enumerate(batches_of(law, workers)):
        spoilt = {place: worker for (w, place), worker in law.spoilt.items() if w == window}
        kept = [
            [part for worker, part in enumerate(batch) if spoilt.get(place) not in (worker, ALL)]
            for place, batch in enumerate(batches)
        ]
        windows += [] if spoilt and skips_windows else [kept]
    remainder = law.options.get("remainder", "flush")
    if remainder == "drop":
        windows = windows[:-1]
    windows = windows * law.epochs
    if remainder == "carry":
        batches, steps = sum(windows, []), law.options["accum_steps"]
        whole = len(batches) - len(batches) % steps
        windows = [batches[start : start + steps] for start in range(0, whole, steps)]
    return [cases.concatenate(sum(batches, [])) for batches in windows]


def plain(law, workers):
    """The plain model, trained on whole windows, and its weights before that."""
    optimizer, further = law.plain or (law.optimizer, {})
    model = build(law, optimizer, **further)
    start = cases.weights_of(model)
    model.fit(cases.dataset(windows_of(law, workers)), verbose=0)
    return model, start


def of_worker(strategy, batches):
    """The data of all workers, of which each has made its own: without end."""
    index = strategy.cluster_resolver.task_id

    def make(context):
        return cases.dataset([parts[index] for parts in batches]).repeat()

    return strategy.distribute_datasets_from_function(make)


def state_of(model):
    """What is compared."""
    return {
        "weights": model.get_weights(),
        "iterations": int(model.optimizer.iterations.numpy()),
        "pending": model.pending_micro_batches,
        "skipped": [model.skipped_windows, model.skipped_micro_batches],
    }


def converted(strategy, law):
    with strategy.scope():
        model = build(law, law.optimizer, **law.compile)
        return ga.make_accumulating(model, **law.options)


def train(strategy, name):
    """Train in windows, in float64."""
    tf_keras.backend.set_floatx("float64")
    law = LAWS[name]
    batches = sum(batches_of(law, strategy.num_replicas_in_sync), [])
    model = converted(strategy, law)
    FEEDS[law.feed](strategy, model, batches, law.epochs)
    return state_of(model)


def _fit(strategy, model, batches, epochs):
    data = of_worker(strategy, batches)
    model.fit(data, steps_per_epoch=len(batches), epochs=epochs, verbose=0)


def _loop(strategy, model, batches, epochs):
    """A loop of one's own, around the model's step."""

    data = iter(of_worker(strategy, batches))

    @tf.function(input_signature=[data.element_spec])
    def step(batch):
        strategy.run(model.train_step, [batch])

    for _ in range(epochs):
        for _ in batches:
            step(next(data))
        model.flush()


def _train_on_batch(strategy, model, batches, epochs):
    """All workers give the rows of all, of which each takes its share."""
    for _ in range(epochs):
        for batch in batches:
            model.train_on_batch(*cases.concatenate(batch))
        model.flush()


def _short(strategy, model, batches, epochs):
    """`fit` until no worker has more data: some have run out before."""
    index = strategy.cluster_resolver.task_id
    parts = [each[index] for each in batches if len(each[index][0])]
    kinds = cases.dataset([batches[0][0], batches[1][0]]).element_spec

    def make(context):
        return tf.data.Dataset.from_generator(lambda: iter(parts), output_signature=kinds)

    data = strategy.distribute_datasets_from_function(make)
    for _ in range(epochs):
        model.fit(data, steps_per_epoch=len(batches), verbose=0)


FEEDS = {"short": _short, "fit": _fit, "loop": _loop, "train_on_batch": _train_on_batch}


def fit_arrays(strategy):
    """`fit` on arrays, of which TensorFlow gives each worker its share; the last has one row."""
    tf_keras.backend.set_floatx("float64")
    law, (x, y) = ARRAYS, arrays()
    model = converted(strategy, law)
    history = model.fit(x, y, batch_size=6, epochs=2, shuffle=False, verbose=0)
    return {**state_of(model), "loss": history.history["loss"]}


ARRAYS = Law(cases.conv, MOMENTUM, {"accum_steps": 3})


def arrays(rows=31):
    """The data of `fit_arrays`."""
    return ARRAYS.case().batch(np.random.default_rng(0), rows)


def fit_arrays_plainly():
    """The plain model on three batches in one, and its weights before that."""
    model = build(ARRAYS, ARRAYS.optimizer)
    start = cases.weights_of(model)
    model.fit(*arrays(), batch_size=18, epochs=2, shuffle=False, verbose=0)
    return model, start


NORMED = Law(normed, SGD, {"accum_steps": 3, "batch_norm": "pooled"})


def pool(strategy):
    """Batch normalisation whose moving statistics are of the rows of all workers."""
    tf_keras.backend.set_floatx("float64")
    batches = sum(batches_of(NORMED, strategy.num_replicas_in_sync), [])
    model = converted(strategy, NORMED)
    _fit(strategy, model, batches, NORMED.epochs)
    return state_of(model)


def scale_losses(strategy):
    """In mixed precision: training with a loss scale that grows, and shrinks where one overflows."""
    law = Law(
        batches=[3] * 6,
        spoilt={(3, 1): 0},
        options={
            "accum_steps": 3,
            "precision": ga.Precision("mixed_float16", growth_steps=2),
        },
    )
    batches = sum(batches_of(law, strategy.num_replicas_in_sync), [])
    model = converted(strategy, law)
    start = model.get_weights()
    scales = []
    note = tf_keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda *_: scales.append(float(model.optimizer.loss_scale.numpy()))
    )
    data = of_worker(strategy, batches)
    model.fit(data, steps_per_epoch=len(batches), callbacks=[note], verbose=0)
    return {**state_of(model), "start": start, "scales": scales}
