"""An attack on a folder whose classes have hostile names, in a hostile folder, on a terminal that knows only ASCII."""

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from PIL import Image

from backpass.data import load_data
from backpass.report.wording import number
from backpass.wording import visible
from support.hostile import PAYLOADS

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NAMES = sorted(text.replace("/", "|")[:60] for text in PAYLOADS if text and "\x00" not in text and "\ud800" not in text)
NAMES = [*NAMES, "\x1b[2J\x9b31m", os.fsdecode(b"caf\xe9 \xff")]


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """The process, and the folder in which it ran."""
    folder = tmp_path_factory.mktemp("hostile")
    digits = load_data("digits").images
    try:
        for label, name in enumerate(NAMES):
            (folder / "data" / name).mkdir(parents=True)
            for row in (digits.labels == label % 10).nonzero().flatten()[:4].tolist():
                Image.fromarray((digits.pixels[row, 0] * 15).numpy()).save(folder / "data" / name / f"{row}.png")
    except OSError as error:
        pytest.skip(f"this file system does not take such names: {error}")
    (folder / "net_here.py").write_text(NETWORK)
    for package in ("jinja2", "rich", "PIL"):  # must not be taken for the packages
        (folder / f"{package}.py").write_text("raise SystemExit('a file of the current folder was run')\n")
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "COLUMNS": "80", "BACKPASS_CACHE": str(folder / "cache")}
    arguments = ["--model", "net_here:Net", "--data", "data", "--eps", "0.1", "--curves", "20", "--out", "run"]
    rules = ["--rule", "bp", "--rule", "linbp:start=-1,slope=0.75"]
    process = subprocess.run(
        [sys.executable, "-m", "backpass", "attack", *arguments, *rules],
        cwd=folder, env={**os.environ, **ascii_only}, capture_output=True, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    return process, folder


NETWORK = f"""
import torch
from torch import nn

def Net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, {len(NAMES)}))
"""


def test_the_terminal_gets_ascii_without_control_characters_and_all_numbers(ended):
    process, folder = ended
    for stream in (process.stdout, process.stderr):
        assert re.fullmatch(rb"[\n -~]*", stream)
    table = json.loads((folder / "run" / "result.json").read_text())["tables"][0]
    shown = re.sub(rb"[\s|]+", b" ", process.stdout).decode()
    for row in table["rows"]:
        for cell in row[:6]:
            if isinstance(cell, dict):
                assert number(cell["mean"]).replace("\N{MINUS SIGN}", "-") in shown


def test_the_page_and_the_json_hold_every_name_as_it_is(ended):
    _, folder = ended
    result = json.loads((folder / "run" / "result.json").read_text())
    assert [one["class"] for one in result["numbers"]["classes"]] == sorted(NAMES, key=os.fsencode)
    assert result["environment"]["command"].startswith("backpass attack --model net_here:Net --data data")
    page = Text((folder / "run" / "report.html").read_text())
    assert {visible(name) for name in NAMES} <= set(page.text)
    assert page.tags.isdisjoint({"script", "iframe", "object", "embed", "b"})


class Text(HTMLParser):
    """Tags and text of a page."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text = set(), []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: install the package chromium")
def test_a_browser_runs_no_script_and_logs_nothing(ended):
    _, folder = ended
    overview = subprocess.run(
        [sys.executable, "-m", "backpass", "report", "."], cwd=folder, capture_output=True, check=False
    )
    (folder / "control.html").write_text("<title>a</title><p>" + PAYLOADS[1])
    assert overview.returncode == 0, overview.stderr
    assert browse(folder / "control.html")[0] == "RAN"  # the payloads do run where they are not escaped
    for page in (folder / "run" / "report.html", folder / "report.html"):
        title, console = browse(page)
        assert title.endswith("backpass")
        assert console == []


def browse(page):
    """Title of a page and messages of its console, after its scripts have run."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=2000"]
    ended = subprocess.run(
        [CHROMIUM, *options, f"--user-data-dir={page.parent / 'browser'}", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    messages = [line for line in ended.stderr.splitlines() if "CONSOLE" in line]
    return re.search("<title>([^<]*)", ended.stdout)[1], messages
