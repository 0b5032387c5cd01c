"""Checkpoints are whole or refused."""

import logging

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


def test_a_checkpoint_never_runs_code(tmp_path):
    class Code:
        def __reduce__(self):
            return print, ("code",)

    for value in (Code(), lambda: 1):
        with pytest.raises(BackpassError, match="tensors, numbers, strings"):
            Checkpoints(tmp_path, 1).save(0, {"x": value})
    assert not list(tmp_path.glob("*.pt"))


def test_the_sum_is_that_of_sha256sum_and_the_last_ones_are_kept(tmp_path):
    import hashlib

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
