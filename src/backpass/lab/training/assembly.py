"""Trainer of a recipe: data, model, rules and attacks from their names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from backpass.attacks import Attack
from backpass.data.augmentation import Augmentation
from backpass.errors import BackpassError
from backpass.lab.placements import parse_rule_for
from backpass.lab.protocols import Normalisation
from backpass.lab.subjects import load_subject
from backpass.lab.training.adversaries import adversary_text, default_judge, make_adversary
from backpass.lab.training.optimizers import default_rate, make_optimizer
from backpass.lab.training.parts import Parts
from backpass.lab.training.recipe import Recipe
from backpass.models import Normalize
from backpass.models.whitened import WhitenedCNN
from backpass.numbers import is_whole
from backpass.preserved import preserved
from backpass.rules import BP, Rule
from backpass.training import AdversarialTraining, CrossEntropy, Progress, RobustEvaluation, Trainer
from backpass.training.schedules import make_schedule
from backpass.training.settings import Settings
from backpass.training.trainer import attach

__all__ = ["Named", "assemble", "complete"]

_FIRST = 5000  # images from which a network may set its first weights
_RESIDENT = 4 * 2**30  # bytes of images that are kept on a GPU


@dataclass(frozen=True, kw_only=True, eq=False)
class Named:
    """Objects that a recipe names, as far as they are known without data.

    Attributes:
        recipe: the recipe with every default as a value.
        rules: rules for the weights; plain backpropagation is no rule.
        adversary: inner maximiser.
        adversary_rule: rule for its gradients.
        judge: attack that measures robustness.
        augmentation: augmentation of training images, without their white.
    """

    recipe: Recipe
    rules: tuple[Rule, ...]
    adversary: Attack | None
    adversary_rule: Rule | None
    judge: Attack | None
    augmentation: Augmentation


def complete(recipe: Recipe) -> Named:
    """Read every text form of a recipe, and replace missing values by their defaults.

    Raises:
        UnknownNameError: a name is unknown; the nearest known one is named.
        BackpassError: a value is out of its range, or two contradict each other.
    """
    for name in ("limit", "robust_images"):
        value = getattr(recipe, name)
        if value is not None and not is_whole(value, 1):
            raise BackpassError(f"{name} must be a whole number of at least 1; got {value}.")
    if recipe.mixup and recipe.adversary is not None:
        raise BackpassError("mixup mixes clean images, and an adversary replaces them: leave out one of the two.")
    for name in ("trades", "adversary_rule"):
        if getattr(recipe, name) is not None and recipe.adversary is None:
            raise BackpassError(f"{name} is for adversarial training: give an adversary too, as in pgd:eps=8/255.")
    for name in ("warmup", "stop_overfitting"):
        if getattr(recipe, name) and recipe.adversary is None:
            raise BackpassError(f"{name} is for adversarial training: give an adversary too, as in pgd:eps=8/255.")
    rules = tuple(parse_rule_for(recipe.model, text, use="training") for text in recipe.rule)
    adversary = make_adversary(recipe.adversary, "the adversary") if recipe.adversary else None
    rule = parse_rule_for(recipe.model, recipe.adversary_rule, use="attack") if recipe.adversary_rule else None
    judge: Attack | None = None
    if recipe.robust not in (None, "none"):
        judge = make_adversary(str(recipe.robust), "robust")
    elif recipe.robust is None and adversary is not None:
        judge = default_judge(adversary)
    lr = default_rate(recipe.optimizer) if recipe.lr is None else recipe.lr
    probe = make_optimizer(recipe.optimizer, [nn.Parameter(torch.zeros(1))], lr)
    if recipe.scheduler is not None:
        make_schedule(recipe.scheduler, probe, 1)
    return Named(
        recipe=replace(
            recipe,
            lr=lr,
            adversary=adversary_text(adversary) if adversary else None,
            robust=adversary_text(judge) if judge else recipe.robust,
        ),
        rules=tuple(one for one in rules if not isinstance(one, BP)),
        adversary=adversary,
        adversary_rule=None if isinstance(rule, BP) else rule,
        judge=judge,
        augmentation=Augmentation.parse(recipe.augment or ""),
    )


def assemble(
    named: Named, parts: Parts, *, device: torch.device, folder: Path | None, report: Callable[[Progress], None] | None
) -> Trainer:
    """Return the trainer of a recipe.

    Args:
        named: objects of the recipe.
        parts: its data.
        device: device to train on.
        folder: folder of checkpoints and logs; None writes nothing.
        report: called with the progress.

    Raises:
        NoSiteError: a rule would act nowhere in the network.
        BackpassError: the network does not take the images, weights do not fit, or a setting is out of its range.
    """
    recipe, images = named.recipe, parts.train.images
    weights = Path(recipe.weights) if recipe.weights else None
    subject = load_subject(recipe.model, weights, device=device, seed=recipe.seed, data=parts.train)
    network = subject.network
    if not recipe.normalize and weights is None:
        for module in network.modules():
            if isinstance(module, Normalize):
                module.use(Normalisation((0.0,), (1.0,)))
    if weights is None and isinstance(network, WhitenedCNN):
        network.initialise_from((images.pixels[:_FIRST].float() / images.white).to(device))
    few = images.x[:2].to(device)
    subject.try_on(few, recipe.data, parts.train.classes)
    assert recipe.lr is not None  # noqa: S101  `complete` has given one
    optimizer = make_optimizer(recipe.optimizer, network.parameters(), recipe.lr)
    _check_rules(network, named, optimizer, few)
    return Trainer(
        network,
        optimizer,
        (_resident(images.pixels, device), _resident(images.labels, device)),
        **{one.name: getattr(recipe, one.name) for one in fields(Settings)},
        objective=_objective(named),
        rules=named.rules,
        prepare=replace(named.augmentation, white=images.white),
        evaluation=(parts.test.images.pixels if images.white == 255 else parts.test.images.x, parts.test.images.y),
        robust=_robust(named),
        folder=folder,
        on_progress=report,
    )


def _objective(named: Named) -> AdversarialTraining | CrossEntropy:
    recipe = named.recipe
    if named.adversary is None:
        return CrossEntropy(label_smoothing=recipe.label_smoothing, mixup=recipe.mixup)
    return AdversarialTraining(
        named.adversary,
        rule=named.adversary_rule,
        trades=recipe.trades,
        warmup=recipe.warmup,
        label_smoothing=recipe.label_smoothing,
    )


def _robust(named: Named) -> RobustEvaluation | None:
    if named.judge is None:
        return None
    return RobustEvaluation(
        named.judge,
        images=named.recipe.robust_images,
        training_attack=named.adversary if named.adversary != named.judge else None,
        stop=named.recipe.stop_overfitting,
    )


def _check_rules(network: nn.Module, named: Named, optimizer: torch.optim.Optimizer, few: Tensor) -> None:
    """Run one forward pass under each rule: a rule that acts nowhere is reported before the folder is created."""
    with preserved(network), torch.no_grad():
        for rule in filter(None, (*named.rules, named.adversary_rule)):
            with attach(rule, network, optimizer):
                network(few)


def _resident(tensor: Tensor, device: torch.device) -> Tensor:
    """Move images to a GPU that has room for them."""
    small = tensor.numel() * tensor.element_size() <= _RESIDENT
    return tensor.to(device) if device.type == "cuda" and small else tensor
