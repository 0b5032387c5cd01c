"""The committed results and the pages made from them say the same."""

import importlib
import json
from pathlib import Path

import pytest

from backpass.papers import experiment_names
from backpass.report.markdown import verdicts
from backpass.report.overview import read_results
from backpass.report.result import checksum

ROOT = Path(__file__).parents[2]
SMALL = ROOT / "docs" / "results" / "small"


@pytest.fixture(scope="module")
def results():
    return read_results(SMALL, experiment_names())


def test_the_page_of_verdicts_is_made_from_the_committed_results(results):
    assert (ROOT / "docs" / "results" / "claims.md").read_text() == verdicts(results)


def test_every_committed_result_is_of_an_experiment_in_its_own_folder(results):
    names = [result.experiment for result in results]
    assert set(names) <= set(experiment_names())
    assert sorted(names) == sorted(path.name for path in SMALL.iterdir())


@pytest.mark.parametrize("path", sorted(SMALL.glob("*/result.json")), ids=lambda path: path.parent.name)
def test_a_committed_result_has_the_checksum_that_it_states(path):
    content = json.loads(path.read_text())
    assert content.pop("sha256", None) in (None, checksum(content))  # results of the former format state none


def test_no_verdict_rests_on_fewer_than_three_runs(results):
    for result in results:
        for claim in result.claims:
            assert claim.verdict == "undecided" or claim.n >= 3


def test_the_page_of_benchmarks_is_made_from_its_committed_json(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    page = importlib.import_module("page")
    found, where = page.read(ROOT / "docs" / "benchmarks" / "cpu.json")
    assert (ROOT / "docs" / "benchmarks" / "cpu.md").read_text() == page.markdown(found, where)


def test_the_page_of_transfer_at_a_budget_is_made_from_its_committed_json(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    page = importlib.import_module("transfer_budget_page").page
    found = ROOT / "docs" / "results" / "transfer-budget.json"
    assert found.with_suffix(".md").read_text() == page(json.loads(found.read_text()))
