"""SIBP against the algorithm written out layer by layer, with dense least squares for each unit."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpass import SIBP
from support.semi_implicit import Layer, error, step_of_layer, steps_of_rule, transcription

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU, "leaky": nn.LeakyReLU, "softplus": nn.Softplus}


def summed_gradient(y: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda z: z.softmax(1) - F.one_hot(y, z.shape[1])


def three_layers(s: Callable[[], nn.Module], bias: bool = True) -> tuple[nn.Module, list[Layer]]:
    one, two, three = nn.Linear(7, 6, bias), nn.Linear(6, 5, bias), nn.Linear(5, 3, bias)
    model = nn.Sequential(one, s(), two, s(), three).double()
    return model, [Layer(one, s()), Layer(two, s()), Layer(three, None)]


def convolutions(s: Callable[[], nn.Module]) -> tuple[nn.Module, list[Layer]]:
    one, two = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 4, 2, stride=2)
    three = nn.Linear(16, 3)
    model = nn.Sequential(one, s(), two, s(), nn.Flatten(), three).double()
    return model, [Layer(one, s()), Layer(two, s(), lambda y: y.flatten(1)), Layer(three, None)]


def compare(model: nn.Module, layers: list[Layer], x: Tensor, reduction: str = "mean", **settings) -> float:
    """The error of SIBP, its conjugate gradients run to the end, against the transcription."""
    y = torch.randint(3, (len(x),))
    plain = {"eta": 0.3, **settings}
    descent_steps = plain.pop("descent_steps", 0)
    with SIBP(cg_steps=60, descent_steps=descent_steps, reduction=reduction, **plain).attach(model):
        F.cross_entropy(model(x), y, reduction=reduction).backward()
    expected = transcription(layers, x, summed_gradient(y), **plain, descents=descent_steps)
    return error(steps_of_rule(model, [layer.module for layer in layers]), expected)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("n", [1, 4, 20], ids=["one sample", "rows", "columns"])
def test_three_linear_layers(name: str, n: int) -> None:
    assert compare(*three_layers(ACTIVATIONS[name]), torch.randn(n, 7).double()) < 1e-10


@pytest.mark.parametrize("name", ["relu", "tanh"])
def test_convolutions(name: str) -> None:
    assert compare(*convolutions(ACTIVATIONS[name]), torch.randn(3, 2, 4, 4).double()) < 1e-10


@pytest.mark.parametrize("name", ["relu", "tanh"])
@pytest.mark.parametrize("network", [three_layers, convolutions])
def test_settings(network: Callable[..., tuple[nn.Module, list[Layer]]], name: str) -> None:
    x = torch.randn(4, 2, 4, 4).double() if network is convolutions else torch.randn(4, 7).double()
    for settings in ({"lam": 0.2}, {"lam": 3.0, "lam_bias": 0.1}, {"updated_weights": False}, {"reduction": "sum"}):
        assert compare(*network(ACTIVATIONS[name]), x, **settings) < 1e-10, settings


@pytest.mark.parametrize("n", [4, 20])
def test_further_newton_steps(n: int) -> None:
    x = torch.randn(n, 7).double()
    assert compare(*three_layers(nn.Tanh), x, newton_steps=3) < 1e-10
    assert compare(*convolutions(nn.Tanh), torch.randn(n, 2, 4, 4).double(), newton_steps=2) < 1e-10


@pytest.mark.parametrize("n", [4, 20])
@pytest.mark.parametrize("eta", [0.3, 3.0])
@pytest.mark.parametrize("descent_steps", [1, 3])
def test_descent_steps_where_the_activation_has_kinks(n: int, eta: float, descent_steps: int) -> None:
    settings = {"eta": eta, "lam": 0.7, "lam_bias": 0.2, "descent_steps": descent_steps}
    for s in (nn.ReLU, nn.LeakyReLU, nn.Hardtanh):
        assert compare(*three_layers(s), torch.randn(n, 7).double(), **settings) < 1e-8, s
        assert compare(*convolutions(s), torch.randn(n, 2, 4, 4).double(), **settings) < 1e-8, s


def test_a_smooth_activation_needs_no_correction() -> None:
    model, layers = three_layers(nn.Tanh)
    x, found = torch.randn(4, 7).double(), []
    for descent_steps in (0, 3):
        model.zero_grad()
        with SIBP(descent_steps=descent_steps).attach(model):
            model(x).square().sum().backward()
        found.append(steps_of_rule(model, [layer.module for layer in layers]))
    assert error(*found) == 0


def test_without_biases() -> None:
    assert compare(*three_layers(nn.Tanh, bias=False), torch.randn(4, 7).double()) < 1e-10


def test_the_loss_may_be_a_mean_or_a_sum() -> None:
    model, layers = three_layers(nn.ReLU)
    x, y = torch.randn(9, 7).double(), torch.randint(3, (9,))
    found = []
    for reduction in ("mean", "sum"):
        model.zero_grad()
        with SIBP(reduction=reduction).attach(model):
            F.cross_entropy(model(x), y, reduction=reduction).backward()
        found.append(steps_of_rule(model, [layer.module for layer in layers]))
    assert error(*found) < 1e-12


def test_sgd_with_rate_1_is_the_algorithm() -> None:
    model, layers = three_layers(nn.Tanh)
    x, y = torch.randn(4, 7).double(), torch.randint(3, (4,))
    before = [layer.module.weight.detach().clone() for layer in layers]
    expected = transcription(layers, x, summed_gradient(y), 0.3)
    with SIBP(eta=0.3, cg_steps=60).attach(model):
        F.cross_entropy(model(x), y).backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    for layer, weight, (step, _) in zip(layers, before, expected, strict=True):
        torch.testing.assert_close(layer.module.weight.detach(), weight + step, rtol=0, atol=1e-10)


def test_a_frozen_bias_stays_and_its_layer_solves_without_it() -> None:
    (model, layers), x = three_layers(nn.Tanh), torch.randn(4, 7).double()
    y = torch.randint(3, (4,))
    hidden, head = layers[1].module, layers[2].module
    hidden.bias.requires_grad_(False)
    with SIBP(cg_steps=60).attach(model):
        F.cross_entropy(model(x), y).backward()
    a = torch.tanh(layers[0].module(x)).detach()
    g = (summed_gradient(y)(model(x)) @ (head.weight - head.weight.grad)).detach()
    expected = step_of_layer(a, hidden(a).detach(), g, torch.tanh, 0.1, 1.0)
    torch.testing.assert_close(-hidden.weight.grad, expected, rtol=0, atol=1e-10)
    assert hidden.bias.grad is None


@pytest.mark.parametrize("n", [3, 20])
def test_a_frozen_weight_leaves_a_problem_in_the_bias(n: int) -> None:
    (model, layers), x = three_layers(nn.Tanh), torch.randn(n, 7).double()
    y = torch.randint(3, (n,))
    hidden, head = layers[1].module, layers[2].module
    hidden.weight.requires_grad_(False)
    with SIBP(cg_steps=60, lam=2.0, lam_bias=0.5).attach(model):
        F.cross_entropy(model(x), y).backward()
    z = hidden(torch.tanh(layers[0].module(x))).detach()
    g = (summed_gradient(y)(model(x)) @ (head.weight - head.weight.grad)).detach()
    expected = step_of_layer(torch.ones(n, 1).double(), z, g, torch.tanh, 0.1, 0.5)
    torch.testing.assert_close(-hidden.bias.grad, expected[:, 0], rtol=0, atol=1e-10)
