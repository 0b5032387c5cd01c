"""Arms run on a real Dask cluster; a worker that is killed in mid-run changes nothing."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from backpass.errors import BackpassError
from backpass.experiments.running import run
from support.experiments import experiment, many, outcome_bytes

TESTS = Path(__file__).parents[2]


@pytest.fixture
def cluster(tmp_path):
    """Address of a scheduler, and two workers, each a process."""
    pytest.importorskip("distributed", reason="dask.distributed is not installed")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    processes = []

    def start(*arguments):
        command = [sys.executable, "-m", *arguments]
        processes.append(subprocess.Popen(command, env=environment, cwd=tmp_path))
        return processes[-1]

    file = tmp_path / "scheduler.json"
    start("distributed.cli.dask_scheduler", "--scheduler-file", str(file), "--host", "127.0.0.1", "--port", "0",
          "--no-dashboard", "--no-show")  # fmt: skip
    workers = [
        start("distributed.cli.dask_worker", "--scheduler-file", str(file), "--nthreads", "1", "--no-nanny",
              "--no-dashboard")
        for _ in range(2)
    ]  # fmt: skip
    deadline = time.monotonic() + 120
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    from distributed import Client

    with Client(scheduler_file=str(file), timeout=120) as client:
        client.wait_for_workers(2, timeout=120)
        address = client.scheduler.address
    yield address, workers
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_with_a_worker_killed_the_outcomes_are_those_of_one_process(cluster, tmp_path):
    address, workers = cluster
    told = []

    def progress(what):
        told.append(what)
        if len(told) == 5:
            workers[0].send_signal(signal.SIGKILL)

    (done,) = run([many()], scale="small", out=tmp_path / "a", cluster=address, progress=progress)
    (single,) = run([many()], scale="small", out=tmp_path / "b")
    assert done.result.claims == single.result.claims
    assert outcome_bytes(tmp_path / "a") == outcome_bytes(tmp_path / "b")
    assert len(told) == 60


@pytest.mark.slow
def test_where_no_scheduler_answers_the_error_names_the_address(tmp_path):
    pytest.importorskip("distributed", reason="dask.distributed is not installed")
    with pytest.raises(BackpassError, match=r"no Dask scheduler answers at tcp://127\.0\.0\.1:9"):
        list(run([experiment()], scale="small", out=tmp_path, cluster="tcp://127.0.0.1:9"))
