"""SGM: skip gradient method (Wu, Wang, Xia, Bailey, Ma, ICLR 2020, arXiv 2002.05990)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from backpass.errors import BackpassError, NoSiteError
from backpass.rules.activations import WITHOUT_ACTIVATION
from backpass.rules.attaching.override import TorchFunction
from backpass.rules.attaching.run import ModuleCall, SiteCall
from backpass.rules.branches import SUMS, block_of_sum, new_features, writes_sum
from backpass.rules.operands import OperandAttached, OperandInterception, OperandRule, Operands
from backpass.rules.torch_internals import custom_functions

__all__ = ["SGM"]

_CATS = frozenset((torch.cat, torch.concat, torch.concatenate))


class _BranchInterception(OperandInterception):
    """Interception that finds the branches of residual sums and the new features of concatenations."""

    blind: str | None = None
    """Path of a module whose sums were called without gradients although the model's call enables them."""

    def find(self, func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operands:
        """Return the branch of a sum, or the new features of a concatenation."""
        if not torch.is_grad_enabled():
            if self.running[0].grad_enabled:
                self.blind = self.running[-1].path
            return ()
        if "out" in kwargs:
            return ()
        if func in _CATS:
            place: Any = 0 if args else next((name for name in ("tensors", "tensor") if name in kwargs), 0)
            tensors = args[0] if args else kwargs.get(place, ())
            return tuple((place, index) for index in new_features(tensors))
        places: Any = (0, 1) if len(args) > 1 else (0, "other") if args else ("input", "other")
        pair: list[Any] = [args[one] if isinstance(one, int) else kwargs.get(one) for one in places]
        if not all(isinstance(x, Tensor) for x in pair):
            return ()
        block = block_of_sum(*pair)
        return () if block is None else ((places[block[0]],),)

    def call_site(self, site: SiteCall, func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a sum or a concatenation by the decision for its site."""
        if func in _CATS and args and isinstance(args[0], list | tuple) and isinstance(args[0][0], Tensor):
            site.shape = args[0][0].shape
        return super().call_site(site, func, args, kwargs)

    def scaled(
        self,
        operands: Operands,
        func: TorchFunction,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        site: SiteCall | None,
    ) -> Any:
        """Call a function with the gradients of the branches multiplied; a sum may overwrite its branch."""
        if writes_sum(func) and len(operands) == 1 and len(operands[0]) == 1 and operands[0][0] == 0:
            args[0].copy_(self.scale(args[0], site))
            return func(*args, **kwargs)
        return super().scaled(operands, func, args, kwargs, site)

    def leave(self, module: nn.Module, call: ModuleCall, output: Any) -> Any:
        """Record a module's output; raise an error at the end of the model if it has no skip connection."""
        output = super().leave(module, call, output)
        if is_dynamo_compiling() or len(self.running) > 1 or self.replayed is not None or output is None:
            return output
        if self.blind is not None and torch.utils.checkpoint.CheckpointFunction in custom_functions(output):
            raise BackpassError(
                f"{self.rule} cannot see the skip connections of module {self.blind or '(model)'!r} in a reentrant "
                "checkpoint: call checkpoint(..., use_reentrant=False)."
            )
        if torch.is_grad_enabled() and not self.traced and not any(site.counted for site in self.run.sites):
            raise NoSiteError(
                f"{self.rule} finds no skip connection: a sum of a branch and of its own input or a projection of it, "
                "or a concatenation of a tensor and of features computed from it. The input of a block "
                "must require gradients: it is searched for in the graph."
            )
        return output


class _BranchAttached(OperandAttached):
    interception = _BranchInterception


@dataclass(frozen=True, kw_only=True)
class SGM(OperandRule):
    """Skip gradient method: the gradient through each residual branch is multiplied by ``decay``.

    skip(z) + f(z) has the gradient J_skip^T g + decay J_f^T g with respect to z, with g the gradient at the sum. In a
    concatenation [z, f(z)] the gradient of the new features f(z) is multiplied by ``decay``. Over blocks in series, a
    path through m branches is thus multiplied by decay^m.

    Source: Wu et al., ICLR 2020, arXiv 2002.05990, Section 3.

    The sites are sums and concatenations. The branch is found in the autograd graph, with or without activations in
    it, independent of module names.

    Args:
        decay: factor of the branches' gradients, in [0, 1]; 0.2 for ResNets and 0.5 for DenseNets in the paper.
        start: first skip connection: an index from the front (7), from the end (-2: the last two), a fraction of all
            (0.5: the second half), or the path of a module (the first inside it); None: the first.
        stop: one past the last skip connection, given like ``start``; None: up to the end.
        where: predicate on a `Site` that selects among them; None: all.

    Raises:
        BackpassError: a setting is out of its range.
        NoSiteError: at the first call of the model that computes gradients, if it has no skip connection or none is
            selected.
    """

    name: ClassVar[str] = "sgm"
    kind = _BranchAttached
    functions: ClassVar[Any] = {
        **{function: "add" for function in SUMS},  # noqa: C420
        **{function: "cat" for function in _CATS},  # noqa: C420
    }
    skipped = WITHOUT_ACTIVATION

    decay: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.decay, bool) or not isinstance(self.decay, int | float) or not 0 <= self.decay <= 1:
            raise BackpassError(f"decay must be in [0, 1], got {self.decay!r}.")

    @property
    def factor(self) -> float:
        """Factor of the branches' gradients."""
        return float(self.decay)
