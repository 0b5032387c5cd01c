"""Transferability: success rates of adversarial images of source models on target models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from backpass.attacks.attack import Attack
from backpass.attacks.checks import check_model
from backpass.attacks.columns import Columns, device_of, processes
from backpass.attacks.data import Data, Source
from backpass.attacks.ensemble import Ensemble
from backpass.attacks.evaluation import Mask, mask_of
from backpass.attacks.iterative import Iterative
from backpass.attacks.paired import Paired, paired
from backpass.attacks.report import Rate
from backpass.attacks.shards import Shards, describe, fingerprint
from backpass.attacks.targets import Targets, choose_targets
from backpass.errors import BackpassError
from backpass.preserved import preserved
from backpass.version import __version__

__all__ = ["Attachable", "TransferReport", "transfer"]


class Attachable(Protocol):
    """Object such as a backward rule that can be attached to a model in a context."""

    def attach(self, model: nn.Module) -> AbstractContextManager[object]:
        """Return a context in which the object acts on the model."""


@dataclass(frozen=True, eq=False)
class TransferReport:
    """Outcomes of the adversarial images of each source on each target.

    With `rules`, a source's name is ``"source rule"``.

    Attributes:
        correct: by target, (N,) bool: the clean samples that it classifies correctly.
        attacked: by target, (N,) bool: of those, the samples whose target class differs from the label.
        fooled: ``fooled[source][target]``, (N,) bool: of those, the samples that the image of the source fools.
        after: ``after[gradients][source][target]``, (N,) bool: likewise for the image after that number of gradients;
            empty without a budget.
        settings: name and settings of the attack.
        versions: versions of torch and backpass.
    """

    correct: dict[str, Tensor]
    attacked: dict[str, Tensor]
    fooled: dict[str, dict[str, Tensor]]
    settings: dict[str, Any]
    versions: dict[str, str]
    after: dict[int, dict[str, dict[str, Tensor]]] = field(default_factory=dict)

    def __repr__(self) -> str:
        lines = ["TransferReport; success on samples that the target has right, 95 % intervals"]
        lines += [f"  {s} to {t}: {rate}" for s, row in self.rates.items() for t, rate in row.items()]
        return "\n".join(lines)

    @property
    def rates(self) -> dict[str, dict[str, Rate]]:
        """Success rates ``rates[source][target]`` over the attacked samples."""
        return self._rates(self.fooled)

    def _rates(self, fooled: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Rate]]:
        trials = {target: int(some.sum()) for target, some in self.attacked.items()}
        return {s: {t: Rate(int(some.sum()), trials[t]) for t, some in row.items()} for s, row in fooled.items()}

    @property
    def curves(self) -> dict[str, dict[str, dict[int, Rate]]]:
        """Success rates ``curves[source][target][gradients]`` over the attacked samples, by number of gradients."""
        rates = {gradients: self._rates(fooled) for gradients, fooled in self.after.items()}
        return {s: {t: {n: rates[n][s][t] for n in rates} for t in row} for s, row in self.fooled.items()}

    @property
    def matrix(self) -> Tensor:
        """(S, T) float64 success rates, sources in rows."""
        return torch.tensor([[rate.value for rate in row.values()] for row in self.rates.values()], dtype=torch.float64)

    def compare(self, first: str, second: str, target: str) -> Paired:
        """Compare the images of two sources on one target, sample by sample, with McNemar's exact test."""
        some = self.attacked[target]
        return paired(self.fooled[first][target][some], self.fooled[second][target][some])

    def to_dict(self) -> dict[str, Any]:
        """Return all rates with intervals, and the settings, in JSON types."""
        rates = {s: {t: rate.to_dict() for t, rate in row.items()} for s, row in self.rates.items()}
        found = {"success_rate": rates, "settings": self.settings, "versions": self.versions}
        if self.after:
            found["after_gradients"] = {
                s: {t: {str(n): rate.to_dict() for n, rate in curve.items()} for t, curve in row.items()}
                for s, row in self.curves.items()
            }
        return found


