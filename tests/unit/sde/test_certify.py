"""Certificates of processes whose truth is known; SVAG; predictions."""

import functools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from backpass import BackpassError
from backpass.sde import SVAG, AdversarialSDE, InnerLoop, certify, explore, run_chain, svag_weights
from backpass.sde.certify import OBSERVABLES, ensemble, process
from backpass.sde.diagnostics import excess_kurtosis, local_numbers, projected_noise, tail_exponent
from support.sde import D, smooth_data, smooth_loss, smooth_theta

SCALES = torch.tensor([1.0, 0.7, 0.5, 0.3], dtype=D)


class Mean(nn.Module):
    """A quadratic loss whose gradient noise is that of the data."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(4, dtype=D))

    def forward(self, x):
        return self.w - x


def quadratic(output, y):
    return (output.square() * SCALES).sum(-1) / 2


def certified(case, seed=0, **settings):
    generator = torch.Generator().manual_seed(1000 + seed)
    x = torch.randn(512, 4, generator=generator, dtype=D)
    chosen = {"steps": 40, "sampling": "iid", "amplifications": (1, 4), "replicas": 32, "seed": seed, **settings}
    eta = 1.9 if case == "unstable" else 0.1
    if case == "heavy":
        x = x / torch.randn(512, 1, generator=generator, dtype=D).abs()  # Cauchy
    if case == "permuted":
        x, chosen["sampling"] = x[:64], "permuted"
    data = x, torch.zeros(len(x))
    return certify(Mean(), data, eta, 4, InnerLoop(steps=2, eta=0.05), criterion=quadratic, **chosen)


@pytest.mark.parametrize(
    ("case", "failed"),
    [
        ("small rate", set()),
        ("unstable", {"eta times curvature", "clean loss, l = 4"}),
        ("heavy", {"kurtosis of the noise"}),
        ("permuted", {"spread, permuted batches"}),
    ],
)
def test_cases_of_known_truth(case, failed):
    found = certified(case)
    names = {check.name for check in found.checks if check.verdict == "failed"}
    assert failed <= names
    assert found.valid is (not failed)
    text = str(found)
    assert ("does not" in text) is bool(failed)
    undecided = sum(check.verdict == "undecided" for check in found.checks)
    assert (f"{undecided} of {len(found.checks)} checks are undecided" in text) is bool(undecided and not failed)


def test_the_amplified_gradient_has_the_mean_and_l_times_the_covariance():
    """Over all pairs of batches of one sample."""
    theta, sde = smooth_theta(1), AdversarialSDE(smooth_loss, smooth_data(), eta_outer=0.2, steps=2, eta_inner=0.1)
    for amplification in (1, 2, 4, 16):
        plus, minus = svag_weights(amplification)
        assert plus + minus == pytest.approx(1)
        assert plus**2 + minus**2 == pytest.approx(amplification)
        chain = SVAG(sde, amplification)
        index = torch.cartesian_prod(*[torch.arange(6)] * chain.batch_size).view(-1, chain.batch_size)
        moves = chain.chain_step(theta.expand(len(index), -1), index=index) - theta
        torch.testing.assert_close(moves.mean(0), -0.2 / amplification * sde.mean_field(theta[0]))
        centred = moves - moves.mean(0)
        torch.testing.assert_close(centred.T @ centred / len(index), 0.04 / amplification * sde.covariance(theta[0]))
    assert SVAG(sde, 4).time_step == pytest.approx(0.05)
    assert run_chain(SVAG(sde, 4), theta, 8, record=2).times.tolist() == pytest.approx([0, 0.2, 0.4])


def test_local_numbers_are_those_of_dense_matrices():
    sde, theta = AdversarialSDE(smooth_loss, smooth_data(), eta_outer=0.2, steps=2, eta_inner=0.1), smooth_theta(1)[0]
    found = local_numbers(sde, theta, draws=100, iterations=100, generator=torch.Generator().manual_seed(0))
    h, S, H = sde.mean_field(theta), sde.covariance(theta), torch.func.jacfwd(sde.mean_field)(theta)
    assert found.drift == pytest.approx(float(h @ h))
    assert found.noise == pytest.approx(float(S.trace()), rel=0.4)
    assert found.curvature == pytest.approx(float(h @ H @ h / (h @ h)))
    assert found.noise_curvature == pytest.approx(float((H @ S).trace()), rel=0.5)
    assert found.largest == pytest.approx(float(torch.linalg.eigvals(H).abs().max()), rel=1e-3)


def test_kurtosis_of_normal_and_of_two_valued_gradients():
    generator = torch.Generator().manual_seed(0)
    for data, expected in (
        (torch.randn(20_000, 1, generator=generator, dtype=D), 0.0),
        (torch.ones(4, 1, dtype=D), -2.0),
    ):
        x = data if expected == 0 else data * torch.tensor([[1.0], [1], [-1], [-1]], dtype=D)
        sde = AdversarialSDE(lambda p, x, y: (p - x)[:, 0].square() / 2, (x, torch.zeros(len(x))), eta_outer=0.1)
        found, _ = excess_kurtosis(projected_noise(sde, torch.zeros(1, dtype=D), generator=generator))
        assert found == pytest.approx(expected, abs=0.15)


def test_the_tail_index_of_powers_of_uniform_numbers():
    """P(U^-1/alpha > x) = x^-alpha, within four standard errors."""
    uniform = torch.rand(4, 5000, generator=torch.Generator().manual_seed(0), dtype=D)
    for alpha in (1.5, 3.0):
        found, error = tail_exponent(uniform.pow(-1 / alpha), 4)
        assert found == pytest.approx(1 / alpha, abs=4 * error)


def test_many_samples_in_a_batch_do_not_hide_heavy_tails():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = torch.distributions.StudentT(1.5).sample((1000, 4)).double()
    data = x, torch.zeros(1000)
    adversary = InnerLoop(steps=0, eta=0.0)
    settings = {"criterion": quadratic, "steps": 10, "sampling": "iid", "amplifications": (1, 4), "probe": 1000}
    found = certify(Mean(), data, 0.05, 64, adversary, replicas=4, **settings)
    verdicts = {check.name: check.verdict for check in found.checks}
    assert verdicts["tail index of the noise"] == "failed"
    assert not found.valid


@pytest.fixture(scope="module")
def explored():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 5, generator=generator, dtype=D)
    y = (x[:, 0] + 0.5 * x[:, 1].square() > 0.4).long()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    sde, theta = process(model, (x, y), 0.2, 16, InnerLoop(steps=3, eta=0.1))
    return sde, theta, explore(sde, theta, 40, probe=sde, replicas=4, generator=generator)


@pytest.mark.parametrize("setting", [(0.15, 4, 0.08), (0.25, 2, 0.13), (0.18, 3, 0.12)])
def test_predictions_hold_runs_at_other_settings(explored, setting):
    sde, theta, predictor = explored
    eta, steps, inner = setting
    other = replace(sde, eta_outer=eta, steps=steps, eta_inner=inner)
    generator = torch.Generator().manual_seed(7)
    found, _ = ensemble(other, theta, round(8 / eta), 4, probe=sde, sampling="permuted", generator=generator)
    predicted = predictor.predict(*setting, replicas=4)
    inside = [
        predicted[name].low <= float(found[name].log().mean().exp()) <= predicted[name].high for name in OBSERVABLES
    ]
    assert sum(inside) >= 2
    assert all(predicted[name].high < 1.5 * predicted[name].low for name in OBSERVABLES)


class Applied(nn.Module):
    """A linear layer between two functions."""

    def __init__(self, before=lambda x: x, after=lambda x: x):
        super().__init__()
        self.linear, self.before, self.after = nn.Linear(3, 2), before, after

    def forward(self, x):
        return self.after(self.linear(self.before(x)))


X, Y = torch.arange(24.0).view(8, 3) / 24, torch.arange(8) % 2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"amplifications": (4,)}, "increase from 1"),
        ({"amplifications": 4}, "increase from 1"),
        ({"replicas": 2}, "replicas >= 4"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"sampling": "shuffled"}, "unknown sampling"),
        ({"seed": -1}, "seed must be an integer >= 0"),
        ({"progress": None}, "progress a function"),
        ({"batch_size": 9}, "up to their number"),
        ({"data": (X[:1], Y[:1]), "batch_size": 1}, "at least 2 samples"),
        ({"data": (X.numpy(), Y.numpy())}, "got ndarray, ndarray"),
        ({"data": (X, Y.float())}, "int64 class indices"),
        ({"data": (X, Y + 1)}, "out of bounds"),
        ({"adversary": None}, "must be an InnerLoop"),
        ({"model": Applied(after=lambda x: {"logits": x})}, "got dict"),
        ({"model": Applied(after=lambda x: x * x.sum().item())}, "depends on values"),
        ({"model": Applied(before=lambda x: x.sub_(1.0))}, "in place"),
        ({"criterion": nn.CrossEntropyLoss()}, "one value per sample"),
        ({"criterion": lambda output: output}, "takes the model's output and y"),
    ],
)
def test_mistakes_are_named(changed, message):
    settings = {"model": Applied(), "data": (X.clone(), Y), "eta": 0.1, "batch_size": 2, "steps": 2}
    with pytest.raises(BackpassError, match=message):
        certify(**{**settings, "adversary": InnerLoop(steps=2, eta=0.1), **changed})


def test_a_model_without_input_gradient_agrees_with_itself():
    model = Applied(before=torch.Tensor.detach)
    found = certify(
        model, (X, Y), 0.1, 2, InnerLoop(steps=1, eta=0.1), steps=2, replicas=4, amplifications=(1, 4), sampling="iid"
    )
    check = next(one for one in found.checks if one.name.startswith("input gradient"))
    assert (check.verdict, check.estimate.value) == ("passed", 0.0)


@pytest.mark.parametrize(
    "criterion",
    [
        pytest.param(lambda output, y: quadratic(output, y) + (0 * output[:, 0]).sqrt(), id="gradients are NaN"),
        pytest.param(lambda output, y: 1e200 * 1e200 * quadratic(output, y), id="loss is infinite"),
        pytest.param(lambda output, y: 1e200 * quadratic(output, y), id="squares overflow"),
    ],
)
def test_a_check_that_is_not_finite_does_not_pass(criterion):
    x = torch.randn(40, 4, dtype=D, generator=torch.Generator().manual_seed(0))
    adversary = InnerLoop(steps=1, eta=0.05)
    settings = {"steps": 2, "replicas": 4, "amplifications": (1, 2), "sampling": "iid"}
    found = certify(nn.Linear(4, 1).double(), (x, x[:, :1]), 0.05, 4, adversary, criterion=criterion, **settings)
    unclear = {check.name: check.verdict for check in found.checks if not math.isfinite(check.estimate.value)}
    assert not found.valid
    assert unclear["eta times curvature"] == "failed"
    assert "passed" not in unclear.values()


def test_the_model_stays_as_it_was():
    model = nn.Linear(3, 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = torch.randn(8, 3), torch.arange(8) % 2
    criterion = functools.partial(F.cross_entropy, reduction="none")
    certify(model, data, 0.1, 2, InnerLoop(steps=1, eta=0.1), criterion=criterion, steps=2, replicas=4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
