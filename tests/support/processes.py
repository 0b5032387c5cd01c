"""Run a function in several gloo processes on this machine."""

import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _run(rank: int, size: int, port: int, function: Callable[..., Any], args: tuple[Any, ...], queue: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(size))
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", rank=rank, world_size=size, timeout=timedelta(seconds=60))
        queue.put((rank, function(rank, *args), None))
        dist.barrier()
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def in_processes(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What ``function(rank, *args)`` gives in each of ``size`` processes; a failure there fails here."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    processes = [
        context.Process(target=_run, args=(rank, size, port, function, args, queue), daemon=True)
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    results = [queue.get() for _ in processes]
    for process in processes:
        process.join(60)
    failures = [error for _, _, error in results if error]
    assert not failures, failures[0]
    return [value for _, value, _ in sorted(results, key=lambda result: result[0])]
