"""Rules and attacks at the ends of what they may meet: one site or ten thousand, one sample or many, no gradient."""

import gc
import tracemalloc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from backpass import SIBP, LinBP, ProxProp, list_sites
from backpass.attacks import APGD, FAB, FGSM, IFGSM, MIFGSM, PGD, Square

RULES = [LinBP(), ProxProp(tau=0.5), SIBP(eta=0.1, lam=0.5)]
ATTACKS = [
    FGSM(eps=0.1),
    IFGSM(eps=0.1, step=0.05, steps=3),
    MIFGSM(eps=0.1, step=0.05, steps=3),
    PGD(eps=0.1, step=0.05, steps=3, restarts=2),
    PGD(eps=0.5, norm="l2", step=0.2, steps=3, restarts=1, loss="dlr"),
    APGD(eps=0.1, steps=3),
    FAB(eps=0.1, steps=3),
    Square(eps=0.1, queries=5),
]
NAMED = {"ids": lambda one: type(one).__name__}


def network(*, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)).to(dtype)


def gradients(model, rule, x, y, weight=1.0):
    model.zero_grad()
    with rule.attach(model):
        (weight * F.cross_entropy(model(x), y)).backward()
    return [p.grad.clone() for p in model.parameters()]


class Deep(nn.Module):
    """x -> relu(x) -> relu(x) -> ..., without a parameter."""

    def __init__(self, sites):
        super().__init__()
        self.sites = sites

    def forward(self, x):
        for _ in range(self.sites):
            x = F.relu(x - 1e-6)
        return x


@pytest.mark.parametrize("sites", [1, 10_000])
def test_a_model_with_so_many_sites(sites):
    model, x = Deep(sites), torch.tensor([1.0, -1.0], dtype=torch.float64, requires_grad=True)
    assert len(list_sites(model, x)) == sites
    with LinBP().attach(model) as attached:
        (all_linear,) = torch.autograd.grad(model(x).sum(), x)
    with LinBP(start=-1).attach(model):
        (last_linear,) = torch.autograd.grad(model(x).sum(), x)
    assert len(attached.sites) == sites
    assert all_linear.tolist() == [1.0, 1.0]
    assert last_linear.tolist() == [1.0, 1.0 if sites == 1 else 0.0]


MANY = 2_000  # with more of them the dense solve itself loses digits, as the square of their number


def one_and_many(rule, rule_of_many):
    """The gradients on one sample, and on the same sample many times."""
    model, x, y = network(), torch.randn(1, 6, dtype=torch.float64), torch.tensor([2])
    many = x.expand(MANY, -1).contiguous(), y.expand(MANY).contiguous()
    return gradients(model, rule, x, y), gradients(model, rule_of_many, *many)


def test_linbp_on_a_huge_batch_is_the_mean_over_its_samples():
    for one, many in zip(*one_and_many(LinBP(), LinBP()), strict=True):
        torch.testing.assert_close(one, many, rtol=1e-8, atol=1e-12)


def test_proxprop_on_a_sample_many_times_is_that_on_the_sample_with_a_larger_tau():
    # The first layer's (sum_i a_i a_i^T + I / tau)^{-1} sum_i g_i a_i^T, with g_i of the mean loss.
    one, many = one_and_many(ProxProp(tau=0.5 * MANY), ProxProp(tau=0.5))
    for a, b in zip(one[:2], many[:2], strict=True):
        torch.testing.assert_close(a, MANY * b, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("rule", RULES, **NAMED)
def test_a_loss_without_gradient_leaves_none(rule):
    model, x, y = network(), torch.randn(7, 6, dtype=torch.float64), torch.arange(7) % 4
    for gradient in gradients(model, rule, x, y, weight=0.0):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("attack", ATTACKS, **NAMED)
def test_an_attack_without_gradient_ends_in_the_ball_and_fools_nobody(attack):
    class Constant(nn.Module):
        def forward(self, x):
            return 0 * x.flatten(1)[:, :3] + torch.tensor([1.0, 0.5, 0.0])

    x, y = torch.rand(5, 1, 4, 4), torch.zeros(5, dtype=torch.long)
    found = attack(Constant(), x, y)
    assert torch.isfinite(found.x_adv).all()
    assert not found.success.any()
    away = (found.x_adv - x).flatten(1).norm(2 if attack.norm == "l2" else float("inf"), dim=1)
    assert (away <= attack.eps + 1e-6).all()


@pytest.mark.parametrize("attack", ATTACKS, **NAMED)
def test_an_attack_on_one_sample_is_that_on_it_among_others(attack):
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    x = torch.rand(64, 1, 4, 4, dtype=torch.float64)
    y = model(x).argmax(1)
    whole = attack(model, x, y)
    alone = attack(model, x[7:8], y[7:8], indices=torch.tensor([7]))
    torch.testing.assert_close(alone.x_adv, whole.x_adv[7:8], rtol=0, atol=1e-12)
    assert alone.success.item() == whole.success[7].item()


@pytest.mark.parametrize(
    "rule", [RULES[0], *(pytest.param(rule, marks=pytest.mark.slow) for rule in RULES[1:])], **NAMED
)
def test_ten_thousand_attached_calls_leave_nothing_behind(rule):
    model, x = network(), torch.randn(2, 6, dtype=torch.float64)

    def calls(count):
        for _ in range(count):
            model.zero_grad()
            model(x).sum().backward()
        gc.collect()

    with rule.attach(model):
        calls(10)
        objects = len(gc.get_objects())
        tracemalloc.start()
        try:
            calls(10)
            before, _ = tracemalloc.get_traced_memory()
            calls(10_000)
            after, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert len(gc.get_objects()) <= objects + 20
        assert after <= before + 160_000  # 16 bytes a call: no object is as small


@pytest.mark.parametrize("rule", RULES, **NAMED)
def test_attaching_ten_thousand_times_leaves_nothing_behind(rule):
    model = network()

    def attach(count):
        for _ in range(count):
            rule.attach(model).remove()
        gc.collect()
        return len(gc.get_objects())

    before = attach(10)
    assert attach(10_000) <= before + 20
