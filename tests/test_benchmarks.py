"""The benchmarks run; what they measure is not asserted, because machines are noisy."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.long
def test_a_benchmark_runs_and_writes_its_rounds(tmp_path):
    """One command prints a table and writes every figure with its target."""
    written = tmp_path / "figures.json"
    command = ["benchmarks", "--quick", "--only", "growth", "--json", str(written)]
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "growth" in done.stdout
    assert "growth" in json.dumps(json.loads(written.read_text()))


@pytest.mark.long
def test_contrastive_training_is_that_of_the_full_batch_with_whole_batch_loss(tmp_path):
    """The picture's dots: with whole_batch_loss they are the full batch's, in slices of any size."""
    written = tmp_path / "found.json"
    code = (
        "import json, sys; from benchmarks.contrastive import train; "
        "found = train(seed=0, epochs=1, batch_size=256, micro_batch_sizes=[64]); "
        "open(sys.argv[1], 'w').write(json.dumps(found))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(written)],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(written.read_text())
    assert found["whole_batch_loss at 64"] == pytest.approx(found["full batch"], abs=0.5)
    assert set(found) == {"full batch", "split at 64", "whole_batch_loss at 64"}
