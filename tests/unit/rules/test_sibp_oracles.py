"""Closed forms and bounds that a semi-implicit step obeys, in float64, for linear and convolutional layers."""

from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from backpass import SIBP
from support.semi_implicit import by_unit, derivative, rows


class Case(NamedTuple):
    """A layer with an activation, its input, and g, the gradient of a summed loss at the activation."""

    module: nn.Module
    s: nn.Module
    x: Tensor
    g: Tensor

    def gradient(self) -> Tensor:
        """Plain backpropagation, (units, columns + 1)."""
        model = nn.Sequential(self.module, self.s)
        model.zero_grad()
        (model(self.x) * self.g).sum().backward()
        return self.collect()

    def step(self, **settings) -> Tensor:
        """d of SIBP, likewise; conjugate gradients run to the end."""
        model = nn.Sequential(self.module, self.s)
        model.zero_grad()
        with SIBP(reduction="sum", **{"cg_steps": 80, **settings}).attach(model):
            (model(self.x) * self.g).sum().backward()
        return -self.collect()

    def collect(self) -> Tensor:
        return torch.cat([self.module.weight.grad.flatten(1), self.module.bias.grad[:, None]], 1)

    @property
    def z(self) -> Tensor:
        return by_unit(self.module, self.module(self.x).detach())


def make(kind: str, s: nn.Module, n: int = 5) -> Case:
    torch.manual_seed(0)
    module = {
        "linear": lambda: nn.Linear(6, 4),
        "conv": lambda: nn.Conv2d(2, 4, 3, padding=1),
        "conv of one row": lambda: nn.Conv2d(2, 4, 3),
    }[kind]().double()
    size = {"linear": (6,), "conv": (2, 4, 4), "conv of one row": (2, 3, 3)}[kind]
    x = torch.randn(n, *size).double()
    return Case(module, s, x, torch.randn_like(module(x)).detach())


KINDS = pytest.mark.parametrize("kind", ["linear", "conv", "conv of one row"])
CURVED = pytest.mark.parametrize("s", [nn.ReLU(), nn.Tanh(), nn.Identity()], ids=["relu", "tanh", "identity"])


@KINDS
@CURVED
def test_1_a_large_penalty_gives_the_gradient(kind: str, s: nn.Module) -> None:
    case = make(kind, s)
    gradient = case.gradient()
    errors = [
        float((case.step(eta=0.1, lam=lam) * (-lam / 0.1) - gradient).norm() / gradient.norm()) for lam in (1e4, 1e6)
    ]
    assert errors[0] < 5e-2
    assert errors[1] == pytest.approx(errors[0] / 100, rel=0.05)


@KINDS
@CURVED
def test_2_a_short_step_is_the_damped_newton_step(kind: str, s: nn.Module) -> None:
    case = make(kind, s)
    A = rows(case.module, case.x, 2.0 / 0.5)
    gradient = case.gradient()
    gradient[:, -1] *= 2.0  # in the column sqrt(lam / lam_bias)
    D = derivative(s, case.z)
    expected = torch.stack(
        [
            torch.linalg.solve(A.T @ (D[:, j, None] ** 2 * A) + 2 * torch.eye(A.shape[1]).double(), -gradient[j])
            for j in range(4)
        ]
    )
    expected[:, -1] *= 2.0
    for steps in (1, 3):
        eta = 1e-6
        step = case.step(eta=eta, lam=2.0, lam_bias=0.5, newton_steps=steps) / eta
        assert (step - expected).norm() / expected.norm() < (1e-9 if steps == 1 else 1e-4)


