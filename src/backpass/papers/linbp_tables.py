"""Li et al., arXiv 2112.11018, tables I and II, and the networks with SiLU: white-box attacks with LinBP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from backpass.experiments.attack_success import FOOLED, Trial, attack_images
from backpass.experiments.experiment import Arm, Comparison, Design, Experiment, Measurement, Plot
from backpass.experiments.victims import Victim
from backpass.numbers import fraction_text
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
    large,
    network_arms,
    slug,
)
from backpass.report.result import Finding

__all__ = ["EXPERIMENTS", "Contest", "published", "success"]

_PUBLISHED_NETWORKS = ("vgg16", "resnet50", "densenet161", "mobilenetv2", "wrn-28-10")
_PUBLISHED = {  # per cent, by attack and radius in 255ths: BP's row and LinBP's row of Tables I and II
    ("pgd:steps=10", 8): ((72.28, 66.41, 56.89, 92.94, 33.14), (95.52, 85.83, 61.87, 99.80, 33.48)),
    ("pgd:steps=20", 8): ((87.07, 80.82, 73.33, 98.19, 38.11), (98.50, 93.11, 77.72, 99.95, 39.55)),
    ("pgd:steps=100", 8): ((96.54, 92.53, 86.46, 99.88, 38.94), (99.25, 95.82, 89.03, 99.99, 40.44)),
    ("pgd:steps=10", 16): ((77.25, 71.52, 62.79, 94.90, 33.78), (98.78, 92.68, 69.04, 99.95, 34.21)),
    ("pgd:steps=20", 16): ((94.88, 91.18, 87.38, 99.44, 44.25), (99.99, 99.51, 91.18, 100.00, 45.22)),
    ("pgd:steps=100", 16): ((99.73, 99.81, 98.35, 100.00, 59.38), (100.00, 99.97, 99.07, 100.00, 60.78)),
    ("apgd:steps=100", 8): ((98.06, 95.77, 91.91, 99.97, 39.46), (99.65, 97.60, 93.35, 100.00, 41.20)),
    ("apgd:steps=100", 16): ((99.97, 99.98, 99.58, 100.00, 60.94), (100.00, 99.99, 99.81, 100.00, 62.99)),
}
# Section 4.2.1 has two pairs of rates; that they are of 10 steps and the radii of Table I is our reading.
_PUBLISHED_SILU = {("pgd:steps=10", 8): (74.24, 75.85), ("pgd:steps=10", 16): (82.65, 87.97)}
_SILU = "resnet50:activation=silu"


def published(attack: str, eps: float, network: str) -> tuple[float, float] | None:
    """Return the rates of BP and LinBP that the paper prints, of 5 restarts; None if it prints none.

    Args:
        attack: text form of the attack.
        eps: radius.
        network: one of the paper's networks.
    """
    key = (attack.partition(",")[0], round(255 * eps))
    if network == _SILU:
        return _PUBLISHED_SILU.get(key)
    if network not in _PUBLISHED_NETWORKS or key not in _PUBLISHED:
        return None
    bp, linbp = _PUBLISHED[key]
    column = _PUBLISHED_NETWORKS.index(network)
    return bp[column], linbp[column]


@dataclass(frozen=True, kw_only=True)
class Contest:
    """A network, and the placements of LinBP in it.

    Attributes:
        victim: the network.
        placements: rules. The claims are about the first, the paper's placement or the one most like it.
        sweep: starts of LinBP, from the last site to the first, for a plot of success by start.
        counterpart: the paper's network, whose numbers are quoted.
    """

    victim: Victim
    placements: tuple[str, ...]
    sweep: tuple[str, ...] = ()
    counterpart: str


def success(
    contests: Sequence[Contest],
    attacks: Sequence[str],
    *,
    where: str,
    seeds: Sequence[int] = SEEDS,
    radii: Sequence[float] = (8 / 255, 16 / 255),
    protocols: Sequence[str] = ("paper", "standard"),
    images: int | None = None,
    precision: str = "float32",
    fooled: Measurement = FOOLED,
) -> Design:
    """Return the table of the images that attacks fool with plain gradients and with LinBP's.

    Args:
        contests: the networks.
        attacks: text forms of the attacks.
        where: place in the paper.
        seeds: seeds of the networks' training.
        radii: radii in the protocols' units.
        protocols: ``paper``, ``standard`` or both.
        images: number of test images; None: all.
        precision: precision of the attacks.
        fooled: compared measurement: `FOOLED` pairs networks, `FOOLED_IMAGES` pairs images.
    """
    arms, claims, plots = [], [], []
    for contest, protocol, eps in product(contests, protocols, radii):
        model = contest.victim.model
        group = f"{model}, {protocol} protocol, eps {fraction_text(eps)}"
        for attack in attacks:
            trial = Trial(
                victim=contest.victim, attack=attack, eps=eps, protocol=protocol, images=images, precision=precision
            )
            for rule in ("bp", *contest.placements):
                arms.append(_arm(f"{rule}, {attack}", trial, rule, group))
            numbers = published(attack, eps, contest.counterpart) if protocol == "paper" else None
            claims.append(
                Comparison(
                    id=slug(f"{model} {protocol} {round(255 * eps)} {attack}"), measurement=fooled, group=group,
                    statement=f"LinBP fools more images of {model} than BP: {trial}",
                    ours=f"{contest.placements[0]}, {attack}", theirs=f"bp, {attack}", reference=f"{PAPER}, {where}",
                    published=_quoted(*numbers, contest.counterpart) if numbers else "",
                )
            )  # fmt: skip
    for contest in (one for one in contests if one.sweep):
        trial = Trial(
            victim=contest.victim, attack=attacks[0], eps=radii[0], protocol=protocols[0], images=images,
            precision=precision,
        )  # fmt: skip
        group, starts = f"{contest.victim.model}, start of LinBP", [f"linbp:start={start}" for start in contest.sweep]
        arms += [_arm(rule, trial, rule, group) for rule in ("bp", *starts)]
        plots.append(
            Plot(title=f"success by LinBP's start, {trial}", lines={"BP": ("bp",) * len(starts), "LinBP": starts},
                 measurement=FOOLED, groups=(group,), x=range(1, len(starts) + 1), y_label="images fooled, %",
                 x_label=f"start, from the last site to the first: {', '.join(contest.sweep)}")
        )  # fmt: skip
    victims = [one.victim for one in contests]
    return Design(
        arms=(*arms, *network_arms(victims)),
        seeds=tuple(seeds),
        measurements=(FOOLED, *DESCRIPTION),
        comparisons=tuple(claims),
        plots=tuple(plots),
        data=described(victims),
    )


def _arm(name: str, trial: Trial, rule: str, group: str) -> Arm:
    return Arm(name=name, work=attack_images, candidates={"": replace(trial, rule=rule)}, group=group)


def _quoted(bp: float, linbp: float, network: str) -> str:
    return f"{linbp - bp:+.2f} ({linbp:.2f} % against {bp:.2f} %, {network})".replace("-", "\N{MINUS SIGN}", linbp < bp)


_LAST = "linbp:start=-1"
_SMALL = (
    Contest(victim=SMALL_CNN, placements=(_LAST, "linbp:start=-2"), sweep=("-1", "-2", "-3", "-4"),
            counterpart="vgg16"),
    Contest(victim=SMALL_RESNET, placements=("linbp:start=layer3", _LAST), sweep=("-1", "-2", "-4", "-6"),
            counterpart="resnet50"),
)  # fmt: skip
_PAPERS = tuple(
    Contest(victim=one, placements=("linbp:start=paper", _LAST), counterpart=one.model,
            sweep=("-1", "-3", "0.9", "0.8", "0.7", "0.5", "0.25"))
    for one in LARGE
)  # fmt: skip
_FEW = 200  # images


def _pgd(*steps: int, restarts: int) -> list[str]:
    return [f"pgd:steps={count},restarts={restarts}" for count in steps]


def _without_sweep(contests: Sequence[Contest], placements: int | None = None) -> list[Contest]:
    return [replace(one, sweep=(), placements=one.placements[:placements]) for one in contests]


_RESNET_SILU = replace(
    _SMALL[1], victim=replace(SMALL_RESNET, model="resnet:width=8,activation=silu"), sweep=(), counterpart=_SILU
)
_RESNET50_SILU = Contest(victim=large(_SILU), placements=("linbp:start=paper",), counterpart=_SILU)
_SETTING = (
    " Both gradients see the same networks, images, starts and steps. The paper's protocol moves in normalised space, "
    "where a radius of 8/255 is about 3.2/255 in pixels and a step 0.4/255, so that 10 steps barely reach the ball's "
    "face; the standard protocol moves pixels."
)
_QUOTED = Finding(
    "The paper's numbers",
    "The paper counts the best of 5 restarts, on all correctly classified test images of CIFAR-10. Its numbers are "
    "quoted beside ours; the networks here are those of the table, unless they have its names.",
)
_CHOSEN = Finding(
    "Placements",
    "The best of several starts is chosen on the images that it is measured on, which flatters it.",
)

EXPERIMENTS = (
    Experiment(
        name="linbp-table1",
        title="Does PGD fool more images with LinBP?",
        question="PGD with 10, 20 and 100 steps against networks for CIFAR-10." + _SETTING,
        source=f"{PAPER}, Table I",
        scales={
            "small": success(_SMALL, _pgd(10, 20, 100, restarts=1), where="Table I", images=_FEW),
            "paper": success(_PAPERS, _pgd(10, 20, 100, restarts=5), where="Table I", seeds=LARGE_SEEDS,
                             precision="bfloat16"),
        },
        data=("cifar10",),
        remarks=(_QUOTED, _CHOSEN),
        plots_note=OVER_NETWORKS,
        claims_note=PAIRED_NETWORKS,
    ),
    Experiment(
        name="linbp-table2",
        title="Does Auto-PGD?",
        question="Auto-PGD, which chooses its steps itself, with 100 steps." + _SETTING,
        source=f"{PAPER}, Table II",
        scales={
            "small": success(_without_sweep(_SMALL, 1), ["apgd:steps=100,restarts=1"], where="Table II", images=_FEW),
            "paper": success(_without_sweep(_PAPERS), ["apgd:steps=100,restarts=5"], where="Table II",
                             seeds=LARGE_SEEDS, precision="bfloat16"),
        },
        data=("cifar10",),
        remarks=(_QUOTED,),
        plots_note=OVER_NETWORKS,
        claims_note=PAIRED_NETWORKS,
    ),
    Experiment(
        name="linbp-silu",
        title="Does LinBP help where the activation is smooth?",
        question="A ResNet with SiLU in the place of ReLU; LinBP's derivative is 1 there too. The paper has two pairs "
        "of rates; that they belong to 10 steps and the two radii of Table I is our reading." + _SETTING,
        source=f"{PAPER}, Section 4.2.1",
        scales={
            "small": success([_RESNET_SILU], _pgd(10, restarts=1), where="Section 4.2.1, two settings", images=_FEW),
            "paper": success([_RESNET50_SILU], _pgd(10, 100, restarts=5), where="Section 4.2.1, two settings",
                             seeds=LARGE_SEEDS, precision="bfloat16"),
        },
        data=("cifar10",),
        remarks=(_QUOTED,),
        plots_note=OVER_NETWORKS,
        claims_note=PAIRED_NETWORKS,
    ),
)  # fmt: skip
