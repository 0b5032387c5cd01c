"""Verification of a stored result: verdicts are recomputed, hashes are compared."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backpass.errors import BackpassError
from backpass.experiments.experiment import Experiment
from backpass.experiments.judging import collect, judge_all, pairs_of, verdict_of
from backpass.experiments.outcomes import Store
from backpass.experiments.running import OUTCOMES
from backpass.report.claims import Claim, corrected
from backpass.report.proportions import judge_images
from backpass.report.reading import read_result
from backpass.report.result import Result, checksum, plain

__all__ = ["Verification", "verify"]

_RELATIVE = 1e-9


@dataclass(frozen=True, kw_only=True)
class Verification:
    """Outcome of `verify`.

    Attributes:
        claims: number of verdicts recomputed.
        outcomes: number of outcome files whose hashes were compared.
        from_outcomes: True if the verdicts were recomputed from these files; False if the files are missing and the
            pairs of values in the result were used.
        problems: description of every difference; empty if there is none.
    """

    claims: int
    outcomes: int
    from_outcomes: bool
    problems: tuple[str, ...]


def verify(path: Path, experiments: Sequence[Experiment]) -> Verification:
    """Recompute every verdict of a result from its stored outcomes, and compare every hash.

    Args:
        path: a ``result.json``, or the folder that holds it.
        experiments: known experiments; that of the result is looked up by name. Of an experiment that was built on
            the spot, as by ``backpass attack``, the verdicts are recomputed from the images' marks in the result.

    Raises:
        BackpassError: the result is missing or damaged, or no outcomes of it are stored.
    """
    path = path / "result.json" if path.is_dir() else path
    result = read_result(path)
    known = {experiment.name: experiment for experiment in experiments}
    of_images = all(isinstance(pair.get("ours"), str) for pair in result.numbers.get("pairs", {}).values())
    if "pairs" not in result.numbers or not (result.experiment in known or of_images):
        raise BackpassError(
            f"{path} is of {result.experiment!r}, of which no outcomes are stored: it cannot be verified."
        )
    problems = []
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.pop("sha256", None) != checksum(content):
        problems.append(f"{path} was edited: its content does not have its SHA-256.")
    folder = next((p / OUTCOMES for p in path.parents[:2] if (p / OUTCOMES).is_dir()), path.parent / OUTCOMES)
    hashes = result.numbers["outcomes"]
    stored = folder.is_dir()
    problems += _other_files(folder, hashes) if stored else []
    pairs = result.numbers["pairs"]
    if result.experiment not in known:
        again = _from_marks(result, pairs)
    elif stored and not problems:
        experiment = known[result.experiment]
        device = "cuda" if result.environment["device"].startswith("cuda") else result.environment["device"]
        found, _ = collect(experiment.design(result.scale), Store(folder), device)
        again = judge_all(experiment, result.scale, found)
        expected = {one.id: plain(pairs_of(one, found)) for one in experiment.design(result.scale).comparisons}
        problems += [
            f"{name}: its numbers are not those of the outcomes."
            for name in expected
            if pairs.get(name) != expected[name]
        ]
    else:
        again = _from_pairs(known[result.experiment], result, pairs)
    problems += _differences(result.claims, again)
    return Verification(
        claims=len(again),
        outcomes=len(hashes) if stored else 0,
        from_outcomes=stored and result.experiment in known,
        problems=tuple(problems),
    )


def _other_files(folder: Path, hashes: Mapping[str, str]) -> Iterator[str]:
    for name, expected in hashes.items():
        if Path(name).name != name or not (folder / name).is_file():
            yield f"{name} is not in {folder}."
        elif hashlib.sha256((folder / name).read_bytes()).hexdigest() != expected:
            yield f"{folder / name} was edited: it does not have the SHA-256 that the result names."


def _from_marks(result: Result, pairs: Mapping[str, Any]) -> list[Claim]:
    """Recompute the claims of an experiment that was built on the spot, which all say that ours is higher."""
    claims = {claim.id: claim for claim in result.claims}
    again = []
    for name, of in pairs.items():
        one = claims.get(f"{result.experiment}.{name}")
        if one is not None:
            again.append(judge_images(one.id, one.statement, **of, quantity=one.quantity, setting=one.setting))
    return corrected(again)


def _from_pairs(experiment: Experiment, result: Result, pairs: Mapping[str, Any]) -> list[Claim]:
    design = experiment.design(result.scale)
    known = {one.id: one for one in design.comparisons}
    if set(pairs) != set(known):
        raise BackpassError(f"{experiment.name} has other claims in this version: run it again.")
    numbers = {
        name: {side: values if isinstance(values, str) else _floats(values) for side, values in of.items()}
        for name, of in pairs.items()
    }
    return corrected(
        [verdict_of(one, numbers[name], design.seeds, f"{experiment.name}.") for name, one in known.items()]
    )


def _floats(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else float(value) for value in values]


def _differences(stored: Sequence[Claim], again: Sequence[Claim]) -> Iterator[str]:
    by_id = {claim.id: claim for claim in stored}
    for claim in again:
        one = by_id.pop(claim.id, None)
        if one is None:
            yield f"{claim.id} is missing in the result."
            continue
        if one.verdict != claim.verdict:
            yield f"{claim.id}: the result says {one.verdict!r}, the outcomes {claim.verdict!r}."
        names = ("estimate", "low", "high", "p", "p_corrected")
        for name, a, b in zip(names, _numbers(one), _numbers(claim), strict=True):
            if not (math.isclose(a, b, rel_tol=_RELATIVE, abs_tol=1e-12) or (math.isnan(a) and math.isnan(b))):
                yield f"{claim.id}: the result's {name} is {a:g}, that of the outcomes {b:g}."
        if (one.n, one.setting, one.statement) != (claim.n, claim.setting, claim.statement):
            yield f"{claim.id}: n, setting or statement differ."
    yield from (f"{name} is no claim of the experiment." for name in by_id)


def _numbers(claim: Claim) -> tuple[float, ...]:
    values = (claim.estimate, *claim.interval, claim.p, claim.p_corrected)
    return tuple(math.nan if value is None else value for value in values)
