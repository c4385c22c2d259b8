"""The site under docs/: every page can be found, its links lead somewhere, its blocks run.

Blocks of a page run one after the other, as a reader pastes them, in an empty folder. A block of
text with a title, right after a block of Python, is what that prints ("Output"), raises or warns
(the name of the class); "..." in it stands for anything.
"""

import builtins
import contextlib
import dataclasses
import io
import operator
import os
import re
import subprocess
import sys
import textwrap
import types
import unicodedata
from pathlib import Path

import pytest
import tf_keras

import ga_transform as ga
from ga_transform import report, training  # noqa: F401  (that the reference finds them)

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "docs" / "pages"
NAMES = sorted(path.relative_to(PAGES).as_posix() for path in PAGES.rglob("*.md"))
#: Pages whose blocks take long.
LONG = {"how-to/command-line.md"}

_FENCE = re.compile(
    r'^(?P<indent> *)```(?P<language>\w+)(?: title="(?P<title>[^"]*)")?\n'
    r"(?P<code>.*?)^(?P=indent)```$",
    re.DOTALL | re.MULTILINE,
)


@dataclasses.dataclass
class Block:
    language: str
    title: str
    code: str
    #: Of its first line in the page, counted from 1.
    line: int

    @property
    def is_run(self):
        return self.language == "python" or (
            self.language == "bash" and self.code.startswith("ga-transform")
        )


def blocks_of(page):
    text = (PAGES / page).read_text()
    return [
        Block(
            found["language"],
            found["title"] or "",
            textwrap.dedent(found["code"]),
            text.count("\n", 0, found.start("code")) + 1,
        )
        for found in _FENCE.finditer(text)
    ]


RUN = [page for page in NAMES if any(block.is_run for block in blocks_of(page))]


# ---- what the pages show -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.long] * (page in LONG)) for page in RUN]
)
def test_the_blocks_of_a_page_run(page, tmp_path, monkeypatch):
    """They print, raise and warn what the page says, and nothing else warns."""
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    blocks = blocks_of(page)
    for block, after in zip(blocks, [*blocks[1:], None]):
        expected = after if after is not None and after.language == "text" else None
        if block.language == "python":
            with saying(expected):
                # At its line in the page, so that errors and TensorFlow's AutoGraph find it.
                code = "\n" * (block.line - 1) + block.code
                exec(compile(code, str(PAGES / page), "exec"), vars(module))
        elif block.is_run:
            with saying(expected):
                run_in_shell(block.code, tmp_path)


@contextlib.contextmanager
def saying(expected):
    """Check what is printed, raised or warned meanwhile."""
    title = "" if expected is None else expected.title
    if title in ("", "Output"):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            yield
        if title:
            assert re.fullmatch(pattern_of(expected.code), normal(printed.getvalue())), (
                printed.getvalue()
            )
        return
    category = getattr(builtins, title, None) or getattr(ga, title)
    told = pytest.warns if issubclass(category, Warning) else pytest.raises
    with told(category) as found:
        yield
    texts = [normal(str(each.message)) for each in found] if told is pytest.warns else None
    texts = texts or [normal(str(found.value))]
    assert any(re.fullmatch(pattern_of(expected.code), text) for text in texts), texts


def normal(text):
    return " ".join(text.split())


def pattern_of(text):
    return ".*".join(map(re.escape, normal(text).split("...")))


def run_in_shell(commands, folder):
    """Run commands of a shell, in which ga-transform is this tree's."""
    shim = folder / ".bin" / "ga-transform"
    if not shim.exists():
        shim.parent.mkdir()
        shim.write_text(f'#!/bin/sh\nexec {sys.executable} -m ga_transform "$@"\n')
        shim.chmod(0o755)
    path = f"{shim.parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=folder,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)  # noqa: T201  (it is what the page shows)


# ---- where the pages lead ----------------------------------------------------------------------

_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)[^)]*\)")
_REFERENCE = re.compile(r"^::: (\S+)", re.MULTILINE)


