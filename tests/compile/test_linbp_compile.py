"""LinBP under torch.compile(fullgraph=True): the same gradients as eager, whenever and wherever it is attached."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from backpass import BackpassError, LinBP
from backpass.rules.activations import ACTIVATIONS
from support.networks import CASES, Nested, gradients

# The ways to call an activation are compiled in every run, the activations beyond ReLU in the longer one.
SLOW = {"gelu-tanh", "sigmoid", "leaky", "elu", "celu", "selu", "mish", "softplus", "hardsigmoid", "hardtanh"}
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CASES]
STARTS = {"front": 1, "end": -1, "half": 0.5, "all": None}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def assert_same(one, other):
    assert torch.equal(one[2], other[2])
    assert torch.allclose(one[0], other[0], rtol=0, atol=1e-12)
    assert all(torch.allclose(one[1][k], other[1][k], rtol=0, atol=1e-12) for k in one[1])


@pytest.mark.parametrize("name", NAMES)
def test_aot_eager_equals_eager(name):
    model, x = CASES[name].make()
    rule = LinBP(start=-1)
    with rule.attach(model):
        expected = gradients(model, model, x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with rule.attach(compiled) as attached:
        assert_same(gradients(compiled, model, x), expected)
    assert len(attached.sites) == 1


@pytest.mark.parametrize("name", ["functional", "residual", "nested-sequential"])
def test_inductor_equals_eager(name):
    model, x = CASES[name].make()
    with LinBP(start=1).attach(model):
        expected = gradients(model, model, x)
        compiled = torch.compile(model, fullgraph=True)
        got = gradients(compiled, model, x)
    assert torch.allclose(got[0], expected[0], rtol=1e-12, atol=1e-12)
    assert all(torch.allclose(got[1][k], expected[1][k], rtol=1e-12, atol=1e-12) for k in got[1])


@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
@pytest.mark.parametrize("to", ["wrapper", "inner"])
@pytest.mark.parametrize("name", ["reused-in-place", "nested-sequential"])
def test_a_model_compiled_and_called_before_takes_the_rule_and_loses_it_again(name, to, start):
    model, x = CASES[name].make()
    plain = gradients(model, model, x)
    with LinBP(start=start).attach(model):
        expected = gradients(model, model, x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same(gradients(compiled, model, x), plain)
    with LinBP(start=start).attach(compiled if to == "wrapper" else model):
        assert_same(gradients(compiled, model, x), expected)
    assert_same(gradients(compiled, model, x), plain)


def sequential():
    torch.manual_seed(0)
    layers = [nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)]
    return nn.Sequential(*layers).double(), torch.randn(3, 5, dtype=torch.float64)


@pytest.mark.parametrize("to", ["wrapper", "inner"])
def test_a_plain_sequential_takes_the_rule_after_it_was_compiled(to):
    # Its forward is PyTorch's own, so the hooks are traced into the graph instead of running around it.
    model, x = sequential()
    with LinBP(start=-1).attach(model):
        expected = gradients(model, model, x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    plain = gradients(compiled, model, x)
    with LinBP(start=-1).attach(compiled if to == "wrapper" else model) as attached:
        assert_same(gradients(compiled, model, x), expected)
        assert [site.index for site in attached.sites] == [1]
    assert_same(gradients(compiled, model, x), plain)


def test_a_part_of_a_compiled_function_takes_the_rule():
    model, x = Nested().double(), torch.randn(3, 5, dtype=torch.float64)

    def scaled(x):
        return model(2 * x)

    with LinBP(start=-2).attach(model):
        expected = gradients(scaled, model, x)
    compiled = torch.compile(scaled, backend="aot_eager", fullgraph=True)
    plain = gradients(compiled, model, x)
    with LinBP(start=-2).attach(model):
        assert_same(gradients(compiled, model, x), expected)
    assert_same(gradients(compiled, model, x), plain)


@pytest.mark.parametrize("make", [sequential, CASES["functional"].make, CASES["residual"].make])
def test_repeated_calls_and_repeated_attachment_compile_once(make):
    model, x = make()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    LinBP(start=-1).attach(model).remove()
    gradients(compiled, model, x)
    for _ in range(12):
        with LinBP(start=-1).attach(model):
            gradients(compiled, model, x)
            gradients(compiled, model, x)
        gradients(compiled, model, x)
    assert counter.frame_count == 2  # plain, and with the rule


def test_another_rule_is_not_served_by_the_compiled_code_of_the_first():
    model, x = sequential()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for start in (0, -1, 1, None):
        with LinBP(start=start).attach(model):
            assert_same(gradients(compiled, model, x), gradients(model, model, x))


@pytest.mark.parametrize("rule", [LinBP(start=-1), LinBP(), LinBP(slope=0.5)], ids=str)
def test_dynamic_batch_sizes(rule):
    model, _ = CASES["conv-bn-relu"].make()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    with rule.attach(model):
        for size in (2, 3, 7):
            x = torch.randn(size, 2, 4, 4, dtype=torch.float64)
            assert_same(gradients(compiled, model, x), gradients(model, model, x))


def test_a_rule_without_a_site_is_an_error_there_too():
    for model in (nn.Sequential(nn.Linear(5, 5)), CASES["functional"].make()[0].layers[0]):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        with LinBP().attach(compiled), pytest.raises(Exception, match="finds no site"):
            compiled(torch.randn(3, 5, dtype=next(model.parameters()).dtype))


def test_renormalized_residuals_refuse_compilation():
    from support.resnets import TinyResNet

    model = TinyResNet().eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with LinBP(residual="renormalized").attach(compiled), pytest.raises(Exception, match="torch.compile"):
        compiled(torch.randn(2, 3, 8, 8))


def test_a_model_compiled_in_place_takes_the_rule():
    model, x = CASES["residual"].make()
    with LinBP(start=-1).attach(model):
        expected = gradients(model, model, x)
    model.compile(backend="aot_eager")
    plain = gradients(model, model, x)
    with LinBP(start=-1).attach(model):
        assert_same(gradients(model, model, x), expected)
    assert_same(gradients(model, model, x), plain)


class EveryName(nn.Module):
    """Calls every activation once by each of its names in torch."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.calls = [
            (function, (0.1, 0.1) if "threshold" in function.__name__ else ())
            for function in ACTIVATIONS
            if "prelu" not in function.__name__
        ]

    def forward(self, x):
        return torch.stack([function(x * self.scale, *arguments) for function, arguments in self.calls])


