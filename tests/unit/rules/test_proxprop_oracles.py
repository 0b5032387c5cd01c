"""What theory says of the proximal direction D = (A^T A + I/tau)^{-1} G, G = A^T g (Frerix et al., Section 3)."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpass.rules import ProxProp, parse_rule
from support.proximal import directions, flat, jacobian, relative

LAYERS = {
    "wide linear": (lambda: nn.Linear(9, 3), (4, 9)),
    "tall linear": (lambda: nn.Linear(4, 3), (12, 4)),
    "convolution": (lambda: nn.Conv2d(4, 2, 3, padding=1, groups=2), (2, 4, 5, 4)),
    "few patches": (lambda: nn.Conv2d(3, 2, 3), (1, 3, 4, 4)),
    "transposed": (lambda: nn.ConvTranspose1d(2, 3, 3, stride=2), (3, 2, 4)),
    "layer norm": (lambda: nn.LayerNorm(5), (4, 5)),
}


@pytest.fixture(params=LAYERS)
def layer(request) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A layer, its input, dL/dz, and its whole A as a matrix."""
    torch.manual_seed(0)
    make, shape = LAYERS[request.param]
    model, x = make().double(), torch.randn(*shape, dtype=torch.float64)
    a = jacobian(model, x, ("weight", "bias"))
    return model, x, torch.randn(model(x).shape, dtype=torch.float64), a


def direction(model: nn.Module, x: Tensor, g: Tensor, tau: float, **settings) -> Tensor:
    return flat(directions(model, x, g, ProxProp(tau=tau, norms=True, **settings)), ("weight", "bias"))


TAUS = (1e-4, 1e-2, 1.0, 1e2, 1e4)


@pytest.mark.parametrize("tau", TAUS)
def test_it_descends_within_both_bounds(layer, tau):
    model, x, g, a = layer
    gradient, largest = a.T @ g.flatten(), torch.linalg.matrix_norm(a, 2) ** 2
    inner = direction(model, x, g, tau) @ gradient
    assert gradient @ gradient / (largest + 1 / tau) <= inner * (1 + 1e-12)
    assert inner <= tau * gradient @ gradient * (1 + 1e-12)


@pytest.mark.parametrize("tau", TAUS)
def test_it_is_no_longer_than_the_gradient_step_and_moves_z_by_no_more_than_g(layer, tau):
    model, x, g, a = layer
    d = direction(model, x, g, tau)
    assert d.norm() <= tau * (a.T @ g.flatten()).norm() * (1 + 1e-12)
    assert (a @ d).norm() <= g.norm() * (1 + 1e-12)


@pytest.mark.parametrize("tau", TAUS)
def test_the_proximal_energy_falls_by_half_the_inner_product(layer, tau):
    model, x, g, a = layer
    d = direction(model, x, g, tau)
    before = g.square().sum() / 2
    after = (g.flatten() - a @ d).square().sum() / 2 + d.square().sum() / (2 * tau)
    torch.testing.assert_close(before - after, d @ (a.T @ g.flatten()) / 2, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("tau", TAUS)
def test_relative_damping_is_over_the_mean_eigenvalue_of_the_smaller_gram_matrix(layer, tau):
    model, x, g, a = layer
    added = a.square().sum() / min(a.shape) / tau
    expected = added * torch.linalg.solve(a.T @ a + added * torch.eye(a.shape[1]).double(), a.T @ g.flatten())
    assert relative(direction(model, x, g, tau, damping="relative"), expected) < 1e-10


def test_a_small_tau_gives_the_gradient(layer):
    model, x, g, a = layer
    gradient, largest = a.T @ g.flatten(), torch.linalg.matrix_norm(a, 2) ** 2
    for tau in (1e-3, 1e-6, 1e-9):
        error = (direction(model, x, g, tau) / tau - gradient).norm()
        assert error <= tau * largest * gradient.norm() + 1e-13 * gradient.norm()


@pytest.mark.parametrize("name", ["wide linear", "tall linear", "few patches"])
def test_a_large_tau_gives_the_least_squares_solution_of_smallest_norm(name):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    model, x = make().double(), torch.randn(*shape, dtype=torch.float64)
    a = jacobian(model, x, ("weight", "bias"))
    g = torch.randn(model(x).shape, dtype=torch.float64)
    assert relative(direction(model, x, g, 1e9), torch.linalg.pinv(a) @ g.flatten()) < 1e-7


def test_the_sum_depends_on_the_batch_size_and_the_mean_does_not():
    torch.manual_seed(0)
    model, x = nn.Linear(6, 4).double(), torch.randn(5, 6, dtype=torch.float64)
    y = torch.randint(0, 4, (5,))

    def step(copies: int, **settings) -> Tensor:
        model.zero_grad()
        with ProxProp(**settings).attach(model):
            F.cross_entropy(model(x.repeat(copies, 1)), y.repeat(copies)).backward()
        return model.weight.grad

    once = step(1, tau=0.5)
    assert relative(step(2, tau=0.25), once / 2) < 1e-12
    assert relative(step(2, tau=0.5), once) > 0.05
    assert relative(step(3, tau=0.5, damping="mean"), step(1, tau=0.5, damping="mean")) < 1e-12


@pytest.mark.parametrize("name", ["wide linear", "tall linear", "convolution"])
def test_conjugate_gradients_converge_to_the_exact_step(name):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    model, x = make().double(), torch.randn(*shape, dtype=torch.float64)
    g = torch.randn(model(x).shape, dtype=torch.float64)
    exact = direction(model, x, g, 1.0)
    errors = [relative(direction(model, x, g, 1.0, solver="cg", cg_steps=n), exact) for n in (1, 3, 10, 100)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[3] < 1e-10


def test_toeplitz_descends_and_is_shorter_where_it_is_cheaper_and_else_exact():
    torch.manual_seed(0)
    for make, shape, cheaper in (
        (lambda: nn.Linear(4, 3), (12, 4), False),
        (lambda: nn.Conv2d(4, 2, 3), (2, 4, 5, 4), False),
        (lambda: nn.Conv2d(3, 2, 5, padding=2), (8, 3, 12, 12), True),
        (lambda: nn.ConvTranspose2d(3, 2, 5), (8, 3, 12, 12), True),
    ):
        model, x = make().double(), torch.randn(*shape, dtype=torch.float64)
        g = torch.randn(model(x).shape, dtype=torch.float64)
        gradient = flat(directions(model, x, g, parse_rule("bp")), ("weight", "bias"))
        exact, larger = direction(model, x, g, 1.0), direction(model, x, g, 1.0, solver="toeplitz")
        assert torch.equal(exact, larger) is not cheaper
        assert 0 < larger @ gradient <= exact @ gradient * (1 + 1e-12)
