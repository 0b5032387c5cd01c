"""Checks of what the user hands in; every message says what was expected, what came and what to do."""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from backpass.errors import BackpassError

__all__ = [
    "NotFiniteLogitsError",
    "check_images",
    "check_labels",
    "check_logits",
    "check_model",
    "check_radius",
    "warn_probabilities",
]

logger = logging.getLogger(__name__)


class NotFiniteLogitsError(BackpassError):
    """The model's outputs are not finite, so nothing can be said of it."""


def check_radius(name: str, value: float, norm: str, bounds: tuple[float, float]) -> None:
    """A radius or a step is a non-negative number that fits the pixel range."""
    lo, hi = bounds
    if not (math.isfinite(lo) and math.isfinite(hi) and lo < hi):
        raise BackpassError(f"bounds must be two finite numbers (lo, hi) with lo < hi; got {bounds}.")
    if not (math.isfinite(value) and value >= 0):
        raise BackpassError(f"{name} must be a finite number, at least 0; got {value}.")
    if norm == "linf" and value > hi - lo:
        raise BackpassError(
            f"{name}={value:g} exceeds the pixel range {bounds}, so every image would be allowed. "
            f"Did you mean {value:g}/255? Images in [0, 255] need bounds=(0, 255)."
        )


def check_model(model: nn.Module, x: Tensor) -> None:
    """The model is a module whose parameters sit where x does, in x's precision."""
    if not isinstance(model, nn.Module):
        raise BackpassError(
            f"model must be a torch.nn.Module, so that its state can be kept; got {type(model).__name__}. "
            "Wrap a function in a Module."
        )
    if isinstance(model, DistributedDataParallel):
        raise BackpassError(
            "model is a DistributedDataParallel wrapper, whose forward waits for the other processes, which may "
            "search for longer or shorter: pass model.module, and attach rules to it."
        )
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


def check_images(x: Tensor, bounds: tuple[float, float]) -> None:
    """The images are a non-empty float batch inside the bounds."""
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
    least, most = (float(v) for v in torch.aminmax(x.detach()))
    lo, hi = bounds
    if math.isnan(least) or math.isnan(most):
        raise BackpassError("x contains NaN: look at how the images were loaded.")
    fuzz = 1e-6 * (hi - lo)
    if least < lo - fuzz or most > hi + fuzz:
        edge = f"max is {most:.4g}" if most > hi + fuzz else f"min is {least:.4g}"
        raise BackpassError(
            f"x must lie in bounds={bounds}; its {edge}: did you normalise before the model? "
            "Put the normalisation inside the model, or pass the bounds= that the images really have."
        )


def check_labels(x: Tensor, y: Tensor, name: str = "y") -> None:
    """The labels are integers, one per image, on the images' device."""
    if not isinstance(y, Tensor) or y.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
        got = y.dtype if isinstance(y, Tensor) else type(y).__name__
        raise BackpassError(f"{name} must be an integer tensor of class labels; got {got}. Use {name}.long().")
    if y.shape != x.shape[:1]:
        raise BackpassError(
            f"{name} must hold one label per image, shape ({len(x)},); got {tuple(y.shape)}. "
            "One-hot labels need argmax(1)."
        )
    if y.device != x.device:
        raise BackpassError(f"x is on {x.device}, {name} on {y.device}: move one of them with .to(device).")
    if int(y.min()) < 0:
        raise BackpassError(f"labels must be at least 0; the least of {name} is {int(y.min())}.")


def check_logits(output: object, batch: int) -> Tensor:
    """The model's answer is a tensor (N, C) of floats."""
    if not isinstance(output, Tensor):
        keys = f" with keys {sorted(map(str, output))}" if isinstance(output, dict) else ""
        raise BackpassError(
            f"the model must return a tensor of logits (N, C); got {type(output).__name__}{keys}. "
            "Select it with logits=: a key, an index or a function of the output."
        )
    if output.dim() != 2 or output.shape[0] != batch or output.shape[1] < 2:
        raise BackpassError(
            f"the model must return logits of shape ({batch}, C) with C >= 2; got {tuple(output.shape)}. "
            "Reduce or select them with logits=."
        )
    return output


def check_first_logits(logits: Tensor, y: Tensor) -> None:
    """What is worth looking at only once, as it waits for the device: finite values, and enough classes."""
    if not bool(logits.isfinite().all()):
        raise NotFiniteLogitsError(
            "the model's logits are not finite: its weights hold NaN or inf, or its forward overflows."
        )
    if int(y.max()) >= logits.shape[1]:
        raise BackpassError(
            f"label {int(y.max())} is out of range: the model has {logits.shape[1]} classes, "
            f"0 to {logits.shape[1] - 1}."
        )
    warn_probabilities(logits)


def warn_probabilities(logits: Tensor) -> None:
    """Warns where the outputs look like the result of a softmax, which hides gradients."""
    if bool(((logits >= 0).all(1) & ((logits.sum(1) - 1).abs() < 1e-4)).all()):
        logger.warning(
            "the model's outputs look like probabilities (non-negative, summing to 1): attacks expect logits, and a "
            "softmax hides their gradient. Return the logits, or select them with logits=."
        )