def prose_of(page):
    """A page without its blocks and without code in its lines."""
    return re.sub(r"`[^`\n]*`", "", _FENCE.sub("", (PAGES / page).read_text()))


def anchors_of(page):
    """The anchors of a page: of its headings, and of what the reference documents there."""
    text = _FENCE.sub("", (PAGES / page).read_text())
    anchors = set(_REFERENCE.findall(text))
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        own = re.search(r"\{ *#([\w.-]+)[^}]*\}", heading)
        anchors.add(own[1] if own else slug(heading))
    return anchors


def slug(heading):
    """As Python-Markdown makes them."""
    heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    text = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode()
    text = re.sub(r"[^\w\s-]", "", text).strip().lower()
    return re.sub(r"[-\s]+", "-", text)


def test_every_page_is_in_the_navigation():
    """Each once, and no other."""
    config = (ROOT / "docs" / "mkdocs.yml").read_text()
    navigation = config.split("\nnav:\n")[1].split("\n\n")[0]
    assert sorted(re.findall(r"- [^:]+: (\S+\.md)$", navigation, re.MULTILINE)) == NAMES


@pytest.mark.parametrize("page", NAMES)
def test_links_lead_somewhere(page):
    """To a page and an anchor that there is, or to a web page of another host by https."""
    for target in _LINK.findall(prose_of(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        there = (PAGES / page).parent / path if path else PAGES / page
        assert there.is_file(), target
        if there.suffix == ".md" and anchor:
            name = os.path.relpath(there, PAGES).replace(os.sep, "/")
            assert anchor in anchors_of(name), target


@pytest.mark.parametrize("page", NAMES)
def test_pages_load_nothing_of_other_hosts(page):
    """Pictures, scripts and styles are files of the site."""
    text = prose_of(page)
    assert not re.search(r"!\[[^\]]*\]\((?:https?:)?//", text)
    assert not re.search(r"<(?:script|link|img|iframe)\b", text)


@pytest.mark.parametrize("page", NAMES)
def test_files_that_pages_name_are_there(page):
    """Examples and benchmarks are where the pages say."""
    text = (PAGES / page).read_text()
    for path in re.findall(r"`((?:examples|benchmarks|tests|ga_transform)/[\w./-]*)`", text):
        assert (ROOT / path).exists(), path


# ---- the reference -----------------------------------------------------------------------------


def documented():
    return [name for page in NAMES for name in _REFERENCE.findall((PAGES / page).read_text())]


def test_the_reference_has_every_public_name():
    """Each name of the package stands there once."""
    names = [name.partition("ga_transform.")[2] for name in documented()]
    assert sorted(name for name in names if "." not in name) == sorted(ga.__all__)


def test_the_reference_documents_what_there_is():
    """Every entry is a name that can be reached, and that has a docstring."""
    for name in documented():
        assert operator.attrgetter(name.partition(".")[2])(ga).__doc__, name


def test_the_reference_has_all_of_a_converted_model():
    """What a converted model has beside its own stands on its page."""
    text = (PAGES / "reference" / "model.md").read_text()
    plain = set(dir(tf_keras.Model))
    own = {name for name in dir(training.Accumulating) if not name.startswith("_")} - plain
    assert own == set(re.findall(r"^\| `(?:model\.)?(\w+)", text, re.MULTILINE))


# ---- the diagrams ------------------------------------------------------------------------------


@pytest.mark.parametrize("light", sorted(PAGES.glob("assets/*-light.svg")), ids=lambda p: p.stem)
def test_diagrams_are_the_same_in_light_and_dark(light):
    """They differ in their colours alone."""
    dark = light.with_name(light.name.replace("-light", "-dark"))
    colours = re.compile(r"#[0-9a-f]{6}\b")
    assert colours.sub("", light.read_text()) == colours.sub("", dark.read_text())
    assert colours.findall(light.read_text()) != colours.findall(dark.read_text())
