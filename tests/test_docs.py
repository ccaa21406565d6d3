"""The documentation is true of the repository: links, names, commands, the tutorials' code, the picture, the site."""

from __future__ import annotations

import importlib
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks import __main__ as benchmarks
from fastvit import cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    path
    for path in (*ROOT.glob("*.md"), *(path for room in ("benchmarks", "csrc", "docs", "examples", "kernels")
                                       for path in (ROOT / room).rglob("*.md")))
)  # fmt: skip
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
ROOMS = "fastvit|kernels|csrc|tests|benchmarks|examples|docs"
FILE = rf"((?:{ROOMS})/[\w./*-]*)(?:::(\w+))?"
NAME = r"fastvit(?:\.\w+)+"
BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)


def _id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _prose(path: Path) -> str:
    return BLOCK.sub("", path.read_text())


def _anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", _prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _commands(path: Path) -> list[str]:
    """Lines of shell blocks and spans of code, without comments."""
    text = path.read_text()
    lines = [line for kind, code in BLOCK.findall(text) if kind == "sh" for line in code.splitlines()]
    spans = re.findall(r"`([^`\n]+)`", _prose(path))
    return [part.strip() for line in (*lines, *spans) for part in line.split(" #")[0].split("&&")]


def test_pages_are_found() -> None:
    """The tests of this file see what the documentation has: pages, links, files and names, commands, tutorials."""
    text = "".join(map(_prose, PAGES))
    spans = re.findall(r"`([^`\n]+)`", text)
    assert len(PAGES) >= 40 and len(TUTORIALS) == 3
    assert len(re.findall(r"\]\(([^)\s]+)\)", text)) >= 150
    assert sum(re.fullmatch(FILE, span) is not None for span in spans) >= 150
    assert sum(re.fullmatch(NAME, span) is not None for span in spans) >= 40
    commands = [command for page in PAGES for command in _commands(page)]
    for program, count in (("fastvit", 30), ("python -m benchmarks", 10), ("make", 20)):
        assert sum(command.startswith(f"{program} ") for command in commands) >= count, program


@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_links(page: Path) -> None:
    """Every relative link leads to a file, and every anchor to a heading."""
    for link in re.findall(r"\]\(([^)\s]+)\)", _prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        found = (page.parent / target).resolve() if target else page
        assert found.exists(), link
        assert not anchor or anchor in _anchors(found), link


@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_files_and_names(page: Path) -> None:
    """Files and dotted names in code spans exist."""
    for span in re.findall(r"`([^`\n]+)`", _prose(page)):
        path = re.fullmatch(FILE, span)
        if path is not None:
            found = list(ROOT.glob(path[1]))
            assert found, span
            assert path[2] is None or f"def {path[2]}(" in found[0].read_text(), span
        elif re.fullmatch(NAME, span) and not span.endswith("._C"):  # the extension, if it is built
            module, names = span, []
            while True:
                try:
                    value = importlib.import_module(module)
                    break
                except ModuleNotFoundError:
                    module, _, name = module.rpartition(".")
                    assert module, span
                    names.insert(0, name)
            for name in names:
                value = getattr(value, name)


@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_commands(page: Path) -> None:
    """The commands of fastvit, of the benchmarks and of make can be given as they stand."""
    parsers = {"fastvit": cli.parser(), "python -m benchmarks": benchmarks.parser()}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in _commands(page):
        words = re.sub(r"^torchrun .*? -m (?=fastvit )", "", command).replace("$", "")
        for program, parser in parsers.items():
            if re.match(rf"{program} [a-z]+ .*\S", words) and "..." not in words:
                parser.parse_args(shlex.split(words.removeprefix(program)))
        make = re.fullmatch(r"make ([a-z-]+)(?: .*)?", command)
        assert make is None or make[1] in targets, command


def _run(page: Path) -> None:
    """Run a page's Python from top to bottom, with the smallest models."""
    code = "\n".join(block for kind, block in BLOCK.findall(page.read_text()) if kind == "python")
    exec(compile(re.sub("vit_(base|small)", "vit_tiny", code), page.name, "exec"), {"__name__": page.stem})


@pytest.mark.parametrize("page", TUTORIALS, ids=_id)
def test_tutorials(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Dinov2Config, Dinov2Model

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)  # a small model in the place of the one that a reader downloads
    config = Dinov2Config(hidden_size=48, num_hidden_layers=2, num_attention_heads=6, image_size=70, patch_size=14)
    Dinov2Model(config).save_pretrained("dinov2-small")
    _run(page)


def test_the_family_of_the_guide_is_the_tested_one() -> None:
    """The Python of docs/how-to/add-a-family.md is the file that tests/test_new_family.py adds."""
    blocks = BLOCK.findall((ROOT / "docs" / "how-to" / "add-a-family.md").read_text())
    (code,) = (code for kind, code in blocks if kind == "python")
    assert code in (ROOT / "tests" / "test_new_family.py").read_text()


def test_readme() -> None:
    """README.md is short, and its Python runs."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= 170
    _run(ROOT / "README.md")


def test_picture() -> None:
    """The picture of the README shows the committed results."""
    drawn = Image.open(ROOT / "docs" / "overview.png").text["Description"]
    assert json.loads(drawn) == runpy.run_path(str(ROOT / "docs" / "picture.py"))["numbers"]()


def test_site(tmp_path: Path) -> None:
    """`make docs` builds every page, and no link of the site is dead."""
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)],
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    commands = (tmp_path / "reference" / "commands" / "index.html").read_text()
    assert "usage: fastvit train" in commands
    assert "usage: python -m benchmarks throughput" in commands
