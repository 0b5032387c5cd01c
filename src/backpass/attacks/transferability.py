"""Black-box success: images made against one model, shown to others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from backpass.attacks.attack import Attack
from backpass.attacks.checks import check_model
from backpass.attacks.data import Data, Source
from backpass.attacks.report import Rate
from backpass.attacks.shards import describe
from backpass.errors import BackpassError
from backpass.preserved import preserved
from backpass.version import __version__

__all__ = ["TransferReport", "transfer"]


@dataclass(frozen=True, eq=False)
class TransferReport:
    """How often images made against a source fool a target.

    Attributes:
        correct: by target, (N,) bool: the samples that it has right when they are clean.
        fooled: ``fooled[source][target]``, (N,) bool: of those, the ones that the source's image fools.
        settings: the attack's name and settings.
        versions: of torch and backpass.
    """

    correct: dict[str, Tensor]
    fooled: dict[str, dict[str, Tensor]]
    settings: dict[str, Any]
    versions: dict[str, str]

    def __repr__(self) -> str:
        lines = ["TransferReport; success on samples that the target has right, 95 % intervals"]
        lines += [f"  {s} to {t}: {rate}" for s, row in self.rates.items() for t, rate in row.items()]
        return "\n".join(lines)

    @property
    def rates(self) -> dict[str, dict[str, Rate]]:
        """``rates[source][target]``: fooled, of the samples that the target has right when they are clean."""
        trials = {target: int(right.sum()) for target, right in self.correct.items()}
        return {s: {t: Rate(int(some.sum()), trials[t]) for t, some in row.items()} for s, row in self.fooled.items()}

    @property
    def matrix(self) -> Tensor:
        """(S, T) float64 success rates, sources in rows."""
        return torch.tensor([[rate.value for rate in row.values()] for row in self.rates.values()], dtype=torch.float64)

    def to_dict(self) -> dict[str, Any]:
        """Every number with its interval and settings, in JSON's types."""
        rates = {s: {t: rate.to_dict() for t, rate in row.items()} for s, row in self.rates.items()}
        return {"success_rate": rates, "settings": self.settings, "versions": self.versions}


def transfer(
    sources: Mapping[str, nn.Module],
    targets: Mapping[str, nn.Module],
    data: Data,
    attack: Attack,
    *,
    batch_size: int = 256,
    classes: Callable[[Tensor], Tensor] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TransferReport:
    """Attacks every source and judges every target on the images: the matrix of black-box success.

    Every sample is attacked; with `early_stop` it keeps the first image that fools the source, which transfers worse
    than the last one, so transfer is usually measured with ``early_stop=False``.

    Args:
        sources: models to attack, by name; a rule attached to one acts on its gradients.
        targets: models to judge, by name; may be the same objects.
        data: (x, y) tensors, a map-style data set of pairs, or a DataLoader that does not shuffle.
        attack: the attack.
        batch_size: samples searched at a time.
        classes: y (N,) -> the classes to lead to, for a targeted attack.
        progress: called with (samples done, samples), a sample once per source.

    Returns:
        Every sample's outcome, and the matrix with Wilson intervals.

    Raises:
        BackpassError: there is no source or no target, or a targeted attack has no classes.
    """
    if not sources or not targets:
        raise BackpassError("transfer needs at least one source and one target, by name.")
    if attack.targeted and classes is None:
        raise BackpassError("a targeted attack needs classes=, for instance classes=lambda y: (y + 1) % 10.")
    source_data = Source(data, batch_size)
    correct: dict[str, list[Tensor]] = {t: [] for t in targets}
    fooled: dict[str, dict[str, list[Tensor]]] = {s: {t: [] for t in targets} for s in sources}
    done = 0
    for x, y, index in source_data.batches(range(len(source_data))):
        aim = classes(y) if classes is not None and attack.targeted else y
        for name, model in targets.items():
            correct[name].append((_predict(model, attack, x, y) == y).cpu())
        for source, model in sources.items():
            device = _device(model)
            x_adv = attack(
                model, x.to(device), aim.to(device), indices=index.to(device), batch_size=batch_size
            ).x_adv.to(x.device)
            for name, target in targets.items():
                seen = _predict(target, attack, x_adv, y)
                hit = seen == aim if attack.targeted else seen != y
                fooled[source][name].append(hit.cpu() & correct[name][-1])
            done += len(x)
            if progress is not None:
                progress(done, source_data.count * len(sources))
    return TransferReport(
        correct={t: torch.cat(parts) for t, parts in correct.items()},
        fooled={s: {t: torch.cat(parts) for t, parts in row.items()} for s, row in fooled.items()},
        settings=describe(attack, strict=False),
        versions={"backpass": __version__, "torch": torch.__version__},
    )


def _device(model: nn.Module) -> torch.device:
    return next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def _predict(model: nn.Module, attack: Attack, x: Tensor, y: Tensor) -> Tensor:
    """(B,) the plain model's classes, where x is."""
    device = _device(model)
    there = x.to(device)
    check_model(model, there)
    with preserved(model):
        return attack.ask(model).plain(there, y.to(device)).argmax(1).to(x.device)
