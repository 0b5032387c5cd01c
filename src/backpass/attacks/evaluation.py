"""Evaluates a model over a data set: streamed, resumable, and split over processes with the same answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from backpass.attacks.attack import Attack
from backpass.attacks.checks import check_images, check_labels, check_model
from backpass.attacks.data import Data, Source
from backpass.attacks.report import AttackRecord, Report
from backpass.attacks.shards import Shards, describe, fingerprint
from backpass.errors import BackpassError
from backpass.preserved import preserved
from backpass.version import __version__

__all__ = ["evaluate", "name_attacks"]

Attacks = Attack | Sequence[Attack] | Mapping[str, Attack]


def evaluate(
    model: nn.Module,
    data: Data,
    attacks: Attacks,
    *,
    batch_size: int = 256,
    resume: str | PathLike[str] | None = None,
    tag: str = "",
    targets: Callable[[Tensor], Tensor] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Clean and robust accuracy of a model, per attack and in the worst case.

    The samples that the model has right are attacked; a sample's random draws come from its place in the data, so
    that the answer depends neither on `batch_size` nor on the number of processes. Where `torch.distributed` is
    initialised, as under torchrun, every process takes its share and all return the same report.

    Args:
        model: maps (N, ...) to logits (N, C); its device is used.
        data: (x, y) tensors, a map-style data set of such pairs, or a DataLoader that does not shuffle;
            x: (N, ...) in the attacks' bounds.
        attacks: one, several, or several by name.
        batch_size: samples searched at a time; also the size of a shard.
        resume: a folder for finished shards. A run that was killed goes on from them; a shard is taken only if model,
            data, settings, `tag` and versions are the same.
        tag: distinguishes shards by what cannot be seen in model, data or settings.
        targets: y (N,) -> the classes that targeted attacks lead to.
        progress: called with (samples done by this process, samples of this process).

    Returns:
        The report.

    Raises:
        BackpassError: data, model or attacks cannot be meant.
    """
    named = name_attacks(attacks)
    if targets is None and any(attack.targeted for attack in named.values()):
        raise BackpassError("a targeted attack needs targets=, for instance targets=lambda y: (y + 1) % 10.")
    source = Source(data, batch_size)
    rank, world = (dist.get_rank(), dist.get_world_size()) if _distributed() else (0, 1)
    mine = range(rank, len(source), world)
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    first = next(iter(named.values()))
    shards = Shards(None, {})
    if resume is not None:
        # The same image for every process and every shard: the first of the data.
        x, y, _ = next(source.batches(range(1)))
        behaviour = fingerprint(model, first.ask(model), x.to(device), y.to(device))
        shards = Shards(Path(resume), {"tag": tag, "batch_size": batch_size, "model": behaviour})
    selector = describe(first, strict=resume is not None)["logits"]
    columns = _Columns(source.count, list(named), device)
    done, total = 0, sum(min(batch_size, source.count - number * batch_size) for number in mine)
    for x, y, index in source.batches(mine):
        x, y, index = x.to(device), y.to(device).long(), index.to(device)
        key = shards.key(x, y, index, {"attack": "clean", "logits": selector})
        clean = shards.get(key)
        if clean is None:
            clean = _clean(model, first, x, y)
            shards.put(key, clean)
        columns.enter("", index, clean)
        right = (clean["prediction"].to(device) == y).nonzero().squeeze(1)
        for name, attack in named.items():
            aim = targets(y) if targets is not None and attack.targeted else y
            own = describe(attack, strict=resume is not None)
            key = shards.key(x, torch.stack([y, aim]), index, own)
            part = shards.get(key)
            if part is None:
                part = _attacked(model, attack, x[right], aim[right], index[right], batch_size)
                shards.put(key, part)
                columns.computed += 1
            else:
                columns.reused += 1
            columns.enter(name, index[right], part)
        done += len(x)
        if progress is not None:
            progress(done, total)
    return columns.report({name: describe(attack, strict=False) for name, attack in named.items()})


