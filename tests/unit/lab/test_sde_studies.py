"""The SDE's studies, small: what they measure is what they say, and the commands write it."""

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from backpass import BackpassError, cli
from backpass.lab.experiments.sde import compare, control, long_run, weak_error
from backpass.lab.experiments.sde.compare_result import describe, gap, tolerance
from backpass.lab.experiments.sde.tanh_network import make_problem
from backpass.sde import VARIANTS

SMALL = compare.Study(paths=40, t=1.5, records=3, points=40)


@pytest.fixture(scope="module")
def measured():
    threads = torch.get_num_threads()
    yield compare.measure(SMALL)
    torch.set_num_threads(threads)


def test_the_network_has_37_parameters_and_a_logistic_loss():
    sde, start = make_problem(seed=0, samples=64, eta=0.1, eta_inner=0.1, steps=3, batch_size=4)
    x, y = sde.data
    assert start.shape == (37,)
    weight, bias, last, shift = start[:24].view(6, 4), start[24:30], start[30:36], start[36]
    outputs = [torch.tanh(weight @ row + bias) @ last + shift for row in x]
    expected = torch.stack([(1 + (-label * out).exp()).log() for out, label in zip(outputs, y, strict=True)])
    torch.testing.assert_close(sde.expected_loss(start), expected.mean())


def test_the_sde_predicts_both_chains_within_three_standard_errors_and_five_percent(measured):
    for who in ("SGD", "AT"):
        for quantity in ("gradient_penalty", "expected_loss"):
            assert (gap(measured, quantity, who) <= tolerance(measured, quantity, who)).all(), (who, quantity)


def test_adversarial_training_turns_the_slope_of_the_input_gradient_down(measured):
    assert len(measured.slopes) == 40
    assert (measured.slopes < 0).double().mean() >= 0.95


def test_all_start_at_the_same_value_and_end_apart(measured):
    penalty = measured.values["gradient_penalty"]
    assert len({values[0, 0].item() for values in penalty.values()}) == 1
    assert penalty["AT"][-1].mean() < penalty["SGD"][-1].mean()
    assert {values.shape for values in penalty.values()} == {(4, 40)}


def test_the_verdicts_are_those_of_the_numbers(measured):
    verdicts = {claim.id: claim.verdict for claim in describe(measured).claims}
    assert verdicts["flatter"] == "same direction"
    assert verdicts["slope"] == "same direction"
    penalty = measured.values["gradient_penalty"]
    swapped = {**penalty, "AT": penalty["SGD"], "SGD": penalty["AT"]}
    turned = replace(measured, slopes=-measured.slopes, values={**measured.values, "gradient_penalty": swapped})
    verdicts = {claim.id: claim.verdict for claim in describe(turned).claims}
    assert verdicts["flatter"] == "opposite direction"
    assert verdicts["slope"] == "opposite direction"


def test_a_comparison_that_cannot_be_made_is_refused():
    with pytest.raises(BackpassError, match="needs an adversary"):
        compare.Study(steps=0)
    with pytest.raises(BackpassError, match=r"Try t=0\.9"):
        compare.Study(t=1.0, records=3)
    with pytest.raises(BackpassError, match="one or two dimensions"):
        weak_error.measure(weak_error.Study(dimension=3))
    with pytest.raises(BackpassError, match="halved at least once"):
        weak_error.Study(halvings=0)


def test_the_weak_error_page_judges_every_sde_by_its_order(tmp_path):
    arguments = ["sde", "weak-error", "--eta", "0.01", "--halvings", "2", "--t", "1", "--out", str(tmp_path)]
    ended = CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "120", "TERM": "dumb"})
    assert ended.exit_code == 0, ended.output
    result = json.loads((tmp_path / "result.json").read_text())
    verdicts = {claim["id"]: claim["verdict"] for claim in result["claims"]}
    assert verdicts == {f"order-{name}": "same direction" for name in VARIANTS}
    assert "Weak errors" in ended.output
    assert (tmp_path / "report.html").exists()


def test_the_comparison_writes_its_page(tmp_path):
    arguments = ["sde", "compare", "--paths", "3", "--t", "0.6", "--records", "3", "--out", str(tmp_path)]
    ended = CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "120", "TERM": "dumb"})
    assert ended.exit_code == 0, ended.output
    result = json.loads((tmp_path / "result.json").read_text())
    assert {series["id"] for series in result["series"]} == {"gradient-penalty", "expected-loss", "adversarial-loss"}


@pytest.mark.parametrize(
    "make",
    [
        lambda: compare.Study(t=float("nan")),
        lambda: compare.Study(eta=0.0),
        lambda: compare.Study(t=float("inf")),
        lambda: long_run.Study(relaxations=float("inf")),
        lambda: long_run.Study(relaxations=1e30),
        lambda: weak_error.measure(weak_error.Study(t=float("inf"))),
        lambda: control.measure(control.Study(t=1e30)),
    ],
)
def test_a_horizon_without_end_is_refused(make):
    with pytest.raises(BackpassError):
        make()
