"""Finished parts of an evaluation on disk: written whole or not at all, found by a hash of all that they depend on."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import logging
import types
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backpass.attacks.attack import Attack
from backpass.attacks.companions import Pool
from backpass.attacks.oracle import Oracle
from backpass.errors import BackpassError
from backpass.files import write_whole
from backpass.preserved import preserved
from backpass.version import __version__

__all__ = ["Shards", "describe", "fingerprint", "read_tensors", "write_tensors"]

_LOG = logging.getLogger(__name__)
_FOLDER = 0x10  # flag of a folder in an archive; torch reads nothing of such an entry


def describe(attack: Attack, *, strict: bool) -> dict[str, Any]:
    """Return an attack's name and settings in JSON's types; functions by name and code.

    Raises:
        BackpassError: `strict`, and a setting cannot be told from another by its description.
    """
    described: dict[str, Any] = {"attack": type(attack).__name__}
    for field in dataclasses.fields(attack):
        value = getattr(attack, field.name)
        try:
            described[field.name] = _plain(value, field.name)
        except BackpassError:
            if strict:
                raise
            described[field.name] = repr(value)
    return described


def _plain(value: Any, name: str) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return [_plain(part, name) for part in value]
    if isinstance(value, torch.dtype | Pool):
        return str(value)
    if isinstance(value, types.FunctionType):
        cells = [_plain(cell.cell_contents, name) for cell in value.__closure__ or ()]
        code = value.__code__
        words = (code.co_code, repr(code.co_consts), code.co_names, value.__defaults__, cells)
        return f"{value.__module__}.{value.__qualname__}#{hashlib.sha256(repr(words).encode()).hexdigest()[:16]}"
    raise BackpassError(
        f"{name}={value!r} cannot be recognised again, so that its shards could be mistaken for another's: "
        "use a plain function, or evaluate without resume=."
    )


def fingerprint(model: nn.Module, oracle: Oracle, x: Tensor, y: Tensor) -> str:
    """Return a hash of the weights, the structure, and the behaviour on one image, forward and backward.

    The behaviour tells apart what weights do not: other code, hooks, a rule attached to the model. Its numbers are
    rounded to four digits, far above the noise of kernels.
    """
    words = hashlib.sha256(repr(model).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, Tensor):
            words.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            words.update(_bytes(tensor))
    with preserved(model):
        # For a randomised model; the guard puts back these generators, and torch.manual_seed would seed all.
        torch.default_generator.manual_seed(0)
        if x.device.type == "cuda":
            with torch.cuda.device(x.device):
                torch.cuda.manual_seed(0)
        logits, _, gradient = oracle.probe(x[:1], y[:1])
        seen = (logits.norm(), logits.amax(), gradient.abs().sum(), gradient.norm(), (gradient * x[:1]).sum())
    words.update(" ".join(f"{float(number):.4g}" for number in seen).encode())
    return words.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


class Shards:
    """A folder of shards; with no folder, nothing is kept.

    Args:
        folder: where the shards are, or None.
        common: dependencies of the answer beside a shard's own samples and attack; JSON's types.
    """

    def __init__(self, folder: Path | None, common: dict[str, Any]) -> None:
        self.folder = folder
        self.common = {"backpass": __version__, "torch": torch.__version__, **common}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def key(self, x: Tensor, y: Tensor, index: Tensor, own: dict[str, Any], mask: Tensor | None = None) -> str:
        """Return the name of a shard: a hash of everything that matters; nothing is hashed without a folder."""
        if self.folder is None:
            return ""
        text = json.dumps([self.common, own, str(x.dtype), list(x.shape)], sort_keys=True)
        words = hashlib.sha256(text.encode())
        for tensor in (x, y, index, *(() if mask is None else (mask,))):
            words.update(_bytes(tensor))
        return words.hexdigest()[:40]

    def get(self, key: str) -> dict[str, Tensor] | None:
        """Return the shard of this name, if it was finished; a damaged one is computed again, with a warning."""
        path = None if self.folder is None else self.folder / f"{key}.pt"
        if path is None or not path.exists():
            return None
        try:
            return read_tensors(path)
        except BackpassError as error:
            _LOG.warning("%s It is computed again.", error)
            return None

    def put(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Keep a finished shard."""
        if self.folder is not None:
            write_tensors(self.folder / f"{key}.pt", tensors)


def write_tensors(path: Path, tensors: dict[str, Any]) -> None:
    """Write tensors and strings so that `path` is whole at any moment, also if the process is killed."""
    content = io.BytesIO()
    torch.save(tensors, content)
    write_whole(path, content.getvalue())


def read_tensors(path: Path) -> dict[str, Any]:
    """Read what `write_tensors` wrote; never runs code from the file.

    Raises:
        BackpassError: the file is damaged, or was not written by `write_tensors`.
        OSError: it cannot be read.
    """
    stream = io.BytesIO(path.read_bytes())
    try:
        with zipfile.ZipFile(stream) as archive:  # torch writes checksums, but does not look at them when it reads
            damaged = archive.testzip() or any(one.external_attr & _FOLDER for one in archive.infolist())
        stream.seek(0)
        content = None if damaged else torch.load(stream, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever zipfile and torch make of bytes that torch has not written
        raise BackpassError(f"{path} is damaged, or was not written by backpass.") from error
    if not isinstance(content, dict):
        raise BackpassError(f"{path} is damaged, or was not written by backpass.")
    return content
