"""Parallel execution of experiments on one machine or a Dask cluster."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from backpass.allocator import keep_freed_memory
from backpass.data import load_data
from backpass.errors import BackpassError
from backpass.experiments.describing import describe
from backpass.experiments.experiment import Context, Experiment, Outcome
from backpass.experiments.judging import RunsByArm, collect
from backpass.experiments.outcomes import Store, Task, tasks_of
from backpass.report.page import write_report
from backpass.report.reading import read_result
from backpass.report.result import Result, plain
from backpass.version import __version__

__all__ = ["OUTCOMES", "Done", "Failed", "run", "run_here"]

OUTCOMES = "outcomes"
"""Name of the folder of all outcomes, next to the folders of the experiments."""


@dataclass(frozen=True, kw_only=True)
class Done:
    """An experiment with a result.

    Attributes:
        result: the result.
        paths: its page and its JSON file.
        kept: True if the files of an earlier run were kept.
    """

    result: Result
    paths: tuple[Path, Path]
    kept: bool = False

    @property
    def name(self) -> str:
        """Name of the experiment."""
        return self.result.experiment


@dataclass(frozen=True, kw_only=True)
class Failed:
    """An experiment without a result.

    Attributes:
        name: name of the experiment.
        reason: error message.
    """

    name: str
    reason: str


def run(
    experiments: Sequence[Experiment],
    *,
    scale: str,
    out: Path,
    device: torch.device | None = None,
    jobs: int = 1,
    cluster: str | None = None,
    recompute: bool = False,
    progress: Callable[[str], None] = lambda what: None,
) -> Iterator[Done | Failed]:
    """Run experiments and yield each one when it is complete or has failed; a failure does not stop the others.

    Outcomes are stored one by one in ``out/outcomes`` and shared by the experiments, so that an interrupted run
    resumes where it stopped.

    Args:
        experiments: experiments to run.
        scale: ``small`` or ``paper``.
        out: output folder; each experiment gets a subfolder with ``report.html`` and ``result.json``.
        device: device to compute on; the CPU by default.
        jobs: number of worker processes on this machine, each with an equal share of the cores.
        cluster: address of a Dask scheduler, whose workers run the arms instead. They need the same packages and data;
            trained networks are shared where they see the same ``out``.
        recompute: recompute stored outcomes.
        progress: called with a description of the current task.

    Raises:
        UnknownNameError: the scale is unknown.
        BackpassError: the data of an experiment is missing; raised before anything is run.
    """
    device = device or torch.device("cpu")
    if jobs < 1:
        raise BackpassError(f"jobs must be at least 1, got {jobs}.")
    for name in sorted({name for experiment in experiments for name in experiment.data}):
        load_data(name, split="train")  # fail before any run if data is missing
    store = Store(out / OUTCOMES)
    needed: dict[str, dict[str, Task]] = {}  # missing tasks by experiment and file name
    for experiment in experiments:
        tasks = {task.name: task for *_, task in tasks_of(experiment.design(scale), device.type)}
        needed[experiment.name] = {name: task for name, task in tasks.items() if recompute or store.read(task) is None}
    waiting = {experiment.name: experiment for experiment in experiments}
    for name in [name for name, missing in needed.items() if not missing]:
        yield _conclude(waiting.pop(name), scale, out, store, device, computed=False)
    missing = {key: task for one in needed.values() for key, task in one.items()}
    context, failed = Context(device=device, folder=out.resolve() / "shared"), {}
    with closing(_compute(list(missing.values()), context, jobs, cluster, progress)) as outcomes:
        for task, outcome in outcomes:
            if isinstance(outcome, str):
                failed[task.name] = f"{task.label}: {outcome}"
            else:
                store.write(task, outcome)
            for name in [name for name in waiting if task.name in needed[name]]:
                del needed[name][task.name]
                if task.name in failed:
                    del waiting[name]
                    yield Failed(name=name, reason=failed[task.name])
                elif not needed[name]:
                    yield _conclude(waiting.pop(name), scale, out, store, device, computed=True)


def run_here(
    experiment: Experiment,
    scale: str,
    *,
    out: Path,
    context: Context,
    store: bool = True,
    progress: Callable[[str, float], None] = lambda what, share: None,
) -> tuple[Result, RunsByArm] | None:
    """Run one experiment in this process, and return its result and its outcomes.

    For experiments that are built on the spot: works may use ``context.loaded``, and every outcome is computed. Errors
    of a work are raised. The caller writes the report into ``out``.

    Args:
        experiment: the experiment.
        scale: name of its scale.
        out: folder of the report; outcomes are stored in ``out/outcomes``.
        context: device, shared folder and loaded objects.
        store: False in the other processes of a distributed run, which only take part in the works.
        progress: called with a description of the current run and the finished share of all.

    Returns:
        The result and the runs by group and arm; None without `store`.
    """
    kept = Store(out / OUTCOMES)
    tasks = [task for *_, task in tasks_of(experiment.design(scale), context.device.type)]
    for number, task in enumerate(tasks):

        def show(share: float, what: str = task.label, done: int = number) -> None:
            progress(what, (done + share) / len(tasks))

        show(0.0)
        began = time.perf_counter()
        outcome = {**task.run(replace(context, progress=show)), "wall seconds": time.perf_counter() - began}
        if store:
            kept.write(task, outcome)
    if not store:
        return None
    found, read = collect(experiment.design(scale), kept, context.device.type)
    return describe(experiment, scale, found, read, kept, context.device), found


def _compute(
    tasks: Sequence[Task], context: Context, jobs: int, cluster: str | None, progress: Callable[[str], None]
) -> Generator[tuple[Task, Outcome | str]]:
    """Yield each task with its outcome, or with an error message, in the order of completion."""
    if jobs == 1 and cluster is None:
        for task in tasks:
            progress(task.label)
            yield _try(task, context, None)
        return
    import joblib

    with ExitStack() as stack:
        threads = max(1, (os.cpu_count() or 1) // jobs)
        if cluster is not None:
            threads = 1
            stack.enter_context(_connected(cluster))
        else:
            stack.enter_context(joblib.parallel_config("loky", n_jobs=jobs, inner_max_num_threads=threads))
        parallel = joblib.Parallel(return_as="generator_unordered", batch_size=1, pre_dispatch="2*n_jobs")
        ended = parallel(joblib.delayed(_try)(task, context, threads) for task in tasks)
        with closing(ended):  # closing it early, for instance on Ctrl-C, ends the workers
            for done, (task, outcome) in enumerate(ended, 1):
                progress(f"{task.label}, {done} of {len(tasks)}")
                yield task, outcome


def _connected(address: str) -> ExitStack:
    """Return a context in which joblib runs on a Dask cluster.

    Raises:
        BackpassError: dask.distributed is not installed, or no scheduler answers at the address.
    """
    import joblib

    try:
        from distributed import Client
    except ImportError as error:
        raise BackpassError(
            "--cluster needs dask.distributed. Install it with: pip install 'backpass[cluster]'"
        ) from error
    with ExitStack() as stack:
        try:
            stack.enter_context(Client(address))
        except OSError as error:
            raise BackpassError(f"no Dask scheduler answers at {address}: {error}.") from error
        stack.enter_context(joblib.parallel_config("dask"))
        return stack.pop_all()


def _try(task: Task, context: Context, threads: int | None) -> tuple[Task, Outcome | str]:
    """Run a task and return its outcome, or the error message if it fails."""
    if threads is not None:
        torch.set_num_threads(threads)
        keep_freed_memory()
    began = time.perf_counter()
    try:
        return task, {**task.run(context), "wall seconds": time.perf_counter() - began}
    except BackpassError as error:
        return task, str(error)
    except Exception as error:
        return task, f"{type(error).__name__}: {error}"


def _conclude(
    experiment: Experiment, scale: str, out: Path, store: Store, device: torch.device, *, computed: bool
) -> Done | Failed:
    """Test the claims of an experiment whose outcomes are complete, and write its report."""
    try:
        found, read = collect(experiment.design(scale), store, device.type)
        folder = out / experiment.name
        result = describe(experiment, scale, found, read, store, device)
        kept = None if computed else _kept(folder, result)
        if kept is not None:
            return Done(result=kept, paths=(folder / "report.html", folder / "result.json"), kept=True)
        return Done(result=result, paths=write_report(result, folder))
    except Exception as error:
        words = str(error) if isinstance(error, BackpassError) else f"{type(error).__name__}: {error}"
        return Failed(name=experiment.name, reason=words)


def _kept(folder: Path, result: Result) -> Result | None:
    """Return an earlier result with the same outcomes and verdicts, if its report exists; else None."""
    try:
        earlier = read_result(folder / "result.json")
    except BackpassError:
        return None
    same = (
        earlier.numbers == plain(result.numbers)
        and [claim.verdict for claim in earlier.claims] == [claim.verdict for claim in result.claims]
        and (earlier.scale, earlier.environment["versions"].get("backpass")) == (result.scale, __version__)
    )
    return earlier if same and (folder / "report.html").exists() else None
