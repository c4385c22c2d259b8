"""What is installed from a built wheel, apart from the source tree: its files, metadata and jobs."""

import configparser
import email
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tensorflow as tf
import tf_keras

ROOT = Path(__file__).parent.parent
#: What a wheel is built from.
SOURCES = ["pyproject.toml", "README.md", "LICENSE", "ga_transform", "tests"]

pytestmark = pytest.mark.long


def run(command, folder, **variables):
    """What a command prints, which must end well, in a folder and with more variables."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env={**inherited, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of the tree with the backend that is installed: no network."""
    tree, built = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("built")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tree)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    run([*pip, "--wheel-dir", built, tree], built)
    (file,) = built.iterdir()
    return file


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """A new virtual environment with the wheel, and what it depends on from where it is now.

    The folders of packages here are appended to its path, so that TensorFlow is not installed
    again. Their own `.pth` files are not read, by one of which the source tree may be on the path.
    """
    folder = tmp_path_factory.mktemp("environment")
    run([sys.executable, "-m", "venv", "--without-pip", folder], folder)
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python"]
    run([*pip, "install", "--no-deps", "--no-index", wheel], folder)
    (site,) = folder.glob("lib/python*/site-packages")
    homes = dict.fromkeys(str(Path(each.__file__).parents[1]) for each in (tf, tf_keras, pytest))
    (site / "dependencies.pth").write_text("\n".join(homes), encoding="utf-8")
    return folder


def test_the_files_of_a_wheel(wheel):
    """It holds each module of the package and `py.typed`, the licence, and nothing else."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    modules = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "ga_transform").rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }
    assert "ga_transform/py.typed" in modules
    (info,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
    about = {f"{info}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt")}
    assert names == modules | about | {f"{info}/licenses/LICENSE"}


def test_the_metadata_of_a_wheel(wheel):
    """Version, Pythons, dependencies, licence and command are said; the README is the description."""
    import ga_transform as ga

    with zipfile.ZipFile(wheel) as archive:
        (info,) = {n.split("/")[0] for n in archive.namelist() if ".dist-info/" in n}
        said = email.message_from_bytes(archive.read(f"{info}/METADATA"))
        commands = configparser.ConfigParser()
        commands.read_string(archive.read(f"{info}/entry_points.txt").decode())
    assert (said["Name"], said["Version"]) == ("ga-transform", ga.__version__)
    assert said["Requires-Python"] == ">=3.9"
    assert said["License-Expression"] == "MIT"
    needed = [each for each in said.get_all("Requires-Dist") if "extra" not in each]
    assert [re.match(r"[\w-]+", each)[0] for each in needed] == ["attrs", "tensorflow", "tf-keras"]
    assert said["Description-Content-Type"] == "text/markdown"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert said.get_payload(decode=True).decode().strip() == readme.strip()
    assert dict(commands["console_scripts"]) == {"ga-transform": "ga_transform.cli:main"}


def test_what_is_installed_works_without_the_source_tree(environment, tmp_path):
    """Package, command, the README's first block and the quickstart run, all from the wheel."""
    import ga_transform as ga

    python, command = environment / "bin" / "python", environment / "bin" / "ga-transform"
    where = run([python, "-c", "import ga_transform; print(ga_transform.__file__)"], tmp_path)
    assert Path(where.strip()).is_relative_to(environment)
    assert run([command, "--version"], tmp_path) == f"ga-transform {ga.__version__}\n"
    assert "ga-transform COMMAND --help" in run([command, "--help"], tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    run([python, "-c", blocks[0]], tmp_path)
    shutil.copy(ROOT / "examples" / "quickstart.py", tmp_path)
    table = run([python, "quickstart.py", "--epochs", "1"], tmp_path)
    assert re.findall(r"^(?:plain|converted|reloaded)", table, re.MULTILINE) == [
        "plain",
        "converted",
        "reloaded",
    ]
