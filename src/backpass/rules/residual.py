"""LinBP in residual networks: the branch's gradient, scaled to its norm under plain backpropagation.

Guo, Li, Chen, "Backpropagating Linearly Improves Transferability of Adversarial Examples", NeurIPS 2020, Section 3.2.
In a block z+ = s(sum), sum = skip(z) + f(z), with g the gradient at the sum: n = J_f(plain)^T g, l = J_f(linear)^T g,
alpha = |n|_2 / |l|_2 per sample; the block passes down J_skip^T g + alpha l. The activation after the sum stays plain.

To have n and l in one backward pass, every operation of the branch runs twice on equal values: once with the rule,
once as a *twin* with plain backward and constant weights, so that weights receive the linear gradient alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from backpass.errors import BackpassError
from backpass.rules.attaching.interception import Interception, ModuleCall
from backpass.rules.attaching.redefinition import TorchFunction

__all__ = ["ResidualInterception"]

_SKIPS = ("downsample", "shortcut")
_SUMS = frozenset(
    getattr(place, name)
    for place, name in (
        (torch, "add"),
        (Tensor, "add"),
        (Tensor, "add_"),
        (Tensor, "__add__"),
        (Tensor, "__radd__"),
        (Tensor, "__iadd__"),
    )
)
_SUMS_IN_PLACE = frozenset((Tensor.add_, Tensor.__iadd__))


class _Renormalize(torch.autograd.Function):
    """z -> (z, z); backward (l, n) -> l |n|_2 / |l|_2, the norms per sample."""

    @staticmethod
    def forward(z: Tensor) -> tuple[Tensor, Tensor]:
        return z.view_as(z), z.view_as(z)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, linear: Tensor, plain: Tensor) -> Any:
        each = tuple(range(1, linear.dim()))
        norm = torch.linalg.vector_norm(linear, dim=each, keepdim=True)
        goal = torch.linalg.vector_norm(plain, dim=each, keepdim=True)
        return linear * (goal / norm.where(norm > 0, torch.ones_like(norm)))


class _BothGradients(torch.autograd.Function):
    """(f, twin) -> f; backward g -> (g, g)."""

    @staticmethod
    def forward(branch: Tensor, twin: Tensor) -> Tensor:
        return branch.view_as(branch)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad


class _Block:
    """A running residual block: its input, its branch tensors with their twins, and its skip tensors."""

    def __init__(self, path: str, z: Tensor) -> None:
        self.path = path
        self.z = z
        self.summed = False
        self.skips: list[Tensor] = [z]
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.ends: tuple[Tensor, Tensor] | None = None

    def split(self) -> tuple[Tensor, Tensor]:
        """The block's input as the branch and its twin see it."""
        if self.ends is None:
            split: Callable[[Tensor], tuple[Tensor, Tensor]] = _Renormalize.apply
            self.ends = split(self.z)
        return self.ends

    def linear(self, x: Any) -> Any:
        """What the branch computes with in the place of ``x``."""
        return self.split()[0] if x is self.z else x

    def twin(self, x: Any) -> Any:
        """What the twin computes with in the place of ``x``; everything that is not of the branch is constant."""
        if x is self.z:
            return self.split()[1]
        for branch, twin in self.pairs:
            if x is branch:
                return twin
        return x.detach() if isinstance(x, Tensor) else x

    def owns(self, x: Any) -> bool:
        """Whether ``x`` is a tensor of the branch."""
        return any(x is branch for branch, _ in self.pairs)

    def is_skip(self, x: Any) -> bool:
        """Whether ``x`` came along the skip connection."""
        return any(x is skip for skip in self.skips)


