"""Every block of the documentation runs, Python and shell, each page from its first block to its last."""

import importlib.util
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from backpass import cli

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "recipes" / "README.md"]
PAGES += sorted([*(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])
BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>needs|not run): (?P<of>.*?) -->\n+)?^ *```(?P<kind>python|sh)\n(?P<text>.*?)^ *```$",
    re.MULTILINE | re.DOTALL,
)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")
NAMED = {"ids": lambda page: str(page.relative_to(ROOT))}


@dataclass(frozen=True)
class Block:
    kind: str  # python or sh
    text: str
    needs: str = ""  # a module without which it is left out
    run: bool = True  # otherwise its commands are only read

    @property
    def commands(self) -> list[list[str]]:
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks(page):
    for found in BLOCK.finditer(page.read_text()):
        mark, of = found["mark"], found["of"]
        yield Block(found["kind"], found["text"], needs=of if mark == "needs" else "", run=mark != "not run")


def is_there(module):
    try:
        return importlib.util.find_spec(module) is not None and bool(importlib.import_module(module))
    except Exception:  # a package may be there and yet not import beside this torch
        return False


def read(words):
    """Whether the command line takes these words; nothing is done."""
    group = typer.main.get_command(cli.app)
    with group.make_context("backpass", list(words)) as context:
        name, command, rest = group.resolve_command(context, list(words))
        command.make_context(name, rest, parent=context)


def check_command(words, run):
    if words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text(), words
    elif words[0] == "backpass" and run:
        ended = CliRunner().invoke(cli.app, words[1:])
        assert ended.exit_code == 0, f"{words}: {ended.output} {ended.exception}"
    else:
        assert not run, f"{words[0]} is no command that a test can run: mark the block as not run, with the reason"
        if "backpass" in words[:6]:  # as it is, or behind torchrun
            read(words[words.index("backpass") + 1 :])


@pytest.mark.parametrize("page", [page for page in PAGES if BLOCK.search(page.read_text())], **NAMED)
def test_the_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    torch.manual_seed(0)
    names, modules, left_out = {"__name__": "__main__"}, set(sys.modules), []
    for block in blocks(page):
        if block.needs and not is_there(block.needs):
            left_out.append(block.needs)
        elif block.kind == "python":
            exec(compile(block.text, str(page), "exec"), names)
        else:
            for words in block.commands:
                check_command(words, block.run)
    # A page may write modules of its own and import them.
    for name in set(sys.modules) - modules:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
    if left_out:
        pytest.skip(f"the blocks with {', '.join(left_out)}, which cannot be imported here; all others ran")


@pytest.mark.parametrize("page", PAGES, **NAMED)
def test_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, **NAMED)
def test_every_page_is_in_the_navigation(page):
    if (ROOT / "docs") in page.parents:
        assert str(page.relative_to(ROOT / "docs")) in (ROOT / "mkdocs.yml").read_text()
