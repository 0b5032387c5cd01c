"""``linbp:start=auto`` in a study: the start of LinBP is selected on held-out images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from backpass.data import Labelled
from backpass.errors import BackpassError
from backpass.experiments.studies import Study
from backpass.lab.placement_search import Choice, choose_start, is_automatic
from backpass.rules import LinBP, parse_rule
from backpass.rules.registry import PLACEHOLDERS

__all__ = ["Placing", "place", "set_aside"]

_MOST = 200


@dataclass(frozen=True, kw_only=True, eq=False)
class Placing:
    """Selected start of ``linbp:start=auto``.

    Attributes:
        choice: selected rule, with the success of every start.
        plan: attack used for the selection.
        images: description of the images used for the selection.
    """

    choice: Choice
    plan: str
    images: str


def set_aside(data: Labelled, limit: int | None, rules: Sequence[str]) -> tuple[Labelled, Labelled | None]:
    """Split the images into those to attack and, if a rule has ``start=auto``, those for the selection of its start.

    The latter are up to 200 images after the first ``limit``; if none is left, at most the last quarter of all images.

    Raises:
        BackpassError: there are fewer than two images.
    """
    attacked = data.first(limit)
    if not any(map(is_automatic, rules)):
        return attacked, None
    count = len(data.images)
    if count < 2:
        raise BackpassError("linbp:start=auto needs an image to attack and another one to choose by, got 1.")
    if len(attacked.images) == count:
        attacked = data.first(count - min(_MOST, max(1, count // 4)))
    first = len(attacked.images)
    rows = slice(first, min(first + _MOST, count))
    return attacked, data.some(rows, f"{rows.stop - first:,} after the first {first:,}")


def place(study: Study, aside: Labelled) -> tuple[Study, dict[str, Placing]]:
    """Replace every ``auto`` by a start, selected by the first gradient-based attack.

    Returns:
        The study, and the selected start by text form of the rule.

    Raises:
        BackpassError: no attack uses gradients.
    """
    plan = next((plan for plan in study.plans if plan.uses_gradients), None)
    if plan is None:
        raise BackpassError("linbp:start=auto needs an attack that uses gradients, to choose by.")
    model, x = study.protocol.model(study.subject.model), study.protocol.images(aside.images.x)
    placed: dict[str, Placing] = {}
    for text in filter(is_automatic, study.rules):
        rule = parse_rule(text, placeholders=PLACEHOLDERS)
        assert isinstance(rule, LinBP)  # noqa: S101  no other rule is automatic
        choice = choose_start(
            rule, study.subject.network, x, aside.images.y, plan.attack, model=model, batch_size=study.batch_size
        )
        placed[text] = Placing(choice=choice, plan=plan.name, images=aside.description)
    rules = [str(placed[text].choice.rule) if text in placed else text for text in study.rules]
    return replace(study, rules=list(dict.fromkeys(rules))), placed
