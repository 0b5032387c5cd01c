"""Report content of an experiment: findings, tables and plots."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

import torch

from backpass.experiments.experiment import Arm, Design, Experiment, Outcome, Plot, Runs, Values
from backpass.experiments.judging import RunsByArm, arm_label, judge_all, pairs_of
from backpass.experiments.outcomes import Store, Task
from backpass.report.claims import CORRECTED, Claim
from backpass.report.proportions import marks_difference, percent, rate_of
from backpass.report.result import Cell, Curve, Finding, Result, Series, Table, environment
from backpass.report.statistics import Interval, geometric_interval, mean_interval
from backpass.report.wording import anchor, interval_text
from backpass.wording import listing

__all__ = ["describe", "device_text"]


def describe(
    experiment: Experiment,
    scale: str,
    found: RunsByArm,
    read: Mapping[str, tuple[Task, Outcome]],
    store: Store,
    device: torch.device,
) -> Result:
    """Test the claims of an experiment and return the content of its report.

    Args:
        experiment: the experiment.
        scale: name of the scale, ``small`` or ``paper``.
        found: runs by group and arm.
        read: each task with its outcome, by file name.
        store: store of the outcomes.
        device: device that the runs used.
    """
    design = experiment.design(scale)
    claims = judge_all(experiment, scale, found)
    chosen = {" ".join(filter(None, key)): runs.chosen for key, runs in found.items() if len(runs.by_candidate) > 1}
    return Result(
        experiment=experiment.name,
        title=experiment.title,
        question=experiment.question,
        scale=scale,
        findings=[*_findings(design, found, claims), *experiment.remarks],
        environment={
            **environment(
                device=device_text(device), threads=torch.get_num_threads(), data=design.data(), seeds=design.seeds
            ),
            "seconds": round(math.fsum(outcome["wall seconds"] for _, outcome in read.values()), 1),
        },
        settings={**_settings(design), **({"chosen": chosen} if chosen else {})},
        series=[series for plot in design.plots for series in _plots(plot, design, found)],
        claims=claims,
        tables=[made for group, arms in design.groups() if (made := _table(group, arms, design, found)) is not None],
        numbers={
            "pairs": {one.id: pairs_of(one, found) for one in design.comparisons},
            "outcomes": {name: digest for task, _ in read.values() for name, digest in store.hashes(task).items()},
        },
        plots_note=experiment.plots_note,
        claims_note=f"{experiment.claims_note} {CORRECTED}",
        source=experiment.source,
    )


def device_text(device: torch.device) -> str:
    """Return the device as text, with the name of the GPU for CUDA."""
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def _findings(design: Design, found: RunsByArm, claims: Sequence[Claim]) -> list[Finding]:
    """Return one finding per compared pair of arms, and one per arm with a claimed range."""
    parts: dict[tuple[tuple[str, ...], str, str], list[str]] = {}
    for one, claim in zip(design.comparisons, claims, strict=True):
        pairs, label = pairs_of(one, found), one.measurement.label
        key = (one.groups or (one.group,), one.ours, one.theirs)
        mean = interval_text(_mean(pairs["ours"]))
        if not one.theirs:
            parts.setdefault(key, []).append(f"{label} {mean} ({claim.verdict})")
            continue
        other = interval_text(_mean(pairs["theirs"]))
        gap = interval_text(Interval(claim.estimate, *claim.interval, claim.n), signed=True)
        parts.setdefault(key, []).append(f"{label} {mean} against {other}, difference {gap} ({claim.verdict})")
    made = []
    for (groups, ours, theirs), texts in parts.items():
        text = f"{'; '.join(texts)}."
        if len(groups) == 1:
            names = [arm_label(found[groups[0], name]) for name in (ours, theirs) if name]
            if theirs and design.cost is not None:
                text += f" {_cost(design, found[groups[0], ours], found[groups[0], theirs])}"
        else:
            names = [name for name in (ours, theirs) if name]
            text = f"Over {listing(list(groups))}: {text}"
        topic = " against ".join(names)
        made.append(Finding(f"{groups[0]}: {topic}" if len(groups) == 1 and groups[0] else topic, text))
    return made


def _mean(values: Values) -> Interval:
    return percent(rate_of(values)) if isinstance(values, str) else mean_interval(values)


def _cost(design: Design, ours: Runs, theirs: Runs) -> str:
    assert design.cost is not None  # noqa: S101
    first, second = (list(map(float, values)) for values in design.cost.both(ours, theirs))
    ratio = [a / b if b else math.nan for a, b in zip(first, second, strict=True)]
    return f"{design.cost.label.capitalize()}: {interval_text(mean_interval(ratio))} times as much."


def _table(group: str, arms: Sequence[Arm], design: Design, found: RunsByArm) -> Table | None:
    """Return the table of a group; None if its outcomes have none of the measurements."""
    several = any(len(arm.candidates) > 1 for arm in arms)
    rows: list[list[Cell]] = []
    outcomes = [one for arm in arms for runs in found[group, arm.name].by_candidate.values() for one in runs]
    columns = [one for one in design.measurements if not one.key or all(one.key in outcome for outcome in outcomes)]
    if not columns:
        return None
    of_images = any(one.images for one in columns)  # such runs do not diverge
    for arm in arms:
        runs = found[group, arm.name]
        for label in arm.candidates:
            here = Runs(arm=arm, by_candidate=runs.by_candidate, chosen=label)
            values = [one.values(here) for one in columns]
            lost = sum(any(not math.isfinite(v) for v in row) for row in zip(*values, strict=False))
            rows.append([
                arm.name,
                *([label, _chosen(runs, label)] if several else []),
                *(one.interval(here) for one in columns),
                *([] if of_images else [f"{lost} of {len(values[0])}"]),
            ])  # fmt: skip
    heads = ["setting", ""] if several else []
    return Table(
        id=anchor(f"{group}-arms".lower().replace(" ", "-")),
        title=f"{group}: every arm" if group else "Every arm",
        columns=["arm", *heads, *(one.quantity for one in columns), *([] if of_images else ["diverged"])],
        rows=rows,
        note=(
            "Percentages of images, in brackets Wilson's 95 % intervals." if of_images else "Means with 95 % intervals."
        )
        + (f" A setting is chosen by its mean {design.choice.label}." if several and design.choice else ""),
    )


def _chosen(runs: Runs, label: str) -> str:
    labels = list(runs.by_candidate)
    if label != runs.chosen or len(labels) == 1:
        return ""
    return "chosen, at the edge" if label in (labels[0], labels[-1]) else "chosen"


def _plots(plot: Plot, design: Design, found: RunsByArm) -> list[Series]:
    made = []
    for group, arms in design.groups():
        if plot.groups and group not in plot.groups:
            continue
        if plot.lines:
            curves = [_line(plot, label, names, group, found) for label, names in plot.lines.items()]
        else:
            shown = [found[group, arm.name] for arm in arms if not plot.arms or arm.name in plot.arms]
            less = found[group, plot.less[0]] if plot.less else None
            curves = [curve for runs in shown if (curve := _curve(plot, runs, less)) is not None]
        if not curves:
            continue
        title = f"{group}: {plot.title}" if group else plot.title
        made.append(
            Series(
                id=anchor(f"{title}-{plot.x_label}".lower().replace(" ", "-")),
                title=title,
                description=f"{plot.y_label} against {plot.x_label}: {listing([curve.label for curve in curves])}.",
                x_label=plot.x_label,
                y_label=plot.y_label,
                curves=curves,
                log_x=plot.log_x,
                log_y=plot.log_y,
            )
        )
    return made


def _curve(plot: Plot, runs: Runs, less: Runs | None) -> Curve | None:
    """Return the curve of an arm; None if it has no such entry, or a run diverged and its x values are unknown."""
    if any(plot.key not in one for one in runs.runs):
        return None
    rows = [one[plot.key] for one in runs.runs]
    if less is not None:
        pairs = zip(rows, (one[plot.key] for one in less.runs), strict=True)
        rows = [[a - b for a, b in zip(*pair, strict=True)] for pair in pairs]
    x = plot.x
    if isinstance(x, str):
        x = [mean_interval(places).mean for places in zip(*(one[x] for one in runs.runs), strict=True)]
        if not all(map(math.isfinite, x)):
            return None
    if plot.images:
        texts = ["".join(parts) for parts in zip(*rows, strict=True)]
        return Curve(label=arm_label(runs), x=x, given=[percent(rate_of(text)) for text in texts])
    if plot.draws:  # intervals only: every step of every draw would take megabytes
        interval = geometric_interval if plot.log_y else mean_interval
        columns = zip(*(row for one in rows for row in one), strict=True)
        return Curve(label=arm_label(runs), x=x, given=[interval(column) for column in columns])
    return Curve(label=arm_label(runs), x=x, runs=rows, geometric=plot.log_y)


def _line(plot: Plot, label: str, names: Sequence[str], group: str, found: RunsByArm) -> Curve:
    assert plot.measurement is not None  # noqa: S101
    assert not isinstance(plot.x, str)  # noqa: S101
    arms, less = ([found[group, name] for name in some] for some in (names, plot.less))
    if plot.measurement.images and not less:
        return Curve(label=label, x=plot.x, given=[plot.measurement.interval(runs) for runs in arms])
    if not less:
        columns = [plot.measurement.values(runs) for runs in arms]
    else:
        pairs = [plot.measurement.both(ours, theirs) for ours, theirs in zip(arms, less, strict=True)]
        if plot.measurement.images:
            return Curve(label=label, x=plot.x, given=[marks_difference(str(a), str(b)).interval for a, b in pairs])
        columns = [[x - y for x, y in zip(map(float, a), map(float, b), strict=True)] for a, b in pairs]
    return Curve(label=label, x=plot.x, runs=[list(row) for row in zip(*columns, strict=True)], geometric=plot.log_y)


def _settings(design: Design) -> dict[str, Any]:
    """Return the settings with one value in all candidates that have them, and the remaining settings by arm."""
    flat = {
        (arm.group, arm.name, label): _flat(settings)
        for arm in design.arms
        for label, settings in arm.candidates.items()
    }
    values: dict[str, list[Any]] = {}
    for settings in flat.values():
        for name, value in settings.items():
            values.setdefault(name, []).append(value)
    shared = {name: each[0] for name, each in values.items() if all(value == each[0] for value in each)}
    made: dict[str, Any] = {name.replace("_", " "): value for name, value in shared.items()}
    for (group, arm, label), settings in flat.items():
        own = {name: value for name, value in settings.items() if name not in shared}
        if own:
            made[" ".join(filter(None, (group, arm, label)))] = own
    return made


def _flat(settings: Any) -> dict[str, Any]:
    content = asdict(settings) if is_dataclass(settings) and not isinstance(settings, type) else dict(settings)
    made: dict[str, Any] = {}
    for name, value in content.items():
        made.update(value if isinstance(value, Mapping) else {name: value})
    return made
