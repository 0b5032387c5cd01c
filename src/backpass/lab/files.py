"""Writing files so that a reader sees the old content or the new, never half of it."""

from __future__ import annotations

from pathlib import Path

from backpass.files import write_whole

__all__ = ["write_atomically", "write_bytes_atomically"]


def write_atomically(path: Path, text: str) -> Path:
    """Write ``text`` to ``path`` as UTF-8; a lone surrogate is written as its escape. See `write_bytes_atomically`."""
    return write_bytes_atomically(path, text.encode(errors="backslashreplace"))


def write_bytes_atomically(path: Path, content: bytes) -> Path:
    """Write ``content`` to ``path`` through a temporary neighbour and one rename.

    Args:
        path: the file; missing folders above it are made.
        content: all of it.

    Returns:
        The path that was written.

    Raises:
        OSError: the folder cannot be made or written; what was at ``path`` before is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_whole(path, content)
