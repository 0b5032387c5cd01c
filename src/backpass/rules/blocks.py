"""Detection of residual blocks in the autograd graph: sums of a branch and of the branch's input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from backpass.rules import torch_internals
from backpass.rules.attaching.run import SiteCall

__all__ = ["SUMS", "Block", "Blocks", "writes_sum"]

_IN_PLACE = frozenset((Tensor.add_, Tensor.__iadd__))

SUMS = _IN_PLACE | {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__}
"""Functions that add two tensors."""

_SKIP_LIMIT = 24
"""Maximum number of graph nodes of a projection on the skip connection."""


def writes_sum(func: Any) -> bool:
    """Return True if a sum overwrites its first operand."""
    return func in _IN_PLACE


class Block:
    """A residual block sum = skip(z) + branch(z).

    Attributes:
        branch: output of the branch.
        z: input of the block.
        sites: sites of the activations in the branch that the rule may act on.
    """

    def __init__(self, branch: Tensor, z: Tensor, sites: list[SiteCall]) -> None:
        self.branch, self.z, self.sites = branch, z, sites
        # Edges, because the tensors may be overwritten later.
        self._from = torch.autograd.graph.get_gradient_edge(branch)
        self._to = torch.autograd.graph.get_gradient_edge(z)

    def release(self) -> None:
        """Release the tensors once the graph is complete."""
        del self.branch, self.z

    def acts(self) -> bool:
        """Return True if the rule acts on an activation of the branch."""
        return any(site.active() for site in self.sites)

    def gradient(self, grad: Tensor) -> Tensor:
        """Return J^T grad, with J the Jacobian of the branch under the present decisions of its kernels."""
        again = torch.is_grad_enabled()
        (found,) = torch.autograd.grad(self._from, self._to, grad, retain_graph=True, create_graph=again)
        return found

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Return a context in which the activations of the branch have their plain backward."""
        runs = {site.run for site in self.sites}
        before = {run: run.plain for run in runs}
        for run in runs:
            run.plain = True
        try:
            yield
        finally:
            for run, plain in before.items():
                run.plain = plain


class Blocks:
    """Residual blocks of one call of a model.

    Attributes:
        found: number of blocks so far.
    """

    def __init__(self) -> None:
        self.found = 0
        self._tensors: dict[Any, ref[Tensor]] = {}
        self._sums: list[ref[Tensor]] = []

    def note(self, tensors: Any) -> None:
        """Record tensors that may be the input of a block."""
        for x in tree_leaves(tensors):
            if isinstance(x, Tensor) and x.requires_grad:
                self._tensors[torch_internals.graph_node(x)] = ref(x)

    def is_sum(self, x: Any) -> bool:
        """Return True if a tensor is the sum of a block."""
        return any(one() is x for one in self._sums)

    def end(self, total: Tensor) -> None:
        """Record the sum of a block."""
        self.found += 1
        self._sums = [*self._sums[-8:], ref(total)]
        self.note(total)

    def ended_by(self, operands: tuple[Any, ...]) -> Block | None:
        """Return the block whose sum has these operands (skip connection and branch), or None."""
        pair = [x for x in operands[:2] if isinstance(x, Tensor) and x.requires_grad]
        if len(pair) != 2 or pair[0].shape != pair[1].shape or pair[0] is pair[1]:
            return None
        orders = ((pair[0], pair[1]), (pair[1], pair[0]))
        for branch, skip in orders:
            sites = _sites_between(branch, skip)
            if sites:
                return Block(branch, skip, sites)
            if sites is not None:
                return None  # a branch without activations
        for branch, skip in orders:
            for node in _projection(skip):
                z = self._tensors[node]() if node in self._tensors else None
                sites = _sites_between(branch, z) if z is not None else None
                if z is not None and sites:
                    return Block(branch, z, sites)
        return None


def _site(node: Any) -> SiteCall | None:
    site = getattr(node, "site", None) if torch_internals.function_class(node) is not None else None
    return site if isinstance(site, SiteCall) else None


def _sites_between(end: Tensor, begin: Tensor) -> list[SiteCall] | None:
    """Return the sites on the graph paths from ``begin`` to ``end``, or None if there is no path."""
    target = torch_internals.graph_node(begin)
    oldest = -1 if begin.is_leaf else torch_internals.sequence_number(target)
    nodes = [torch_internals.graph_node(end)]
    seen, sites, reached = set(nodes), [], False
    while nodes:
        node = nodes.pop()
        if node is target:
            reached = True
            continue
        site = _site(node)
        if site is not None:
            sites.append(site)
        for following, _ in node.next_functions:
            if following is None or following in seen:
                continue
            if following is target or torch_internals.sequence_number(following) > oldest:
                seen.add(following)
                nodes.append(following)
    return sites if reached else None


def _projection(skip: Tensor) -> Iterator[Any]:
    """Yield the graph nodes behind a skip connection, the nearest first, up to its first activation."""
    nodes = [torch_internals.graph_node(skip)]
    seen = set(nodes)
    while nodes and len(seen) < _SKIP_LIMIT:
        node = nodes.pop(0)
        yield node
        if _site(node) is None:
            following = [one for one, _ in node.next_functions if one is not None and one not in seen]
            seen.update(following)
            nodes += following
