"""What replicas are fed, and the law: as plain tf_keras on one device, on all rows together.

A step is a list with one batch for each replica, a window a list of steps.
"""

import cases
import numpy as np
import tensorflow as tf

import ga_transform as ga

#: Batches a window; the last window of an epoch has fewer, and is left to its end.
STEPS = 3
WAYS = {
    "across": {"accum_steps": STEPS},
    "split": {"micro_batch_size": 2},
    "both": {"accum_steps": STEPS, "micro_batch_size": 2},
}
SHAPES = ("equal", "uneven", "empty")


def rows_of(strategy, shape, steps=(STEPS, STEPS - 1)):
    """Row counts by window, step and replica.

    Args:
        strategy: How many replicas there are.
        shape: One of `SHAPES`; "empty" is uneven, with no rows for one replica of the last step.
        steps: How many each window has.
    """
    rng = np.random.default_rng(len(steps))
    replicas = strategy.num_replicas_in_sync
    if shape == "equal":
        return [np.full([count, replicas], 3).tolist() for count in steps]
    windows = [rng.integers(1, 6, size=[count, replicas]).tolist() for count in steps]
    if shape == "empty":
        windows[-1][-1][-1] = 0
    return windows


def make_windows(batch, rows, seed=0):
    """Batches by window, step and replica, of a function that makes one."""
    rng = np.random.default_rng(seed)
    return [[[batch(rng, count) for count in step] for step in window] for window in rows]


def single(windows):
    """Each step of some windows as a window of its own."""
    return [[step] for window in windows for step in window]


def is_split_only(way):
    return "accum_steps" not in way


def joined(window):
    """One batch of all rows of a window."""
    return cases.concatenate([batch for step in window for batch in step])


def distributed(strategy, steps):
    """A pipeline without end: of each step, each replica gets its batch."""
    data = cases.dataset([batch for step in steps for batch in step]).repeat()
    return strategy.distribute_datasets_from_function(lambda _: data)


def per_replica(strategy, step):
    """What the replicas are given in one step."""

    def of(context):
        batch = step[context.replica_id_in_sync_group]
        return tf.nest.map_structure(tf.constant, batch)

    return strategy.experimental_distribute_values_from_function(of)


def fit(strategy, model, windows, epochs=1, **arguments):
    steps = [step for window in windows for step in window]
    return model.fit(
        distributed(strategy, steps),
        steps_per_epoch=len(steps),
        epochs=epochs,
        verbose=0,
        **arguments,
    ).history


def fit_plain(model, windows, epochs=1, **arguments):
    """Train on each window as one batch: without a graph, which would take longer to trace."""
    model.run_eagerly = True
    return model.fit(
        cases.dataset(map(joined, windows)), epochs=epochs, verbose=0, **arguments
    ).history


def mirrored(strategy, make, like):
    """A model made under the strategy, with the weights of one that is not."""
    with strategy.scope():
        model = make()
        model.set_weights(like.get_weights())
    return model


def convert(strategy, model, **way):
    with strategy.scope():
        return ga.make_accumulating(model, **way)


def maker(name, optimizer, **compile_arguments):
    """A function that makes one of the models of the tables, compiled; and its batches."""

    def make():
        case = cases.MODELS[name]()
        case.model.compile(optimizer(), **{**case.compile, **compile_arguments})
        return case.model

    return make, cases.MODELS[name]().batch


def updates(model):
    return int(model.optimizer.iterations.numpy())


def assert_law(strategy, make, windows, way, *, epochs=2, tolerance=1e-9):
    """After as many updates, the weights of plain tf_keras on one device.

    Args:
        strategy: Where the converted model is made.
        make: Makes a compiled model.
        windows: Batches by window, step and replica.
        way: What `make_accumulating` is given.
        epochs: How often all windows are seen.
        tolerance: Relative to the distance that was travelled.

    Returns:
        The converted model, and what both have logged: ours, and the plain one's.
    """
    plain = make()
    start = cases.weights_of(plain)
    model = convert(strategy, mirrored(strategy, make, plain), **way)
    ours = fit(strategy, model, windows, epochs)
    theirs = fit_plain(plain, windows, epochs)
    cases.assert_same_weights(model, plain, start, tolerance)
    assert updates(model) == updates(plain) == epochs * len(windows)
    assert_mirrored(model)
    return model, ours, theirs


def assert_mirrored(model):
    """All replicas hold the same weights."""
    for variable in model.weights:
        first, *others = (each.numpy() for each in variable.values)
        for other in others:
            np.testing.assert_array_equal(first, other, err_msg=variable.name)


def assert_same_logs(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-9, err_msg=name)
