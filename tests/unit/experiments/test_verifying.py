"""`backpass verify` recomputes verdicts, and notices every edit."""

import json
import shutil

import pytest

from backpass import papers
from backpass.errors import BackpassError
from backpass.experiments.running import run
from backpass.experiments.verifying import verify
from backpass.report.result import checksum
from support.command_line import call
from support.command_line import run as run_command
from support.experiments import arm, claim, experiment, table

RANGE = table(
    arm("up", 1.0, 3.0),
    arm("down", 0.0),
    claims=[claim("up", "down", setting="the claim's"), claim("up", "", low=-99.0, high=99.0)],
)


@pytest.fixture
def out(tmp_path):
    list(run([experiment(scale=RANGE)], scale="small", out=tmp_path))
    return tmp_path


def check(out):
    return verify(out / "one", [experiment(scale=RANGE)])


def edit(path, change, *, sign=False):
    content = json.loads(path.read_text())
    change(content)
    if sign:
        del content["sha256"]
        content["sha256"] = checksum(content)
    path.write_text(json.dumps(content, indent=1))


def test_an_untouched_result_is_confirmed_from_its_outcomes(out):
    found = check(out)
    assert (found.claims, found.outcomes, found.from_outcomes, found.problems) == (2, 24, True, ())


def test_without_the_outcomes_the_numbers_of_the_result_are_judged_again(out):
    shutil.rmtree(out / "outcomes")
    found = check(out)
    assert (found.claims, found.outcomes, found.from_outcomes, found.problems) == (2, 0, False, ())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda c: c["claims"][0].update(verdict="contradicted"), "says 'contradicted', the outcomes 'replicated'"),
        (lambda c: c["claims"][0].update(estimate=9.0), "estimate is 9"),
        (lambda c: c["claims"][1].update(n=5), "n, setting or statement differ"),
        (lambda c: c["claims"].pop(), "is missing in the result"),
        (lambda c: c["claims"].append({**c["claims"][0], "id": "one.new"}), "one.new is no claim of the experiment"),
        (lambda c: c["numbers"]["pairs"]["up-down"]["ours"].__setitem__(0, 7.5), "its numbers are not those"),
        (lambda c: c["numbers"]["outcomes"].update({"nowhere.json": "0"}), "nowhere.json is not in"),
    ],
)
def test_an_edited_result_is_noticed_also_where_its_hash_was_made_again(out, change, expected):
    path = out / "one" / "result.json"
    edit(path, change, sign=True)
    problems = check(out).problems
    assert any(expected in problem for problem in problems)
    assert not any("was edited" in problem for problem in problems)


def test_any_edit_of_the_result_breaks_its_hash(out):
    edit(out / "one" / "result.json", lambda content: content.update(title="Another"))
    (problem,) = check(out).problems
    assert "result.json was edited" in problem


@pytest.mark.parametrize("kind", ["clock", "values"])
def test_an_edited_outcome_is_noticed(out, kind):
    path = next(path for path in sorted((out / "outcomes").iterdir()) if (".clock." in path.name) == (kind == "clock"))
    path.write_text(path.read_text().replace("0", "1", 1))
    (problem,) = check(out).problems
    assert f"{path.name} was edited" in problem


def test_the_command_confirms_a_result_and_fails_on_an_edited_one(out, monkeypatch, capsys):
    monkeypatch.setattr(papers, "EXPERIMENTS", (experiment(scale=RANGE),))
    assert run_command("verify", str(out / "one")).output.strip().endswith("24 files of outcomes: all agree.")
    edit(out / "one" / "result.json", lambda content: content["claims"][0].update(verdict="contradicted"))
    code, _, error = call(monkeypatch, capsys, "verify", str(out / "one" / "result.json"))
    assert code == 2
    assert "says 'contradicted', the outcomes 'replicated'" in error


def test_what_has_no_stored_outcomes_cannot_be_verified(out):
    edit(out / "one" / "result.json", lambda content: content["numbers"].clear())
    with pytest.raises(BackpassError, match="cannot be verified"):
        check(out)
    with pytest.raises(BackpassError, match="there is no result"):
        verify(out / "two", [])
