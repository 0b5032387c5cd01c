"""Base class of iterative attacks: batched restarts, removal of finished rows, and the final verdict."""

from __future__ import annotations

import logging
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from backpass.attacks.active_set import ActiveSet
from backpass.attacks.attack import Attack
from backpass.attacks.checks import check_images, check_labels, check_model
from backpass.attacks.jobs import Jobs, batch_sizes, pad
from backpass.attacks.losses import Loss
from backpass.attacks.oracle import Oracle, Verdict
from backpass.attacks.restarts import Best, further_restarts
from backpass.attacks.state import State, choose
from backpass.preserved import preserved

__all__ = ["SearchAttack", "keep_finite"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SearchAttack(Attack):
    """Base class of attacks by an iterative search, repeated per restart on the samples that are not fooled yet.

    A subclass defines `begin` and `advance`. Rows of the batch are independent. `advance` is called `iterations` times;
    finished rows are removed from the active set, and the images are classified at the end.
    """

    @property
    def iterations(self) -> int:
        """Number of steps of a search: the setting `steps`, else 1."""
        return int(getattr(self, "steps", 1))

    @property
    def searches(self) -> int:
        """Number of searches per sample, including the first: the setting `restarts`, else 1."""
        return int(getattr(self, "restarts", 1))

    @property
    def stops_early(self) -> bool:
        """True if a success ends the search of its sample."""
        return self.early_stop

    def score(self, oracle: Oracle, z: Tensor, jobs: Jobs, verdict: Verdict, found: dict[str, Tensor]) -> Tensor:
        """Return the score (B,) that ranks restarts among successes and among failures: the objective."""
        return verdict.value

    @abstractmethod
    def begin(self, oracle: Oracle, jobs: Jobs) -> State:
        """Return the state before the first step."""

    @abstractmethod
    def advance(self, oracle: Oracle, state: State, iteration: int) -> State:
        """Return the state after one more step; `state` is not modified."""

    def end(self, oracle: Oracle, state: State) -> State:
        """Return the final state of the rows that are not finished."""
        return state

    def first_images(self, jobs: Jobs, drawn: Tensor) -> Tensor:
        """Return the start of a search: the given start, else the drawn images (B, ...)."""
        if jobs.start is None:
            return drawn
        return choose(jobs.restart == 0, jobs.threat.project(jobs.x, jobs.start.clone()), drawn)

    def search(self, model: nn.Module, x: Tensor, y: Tensor, *, indices: Tensor, value: Loss | None = None) -> Tensor:
        """Return the end point of one search of every sample, (N, ...): the inner maximum of adversarial training.

        It has no verdict, no restarts and no early removal of samples, so that it costs only the gradients of the
        search.

        Args:
            model: as for a call of the attack, as are `x`, `y` and `indices`.
            x: (N, ...).
            y: (N,).
            indices: (N,).
            value: objective to maximise instead of the attack's loss, (logits (B, C), row (B,)) -> (B,); row: indices
                into x.

        Raises:
            BackpassError: as in a call of the attack.
        """
        check_images(x, self.bounds)
        check_labels(x, y)
        check_model(model, x)
        check_labels(x, indices, "indices")
        with preserved(model):
            oracle = self.make_oracle(model)
            oracle.looks_at_batches = False
            row = torch.arange(len(x), device=x.device)
            if value is not None:
                raised = value
                # Look the target up by job, because the search may reorder jobs.
                oracle.objective = lambda logits, _, target: raised(logits, row if target is None else target)
            threat = self.threat(indices)
            jobs = Jobs(x.detach(), y.long(), indices.long(), row, torch.zeros_like(row), threat, row)
            z = self._drive(oracle, jobs, ActiveSet(jobs, len(x), [len(x)], fixed=False, early_stop=False))["z"]
            return keep_finite(z.detach(), jobs)

    def _attack(self, oracle: Oracle, jobs: Jobs, capacity: int) -> Best:
        sizes = batch_sizes(capacity, compiled=oracle.fixed_sizes)
        best = self._first(oracle, jobs, sizes)
        for row, restart in further_restarts(best, self.searches, capacity, self.stops_early):
            found = self._run(oracle, jobs.at(row, restart), sizes)
            for r in torch.unique(restart):
                same = restart == r
                best.improve(row[same], found[same], keep_first=self.stops_early)
        return best

    def _first(self, oracle: Oracle, jobs: Jobs, sizes: list[int]) -> Best:
        """Run the first restart. A given start that is a success already needs no gradient."""
        if jobs.start is None or not self.stops_early or self.loss == "dlr-targeted":
            return self._run(oracle, jobs, sizes)
        rows = torch.arange(len(jobs), device=jobs.y.device)
        padded = jobs[pad(rows, sizes if oracle.fixed_sizes else None)]
        z = self.first_images(padded, padded.x)
        verdict = oracle.judge(z, padded)
        best = Best(z, z, verdict, self.score(oracle, z, padded, verdict, {}))[: len(jobs)]
        standing = rows[~best.verdict.success]
        if len(standing):
            best.improve(standing, self._run(oracle, jobs[standing], sizes), keep_first=True)
        return best

    def _run(self, oracle: Oracle, jobs: Jobs, sizes: list[int]) -> Best:
        """Run one batched search and classify the images that it found."""
        real, fixed = len(jobs), oracle.fixed_sizes
        if fixed:
            jobs = jobs[pad(torch.arange(real, device=jobs.y.device), sizes)]
        found = self._drive(oracle, jobs, ActiveSet(jobs, real, sizes, fixed=fixed, early_stop=self.stops_early))
        z = keep_finite(found["z"].detach(), jobs)
        verdict = oracle.judge(z, jobs.with_targets(found.get("target")))
        return Best(z, found["ahead"], verdict, self.score(oracle, z, jobs, verdict, found), found.get("record"))[:real]

    def _drive(self, oracle: Oracle, jobs: Jobs, active: ActiveSet) -> dict[str, Tensor]:
        state = self.begin(oracle, jobs)
        for iteration in range(self.iterations):
            state = self.advance(oracle, state, iteration)
            keep = active.retire(oracle, state)
            if active.done:
                break
            if keep is not None:
                state = state[keep]
        return active.finish(state if active.done else self.end(oracle, state))


def keep_finite(z: Tensor, jobs: Jobs) -> Tensor:
    """Replace images (B, ...) that are not finite by the originals."""
    finite = z.flatten(1).isfinite().all(1)
    if bool(finite.all()):
        return z
    logger.warning("%d of %d searches met a gradient that is not finite", int((~finite).sum()), len(jobs))
    return choose(finite, z, jobs.x)
