"""Cache of decoded data sets: memory-mapped files, found by a hash of their source.

A file is a line of JSON (shape, formats, digest) padded to 4096 bytes, then the pixels, then the labels: numbers only.
Every byte is checked against the digest when the file has changed since it was checked last, by size or by its times.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backpass.data.decode import Decoded
from backpass.files import write_whole

__all__ = ["cache_folder", "cached", "content_key"]

_LOG = logging.getLogger(__name__)
_LAYOUT = 3  # version of the files' layout and of the decoding; part of every key
_HEADER = 4096


def cache_folder() -> Path:
    """Return ``$BACKPASS_CACHE``, else ``$XDG_CACHE_HOME/backpass``, else ``backpass`` in the platform's cache."""
    if own := os.environ.get("BACKPASS_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    if base is None and sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA")
    usual = "Library/Caches" if sys.platform == "darwin" else ".cache"
    return (Path(base) if base else Path.home() / usual) / "backpass"


def content_key(files: Iterable[Path], words: Iterable[str]) -> str:
    """Return a hash of the bytes of files, in their order, and of the settings by which they are read."""
    key = hashlib.blake2b(f"{_LAYOUT}".encode(), digest_size=16)
    for word in words:
        key.update(b"\0" + word.encode(errors="surrogatepass"))
    for path in files:
        with path.open("rb") as file:
            key.update(hashlib.file_digest(file, "blake2b").digest())
    return key.hexdigest()


def cached(key: str, make: Callable[[], Decoded]) -> Decoded:
    """Return the data set of this key, mapped from the cache, or made and stored there.

    The tensors are copy-on-write: changes stay in this process. A damaged file is made again. Where the cache cannot be
    written, the data set is made each time.
    """
    path = cache_folder() / "data" / f"{key}.images"
    found = _read(path)
    if found is not None:
        return found
    made = make()
    try:
        _write(path, made)
    except OSError as error:
        _LOG.warning("the decoded images cannot be kept in %s, so they are decoded every time: %s", path, error)
        return made
    return _read(path) or made


def _write(path: Path, made: Decoded) -> None:
    head = {"shape": list(made.pixels.shape), "formats": list(made.formats)}
    pixels, labels = _bytes(made.pixels), _bytes(made.labels)
    line = json.dumps({**head, "digest": _digest(head, pixels, labels)}).encode()
    padding = bytes(_padding(made.pixels.numel()))
    write_whole(path, b"".join([line.ljust(_HEADER - 1), b"\n", pixels, padding, labels]))
    _note_checked(path)


def _read(path: Path) -> Decoded | None:
    """Return what `_write` wrote, or None where there is no such file or it is damaged."""
    try:
        return _map(path)
    except FileNotFoundError:
        return None
    except (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        _LOG.warning("%s is damaged (%s); the images are decoded anew.", path, error)
        return None


def _map(path: Path) -> Decoded:
    with path.open("rb") as file:
        head = json.loads(file.read(_HEADER))
    digest, shape = head.pop("digest"), head["shape"]
    count = math.prod(shape)
    first_label = _HEADER + count + _padding(count)
    size = first_label + torch.int64.itemsize * shape[0]
    if path.stat().st_size != size:
        raise ValueError(f"{path.stat().st_size} bytes instead of {size}")
    whole = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    pixels, labels = whole[_HEADER : _HEADER + count].view(shape), whole[first_label:].view(torch.int64)
    if not _was_checked(path):
        if _digest(head, _bytes(pixels), _bytes(labels)) != digest:
            raise ValueError("its content does not have its digest")
        _note_checked(path)
    return Decoded(pixels, labels, tuple(head["formats"]))


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().numpy().data


def _digest(head: dict[str, Any], pixels: memoryview, labels: memoryview) -> str:
    digest = hashlib.blake2b(json.dumps(head, sort_keys=True).encode(), digest_size=16)
    digest.update(pixels)
    digest.update(labels)
    return digest.hexdigest()


def _padding(count: int) -> int:
    """Return the number of bytes after the pixels that align the labels."""
    return -count % torch.int64.itemsize


def _stamp(path: Path) -> str:
    """Return a text that changes when the file is written, truncated, replaced or touched."""
    now = path.stat()
    return f"{now.st_size} {now.st_mtime_ns} {now.st_ctime_ns} {now.st_ino}"


def _was_checked(path: Path) -> bool:
    try:
        return path.with_suffix(".checked").read_text() == _stamp(path)
    except (OSError, ValueError):
        return False


def _note_checked(path: Path) -> None:
    """Store that the file was checked; if that fails, it is checked again next time."""
    try:
        write_whole(path.with_suffix(".checked"), _stamp(path))
    except OSError as error:
        _LOG.debug("no note of the check of %s: %s", path, error)
