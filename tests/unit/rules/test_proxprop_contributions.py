"""Solved in the backward pass, a weight's step is exact for one use per step; anything else is an error."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

from backpass import SIBP, BackpassError
from backpass.rules.implicit.systems import NotFiniteError
from support.proximal import EXACT, directions, relative

both = pytest.mark.parametrize("rule", [EXACT, SIBP()], ids=["proxprop", "sibp"])


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@both
def test_a_second_micro_batch_names_the_step(rule, model, x):
    with rule.attach(model):
        model(x).sum().backward()
        with pytest.raises(BackpassError, match=r'\'2.weight\' has a gradient.*solve="step"'):
            model(x).sum().backward()


@both
@pytest.mark.parametrize("set_to_none", [True, False])
def test_after_zero_grad_the_next_step_is_free(rule, set_to_none, model, x):
    with rule.attach(model):
        model(x).sum().backward()
        first = model[0].weight.grad.clone()
        model.zero_grad(set_to_none)
        model(x).sum().backward()
    assert torch.equal(model[0].weight.grad, first)


@both
def test_a_layer_used_twice_names_the_step(rule, model, x):
    shared = nn.Sequential(model[0], nn.Tanh(), model[0])
    with rule.attach(shared), pytest.raises(BackpassError, match=r'\'0.weight\' is used twice.*solve="step"'):
        shared(x).sum().backward()


@both
def test_two_calls_in_one_backward_pass_name_the_step(rule, model, x):
    with rule.attach(model), pytest.raises(BackpassError, match='solve="step"'):
        (model(x).sum() + model(2 * x).sum()).backward()


def test_two_calls_of_which_one_is_used_are_fine(model, x):
    expected = directions(model, x, torch.ones(5, 3, dtype=torch.float64), EXACT)
    with EXACT.attach(model):
        model(2 * x)
        model(x).sum().backward()
    assert torch.equal(model[0].weight.grad, expected["0.weight"])


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_module_is_exact(x, reentrant):
    class Checkpointed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.first, self.inner, self.checkpointing = nn.Linear(4, 4), inner, False

        def forward(self, x):
            h = self.first(x)
            return checkpoint(self.inner, h, use_reentrant=reentrant) if self.checkpointing else self.inner(h)

    torch.manual_seed(0)
    model = Checkpointed(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))).double()
    g = torch.randn(5, 3, dtype=torch.float64)
    expected = directions(model, x, g, EXACT)
    model.checkpointing = True
    found = directions(model, x, g, EXACT)
    assert all(relative(found[name], expected[name]) < 1e-12 for name in expected)


def test_input_gradients_cost_no_solve_and_count_as_no_contribution(model, x, monkeypatch):
    solves = []
    monkeypatch.setattr("backpass.rules.implicit.proximal.direction", lambda *a: solves.append(a))
    x.requires_grad_()
    with EXACT.attach(model):
        for _ in range(3):
            (gradient,) = torch.autograd.grad(model(x).sum(), x)
    (expected,) = torch.autograd.grad(model(x).sum(), x)
    assert torch.equal(gradient, expected)
    assert not solves


def test_autograd_grad_gives_directions_as_often_as_asked(model, x):
    expected = directions(model, x, torch.ones(5, 3, dtype=torch.float64), EXACT)["0.weight"]
    with EXACT.attach(model):
        for _ in range(2):
            assert torch.equal(torch.autograd.grad(model(x).sum(), model[0].weight)[0], expected)


def test_functional_gradients_per_sample(model, x):
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, sample):
        return functional_call(model, parameters, (sample[None],)).sum()

    each = [directions(model, x[i : i + 1], torch.ones(1, 3, dtype=torch.float64), EXACT) for i in range(5)]
    with EXACT.attach(model):
        found = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
        one = grad(loss)(parameters, x[0])
    for name in found:
        torch.testing.assert_close(found[name], torch.stack([one[name] for one in each]), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(one[name], each[0][name], rtol=1e-12, atol=1e-12)


@both
def test_differentiating_twice_is_an_error(rule, model, x):
    x.requires_grad_()
    with rule.attach(model), pytest.raises(BackpassError, match="create_graph"):
        torch.autograd.grad(model(x).square().sum(), x, create_graph=True)


@both
def test_a_backward_pass_after_removal_is_an_error(rule, model, x):
    attached = rule.attach(model)
    loss = model(x).sum()
    attached.remove()
    del attached
    with pytest.raises(BackpassError, match="while the rule is attached"):
        loss.backward()


def test_a_diverged_network_is_named(model, x):
    x[2, 1] = float("nan")
    with EXACT.attach(model), pytest.raises(NotFiniteError, match=r"'2.weight'.*diverged"):
        model(x).sum().backward()


def test_a_gradient_that_is_not_finite_stays_visible_as_in_plain_backpropagation(model, x):
    with EXACT.attach(model):
        (model(x).sum() * float("inf")).backward()
    assert not model[0].weight.grad.isfinite().all()
