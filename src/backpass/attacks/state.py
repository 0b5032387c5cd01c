"""The state of a search, between one step and the next."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from backpass.attacks.jobs import Jobs
from backpass.attacks.threat import per_sample

__all__ = ["State", "choose"]


@dataclass(frozen=True, eq=False, kw_only=True)
class State:
    """Images and everything else that a search keeps for each row of the batch.

    A search adds its own tensors, each with the batch first, in a subclass. Rows that are done are removed from all
    of them.

    Attributes:
        jobs: the samples of the rows.
        z: (B, ...) the images to return if the search ended now.
        seen: (B, ...) the images to return for rows that are done: those that the model was last shown.
        logits: (B, C) the model's answer to `seen`, by which a row is done once it is fooled.
        exact: whether `seen` itself went through the model, and not a view of it.
        done: (B,) bool; instead of `logits`, a search's own criterion.
        record: (B, K) int64 numbers about the search for `Result`.
    """

    jobs: Jobs
    z: Tensor
    seen: Tensor
    logits: Tensor | None = None
    exact: bool = True
    done: Tensor | None = None
    record: Tensor | None = field(default=None)

    def __getitem__(self, keep: Tensor) -> Self:
        parts: dict[str, Any] = {one.name: getattr(self, one.name) for one in fields(self)}
        chosen: dict[str, Any] = {n: part[keep] for n, part in parts.items() if isinstance(part, Tensor | Jobs)}
        return replace(self, **chosen)

    def results(self, images: Tensor) -> dict[str, Tensor]:
        """Return the tensors (B, ...) that outlive the search."""
        parts = {"z": images, "ahead": self.z, "target": self.jobs.target, "record": self.record}
        return {name: part for name, part in parts.items() if part is not None}


def choose(where: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Take rows (B, ...) of `one` where (B,) is true, of `other` elsewhere."""
    return torch.where(per_sample(where, one) if one.dim() > 1 else where, one, other)
