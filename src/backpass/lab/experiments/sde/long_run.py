"""Adversarial training run for long beside its predicted stationary law."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from backpass.errors import BackpassError
from backpass.lab.experiments.sde.regression import choose, squared_loss
from backpass.lab.threads import one_thread
from backpass.report.claims import Claim, judge_within
from backpass.report.result import Curve, Finding, Result, Series, Table, environment
from backpass.report.statistics import Interval, mean_interval
from backpass.sde import AdversarialSDE, Stationary, fluctuation_dissipation, run_chain, stationarity_test, stationary
from backpass.sde.stationarity import Balance, Drifting

__all__ = ["Measured", "Study", "describe", "measure"]

_SOURCE = "derived for this project in the setting of Gu and Guo, arXiv 2105.08037v1"
_LONGEST = 10_000
_TOLERANCE = 0.1
"""The part by which a prediction of order eta may be off."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """Settings of the run.

    Attributes:
        dimension: parameters of the regression on four points, 1 or 2.
        steps: K of the adversary.
        eta: the learning rate.
        eta_inner: the adversary's step.
        batch_size: B.
        paths: independent runs, >= 8.
        relaxations: the length of a run, in relaxation times 1 / rate.
        records: at equal intervals; the second half is taken as stationary.
        seed: of the batches.
    """

    dimension: int = 2
    steps: int = 2
    eta: float = 0.02
    eta_inner: float = 0.1
    batch_size: int = 1
    paths: int = 400
    relaxations: float = 16.0
    records: int = 80
    seed: int = 0

    def __post_init__(self) -> None:
        if self.paths < 8 or self.records < 8 or not 2 <= self.relaxations <= _LONGEST:
            raise BackpassError(
                f"a long run takes at least 8 paths, 8 records and 2 relaxation times, at most {_LONGEST:,}; got "
                f"{self.paths}, {self.records} and {self.relaxations:g}."
            )


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Measured numbers.

    Attributes:
        study: the settings.
        law: the prediction.
        times: of the records, (R,).
        theta: the records, (R, paths, P).
        penalty: E|grad_x L|^2 at the clean minimum and at the shifted one.
        balance: fluctuation and dissipation over the second half.
        arriving: the test of stationarity over all of the run.
        arrived: over its second half.
        seconds: how long it took.
    """

    study: Study
    law: Stationary
    times: Tensor
    theta: Tensor
    penalty: tuple[float, float]
    balance: Balance
    arriving: Drifting
    arrived: Drifting
    seconds: float


