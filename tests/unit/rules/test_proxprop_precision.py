"""ProxProp in float32 and below: how close it stays to float64, and what happens where it cannot."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from backpass.rules import ProxProp
from support.proximal import directions, relative


def deviation(layer: nn.Module, x: torch.Tensor, tau: float, **settings) -> float:
    """Relative error of the float32 direction against the float64 one."""
    g = torch.randn(layer(x).shape)
    exact = directions(copy.deepcopy(layer).double(), x.double(), g.double(), ProxProp(tau=tau, **settings))
    found = directions(layer, x, g, ProxProp(tau=tau, **settings))
    return max(relative(found[name].double(), exact[name]) for name in exact)


@pytest.mark.parametrize("tau", [1e-3, 1.0, 1e3, 1e6])
@pytest.mark.parametrize("case", ["few rows", "many rows", "duplicated rows", "convolution"])
def test_float32_stays_within_a_thousandth_of_float64_without_a_warning(case, tau):
    torch.manual_seed(0)
    layer, x = {
        "few rows": lambda: (nn.Linear(300, 50), torch.randn(50, 300)),
        "many rows": lambda: (nn.Linear(50, 20), torch.randn(400, 50)),
        "duplicated rows": lambda: (nn.Linear(300, 50), torch.randn(10, 300).repeat(5, 1)),
        "convolution": lambda: (nn.Conv2d(3, 8, 3, padding=1), torch.randn(16, 3, 12, 12)),
    }[case]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert deviation(layer, x, tau) < 1e-3


@pytest.mark.parametrize("tau", [1e3, 1e6])
def test_more_rows_than_rank_are_solved_in_float64(tau):
    torch.manual_seed(0)
    x = torch.randint(-3, 4, (100, 5)).float() @ torch.randint(-3, 4, (5, 30)).float()  # of rank 5 in float32 too
    assert deviation(nn.Linear(30, 4), x, tau) < 1e-3


def test_weights_in_bfloat16_are_solved_for_in_float32():
    torch.manual_seed(0)
    layer, x, g = nn.Linear(40, 6), torch.randn(20, 40), torch.randn(20, 6)
    half = copy.deepcopy(layer).bfloat16()
    found = directions(half, x.bfloat16(), g.bfloat16(), ProxProp(tau=10.0))["weight"]
    rounded = directions(half.float(), x.bfloat16().float(), g.bfloat16().float(), ProxProp(tau=10.0))["weight"]
    assert found.dtype == torch.bfloat16
    assert relative(found.float(), rounded) < 2**-8


@pytest.mark.parametrize("solve", ["backward", "step"])
def test_bfloat16_autocast_is_within_its_rounding_of_float32(solve):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.GroupNorm(2, 6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5))
    x, y = torch.randn(32, 2, 6, 6), torch.randint(0, 5, (32,))
    found = []
    for enabled in (False, True):
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        model.zero_grad()
        rule = ProxProp(tau=0.5, solve=solve)
        with rule.attach(model, optimizer) if solve == "step" else rule.attach(model):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, value in found[0].items():
        assert found[1][name].dtype == torch.float32
        assert relative(found[1][name], value) < 0.05, name


@pytest.mark.parametrize("solve", ["backward", "step"])
def test_grad_scaler_scales_the_direction_and_skips_what_overflows(solve):
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    x, y = torch.randn(16, 6), torch.randint(0, 4, (16,))

    def train(scaler: torch.amp.GradScaler | None) -> nn.Module:
        model = copy.deepcopy(start)
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        rule = ProxProp(tau=0.5, solve=solve)
        if solve == "step":
            rule.attach(model, optimizer)
        else:
            rule.attach(model)
        steps = 0
        while steps < 3:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            if scaler is None:
                loss.backward()
                optimizer.step()
                steps += 1
            else:
                scaler.scale(loss).backward()
                before = scaler.get_scale()
                scaler.step(optimizer)
                scaler.update()
                steps += scaler.get_scale() >= before
        return model

    # 2^150 overflows float32 gradients: the first steps are skipped, and halve the scale.
    plain = train(None)
    scaled = train(torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=1000))
    for a, b in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
