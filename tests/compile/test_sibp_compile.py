"""SIBP under torch.compile(fullgraph=True): the same gradients as in eager calls."""

import pytest
import torch
from torch import nn

from backpass import SIBP, BackpassError
from support.networks import CASES, gradients


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def assert_same(one, other):
    assert torch.equal(one[2], other[2])
    assert torch.allclose(one[0], other[0], rtol=0, atol=1e-12)
    assert all(torch.allclose(one[1][k], other[1][k], rtol=0, atol=1e-12) for k in one[1])


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("modules", "method", "gelu")]


@pytest.mark.parametrize("name", ["tanh", "residual", "conv-bn-relu", *SLOW])
def test_aot_eager_equals_eager(name):
    model, x = CASES[name].make()
    rule = SIBP(eta=None, newton_steps=2)
    with rule.attach(model):
        expected = gradients(model, model, x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with rule.attach(compiled) as attached:
        assert_same(gradients(compiled, model, x), expected)
    assert len(attached.sites) == len([m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)])


def test_an_activation_in_place():
    model, x = CASES["reused-in-place"].make()
    with SIBP().attach(model):
        expected = gradients(model, model, x)
        assert_same(gradients(torch.compile(model, backend="aot_eager", fullgraph=True), model, x), expected)


@pytest.mark.slow
def test_inductor_equals_eager():
    model, x = CASES["modules"].make()
    with SIBP().attach(model):
        expected = gradients(model, model, x)
        got = gradients(torch.compile(model, fullgraph=True), model, x)
    assert all(torch.allclose(got[1][k], expected[1][k], rtol=1e-10, atol=1e-12) for k in got[1])


def test_what_is_not_exact_raises_in_compiled_code_too():
    model, x = CASES["modules"].make()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with SIBP().attach(compiled):
        compiled(x).sum().backward()
        with pytest.raises(BackpassError, match="has a gradient from a backward pass before"):
            compiled(x).sum().backward()
