"""Networks of tf_keras with each choice for batch normalisation, in 32 and in 16 bits: trained,
saved and loaded.

A covering set: each network with each choice, each choice in each precision, each kind of file.
"""

import numpy as np
import pytest
import tf_keras
from tf_keras import applications, layers

import ga_transform as ga

pytestmark = pytest.mark.long

SHAPE = {"weights": None, "input_shape": [32, 32, 3], "classes": 4}
NETWORKS = {
    "ResNet50": lambda: applications.ResNet50(**SHAPE),
    "MobileNetV2": lambda: applications.MobileNetV2(alpha=0.35, **SHAPE),
    "EfficientNetB0": lambda: applications.EfficientNetB0(**SHAPE),
}
AT_REST = ga.BatchNorm("freeze", trainable=False)
#: Of fewer rows, gradients of a new network with batch normalisation leave the range of float16.
ROWS = 4
ACROSS, WITHIN = ga.Accumulate(2), ga.Split(ROWS)
EAGERLY = {"run_eagerly": True}
#: A `.keras` file of a large model takes tf_keras minutes to read: ResNet50's are others.
RUNS = [
    ("MobileNetV2", "pooled", None, ACROSS, {}, "model.keras"),
    ("MobileNetV2", "momentum", "mixed_float16", WITHIN, EAGERLY, "model.h5"),
    ("MobileNetV2", "freeze", "mixed_bfloat16", ACROSS, {}, "model"),
    ("MobileNetV2", "keep", "mixed_float16", ACROSS, EAGERLY, "model.keras"),
    ("ResNet50", "pooled", "mixed_float16", WITHIN, {}, "model.h5"),
    ("ResNet50", "momentum", "mixed_bfloat16", ACROSS, EAGERLY, "model.h5"),
    ("ResNet50", AT_REST, None, ACROSS, EAGERLY, "model.h5"),
    ("ResNet50", "keep", None, WITHIN, EAGERLY, "model.h5"),
    ("EfficientNetB0", "pooled", "mixed_bfloat16", ACROSS, EAGERLY, "model.keras"),
    ("EfficientNetB0", "momentum", None, WITHIN, EAGERLY, "model.h5"),
    ("EfficientNetB0", "freeze", "mixed_float16", ACROSS, EAGERLY, "model.h5"),
    ("EfficientNetB0", "keep", "mixed_bfloat16", ACROSS, {}, "model.keras"),
]


@pytest.fixture(scope="module")
def networks():
    """The plain networks, each built once; nothing that is done to their copies touches them."""
    made = {}
    for name, build in NETWORKS.items():
        tf_keras.utils.set_random_seed(7)
        made[name] = build()
    return made


def compiled(model, **how):
    """A network with a pace that suits the large gradients of a new one."""
    model.compile(tf_keras.optimizers.SGD(1e-6), "sparse_categorical_crossentropy", **how)
    return model


def batches(count, rows, seed=0):
    rng = np.random.default_rng(seed)
    scale = 20.0 * (1.0 + np.arange(rows))[:, None, None, None]  # the rows differ
    return [
        (
            (rng.normal(size=[rows, 32, 32, 3]) * scale).astype("float32"),
            rng.integers(0, 4, size=[rows]),
        )
        for _ in range(count)
    ]


def norms_of(model):
    return [
        layer for layer in model._flatten_layers() if isinstance(layer, layers.BatchNormalization)
    ]


def statistics(model):
    return [
        weight.numpy()
        for layer in norms_of(model)
        for weight in (layer.moving_mean, layer.moving_variance)
    ]


def convert(model, choice, policy, window):
    transforms = [choice if isinstance(choice, ga.BatchNorm) else ga.BatchNorm(choice), window]
    if policy is not None:
        transforms.insert(0, ga.Precision(policy, initial_scale=1.0))
    if choice != "keep":
        return ga.make_accumulating(model, transforms=transforms)
    with pytest.warns(ga.InexactWarning, match=norms_of(model)[-1].name):
        return ga.make_accumulating(model, transforms=transforms)


@pytest.mark.parametrize(("name", "choice", "policy", "window", "how", "file"), RUNS, ids=str)
def test_a_network_trains_and_is_saved(networks, tmp_path, name, choice, policy, window, how, file):
    """Its statistics move as chosen, and what is loaded predicts what was saved."""
    source = compiled(networks[name], **how)
    start = statistics(source)
    model = convert(source, choice, policy, window)
    rows, count = (ROWS, 2) if window is ACROSS else (2 * ROWS, 1)
    for _ in range(1 if how else 2):
        for batch in batches(count, rows):
            model.train_on_batch(*batch)

    assert int(model.optimizer.iterations) == (1 if how else 2)
    assert model.pending_micro_batches == 0
    assert np.any(model.layers[-1].bias != source.layers[-1].bias)
    assert all(np.all(np.isfinite(each)) for each in statistics(model))
    is_frozen = choice in ("freeze", AT_REST)
    for ours, theirs in zip(statistics(model)[1::2], start[1::2]):  # a mean may be zero
        assert np.array_equal(ours, theirs) == is_frozen

    x = batches(1, 3, seed=1)[0][0]
    expected = model(x, training=False).numpy()
    assert np.all(np.isfinite(expected))
    assert expected.dtype == "float32"
    model.save(tmp_path / file)
    loaded = tf_keras.models.load_model(tmp_path / file)
    assert loaded.transforms == model.transforms
    np.testing.assert_allclose(loaded(x, training=False).numpy(), expected, rtol=1e-5, atol=1e-6)
    computes = {layer.compute_dtype for layer in norms_of(loaded)}
    assert computes == {"float32" if policy is None else policy[len("mixed_") :]}
    ga.strip_accumulating(loaded, inplace=True)
    assert {type(layer) for layer in norms_of(loaded)} == {layers.BatchNormalization}
    assert {layer.compute_dtype for layer in norms_of(loaded)} == {"float32"}

    for ours, theirs in zip(statistics(source), start):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_first_layer_has_the_statistics_of_the_large_batch(networks, name):
    """Before any update, what it sees does not depend on how rows are cut into micro-batches."""
    source = compiled(networks[name], **EAGERLY)
    model = convert(source, "pooled", None, ACROSS)
    window = batches(2, ROWS)
    for batch in window:
        model.train_on_batch(*batch)
    x = np.concatenate([x for x, _ in window])
    first = norms_of(source)[0]
    inputs = tf_keras.Model(source.inputs, first.input)(x, training=True)
    plain = layers.BatchNormalization.from_config(first.get_config())
    plain.build(inputs.shape)
    plain.set_weights(first.get_weights())
    start = [plain.moving_mean.numpy(), plain.moving_variance.numpy()]
    plain(inputs, training=True)
    expected = [plain.moving_mean.numpy(), plain.moving_variance.numpy()]
    for ours, theirs, at_start in zip(statistics(model)[:2], expected, start):
        travelled = np.max(np.abs(theirs - at_start))
        assert travelled > 1e-5, "the reference has not moved: the test could not fail"
        assert np.max(np.abs(ours - theirs)) <= 1e-4 * travelled
