"""Token gradient regularization: attention written out, and which linear layers are sites."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from backpass import TGR, NoSiteError
from backpass.rules.tgr import attention
from support.transfer import BLOCKS

MASKS = {
    "none": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "float": {"attn_mask": torch.randn(4, 6, dtype=torch.float64)},
    "bool": {"attn_mask": torch.arange(24).view(4, 6) % 5 > 0},
    "bool, a row without a key": {"attn_mask": torch.arange(24).view(4, 6) > 6},
}


@pytest.mark.parametrize("name", MASKS)
def test_the_attention_that_tgr_writes_out_is_pytorchs(name):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 5, dtype=torch.float64, requires_grad=True) for n in (4, 6, 6))
    kwargs = MASKS[name]
    expected = F.scaled_dot_product_attention(q, k, v, **kwargs)
    found = attention(q, k, v, **kwargs, change=lambda matrix: matrix)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for one, other in zip(
        *(torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (found, expected)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_tgr_takes_grouped_queries_and_names_attention_that_drops_out():
    class Grouped(nn.Module):
        dropout = 0.0

        def forward(self, x):
            q, kv = x.unflatten(-1, (4, 2)).transpose(1, 2), x[..., :4].unflatten(-1, (2, 2)).transpose(1, 2)
            return F.scaled_dot_product_attention(q, kv, kv, dropout_p=self.dropout, enable_gqa=True)

    x, model = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True), Grouped()
    plain = torch.autograd.grad(model(x).square().sum(), x)[0]
    with TGR().attach(model):
        out = model(x)
        assert torch.equal(out, model(x))
        assert not torch.allclose(torch.autograd.grad(out.square().sum(), x)[0], plain)
    model.dropout = 0.5
    with TGR().attach(model), pytest.raises(NoSiteError, match=r"its attention drops out; call model.eval\(\)"):
        model(x)


class Pooled(nn.Module):
    """A transformer block, an activation of the residual sum, and a head with an activation."""

    def __init__(self):
        super().__init__()
        self.block, self.head = BLOCKS["vit, matmul"](), nn.Linear(8, 8)

    def forward(self, x):
        return torch.tanh(self.head(F.silu(self.block(x))[:, 0]))


def test_activations_behind_the_sum_and_in_the_head_make_no_mlp():
    model, x = Pooled().double(), torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    with TGR().attach(model) as attached:
        model(x)
    assert [site.function for site in attached.sites] == ["linear", "matmul", "linear"]
