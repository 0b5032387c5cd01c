"""Cost of implicit steps: whole training steps over those of AdamW, interleaved, on one thread.

    OMP_NUM_THREADS=1 python benchmarks/implicit_cost.py [--rounds 30] [--only GPT] [--out cost.json]

Every arm trains its own copy of the network on the same batches. An arm's figure is the median over rounds of its
CPU time over AdamW's in the same round; with memory a round is ten steps, so that every layer is refreshed once. Peak
memory is that of twelve steps in a process of its own, over AdamW's.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpass import SIBP, ProxProp
from implicit_networks import SETTINGS, Setting

RULES: dict[str, ProxProp | SIBP | None] = {
    "AdamW": None,
    "exact": ProxProp(),
    "default at the step": ProxProp(solve="step"),
    "memory .9, refresh 10": ProxProp(solve="step", memory=0.9, refresh=10),
    "SIBP": SIBP(),
}
STEPS = 10


def arm(make: Callable[[], nn.Module], rule: ProxProp | SIBP | None) -> Callable[[Tensor, Tensor], None]:
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    if isinstance(rule, ProxProp) and rule.solve == "step":
        rule.attach(model, optimizer)
    elif rule is not None:
        rule.attach(model)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def peak(work: Callable[[], None]) -> float:
    """MB by which a forked process grows while it does the work."""
    read, write = os.pipe()
    if not os.fork():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        work()
        os.write(write, str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before).encode())
        os._exit(0)
    os.wait()
    return int(os.read(read, 64)) / 1024


def measured(setting: Setting, arms: list[str], rounds: int) -> dict:
    """Milliseconds of AdamW, ratios to it, and peak memory."""
    x, y = setting.data(0)[:2]

    def run(step: Callable[[Tensor, Tensor], None], first: int, count: int) -> None:
        for k in range(first, first + count):
            rows = (torch.arange(setting.batch) + k * setting.batch) % len(x)
            step(x[rows], y[rows])

    memory = {one: peak(lambda one=one: run(arm(setting.make, RULES[one]), 0, STEPS + 2)) for one in arms}
    steps = {one: arm(setting.make, RULES[one]) for one in arms}
    times: dict[str, list[float]] = {one: [] for one in arms}
    for turn in range(rounds + 1):
        for one, step in steps.items():
            start = time.process_time()
            run(step, turn * STEPS, STEPS)
            if turn:
                times[one].append((time.process_time() - start) / STEPS)
    ratios = {
        one: statistics.median(a / b for a, b in zip(values, times["AdamW"], strict=True))
        for one, values in times.items()
    }
    return {"ms of AdamW": 1e3 * statistics.median(times["AdamW"]), "ratio": ratios, "peak MB": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", help="settings whose name holds this")
    parser.add_argument("--arms", nargs="*", default=list(RULES))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arms = list(dict.fromkeys(["AdamW", *arguments.arms]))
    found = {}
    for name, setting in SETTINGS.items():
        if arguments.only in name:
            one = found[name] = measured(setting, arms, arguments.rounds)
            listing = "; ".join(f"{arm} {one['ratio'][arm]:.2f}, {one['peak MB'][arm]:.0f} MB" for arm in arms)
            print(f"{name}: AdamW {one['ms of AdamW']:.1f} ms; {listing}", flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
