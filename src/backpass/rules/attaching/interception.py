"""The one mechanism: while an attached module runs, its torch functions pass through a mode.

Hooks on the model and on every module below it keep the chain of module calls; the outermost of them pushes a
fresh `Interception` on the thread's stack of torch function modes and pops it when the call ends, also by an
exception. Module calls, functional calls, methods, in-place calls and re-used activation modules all arrive there.
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
from backpass.rules.attaching.override import TorchFunction
from backpass.rules.attaching.run import Planned, Run, SiteCall
from backpass.rules.torch_internals import saved_tensor_hooks

if TYPE_CHECKING:
    from backpass.rules.attaching.attached import Attached

__all__ = ["Interception", "ModuleCall", "checkpointed_function", "choose", "outer_interceptions"]


class ModuleCall:
    """One running call of a module.

    Attributes:
        path: of the module.
        key: the chain of calls that leads here.
        calls: how often each function and module below was called so far.
        plain: whether its calls are left alone.
        looks: whether all its calls are looked at, not only those of the rule's functions.
        x: its input, where it is one activation as a whole.
        hidden: functions of the rule that were called without gradients, as a custom autograd function does.
        origins: of the results of elementwise functions, where all calls are looked at; else None.
    """

    plain = False
    looks = False
    x: Tensor | None = None
    hidden: tuple[str, ...] = ()
    origins: Any = None

    def __init__(self, path: str, key: str) -> None:
        self.path = path
        self.key = key
        self.calls: dict[str, int] = {}
        if not is_dynamo_compiling():
            self.grad_enabled = torch.is_grad_enabled()
            self.checkpoint = torch_internals.checkpoint_hooks() if saved_tensor_hooks(True) else None

    def count(self, name: str) -> int:
        """Return how many calls of ``name`` came before this one."""
        before = self.calls.get(name, 0)
        self.calls[name] = before + 1
        return before


class Interception(TorchFunctionMode):
    """One call of an attached model: notes its sites and hands those that the rule selects to the rule.

    Attributes:
        follows: whether calls may be made as the plan says, without a `SiteCall` for each.
        unattended: whether the end of a module's call matters only where something was noted in it.
        watched: running modules that may be one activation as a whole.
        attached: the rule on the model.
        run: the sites of this call.
        running: the chain of running module calls, the outermost first.
        replayed: the calls of the last whole run by key, where a part of the model is called again by itself.
        traced: number of sites that compiled code has passed.
        handled: the exception that was being handled when the call began.
    """

    follows = False
    unattended = True
    watched: list[Any] | tuple[()] = ()

    def __init__(self, attached: Attached, run: Run, replayed: dict[str, SiteCall] | None = None) -> None:
        super().__init__()
        self.attached = attached
        self.rule: Any = attached.rule
        self.functions = self.rule.functions
        self.fast = self.follows and (self.rule.acts_on_nodes or not run.relative)
        self.run = run
        self.running: list[ModuleCall] = []
        self.replayed = replayed
        self.traced = 0
        self.handled = None if is_dynamo_compiling() else sys.exception()

    def __torch_function__(
        self, func: TorchFunction, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        caller = self.running[-1]
        if caller.plain:
            return func(*args, **kwargs)
        name = self.functions.get(func)
        if is_dynamo_compiling():
            return self._traced(caller, name, func, args, kwargs)
        if name is None:
            return self.other(caller, func, args, kwargs)
        if caller.grad_enabled != torch.is_grad_enabled():
            # No gradient reaches this call: it is made under no_grad, or in the forward of a custom autograd function.
            self.hide(caller, name)
            return func(*args, **kwargs)
        if saved_tensor_hooks(True) is not None:
            hooks = torch_internals.checkpoint_hooks()
            if hooks is not None and hooks is not caller.checkpoint:
                raise checkpointed_function(name, caller.path)
        x = args[0] if args else kwargs.get("input")
        run = self.run
        if self.fast and run.plan is not None and not caller.looks and self.replayed is None:
            planned = run.follow(caller.key, name, x.shape if isinstance(x, Tensor) else ())
            if planned is not None:
                return self._planned(planned, func, args, kwargs)
            self._recount()
        return self.at(self.meet(caller, name, x), func, args, kwargs)

    def _planned(self, planned: Planned, func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function as the plan says."""
        run = self.run
        if planned.selected:
            if torch._C._len_torch_function_stack() or not torch.is_grad_enabled():
                return self.at(run.last(), func, args, kwargs)
            return self.replace_planned(func, args, kwargs, run.last() if run.relative or run.inner else None)
        out = func(*args, **kwargs)
        if run.relative and planned.counted and isinstance(out, Tensor):
            run.keep_node(out.grad_fn)
        return out

    def _recount(self) -> None:
        """Count the calls of the running modules, which following a plan does not."""
        for call in self.running:
            for site in self.run.sites:
                name, _, number = site.key.removeprefix(f"{call.key}:").partition("#")
                if number.isdigit() and site.key == f"{call.key}:{name}#{number}":
                    call.calls[name + "()"] = int(number) + 1

    def other(self, caller: ModuleCall, func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function that is no site of the rule."""
        if not is_dynamo_compiling() and self.run.plan is None:
            if func in self.rule.opaque:
                self.note_unreachable(caller.path, f"{self.rule.opaque[func]} computes out of reach")
            elif _operator(func) in self.attached.operators:
                self.note_unreachable(caller.path, f"it calls {func}, as exported code does")
        return func(*args, **kwargs)

    def hide(self, caller: ModuleCall, name: str) -> None:
        """Note a function of the rule that is called without gradients."""
        caller.hidden = (*caller.hidden, name)

    def meet(self, caller: ModuleCall, name: str, x: Any, key: str = "") -> SiteCall:
        """Note a call that may be a site; in a recomputation, find it again."""
        key = key or f"{caller.key}:{name}#{caller.count(name + '()')}"
        if self.replayed is None:
            return self.run.meet(key, caller.path, name, x.shape if isinstance(x, Tensor) else ())
        if key not in self.replayed:
            raise BackpassError(f"site {key!r} was not in the last whole call of the model: call the model again.")
        return self.replayed[key]

    def at(self, site: SiteCall, func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function as its site is decided: plain, by the rule, or so that the backward pass decides."""
        again = self.replayed is not None and site.kernel  # a recomputation saves what the first pass saved
        if site.selected is False and not again and (site.fixed or self.rule.acts_on_nodes):
            out = func(*args, **kwargs)
            if not site.fixed and isinstance(out, Tensor):
                site.node = out.grad_fn
            return out
        if not torch.is_grad_enabled() or (self.replayed is not None and site.hooked):
            return func(*args, **kwargs)
        if site.selected is None and torch_internals.forward_mode():
            self.run.decide_early(site)
            return self.at(site, func, args, kwargs)
        site.kernel = True
        outer = outer_interceptions()
        if not outer:
            if self.replayed is None:
                site.undecided = site.selected is None
            if not site.selected or site.undecided:  # a recomputation saves what the first pass saved
                return self.replace(func, args, kwargs, site)
            return (
                self.replace(func, args, kwargs, None) if site.fixed else self.replace_planned(func, args, kwargs, site)
            )
        before = [len(mode.run.sites) for mode in outer]
        out = self.replace(func, args, kwargs, site)
        for mode, count in zip(outer, before, strict=True):
            for other in mode.run.sites[count:]:
                other.delegate = site
        return out

    def replace(self, func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any], site: SiteCall | None) -> Any:
        """Call a function with the rule's backward.

        Args:
            func: the function.
            args: its arguments.
            kwargs: its keyword arguments.
            site: asked in the backward pass whether the rule acts; where not, other rules on the stack do. None: the
                rule acts.
        """
        if site is None:
            return self.rule.replace(func, args, kwargs)
        plain = func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            replaced = self.rule.replace(func, args, kwargs)
        return choose(plain, replaced, site)

    def replace_planned(
        self, func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any], site: SiteCall | None
    ) -> Any:
        """Call a function with the rule's backward, where surely or most likely the rule acts; see `replace`."""
        return self.replace(func, args, kwargs, site)

    def _traced(
        self, caller: ModuleCall, name: str | None, func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if name is None:
            return self.other(caller, func, args, kwargs)
        self.traced += 1
        key = f"{caller.key}:{name}#{caller.count(name + '()')}"
        if not self.attached.token or not self.attached.planned(key):
            return self.plain_in_graph(func, args, kwargs)
        return self.replace(func, args, kwargs, None)

    def plain_in_graph(self, func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function of the rule plainly in compiled code, if possible as an operator that no mode sees."""
        return func(*args, **kwargs)

    def enter(self, module: nn.Module, path: str, key: str, args: tuple[Any, ...], activation: bool) -> Any:
        """Note that a call of a module begins; return other arguments for it, or None."""
        call = ModuleCall(path, key)
        if len(self.running) > 0 and self.running[-1].plain:
            call.plain = True
        self.running.append(call)
        if not is_dynamo_compiling() and self.replayed is None:
            self.run.entered.append((path, key))
        return None

    def leave(self, module: nn.Module, call: ModuleCall, output: Any) -> Any:
        """Note that a module's call ends, and return its output, which is None after an exception."""
        if call.hidden and output is not None and self.run.plan is None and not is_dynamo_compiling():
            self._name_hidden(call, output)
        return output

    def note_unreachable(self, path: str, reason: str) -> None:
        """Note what the rule cannot reach in a module."""
        reasons = self.run.unreachable.setdefault(path, [])
        if reason not in reasons:
            reasons.append(reason)

    def _name_hidden(self, call: ModuleCall, output: Any) -> None:
        for kind in torch_internals.custom_functions(output):
            if kind is torch.utils.checkpoint.CheckpointFunction:
                raise checkpointed_function(call.hidden[0], call.path)
            self.note_unreachable(call.path, f"the autograd function {kind.__name__} has its own backward")


def _operator(func: TorchFunction) -> str:
    """Return the name of an operator that is called past torch's functions, as ``torch.ops.aten.relu``; or ""."""
    if not isinstance(func, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return ""
    return func.__name__.partition(".")[0].rstrip("_")


def choose(plain: Tensor, replaced: Tensor, site: SiteCall) -> Any:
    """Return the common value of two tensors, with the gradient of the one that the site is decided for."""
    apply: Callable[..., Any] = _Choice.apply
    return apply(plain, replaced, site)


class _Choice(torch.autograd.Function):
    """(plain, replaced) -> their common value; backward gives the gradient to one of them."""

    @staticmethod
    def forward(ctx: Any, plain: Tensor, replaced: Tensor, site: SiteCall) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.site = site
        return replaced.data

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        return (None, grad, None) if ctx.site.active() else (grad, None, None)


def outer_interceptions() -> list[Interception]:
    """Return the interceptions that lie further out on this thread's stack of modes than the one that asks."""
    if not torch._C._len_torch_function_stack():
        return []
    return [mode for mode in torch_internals.function_modes() if isinstance(mode, Interception)]


def checkpointed_function(name: str, path: str) -> BackpassError:
    """Return the error of a checkpointed function: its recomputation runs no hook of a module."""
    return BackpassError(
        f"{name!r} in module {path or '(model)'!r} runs inside a checkpointed function, and its recomputation would "
        "silently be plain backpropagation. Checkpoint a module instead of a function: put the code into an nn.Module "
        "and call checkpoint(that_module, x)."
    )
