"""Several processes learn what one process learns from the union of their batches."""

import logging
import os
import signal

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from backpass import SIBP, BackpassError, LinBP, ProxProp
from backpass.attacks import PGD
from backpass.training import AdversarialTraining, ControlledLR, Interrupted, Trainer, half_losses
from support.processes import in_processes

CASES = {
    "BP": {},
    "LinBP": {"rules": (LinBP(start=-1),)},
    "ProxProp union": {"rules": (ProxProp(tau=0.5, solve="step"),)},
    "PGD-AT": {"objective": AdversarialTraining(PGD(eps=0.1, step=0.05, steps=3))},
    "TRADES and LinBP": {
        "objective": AdversarialTraining(PGD(eps=0.1, step=0.05, steps=3), rule=LinBP(start=-1), trades=2.0),
        "rules": (LinBP(start=-1),),
    },
    "accumulated, clipped, averaged": {"accumulate": 2, "clip_norm": 0.5, "average": "ema:0.5"},
    "a short last batch": {"drop_last": False, "batch_size": 18},
}


def make(settings: dict, folder=None, **more) -> Trainer:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, 3))
    model = model.double()
    x, y = torch.rand(45, 1, 6, 6, dtype=torch.float64), torch.arange(45) % 3
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    # 11 samples: 5 and 6 of them.
    settings = {"epochs": 2, "batch_size": 11, "evaluation": (x[:25], y[:25]), "log_every": 3, **settings, **more}
    return Trainer(model, optimizer, (x, y), folder=folder, **settings)


def learned(rank: int, settings: dict) -> tuple[list[float], list[dict]]:
    trainer = make(settings)
    result = trainer.fit()
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    averaged = [one.flatten() for one in (result.averaged or {}).values()]
    return torch.cat([weights, *averaged]).tolist(), result.history


def flat(value) -> list[float]:
    if isinstance(value, dict):
        return [one for key in sorted(value) if key != "kind" for one in flat(value[key])]
    return [float(value)]


def resumed(rank: int, folder: str) -> tuple[list[float], str]:
    def whole(name: str, **more) -> Trainer:
        return make({}, f"{folder}/{name}", **more)

    expected = whole("whole", dtype=torch.bfloat16)
    expected.fit()
    stopped = whole("stopped", dtype=torch.bfloat16, on_progress=lambda progress: stop(progress.step))
    try:
        stopped.fit()
    except Interrupted as error:
        message = str(error)
    again = whole("stopped", dtype=torch.bfloat16)
    again.fit(resume=True)
    pairs = zip(again.model.parameters(), expected.model.parameters(), strict=True)
    return [float((a - b).abs().max()) for a, b in pairs], message


def stop(step: int) -> None:
    if step == 6:
        os.kill(os.getpid(), signal.SIGTERM)


def refusals(rank: int, folder: str) -> list[str]:
    messages = []
    synchronized = make({})
    synchronized.model[2] = nn.Sequential(nn.SyncBatchNorm(3, affine=False).double(), nn.Flatten())
    for trainer, resume in (
        (synchronized, False),
        (make({"rules": (SIBP(),)}), False),
        (make({"batch_size": 1}), False),
        (make({}, f"{folder}/nothing"), True),
    ):
        try:
            trainer.fit(resume=resume)
        except BackpassError as error:
            messages.append(str(error))
    return messages


def warnings_of_batch_norm(rank: int) -> list[str]:
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("backpass.training").addHandler(handler)
    trainer = make({"epochs": 1})
    trainer.model[2] = nn.Sequential(nn.BatchNorm2d(3, affine=False).double(), nn.Flatten())
    trainer.fit()
    return messages


def measured(rank: int, size: int) -> list[float]:
    """Numbers of a learning rate that measures halves of the batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(16, width, generator=generator, dtype=torch.float64) for width in (3, 1))
    each = 8 // size  # every process has its part of both halves
    rows = torch.cat([torch.arange(rank * each, (rank + 1) * each) + half for half in (0, 8)])
    scheduler = ControlledLR(torch.optim.SGD(model.parameters(), lr=0.5))
    for _ in range(12):
        scheduler.measure(half_losses(model, F.mse_loss, x[rows], y[rows]))
    return [*scheduler.measured, scheduler.inverse]


def everything(rank: int, folder: str) -> dict:
    return {
        "warnings": warnings_of_batch_norm(rank),
        "learned": {case: learned(rank, settings) for case, settings in CASES.items()},
        "resumed": resumed(rank, folder),
        "refusals": refusals(rank, folder),
        "measured": measured(rank, 2),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def by_two(folder):
    # Two processes take seconds to start, so they are started once.
    return in_processes(2, everything, str(folder))


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(case, by_two):
    weights, history = learned(0, CASES[case])
    for process in by_two:
        found, found_history = process["learned"][case]
        assert found == pytest.approx(weights, rel=0, abs=1e-9)
        for a, b in zip(found_history, history, strict=True):
            assert flat(a) == pytest.approx(flat(b), abs=1e-9)


def test_two_processes_measure_what_one_does(by_two):
    for process in by_two:
        assert process["measured"] == pytest.approx(measured(0, 1), rel=1e-9)


def test_a_signal_to_one_process_stops_all_and_they_resume_to_the_bit(by_two, folder):
    for process in by_two:
        gaps, message = process["resumed"]
        assert set(gaps) == {0.0}
        assert "step 6" in message
    logs = [(folder / name / "log.jsonl").read_bytes() for name in ("whole", "stopped")]
    assert logs[0] == logs[1]


def test_what_cannot_be_is_refused_in_every_process(by_two):
    for process in by_two:
        norm, rule, size, nothing = process["refusals"]
        assert "SyncBatchNorm for GPUs only" in norm
        assert "2 processes contribute" in rule
        assert "cannot be shared by 2 processes" in size
        assert "no checkpoint" in nothing


def test_batch_norm_over_parts_is_warned_of(by_two):
    for process in by_two:
        (message,) = process["warnings"]
        assert "SyncBatchNorm" in message


def test_a_run_of_two_processes_is_not_resumed_by_one(by_two, folder):
    with pytest.raises(BackpassError, match="processes: was 2, is 1"):
        make({}, folder / "whole", dtype=torch.bfloat16).fit(resume=True)
