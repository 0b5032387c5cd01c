"""Matrix products with a parameter are layers: ProxProp and SIBP equal the dense solve, the forward is unchanged."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpass import SIBP, BackpassError, NoSiteError, ProxProp, parse_rule
from support.proximal import directions, flat, jacobian, proximal_direction, relative


class Product(nn.Module):
    """A function of an input, a weight and perhaps a bias."""

    def __init__(self, function, weight: tuple[int, ...], bias: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(weight, dtype=torch.float64))
        self.bias = None if bias is None else nn.Parameter(torch.randn(bias, dtype=torch.float64))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight, self.bias)


PRODUCTS = {
    "x @ w": (lambda x, w, b: x @ w, (5, 3), None, (7, 5)),
    "x @ w, tokens": (lambda x, w, b: x @ w, (5, 3), None, (2, 2, 2, 5)),
    "x @ w, square": (lambda x, w, b: x @ w, (4, 4), None, (3, 4)),
    "matmul": (lambda x, w, b: torch.matmul(x, w), (5, 3), None, (2, 4, 5)),
    "x.matmul": (lambda x, w, b: x.matmul(w), (5, 3), None, (4, 5)),
    "mm": (lambda x, w, b: torch.mm(x, w), (5, 3), None, (4, 5)),
    "w on the left": (lambda x, w, b: w @ x, (3, 5), None, (5, 6)),
    "w on the left of many": (lambda x, w, b: w @ x, (3, 5), None, (2, 5, 6)),
    "vector weight": (lambda x, w, b: x @ w, (5,), None, (4, 5)),
    "vector input": (lambda x, w, b: x @ w, (5, 3), None, (5,)),
    "x @ w.t()": (lambda x, w, b: x @ w.t(), (3, 5), None, (4, 5)),
    "linear with w.t()": (lambda x, w, b: F.linear(x, w.t(), b), (5, 3), (3,), (4, 5)),
    "linear with a part of w": (lambda x, w, b: F.linear(x, w[1:3], b[1:3]), (4, 5), (4,), (6, 5)),
    "x @ a part of w": (lambda x, w, b: x @ w[:, 1:3], (5, 4), None, (7, 5)),
    "bmm of a view": (lambda x, w, b: torch.bmm(x, w.mT), (2, 3, 5), None, (2, 6, 5)),
    "bmm": (lambda x, w, b: torch.bmm(x, w), (2, 5, 3), None, (2, 6, 5)),
    "addmm": (lambda x, w, b: torch.addmm(b, x, w), (5, 3), (3,), (7, 5)),
    "Hugging Face's Conv1D": (
        lambda x, w, b: torch.addmm(b, x.view(-1, x.size(-1)), w).view(2, 3, 4),
        (5, 4),
        (4,),
        (2, 3, 5),
    ),
    "einsum heads": (lambda x, w, b: torch.einsum("bnd,hdo->bhno", x, w), (2, 5, 3), None, (2, 4, 5)),
    "einsum experts": (lambda x, w, b: torch.einsum("end,edo->eno", x, w), (2, 5, 3), None, (2, 6, 5)),
    "einsum, implicit output": (lambda x, w, b: torch.einsum("bd,od", x, w), (3, 5), None, (4, 5)),
    "einsum, ellipsis": (lambda x, w, b: torch.einsum("...d,od->...o", x, w), (3, 5), None, (2, 3, 5)),
    "einsum, two contracted": (lambda x, w, b: torch.einsum("bhd,hdo->bo", x, w), (2, 3, 4), None, (5, 2, 3)),
    "einsum, weight first": (lambda x, w, b: torch.einsum("od,bd->bo", w, x), (3, 5), None, (4, 5)),
}


@pytest.fixture(params=PRODUCTS)
def case(request) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    function, weight, bias, shape = PRODUCTS[request.param]
    return Product(function, weight, bias), torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("tau", [0.3, 1e3])
def test_the_direction_is_the_dense_solve(case, tau):
    model, x = case
    names = [name for name, _ in model.named_parameters()]
    g = torch.randn(model(x).shape, dtype=torch.float64)
    found = flat(directions(model, x, g, ProxProp(tau=tau)), names)
    assert relative(found, proximal_direction(jacobian(model, x, names), g, tau)) < 1e-10


def test_forward_and_input_gradient_are_the_plain_ones_to_the_bit(case):
    model, x = case
    model, x = model.float(), x.float()
    found = []
    for rule in ("bp", "proxprop"):
        inputs = x.clone().requires_grad_()
        with parse_rule(rule).attach(model):
            z = model(inputs)
            z.square().sum().backward()
        found.append((z.detach(), inputs.grad))
        model.zero_grad()
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5, atol=1e-6)


def test_sibp_takes_the_least_squares_step(case):
    model, x = case
    names = [name for name, _ in model.named_parameters()]
    g = torch.randn(model(x).shape, dtype=torch.float64)
    rule = SIBP(eta=0.3, lam=0.7, reduction="sum")
    found = flat(directions(model, x, g, rule), names)
    assert relative(found, 0.3 * proximal_direction(jacobian(model, x, names), g, 1 / 0.7)) < 1e-10


def test_at_the_step_several_uses_of_products_are_one_least_squares_problem():
    torch.manual_seed(0)
    function, weight, bias, shape = PRODUCTS["addmm"]
    once = Product(function, weight, bias)
    twice, x = copy.deepcopy(once), torch.randn(shape, dtype=torch.float64)
    with ProxProp(tau=0.5).attach(once):
        once(x).square().sum().backward()
    optimizer = torch.optim.SGD(twice.parameters(), 0.0)
    with ProxProp(tau=0.5, solve="step").attach(twice, optimizer):
        for part in x.split(2):
            twice(part).square().sum().backward()
        optimizer.step()
    assert relative(twice.weight.grad, once.weight.grad) < 1e-10
    assert relative(twice.bias.grad, once.bias.grad) < 1e-10


def test_products_of_activations_are_no_sites():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(4, 12), nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            return (torch.softmax(q @ k.mT, -1) @ v) @ self.out

    model = Attention()
    with ProxProp().attach(model) as attached:
        model(torch.randn(2, 3, 4)).sum().backward()
    assert [site.function for site in attached.sites] == ["linear", "matmul"]


def test_a_model_of_products_of_activations_has_no_site():
    class Similarity(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ x.mT

    model = Similarity()
    with ProxProp().attach(model), pytest.raises(NoSiteError):
        model(torch.randn(2, 3))


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda x, w: torch.addmm(x, x, w), "bias of one row"),
        (lambda x, w: torch.addmm(x[0], x, w, alpha=2), "alpha"),
        (lambda x, w: torch.einsum("bd,de->b", x, w), "einsum"),
        (lambda x, w: torch.einsum("bd,dd->b", x, w), "einsum"),
    ],
)
def test_products_without_a_proximal_step_are_refused_by_name(function, says):
    model = Product(lambda x, w, b: function(x, w), (4, 4))
    with ProxProp().attach(model), pytest.raises(BackpassError, match=says):
        model(torch.randn(4, 4, dtype=torch.float64))
