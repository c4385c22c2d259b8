"""MirroredStrategy on several devices: each module of `mirrored/` in a process of its own.

A process has as many logical devices as it has asked for before TensorFlow starts.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).with_name("mirrored")
MODULES = ["laws", "saving", "batch_norm", "stages", "ways", "precision", "whole_batch"]
#: Of some modules, the tests to which the number of replicas may make a difference.
OF_FOUR = {
    "laws": "dense-across or (without_rows and not sum) or arrays",
    "saving": "from_replicas or to_replicas",
    "batch_norm": "test_pooled and across",
}
#: In seconds; a trace on old versions of TensorFlow takes long.
BOUND = 1800


def tail_of(output):
    text = output.decode(errors="replace") if isinstance(output, bytes) else output or ""
    return text[-6000:]


@pytest.mark.parametrize(
    ("module", "devices", "chosen"),
    [
        ("laws", 2, ""),
        *(pytest.param(module, 2, "", marks=pytest.mark.long) for module in MODULES[1:]),
        *(
            pytest.param(module, 4, chosen, marks=pytest.mark.long)
            for module, chosen in OF_FOUR.items()
        ),
    ],
    ids=str,
)
def test_mirrored(module, devices, chosen):
    """Every test of the module holds, or each that is chosen."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    plugins = ["-p", "no:cacheprovider", "-p", "no:xdist"]
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "--show-capture=no", *plugins]
    try:
        done = subprocess.run(
            [*command, FOLDER / f"{module}.py", "-k", chosen],
            env={**own, "LOGICAL_CPUS": str(devices)},
            cwd=FOLDER.parents[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=BOUND,
        )
    except subprocess.TimeoutExpired as error:
        pytest.fail(
            f"{module} on {devices} devices was not done in {BOUND} s: {tail_of(error.output)}"
        )
    assert done.returncode == 0, tail_of(done.stdout)


def test_every_module_is_run():
    """None is forgotten here: those with tests are in the list."""
    with_tests = {
        path.stem for path in FOLDER.glob("*.py") if "\ndef test_" in path.read_text("utf-8")
    }
    assert with_tests == set(MODULES)
