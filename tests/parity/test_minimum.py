"""Minimal distances beside adversarial-library's FMN, an independent implementation by authors of the field."""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from backpass.attacks import FMN
from backpass.data import load_data
from backpass.models import build

adv_lib = pytest.importorskip("adv_lib", reason="needs the package adv-lib")


def module(name):
    """A file of the package by itself: its folder's __init__ needs torchvision."""
    file = Path(adv_lib.__path__[0], f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"adv_lib_{file.stem}", file)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


fmn = module("attacks/fast_minimum_norm").fmn

NETWORKS = ("cnn", "mlp", "cnn:activation=silu")


@pytest.fixture(scope="module", params=NETWORKS)
def trained(request):
    torch.manual_seed(0)
    data = load_data("digits", split="train").images
    model = build(request.param, seed=0)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(data.x), data.y).backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize(("norm", "p", "step"), [("linf", float("inf"), 1.0), ("l2", 2, 1.0), ("l1", 1, 1.0)])
def test_the_median_distance_is_within_two_per_cent_or_smaller(trained, norm, p, step):
    data = load_data("digits").images
    x, y = data.x[:100], data.y[:100]
    right = trained(x).argmax(1) == y
    x, y = x[right], y[right]
    ours = FMN(norm=norm, steps=200, step=step)(trained, x, y)
    theirs = fmn(trained, x, y, norm=p, steps=200, α_init=step)
    found = trained(theirs).argmax(1) != y
    distance = (theirs - x).flatten(1).norm(p, dim=1).masked_fill(~found, torch.inf)
    assert ours.success.all()
    assert ours.distance.median() <= 1.02 * distance.median()
