"""Decoded images on disk: mapped, never half written, and damage is seen."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from backpass.data import cache, load_data
from backpass.data.cache import cached
from backpass.data.decode import Decoded
from support.pictures import parquet, picture


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BACKPASS_CACHE", str(tmp_path / "cache"))


def images(count=3, shape=(3, 5, 7)):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, *shape), dtype=torch.uint8, generator=generator)
    return Decoded(pixels, torch.arange(count), ("JPEG", "PNG"))


def only_file(tmp_path):
    (path,) = (tmp_path / "cache" / "data").glob("*.images")
    return path


def fail():
    pytest.fail("made again")


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 5, 7), (1, 1, 1)])
def test_what_comes_back_is_what_was_made(shape):
    made = images(3, shape)
    cached("key", lambda: made)
    found = cached("key", fail)
    assert torch.equal(found.pixels, made.pixels)
    assert torch.equal(found.labels, made.labels)
    assert (found.pixels.dtype, found.labels.dtype, found.formats) == (torch.uint8, torch.int64, made.formats)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux says what of a file is in memory")
def test_a_second_load_maps_the_file_and_does_not_read_it(tmp_path):
    cached("key", lambda: images(2000, (3, 32, 32)))
    script = """
import sys
from backpass.data.cache import cached
found = cached("key", lambda: sys.exit("made again"))
found.labels.max()
lines = open("/proc/self/smaps").read().splitlines()
at = next(i for i, line in enumerate(lines) if line.endswith("key.images"))
size, resident = (next(int(l.split()[1]) for l in lines[at:] if l.startswith(word)) for word in ("Size:", "Rss:"))
print(size, resident)
"""
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    size, resident = map(int, said.split())
    assert size >= 2000 * 3 * 32 * 32 / 1024
    assert resident < size / 10


def test_what_a_caller_writes_stays_with_the_caller():
    cached("key", images).pixels.zero_()
    assert torch.equal(cached("key", fail).pixels, images().pixels)


@pytest.mark.parametrize("where", [3, 20, 60, 4096, 4096 + 100, -1])
def test_a_flipped_bit_is_seen_wherever_it_is(tmp_path, where):
    cached("key", images)
    path = only_file(tmp_path)
    content, was = bytearray(path.read_bytes()), path.stat()
    content[where] ^= 4
    path.write_bytes(content)
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))
    again = []
    found = cached("key", lambda: again.append(1) or images())
    assert again == [1]
    assert torch.equal(found.pixels, images().pixels)
    assert torch.equal(cached("key", fail).labels, images().labels)


@pytest.mark.parametrize("left", [0, 10, 4095, 4096, 4300])
def test_a_cut_file_is_seen(tmp_path, left, caplog):
    cached("key", images)
    path = only_file(tmp_path)
    path.write_bytes(path.read_bytes()[:left])
    assert torch.equal(cached("key", images).pixels, images().pixels)
    assert "is damaged" in caplog.text


def test_a_file_that_was_copied_is_checked_once_and_then_mapped(tmp_path, monkeypatch):
    cached("key", images)
    path = only_file(tmp_path)
    path.write_bytes(path.read_bytes())
    cached("key", fail)
    monkeypatch.setattr(cache, "_digest", lambda *_: pytest.fail("checked again"))
    assert torch.equal(cached("key", fail).pixels, images().pixels)


def test_processes_that_write_at_the_same_time_leave_one_whole_file(tmp_path):
    script = """
import torch
from backpass.data.cache import cached
from backpass.data.decode import Decoded
for key in range(30):
    pixels = torch.full((400, 3, 16, 16), key, dtype=torch.uint8)
    found = cached(f"key{key}", lambda: Decoded(pixels, torch.arange(400), ("PNG",)))
    assert torch.equal(found.pixels, pixels) and torch.equal(found.labels, torch.arange(400))
"""
    running = [subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE) for _ in range(3)]
    for process in running:
        _, errors = process.communicate()
        assert (process.returncode, errors) == (0, b"")
    left = [path.name for path in (tmp_path / "cache" / "data").iterdir()]
    assert sorted(left) == sorted(f"key{key}.{kind}" for key in range(30) for kind in ("images", "checked"))


def test_images_are_decoded_once(tmp_path, monkeypatch):
    content, pixels = picture(1)
    parquet(tmp_path / "d" / "test-0.parquet", [content], [3])
    load_data(str(tmp_path / "d"))
    monkeypatch.setattr("backpass.data.parquet.decode", lambda _: pytest.fail("decoded again"))
    (tmp_path / "d").rename(tmp_path / "moved")  # the cache goes by content, not by name
    again = load_data(str(tmp_path / "moved"))
    assert torch.equal(again.images.pixels[0], pixels)
    assert again.images.labels.tolist() == [3]


def test_changed_content_is_decoded_anew(tmp_path):
    path = tmp_path / "test-0.parquet"
    (one, _), (two, pixels) = picture(1), picture(2)
    parquet(path, [one], [0])
    load_data(str(tmp_path))
    was = path.stat()
    parquet(path, [two], [0])
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert torch.equal(load_data(str(tmp_path)).images.pixels[0], pixels)


def test_a_cache_that_cannot_be_written_does_no_harm(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("BACKPASS_CACHE", str(tmp_path / "file"))
    assert torch.equal(cached("key", images).pixels, images().pixels)
    assert "decoded every time" in caplog.text


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    assert cache.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("BACKPASS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.cache_folder() == tmp_path / "backpass"
    monkeypatch.delenv("XDG_CACHE_HOME")
    for platform, folder in (("linux", ".cache"), ("darwin", "Library/Caches")):
        monkeypatch.setattr("sys.platform", platform)
        assert cache.cache_folder() == Path.home() / folder / "backpass"
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert cache.cache_folder() == tmp_path / "local" / "backpass"
