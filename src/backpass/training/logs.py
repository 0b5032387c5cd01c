"""Log files of a run beside its checkpoints, and loggers of other packages."""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

import torch

from backpass.errors import BackpassError, UnknownNameError
from backpass.files import write_whole
from backpass.version import __version__

__all__ = ["Logger", "Logs", "Status", "check_loggers"]

_LOG = logging.getLogger(__name__)

Status = Literal["running", "finished", "stopped", "diverged", "interrupted"]


class Logger(Protocol):
    """Further place for the numbers of a run's log; process 0 calls it."""

    def open(self, folder: Path | None, settings: dict[str, Any], step: int) -> None:
        """Begin a run in a folder (None without one), or continue it after so many steps."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Take the numbers of one record, with names such as ``epoch/evaluation/accuracy``."""

    def close(self) -> None:
        """End the run."""


class _TensorBoard:
    def __init__(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter

    def open(self, folder: Path | None, settings: dict[str, Any], step: int) -> None:
        self._writer = self._writer(str(Path(folder or ".") / "tensorboard"), purge_step=step + 1)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self) -> None:
        import wandb

        self._wandb: Any = wandb

    def open(self, folder: Path | None, settings: dict[str, Any], step: int) -> None:
        name = (folder or Path("run")).name
        self._run = self._wandb.init(dir=folder, name=name, id=_identifier(folder), resume="allow", config=settings)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    def __init__(self) -> None:
        import mlflow

        self._mlflow: Any = mlflow

    def open(self, folder: Path | None, settings: dict[str, Any], step: int) -> None:
        note = None if folder is None else folder / "mlflow-run"
        known = note.read_text() if note is not None and note.exists() else None
        run = self._mlflow.start_run(run_id=known, run_name=(folder or Path("run")).name)
        if note is not None and known is None:
            note.write_text(run.info.run_id)
            self._mlflow.log_dict(settings, "settings.json")

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._mlflow.log_metrics({name: float(value) for name, value in numbers.items()}, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


_LOGGERS: dict[str, type[Any]] = {"mlflow": _MLflow, "tensorboard": _TensorBoard, "wandb": _WandB}


class Logs:
    """The log files of a run, in its folder.

    ``log.jsonl`` has the records, without times, so that a resumed run's are those of an uninterrupted one to the
    byte; ``timing.jsonl`` has seconds; ``run.json`` settings, environment, status and the last numbers.

    Args:
        folder: folder to write to; None writes nothing.
        loggers: further loggers, or their names.

    Raises:
        BackpassError: the package of a logger is not installed.
    """

    def __init__(self, folder: Path | None, loggers: Sequence[str | Logger]) -> None:
        self._folder, self._stream = folder, None
        self._length = 0
        self._run: dict[str, Any] = {}
        self._loggers = [_logger(one) for one in loggers]

    _stream: BinaryIO | None

    def open(self, offset: int, step: int, settings: dict[str, Any]) -> None:
        """Begin, or continue after ``offset`` bytes of the log and ``step`` steps."""
        for logger in self._loggers:
            logger.open(self._folder, settings, step)
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / "log.jsonl"
        self._stream = path.open("a+b", buffering=0)
        there = path.stat().st_size
        if there < offset:
            _LOG.warning(
                "%s has lost %d bytes since the checkpoint: records are missing from it.", path, offset - there
            )
        self._length = min(offset, there)
        self._stream.truncate(self._length)
        self._run = {"settings": settings, "environment": _environment()}

    def record(self, record: dict[str, Any], seconds: float) -> None:
        """Write one record, and the seconds since the run was started or resumed.

        Raises:
            BackpassError: the file cannot be written, for instance on a full disk.
        """
        _LOG.info("%s", record)
        numbers = dict(_scalars(record, record["kind"]))
        for logger in self._loggers:
            logger.log(record["step"], numbers)
        if self._folder is None or self._stream is None:
            return
        line = (json.dumps(_finite(record), allow_nan=False) + "\n").encode()
        timing = {"kind": record["kind"], "step": record["step"], "seconds": round(seconds, 6), "time": time.time()}
        path = self._folder / "log.jsonl"
        try:
            self._restore(path)
            _append(self._stream, line)
            self._length += len(line)
            path = self._folder / "timing.jsonl"
            with path.open("ab", buffering=0) as stream:
                _append(stream, (json.dumps(timing) + "\n").encode())
        except OSError as error:
            raise BackpassError(
                f"{path} cannot be written: {error.strerror}. The checkpoints are kept: make room, and continue by "
                "fit(resume=True) or --resume."
            ) from error

    def _restore(self, path: Path) -> None:
        """Put the log back where it was deleted or replaced; its records are still in the open file."""
        assert self._stream is not None  # noqa: S101  the caller has checked
        ours = os.fstat(self._stream.fileno())
        if ours.st_size != self._length:
            _LOG.warning(
                "%s was changed by another program: it has %d bytes, not %d.", path, ours.st_size, self._length
            )
            self._length = ours.st_size
        with suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), ours):
                return
        _LOG.warning("%s was deleted or replaced during the run: its records are written again.", path)
        self._stream.seek(0)
        content = self._stream.read()
        self._stream.close()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
        self._stream = path.open("a+b", buffering=0)

    def offset(self) -> int:
        """Return the length of the log in bytes; it is on the disk when this returns."""
        if self._stream is None:
            return 0
        os.fsync(self._stream.fileno())
        return self._length

    def status(self, status: Status, numbers: dict[str, Any]) -> None:
        """Write ``run.json``."""
        if self._folder is not None and self._stream is not None:
            content = {"status": status, **numbers, "updated": time.time(), **self._run}
            write_whole(self._folder / "run.json", (json.dumps(_finite(content), indent=2) + "\n").encode())

    def close(self) -> None:
        """Close all files and loggers."""
        if self._stream is not None:
            self._stream.close()
        for logger in self._loggers:
            logger.close()


def _append(stream: BinaryIO, content: bytes) -> None:
    """Write all bytes without a buffer, so that nothing half-written is tried again later."""
    while content:
        content = content[stream.write(content) :]


def check_loggers(loggers: Sequence[str | Logger]) -> None:
    """Validate the setting.

    Raises:
        BackpassError: a logger lacks a method, or there is none of such a name.
    """
    if isinstance(loggers, str) or not isinstance(loggers, Sequence):
        raise BackpassError(f'loggers must be a sequence, such as ("tensorboard",); got {loggers!r}.')
    for one in loggers:
        if isinstance(one, str) and one not in _LOGGERS:
            raise UnknownNameError("logger", one, _LOGGERS)
        if not isinstance(one, str) and not all(callable(getattr(one, m, None)) for m in ("open", "log", "close")):
            raise BackpassError(f"a logger must have the methods open, log and close; got {one!r}.")


def _logger(one: str | Logger) -> Logger:
    if not isinstance(one, str):
        return one
    try:
        made: Logger = _LOGGERS[one]()
    except ImportError as error:
        extra = "'backpass[lab]'" if one == "tensorboard" else one
        raise BackpassError(
            f"the logger {one} needs its package, which is not installed: pip install {extra}, or leave it out; "
            "log.jsonl has the same numbers."
        ) from error
    return made


def _identifier(folder: Path | None) -> str | None:
    """Return one identifier per folder, so that a resumed run continues its record."""
    if folder is None:
        return None
    note = folder / "wandb-run"
    if not note.exists():
        folder.mkdir(parents=True, exist_ok=True)
        note.write_text(os.urandom(8).hex())
    return note.read_text()


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
    """Replace infinities and NaN, which JSON does not know, by null."""
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
