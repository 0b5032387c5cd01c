"""A call of an attached model keeps no tensor alive: with its outputs its graph is freed, by reference counts alone."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpass.rules.registry import parse_rule


class Blocks(nn.Module):
    """A convolution, a residual block with an activation written by hand, pooling, attention and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.qkv, self.head = nn.Linear(4, 12), nn.Linear(4, 3)
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        inner = self.first(h)
        h = F.relu(h + self.second(inner * torch.sigmoid(inner)))
        tokens = F.max_pool2d(h, 2).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).chunk(3, -1)
        tokens = tokens + (q @ k.transpose(1, 2) / 2).softmax(-1) @ v
        out: Tensor = self.head((tokens + self.mlp(tokens)).mean(1))
        return out


class Perceptron(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


RULES = {
    "linbp:start=1": Blocks,
    "linbp:start=-2": Blocks,
    "linbp:start=-2,residual=renormalized": Blocks,
    "linbp:start=0,residual=per_activation": Blocks,
    "bpa:start=1": Blocks,
    "guided": Blocks,
    "deconvnet": Blocks,
    "sgm:decay=0.5": Blocks,
    "pna": Blocks,
    "tgr": Blocks,
    "proxprop:tau=0.5": Blocks,
    "proxprop:solve=step,memory=0.9": Blocks,
    "sibp:eta=0.1": Perceptron,
}


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("stage", ["first call", "later call", "failed call"])
@pytest.mark.parametrize(("rule", "network"), RULES.items(), ids=list(RULES))
def test_the_graph_is_freed_with_the_outputs(
    rule: str, network: Callable[[], nn.Module], stage: str, no_collector: None
) -> None:
    model, x = network(), torch.randn(5, 2, 4, 4, requires_grad=True)
    seen: list[weakref.ref[Tensor]] = []

    def note(module: nn.Module, args: Any, output: Tensor) -> None:
        seen.append(weakref.ref(output))
        if stage == "failed call" and module is list(model.modules())[-1]:
            raise RuntimeError("stop")

    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    options: dict[str, Any] = {"optimizer": optimizer} if "solve=step" in rule else {}
    attached = parse_rule(rule).attach(model, **options)
    for module in model.modules():
        module.register_forward_hook(note)
    for _ in range(3 if stage == "later call" else 1):
        optimizer.zero_grad()
        with pytest.raises(RuntimeError, match="stop") if stage == "failed call" else nullcontext():
            F.cross_entropy(model(x), torch.arange(5) % 3).backward()
            optimizer.step()
    assert seen
    assert [one for one in seen if one() is not None] == []
    attached.remove()
