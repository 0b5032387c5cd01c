"""LinBP's simulations agree with closed forms, with slow loops and with numbers from an independent implementation."""

import math

import pytest
import torch

from backpass.attacks import PGD
from backpass.experiments.experiment import Context
from backpass.experiments.sleeping import Asleep, Sleeper, attack_sleepers
from backpass.experiments.students import Attacked, Taught, attack_students, teach_students
from backpass.papers import linbp_simulations as paper
from support.experiments import judged

SLOPES = {"bp": lambda z: (z > 0).double(), "linbp": torch.ones_like}


def mean_and_error(values):
    values = torch.tensor(values, dtype=torch.float64)
    return values.mean().item(), values.std().item() / math.sqrt(len(values))


# Means of another 500 draws, with their own standard errors of about .68: after 10, 50 and 100 steps.
REFERENCE = {
    ("bp", "none", 1e-3): (194.70, 194.00, 193.89),
    ("linbp", "none", 1e-3): (193.83, 192.84, 192.77),
    ("bp", "l2", 0.05): (194.90, 193.99, 193.90),
    ("linbp", "l2", 0.05): (194.60, 192.95, 192.77),
    ("bp", "sign", 0.005): (195.00, 194.00, 193.97),
    ("linbp", "sign", 0.005): (194.77, 192.90, 192.86),
}


@pytest.mark.parametrize(("rule", "norm", "step"), list(REFERENCE))
def test_the_attacks_distances_are_those_of_an_independent_implementation(rule, norm, step):
    found = attack_students(Attacked(rule=rule, norm=norm, step=step), 0, Context())
    for place, expected in zip((10, 50, 100), REFERENCE[rule, norm, step], strict=True):
        mean, error = mean_and_error([row[place] for row in found["distance"]])
        assert abs(mean - expected) < 3 * math.hypot(error, 0.68)


@pytest.mark.parametrize("rule", SLOPES)
def test_the_attack_is_descent_by_the_rules_gradient_inside_the_ball(rule):
    settings = Attacked(rule=rule, runs=3, steps=4, eps=0.01)
    d, m, k = settings.widths
    draws = torch.Generator().manual_seed(7)
    w, v, best, start = (
        torch.randn(*shape, generator=draws, dtype=torch.float64) for shape in ((3, m, d), (3, k, m), (3, d), (3, d))
    )
    best = 1 + 2 * best
    found = attack_students(settings, 7, Context())
    for run_ in range(3):
        x, aim, norms = start[run_], v[run_] @ (w[run_] @ best[run_]).relu(), []
        for distance in found["distance"][run_]:
            assert distance == pytest.approx((x - best[run_]).abs().sum().item())
            z = w[run_] @ x
            error = v[run_] @ z.relu() - aim
            gradient = w[run_].T @ (SLOPES[rule](z) * (v[run_].T @ error)) / d
            norms.append(gradient.norm().item())
            x = start[run_] + (x - 1e-3 * gradient - start[run_]).clamp(-0.01, 0.01)
        assert len(norms) == 5
        assert found["norm"][run_] == pytest.approx(norms[0])
        assert found["loss"][run_] == pytest.approx(error.square().sum().item() / 2)


def test_linbps_expected_weights_shrink_by_one_minus_half_the_step():
    settings = Taught(rule="linbp", runs=20, recorded=(0, 1000))
    ratios = [after / before for before, after in teach_students(settings, 0, Context())["distance"]]
    mean, error = mean_and_error(ratios)
    assert abs(mean - (1 - settings.step / 2) ** 1000) < 4 * error + 1e-3


