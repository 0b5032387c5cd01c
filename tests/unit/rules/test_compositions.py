"""Activations composed of several calls, against straight-through ones, in every call of a model."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpass import LinBP, NoSiteError, list_sites
from support.straight_through import renormalized, straight_through
from support.zoo.activations_by_hand import CubeFunction
from support.zoo.by_hand import scripted_function


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


def overwritten(x: Tensor, compute) -> Tensor:
    y = 1 * x
    negative = y < 0
    y[negative] = compute(y[negative])
    return y


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
    "a mask": lambda x: x * (x > 0),
    "a mask as a number": lambda x: x * (x > 0).to(x),
    "a negated mask": lambda x: x * ~(x < 0),
    "a mask without a gradient": lambda x: (x.detach() > 0) * x,
    "heaviside": lambda x: x * torch.heaviside(x.detach(), torch.zeros_like(x)),
    "sign": lambda x: x * (torch.sign(x) + 1) / 2,
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "where of zeros": lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
    "where with zeros first": lambda x: torch.where(x <= 0, torch.zeros_like(x), x),
    "Tensor.where": lambda x: x.where(x > 0, 0.0),
    "masked_fill": lambda x: x.masked_fill(x < 0, 0.0),
    "masked_fill_": lambda x: (1 * x).masked_fill_(x < 0, 0.0),
    "the absolute value": lambda x: (x + x.abs()) / 2,
    "without the negative part": lambda x: x - x.clamp(max=0),
    "without the minimum": lambda x: x - torch.minimum(x, torch.zeros_like(x)),
    "with the negated": lambda x: x + F.relu(-x),
}
SMOOTH = {
    "softplus": lambda x: torch.log1p(torch.exp(x)),
    "softplus by log": lambda x: torch.log(1 + x.exp()),
    "softplus by logaddexp": lambda x: torch.logaddexp(x, torch.zeros_like(x)),
    "stable softplus": lambda x: torch.log1p(torch.exp(-x.abs())) + x.clamp(min=0),
    "logsigmoid": lambda x: -torch.log(1 + torch.exp(-x)),
    "sigmoid": lambda x: torch.exp(x) / (1 + torch.exp(x)),
    "tanh": lambda x: (torch.exp(x) - torch.exp(-x)) / (torch.exp(x) + torch.exp(-x)),
    "tanhshrink": lambda x: x - torch.tanh(x),
    "softsign": lambda x: x / (1 + x.abs()),
    "softsign by root": lambda x: x / torch.sqrt(1 + x**2),
    "gelu by tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu by erf": gelu,
    "gelu by erfc": lambda x: 0.5 * x * torch.erfc(-x / math.sqrt(2)),
    "gelu by ndtr": lambda x: x * torch.special.ndtr(x),
    "swish": lambda x: x / (1 + torch.exp(-x)),
    "swish by addcmul": lambda x: torch.addcmul(0 * x, x, torch.sigmoid(x)),
    "mish": lambda x: x * torch.tanh(torch.log1p(torch.exp(x))),
    "snake": lambda x: x + torch.sin(x) ** 2,
    "bent identity": lambda x: ((x**2 + 1).sqrt() - 1) / 2 + x,
}
PIECEWISE = {
    "relu6": F.relu6,
    "hardtanh": F.hardtanh,
    "hardswish": lambda x: x * (x + 3).clamp(0, 6) / 6,
    "leaky by max": lambda x: torch.max(0.1 * x, x),
    "leaky by where": lambda x: torch.where(x >= 0, x, x * 0.01),
    "leaky by abs": lambda x: 0.55 * x + 0.45 * x.abs(),
    "leaky by clamps": lambda x: x.clamp(min=0) + 0.1 * x.clamp(max=0),
    "leaky by lerp": lambda x: torch.lerp(0.1 * x, x, (x > 0).to(x)),
    "prelu": lambda x: F.relu(x) - 0.25 * F.relu(-x),
    "elu by where": lambda x: torch.where(x > 0, x, torch.expm1(x)),
    "elu by a sum": lambda x: F.relu(x) + (torch.exp(x) - 1).clamp(max=0),
    "softshrink by sign": lambda x: torch.sign(x) * (x.abs() - 0.5).clamp(min=0),
    "softshrink by relus": lambda x: F.relu(x - 0.5) - F.relu(-x - 0.5),
    "hardshrink": lambda x: x * (x.abs() > 0.5),
    "threshold by where": lambda x: torch.where(x > 0.1, x, 0.1),
}
ACTIVATIONS = {**RECTIFIERS, **SMOOTH, **PIECEWISE}

NAMED = {
    "minimum": lambda x: -torch.minimum(-x, torch.zeros_like(x)),
    "sigmoid by exp": lambda x: 1 / (1 + torch.exp(-x)),
    "reciprocal": lambda x: (1 + torch.exp(-x)).reciprocal(),
    "clamp": lambda x: x.clamp(0, 1),
    "clamp in two calls": lambda x: F.relu(x).clamp(max=6),
    "another limit": lambda x: x.clamp(min=0.1),
    "square": lambda x: x * x,
    "power": lambda x: x**3,
    "polynomial": lambda x: x + x * x,
    "abs": torch.abs,
    "sin": torch.sin,
    "atan": torch.atan,
    "erf": torch.erf,
    "gaussian": lambda x: torch.exp(-(x**2)),
    "two values": lambda x: torch.maximum(x, x.flip(-1)),
    "an assignment": lambda x: overwritten(x, lambda negative: 0 * negative),
    "a leaky assignment": lambda x: overwritten(x, lambda negative: 0.1 * negative),
    "index_put": lambda x: x.index_put((x < 0,), torch.zeros((), dtype=x.dtype)),
    "masked_scatter": lambda x: x.masked_scatter(x < 0, torch.zeros_like(x)),
    "inside vmap": lambda x: torch.vmap(lambda row: row.clamp(min=0))(x),
    "operator": torch.ops.aten.relu,
    "another operator": lambda x: torch.ops.aten.clamp_min(x, 0),
    "autograd function": CubeFunction.apply,
    "scripted": scripted_function,
    "swiglu of three factors": lambda x: (x.flip(-1) + 1) * x * torch.sigmoid(x),
}


@pytest.mark.parametrize("start", [0, -1, 1])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_other_functions_that_compute_an_activation_are_one(name, start):
    torch.manual_seed(0)
    network = Network(ACTIVATIONS[name], BEFORE["as it is"])
    assert_straight_through(network, torch.randn(4, 5).double().requires_grad_(), start)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", NAMED)
def test_no_other_nonlinear_function_is_silently_plain(name):
    network, x = Network(NAMED[name], BEFORE["doubled"]), torch.randn(4, 5).double().requires_grad_()
    plain = network(x)
    with LinBP().attach(network) as attached:
        assert torch.equal(network(x), plain)
    assert list(attached.unreachable) == list(list_sites(network, x).unreachable) == [""]
    with pytest.raises(NoSiteError, match="cannot reach"), LinBP().attach(network, strict=True):
        network(x)


@pytest.mark.parametrize("size", [(), (1,)])
def test_they_are_where_the_input_has_no_gradient(size):
    network = Network(ACTIVATIONS["clamp"], BEFORE["as it is"]).requires_grad_(False)
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


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("output", [lambda y: y, lambda y: y.sum(), lambda y: SimpleNamespace(logits=y)])
def test_they_are_named_in_the_first_call_that_computes_gradients(output):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = Network(torch.sin, BEFORE["as it is"])

        def forward(self, x):
            return output(self.network(x))

    model, x = Model().requires_grad_(False), torch.randn(4, 5).double()
    with LinBP().attach(model) as attached:
        for _ in range(2):
            model(x)
        assert attached.unreachable == {}
        model(x.requires_grad_())
    assert list(attached.unreachable) == ["network"]


NORMALIZED = {
    "root mean square": lambda model, h: h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6),
    "variance": lambda model, h: (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True) + 1e-6).sqrt(),
    "unit length": lambda model, h: h / h.norm(dim=-1, keepdim=True).clamp(min=1e-6),
    "mean absolute value": lambda model, h: h / (h.abs().mean(-1, keepdim=True) + 1e-6),
    "softmax": lambda model, h: h.exp() / h.exp().sum(-1, keepdim=True),
    "stable softmax": lambda model, h: (e := (h - h.amax(-1, keepdim=True)).exp()) / e.sum(-1, keepdim=True),
    "softmax by a reciprocal": lambda model, h: (e := h.exp()) * (1 / e.sum(-1, keepdim=True)),
    "length by einsum": lambda model, h: h / (torch.einsum("bi,bi->b", h, h).sqrt()[:, None] + 1e-6),
    "the range of float16": lambda model, h: h.clamp(-65504, 65504),
    "entropy": lambda model, h: h + ((p := h.softmax(-1)) * p.log()).sum(-1, keepdim=True),
    "a learned temperature": lambda model, h: h * model.scale.clamp(max=4.6).exp(),
    "weights": lambda model, h: F.linear(h, model.second.weight / model.second.weight.norm(dim=1, keepdim=True)),
    "a constant mask": lambda model, h: h.masked_fill(torch.arange(5) > 3, 0.0),
    "rotation": lambda model, h: h * torch.arange(5).cos() + h.flip(-1) * torch.arange(5).sin(),
    "dropout by hand": lambda model, h: h * (torch.rand_like(h) > 0.5),
    "straight-through rounding": lambda model, h: h + (h.round() - h).detach(),
    "a decay": lambda model, h: model.second(h) * torch.exp(-model.first(h)),
    "a bilinear gate": lambda model, h: model.second(h) * model.first(h),
}


@pytest.mark.parametrize("name", NORMALIZED)
def test_normalizations_masks_and_weights_are_not_named(name):
    network, x = Network(F.relu, NORMALIZED[name]), torch.randn(4, 5).double()
    with LinBP().attach(network, strict=True) as attached:
        network(x)
    assert len(attached.seen) == 2
