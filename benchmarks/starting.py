"""How long it takes to begin."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator

from side_by_side import Options, Row, Section, milliseconds

ASKED_IMPORT, ASKED_HELP = 50.0, 600.0  # milliseconds


def cpu_seconds(*arguments: str) -> float:
    """CPU seconds of a Python process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def sections(options: Options) -> Iterator[Section]:
    """Imports and help."""
    programs = {
        "import torch": ("-c", "import torch"),
        "import torch, backpass": ("-c", "import torch, backpass"),
        "from backpass import LinBP": ("-c", "from backpass import LinBP"),
        "backpass --help": ("-m", "backpass", "--help"),
        "backpass attack --help": ("-m", "backpass", "attack", "--help"),
    }
    times: dict[str, list[float]] = {name: [] for name in programs}
    for number in range(options.rounds(7) + 1):
        for name, arguments in programs.items():
            seconds = cpu_seconds(*arguments)
            if number:
                times[name].append(seconds)
    rows = [Row(name=name, figures={"ms": milliseconds(seconds)}) for name, seconds in times.items()]
    beyond = {
        name: 1e3 * (min(times[name]) - min(times["import torch"]))
        for name in ("import torch, backpass", "from backpass import LinBP")
    }
    yield Section(
        title="Starting",
        text="CPU time of whole processes, in turn. What backpass adds to `import torch` is the difference of the "
        "least.",
        rows=[
            *(row for row in rows if "help" not in row.name),
            *(
                Row(
                    name=f"{name}, beyond torch",
                    figures={"ms beyond torch": value},
                    asked=("ms beyond torch", ASKED_IMPORT),
                )
                for name, value in beyond.items()
            ),
            *(Row(name=row.name, figures=row.figures, asked=("ms", ASKED_HELP)) for row in rows if "help" in row.name),
        ],
    )
