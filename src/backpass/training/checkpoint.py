"""Checkpoints with atomic writes and checksums, read without executing code."""

from __future__ import annotations

import hashlib
import io
import logging
import pickle
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from backpass.errors import BackpassError
from backpass.files import write_whole

__all__ = ["Checkpoints"]

_LOG = logging.getLogger(__name__)
_NAME = re.compile(r"step-(\d{8,})\.pt")


class Checkpoints:
    """Checkpoints of a run: ``step-00000400.pt`` beside its SHA-256 sum, in the format of ``sha256sum``.

    Args:
        folder: their folder, created at the first save.
        keep: number of latest checkpoints to keep, at least 1.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder, self._keep = folder, keep
        self._proven = False

    def steps(self) -> list[int]:
        """Return the steps of the existing checkpoints, in order."""
        found = (_NAME.fullmatch(path.name) for path in self._folder.glob("step-*.pt"))
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        """Return the path of the checkpoint of a step."""
        return self._folder / f"step-{step:08d}.pt"

    def clean(self) -> None:
        """Delete partial files of a killed process, and checksums without a checkpoint."""
        for path in (*self._folder.glob(".*.part"), *self._folder.parent.glob(".*.part")):
            path.unlink(missing_ok=True)
        for path in self._folder.glob("step-*.pt.sha256"):
            if not path.with_suffix("").exists():
                path.unlink(missing_ok=True)

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write a checkpoint and delete old ones.

        Raises:
            BackpassError: the state has other types than tensors, numbers, strings, lists and dicts; or the checkpoint
                cannot be written.
        """
        stream = io.BytesIO()
        try:
            torch.save(state, stream)
            content = stream.getvalue()
            if not self._proven:
                _read(content)
        except (pickle.PickleError, AttributeError, TypeError) as error:
            raise BackpassError(
                "a checkpoint holds tensors, numbers, strings, lists and dicts only; the state_dict of the "
                f"optimizer, scheduler, objective or model has something else: {error}"
            ) from error
        self._proven = True
        path = self.path(step)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            # Write the checksum first, so that every visible checkpoint has one.
            write_whole(_sum(path), f"{hashlib.sha256(content).hexdigest()}  {path.name}\n".encode())
            write_whole(path, content)
        except OSError as error:
            with suppress(OSError):
                if not path.exists():
                    _sum(path).unlink(missing_ok=True)
            raise self._lost(error) from error
        for old in self.steps()[: -self._keep]:
            self.path(old).unlink(missing_ok=True)
            _sum(self.path(old)).unlink(missing_ok=True)
        return path

    def _lost(self, error: OSError) -> BackpassError:
        steps = self.steps()
        kept = (
            f"The last whole checkpoint is {self.path(steps[-1])}: make room, and continue from step {steps[-1]} by "
            "fit(resume=True) or --resume."
            if steps
            else "No checkpoint was written before: make room, and start anew."
        )
        return BackpassError(f"{error.filename} cannot be written: {error.strerror}. {kept}")

    def load(self) -> dict[str, Any]:
        """Return the last valid checkpoint, with a warning for each damaged one.

        Raises:
            BackpassError: there is no valid checkpoint.
        """
        steps = self.steps()
        for step in reversed(steps):
            path = self.path(step)
            content = path.read_bytes()
            expected = _sum(path).read_bytes().split()[:1] if _sum(path).exists() else []
            if expected == [hashlib.sha256(content).hexdigest().encode()]:
                try:
                    return _read(content)
                except Exception as error:  # torch raises various exceptions for invalid files
                    raise BackpassError(
                        f"{path} is no checkpoint of backpass, or cannot be read without running code: resume in the "
                        "folder of the run itself, or start anew in another folder."
                    ) from error
            _LOG.warning("%s is damaged (its SHA-256 sum differs): the checkpoint before it is used.", path)
        if steps:
            raise BackpassError(f"no checkpoint in {self._folder} is whole: start anew in another folder.")
        raise BackpassError(f"there is no checkpoint in {self._folder} to resume from: call fit() without resume.")


def _sum(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _read(content: bytes) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return state