@one_thread()
def measure(study: Study) -> Measured:
    """Predict the stationary law, and run the chain into it.

    Raises:
        BackpassError: a setting is out of its range, or there is no stationary law.
    """
    began = time.perf_counter()
    problem = choose(study.dimension)
    sde = AdversarialSDE(
        squared_loss,
        problem.data,
        eta_outer=study.eta,
        eta_inner=study.eta_inner,
        steps=study.steps,
        batch_size=study.batch_size,
    )
    start = torch.tensor(problem.start, dtype=torch.float64)
    law = stationary(sde, start)
    per_record = max(1, math.ceil(study.relaxations / law.rate / study.eta / study.records))
    found = run_chain(
        sde,
        start,
        per_record * study.records,
        paths=study.paths,
        generator=torch.Generator().manual_seed(study.seed),
        record=study.records,
    )
    settled = found.values[study.records // 2 + 1 :]
    distance = (found.values - law.mean).square().sum(-1)
    clean = law.theta if law.clean is None else law.clean
    return Measured(
        study=study,
        law=law,
        times=found.times,
        theta=found.values,
        penalty=(float(sde.gradient_penalty(clean)), float(sde.gradient_penalty(law.theta))),
        balance=fluctuation_dissipation(sde, settled),
        arriving=stationarity_test(distance),
        arrived=stationarity_test(distance[study.records // 2 + 1 :]),
        seconds=time.perf_counter() - began,
    )


def describe(measured: Measured) -> Result:
    """The result that the report shows."""
    study = measured.study
    return Result(
        experiment="sde-long-run",
        title="Where does adversarial training come to rest, and how fast?",
        question=(
            "Adversarial training of a linear regression on four points is run for many relaxation times. Its "
            "stationary law is predicted without running it: the shifted minimum, the mean, the covariance from a "
            "Lyapunov equation, and the rate at which the start is forgotten."
        ),
        scale="standard",
        findings=_findings(measured),
        environment={
            **environment(device="cpu", threads=1, data="four points, given in the settings", seeds=(study.seed,)),
            "seconds": round(measured.seconds, 1),
        },
        settings={**asdict(study), **asdict(choose(study.dimension))},
        series=[_path(measured, place) for place in range(study.dimension)],
        tables=[_table(measured)],
        claims=_claims(measured),
        plots_note="Bands are 95 % intervals of the mean over the paths.",
        claims_note="The paths are independent; n counts them.",
    )


def _settled(measured: Measured) -> Tensor:
    """The second half, (R', paths, P)."""
    return measured.theta[measured.study.records // 2 + 1 :]


def _spread(measured: Measured) -> list[float]:
    """E|theta - mean|^2 over the predicted trace, by path."""
    squares = (_settled(measured) - measured.law.mean).square().sum(-1).mean(0)
    values: list[float] = (squares / measured.law.chain_covariance.trace()).tolist()
    return values


def _claims(measured: Measured) -> list[Claim]:
    return [
        judge_within(
            "spread",
            "The predicted covariance has the trace that is measured",
            values=_spread(measured),
            low=1 - _TOLERANCE,
            high=1 + _TOLERANCE,
            quantity="measured over predicted",
            reference=_SOURCE,
            note="The prediction leaves out terms that are smaller by a factor of the order of eta.",
        )
    ]


def _findings(measured: Measured) -> list[Finding]:
    law, (before, after) = measured.law, measured.penalty
    balance, arriving, arrived = measured.balance, measured.arriving, measured.arrived
    return [
        Finding(
            "The minimum moves",
            f"From {_vector(law.clean)} without an adversary to {_vector(law.theta)}; the first-order shift "
            f"-K eta_I Hess(G)^-1 grad V is {_vector(law.shift)}. There the squared input gradient is {after:.4g} "
            f"in the place of {before:.4g}.",
        ),
        Finding(
            "The rate",
            f"The slowest direction forgets its start at the rate {law.rate:.4g} per unit of time, that is in "
            f"{1 / law.rate / measured.study.eta:.0f} steps.",
        ),
        Finding(
            "Fluctuation and dissipation",
            f"E[(theta - c) . h] = {balance.dissipation:.4g} and eta/2 E|g|^2 = {balance.fluctuation:.4g}: the gap is "
            f"{100 * balance.gap:+.2f} %, its standard error {100 * balance.error:.2f} %.",
        ),
        Finding(
            "Stationarity",
            f"Halves of the whole run differ by {arriving.z:+.1f} standard errors (p = {arriving.p_value:.2g}), halves "
            f"of its second half by {arrived.z:+.1f} (p = {arrived.p_value:.2g}).",
        ),
    ]


def _table(measured: Measured) -> Table:
    law, settled, places = measured.law, _settled(measured), range(measured.study.dimension)
    squares = (settled - law.mean).square().mean(0)
    return Table(
        id="law",
        title="The stationary law",
        columns=["", *(f"theta_{place + 1}" for place in places)],
        rows=[
            ["minimum", *(f"{v:.5f}" for v in law.theta.tolist())],
            ["mean, predicted", *(f"{v:.5f}" for v in law.mean.tolist())],
            ["mean, measured", *(mean_interval(settled[..., place].mean(0).tolist()) for place in places)],
            ["variance of the SDE", *(f"{v:.3g}" for v in law.covariance.diagonal().tolist())],
            ["variance of the chain", *(f"{v:.3g}" for v in law.chain_covariance.diagonal().tolist())],
            ["variance, measured", *(mean_interval(squares[:, place].tolist()) for place in places)],
        ],
        note=(
            f"Over {measured.study.paths} paths, with 95 % intervals. Of the SDE: H C + C H^T = eta S. Of the chain: "
            "C = A C A^T + eta^2 S, A = I - eta Dh."
        ),
    )


def _path(measured: Measured, place: int) -> Series:
    law, times = measured.law, measured.times
    away = measured.theta[0, 0] - law.mean
    predicted = [
        float((law.mean + torch.linalg.matrix_exp(-law.jacobian * float(t)) @ away)[place]) for t in times.tolist()
    ]
    return Series(
        id=f"theta-{place + 1}",
        title=f"E theta_{place + 1}",
        description="The mean over the paths against SDE time, steps times the learning rate.",
        x_label="t",
        y_label=f"E theta_{place + 1}",
        curves=[
            Curve(
                label="chain",
                x=times.tolist(),
                given=[mean_interval(row) for row in measured.theta[..., place].tolist()],
            ),
            Curve(
                label="linear prediction",
                x=times.tolist(),
                given=[Interval(value, math.nan, math.nan, 1) for value in predicted],
            ),
        ],
    )


def _vector(values: Tensor | None) -> str:
    return "none" if values is None else "(" + ", ".join(f"{v:.4f}" for v in values.tolist()) + ")"
