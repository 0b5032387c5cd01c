"""Running a model without a lasting effect on it."""

from __future__ import annotations

import random
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.nn.parameter import is_lazy

from backpass.errors import BackpassError

__all__ = ["preserved"]


@contextmanager
def preserved(
    model: nn.Module, *, training: bool | None = False, grad: bool | None = True, graph: bool = False
) -> Iterator[None]:
    """Restore the model and the random number generators at the end, also after an exception.

    Restored are: the training flag of every module; buffers and plain tensor attributes, which tensor they are and
    its values; parameters' identity, ``.grad`` and ``requires_grad``; submodules; the generators of the CPU, of the
    model's devices, of Python and NumPy, and those that modules hold; grad and inference mode. Hooks that were added
    are removed. Values of parameters are not restored. Autograd graphs from before stay valid, even if they saved a
    buffer that was written to.

    One thread at a time is inside for a module or a parameter; others wait. The same thread may enter again.

    Args:
        model: any module, compiled, scripted or wrapped as well.
        training: flag that every module has inside; None keeps their flags.
        grad: whether gradients are recorded inside, outside of inference mode; None keeps the caller's mode.
        graph: whether a graph that is recorded inside is differentiated after the end. The model then works on copies
            of its buffers; otherwise such a graph may find that its buffers have been restored.

    Raises:
        BackpassError: ``model`` is no module, or has lazy modules without a shape.
    """
    if not isinstance(model, nn.Module):
        raise BackpassError(
            f"model must be a torch.nn.Module; got {type(model).__name__}. Wrap a function in a Module."
        )
    modules = list(model.modules())
    parameters = list(model.parameters())
    if any(is_lazy(tensor) for tensor in (*parameters, *model.buffers())):
        raise BackpassError("the model has lazy modules without a shape: call it once on a batch of data first.")
    with ExitStack() as stack:
        stack.enter_context(_locked([*modules, *parameters]))
        stack.enter_context(_generators(model, modules))
        sharded = any(base.__name__ == "FSDPModule" for kind in set(map(type, modules)) for base in kind.__mro__)
        stack.callback(_restore, [_Module(module, sharded=sharded) for module in modules])
        stack.enter_context(_tensors(modules, copies=graph))
        stack.callback(_restore, [_Parameter(parameter) for parameter in parameters if parameter.is_leaf])
        if training is not None:
            for module in modules:
                # train() may be overridden, for instance to keep a BatchNorm frozen.
                if getattr(module, "training", training) != training:  # a frozen script module has no flag
                    module.training = training
        stack.enter_context(nullcontext() if grad is None else torch.inference_mode(False))
        stack.enter_context(nullcontext() if grad is None else torch.set_grad_enabled(grad))
        yield


_NONE: frozenset[Any] = frozenset()


def _restore(saved: list[Any]) -> None:
    for one in saved:
        one.restore()


class _Module:
    """Flag, hooks, and the names under which a module holds parameters, buffers and submodules."""

    def __init__(self, module: nn.Module, *, sharded: bool) -> None:
        self.module, self.training = module, getattr(module, "training", None)
        own = vars(module)
        self.own = dict(own)
        hooks = [one for name, one in own.items() if "_hooks" in name and isinstance(one, dict)]
        self.hooks = [(one, frozenset(one) if one else _NONE) for one in hooks]
        # A scripted module keeps its members in C++, where none can be added. Under FSDP2, parameters come and go.
        tables = [own.get(name) for name in ("_buffers", "_modules", *(() if sharded else ("_parameters",)))]
        self.tables = [(table, dict(table)) for table in tables if isinstance(table, dict)]

    def restore(self) -> None:
        if self.training is not None and self.module.training != self.training:
            self.module.training = self.training
        for hooks, before in self.hooks:
            # A hook that was removed meanwhile, for instance by a finaliser, stays removed.
            if hooks and hooks.keys() != before:
                for key in set(hooks) - before:
                    del hooks[key]
        for table, members in self.tables:
            if len(table) != len(members) or any(table.get(name) is not one for name, one in members.items()):
                table.clear()
                table.update(members)
        # An attribute that became a member, as in `if self.head is None: self.head = Linear(...)`, was removed here.
        for name in self.own.keys() - vars(self.module).keys():
            vars(self.module)[name] = self.own[name]


