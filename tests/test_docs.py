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


def check_own_transform(output):
    last_line = "Chain(Accumulate(steps=4) -> Centralize() -> ClipByGlobalNorm(max_norm=5.0))"
    assert output.splitlines()[-1] == last_line


def check_batch_norm(output):
    """Pooled statistics, and frozen weights, are those of the large batch; others are not."""
    rows = re.findall(r"^(\S.*\S) +(\d+) +([\d.]+) +([\d.]+) +(\S+)$", output, re.MULTILINE)
    updates = {name: int(count) for name, count, *_ in rows}
    difference = {name: float(row[-1]) for name, *row in rows[:5]}
    assert updates.pop("plain, batch 8") == 180
    assert updates.pop("not fine-tuned") == 0
    assert len(updates) == 7
    assert set(updates.values()) == {12}
    assert difference["converted, pooled"] < 1e-6
    assert difference["converted, momentum"] > 1e-3
    assert difference["converted, keep"] == difference["plain, batch 8"] > 0.1
    from_frozen = {name: float(row[-1]) for name, *row in rows[5:]}
    assert from_frozen["converted, freeze, not trainable"] < 1e-5
    assert min(from_frozen["converted, freeze"], from_frozen["converted, pooled"]) > 1e-3


def check_mixed_precision(output):
    """All precisions make as many updates and learn as much; float16 scales its loss."""
    rows = re.findall(
        r"^(\w+) +(\d+) +(\d+) +([\d.]+) \+- [\d.]+ +([\d.]+) \+-", output, re.MULTILINE
    )
    assert [row[0] for row in rows] == ["float32", "float16", "bfloat16"]
    assert all(row[1:3] == ("36", "0") for row in rows)
    accuracies, losses = ([float(row[column]) for row in rows] for column in (3, 4))
    assert min(accuracies) > 0.8
    assert len(set(losses)) == 3
    assert max(losses) - min(losses) < 0.1
    # 36 updates, and the scale grows after 25.
    assert "at the end, from 32768 on: 65536\n" in output
    assert "Conv2D float16, Flatten float16, Dense float16, Dense float32\n" in output


def check_multi_worker(output):
    """Both workers end where one process does; gradients go between them with updates alone."""
    workers = re.findall(r"^worker (\d) +(\S+)$", output, re.MULTILINE)
    assert [number for number, _ in workers] == ["0", "1"]
    assert len({difference for _, difference in workers}) == 1
    assert float(workers[0][1]) < 1e-5
    (gradients,) = re.findall(r"Gradients are ([\d,]+) bytes", output)
    sent = re.findall(r"^with(?:out)? an update +([\d,]+)$", output, re.MULTILINE)
    without, with_update, gradients = (int(n.replace(",", "")) for n in (*sent, gradients))
    assert without < gradients < with_update


@pytest.mark.long
@pytest.mark.parametrize(
    ("example", "arguments", "check"),
    [
        ("own_transform", [], check_own_transform),
        ("batch_norm", ["--epochs", "1"], check_batch_norm),
        ("mixed_precision", ["--epochs", "3", "--seeds", "1"], check_mixed_precision),
        ("multi_worker", ["--epochs", "1"], check_multi_worker),
    ],
)
def test_the_examples_run(example, arguments, check, tmp_path):
    """Each example runs and prints what it promises."""
    done = run([str(ROOT / "examples" / f"{example}.py"), *arguments], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    check(done.stdout)
