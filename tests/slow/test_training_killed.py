"""A run that is killed without warning, at any moment, and resumed, ends as the run that was never killed."""

import multiprocessing
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from support.training import outcome, trainer

pytestmark = pytest.mark.slow

CASES = (("BP", "momentum"), ("ProxProp union", "adamw"), ("adversarial", "momentum"))
SETTINGS = {
    "momentum": {"average": "polyak:0.5", "loggers": ("tensorboard",)},
    "adamw": {"average": "ema:0.9", "drop_last": False, "batch_size": 22, "accumulate": 3},
}
FORKED = multiprocessing.get_context("forkserver")


def run(kind: str, optimizer: str, folder: Path) -> dict[str, bytes]:
    torch.set_num_threads(1)
    # The same settings each time: the first start finds no checkpoint, the others do.
    one = trainer(kind, folder, optimizer, checkpoint_every=1, log_every=2, **SETTINGS[optimizer])
    return outcome(one, one.fit(resume="auto"))


def _run(kind: str, optimizer: str, folder: Path, connection) -> None:
    connection.send("started")
    connection.send(run(kind, optimizer, folder))


def start(kind: str, optimizer: str, folder: Path):
    """A process that runs it, from the moment that it begins, and where its outcome will be."""
    here, there = FORKED.Pipe()
    process = FORKED.Process(target=_run, args=(kind, optimizer, folder, there), daemon=True)
    process.start()
    assert here.recv() == "started"
    return process, here


@pytest.fixture(scope="module", autouse=True)
def _preloaded():
    FORKED.set_forkserver_preload(["support.training", "torch.utils.tensorboard"])


def killed(kind: str, optimizer: str, folder: Path, length: int, pause: float) -> bool:
    """Start or go on, and kill without warning some time after the log has this many bytes; whether it was killed."""
    process, _ = start(kind, optimizer, folder)
    log = folder / "log.jsonl"
    while process.is_alive() and length and not (log.exists() and log.stat().st_size >= length):
        time.sleep(0.001)
    time.sleep(pause)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize(("kind", "optimizer"), CASES)
def test_ten_kills_at_random_moments(kind, optimizer, tmp_path):
    process, connection = start(kind, optimizer, tmp_path / "whole")
    expected = connection.recv()
    process.join()
    draws = random.Random(kind)
    hits = 0
    for attempt in range(10):
        folder = tmp_path / str(attempt)
        hits += killed(kind, optimizer, folder, draws.randrange(len(expected["log"])), draws.uniform(0, 0.03))
        process, connection = start(kind, optimizer, folder)
        assert connection.recv() == expected, attempt
        process.join()
    assert hits >= 7


def test_a_run_killed_again_and_again(tmp_path):
    process, connection = start("BP", "momentum", tmp_path / "whole")
    expected = connection.recv()
    process.join()
    for part in range(10):
        killed("BP", "momentum", tmp_path / "killed", part * len(expected["log"]) // 10, 0.01)
    process, connection = start("BP", "momentum", tmp_path / "killed")
    assert connection.recv() == expected
    process.join()
