"""AutoAttack: four attacks that need no tuning, one after the other on what still stands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from backpass.attacks.apgd import APGD
from backpass.attacks.attack import Attack
from backpass.attacks.fab import FAB
from backpass.attacks.jobs import Jobs, batch_sizes, pad
from backpass.attacks.losses import make_objective
from backpass.attacks.oracle import Oracle
from backpass.attacks.restarts import Best
from backpass.attacks.square import Square
from backpass.errors import BackpassError

__all__ = ["AutoAttack"]


@dataclass(frozen=True, kw_only=True)
class AutoAttack(Attack):
    """APGD on cross-entropy, targeted APGD on DLR, targeted FAB and Square, each on what the others left standing.

    With fewer than four classes, where targeted DLR is not defined, the margin takes its place. Setting
    ``early_stop=False`` keeps fooled samples in the batch of each attack, but never carries them on to the next.
    Source: Croce and Hein (2020), section 6: the version "standard".

    Args:
        steps: gradient steps of APGD and FAB.
        queries: of Square.
        targets: the most likely wrong classes for the targeted attacks.
    """

    steps: int = 100
    queries: int = 5000
    targets: int = 9

    def __post_init__(self) -> None:
        """Refuses settings that cannot be meant."""
        super().__post_init__()
        if self.targeted:
            raise BackpassError("AutoAttack leads away from y: leave targeted=False, or use APGD(targeted=True).")
        if self.loss != "ce":
            raise BackpassError(f"AutoAttack chooses its losses itself; got loss={self.loss!r}. Use APGD(loss=...).")
        if min(self.steps, self.queries, self.targets) < 1:
            raise BackpassError(
                "steps, queries and targets must be at least 1; "
                f"got steps={self.steps}, queries={self.queries}, targets={self.targets}."
            )

    def parts(self, classes: int) -> tuple[Attack, ...]:
        """The four attacks for a model of so many classes."""
        targeted = "dlr-targeted" if classes > 3 else "margin"
        targets = min(self.targets, classes - 1)
        shared: dict[str, Any] = {
            "eps": self.eps,
            "norm": self.norm,
            "bounds": self.bounds,
            "seed": self.seed,
            "early_stop": self.early_stop,
            "dtype": self.dtype,
            "eot": self.eot,
            "logits": self.logits,
        }
        return (
            APGD(**shared, steps=self.steps),
            APGD(**shared, steps=self.steps, loss=targeted, targets=targets),
            FAB(**shared, steps=self.steps, targets=targets),
            Square(**shared, queries=self.queries),
        )

    def _attack(self, oracle: Oracle, x: Tensor, y: Tensor, index: Tensor, capacity: int) -> Best:
        rows = torch.arange(len(x), device=x.device)
        jobs = Jobs(x, y, index, rows, torch.zeros_like(rows))[
            pad(rows, batch_sizes(capacity, compiled=oracle.compiled))
        ]
        classes = oracle.forward(jobs.x, jobs).shape[1]
        best: Best | None = None
        for part in self.parts(classes):
            standing = rows if best is None else (~best.verdict.success).nonzero().squeeze(1)
            if len(standing) == 0:
                break
            oracle.objective = make_objective(part.loss, targeted=False)
            found = part._attack(oracle, x[standing], y[standing], index[standing], capacity)
            if best is None:
                best = found
            else:
                at = found.verdict.success
                best.improve(standing[at], found[at], keep_first=True)
        assert best is not None  # noqa: S101 -- there is a first part
        # One loss for all images, whichever attack has found them.
        oracle.objective = make_objective(self.loss, targeted=False)
        z = best.z[jobs.row]
        return Best(z, oracle.judge(z, jobs))[: len(rows)]
