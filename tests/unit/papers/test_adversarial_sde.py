"""The tables of adversarial training's SDE in small; what their works measure is what they say."""

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from backpass import BackpassError, cli
from backpass.experiments.experiment import Context
from backpass.experiments.long_run import LongRun, find_minimum, predict_law, run_long
from backpass.experiments.optimal_rate import Quadratic, compare_schedules
from backpass.experiments.robustness import QUANTITIES, Paired, compare_slopes, predict_paths, run_paths
from backpass.experiments.tanh_network import make_problem
from backpass.experiments.weak_orders import FUNCTIONS, Orders, weak_errors
from backpass.papers import adversarial_sde
from backpass.sde import VARIANTS, fit_slope
from support.experiments import judged

TINY = Paired(paths=40, t=1.5, records=3, points=40)


def test_weak_orders_are_those_of_the_derivation_over_all_problems(tmp_path):
    claims, result = judged(tmp_path, adversarial_sde.weak_orders(Orders(steps=(0, 2), rhos=(1.0,))))
    for name, variant in VARIANTS.items():
        claim = claims[f"order-{name}"]
        assert claim.n == 6
        assert claim.estimate == pytest.approx(variant.order, abs=0.15)
        assert claim.verdict == "same direction"
    assert [len(series.curves) for series in result.series] == [4] * len(FUNCTIONS)


def test_an_order_that_is_not_reached_is_an_opposite_verdict(tmp_path):
    scale = adversarial_sde.weak_orders(Orders(steps=(2,), rhos=(1.0,)))
    b0, *_, exact = scale.comparisons
    claims, _ = judged(tmp_path, replace(scale, comparisons=(replace(exact, ours=b0.ours),)))
    assert claims["order-C"].verdict == "opposite direction"


def test_slopes_are_fitted_to_the_errors_of_each_problem():
    settings = Orders(steps=(0, 2), rhos=(1.0, 3.0), t=0.5)
    assert list(settings.problems) == [(1, 0, 1.0), (1, 2, 1.0), (1, 2, 3.0)]
    found = weak_errors(settings, 0, Context())
    expected = [
        fit_slope(settings.etas, found[f"error of {function}"][problem])
        for problem in range(3)
        for function in FUNCTIONS
    ]
    assert found["slope"] == expected


def test_a_long_run_ends_in_the_law_that_is_predicted(tmp_path):
    settings = LongRun(dimension=1, paths=64, relaxations=8.0, eta=0.05)
    claims, result = judged(tmp_path, adversarial_sde.long_run(settings))
    assert claims["spread"].n == 64
    (chain, prediction), (plain, attacked) = (table.rows for table in result.tables)
    assert abs(chain[1].mean - prediction[1].mean) < 2 * (chain[1].high - chain[1].low)
    assert abs(chain[1].mean - attacked[1].mean) < abs(chain[1].mean - plain[1].mean)
    assert attacked[2].mean < plain[2].mean  # a smaller input gradient
    assert [curve.label for curve in result.series[0].curves] == ["chain", "prediction"]


def test_the_prediction_has_the_times_of_the_run_and_starts_where_it_starts():
    settings = LongRun(paths=8, relaxations=2.0)
    measured, predicted = (work(settings, 0, Context()) for work in (run_long, predict_law))
    assert set(measured) == set(predicted)
    assert measured["t"] == pytest.approx(predicted["t"])
    for name in ("theta_1", "theta_2"):
        assert predicted[name][0][0] == measured[name][0][0] == measured[name][7][0]
        assert {len(path) for path in (*measured[name], *predicted[name])} == {settings.records + 1}


@pytest.fixture(scope="module")
def paths():
    settings = {
        "SGD": (run_paths, replace(TINY, adversarial=False)),
        "AT": (run_paths, TINY),
        "SGD, C": (predict_paths, replace(TINY, adversarial=False)),
        "AT, C": (predict_paths, TINY),
        "AT, B": (predict_paths, replace(TINY, mode="expanded")),
    }
    return {name: work(one, 0, Context()) for name, (work, one) in settings.items()}


def test_the_network_has_37_parameters_and_a_logistic_loss():
    sde, start = make_problem(seed=0, samples=64, eta=0.1, eta_inner=0.1, steps=3, batch_size=4)
    x, y = sde.data
    assert start.shape == (37,)
    weight, bias, last, shift = start[:24].view(6, 4), start[24:30], start[30:36], start[36]
    outputs = [torch.tanh(weight @ row + bias) @ last + shift for row in x]
    expected = torch.stack([(1 + (-label * out).exp()).log() for out, label in zip(outputs, y, strict=True)])
    torch.testing.assert_close(sde.expected_loss(start), expected.mean())


