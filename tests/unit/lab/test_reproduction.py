"""Experiments run, are kept, go on where they were interrupted, and make one page."""

import json
import math
import re
import sys
from dataclasses import dataclass

import pytest
import torch

from backpass import cli, papers
from backpass.errors import BackpassError, UnknownNameError
from backpass.lab.bench.experiment import Experiment, Outcome
from backpass.lab.experiments import catalogue
from backpass.lab.reproduction.running import reproduce
from backpass.report.claims import judge
from backpass.report.markdown import verdicts
from backpass.report.overview import read_results
from backpass.report.reading import read_result
from backpass.report.result import Curve, Finding, Series, Table
from backpass.report.statistics import mean_interval

CPU = torch.device("cpu")
CALLS = []


@dataclass(frozen=True, kw_only=True)
class Sizes:
    runs: int = 4
    fail_at: int | None = None


def measure(settings, bench):
    values = []
    for run in range(settings.runs):

        def compute(run=run):
            CALLS.append(run)
            if run == settings.fail_at:
                raise KeyboardInterrupt
            return float(run)

        values.append(bench.pieces.value(f"run {run}", compute, run=run))
    return Outcome(
        findings=[Finding("In short", "It was measured.")],
        series=[
            Series(
                id="line", title="A line", description="", x_label="x", y_label="y",
                curves=[Curve(label="a", x=[0, 1], runs=[[1.0, math.nan], [2.0, 3.0]]),
                        Curve(label="b", x=[0, 1], given=[mean_interval(values), mean_interval([1.0])])],
            )
        ],
        claims=[
            judge("more", "more is more", ours=[v + 1 for v in values], theirs=[0.1 * v for v in values],
                  direction="higher", quantity="units", published="3 units")
        ],
        tables=[Table(id="t", title="Numbers", columns=["what", "n", "x"], rows=[["a", 3, mean_interval(values)]])],
        data="made", seeds=range(settings.runs),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    CALLS.clear()
    scales = {"small": Sizes(), "paper": Sizes(runs=9)}
    one, two = (
        Experiment(name=name, title="T", question="Q?", source="P, Figure 1", scales=scales, measure=measure)
        for name in ("one", "two")
    )
    monkeypatch.setattr(catalogue, "EXPERIMENTS", (one, two))
    monkeypatch.setattr(papers, "EXPERIMENTS", ())
    return one


def run(tmp_path, *names, **options):
    return list(reproduce(names or ["one"], out=tmp_path, device=CPU, **{"scale": "small", **options}))


def command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["backpass", *arguments])
    try:
        cli.main()
        code = 0
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


def test_an_experiment_writes_the_promised_json(tmp_path):
    run(tmp_path)
    written = json.loads((tmp_path / "one" / "result.json").read_text())
    assert {"experiment", "scale", "environment", "settings", "series", "claims"} <= set(written)
    (claim,) = written["claims"]
    assert {"id", "statement", "verdict", "estimate", "interval", "n", "reference"} <= set(claim)
    assert (written["experiment"], written["scale"], claim["id"]) == ("one", "small", "one.more")
    assert claim["verdict"] == "same direction"


def test_a_finished_experiment_is_kept_and_run_again_when_asked(tmp_path):
    assert [done.kept for done in run(tmp_path)] == [False]
    assert [done.kept for done in run(tmp_path)] == [True]
    assert CALLS == [0, 1, 2, 3]
    assert [done.kept for done in run(tmp_path, scale="paper")] == [False]
    assert [done.kept for done in run(tmp_path, scale="paper", again=True)] == [False]


def test_an_interrupted_experiment_goes_on_from_its_finished_pieces(tmp_path, monkeypatch, tiny):
    monkeypatch.setitem(tiny.scales, "small", Sizes(fail_at=2))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert not (tmp_path / "one" / "result.json").exists()
    monkeypatch.setitem(tiny.scales, "small", Sizes())
    CALLS.clear()
    run(tmp_path)
    assert CALLS == [2, 3]
    run(tmp_path / "whole")
    resumed, whole = (read_result(folder / "one" / "result.json") for folder in (tmp_path, tmp_path / "whole"))
    assert resumed.claims == whole.claims