def name_attacks(attacks: Attacks) -> dict[str, Attack]:
    """Names attacks by their class, with a number where a class comes twice.

    Raises:
        BackpassError: there is none, or one of them is no attack.
    """
    if isinstance(attacks, Attack):
        attacks = [attacks]
    if not isinstance(attacks, Mapping):
        names: list[str] = []
        for attack in attacks:
            name = type(attack).__name__
            again = sum(other.split("-")[0] == name for other in names)
            names.append(f"{name}-{again + 1}" if again else name)
        attacks = dict(zip(names, attacks, strict=True))
    for attack in attacks.values():
        if not isinstance(attack, Attack):
            raise BackpassError(f"attacks must be attacks, for instance PGD(eps=8/255); got {type(attack).__name__}.")
    if not attacks:
        raise BackpassError("there is no attack to evaluate: give at least one, for instance PGD(eps=8/255).")
    return dict(attacks)


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _clean(model: nn.Module, attack: Attack, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The plain model on the clean images of one batch."""
    check_images(x, attack.bounds)
    check_labels(x, y)
    check_model(model, x)
    with preserved(model):
        logits = attack.ask(model).plain(x, y)
    return {"prediction": logits.argmax(1), "label": y, "classes": torch.tensor(logits.shape[1])}


def _attacked(
    model: nn.Module, attack: Attack, x: Tensor, y: Tensor, index: Tensor, batch_size: int
) -> dict[str, Tensor]:
    """One attack on those samples of a batch that the model has right."""
    if len(x) == 0:
        empty = torch.empty(0)
        return {"success": empty, "loss": empty, "prediction": empty, "gradients": torch.tensor(0)}
    result = attack(model, x, y, indices=index, batch_size=batch_size)
    return {
        "success": result.success,
        "loss": result.loss,
        "prediction": result.prediction,
        "gradients": torch.tensor(result.gradients),
    }


class _Columns:
    """The table of all samples, of which every process fills the rows of its batches; their sum is the whole."""

    def __init__(self, count: int, names: list[str], device: torch.device) -> None:
        self.names, self.device = names, device
        self.rows = {f"{name}/{part}": _zeros(count) for name in names for part in ("success", "loss", "prediction")}
        self.rows |= {"/prediction": _zeros(count), "/label": _zeros(count)}
        self.gradients = dict.fromkeys(names, 0)
        self.classes = self.computed = self.reused = 0

    def enter(self, name: str, index: Tensor, part: dict[str, Tensor]) -> None:
        """Takes in a shard; index: (B,) the places of its samples."""
        for key, value in part.items():
            if key == "classes":
                self.classes = int(value)
            elif key == "gradients":
                self.gradients[name] += int(value)
            else:
                self.rows[f"{name}/{key}"][index.cpu()] = value.double().cpu()

    def report(self, settings: dict[str, dict[str, Any]]) -> Report:
        """The report on all samples, the same in every process."""
        numbers = torch.tensor([float(self.computed), self.reused, *self.gradients.values()], dtype=torch.float64)
        classes = torch.tensor([float(self.classes)])
        columns = torch.stack(list(self.rows.values()))
        if _distributed():
            # NCCL sums on the device, gloo on the CPU; float64 holds every count exactly.
            where = self.device if dist.get_backend() == "nccl" else torch.device("cpu")
            numbers, classes, columns = (t.to(where) for t in (numbers, classes, columns))
            dist.all_reduce(numbers)
            dist.all_reduce(columns)
            dist.all_reduce(classes, dist.ReduceOp.MAX)
        rows = dict(zip(self.rows, columns.cpu(), strict=True))
        computed, reused, *gradients = (int(number) for number in numbers)
        y, prediction = rows["/label"].long(), rows["/prediction"].long()
        right = prediction == y
        return Report(
            y=y,
            prediction=prediction,
            classes=int(classes),
            attacks={
                name: AttackRecord(
                    settings=settings[name],
                    success=rows[f"{name}/success"].bool(),
                    loss=torch.where(right, rows[f"{name}/loss"], torch.nan),
                    prediction=torch.where(right, rows[f"{name}/prediction"].long(), prediction),
                    gradients=spent,
                )
                for name, spent in zip(self.names, gradients, strict=True)
            },
            shards_computed=computed,
            shards_reused=reused,
            versions={"backpass": __version__, "torch": torch.__version__},
        )


def _zeros(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.float64)