def transfer(
    sources: Mapping[str, nn.Module | Sequence[nn.Module]],
    targets: Mapping[str, nn.Module],
    data: Data,
    attack: Attack,
    *,
    rules: Mapping[str, Attachable | None] | None = None,
    batch_size: int = 256,
    classes: Targets | None = None,
    mask: Mask = None,
    resume: str | PathLike[str] | None = None,
    tag: str = "",
    gradients: Sequence[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TransferReport:
    """Attack every source and evaluate every target on the adversarial images.

    `early_stop` is ignored: the first image that fools the source transfers less often than the last one. Processes
    under torchrun share the work and return the same report.

    Args:
        sources: models to attack, by name; a rule attached to one acts on its gradients. Several models in a sequence,
            or an `Ensemble`, are attacked as one.
        targets: models to evaluate, by name; may be the same objects.
        data: (x, y) tensors, a data set, or an iterable of batches; see `Source`.
        attack: the attack.
        rules: backward rules by name, each attached to every source in turn; None is plain backpropagation.
        batch_size: samples searched at a time.
        classes: target classes of a targeted attack, as the targets of `evaluate`; a strategy by name uses the logits
            of the first source.
        mask: entries that may change, as in `evaluate`.
        resume: folder of finished parts, from which an interrupted run resumes.
        tag: further text in the key of the parts, for differences that models, data and settings do not show.
        gradients: increasing numbers of gradients per image at which the images are evaluated. The last one is the
            budget, which `Iterative.within` converts to steps; random restarts are off. A backward pass under any rule,
            or of an ensemble, counts as one gradient.
        progress: called with (finished, total) samples of this process, counted once per source and rule.

    Returns:
        The outcome of every sample, and success rates with Wilson intervals.

    Raises:
        BackpassError: there is no source or no target, a targeted attack has no classes, or a budget is too small for
            one step or used with an attack that is not `Iterative`.
    """
    for what, given in (("sources", sources), ("targets", targets), ("rules", {"": None} if rules is None else rules)):
        if not isinstance(given, Mapping) or not given:
            raise BackpassError(f"{what} must be a dict of at least one by name; got {given!r}.")
    if not isinstance(attack, Attack):
        raise BackpassError(f"attack must be an attack, for instance PGD(eps=8/255); got {type(attack).__name__}.")
    if attack.targeted and classes is None:
        raise BackpassError("a targeted attack needs classes=, for instance classes='next'.")
    for name, rule in (rules or {}).items():
        if rule is not None and not hasattr(rule, "attach"):
            raise BackpassError(
                f"rule {name!r} must be a rule, as backpass.parse_rule('linbp') makes it; got {rule!r}."
            )
    attack, steps = _budget(replace(attack, early_stop=False), gradients)
    marks = list(gradients or ())
    rows = [
        _Network(
            name if rules is None else f"{name} {rule}",
            model if isinstance(model, nn.Module) else Ensemble(model),
            attached,
        )
        for name, model in sources.items()
        for rule, attached in (rules or {"": None}).items()
    ]
    goals = [_Network(name, model) for name, model in targets.items()]
    rank, world = processes()
    source = Source(data, batch_size, several=world > 1 or resume is not None)
    columns, done = Columns(device_of(rows[0].model)), 0
    shards = _Predictions(resume, tag, attack, source)
    for x, y, index in source.batches(rank, world):
        y = y.long()
        aim = _aim(rows[0].model, attack, classes, x, y, index)
        own = mask_of(mask, x, index)
        correct = {}
        for goal in goals:
            seen = shards.get("correct", goal, None, (x, y, index), partial(_predict, goal.model, attack, x, y))
            correct[goal] = seen == y
            outcome = {"correct": correct[goal], "attacked": correct[goal] & ((aim != y) | (not attack.targeted))}
            columns.enter(f"target {goal.name}", index, outcome, outcome)
        for row in rows:
            images = cache(partial(row.images, attack, x, aim, steps, indices=index, batch_size=batch_size, mask=own))
            for goal in goals:
                compute = partial(_predict_all, goal.model, attack, images, y)
                seen = shards.get("row", goal, row, (x, torch.stack([y, aim]), index), compute, own, marks)
                hit = seen == aim[:, None] if attack.targeted else seen != y[:, None]
                columns.enter(f"row {row.name}/{goal.name}", index, {"hit": hit & correct[goal][:, None]}, ("hit",))
            done += len(x)
            if progress is not None:
                total = source.own(rank, world)
                progress(done, done if total is None else total * len(rows))
    table, _ = columns.collect(source.read)
    whole = {name: value.bool() for name, value in table.items()}
    attacked = {t: whole[f"target {t}/attacked"].squeeze(1) for t in targets}

    def fooled(column: int) -> dict[str, dict[str, Tensor]]:
        return {r.name: {t: whole[f"row {r.name}/{t}/hit"][:, column] & attacked[t] for t in targets} for r in rows}

    return TransferReport(
        correct={t: whole[f"target {t}/correct"].squeeze(1) for t in targets},
        attacked=attacked,
        fooled=fooled(-1),
        after={number: fooled(column) for column, number in enumerate(marks)},
        settings=describe(attack, strict=False),
        versions={"backpass": __version__, "torch": torch.__version__},
    )


@dataclass(frozen=True, eq=False)
class _Network:
    """Source with a rule, or target."""

    name: str
    model: nn.Module
    rule: Attachable | None = None

    @property
    def members(self) -> list[nn.Module]:
        """The members of an ensemble, or the model itself."""
        return list(self.model.members) if isinstance(self.model, Ensemble) else [self.model]

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Attach the rule to every member."""
        with ExitStack() as stack:
            if self.rule is not None:
                for member in self.members:
                    stack.enter_context(self.rule.attach(member))
            yield

    def images(
        self,
        attack: Attack,
        x: Tensor,
        aim: Tensor,
        steps: list[int],
        *,
        indices: Tensor,
        batch_size: int,
        mask: Tensor | None,
    ) -> list[Tensor]:
        """Return adversarial images (B, ...) after each number of steps, or the final ones, on the device of x."""
        x_there, aim, indices = (one.to(device_of(self.model)) for one in (x, aim, indices))
        mask = None if mask is None else mask.to(x_there.device)
        given = {"indices": indices, "batch_size": batch_size, "mask": mask}
        with self.attached():
            if isinstance(attack, Iterative) and steps:
                found = attack.path(self.model, x_there, aim, steps=steps, **given)  # type: ignore[arg-type]
            else:
                found = [attack(self.model, x_there, aim, **given).x_adv]  # type: ignore[arg-type]
        return [one.to(x.device) for one in found]


class _Predictions:
    """Cache of predictions on disk, keyed by source, rule, target, data and settings."""

    def __init__(self, folder: str | PathLike[str] | None, tag: str, attack: Attack, source: Source) -> None:
        self._shards = Shards(None if folder is None else Path(folder), {"tag": tag})
        self._attack, self._source, self._known = attack, source, dict[_Network, str]()
        self._settings = {} if folder is None else describe(attack, strict=True)

    def get(
        self,
        kind: str,
        goal: _Network,
        row: _Network | None,
        data: tuple[Tensor, Tensor, Tensor],
        compute: Callable[[], Tensor],
        mask: Tensor | None = None,
        gradients: Sequence[int] = (),
    ) -> Tensor:
        """Return the finished predictions (B, ...), or compute and store them."""
        if self._shards.folder is None:
            return compute()
        own: dict[str, Any] = {"kind": kind, "name": goal.name, "target": self._print(goal)}
        if row is not None:
            own |= {"source": [row.name, self._print(row)], "settings": self._settings, "gradients": list(gradients)}
        key = self._shards.key(*data, own, mask)
        found = self._shards.get(key)
        if found is None:
            found = {"prediction": compute()}
            self._shards.put(key, found)
        return found["prediction"]

    def _print(self, network: _Network) -> str:
        if network not in self._known:
            x, y = (one.to(device_of(network.model)) for one in self._source.head)
            with network.attached():
                prints = [fingerprint(one, self._attack.make_oracle(one), x, y) for one in network.members]
            mean = network.model.mean if isinstance(network.model, Ensemble) else ""
            self._known[network] = " ".join([mean, *prints])
        return self._known[network]


def _budget(attack: Attack, gradients: Sequence[int] | None) -> tuple[Attack, list[int]]:
    """Return the attack with the steps that fit its budget, and the numbers of steps to evaluate at."""
    if gradients is None:
        return attack, []
    if not isinstance(attack, Iterative):
        raise BackpassError(
            f"a budget in gradients needs an attack that takes steps, as ifgsm, mifgsm or pgd; got "
            f"{type(attack).__name__}."
        )
    if not isinstance(gradients, Sequence) or not gradients or sorted(set(gradients)) != list(gradients):
        raise BackpassError(f"gradients must be increasing numbers, the last being the budget; got {gradients!r}.")
    steps = [attack.within(number).steps for number in gradients]
    return attack.within(gradients[-1]), steps


def _aim(model: nn.Module, attack: Attack, classes: Targets | None, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
    if classes is None or not attack.targeted:
        return y
    device = device_of(model)
    with preserved(model):
        logits = attack.make_oracle(model).plain(x.to(device), y.to(device)).to(x.device)
    aim = choose_targets(classes, y, logits, index, attack.seed)
    if bool((aim == y).all()):
        raise BackpassError("every target is the sample's own label, so there is nothing to lead to: give others.")
    return aim


def _predict(model: nn.Module, attack: Attack, x: Tensor, y: Tensor) -> Tensor:
    """Return the classes (B,) of the model without rules, on the device of x."""
    device = device_of(model)
    there = x.to(device)
    check_model(model)
    check_model(model, there)
    with preserved(model):
        return attack.make_oracle(model).plain(there, y.to(device)).argmax(1).to(x.device)


def _predict_all(model: nn.Module, attack: Attack, images: Callable[[], list[Tensor]], y: Tensor) -> Tensor:
    """Return the classes (B, M) of the M versions of each image."""
    return torch.stack([_predict(model, attack, one, y) for one in images()], 1)
