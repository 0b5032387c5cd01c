"""Training run of a recipe in a folder: recipe, checkpoints, logs and weights."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from backpass.attacks import Attack
from backpass.files import locked
from backpass.lab.training.assembly import assemble, complete
from backpass.lab.training.parts import load_parts
from backpass.lab.training.recipe import Recipe, write_recipe
from backpass.models.weights import save_weights
from backpass.numbers import fraction_text
from backpass.rules import unwrap
from backpass.training import Progress, TrainingResult
from backpass.training.processes import rank

__all__ = ["Trained", "train"]

_EPS = 8 / 255


@dataclass(frozen=True, kw_only=True, eq=False)
class Trained:
    """Result of a run.

    Attributes:
        recipe: the recipe with every default as a value.
        result: the trainer's result.
        weights: file with the last weights, or their average where the recipe asks for one; None in a process that
            does not write.
        accuracy: accuracy on the test images of the weights in the file.
        robust_accuracy: accuracy of the last weights under the attack of ``robust``; None where it was not measured.
        next: command that attacks the network.
    """

    recipe: Recipe
    result: TrainingResult
    weights: Path | None
    accuracy: float | None
    robust_accuracy: float | None
    next: str


def train(
    recipe: Recipe,
    folder: Path,
    *,
    device: torch.device,
    resume: bool = False,
    report: Callable[[str, float], None] = lambda what, part: None,
    tell: Callable[[str], None] = lambda line: None,
) -> Trained:
    """Train by a recipe; with several processes, each calls this.

    Args:
        recipe: settings of the run.
        folder: folder for ``recipe.toml`` (with every default as a value), ``checkpoints``, ``log.jsonl``,
            ``run.json`` and ``weights.safetensors``.
        device: device to train on.
        resume: continue from the last checkpoint in the folder.
        report: called with the present activity and the part done.
        tell: called with a line about the data, and a line per epoch.

    Raises:
        BackpassError: the recipe is invalid, or the folder holds another run or is in use.
        Interrupted: by Ctrl-C or SIGTERM, after a checkpoint.
    """
    named = complete(recipe)
    report("reading the data", 0.0)
    parts = load_parts(recipe.data, test_split=recipe.test_split, limit=recipe.limit)
    trainer = assemble(named, parts, device=device, folder=folder, report=_reporter(report, tell))
    tell(f"{parts.train.description}\n{parts.test.description}")
    with ExitStack() as stack:
        if rank() == 0:
            stack.enter_context(locked(folder))
            if not resume:
                write_recipe(named.recipe, folder / "recipe.toml")
        result = trainer.fit(resume=resume)
        weights = None
        if rank() == 0:
            write_recipe(named.recipe, folder / "recipe.toml")  # a resumed run may have more epochs
            weights = _save(unwrap(trainer.model), result, folder)
    last = result.history[-1] if result.history else {}
    return Trained(
        recipe=named.recipe,
        result=result,
        weights=weights,
        accuracy=last.get("averaged", last.get("evaluation", {})).get("accuracy"),
        robust_accuracy=last.get("robust", {}).get("robust_accuracy"),
        next=_attack_command(named.recipe, folder, named.judge, parts.test.split),
    )


def _reporter(report: Callable[[str, float], None], tell: Callable[[str], None]) -> Callable[[Progress], None]:
    def told(progress: Progress) -> None:
        report(f"epoch {progress.epoch}/{progress.epochs}", progress.step / progress.steps)
        if progress.record["kind"] == "epoch":
            tell(_line(progress.record))

    return told


def _line(record: dict[str, Any]) -> str:
    """Describe an epoch in one line."""
    words = [f"epoch {record['epoch']}: loss {record['loss']:.4f}"]
    if record.get("accuracy") is not None:
        words.append(f"training accuracy {record['accuracy']:.2%}")
    for name, title in (("evaluation", "test"), ("averaged", "averaged")):
        if "accuracy" in record.get(name, {}):
            words.append(f"{title} {record[name]['accuracy']:.2%}")
    if "robust_accuracy" in record.get("robust", {}):
        words.append(f"robust {record['robust']['robust_accuracy']:.1%}")
    return ", ".join(words)


def _save(model: nn.Module, result: TrainingResult, folder: Path) -> Path:
    path = folder / "weights.safetensors"
    if result.averaged is None:
        return save_weights(model, path)
    save_weights(model, folder / "weights-last.safetensors")
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(result.averaged)
    try:
        return save_weights(model, path)
    finally:
        model.load_state_dict(own)


def _attack_command(recipe: Recipe, folder: Path, judge: Attack | None, split: str) -> str:
    eps = judge.largest_eps if judge is not None else _EPS
    words = ["backpass", "attack", "--model", recipe.model, "--weights", str(folder / "weights.safetensors")]
    # APGD chooses its steps itself, whatever the ball.
    words += ["--data", recipe.data, "--attack", "apgd", "--eps", fraction_text(eps), "--limit", "1000"]
    words += [] if split == "test" else ["--split", split]
    words += [] if judge is None or judge.norm == "linf" else ["--norm", judge.norm]
    return shlex.join(words)
