"""Training runs read from their folders: settings, progress, accuracy."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backpass.errors import BackpassError, UnknownNameError
from backpass.lab.training.recipe import read_recipe

__all__ = ["SORTED_BY", "Run", "find_runs", "sort_runs"]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run.

    Attributes:
        folder: folder of the run.
        status: ``running``, ``finished``, ``stopped``, ``diverged`` or ``interrupted``; of a killed run ``running``.
        data: data set; empty if the folder has no recipe.
        model: network.
        rule: backward rules for the gradients of the weights.
        adversary: attack of adversarial training, with its rule; empty for none.
        epoch: finished epochs.
        epochs: epochs of the whole run.
        loss: mean loss of the last epoch on the training images.
        accuracy: accuracy on the test images, in [0, 1]; of the averaged weights if there are any.
        robust_accuracy: accuracy under the attack of the recipe's ``robust``.
        seconds: seconds of training, without pauses.
    """

    folder: str
    status: str
    data: str
    model: str
    rule: str
    adversary: str
    epoch: int
    epochs: int
    loss: float | None
    accuracy: float | None
    robust_accuracy: float | None
    seconds: float


SORTED_BY: dict[str, Callable[[Run], Any]] = {
    "folder": lambda run: run.folder,
    "accuracy": lambda run: -(-1.0 if run.accuracy is None else run.accuracy),
    "robust": lambda run: -(-1.0 if run.robust_accuracy is None else run.robust_accuracy),
    "loss": lambda run: (run.loss is None, run.loss),
    "seconds": lambda run: run.seconds,
}
"""Sort keys; the best or fastest run comes first."""


def find_runs(places: Iterable[Path]) -> list[Run]:
    """Return the runs in folders and below them, each once.

    Raises:
        BackpassError: there is no such folder, or no run in it.
    """
    found: dict[Path, Run] = {}
    for place in places:
        if not place.is_dir():
            raise BackpassError(f"there is no folder {place}.")
        here = sorted(place.rglob("run.json"))
        if not here:
            raise BackpassError(f"there is no training run in {place}: a run has a file run.json.")
        for file in here:
            try:
                found[file.resolve()] = _read(file.parent)
            except BackpassError as error:
                if len(here) == 1:
                    raise
                _LOG.warning("%s", error)  # the others can be listed all the same
    return list(found.values())


def sort_runs(runs: Sequence[Run], by: str) -> list[Run]:
    """Sort the runs by one of `SORTED_BY`.

    Raises:
        UnknownNameError: there is no such order.
    """
    if by not in SORTED_BY:
        raise UnknownNameError("order of runs", by, SORTED_BY)
    return sorted(runs, key=SORTED_BY[by])


def _read(folder: Path) -> Run:
    try:
        state = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        last = state.get("last") or {}
        settings = state["settings"]
        recipe = read_recipe(folder / "recipe.toml") if (folder / "recipe.toml").is_file() else {}
        rules = recipe.get("rule") or settings.get("rules") or ["bp"]
        adversary = [recipe.get("adversary", ""), *([recipe["adversary_rule"]] if "adversary_rule" in recipe else [])]
        return Run(
            folder=str(folder),
            status=str(state["status"]),
            data=str(recipe.get("data", "")),
            model=str(recipe.get("model", settings.get("model", {}).get("type", ""))),
            rule=" ".join(rules),
            adversary=" by ".join(adversary) + (f" (TRADES {recipe['trades']:g})" if "trades" in recipe else ""),
            epoch=int(state["epoch"]),
            epochs=int(settings["epochs"]),
            loss=_number(last.get("loss")),
            accuracy=_number(last.get("averaged", last.get("evaluation", {})).get("accuracy")),
            robust_accuracy=_number(last.get("robust", {}).get("robust_accuracy")),
            seconds=_seconds(folder / "timing.jsonl"),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BackpassError(
            f"{folder / 'run.json'} is not that of a training run ({type(error).__name__}: {error}): it may be "
            "damaged, or of another program."
        ) from error


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _seconds(file: Path) -> float:
    """Sum the seconds over the starts of the run; the clock begins at 0 at each start."""
    total = last = 0.0
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            now = float(json.loads(line)["seconds"])
        except json.JSONDecodeError:
            continue  # cut off where the run was killed
        total += last if now < last else 0.0
        last = now
    return total + last
