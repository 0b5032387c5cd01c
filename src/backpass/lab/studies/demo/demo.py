"""Execution of the four parts of the demo as one result."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from backpass.data import load_digits
from backpass.lab.studies.demo.implicit_steps import ImplicitSteps
from backpass.lab.studies.demo.initial_weights import InitialWeights
from backpass.lab.studies.demo.part import Part
from backpass.lab.studies.demo.prediction import Prediction
from backpass.lab.studies.demo.transfer import Transfer
from backpass.lab.threads import one_thread
from backpass.report.result import Finding, Result, environment

__all__ = ["SCALES", "Demo", "run"]

Progress = Callable[[str, float], None]
"""Called with a description of the finished work and the finished fraction in [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Settings of the four parts."""

    scale: str = "standard"
    transfer: Transfer = field(default_factory=Transfer)
    implicit_steps: ImplicitSteps = field(default_factory=ImplicitSteps)
    initial_weights: InitialWeights = field(default_factory=InitialWeights)
    prediction: Prediction = field(default_factory=Prediction)


SCALES = {
    "standard": Demo(),
    "quick": Demo(
        scale="quick",
        transfer=Transfer(seeds=3, source="resnet:width=4", epochs=1, eps=(0.2,), steps=3, images=50),
        implicit_steps=ImplicitSteps(seeds=3, model="mlp:widths=64", epochs=2, rates=(3e-3,)),
        initial_weights=InitialWeights(seeds=3, model="mlp:widths=50-50-50", epochs=2, rates=(0.1,)),
        prediction=Prediction(seeds=3, paths=8, samples=16, steps=10, records=2),
    ),
}
"""Sizes of the demo by name."""


def run(demo: Demo, progress: Progress = lambda what, part: None) -> Result:
    """Run the demo on one CPU thread; all numbers except timings depend on settings and versions only."""
    began = time.perf_counter()
    parts = (demo.transfer, demo.implicit_steps, demo.initial_weights, demo.prediction)
    done, pieces = 0, sum(part.seeds for part in parts[:3]) + 3  # the last part reports three times

    def report(what: str) -> None:
        nonlocal done
        done += 1
        progress(what, done / pieces)

    with one_thread():
        split = load_digits()
        found = [part.run(split, report) for part in parts]
    return _describe(demo, found, split.description, time.perf_counter() - began)


def _describe(demo: Demo, parts: list[Part], data: str, seconds: float) -> Result:
    seeds = demo.transfer.seeds
    return Result(
        experiment="demo",
        title="Four papers, one backward pass each",
        question=(
            "Each rule changes only the backward pass of a network. Four small experiments on real handwritten digits "
            "compare it with plain backpropagation: attacks that transfer, implicit steps, bad initial weights, and "
            "the SDE of adversarial training."
        ),
        scale=demo.scale,
        findings=[
            *(part.finding for part in parts),
            Finding(
                "Limits",
                f"Small networks on images of 8x8 pixels, {seeds} seeds. It shows what the rules do, and is no "
                "evidence about the networks of the papers.",
            ),
        ],
        environment={
            **environment(device="cpu", threads=1, data=data, seeds=range(seeds)),
            "seconds": round(seconds, 1),
        },
        settings={part.finding.topic: part.settings for part in parts},
        series=[part.series for part in parts],
        claims=[claim for part in parts for claim in part.claims],
        plots_note="Lines are means over the seeds, bands their 95 % intervals; geometric on a logarithmic axis.",
        claims_note="Pairs share their seed. Each interval is Student's t over the seeds.",
    )
