"""Models of other packages, where these are installed: converted, trained, compared, saved."""

import cases
import numpy as np
import pytest
import tf_keras

import ga_transform as ga

applications = tf_keras.applications


def without_noise(model):
    """Batch norm as it is at inference, no dropout: what is left is within the law."""
    for layer in model._flatten_layers():
        if isinstance(layer, tf_keras.layers.BatchNormalization):
            layer.trainable = False
        if isinstance(layer, tf_keras.layers.Dropout):
            layer.rate = 0.0
    return model


@pytest.mark.long
@pytest.mark.parametrize(
    "build", [applications.ResNet50, applications.MobileNetV2, applications.EfficientNetB0]
)
def test_applications(float64, tmp_path, build):
    """tf_keras's own networks: the law, the logs, and every format."""
    model = without_noise(build(weights=None, input_shape=[32, 32, 3], classes=4))
    case = cases.Case(
        model,
        {"loss": "sparse_categorical_crossentropy", "metrics": ["accuracy"]},
        lambda rng, rows: (rng.normal(size=[rows, 32, 32, 3]), rng.integers(0, 4, size=[rows])),
    )
    converted = cases.assert_law(
        case, lambda: tf_keras.optimizers.SGD(0.01), [[2, 1, 2], [1, 2]], 1e-6, epochs=1
    )
    x = np.ones([2, 32, 32, 3])
    expected = converted.predict(x, verbose=0)
    for suffix in (".keras", ".h5", ""):
        path = tmp_path / f"model{suffix}"
        converted.save(path)
        loaded = tf_keras.models.load_model(path)
        assert loaded.transforms == converted.transforms
        np.testing.assert_allclose(loaded.predict(x, verbose=0), expected, atol=1e-9)
    plain = ga.strip_accumulating(converted)
    plain.load_weights(tmp_path / "model.h5")
    np.testing.assert_allclose(plain.predict(x, verbose=0), expected, atol=1e-9)