def test_the_gap_between_chain_and_sde_stays_within_three_standard_errors_and_five_percent(paths):
    for who in ("SGD", "AT"):
        for quantity in ("gradient_penalty", "expected_loss"):
            chain, sde = (torch.tensor(paths[name][quantity])[:, 1:] for name in (who, f"{who}, C"))
            gap = (chain.mean(0) - sde.mean(0)).abs()
            allowed = 3 * (chain.var(0) / 40 + sde.var(0) / 40).sqrt() + 0.05 * sde.mean(0)
            assert (gap <= allowed).all(), (who, quantity)
            assert paths[f"{who}, C"][f"gap {quantity}"] == pytest.approx(gap.tolist(), abs=1e-6)
            assert paths[f"{who}, C"][f"excess {quantity}"] == pytest.approx((gap - allowed).tolist(), abs=1e-6)


def test_all_start_at_the_same_value_and_end_apart(paths):
    for quantity in QUANTITIES:
        assert len({one[quantity][0][0] for one in paths.values()}) == 1
        assert {(len(one[quantity]), len(one[quantity][0])) for one in paths.values()} == {(40, 4)}
    ends = {name: sum(path[-1] for path in one["gradient_penalty"]) for name, one in paths.items()}
    assert ends["AT"] < ends["SGD"]
    assert len(set(ends.values())) == 5


def test_adversarial_training_turns_the_slope_of_the_input_gradient_down():
    slopes = compare_slopes(TINY, 0, Context())["slope"]
    assert len(slopes) == 40
    assert sum(slope < 0 for slope in slopes) >= 0.95 * 40


def test_the_verdicts_on_robustness_are_those_of_the_numbers(tmp_path, paths):
    claims, result = judged(tmp_path, adversarial_sde.robustness(TINY))
    ours, theirs = ([path[-1] for path in paths[name]["gradient_penalty"]] for name in ("AT", "SGD"))
    assert claims["flatter"].estimate == pytest.approx((sum(ours) - sum(theirs)) / 40)
    assert claims["flatter"].verdict == claims["slope"].verdict == "same direction"
    exact, expanded = (sum(paths[name]["gap gradient_penalty"]) / 3 for name in ("AT, C", "AT, B"))
    assert claims["exact-closer"].estimate == pytest.approx(exact - expanded)
    assert [len(table.rows) for table in result.tables] == [5, 1]


def test_the_commands_write_their_pages(tmp_path):
    for arguments, ids in (
        ("weak-error --eta 0.01 --halvings 2 --t 1", {f"order-{name}" for name in VARIANTS}),
        ("long-run --paths 8 --relaxations 2 --eta 0.1 --dim 1", {"spread"}),
        ("compare --paths 3 --t 0.6 --records 3", {"flatter", "slope", "exact-closer"}),
    ):
        out = tmp_path / arguments.split()[0]
        ended = CliRunner().invoke(cli.app, ["sde", *arguments.split(), "--out", str(out)], env={"TERM": "dumb"})
        assert ended.exit_code == 0, ended.output
        result = json.loads((out / "result.json").read_text())
        assert {claim["id"].partition(".")[2] for claim in result["claims"]} >= ids
        assert "every arm" in ended.output.lower()
        assert {path.name for path in out.iterdir()} == {"report.html", "result.json"}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Paired(steps=0), "needs an adversary"),
        (lambda: Paired(t=1.0, records=3), r"Try t=0\.9"),
        (lambda: Paired(t=float("nan")), "finite numbers above 0"),
        (lambda: Paired(t=float("inf")), "finite numbers above 0"),
        (lambda: Paired(eta=0.0), "finite numbers above 0"),
        (lambda: Orders(halvings=0), "halved at least once"),
        (lambda: weak_errors(Orders(dimensions=(3,)), 0, Context()), "one or two dimensions"),
        (lambda: weak_errors(Orders(t=float("inf")), 0, Context()), None),
        (lambda: LongRun(paths=2), "at least 8 paths"),
        (lambda: LongRun(relaxations=float("inf")), "relaxation times"),
        (lambda: LongRun(relaxations=1e30), "relaxation times"),
        (lambda: find_minimum(LongRun(dimension=3), 0, Context()), "one or two dimensions"),
        (lambda: compare_schedules(Quadratic(t=1e30)), "shorter horizon"),
    ],
)
def test_what_cannot_be_measured_is_refused(make, words):
    with pytest.raises(BackpassError, match=words):
        make()
