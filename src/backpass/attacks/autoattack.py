"""AutoAttack: an ensemble of attacks that need no tuning, each on what the others left standing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from backpass.attacks.apgd import APGD
from backpass.attacks.attack import Attack
from backpass.attacks.fab import FAB
from backpass.attacks.jobs import Jobs, batch_sizes, pad
from backpass.attacks.losses import make_objective
from backpass.attacks.oracle import Oracle
from backpass.attacks.restarts import Best
from backpass.attacks.settings import count
from backpass.attacks.square import Square
from backpass.errors import BackpassError, UnknownNameError

__all__ = ["AutoAttack"]

_VERSIONS = ("standard", "plus", "rand", "paper")


@dataclass(frozen=True, kw_only=True)
class AutoAttack(Attack):
    """The published evaluation by APGD, FAB and Square, each on what the others left standing.

    With fewer than four classes, where targeted DLR is not defined, the margin takes its place, and with two, where DLR
    is not, too. In every version a sample is removed as soon as it is fooled, which changes no outcome and saves
    gradients. Setting ``early_stop=False`` keeps fooled samples in the batch of each attack, but never carries them on
    to the next. For l_1, APGD and FAB are run, without Square.
    Source: Croce and Hein (2020), section 6.

    Args:
        version: ``"standard"``: APGD-CE, APGD-T, FAB-T and Square as the authors' code runs them; ``"plus"``: APGD-CE
            and APGD-DLR with 5 restarts each, FAB with 5, Square, APGD-T and FAB-T; ``"rand"``: APGD-CE and APGD-DLR
            over 20 draws, for randomised models; ``"paper"``: the parts of "standard" by the algorithms as the papers
            state them, Square's schedule rescaled to its number of queries.
        steps: gradient steps of APGD and FAB.
        queries: forward passes of Square.
        targets: number of the most likely wrong classes for the targeted attacks.
    """

    version: str = "standard"
    steps: int = count(100)
    queries: int = count(5000)
    targets: int = count(9)

    def __post_init__(self) -> None:
        """Validate the settings."""
        if self.version == "rand" and self.eot == 1:
            object.__setattr__(self, "eot", 20)
        super().__post_init__()
        if self.version not in _VERSIONS:
            raise UnknownNameError("version", str(self.version), _VERSIONS)
        if self.targeted:
            raise BackpassError("AutoAttack leads away from y: leave targeted=False, or use APGD(targeted=True).")
        if self.loss != "ce":
            raise BackpassError(f"AutoAttack chooses its losses itself; got loss={self.loss!r}. Use APGD(loss=...).")

    def parts(self, classes: int) -> tuple[Attack, ...]:
        """Return the attacks for a model of so many classes, in their order."""
        plain, targeted = "dlr" if classes > 2 else "margin", "dlr-targeted" if classes > 3 else "margin"
        targets = min(self.targets, classes - 1)
        shared: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("eps", "norm", "bounds", "seed", "early_stop", "dtype", "eot", "logits")
        }
        shared["published"] = self.version != "paper"
        gradient: dict[str, Any] = {**shared, "steps": self.steps}
        square = () if self.norm == "l1" else (Square(**shared, queries=self.queries),)
        if self.version == "rand":
            return APGD(**gradient), APGD(**gradient, loss=plain)
        restarts = 5 if self.norm == "l1" or self.version == "plus" else 1
        first = APGD(**gradient, restarts=restarts)
        aimed = min(targets, 5) if self.norm == "l1" else targets
        towards = APGD(**gradient, loss=targeted, targets=aimed)
        fab = FAB(**gradient, targets=targets)
        if self.version != "plus":
            return first, towards, fab, *square
        dlr, untargeted = APGD(**gradient, loss=plain, restarts=5), FAB(**gradient, targets=None, restarts=5)
        return first, dlr, untargeted, *square, towards, fab

    def _attack(self, oracle: Oracle, jobs: Jobs, capacity: int) -> Best:
        sizes = batch_sizes(capacity, compiled=True) if oracle.fixed_sizes else None
        padded = jobs[pad(jobs.row, sizes)]
        best: Best | None = None
        for part in self.parts(oracle.forward(padded.x, padded).shape[1]):
            standing = jobs.row if best is None else (~best.verdict.success).nonzero().squeeze(1)
            if len(standing) == 0:
                break
            oracle.objective = make_objective(part.loss, targeted=False)
            found = part._attack(oracle, jobs.at(standing), capacity)
            found.record = None  # of one part only
            if best is None:
                best = found
            else:
                at = found.verdict.success
                best.improve(standing[at], found[at], keep_first=True)
        assert best is not None  # noqa: S101 -- there is a first part
        # One loss for all images, whichever attack has found them.
        oracle.objective = make_objective(self.loss, targeted=False)
        z = best.z[padded.row]
        verdict = oracle.judge(z, padded)
        return Best(z, z, verdict, verdict.value)[: len(jobs)]
