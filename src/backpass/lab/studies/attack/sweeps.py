"""Attacks for the curves of success against eps and against steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from backpass.attacks import APGD, FGSM, Attack, Iterative
from backpass.lab.studies.attack.plans import make_plans
from backpass.lab.studies.attack.study import Study

__all__ = ["planned_sweeps"]

_SWEPT = (FGSM, Iterative, APGD)  # fast enough for many values
_EPS_LADDER = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
_STEPS_LADDER = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
_ENOUGH_RADII = 4


def planned_sweeps(study: Study) -> list[tuple[str, str, str, dict[float, Attack]]]:
    """Return the planned sweeps: (attack, setting, fixed settings as text, attacks by value)."""
    if study.swept == 0:
        return []
    first = study.radii[0]
    radii = set(study.radii)
    if len(radii) < _ENOUGH_RADII:
        radii |= {eps for share in _EPS_LADDER if (eps := share * max(study.radii)) <= 1}
    found: list[tuple[str, str, str, dict[float, Attack]]] = []
    for text in study.attacks:
        plans = make_plans([text], sorted(radii), study.options, study.protocol)
        if not isinstance(plans[0].attack, _SWEPT):
            continue
        steps = getattr(plans[0].attack, "steps", None)
        fixed = f"{steps} steps" if steps else "one step"
        found.append((text, "eps", fixed, {plan.eps: plan.attack for plan in plans}))
        if steps is not None:
            (plan,) = (plan for plan in plans if plan.eps == first)
            ladder = sorted({steps, *(k for k in _STEPS_LADDER if k <= 2 * steps)})
            attacks = {float(k): replace(plan.attack, **_steps(k)) for k in ladder}
            found.append((text, "steps", plan.name.rpartition(" at ")[2], attacks))
    return found


def _steps(count: int) -> dict[str, Any]:
    # Not every attack has steps, so that a keyword would not pass the type checker.
    return {"steps": count}
