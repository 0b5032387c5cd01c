"""The networks that the experiments on attacks share: trained once, and found again by the next experiment."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from backpass.data import Labelled
from backpass.errors import BackpassError
from backpass.lab.bench.experiment import Bench
from backpass.lab.subjects import load_subject
from backpass.lab.training.assembly import assemble, complete
from backpass.lab.training.parts import Parts, load_parts
from backpass.lab.training.recipe import Recipe

__all__ = ["Training", "Victim", "data_text", "victims"]

_LOOKED_AT = 1000  # images on which the trained network is described
_BATCH = 500
_NOTHING = 0.98  # of the loss of a guess


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a network comes to be attacked: SGD with momentum 0.9 and a cosine schedule.

    Attributes:
        model: the network's specification.
        data: the data set.
        limit: images to learn from; all where it is None.
        epochs: passes over them.
        batch_size: images per step.
        lr: the first learning rate.
        weight_decay: at least 0.
        augment: how training images are varied; empty for not at all.
        adversary: of adversarial training; empty for none.
        dtype: of autocast; empty for none.
    """

    model: str
    data: str = "cifar10"
    limit: int | None = None
    epochs: int = 1
    batch_size: int = 64
    lr: float = 0.05
    weight_decay: float = 5e-4
    augment: str = ""
    adversary: str = ""
    dtype: str = ""

    def recipe(self, seed: int) -> Recipe:
        """The same, as training runs are told."""
        return Recipe(
            data=self.data,
            model=self.model,
            limit=self.limit,
            epochs=self.epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            optimizer=f"sgd:momentum=0.9,weight_decay={self.weight_decay}",
            scheduler="cosine",
            augment=self.augment or None,
            adversary=self.adversary or None,
            robust="none",
            dtype=self.dtype or None,
            seed=seed,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Victim:
    """A trained network.

    Attributes:
        training: how it was trained.
        seed: of its initial weights and the order of its images.
        network: in eval mode, for pixels in [0, 1].
        loss: mean cross-entropy on images that it has learned from, without augmentation.
        accuracy: on them, in per cent.
        test_accuracy: on images that it has not seen, in per cent.
        test: the images to attack.
        device: where it was trained.
    """

    training: Training
    seed: int
    network: nn.Module
    loss: float
    accuracy: float
    test_accuracy: float
    test: Labelled
    device: torch.device

    @property
    def key(self) -> dict[str, Any]:
        """What everything measured on it depends on."""
        return {**asdict(self.training), "seed": self.seed, "device": self.device.type}


def victims(training: Training, seeds: tuple[int, ...], bench: Bench) -> Iterator[Victim]:
    """The networks of these seeds, one after the other: one is in memory at a time.

    Raises:
        BackpassError: the data is not there, a training run diverged, or a network learned nothing.
    """
    parts = load_parts(training.data, limit=training.limit)
    for seed in seeds:
        recipe = training.recipe(seed)
        network = load_subject(recipe.model, None, device=bench.device, seed=seed, data=parts.train).network
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        told = bench.shared.network(
            f"{training.model}, seed {seed}",
            network,
            partial(_train, recipe=recipe, parts=parts, device=bench.device, folder=_folder(bench, training, seed)),
            training=asdict(training),
            seed=seed,
            device=bench.device.type,
        )
        yield Victim(training=training, seed=seed, network=network.eval(), test=parts.test, device=bench.device, **told)


def data_text(trainings: Iterable[Training]) -> str:
    """What the images are of which networks learn, with what a reader must know of them."""
    texts = []
    for training in trainings:
        parts = load_parts(training.data, limit=training.limit)
        texts += [f"{parts.train.description}.", f"{parts.test.description}.", parts.test.warning]
    return " ".join(filter(None, dict.fromkeys(texts)))


def _folder(bench: Bench, training: Training, seed: int) -> Path | None:
    """Where checkpoints are while a network is trained, so that hours of training can be gone on with."""
    if bench.shared.folder is None:
        return None
    asked = json.dumps([asdict(training), seed, bench.device.type], sort_keys=True)
    return bench.shared.folder / "training" / hashlib.sha256(asked.encode()).hexdigest()[:12]


def _train(
    network: nn.Module, recipe: Recipe, parts: Parts, device: torch.device, folder: Path | None
) -> dict[str, float]:
    """Trains on, from where an interrupted run stopped, and clears away what it needed for that."""
    few = Parts(parts.train, parts.test.first(_LOOKED_AT))
    trainer = assemble(complete(recipe), few, device=device, folder=folder, report=None)
    trainer.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    result = trainer.fit(resume="auto" if folder else False)
    if folder is not None:
        shutil.rmtree(folder)
    if result.diverged:
        raise BackpassError(f"{recipe.model} with seed {recipe.seed} diverged: {result.diverged}.")
    network.load_state_dict(trainer.model.state_dict())
    network.eval()
    loss, accuracy = _describe(network, parts.train, device)
    if loss > _NOTHING * math.log(parts.train.classes):
        # Its gradients are next to nothing, and no attack on it compares anything.
        raise BackpassError(
            f"{recipe.model} with seed {recipe.seed} has learned nothing: its loss is {loss:.3f}, that of a guess "
            f"{math.log(parts.train.classes):.3f}. Train it longer, or with a lower rate than {recipe.lr:g}."
        )
    return {"loss": loss, "accuracy": accuracy, "test_accuracy": _describe(network, parts.test, device)[1]}


@torch.no_grad()
def _describe(network: nn.Module, data: Labelled, device: torch.device) -> tuple[float, float]:
    """Mean cross-entropy, and accuracy in per cent, on the first images."""
    images = data.first(_LOOKED_AT).images
    logits = torch.cat([network(x.to(device)).float() for x in torch.split(images.x, _BATCH)]).cpu()
    loss = F.cross_entropy(logits.double(), images.y).item()
    return loss, 100 * (logits.argmax(1) == images.y).double().mean().item()
