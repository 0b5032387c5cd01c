"""A suspended rule is out of force, and afterwards in force again as if nothing had been."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from backpass import SIBP, LinBP, ProxProp
from backpass.rules import attachments
from support.networks import CASES, gradients

RULES = {"linbp": LinBP(start=-1), "proxprop": ProxProp(tau=0.5), "sibp": SIBP(eta=0.2)}


def same(one, other):
    return all(
        torch.equal(a, b) for a, b in zip((one[0], *one[1].values()), (other[0], *other[1].values()), strict=True)
    )


@pytest.fixture(params=["functional", "reused-in-place", "residual"])
def case(request):
    return CASES[request.param].make()


@pytest.mark.parametrize("name", RULES)
def test_plain_inside_and_in_force_again_after(case, name):
    model, x = case
    plain = gradients(model, model, x)
    with RULES[name].attach(model) as attached:
        ruled = gradients(model, model, x)
        with attached.suspended():
            assert same(gradients(model, model, x), plain)
            assert attachments(model) == []
        assert same(gradients(model, model, x), ruled)
        assert attachments(model) == [attached]
    assert same(gradients(model, model, x), plain)
    assert not same(ruled, plain)


def test_nested_and_after_an_exception(case):
    model, x = case
    plain = gradients(model, model, x)
    with LinBP(start=1).attach(model) as attached:
        ruled = gradients(model, model, x)
        with attached.suspended():
            with pytest.raises(ZeroDivisionError), attached.suspended():
                raise ZeroDivisionError
            assert same(gradients(model, model, x), plain)
        assert same(gradients(model, model, x), ruled)


def test_after_removal_it_does_nothing(case):
    model, x = case
    plain = gradients(model, model, x)
    attached = LinBP(start=1).attach(model)
    attached.remove()
    with attached.suspended():
        assert same(gradients(model, model, x), plain)
    assert same(gradients(model, model, x), plain)


def test_removed_inside_it_does_not_come_back_nor_disturb_who_came_meanwhile(case):
    model, x = case
    with LinBP(start=-1).attach(model):
        expected = gradients(model, model, x)
    attached = LinBP(start=1).attach(model)
    with attached.suspended():
        attached.remove()
        other = LinBP(start=-1).attach(model)
    assert same(gradients(model, model, x), expected)
    other.remove()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_of_two_rules_one_rests_and_the_order_stays(case):
    # Where both select a site, the rule attached last acts.
    model, x = case
    outer, inner = LinBP(start=0, slope=2.0), LinBP(start=0, slope=3.0)
    with outer.attach(model):
        outer_alone = gradients(model, model, x)
    with inner.attach(model):
        inner_alone = gradients(model, model, x)
    with outer.attach(model) as first, inner.attach(model) as second:
        with second.suspended():
            assert same(gradients(model, model, x), outer_alone)
        with first.suspended():
            assert same(gradients(model, model, x), inner_alone)
        with second.suspended(), first.suspended():
            assert attachments(model) == []
        assert same(gradients(model, model, x), inner_alone)
        assert attachments(model) == [first, second]


def test_another_rule_may_come_inside_and_stay(case):
    model, x = case
    with LinBP(start=0, slope=3.0).attach(model):
        expected = gradients(model, model, x)
    with LinBP(start=0, slope=2.0).attach(model) as attached:
        with attached.suspended():
            other = LinBP(start=0, slope=3.0).attach(model)
            assert same(gradients(model, model, x), expected)
        assert attachments(model) == [attached, other]
        assert same(gradients(model, model, x), expected)
        other.remove()


def test_the_range_of_sites_is_not_looked_for_again(case):
    model, x = case
    with LinBP(start=-1).attach(model) as attached:
        gradients(model, model, x)
        calls = []
        model.register_forward_hook(lambda *_: calls.append(1))
        for _ in range(3):
            with attached.suspended():
                pass
            model(x)
    assert len(calls) == 3


def test_what_proxprop_collected_survives():
    # The union of two batches is the proximal step of both in one, also with plain passes between them.
    torch.manual_seed(0)
    layer = nn.Linear(4, 3).double()
    x, y = torch.randn(10, 4, dtype=torch.float64), torch.randn(10, 3, dtype=torch.float64)
    a = torch.cat([x, torch.ones(10, 1, dtype=torch.float64)], 1)
    g = layer(x).detach() - y
    expected = torch.linalg.solve(a.T @ a + torch.eye(5, dtype=torch.float64) / 0.7, a.T @ g)
    optimizer = torch.optim.SGD(layer.parameters(), 1.0)
    with ProxProp(tau=0.7, solve="step").attach(layer, optimizer=optimizer) as attached:
        for part in (slice(0, 6), slice(6, 10)):
            with attached.suspended():
                inside = x[part].clone().requires_grad_()
                torch.autograd.grad(layer(inside).square().sum(), inside)
            (0.5 * (layer(x[part]) - y[part]).square().sum()).backward()
        optimizer.step()
    assert torch.allclose(layer.weight.grad.T, expected[:4], rtol=0, atol=1e-12)
    assert torch.allclose(layer.bias.grad, expected[4], rtol=0, atol=1e-12)


def test_a_copy_made_inside_is_plain(case):
    model, x = case
    plain = gradients(model, model, x)
    with LinBP(start=1).attach(model) as attached, attached.suspended():
        twin = copy.deepcopy(model)
    assert attachments(twin) == []
    assert same(gradients(twin, twin, x), plain)


def test_a_rule_that_ctrl_c_left_running_rests_too():
    class Interrupted(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.now = nn.Linear(3, 3).double(), False

        def forward(self, x):
            if self.now:
                raise KeyboardInterrupt
            return F.relu(self.linear(x)).sum(1)

    model, x = Interrupted(), torch.randn(2, 3, dtype=torch.float64)
    plain = gradients(model, model, x)
    with LinBP().attach(model) as attached:
        model(x)
        model.now = True
        with pytest.raises(KeyboardInterrupt):
            model(x)
        model.now = False
        with attached.suspended():
            assert torch._C._len_torch_function_stack() == 0
            assert same(gradients(model, model, x), plain)


@pytest.mark.parametrize("name", ["functional", "conv-bn-relu", "nested-sequential"])
def test_compiled_code_serves_every_cycle(name):
    torch._dynamo.reset()
    model, x = CASES[name].make()
    plain = gradients(model, model, x)
    counter = CompileCounterWithBackend("aot_eager")
    with LinBP(start=-1).attach(model) as attached:
        ruled = gradients(model, model, x)
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        counts = []
        for _ in range(4):
            assert torch.allclose(gradients(compiled, model, x)[0], ruled[0], rtol=0, atol=1e-12)
            with attached.suspended():
                assert torch.allclose(gradients(compiled, model, x)[0], plain[0], rtol=0, atol=1e-12)
            counts.append(counter.frame_count)
    torch._dynamo.reset()
    assert counts == [2, 2, 2, 2]
