"""Every outcome is computed once, survives interruptions to the byte, and a failure stops nothing else."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from backpass.errors import BackpassError, UnknownNameError
from backpass.experiments import outcomes
from backpass.experiments.running import run
from backpass.report.reading import read_result
from support.experiments import CALLS, arm, claim, experiment, many, outcome_bytes, table

TESTS = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_calls():
    CALLS.clear()


def done(out, *experiments, **options):
    return list(run(experiments or [experiment()], scale="small", out=out, **options))


def test_a_result_has_findings_tables_plots_claims_and_its_outcomes(tmp_path):
    (one,) = done(tmp_path)
    written = json.loads((tmp_path / "one" / "result.json").read_text())
    assert {"experiment", "scale", "environment", "settings", "series", "claims", "numbers", "sha256"} <= set(written)
    (judged,) = written["claims"]
    assert (judged["id"], judged["verdict"], judged["published"]) == ("one.up-down", "same direction", "3 points")
    assert judged["estimate"] == pytest.approx(3)
    assert written["settings"]["chosen"] == {"up": "3"}
    assert [row[:3] for row in written["tables"][0]["rows"]] == [
        ["up", "1", ""], ["up", "3", "chosen, at the edge"], ["down", "0", ""]
    ]  # fmt: skip
    assert [curve["label"] for curve in written["series"][0]["curves"]] == ["up, 3", "down"]
    assert written["findings"][0]["topic"] == "up, 3 against down"
    assert len(written["numbers"]["outcomes"]) == 2 * 3 * 4
    assert one.result.environment["seconds"] >= 0
    html = (tmp_path / "one" / "report.html").read_text()
    assert "same direction" in html
    assert read_result(tmp_path / "one" / "result.json").as_json() == one.result.as_json()


def test_a_finished_experiment_is_kept_and_run_again_when_asked(tmp_path):
    assert [one.kept for one in done(tmp_path)] == [False]
    assert len(CALLS) == 12
    assert [one.kept for one in done(tmp_path)] == [True]
    assert len(CALLS) == 12
    before = outcome_bytes(tmp_path)
    assert [one.kept for one in done(tmp_path, recompute=True)] == [False]
    assert len(CALLS) == 24
    assert outcome_bytes(tmp_path) == before


def test_experiments_share_the_outcomes_of_equal_arms(tmp_path):
    first, second = experiment(), experiment("two", table(arm("other name", 0.0), arm("new", 5.0), seeds=4))
    done(tmp_path, first, second)
    assert sorted(CALLS) == sorted((shift, seed) for shift in (0.0, 1.0, 3.0, 5.0) for seed in range(4))


def test_a_changed_claim_is_judged_again_without_running_anything(tmp_path):
    done(tmp_path)
    CALLS.clear()
    turned = experiment(scale=table(arm("up", 1.0, 3.0), arm("down", 0.0), claims=[claim("down", "up")]))
    (one,) = done(tmp_path, turned)
    assert (one.kept, CALLS) == (False, [])
    assert one.result.claims[0].verdict == "opposite direction"


@pytest.mark.parametrize("survivors", [0, 1, 2, 3, 7, 23])
def test_an_interrupted_experiment_goes_on_to_the_same_bytes(tmp_path, monkeypatch, survivors):
    written, whole = [], outcomes.write_whole

    def write(path, content):
        if len(written) == survivors:
            raise KeyboardInterrupt
        written.append(path)
        return whole(path, content)

    monkeypatch.setattr(outcomes, "write_whole", write)
    with pytest.raises(KeyboardInterrupt):
        done(tmp_path / "a")
    monkeypatch.undo()
    assert not (tmp_path / "a" / "one").exists()
    CALLS.clear()
    done(tmp_path / "a")
    assert len(CALLS) == 12 - survivors // 2
    done(tmp_path / "b")
    assert outcome_bytes(tmp_path / "a") == outcome_bytes(tmp_path / "b")


def test_a_damaged_outcome_is_computed_again(tmp_path):
    done(tmp_path)
    before = outcome_bytes(tmp_path)
    for name, damage in zip(
        before, (b"", b"{}", b'{"values": 3}', before[min(before)].replace(b"0", b"1")), strict=False
    ):
        (tmp_path / "outcomes" / name).write_bytes(damage)
    CALLS.clear()
    done(tmp_path)
    assert len(CALLS) == 4
    assert outcome_bytes(tmp_path) == before


def test_one_that_fails_does_not_stop_the_others(tmp_path):
    broken = experiment("broken", table(arm("fails", 0.0, fails=True)))
    found = {one.name: one for one in done(tmp_path, broken, experiment())}
    assert found["broken"].reason == "fails 0, seed 0: it fails on purpose"
    assert found["one"].result.claims
    assert not (tmp_path / "broken").exists()


def test_unknown_scales_and_missing_data_are_reported_before_anything_runs(tmp_path):
    with pytest.raises(UnknownNameError, match="small"):
        list(run([experiment()], scale="smal", out=tmp_path))
    with pytest.raises(BackpassError, match="no-such-data"):
        done(tmp_path, experiment(), experiment("two", data=("no-such-data",)))
    with pytest.raises(BackpassError, match="jobs must be at least 1"):
        done(tmp_path, jobs=0)
    assert CALLS == []


@pytest.mark.slow
def test_side_by_side_the_outcomes_are_those_of_one_by_one(tmp_path):
    told = []
    pairs = [done(tmp_path / str(jobs), many(), jobs=jobs, progress=told.append) for jobs in (1, 2)]
    assert pairs[0][0].result.claims == pairs[1][0].result.claims
    assert outcome_bytes(tmp_path / "1") == outcome_bytes(tmp_path / "2")
    assert told[-1].endswith("60 of 60")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the runs are children that are forked")
def test_killed_at_ten_random_moments_the_outcomes_have_the_same_bytes(tmp_path):
    program = "from support.experiments import run_and_be_killed; run_and_be_killed(10)"
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "a")], cwd=TESTS, check=True, timeout=300)
    assert outcome_bytes(tmp_path / "a")
    assert not (tmp_path / "a" / "many").exists()
    done(tmp_path / "a", many())
    done(tmp_path / "b", many())
    assert outcome_bytes(tmp_path / "a") == outcome_bytes(tmp_path / "b")
    first, second = (read_result(tmp_path / out / "many" / "result.json").claims for out in "ab")
    assert first == second


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are found through /proc")
def test_an_interrupted_command_leaves_no_process_behind(tmp_path):
    pytest.importorskip("typer")
    command = [sys.executable, "-m", "backpass", "reproduce", "linbp-fig3", "linbp-fig4"]
    # A suite that a shell runs in the background would hand down that Ctrl-C is ignored.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    command += ["--jobs", "2", "--out", str(tmp_path)]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, preexec_fn=heed)
    threads, workers = Path(f"/proc/{running.pid}/task"), []
    while running.poll() is None and len(workers) < 3:  # two workers, and the one that tracks resources
        time.sleep(0.1)
        with suppress(OSError):  # a thread has just ended
            workers = [pid for thread in threads.iterdir() for pid in (thread / "children").read_text().split()]
    running.send_signal(signal.SIGINT)
    assert running.wait(60) == 130
    errors = running.stderr.read().decode()
    assert not re.search(r"Traceback \(most recent call last\):\n.*backpass/cli", errors)
    deadline = time.monotonic() + 30
    while (left := [pid for pid in workers if Path(f"/proc/{pid}").exists()]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []
