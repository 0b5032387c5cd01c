"""Attacks on one network under several rules, with equal images, starts and steps."""

from __future__ import annotations

import time
from collections.abc import Callable

from backpass.attacks import Attack, Report, evaluate
from backpass.data import Labelled
from backpass.lab.studies.attack.images import AttackImages
from backpass.lab.studies.attack.samples import draw_samples
from backpass.lab.studies.attack.study import Measured, Study, Sweep
from backpass.lab.studies.attack.sweeps import planned_sweeps
from backpass.rules import parse_rule

__all__ = ["measure"]

Progress = Callable[[str, float], None]
"""Called with a description of the current work and the finished fraction in [0, 1]."""


def measure(study: Study, progress: Progress = lambda what, part: None) -> Measured:
    """Run the attacks of a study under every rule.

    Raises:
        BackpassError: the attacks cannot be run on this network and these images.
    """
    began = time.perf_counter()
    runner = _Runner(study, progress)
    reports = {
        rule: runner.run(rule, study.data, {plan.name: plan.attack for plan in plans})
        for rule in study.rules
        if (plans := study.plans_of(rule))
    }
    sweeps = _sweeps(study, runner)
    samples = draw_samples(study, reports)
    return Measured(
        study=study,
        reports=reports,
        sweeps=sweeps,
        samples=samples,
        computed=runner.computed,
        reused=runner.reused,
        seconds=time.perf_counter() - began,
    )


class _Runner:
    """Evaluator under rules that counts shards and reports progress."""

    def __init__(self, study: Study, progress: Progress) -> None:
        self.study, self.progress = study, progress
        self.model = study.protocol.model(study.subject.model)
        self.computed = self.reused = 0
        self.done = 0.0
        runs = sum(len(study.plans_of(rule)) for rule in study.rules) * len(study.data.images)
        swept = min(study.swept, len(study.data.images))
        self.total = runs + swept * len(study.rules) * sum(len(attacks) for *_, attacks in planned_sweeps(study))

    def run(self, rule: str, data: Labelled, attacks: dict[str, Attack]) -> Report:
        """Run one evaluation with the rule attached."""
        before = self.done

        def report_progress(done: int, total: int) -> None:
            self.done = before + done * len(attacks)
            self.progress(f"attack with {rule}", min(self.done / max(self.total, 1), 1.0))

        self.progress(f"attack with {rule}", min(self.done / max(self.total, 1), 1.0))
        with parse_rule(rule).attach(self.study.subject.network):
            report = evaluate(
                self.model,
                AttackImages(data, self.study.protocol),
                attacks,
                batch_size=self.study.batch_size,
                resume=self.study.shards,
                tag=rule,
                targets=self.study.target,
                progress=report_progress,
            )
        self.computed += report.shards_computed
        self.reused += report.shards_reused
        return report


def _sweeps(study: Study, runner: _Runner) -> list[Sweep]:
    some = study.data.first(study.swept) if study.swept else study.data
    sweeps = []
    for text, over, fixed, attacks in planned_sweeps(study):
        named = {f"{over} {place:.12g}": attack for place, attack in attacks.items()}
        rates = {}
        for rule in study.rules:
            report = runner.run(rule, some, named)
            rates[rule] = [report.fooled(name) for name in named]
        sweeps.append(
            Sweep(attack=text, over=over, places=list(attacks), fixed=fixed, rates=rates, images=len(some.images))
        )
    return sweeps
