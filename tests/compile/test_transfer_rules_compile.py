"""SGM, BPA and PNA under torch.compile(fullgraph=True): the gradients of eager calls, or a refusal by name."""

import pytest
import torch
from torch import nn

from backpass import BPA, PNA, SGM, TGR
from support.names import name_of
from support.transfer import BLOCKS

CASES = [
    (SGM(decay=0.3), "resnet"),
    pytest.param(SGM(decay=0.3, start=-1), "densenet", marks=pytest.mark.slow),
    pytest.param(SGM(decay=0.3), "swin", marks=pytest.mark.slow),
    (BPA(), "resnet"),
    (PNA(), "swin"),
    (PNA(), "vit, matmul"),
    pytest.param(PNA(), "vit, talking heads", marks=pytest.mark.slow),
    pytest.param(BPA(), "densenet", marks=pytest.mark.slow),
    pytest.param(BPA(), "mbconv", marks=pytest.mark.slow),
    pytest.param(PNA(), "vit, einsum", marks=pytest.mark.slow),
    pytest.param(SGM(decay=0.3), "vit, module", marks=pytest.mark.slow),
]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def made(name):
    torch.manual_seed(0)
    model = BLOCKS[name]().double().eval()
    return model, torch.randn(model.shape, dtype=torch.float64, requires_grad=True)


def gradient(model, x):
    return torch.autograd.grad(model(x).square().sum(), x)[0]


@pytest.mark.parametrize(("rule", "name"), CASES, ids=name_of)
def test_compiled_code_has_the_gradients_of_eager_calls(rule, name):
    model, x = made(name)
    plain = gradient(model, x)
    with rule.attach(model) as attached:
        expected = gradient(model, x)
        sites = attached.sites
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with rule.attach(compiled) as attached:
        for _ in range(2):
            torch.testing.assert_close(gradient(compiled, x), expected, rtol=1e-12, atol=1e-12)
        assert attached.sites == sites
    assert not torch.equal(expected, plain)
    torch.testing.assert_close(gradient(compiled, x), plain, rtol=1e-12, atol=1e-12)


def test_multi_head_attention_is_refused_by_name():
    model, x = made("vit, module")
    compiled = torch.compile(nn.Sequential(model), backend="aot_eager", fullgraph=True)
    with PNA().attach(compiled), pytest.raises(Exception, match=r"inside nn\.MultiheadAttention in module '0\.att"):
        compiled(x)


def test_tgr_is_refused_by_name():
    model, x = made("vit, matmul")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with TGR().attach(compiled), pytest.raises(Exception, match="tgr does not work under torch.compile"):
        compiled(x)
