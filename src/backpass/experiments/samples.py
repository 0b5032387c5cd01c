"""Gallery of fooled images: the image, its adversarial images and the perturbations."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from backpass.attacks.targets import choose_targets
from backpass.experiments.experiment import Outcome
from backpass.experiments.studies import AttackImages, Study, rule_name
from backpass.lab.plans import Plan
from backpass.preserved import preserved
from backpass.report.pictures import Gallery, Picture, amplified, png_uri
from backpass.rules import parse_rule

__all__ = ["gallery"]

_RULES_SHOWN = 3


def gallery(study: Study, outcomes: Mapping[str, Outcome]) -> list[Gallery]:
    """Return the first fooled images, if possible those fooled with every rule: one row per image.

    Args:
        study: the study.
        outcomes: by rule, the outcome of the first plan that uses gradients, or else of the first plan.
    """
    plan = next((plan for plan in study.plans if plan.uses_gradients), study.plans[0])
    rules = list(outcomes)[:_RULES_SHOWN]
    texts = [outcomes[rule]["fooled"] for rule in rules]
    by_every_rule = [place for place, row in enumerate(zip(*texts, strict=True)) if set(row) == {"1"}]
    chosen = (by_every_rule or [place for place, row in enumerate(zip(*texts, strict=True)) if "1" in row])[
        : study.shown
    ]
    if not chosen:
        return []
    index = torch.tensor(chosen)
    images = AttackImages(study.data, study.protocol)
    x = torch.stack([images[place][0] for place in chosen]).to(study.device)
    y = study.data.images.labels[index].to(study.device)
    model = study.protocol.model(study.subject.model)
    before, sure = study.protocol.pixels(x).cpu(), _confidence(study, model, x, y)
    after, columns, cells = {}, ["Before"], []
    for place, label, confidence, image in zip(chosen, y.tolist(), sure, before, strict=True):
        caption = f"{study.data.class_name(label)}, {confidence:.0%} (image {place})"
        cells.append([Picture(uri=png_uri(image), caption=caption)])
    for rule in rules:
        with parse_rule(rule).attach(study.subject.network):
            found = plan.attack(model, x, _aim(study, plan, model, x, y, index), indices=index.to(study.device))
        sure = _confidence(study, model, found.x_adv, found.prediction)
        after[rule] = study.protocol.pixels(found.x_adv).cpu(), found.prediction.tolist(), sure
    largest = max(float((pixels - before).abs().max()) for pixels, *_ in after.values())
    factor = 0.5 / largest if largest else 1.0
    for rule, (pixels, seen, confidences) in after.items():
        columns += [f"After, {rule_name(rule)}", "Difference"]
        for row, image, adversarial, label, confidence in zip(cells, before, pixels, seen, confidences, strict=True):
            added = adversarial - image
            caption = f"seen as {study.data.class_name(label)}, {confidence:.0%}"
            change = f"largest change {255 * float(added.abs().max()):.3g}/255"
            row += [
                Picture(uri=png_uri(adversarial), caption=caption),
                Picture(uri=png_uri(amplified(added, factor)), caption=change),
            ]
    return [
        Gallery(
            id="samples",
            title="Some fooled images",
            columns=columns,
            rows=cells,
            note=f"The first images fooled by {plan.name}, if possible with every rule's gradients. Percentages are "
            f"the network's softmax probabilities. Differences are multiplied by {factor:.3g} around mid-grey.",
        )
    ]


def _aim(study: Study, plan: Plan, model: nn.Module, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
    """Return the target classes of the images; their labels for an untargeted attack."""
    if study.target is None:
        return y
    with preserved(model):
        logits = plan.attack.make_oracle(model).plain(x, y)
    return choose_targets(study.target, y, logits, index.to(study.device), plan.attack.seed)


@torch.no_grad()
def _confidence(study: Study, model: nn.Module, x: Tensor, classes: Tensor) -> list[float]:
    """Return the softmax probability of one class per image."""
    logits, place = model(x.clone()), study.options.get("logits")
    if place is not None:
        logits = getattr(logits, place) if isinstance(place, str) and hasattr(logits, place) else logits[place]
    return [float(p) for p in logits.softmax(1).gather(1, classes[:, None]).squeeze(1)]
