"""Distributed training with processes started by ``torchrun``."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from itertools import count
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from backpass.errors import BackpassError

__all__ = [
    "any_process",
    "distributed",
    "from_all",
    "from_first",
    "is_sharded",
    "joined",
    "like",
    "local_device",
    "local_model",
    "rank",
    "summed",
    "unsynchronized",
    "whole",
    "world",
]

_LOG = logging.getLogger(__name__)
_RUNS = count()  # all processes start the same runs in the same order

Value = TypeVar("Value")


def world() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the rank of this process, from 0; only process 0 writes files."""
    return dist.get_rank() if world() > 1 else 0


def local_device() -> torch.device:
    """Return the device for this process's model: its own GPU if available, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Join the processes that ``torchrun`` started: gloo on CPU, NCCL on GPU. An existing group is kept.

    Raises:
        BackpassError: another process failed; the message contains its error.
    """
    started = int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ
    own = started and dist.is_available() and not dist.is_initialized()
    if own:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        with _telling_others():
            yield
    finally:
        if own:
            dist.destroy_process_group()


@contextmanager
def _telling_others() -> Iterator[None]:
    """Publish an error of this process, and replace a lost connection by the error of the process that failed."""
    if world() == 1:
        yield
        return
    store, key = dist.distributed_c10d._get_default_store(), f"backpass/error/{next(_RUNS)}"
    try:
        yield
    except RuntimeError as error:
        problem = None
        with suppress(Exception):  # the process that hosts the store may have died
            problem = store.get(key).decode() if store.check([key]) else None
        if problem is None and not _is_lost(error):
            _publish(store, key, error)
            raise
        reason = f"another process failed: {problem}" if problem else f"another process died ({error})"
        raise BackpassError(f"{reason}. Start all processes again, with resume=True to continue.") from error
    except BaseException as error:
        _publish(store, key, error)
        raise


def _is_lost(error: RuntimeError) -> bool:
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(
        word in text for word in ("connection", "gloo", "nccl", "timed out", "peer", "broken pipe")
    )


def _publish(store: Any, key: str, error: BaseException) -> None:
    with suppress(Exception):
        store.compare_set(key, "", f"process {rank()}: {type(error).__name__}: {error}")


def is_sharded(model: nn.Module) -> bool:
    """Return True if ``fully_shard`` (FSDP2) has sharded a part of the model."""
    if not dist.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(one, FSDPModule) for one in model.modules())


def whole(tensor: Tensor) -> Tensor:
    """Return the full tensor of a tensor that may be sharded over processes."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


def like(tensor: Tensor, other: Any) -> Tensor:
    """Return a full tensor on the device of another one, with its sharding."""
    moved: Tensor = tensor.to(other.device)
    if not hasattr(other, "full_tensor"):
        return moved
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(moved, other.device_mesh, other.placements)


def distributed(model: nn.Module, device: torch.device) -> nn.Module:
    """Return the model wrapped so that its gradients are the mean over the processes.

    Raises:
        BackpassError: the model has a SyncBatchNorm, and is on the CPU.
    """
    if world() == 1 or isinstance(model, DistributedDataParallel):
        return model
    norms = [isinstance(one, nn.SyncBatchNorm) for one in model.modules() if isinstance(one, _BatchNorm)]
    if any(norms) and device.type == "cpu":
        raise BackpassError(
            "torch has SyncBatchNorm for GPUs only, and the model is on the CPU: use GPUs, a normalization within each "
            "sample (GroupNorm, LayerNorm), or BatchNorm, which normalizes over each process's own part of a batch."
        )
    if not all(norms):
        _LOG.warning(
            "BatchNorm normalizes over each process's own part of a batch, so %d processes do not learn what one does. "
            "On GPUs convert the model first: torch.nn.SyncBatchNorm.convert_sync_batchnorm(model).",
            world(),
        )
    if is_sharded(model):
        return model
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


def local_model(model: nn.Module) -> nn.Module:
    """Return the model without a DDP wrapper, whose forward would wait for the other processes.

    Raises:
        BackpassError: ``model`` is no ``nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise BackpassError(f"expected an nn.Module, got {type(model).__name__}: pass the model itself.")
    original = getattr(model, "_orig_mod", None)
    if isinstance(original, DistributedDataParallel):
        model = original
    return local_model(model.module) if isinstance(model, DistributedDataParallel) else model


@contextmanager
def _without_reduction(model: Any) -> Iterator[None]:
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def unsynchronized(model: nn.Module, more_to_come: bool) -> AbstractContextManager[object]:
    """Return a context in which gradients are not exchanged, because further parts of the batch follow."""
    if more_to_come and isinstance(model, DistributedDataParallel):
        return model.no_sync()
    if more_to_come and hasattr(model, "set_requires_gradient_sync"):
        return _without_reduction(model)
    return nullcontext()


def summed(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes in place, and return it."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def any_process(here: bool, device: torch.device) -> bool:
    """Return True if a condition is true in any process."""
    return bool(summed(torch.tensor(float(here), device=device)) > 0) if world() > 1 else here


def from_all(value: Value) -> list[Value]:
    """Return the values of all processes, in order."""
    if world() == 1:
        return [value]
    values: list[Value] = [value] * world()
    dist.all_gather_object(values, value)
    return values


def from_first(function: Callable[[], Value]) -> Value:
    """Return in all processes the value of ``function()`` in process 0; its errors are raised in all of them."""
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
