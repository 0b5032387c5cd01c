"""The finished pieces of an experiment on disk: what is there is not computed again."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock
from torch import nn

from backpass.files import write_whole
from backpass.models.weights import load_weights, save_weights
from backpass.version import __version__

__all__ = ["Pieces"]

T = TypeVar("T")


class Pieces:
    """Pieces of work by name and settings, each a file that is written whole or not at all.

    A run that was interrupted finds the pieces that it had finished; other settings, or another version of backpass,
    find none of them. Several processes may share a folder: no piece is computed twice. Without a folder nothing is
    kept.

    Args:
        folder: where they are kept, or ``None``.
        progress: called with a piece's name before it is computed, and after it is there.
    """

    def __init__(self, folder: str | PathLike[str] | None, progress: Callable[[str], None] = lambda name: None) -> None:
        self.folder = None if folder is None else Path(folder)
        self.progress = progress
        self.computed = 0
        self.found = 0

    def value(self, name: str, compute: Callable[[], T], **settings: Any) -> T:
        """A value of JSON's types (numbers may be ``nan``), from disk where it was finished before.

        Args:
            name: of the piece, for people.
            compute: makes the value; must depend on nothing but ``settings``.
            **settings: all that the value depends on, of JSON's types.
        """
        asked, path = self._asked(name, settings, "json")
        with _alone(path):
            self.progress(name)
            text = _read(path, asked) if path is not None else None
            if text is not None:
                self.found += 1
            else:
                value = compute()
                text = json.dumps({"asked": asked, "value": value, "sum": _sum(value)})
                if path is not None:
                    write_whole(path, text)
                self.computed += 1
        # Through JSON also the first time: a resumed run must see the very same types.
        seen: T = json.loads(text)["value"]
        return seen

    def network(self, name: str, model: nn.Module, train: Callable[[nn.Module], T], **settings: Any) -> T:
        """Trains ``model`` in place, or gives it the weights that an earlier run has trained.

        Args:
            name: of the piece, for people.
            model: with its initial weights.
            train: trains it and returns what is to be kept of the training, of JSON's types.
            **settings: all that the trained weights depend on.

        Returns:
            What ``train`` returned.
        """
        path = self._asked(name, settings, "safetensors")[1]
        if path is None:
            return self.value(name, lambda: train(model), **settings)

        def train_and_save() -> T:
            told = train(model)
            save_weights(model, path)  # before the record: a record stands for saved weights
            return told

        told = self.value(name, train_and_save, **settings)
        load_weights(model, path)
        return told

    def _asked(self, name: str, settings: dict[str, Any], suffix: str) -> tuple[dict[str, Any], Path | None]:
        asked = json.loads(json.dumps({"name": name, "settings": settings, "version": __version__}))
        if self.folder is None:
            return asked, None
        digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]
        slug = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")[:80]
        return asked, self.folder / f"{slug}-{digest}.{suffix}"


def _alone(path: Path | None) -> AbstractContextManager[object]:
    """Of several processes that want a piece, one computes it and the others wait; a killed one holds up nobody."""
    if path is None:
        return nullcontext()
    locks = path.parent / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    return FileLock(locks / path.stem)


def _read(path: Path, asked: dict[str, Any]) -> str | None:
    """A finished piece's text; nothing where it is not there or damaged, so that the piece is computed."""
    try:
        text = path.read_text(encoding="utf-8")
        kept = json.loads(text)
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    whole = isinstance(kept, dict) and kept.get("asked") == asked and kept.get("sum") == _sum(kept.get("value"))
    return text if whole else None


def _sum(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
