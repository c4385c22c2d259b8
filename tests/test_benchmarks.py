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
