"""Li et al., arXiv 2112.11018, section 4.2.1: when LinBP is the stronger white-box attack, and when Auto-PGD stalls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from backpass.experiments.attack_success import FOOLED, HALVINGS, Trial, attack_images, find_halvings, halving
from backpass.experiments.experiment import Arm, Comparison, Design, Experiment, Measurement, Plot
from backpass.experiments.input_gradients import Directions, compare_gradients, measure_steps
from backpass.experiments.victims import Victim
from backpass.papers.linbp_networks import (
    DESCRIPTION,
    LARGE,
    LARGE_SEEDS,
    OVER_NETWORKS,
    PAIRED_NETWORKS,
    PAPER,
    SEEDS,
    SMALL_CNN,
    SMALL_RESNET,
    described,
    network_arms,
    slug,
)
from backpass.report.result import Finding

__all__ = ["EXPERIMENTS", "Conditions", "halvings", "white_box"]

_SECTION = f"{PAPER}, Section 4.2.1"
_PUBLISHED_HALVINGS = {
    "first": (25.85, 22.95), "second": (45.11, 42.18), "third": (61.98, 58.59), "fourth": (77.45, 72.11),
}  # fmt: skip
"""Mean iterations of ResNet-50's halvings in Auto-PGD, BP's and LinBP's."""

Conditions = Mapping[str, Mapping[str, Trial]]
"""Trials by factor, such as ``depth``, and its value. The first factor has one value, from which the others differ."""

_GRADIENTS = (
    Measurement(label="loss", unit="nats", key="loss"),
    Measurement(label="negative inputs of the linear sites", unit="%", key="asleep"),
    Measurement(label="images at which BP's gradient is zero", unit="%", key="blind"),
    Measurement(label="entries of equal sign", unit="%", key="agreement"),
    Measurement(label="cosine of the two gradients", key="cosine"),
)


def white_box(
    conditions: Conditions,
    seeds: Sequence[int] = SEEDS,
    lengths: Sequence[float] = (0.001, 0.003, 0.01, 0.03, 0.1),
    fooled: Measurement = FOOLED,
) -> Design:
    """Return the table of attacks that differ from one in a single thing, each with BP and with LinBP.

    Args:
        conditions: the trials; their rules are LinBP.
        seeds: seeds of the networks' training.
        lengths: lengths of single steps whose gain is measured on each network, in pixels of [0, 1].
        fooled: compared measurement: `FOOLED` pairs networks, `FOOLED_IMAGES` pairs images.
    """
    first, *_ = conditions.values()
    attacks, claims = [], []
    for factor, trials in conditions.items():
        for value, trial in {**first, **trials}.items():
            for side, rule in (("BP", "bp"), ("LinBP", trial.rule)):
                attacks.append(
                    Arm(name=f"{value}, {side}", work=attack_images, candidates={"": replace(trial, rule=rule)},
                        group=factor)
                )  # fmt: skip
        claims += [
            Comparison(
                id=slug(f"{factor} {value}"), measurement=fooled, ours=f"{value}, LinBP", theirs=f"{value}, BP",
                group=factor, reference=_SECTION, published="higher, in 29 of the 30 cells of Table I",
                statement=f"LinBP fools more images than BP ({factor}: {value}; {trial.rule} in {trial.victim.model})",
            )
            for value, trial in trials.items()
        ]  # fmt: skip
    studied: dict[tuple[Victim, str], str] = {}  # each network and placement once, by its first condition
    images = next(iter(first.values())).images
    for factor, trials in conditions.items():
        for value, trial in trials.items():
            if "auto" not in trial.rule:
                studied.setdefault((trial.victim, trial.rule), f"{factor}: {value}")
    gradients, steps = "The two gradients at clean images", "One signed step"
    studies, plots = [], []
    for (victim, rule), name in studied.items():
        one = Directions(victim=victim, rule=rule, images=images)
        studies.append(Arm(name=name, work=compare_gradients, candidates={"": one}, group=gradients))
        sides = {f"{name}, {side}": text for side, text in (("BP", "bp"), ("LinBP", rule))}
        studies += [
            Arm(name=side, work=measure_steps, group=steps,
                candidates={"": replace(one, rule=text, lengths=tuple(lengths))})
            for side, text in sides.items()
        ]  # fmt: skip
        plots.append(
            Plot(title=name, key="gain", x=lengths, x_label="length of the step", y_label="rise of the loss, nats",
                 log_x=True, groups=(steps,), arms=tuple(sides))
        )  # fmt: skip
    victims = [trial.victim for trials in conditions.values() for trial in trials.values()]
    return Design(
        arms=(*attacks, *studies, *network_arms(victims)),
        seeds=tuple(seeds),
        measurements=(
            FOOLED,
            *_GRADIENTS,
            *(
                Measurement(label=f"rise of the loss after a step of {lengths[at]:g}", unit="nats", key="gain", at=at)
                for at in (0, -1)
            ),
            *DESCRIPTION,
        ),
        comparisons=tuple(claims),
        plots=tuple(plots),
        data=described(victims),
    )


