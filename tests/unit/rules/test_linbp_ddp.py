"""LinBP in two processes equals one process with the union batch."""

import torch
from torch.nn.parallel import DistributedDataParallel

from backpass import LinBP
from support.networks import CASES, gradients
from support.processes import in_processes

START = {"residual": -2, "conv-bn-relu": 1}


def train_step(rank: int, name: str) -> tuple[list[list[float]], int]:
    model, _ = CASES[name].make()
    x = torch.randn(4, *CASES[name].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    wrapped = DistributedDataParallel(model)
    with LinBP(start=START[name]).attach(wrapped) as attached:
        _, by_weight, _ = gradients(wrapped, model, x[2 * rank : 2 * rank + 2])
    # DDP averages over the processes.
    return [(2 * g).flatten().tolist() for g in by_weight.values()], len(attached.sites)


def test_two_processes_equal_one():
    for name in START:
        model, _ = CASES[name].make()
        x = torch.randn(4, *CASES[name].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
        with LinBP(start=START[name]).attach(model) as attached:
            _, by_weight, _ = gradients(model, model, x)
        for values, sites in in_processes(2, train_step, name):
            assert sites == len(attached.sites)
            for got, expected in zip(values, by_weight.values(), strict=True):
                assert torch.allclose(torch.tensor(got, dtype=torch.float64), expected.flatten(), rtol=0, atol=1e-10)
