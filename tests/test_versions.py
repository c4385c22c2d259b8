"""Which Keras a model is of: tf_keras, whatever `tf.keras` is on this TensorFlow.

What `tf.keras` is depends on the version of TensorFlow, and on TF_USE_LEGACY_KERAS when it is
imported: each answer comes from a process of its own.
"""

import os
import subprocess
import sys

#: A model of each Keras that is named, made as its documentation shows, and what becomes of it.
SCRIPT = """
import sys
from importlib import import_module

import numpy as np
import tensorflow as tf

import ga_transform as ga

for name in sys.argv[1:]:
    keras = tf.keras if name == "tf.keras" else import_module(name)
    model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(2)])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    try:
        model = ga.make_accumulating(model, accum_steps=2)
    except TypeError as error:
        print(error)
        continue
    model.fit(np.ones([8, 3]), np.ones([8, 2]), batch_size=2, verbose=0)
    print(type(model.optimizer).__module__.split(".")[0], int(model.optimizer.iterations))
"""


def become_of(names, **variables):
    """What becomes of a model of each of these, in a line."""
    inherited = {k: v for k, v in os.environ.items() if k != "TF_USE_LEGACY_KERAS"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *names],
        env={**inherited, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_a_model_of_another_keras_is_refused():
    """`tf.keras` and `keras` are another package, on each TensorFlow: one line names two ways out.

    The first of them, to build the model with tf_keras, is taken here.
    """
    import keras

    refusal = (
        "make_accumulating.model must be a tf_keras.Model; got Sequential of the package keras "
        f"{keras.__version__}. Build it with tf_keras ('import tf_keras' for 'import keras'), or "
        "set TF_USE_LEGACY_KERAS=1 before TensorFlow is imported if it is built with tf.keras."
    )
    assert become_of(["tf.keras", "keras", "tf_keras"]) == [refusal, refusal, "tf_keras 2"]


def test_models_of_legacy_tf_keras_convert():
    """The second way out: with TF_USE_LEGACY_KERAS=1 the same code builds, converts and trains."""
    assert become_of(["tf.keras"], TF_USE_LEGACY_KERAS="1") == ["tf_keras 2"]
