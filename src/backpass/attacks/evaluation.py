"""Evaluation of a model over a data set: streamed, resumable, and split over processes with the same answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backpass.attacks.attack import Attack
from backpass.attacks.checks import check_images, check_labels, check_mask, check_model
from backpass.attacks.columns import Columns, device_of, processes
from backpass.attacks.data import Data, Source
from backpass.attacks.radii import check_radii, run, run_radii
from backpass.attacks.report import AttackRecord, Report
from backpass.attacks.shards import Shards, describe, fingerprint
from backpass.attacks.targets import Targets, choose_targets
from backpass.errors import BackpassError
from backpass.preserved import preserved
from backpass.version import __version__

__all__ = ["Mask", "evaluate", "mask_of", "name_attacks"]

Attacks = Attack | Sequence[Attack] | Mapping[str, Attack]
Mask = Tensor | Callable[[Tensor], Tensor] | None


def evaluate(
    model: nn.Module,
    data: Data,
    attacks: Attacks,
    *,
    batch_size: int = 256,
    resume: str | PathLike[str] | None = None,
    tag: str = "",
    targets: Targets | None = None,
    mask: Mask = None,
    radii: Sequence[float] | None = None,
    class_names: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Measure clean and robust accuracy of a model, per attack and in the worst case.

    The samples that the model classifies correctly are attacked. A sample's random draws come from its place in the
    data, so that the answer depends neither on `batch_size` nor on the number of processes. Where `torch.distributed`
    is initialised, as under torchrun, every process takes its share and all return the same report. Samples are
    counted as they arrive.

    Args:
        model: maps (N, ...) to logits (N, C); its device is used.
        data: (x, y) tensors, a data set, or an iterable of batches such as a DataLoader; see `Source`.
            x: (N, ...) in the attacks' bounds.
        attacks: one, several, or several by name.
        batch_size: samples searched at a time; also the size of a shard.
        resume: a folder for finished shards. A run that was killed goes on from them; a shard is reused only if model,
            data, settings, `tag` and versions are the same.
        tag: distinguishes shards by what cannot be seen in model, data or settings.
        targets: classes that targeted attacks lead to: ``"next"``, ``"random"``, ``"least-likely"``, ``"second"``, a
            class, or a function of y (N,). Samples whose target is their label are not attacked.
        mask: entries that may change: a bool tensor that broadcasts to one sample, or has one mask for each sample of
            the data, or a function of the images x (B, ...).
        radii: evaluate every attack at each of these radii; see `Report.curve`. A sample is searched at the largest
            radius, then at the next smaller one from the image found, and so on until a search fails: it stands at that
            radius and at all smaller ones. Lengths are scaled with the radius, and a success ends a search.
        class_names: names of the model's classes, for the report.
        progress: called with (samples done by this process, samples of this process).

    Returns:
        The report.

    Raises:
        BackpassError: data, model or attacks are invalid.
    """
    named = name_attacks(attacks)
    if targets is None and any(attack.targeted for attack in named.values()):
        raise BackpassError("a targeted attack needs targets=, for instance targets='next'.")
    if not isinstance(model, nn.Module):
        check_model(model)
    levels = None if radii is None else check_radii(radii, list(named.values()))
    rank, world = processes()
    source = Source(data, batch_size, several=world > 1 or resume is not None)
    device = device_of(model)
    first = next(iter(named.values()))
    shards = None if resume is not None else Shards(None, {})
    strict = resume is not None
    selector = describe(first, strict=strict)["logits"]
    columns, classes, done = Columns(device), 0, 0
    for x, y, index in source.batches(rank, world):
        x, y, index = x.to(device), y.to(device), index.to(device)
        if shards is None:
            shards = _open(model, first, source, Path(resume or ""), {"tag": tag, "batch_size": batch_size}, device)
        fixed = targets if isinstance(targets, str | int) else None
        key = shards.key(x, y, index, {"attack": "clean", "logits": selector, "targets": fixed})
        clean = shards.get(key)
        if clean is None:
            clean = _clean(model, first, x, y, index, fixed)
            shards.put(key, clean)
        columns.enter("", index, clean, ("prediction", "label"))
        y, classes = y.long(), int(clean["classes"])
        right = clean["prediction"].to(device) == y
        own = mask_of(mask, x, index)
        for name, attack in named.items():
            aim = _aims(attack, targets, y, index, clean, classes)
            rows = (right & (aim != y) if attack.targeted else right).nonzero().squeeze(1)
            settings = {**describe(attack, strict=strict), "radii": levels}
            key = shards.key(x, torch.stack([y, aim]), index, settings, own)
            part = shards.get(key)
            columns.count("reused" if part is not None else "computed", 1)
            if part is None:
                some = None if own is None else own[rows]
                samples = (model, x[rows], aim[rows], index[rows], batch_size)
                part = run(attack, *samples, some) if levels is None else run_radii(attack, *samples, levels, some)
                shards.put(key, part)
            columns.enter(name, index[rows], part, ("success", "loss", "prediction", "distance"))
            columns.count(name, int(part["gradients"]))
        done += len(x)
        if progress is not None:
            progress(done, source.own(rank, world) or done)
    columns.count("classes", classes, largest=True)
    return _report(columns, source.read, named, levels, class_names)