def halvings(trial: Trial, seeds: Sequence[int] = SEEDS) -> Design:
    """Return the table of the iterations at which Auto-PGD halves its step; the trial's rule is LinBP."""
    group = "Auto-PGD"
    columns = [halving(nth, word) for nth, word in enumerate(_PUBLISHED_HALVINGS)]
    rules = {"BP": "bp", "LinBP": trial.rule}
    return Design(
        arms=(
            *(
                Arm(name=name, work=find_halvings, candidates={"": replace(trial, rule=rule)}, group=group)
                for name, rule in rules.items()
            ),
            *network_arms([trial.victim]),
        ),
        seeds=tuple(seeds),
        measurements=(
            *columns,
            *(
                Measurement(label=f"images with a {word} halving", unit="%", key="shares", at=nth)
                for nth, word in enumerate(_PUBLISHED_HALVINGS)
            ),
            *DESCRIPTION,
        ),
        comparisons=tuple(
            Comparison(
                id=f"halving-{nth}", statement=f"with LinBP Auto-PGD halves its step earlier the {word} time",
                measurement=column, ours="LinBP", theirs="BP", group=group, direction="lower",
                reference=_SECTION,
                published=f"\N{MINUS SIGN}{bp - linbp:.2f} ({linbp:g} against {bp:g}, ResNet-50)",
            )
            for nth, (column, (word, (bp, linbp))) in enumerate(
                zip(columns, _PUBLISHED_HALVINGS.items(), strict=True), 1
            )
        ),
        plots=(
            Plot(title="mean iteration of each halving, over the images that have it", key="iterations",
                 x=range(1, HALVINGS + 1), x_label="halving", y_label="iteration", groups=(group,)),
        ),
        data=described([trial.victim]),
    )  # fmt: skip


_MNIST_STD = 0.3081  # of a pixel: the length of one normalised unit


class _Variants:
    """Trials that differ from one in a single thing."""

    def __init__(self, base: Trial) -> None:
        self.base = base

    def network(self, rule: str = "", **changes: Any) -> Trial:
        """Change fields of `Victim`, and the placement if it is given."""
        return replace(self.base, rule=rule or self.base.rule, victim=replace(self.base.victim, **changes))

    def attack(self, **changes: Any) -> Trial:
        """Change fields of `Trial`."""
        return replace(self.base, **changes)


def _pgd(steps: int, step: float, more: str = "") -> str:
    return f"pgd:steps={steps},restarts=1,step={step:g}{more}"


def _small() -> Conditions:
    eps = 0.1
    base = Trial(
        victim=Victim(model="mlp:widths=100-100-100", data="mnist", limit=4000, epochs=10), rule="linbp:start=-2",
        attack=_pgd(10, eps / 4), eps=eps, protocol="standard", images=200,
    )  # fmt: skip
    a, model = _Variants(base), base.victim.model
    papers = replace(base, victim=SMALL_CNN, rule="linbp:start=-1", attack="pgd:steps=10,restarts=1", eps=8 / 255,
                     protocol="paper")  # fmt: skip
    return {
        "base": {"three layers of 100": base},
        "depth": {
            "one layer": a.network("linbp:start=-1", model="mlp:widths=100"),
            "six layers": a.network(model="mlp:widths=100-100-100-100-100-100"),
        },
        "width": {"20": a.network(model="mlp:widths=20-20-20"), "400": a.network(model="mlp:widths=400-400-400")},
        "training": {"1 epoch": a.network(epochs=1), "40 epochs": a.network(epochs=40)},
        "weight decay": {"0": a.network(weight_decay=0.0), "0.005": a.network(weight_decay=0.005)},
        "normalisation": {
            "of every batch": a.network(model=f"{model},batch_norm=true"),
            "of images, as in the paper": a.attack(
                protocol="paper", eps=eps / 2 / _MNIST_STD, attack=_pgd(10, eps / 4 / _MNIST_STD)
            ),
        },
        "placement": {
            "last site": a.attack(rule="linbp:start=-1"),
            "all sites": a.attack(rule="linbp"),
            "chosen on other images": a.attack(rule="linbp:start=auto"),
        },
        "reach of all steps": {
            "half the radius": a.attack(attack=_pgd(10, eps / 20)),
            "1.25 radii": a.attack(attack=_pgd(10, eps / 8)),
            "10 radii": a.attack(attack=_pgd(10, eps)),
        },
        "steps": {
            "1": a.attack(attack=_pgd(1, 1.25 * eps)),
            "3": a.attack(attack=_pgd(3, 2.5 * eps / 3)),
            "50": a.attack(attack=_pgd(50, 2.5 * eps / 50)),
        },
        "loss": {name: a.attack(attack=_pgd(10, eps / 4, f",loss={name}")) for name in ("dlr", "margin")},
        "saturation": {f"logits times {factor}": a.attack(scale=float(factor)) for factor in (10, 100)},
        "norm": {"l2": a.attack(attack=_pgd(10, 1.5 / 4, ",norm=l2"), eps=1.5)},
        "radius": {f"{radius:g}": a.attack(attack=_pgd(10, radius / 4), eps=radius) for radius in (0.05, 0.2)},
        "precision": {name: a.attack(precision=name) for name in ("float64", "bfloat16")},
        "network": {
            "CNN, CIFAR-10": papers,
            "CNN with batch normalisation, CIFAR-10": replace(
                papers, victim=replace(SMALL_CNN, model=f"{SMALL_CNN.model}:batch_norm=true")
            ),
            "ResNet with batch normalisation, CIFAR-10": replace(
                papers, victim=SMALL_RESNET, rule="linbp:start=layer3"
            ),
        },
    }


