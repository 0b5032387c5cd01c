"""Gu and Guo, arXiv 2105.08037: adversarial training as a stochastic differential equation."""

from __future__ import annotations

from dataclasses import replace

from backpass.experiments.experiment import Arm, Comparison, Design, Experiment, Measurement, Plot
from backpass.experiments.long_run import LongRun, find_minimum, predict_law, run_long
from backpass.experiments.robustness import Paired, compare_slopes, predict_paths, run_paths
from backpass.experiments.weak_orders import FUNCTIONS, Orders, weak_errors
from backpass.report.result import Finding
from backpass.sde import VARIANTS

__all__ = ["EXPERIMENTS", "long_run", "robustness", "weak_orders"]

_PAPER = "Gu and Guo, arXiv 2105.08037v1"
_DERIVED = f"derived for this project in the setting of {_PAPER}"
_FLOW = f"{_PAPER}, abstract: the SDE confirms the robustness as a gradient flow"

_ORDER_WITHIN, _SPREAD_WITHIN = 0.15, 0.1
"""Largest accepted distance of a number from its prediction at finite learning rates."""

_SDES = {"b0": "b0: gradient flow", "b0+sigma": "b0 + sigma: noise", "B": "B: expanded", "C": "C: exact attack"}


def weak_orders(orders: Orders) -> Design:
    """Return the table of four SDEs against the chain, over all regressions and adversaries."""
    slope = Measurement(label="slope", key="slope", draws=True)
    return Design(
        arms=tuple(
            Arm(name=_SDES[name], work=weak_errors, candidates={"": replace(orders, variant=name)}) for name in VARIANTS
        ),
        seeds=(0,),
        measurements=(
            slope,
            *(
                Measurement(label=f"error of E {f} at eta {orders.etas[-1]:g}", key=f"error of {f}", at=-1, draws=True)
                for f in FUNCTIONS
            ),
            Measurement(label="the oracle's own part of an error", key="resolution", draws=True),
        ),
        comparisons=tuple(
            Comparison(
                id=f"order-{name}", statement=f"{_SDES[name]} has weak order {variant.order}", measurement=slope,
                ours=_SDES[name], low=variant.order - _ORDER_WITHIN, high=variant.order + _ORDER_WITHIN,
                reference=f"{_DERIVED}, whose abstract claims an error bound",
            )
            for name, variant in VARIANTS.items()
        ),
        plots=tuple(
            Plot(title=f"Weak error of E {f}", key=f"error of {f}", draws=True, x=orders.etas, log_x=True, log_y=True,
                 x_label="learning rate eta", y_label="weak error")
            for f in FUNCTIONS
        ),
        data=lambda: "four points in each regression, made",
    )  # fmt: skip


def long_run(settings: LongRun, seed: int = 0) -> Design:
    """Return the table of a long run beside its predicted law."""
    places = range(1, settings.dimension + 1)
    spread = Measurement(label="E|theta - mean|^2, measured over predicted", key="spread", draws=True)
    law, minimum = "Stationary law", "Minimum"
    works = {"chain": run_long, "prediction": predict_law}
    processes = {"SGD": 0, "adversarial training": settings.steps}
    return Design(
        arms=(
            *(Arm(name=name, work=work, candidates={"": settings}, group=law) for name, work in works.items()),
            *(
                Arm(name=name, work=find_minimum, candidates={"": replace(settings, steps=steps)}, group=minimum)
                for name, steps in processes.items()
            ),
        ),
        seeds=(seed,),
        measurements=(
            *(
                Measurement(label=f"{what} of theta_{i}", key=f"{what} of theta_{i}", draws=True)
                for what in ("mean", "variance")
                for i in places
            ),
            spread,
            Measurement(label="dissipation above fluctuation", unit="%", key="gap"),
            Measurement(label="difference of the halves of the second half", unit="standard errors", key="z"),
            *(Measurement(label=f"theta_{i}", key=f"minimum theta_{i}") for i in places),
            Measurement(label="E|grad_x L|^2", key="penalty"),
            Measurement(label="rate of the slowest direction", unit="per unit of time", key="rate"),
        ),
        comparisons=(
            Comparison(
                id="spread", statement="The predicted covariance has the trace that is measured", measurement=spread,
                ours="chain", group=law, low=1 - _SPREAD_WITHIN, high=1 + _SPREAD_WITHIN, reference=_DERIVED,
            ),
        ),
        plots=tuple(
            Plot(title=f"E theta_{i}", key=f"theta_{i}", draws=True, x="t", x_label="t", y_label=f"E theta_{i}",
                 groups=(law,))
            for i in places
        ),
        data=lambda: "four points, given in the code",
    )  # fmt: skip


