"""Rules of one's own for activations: the formula of `backward`, at every site, however the activation is called."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpass import BackpassError, LinBP, NoSiteError, UnknownNameError
from backpass.rules import ActivationRule, activations


@dataclass(frozen=True, kw_only=True)
class Guided(ActivationRule):
    name = "guided"
    functions = activations("relu")

    def backward(self, grad: Tensor, x: Tensor) -> Tensor:
        return grad.clamp(min=0) * (x > 0)


@dataclass(frozen=True, kw_only=True)
class Doubled(ActivationRule):
    """Twice the derivative of the hyperbolic tangent, whatever the activation."""

    name = "doubled"

    def backward(self, grad: Tensor, x: Tensor) -> Tensor:
        return 2 * grad / torch.cosh(x) ** 2


class Method(nn.Module):
    def forward(self, x):
        return x.relu()


class InPlace(nn.Module):
    def forward(self, x):
        h = x * 1.0
        h.relu_()
        return h


class Functional(nn.Module):
    def forward(self, x):
        return F.relu(x * 1.0, inplace=True)


FORMS = [nn.ReLU(), Method(), InPlace(), Functional()]
GRAD = torch.tensor([[1.0, -1.0, 2.0, -2.0]], dtype=torch.float64)
X = torch.tensor([[3.0, 3.0, -3.0, -3.0]], dtype=torch.float64)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: type(form).__name__)
def test_the_formula_holds_however_the_activation_is_called(form):
    x = X.clone().requires_grad_()
    with Guided().attach(form):
        y = form(x)
    assert torch.equal(y, X.relu())
    assert torch.autograd.grad(y, x, GRAD)[0].tolist() == [[1.0, 0.0, 0.0, 0.0]]


def test_activations_without_names_are_all_of_them():
    assert activations() == dict(LinBP.functions)


def test_it_acts_on_the_named_activations_alone():
    model = nn.Sequential(nn.ReLU(), nn.Tanh())
    with Guided().attach(model) as attached:
        model(X)
    assert [site.function for site in attached.sites] == ["relu"]
    model = nn.Tanh()
    with Guided().attach(model), pytest.raises(NoSiteError):
        model(X)
    with pytest.raises(UnknownNameError, match="Did you mean 'relu'"):
        activations("rely")


@pytest.mark.parametrize("start", [0, 1, -1, 0.5])
def test_it_is_the_dense_chain_rule_with_the_derivative_replaced(start):
    torch.manual_seed(0)
    a, b, c = (torch.randn(5, 5, dtype=torch.float64) for _ in range(3))
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)

    class Net(nn.Module):
        def forward(self, x):
            return c @ torch.sigmoid(b @ torch.relu(a @ x))

    z1 = a @ x.detach()
    z2 = b @ z1.relu()
    plain = [(z1 > 0).double(), torch.sigmoid(z2) * (1 - torch.sigmoid(z2))]
    own = [2 / torch.cosh(z) ** 2 for z in (z1, z2)]
    first = {0: 0, 1: 1, -1: 1, 0.5: 1}[start]
    d1, d2 = (own[k] if k >= first else plain[k] for k in (0, 1))
    model = Net()
    with Doubled(start=start).attach(model):
        found = torch.autograd.functional.jacobian(model, x)
    torch.testing.assert_close(found, c @ torch.diag(d2) @ b @ torch.diag(d1) @ a, rtol=1e-12, atol=1e-12)


def test_a_learned_parameter_keeps_its_own_gradient():
    model, x = nn.PReLU(num_parameters=4, dtype=torch.float64), X.clone().requires_grad_()
    model(x).backward(GRAD)
    plain = model.weight.grad.clone()
    model.zero_grad()
    x.grad = None
    with Doubled().attach(model):
        y = model(x)
    assert torch.equal(y, F.prelu(X, model.weight))
    y.backward(GRAD)
    assert torch.equal(model.weight.grad, plain)
    torch.testing.assert_close(x.grad, 2 * GRAD / torch.cosh(X) ** 2)


def test_it_goes_through_transforms_and_compilation():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    x = torch.randn(7, 4, dtype=torch.float64)

    def gradient(row):
        return torch.func.grad(lambda r: model(r).sum())(row)

    with Guided().attach(model):
        z = x.clone().requires_grad_()
        eager = torch.autograd.grad(model(z).sum(), z)[0]
        torch.testing.assert_close(torch.func.vmap(gradient)(x), eager, rtol=1e-12, atol=1e-12)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(torch.autograd.grad(compiled(z).sum(), z)[0], eager, rtol=1e-12, atol=1e-12)


def test_the_slope_one_is_linear_backpropagation():
    @dataclass(frozen=True, kw_only=True)
    class Straight(ActivationRule):
        name = "straight"

        def backward(self, grad, x):
            return grad

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 6), nn.Hardswish(inplace=True), nn.Linear(6, 3))
    x, jacobians = torch.randn(4), []
    for rule in (Straight(), LinBP()):
        with rule.attach(model):
            jacobians.append(torch.autograd.functional.jacobian(model, x))
    assert torch.equal(*jacobians)


def test_without_a_backward_it_is_refused():
    @dataclass(frozen=True, kw_only=True)
    class Empty(ActivationRule):
        name = "empty"

    with pytest.raises(BackpassError, match=r"define backward\(grad, x\)"):
        Empty().attach(nn.ReLU())


def test_without_gradients_the_activation_is_computed_as_it_is():
    model = nn.ReLU()
    with Guided().attach(model), torch.no_grad():
        assert torch.equal(model(X), X.relu())
