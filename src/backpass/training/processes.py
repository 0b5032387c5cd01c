"""Several processes that train together, started by ``torchrun``: who this one is, and what all of them agree on."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from backpass.errors import BackpassError

__all__ = ["any_process", "distributed", "from_all", "from_first", "joined", "local_device", "rank", "summed", "world"]

_LOG = logging.getLogger(__name__)

Value = TypeVar("Value")


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this one is, from 0; only process 0 writes."""
    return dist.get_rank() if world() > 1 else 0


def local_device() -> torch.device:
    """The device for this process's model: a GPU of its own where there are GPUs, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Joins the processes that ``torchrun`` started: gloo on CPU, NCCL on GPU. A group that is there already stays."""
    started = int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ
    if not started or not dist.is_available() or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def distributed(model: nn.Module, device: torch.device) -> nn.Module:
    """The model as each process calls it: its gradients are the mean over the processes."""
    if world() == 1 or isinstance(model, DistributedDataParallel):
        return model
    if any(isinstance(one, _BatchNorm) and not isinstance(one, nn.SyncBatchNorm) for one in model.modules()):
        _LOG.warning(
            "BatchNorm normalizes over each process's own part of a batch, so %d processes do not learn what one does. "
            "On GPUs convert the model first: torch.nn.SyncBatchNorm.convert_sync_batchnorm(model).",
            world(),
        )
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


def summed(tensor: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def any_process(here: bool, device: torch.device) -> bool:
    """Whether it is so in any process."""
    return bool(summed(torch.tensor(float(here), device=device)) > 0) if world() > 1 else here


def from_all(value: Value) -> list[Value]:
    """The values of all processes, in order."""
    if world() == 1:
        return [value]
    values: list[Value] = [value] * world()
    dist.all_gather_object(values, value)
    return values


def from_first(function: Callable[[], Value]) -> Value:
    """What ``function()`` gives in process 0, in all of them; so is an error that it raises on purpose."""
    if world() == 1:
        return function()
    answer: list[tuple[Value | None, BackpassError | None]] = [(None, None)]
    if rank() == 0:
        try:
            answer = [(function(), None)]
        except BackpassError as error:
            answer = [(None, error)]
    dist.broadcast_object_list(answer, src=0)
    value, problem = answer[0]
    if problem is not None:
        raise problem
    return value  # type: ignore[return-value]