def test_every_name_of_every_activation_is_seen_in_compiled_code():
    model, x = EveryName(), torch.randn(4, 3)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with LinBP().attach(model) as attached:
        got = gradients(compiled, model, x)
        assert len(attached.sites) == len(model.calls)
    assert torch.allclose(got[0], got[2].sum(0))


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.act = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)]), nn.SiLU()

    def forward(self, x):
        return self.act(self.layers[1](torch.relu(self.layers[0](x))))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("how", ["wrapped", "in place"])
@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
def test_a_compiled_part_of_an_eager_model_takes_the_rule(start, how, backend):
    torch.manual_seed(0)
    part = Part()
    model = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), part, nn.Linear(5, 5), nn.Tanh()).double()
    x = torch.randn(3, 5, dtype=torch.float64)
    with LinBP(start=start).attach(model) as attached:
        expected = gradients(model, model, x)
        sites = [site.index for site in attached.sites]
    if how == "wrapped":
        model[2] = torch.compile(part, backend=backend, fullgraph=True)
    else:
        part.compile(backend=backend, fullgraph=True)
    plain = gradients(model, model, x)
    with LinBP(start=start).attach(model) as attached:
        for _ in range(2):
            got = gradients(model, model, x)
            assert torch.allclose(got[0], expected[0], rtol=0, atol=1e-12)
            assert [site.index for site in attached.sites] == sites
    assert torch.equal(gradients(model, model, x)[0], plain[0])


class SwishByHand(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x):
        h = self.first(x)
        return F.relu(self.second(h * torch.sigmoid(h)))


def test_a_composition_among_other_calls_is_an_error_only_where_it_is_selected():
    model, x = SwishByHand().double(), torch.randn(3, 5).double().requires_grad_()
    with LinBP(start=1).attach(model):
        (expected,) = torch.autograd.grad(model(x).sum(), x)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with LinBP(start=1).attach(model):
        (found,) = torch.autograd.grad(compiled(x).sum(), x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with LinBP(start=0).attach(model), pytest.raises(BackpassError, match="module of its own"):
        compiled(x)
