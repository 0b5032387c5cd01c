"""The one mechanism: while an attached module runs, its torch functions pass through a mode.

Hooks on the model and on every module below it keep the chain of module calls; the outermost of them pushes a
fresh `Interception` on the thread's stack of torch function modes and pops it when the call ends, also by an
exception. Module calls, functional calls, methods, in-place calls and re-used activation modules all arrive there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from backpass.errors import BackpassError
from backpass.rules.sites import Site

if TYPE_CHECKING:
    from backpass.rules.rule import Attached

__all__ = ["Interception", "ModuleCalls", "guard_module_hooks", "pop_modes"]

TorchFunction = Callable[..., Any]
SiteFields = tuple[int, str, str, int, tuple[int, ...], str]
Function = TypeVar("Function", bound=Callable[..., Any])
LastCall = tuple[list[SiteFields], list[int]]


class ModuleCall:
    """One running call of a module: its path, the chain of calls above it, and what it has called so far."""

    __slots__ = ("calls", "grad_enabled", "key", "path", "saved_tensor_hooks")

    def __init__(self, path: str, key: str) -> None:
        self.path = path
        self.key = key
        self.calls: dict[str, int] = {}
        if not torch.compiler.is_dynamo_compiling():
            self.grad_enabled = torch.is_grad_enabled()
            self.saved_tensor_hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)

    def count(self, name: str) -> int:
        """How many calls of ``name`` came before this one."""
        before = self.calls.get(name, 0)
        self.calls[name] = before + 1
        return before


class Interception(TorchFunctionMode):
    """One call of an attached model: numbers its sites and hands those that the rule selects to the rule.

    ``seen`` and ``taken`` hold plain tuples, the fields of `Site`, because a compiled region can rebuild those.
    """

    def __init__(self, attached: Attached, first: int, stop: int, whole: bool) -> None:
        super().__init__()
        self.attached = attached
        self.first = first
        self.stop = stop
        self.whole = whole
        self.running: list[ModuleCall] = []
        self.calls: dict[str, int] = {}
        self.seen: list[SiteFields] = []
        self.taken: list[int] = []
        self.calls_of: dict[str, list[str]] = {}

    def __torch_function__(
        self,
        func: TorchFunction,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        rule = self.attached.rule
        name = rule.functions.get(func)
        if name is None:
            return func(*args, **(kwargs or {}))
        if not self.take(name, args, kwargs or {}):
            return func(*args, **(kwargs or {}))
        return rule.replace(func, args, kwargs or {})

    def enter(self, module: nn.Module, path: str, key: str, args: tuple[Any, ...]) -> None:
        """Note that a call of a module begins."""
        self.running.append(ModuleCall(path, key))
        if not torch.compiler.is_dynamo_compiling():
            self.calls_of.setdefault(path, []).append(key)

    def leave(self, call: ModuleCall, finished: bool) -> None:
        """Note that a module's call ends, ``finished`` unless by an exception."""

    def take(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Number one call as a site; whether the rule selects it."""
        inner = self.running[-1]
        key = f"{inner.key}:{name}#{inner.count(name + '()')}"
        index = len(self.seen) if self.whole else self.attached.index_of(key)
        place = f"{inner.path}:{name}"
        call = self.calls.get(place, 0)
        self.calls[place] = call + 1
        x = args[0] if args else kwargs.get("input")
        shape = tuple(x.shape) if isinstance(x, Tensor) else ()
        fields = (index, inner.path, name, call, shape, key)
        self.seen.append(fields)
        taken = self.selects(index, fields)
        if taken:
            self.taken.append(index)
            if not torch.compiler.is_dynamo_compiling():
                self._refuse_checkpointed_function(inner, name)
        return taken

    def selects(self, index: int, fields: SiteFields) -> bool:
        """Whether the rule acts on this site."""
        return self.first <= index < self.stop and self.attached.rule.selects(Site(*fields))

    def _refuse_checkpointed_function(self, inner: ModuleCall, name: str) -> None:
        """A recomputation calls the checkpointed function, not the module around it: no hook would run then."""
        if inner.grad_enabled != torch.is_grad_enabled():
            checkpointed = _called_from_checkpoint()
        else:
            top = torch._C._autograd._top_saved_tensors_default_hooks(True)
            checkpointed = (
                top is not None
                and top != inner.saved_tensor_hooks
                and top[0].__module__ == "torch.utils.checkpoint"
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


class ModuleCalls:
    """The pair of hooks of one module in an attached model."""

    def __init__(self, attached: Attached, path: str) -> None:
        self.attached = attached
        self.path = path

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: note the call, and begin the interception where this is the outermost one."""
        mode = self._current()
        if (
            mode is not None
            and self.path == ""
            and not torch.compiler.is_dynamo_compiling()
            and not _calls_itself(module)
        ):
            # A call that Ctrl-C cut short: PyTorch runs no hook then.
            pop_modes(self.attached)
            mode = None
        if mode is None:
            if not self.attached.idle:
                torch._C._push_on_torch_function_stack(self._begin(module, args, kwargs))  # type: ignore[attr-defined]
        else:
            outer = mode.running[-1]
            mode.enter(module, self.path, f"{outer.key}/{self.path}#{outer.count(self.path)}", args)

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook, run after an exception too: end what `enter` began, and nothing else."""
        mode = self._current()
        # Where another pre-hook failed before ours, there is nothing of this module to end.
        if mode is None or mode.running[-1].path != self.path:
            return
        call = mode.running.pop()
        if not mode.running:
            torch._C._pop_torch_function_stack()  # type: ignore[attr-defined]
        mode.leave(call, finished=output is not None)  # a call that an exception ended has no output
        if not mode.running:
            if torch.compiler.is_dynamo_compiling():
                self.attached.last_call = (mode.seen, mode.taken)
                _verify_while_tracing(self.attached.token, len(mode.seen), len(mode.taken))
            elif mode.whole and output is not None:
                self.attached.record(mode)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Interception:
        attached = self.attached
        if self.path:
            first, stop, key = attached.resume(self.path)
        else:
            resolve = _resolve_while_tracing if torch.compiler.is_dynamo_compiling() else _resolve
            (first, stop), key = resolve(attached.token, *args, **kwargs), ""
        mode = attached.rule.intercept(attached, first, stop, whole=not self.path)
        mode.enter(module, self.path, key, args)
        return mode

    def _current(self) -> Interception | None:
        for depth in range(torch._C._len_torch_function_stack() - 1, -1, -1):
            mode = torch._C._get_function_stack_at(depth)
            if isinstance(mode, Interception) and mode.attached is self.attached:
                return mode
        return None


def _calls_itself(module: nn.Module) -> bool:
    """Whether a call of this module is really running above the one that begins now."""
    frame, running = sys._getframe(1), 0
    while frame.f_back is not None:
        frame = frame.f_back
        running += frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals.get("self") is module
    return running > 1


def pop_modes(attached: Attached) -> None:
    """Take the interceptions of ``attached`` off this thread's stack of modes, wherever they lie."""
    stack = [torch._C._pop_torch_function_stack() for _ in range(torch._C._len_torch_function_stack())]  # type: ignore[attr-defined]
    for mode in reversed(stack):
        if not (isinstance(mode, Interception) and mode.attached is attached):
            torch._C._push_on_torch_function_stack(mode)  # type: ignore[attr-defined]


_BY_TOKEN: WeakValueDictionary[str, Attached] = WeakValueDictionary()


def announce(attached: Attached) -> None:
    """Make ``attached`` known to a trace of its model."""
    _BY_TOKEN[attached.token] = attached


def _resolve(token: str, *args: Any, **kwargs: Any) -> tuple[int, int]:
    return _BY_TOKEN[token].resolve(args, kwargs)


def _constant_while_tracing(function: Function) -> Function:
    """Dynamo runs the function while it traces; the graph takes the answer as a constant."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant_while_tracing
def _resolve_while_tracing(token: str, *args: Any, **kwargs: Any) -> tuple[int, int]:
    return _resolve(token, *args, **kwargs)


@_constant_while_tracing
def _verify_while_tracing(token: str, seen: int, taken: int) -> None:
    _BY_TOKEN[token].verify(seen, taken)


def guard_module_hooks() -> None:
    """Let compiled code notice that module hooks came or went.

    By default Dynamo does not look at empty hook dictionaries again, so code compiled before a rule was attached, or
    after it was removed, would go on without it. Code compiled under the default is dropped once.
    """
    if "torch._dynamo" not in sys.modules:
        return
    from torch._dynamo import config, reset

    if config.skip_nnmodule_hook_guards:
        config.skip_nnmodule_hook_guards = False
        reset()


def _run_outside_compiled_frames(*functions: Callable[..., Any]) -> None:
    """Dynamo may inline these functions, but must not compile them as frames of their own.

    The hooks of a compiled model's outermost module run outside the graph; they push and pop modes, which a frame
    compiled by itself cannot do.
    """
    frames = torch._C._dynamo.eval_frame
    skip = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.SKIP)
    for function in functions:
        frames.set_code_exec_strategy(function.__code__, skip)


_run_outside_compiled_frames(ModuleCalls.enter, ModuleCalls.leave)
