"""LinBP in residual networks: gradients of branches are rescaled to their norm under plain backpropagation.

Guo, Li, Chen, "Backpropagating Linearly Improves Transferability of Adversarial Examples", NeurIPS 2020, Section 3.2.
In a block sum = skip(z) + f(z), with g the gradient at the sum: n = J_f(plain)^T g, l = J_f(linear)^T g,
alpha = |n|_2 / |l|_2 per sample; the gradient with respect to z is J_skip^T g + decay alpha l. An
activation of the sum itself stays plain. Weights get the linear gradient, unscaled.

The graph of a branch has the plain backward and that of the rule, so that the backward pass of the sum can compute both
n and l.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.compiler import is_dynamo_compiling
from torch.utils._pytree import tree_leaves

from backpass.errors import BackpassError
from backpass.rules.activation_calls import ActivationInterception
from backpass.rules.attaching.override import TorchFunction
from backpass.rules.attaching.run import ModuleCall, SiteCall
from backpass.rules.branches import SUMS, block_of_sum, sites_between, writes_sum

__all__ = ["ResidualInterception", "ratio"]


class ResidualInterception(ActivationInterception):
    """Interception that scales the gradients of residual branches."""

    follows = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.found = False
        self._tensors: dict[Any, ref[Tensor]] = {}
        self._sums: list[ref[Tensor]] = []

    def enter(self, module: nn.Module, path: str, key: str, args: tuple[Any, ...], activation: bool) -> Any:
        """Record a module call and its input, which may be the input of a block."""
        if is_dynamo_compiling():
            raise BackpassError(
                'residual="renormalized" does not work under torch.compile: use residual="plain", or the model without '
                "torch.compile."
            )
        with torch._C.DisableTorchFunction():
            self._note(args)
        return super().enter(module, path, key, args, activation)

    def leave(self, module: nn.Module, call: ModuleCall, output: Any) -> Any:
        """Record a module's output; raise an error at the end of the model if it has no residual block."""
        output = super().leave(module, call, output)
        with torch._C.DisableTorchFunction():
            self._note(output)
        if (
            len(self.running) == 1
            and self.replayed is None
            and output is not None
            and torch.is_grad_enabled()
            and not self.found
        ):
            raise BackpassError(
                f"{self.rule} finds no residual block with an activation in its branch: a block adds a branch to its "
                'own input, or to a projection of it. Use residual="plain" or "per_activation".'
            )
        return output

    def call_site(self, site: SiteCall, func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call an activation with a decision in the backward pass; an activation of a block's sum stays plain."""
        x = args[0] if args else kwargs["input"]
        self._hold(site, x)
        out = super().call_site(site, func, args, kwargs)
        self._note(out)
        return out

    def at_value(self, site: SiteCall, source: Tensor, plain: Tensor, learns: bool = False) -> Tensor:
        """Apply the rule's backward to a value, with a decision in the backward pass."""
        self._hold(site, source)
        return super().at_value(site, source, plain, learns)

    def _hold(self, site: SiteCall, x: Tensor) -> None:
        """Defer the decision for a site to the backward pass; exclude activations of a block's sum."""
        site.excluded = any(total() is x for total in self._sums)
        site.fixed = site.excluded or (site.fixed and not site.selected)
        if site.excluded:
            site.selected = False

    def _note(self, tensors: Any) -> None:
        """Record tensors that may be the input of a block."""
        for x in tree_leaves(tensors):
            if isinstance(x, Tensor) and x.requires_grad:
                self._tensors[get_gradient_edge(x).node] = ref(x)

    def call_other(self, caller: ModuleCall, func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function that is no activation; a sum may end a block."""
        found = self._block(args) if func in SUMS and torch.is_grad_enabled() else None
        if found is None:
            return super().call_other(caller, func, args, kwargs)
        index, z, sites = found
        scale: Callable[..., Tensor] = _Renormalized.apply
        operands = [scale(x, z, _Block(x, z, sites), self.rule.decay) if i == index else x for i, x in enumerate(args)]
        out = args[0].copy_(torch.add(*operands, **kwargs)) if writes_sum(func) else func(*operands, **kwargs)
        self.found = True
        self._sums = [*self._sums[-8:], ref(out)]
        self._note(out)
        return out

    def _block(self, operands: tuple[Any, ...]) -> tuple[int, Tensor, list[SiteCall]] | None:
        """Return the index of the branch in a sum, the block's input and the sites in the branch."""
        if len(operands) < 2 or not all(isinstance(x, Tensor) and x.requires_grad for x in operands[:2]):
            return None
        index, begin = block_of_sum(*operands[:2]) or (None, None)
        if index is None:
            return None
        skip = operands[1 - index]
        z = skip if get_gradient_edge(skip).node is begin else self._tensors.get(begin, lambda: None)()
        sites = sites_between(operands[index], begin)
        return (index, z, sites) if sites and z is not None else None


class _Block:
    """A residual block sum = skip(z) + branch(z).

    Args:
        branch: output of the branch.
        z: input of the block.
        sites: sites of the activations in the branch that the rule may act on.
    """

    def __init__(self, branch: Tensor, z: Tensor, sites: list[SiteCall]) -> None:
        self.sites = sites
        self._edges = get_gradient_edge(branch), get_gradient_edge(z)  # the tensors may be overwritten later

    def gradient(self, grad: Tensor) -> Tensor:
        """Return J^T grad, with J the Jacobian of the branch under the present decisions of its kernels."""
        end, begin = self._edges
        again = torch.is_grad_enabled()
        (found,) = torch.autograd.grad(end, begin, grad, retain_graph=True, create_graph=again)
        return found

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Return a context in which the activations of the branch have their plain backward."""
        before = {site.run: site.run.plain for site in self.sites}
        for run in before:
            run.plain = True
        try:
            yield
        finally:
            for run, plain in before.items():
                run.plain = plain


class _Renormalized(torch.autograd.Function):
    """(branch, z) -> branch; backward makes the gradient of z through the branch equal to decay alpha l."""

    @staticmethod
    def forward(ctx: Any, branch: Tensor, z: Tensor, block: _Block, decay: float) -> Tensor:
        ctx.block, ctx.decay = block, decay
        return branch.data

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        block: _Block = ctx.block
        if not any(site.active() for site in block.sites):
            return grad, None, None, None
        linear = block.gradient(grad)
        with block.plain():
            plain = block.gradient(grad)
        # The branch contributes l itself; this adds the difference to decay alpha l.
        return grad, (ctx.decay * ratio(plain, linear) - 1) * linear, None, None


def ratio(goal: Tensor, x: Tensor) -> Tensor:
    """Return |goal|_2 / |x|_2 per sample, and 1 where x vanishes."""
    norm = _norm(x)
    return torch.where(norm > 0, _norm(goal) / norm.where(norm > 0, torch.ones_like(norm)), 1.0)


def _norm(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dim=tuple(range(1, x.dim())), keepdim=True)
    return norm
