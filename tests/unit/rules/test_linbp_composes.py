"""LinBP works where PyTorch works, and gives the same gradients there."""

import pytest
import torch
from torch import nn

from backpass import BackpassError, LinBP, list_sites
from support.networks import CASES, gradients


def close(one, other, tolerance=1e-12):
    assert torch.allclose(one[0], other[0], rtol=0, atol=tolerance)
    assert all(torch.allclose(one[1][k], other[1][k], rtol=0, atol=tolerance) for k in one[1])


@pytest.fixture(params=["functional", "reused-in-place", "residual", "conv-bn-relu"])
def case(request):
    return CASES[request.param].make()


def test_func_grad(case):
    model, x = case
    parameters = dict(model.named_parameters())

    def loss(parameters, x):
        return 0.5 * torch.func.functional_call(model, parameters, (x,)).square().sum()

    with LinBP(start=-1).attach(model):
        by_weight, by_input = torch.func.grad(loss, argnums=(0, 1))(parameters, x)
        expected = gradients(model, model, x)
    close((by_input, by_weight), expected)


def test_vmap_of_grad_gives_per_sample_gradients(case):
    model, x = case
    parameters = dict(model.named_parameters())

    def loss(parameters, sample):
        return 0.5 * torch.func.functional_call(model, parameters, (sample[None],)).square().sum()

    with LinBP(start=1).attach(model):
        per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
        _, by_weight, _ = gradients(model, model, x)
    for name, value in by_weight.items():
        assert torch.allclose(per_sample[name].sum(0), value, rtol=0, atol=1e-10)


def test_vmap_outside_of_the_model(case):
    model, x = case
    with LinBP(start=1).attach(model):
        whole = gradients(model, model, x)
        mapped = gradients(lambda x: torch.func.vmap(lambda s: model(s[None])[0])(x), model, x)
    close(mapped, whole, 1e-10)


@pytest.mark.parametrize("slope", [1.0, 0.5])
def test_forward_mode_gives_the_same_linear_derivative(slope):
    model, x = CASES["silu"].make()
    direction = torch.randn_like(x)
    with LinBP(start=1, slope=slope).attach(model):
        value, tangent = torch.func.jvp(model, (x,), (direction,))
        jacobian = torch.func.vmap(torch.func.jacrev(lambda s: model(s[None])[0]))(x)
    assert torch.equal(value, model(x))
    assert torch.allclose(tangent, torch.einsum("noi,ni->no", jacobian, direction), atol=1e-12)


def test_double_backward_sees_a_linear_activation():
    model, x = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh()).double(), torch.randn(2, 3, dtype=torch.float64)
    x.requires_grad_()
    with LinBP().attach(model):
        (first,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        (by_weight,) = torch.autograd.grad(first.sum(), model[0].weight)
    assert torch.allclose(first, model[0].weight.sum(0).expand(2, 3))
    assert torch.equal(by_weight, torch.full((3, 3), 2.0, dtype=torch.float64))


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Softplus, nn.SiLU, nn.Tanh])
def test_bf16_autocast_keeps_the_forward_and_the_dtypes(activation):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 6), activation(), nn.Linear(6, 3)), torch.randn(4, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = model(x)
        with LinBP().attach(model):
            leaf = x.clone().requires_grad_()
            out = model(leaf)
            out.sum().backward()
    assert torch.equal(out, plain)
    assert leaf.grad.dtype == torch.float32
    weight = (model[2].weight.to(torch.bfloat16).sum(0) @ model[0].weight.to(torch.bfloat16)).float()
    assert torch.allclose(leaf.grad, weight.expand(4, 6), rtol=2e-2, atol=2e-2)


def test_prelu_learns_its_slope_as_before():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.PReLU(4)).double(), torch.randn(5, 4, dtype=torch.float64)
    plain = gradients(model, model, x)
    with LinBP().attach(model):
        linear = gradients(model, model, x)
    assert torch.equal(linear[2], plain[2])
    assert torch.equal(linear[1]["1.weight"], plain[1]["1.weight"])
    assert torch.allclose(linear[0], linear[2] @ model[0].weight)


def test_of_two_rules_the_one_attached_last_acts():
    model, x = CASES["functional"].make()
    with LinBP(start=1, stop=2, slope=0.5).attach(model) as outer:
        only_outer = gradients(model, model, x)
        with LinBP(start=1).attach(model) as inner:
            both = gradients(model, model, x)
            assert [site.index for site in inner.sites] == [1, 2]
        close(gradients(model, model, x), only_outer)
    with LinBP(start=1).attach(model):
        close(both, gradients(model, model, x))
    assert outer.rule.slope == 0.5


def test_a_site_that_the_inner_rule_leaves_goes_to_the_outer_one():
    model, x = CASES["functional"].make()
    with LinBP(start=2).attach(model), LinBP(start=0, stop=1).attach(model):
        got = gradients(model, model, x)
    with LinBP(where=lambda site: site.index != 1).attach(model):
        close(got, gradients(model, model, x))


@pytest.mark.parametrize("order", [1, -1])
def test_two_rules_with_ranges_counted_from_the_end_share_the_sites(case, order):
    """Each finds its range with a call of its own, which the other does not count."""
    model, x = case
    total = len(list_sites(model, x))
    counted = [LinBP(stop=-1, slope=0.5), LinBP(start=-1)][::order]
    named = [LinBP(stop=total - 1, slope=0.5), LinBP(start=total - 1)][::order]

    def under(rules):
        with rules[0].attach(model) as one, rules[1].attach(model) as other:
            return gradients(model, model, x), {site.index for site in (*one.sites, *other.sites)}

    (found, acted), (expected, _) = under(counted), under(named)
    assert acted == set(range(total))
    close(found, expected)


def test_a_rule_that_was_removed_is_not_entered_again(case):
    model, _ = case
    attached = LinBP(start=-1).attach(model)
    with attached:
        pass
    with pytest.raises(BackpassError, match="was removed from this model, and acts no more"), attached:
        pass


def test_rules_on_nested_modules_number_their_own_sites():
    model, x = CASES["nested-sequential"].make()
    with LinBP(start=2).attach(model) as outer, LinBP(start=0, stop=1).attach(model.body[0]) as inner:
        got = gradients(model, model, x)
        assert [s.module for s in outer.sites] == ["body.1.1"]
        assert [s.module for s in inner.sites] == ["1"]
    with LinBP(where=lambda site: site.index in (0, 2)).attach(model):
        close(got, gradients(model, model, x))


def test_removal_out_of_order_leaves_the_other_rule():
    model, x = CASES["functional"].make()
    first, second = LinBP(start=2).attach(model), LinBP(start=0, stop=1).attach(model)
    first.remove()
    got = gradients(model, model, x)
    second.remove()
    with LinBP(start=0, stop=1).attach(model):
        close(got, gradients(model, model, x))


def test_the_gradient_of_a_batch_is_the_sum_over_its_parts(case):
    model, x = case
    with LinBP(start=1).attach(model):
        whole = gradients(model, model, x)
        parts = [gradients(model, model, x[k : k + 1]) for k in range(len(x))]
    close((torch.cat([p[0] for p in parts]), {k: sum(p[1][k] for p in parts) for k in whole[1]}), whole, 1e-10)
