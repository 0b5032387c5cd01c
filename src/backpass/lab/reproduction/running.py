"""Experiments run one after the other or side by side, each resumed where it was interrupted."""

from __future__ import annotations

import multiprocessing
import multiprocessing.queues
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch

from backpass.allocator import keep_freed_memory
from backpass.data import load_data
from backpass.errors import BackpassError
from backpass.lab.bench.experiment import Bench
from backpass.lab.bench.pieces import Pieces
from backpass.lab.experiments.catalogue import choose
from backpass.report.page import write_report
from backpass.report.reading import read_result
from backpass.report.result import Result
from backpass.version import __version__

__all__ = ["Done", "Failed", "reproduce"]

Progress = Callable[[str], None]
"""Called with what is being computed."""

Told = multiprocessing.queues.SimpleQueue[str]


@dataclass(frozen=True, kw_only=True)
class Done:
    """One experiment that has a result.

    Attributes:
        result: what it found.
        paths: its page and its JSON.
        kept: whether the result of an earlier run was kept.
    """

    result: Result
    paths: tuple[Path, Path]
    kept: bool = False

    @property
    def name(self) -> str:
        """Of the experiment."""
        return self.result.experiment


@dataclass(frozen=True, kw_only=True)
class Failed:
    """One experiment that has none.

    Attributes:
        name: of the experiment.
        reason: in words.
    """

    name: str
    reason: str


def reproduce(
    names: Sequence[str],
    *,
    scale: str,
    out: Path,
    device: torch.device,
    jobs: int = 1,
    again: bool = False,
    progress: Progress = lambda what: None,
) -> Iterator[Done | Failed]:
    """Runs experiments and yields each as it is done, or has failed: that does not stop the others.

    A finished experiment of the same scale and version is kept; of an interrupted one, the finished pieces are.

    Args:
        names: of the experiments, or ``all``.
        scale: ``small`` or ``paper``.
        out: the folder; each experiment gets one below, with ``report.html``, ``result.json`` and its pieces.
        device: where to compute.
        jobs: experiments side by side, each in a process of its own with an equal share of the cores.
        again: compute finished experiments anew.
        progress: called with what is being computed.

    Raises:
        UnknownNameError: there is no experiment or scale of that name.
        BackpassError: the data that one needs is not there; nothing has been run then.
    """
    chosen = choose(names)
    for experiment in chosen:
        experiment.settings(scale)
    for name in sorted({name for experiment in chosen for name in experiment.data}):
        load_data(name, split="train")  # before any work: hours later would be a bad moment to miss it
    if jobs < 1:
        raise BackpassError(f"jobs must be at least 1, got {jobs}.")
    names = [experiment.name for experiment in chosen]
    if jobs == 1 or len(names) == 1:
        for name in names:
            yield _try(name, scale, out, device, again, progress)
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    # Spawned, not forked: a fork of a process with torch's threads may hang.
    context = multiprocessing.get_context("spawn")
    told: Told = context.SimpleQueue()
    threading.Thread(target=_listen, args=(told, progress), daemon=True).start()
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_prepare, initargs=(threads, told)) as pool:
        waiting = [pool.submit(_try, name, scale, out, device, again) for name in names]
        try:
            for future in as_completed(waiting):
                yield future.result()
        except BaseException:
            # Finished pieces are on disk; nobody waits for the others. Without workers the pool gives up what waits,
            # as it could not with cancelled futures.
            for process in multiprocessing.active_children():
                process.kill()  # a training run would take a request to end as one to save first
            raise
        finally:
            told.put("")


def _listen(told: Told, progress: Progress) -> None:
    """Passes on what the processes tell, until an empty text ends it."""
    while what := told.get():
        progress(what)


_told: Told | None = None  # in a process of its own, the way to the one that started it


def _tell(what: str) -> None:
    if _told is not None:
        _told.put(what)


def _prepare(threads: int, told: Told) -> None:
    """What a process of its own does first."""
    global _told
    _told = told
    torch.set_num_threads(threads)
    keep_freed_memory()


def _try(
    name: str, scale: str, out: Path, device: torch.device, again: bool, progress: Progress | None = None
) -> Done | Failed:
    try:
        return _run(name, scale, out, device, again, progress or _tell)
    except BackpassError as error:
        return Failed(name=name, reason=str(error))
    except Exception as error:
        return Failed(name=name, reason=f"{type(error).__name__}: {error}")


def _run(name: str, scale: str, out: Path, device: torch.device, again: bool, progress: Progress) -> Done:
    (experiment,) = choose([name])
    folder = out / name
    kept = _finished(folder, scale)
    if kept is not None and not again:
        return Done(result=kept, paths=(folder / "report.html", folder / "result.json"), kept=True)
    bench = Bench(
        device=device,
        pieces=Pieces(folder / "pieces", lambda piece: progress(f"{name}: {piece}")),
        shared=Pieces(out / "shared", lambda piece: progress(f"{name}: {piece}")),
    )
    result = experiment.run(scale, bench)
    paths = write_report(result, folder)
    return Done(result=result, paths=paths)


def _finished(folder: Path, scale: str) -> Result | None:
    """The result of an earlier run of this scale and version, where there is one that can be read."""
    try:
        result = read_result(folder / "result.json")
    except BackpassError:
        return None
    same = result.scale == scale and result.environment["versions"].get("backpass") == __version__
    return result if same and (folder / "report.html").exists() else None
