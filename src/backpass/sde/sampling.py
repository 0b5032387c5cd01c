"""Batches drawn with and without replacement."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from backpass.errors import BackpassError, UnknownNameError

__all__ = ["Sampling", "draw_batches"]

Sampling = Literal["iid", "permuted"]
"""``"iid"``: with replacement, as the SDE assumes; ``"permuted"``: epochs without replacement, as trainers sample."""


def draw_batches(
    sampling: Sampling,
    samples: int,
    batch_size: int,
    paths: tuple[int, ...],
    generator: torch.Generator | None,
    device: torch.device,
) -> Iterator[Tensor]:
    """Yield the indices of one batch per path after another, (*paths, B), without end.

    Args:
        sampling: ``"iid"`` or ``"permuted"``. A permutation that B does not divide leaves its last samples out.
        samples: N.
        batch_size: B.
        paths: leading shape; every path has its own batches.
        generator: of the draws.
        device: of the indices.

    Raises:
        BackpassError: an unknown sampling, or a batch larger than the data without replacement.
    """
    if sampling not in ("iid", "permuted"):
        raise UnknownNameError("sampling", str(sampling), ("iid", "permuted"))
    if sampling == "permuted" and batch_size > samples:
        raise BackpassError(
            f"without replacement a batch has at most the {samples} samples of the data, got batch_size={batch_size}."
        )
    return _draw(sampling, samples, batch_size, paths, generator, device)


def _draw(
    sampling: Sampling,
    samples: int,
    size: int,
    paths: tuple[int, ...],
    generator: torch.Generator | None,
    device: torch.device,
) -> Iterator[Tensor]:
    while sampling == "iid":
        yield torch.randint(samples, (*paths, size), generator=generator, device=device)
    while True:
        order = torch.rand(*paths, samples, generator=generator, device=device, dtype=torch.float64).argsort(-1)
        yield from torch.split(order[..., : samples // size * size], size, -1)
