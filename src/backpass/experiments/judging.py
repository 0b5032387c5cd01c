"""Selection of candidates and tests of claims from stored outcomes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from backpass.errors import BackpassError
from backpass.experiments.experiment import Arm, Comparison, Design, Experiment, Outcome, Runs, Values
from backpass.experiments.outcomes import Store, Task, tasks_of
from backpass.report.claims import Claim, corrected, judge, judge_within
from backpass.report.proportions import judge_images

__all__ = ["RunsByArm", "collect", "judge_all", "pairs_of", "verdict_of"]

RunsByArm = Mapping[tuple[str, str], Runs]
"""Runs by (group, name of the arm)."""


def collect(design: Design, store: Store, device: str) -> tuple[RunsByArm, dict[str, tuple[Task, Outcome]]]:
    """Read every outcome of a scale and select the candidate of each arm.

    Returns:
        The runs by group and arm, and each task with its outcome by file name; several arms may share one.

    Raises:
        BackpassError: an outcome is missing or damaged.
    """
    outcomes: dict[tuple[str, str], dict[str, list[Outcome]]] = {}
    read: dict[str, tuple[Task, Outcome]] = {}
    for key, label, task in tasks_of(design, device):
        if task.name not in read:
            outcome = store.read(task)
            if outcome is None:
                raise BackpassError(f"the outcome of {task.label} is not in {store.folder}, or damaged: run it again.")
            read[task.name] = task, outcome
        outcomes.setdefault(key, {}).setdefault(label, []).append(read[task.name][1])
    arms = {(arm.group, arm.name): arm for arm in design.arms}
    found = {key: Runs(arm=arms[key], by_candidate=of, chosen=_choose(design, of)) for key, of in outcomes.items()}
    return found, read


def _choose(design: Design, outcomes: Mapping[str, Sequence[Outcome]]) -> str:
    """Return the label of the candidate with the fewest diverged runs and the highest mean."""
    if design.choice is None or len(outcomes) == 1:
        return next(iter(outcomes))

    def merit(label: str) -> tuple[int, float]:
        assert design.choice is not None  # noqa: S101
        values = design.choice.of(outcomes[label])
        kept = [value for value in values if math.isfinite(value)]
        return len(kept) - len(values), math.fsum(kept) / max(len(kept), 1)

    return max(outcomes, key=merit)


def pairs_of(one: Comparison, found: RunsByArm) -> dict[str, Values]:
    """Return the values that a claim is tested on: ``ours``, and ``theirs`` if it compares two arms."""

    def both(group: str) -> dict[str, Values]:
        ours = found[group, one.ours]
        if not one.theirs:
            return {"ours": one.measurement.values(ours)}
        return dict(zip(("ours", "theirs"), one.measurement.both(ours, found[group, one.theirs]), strict=True))

    if not one.groups:
        return both(one.group)
    each = [both(group) for group in one.groups]
    return {side: [math.fsum(map(float, values[side])) / len(values[side]) for values in each] for side in each[0]}


def verdict_of(one: Comparison, pairs: Mapping[str, Any], seeds: Sequence[int], prefix: str = "") -> Claim:
    """Test one claim, without correction for multiple comparisons."""
    told: dict[str, Any] = {
        "quantity": one.measurement.quantity,
        "reference": one.reference or None,
        "published": one.published,
        "setting": one.setting,
    }
    if one.measurement.images:
        return judge_images(prefix + one.id, one.statement, **pairs, direction=one.direction, **told)
    if "theirs" not in pairs or math.isfinite(one.low) or math.isfinite(one.high):
        values = pairs["ours"]
        if "theirs" in pairs:
            told["quantity"] = f"difference in {told['quantity']}"
            values = [a - b for a, b in zip(values, pairs["theirs"], strict=True)]
        return judge_within(prefix + one.id, one.statement, values=values, low=one.low, high=one.high, **told)
    return judge(
        prefix + one.id,
        one.statement,
        ours=pairs["ours"],
        theirs=pairs["theirs"],
        direction=one.direction,
        seeds=seeds if len(seeds) == len(pairs["ours"]) else (),
        diverged=one.diverged,
        **told,
    )


def judge_all(experiment: Experiment, scale: str, found: RunsByArm) -> list[Claim]:
    """Test every claim of an experiment, with Holm's correction for multiple comparisons."""
    design = experiment.design(scale)
    claims = [verdict_of(one, pairs_of(one, found), design.seeds, f"{experiment.name}.") for one in design.comparisons]
    return corrected(claims)


def arm_label(runs: Runs) -> str:
    """Return the name of an arm, with the selected candidate if it has several."""
    arm: Arm = runs.arm
    return f"{arm.name}, {runs.chosen}" if len(runs.by_candidate) > 1 else arm.name
