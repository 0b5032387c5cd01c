"""Networks that are attacked: trained once, and kept in the shared folder of a run."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import nn

from backpass.data import Labelled
from backpass.errors import BackpassError
from backpass.experiments.experiment import Context, Outcome
from backpass.lab.subjects import Subject, load_subject
from backpass.lab.training.assembly import assemble, complete
from backpass.lab.training.parts import Parts, load_parts
from backpass.lab.training.recipe import Recipe
from backpass.models.weights import load_weights, save_weights, weights_hash
from backpass.version import __version__

__all__ = ["Loaded", "Victim", "describe_data", "describe_victim", "load_victim"]

_JUDGED = 1000  # images that a trained network is described on
_BATCH = 500
_CHANCE = 0.98  # of the loss of a guess: a network above it has learned nothing


@dataclass(frozen=True, kw_only=True)
class Victim:
    """A network to attack, trained by SGD with momentum 0.9 and a cosine schedule, or given by its weights.

    Attributes:
        model: text form of a network. One of a library, such as ``timm:NAME``, has its weights and is not trained.
        weights: file of weights of a network that is not trained; ``{seed}`` stands for the seed.
        data: data set, whose test images are attacked.
        limit: number of training images; None: all.
        epochs: passes over them.
        batch_size: images per step.
        lr: initial learning rate.
        weight_decay: at least 0.
        augment: augmentation of the training images; empty for none.
        adversary: attack of adversarial training; empty for none.
        dtype: autocast type of training; empty for none.
    """

    model: str
    weights: str = ""
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
        """Return the recipe of the training."""
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


class Loaded(NamedTuple):
    """A trained network with its data.

    Attributes:
        subject: the network in eval mode; its ``model`` takes pixels in [0, 1].
        train: training images.
        test: test images.
    """

    subject: Subject
    train: Labelled
    test: Labelled


def load_victim(victim: Victim, seed: int, context: Context) -> Loaded:
    """Return the trained network of a seed, from the shared folder if it was trained before.

    Raises:
        BackpassError: data or weights are missing, the training diverged, or the network learned nothing.
    """
    parts = _parts(victim.data, victim.limit)
    weights = Path(victim.weights.replace("{seed}", str(seed))) if victim.weights else None
    subject = load_subject(victim.model, weights, device=context.device, seed=seed, data=parts.train)
    network = subject.network
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if not subject.trained:
        _train_once(network, victim, seed, parts, context)
    return Loaded(subject, parts.train, parts.test)


def describe_victim(victim: Victim, seed: int, context: Context) -> Outcome:
    """Measure a trained network on the first 1,000 images of each part, without augmentation.

    Returns:
        ``train loss`` in nats, ``train accuracy`` and ``test accuracy`` in per cent; ``weights``, their hash.
    """
    subject, train, test = load_victim(victim, seed, context)
    loss, accuracy = _judge(subject.model, train, context.device)
    return {
        "train loss": loss,
        "train accuracy": accuracy,
        "test accuracy": _judge(subject.model, test, context.device)[1],
        "weights": weights_hash(subject.network),
    }


def describe_data(victims: Iterable[Victim]) -> str:
    """Return one line about the images that the networks learn from and are attacked on."""
    texts = []
    for victim in victims:
        parts = _parts(victim.data, victim.limit)
        texts += [f"{parts.train.description}.", f"{parts.test.description}.", parts.test.warning]
    return " ".join(filter(None, dict.fromkeys(texts)))


@lru_cache(maxsize=4)
def _parts(data: str, limit: int | None) -> Parts:
    return load_parts(data, limit=limit)


def _train_once(network: nn.Module, victim: Victim, seed: int, parts: Parts, context: Context) -> None:
    """Train the network in place, or load the weights that this or another process has trained."""
    key = json.dumps([asdict(victim), seed, context.device.type, __version__], sort_keys=True)
    model = re.sub(r"[^a-z0-9]+", "-", victim.model.lower()).strip("-")
    name = f"{model}-{seed}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if context.folder is None:
        _train(network, victim, seed, parts, context, None)
        return
    context.folder.mkdir(parents=True, exist_ok=True)
    path = context.folder / f"{name}.safetensors"
    with FileLock(context.folder / f"{name}.lock") if not path.exists() else nullcontext():
        if not path.exists():
            _train(network, victim, seed, parts, context, context.folder / name)
            save_weights(network, path)
            shutil.rmtree(context.folder / name)
    load_weights(network, path)


def _train(
    network: nn.Module, victim: Victim, seed: int, parts: Parts, context: Context, checkpoints: Path | None
) -> None:
    """Train the network, from the last checkpoint of an interrupted run if there is one."""
    few = Parts(parts.train, parts.test.first(_JUDGED))
    trainer = assemble(complete(victim.recipe(seed)), few, device=context.device, folder=checkpoints, report=None)
    trainer.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    result = trainer.fit(resume="auto" if checkpoints else False)
    if result.diverged:
        raise BackpassError(f"{victim.model} with seed {seed} diverged: {result.diverged}.")
    network.load_state_dict(trainer.model.state_dict())
    loss, _ = _judge(network.eval(), parts.train, context.device)
    chance = math.log(parts.train.classes)
    if not loss <= _CHANCE * chance:  # its gradients are next to nothing, and no attack on it compares anything
        raise BackpassError(
            f"{victim.model} with seed {seed} has learned nothing: its loss is {loss:.3f}, that of a guess "
            f"{chance:.3f}. Train it longer, or with a lower rate than {victim.lr:g}."
        )


@torch.no_grad()
def _judge(model: nn.Module, data: Labelled, device: torch.device) -> tuple[float, float]:
    """Return the mean cross-entropy and the accuracy in per cent on the first images."""
    images = data.first(_JUDGED).images
    logits = torch.cat([model(x.to(device)).float() for x in torch.split(images.x, _BATCH)]).cpu()
    loss = F.cross_entropy(logits.double(), images.y).item()
    return loss, 100 * (logits.argmax(1) == images.y).double().mean().item()
