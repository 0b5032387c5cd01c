"""ProxProp: proximal backpropagation (Frerix, Moellenhoff, Moeller, Cremers, ICLR 2018, arXiv 1706.04638)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from torch import nn

from backpass.errors import BackpassError, UnknownNameError
from backpass.numbers import is_number, is_whole
from backpass.rules.activations import WITHOUT_ACTIVATION
from backpass.rules.attaching.override import TorchFunction
from backpass.rules.implicit.calls import LINEAR, NORMALIZATIONS, OPAQUE, PRODUCTS
from backpass.rules.implicit.proximal import ProximalAttached, ProximalStep
from backpass.rules.implicit.step import ProximalAtStep, optimizers_of
from backpass.rules.places import Place, check_places
from backpass.rules.rule import Rule
from backpass.rules.sites import Site

__all__ = ["ProxProp", "ProximalAttached"]

_TAU, _MEMORY_TAU = 1.0, 30.0
_MEMORY = 0.9
_SIDE, _MEMORY_SIDE = 4096, 128

_WITH_LAYERS = {nn.Linear, *(getattr(nn, f"Conv{kind}{dims}d") for kind in ("", "Transpose") for dims in (1, 2, 3))}
_ON_REQUEST = {nn.Embedding: "embeddings"} | dict.fromkeys(
    (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm), "norms"
)
_ACTIVATIONS = {nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.ELU}


@dataclass(frozen=True, kw_only=True)
class ProxProp(Rule):
    """Proximal backpropagation: implicit steps in the weights of linear layers.

    The forward pass z = A Theta and the gradient with respect to A are unchanged. Instead of the gradient A^T g the
    weights get
    D = Theta - argmin_T 1/2 |A T - (A Theta - g)|^2 + 1/(2 tau) |T - Theta|^2 = (A^T A + I/tau)^{-1} A^T g,
    which any optimizer then uses. Linear layers are F.linear, convolutions (also transposed), matrix products, addmm
    and einsum with a parameter, with their biases. Embeddings and the weights of normalizations are optional.

    Args:
        tau: step size of the proximal step, positive; None takes 1 with ``damping="relative"``, and 30 in layers with
            memory. tau -> 0 gives tau times the gradient, tau -> inf the least-squares solution of A T = A Theta - g.
        damping: what 1/tau is relative to. ``"sum"``: A^T A as above (the paper), where the effect of tau depends
            on the batch size if the loss is a mean. ``"mean"``: A^T A / rows (FOOF), rows are samples, tokens or
            output pixels. ``"sample_mean"``: A^T A / samples (K-FAC's convention for convolutions). ``"relative"``:
            the mean eigenvalue lambda of the smaller of A^T A and A A^T (of the average with memory), so that
            D = (lambda/tau) (A^T A + (lambda/tau) I)^{-1} A^T g, which has the scale of the gradient. None:
            ``"relative"`` without tau, ``"sum"`` with one.
        solver: ``"exact"``; ``"cg"``, a few conjugate-gradient steps on the same system as in the paper, in linear
            layers with one step length per output; or ``"toeplitz"``, exact but for convolutions where it is cheaper
            to replace A^T A by the larger block-Toeplitz matrix that ignores the border.
        cg_steps: iterations of ``solver="cg"``, at least 1.
        solve: ``"backward"`` solves in the backward pass, for one use of each weight per step. ``"step"`` solves at
            the optimizer's step, over all contributions since the last: micro-batches, shared weights, processes.
        memory: with ``solve="step"``, the share in [0, 1) of the running average of A^T A / rows that each step
            keeps; None takes 0.9, and the exact step for layers where that is cheaper. 0 without ``refresh`` is the
            exact step for all layers.
        refresh: number of steps from one refresh of a layer's average to the next, for which the layers take turns;
            None: 1 at first, then a tenth of the steps so far, at most 10.
        embeddings: True to include embeddings.
        norms: True to include the weights of normalizations.
        max_side: maximum side of a Gram matrix over columns. A larger one is replaced by its diagonal blocks of at most
            this side; None takes 128 with memory, else 4,096. Systems over rows have no limit.
        start: first site, as in `LinBP`.
        stop: one past the last site; -1 leaves the last layer plain, as in the paper.
        where: predicate on a `Site` that selects sites from ``start`` to ``stop``; None: all.

    Raises:
        BackpassError: a setting is out of its range.
        NoSiteError: at the first call of the model, if no site is selected.
    """

    name: ClassVar[str] = "proxprop"
    functions: ClassVar[Mapping[TorchFunction, str]] = {**LINEAR, **PRODUCTS, **NORMALIZATIONS}
    opaque: ClassVar[Mapping[TorchFunction, str]] = OPAQUE

    tau: float | None = None
    damping: Literal["relative", "sum", "mean", "sample_mean"] | None = None
    solver: Literal["exact", "cg", "toeplitz"] = "exact"
    cg_steps: int = 3
    solve: Literal["backward", "step"] = "backward"
    memory: float | None = None
    refresh: int | None = None
    embeddings: bool = False
    norms: bool = False
    max_side: int | None = None
    start: Place = None
    stop: Place = None
    where: Callable[[Site], bool] | None = None

    def __post_init__(self) -> None:
        checks: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
            ("tau", "positive and finite", lambda v: v is None or (is_number(v) and v > 0)),
            ("memory", "in [0, 1)", lambda v: v is None or (is_number(v) and 0 <= v < 1)),
            ("cg_steps", "an int of at least 1", lambda v: is_whole(v, 1)),
            ("refresh", "an int of at least 1", lambda v: v is None or is_whole(v, 1)),
            ("max_side", "an int of at least 1", lambda v: v is None or is_whole(v, 1)),
            ("embeddings", "True or False", lambda v: isinstance(v, bool)),
            ("norms", "True or False", lambda v: isinstance(v, bool)),
        )
        for name, kind, valid in checks:
            if not valid(getattr(self, name)):
                raise BackpassError(f"{name} must be {kind}, got {getattr(self, name)!r}.")
        for name, value, known in (
            ("solver", self.solver, ("exact", "cg", "toeplitz")),
            ("damping", self.damping, (None, "relative", "sum", "mean", "sample_mean")),
            ("solve", self.solve, ("backward", "step")),
        ):
            if value not in known:
                raise UnknownNameError(name, str(value), [one for one in known if one])
        if self.solve == "backward" and (self.memory or (self.refresh or 1) > 1):
            raise BackpassError(
                'memory and refresh need the solve at the optimizer\'s step: set solve="step" and attach the rule with '
                "attach(model, optimizer=optimizer)."
            )
        if self.memory and (self.solver == "cg" or self.step.damping == "sum"):
            raise BackpassError(
                'memory averages A^T A / rows and factors it: it goes with damping "relative", "mean" or '
                f"\"sample_mean\", and not with solver='cg'; got damping={self.step.damping!r}, solver={self.solver!r}."
            )
        check_places(self.start, self.stop)
        if self.where is not None and not callable(self.where):
            raise BackpassError(f"where must be a function of a Site that returns a bool, got {self.where!r}.")

    def attach(self, model: nn.Module, optimizer: Any = None, *, strict: bool = False) -> ProximalAttached:
        """Override the backward of ``model``; see `Rule.attach`.

        Args:
            model: the model.
            optimizer: with ``solve="step"``, the optimizer whose step performs the solve, or a list of optimizers that
                share the parameters of the model.
            strict: as in `Rule.attach`.

        Raises:
            BackpassError: ``solve="step"`` without an optimizer, or an optimizer without ``solve="step"``; the
                parameters are sharded.
        """
        if self.solve == "step":
            return ProximalAtStep(self, model, optimizers_of(optimizer), strict)
        if optimizer is not None:
            raise BackpassError('an optimizer is for solve="step"; without it the backward pass solves: leave it out.')
        return ProximalAttached(self, model, strict)

    @property
    def skipped(self) -> frozenset[type[nn.Module]]:  # type: ignore[override]
        """Module classes without layers of this rule, which need no hooks."""
        asked = {kind for kind, setting in _ON_REQUEST.items() if getattr(self, setting)}
        return (WITHOUT_ACTIVATION | _ACTIVATIONS) - _WITH_LAYERS - asked

    @property
    def step(self) -> ProximalStep:
        """Settings of the solve."""
        damping = self.damping or ("relative" if self.tau is None else "sum")
        tau = _TAU if self.tau is None else float(self.tau)
        side = self.max_side or (_MEMORY_SIDE if self.share else _SIDE)
        return ProximalStep(tau, damping, self.solver, self.cg_steps, side)

    @property
    def memory_step(self) -> ProximalStep:
        """Settings of the solve in layers with memory."""
        return self.step if self.tau is not None else replace(self.step, tau=_MEMORY_TAU)

    @property
    def chooses(self) -> bool:
        """True if each layer uses the cheaper of the running average and the exact step."""
        damping = self.damping or ("relative" if self.tau is None else "sum")
        return self.solve == "step" and self.memory is None and self.solver != "cg" and damping != "sum"

    @property
    def share(self) -> float:
        """Share of the running average that a step keeps."""
        return self.memory if self.memory is not None else _MEMORY if self.chooses else 0.0

    @property
    def remembers(self) -> bool:
        """True if layers keep a Gram matrix for several steps."""
        return self.share > 0 or (self.refresh or 1) > 1
