"""What the README and the examples say is run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def run(arguments, folder):
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=False
    )


def test_the_blocks_of_the_readme_run(tmp_path):
    """They run one after the other, as a reader pastes them."""
    assert len(BLOCKS) >= 3
    done = run(["-c", "\n".join(BLOCKS)], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.long
def test_the_quickstart_ends_with_the_same_weights(tmp_path):
    """Its table shows the converted model where the plain one is, and as much after a reload."""
    done = run([str(ROOT / "examples" / "quickstart.py"), "--epochs", "2"], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = re.findall(
        r"^(plain|converted|reloaded).*? (\d+) +([\d.]+) +(\S+)$", done.stdout, re.MULTILINE
    )
    assert [row[0] for row in rows] == ["plain", "converted", "reloaded"]
    assert len({row[1] for row in rows}) == 1
    assert len({row[2] for row in rows}) == 1
    assert all(float(row[3]) < 1e-5 for row in rows)


@pytest.mark.long
@pytest.mark.parametrize(
    ("example", "last_line"),
    [
        (
            "own_transform",
            "Chain(Accumulate(steps=4) -> Centralize() -> ClipByGlobalNorm(max_norm=5.0))",
        )
    ],
)
def test_the_examples_run(example, last_line, tmp_path):
    """Each example runs and ends with what it promises."""
    done = run([str(ROOT / "examples" / f"{example}.py")], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == last_line
