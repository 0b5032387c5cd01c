"""Interception of torch functions: while an attached model runs, its calls pass through a torch function mode.

Hooks on the model and on its submodules maintain the chain of module calls. The outermost hook pushes a new
`Interception` on the thread's stack of torch function modes and pops it at the end of the call, also on exceptions.
Module calls, functional calls, methods, in-place calls and re-used activation modules all reach the mode.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.overrides import TorchFunctionMode

from backpass.errors import BackpassError
from backpass.rules import torch_internals
from backpass.rules.attaching.override import BackwardOverride, TorchFunction
from backpass.rules.attaching.run import Decision, ModuleCall, PlannedSite, Run, SiteCall
from backpass.rules.torch_internals import saved_tensor_hooks

if TYPE_CHECKING:
    from backpass.rules.attaching.attached import Attached

__all__ = ["Interception", "checkpointed_function", "choose", "outer_interceptions"]


class Interception(TorchFunctionMode):
    """Torch function mode of one call of an attached model: records the sites and applies the rule to selected ones.

    Attributes:
        follows: True if calls may follow the plan, without a `SiteCall` for each.
        fast: True if they follow it in this call.
        partial: True if the rule covers only some calls of its functions.
        watched: running modules that may compute a single activation.
        attached: the attached rule.
        run: sites of this call.
        running: chain of running module calls, the outermost first.
        replayed: in a recomputation, the calls of the last complete run by key; else None.
        traced: number of sites in compiled code so far.
        left_plain: graph nodes of sites that are known not to be selected.
        handled: exception that was being handled when the call began.
    """

    follows = False
    watched: list[Any] | tuple[()] = ()

    def __init__(self, attached: Attached, run: Run, replayed: dict[str, SiteCall] | None = None) -> None:
        super().__init__()
        self.attached = attached
        self.rule: Any = attached.rule
        self.functions = self.rule.functions
        self.fast = self.follows and replayed is None and (self.rule.acts_on_nodes or not run.relative)
        self.partial = type(self.rule).covers is not BackwardOverride.covers
        self.run = run
        self.running: list[ModuleCall] = []
        self.replayed = replayed
        self.traced = 0
        self.left_plain: set[Any] = set()
        self.handled = None if is_dynamo_compiling() else sys.exception()

    def __torch_function__(
        self, func: TorchFunction, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        caller = self.running[-1]
        name = self.functions.get(func)
        kwargs = kwargs or {}
        if is_dynamo_compiling():
            return func(*args, **kwargs) if caller.plain else self._traced(caller, name, func, args, kwargs)
        follows = caller.planned
        if follows is not None and name is not None:  # fast path: the call follows the plan
            if caller.grad_enabled != torch.is_grad_enabled():
                return func(*args, **kwargs)
            run = self.run
            position = len(run.shapes)
            planned = run.steps[position]
            if (
                planned.caller is not follows
                or planned.function != name
                or (self.partial and self.rule.covers(func, args, kwargs) != planned.covered)
            ):
                return self._call_unplanned(func, args, kwargs)
            run.shapes.append(args[0].shape if args else kwargs["input"].shape)
            if planned.selected and caller.grad_enabled:
                return self._call_selected(caller, name, func, args, kwargs)
            out = func(*args, **kwargs)
            if planned.revisable:
                run.nodes[position] = out.grad_fn
            return out
        if caller.plain or follows is not None:
            return func(*args, **kwargs)
        if name is None:
            return self.call_other(caller, func, args, kwargs)
        if caller.grad_enabled != torch.is_grad_enabled():
            # No gradient reaches this call: it runs under no_grad or in the forward of a custom autograd function.
            self.note_hidden(caller, name)
            return func(*args, **kwargs)
        self._refuse_checkpointed(caller, name)
        return self.call_site(self.record(caller, name, args[0] if args else kwargs.get("input")), func, args, kwargs)

    @staticmethod
    def _refuse_checkpointed(caller: ModuleCall, name: str) -> None:
        hooks = torch_internals.checkpoint_hooks()
        if hooks is not None and hooks is not caller.checkpoint:
            raise checkpointed_function(name, caller.path)

    def _call_selected(
        self, caller: ModuleCall, name: str, func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call a function that the plan selects."""
        run = self.run
        if saved_tensor_hooks(True) is not None:
            self._refuse_checkpointed(caller, name)
        if torch._C._len_torch_function_stack():
            return self.call_site(run.site(len(run) - 1), func, args, kwargs)
        return self.replace_planned(func, args, kwargs, PlannedSite(run, len(run) - 1) if run.revisable else None)

    def _call_unplanned(self, func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function of the rule that differs from the plan."""
        self.run.plan = None
        self._leave_plan()
        return self.__torch_function__(func, (), args, kwargs)

    def step_into(self, path: str) -> bool:
        """Record the start of a module call if the plan fully describes it; return False otherwise."""
        call = self._next_call(path)
        if (
            call is None
            or not call.repeats
            or call.grad_enabled != torch.is_grad_enabled()
            or saved_tensor_hooks(True) is not None
        ):
            return False
        self.running.append(call.again())
        self.run.entered.append(call)
        return True

    def _next_call(self, path: str) -> ModuleCall | None:
        """Return the planned call of a module, or None if the plan expects another one."""
        plan = self.run.plan
        if plan is None or not self.fast:
            return None
        call = plan.entered[len(self.run.entered)]
        if call.path == path and call.depth == len(self.running):
            return call
        self.run.plan = None
        self._leave_plan()
        return None

    def key_of(self, path: str) -> str:
        """Return the key of a starting module call."""
        call = None if is_dynamo_compiling() else self._next_call(path)
        if call is not None:
            return call.key
        outer = self.running[-1]
        return f"{outer.key}/{path}#{outer.count(path)}"

    def _leave_plan(self) -> None:
        """Leave the plan: restore the call counts of the running modules, which the fast path does not maintain."""
        for call in self.running:
            call.planned, call.calls = None, self.run.counts(call)

    def call_other(self, caller: ModuleCall, func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function that is no site of the rule."""
        if not is_dynamo_compiling() and self.run.plan is None:
            if func in self.rule.opaque:
                self.note_unreachable(caller.path, f"{self.rule.opaque[func]} computes out of reach")
            elif _operator(func) in self.attached.operators:
                self.note_unreachable(caller.path, f"it calls {func}, as exported code does")
        return func(*args, **kwargs)

    def note_hidden(self, caller: ModuleCall, name: str) -> None:
        """Record a function of the rule that is called without gradients."""
        caller.hidden = (*caller.hidden, name)

    def record(self, caller: ModuleCall, name: str, x: Any, key: str = "") -> SiteCall:
        """Record a call that may be a site; in a recomputation, look it up."""
        key = key or f"{caller.key}:{name}#{caller.count(name + '()')}"
        if self.replayed is None:
            planned = self.run.plan
            site = self.run.record(key, caller.path, name, x.shape if isinstance(x, Tensor) else ())
            if planned is not self.run.plan:
                self._leave_plan()
            return site
        if key not in self.replayed:
            raise BackpassError(f"site {key!r} was not in the last whole call of the model: call the model again.")
        return self.replayed[key]

    def call_site(self, site: SiteCall, func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function by the decision for its site: plain, with the rule, or decided in the backward pass."""
        again = self.replayed is not None and site.kernel  # a recomputation saves what the first pass saved
        if site.selected is False and not again and (site.fixed or self.rule.acts_on_nodes):
            out = func(*args, **kwargs)
            if isinstance(out, Tensor):
                if not site.fixed:
                    site.node = out.grad_fn
                if self.run.plan is None:
                    self.left_plain.add(out.grad_fn)
            return out
        if not torch.is_grad_enabled() or (self.replayed is not None and site.hooked):
            return func(*args, **kwargs)
        if site.selected is None and torch_internals.forward_mode():
            self.run.decide_early(site)
            return self.call_site(site, func, args, kwargs)
        site.kernel = True
        outer = outer_interceptions()
        if not outer:
            if self.replayed is None:
                site.undecided = site.selected is None
            if not site.selected or site.undecided:  # a recomputation saves what the first pass saved
                return self.replace(func, args, kwargs, site)
            if site.fixed:
                return self.replace(func, args, kwargs, None)
            return self.replace_planned(func, args, kwargs, site)
        before = [len(mode.run.sites) for mode in outer]
        out = self.replace(func, args, kwargs, site)
        for mode, count in zip(outer, before, strict=True):
            for other in mode.run.sites[count:]:
                other.delegate = site
        return out

    def replace(self, func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any], site: Any) -> Any:
        """Call a function with the rule's backward.

        Args:
            func: the function.
            args: its arguments.
            kwargs: its keyword arguments.
            site: site queried in the backward pass; if it is inactive, other rules on the stack act. None: the rule
                acts.
        """
        if site is None:
            return self.rule.replace(func, args, kwargs)
        plain = func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            replaced = self.rule.replace(func, args, kwargs)
        return choose(plain, replaced, site)

    def replace_planned(
        self, func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any], site: Decision | None
    ) -> Any:
        """Call a function with the rule's backward where the plan predicts that the rule acts; see `replace`."""
        return self.replace(func, args, kwargs, site)

    def _traced(
        self, caller: ModuleCall, name: str | None, func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if name is None:
            return self.call_other(caller, func, args, kwargs)
        self.traced += 1
        key = f"{caller.key}:{name}#{caller.count(name + '()')}"
        if not self.attached.token or not self.attached.planned(key):
            return self.plain_in_graph(func, args, kwargs)
        return self.replace(func, args, kwargs, None)

    def plain_in_graph(self, func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function with its plain backward in compiled code, if possible as an operator that bypasses modes."""
        return func(*args, **kwargs)

    def enter(self, module: nn.Module, path: str, key: str, args: tuple[Any, ...], activation: bool) -> Any:
        """Record the start of a module call; return replaced arguments, or None."""
        call = ModuleCall(path, key, len(self.running))
        if len(self.running) > 0 and self.running[-1].plain:
            call.plain = True
        self.running.append(call)
        if not is_dynamo_compiling():
            call.grad_enabled = torch.is_grad_enabled()
            call.checkpoint = torch_internals.checkpoint_hooks()
            if self.replayed is None:
                self.run.entered.append(call)
        return None

    def leave(self, module: nn.Module, call: ModuleCall, output: Any) -> Any:
        """Record the end of a module call and return its output; None after an exception."""
        if call.hidden and output is not None and self.run.plan is None and not is_dynamo_compiling():
            self._name_hidden(call, output)
        return output

    def note_unreachable(self, path: str, reason: str) -> None:
        """Record a part of a module that the rule cannot reach."""
        reasons = self.run.unreachable.setdefault(path, [])
        if reason not in reasons:
            reasons.append(reason)

    def _name_hidden(self, call: ModuleCall, output: Any) -> None:
        for kind in torch_internals.custom_functions(output):
            if kind is torch.utils.checkpoint.CheckpointFunction:
                raise checkpointed_function(call.hidden[0], call.path)
            self.note_unreachable(call.path, f"the autograd function {kind.__name__} has its own backward")


def _operator(func: TorchFunction) -> str:
    """Return the name of a directly called operator such as ``torch.ops.aten.relu``; else ""."""
    if not isinstance(func, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return ""
    return func.__name__.partition(".")[0].rstrip("_")


def choose(plain: Tensor, replaced: Tensor, site: SiteCall) -> Any:
    """Return the common value of two tensors, with the gradient path that the site selects."""
    apply: Callable[..., Any] = _Choice.apply
    return apply(plain, replaced, site)


class _Choice(torch.autograd.Function):
    """(plain, replaced) -> their common value; backward passes the gradient to one of them."""

    @staticmethod
    def forward(ctx: Any, plain: Tensor, replaced: Tensor, site: SiteCall) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.site = site
        return replaced.data

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        return (None, grad, None) if ctx.site.active() else (grad, None, None)


def outer_interceptions() -> list[Interception]:
    """Return the interceptions that are further out on this thread's stack of modes than the calling one."""
    if not torch._C._len_torch_function_stack():
        return []
    return [mode for mode in torch_internals.function_modes() if isinstance(mode, Interception)]


def checkpointed_function(name: str, path: str) -> BackpassError:
    """Return the error for a checkpointed function, whose recomputation runs no module hook."""
    return BackpassError(
        f"{name!r} in module {path or '(model)'!r} runs inside a checkpointed function, and its recomputation would "
        "silently be plain backpropagation. Checkpoint a module instead of a function: put the code into an nn.Module "
        "and call checkpoint(that_module, x)."
    )
