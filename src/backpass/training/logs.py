"""Log files of a run, and interfaces to TensorBoard, Weights & Biases and MLflow."""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from backpass.errors import BackpassError, UnknownNameError
from backpass.files import write_whole
from backpass.version import __version__

__all__ = ["Logger", "Logs", "Status", "check_loggers"]

_LOG = logging.getLogger(__name__)

Status = Literal["running", "finished", "stopped", "diverged", "interrupted"]


class Logger(Protocol):
    """Interface of a logger; called in process 0."""

    def open(self, folder: Path | None, settings: dict[str, Any], step: int) -> None:
        """Begin a run in a folder (None without one), or continue it after ``step`` steps."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Log the numbers of one record, with names such as ``epoch/evaluation/accuracy``."""

    def close(self) -> None:
        """End the run."""


class _TensorBoard:
    def open(self, folder: Path | None, settings: dict[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        writer: Any = SummaryWriter
        self._writer = writer(str(Path(folder or ".") / "tensorboard"), purge_step=step + 1)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def open(self, folder: Path | None, settings: dict[str, Any], step: int) -> None:
        import wandb

        known = _note(folder, "wandb-run", lambda: os.urandom(8).hex())
        self._run = wandb.init(dir=folder, name=_name(folder), id=known, resume="allow", config=settings)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    def open(self, folder: Path | None, settings: dict[str, Any], step: int) -> None:
        import mlflow

        self._mlflow: Any = mlflow
        known = _note(folder, "mlflow-run", lambda: None)
        run = mlflow.start_run(run_id=known, run_name=_name(folder))
        if folder is not None and known is None:
            _note(folder, "mlflow-run", lambda: run.info.run_id)
            mlflow.log_dict(settings, "settings.json")

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(numbers), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


def _name(folder: Path | None) -> str:
    return (folder or Path("run")).name


def _note(folder: Path | None, name: str, make: Callable[[], str | None]) -> str | None:
    """Return the run identifier stored in the folder, created if needed, so that a resumed run keeps its entry."""
    if folder is None:
        return None
    if (folder / name).exists():
        return (folder / name).read_text()
    made = make()
    if made is not None:
        write_whole(folder / name, made)
    return made


_LOGGERS: dict[str, type[Any]] = {"mlflow": _MLflow, "tensorboard": _TensorBoard, "wandb": _WandB}


class Logs:
    """Log files of a run, in its folder.

    ``log.jsonl`` has the records without times, so that it is byte-identical for resumed and uninterrupted runs;
    ``timing.jsonl`` has seconds; ``run.json`` settings, environment, status and the last numbers.

    Args:
        folder: folder to write to; None writes nothing.
        loggers: further loggers, or their names.
    """

    def __init__(self, folder: Path | None, loggers: Sequence[str | Logger]) -> None:
        self._folder, self._content = folder, bytearray()  # of log.jsonl
        self._run: dict[str, Any] = {}
        self._loggers: list[Logger] = [_LOGGERS[one]() if isinstance(one, str) else one for one in loggers]
        self._opened: list[Logger] = []

    def open(self, offset: int, step: int, settings: dict[str, Any]) -> None:
        """Begin, or continue after ``offset`` bytes of the log and ``step`` steps.

        Raises:
            BackpassError: the package of a logger is not installed.
        """
        for logger in self._loggers:
            try:
                logger.open(self._folder, settings, step)
            except ImportError as error:
                name = type(logger).__name__.strip("_").lower()
                extra = "'backpass[lab]'" if name == "tensorboard" else name
                raise BackpassError(
                    f"the logger {name} needs its package, which is not installed: pip install {extra}, or leave it "
                    "out; log.jsonl has the same numbers."
                ) from error
            self._opened.append(logger)
        if self._folder is None:
            return
        path, self._run = self._folder / "log.jsonl", {"settings": settings, "environment": _environment()}
        with _reported():
            self._content[:] = path.read_bytes()[:offset] if path.exists() else b""
        if len(self._content) < offset:
            lost = offset - len(self._content)
            _LOG.warning("%s has lost %d bytes since the checkpoint: records are missing from it.", path, lost)
        if path.exists():  # truncate the records of steps that are repeated
            with _reported():
                write_whole(path, bytes(self._content))

    def record(self, record: dict[str, Any], seconds: float) -> None:
        """Write one record, and the seconds since the run was started or resumed.

        Raises:
            BackpassError: the file cannot be written, for instance on a full disk.
        """
        _LOG.info("%s", record)
        numbers = dict(_scalars(record, record["kind"]))
        for logger in self._loggers:
            logger.log(record["step"], numbers)
        if self._folder is None:
            return
        timing = {"kind": record["kind"], "step": record["step"], "seconds": round(seconds, 6), "time": time.time()}
        with _reported():
            path = self._mended(self._folder)
            self._content += _line(record)
            _append(path, _line(record))
            _append(self._folder / "timing.jsonl", _line(timing))

    def _mended(self, folder: Path) -> Path:
        """Return the path of the log, rewritten if another program deleted or changed it."""
        path = folder / "log.jsonl"
        if (path.stat().st_size if path.exists() else 0) != len(self._content):
            _LOG.warning("%s was deleted or changed by another program: its records are written again.", path)
            write_whole(path, bytes(self._content))
        return path

    def offset(self) -> int:
        """Return the length of the log in bytes; it is on the disk when this returns."""
        if self._folder is not None and self._content:
            with _reported(), self._mended(self._folder).open("rb") as stream:
                os.fsync(stream.fileno())
        return len(self._content)

    def status(self, status: Status, numbers: dict[str, Any]) -> None:
        """Write ``run.json``."""
        if self._folder is not None:
            content = {"status": status, **numbers, "updated": time.time(), **self._run}
            with _reported():
                write_whole(self._folder / "run.json", json.dumps(_finite(content), indent=2) + "\n")

    def close(self) -> None:
        """Close all loggers."""
        for logger in self._opened:
            logger.close()


def _line(record: dict[str, Any]) -> bytes:
    return (json.dumps(_finite(record), allow_nan=False) + "\n").encode()


def _append(path: Path, content: bytes) -> None:
    """Append all bytes without a buffer, so that nothing half-written is tried again later."""
    try:
        with path.open("ab", buffering=0) as stream:
            while content:
                content = content[stream.write(content) :]
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def _reported() -> Iterator[None]:
    """Report a full disk with the file, and how to continue."""
    try:
        yield
    except OSError as error:
        raise BackpassError(
            f"{error.filename} cannot be written: {error.strerror}. The checkpoints are kept: make room, and continue "
            "by fit(resume=True) or --resume."
        ) from error


def check_loggers(loggers: Sequence[str | Logger]) -> None:
    """Validate the setting.

    Raises:
        BackpassError: a logger lacks a method, or a name is unknown.
    """
    if isinstance(loggers, str) or not isinstance(loggers, Sequence):
        raise BackpassError(f'loggers must be a sequence, such as ("tensorboard",); got {loggers!r}.')
    for one in loggers:
        if isinstance(one, str) and one not in _LOGGERS:
            raise UnknownNameError("logger", one, _LOGGERS)
        if not isinstance(one, str) and not all(callable(getattr(one, m, None)) for m in ("open", "log", "close")):
            raise BackpassError(f"a logger must have the methods open, log and close; got {one!r}.")


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
    """Replace infinities and NaN, which JSON does not support, by null."""
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
