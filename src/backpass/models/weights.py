"""Weights of a model in files, read without running code."""

from __future__ import annotations

import hashlib
import logging
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backpass.errors import BackpassError
from backpass.files import write_whole
from backpass.models import Normalize
from backpass.wording import visible

__all__ = ["load_weights", "read_weights", "save_weights", "weights_hash"]

_LOG = logging.getLogger(__name__)
_WRAPPED = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
_SHOWN = 3


def load_weights(model: nn.Module, path: Path) -> None:
    """Load the weights of a file into a model, all of them or none.

    A file without the normalisation of a lab network, as other libraries write it, leaves the normalisation as it is.

    Raises:
        BackpassError: the file holds no weights, or those of another model; the message names the first differences.
    """
    state = read_weights(path)
    own = model.state_dict()
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in state) and not any(key.startswith(prefix) for key in own):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    for name, module in model.named_modules():
        buffers = (f"{name}.mean", f"{name}.std")
        if isinstance(module, Normalize) and not state.keys() & buffers:
            _LOG.warning("%s holds no normalisation; the network keeps its own: %s", path, module)
            state |= {key: own[key] for key in buffers}
    problems = _differences(own, state)
    if problems:
        raise BackpassError(f"the weights of {path} are not those of this {type(model).__name__}: {problems}.")
    model.load_state_dict(state)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict from safetensors or ``torch.save``, bare or under "state_dict", "model_state_dict" or "model".

    Raises:
        BackpassError: there is no such file, it cannot be read without running code, or it holds no state dict.
    """
    if not path.is_file():
        raise BackpassError(f"there is no file of weights {path}.")
    content = _safetensors(path) if path.suffix == ".safetensors" else _torch(path)
    for name in _WRAPPED:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping) or not content:
        raise BackpassError(f"{path} holds {type(content).__name__}, not a state dict: save model.state_dict().")
    odd = [str(key) for key, value in content.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if odd:
        raise BackpassError(
            f"{path} holds no state dict of tensors: {_few(odd)} is something else. Save model.state_dict(), bare or "
            'under "state_dict".'
        )
    return dict(content)


def save_weights(model: nn.Module, path: Path) -> Path:
    """Write a model's state dict as safetensors, whole or not at all, without the prefixes of DDP and torch.compile.

    Raises:
        OSError: the folder cannot be made or written.
    """
    from safetensors.torch import save

    state = {}
    for key, value in model.state_dict().items():
        for prefix in _PREFIXES:
            key = key.removeprefix(prefix)
        # Shared tensors are written twice: safetensors refuses views of one storage.
        state[key] = value.detach().cpu().contiguous().clone()
    return write_whole(path, save(state))


def weights_hash(model: nn.Module) -> str:
    """Return twelve hexadecimal digits of a SHA-256 over the names, types, shapes and bytes of the state dict."""
    words = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, Tensor):
            flat = tensor.detach().cpu().contiguous().flatten()
            words.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            words.update(flat.view(torch.uint8).numpy().tobytes())
    return words.hexdigest()[:12]


def _safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load, load_file

    try:
        # The library maps files into memory, but only those with a name in UTF-8.
        return load_file(path) if visible(path) == str(path) else load(path.read_bytes())
    except SafetensorError as error:
        raise BackpassError(f"{path} cannot be read as safetensors: {error}.") from error


def _torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise BackpassError(
            f"{path} is no file of weights, or one that cannot be read without running code that it may hold "
            "(torch.load with weights_only=True refuses it). Save model.state_dict() alone, best as safetensors."
        ) from error
    except Exception as error:  # whatever torch makes of bytes that it has not written
        raise BackpassError(f"{path} cannot be read as weights: the file may be cut off or of another kind.") from error


def _differences(own: Mapping[str, Any], state: Mapping[str, Tensor]) -> str:
    missing = [key for key in own if key not in state]
    further = [key for key in state if key not in own]
    shapes = [
        f"{key} is {_shape(state[key])} in the file and {_shape(value)} in the model"
        for key, value in own.items()
        if key in state and isinstance(value, Tensor) and state[key].shape != value.shape
    ]
    parts = [
        f"the file lacks {_few(missing)}" if missing else "",
        f"the model lacks {_few(further)}" if further else "",
        _few(shapes),
    ]
    return "; ".join(filter(None, parts))


def _few(words: list[str]) -> str:
    more = f" and {len(words) - _SHOWN} more" if len(words) > _SHOWN else ""
    return ", ".join(words[:_SHOWN]) + more


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"
