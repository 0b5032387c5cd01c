"""PNA: pay no attention (Wei, Chen, Goldblum, Wu, Goldstein, Jiang, AAAI 2022, arXiv 2109.04176)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor

from backpass.errors import BackpassError
from backpass.rules.activations import WITHOUT_ACTIVATION
from backpass.rules.attaching.interception import outer_interceptions
from backpass.rules.attaching.override import TorchFunction
from backpass.rules.attaching.run import ModuleCall, SiteCall
from backpass.rules.operands import OperandAttached, OperandInterception, OperandRule, Operands, positions
from backpass.rules.torch_internals import body_below_modes, constant_while_tracing

__all__ = ["PNA", "AttentionAttached", "AttentionInterception"]

_SDPA = F.scaled_dot_product_attention
_SDPA_NAMES = ("query", "key", "value", "attn_mask")
_CONSTANT = ("query", "key", "attn_mask")
_EINSUM = torch.einsum
_PRODUCTS: dict[Any, str] = {
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__), "matmul"),
    **dict.fromkeys((torch.bmm, Tensor.bmm), "bmm"),
    _EINSUM: "einsum",
}
_SOFTMAX = frozenset((F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax))
_MULTI_HEAD = F.multi_head_attention_forward
_multi_head_body = body_below_modes(_MULTI_HEAD)

_VIEWS = frozenset(
    (
        *("view", "reshape", "permute", "transpose", "swapaxes", "movedim", "flatten", "unflatten"),
        *("unsqueeze", "squeeze", "expand", "expand_as", "contiguous", "clone", "to", "type"),
        *("type_as", "float", "double", "half", "bfloat16", "split", "chunk", "unbind"),
        *("__getitem__", "__get__", "dropout", "nan_to_num"),
    )
)
"""Functions that return an attention matrix if their first argument is one."""

_MIXES = frozenset(
    (
        *("linear", "conv2d", "mul", "__mul__", "__rmul__", "div", "__truediv__", "add"),
        *("__add__", "masked_fill", "where"),
    )
)
"""Functions that do so if they preserve the number of elements, as in talking-heads attention."""


class AttentionInterception(OperandInterception):
    """Interception that tracks attention matrices from the softmax to the product with the values."""

    tokens_first = False
    """True if tensors are (tokens, samples, channels), as inside `nn.MultiheadAttention`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._matrices: dict[int, ref[Tensor]] = {}

    def find(self, func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operands:
        """Return the operands that are the attention matrix or that it is computed from."""
        if func is _SDPA:
            return tuple((place,) for place in positions(_SDPA_NAMES, _CONSTANT, args, kwargs))
        given: dict[tuple[int | str, ...], Any] = {
            (i,): x for i, x in enumerate(args) if not isinstance(x, list | tuple)
        }
        given |= {(i, j): x for i, one in enumerate(args) if isinstance(one, list | tuple) for j, x in enumerate(one)}
        given |= {(name,): x for name, x in kwargs.items()}
        tensors = [x for x in given.values() if isinstance(x, Tensor)]
        found = tuple(place for place, x in given.items() if self._is_matrix(x))
        return () if len(found) == len(tensors) else found  # a product of attention matrices is an attention matrix

    def called(self, func: TorchFunction, args: tuple[Any, ...], out: Any) -> None:
        """Track attention matrices."""
        if func in _SOFTMAX:
            self._note(out)
            return
        if not self._matrices or not args:
            return
        name = getattr(func, "__name__", "")
        if name in _VIEWS:
            follows = self._is_matrix(args[0])
        elif name in _MIXES:
            matrix = next((x for x in args if self._is_matrix(x)), None)
            follows = matrix is not None and isinstance(out, Tensor) and out.numel() == matrix.numel()
        else:
            follows = func in _PRODUCTS and self.found == () and self._all_matrices(args)
        if follows:
            for one in out if isinstance(out, list | tuple) else (out,):
                self._note(one)

    def scale(self, x: Tensor, site: SiteCall | None) -> Tensor:
        """Return x with the rule's gradient; outer rules track the result like x."""
        scaled = self.changed(x, site)
        for outer in outer_interceptions():
            if isinstance(outer, AttentionInterception):
                outer.note_same(x, scaled)
        return scaled

    def changed(self, x: Tensor, site: SiteCall | None) -> Tensor:
        """Return x with the rule's gradient if the site is active."""
        return super().scale(x, site)

    def note_same(self, x: Tensor, other: Tensor) -> None:
        """Record that another tensor replaces x."""
        if self._is_matrix(x):
            self._note(other)

    def _all_matrices(self, args: tuple[Any, ...]) -> bool:
        return all(self._is_matrix(x) for x in args if isinstance(x, Tensor))

    def _note(self, x: Any) -> None:
        if isinstance(x, Tensor):
            self._matrices[id(x)] = ref(x)

    def _is_matrix(self, x: Any) -> bool:
        return isinstance(x, Tensor) and id(x) in self._matrices and self._matrices[id(x)]() is x

    def call_other(self, caller: ModuleCall, func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function that is no site; run multi-head attention with its inner calls visible."""
        if func is _MULTI_HEAD:
            # Outer rules see only the functions that this one calls.
            here = [self, *(mode for mode in outer_interceptions() if isinstance(mode, AttentionInterception))]
            before = [mode.tokens_first for mode in here]
            try:
                for mode in here:
                    mode.tokens_first = True
                with self:
                    return _multi_head_body(*args, **kwargs)
            finally:
                for mode, first in zip(here, before, strict=True):
                    mode.tokens_first = first
        if isinstance(func, torch._ops.OpOverload | torch._ops.OpOverloadPacket) and _is_fused(str(func)):
            self.note_unreachable(
                caller.path, f"it calls {func}; set the model's attention to \"eager\" or to PyTorch's own function"
            )
        return super().call_other(caller, func, args, kwargs)

    def _traced(
        self, caller: ModuleCall, name: str | None, func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if func is _MULTI_HEAD:
            attached: Any = self.attached
            attached.refuse_to_compile(caller.path)
        return super()._traced(caller, name, func, args, kwargs)


def _is_fused(name: str) -> bool:
    return "attention" in name or "attn" in name


class AttentionAttached(OperandAttached):
    """An attention rule attached to a model."""

    interception = AttentionInterception

    @constant_while_tracing
    def refuse_to_compile(self, path: str) -> None:
        """Raise an error: Dynamo cannot trace the body of multi-head attention below a mode."""
        raise BackpassError(
            f"{self.rule} does not reach inside nn.MultiheadAttention in module {path or '(model)'!r} under "
            "torch.compile: use the model without torch.compile, or call F.scaled_dot_product_attention."
        )


@dataclass(frozen=True, kw_only=True)
class PNA(OperandRule):
    """Pay no attention: the attention matrix is a constant in the backward pass.

    O = A V with A = softmax(Q K^T / sqrt(d) + mask): dL/dV = A^T dL/dO, and no gradient goes to Q, K and the mask.

    The sites are calls of ``scaled_dot_product_attention``, inside ``nn.MultiheadAttention`` too, and products of a
    softmax and of other values (``matmul``, ``@``, ``bmm``, ``einsum``), also after dropout, a cast or a mixing of
    heads. Kernels outside PyTorch (flash-attn, xformers) are unreachable; those that are registered operators are
    reported.

    The settings are those of `SGM` without ``decay``.

    Source: Wei et al., AAAI 2022, arXiv 2109.04176, Section 3.

    Raises:
        BackpassError: a setting is out of its range.
        NoSiteError: at the first call of the model that computes gradients, if it has no reachable attention or none is
            selected.
    """

    name: ClassVar[str] = "pna"
    kind = AttentionAttached
    functions: ClassVar[Any] = {_SDPA: "scaled_dot_product_attention", **_PRODUCTS}
    skipped = WITHOUT_ACTIVATION