def robustness(settings: Paired, seed: int = 0) -> Design:
    """Return the table of SGD and adversarial training beside their SDEs."""
    group, slopes = "Paths", "Slopes"
    labels = {
        "gradient_penalty": "E |grad_x L|^2",
        "expected_loss": "E L",
        "adversarial_loss": "E L(x + delta_K)",
    }
    ends = {
        key: Measurement(label=f"{label} at time {settings.t:g}", key=key, at=-1, draws=True)
        for key, label in labels.items()
    }
    slope = Measurement(label="difference of the slopes d/dt, over points", key="slope", draws=True)
    gap = Measurement(
        label="distance of the means of E |grad_x L|^2, over times", key="gap gradient_penalty", draws=True
    )
    arms = (
        ("SGD", run_paths, replace(settings, adversarial=False)),
        ("AT", run_paths, settings),
        ("SGD, its SDE", predict_paths, replace(settings, adversarial=False)),
        ("AT, exact (C)", predict_paths, settings),
        ("AT, expanded (B)", predict_paths, replace(settings, mode="expanded")),
    )
    trained = (
        ("flatter", "with a smaller input gradient", "gradient_penalty", "lower", _FLOW),
        ("robust", "with a lower loss under the training attack", "adversarial_loss", "lower", ""),
        ("clean", "with a higher clean loss", "expected_loss", "higher", ""),
    )
    predicted = (("SGD", "SGD, its SDE"), ("AT", "AT, exact (C)"))
    return Design(
        arms=(
            *(Arm(name=name, work=work, candidates={"": one}, group=group) for name, work, one in arms),
            Arm(name="AT less SGD", work=compare_slopes, candidates={"": settings}, group=slopes),
        ),
        seeds=(seed,),
        measurements=(
            *ends.values(),
            slope,
            Measurement(label="share of points where it is below 0", key="slope",
                        reduce=lambda row: sum(value < 0 for value in row) / len(row)),
        ),
        comparisons=(
            *(
                Comparison(
                    id=id_, statement=f"adversarial training ends {what} than SGD", measurement=ends[key], ours="AT",
                    theirs="SGD", group=group, direction=direction, reference=reference,  # type: ignore[arg-type]
                )
                for id_, what, key, direction, reference in trained
            ),
            Comparison(
                id="slope", measurement=slope, ours="AT less SGD", group=slopes, high=0.0, reference=_FLOW,
                statement="at the same point adversarial training changes E |grad_x L|^2 / 2 more to the negative than "
                "SGD",
            ),
            Comparison(
                id="exact-closer", measurement=gap, ours="AT, exact (C)", theirs="AT, expanded (B)", group=group,
                statement="the SDE with the exact attack (C) is closer to the input gradient of adversarial training "
                "than the expanded one (B)",
                direction="lower", reference=_DERIVED,
            ),
            *(
                Comparison(
                    id=f"predicted-{who}-{key}".lower().replace("_", "-"),
                    statement=f"{who}: its SDE predicts {labels[key]} within 3 standard errors plus 5 %",
                    measurement=Measurement(label=f"distance of the means of {labels[key]} less that allowance, over "
                                            "times", key=f"excess {key}", draws=True),
                    ours=sde, group=group, high=0.0, reference=_DERIVED,
                )
                for who, sde in predicted
                for key in ("gradient_penalty", "expected_loss")
            ),
        ),
        plots=tuple(
            Plot(title=title, key=key, draws=True, x=settings.times, x_label="time, learning rates times steps",
                 y_label=labels[key], groups=(group,))
            for key, title in (
                ("gradient_penalty", "Mean squared input gradient"),
                ("expected_loss", "Clean loss"),
                ("adversarial_loss", "Loss under the training attack"),
            )
        ),
        data=lambda: "made from the seed",
    )  # fmt: skip


