"""Files of every version that was published load in this one, and training goes on from them."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import ga_transform as ga

GOLDEN = Path(__file__).with_name("golden")
sys.path.insert(0, str(GOLDEN))

import write  # noqa: E402  (the script beside the files)

VERSIONS = sorted(path.name for path in GOLDEN.iterdir() if (path / "chain.json").exists())


def loaded(folder, file):
    if file in ("model.keras", "savedmodel"):
        return tf_keras.models.load_model(folder / file)
    if file == "model.h5":
        with pytest.warns(UserWarning, match="had 2 pending micro-batches"):
            return tf_keras.models.load_model(folder / file)
    model = write.build()
    if file == "checkpoint":
        tf.train.Checkpoint(model).read(str(folder / file)).assert_existing_objects_matched()
    else:
        model.load_weights(folder / file)
    return model


@pytest.mark.parametrize(
    "file", ["model.keras", "savedmodel", "model.h5", "w.weights.h5", "checkpoint"]
)
@pytest.mark.parametrize("version", VERSIONS)
def test_files_of_earlier_versions_load(version, file):
    """Class, chain, weights; and where the format holds it, the window and what comes of it."""
    folder = GOLDEN / version
    expected = json.loads((folder / "expected.json").read_text())
    model = loaded(folder, file)
    assert type(model).__name__ == "AccumulatingFunctional"
    assert repr(model.transforms) == expected["chain"]
    x, _ = write.batch(9)
    np.testing.assert_allclose(model(x), expected["predictions"], rtol=1e-5, atol=1e-6)
    if file in ("model.keras", "savedmodel", "checkpoint"):
        assert (model.pending_micro_batches, int(model.optimizer.iterations)) == (2, 1)
        for number in range(4, 8):
            model.train_on_batch(*write.batch(number))
        for ours, other in zip(model.get_weights(), expected["end"]):
            np.testing.assert_allclose(ours, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("version", VERSIONS)
def test_chains_of_earlier_versions_are_read(version):
    """A config is the chain that it was written from."""
    config = json.loads((GOLDEN / version / "chain.json").read_text())
    expected = json.loads((GOLDEN / version / "expected.json").read_text())
    assert repr(ga.Chain.from_config(config)) == expected["chain"]
