"""As many logical devices as are asked for, and the strategy that mirrors models on them.

They are made before TensorFlow starts: so each module is run in a process of its own, by
`test_mirrored.py`. Where none are asked for, nothing is done.
"""

import os

import pytest
import tensorflow as tf

COUNT = int(os.environ.get("LOGICAL_CPUS", "0"))
if COUNT:
    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * COUNT
    )


@pytest.fixture(scope="session")
def strategy():
    return tf.distribute.MirroredStrategy([f"CPU:{place}" for place in range(COUNT)])
