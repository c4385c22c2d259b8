"""The examples of tasks, in a short setting: each prints what its docstring promises."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"

pytestmark = pytest.mark.long


def output_of(example, *arguments, folder):
    """What a script prints, run by a process of its own."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{example}.py"), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONWARNINGS": "default"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def table_of(output, numbers):
    """By name, the numbers of the rows of a table that end in so many."""
    pattern = r"^(\S.*?\S)" + r" +([-\d.e+]+)" * numbers + "$"
    return {
        name: tuple(map(float, row)) for name, *row in re.findall(pattern, output, re.MULTILINE)
    }


def test_image_classification(tmp_path):
    """At a rate at which plain training fails, AGC learns; in micro-batches as in large batches."""
    output = output_of("image_classification", "--epochs", "4", folder=tmp_path)
    assert output.startswith("Chain(Accumulate(steps=8) -> ClipByAGC())\n")
    rows = table_of(output, 3)
    small, fast, clipped, in_micro_batches = rows
    assert [small, fast] == ["plain, 256, rate 0.05", "plain, 256, rate 0.5"]
    assert [clipped, in_micro_batches] == ["AGC, 256, rate 0.5", "AGC, 8 x 32, rate 0.5"]
    updates, accuracy, difference = (
        {name: row[column] for name, row in rows.items()} for column in range(3)
    )
    assert set(updates.values()) == {24}  # 1437 rows an epoch: 5 windows and a partial one
    assert accuracy[fast] < 0.5
    assert accuracy[clipped] > 0.8
    assert accuracy[in_micro_batches] == pytest.approx(accuracy[clipped], abs=1 / 360)
    assert difference[in_micro_batches] < 1e-5
    assert difference[fast] > 1e-2


def test_text(tmp_path):
    """Weighed by their words, micro-batches end where large batches do; weighed alike, elsewhere."""
    output = output_of("text", "--epochs", "1", "--names", "600", folder=tmp_path)
    (counts,) = re.findall(r"^Words of the first 8 micro-batches: ([\d, ]+)$", output, re.MULTILINE)
    assert len(set(counts.split(", "))) > 3
    rows = table_of(output, 3)
    assert len(rows) == 4
    assert {updates for updates, _, _ in rows.values()} == {5}  # 38 micro-batches
    difference = {name: row[-1] for name, row in rows.items()}
    assert difference["8 x 16 names"] < 1e-5
    assert difference["128 names in slices of 16"] < 1e-5
    assert difference["8 x 16 names, equal"] > 1e-3


def test_gan(tmp_path):
    """Both optimizers count updates; which large batch a GAN ends at is what the README says."""
    rows = table_of(output_of("gan", "--epochs", "2", folder=tmp_path), 3)
    assert len(rows) == 6
    assert {row[:2] for row in rows.values()} == {(15, 15)}  # 3594 rows
    difference = {name: row[-1] for name, row in rows.items()}
    for exact in ("gradients first, 8 x 32", "gradients first, slices of 32"):
        assert difference[exact] < 1e-5
    assert difference["in turn, 8 x 32"] > 1e-3
    assert difference["in turn, slices of 32"] < 1e-5


def check_third_party(model, of_class, folder):
    output = output_of("third_party", model, "--epochs", "2", "--rows", "128", folder=folder)
    assert output.startswith(f"A {of_class} still: True\n")
    (relative,) = re.findall(r"^Largest relative .*: (\S+)$", output, re.MULTILINE)
    assert float(relative) < 1e-3
    (updates, first, last) = re.findall(
        r"^(\d+) updates, loss by epoch: (\S+), (\S+)$", output, re.MULTILINE
    )[0]
    assert int(updates) == 4
    assert float(last) < float(first)
    return output


def test_a_model_of_tf_keras_applications(tmp_path):
    """It is explained, verified and trained; frozen batch normalisation is exact."""
    output = check_third_party("mobilenet", "Functional", tmp_path)
    assert re.search(r"^exact +batch normalisation \(bn_Conv1, ", output, re.MULTILINE)


def test_a_model_of_transformers(tmp_path):
    """It is explained, verified and trained, with a mean over tokens."""
    pytest.importorskip("transformers")
    pytest.importorskip("transformers.modeling_tf_utils")  # transformers 5 has no TensorFlow models
    output = check_third_party("gpt2", "TFGPT2LMHeadModel", tmp_path)
    assert "Chain(Accumulate(steps=4, weighting=labelled_tokens))" in output


def test_resume(tmp_path):
    """Killed in the middle of a window and started again, it ends with the same bits."""
    output = output_of("resume", "--epochs", "1", folder=tmp_path)
    places = re.findall(
        r"^(starts|killed) after micro-batch (\d+), (\d) of 8 in the window$", output, re.MULTILINE
    )
    assert places == [
        ("starts", "0", "0"),
        ("starts", "0", "0"),
        ("killed", "29", "5"),
        ("starts", "25", "1"),  # the last backup
    ]
    assert output.endswith("\nUpdates: 7 and 7\nWeights are the same bits: True\n")


def test_segmentation(tmp_path):
    """Slices take much less memory than the batch, and end with its weights."""
    rows = table_of(output_of("segmentation", "--updates", "2", folder=tmp_path), 4)
    plain, sliced = rows.values()
    assert plain[0] == sliced[0] == 2
    assert sliced[2] - sliced[1] < 0.5 * (plain[2] - plain[1])
    assert sliced[3] < 1e-5


def check_whole_batch(example, *arguments, folder):
    """With the loss of the whole batch slices end as plain batches do; on their own, elsewhere."""
    rows = table_of(output_of(example, *arguments, folder=folder), 3)
    plain, sliced, whole = rows.values()
    assert plain[0] == sliced[0] == whole[0] > 1
    assert whole[1] == pytest.approx(plain[1], abs=0.005)
    assert whole[2] < 1e-5
    assert sliced[2] > 1e-3


def test_recommender(tmp_path):
    """Two towers with in-batch negatives, on the imports of some files of Python."""
    check_whole_batch("recommender", "--epochs", "2", "--files", "400", folder=tmp_path)


def test_contrastive(tmp_path):
    """Pairs of views, and a compute_loss of the model's own."""
    check_whole_batch("contrastive", "--epochs", "1", folder=tmp_path)


def test_dice(tmp_path):
    """Dice of all pixels of a batch."""
    check_whole_batch("dice", "--updates", "10", folder=tmp_path)
