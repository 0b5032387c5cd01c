"""A run that is killed without warning, at any moment, and resumed, ends as the run that was never killed."""

import multiprocessing
import os
import random
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from backpass import ProxProp
from support.training import images, outcome, trainer

pytestmark = pytest.mark.slow

FORKED = multiprocessing.get_context("forkserver")


def weighted() -> DataLoader:
    x, y = images()
    return DataLoader(TensorDataset(x, y), batch_size=24, sampler=WeightedRandomSampler(1.0 + y, 120))


def settings(case: str) -> tuple[str, str, dict]:
    """Kind, optimizer and further settings of a run of `support.training`."""
    cases = {
        "plain": ("BP", "momentum", {"average": "polyak:0.5", "loggers": ("tensorboard",)}),
        "incomplete batches": ("BP", "adamw", {"drop_last": False, "batch_size": 22, "accumulate": 3}),
        "weighted sampler": ("BP", "momentum", {"data": weighted(), "batch_size": None}),
        "ProxProp with memory": ("BP", "adamw", {"rules": (ProxProp(solve="step", memory=0.9, refresh=2),)}),
        "adversarial with BatchNorm": ("adversarial", "momentum", {}),
        "EMA and bfloat16": ("BP", "momentum", {"average": "ema:0.9", "dtype": "bfloat16"}),
        "two processes": ("BP", "momentum", {"average": "ema:0.9"}),
        "sharded in two processes": ("BP", "adamw", {"sharded": True, "scheduler": "cosine:warmup=0.2"}),
    }
    return cases[case]


def run(case: str, folder: Path) -> dict[str, bytes]:
    torch.set_num_threads(1)
    kind, optimizer, more = settings(case)
    # The same settings each time: the first start finds no checkpoint, the others do.
    one = trainer(kind, folder, optimizer, checkpoint_every=1, log_every=2, **more)
    return outcome(one, one.fit(resume="auto"))


def _run(case: str, folder: Path, connection, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    connection.send("started")
    connection.send(run(case, folder))


class Started:
    """The processes of a run, from the moment that they begin, and where their outcome will be."""

    def __init__(self, case: str, folder: Path) -> None:
        size = 2 if "two processes" in case else 1
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        self.processes, self.connections = [], []
        for rank in range(size):
            here, there = FORKED.Pipe()
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
            group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **ranks} if size > 1 else {}
            self.processes.append(FORKED.Process(target=_run, args=(case, folder, there, group), daemon=True))
            self.processes[-1].start()
            self.connections.append(here)
        for one in self.connections:
            assert one.recv() == "started"

    def outcome(self) -> dict[str, bytes]:
        found = [one.recv() for one in self.connections]
        for process in self.processes:
            process.join()
        return found[0]  # of process 0, whose running statistics are those of checkpoints

    def kill(self) -> bool:
        """Kill all of them; whether one was still running."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        return any(process.exitcode == -signal.SIGKILL for process in self.processes)


@pytest.fixture(scope="module", autouse=True)
def _preloaded():
    FORKED.set_forkserver_preload(["support.training", "torch.utils.tensorboard"])


def killed(case: str, folder: Path, length: int, pause: float) -> bool:
    """Start or continue, and kill without warning some time after the log has this many bytes."""
    started = Started(case, folder)
    log = folder / "log.jsonl"
    while started.processes[0].is_alive() and length and not (log.exists() and log.stat().st_size >= length):
        time.sleep(0.001)
    time.sleep(pause)
    return started.kill()


CASES = (
    "plain",
    "incomplete batches",
    "weighted sampler",
    "ProxProp with memory",
    "adversarial with BatchNorm",
    "EMA and bfloat16",
    "two processes",
    "sharded in two processes",
)


@pytest.mark.parametrize("case", CASES)
def test_ten_kills_at_random_moments(case, tmp_path):
    expected = Started(case, tmp_path / "whole").outcome()
    draws = random.Random(case)
    hits = 0
    for attempt in range(10):
        folder = tmp_path / str(attempt)
        hits += killed(case, folder, draws.randrange(len(expected["log"])), draws.uniform(0, 0.03))
        assert Started(case, folder).outcome() == expected, attempt
        assert not list(folder.rglob("*.part"))
    assert hits >= 7


def test_a_run_killed_again_and_again(tmp_path):
    expected = Started("plain", tmp_path / "whole").outcome()
    for part in range(10):
        killed("plain", tmp_path / "killed", part * len(expected["log"]) // 10, 0.01)
    assert Started("plain", tmp_path / "killed").outcome() == expected
