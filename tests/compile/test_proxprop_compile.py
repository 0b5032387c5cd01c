"""ProxProp under torch.compile(fullgraph=True): the same directions as eager, and the same errors."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad

from backpass import BackpassError
from backpass.rules import ProxProp
from support.proximal import relative


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Conv2d(2, 4, 3, padding="same"), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
    more = (nn.ConvTranspose2d(4, 3, 3, stride=2), nn.GroupNorm(3, 3), nn.Flatten(), nn.Linear(507, 8), nn.LayerNorm(8))
    return nn.Sequential(*layers, *more, nn.Linear(8, 5)).double()


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(6, 2, 6, 6, dtype=torch.float64), torch.randint(0, 5, (6,))


def step(model: nn.Module, call, rule: ProxProp, passes: int = 1) -> dict[str, torch.Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    x, y = batch()
    model.zero_grad()
    with rule.attach(model, optimizer) if rule.solve == "step" else rule.attach(model):
        for a, b in zip(x.chunk(passes), y.chunk(passes), strict=True):
            (F.cross_entropy(call(a), b) / passes).backward()
        optimizer.step()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("settings", "passes"),
    [({}, 1), ({"solver": "cg"}, 1), ({"solve": "step"}, 2)],
    ids=str,
)
def test_the_same_directions_as_eager(settings, passes):
    rule = ProxProp(tau=0.5, **settings)
    eager, compiled = network().eval(), network().eval()
    expected = step(eager, eager, rule, passes)
    found = step(compiled, torch.compile(compiled, backend="aot_eager", fullgraph=True), rule, passes)
    for name, value in expected.items():
        assert relative(found[name], value) < 1e-10, name


def test_the_same_in_training_mode_with_its_running_statistics():
    eager, compiled = network(), network()
    expected = step(eager, eager, ProxProp(tau=0.5))
    found = step(compiled, torch.compile(compiled, backend="aot_eager", fullgraph=True), ProxProp(tau=0.5))
    for name, value in expected.items():
        assert relative(found[name], value) < 1e-10, name
    torch.testing.assert_close(compiled[1].running_var, eager[1].running_var, rtol=1e-12, atol=0)


def test_a_second_backward_pass_names_the_step():
    model, (x, _) = network(), batch()
    call = torch.compile(model, backend="aot_eager", fullgraph=True)
    with ProxProp(tau=0.5).attach(model):
        call(x).sum().backward()
        with pytest.raises(BackpassError, match='solve="step"'):
            call(x).sum().backward()


def test_a_compiled_functional_gradient_is_refused_and_works_without_fullgraph():
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    x = torch.randn(5, 4, dtype=torch.float64)

    def loss(x):
        return model(x).square().sum()

    with ProxProp(tau=0.5).attach(model):
        expected = grad(loss)(x)
        with pytest.raises(Exception, match="torch.func.grad"):
            torch.compile(grad(loss), backend="aot_eager", fullgraph=True)(x)
        torch.testing.assert_close(torch.compile(grad(loss), backend="aot_eager")(x), expected)