_SMALL = Paired(paths=40, t=10.0)

EXPERIMENTS = (
    Experiment(
        name="sde-weak-error",
        title="How close are the SDEs to adversarial training?",
        question="Adversarial training of a linear regression on four points is a Markov chain. Its expectations are "
        "compared with those of four SDEs, both without Monte Carlo: the chain's transfer operator and the SDE's "
        "generator act on functions given by their values on Chebyshev nodes. The error is the largest over all steps "
        "up to the horizon, and its order is the slope against the learning rate.",
        source=f"{_PAPER}, abstract: error bound",
        scales={"small": weak_orders(Orders()), "paper": weak_orders(Orders(dimensions=(1, 2)))},
        remarks=(
            Finding(
                "Why order 2",
                "One term, K eta_I/2 E|grad_x L|^2 in the potential, makes the difference between order 1 and 2: it is "
                "what the adversary adds to SGD. The oracle's own part of an error is its largest relative change when "
                "the oracle has three nodes less per dimension.",
            ),
        ),
        plots_note="Geometric means over the problems with 95 % intervals. Nothing here is random.",
        claims_note="Nothing here is random; n counts problems and test functions, and the interval is over them.",
    ),
    Experiment(
        name="sde-long-run",
        title="Where does adversarial training come to rest, and how fast?",
        question="Adversarial training of a linear regression on four points is run for many relaxation times. Its "
        "stationary law is predicted without running it: the shifted minimum, the mean, the covariance from a Lyapunov "
        "equation, and the rate at which the start is forgotten.",
        source=f"{_PAPER}, abstract: convergence analysis",
        scales={"small": long_run(LongRun()), "paper": long_run(LongRun(paths=4000))},
        remarks=(
            Finding(
                "The prediction",
                "The variance is that of C = A C A^T + eta^2 S with A = I - eta Dh; it leaves out terms that are "
                "smaller by a factor of the order of eta. In a stationary law dissipation, E[(theta - c) . h], equals "
                "fluctuation, eta/2 E|g|^2.",
            ),
        ),
        plots_note="Means over the paths with 95 % intervals.",
        claims_note="The paths are independent; n counts them.",
    ),
    Experiment(
        name="sde-robustness",
        title="Is adversarial training a gradient flow towards robustness?",
        question="A tanh network of 37 parameters learns by SGD and by adversarial training (AT), many times from one "
        "start, and so do the SDEs that model them. Recorded are the mean squared input gradient, which the theory "
        "says adversarial training lowers, and the clean and the adversarial loss.",
        source=f"{_PAPER}, abstract: robustness from a gradient-flow viewpoint",
        scales={"small": robustness(_SMALL), "paper": robustness(replace(_SMALL, paths=400, t=20.0))},
        remarks=(Finding("Two SDEs of one process", "The exact one serves to predict, the expanded one to explain."),),
        plots_note="Lines are means over the paths, bands their 95 % intervals.",
        claims_note="Differences between the two ways of training are paired over the paths, which see the same "
        "batches; those between predictions are taken over the recorded times, which depend on each other. Each "
        "interval is Student's t.",
    ),
)
