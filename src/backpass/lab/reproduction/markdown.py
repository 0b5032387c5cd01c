"""The verdicts of many results as Markdown, for a README or a site."""

from __future__ import annotations

from collections.abc import Sequence

from backpass.lab.report import count_verdicts, estimate
from backpass.lab.result import Result
from backpass.lab.wording import interval_text

__all__ = ["verdict_counts", "verdicts"]


_WHAT = """What is measured is a difference, what the claim speaks of less what it is compared with, in pairs of runs;
or, where a range is claimed, the quantity itself. A claim holds where the whole 95 % interval is on its side of zero,
or in its range.
"""


def verdict_counts(results: Sequence[Result]) -> str:
    """A table with a row for each experiment: what it asks, and how many of its claims have each verdict."""
    lines = ["| experiment | question | holds | does not hold | undecided |", "| --- | --- | --- | --- | --- |"]
    for result in results:
        counts = count_verdicts(result.claims)
        lines.append(
            f"| `{result.experiment}` | {result.title} | {' | '.join(str(count or '') for count in counts.values())} |"
        )
    return "\n".join(lines) + "\n"


def verdicts(results: Sequence[Result]) -> str:
    """A page: the counts, then for every experiment its findings and each claim with its verdict."""
    parts = ["# Which claims hold?\n", _WHAT, verdict_counts(results)]
    for result in results:
        place = result.environment
        parts.append(f"\n## {result.experiment}: {result.title}\n")
        parts.append(
            f"{result.source}. Scale {result.scale}, {place['data']}; {place['device']}, torch "
            f"{place['versions'].get('torch', '?')}, {place.get('seconds', '?')} s.\n"
        )
        parts += [f"- **{finding.topic}.** {_escaped(finding.text)}" for finding in result.findings]
        parts.append(
            "\n| claim | verdict | measured [95 % interval] | in the paper | n |\n| --- | --- | --- | --- | --- |"
        )
        parts += [
            f"| {_escaped(claim.statement)} ({_escaped(claim.quantity)}) | **{claim.verdict}** | "
            f"{interval_text(estimate(claim), signed=True)} | {_escaped(claim.published)} | {claim.n} |"
            for claim in result.claims
        ]
    return "\n".join(parts) + "\n"


def _escaped(text: str) -> str:
    """Without what Markdown would take for a column's or an emphasis's end."""
    return text.replace("|", "\\|").replace("*", "\\*").replace("\n", " ")
