"""Decoded data sets on disk: written whole or not at all, found again by the content they were decoded from."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from backpass.lab.data.decode import Decoded

__all__ = ["cache_folder", "cached", "content_key"]

_LAYOUT = 1  # of the files below; another number makes other keys


def cache_folder() -> Path:
    """``$BACKPASS_CACHE``, else ``$XDG_CACHE_HOME/backpass``, else ``~/.cache/backpass``."""
    if own := os.environ.get("BACKPASS_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "backpass"


def content_key(files: Iterable[Path], words: Iterable[str]) -> str:
    """A hash of the bytes of files, in their order, and of words that say how they are read."""
    key = hashlib.blake2b(f"{_LAYOUT}".encode(), digest_size=16)
    for word in words:
        key.update(b"\0" + word.encode())
    for path in files:
        with path.open("rb") as file:
            key.update(hashlib.file_digest(file, "blake2b").digest())
    return key.hexdigest()


def cached(key: str, make: Callable[[], Decoded]) -> Decoded:
    """The data set of this key, from the cache's memory-mapped file, or made and kept there.

    A cache that cannot be written costs only time: the data set is made anew.
    """
    path = cache_folder() / "data" / f"{key}.pt"
    found = _read(path)
    if found is not None:
        return found
    made = make()
    content = {"pixels": made.pixels, "labels": made.labels, "formats": list(made.formats)}
    try:
        _write(path, content)
    except OSError:
        return made
    return made


def _read(path: Path) -> Decoded | None:
    """What `_write` wrote; nothing where there is no such file or it is damaged."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return Decoded(content["pixels"], content["labels"], tuple(content["formats"]))
    except (OSError, RuntimeError, KeyError, TypeError, EOFError, ValueError):
        return None


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
    partial = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
