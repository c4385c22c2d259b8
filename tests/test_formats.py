"""Formats x models x moments: each loaded by a fresh process, and trained on there."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import saved_models
from saved_models import MODELS, MOMENTS, WHOLE


@pytest.mark.long
@pytest.mark.parametrize("name", MODELS)
def test_training_goes_on_in_another_process(tmp_path, name):
    """A model that was saved and loaded is the one that was saved, and ends as if it never was.

    Class, chain, count of updates, partial window, predictions, what is frozen, loss scale; and
    after the rest of the batches the very weights.
    """
    expected, end = saved_models.write(tmp_path, name)
    script = Path(saved_models.__file__)
    done = subprocess.run(
        [sys.executable, script, tmp_path, name], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for moment, file in saved_models.keys(name):
        state, before = found[f"{moment}/{file}"], expected[moment]
        predictions, said = state.pop("predictions"), state.pop("warnings")
        wanted = {field: value for field, value in before.items() if field in state}
        if file not in WHOLE:
            wanted["pending"] = 0
        if file == "w.weights.h5":  # of weights, and nothing but them
            for field in ("iterations", "scale"):
                del state[field], wanted[field]
        dropped = before["pending"] if file == "model.h5" else 0
        assert [f"had {dropped} pending" in text for text in said] == [True] * bool(dropped), said
        assert state == wanted, (moment, file)
        for ours, other in zip(predictions, before["predictions"]):
            np.testing.assert_allclose(
                ours, other, rtol=1e-5, atol=1e-6, err_msg=f"{moment} {file}"
            )
        is_whole = file in WHOLE or (file == "model.h5" and not dropped)
        if is_whole and MOMENTS[moment]:
            with np.load(f"{saved_models.path_of(tmp_path, name, moment, file)}.end.npz") as final:
                for ours, other in zip((final[each] for each in final.files), end):
                    np.testing.assert_allclose(ours, other, 1e-6, 1e-7, err_msg=f"{moment} {file}")
