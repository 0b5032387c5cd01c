"""What `sibp_training` writes: the paper's claims in words, and every run in a table."""

from __future__ import annotations

import math
import statistics
from typing import Any

T_QUANTILE = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # two-sided 95 %, by number of seeds


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval by Student's t."""
    return statistics.fmean(values), T_QUANTILE[len(values)] * statistics.stdev(values) / math.sqrt(len(values))


def best(rows: list[dict[str, Any]], family: str) -> dict[str, Any]:
    """The row of the rate that was chosen on the held-out images."""
    (row,) = (row for row in rows if row["method"] == family and row["chosen"])
    return row


def on_edge(rows: list[dict[str, Any]], family: str) -> bool:
    """Whether the chosen rate is the first or the last of the grid."""
    rates = [row["rate"] for row in rows if row["method"] == family]
    return best(rows, family)["rate"] in (min(rates), max(rates))


def compare(ours: dict[str, Any], theirs: dict[str, Any], mark: str, what: str) -> str:
    """The paired difference of accuracies, or of losses, with its interval and what it says."""
    pairs = zip(ours["at"][mark][what], theirs["at"][mark][what], strict=True)
    differences = [math.nan if None in pair else pair[0] - pair[1] for pair in pairs]
    mean, half = interval(differences)
    if math.isnan(mean):
        return "undecided (a run diverged)"
    good = mean - half > 0 if what == "accuracies" else mean + half < 0
    bad = mean + half < 0 if what == "accuracies" else mean - half > 0
    verdict = "same direction" if good else "opposite direction" if bad else "undecided"
    digits = 2 if what == "accuracies" else 3
    return f"{verdict}: {mean:+.{digits}f} ± {half:.{digits}f}"


def usable(rows: list[dict[str, Any]], family: str) -> list[float]:
    """Rates whose mean accuracy at the last mark is within 3 points of the family's best, if that learned anything."""
    top = list(best(rows, family)["at"].values())[-1]["accuracy"][0]
    mine = [row for row in rows if row["method"] == family and not row["diverged"]]
    return [row["rate"] for row in mine if list(row["at"].values())[-1]["accuracy"][0] >= max(top - 3, 20)]


def report(networks: dict[str, Any], facts: str, *, growth: int) -> str:
    """The page as Markdown; ``growth`` is how often a grid may grow."""
    lines = ["# Early training with SIBP", "", facts, ""]
    lines += [
        "## The paper's claims",
        "",
        "SIBP against each other method, both at the rate chosen on held-out images, paired by seed.",
        "",
    ]
    for network in networks.values():
        rows = network["rows"]
        last = list(rows[0]["at"])[-1]
        ours, sgd, prox, adam = (best(rows, family) for family in ("SIBP", "SGD", "ProxProp", "AdamW"))
        lines += [
            f"**{network['title']}**, SIBP eta {ours['rate']:g}, SGD {sgd['rate']:g}, ProxProp {prox['rate']:g}, "
            f"AdamW {adam['rate']:g}:",
            "",
        ]
        far = max((row for row in rows if row["method"] == "SGD"), key=lambda row: row["rate"])
        (same,) = (row for row in rows if row["method"] == "SIBP" and row["rate"] == 0.1)
        lines.append(
            f"- Larger steps, accuracy at eta n / lam = 10 over SGD at {far['rate']:g}: "
            f"{compare(same, far, last, 'accuracies')} points. Within 3 points of their best are SIBP for eta in "
            f"{usable(rows, 'SIBP')} and SGD for rates in {usable(rows, 'SGD')}."
        )
        for name, other in (("SGD", sgd), ("ProxProp", prox), ("AdamW", adam)):
            lines.append(
                f"- Faster decrease than {name}, loss after 100 batches: {compare(ours, other, '100', 'losses')}. "
                f"Better accuracy after {last}: {compare(ours, other, last, 'accuracies')} points."
            )
        edges = [family for family in dict.fromkeys(row["method"] for row in rows) if on_edge(rows, family)]
        if edges:
            lines.append(f"- On the edge of its grid, which grew {growth} times: {', '.join(edges)}.")
        lines.append("")
    for network in networks.values():
        rows = network["rows"]
        marks = list(rows[0]["at"])
        lines += [f"## {network['title']}, {network['seeds']} seeds", ""]
        lines.append(
            "| method | rate | "
            + " | ".join(f"accuracy, loss at {mark}" for mark in marks)
            + " | held out | CPU s | diverged |"
        )
        lines.append("| --- " * (len(marks) + 5) + "|")
        for row in rows:
            cells = []
            for mark in marks:
                accuracy, loss = row["at"][mark]["accuracy"], row["at"][mark]["loss"]
                shown = (
                    "not finite" if loss is None else "above 100" if loss[0] > 100 else f"{loss[0]:.3f} ± {loss[1]:.3f}"
                )
                cells.append(f"{accuracy[0]:.2f} ± {accuracy[1]:.2f}, {shown}")
            bold = "**" if row is best(rows, row["method"]) else ""
            diverged = f"{row['diverged']} of {network['seeds']}" if row["diverged"] else ""
            seconds = row["at"][marks[-1]]["seconds"]
            lines.append(
                f"| {bold}{row['method']}{bold} | {row['rate']:g} | {' | '.join(cells)} | {row['held_out']:.2f} "
                f"| {seconds:.1f} | {diverged} |"
            )
        lines.append("")
    return "\n".join(lines)
