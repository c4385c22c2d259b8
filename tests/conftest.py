"""What all tests share: a quiet TensorFlow, one seed, and float64 where rounding would hide faults."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import pytest
import tf_keras


@pytest.fixture(autouse=True)
def _fresh_session():
    """Each test starts with the same seed and the default float type."""
    tf_keras.backend.clear_session()
    tf_keras.utils.set_random_seed(7)
    tf_keras.backend.set_floatx("float32")
    yield
    tf_keras.backend.set_floatx("float32")


@pytest.fixture
def float64():
    """Layers made in this test compute in float64."""
    tf_keras.backend.set_floatx("float64")
