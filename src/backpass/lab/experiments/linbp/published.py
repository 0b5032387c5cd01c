"""Attack success in per cent, as Li et al. (arXiv 2112.11018) print it: plain gradients first, then LinBP's."""

from __future__ import annotations

__all__ = ["HALVINGS", "TABLES", "published"]

_NETWORKS = ("vgg16", "resnet50", "densenet161", "mobilenetv2", "wrn-28-10")

_PGD = {
    (10, 8): ((72.28, 66.41, 56.89, 92.94, 33.14), (95.52, 85.83, 61.87, 99.80, 33.48)),
    (20, 8): ((87.07, 80.82, 73.33, 98.19, 38.11), (98.50, 93.11, 77.72, 99.95, 39.55)),
    (100, 8): ((96.54, 92.53, 86.46, 99.88, 38.94), (99.25, 95.82, 89.03, 99.99, 40.44)),
    (10, 16): ((77.25, 71.52, 62.79, 94.90, 33.78), (98.78, 92.68, 69.04, 99.95, 34.21)),
    (20, 16): ((94.88, 91.18, 87.38, 99.44, 44.25), (99.99, 99.51, 91.18, 100.00, 45.22)),
    (100, 16): ((99.73, 99.81, 98.35, 100.00, 59.38), (100.00, 99.97, 99.07, 100.00, 60.78)),
}
_APGD = {
    (100, 8): ((98.06, 95.77, 91.91, 99.97, 39.46), (99.65, 97.60, 93.35, 100.00, 41.20)),
    (100, 16): ((99.97, 99.98, 99.58, 100.00, 60.94), (100.00, 99.99, 99.81, 100.00, 62.99)),
}

TABLES = {
    f"{attack}:steps={steps}": {
        eps: {network: (bp, linbp) for network, bp, linbp in zip(_NETWORKS, *rates, strict=True)}
        for (count, eps), rates in table.items()
        if count == steps
    }
    for attack, table in (("pgd", _PGD), ("apgd", _APGD))
    for steps in sorted({steps for steps, _ in table})
}
"""By attack, radius in 255ths, and network. Tables I and II."""

# Section 4.2.1 has two pairs of rates; that they are of 10 steps and the radii of Table I is our reading.
TABLES["pgd:steps=10"][8]["resnet50:activation=silu"] = (74.24, 75.85)
TABLES["pgd:steps=10"][16]["resnet50:activation=silu"] = (82.65, 87.97)

HALVINGS = {"bp": (25.85, 45.11, 61.98, 77.45), "linbp": (22.95, 42.18, 58.59, 72.11)}
"""Mean iterations at which Auto-PGD halves its step the first, second, third and fourth time; ResNet-50."""


def published(attack: str, eps: float, network: str) -> tuple[float, float] | None:
    """The rates of BP and LinBP in the paper, where it has them.

    Args:
        attack: in its text form; restarts are 5 in the paper.
        eps: the radius.
        network: one of the paper's.
    """
    steps = ",".join(attack.split(",")[:1])
    return TABLES.get(steps, {}).get(round(255 * eps), {}).get(network)
