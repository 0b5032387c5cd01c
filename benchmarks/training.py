"""What the trainer costs beside a loop written by hand, and a rule beside plain backpropagation.

Whole runs of some steps, data loading included, taken in turn in one process; medians of ratios within a round.
Run: python benchmarks/training.py [--device cuda] [--dtype bf16] [--channels-last] [--compile] [--json figures.json]
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpass import LinBP
from backpass.lab.models import build
from backpass.rules import Rule
from backpass.training import Trainer
from backpass.training.batches import epoch_order

SHAPES = {"lenet5": (1, 28, 28), "resnet18": (3, 32, 32)}
DTYPES = {"float32": None, "bf16": torch.bfloat16}


class Setting:
    """A network, its data, and how both are computed."""

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        self.device, self.dtype = torch.device(arguments.device), DTYPES[arguments.dtype]
        self.batch, self.compile = arguments.batch, arguments.compile
        self.format = torch.channels_last if arguments.channels_last else torch.contiguous_format
        samples = self.batch * arguments.steps[name]
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randint(0, 256, (samples, *SHAPES[name]), dtype=torch.uint8, generator=generator)
        self.y = torch.randint(10, (samples,), generator=generator)
        model = build(name, shape=SHAPES[name]).to(self.device)
        self._model = model.to(memory_format=self.format)

    def fresh(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The network with its first weights, and an optimizer."""
        model = copy.deepcopy(self._model)
        return model, torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)

    def prepare(self, x: Tensor, batch: object = None) -> Tensor:
        """Images as floats in [0, 1]."""
        return x.float().div_(255).contiguous(memory_format=self.format)


def by_hand(setting: Setting, rule: Rule | None) -> Callable[[], None]:
    """What a careful user writes: pinned memory, no waiting for the device, the loss summed there."""
    model, optimizer = setting.fresh()
    called = torch.compile(model) if setting.compile else model
    cuda = setting.device.type == "cuda"

    def moved(tensor: Tensor) -> Tensor:
        return tensor.pin_memory().to(setting.device, non_blocking=True) if cuda else tensor

    def run() -> None:
        attached = rule.attach(model) if rule else None
        total = torch.zeros((), device=setting.device)
        for rows in epoch_order(len(setting.y), 0, 0).split(setting.batch):
            x, y = setting.prepare(moved(setting.x[rows])), moved(setting.y[rows])
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(setting.device.type, dtype=setting.dtype, enabled=setting.dtype is not None):
                loss = F.cross_entropy(called(x), y)
            loss.backward()
            optimizer.step()
            total += loss.detach()
        total.item()
        if attached:
            attached.remove()

    return run


def by_trainer(setting: Setting, rule: Rule | None) -> Callable[[], None]:
    model, optimizer = setting.fresh()
    trainer = Trainer(
        model,
        optimizer,
        (setting.x, setting.y),
        epochs=1,
        batch_size=setting.batch,
        rules=(rule,) if rule else (),
        prepare=setting.prepare,
        dtype=setting.dtype,
        compile=setting.compile,
    )

    def run() -> None:
        trainer.fit()

    return run


def interleaved(runs: dict[str, Callable[[], None]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each, round by round; one round before warms up. On the CPU those of the processor, of one thread."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            begun = clock()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number:
                seconds[name].append(clock() - begun)
    return seconds


PAIRS = (
    ("trainer / by hand", "trainer", "by hand"),
    ("trainer with LinBP / trainer", "trainer, LinBP", "trainer"),
    ("trainer with LinBP / by hand with LinBP", "trainer, LinBP", "by hand, LinBP"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, help="of a run; by default such that it lasts about a second")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    usual = {"lenet5": 40, "resnet18": 2} if arguments.device == "cpu" else {"lenet5": 400, "resnet18": 100}
    arguments.steps = {name: arguments.steps or usual[name] for name in SHAPES}
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    rule, figures = LinBP(start=-2), {}
    how = f"{arguments.device}, {arguments.dtype}, batch {arguments.batch}, {arguments.rounds} rounds"
    print(f"{how}, torch {torch.__version__}")
    for name in arguments.models:
        setting = Setting(name, arguments)
        runs = {
            "by hand": by_hand(setting, None),
            "trainer": by_trainer(setting, None),
            "by hand, LinBP": by_hand(setting, rule),
            "trainer, LinBP": by_trainer(setting, rule),
        }
        seconds = interleaved(runs, arguments.rounds, setting.device)
        per_step = 1e3 * statistics.median(seconds["by hand"]) / arguments.steps[name]
        print(f"\n{name}: {per_step:.2f} ms a step by hand")
        figures[name] = {}
        for title, above, below in PAIRS:
            ratios = sorted(a / b for a, b in zip(seconds[above], seconds[below], strict=True))
            middle = statistics.median(ratios)
            figures[name][title] = {"median": middle, "least": ratios[0], "most": ratios[-1]}
            print(f"  {title:<42}{middle:.3f}   ({ratios[0]:.3f} to {ratios[-1]:.3f})")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
