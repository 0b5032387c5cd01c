"""Certificate of a training run, from its recipe and weights."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpass.attacks import FGSM, MIFGSM, Attack
from backpass.attacks.iterative import Iterative
from backpass.errors import BackpassError
from backpass.lab.subjects import load_subject
from backpass.lab.threads import one_thread
from backpass.lab.training.assembly import complete
from backpass.lab.training.optimizers import OPTIMIZERS
from backpass.lab.training.parts import load_parts
from backpass.lab.training.recipe import Recipe, read_recipe
from backpass.sde import Certificate, InnerLoop, Predictor, certify, explore
from backpass.sde.certify import process
from backpass.training.schedules import read_named

__all__ = ["Certified", "Study", "certify_run", "inner_loop"]

Progress = Callable[[str, float], None]


@dataclass(frozen=True, kw_only=True)
class Study:
    """Settings of a certificate.

    Attributes:
        run: folder of a training run, with ``recipe.toml`` and weights; or a recipe's file, for its initial weights.
        steps: steps of training that the certificate is for.
        replicas: independent runs at each amplification.
        amplifications: l of SVAG.
        probe: images on which losses and local numbers are measured.
        limit: training images in memory.
        predict: explore other learning rates and adversaries.
        seed: seed of all draws.
    """

    run: Path
    steps: int = 50
    replicas: int = 8
    amplifications: tuple[int, ...] = (1, 4)
    probe: int = 256
    limit: int = 10_000
    predict: bool = True
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Certified:
    """A certificate with its circumstances.

    Attributes:
        study: settings.
        recipe: recipe of the run.
        eta: effective learning rate.
        certificate: certificate of the run.
        predictor: predictor of other settings, or None.
        notes: differences between the run and the process that was certified.
        seconds: duration.
    """

    study: Study
    recipe: Recipe
    eta: float
    certificate: Certificate
    predictor: Predictor | None
    notes: tuple[str, ...]
    seconds: float


class _Clamped(nn.Module):
    """Network on pixels clamped to [0, 1], the bounds of the attack of training."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.network(x.clamp(0, 1))
        return output


def inner_loop(attack: Attack | None) -> InnerLoop:
    """Return an attack of training as an inner loop without a random start.

    Raises:
        BackpassError: the attack is not one of plain gradient steps.
    """
    if attack is None:
        return InnerLoop(steps=0, eta=0.0)
    if not isinstance(attack, Iterative | FGSM) or isinstance(attack, MIFGSM):
        raise BackpassError(
            f"a certificate needs an adversary of gradient steps, FGSM, I-FGSM or PGD; got {type(attack).__name__}."
        )
    eps = attack.eps
    if isinstance(eps, tuple):
        raise BackpassError(f"a certificate needs an adversary with one eps for all samples; got {len(eps)} radii.")
    steps = attack.steps if isinstance(attack, Iterative) else 1
    step = float(attack.step) if isinstance(attack, Iterative) and attack.step is not None else eps
    if attack.norm == "linf":
        return InnerLoop(steps=steps, eta=step, direction="sign", eps=eps)
    return InnerLoop(steps=steps, eta=step, direction=_unit, eps=eps)


def _unit(gradient: Tensor) -> Tensor:
    length = gradient.flatten(1).square().sum(1).clamp(min=torch.finfo(gradient.dtype).tiny).sqrt()
    return gradient / length.view(-1, *[1] * (gradient.ndim - 1))


@one_thread()
def certify_run(study: Study, progress: Progress = lambda what, part: None) -> Certified:
    """Certify the run, and explore other settings if asked for.

    Raises:
        BackpassError: the recipe does not describe SGD on a loss that the SDE models.
    """
    began = time.perf_counter()
    file = study.run / "recipe.toml" if study.run.is_dir() else study.run
    named = complete(Recipe.of(read_recipe(file), str(file)))
    recipe = named.recipe
    notes: list[str] = []
    eta = _effective_rate(recipe, notes)
    for what, present in (
        ("rules for the weights", bool(named.rules)),
        ("the rule for the adversary's gradients", named.adversary_rule is not None),
        ("TRADES", recipe.trades is not None),
    ):
        if present:
            raise BackpassError(f"the SDE models plain SGD on the adversarial loss, not {what} of this recipe.")
    adversary = inner_loop(named.adversary)
    if getattr(named.adversary, "random_start", False):
        notes.append("The adversary starts at the image itself, without its random start.")
    left_out = {"Augmentation": recipe.augment, "Averaging": recipe.average, "Clipping": recipe.clip_norm}
    notes += [f"{what} is left out." for what, given in left_out.items() if given]
    data = load_parts(recipe.data, test_split=recipe.test_split, limit=study.limit).train
    weights = study.run / "weights.safetensors" if study.run.is_dir() else None
    weights = weights or (Path(recipe.weights) if recipe.weights else None)
    subject = load_subject(recipe.model, weights, device=torch.device("cpu"), seed=recipe.seed, data=data)
    network = _Clamped(subject.network).eval()
    criterion = partial(F.cross_entropy, reduction="none", label_smoothing=recipe.label_smoothing)
    pairs = data.images.x, data.images.y
    share = 1.0 if not study.predict else 0.5
    certificate = certify(
        network,
        pairs,
        eta,
        recipe.batch_size,
        adversary,
        criterion=criterion,
        steps=study.steps,
        amplifications=study.amplifications,
        replicas=study.replicas,
        probe=study.probe,
        seed=study.seed,
        progress=lambda what, part: progress(what, share * part),
    )
    predictor = None
    if study.predict and adversary.steps:
        sde, theta = process(network, pairs, eta, recipe.batch_size, adversary, criterion)
        predictor = explore(
            sde,
            theta,
            study.steps,
            probe=replace(sde, data=(pairs[0][: study.probe], pairs[1][: study.probe])),
            replicas=max(2, study.replicas // 2),
            generator=torch.Generator().manual_seed(study.seed + 1),
            progress=lambda what, part: progress(what, share + share * part),
        )
    return Certified(
        study=study,
        recipe=recipe,
        eta=eta,
        certificate=certificate,
        predictor=predictor,
        notes=tuple(notes),
        seconds=time.perf_counter() - began,
    )


def _effective_rate(recipe: Recipe, notes: list[str]) -> float:
    """Return lr / (1 - momentum) of SGD."""
    name, settings = read_named("optimizer", recipe.optimizer, OPTIMIZERS)
    if name != "sgd":
        raise BackpassError(f"the SDE models SGD; the recipe's optimizer is {recipe.optimizer!r}.")
    lr, momentum = recipe.lr, settings.get("momentum", 0.0)
    assert lr is not None  # noqa: S101  `complete` has given one
    if momentum:
        notes.append(f"Momentum {momentum:g} counts as the rate that it makes, lr / (1 - momentum).")
    if settings.get("weight_decay"):
        notes.append("Weight decay is left out.")
    if recipe.scheduler:
        notes.append("The learning rate is the recipe's first; its schedule is left out.")
    return float(lr / (1 - momentum)) if math.isfinite(lr) else lr
