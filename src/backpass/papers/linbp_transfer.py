"""Guo, Li, Chen, NeurIPS 2020: images made with LinBP against one network, and shown to others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from backpass.experiments.attack_success import Transfer, transfer_images
from backpass.experiments.experiment import Arm, Comparison, Design, Experiment, Measurement, Plot
from backpass.papers.linbp_networks import (
    DESCRIPTION,
    LARGE,
    LARGE_SEEDS,
    OVER_NETWORKS,
    PAIRED_NETWORKS,
    SEEDS,
    SMALL_CNN,
    SMALL_RESNET,
    described,
    network_arms,
    slug,
)
from backpass.report.result import Finding

__all__ = ["EXPERIMENTS", "transfers"]

_PAPER = "Guo, Li, Chen, NeurIPS 2020"


def transfers(settings: Transfer, start: str, steps: Sequence[int] = (10, 30), seeds: Sequence[int] = SEEDS) -> Design:
    """Return the table of images made against one network and shown to others.

    Args:
        settings: source, targets and attack. Rule and steps are added, and the number of seeds.
        start: first linear site of LinBP in the source.
        steps: numbers of steps; the claims are about the last.
        seeds: seeds of the networks, 0 to n - 1.
    """
    group, linear = "Transfer", f"linbp:start={start}"
    rules = {"BP": "bp", "LinBP": linear, "LinBP, renormalised": f"{linear},residual=renormalized"}
    fooled = {
        key: Measurement(label=f"images that fool {words}", unit="percentage points", key=key)
        for key, words in {"source": "the source itself", **{one.model: one.model for one in settings.targets}}.items()
    }
    targets = [one.model for one in settings.targets]
    return Design(
        arms=(
            *(
                Arm(
                    name=f"{name}, {count} steps", work=transfer_images, group=group,
                    candidates={"": replace(settings, rule=rule, attack=f"{settings.attack},steps={count}",
                                            networks=len(seeds))},
                )
                for name, rule in rules.items() for count in steps
            ),
            *network_arms((settings.victim, *settings.targets)),
        ),
        seeds=tuple(seeds),
        measurements=(*fooled.values(), *DESCRIPTION),
        comparisons=tuple(
            Comparison(
                id=slug(f"{target} {name}"), measurement=fooled[target], group=group,
                statement=f"images made with {name} fool {target} more often than BP's, after {steps[-1]} steps",
                ours=f"{name}, {steps[-1]} steps", theirs=f"BP, {steps[-1]} steps",
                reference=f"{_PAPER}, Tables 1 and 2", published="higher" if "renormalised" in name else "",
            )
            for target in targets for name in list(rules)[1:]
        ),
        plots=tuple(
            Plot(title=f"images that fool {target}", measurement=fooled[target], groups=(group,), x=steps,
                 lines={name: [f"{name}, {count} steps" for count in steps] for name in rules},
                 x_label="steps", y_label="images fooled, %")
            for target in targets
        ),
        data=described((settings.victim, *settings.targets)),
    )  # fmt: skip


# Guo et al.: fresh noise of the radius' width at every iteration, steps of 1/255.
_TRANSFER = Transfer(
    victim=SMALL_RESNET, targets=(SMALL_RESNET, SMALL_CNN), networks=5, attack="ifgsm:step=1/255,noise=0.03",
    eps=0.03, protocol="standard", images=150,
)  # fmt: skip

EXPERIMENTS = (
    Experiment(
        name="linbp-transfer",
        title="Do images made with LinBP fool other networks more often?",
        question="The original use of LinBP: I-FGSM with steps of 1/255 and fresh uniform noise at every iteration, "
        "l_inf radius 0.03, pixels kept in [0, 1], against one network; its images are shown to networks that were "
        "trained apart. With plain gradients, with LinBP as it is, and with the branches renormalised.",
        source=_PAPER,
        scales={
            "small": transfers(_TRANSFER, "layer2"),
            "paper": transfers(
                replace(_TRANSFER, victim=LARGE[1], targets=(LARGE[0], LARGE[3], LARGE[4]), images=None,
                        precision="bfloat16"),
                "layer3.1", (10, 50, 100, 300), LARGE_SEEDS,
            ),
        },
        data=("cifar10",),
        remarks=(
            Finding(
                "Renormalised branches",
                "Guo et al. scale the gradients of residual branches to their norm under BP; Li et al. do not.",
            ),
        ),
        plots_note=OVER_NETWORKS,
        claims_note=PAIRED_NETWORKS,
    ),
)  # fmt: skip
