"""The law: after each update, the weights of plain tf_keras on the concatenated window."""

import cases
import pytest


@pytest.mark.parametrize("windows", cases.WINDOWS)
@pytest.mark.parametrize("model", cases.MODELS)
def test_every_model_and_window(float64, model, windows):
    """Any model, micro-batches of any sizes: the weights of the large batch."""
    cases.assert_law(
        cases.MODELS[model](), cases.OPTIMIZERS["momentum"], cases.WINDOWS[windows], 1e-9
    )


@pytest.mark.parametrize("optimizer", cases.OPTIMIZERS)
@pytest.mark.parametrize("model", ["words", "dense"])
def test_every_optimizer(float64, model, optimizer):
    """Any optimizer of tf_keras, new or legacy, with dense gradients and with slices."""
    # tf_keras's Nadam counts in Python, while it is traced: a flush, which is a trace of its
    # own, counts on where plain training would start anew.
    windows = cases.UNEVEN if optimizer == "nadam" else cases.PARTIAL
    cases.assert_law(cases.MODELS[model](), cases.OPTIMIZERS[optimizer], windows, 1e-9)


@pytest.mark.parametrize("option", cases.OPTIONS)
def test_every_option_of_an_optimizer(float64, option):
    """EMA, weight decay, clips, schedules and loss scaling see updates and nothing else."""
    cases.assert_law(cases.dense(), cases.OPTIONS[option], cases.PARTIAL, 1e-9, epochs=3)


@pytest.mark.parametrize("model", cases.MODELS)
def test_in_float32(model):
    """In float32 the law holds to 1e-4 of the distance travelled."""
    cases.assert_law(cases.MODELS[model](), cases.OPTIMIZERS["adam"], cases.UNEVEN, 1e-4)


@pytest.mark.parametrize(
    "how",
    [
        {"run_eagerly": True},
        pytest.param({"jit_compile": True}, marks=pytest.mark.long),
        {"steps_per_execution": 3},
        {"steps_per_execution": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("model", ["dense", "words"])
def test_every_way_to_run_a_step(float64, model, how):
    """Eagerly, compiled by XLA, and several batches a call."""
    cases.assert_law(cases.MODELS[model](), cases.OPTIMIZERS["adam"], cases.PARTIAL, 1e-9, **how)
