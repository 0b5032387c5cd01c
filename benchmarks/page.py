"""What the benchmarks found, as JSON and as a page of the documentation."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from backpass import __version__
from side_by_side import Figure, Options, Row, Section, processor

__all__ = ["environment", "markdown", "read", "write"]

Found = Mapping[str, Sequence[Section]]
"""By benchmark, its sections."""


def environment(options: Options) -> dict[str, Any]:
    """Where it ran."""
    return {
        "processor": processor("model name") or platform.processor() or "unknown",
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu, one thread",
        "backpass": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def write(found: Found, where: Mapping[str, Any], folder: Path) -> tuple[Path, Path]:
    """``cpu.json`` and ``cpu.md``, or ``cuda.json`` and ``cuda.md``, in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    name = "cpu" if where["device"].startswith("cpu") else "cuda"
    data, page = folder / f"{name}.json", folder / f"{name}.md"
    parts = {benchmark: [asdict(section) for section in sections] for benchmark, sections in found.items()}
    data.write_text(json.dumps({"environment": dict(where), "benchmarks": parts}, indent=1) + "\n")
    page.write_text(markdown(found, where))
    return data, page


def read(path: Path) -> tuple[dict[str, list[Section]], dict[str, Any]]:
    """What `write` wrote as JSON."""
    content = json.loads(path.read_text())
    found = {
        benchmark: [
            Section(title=one["title"], text=one["text"], rows=[_row(row) for row in one["rows"]]) for one in parts
        ]
        for benchmark, parts in content["benchmarks"].items()
    }
    return found, content["environment"]


def markdown(found: Found, where: Mapping[str, Any]) -> str:
    """The page: what was asked for and whether it is met, then every table."""
    rows = [row for sections in found.values() for section in sections for row in section.rows if row.asked]
    lines = [
        "# Benchmarks",
        "",
        f"{where['device']}: {where['processor']}, {where['platform']}; backpass {where['backpass']}, torch "
        f"{where['torch']}, Python {where['python']}. All contestants of a table take turns in one process; a ratio is "
        "the median over the rounds of times within a round, with the least and the most in brackets. Times are CPU "
        "times of one thread. Made by `make bench`.",
        "",
        "## What was asked for",
        "",
        "| contestant | figure | at most | measured | |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        assert row.asked is not None
        name, most = row.asked
        value = row.figures[name]
        middle = value.median if isinstance(value, Figure) else value
        verdict = "met" if middle <= most else f"**missed**{': ' + row.note if row.note else ''}"
        lines.append(f"| {row.name} | {name} | {most:g} | {_text(value)} | {verdict} |")
    for sections in found.values():
        for section in sections:
            names = list(dict.fromkeys(name for row in section.rows for name in row.figures))
            notes = any(row.note for row in section.rows)
            lines += [
                "",
                f"## {section.title}",
                "",
                section.text,
                "",
                f"| | {' | '.join(names)} |{' |' if notes else ''}",
                f"| --- | {' | '.join(['---'] * len(names))} |{' --- |' if notes else ''}",
            ]
            for row in section.rows:
                cells = [_text(row.figures[name]) if name in row.figures else "" for name in names]
                lines.append(f"| {row.name} | {' | '.join(cells)} |{f' {row.note} |' if notes else ''}")
    return "\n".join(lines) + "\n"


def _text(value: Figure | float) -> str:
    if isinstance(value, Figure):
        return f"{_digits(value.median)} [{_digits(value.least)}, {_digits(value.most)}]"
    return _digits(value)


def _digits(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _row(content: Mapping[str, Any]) -> Row:
    figures = {
        name: Figure(**value) if isinstance(value, Mapping) else float(value)
        for name, value in content["figures"].items()
    }
    asked = content["asked"]
    return Row(
        name=content["name"], figures=figures, asked=(asked[0], asked[1]) if asked else None, note=content["note"]
    )
