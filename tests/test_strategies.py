"""Strategies of `tf.distribute`: those of one device, what a TPU asks for, and what is refused."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from cases import assert_same_weights, batches_of, concatenate, weights_of

import ga_transform as ga

MIRRORED = "MirroredStrategy", lambda: tf.distribute.MirroredStrategy(["/cpu:0"])
ONE_DEVICE = "OneDeviceStrategy", lambda: tf.distribute.OneDeviceStrategy("/cpu:0")


def network(**arguments):
    layers = [
        tf_keras.Input([4]),
        tf_keras.layers.Dense(6, "tanh", kernel_regularizer="l2"),
        tf_keras.layers.BatchNormalization(),
        tf_keras.layers.Dense(2),
    ]
    model = tf_keras.Sequential(layers, name="net")
    model.compile("adam", "mse", **arguments)
    return model


def batch(rng, rows):
    return rng.normal(size=[rows, 4]), rng.normal(size=[rows, 2])


# ---- one device ----------------------------------------------------------------------------------


@pytest.mark.parametrize("make_strategy", [MIRRORED[1], ONE_DEVICE[1]], ids=["mirrored", "one"])
@pytest.mark.parametrize("jit_compile", [False, True], ids=["graph", "xla"])
@pytest.mark.parametrize("micro_batch_size", [None, 2], ids=["batches", "split"])
@pytest.mark.usefixtures("float64")
def test_a_strategy_of_one_device(make_strategy, jit_compile, micro_batch_size):
    """It is as if there were none, compiled by XLA, too."""
    with make_strategy().scope():
        plain = network(jit_compile=jit_compile)
    batches = batches_of(batch, [[4, 4], [4, 4]])
    alone = tf_keras.models.clone_model(plain)
    alone.compile("adam", "mse")
    alone.set_weights(plain.get_weights())
    models = []
    for model in (plain, alone):
        start = weights_of(model)
        model = ga.make_accumulating(
            model, 2, micro_batch_size=micro_batch_size, batch_norm="pooled"
        )
        data = concatenate(sum(batches, []))
        model.fit(*data, batch_size=4, epochs=2, shuffle=False, verbose=0)
        models.append(model)
    assert_same_weights(*models, start, 1e-9)


# ---- what a TPU asks for -------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch_size", [None, 2], ids=["batches", "split"])
def test_xla_compiles_the_step_of_a_replica(micro_batch_size):
    """All of it, at sizes that are known, and without a call of the host."""
    strategy = MIRRORED[1]()
    with strategy.scope():
        model = ga.make_accumulating(
            network(), 2, micro_batch_size=micro_batch_size, agc=True, batch_norm="pooled"
        )

    @tf.function(jit_compile=True)
    def step(x, y):
        strategy.run(model.train_step, args=((x, y),))

    data = [tf.constant(part, tf.float32) for part in batch(np.random.default_rng(0), 4)]
    for _ in range(2):
        step(*data)
    assert model.optimizer.iterations.numpy() == 1
    compiled = step.experimental_get_compiler_ir(*data)(stage="hlo")
    assert "while" in compiled or micro_batch_size is None
    assert "conditional" in compiled
    sizes_that_vary = re.findall(r"\[[\d,]*<=", compiled)
    calls_of_the_host = re.findall(r"infeed|outfeed|send\(|recv\(|[Cc]allback", compiled)
    assert not sizes_that_vary + calls_of_the_host


# ---- parameter servers ---------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.long)])
def test_parameter_servers(workers):
    """In a process of its own, which is a cluster: `parameter_servers.py` says what is asserted."""
    script = Path(__file__).with_name("parameter_servers.py")
    done = subprocess.run(
        [sys.executable, script, str(workers)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "all hold"


# ---- refused -------------------------------------------------------------------------------------


def test_a_model_from_outside_of_the_scope_is_refused():
    """Before anything is changed."""
    model = network()
    text = (
        "make_accumulating.model must be built under the strategy in whose scope it is converted; "
        "got 'net', built outside of MirroredStrategy. Build it within 'with strategy.scope():', "
        "too."
    )
    with MIRRORED[1]().scope(), pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        ga.make_accumulating(model, 2, inplace=True)
    assert type(model) is tf_keras.Sequential


def test_a_strategy_that_is_not_known_is_refused():
    """By name, with those that are."""
    strategy = tf.distribute.experimental.CentralStorageStrategy(["/cpu:0"], "/cpu:0")
    with strategy.scope():
        model = network()
    text = (
        "make_accumulating.model must be under a strategy that is known here; got 'net' under "
        "CentralStorageStrategy. Build it under MirroredStrategy, MultiWorkerMirroredStrategy, "
        "TPUStrategy, OneDeviceStrategy or (with micro_batch_size) ParameterServerStrategy."
    )
    with pytest.raises(NotImplementedError, match=f"^{re.escape(text)}$"):
        ga.make_accumulating(model, 2)


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_layers_that_wait_for_replicas_are_refused_in_slices(micro_batch_size, monkeypatch):
    """And with whole batches they are not."""
    strategy = MIRRORED[1]()
    monkeypatch.setattr(type(strategy), "num_replicas_in_sync", 2)
    with strategy.scope():
        norm = tf_keras.layers.BatchNormalization(synchronized=True, name="bn")
        layers = [tf_keras.Input([4]), norm]
        model = tf_keras.Sequential(layers, name="net")
    if micro_batch_size is None:
        ga.make_accumulating(model, 2, batch_norm="pooled")
        return
    text = (
        "Split must be given a model without synchronized batch normalisation where there are "
        "several replicas; got bn in 'net'. Use accum_steps, or synchronized=False with "
        "batch_norm='pooled'."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        ga.make_accumulating(model, micro_batch_size=micro_batch_size)


def test_dtensor_is_refused():
    """A model whose weights it lays out."""
    mesh = tf.experimental.dtensor.create_mesh([("batch", 1)], devices=["CPU:0"])
    layouts = tf_keras.dtensor.experimental.LayoutMap(mesh=mesh)
    layouts["dense.kernel"] = tf.experimental.dtensor.Layout.replicated(mesh, 2)
    with layouts.scope():
        layers = [tf_keras.Input([4]), tf_keras.layers.Dense(3, name="dense")]
        model = tf_keras.Sequential(layers, name="net")
    text = (
        "make_accumulating.model must not be laid out by DTensor; got 'net'. Build it under a "
        "MirroredStrategy or MultiWorkerMirroredStrategy of tf.distribute."
    )
    with pytest.raises(NotImplementedError, match=f"^{re.escape(text)}$"):
        ga.make_accumulating(model, 2)