def test_one_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, tiny):
    def fail(settings, bench):
        raise ZeroDivisionError("a bug")

    broken = Experiment(**{**vars(tiny), "name": "broken", "measure": fail})
    monkeypatch.setattr(catalogue, "EXPERIMENTS", (broken, tiny))
    first, second = run(tmp_path, "all")
    assert (first.name, first.reason) == ("broken", "ZeroDivisionError: a bug")
    assert (second.name, second.kept) == ("one", False)
    assert not (tmp_path / "broken").exists()


def test_the_command_line_tells_of_each_and_fails_if_one_did(tmp_path, monkeypatch, capsys, tiny):
    monkeypatch.setitem(tiny.scales, "small", Sizes(runs=-1))  # no pair: an error
    code, _, err = command(monkeypatch, capsys, "reproduce", "all", "--jobs", "1", "--out", str(tmp_path))
    assert code == 2
    assert "one (" in err
    assert "failed: " in err
    assert "2 of 2 experiments failed, see above: one, two." in err
    assert "Traceback" not in err


def test_a_damaged_result_hides_no_other_and_is_told(tmp_path, monkeypatch, capsys, tiny):
    run(tmp_path)
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "result.json").write_text('{"claims": "nonsense"}')
    for arguments in (["report", str(tmp_path)], ["reproduce", "one", "--out", str(tmp_path)]):
        (tmp_path / "report.html").unlink(missing_ok=True)
        code, out, err = command(monkeypatch, capsys, *arguments)
        assert code == 2
        assert "1 same direction" in out
        assert re.search(r"not on the page: .*two/result.json.*Delete it", err)
        assert "one" in (tmp_path / "report.html").read_text()


def test_a_file_is_no_folder_for_results(tmp_path, monkeypatch, capsys, tiny):
    (tmp_path / "file").touch()
    code, out, err = command(monkeypatch, capsys, "reproduce", "one", "--out", str(tmp_path / "file"))
    assert (code, out) == (2, "")
    assert "is a file: name a folder" in err


def test_an_interrupted_command_says_that_it_goes_on(tmp_path, monkeypatch, capsys, tiny):
    monkeypatch.setitem(tiny.scales, "small", Sizes(fail_at=2))
    code, _, err = command(monkeypatch, capsys, "reproduce", "one", "--out", str(tmp_path))
    assert code == 130
    assert "Interrupted. Finished runs are kept: the same command goes on." in err


def test_what_was_written_is_what_is_read(tmp_path):
    (done,) = run(tmp_path)
    again = read_result(tmp_path / "one" / "result.json")
    assert again.as_json() == done.result.as_json()
    assert again.claims == done.result.claims


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"claims": 3}'])
def test_what_is_no_result_is_told(tmp_path, text):
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(BackpassError, match=r"result\.json is (no result|damaged).*Delete it"):
        read_result(tmp_path / "result.json")


def test_a_folder_without_results_is_told(tmp_path):
    with pytest.raises(BackpassError, match=r"there is no result\.json"):
        read_results(tmp_path)


def test_the_verdicts_as_markdown_have_a_row_for_every_claim(tmp_path):
    run(tmp_path, "all")
    text = verdicts(read_results(tmp_path))
    assert text.count("| **same direction** |") == 2
    assert "| `one` | T | 1 |" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} == {4, 7}


def test_two_claims_of_one_id_are_refused(tmp_path, monkeypatch, tiny):
    def twice(settings, bench):
        found = measure(settings, bench)
        return Outcome(**{**vars(found), "claims": [*found.claims, *found.claims]})

    monkeypatch.setattr(catalogue, "EXPERIMENTS", (Experiment(**{**vars(tiny), "measure": twice}),))
    (failed,) = run(tmp_path)
    assert "two claims of one id" in failed.reason


def test_unknown_names_and_scales_are_told_before_anything_runs(tmp_path):
    with pytest.raises(UnknownNameError, match="one"):
        run(tmp_path, "onne")
    with pytest.raises(UnknownNameError, match="small"):
        run(tmp_path, "one", scale="smal")
    assert CALLS == []


def test_data_that_is_not_there_is_told_before_anything_runs(tmp_path, monkeypatch, tiny):
    needs = Experiment(**{**vars(tiny), "data": ("no-such-data",)})
    monkeypatch.setattr(catalogue, "EXPERIMENTS", (tiny, needs))
    with pytest.raises(BackpassError, match="no-such-data"):
        run(tmp_path, "all")
    assert CALLS == []
