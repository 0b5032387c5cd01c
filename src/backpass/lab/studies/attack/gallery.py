"""Gallery of original images, adversarial images and perturbations."""

from __future__ import annotations

from backpass.lab.studies.attack.comparison import rule_name
from backpass.lab.studies.attack.study import Measured
from backpass.report.pictures import Gallery, Picture, amplified, png_uri

__all__ = ["gallery"]

_RULES_SHOWN = 3


def gallery(measured: Measured) -> list[Gallery]:
    """Return one row per sample: original image, then adversarial image and perturbation of every rule."""
    samples, data = measured.samples, measured.study.data
    if not samples:
        return []
    plan = next((plan for plan in measured.study.plans if plan.uses_gradients), measured.study.plans[0])
    rules = list(samples[0].after)[:_RULES_SHOWN]
    largest = max(float((s.after[rule] - s.before).abs().max()) for s in samples for rule in rules)
    factor = 0.5 / largest if largest else 1.0
    columns = ["Before"]
    for rule in rules:
        columns += [f"After, {rule_name(rule)}", "Difference"]
    rows = []
    for sample in samples:
        row = [
            Picture(
                uri=png_uri(sample.before),
                caption=f"{data.class_name(sample.label)}, {sample.confidence:.0%} (image {sample.index})",
            )
        ]
        for rule in rules:
            added = sample.after[rule] - sample.before
            row += [
                Picture(
                    uri=png_uri(sample.after[rule]),
                    caption=f"seen as {data.class_name(sample.seen[rule])}, {sample.confidences[rule]:.0%}",
                ),
                Picture(
                    uri=png_uri(amplified(added, factor)),
                    caption=f"largest change {255 * float(added.abs().max()):.3g}/255",
                ),
            ]
        rows.append(row)
    return [
        Gallery(
            id="samples",
            title="Some fooled images",
            columns=columns,
            rows=rows,
            note=f"The first images fooled by {plan.name}, if possible with every rule's gradients. Percentages are "
            f"the network's softmax probabilities. Differences are multiplied by {factor:.3g} around mid-grey.",
        )
    ]
