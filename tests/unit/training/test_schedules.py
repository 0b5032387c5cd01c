"""Schedules by name are their formulas, in a run of the trainer."""

import math

import pytest
import torch
from torch import nn

from backpass.training import Trainer

STEPS, EPOCHS = 5, 4


def rates(scheduler: str) -> list[float]:
    """The rate of every step of a run of 20."""
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), 2.0)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(optimizer.param_groups[0]["lr"]))
    data = torch.randn(20, 4), torch.arange(20) % 3
    settings = {"epochs": EPOCHS, "batch_size": 4, "scheduler": scheduler, "diverged_above": None}
    Trainer(model, optimizer, data, **settings).fit()
    return seen


def rise_and_fall(warmup: float, start: float, end: float, cosine: bool) -> list[float]:
    rising, total = warmup * STEPS * EPOCHS, STEPS * EPOCHS
    expected = []
    for step in range(total):
        if step < rising:
            expected.append(2 * (start + (1 - start) * step / rising))
            continue
        part = (step - rising) / (total - rising)
        left = math.cos(math.pi * part / 2) ** 2 if cosine else 1 - part
        expected.append(2 * (end + (1 - end) * left))
    return expected


FORMULAS = {
    "one-cycle": rise_and_fall(0.3, 0.04, 0, True),
    "one-cycle:warmup=0.5,start=0.1,end=0.2": rise_and_fall(0.5, 0.1, 0.2, True),
    "cosine": rise_and_fall(0, 0, 0, True),
    "cosine:warmup=0.25": rise_and_fall(0.25, 0.01, 0, True),
    "linear": rise_and_fall(0, 0, 0, False),
    "linear:warmup=0.2,start=0.2,end=0.07": rise_and_fall(0.2, 0.2, 0.07, False),
    "step:every=2,gamma=0.5": [2.0 * 0.5 ** (step // STEPS // 2) for step in range(20)],
    "exponential:gamma=0.9": [2.0 * 0.9 ** (step // STEPS) for step in range(20)],
    "cosine:epochs=8": [2 * math.cos(math.pi * (step // STEPS) / 8 / 2) ** 2 for step in range(20)],
}


@pytest.mark.parametrize("name", FORMULAS)
def test_the_rate_of_every_step(name):
    assert rates(name) == pytest.approx(FORMULAS[name], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_channels_last_is_the_format_of_model_and_images_and_the_same_steps(dtype):
    seen = []

    def run(channels_last):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 3))
        hook = model[0].register_forward_hook(
            lambda module, args, output: seen.append(args[0].is_contiguous(memory_format=torch.channels_last))
        )
        x, y = torch.rand(24, 3, 6, 6), torch.arange(24) % 3
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        settings = {"epochs": 2, "batch_size": 8, "evaluation": (x, y), "channels_last": channels_last, "dtype": dtype}
        Trainer(model, optimizer, (x, y), **settings).fit()
        hook.remove()
        return model

    plain = run(False)
    seen.clear()
    last = run(True)
    assert all(seen[2:])  # after the two samples that check the targets
    assert last[0].weight.is_contiguous(memory_format=torch.channels_last)
    tolerance = 1e-5 if dtype is None else 1e-2
    for a, b in zip(plain.parameters(), last.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)
