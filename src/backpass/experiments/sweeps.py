"""Attacks for the curves of success against eps and against steps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from backpass.attacks import APGD, FGSM, Attack, Iterative
from backpass.experiments.studies import Study
from backpass.lab.plans import Plan, make_plans

__all__ = ["Sweep", "planned_sweeps"]

_SWEPT = (FGSM, Iterative, APGD)  # fast enough for many values
_EPS_LADDER = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
_STEPS_LADDER = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
_ENOUGH_RADII = 4


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Attacks along one setting.

    Attributes:
        attack: text form of the attack.
        over: varied setting, ``eps`` or ``steps``.
        fixed: fixed setting, as text.
        plan: plan that the attacks vary.
        attacks: attacks by value of the setting.
    """

    attack: str
    over: str
    fixed: str
    plan: Plan
    attacks: dict[float, Attack]

    @property
    def name(self) -> str:
        """Unique name of the curve."""
        return f"{self.attack} against {self.over}"


def planned_sweeps(study: Study) -> list[Sweep]:
    """Return the curves of a study; none if it has no images for them."""
    if study.swept == 0:
        return []
    first = study.radii[0]
    radii = set(study.radii)
    if len(radii) < _ENOUGH_RADII:
        radii |= {eps for share in _EPS_LADDER if (eps := share * max(study.radii)) <= 1}
    found: list[Sweep] = []
    every = make_plans(study.attacks, sorted(radii), study.options, study.protocol)
    for text in study.attacks:
        plans = [plan for plan in every if plan.text == text]
        if not isinstance(plans[0].attack, _SWEPT):
            continue
        steps = getattr(plans[0].attack, "steps", None)
        (plan,) = (plan for plan in plans if plan.eps == first)
        by_radius = {plan.eps: plan.attack for plan in plans}
        fixed = f"{steps} steps" if steps else "one step"
        found.append(Sweep(attack=text, over="eps", fixed=fixed, plan=plan, attacks=by_radius))
        if steps is not None:
            ladder = sorted({steps, *(k for k in _STEPS_LADDER if k <= 2 * steps)})
            by_steps = {float(k): replace(plan.attack, **_steps(k)) for k in ladder}
            fixed = plan.name.rpartition(" at ")[2]
            found.append(Sweep(attack=text, over="steps", fixed=fixed, plan=plan, attacks=by_steps))
    return found


def _steps(count: int) -> dict[str, Any]:
    # Not every attack has steps, so that a keyword would not pass the type checker.
    return {"steps": count}
