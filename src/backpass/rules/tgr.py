"""TGR: token gradient regularization (Zhang, Huang, Wu, Lyu, CVPR 2023, arXiv 2303.15754)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpass.errors import BackpassError
from backpass.numbers import is_number, is_whole
from backpass.rules.activations import ACTIVATIONS, WITHOUT_ACTIVATION
from backpass.rules.attaching.interception import choose, outer_interceptions
from backpass.rules.attaching.override import TorchFunction
from backpass.rules.attaching.run import ModuleCall, SiteCall
from backpass.rules.branches import SUMS
from backpass.rules.operands import OperandRule, Operands
from backpass.rules.pna import PNA, AttentionAttached, AttentionInterception
from backpass.rules.torch_internals import constant_while_tracing

__all__ = ["TGR"]

_SDPA = F.scaled_dot_product_attention
_LAYERS = frozenset((F.linear, F.conv1d, F.conv2d, F.conv3d))


class _TokenInterception(AttentionInterception):
    """Interception that also finds the linear layers before an attention, and those before an activation.

    The input of each linear layer that acts on tokens is marked. Its role becomes known later in the forward pass; the
    backward pass reads it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._linear: dict[int, tuple[ref[Tensor], list[SiteCall]]] = {}
        self._summed: set[int] = set()
        self._marked: list[SiteCall] = []

    def call_site(self, site: SiteCall, func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call an attention by the decision for its site, or a linear layer with its input marked."""
        if func is not F.linear:
            return super().call_site(site, func, args, kwargs)
        x = args[0] if args else kwargs["input"]
        if not isinstance(x, Tensor) or x.dim() < 3 or self._is_matrix(x):
            self._count(site, None)
            out = func(*args, **kwargs)
            self.called(func, args, out)
            return out
        site.kernel, site.fixed = True, False
        if self.replayed is None:
            self._marked.append(site)
            site.factor = None  # type: ignore[attr-defined]
        outer = [mode for mode in outer_interceptions() if isinstance(mode, _TokenInterception)]
        before = [len(mode.run.sites) for mode in outer]
        if torch.is_grad_enabled() and x.requires_grad:
            apply: Callable[..., Tensor] = _Tokens.apply
            x = apply(x, site, self.rule.tokens, self.tokens_first)
        out = func(x, *args[1:], **kwargs) if args else func(**{**kwargs, "input": x})
        for mode, count in zip(outer, before, strict=True):
            for other in mode.run.sites[count:]:
                other.delegate = site
        self._keep(out, [site])
        return out

    def find(self, func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operands:
        """Return the attention matrix of a call, and record which linear layers it is computed from."""
        found = super().find(func, args, kwargs)
        if func is _SDPA:
            if kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0):
                self.note_unreachable(self.running[-1].path, "its attention drops out; call model.eval()")
                return ()
            found = ((0,),) if args else (("query",),)
        if found:
            self._note_role(self._sources((*args, *kwargs.values())), self.rule.qkv)
        return found

    def called(self, func: TorchFunction, args: tuple[Any, ...], out: Any) -> None:
        """Track attention matrices and outputs of linear layers."""
        super().called(func, args, out)
        if func in ACTIVATIONS:
            # A residual sum ends the MLP that the layer begins.
            self._note_role([site for site in self._sources(args) if id(args[0]) not in self._summed], self.rule.mlp)
        elif func is not _SDPA and not self.found and (func not in _LAYERS or self._is_matrix(args[0])):
            source = next((one for one in args if self._sources((one,))), None)
            if source is not None:
                summed = id(source) in self._summed or (func in SUMS and sum(map(_is_batch, args)) > 1)
                for one in out if isinstance(out, list | tuple) else (out,):
                    if isinstance(one, Tensor):
                        self._keep(one, self._sources((source,)), summed=summed)
        self.found = ()

    def _keep(self, out: Tensor, sources: list[SiteCall], *, summed: bool = False) -> None:
        """Record the linear layers that a tensor is computed from."""
        self._linear[id(out)] = ref(out), sources
        (self._summed.add if summed else self._summed.discard)(id(out))

    def _sources(self, args: Any) -> list[SiteCall]:
        """Return the linear layers that these arguments are computed from."""
        found: list[SiteCall] = []
        for one in args:
            if isinstance(one, list | tuple):
                found += self._sources(one)
            elif isinstance(one, Tensor) and id(one) in self._linear:
                tensor, sources = self._linear[id(one)]
                found += sources if tensor() is one else []
        return found

    def _note_role(self, sites: list[SiteCall], factor: float) -> None:
        for site in sites:
            if self.replayed is None and site.factor is None:  # type: ignore[attr-defined]
                self._count(site, factor)

    def _count(self, site: SiteCall, factor: float | None) -> None:
        """Decide if a linear layer is a site."""
        if self.replayed is not None:
            return
        site.factor = factor  # type: ignore[attr-defined]
        if site.counted != (factor is not None):
            self.run.plan, site.counted, site.selected = None, factor is not None, None

    def leave(self, module: nn.Module, call: ModuleCall, output: Any) -> Any:
        """Record a module's output; at the end of the model, decide about the remaining linear layers."""
        output = super().leave(module, call, output)
        if len(self.running) == 1:
            for site in self._marked:
                self._count(site, site.factor)  # type: ignore[attr-defined]
        return output

    def changed(self, x: Tensor, site: SiteCall | None) -> Tensor:
        """Return an attention matrix with a regularized gradient if the site is active."""
        apply: Callable[..., Tensor] = _Matrix.apply
        return apply(x, site, self.rule.attention, self.rule.tokens)

    def note_same(self, x: Tensor, other: Tensor) -> None:
        """Record that another tensor replaces x."""
        super().note_same(x, other)
        sources = self._sources((x,))
        if sources:
            self._keep(other, sources, summed=id(x) in self._summed)

    def scaled(
        self,
        operands: Operands,
        func: TorchFunction,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        site: SiteCall | None,
    ) -> Any:
        """Call an attention with a regularized gradient of its matrix."""
        if func is not _SDPA:
            return super().scaled(operands, func, args, kwargs, site)
        assert site is not None  # noqa: S101 -- compiled code is refused
        plain = func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            written_out = attention(*args, **kwargs, change=lambda matrix: self.changed(matrix, None))
            apply: Callable[..., Tensor] = _Valued.apply
            return choose(plain, apply(written_out, plain.detach()), site)

    def _traced(
        self, caller: ModuleCall, name: str | None, func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        attached: Any = self.attached
        attached.refuse_to_compile(caller.path)


class _TokenAttached(AttentionAttached):
    interception = _TokenInterception

    @constant_while_tracing
    def refuse_to_compile(self, path: str) -> None:
        """Raise an error: compiled code cannot decide the role of a layer before the backward pass."""
        raise BackpassError(f"{self.rule} does not work under torch.compile: use the model without it.")


@dataclass(frozen=True, kw_only=True)
class TGR(OperandRule):
    """Token gradient regularization: zeroes extreme token gradients in attention, QKV layers and MLPs.

    - Attention matrix A of each head: in dL/dA, the row and the column of the largest and of the smallest entry are set
      to zero, and the rest is multiplied by ``attention``.
    - Linear layers that compute queries, keys and values: in the gradient of their input, the largest and the
      smallest entry over all tokens are set to zero in each channel, and the rest is multiplied by ``qkv``.
    - Linear layers before an activation (the first layer of an MLP): likewise, with ``mlp``.

    Samples are independent, and so are windows of windowed attention. The sites are the attentions, as
    in `PNA`, and these linear layers, in the order of their calls; the input of a linear
    layer must have three dimensions or more.

    The settings are those of `PNA` and:

    Args:
        attention: factor of the gradients of attention matrices, at least 0.
        qkv: factor of the input gradients of layers before an attention.
        mlp: factor of the input gradients of layers before an activation.
        tokens: number of extreme entries at each end.

    Raises:
        BackpassError: a setting is out of its range.
        NoSiteError: at the first call of the model that computes gradients, if no site is selected.
    """

    name: ClassVar[str] = "tgr"
    kind = _TokenAttached
    functions: ClassVar[Any] = {**PNA.functions, F.linear: "linear"}
    skipped = WITHOUT_ACTIVATION

    attention: float = 0.25
    qkv: float = 0.75
    mlp: float = 0.5
    tokens: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("attention", "qkv", "mlp"):
            factor = getattr(self, name)
            if not is_number(factor) or factor < 0:
                raise BackpassError(f"{name} must be a factor of at least 0, got {factor!r}.")
        if not is_whole(self.tokens, 1):
            raise BackpassError(f"tokens must be a whole number of at least 1, got {self.tokens!r}.")


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    change: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return change(softmax(Q K^T scale + mask)) V, with the arguments of ``scaled_dot_product_attention``."""
    if enable_gqa:
        key, value = (one.repeat_interleave(query.shape[-3] // one.shape[-3], -3) for one in (key, value))
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        # A fully masked row has the output 0, as in PyTorch's function.
        scores = scores.masked_fill(~attn_mask, -torch.inf)
        matrix = torch.where(attn_mask.any(-1, keepdim=True), scores, 0.0).softmax(-1)
        matrix = torch.where(attn_mask.any(-1, keepdim=True), matrix, 0.0)
    else:
        matrix = (scores if attn_mask is None else scores + attn_mask).softmax(-1)
    return change(matrix) @ value


def _is_batch(x: Any) -> bool:
    """Return True if an operand of a sum is a batch of features, not a bias."""
    return isinstance(x, Tensor) and x.dim() > 1


def _extremes(gradient: Tensor, count: int) -> Tensor:
    """Return the indices (..., 2 count) of the largest and the smallest entries of each row (..., T)."""
    count = min(count, gradient.shape[-1])
    return torch.cat([gradient.topk(count, largest=largest).indices for largest in (True, False)], -1)


class _Valued(torch.autograd.Function):
    """(x, value) -> value; backward: the gradient goes to x, which equals the value up to rounding."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.data

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Matrix(torch.autograd.Function):
    """x -> x; backward: rows and columns of extreme entries are zero, the rest is multiplied."""

    passes_on = True

    @staticmethod
    def forward(ctx: Any, x: Tensor, asked: SiteCall | None, factor: float, count: int) -> Tensor:
        ctx.asked, ctx.factor, ctx.count = asked, factor, count
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.asked is not None and not ctx.asked.active():
            return grad, None, None, None
        places = _extremes(grad.flatten(-2), ctx.count)
        columns = grad.shape[-1]
        rows = torch.zeros(grad.shape[:-1], dtype=torch.bool, device=grad.device)
        rows.scatter_(-1, places // columns, True)
        across = torch.zeros((*grad.shape[:-2], columns), dtype=torch.bool, device=grad.device)
        across.scatter_(-1, places % columns, True)
        dropped = rows.unsqueeze(-1) | across.unsqueeze(-2)
        return (grad * ctx.factor).masked_fill(dropped, 0.0), None, None, None


class _Tokens(torch.autograd.Function):
    """x -> x; backward: extreme tokens of each channel are zero, the rest is multiplied, if the site is active."""

    passes_on = True

    @staticmethod
    def forward(ctx: Any, x: Tensor, asked: Any, count: int, tokens_first: bool) -> Tensor:
        ctx.asked, ctx.count, ctx.tokens_first = asked, count, tokens_first
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.asked.factor is None or not ctx.asked.active():
            return grad, None, None, None
        # (samples, channels, tokens)
        rows = grad.permute(1, 2, 0) if ctx.tokens_first else grad.flatten(1, -2).transpose(1, 2)
        kept = (rows * ctx.asked.factor).scatter(-1, _extremes(rows, ctx.count), 0.0)
        back = kept.permute(2, 0, 1) if ctx.tokens_first else kept.transpose(1, 2).reshape(grad.shape)
        return back, None, None, None
