"""The example of a fifth paper: its measurements, and its claims through the harness."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from backpass.data import load_digits
from backpass.experiments.experiment import Context
from backpass.experiments.running import run
from backpass.experiments.verifying import verify

FILE = Path(__file__).parents[2] / "examples" / "fifth_paper.py"


@pytest.fixture
def paper(monkeypatch):
    spec = importlib.util.spec_from_file_location("fifth_paper", FILE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fifth_paper", module)
    spec.loader.exec_module(module)
    return module


def test_its_measurements_are_their_definitions_image_by_image(paper, monkeypatch):
    kept = []
    monkeypatch.setattr(paper, "build", lambda *a, made=paper.build, **k: kept.append(made(*a, **k)) or kept[0])
    found = paper.train(paper.Smoothed(smoothing=0.05, epochs=3), 0, Context())
    test, bins, right, sure = load_digits().test, {}, 0, 0.0
    for x, y in zip(test.x, test.y, strict=True):
        chances = torch.softmax(kept[0](x[None])[0].detach(), 0)
        hit, chance = float(chances.argmax() == y), chances.max().item()
        bins.setdefault(min(int(10 * chance), 9), []).append((chance, hit))
        right, sure = right + hit, sure + chance
    count = len(test.y)
    gap = sum(abs(sum(c for c, _ in one) - sum(h for _, h in one)) for one in bins.values())
    assert found["accuracy"] == pytest.approx(100 * right / count, abs=1e-3)
    assert found["overconfidence"] == pytest.approx(100 * (sure - right) / count, abs=1e-3)
    assert found["calibration error"] == pytest.approx(100 * gap / count, abs=1e-3)


def test_its_table_runs_and_verifies_and_smoothed_labels_make_a_network_less_sure(paper, tmp_path):
    small = replace(paper.SMALL, seeds=(0, 1, 2))
    experiments = [replace(one, scales={"small": small}) for one in paper.EXPERIMENTS]
    (done,) = run(experiments, scale="small", out=tmp_path)
    assert verify(tmp_path / "label-smoothing", experiments).problems == ()
    confidence, calibration = done.result.claims
    assert confidence.verdict == "same direction"
    assert confidence.interval[1] < 0
    assert calibration.published == "improves model calibration"
