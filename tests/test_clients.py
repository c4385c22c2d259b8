"""Models of other packages, where these are installed: converted, trained, compared, saved."""

import cases
import numpy as np
import pytest
import tf_keras

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
    ("build", "file"),
    [
        (applications.ResNet50, "model.h5"),
        (applications.MobileNetV2, "model.keras"),
        (applications.EfficientNetB0, "model"),
    ],
)
def test_applications(float64, tmp_path, build, file):
    """tf_keras's own networks: the law, and their file."""
    model = without_noise(build(weights=None, input_shape=[32, 32, 3], classes=4))
    case = cases.Case(
        model,
        {"loss": "sparse_categorical_crossentropy", "metrics": ["accuracy"]},
        lambda rng, rows: (rng.normal(size=[rows, 32, 32, 3]), rng.integers(0, 4, size=[rows])),
    )
    converted = cases.assert_law(
        case, lambda: tf_keras.optimizers.SGD(0.01), [[2, 1]], 1e-6, epochs=1
    )
    converted.save(tmp_path / file)
    loaded = tf_keras.models.load_model(tmp_path / file)
    assert loaded.transforms == converted.transforms
    for ours, theirs in zip(loaded.get_weights(), converted.get_weights()):
        np.testing.assert_array_equal(ours, theirs)
