"""Activations composed of several calls, against straight-through ones, in every call of a model."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpass import LinBP
from support.straight_through import renormalized, straight_through


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def squared_relu(x: Tensor) -> Tensor:
    return F.relu(x) ** 2


def squared_relu_method(x: Tensor) -> Tensor:
    return F.relu(x).square()


def product_of_relus(x: Tensor) -> Tensor:
    return F.relu(x) * F.relu(x)


BEFORE = {
    "as it is": lambda model, h: h,
    "doubled": lambda model, h: 2 * h,
    "divided": lambda model, h: h / 3.0,
    "shifted": lambda model, h: 3 * h + 1,
    "a learned scale": lambda model, h: model.scale * h,
    "a polynomial": lambda model, h: h + h * h,
    "in place": lambda model, h: h.mul_(2),
}


class Network(nn.Module):
    def __init__(self, activation, before, width=5):
        super().__init__()
        self.activation, self.before, self.straight = activation, before, frozenset()
        self.first = nn.Linear(5, width)
        self.second = nn.Linear(width, width)
        self.scale = nn.Parameter(torch.tensor(1.3))
        self.double()

    def forward(self, x):
        h = self._of(self.activation, self.before(self, self.first(x)), 0)
        return self._of(F.relu, self.second(h), 1)

    def _of(self, function, x, number):
        return straight_through(x, function) if number in self.straight else function(x)


def gradients(model, x):
    out = model(x)
    return [out, *torch.autograd.grad(out.square().sum(), [x, *model.parameters()], materialize_grads=True)]


def assert_straight_through(model, x, start):
    """Three calls of the model give the plain output, and the gradients of straight-through activations."""
    plain, *_ = gradients(model, x)
    model.straight = frozenset(range(2)[start:])
    _, *expected = gradients(model, x)
    model.straight = frozenset()
    with LinBP(start=start).attach(model) as attached:
        for _ in range(3):
            out, *got = gradients(model, x)
            assert torch.equal(out, plain)
            assert len(attached.seen) == 2
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("start", [0, -1, 1])
@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("activation", [silu, gelu, squared_relu, squared_relu_method, product_of_relus])
def test_an_activation_begins_where_the_function_bends(activation, before, start):
    torch.manual_seed(0)
    assert_straight_through(Network(activation, BEFORE[before]), torch.randn(4, 5).double().requires_grad_(), start)


@pytest.mark.parametrize("start", [0, -1, 1])
@pytest.mark.parametrize("activation", [silu, gelu, squared_relu, product_of_relus])
def test_a_parameter_that_scales_an_activation_is_a_layer_of_its_own(activation, start):
    class Scaled(Network):
        def _of(self, function, x, number):
            return self.scale * super()._of(function, x, number)

    torch.manual_seed(0)
    assert_straight_through(Scaled(activation, BEFORE["as it is"]), torch.randn(4, 5).double().requires_grad_(), start)


@pytest.mark.parametrize("activation", [silu, gelu, squared_relu])
def test_one_sample_with_one_feature_is_no_constant(activation):
    torch.manual_seed(0)
    network = Network(activation, BEFORE["as it is"], width=1)
    assert_straight_through(network, torch.randn(1, 5).double().requires_grad_(), 0)


@pytest.mark.parametrize("start", [0, -1])
def test_the_square_in_a_norm_is_no_activation(start):
    class Normed(Network):
        def _of(self, function, x, number):
            h = super()._of(function, x, number)
            return h / (h.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt()

    torch.manual_seed(0)
    network = Normed(F.relu, BEFORE["as it is"])
    assert_straight_through(network, torch.randn(4, 5).double().requires_grad_(), start)


@pytest.mark.parametrize("start", [0, -1])
def test_a_model_may_return_nothing(start):
    class Keeping(Network):
        def forward(self, x):
            self.kept = super().forward(x)

    torch.manual_seed(0)
    network, x = Keeping(silu, BEFORE["doubled"]), torch.randn(4, 5).double().requires_grad_()
    network.straight = frozenset(range(2)[start:])
    network(x)
    (expected,) = torch.autograd.grad(network.kept.sum(), x)
    network.straight = frozenset()
    with LinBP(start=start).attach(network) as attached:
        for _ in range(2):
            network(x)
            (got,) = torch.autograd.grad(network.kept.sum(), x)
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
            assert len(attached.seen) == 2


@pytest.mark.parametrize("activation", [F.relu, silu, squared_relu, product_of_relus])
def test_composed_activations_are_renormalized_in_every_call(activation):
    class Renormalized(Network):
        def _of(self, function, x, number):
            return renormalized(x, function) if number in self.straight else function(x)

    torch.manual_seed(0)
    network, x = Renormalized(activation, BEFORE["doubled"]), torch.randn(4, 5).double().requires_grad_()
    network.straight = frozenset(range(2))
    (expected,) = torch.autograd.grad(network(x).sum(), x)
    network.straight = frozenset()
    with LinBP(residual="per_activation").attach(network):
        for _ in range(3):
            (got,) = torch.autograd.grad(network(x).sum(), x)
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("operator", [torch.ops.aten.relu, torch.ops.aten.relu.default])
def test_operators_called_past_torch_s_functions_are_named(operator):
    network = Network(operator, BEFORE["as it is"])
    with LinBP().attach(network) as attached, pytest.warns(UserWarning, match="aten.relu"):
        network(torch.randn(4, 5).double())
    assert list(attached.unreachable) == [""]


def test_two_rules_share_a_composition():
    class Model(nn.Module):
        def forward(self, x):
            return torch.tanh(x * torch.sigmoid(x))

    model, x = Model(), torch.tensor([-1.0, 2.0], requires_grad=True)
    with LinBP(start=0).attach(model) as outer, LinBP(start=-1, slope=2.0).attach(model) as inner:
        for _ in range(2):
            (found,) = torch.autograd.grad(model(x).sum(), x)
            assert found.tolist() == [2.0, 2.0]
            assert [site.index for site in outer.seen] == [site.index for site in inner.seen] == [0, 1]
            assert [site.index for site in outer.sites] == [0]


# Activations as other functions, in the forward of a module with layers

RECTIFIERS = {
    "clamp": lambda x: x.clamp(min=0),
    "torch.clamp": lambda x: torch.clamp(x, 0),
    "clamp_": lambda x: (1 * x).clamp_(min=0),
    "clamp_min": lambda x: torch.clamp_min(x, 0.0),
    "clip": lambda x: x.clip(0),
    "maximum": lambda x: torch.maximum(x, torch.zeros_like(x)),
    "maximum of a number": lambda x: torch.maximum(torch.tensor(0.0).to(x), x),
    "max": lambda x: torch.max(x, torch.zeros_like(x)),
    "fmax": lambda x: torch.fmax(x, torch.zeros_like(x)),
    "threshold": lambda x: F.threshold(x, 0.0, 0.0),
    "product": lambda x: x * (x > 0),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "where of zeros": lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
    "masked_fill": lambda x: x.masked_fill(x < 0, 0.0),
}
SOFTPLUS = {
    "log1p": lambda x: torch.log1p(torch.exp(x)),
    "log": lambda x: torch.log(1 + x.exp()),
    "logaddexp": lambda x: torch.logaddexp(x, torch.zeros_like(x)),
}


@pytest.mark.parametrize("start", [0, -1, 1])
@pytest.mark.parametrize("name", {**RECTIFIERS, **SOFTPLUS})
def test_other_functions_that_compute_an_activation_are_one(name, start):
    torch.manual_seed(0)
    network = Network({**RECTIFIERS, **SOFTPLUS}[name], BEFORE["as it is"])
    assert_straight_through(network, torch.randn(4, 5).double().requires_grad_(), start)


@pytest.mark.parametrize("size", [(), (1,)])
def test_they_are_where_the_input_has_no_gradient(size):
    network = Network(RECTIFIERS["clamp"], BEFORE["as it is"]).requires_grad_(False)
    with LinBP().attach(network) as attached:
        network(torch.randn(*size, 5).double())
    assert len(attached.seen) == 2


NO_ACTIVATIONS = {
    "pixels": lambda model, x: F.relu(model.first(x.clamp(min=0))),
    "a root": lambda model, x: F.relu(model.second(model.first(x).clamp(min=0).sqrt())),
    "a logarithm": lambda model, x: F.relu(model.second((model.first(x).clamp(min=0) + 1).log())),
    "a divisor": lambda model, x: F.relu(model.second(x / (model.first(x).clamp(min=0) + 1))),
    "a variance": lambda model, x: F.relu(x / (model.first(x).var(-1, keepdim=True).clamp(min=0) + 1)),
    "another limit": lambda model, x: F.relu(model.second(model.first(x).clamp(min=1e-5))),
    "a parameter": lambda model, x: F.relu(F.linear(x, F.softplus(model.first.weight))),
    "parameters": lambda model, x: F.relu(F.linear(x, torch.tanh(model.first.weight + model.second.weight))),
    "a composition of parameters": lambda model, x: F.relu(F.linear(x, silu(model.first.weight))),
}
GATES = {
    "cat": lambda a, b: torch.cat([a, b], -1).chunk(2, -1)[0],
    "stack": lambda a, b: torch.stack([a, b])[0],
    "dropout": lambda a, b: F.dropout(torch.stack([a, b]), 0.0)[0],
    "mean": lambda a, b: torch.stack([a, b]).mean(0),
}


def functions_seen(forward, start=0):
    network = Network(F.relu, BEFORE["as it is"])
    network.forward = forward.__get__(network)
    with LinBP(start=start).attach(network) as attached:
        for _ in range(2):
            network(torch.rand(4, 5).double().requires_grad_())
            seen = [site.function for site in attached.seen]
        return seen


@pytest.mark.parametrize("name", NO_ACTIVATIONS)
def test_clamps_that_keep_a_domain_and_functions_of_parameters_are_no_activations(name):
    assert functions_seen(NO_ACTIVATIONS[name]) == ["relu"]


@pytest.mark.parametrize("join", GATES)
def test_gates_remain_gates_when_joined(join):
    def forward(model, x):
        gate = GATES[join](torch.sigmoid(model.first(x)), torch.sigmoid(model.second(x)))
        return F.relu(x) * gate

    assert functions_seen(forward) == ["relu"]


@pytest.mark.parametrize(
    "product",
    [torch.matmul, lambda a, b: a @ b, lambda a, b: torch.einsum("ij,jk->ik", a, b)],
    ids=["f", "@", "einsum"],
)
def test_a_sigmoid_that_weighs_other_values_is_a_gate_and_one_before_a_layer_is_none(product):
    def weighs(model, x):
        return F.relu(product(torch.sigmoid(model.first(x) @ model.second(x).T), model.second(x)))

    def before_a_layer(model, x):
        return F.relu(product(torch.sigmoid(model.first(x)), model.second.weight.t()))

    assert functions_seen(weighs) == ["relu"]
    assert functions_seen(before_a_layer) == ["sigmoid", "relu"]


@pytest.mark.parametrize("function", [torch.sin, torch.atan, torch.erf, lambda x: x.clamp(0, 1)])
def test_functions_that_may_be_activations_are_named_and_those_in_a_composition_are_not(function):
    own, composed = Network(function, BEFORE["doubled"]), Network(gelu, BEFORE["doubled"])
    x = torch.randn(4, 5).double().requires_grad_()
    with LinBP().attach(own) as attached, pytest.warns(UserWarning, match="another purpose"):
        own(x)
    assert list(attached.unreachable) == [""]
    with LinBP().attach(composed) as attached:
        composed(x)
    assert not attached.unreachable
