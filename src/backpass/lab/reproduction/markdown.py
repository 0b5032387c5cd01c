"""The verdicts of many results as Markdown, for a README or a site."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from backpass.report.page import count_verdicts, estimate
from backpass.report.result import Result
from backpass.report.wording import interval_text, setting
from backpass.wording import visible

__all__ = ["verdict_counts", "verdicts"]


_WHAT = """The measured quantity is a paired difference: the side that the claim speaks of less the side that it is
compared with. Where a range is claimed it is the quantity itself. A claim holds where the whole 95 % interval is on its
side of zero or in its range, and does not hold where the whole interval is on the other side: the effect is then
significantly the opposite one.
"""


def verdict_counts(results: Sequence[Result]) -> str:
    """Return a table with the number of claims by verdict, a row for each experiment."""
    lines = ["| experiment | question | holds | does not hold | undecided |", "| --- | --- | --- | --- | --- |"]
    for result in results:
        counts = [str(count or "") for count in count_verdicts(result.claims).values()]
        lines.append(f"| {' | '.join([_name(result.experiment), _escaped(result.title), *counts])} |")
    return "\n".join(lines) + "\n"


def verdicts(results: Sequence[Result]) -> str:
    """Return a page: the counts, then the findings and claims of every experiment."""
    parts = ["# Which claims hold?\n", _WHAT, verdict_counts(results)]
    for result in results:
        run = {name: setting(value) for name, value in result.environment.items()}
        torch = result.environment["versions"].get("torch", "?")
        about = (
            f"{result.source}. Scale {result.scale}, {run.get('data', '?')}; {run.get('device', '?')}, torch {torch}, "
        )
        parts.append(f"\n## {_escaped(result.experiment)}: {_escaped(result.title)}\n")
        when = f", {run['date']}" if "date" in run else ""
        parts.append(_escaped(f"{about}{run.get('seconds', '?')} s{when}.") + "\n")
        parts += [f"- **{_escaped(finding.topic)}.** {_escaped(finding.text)}" for finding in result.findings]
        parts.append(
            "\n| claim | verdict | measured [95 % interval] | in the paper | n |\n| --- | --- | --- | --- | --- |"
        )
        parts += [
            f"| {_escaped(claim.statement)} ({_escaped(claim.quantity)}) | **{claim.verdict}** | "
            f"{interval_text(estimate(claim), signed=True)} | {_escaped(claim.published)} | {claim.n} |"
            for claim in result.claims
        ]
    return "\n".join(parts) + "\n"


def _name(text: str) -> str:
    return f"`{text}`" if re.fullmatch(r"[\w.-]+", text) else _escaped(text)


def _escaped(text: object) -> str:
    """Escape HTML and Markdown: no tag, link, emphasis, column or formula begins in a text."""
    return re.sub(r"([\\`*_|$~]|\](?=[(\[:]))", r"\\\1", escape(visible(text).replace("\n", " "), quote=False))
