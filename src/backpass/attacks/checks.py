"""Checks of the user's input; every message says what was expected, what was received and what to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from backpass.attacks.settings import per_channel
from backpass.attacks.threat import Bounds, limits
from backpass.errors import BackpassError

__all__ = [
    "check_images",
    "check_labels",
    "check_logits",
    "check_model",
    "fields_of",
]


def check_mask(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """Return the mask in the shape of x.

    Raises:
        BackpassError: it is not bool, or its shape does not broadcast to x.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise BackpassError(f"mask must be a bool tensor, True where pixels may change; got {got}. Use mask.bool().")
    if mask.device != x.device:
        raise BackpassError(f"x is on {x.device}, mask on {mask.device}: move one of them with .to(device).")
    try:
        return mask.broadcast_to(x.shape)
    except RuntimeError:
        raise BackpassError(
            f"mask must have a shape that broadcasts to x, {tuple(x.shape)}; got {tuple(mask.shape)}."
        ) from None


def check_model(model: nn.Module, x: Tensor | None = None) -> None:
    """Check that the model is a module that one process can call, with parameters where x is, in x's precision."""
    if not isinstance(model, nn.Module):
        raise BackpassError(
            f"model must be a torch.nn.Module, so that its state can be kept; got {type(model).__name__}. "
            "Wrap a function in a Module."
        )
    if x is None:
        _check_structure(model)
        return
    devices = {t.device for t in (*model.parameters(), *model.buffers())}
    if devices and x.device not in devices:
        raise BackpassError(
            f"x is on {x.device}, the model on {', '.join(sorted(map(str, devices)))}: "
            "move one of them with .to(device)."
        )
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if len(dtypes) == 1 and x.dtype not in dtypes:
        (dtype,) = dtypes
        advice = (
            "keep the model in float32 and pass dtype=torch.bfloat16 to the attack"
            if dtype in (torch.bfloat16, torch.float16)
            else f"convert the images with x.to({dtype})"
        )
        raise BackpassError(f"x is {x.dtype}, the model's parameters are {dtype}: {advice}.")
    if any(p.is_inference() for p in model.parameters()):
        raise BackpassError(
            "the model's parameters were made under torch.inference_mode(), so nothing can be differentiated "
            "through them: build or load the model outside of it."
        )


_WRAPPERS = {
    "DistributedDataParallel": "a DistributedDataParallel wrapper: pass model.module, and attach rules to it",
    "FullyShardedDataParallel": "sharded by FSDP: load its full state dict into a plain copy of the model",
    "FSDPModule": "sharded by fully_shard: load its full state dict into a plain copy of the model",
}


def _check_structure(model: nn.Module) -> None:
    for kind in {type(module) for module in model.modules()}:
        for base in kind.__mro__:
            if base.__name__ in _WRAPPERS and base.__module__.startswith("torch."):
                raise BackpassError(
                    f"the model is {_WRAPPERS[base.__name__]}. Its forward waits for the other processes, which may "
                    "search for longer or shorter."
                )
    tensors = [*model.parameters(), *model.buffers()]
    if any(is_lazy(tensor) for tensor in tensors):
        raise BackpassError("the model has lazy modules without a shape: call it once on a batch of data first.")
    if any(tensor.is_meta for tensor in tensors):
        raise BackpassError("the model has parameters without values, on the device meta: load its weights first.")


