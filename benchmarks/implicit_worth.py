"""Worth of implicit steps: held-out loss after equal steps and in equal time, for tuned optimizers.

    OMP_NUM_THREADS=1 python benchmarks/implicit_worth.py runs.jsonl [--only GPT] [--methods AdamW Muon] [--costs]
    python benchmarks/implicit_worth.py runs.jsonl --report table.json

Each run is a line of the file, so an interrupted study goes on where it was; ``--report`` prints the tables of what is
there and writes them. Rates are chosen on a seed and a held-out part of their own, by the held-out loss after the last
step; where the best rate is at the end of the grid, the grid grows. The other seeds hold out other data. ``--costs``
measures the CPU time of each method's whole run over AdamW's on one thread, the methods' steps interleaved. "Equal
time" is the loss after as many steps as fit into the time of all of AdamW's, interpolated between evaluations.
Intervals are 95 % Student intervals of the paired difference.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, AdamW, Muon, Optimizer

from backpass import SIBP, BackpassError, ProxProp
from backpass.training import keep_freed_memory
from implicit_networks import GPT, SETTINGS, Setting, of_text

T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
EVALUATIONS = 10
HELD = {"GPT": 64}
TUNING = 100

_OUTER = ("token", "place", "head")


def muon(model: nn.Module, rate: float) -> list[Optimizer]:
    hidden = [p for name, p in model.named_parameters() if p.dim() == 2 and name.split(".")[0] not in _OUTER]
    chosen = {id(p) for p in hidden}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [Muon(hidden, rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"), AdamW(others, rate)]


def soap(model: nn.Module, rate: float) -> list[Optimizer]:
    from pytorch_optimizer import SOAP

    return [SOAP(model.parameters(), lr=rate, precondition_frequency=10)]


def one(kind: Callable[..., Optimizer], model: nn.Module, rate: float, **settings: Any) -> list[Optimizer]:
    return [kind(model.parameters(), rate, **settings)]


@dataclass(frozen=True)
class Method:
    """How to train: optimizers as a function of the rate, the middle of its grid, and a rule."""

    optimizers: Callable[[nn.Module, float], list[Optimizer]]
    first: float
    rule: ProxProp | SIBP | None = None


ADAMW = Method(partial(one, AdamW), 3e-3)
METHODS = {
    "AdamW": ADAMW,
    "ProxProp exact": replace(ADAMW, rule=ProxProp()),
    "ProxProp with memory": replace(ADAMW, rule=ProxProp(solve="step", memory=0.9)),
    "Muon": Method(muon, 6e-3),
    "SIBP": Method(partial(one, SGD), 1.0, SIBP(eta=None)),
    "SGD": Method(partial(one, SGD, momentum=0.9), 0.03),
    "SOAP": Method(soap, 3e-3),
}
TAUS = (0.1, 0.3, 3.0, 10.0)

# The networks of `implicit_cost`, with smaller batches where a step is long, and their steps.
WORTH: dict[str, tuple[Setting, int]] = {
    "MLP 784-256-256-10, MNIST, batch 128": (SETTINGS["MLP 784-256-256-10, batch 128"], 200),
    "GPT d64 L2, 1,024 tokens": (SETTINGS["GPT d64 L2, 1,024 tokens"], 150),
    "ViT d64 L3, CIFAR-10, batch 16": (replace(SETTINGS["ViT d64 L3, batch 64"], batch=16), 100),
    "CNN with BatchNorm, CIFAR-10, batch 32": (replace(SETTINGS["CNN with BatchNorm, batch 128"], batch=32), 80),
    "GPT d256 L1, 1,024 tokens": (Setting(lambda: GPT(256, 1), of_text, 16), 60),
}


class Training:
    """A method on a network from a seed: steps, their CPU time, and the held-out loss."""

    def __init__(self, setting: Setting, method: Method, rate: float, seed: int, held: int) -> None:
        self.data, self.batch, self.held, self.seconds = setting.data(seed), setting.batch, held, 0.0
        torch.manual_seed(seed)
        self.model = setting.make()
        self.optimizers = method.optimizers(self.model, rate)
        if isinstance(method.rule, ProxProp) and method.rule.solve == "step":
            method.rule.attach(self.model, self.optimizers)
        elif method.rule is not None:
            method.rule.attach(self.model)
        self.generator = torch.Generator().manual_seed(seed)

    def step(self) -> None:
        x, y = self.data[:2]
        rows = torch.randint(len(x), (self.batch,), generator=self.generator)
        start = time.process_time()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        F.cross_entropy(self.model(x[rows]), y[rows]).backward()
        for optimizer in self.optimizers:
            optimizer.step()
        self.seconds += time.process_time() - start

    def loss(self) -> float:
        x, y = (part[: self.held] for part in self.data[2:])
        self.model.eval()
        with torch.no_grad():
            loss = F.cross_entropy(self.model(x), y).item()
        self.model.train()
        return loss if math.isfinite(loss) else math.inf


def train(setting: Setting, method: Method, rate: float, seed: int, steps: int, held: int) -> dict[str, Any]:
    """Held-out losses at the evaluations, infinite after a failure, and CPU seconds per step."""
    run, found = Training(setting, method, rate, seed, held), []
    for step in range(1, steps + 1):
        try:
            run.step()
        except BackpassError:
            found += [math.inf] * (EVALUATIONS - len(found))
            break
        if step * EVALUATIONS % steps == 0:
            found.append(run.loss())
    return {"losses": found, "seconds": run.seconds / step}


def costs(setting: Setting, methods: list[str], steps: int) -> dict[str, float]:
    """CPU time of a run over AdamW's, steps interleaved."""
    runs = {name: Training(setting, METHODS[name], METHODS[name].first / 3, TUNING, 1) for name in methods}
    for _ in range(steps):
        for run in runs.values():
            run.step()
    return {name: run.seconds / runs["AdamW"].seconds for name, run in runs.items()}