def _large() -> Conditions:
    pgd = "pgd:steps=10,restarts=5"
    base = Trial(
        victim=LARGE[1], rule="linbp:start=paper", attack=pgd, eps=8 / 255, protocol="paper", images=5000,
        precision="bfloat16",
    )  # fmt: skip
    a = _Variants(base)
    return {
        "base": {"ResNet-50": base},
        "network": {"VGG-16": a.network(model="vgg16"), "MobileNetV2": a.network(model="mobilenetv2")},
        "depth": {"ResNet-18": a.network("linbp:start=layer4", model="resnet18")},
        "training": {
            "5 epochs": a.network(epochs=5),
            "30 epochs": a.network(epochs=30),
            "no augmentation": a.network(augment=""),
        },
        "weight decay": {"0": a.network(weight_decay=0.0)},
        "placement": {
            "last site": a.attack(rule="linbp:start=-1"),
            "chosen on other images": a.attack(rule="linbp:start=auto"),
        },
        "reach of all steps": {
            "2.5 radii": a.attack(attack=f"{pgd},step=4/255"),
            "10 radii": a.attack(attack=f"{pgd},step=16/255"),
        },
        "steps": {"100": a.attack(attack="pgd:steps=100,restarts=5")},
        "restarts": {"1": a.attack(attack="pgd:steps=10,restarts=1")},
        "loss": {name: a.attack(attack=f"{pgd},loss={name}") for name in ("dlr", "margin")},
        "saturation": {"logits times 10": a.attack(scale=10.0)},
        "precision": {"float32": a.attack(precision="float32")},
        "protocol": {
            "standard, radius 1/255": a.attack(protocol="standard", eps=1 / 255, attack=f"{pgd},step=0.25/255")
        },
    }


_HALVING = Trial(
    victim=SMALL_RESNET, rule="linbp:start=layer3", attack="apgd:steps=100,restarts=1", eps=8 / 255, images=60
)

EXPERIMENTS = (
    Experiment(
        name="linbp-halving",
        title="Does Auto-PGD halve its step earlier with LinBP?",
        question="Auto-PGD halves its step where it makes no progress. The paper counts the iterations until then and "
        "takes fewer as a sign of faster convergence. Every image has all 100 steps here, also when it is fooled "
        "before. Two rules are compared over the images that have a halving under both.",
        source=_SECTION,
        scales={
            "small": halvings(_HALVING),
            "paper": halvings(
                replace(_HALVING, victim=LARGE[1], rule="linbp:start=paper", images=None, precision="bfloat16"),
                LARGE_SEEDS,
            ),
        },
        data=("cifar10",),
        remarks=(
            Finding(
                "Early halvings",
                "Auto-PGD halves where too few of the last steps raised the loss. An early halving means that progress "
                "has stopped, at a maximum or before one: by itself it is no merit. Success is measured in "
                "linbp-table2.",
            ),
        ),
        plots_note=OVER_NETWORKS,
        claims_note=PAIRED_NETWORKS,
    ),
    Experiment(
        name="linbp-white-box",
        title="When does LinBP make the stronger white-box attack?",
        question="The paper's tables say that it does, everywhere; small checks said that it does not. One thing at a "
        "time is changed: depth, width and normalisation of the network, how long and with how much weight decay it "
        "was trained, where LinBP is placed, how far the steps of the attack reach, how many there are, the loss and "
        "its saturation, the norm, the radius, the precision. Both gradients see the same networks, images and starts. "
        "The experiment linbp-sleeping-units asks the same of networks made for it.",
        source=_SECTION,
        scales={"small": white_box(_small()), "paper": white_box(_large(), LARGE_SEEDS)},
        data=("cifar10", "mnist"),
        remarks=(
            Finding(
                "One step",
                "For steps that are short enough the gradient of the network itself raises the loss most; only a "
                "longer step, which wakes sleeping units, can reward another direction.",
            ),
        ),
        plots_note=OVER_NETWORKS,
        claims_note=PAIRED_NETWORKS,
    ),
)  # fmt: skip
