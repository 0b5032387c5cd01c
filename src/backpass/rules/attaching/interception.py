"""The one mechanism: while an attached module runs, its torch functions pass through a mode.

Hooks on the model and on every module below it keep the chain of module calls; the outermost of them pushes a
fresh `Interception` on the thread's stack of torch function modes and pops it when the call ends, also by an
exception. Module calls, functional calls, methods, in-place calls and re-used activation modules all arrive there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.overrides import TorchFunctionMode

from backpass.errors import BackpassError
from backpass.rules.attaching.dynamo import outside_compiled_frames
from backpass.rules.attaching.numbering import Numbering, resolve, resolve_while_tracing, verify_while_tracing
from backpass.rules.attaching.redefinition import TorchFunction
from backpass.rules.sites import Seen, Site

__all__ = ["Intercept", "Interception", "ModuleCall", "ModuleCalls", "interceptions_aside", "pop_modes"]


class ModuleCall:
    """One running call of a module: its path, the chain of calls above it, and what it has called so far."""

    __slots__ = ("calls", "grad_enabled", "key", "path", "saved_tensor_hooks")

    def __init__(self, path: str, key: str) -> None:
        self.path = path
        self.key = key
        self.calls: dict[str, int] = {}
        if not is_dynamo_compiling():
            self.grad_enabled = torch.is_grad_enabled()
            self.saved_tensor_hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)

    def count(self, name: str) -> int:
        """How many calls of ``name`` came before this one."""
        before = self.calls.get(name, 0)
        self.calls[name] = before + 1
        return before


class Interception(TorchFunctionMode):
    """One call of an attached model: numbers its sites and hands those that the rule selects to the rule.

    Attributes:
        seen: what was noted of the sites, as plain tuples because a compiled region can rebuild those.
        taken: the indices of the sites that the rule re-defined.
        yielded: how many selected sites a rule further in re-defined.
    """

    def __init__(self, numbering: Numbering, first: int, stop: int, whole: bool) -> None:
        super().__init__()
        self.numbering = numbering
        self.first = first
        self.stop = stop
        self.whole = whole
        self.running: list[ModuleCall] = []
        self.seen: list[Seen] = []
        self.taken: list[int] = []
        self.yielded = 0
        self.entered: list[tuple[str, str]] = []

    def __torch_function__(
        self,
        func: TorchFunction,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = self.numbering.rule.functions.get(func)
        if name is None:
            return func(*args, **kwargs)
        caller = self.running[-1]
        index = self.number(caller, name, args, kwargs)
        if not self.accepts(index, caller, name):
            return func(*args, **kwargs)
        self.taken.append(index)
        if not is_dynamo_compiling():
            self._refuse_checkpointed_function(caller, name)
        if torch._C._len_torch_function_stack():
            for outer in _interceptions():
                outer.yield_to_inner(func, args, kwargs)
        return self.replace(func, args, kwargs)

    def replace(self, func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The selected call with the rule's backward."""
        return self.numbering.rule.replace(func, args, kwargs)

    def enter(self, module: nn.Module, path: str, key: str, args: tuple[Any, ...]) -> None:
        """Note that a call of a module begins."""
        self.running.append(ModuleCall(path, key))
        self.entered.append((path, key))

    def leave(self, call: ModuleCall, finished: bool) -> None:
        """Note that a module's call ends, ``finished`` unless by an exception."""

    def number(self, caller: ModuleCall, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """Note one call as a site; its index."""
        if not self.whole:
            return self.numbering.site_at(f"{caller.key}:{name}#{caller.count(name + '()')}").index
        x = args[0] if args else kwargs.get("input")
        self.seen.append((caller.path, caller.key, name, x.shape if isinstance(x, Tensor) else ()))
        return len(self.seen) - 1

    def accepts(self, index: int, caller: ModuleCall, name: str) -> bool:
        """Whether the rule selects this site."""
        if not self.first <= index < self.stop:
            return False
        where = self.numbering.rule.where
        if where is None:
            return True
        if not self.whole:
            return bool(where(self.numbering.seen[index]))
        before = [seen for seen in self.seen[:-1] if seen[0] == caller.path and seen[2] == name]
        return bool(where(Site(index, caller.path, name, len(before), tuple(self.seen[-1][3]))))

    def yield_to_inner(self, func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Number a call that a rule further in re-defines: the numbers stay those of the model."""
        name = self.numbering.rule.functions.get(func)
        if name is not None:
            caller = self.running[-1]
            self.yielded += self.accepts(self.number(caller, name, args, kwargs), caller, name)

    def _refuse_checkpointed_function(self, inner: ModuleCall, name: str) -> None:
        """A recomputation calls the checkpointed function, not the module around it: no hook would run then."""
        if inner.grad_enabled != torch.is_grad_enabled():
            checkpointed = _called_from_checkpoint()
        else:
            top = torch._C._autograd._top_saved_tensors_default_hooks(True)
            checkpointed = (
                top is not None and top != inner.saved_tensor_hooks and top[0].__module__ == "torch.utils.checkpoint"
            )
        if checkpointed:
            raise BackpassError(
                f"{name!r} in module {inner.path or '(model)'!r} runs inside a checkpointed function, and its "
                "recomputation would silently be plain backpropagation. Checkpoint a module instead of a function: "
                "put the code into an nn.Module and call checkpoint(that_module, x)."
            )


def _called_from_checkpoint() -> bool:
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            return True
    return False


def _interceptions() -> list[Interception]:
    """Those running in this thread, the innermost first."""
    depths = range(torch._C._len_torch_function_stack() - 1, -1, -1)
    modes = [torch._C._get_function_stack_at(depth) for depth in depths]
    return [mode for mode in modes if isinstance(mode, Interception)]


NOTHING: dict[str, Any] = {}

Intercept = Callable[[Numbering, int, int, bool], Interception]


class ModuleCalls:
    """The pair of hooks of one module in an attached model."""

    def __init__(self, numbering: Numbering, intercept: Intercept, path: str) -> None:
        self.numbering = numbering
        self.intercept = intercept
        self.path = path

    @outside_compiled_frames
    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] = NOTHING) -> None:
        """Forward pre-hook: note the call, and begin the interception where this is the outermost one."""
        mode = self._current()
        if mode is not None and not self.path and not is_dynamo_compiling() and not _calls_itself(module):
            # Ctrl-C cut a call short: PyTorch runs no hook then.
            pop_modes(self.numbering)
            mode = None
        if mode is not None:
            outer = mode.running[-1]
            mode.enter(module, self.path, f"{outer.key}/{self.path}#{outer.count(self.path)}", args)
        else:
            torch._C._push_on_torch_function_stack(self._begin(module, args, kwargs))

    @outside_compiled_frames
    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook, run after an exception too: end what `enter` began, and nothing else."""
        mode = self._current()
        # Where another pre-hook failed before ours, there is nothing of this module to end.
        if mode is None or mode.running[-1].path != self.path:
            return
        finished = output is not None  # a call that an exception ended has no output
        call = mode.running.pop()
        if not mode.running:
            torch._C._pop_torch_function_stack()
        mode.leave(call, finished)
        if not mode.running and mode.whole and finished:
            if is_dynamo_compiling():
                self.numbering.last_call = (mode.seen, mode.taken)
                verify_while_tracing(self.numbering.token, len(mode.seen), len(mode.taken) + mode.yielded)
            else:
                self.numbering.record(mode.seen, mode.taken, len(mode.taken) + mode.yielded, mode.entered)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Interception:
        intercept: Intercept = self.intercept
        if self.path:
            first, stop, key = self.numbering.resume(self.path)
        elif self.numbering.is_probing:
            first, stop, key, intercept = 0, 0, "", Interception
        else:
            resolve_now = resolve_while_tracing if is_dynamo_compiling() else resolve
            (first, stop), key = resolve_now(self.numbering.token, module.training, *args, **kwargs), ""
        mode = intercept(self.numbering, first, stop, not self.path)
        mode.enter(module, self.path, key, args)
        return mode

    def _current(self) -> Interception | None:
        depth = torch._C._len_torch_function_stack()
        while depth:  # mostly the innermost one
            depth -= 1
            mode = torch._C._get_function_stack_at(depth)
            if isinstance(mode, Interception) and mode.numbering is self.numbering:
                return mode
        return None


def _calls_itself(module: nn.Module) -> bool:
    """Whether a call of this module is really running above the one that begins now."""
    frame, running = sys._getframe(1), 0
    while frame.f_back is not None:
        frame = frame.f_back
        running += frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals.get("self") is module
    return running > 1


def pop_modes(numbering: Numbering) -> None:
    """Take the interceptions of ``numbering`` off this thread's stack of modes, wherever they lie."""
    for mode in _popped():
        if not (isinstance(mode, Interception) and mode.numbering is numbering):
            torch._C._push_on_torch_function_stack(mode)


@contextmanager
def interceptions_aside() -> Iterator[None]:
    """Inside, no interception is on this thread's stack of modes: a call of a model is not part of one that runs."""
    stack = _popped()
    for mode in stack:
        if not isinstance(mode, Interception):
            torch._C._push_on_torch_function_stack(mode)
    try:
        yield
    finally:
        _popped()
        for mode in stack:
            torch._C._push_on_torch_function_stack(mode)


def _popped() -> list[Any]:
    """This thread's modes, the outermost first, taken off their stack."""
    return [torch._C._pop_torch_function_stack() for _ in range(torch._C._len_torch_function_stack())][::-1]