class _Parameter:
    """Gradient and ``requires_grad`` of a parameter; inside, it starts without a gradient."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter, self.grad, self.requires_grad = parameter, parameter.grad, parameter.requires_grad
        if self.grad is not None:
            parameter.grad = None

    def restore(self) -> None:
        if self.parameter.grad is not self.grad:
            self.parameter.grad = self.grad
        if self.parameter.requires_grad != self.requires_grad:
            self.parameter.requires_grad_(self.requires_grad)


_NO_TENSORS = (bool, int, str, tuple, dict, OrderedDict, set, type(None))  # most attributes, told apart quickly


@contextmanager
def _tensors(modules: list[nn.Module], *, copies: bool) -> Iterator[None]:
    """Restore buffers and plain tensor attributes by value; inside, they are copies if so wanted."""
    places: list[tuple[Any, str, Tensor]] = []
    for module in modules:
        for table in (module._buffers, vars(module)):
            for name, one in table.items():
                if type(one) not in _NO_TENSORS and isinstance(one, Tensor) and one.is_leaf:
                    places.append((table, name, one))
    # A tensor that several modules share is one tensor inside too. Batch norm does not count its writes in `_version`,
    # so that values are compared.
    with torch.inference_mode(False):
        saved = {id(one): (one, one.clone()) for _, _, one in places if not one.requires_grad}
    if copies:
        for table, name, one in places:
            if id(one) in saved:
                table[name] = saved[id(one)][1]
    counted = tuple(one for one, _ in saved.values() if not one.is_inference())
    with nullcontext() if copies else _unsafe_preserve_version_counter(counted):
        try:
            yield
        finally:
            for table, name, one in places:
                if not isinstance(table, dict) or table.get(name) is not one:
                    table[name] = one
            if not copies:
                for one, value in saved.values():
                    _write_back(one, value)


def _write_back(tensor: Tensor, value: Tensor) -> None:
    """Copy the value into the tensor where they differ; nan differs from itself, which does no harm."""
    same = tensor.shape == value.shape and tensor.layout == torch.strided
    if tensor.is_meta or (same and torch.equal(tensor, value)):
        return
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        if tensor.shape != value.shape:
            tensor.resize_(value.shape)
        tensor.copy_(value)


@contextmanager
def _generators(model: nn.Module, modules: list[nn.Module]) -> Iterator[None]:
    """Restore the states of all generators within reach."""
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        devices.add(torch.device("cuda", torch.cuda.current_device()))
    indices: dict[str, list[int | None]] = {"cuda": []}  # the CPU's generator is always restored
    for device in devices:
        if device.type in ("cuda", "xpu"):
            indices.setdefault(device.type, []).append(device.index)
    own = {id(one): one for module in modules for one in vars(module).values() if type(one) is torch.Generator}
    undo: list[tuple[Callable[[Any], object], Any]] = [(one.set_state, one.get_state()) for one in own.values()]
    undo.append((random.setstate, random.getstate()))
    if "numpy" in sys.modules:
        numpy_random = sys.modules["numpy"].random
        undo.append((numpy_random.set_state, numpy_random.get_state()))
    with ExitStack() as stack:
        for kind, some in indices.items():
            stack.enter_context(torch.random.fork_rng(devices=some, device_type=kind))
        try:
            yield
        finally:
            for put, state in undo:
                put(state)


_changed = threading.Condition()
_held: dict[int, tuple[int, int]] = {}  # by id of a module or parameter: the thread inside, and how many times


@contextmanager
def _locked(objects: list[Any]) -> Iterator[None]:
    """Wait until no other thread holds any of the objects, then hold all of them at once.

    All at once, so that two models that share a part cannot wait for each other.
    """
    me = threading.get_ident()
    free = (me, 0)
    with _changed:
        _changed.wait_for(lambda: all(_held.get(id(one), free)[0] == me for one in objects))
        for one in objects:
            _held[id(one)] = (me, _held.get(id(one), free)[1] + 1)
    try:
        yield
    finally:
        with _changed:
            for one in objects:
                count = _held[id(one)][1] - 1
                if count:
                    _held[id(one)] = (me, count)
                else:
                    del _held[id(one)]
            _changed.notify_all()