def best(losses: dict[float, float]) -> tuple[float, bool]:
    """The best rate, and whether the grid holds it inside."""
    found = min(losses, key=losses.__getitem__)
    return found, found not in (min(losses), max(losses))


def work(known: dict[tuple, dict], name: str, method: str, seeds: int) -> Iterator[tuple[float, int, float | None]]:
    """What is left to run: (rate, seed, tau), rates of the grid first; goes on as ``known`` grows."""

    def tuned() -> dict[float, float]:
        return {
            key[2]: run["losses"][-1] for key, run in known.items() if key[:2] == (name, method) and key[3] == TUNING
        }

    first = METHODS[method].first
    yield from ((rate, TUNING, None) for rate in (first / 3, first, first * 3) if rate not in tuned())
    for _ in range(4):
        rate, inside = best(tuned())
        if inside:
            break
        yield (rate / 3 if rate == min(tuned()) else rate * 3), TUNING, None
    rate = best(tuned())[0]
    yield from ((rate, seed, None) for seed in range(seeds))
    if method == "ProxProp exact":
        yield from ((rate, seed, tau) for tau in TAUS for seed in range(3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--only", default="", help="settings whose name holds this")
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--costs", action="store_true")
    parser.add_argument("--report", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    lines = arguments.runs.read_text().splitlines() if arguments.runs.exists() else []
    known = {tuple(run["key"]): run for run in map(json.loads, lines)}

    def keep(key: tuple, run: dict[str, Any]) -> None:
        known[key] = run
        with arguments.runs.open("a") as file:
            file.write(json.dumps({"key": key, **run}) + "\n")

    if arguments.report:
        tables = {name: table(name, known) for name in WORTH}
        for name, rows in tables.items():
            show(name, rows)
        arguments.report.write_text(json.dumps(tables, indent=1) + "\n")
        return
    chosen_networks = {name: one for name, one in WORTH.items() if arguments.only in name}
    if arguments.costs:
        for name, (setting, steps) in chosen_networks.items():
            keep((name, "costs"), costs(setting, arguments.methods, steps))
        return
    for method in arguments.methods:
        chosen = METHODS[method]
        for name, (setting, steps) in chosen_networks.items():
            held = HELD.get(name[:3], 500)
            for rate, seed, tau in work(known, name, method, arguments.seeds):
                key = (name, method, rate, seed, tau)
                if key in known:
                    continue
                rule = chosen.rule if tau is None else replace(chosen.rule, tau=tau, damping="relative")
                keep(key, train(setting, replace(chosen, rule=rule), rate, seed, steps, held))


def at(losses: list[float], share: float) -> float:
    """The loss after a share of the steps, interpolated between evaluations."""
    position = min(share, 1.0) * len(losses) - 1
    if position <= 0:
        return losses[0]
    low = min(int(position), len(losses) - 2)
    return losses[low] + (position - low) * (losses[low + 1] - losses[low])


def interval(differences: list[float]) -> str:
    mean = statistics.fmean(differences)
    if len(differences) < 2 or not all(map(math.isfinite, differences)):
        return f"{mean:+.3f}"
    half = T_975.get(len(differences), 2.262) * statistics.stdev(differences) / len(differences) ** 0.5
    return f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]"


def table(name: str, known: dict[tuple, dict]) -> list[dict[str, Any]]:
    """One row for each method of a network: held-out losses of the seeds after equal steps and in AdamW's time."""
    runs: dict[tuple, dict[int, dict]] = {}
    grids: dict[str, dict[float, float]] = {}
    interleaved = known.get((name, "costs"), {})
    for (network, method, rate, seed, tau), run in ((key, run) for key, run in known.items() if len(key) == 5):
        if network == name and seed == TUNING:
            grids.setdefault(method, {})[rate] = run["losses"][-1]
        elif network == name:
            runs.setdefault((method, tau), {})[seed] = run
    base, rows = runs.get(("AdamW", None), {}), []
    for (method, tau), found in runs.items():
        seeds = sorted(set(found) & set(base))
        if not seeds:
            continue
        rate, inside = best(grids[method])
        apart = statistics.median(found[seed]["seconds"] / base[seed]["seconds"] for seed in seeds)
        cost = interleaved.get(method, apart)
        row = {"method": method, "tau": tau, "rate": rate, "inside": inside, "cost": round(cost, 2), "seeds": seeds}
        row["steps"] = [round(found[seed]["losses"][-1], 4) for seed in seeds]
        row["time"] = [round(at(found[seed]["losses"], 1 / cost), 4) for seed in seeds]
        row["AdamW"] = [round(base[seed]["losses"][-1], 4) for seed in seeds]
        rows.append(row)
    return rows


def show(name: str, rows: list[dict[str, Any]]) -> None:
    """Print the table of a network, in Markdown."""
    print(f"\n**{name}**, {WORTH[name][1]} steps\n")
    print("| method | rate | time | after equal steps | difference to AdamW | in AdamW's time | difference |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        title = row["method"] + ("" if row["tau"] is None else f", tau {row['tau']:g}")
        cells = [f"{title} ({len(row['seeds'])})", f"{row['rate']:.2g}{'' if row['inside'] else ' (end of the grid)'}"]
        cells.append(f"{row['cost']:.2f}")
        for losses in (row["steps"], row["time"]):
            differences = [a - b for a, b in zip(losses, row["AdamW"], strict=True)]
            cells += [f"{statistics.fmean(losses):.3f}", interval(differences) if any(differences) else ""]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
