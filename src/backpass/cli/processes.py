"""Several processes of one command, as torchrun starts them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["barrier", "leave", "processes"]

_joined = False


@contextmanager
def processes(device: torch.device) -> Iterator[tuple[torch.device, bool]]:
    """Join the other processes; yield this one's device, and True in the first, which writes and prints.

    Without torchrun there is one process. On CUDA each process has the device of its local rank.
    """
    import torch
    import torch.distributed as dist

    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ or dist.is_initialized():
        yield device, True
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    global _joined
    _joined = True
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        if dist.get_rank() == 0:
            yield device, True
        else:
            with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):  # noqa: PTH123
                yield device, False
    finally:
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for the other processes."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()


def leave() -> None:
    """End this process at once if it was one of several and has succeeded.

    The threads of gloo, which `DistributedDataParallel` keeps alive, were seen to abort an interpreter that ends.
    """
    if _joined:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
