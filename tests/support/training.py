"""A small training run with everything that has a state: dropout, BatchNorm, momentum, a schedule, an average."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard

from backpass import LinBP, ProxProp
from backpass.attacks import PGD
from backpass.training import AdversarialTraining, ControlledLR, Trainer, TrainingResult

KINDS: dict[str, dict[str, Any]] = {
    "BP": {},
    "LinBP": {"rules": (LinBP(start=-1),)},
    "ProxProp union": {"rules": (ProxProp(tau=0.5, solve="step"),)},
    "adversarial": {"objective": AdversarialTraining(PGD(eps=0.1, step=0.05, steps=2), rule=LinBP(start=-1), warmup=1)},
    "controlled": {"accumulate": 1},
}


def images(count: int = 120) -> tuple[Tensor, Tensor]:
    """(N, 1, 6, 6) uint8 and labels in 0..3 that can be learned from them."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(count) % 4
    x = torch.randint(0, 128, (count, 1, 6, 6), dtype=torch.uint8, generator=generator)
    return x + (32 * y).to(torch.uint8)[:, None, None, None], y


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(64, 16),
            nn.ReLU(),
            nn.Linear(16, 4),
        )


def jitter(x: Tensor, batch: Any) -> Tensor:
    """Augmentation that draws from the global generator."""
    x = x.float() / 255
    return x + 0.05 * torch.rand_like(x)


def trainer(kind: str, folder: Path | None, optimizer: str = "momentum", **changed: Any) -> Trainer:
    """Return a run of 3 epochs of 5 steps; ``data`` may replace the images, and ``sharded=True`` asks for FSDP2."""
    model = network()
    if changed.pop("sharded", False):
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        fully_shard(model[5])
        fully_shard(model)
    if optimizer == "momentum":
        made: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, nesterov=True)
    else:
        made = torch.optim.AdamW(model.parameters(), 1e-2)
    schedule: Any = torch.optim.lr_scheduler.CosineAnnealingLR(made, 15)
    if kind == "controlled":
        schedule = ControlledLR(made, every=2)
    settings: dict[str, Any] = {
        "epochs": 3,
        "batch_size": 24,
        "accumulate": 2,
        "scheduler": schedule,
        "step_scheduler": "step",
        "average": "ema:0.9",
        "evaluation": images(40),
        "prepare": jitter,
        "log_every": 3,
        "checkpoint_every": 2,
        "seed": 7,
        **KINDS[kind],
        **changed,
    }
    return Trainer(model, made, settings.pop("data", images()), folder=folder, **settings)


def outcome(trainer: Trainer, result: TrainingResult) -> dict[str, bytes]:
    """Everything that a run ends with, to the bit."""
    named = {**trainer.model.state_dict(), **{f"averaged {k}": v for k, v in (result.averaged or {}).items()}}
    whole = {name: getattr(one, "full_tensor", lambda one=one: one)() for name, one in named.items()}
    ended = {name: one.contiguous().numpy().tobytes() for name, one in whole.items()}
    if trainer.path is not None:
        ended["log"] = (trainer.path / "log.jsonl").read_bytes()
    return ended
