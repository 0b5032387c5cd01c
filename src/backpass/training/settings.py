"""Everything a training run is told, and what cannot be meant."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from backpass.errors import BackpassError, UnknownNameError
from backpass.numbers import is_number, is_whole
from backpass.rules import Rule, unwrap
from backpass.training.averaging import Average
from backpass.training.batches import Prepare, to_unit_interval
from backpass.training.fingerprint import describe, describe_model, describe_optimizer
from backpass.training.measuring import Measuring
from backpass.training.objective import CrossEntropy, Objective
from backpass.training.progress import Progress
from backpass.training.sources import Data, Source

__all__ = ["Settings"]

_COUNTS = ("epochs", "batch_size", "accumulate", "log_every", "evaluate_every", "robust_every", "keep")
_SWITCHES = ("drop_last", "normalize_gradient", "tensorboard")
_CALLED = {"prepare": False, "prepare_evaluation": True, "robust": True, "on_progress": True}  # whether it may be None


@dataclass(frozen=True, eq=False)
class Settings:
    """The settings of `Trainer`, which says what each one means.

    Raises:
        BackpassError: a setting is out of its range, or two do not go together.
    """

    model: nn.Module
    optimizer: Optimizer
    data: Data = field(repr=False)
    _: KW_ONLY
    epochs: int
    batch_size: int
    objective: Objective = field(default_factory=CrossEntropy)
    rules: Sequence[Rule] = ()
    scheduler: LRScheduler | None = None
    step_scheduler: Literal["step", "epoch"] = "epoch"
    accumulate: int = 1
    drop_last: bool = True
    prepare: Prepare = to_unit_interval
    seed: int = 0
    dtype: torch.dtype | None = None
    compile: bool | Mapping[str, Any] = False
    clip_norm: float | None = None
    normalize_gradient: bool = False
    average: str | None = None
    diverged_above: float | None = 10.0
    evaluation: Data | None = field(default=None, repr=False)
    evaluate_every: int = 1
    prepare_evaluation: Callable[[Tensor], Tensor] | None = None
    robust: Callable[[nn.Module, Tensor, Tensor], Mapping[str, float]] | None = None
    robust_every: int = 1
    folder: str | Path | None = None
    checkpoint_every: int | None = None
    keep: int = 2
    log_every: int = 50
    tensorboard: bool = False
    on_progress: Callable[[Progress], None] | None = None
    source: Source = field(init=False, repr=False)
    evaluated: Source | None = field(init=False, repr=False)
    averaged: Average | None = field(init=False, repr=False)
    description: dict[str, Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._check_kinds()
        self._check_numbers()
        self._check_objective()
        self._check_optimizer()
        object.__setattr__(self, "source", Source(self.data))
        object.__setattr__(self, "evaluated", None if self.evaluation is None else Source(self.evaluation))
        if self.robust is not None and self.evaluated is not None and self.evaluated.tensors is None:
            raise BackpassError("robust needs the evaluation set as tensors: evaluation=(x, y).")
        object.__setattr__(self, "averaged", None if self.average is None else Average.parse(self.average))
        # Now, before a run moves rates and weights.
        object.__setattr__(self, "description", self._describe())

    @property
    def device(self) -> torch.device:
        """Of the model."""
        return next(self.model.parameters()).device

    @property
    def path(self) -> Path | None:
        """The run's folder."""
        return None if self.folder is None else Path(self.folder)

    def _check_kinds(self) -> None:
        """What is not even of the kind that is meant."""
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise BackpassError(f"{name} is True or False, got {getattr(self, name)!r}.")
        for name, optional in _CALLED.items():
            value = getattr(self, name)
            if not (callable(value) or (optional and value is None)):
                raise BackpassError(f"{name} is a function{' or None' if optional else ''}, got {value!r}.")
        if not isinstance(self.compile, bool | Mapping):
            raise BackpassError(f"compile is True, False or a dict of torch.compile's arguments, got {self.compile!r}.")
        if not is_whole(self.seed, -(2**63)):
            raise BackpassError(f"seed is a whole number of 64 bits, got {self.seed!r}.")
        if not isinstance(self.folder, str | Path | None):
            raise BackpassError(f"folder is a path, or None to write nothing; got {self.folder!r}.")
        if not isinstance(self.optimizer, Optimizer):
            raise BackpassError(
                f"optimizer is one of torch's, such as torch.optim.SGD(model.parameters(), lr=0.1); got "
                f"{self.optimizer!r}."
            )
        if self.scheduler is not None and not all(
            callable(getattr(self.scheduler, name, None)) for name in ("step", "state_dict", "load_state_dict")
        ):
            raise BackpassError(f"scheduler is one of torch's, or has its methods, or None; got {self.scheduler!r}.")

    def _check_numbers(self) -> None:
        for name in (*_COUNTS, "checkpoint_every"):
            value = getattr(self, name)
            if value is None and name == "checkpoint_every":
                continue
            if not is_whole(value, 1):
                raise BackpassError(f"{name} is an int of at least 1, got {value!r}.")
        for name, above in (("clip_norm", 0.0), ("diverged_above", 1.0)):
            value = getattr(self, name)
            if value is not None and not (is_number(value) and value > above):
                raise BackpassError(f"{name} is a finite number above {above:g}, or None; got {value!r}.")
        if self.step_scheduler not in ("step", "epoch"):
            raise UnknownNameError("step_scheduler", str(self.step_scheduler), ("step", "epoch"))
        if self.accumulate > self.batch_size:
            raise BackpassError(
                f"accumulate={self.accumulate} parts of a batch_size={self.batch_size}: batch_size is the number of "
                "samples per optimizer step, which accumulate cuts into parts; it must be at least as large."
            )
        if self.normalize_gradient and self.clip_norm is not None:
            raise BackpassError("normalize_gradient gives every gradient the norm 1: leave out clip_norm.")
        if self.dtype not in (None, torch.bfloat16, torch.float16):
            raise BackpassError(f"dtype of autocast is torch.bfloat16, torch.float16 or None, got {self.dtype!r}.")
        if self.robust is not None and self.evaluation is None:
            raise BackpassError("robust is measured on the evaluation set: give evaluation=(x, y) too.")
        if isinstance(self.scheduler, ReduceLROnPlateau) and self.step_scheduler == "step":
            raise BackpassError('ReduceLROnPlateau looks at the loss of an epoch: leave step_scheduler="epoch".')
        if self.folder is None and (self.checkpoint_every is not None or self.tensorboard):
            raise BackpassError("checkpoints and logs need a place: give folder=... too.")
        if not isinstance(self.rules, Sequence) or not all(isinstance(rule, Rule) for rule in self.rules):
            raise BackpassError(f"rules is a sequence of rules, such as (LinBP(start=-2),); got {self.rules!r}.")

    def _check_objective(self) -> None:
        called = self.objective.forward if isinstance(self.objective, nn.Module) else self.objective
        try:
            inspect.signature(called).bind(self.model, None, None)
        except TypeError as error:
            raise BackpassError(
                "an objective is called as objective(model, batch, plain); of a loss of (output, y), one number per "
                f"sample, PerSample(loss) makes one. {self.objective!r}: {error}."
            ) from error

    def _check_optimizer(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise BackpassError(f"model is an nn.Module, got {type(self.model).__name__}.")
        parameters = {id(p) for p in self.model.parameters()}
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        strange = sum(id(p) not in parameters for p in held)
        if strange:
            raise BackpassError(
                f"{strange} of the {len(held)} tensors that the optimizer holds are no parameters of the model: make "
                "the optimizer from model.parameters(), after the model was moved or copied."
            )
        if not any(p.requires_grad for p in held):
            raise BackpassError("all parameters of the optimizer are frozen: requires_grad_() those to be learned.")
        if self.device.type == "meta":
            raise BackpassError("the model is on the device meta, which holds no numbers: move it with to_empty().")
        if isinstance(self.optimizer, LBFGS):
            raise BackpassError("LBFGS calls the objective several times a step, which the trainer does not do.")
        if getattr(self.scheduler, "optimizer", self.optimizer) is not self.optimizer:
            raise BackpassError("the scheduler is of another optimizer: make it from the one that the trainer gets.")
        if isinstance(self.scheduler, Measuring) and self.accumulate > 1:
            raise BackpassError(
                "a scheduler that measures on halves of the batch needs all of it: use accumulate=1, "
                "or a loop of your own."
            )
        if isinstance(self.scheduler, Measuring) and self.step_scheduler != "step":
            raise BackpassError(
                'a scheduler that measures steps is stepped after each: give step_scheduler="step" too.'
            )
        if self.dtype == torch.float16 and self.device.type != "cuda":
            raise BackpassError("float16 is for CUDA; on the CPU use dtype=torch.bfloat16, or None.")

    def _describe(self) -> dict[str, Any]:
        """All that a run's weights and log depend on, in JSON's types; not how often it is saved or shown."""
        names = ("batch_size", "step_scheduler", "evaluate_every", "seed", "clip_norm", "normalize_gradient", "average")
        more = ("accumulate", "drop_last", "diverged_above", "robust_every", "log_every")
        others = ("objective", "prepare", "prepare_evaluation", "robust", "compile")
        scheduler = self.scheduler
        described: dict[str, Any] = {name: getattr(self, name) for name in (*names, *more)}
        return {
            "model": describe_model(unwrap(self.model)),
            "optimizer": describe_optimizer(self.optimizer),
            "scheduler": scheduler and {"type": type(scheduler).__qualname__, **describe(scheduler.state_dict())},
            "data": self.source.describe(),
            "evaluation": self.evaluated and self.evaluated.describe(),
            "rules": [str(rule) for rule in self.rules],
            "dtype": describe(self.dtype),
            **{name: describe(getattr(self, name)) for name in others},
            **described,
        }
