"""The folder of a run: one run at a time, logs that survive, and a full disk that loses nothing that was whole."""

import errno
import json
import os
import subprocess
import sys
import threading

import pytest

from backpass import BackpassError
from backpass.files import locked, write_whole
from backpass.training import Interrupted
from backpass.training.checkpoint import Checkpoints
from support.training import outcome, trainer

HOLD = """
import pathlib, sys, time
from backpass.files import locked
with locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of a folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


class TestLock:
    def test_the_second_process_is_refused_twenty_times_and_told_who_holds_it(self, holder, tmp_path):
        for resume in (False, True, "auto", False) * 5:
            with pytest.raises(BackpassError, match=f"is in use by process {holder.pid} on .*, since 20"):
                trainer("BP", tmp_path).fit(resume=resume)
        assert [one.name for one in tmp_path.iterdir()] == ["lock"]

    def test_a_killed_process_holds_nothing(self, holder, tmp_path):
        holder.kill()
        holder.wait()
        with locked(tmp_path):
            pass

    def test_another_thread_is_refused_and_the_same_one_may_enter_again(self, tmp_path):
        messages = []

        def other():
            try:
                with locked(tmp_path):
                    messages.append("entered")
            except BackpassError as error:
                messages.append(str(error))

        with locked(tmp_path), locked(tmp_path):
            for _ in range(2):
                thread = threading.Thread(target=other)
                thread.start()
                thread.join()
        with locked(tmp_path):
            pass
        assert all(f"process {os.getpid()}" in one for one in messages)

    def test_a_folder_that_cannot_be_locked_is_named(self, tmp_path, monkeypatch):
        (tmp_path / "a" / "lock").mkdir(parents=True)
        with pytest.raises(BackpassError, match="a cannot be made or locked: Is a directory"):
            trainer("BP", tmp_path / "a").fit()
        with monkeypatch.context() as context:
            full_at(context, "lock", 1)
            with pytest.raises(BackpassError, match="b cannot be made or locked: No space left"):
                trainer("BP", tmp_path / "b").fit()
        trainer("BP", tmp_path / "b").fit()

    def test_it_is_free_after_an_error(self, tmp_path):
        with pytest.raises(ZeroDivisionError):
            trainer("BP", tmp_path, on_step=lambda step: 1 / 0).fit()
        trainer("BP", tmp_path).fit(resume=True)


class TestLog:
    @pytest.fixture
    def expected(self, tmp_path):
        whole = trainer("BP", tmp_path / "whole")
        return outcome(whole, whole.fit())

    def test_a_log_that_was_deleted_replaced_or_cut_is_written_again(self, expected, tmp_path, caplog):
        log = tmp_path / "run" / "log.jsonl"

        def lose(step):
            if step == 4:
                log.unlink()
            if step == 8:
                log.unlink()
                log.write_text("an editor's copy\n")
            if step == 12:
                os.truncate(log, 10)

        run = trainer("BP", tmp_path / "run", on_step=lose)
        assert outcome(run, run.fit()) == expected
        assert caplog.text.count("was deleted or changed by another program: its records are written again") == 3

    def test_a_folder_that_was_deleted_is_made_again(self, expected, tmp_path):
        import shutil

        run = trainer("BP", tmp_path / "run", on_step=lambda step: step == 4 and shutil.rmtree(tmp_path / "run"))
        assert outcome(run, run.fit()) == expected
        assert Checkpoints(tmp_path / "run" / "checkpoints", 2).load()["position"] == [3, 0, 15]


def full_at(monkeypatch, name: str, count: int) -> None:
    """The disk is full when the ``count``-th file of a name is written."""
    import pathlib

    opened, calls = pathlib.Path.open, []

    def limited(self, mode="r", *args, **kwargs):
        if ("w" in mode or "a" in mode) and name in self.name:
            calls.append(self)
            if len(calls) >= count:
                stream = opened(self, mode, *args, **kwargs)
                stream.write(b"ha")  # a part of the bytes still fits
                stream.close()
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return opened(self, mode, *args, **kwargs)

    monkeypatch.setattr(pathlib.Path, "open", limited)


class TestFullDisk:
    @pytest.mark.parametrize(
        ("name", "count", "file"),
        [(".pt.part", 3, "step-00000004.pt"), (".pt.sha256.part", 3, "step-00000004.pt.sha256")],
    )
    def test_a_checkpoint_names_what_is_lost_and_kept_and_how_to_continue(
        self, name, count, file, tmp_path, monkeypatch
    ):
        whole = trainer("BP", tmp_path / "whole")
        expected = outcome(whole, whole.fit())
        with monkeypatch.context() as context:
            full_at(context, name, count)
            with pytest.raises(BackpassError, match=f"{file} cannot be written: No space left") as problem:
                trainer("BP", tmp_path / "run").fit()
        assert "last whole checkpoint" in str(problem.value)
        assert "step-00000002.pt: make room, and continue from step 2 by fit(resume=True)" in str(problem.value)
        left = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
        assert left == {f"step-0000000{step}.pt{end}" for step in (0, 2) for end in ("", ".sha256")}
        run = trainer("BP", tmp_path / "run")
        assert outcome(run, run.fit(resume=True)) == expected

    def test_the_first_checkpoint(self, tmp_path, monkeypatch):
        full_at(monkeypatch, ".pt.part", 1)
        with pytest.raises(BackpassError, match="No checkpoint was written before: make room, and start anew"):
            trainer("BP", tmp_path).fit()
        assert not list(tmp_path.rglob("*.part"))
        assert not list(tmp_path.rglob("*.sha256"))

    @pytest.mark.parametrize("name", ["timing.jsonl", ".run.json.part"])
    def test_other_files_are_named(self, name, tmp_path, monkeypatch):
        with monkeypatch.context() as context:
            full_at(context, name, 1)
            with pytest.raises(BackpassError, match=f"{name.strip('.').removesuffix('.part')} cannot be written"):
                trainer("BP", tmp_path).fit()
        assert not list(tmp_path.rglob("*.part"))
        trainer("BP", tmp_path).fit(resume=True)

    @pytest.mark.parametrize(
        ("name", "kind"), [("log.jsonl", "mkdir"), ("run.json", "mkdir"), ("checkpoints", "touch")]
    )
    def test_what_is_in_the_way_is_named(self, name, kind, tmp_path):
        getattr(tmp_path / name, kind)()
        with pytest.raises(BackpassError, match=f"{name}.* cannot be written"):
            trainer("BP", tmp_path).fit()

    def test_a_record_that_did_not_fit_is_not_in_the_log_after_resumption(self, tmp_path, monkeypatch):
        whole = trainer("BP", tmp_path / "whole")
        expected = outcome(whole, whole.fit())
        run = trainer("BP", tmp_path / "run")

        def broken(path, content):
            with path.open("ab") as stream:
                stream.write(content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

        with monkeypatch.context() as context:
            context.setattr("backpass.training.logs._append", broken)
            with pytest.raises(BackpassError, match=r"log\.jsonl cannot be written: No space.*checkpoints are kept"):
                run.fit()
        assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "interrupted"
        run = trainer("BP", tmp_path / "run")
        assert outcome(run, run.fit(resume=True)) == expected


def test_what_a_killed_process_left_unfinished_is_removed(tmp_path):
    trainer("BP", tmp_path).fit()
    folder = tmp_path / "checkpoints"
    rubbish = [tmp_path / ".run.json.part", folder / ".step-00000020.pt.part", folder / "step-00000020.pt.sha256"]
    for path in rubbish:
        path.write_text("half")
    trainer("BP", tmp_path).fit(resume=True)
    assert not [path for path in rubbish if path.exists()]


def test_no_part_stays_after_any_error(tmp_path):
    with pytest.raises(TypeError):
        write_whole(tmp_path / "file", object())
    assert not list(tmp_path.iterdir())


def test_checkpoints_by_time(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("backpass.training.loop.time.monotonic", lambda: now[0])
    saved = []
    save = Checkpoints.save

    def spy(self, step, state):
        saved.append(step)
        return save(self, step, state)

    monkeypatch.setattr(Checkpoints, "save", spy)

    def tick(step):
        now[0] += 25.0

    trainer("BP", tmp_path, checkpoint_every="1min", on_step=tick).fit()
    assert saved == [0, 3, 5, 8, 10, 13, 15]  # after 75 s, and at the end of each epoch of 5 steps


@pytest.mark.parametrize(("text", "seconds"), [("30s", 30), ("1.5 min", 90), ("2h", 7200)])
def test_times(text, seconds):
    from backpass.training.settings import seconds_between

    assert seconds_between(text) == seconds
    assert seconds_between(7) is None


def test_a_run_that_its_watcher_ends_has_stopped(tmp_path):
    def watch(progress):
        return "good enough" if progress.step >= 6 else None

    result = trainer("BP", tmp_path, on_progress=watch).fit()
    assert (result.steps, result.stopped, result.diverged) == (6, "good enough", None)
    run = json.loads((tmp_path / "run.json").read_text())
    assert (run["status"], run["stopped"]) == ("stopped", "good enough")


def test_max_steps_end_a_run_within_an_epoch_and_evaluations_stand_where_they_were_asked_for(tmp_path):
    result = trainer("BP", tmp_path, max_steps=7, evaluate_at=(0, 3, 7), evaluate_every=None).fit()
    assert result.steps == 7
    assert [one["step"] for one in result.evaluations] == [0, 3, 7]
    assert "evaluation" not in result.history[0]
    again = trainer("BP", tmp_path, max_steps=7, evaluate_at=(0, 3, 7), evaluate_every=None).fit(resume=True)
    assert again.evaluations == result.evaluations


def test_evaluations_are_those_of_an_uninterrupted_run(tmp_path):
    def run(folder, **settings):
        return trainer("BP", tmp_path / folder, evaluate_at=(0, 4, 9), checkpoint_every=1, **settings)

    whole = run("whole")
    expected = outcome(whole, whole.fit())

    def stop(step):
        if step == 5:
            raise Interrupted

    with pytest.raises(Interrupted):
        run("stopped", on_step=stop).fit()
    again = run("stopped")
    assert outcome(again, again.fit(resume=True)) == expected
