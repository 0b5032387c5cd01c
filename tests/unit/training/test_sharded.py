"""Two processes with sharded weights (FSDP2) learn what one does; a rank that fails ends the run with its message."""

import os
import socket
import subprocess
import sys
from contextlib import suppress

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from backpass import BackpassError, LinBP
from backpass.attacks import PGD
from backpass.training import AdversarialTraining, Interrupted, RobustEvaluation, Trainer
from support.processes import in_processes

X, Y = torch.rand(45, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64), torch.arange(45) % 3
ATTACK = PGD(eps=0.1, step=0.05, steps=2, restarts=1)
CASES = {
    "plain": {"accumulate": 2, "clip_norm": 0.5},
    "LinBP": {"rules": (LinBP(start=-1),), "average": "ema:0.8"},
    "adversarial": {"objective": AdversarialTraining(ATTACK)},
    "TRADES by LinBP": {"objective": AdversarialTraining(ATTACK, trades=2.0, rule=LinBP(start=-1))},
    "normalised": {"normalize_gradient": "tensor"},
}


def make(sharded: bool, folder=None, **settings) -> Trainer:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)).double()
    model.register_buffer("whole", torch.ones(3, dtype=torch.float64))  # averaged beside sharded weights
    if sharded:
        fully_shard(model[2])
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    settings = {"epochs": 2, "batch_size": 11, "evaluation": (X[:25], Y[:25]), "log_every": 3, **settings}
    return Trainer(model, optimizer, (X, Y), folder=folder, **settings)


def numbers(trainer: Trainer, result) -> list[float]:
    state = trainer.model.state_dict()
    tensors = [*state.values(), *(result.averaged or {}).values()]
    return torch.cat([getattr(one, "full_tensor", lambda one=one: one)().flatten() for one in tensors]).tolist()


def learned(sharded: bool, settings) -> tuple[list[float], list[dict]]:
    trainer = make(sharded, **settings)
    result = trainer.fit()
    return numbers(trainer, result), result.history


def resumed(folder: str) -> list[bool]:
    whole = make(True, f"{folder}/whole", average="ema:0.8")
    expected = numbers(whole, whole.fit())

    def stop(step):
        if step == 6:
            raise Interrupted

    with suppress(Interrupted):
        make(True, f"{folder}/stopped", average="ema:0.8", checkpoint_every=2, on_step=stop).fit()
    again = make(True, f"{folder}/stopped", average="ema:0.8")
    return numbers(again, again.fit(resume=True)) == expected


def refused(settings) -> str:
    try:
        make(True, **settings).fit()
    except BackpassError as error:
        return str(error)
    return ""


def everything(rank: int, folder: str) -> dict:
    return {
        **{case: learned(True, settings) for case, settings in CASES.items()},
        "resumed": resumed(folder),
        "refused": [
            refused({"compile": True}),
            refused({"robust": RobustEvaluation(ATTACK)}),
        ],
    }


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    return in_processes(2, everything, str(tmp_path_factory.mktemp("runs")))


@pytest.mark.parametrize("case", CASES)
def test_sharded_weights_learn_what_one_process_does(case, by_two):
    weights, history = learned(False, CASES[case])
    for process in by_two:
        found, found_history = process[case]
        assert found == pytest.approx(weights, rel=0, abs=1e-6)
        for a, b in zip(found_history, history, strict=True):
            assert a["evaluation"] == pytest.approx(b["evaluation"], abs=1e-6)
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-6)


def test_they_resume_to_the_bit(by_two):
    assert all(process["resumed"] for process in by_two)


def test_what_a_sharded_model_cannot_do_is_refused_with_the_reason(by_two):
    for process in by_two:
        compiled, robust = process["refused"]
        assert "cannot be compiled" in compiled
        assert "no single process can call a model sharded" in robust


FAILING = """
import os, sys, torch
from torch import nn
from backpass.training import Trainer

def on_step(step):
    if step == 3 and os.environ["RANK"] == "1":
        if sys.argv[1] == "killed":
            os.kill(os.getpid(), 9)
        raise RuntimeError("the disk of this machine is gone")

torch.manual_seed(0)
model = nn.Linear(4, 3)
data = torch.randn(400, 4), torch.arange(400) % 3
optimizer = torch.optim.SGD(model.parameters(), 0.1)
Trainer(model, optimizer, data, epochs=50, batch_size=8, on_step=on_step).fit()
"""


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raises", "another process failed: process 1: RuntimeError: the disk of this machine is gone"),
        ("killed", "another process died"),
    ],
)
def test_a_rank_that_ends_tells_the_others(how, message, tmp_path):
    """Started by hand, without torchrun's agent, which would kill them all."""
    (tmp_path / "run.py").write_text(FAILING)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "run.py"), how],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    processes[1].communicate(timeout=120)
    _, others = processes[0].communicate(timeout=120)
    assert processes[0].returncode == 1
    assert f"BackpassError: {message}" in others
    assert "resume=True" in others
