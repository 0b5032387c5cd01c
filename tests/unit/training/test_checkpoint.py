"""Checkpoints are whole or refused."""

import hashlib
import io
import logging
import pickle

import pytest
import torch

from backpass import BackpassError
from backpass.files import write_whole
from backpass.training.checkpoint import Checkpoints
from support.training import outcome, trainer


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "emptied": lambda path: path.write_bytes(b""),
    "a bit flipped": flip_a_bit,
    "without its sum": lambda path: path.with_name(f"{path.name}.sha256").unlink(),
    "with a damaged sum": lambda path: path.with_name(f"{path.name}.sha256").write_bytes(b"\xff\xfe\x00"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(damage, tmp_path, caplog):
    whole = trainer("BP", tmp_path)
    expected = outcome(whole, whole.fit())
    before, last = sorted((tmp_path / "checkpoints").glob("*.pt"))
    DAMAGES[damage](last)
    again = trainer("BP", tmp_path)
    with caplog.at_level(logging.WARNING):
        assert outcome(again, again.fit(resume=True)) == expected
    assert str(last) in caplog.text
    assert str(before) not in caplog.text
    assert Checkpoints(tmp_path / "checkpoints", 2).load()["position"] == [3, 0, 15]


def test_no_whole_checkpoint_is_an_error(tmp_path):
    trainer("BP", tmp_path).fit()
    for path in (tmp_path / "checkpoints").glob("*.pt"):
        flip_a_bit(path)
    with pytest.raises(BackpassError, match="no checkpoint in .* is whole"):
        trainer("BP", tmp_path).fit(resume=True)


class Touch:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def saved(content):
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def test_a_checkpoint_with_code_is_not_written(tmp_path):
    for value in (Touch(tmp_path / "written"), lambda: 1):
        with pytest.raises(BackpassError, match="tensors, numbers, strings"):
            Checkpoints(tmp_path / "run", 1).save(0, {"x": value})
    assert not list(tmp_path.rglob("*.pt"))
    assert not (tmp_path / "written").exists()


CONTENTS = {
    "pickled code": (lambda path: pickle.dumps(Touch(path)), "without running code"),
    "code": (lambda path: saved({"model": Touch(path)}), "without running code"),
    "words": (lambda path: b"words", "start anew"),
    "another dict": (lambda path: saved({"x": 1}), "Start anew"),
    "a list": (lambda path: saved([1]), "Start anew"),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", CONTENTS)
def test_a_checkpoint_of_something_else_is_refused_and_not_run(kind, tmp_path):
    trainer("BP", tmp_path).fit()
    make, message = CONTENTS[kind]
    content = make(tmp_path / "written")
    for path in (tmp_path / "checkpoints").glob("*.pt"):
        path.write_bytes(content)
        path.with_name(path.name + ".sha256").write_text(f"{hashlib.sha256(content).hexdigest()}  {path.name}\n")
    with pytest.raises(BackpassError, match=message):
        trainer("BP", tmp_path).fit(resume=True)
    assert not (tmp_path / "written").exists()


def test_a_log_that_was_lost_is_not_filled_with_zeros(tmp_path, caplog):
    trainer("BP", tmp_path, epochs=2).fit()
    (tmp_path / "log.jsonl").unlink()
    trainer("BP", tmp_path).fit(resume=True)
    assert b"\0" not in (tmp_path / "log.jsonl").read_bytes()
    assert "records are missing" in caplog.text


def test_the_sum_is_that_of_sha256sum_and_the_last_ones_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, 2)
    for step in (1, 5, 10):
        path = checkpoints.save(step, {"step": step})
    assert checkpoints.steps() == [5, 10]
    assert {one.name for one in tmp_path.iterdir()} == {
        name for step in (5, 10) for name in (f"step-{step:08d}.pt", f"step-{step:08d}.pt.sha256")
    }
    line = path.with_name(path.name + ".sha256").read_text()
    assert line == f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"


def test_a_file_is_written_whole_or_stays(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, b"before")

    def crash(descriptor: int) -> None:
        raise OSError("power cut")

    monkeypatch.setattr("os.fsync", crash)
    with pytest.raises(OSError, match="power cut"):
        write_whole(path, b"after")
    assert path.read_bytes() == b"before"


def test_the_weights_of_a_checkpoint_load_into_the_model(tmp_path):
    run = trainer("BP", tmp_path)
    run.fit()
    state = torch.load(tmp_path / "checkpoints" / "step-00000015.pt", weights_only=True)["model"]
    assert all(torch.equal(state[name], value) for name, value in run.model.state_dict().items())
