"""The two coordinates of a sub-problem give one step, and activations have their derivatives, whatever the input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from backpass import SIBP
from backpass.rules.activations import ACTIVATIONS
from backpass.rules.implicit.calls import linear_call
from backpass.rules.implicit.layers import Linear, LinearLayer
from backpass.rules.implicit.uses import layer_of
from backpass.rules.semi_implicit.elementwise import elementwise
from backpass.rules.semi_implicit.unit_systems import ByColumns, ByRows
from backpass.rules.semi_implicit.weight_step import increment

STEP = SIBP(eta=0.1, lam=0.7, lam_bias=0.3, cg_steps=40, descent_steps=0, reduction="sum")


def layer_and_input(draw: st.DrawFn) -> tuple[LinearLayer, Tensor]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    n, groups = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2]))
    if draw(st.booleans()):
        width, units = draw(st.integers(1, 6)), draw(st.integers(1, 5))
        weight, x = torch.zeros(units, width), torch.randn(n, width, generator=generator)
        call = linear_call(nn.functional.linear, (x.double(), weight.double()), {})
    else:
        stride, padding = draw(st.integers(1, 2)), draw(st.integers(0, 1))
        dilation, kernel = draw(st.integers(1, 2)), draw(st.integers(1, 2))
        weight = torch.zeros(2 * groups, 2, kernel, kernel)
        x = torch.randn(n, 2 * groups, 4, 5, generator=generator)
        given = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        call = linear_call(nn.functional.conv2d, (x.double(), weight.double()), given)
    return layer_of(call.text, tuple(call.weight.shape)), call.x


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_rows_and_columns_give_the_same_step(data: st.DataObject) -> None:
    layer, x = layer_and_input(data.draw)
    wants = data.draw(st.sampled_from([(True, True), (True, False)]))
    curved = data.draw(st.booleans())
    found = []
    for kind in (ByRows, ByColumns):
        system = kind(layer, x, wants, STEP.ratio)
        weight = torch.zeros(layer.shape).double()
        z = nn.functional.linear(x, weight) if isinstance(layer, Linear) else layer.outputs(x, weight, None)
        generator = torch.Generator().manual_seed(1)
        grad = torch.randn(z.shape, generator=generator).double()
        slope = torch.rand(z.shape, generator=generator).double()
        weighting = system.arrange(slope.square()).clone() if curved else None
        unknown = increment(system, system.arrange(grad * slope if curved else grad), weighting, None, 0.1, STEP)
        found.append(system.weights(unknown))
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


PARAMETERS = {"threshold": (0.3, 0.1), "leaky_relu": (0.2,), "elu": (0.7,), "celu": (0.5,), "softplus": (2.0, 5.0)}
BY_NAME = {name: function for function, name in ACTIVATIONS.items() if not function.__name__.endswith("_")}


@pytest.mark.parametrize("name", sorted(set(BY_NAME) - {"prelu", "rrelu"}))
@settings(max_examples=10, deadline=None)
@given(scale=st.floats(0.01, 10))
def test_derivatives_are_those_of_autograd(name: str, scale: float) -> None:
    z = (torch.randn(50, generator=torch.Generator().manual_seed(0)).double() * scale).requires_grad_()
    variants = [{"approximate": "none"}, {"approximate": "tanh"}] if name == "gelu" else [{}]
    for kwargs in variants:
        found = elementwise(BY_NAME[name], (z, *PARAMETERS.get(name, ())), kwargs)
        assert found is not None
        y = BY_NAME[name](z, *PARAMETERS.get(name, ()), **kwargs)
        torch.testing.assert_close(found[0].value(z.detach()), y.detach(), rtol=0, atol=0)
        (expected,) = torch.autograd.grad(y.sum(), z)
        torch.testing.assert_close(found[0].derivative(z.detach()), expected, rtol=1e-12, atol=1e-14)


def test_learned_and_random_activations_are_left_to_autograd() -> None:
    assert elementwise(nn.functional.prelu, (torch.randn(3), torch.tensor([0.1])), {}) is None
    assert elementwise(nn.functional.rrelu, (torch.randn(3),), {"training": True}) is None
