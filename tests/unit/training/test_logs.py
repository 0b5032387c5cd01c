"""What a run writes."""

import json
import math

import pytest

from support.training import trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    trainer("adversarial", folder, loggers=("tensorboard",), clip_norm=1.0).fit()
    return folder


def lines(folder, name="log.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_records_of_steps_and_epochs(folder):
    records = lines(folder)
    assert [(one["kind"], one["step"], one["epoch"]) for one in records] == [
        *[("step", 3, 1), ("step", 5, 1), ("epoch", 5, 1)],
        *[("step", 6, 2), ("step", 9, 2), ("step", 10, 2), ("epoch", 10, 2)],
        *[("step", 12, 3), ("step", 15, 3), ("epoch", 15, 3)],
    ]
    for one in records:
        assert one["loss"] > 0
        assert 0 <= one["accuracy"] <= 1
        assert 0 <= one["adversarial_accuracy"] <= 1
    rate = 0.05 * (1 + math.cos(math.pi * 3 / 15)) / 2
    assert records[0]["lr"] == pytest.approx(rate)
    assert records[0]["gradient_norm"] > 0
    assert records[-1]["evaluation"].keys() == records[-1]["averaged"].keys() == {"loss", "accuracy"}


def test_seconds_are_in_a_file_of_their_own(folder):
    assert "seconds" not in (folder / "log.jsonl").read_text()
    timing = lines(folder, "timing.jsonl")
    assert [(one["kind"], one["step"]) for one in timing] == [(one["kind"], one["step"]) for one in lines(folder)]
    assert timing[0]["seconds"] <= timing[-1]["seconds"]


def test_the_state_of_the_run(folder):
    run = json.loads((folder / "run.json").read_text())
    assert run["status"] == "finished"
    assert (run["epoch"], run["step"], run["diverged"]) == (3, 15, None)
    assert run["settings"]["batch_size"] == 24
    assert run["settings"]["objective"]["attack"]["eps"] == 0.1
    assert run["environment"]["torch"]
    assert run["last"]["evaluation"] == lines(folder)[-1]["evaluation"]


def test_tensorboard_has_the_same_numbers(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    found = {(one.step, round(one.value, 5)) for one in events.Scalars("epoch/evaluation/accuracy")}
    assert found == {
        (one["step"], round(one["evaluation"]["accuracy"], 5)) for one in lines(folder) if one["kind"] == "epoch"
    }
