"""Stages on replicas: on updates as on one device, on micro-batches as each replica has them."""

import attrs
import cases
import feeding
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import ga_transform as ga

pytestmark = pytest.mark.usefixtures("float64")

STEPS = 2


@attrs.frozen
class Signed(ga.Transform):
    """Gradients of one size, which tells a sum over replicas from its parts."""

    size: float = 0.1


@ga.register_transform(Signed, package="mirrored")
def signed(spec, gradients, variables, model):
    assert len(gradients) == len(variables)
    return [spec.size * tf.sign(tf.convert_to_tensor(each)) for each in gradients]


#: So tight that each of them acts.
STAGES = {
    "agc": [ga.ClipByAGC(0.01)],
    "global norm": [ga.ClipByGlobalNorm(0.05)],
    "norm": [ga.ClipByNorm(0.02)],
    "value": [ga.ClipByValue(0.01)],
    "scale": [ga.Scale(0.25)],
    "own": [Signed()],
    "several": [ga.ClipByAGC(0.05), ga.Scale(3.0), ga.ClipByGlobalNorm(0.05)],
}


def make(name="dense"):
    case = cases.MODELS[name]()
    case.model.compile(tf_keras.optimizers.SGD(0.5), **case.compile)
    return case.model


def windows_of(strategy, shape, name="dense"):
    rows = feeding.rows_of(strategy, shape, steps=(STEPS, STEPS))
    return feeding.make_windows(cases.MODELS[name]().batch, rows)


@pytest.mark.parametrize(
    ("stage", "split"),
    [*((name, False) for name in STAGES if name != "several"), ("several", True)],
)
def test_after_accumulate(strategy, stage, split):
    """They act once, on the gradient of all rows: as on one device that has them in a batch."""
    like = make()
    start = cases.weights_of(like)
    chain = [*([ga.Split(2)] if split else []), ga.Accumulate(STEPS), *STAGES[stage]]
    model = feeding.convert(strategy, feeding.mirrored(strategy, make, like), transforms=chain)
    alone = ga.make_accumulating(like, transforms=[ga.Accumulate(1), *STAGES[stage]])
    windows = windows_of(strategy, "empty")
    feeding.fit(strategy, model, windows)
    feeding.fit_plain(alone, windows)
    cases.assert_same_weights(model, alone, start, 1e-9)
    assert_acted(alone, like, windows)


def assert_acted(alone, plain, windows):
    feeding.fit_plain(plain, windows)
    moved = [np.abs(a - b).max() for a, b in zip(cases.weights_of(plain), cases.weights_of(alone))]
    assert max(moved) > 1e-3, "the stage has done nothing: the test could not fail"


def test_of_slices(strategy):
    """Rows that several replicas have a gradient for are added up before they are clipped."""
    like = make("words")
    start = cases.weights_of(like)
    chain = [ga.Accumulate(STEPS), *STAGES["agc"]]
    model = feeding.convert(
        strategy, feeding.mirrored(strategy, make_words, like), transforms=chain
    )
    alone = ga.make_accumulating(like, transforms=[ga.Accumulate(1), *STAGES["agc"]])
    windows = windows_of(strategy, "empty", "words")
    feeding.fit(strategy, model, windows)
    feeding.fit_plain(alone, windows)
    cases.assert_same_weights(model, alone, start, 1e-9)
    assert_acted(alone, like, windows)


def make_words():
    return make("words")


@pytest.mark.parametrize("stage", ["agc", "norm", "own"])
def test_before_accumulate(strategy, stage):
    """They act on each replica's micro-batch: as on one device that has these one by one."""
    like = make()
    start = cases.weights_of(like)
    windows = windows_of(strategy, "uneven")
    chain = [*STAGES[stage], ga.Accumulate(STEPS)]
    model = feeding.convert(strategy, feeding.mirrored(strategy, make, like), transforms=chain)
    one_by_one = STEPS * strategy.num_replicas_in_sync
    alone = ga.make_accumulating(like, transforms=[*STAGES[stage], ga.Accumulate(one_by_one)])
    feeding.fit(strategy, model, windows)
    steps = [step for window in windows for step in window]
    alone.fit(cases.dataset([batch for step in steps for batch in step]), verbose=0)
    cases.assert_same_weights(model, alone, start, 1e-9)
    assert_acted(alone, like, windows)


def test_without_accumulate(strategy):
    """A stage alone acts on each update, once."""
    like = make()
    start = cases.weights_of(like)
    chain = STAGES["global norm"]
    model = feeding.convert(strategy, feeding.mirrored(strategy, make, like), transforms=chain)
    alone = ga.make_accumulating(like, transforms=chain)
    windows = feeding.single(windows_of(strategy, "equal"))
    feeding.fit(strategy, model, windows)
    feeding.fit_plain(alone, windows)
    cases.assert_same_weights(model, alone, start, 1e-9)
    assert_acted(alone, like, windows)
