"""LinBP equals a slow dense-Jacobian computation, whatever way a network calls its activations."""

import pytest
import torch

from backpass import LinBP, list_sites
from support.dense import dense_gradients
from support.networks import CASES, gradients


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_dense_jacobians_at_every_start(name):
    case = CASES[name]
    model, x = case.make()
    stages = case.stages(model)
    sites = sum(stage.activation is not None for stage in stages)
    plain = model(x)
    for start in range(sites):
        with LinBP(start=start).attach(model) as attached:
            by_input, by_weight, out = gradients(model, model, x)
        assert [site.index for site in attached.sites] == list(range(start, sites))
        expected_input, expected_weight, _ = dense_gradients(model, stages, x, start, sites, 1.0)
        assert torch.equal(out, plain)
        assert torch.allclose(by_input, expected_input, rtol=0, atol=1e-10)
        for key, value in by_weight.items():
            assert torch.allclose(value, expected_weight[key], rtol=0, atol=1e-10), key


@pytest.mark.parametrize("name", ["functional", "statement-in-place", "residual"])
def test_stop_and_slope_equal_dense_jacobians(name):
    case = CASES[name]
    model, x = case.make()
    stages = case.stages(model)
    with LinBP(start=1, stop=2, slope=0.3).attach(model):
        by_input, by_weight, _ = gradients(model, model, x)
    expected_input, expected_weight, _ = dense_gradients(model, stages, x, 1, 2, 0.3)
    assert torch.allclose(by_input, expected_input, rtol=0, atol=1e-10)
    assert all(torch.allclose(by_weight[k], expected_weight[k], rtol=0, atol=1e-10) for k in by_weight)


@pytest.mark.parametrize("name", CASES)
def test_the_removed_rule_leaves_plain_backpropagation(name):
    model, x = CASES[name].make()
    before = gradients(model, model, x)
    with LinBP().attach(model):
        model(x)
    after = gradients(model, model, x)
    assert torch.equal(before[0], after[0])
    assert all(torch.equal(before[1][k], after[1][k]) for k in before[1])


@pytest.mark.parametrize("name", CASES)
def test_every_activation_is_listed(name):
    case = CASES[name]
    model, x = case.make()
    expected = sum(stage.activation is not None for stage in case.stages(model))
    assert [site.index for site in list_sites(model, x)] == list(range(expected))