@KINDS
@CURVED
@pytest.mark.parametrize("cg_steps", [1, 2, 5, 80])
def test_4_the_step_descends_and_its_length_is_bounded(kind: str, s: nn.Module, cg_steps: int) -> None:
    case = make(kind, s)
    gradient, step = case.gradient(), case.step(eta=0.3, lam=2.0, cg_steps=cg_steps, updated_weights=False)
    s_max = torch.linalg.svdvals(rows(case.module, case.x, 1.0)).max()
    length, plain = step.norm(), gradient.norm()
    assert 0.3 / (2.0 + s_max**2) * plain <= length * (1 + 1e-12)
    assert length <= 0.3 / 2.0 * plain * (1 + 1e-12)
    assert (step * gradient).sum() < 0


@pytest.mark.parametrize("kind", ["linear", "conv of one row"])
@CURVED
def test_5_one_row_has_a_closed_form(kind: str, s: nn.Module) -> None:
    case = make(kind, s, n=1)
    a, lam, lam_bias = rows(case.module, case.x, 1.0)[0, :-1], 0.7, 0.2
    D = derivative(s, case.z)[0]
    of_z = (D * case.g.flatten())[:, None]
    weight = -0.3 * of_z * a / (lam + D[:, None] ** 2 * (a @ a + lam / lam_bias))
    step = case.step(eta=0.3, lam=lam, lam_bias=lam_bias)
    torch.testing.assert_close(step[:, :-1], weight, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", ["linear", "conv", "conv of one row"])
def test_6_a_linear_layer_moves_to_its_targets_by_the_damped_projection(kind: str) -> None:
    case = make(kind, nn.Identity())
    A, lam = rows(case.module, case.x, 1.0), 0.3
    target = case.z - 0.2 * by_unit(case.module, case.g)
    after = case.z + A @ case.step(eta=0.2, lam=lam).T
    expected = lam * torch.linalg.solve(A @ A.T + lam * torch.eye(len(A)).double(), case.z - target)
    torch.testing.assert_close(after - target, expected, rtol=1e-10, atol=1e-13)


@KINDS
def test_7_every_iteration_lowers_the_quadratic_model(kind: str) -> None:
    case = make(kind, nn.Tanh())
    A, D = rows(case.module, case.x, 1.0), derivative(torch.tanh, case.z)
    errors = 0.3 * by_unit(case.module, case.g)

    def model(step: Tensor) -> Tensor:
        return (D * (A @ step.T) + errors).square().sum() + 0.5 * step.square().sum()

    values = [model(case.step(eta=0.3, lam=0.5, cg_steps=k)) for k in range(1, 7)]
    assert values[0] < model(torch.zeros(4, A.shape[1]).double())
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(values))


KINDS_OF_LAYERS = {
    "linear on tokens": (lambda: nn.Linear(6, 4), (5, 6)),
    "conv1d": (lambda: nn.Conv1d(2, 4, 3, padding="same", bias=False), (2, 7)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, stride=2), (4, 6, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, output_padding=1), (4, 3, 3)),
    "conv3d": (lambda: nn.Conv3d(1, 2, 2, dilation=2), (1, 4, 4, 3)),
}


@pytest.mark.parametrize("name", KINDS_OF_LAYERS)
@pytest.mark.parametrize("s", [nn.Tanh(), nn.Identity()], ids=["tanh", "identity"])
@pytest.mark.parametrize("newton_steps", [1, 2])
def test_every_kind_of_layer_gets_the_gradient_for_a_large_penalty(name: str, s: nn.Module, newton_steps: int) -> None:
    torch.manual_seed(0)
    build, size = KINDS_OF_LAYERS[name]
    model, x = nn.Sequential(build(), s).double(), torch.randn(3, *size).double().requires_grad_()
    found = []
    for rule in (None, SIBP(eta=0.5, lam=1e7, reduction="sum", newton_steps=newton_steps)):
        model.zero_grad()
        x.grad = None
        attached = rule.attach(model) if rule else None
        model(x).square().sum().backward()
        found.append([x.grad, *(p.grad * (1e7 / 0.5 if rule else 1) for p in model.parameters())])
        if attached:
            attached.remove()
    for plain, ours in zip(*found, strict=True):
        assert (plain - ours).norm() < 1e-4 * plain.norm()