def check_images(x: Tensor, bounds: Bounds) -> None:
    """Check that the images are a non-empty float batch inside the bounds."""
    if not isinstance(x, Tensor):
        raise BackpassError(f"x must be a tensor (N, ...); got {type(x).__name__}. Use torch.as_tensor(x).")
    if x.dtype not in (torch.float32, torch.float64):
        advice = (
            "search in half precision with dtype= and give float32 images"
            if x.is_floating_point()
            else "convert with x.float() / 255"
        )
        raise BackpassError(f"x must be float32 or float64; got {x.dtype}: {advice}.")
    if x.dim() < 2 or x.numel() == 0:
        raise BackpassError(f"x must be a non-empty batch (N, ...); got shape {tuple(x.shape)}, an empty batch.")
    if x.layout != torch.strided or x.is_meta:
        raise BackpassError(f"x must be a dense tensor with values; got {x.layout} on {x.device}. Use x.to_dense().")
    ranges = per_channel(bounds)
    if any(isinstance(one, tuple) for one in bounds) and x.shape[1] != len(ranges):
        raise BackpassError(
            f"bounds has {len(ranges)} channels, x has shape {tuple(x.shape)}: give one number per channel."
        )
    lo, hi = limits(bounds, x)
    low, high = (x.detach() - lo).amin(), (x.detach() - hi).amax()
    if bool((low + high).isnan()):
        raise BackpassError("x contains NaN: look at how the images were loaded.")
    fuzz = 1e-6 * max(b - a for a, b in ranges)
    if float(low) < -fuzz or float(high) > fuzz:
        edge = f"max is {float(x.max()):.4g}" if float(high) > fuzz else f"min is {float(x.min()):.4g}"
        raise BackpassError(
            f"x must lie in bounds={bounds}; its {edge}: did you normalise before the model? "
            "Put the normalisation inside the model, or pass the bounds= that the images really have."
        )


def check_labels(x: Tensor, y: Tensor, name: str = "y") -> None:
    """Check that labels are integers, one per image, on the images' device."""
    if not isinstance(y, Tensor):
        raise BackpassError(f"{name} must be an integer tensor; got {type(y).__name__}. Use torch.as_tensor({name}).")
    if y.shape != x.shape[:1]:
        raise BackpassError(
            f"{name} must hold one label per image, shape ({len(x)},); got {tuple(y.shape)}. "
            "One-hot labels need argmax(1), a column of labels squeeze(1)."
        )
    if y.dtype.is_floating_point or y.dtype.is_complex or y.dtype == torch.bool:
        raise BackpassError(f"{name} must be an integer tensor of class labels; got {y.dtype}. Use {name}.long().")
    if y.device != x.device:
        raise BackpassError(f"x is on {x.device}, {name} on {y.device}: move one of them with .to(device).")
    if (least := int(y.long().min())) < 0:
        raise BackpassError(f"labels must be at least 0; the least of {name} is {least}.")


def fields_of(one: Any) -> dict[str, Any] | None:
    """Return what a mapping, a named tuple, a dataclass or another object of attributes holds by name, or None."""
    if isinstance(one, Mapping):
        return {str(key): value for key, value in one.items()}
    if hasattr(one, "_fields"):
        return dict(zip(one._fields, one, strict=True))
    if is_dataclass(one):
        return {field.name: getattr(one, field.name) for field in fields(one)}
    return None if isinstance(one, tuple | list | Tensor) else getattr(one, "__dict__", None)


def check_logits(output: object, batch: int) -> Tensor:
    """Check that the model's output is a tensor of logits (N, C); a field ``logits`` of it is used by itself."""
    if not isinstance(output, Tensor):
        named = fields_of(output) or {}
        output = named.get("logits", output)
    if not isinstance(output, Tensor):
        names = sorted(named)
        keys = f" with keys {names}" if names else ""
        raise BackpassError(
            f"the model must return a tensor of logits (N, C); got {type(output).__name__}{keys}. "
            "Select it with logits=: a key, an index or a function of the output."
        )
    if output.is_complex():
        raise BackpassError("the model must return real logits; got complex numbers. Use their abs() in logits=.")
    if output.dim() != 2 or output.shape[0] != batch or output.shape[1] < 2:
        raise BackpassError(
            f"the model must return logits of shape ({batch}, C) with C >= 2; got {tuple(output.shape)}. "
            "Reduce or select them with logits=."
        )
    return output
