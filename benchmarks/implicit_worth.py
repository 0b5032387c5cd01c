"""Worth of implicit steps: held-out loss after equal steps and after equal time, for tuned optimizers.

    OMP_NUM_THREADS=1 python benchmarks/implicit_worth.py [--only GPT] [--steps 200] [--seeds 5] [--out worth.json]

Rates are chosen on a seed and a held-out part of their own, by the held-out loss after the last step; where the best
rate is at the end of the grid, the grid grows. The other seeds hold out other data. Time is CPU time of training steps
on one thread; "equal time" is the time that AdamW takes for all its steps, and a run's loss then is interpolated
between evaluations. Intervals are 95 % Student intervals of the paired difference to AdamW.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, AdamW, Muon, Optimizer

from backpass import SIBP, BackpassError, ProxProp
from backpass.training import keep_freed_memory
from implicit_networks import SETTINGS, Setting

T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
EVALUATIONS = 10


def sgd(model: nn.Module, rate: float) -> list[Optimizer]:
    return [SGD(model.parameters(), rate, momentum=0.9)]


def plain_sgd(model: nn.Module, rate: float) -> list[Optimizer]:
    return [SGD(model.parameters(), rate)]


def adamw(model: nn.Module, rate: float) -> list[Optimizer]:
    return [AdamW(model.parameters(), rate)]


def muon(model: nn.Module, rate: float) -> list[Optimizer]:
    hidden = [p for name, p in model.named_parameters() if p.dim() == 2 and name.split(".")[0] not in _OUTER]
    chosen = {id(p) for p in hidden}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [Muon(hidden, rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"), AdamW(others, rate)]


_OUTER = ("token", "place", "head")


def soap(model: nn.Module, rate: float) -> list[Optimizer]:
    from pytorch_optimizer import SOAP

    return [SOAP(model.parameters(), lr=rate, precondition_frequency=10)]


@dataclass(frozen=True)
class Method:
    """How to train: optimizers as a function of the rate, the middle of its grid, and a rule."""

    optimizers: Callable[[nn.Module, float], list[Optimizer]]
    first: float
    rule: ProxProp | SIBP | None = None


METHODS = {
    "SGD": Method(sgd, 0.03),
    "AdamW": Method(adamw, 3e-3),
    "Muon": Method(muon, 3e-3),
    "SOAP": Method(soap, 3e-3),
    "ProxProp exact": Method(adamw, 3e-3, ProxProp()),
    "ProxProp with memory": Method(adamw, 3e-3, ProxProp(solve="step", memory=0.9, refresh=10)),
    "SIBP": Method(plain_sgd, 1.0, SIBP(eta=None)),
}


def train(setting: Setting, method: Method, rate: float, seed: int, steps: int) -> list[tuple[float, float]]:
    """(CPU seconds, held-out loss) at every evaluation; infinite losses after a failure."""
    x, y, held_x, held_y = setting.data(seed)
    torch.manual_seed(seed)
    model = setting.make()
    optimizers = method.optimizers(model, rate)
    if isinstance(method.rule, ProxProp) and method.rule.solve == "step":
        method.rule.attach(model, optimizers)
    elif method.rule is not None:
        method.rule.attach(model)
    generator, seconds, found = torch.Generator().manual_seed(seed), 0.0, []
    for step in range(1, steps + 1):
        rows = torch.randint(len(x), (setting.batch,), generator=generator)
        start = time.process_time()
        for optimizer in optimizers:
            optimizer.zero_grad()
        try:
            F.cross_entropy(model(x[rows]), y[rows]).backward()
        except BackpassError:
            return found + [(seconds, math.inf)] * (EVALUATIONS - len(found))
        for optimizer in optimizers:
            optimizer.step()
        seconds += time.process_time() - start
        if step * EVALUATIONS % steps == 0:
            model.eval()
            with torch.no_grad():
                losses = [
                    F.cross_entropy(model(a), b).item()
                    for a, b in zip(held_x.split(500), held_y.split(500), strict=True)
                ]
            model.train()
            loss = statistics.fmean(losses)
            found.append((seconds, loss if math.isfinite(loss) else math.inf))
    return found


def tuned(setting: Setting, method: Method, steps: int) -> tuple[float, bool]:
    """The best rate on the seed for tuning, and whether the grid holds it inside."""
    rates = [method.first / 3, method.first, method.first * 3]
    losses = {rate: train(setting, method, rate, 100, steps)[-1][1] for rate in rates}
    for _ in range(4):
        best = min(losses, key=losses.__getitem__)
        ends = (min(losses), max(losses))
        if best not in ends:
            break
        further = best / 3 if best == ends[0] else best * 3
        losses[further] = train(setting, method, further, 100, steps)[-1][1]
    best = min(losses, key=losses.__getitem__)
    return best, best not in (min(losses), max(losses))


def at(run: list[tuple[float, float]], seconds: float) -> float:
    """The loss after a time, between evaluations interpolated; the last one if the run was over before."""
    before = None
    for point in run:
        if point[0] >= seconds:
            if before is None:
                return point[1]
            share = (seconds - before[0]) / (point[0] - before[0])
            return before[1] + share * (point[1] - before[1])
        before = point
    return run[-1][1]


def interval(differences: list[float]) -> str:
    mean = statistics.fmean(differences)
    if len(differences) < 2 or not all(map(math.isfinite, differences)):
        return f"{mean:+.3f}"
    half = T_975.get(len(differences), 2.262) * statistics.stdev(differences) / len(differences) ** 0.5
    return f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="settings whose name holds this")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    results = json.loads(arguments.out.read_text()) if arguments.out and arguments.out.exists() else {}
    for name, setting in SETTINGS.items():
        if arguments.only not in name:
            continue
        known = results.setdefault(name, {"steps": arguments.steps, "rates": {}, "runs": {}})
        if known["steps"] != arguments.steps:
            parser.error(f"{arguments.out} holds runs of {known['steps']} steps")
        for one in arguments.methods:
            if one in known["runs"]:
                continue
            try:
                rate = tuned(setting, METHODS[one], arguments.steps)
            except ImportError as error:
                print(f"{one} left out: {error}")
                continue
            seeds = range(arguments.seeds)
            known["rates"][one] = rate
            known["runs"][one] = [train(setting, METHODS[one], rate[0], seed, arguments.steps) for seed in seeds]
            if arguments.out:
                arguments.out.write_text(json.dumps(results) + "\n")
        report(name, known)


def report(name: str, known: dict) -> None:
    base = known["runs"].get("AdamW")
    print(f"{name}, {known['steps']} steps: held-out loss, and its difference to AdamW's")
    for one, found in known["runs"].items():
        rate, inside = known["rates"][one]
        steps, cost = [run[-1][1] for run in found], statistics.median(run[-1][0] for run in found)
        line = f"  {one:21} rate {rate:.2g}{'' if inside else ' (end of the grid)'}, {cost:.1f} s, {len(found)} seeds: "
        line += f"equal steps {statistics.fmean(steps):.3f}"
        if base and len(base) == len(found):
            ends = [run[-1] for run in base]
            times = [at(run, end[0]) for run, end in zip(found, ends, strict=True)]
            line += f", {interval([a - end[1] for a, end in zip(steps, ends, strict=True)])}"
            line += f"; equal time {statistics.fmean(times):.3f}, "
            line += interval([a - end[1] for a, end in zip(times, ends, strict=True)])
        print(line, flush=True)


if __name__ == "__main__":
    main()
