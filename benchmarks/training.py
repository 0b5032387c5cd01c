"""What the trainer costs beside a loop written by hand, and a rule beside plain backpropagation."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpass import LinBP
from backpass.models import build
from backpass.rules import Rule
from backpass.training import Trainer
from backpass.training.batches import epoch_order
from side_by_side import Contestant, Options, Row, Section, milliseconds, ratio, side_by_side

FAST = {"resnet18"}  # in bfloat16 and channels_last
SHAPES = {"lenet5": (1, 28, 28), "resnet18": (3, 32, 32)}
SIZES = {"lenet5": (40, 128), "resnet18": (20, 32)}  # steps of a run, images of a step


class Setting:
    """A network and its data."""

    def __init__(self, name: str, device: str, steps: int, batch: int) -> None:
        self.device = torch.device(device)
        self.batch, self.fast = batch, name in FAST
        samples = batch * steps
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randint(0, 256, (samples, *SHAPES[name]), dtype=torch.uint8, generator=generator)
        self.y = torch.randint(10, (samples,), generator=generator)
        self._model = build(name, shape=SHAPES[name]).to(self.device)

    def fresh(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The network with its first weights, and an optimizer."""
        model = copy.deepcopy(self._model)
        return model, torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)

    def prepare(self, x: Tensor, batch: object = None) -> Tensor:
        """Images as floats in [0, 1]."""
        return x.float().div_(255)


def by_hand(setting: Setting, rule: Rule | None) -> Contestant:
    """What a careful user writes: pinned memory, no waiting for the device, the loss summed there."""
    model, optimizer = setting.fresh()
    cuda = setting.device.type == "cuda"
    layout = torch.channels_last if setting.fast else torch.contiguous_format
    model.to(memory_format=layout)

    def moved(tensor: Tensor) -> Tensor:
        return tensor.pin_memory().to(setting.device, non_blocking=True) if cuda else tensor

    def run() -> None:
        attached = rule.attach(model) if rule else None
        total = torch.zeros((), device=setting.device)
        for rows in epoch_order(len(setting.y), 0, 0).split(setting.batch):
            x, y = setting.prepare(moved(setting.x[rows])).contiguous(memory_format=layout), moved(setting.y[rows])
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(setting.device.type, torch.bfloat16, enabled=setting.fast):
                loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            total += loss.detach()
        total.item()
        if attached:
            attached.remove()

    return run


def by_trainer(setting: Setting, rule: Rule | None) -> Contestant:
    model, optimizer = setting.fresh()
    trainer = Trainer(
        model,
        optimizer,
        (setting.x, setting.y),
        epochs=1,
        batch_size=setting.batch,
        rules=(rule,) if rule else (),
        prepare=setting.prepare,
        channels_last=setting.fast,
        dtype="bfloat16" if setting.fast else None,
    )

    def run() -> None:
        trainer.fit()

    return run


PAIRS = (
    ("trainer / by hand", "trainer", "by hand", 1.03),
    ("trainer with LinBP / by hand with LinBP", "trainer, LinBP", "by hand, LinBP", 1.03),
    ("by hand with LinBP / by hand", "by hand, LinBP", "by hand", None),  # the rule's own part of the next row
    ("trainer with LinBP / trainer", "trainer, LinBP", "trainer", 1.03),
)


def sections(options: Options) -> Iterator[Section]:
    """Whole runs of some steps, data loading included."""
    rule = LinBP(start=-2)
    for name in SHAPES:
        if options.quick and name == "resnet18":
            continue
        steps, batch = SIZES[name] if options.device == "cpu" else (200, 128)
        steps = 3 if options.quick else steps
        setting = Setting(name, options.device, steps, batch)
        runs = {
            "by hand": by_hand(setting, None),
            "trainer": by_trainer(setting, None),
            "by hand, LinBP": by_hand(setting, rule),
            "trainer, LinBP": by_trainer(setting, rule),
        }
        times = side_by_side(runs, device=options.device, rounds=options.rounds(25 if name == "lenet5" else 5))
        each = {key: [second / steps for second in seconds] for key, seconds in times.items()}
        yield Section(
            title=f"Training: {name}{', bfloat16 and channels_last' if setting.fast else ''}",
            text=f"Runs of {steps} steps of batch {batch}, data loading included; the loop by hand is a careful one.",
            rows=[
                Row(
                    name=title,
                    figures={"ratio": ratio(times[above], times[below]), "ms a step": milliseconds(each[above])},
                    asked=("ratio", most) if most else None,
                )
                for title, above, below, most in PAIRS
            ],
        )
