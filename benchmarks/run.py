"""All benchmarks, or some, side by side with their peers; one page.

    OMP_NUM_THREADS=1 python benchmarks/run.py [NAME ...] [--device cuda] [--quick] [--out docs/benchmarks]

Optional peers: pip install torchsde adversarial-robustness-toolbox
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import attacks
import proxprop
import rules
import sde
import sibp
import starting
import training
from backpass.training import keep_freed_memory
from page import environment, markdown, read, write
from side_by_side import Options

BENCHMARKS = {
    "starting": starting,
    "rules": rules,
    "attacks": attacks,
    "proxprop": proxprop,
    "sibp": sibp,
    "training": training,
    "sde": sde,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="small sizes and two rounds: does it run?")
    parser.add_argument("--out", type=Path, help="folder for the page and its JSON; what other names have there stays")
    arguments = parser.parse_args()
    names = arguments.names or list(BENCHMARKS)
    for name in names:
        if name not in BENCHMARKS:
            parser.error(f"there is no benchmark {name!r}: {', '.join(BENCHMARKS)}")
    keep_freed_memory()
    torch.set_num_threads(1)
    options = Options(device=arguments.device, quick=arguments.quick)
    where = environment(options)
    before = arguments.out / f"{options.device}.json" if arguments.out else None
    found = read(before)[0] if before and before.exists() else {}
    for name in names:
        found[name] = list(BENCHMARKS[name].sections(options))
        print(markdown({name: found[name]}, where), flush=True)
    if arguments.out:
        ordered = {name: found[name] for name in BENCHMARKS if name in found}
        print("written:", *write(ordered, where, arguments.out))


if __name__ == "__main__":
    main()
