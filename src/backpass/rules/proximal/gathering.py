"""What several processes collected, brought together: every process then solves the same system."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch import distributed as dist

from backpass.errors import BackpassError
from backpass.rules.proximal.collected import Collected

__all__ = ["gather"]


def gather(names: Sequence[str], collected: dict[str, Collected]) -> None:
    """Join what all processes collected; each must call this with the same names in the same order.

    Gram matrices are summed. Where the rows of all processes together are few, the rows are exchanged.

    Raises:
        BackpassError: a weight was used in some processes only.
    """
    here = [collected.get(name) for name in names]
    table = [[one.count if one else 0, int(one is not None and one.rows is None)] for one in here]
    everywhere: list[list[list[int]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everywhere, table)
    for position, name in enumerate(names):
        counts = [process[position][0] for process in everywhere]
        if not any(counts):
            continue
        one = here[position]
        if one is None or not all(counts):
            unused = [rank for rank, count in enumerate(counts) if not count]
            raise BackpassError(
                f"{name!r} was used in some processes but not in {unused}: union=True needs each process to use the "
                "same layers in each step."
            )
        has_gram = any(process[position][1] for process in everywhere)
        if has_gram or sum(counts) > one.layer.columns(one.ones):
            one.to_gram()
            dist.all_reduce(one.gram)
        else:
            rows, outputs = one.whole()
            one.replace_rows(_exchange(rows, counts), _exchange(outputs, counts))
        one.count = sum(counts)


def _exchange(tensor: Tensor, counts: list[int]) -> Tensor:
    """The (blocks, n, columns) tensors of all processes, one after the other along n."""
    longest = max(counts)
    padded = tensor.new_zeros(tensor.shape[0], longest, tensor.shape[2])
    padded[:, : tensor.shape[1]] = tensor
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:, :count] for part, count in zip(parts, counts, strict=True)], 1)
