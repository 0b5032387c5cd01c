"""Files that are written whole or not at all, and folders that one process at a time uses."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from backpass.errors import BackpassError

__all__ = ["locked", "write_whole"]

_HELD: dict[str, tuple[int, str]] = {}  # by path: the thread of this process, and the holder's description
_GUARD = threading.Lock()


def write_whole(path: Path, content: bytes | str) -> Path:
    """Write a file so that after a crash at any moment it is there as a whole, or as it was before.

    Args:
        path: the file; missing folders above it are made.
        content: all of it; text is written as UTF-8, and a lone surrogate in it as its escape.

    Returns:
        The path.

    Raises:
        OSError: the file cannot be written; its name is in the error, and no part of it stays.
    """
    if isinstance(content, str):
        content = content.encode(errors="backslashreplace")
    path.parent.mkdir(parents=True, exist_ok=True)
    # Threads and processes that write the same file do not share a temporary one.
    temporary = path.with_name(f".{os.getpid()}-{threading.get_ident()}.{path.name}.part")
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        raise
    if os.name != "nt":  # there, folders cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    return path


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which is created if needed; the thread that holds it may ask again.

    The operating system releases the lock when the process ends, also by ``kill -9``. It is not inherited by child
    processes.

    Raises:
        BackpassError: another run holds it, with the name of the process; or the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(folder, error) from error
    key, thread = str(folder.resolve()), threading.get_ident()
    holder = f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"
    with _GUARD:
        owner, described = _HELD.get(key, (None, ""))
        if owner not in (None, thread):
            raise _in_use(folder, described)
        if owner is None:
            try:
                stream = (folder / "lock").open("ab+", buffering=0)
            except OSError as error:
                raise _unusable(folder, error) from error
            if not _take(stream):
                stream.seek(0)
                described = stream.read().decode().strip() or "another process"
                stream.close()
                raise _in_use(folder, described)
            try:
                stream.truncate(0)
                stream.write(f"{holder}\n".encode())
            except OSError as error:
                stream.close()
                raise _unusable(folder, error) from error
            _HELD[key] = thread, holder
    try:
        yield
    finally:
        if owner is None:
            with _GUARD:
                stream.close()  # releases the lock
                del _HELD[key]


def _unusable(folder: Path, error: OSError) -> BackpassError:
    return BackpassError(
        f"the folder {folder} cannot be made or locked: {error.strerror}. Give another path, or make room for it."
    )


def _in_use(folder: Path, holder: str) -> BackpassError:
    return BackpassError(
        f"{folder} is in use by {holder}: wait for that run or stop it, then resume, or give another folder."
    )


def _take(stream: IO[bytes]) -> bool:
    """Lock the file, not waiting for another process."""
    try:
        if os.name == "nt":
            import msvcrt

            stream.seek(2**20)  # a byte that nobody reads, as locked bytes cannot be read
            msvcrt.locking(stream.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        else:
            import fcntl

            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
