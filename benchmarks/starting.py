"""How long it takes to begin."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator

from side_by_side import Options, Row, Section, milliseconds

ASKED_IMPORT, ASKED_HELP = 50.0, 600.0  # milliseconds
BEYOND = "ms beyond torch"
TIMED = "import time, torch; began = time.process_time(); {}; print(time.process_time() - began)"
"""In one process: torch's own import scatters by hundreds of milliseconds from one process to the next."""


def cpu_seconds(*arguments: str) -> float:
    """CPU seconds of a Python process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def seconds_beyond_torch(statement: str) -> float:
    """CPU seconds of an import in a process that has imported torch."""
    command = [sys.executable, "-c", TIMED.format(statement)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def sections(options: Options) -> Iterator[Section]:
    """Imports and help."""
    imports = ("import backpass", "from backpass import LinBP", "from backpass.attacks import PGD")
    helps = {"backpass --help": ("--help",), "backpass attack --help": ("attack", "--help")}
    beyond: dict[str, list[float]] = {name: [] for name in imports}
    times: dict[str, list[float]] = {name: [] for name in ("import torch", *helps)}
    for number in range(options.rounds(7) + 1):
        found = {name: seconds_beyond_torch(name) for name in imports}
        taken = {name: cpu_seconds("-m", "backpass", *arguments) for name, arguments in helps.items()}
        taken["import torch"] = cpu_seconds("-c", "import torch")
        if number:  # the first one warms the disk
            for name, seconds in found.items():
                beyond[name].append(seconds)
            for name, seconds in taken.items():
                times[name].append(seconds)
    yield Section(
        title="Starting",
        text="CPU time. What backpass adds to `import torch` is timed in a process that has imported torch; the others "
        "are whole processes.",
        rows=[
            Row(name="import torch", figures={"ms": milliseconds(times["import torch"])}),
            *(
                Row(name=name, figures={BEYOND: milliseconds(seconds)}, asked=(BEYOND, ASKED_IMPORT))
                for name, seconds in beyond.items()
            ),
            *(Row(name=name, figures={"ms": milliseconds(times[name])}, asked=("ms", ASKED_HELP)) for name in helps),
        ],
    )
