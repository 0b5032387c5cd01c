"""Markdown summary of the verdicts of several results."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from backpass.report.claims import count_verdicts
from backpass.report.page import estimate
from backpass.report.result import Result
from backpass.report.wording import interval_text, setting
from backpass.wording import visible

__all__ = ["verdict_counts", "verdicts"]


_WHAT = """The measured quantity is a paired difference: the side that the claim speaks of less the side that it is
compared with. Where a range is claimed it is the quantity itself. At the setting that the claim speaks of (its network,
data and protocol, trained to within 3 points of the published accuracy) a verdict is *replicated*, or *contradicted*
where the effect is significantly the opposite one. Elsewhere, for instance on smaller networks or fewer images, it is
*same direction* or *opposite direction*, which is no verdict on the claim. *Undecided* is what is not significant.
"""


def verdict_counts(results: Sequence[Result]) -> str:
    """Return a table of the number of claims by verdict, one row per experiment."""
    found = count_verdicts([claim for result in results for claim in result.claims])
    columns = ["experiment", "question", *found]
    lines = [f"| {' | '.join(columns)} |", f"| {' | '.join(['---'] * len(columns))} |"]
    for result in results:
        here = count_verdicts(result.claims)
        counts = [str(here.get(verdict, "")) for verdict in found]
        lines.append(f"| {' | '.join([_name(result.experiment), _escaped(result.title), *counts])} |")
    return "\n".join(lines) + "\n"


def verdicts(results: Sequence[Result]) -> str:
    """Return a page with the counts, findings and claims of every experiment."""
    parts = ["# Which claims are replicated?\n", _WHAT, verdict_counts(results)]
    for result in results:
        run = {name: setting(value) for name, value in result.environment.items()}
        torch = result.environment["versions"].get("torch", "?")
        data = str(run.get("data", "?")).rstrip(".")
        source = f"{result.source}. " if result.source else ""
        about = f"{source}Scale {result.scale}, {data}; {run.get('device', '?')}, torch {torch}, "
        parts.append(f"\n## {_escaped(result.experiment)}: {_escaped(result.title)}\n")
        when = f", {run['date']}" if "date" in run else ""
        parts.append(_escaped(f"{about}{run.get('seconds', '?')} s{when}.") + "\n")
        parts += [f"- **{_escaped(finding.topic)}.** {_escaped(finding.text)}" for finding in result.findings]
        parts.append(
            "\n| claim | setting | verdict | measured [95 % interval] | in the paper | n |\n"
            "| --- | --- | --- | --- | --- | --- |"
        )
        parts += [
            f"| {_escaped(claim.statement)} ({_escaped(claim.quantity)}) | {claim.setting} | **{claim.verdict}** | "
            f"{interval_text(estimate(claim), signed=True)} | {_escaped(claim.published)} | {claim.n} |"
            for claim in result.claims
        ]
    return "\n".join(parts) + "\n"


def _name(text: str) -> str:
    return f"`{text}`" if re.fullmatch(r"[\w.-]+", text) else _escaped(text)


def _escaped(text: object) -> str:
    """Escape HTML and Markdown syntax: tags, links, emphasis, table columns and formulas."""
    return re.sub(r"([\\`*_|$~]|\](?=[(\[:]))", r"\\\1", escape(visible(text).replace("\n", " "), quote=False))
