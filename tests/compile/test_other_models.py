"""A rule on one model changes no other model's compiled code, and no setting of the process."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._dynamo import config
from torch._dynamo.testing import CompileCounter

from backpass import SIBP, BackpassError, LinBP, ProxProp

RULES = [LinBP(), LinBP(start=-1), LinBP(residual="renormalized"), ProxProp(tau=0.1), SIBP(eta=0.1)]


class Block(nn.Module):
    """A residual block, so that every rule finds something."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 4), Block(), nn.Linear(4, 2)).double()


@pytest.fixture(autouse=True)
def _fresh_compiler():
    """Every test begins with torch's own setting, whatever others did to it."""
    torch._dynamo.reset()
    before, config.skip_nnmodule_hook_guards = config.skip_nnmodule_hook_guards, True
    yield
    config.skip_nnmodule_hook_guards = before
    torch._dynamo.reset()


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(3, 4, dtype=torch.float64, requires_grad=True)


def call(model, x):
    try:
        return torch.autograd.grad(model(x).square().sum(), x)[0]
    except BackpassError:  # a rule that this model does not fit; whatever it says must leave no trace either
        return None


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_an_unrelated_compiled_model_is_not_compiled_again(rule, x):
    counter = CompileCounter()
    unrelated, function = torch.compile(network(1), backend=counter), torch.compile(torch.tanh, backend=counter)
    before = [call(unrelated, x), call(function, x)]
    frames = counter.frame_count
    model = network()
    settings = config.get_config_copy()
    with rule.attach(model):
        call(model, x)
        between = [call(unrelated, x), call(function, x)]
    call(model, x)
    after = [call(unrelated, x), call(function, x)]
    assert counter.frame_count == frames
    for one, other in zip(before * 2, between + after, strict=True):
        assert torch.equal(one, other)
    assert config.get_config_copy() == settings


@pytest.mark.parametrize("rule", RULES[:2], ids=str)
def test_a_twin_of_the_attached_model_is_not_compiled_again(rule, x):
    # The same classes and the same code, another object.
    counter = CompileCounter()
    twin = torch.compile(network(), backend=counter)
    call(twin, x)
    frames = counter.frame_count
    model = network(2)
    with rule.attach(model):
        call(model, x)
        plain = call(twin, x)
    assert counter.frame_count == frames
    assert torch.equal(plain, call(network(), x))


WAYS = {
    "wrapper": lambda model: torch.compile(model, backend="eager"),
    "in place": lambda model: (model.compile(backend="eager"), model)[1],
    "function": lambda model: torch.compile(lambda x: model(x), backend="eager"),
    "a part": lambda model: (model[1].compile(backend="eager"), model)[1],
}


class CallsCompiledFunction(nn.Module):
    """An eager model whose forward calls a compiled function."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)
        self.function = [torch.compile(lambda z: torch.relu(z) * 2, backend="eager")]

    def forward(self, x):
        return self.last(torch.tanh(self.function[0](self.first(x))))


@pytest.mark.parametrize("called_before", [True, False])
@pytest.mark.parametrize("start", [0, -1])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_compiled_function_inside_obeys_the_rule_is_named_or_an_error(start, called_before, x):
    torch.manual_seed(0)
    model = CallsCompiledFunction().double()
    with torch.compiler.set_stance("force_eager"), LinBP(start=start).attach(model):
        expected = call(model, x)
    if called_before:
        call(model, x)
    try:
        with LinBP(start=start).attach(model) as attached:
            (found,) = torch.autograd.grad(model(x).square().sum(), x)
            (again,) = torch.autograd.grad(model(x).square().sum(), x)
    except BackpassError:
        return
    exact = all(torch.allclose(one, expected, rtol=0, atol=1e-12) for one in (found, again))
    assert exact or "" in attached.unreachable


@pytest.mark.parametrize("called_before", [True, False])
@pytest.mark.parametrize("start", [0, -1])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_compiled_model_obeys_the_rule_or_is_an_error(way, start, called_before, x):
    model = network()
    plain = call(model, x)
    with LinBP(start=start).attach(model):
        expected = call(model, x)
    assert not torch.equal(plain, expected)
    compiled = WAYS[way](model)
    if called_before:
        call(compiled, x)
    try:
        with LinBP(start=start).attach(model) as attached:
            (found,) = torch.autograd.grad(compiled(x).square().sum(), x)
            out_of_reach = attached.unreachable
    except (BackpassError, torch._dynamo.exc.TorchDynamoException) as error:
        assert isinstance(error, BackpassError) or "backpass" in str(error)  # noqa: PT017
    else:
        assert torch.allclose(found, expected, rtol=0, atol=1e-12) or (way == "a part" and "1" in out_of_reach)
    assert torch.allclose(call(compiled, x), plain, rtol=0, atol=1e-12)


CODE = """
import sys, torch
from torch import nn
from backpass import LinBP
model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(2, 4)
with LinBP(start=-1).attach(model):
    model(x).sum().backward()
assert "torch._dynamo" not in sys.modules, "attaching a rule imported the compiler"
"""


def test_attaching_imports_no_compiler():
    subprocess.run([sys.executable, "-c", CODE], check=True, timeout=120)
