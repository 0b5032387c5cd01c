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


NORMS = {"linf": float("inf"), "l2": 2, "l1": 1}


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


@pytest.fixture
def images(trained):
    """One hundred images, those that the network has right."""
    data = load_data("digits").images
    x, y = data.x[:100], data.y[:100]
    right = trained(x).argmax(1) == y
    return x[right], y[right]


@pytest.mark.parametrize("norm", NORMS)
def test_the_median_distance_is_within_two_per_cent_where_both_find(trained, images, norm):
    x, y = images
    p = NORMS[norm]
    ours = FMN(norm=norm, steps=200)(trained, x, y)
    theirs = fmn(trained, x, y, norm=p, steps=200, α_init=1.0)
    found = (trained(theirs).argmax(1) != y) & ours.success
    distance = (theirs - x).flatten(1).norm(p, dim=1)
    assert ours.success.all()
    assert found.any()  # their search often converges from inside and finds nothing
    assert ours.distance[found].median() <= 1.02 * distance[found].median()
