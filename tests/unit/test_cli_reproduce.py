"""reproduce and report from the command line, and the pages and files that they leave."""

import re
import sys

import pytest

from backpass import cli, papers
from backpass.errors import BackpassError
from backpass.report.markdown import verdicts
from backpass.report.overview import read_results
from backpass.report.reading import read_result
from support.experiments import arm, claim, experiment, table

UP, DOWN = arm("up", 1.0), arm("down", 0.0)


@pytest.fixture(autouse=True)
def two(monkeypatch):
    scale = table(UP, DOWN, claims=[claim("up", "down", published="3 units")])
    monkeypatch.setattr(papers, "EXPERIMENTS", (experiment("one", scale), experiment("two", scale)))


@pytest.fixture
def command(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["backpass", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def results(tmp_path, command):
    assert command("reproduce", "all", "--jobs", 1, "--out", tmp_path)[0] == 0
    return tmp_path


def test_each_is_reported_and_one_that_fails_fails_the_command(tmp_path, command, monkeypatch):
    broken = experiment("broken", table(arm("fails", 0.0, fails=True)))
    monkeypatch.setattr(papers, "EXPERIMENTS", (*papers.EXPERIMENTS, broken))
    code, out, err = command("reproduce", "all", "--jobs", 1, "--out", tmp_path)
    assert code == 2
    assert "2 same direction" in out
    for words in (
        "one (",
        "failed: fails 0, seed 0: it fails on purpose",
        "1 of 3 experiments failed, see above: broken.",
    ):
        assert words in err
    assert "Traceback" not in err


def test_a_damaged_result_hides_no_other_and_is_named(results, command):
    (results / "two" / "result.json").write_text('{"claims": "nonsense"}')
    for arguments in (["report", results], ["reproduce", "one", "--out", results]):
        (results / "report.html").unlink(missing_ok=True)
        code, out, err = command(*arguments)
        assert code == 2
        assert "1 same direction" in out
        assert re.search(r"not on the page: .*two/result.json.*Delete it", err)
        assert "one" in (results / "report.html").read_text()


def test_a_file_is_no_folder_for_results(tmp_path, command):
    (tmp_path / "file").touch()
    code, out, err = command("reproduce", "one", "--out", tmp_path / "file")
    assert (code, out) == (2, "")
    assert "is a file: name a folder" in err


@pytest.mark.parametrize("arguments", [["report"], ["reproduce", "one", "--out"]])
def test_the_page_of_one_result_is_not_replaced_by_the_page_of_verdicts(results, command, arguments):
    page = results / "one" / "report.html"
    before = page.read_text()
    code, _, err = command(*arguments, results / "one")
    assert code == 2
    assert "would be replaced: name another folder, such as the one above" in err
    assert page.read_text() == before


def test_an_interrupted_command_says_how_to_go_on(tmp_path, command, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("backpass.experiments.running.write_report", interrupted)
    code, _, err = command("reproduce", "one", "--jobs", 1, "--out", tmp_path)
    assert code == 130
    assert "Interrupted. Finished runs are kept: the same command goes on." in err


def test_an_unknown_name_is_answered_with_the_known_ones(tmp_path, command):
    code, _, err = command("reproduce", "onne", "--out", tmp_path)
    assert code == 2
    assert "Did you mean 'one'" in err


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"claims": 3}'])
def test_what_is_no_result_is_refused(tmp_path, text):
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(BackpassError, match=r"result\.json is (no result|damaged).*Delete it"):
        read_result(tmp_path / "result.json")


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(BackpassError, match=r"there is no result\.json"):
        read_results(tmp_path)


def test_the_verdicts_as_markdown_have_a_row_for_every_claim(results):
    text = verdicts(read_results(results))
    assert text.count("| **same direction** |") == 2
    assert "| `one` | T | 1 |" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} == {4, 7}
