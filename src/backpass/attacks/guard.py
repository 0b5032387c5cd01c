"""The guard: whatever an attack does in between, the model is left as it was found."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["leave_no_trace"]


@contextmanager
def leave_no_trace(model: nn.Module) -> Iterator[None]:
    """Evaluates `model` in eval mode with gradients on, and restores everything afterwards.

    Kept, also after an exception: the train/eval flag of every module, all buffers, `.grad` and `requires_grad`
    of the parameters, the generators of the CPU and of the model's devices, grad and inference mode.
    """
    modules = list(model.modules())
    # Flags are set directly: a model may override train() in order to keep a BatchNorm frozen.
    modes = [module.training for module in modules]
    parameters = [(p, p.grad, p.requires_grad) for p in model.parameters()]
    buffers = [_Buffer(module, name) for module in modules for name in list(module._buffers.keys())]
    devices = {t.device for t in (*model.parameters(), *model.buffers()) if t.device.type == "cuda"}
    # fork_rng names device indices, of one type of device.
    with torch.random.fork_rng(devices=[device.index for device in devices], device_type="cuda"):
        try:
            for module in modules:
                module.training = False
            with torch.inference_mode(False), torch.enable_grad():
                yield
        finally:
            for module, mode in zip(modules, modes, strict=True):
                module.training = mode
            for parameter, grad, requires_grad in parameters:
                if parameter.grad is not grad:
                    parameter.grad = grad
                if parameter.requires_grad != requires_grad:
                    parameter.requires_grad_(requires_grad)
            for buffer in buffers:
                buffer.restore()


class _Buffer:
    """A buffer of a module, with what it held."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name
        self.tensor: Tensor | None = getattr(module, name)
        self.version = _version(self.tensor)
        self.value = None if self.tensor is None else self.tensor.detach().clone()

    def restore(self) -> None:
        if getattr(self.module, self.name, None) is not self.tensor:
            setattr(self.module, self.name, self.tensor)
        # Writing only where something was written keeps the version counters, and a graph that saved the buffer.
        if self.tensor is not None and self.value is not None and self.version != _version(self.tensor):
            with torch.inference_mode(self.tensor.is_inference()), torch.no_grad():
                self.tensor.copy_(self.value)


def _version(tensor: Tensor | None) -> float | None:
    """The number of in-place writes; an inference tensor does not count them, and nan never equals itself."""
    if tensor is None:
        return None
    return math.nan if tensor.is_inference() else tensor._version
