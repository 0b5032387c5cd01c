"""Pieces: finished work is found again, and nothing else is."""

import math
import multiprocessing
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from torch import nn

from backpass.lab.bench.pieces import Pieces


class Count:
    def __init__(self, value=1.0):
        self.calls, self.value = 0, value

    def __call__(self):
        self.calls += 1
        return self.value


def test_a_finished_piece_is_not_computed_again(tmp_path):
    work = Count([1.5, math.inf, 3])
    assert Pieces(tmp_path).value("run", work, seed=0) == [1.5, math.inf, 3]
    again = Pieces(tmp_path)
    assert again.value("run", work, seed=0) == [1.5, math.inf, 3]
    assert (work.calls, again.found, again.computed) == (1, 1, 0)


def test_nan_comes_back_as_nan(tmp_path):
    for _ in range(2):
        assert math.isnan(Pieces(tmp_path).value("run", Count(math.nan)))


@pytest.mark.parametrize("other", [{"seed": 1}, {"seed": 0, "rule": "bp"}, {}])
def test_other_settings_are_another_piece(tmp_path, other):
    work = Count()
    Pieces(tmp_path).value("run", work, seed=0)
    Pieces(tmp_path).value("run", work, **other)
    assert work.calls == 2


def test_another_version_is_another_piece(tmp_path, monkeypatch):
    work = Count()
    Pieces(tmp_path).value("run", work)
    monkeypatch.setattr("backpass.lab.bench.pieces.__version__", "0.0.0")
    Pieces(tmp_path).value("run", work)
    assert work.calls == 2


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"value": 7}', '{"asked": {}, "value": 7}'])
def test_a_damaged_piece_is_computed_again(tmp_path, damage):
    Pieces(tmp_path).value("run", Count(1.0))
    (file,) = tmp_path.glob("*.json")
    file.write_text(damage)
    assert Pieces(tmp_path).value("run", Count(1.0)) == 1.0


def test_a_failing_piece_leaves_nothing_behind(tmp_path):
    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Pieces(tmp_path).value("run", fail)
    assert not any(tmp_path.glob("*.*"))
    assert Pieces(tmp_path).value("run", Count(2.0)) == 2.0


def test_the_first_run_sees_the_types_that_a_resumed_one_sees(tmp_path):
    pieces = Pieces(tmp_path)
    assert pieces.value("run", lambda: {1: (2, 3)}) == pieces.value("run", lambda: {1: (2, 3)}) == {"1": [2, 3]}


def test_a_trained_network_comes_back_to_the_bit(tmp_path):
    def train(model):
        nn.init.normal_(model.weight)
        return 0.5

    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    assert Pieces(tmp_path).network("net", first, train, seed=0) == 0.5
    assert Pieces(tmp_path).network("net", second, lambda model: pytest.fail("trained again"), seed=0) == 0.5
    assert torch.equal(first.weight, second.weight)


def count_and_compute(folder, rank):
    """Runs in a process of its own; leaves a file for every time that it had to compute."""

    def compute():
        (folder / f"computed by {rank}").touch()
        time.sleep(0.3)
        return 7

    return Pieces(folder).value("run", compute, seed=0)


def test_several_processes_compute_a_piece_once(tmp_path):
    with ProcessPoolExecutor(3, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert list(pool.map(count_and_compute, [tmp_path] * 3, range(3))) == [7, 7, 7]
    assert len(list(tmp_path.glob("computed by *"))) == 1


def test_a_killed_process_does_not_keep_the_others_waiting(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; from backpass.lab.bench.pieces import Pieces;"
        "Pieces(Path(sys.argv[1])).value('run', lambda: os.kill(os.getpid(), signal.SIGKILL))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == -signal.SIGKILL
    assert Pieces(tmp_path).value("run", Count(2.0)) == 2.0


def test_without_a_folder_nothing_is_kept():
    work = Count()
    pieces = Pieces(None)
    pieces.value("run", work)
    pieces.value("run", work)
    assert work.calls == 2
