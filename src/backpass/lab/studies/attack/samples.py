"""Selection of example images that were fooled."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from backpass.attacks import Report
from backpass.attacks.targets import choose_targets
from backpass.lab.studies.attack.images import AttackImages
from backpass.lab.studies.attack.study import Sample, Study
from backpass.preserved import preserved
from backpass.rules import parse_rule

__all__ = ["draw_samples"]


def draw_samples(study: Study, reports: dict[str, Report]) -> list[Sample]:
    """Return images that the first plan fools, if possible with every rule."""
    plan = next((plan for plan in study.plans if plan.uses_gradients), study.plans[0])
    rules = [rule for rule in study.rules if plan in study.plans_of(rule)]
    outcomes = torch.stack([reports[rule].attacks[plan.name].success for rule in rules])
    fooled = next((rows for rows in (outcomes.all(0), outcomes[0], outcomes.any(0)) if bool(rows.any())), outcomes[0])
    chosen = fooled.nonzero().squeeze(1)[: study.shown]
    if len(chosen) == 0:
        return []
    images = AttackImages(study.data, study.protocol)
    x = torch.stack([images[int(index)][0] for index in chosen]).to(study.device)
    y = study.data.images.labels[chosen].to(study.device)
    model = study.protocol.model(study.subject.model)
    aim = y
    if study.target is not None:
        with preserved(model):
            logits = plan.attack.make_oracle(model).plain(x, y)
        aim = choose_targets(study.target, y, logits, chosen.to(study.device), plan.attack.seed)
    after, seen, confidences = {}, {}, {}
    for rule in rules:
        with parse_rule(rule).attach(study.subject.network):
            found = plan.attack(model, x, aim, indices=chosen.to(study.device))
        after[rule], seen[rule] = study.protocol.pixels(found.x_adv).cpu(), found.prediction.cpu()
        confidences[rule] = _confidence(study, model, found.x_adv, found.prediction)
    before = study.protocol.pixels(x).cpu()
    confidence = _confidence(study, model, x, y)
    return [
        Sample(
            index=int(index),
            label=int(y[row]),
            before=before[row],
            after={rule: after[rule][row] for rule in rules},
            seen={rule: int(seen[rule][row]) for rule in rules},
            confidence=confidence[row],
            confidences={rule: confidences[rule][row] for rule in rules},
        )
        for row, index in enumerate(chosen)
    ]


@torch.no_grad()
def _confidence(study: Study, model: nn.Module, x: Tensor, classes: Tensor) -> list[float]:
    """Return the softmax probability of one class per image."""
    logits, place = model(x.clone()), study.options.get("logits")
    if place is not None:
        logits = getattr(logits, place) if isinstance(place, str) and hasattr(logits, place) else logits[place]
    return [float(p) for p in logits.softmax(1).gather(1, classes[:, None]).squeeze(1)]