@pytest.mark.parametrize("norm", ["none", "l2"])
def test_training_is_sgd_with_the_rules_gradient(norm):
    draws = torch.Generator().manual_seed(7)
    best = 1 + 3 * torch.randn(2, 10, generator=draws, dtype=torch.float64)
    start = torch.randn(2, 10, generator=draws, dtype=torch.float64)
    inputs = torch.Generator().manual_seed(8)
    xs = [torch.randn(2, 100, 10, generator=inputs, dtype=torch.float64) for _ in range(4)]
    last = {}
    for rule, slope in SLOPES.items():
        settings = Taught(rule=rule, norm=norm, step=0.1, runs=2, recorded=(0, 1, 2, 3), early=1)
        found = teach_students(settings, 7, Context())
        for run_ in range(2):
            w, lengths = start[run_], []
            for step in range(4):
                last[rule, run_] = (w - best[run_]).abs().sum().item()
                assert found["distance"][run_][step] == pytest.approx(last[rule, run_])
                z = xs[step][run_] @ w
                error = z.relu() - (xs[step][run_] @ best[run_]).relu()
                assert found["loss"][run_][step] == pytest.approx(error.square().sum().item() / 2)
                gradient = xs[step][run_].T @ (slope(z) * error) / 100
                lengths.append(gradient.abs().sum().item())
                w = w - 0.1 * (gradient / gradient.norm() if norm == "l2" else gradient)
            assert found["norm"][run_] == pytest.approx([lengths[0], sum(lengths[:3]) / 3])
            assert found["gain"][run_] == pytest.approx(math.log(last["bp", run_] / last[rule, run_]))


def test_linbps_example_is_nearer_and_has_the_higher_loss(tmp_path):
    claims, result = judged(tmp_path, paper.attack(("plain", "sign"), runs=60, steps=30))
    assert claims["nearer-plain-30"].estimate < 0
    assert claims["loss-sign"].estimate > 0
    assert claims["longer-first"].estimate > 0
    assert {claim.n for claim in claims.values()} == {60}
    assert [table.title for table in result.tables] == ["plain update: every arm", "sign update: every arm"]
    assert [len(curve.x) for series in result.series for curve in series.curves] == [31] * 4


def test_steps_of_one_length_gain_less_than_plain_ones(tmp_path):
    plain, unit = paper.learn(runs=6, recorded=(0, 100)), paper.learn(unit=True, runs=6, recorded=(0, 100))
    claims, _ = judged(tmp_path, plain)
    assert set(claims) == {"nearer-100", "loss-100", "longer-early", "longer-all"}
    assert claims["nearer-100"].estimate < 0
    claims, _ = judged(tmp_path, unit)
    assert claims["smaller-gain"].estimate < 0
    assert len(list((tmp_path / "outcomes").glob("teach-students-0-*.clock.json"))) == 4  # one is shared


@pytest.mark.parametrize("threshold", [0.0, 1.0, 2.0])
def test_units_are_awake_as_often_as_a_normal_number_exceeds_the_threshold(threshold):
    found = attack_sleepers(Asleep(rule="bp", threshold=threshold, radii=(), images=2000), 0, Context())
    assert found["awake"] == pytest.approx(50 * math.erfc(threshold / math.sqrt(2)), abs=2)


def drawn(settings, seed):
    generator = torch.Generator().manual_seed(seed)
    network = Sleeper(settings.widths, settings.threshold, generator)
    return network, torch.randn(settings.images, settings.widths[0], generator=generator)


def test_plain_gradients_are_blind_exactly_where_no_unit_is_awake():
    settings = Asleep(rule="linbp", threshold=3.0, radii=(), images=300)
    network, x = drawn(settings, 4)
    asleep = (x @ network.w.T <= 3.0).all(1).double().mean().item()
    assert 0 < asleep < 1
    assert attack_sleepers(settings, 4, Context())["blind"] == pytest.approx(100 * asleep)


def test_without_sleeping_units_both_gradients_are_one():
    plain, linear = (
        attack_sleepers(Asleep(rule=rule, threshold=-100.0, radii=(0.1,), images=50), 0, Context()) for rule in SLOPES
    )
    assert plain["awake"] == 100
    assert plain == linear


def test_a_rate_is_that_of_pgd():
    settings = Asleep(rule="bp", threshold=1.0, radii=(0.2,), images=40)
    network, x = drawn(settings, 0)
    attack = PGD(eps=0.2, step=0.05, steps=10, restarts=1, bounds=(-20, 20))
    expected = attack(network, x, network(x).argmax(1)).success.double().mean().item()
    assert attack_sleepers(settings, 0, Context())["fooled"] == [pytest.approx(100 * expected)]


def test_linbp_is_ahead_where_units_sleep_and_the_ball_is_wide_and_behind_where_neither(tmp_path):
    claims, result = judged(tmp_path, paper.sleep((0.0, 3.0), (0.05, 0.5), networks=4, images=80))
    assert claims["b3-eps0.5"].verdict == "same direction"
    assert claims["b0-eps0.05"].verdict == "opposite direction"
    assert [table.title for table in result.tables] == ["threshold 0: every arm", "threshold 3: every arm"]
