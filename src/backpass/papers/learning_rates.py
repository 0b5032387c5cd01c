"""Gu and Guo, arXiv 2105.08037v1: control of the learning rate, by `ControlledLR` and its rivals."""

from __future__ import annotations

from backpass.data import load_data
from backpass.experiments import adversarial_rates, regression_problems
from backpass.experiments.adversarial_rates import Attacked, compare_rates
from backpass.experiments.experiment import Arm, Comparison, Design, Experiment
from backpass.experiments.image_rates import Images, train_images
from backpass.experiments.rate_ends import SCHEDULES, end
from backpass.experiments.regression_rates import Regression, regress

__all__ = ["EXPERIMENTS", "adversarial", "images", "regression"]

_SOURCE = (
    "Gu and Guo, arXiv 2105.08037v1, abstract (learning-rate control, a claim of version 1 alone); the rule is derived "
    "for this project"
)
_FIXED = "fixed, best of 10 rates"
_RIVALS = tuple(name for name in SCHEDULES if not name.startswith("controlled"))
_OVER_FIXED = end("log of that over the best fixed rate's", log=True, over=_FIXED)


def _slug(text: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def regression(steps: int, runs: int, every: int = 10) -> Design:
    """Return the table of all schedules on eight regression problems; a claim is about all of them."""
    problems = regression_problems.PROBLEMS
    log = end("log of the excess of the effective loss", log=True)
    return Design(
        arms=tuple(
            Arm(
                name=name, work=regress, group=problem.name,
                candidates={"": Regression(problem=problem, steps=steps, every=every)},
            )
            for problem in problems
            for name in (*_RIVALS, "controlled", f"controlled, every {every}", "controlled, Polyak average")
        ),
        seeds=tuple(range(runs)),
        measurements=(
            end("excess of the effective loss"),
            _OVER_FIXED,
            end("loss under the adversary, E L(x + delta_K)", metric=" attacked", chosen_by=" attacked"),
        ),
        comparisons=tuple(
            Comparison(
                id=f"below-{_slug(rival)}", statement=f"Over the problems, ControlledLR ends lower than: {rival}",
                measurement=log, ours="controlled", theirs=rival, direction="lower", reference=_SOURCE,
                groups=tuple(problem.name for problem in problems),
            )
            for rival in _RIVALS
        ),
        data=lambda: "made, Gaussian, fresh in every step; and scikit-learn's diabetes data, drawn with replacement",
    )  # fmt: skip


def images(runs: int, models: tuple[str, ...] = ("mlp", "cnn"), **sizes: int) -> Design:
    """Return the table of networks on MNIST, plain and adversarial; a claim is about one of them."""
    networks = {
        f"{model.upper()}, {f'adversarial, K = {steps}' if steps else 'plain'}": Images(
            model=model, attack_steps=steps, **sizes
        )
        for model in models
        for steps in (0, 3)
    }
    rivals = tuple(
        name for name in _RIVALS if name not in ("linear decay, best of 10 rates", "cosine, best of 10 rates")
    )
    effective, attacked = end("effective test loss"), end("test loss under the adversary", metric=" attacked")
    return Design(
        arms=tuple(
            Arm(name=name, work=train_images, candidates={"": settings}, group=group)
            for group, settings in networks.items()
            for name in (*rivals, "controlled", "controlled, Polyak average")
        ),
        seeds=tuple(range(runs)),
        measurements=(
            effective, attacked,
            end("test accuracy under the adversary", unit="percentage points", metric=" accuracy"),
        ),
        comparisons=tuple(
            Comparison(
                id=_slug(f"{what}-{group}-below-{rival}"), measurement=measurement, ours="controlled", theirs=rival,
                statement=f"{group}: ControlledLR ends lower than: {rival}", group=group, direction="lower",
                reference=_SOURCE,
            )
            for what, measurement in (("loss", effective), ("adversary", attacked))
            for group, settings in networks.items()
            if what == "loss" or settings.attack_steps
            for rival in rivals
        ),
        data=lambda: load_data("mnist", split="train").description,
    )  # fmt: skip


def adversarial(steps: int, runs: int, every: int) -> Design:
    """Return the table of seven convex losses; a claim is about one of them."""
    names = [problem.name for problem in adversarial_rates.PROBLEMS]
    log = end("log of the excess", log=True)
    return Design(
        arms=tuple(
            Arm(
                name=name, work=compare_rates, group=problem,
                candidates={"": Attacked(problem=problem, steps=steps, every=every)},
            )
            for problem in names
            for name in (_FIXED, "controlled", "controlled, frozen")
        ),
        seeds=tuple(range(runs)),
        measurements=(end("excess"), _OVER_FIXED),
        comparisons=tuple(
            Comparison(
                id=f"below-fixed-{place}", measurement=log, ours="controlled", theirs=_FIXED, group=problem,
                statement=f"{problem}: ControlledLR ends lower than the best of 10 fixed rates", direction="lower",
                reference="derived for this project",
            )
            for place, problem in enumerate(names)
        ),
        data=lambda: "made from a seed, drawn with replacement",
    )  # fmt: skip


_QUESTION = (
    "ControlledLR measures when a learning rate has ceased to pay, and then lowers it. It starts at the largest rate "
    "and is told neither the number of steps nor the noise. Its rivals: ten fixed rates, of which the best is chosen "
    "in hindsight on the very numbers of the table; linear and cosine decay to zero over the known number of steps; "
    "and Polyak averaging over the second half at fixed rates. "
)

EXPERIMENTS = (
    Experiment(
        name="sde-learning-rate",
        title="Does the controlled learning rate beat a tuned one? Regression",
        question=_QUESTION + "Eight regression problems, two of them adversarial, none used to choose its settings.",
        source=_SOURCE,
        scales={"small": regression(2000, 5), "paper": regression(10_000, 20)},
        claims_note="One pair per problem: the means of the logarithms over the seeds, which share their batches.",
    ),
    Experiment(
        name="sde-learning-rate-mnist",
        title="Does the controlled learning rate beat a tuned one? MNIST",
        question=_QUESTION + "A perceptron and a convolutional network, plain and with an adversary of K ascent steps.",
        source=_SOURCE,
        scales={"small": images(3), "paper": images(10, images=60_000, test=10_000, epochs=10)},
        data=("mnist",),
    ),
    Experiment(
        name="sde-learning-rate-adversarial",
        title="Does the controlled learning rate need the curvature through the attack?",
        question="ControlledLR in adversarial training of seven convex losses, with the curvature through the attack "
        "and at frozen perturbations, beside ten fixed rates of which the best is chosen in hindsight. The excess is "
        "that of the loss that adversarial training descends, to second order at its minimum.",
        source="derived for this project",
        scales={"small": adversarial(1500, 6, 10), "paper": adversarial(10_000, 20, 1)},
    ),
)
