"""A reader sees the old file or the new one, never half of it."""

import os

import pytest

from backpass.files import write_whole


def test_it_makes_the_folders_and_writes_utf8(tmp_path):
    path = write_whole(tmp_path / "a" / "b" / "page.html", "naïve ±")
    assert path.read_text(encoding="utf-8") == "naïve ±"
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failure_on_the_way_keeps_the_old_file_and_leaves_no_litter(tmp_path, monkeypatch, step):
    path = write_whole(tmp_path / "result.json", "old")

    def fails(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(os, step, fails)
    with pytest.raises(OSError, match="disk full"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
