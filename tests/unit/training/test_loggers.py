"""Loggers get the numbers of every record, and continue after a resumption."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest

from backpass import BackpassError
from backpass.training import Interrupted
from support.training import trainer


class Listing:
    def __init__(self):
        self.calls = []

    def open(self, folder, settings, step):
        self.calls.append(("open", step, settings["seed"]))

    def log(self, step, numbers):
        self.calls.append(("log", step, dict(numbers)))

    def close(self):
        self.calls.append(("close",))


def interrupted_at(step, folder, **settings):
    def stop(now):
        if now == step:
            raise Interrupted

    with pytest.raises(Interrupted):
        trainer("BP", folder, on_step=stop, **settings).fit()


def test_a_logger_of_ones_own_gets_what_the_log_has(tmp_path):
    listing = Listing()
    trainer("BP", tmp_path, loggers=(listing,)).fit()
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert listing.calls[0] == ("open", 0, 7)
    assert listing.calls[-1] == ("close",)
    logged = listing.calls[1:-1]
    assert [step for _, step, _ in logged] == [record["step"] for record in records]
    assert logged[0][2]["step/loss"] == records[0]["loss"]
    assert logged[-1][2]["epoch/evaluation/accuracy"] == records[-1]["evaluation"]["accuracy"]


def test_a_logger_is_closed_after_an_error_and_told_where_the_run_continues(tmp_path):
    listing = Listing()
    interrupted_at(7, tmp_path, loggers=(listing,))
    assert listing.calls[-1] == ("close",)
    listing = Listing()
    trainer("BP", tmp_path, loggers=(listing,)).fit(resume=True)
    assert listing.calls[0] == ("open", 6, 7)  # the last checkpoint


def fake_wandb(calls):
    module = ModuleType("wandb")

    def init(**settings):
        calls.append(("init", settings))
        return SimpleNamespace(
            log=lambda numbers, step: calls.append(("log", step, numbers)), finish=lambda: calls.append(("finish",))
        )

    module.init = init
    return module


def fake_mlflow(calls):
    module = ModuleType("mlflow")

    def start_run(run_id, run_name):
        calls.append(("start", run_id))
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id or "r1"))

    module.start_run = start_run
    module.log_dict = lambda settings, name: calls.append(("settings", settings["seed"]))
    module.log_metrics = lambda numbers, step: calls.append(("log", step, numbers))
    module.end_run = lambda: calls.append(("end",))
    return module


def test_weights_and_biases_continues_one_run(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(calls))
    interrupted_at(7, tmp_path, loggers=("wandb",))
    trainer("BP", tmp_path, loggers=("wandb",)).fit(resume=True)
    begun = [call[1] for call in calls if call[0] == "init"]
    assert begun[0]["id"] == begun[1]["id"]
    assert begun[0]["resume"] == "allow"
    assert begun[0]["config"]["seed"] == 7
    assert [call[0] for call in calls].count("finish") == 2
    assert [call for call in calls if call[0] == "log"][-1][1] == 15


def test_mlflow_continues_one_run(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setitem(sys.modules, "mlflow", fake_mlflow(calls))
    interrupted_at(7, tmp_path, loggers=("mlflow",))
    trainer("BP", tmp_path, loggers=("mlflow",)).fit(resume=True)
    assert [call for call in calls if call[0] == "start"] == [("start", None), ("start", "r1")]
    assert calls.count(("settings", 7)) == 1
    last = [call for call in calls if call[0] == "log"][-1]
    assert last[1] == 15
    assert 0 <= last[2]["epoch/evaluation/accuracy"] <= 1


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_package_that_is_not_installed_is_named(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BackpassError, match=f"pip install {name}"):
        trainer("BP", tmp_path, loggers=(name,)).fit()
