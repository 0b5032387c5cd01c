"""What a run writes beside its checkpoints: its records, its times, its state."""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import socket
import time
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch

from backpass.errors import BackpassError
from backpass.training.checkpoint import write_whole
from backpass.version import __version__

__all__ = ["Logs", "Status"]

_LOG = logging.getLogger(__name__)

Status = Literal["running", "finished", "diverged", "interrupted"]


class Logs:
    """The files of a run, in its folder.

    ``log.jsonl`` has the records, without times, so that a resumed run's are those of an uninterrupted one to the
    byte; ``timing.jsonl`` has seconds; ``run.json`` settings, environment, status and the last numbers;
    ``tensorboard/`` events.

    Args:
        folder: where to write; None: nowhere.
        tensorboard: whether to write events too.

    Raises:
        BackpassError: TensorBoard is asked for and not installed.
    """

    def __init__(self, folder: Path | None, *, tensorboard: bool) -> None:
        self._folder = folder
        self._stream: BinaryIO | None = None
        self._events: Any = None
        self._run: dict[str, Any] = {}
        self._begun = time.perf_counter()
        self._tensorboard = _summary_writer() if tensorboard else None

    def open(self, offset: int, step: int, settings: dict[str, Any]) -> None:
        """Begin, or go on after ``offset`` bytes of the log and ``step`` steps."""
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / "log.jsonl"
        self._stream = path.open("ab")
        there = path.stat().st_size
        if there < offset:
            _LOG.warning(
                "%s has lost %d bytes since the checkpoint: records are missing from it.", path, offset - there
            )
        self._stream.truncate(min(offset, there))
        self._stream.seek(min(offset, there))
        if self._tensorboard is not None:
            self._events = self._tensorboard(str(self._folder / "tensorboard"), purge_step=step + 1)
        self._run = {"settings": settings, "environment": _environment()}

    def record(self, record: dict[str, Any], seconds: float) -> None:
        """Write one record, and the seconds since the run was started or resumed."""
        _LOG.info("%s", record)
        if self._folder is None or self._stream is None:
            return
        self._stream.write((json.dumps(_finite(record), allow_nan=False) + "\n").encode())
        self._stream.flush()
        timing = {"kind": record["kind"], "step": record["step"], "seconds": round(seconds, 6), "time": time.time()}
        with (self._folder / "timing.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(timing) + "\n")
        if self._events is not None:
            for name, value in _scalars(record, record["kind"]):
                self._events.add_scalar(name, value, record["step"])

    def offset(self) -> int:
        """How long the log is, in bytes; it is on the disk when this returns."""
        if self._stream is None:
            return 0
        os.fsync(self._stream.fileno())
        return self._stream.tell()

    def status(self, status: Status, numbers: dict[str, Any]) -> None:
        """Write ``run.json``."""
        if self._folder is not None and self._stream is not None:
            content = {"status": status, **numbers, "updated": time.time(), **self._run}
            write_whole(self._folder / "run.json", (json.dumps(_finite(content), indent=2) + "\n").encode())

    def close(self) -> None:
        """No more records."""
        if self._stream is not None:
            self._stream.close()
        if self._events is not None:
            self._events.close()


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise BackpassError(
            "tensorboard=True needs TensorBoard, which is not installed: pip install 'backpass[lab]', or leave it out; "
            "log.jsonl has the same numbers."
        ) from error
    return SummaryWriter


def _environment() -> dict[str, Any]:
    return {
        "backpass": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "host": socket.gethostname(),
        "process": os.getpid(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _finite(value: Any) -> Any:
    """JSON knows no infinity: such numbers become null."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scalars(value: Any, name: str) -> list[tuple[str, float]]:
    if isinstance(value, dict):
        return [one for key, inner in value.items() for one in _scalars(inner, f"{name}/{key}")]
    if isinstance(value, bool) or not isinstance(value, int | float) or name.endswith(("/step", "/epoch")):
        return []
    return [(name, float(value))]