def name_attacks(attacks: Attacks) -> dict[str, Attack]:
    """Name attacks by their class, with a number where a class comes twice.

    Raises:
        BackpassError: there is none, or one of them is no attack.
    """
    if not isinstance(attacks, Mapping):
        listed: list[Any] = list(attacks) if isinstance(attacks, Iterable) else [attacks]
        names: list[str] = []
        for attack in listed:
            name = type(attack).__name__
            again = sum(other.split("-")[0] == name for other in names)
            names.append(f"{name}-{again + 1}" if again else name)
        attacks = dict(zip(names, listed, strict=True))
    for attack in attacks.values():
        if not isinstance(attack, Attack):
            raise BackpassError(f"attacks must be attacks, for instance PGD(eps=8/255); got {type(attack).__name__}.")
    if not attacks:
        raise BackpassError("there is no attack to evaluate: give at least one, for instance PGD(eps=8/255).")
    return dict(attacks)


def _open(
    model: nn.Module, first: Attack, source: Source, folder: Path, common: dict[str, Any], device: torch.device
) -> Shards:
    """Open the folder; the first image of the data shows the model's behaviour in every process."""
    x, y = (one.to(device) for one in source.head)
    check_images(x, first.bounds)
    check_labels(x, y)
    check_model(model)
    check_model(model, x)
    return Shards(folder, {**common, "model": fingerprint(model, first.make_oracle(model), x, y)})


def _clean(
    model: nn.Module, attack: Attack, x: Tensor, y: Tensor, index: Tensor, targets: str | int | None
) -> dict[str, Tensor]:
    """The plain model on the clean images of one batch."""
    check_images(x, attack.bounds)
    check_labels(x, y)
    check_model(model)
    check_model(model, x)
    with preserved(model):
        logits = attack.make_oracle(model).plain(x, y)
    found = {"prediction": logits.argmax(1), "label": y, "classes": torch.tensor(logits.shape[1])}
    if targets is None:
        return found
    return {**found, "target": choose_targets(targets, y.long(), logits, index, attack.seed)}


def _aims(
    attack: Attack, targets: Targets | None, y: Tensor, index: Tensor, clean: dict[str, Tensor], classes: int
) -> Tensor:
    if targets is None or not attack.targeted:
        return y
    if "target" in clean:
        return clean["target"].to(y.device)
    return choose_targets(targets, y, torch.zeros(len(y), classes, device=y.device), index)


def mask_of(mask: Mask, x: Tensor, index: Tensor) -> Tensor | None:
    """The mask of these samples, (B, ...)."""
    if mask is None:
        return None
    if callable(mask):
        return check_mask(mask(x), x)
    if isinstance(mask, Tensor) and mask.dim() == x.dim() and len(mask) > 1:
        if len(mask) <= int(index.max()):
            raise BackpassError(f"mask has {len(mask)} rows, fewer than there are samples: give one for each, or one.")
        mask = mask[index.to(mask.device)]
    return check_mask(mask.to(x.device) if isinstance(mask, Tensor) else mask, x)


def _report(
    columns: Columns,
    count: int,
    named: dict[str, Attack],
    levels: list[float] | None,
    class_names: Sequence[str] | None,
) -> Report:
    table, numbers = columns.collect(count)
    classes = numbers.pop("classes")
    if class_names is not None and len(class_names) != classes:
        raise BackpassError(f"class_names must name all {classes} outputs of the model; got {len(class_names)} names.")
    y, prediction = (table[name].squeeze(1).long() for name in ("/label", "/prediction"))
    records: dict[str, AttackRecord] = {}
    radii: dict[str, dict[float, str]] = {}
    for name, attack in named.items():
        attacked = table[f"{name}/entered"].squeeze(1).bool()
        if attack.targeted and not attacked.any() and (prediction == y).any():
            raise BackpassError("every target is the sample's own label, so there is nothing to lead to: give others.")
        for number, radius in enumerate(levels or [None]):
            part = {key: table[f"{name}/{key}"][:, number] for key in ("success", "loss", "prediction", "distance")}
            own = name if radius is None else f"{name} eps={radius:.6g}"
            if radius is not None:
                radii.setdefault(name, {})[radius] = own
            settings = describe(attack if radius is None else replace(attack, eps=radius), strict=False)
            records[own] = AttackRecord(
                settings=settings,
                attacked=attacked,
                success=part["success"].bool() & attacked,
                loss=torch.where(attacked, part["loss"], torch.nan),
                prediction=torch.where(attacked, part["prediction"].long(), prediction),
                distance=torch.where(attacked, part["distance"], torch.inf),
                # All radii share the gradients of the searches, which build on each other.
                gradients=numbers.get(name, 0) if number == 0 else 0,
                minimum_norm=attack.minimum_norm,
            )
    return Report(
        y=y,
        prediction=prediction,
        classes=classes,
        attacks=records,
        shards_computed=numbers.get("computed", 0),
        shards_reused=numbers.get("reused", 0),
        versions={"backpass": __version__, "torch": torch.__version__},
        radii=radii,
        class_names=None if class_names is None else tuple(class_names),
    )