class ResidualInterception(Interception):
    """An interception that knows the residual blocks of ResNets.

    A block is a module with an attribute ``downsample`` or ``shortcut`` (None or a module), as in torchvision, timm
    and `backpass.lab.models`, that adds its branch to its input or to what that attribute made of it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.blocks: list[_Block] = []
        self.recognised = 0

    def enter(self, module: nn.Module, path: str, key: str, args: tuple[Any, ...]) -> None:
        """Note a module's call, and a block where its branch holds a site that the rule may act on."""
        super().enter(module, path, key, args)
        if any(hasattr(module, name) for name in _SKIPS) and torch.is_grad_enabled():
            ours = self.numbering.selects_inside(path)
            if ours and args and isinstance(args[0], Tensor):
                if torch.compiler.is_dynamo_compiling():
                    raise BackpassError(
                        'residual="renormalized" does not work under torch.compile; use residual="plain", or the '
                        "model without torch.compile."
                    )
                self.blocks.append(_Block(path, args[0]))

    def leave(self, call: ModuleCall, finished: bool) -> None:
        """Note a call's end; a block must have shown its sum by then."""
        super().leave(call, finished)
        if self.blocks and self.blocks[-1].path == call.path:
            block = self.blocks.pop()
            self.recognised += block.summed
            if finished and not block.summed:
                raise BackpassError(
                    f"residual block {call.path!r} could not be recognised: it never added its branch to its input or "
                    'to the output of its downsample or shortcut. Use residual="plain" for this model.'
                )
        if not self.running and self.whole and finished and not self.recognised and torch.is_grad_enabled():
            raise BackpassError(
                'residual="renormalized" recognised no residual block with a selected activation: a block is a module '
                'with an attribute "downsample" or "shortcut" (as in torchvision and timm). Use residual="plain".'
            )

    def __torch_function__(
        self,
        func: TorchFunction,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        block = self.blocks[-1] if self.blocks else None
        kwargs = kwargs or {}
        if block is None or block.summed:
            return super().__torch_function__(func, types, args, kwargs)
        if self._on_skip(block):
            out = super().__torch_function__(func, types, args, kwargs)
            block.skips += [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
            return out
        if func in _SUMS and self._closes(block, args):
            return self._sum(block, func, args, kwargs)
        if not any(leaf is block.z or block.owns(leaf) for leaf in tree_leaves((args, kwargs))):
            return super().__torch_function__(func, types, args, kwargs)
        return self._twice(block, func, types, args, kwargs)

    def accepts(self, index: int, caller: ModuleCall, name: str) -> bool:
        """The activations of a block after its sum keep their own derivative."""
        return not (self.blocks and self.blocks[-1].summed) and super().accepts(index, caller, name)

    def _on_skip(self, block: _Block) -> bool:
        prefixes = tuple(f"{block.path}.{name}".lstrip(".") for name in _SKIPS)
        return any(call.path == p or call.path.startswith(p + ".") for call in self.running for p in prefixes)

    def _closes(self, block: _Block, args: tuple[Any, ...]) -> bool:
        return len(args) > 1 and any(
            block.owns(branch) and block.is_skip(skip) for branch, skip in (args[:2], args[1::-1])
        )

    def _sum(self, block: _Block, func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        join: Callable[[Tensor, Tensor], Tensor] = _BothGradients.apply
        operands = [join(x, block.twin(x)) if block.owns(x) else x for x in args[:2]]
        block.summed = True
        out = torch.add(*operands, **kwargs)
        return args[0].copy_(out) if func in _SUMS_IN_PLACE else out

    def _twice(
        self, block: _Block, func: TorchFunction, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if getattr(func, "__name__", "").find("dropout") >= 0 and kwargs.get("training", False):
            raise BackpassError('residual="renormalized" needs dropout switched off: call model.eval().')
        twin_args, twin_kwargs = tree_map(block.twin, (args, kwargs))
        if func is F.batch_norm and kwargs.get("training", False):
            # The twin must not move the running statistics a second time.
            twin_args = (twin_args[0], *(x.clone() if isinstance(x, Tensor) else x for x in twin_args[1:]))
        args, kwargs = tree_map(block.linear, (args, kwargs))
        out = super().__torch_function__(func, types, args, kwargs)
        twins = func(*twin_args, **twin_kwargs)
        for leaf, twin in zip(tree_leaves(out), tree_leaves(twins), strict=True):
            if isinstance(leaf, Tensor) and not block.owns(leaf):
                block.pairs.append((leaf, twin))
        return out
