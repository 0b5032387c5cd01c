"""Training with any model, optimizer, scheduler, objective and rules."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import KW_ONLY, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from backpass.errors import BackpassError, UnknownNameError
from backpass.files import locked
from backpass.rules import Attached, ProxProp, Rule, unwrap
from backpass.training.batches import Order, Prepare, to_unit_interval
from backpass.training.evaluation import Metric, check_targets
from backpass.training.fingerprint import describe, describe_model, describe_optimizer
from backpass.training.half_batches import Measuring
from backpass.training.interruption import recorded_signals
from backpass.training.loop import Loop, Resume
from backpass.training.objective import CrossEntropy, Objective
from backpass.training.processes import from_first, joined, rank
from backpass.training.progress import Progress, TrainingResult
from backpass.training.randomness import mixed, seeded
from backpass.training.schedules import make_schedule
from backpass.training.settings import Settings, precision
from backpass.training.sources import Data, Source

__all__ = ["Trainer", "attach"]

_CALLED = {"prepare": False, "prepare_evaluation": True, "robust": True, "on_progress": True, "on_step": True}
"""Settings that are functions, and whether None is allowed."""
_NOT_DESCRIBED = {"epochs", "checkpoint_every", "keep", "loggers", "scheduler", "dtype", "batch_size", "drop_last"}


@dataclass(frozen=True, eq=False)
class Trainer(Settings):
    r"""Minimise an objective over batches B: theta <- step(theta, grad 1/|B| sum_{i in B} loss_i(theta)).

    The model is trained in place. With a folder, a run that was stopped at any moment continues by
    ``fit(resume=True)`` and ends with the weights and the log of an uninterrupted run: bit for bit on the CPU.

    Args:
        model: any ``nn.Module``, on its device.
        optimizer: any torch optimizer of the model's parameters, except LBFGS.
        data: (x, y) tensors on any device, also memory-mapped; a map-style ``Dataset`` of pairs; or a ``DataLoader``,
            of which everything is used: data set, workers, ``collate_fn``, sampler or batch sampler, batch size.
        epochs: passes over the data, at least 1.
        batch_size: samples per optimizer step, over all processes and accumulated parts; at most those of the data.
            Leave it out for the batch size of a ``DataLoader``.
        accumulate: parts in which a step's batch is computed, at least 1. This needs less memory and gives the same
            gradient, except that BatchNorm uses the statistics of each part.
        drop_last: drop an epoch's incomplete last batch; by default yes, or what a ``DataLoader`` says. The dropped
            samples differ from epoch to epoch.
        max_steps: end the run after this many optimizer steps, also within an epoch.
        objective: function to minimise: `CrossEntropy`, `BinaryCrossEntropy`, ``PerSample(loss)`` with any loss
            (output, y) -> (B,), `AdversarialTraining`, or an `Objective` of your own.
        rules: rules in force during the run, attached in this order and removed at its end. They are suspended in
            evaluation.
        scheduler: learning rate schedule by name, for instance ``cosine:warmup=0.05``, ``one-cycle``, ``linear``,
            ``step:every=30``, ``exponential:gamma=0.98`` or ``controlled``; in Python also any torch scheduler of the
            optimizer, or one with ``measure``, such as `ControlledLR`.
        step_scheduler: call a scheduler object after each ``"step"`` or ``"epoch"``. Schedules by name know it.
            ``ReduceLROnPlateau`` is given the loss of the first evaluation set, with ``mode="max"`` its accuracy, after
            each evaluation; without ``evaluation``, that of training.
        clip_norm: upper limit of the gradient's l2 norm over all parameters, positive.
        normalize_gradient: divide the gradient by its l2 norm: ``model``, over all parameters, or ``tensor``, each
            parameter's by its own.
        average: averaged weights beside the model's own: ``ema:0.999``, a <- d a + (1 - d) theta after each step with
            d in (0, 1), or ``polyak:0.5``, the mean over this last part of all steps.
        seed: seed of the order of the samples and of random numbers in training. The global generators of torch,
            Python and NumPy are restored afterwards.
        dtype: precision of autocast: ``bfloat16``, or on CUDA ``float16`` with scaled losses.
        channels_last: keep model and images (B, C, H, W) in this memory format, which convolutions in bfloat16 need to
            be fast.
        compile: compile the model; in Python also a dict of ``torch.compile``'s arguments.
        diverged_above: stop the run as diverged where the mean loss of a record exceeds this many times
            max(1, first loss); above 1. None checks only that losses and gradients are finite.
        prepare: (x, batch) -> x on the model's device, for augmentation. By default uint8 images become floats in
            [0, 1], and floats stay as they are.
        evaluation: data to evaluate the model on, as ``data``, or a dict of several.
        evaluate_every: epochs between evaluations; the last epoch always has one. None evaluates at ``evaluate_at``
            only.
        evaluate_at: numbers of steps after which the model is evaluated as well; 0 is before the first step.
        prepare_evaluation: x -> x on the model's device; by default uint8 images become floats in [0, 1].
        metrics: further numbers to evaluate, ``{name: function}``. Each function is called once with the outputs (the
            logits, where the objective selects them) and targets of the whole evaluation set, on the CPU, and returns
            a number. A function called ``accuracy`` replaces the accuracy.
        robust: (model, x, y) -> dict of numbers, on the whole prepared evaluation set (tensors), in eval mode, called
            by process 0, for instance a `RobustEvaluation`. It may have ``reason_to_stop(numbers)``, which returns
            None or why the run ends there as diverged.
        robust_every: epochs between measurements of robust accuracy; the last epoch always has one.
        folder: folder of checkpoints and logs, created if needed; None writes nothing. One run at a time can use it.
        checkpoint_every: steps between checkpoints, or a time such as ``10min``. The end of an epoch always has one.
        keep: number of checkpoints that are kept, at least 1.
        log_every: steps per record of the log, at least 1. Losses are read from the device, and divergence is
            noticed, once per record.
        loggers: further places for the numbers of the log: ``tensorboard``, ``wandb`` or ``mlflow`` with their own
            packages; in Python also a `Logger` of your own.
        on_progress: called with a `Progress` after each record, in process 0. The run ends, as stopped, where it
            returns a reason (a string).
        on_step: called with the number of steps taken after each optimizer step, in every process.

    Raises:
        BackpassError: a setting is out of its range, or two contradict each other.

    Example:
        >>> import torch
        >>> from backpass import LinBP
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> data = torch.randn(64, 8), torch.randint(3, (64,))
        >>> Trainer(model, optimizer, data, epochs=2, batch_size=16, rules=(LinBP(start=-1),)).fit().steps
        8
    """

    model: nn.Module
    optimizer: Optimizer
    data: Data = field(repr=False)
    _: KW_ONLY
    objective: Objective = field(default_factory=CrossEntropy)
    rules: Sequence[Rule] = ()
    step_scheduler: Literal["step", "epoch"] = "epoch"
    prepare: Prepare = to_unit_interval
    evaluation: Data | Mapping[str, Data] | None = field(default=None, repr=False)
    prepare_evaluation: Callable[[Tensor], Tensor] | None = None
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    robust: Callable[[nn.Module, Tensor, Tensor], Mapping[str, float]] | None = None
    folder: str | Path | None = None
    on_progress: Callable[[Progress], str | None] | None = None
    on_step: Callable[[int], object] | None = None
    source: Source = field(init=False, repr=False)
    order: Order = field(init=False, repr=False)
    evaluated: dict[str, Source] = field(init=False, repr=False)
    description: dict[str, Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        source = Source(self.data)
        several = self.evaluation if isinstance(self.evaluation, Mapping) else {"": self.evaluation}
        evaluated = {str(name): Source(one) for name, one in several.items() if one is not None}
        if self.robust is not None and next(iter(evaluated.values())).tensors is None:
            raise BackpassError("robust needs the evaluation set as tensors: evaluation=(x, y).")
        self._set(source=source, evaluated=evaluated, order=self._ordered(source))
        if isinstance(self.scheduler, str):
            scheduler, when = make_schedule(self.scheduler, self.optimizer, self.steps)
            self._set(scheduler=scheduler, step_scheduler=when)
        self._check_scheduler()
        self._set(description=self._describe())  # before a run changes rates and weights

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return next(self.model.parameters()).device

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return min(self.epochs * len(self.order), self.max_steps or 2**62)

    @property
    def path(self) -> Path | None:
        """Folder of the run."""
        return None if self.folder is None else Path(self.folder)

    def fit(self, *, resume: Resume = False) -> TrainingResult:
        """Train to the last epoch.

        Under ``torchrun`` all processes call this, each with its model on `local_device()`; the sum over processes of
        what they see is the batch of one process. Ctrl-C and SIGTERM save after the running step.

        Args:
            resume: continue from the last whole checkpoint in the folder; ``"auto"`` starts anew where there is none.

        Returns:
            The outcome of the run; a run that diverged returns too, with the reason.

        Raises:
            BackpassError: there is nothing to resume from, the checkpoint has other settings, the folder holds a run
                already or is in use, or data and model do not fit.
            Interrupted: by Ctrl-C or SIGTERM, with how to continue; it is a ``KeyboardInterrupt``.
        """
        if resume not in (True, False, "auto"):
            raise BackpassError(f'resume must be True, False or "auto", got {resume!r}.')
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(joined(self.device))
            if self.path is not None:
                path = self.path
                from_first(lambda: stack.enter_context(locked(path)))
            signals = stack.enter_context(recorded_signals())
            gpu = [self.device] if self.device.type == "cuda" else []
            stack.enter_context(torch.random.fork_rng(devices=gpu))
            stack.enter_context(seeded(mixed(self.seed, rank())))
            if gpu:
                torch.cuda.manual_seed(mixed(self.seed, rank()))
            model = unwrap(self.model)
            if not model.training:
                model.train()
            if self.channels_last:
                model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            check_targets(self, model)
            if hasattr(self.objective, "close"):
                stack.callback(self.objective.close)
            attached = [stack.enter_context(attach(rule, self.model, self.optimizer)) for rule in self.rules]
            return Loop(self, attached, signals).run(resume)

    def _ordered(self, source: Source) -> Order:
        size, its = self.batch_size, source.batch_size
        if size is not None and its is not None and its not in (size, 1):
            raise BackpassError(
                f"batch_size={size}, and the batch size of the DataLoader is {its}: leave one of them out, or "
                "make them equal."
            )
        if source.in_batches and self.drop_last is not None:
            raise BackpassError(
                "the batch sampler of the DataLoader decides about the last batch: leave out drop_last."
            )
        if source.in_batches and size is not None and its is None:
            raise BackpassError("the batch sampler of the DataLoader decides the batch size: leave out batch_size.")
        if size is None and its is None and not source.in_batches:
            raise BackpassError("batch_size is missing: give the number of samples per optimizer step.")
        drop_last = next((one for one in (self.drop_last, source.drop_last) if one is not None), True)
        size = None if source.in_batches else size or its
        self._set(batch_size=size or its, drop_last=None if source.in_batches else drop_last)
        return Order(source, size, self.seed, drop_last)

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        for name, optional in _CALLED.items():
            value = getattr(self, name)
            if not (callable(value) or (optional and value is None)):
                yield f"{name} must be a function{' or None' if optional else ''}, got {value!r}."
        if not isinstance(self.metrics, Mapping) or not all(map(callable, self.metrics.values())):
            yield f"metrics must be a dict of functions (output, y) -> number, got {self.metrics!r}."
        if "loss" in self.metrics:
            yield "metrics has a function called 'loss', the name of the objective's: choose another."
        if not isinstance(self.folder, str | Path | None):
            yield f"folder must be a path, or None to write nothing; got {self.folder!r}."
        if not isinstance(self.optimizer, Optimizer):
            example = "torch.optim.SGD(model.parameters(), lr=0.1)"
            yield f"optimizer must be one of torch's, such as {example}; got {self.optimizer!r}."
        named = self.scheduler is None or isinstance(self.scheduler, str)
        methods = ("step", "state_dict", "load_state_dict")
        if not named and not all(callable(getattr(self.scheduler, name, None)) for name in methods):
            expected = "a name such as cosine, one of torch's, or have its methods"
            yield f"scheduler must be {expected}; got {self.scheduler!r}."
        elif not named and not isinstance(self.scheduler, ReduceLROnPlateau) and not _takes(self.scheduler.step):  # type: ignore[union-attr]
            yield f"a scheduler's step() takes no argument, except that of ReduceLROnPlateau; got {self.scheduler!r}."
        if self.step_scheduler not in ("step", "epoch"):
            raise UnknownNameError("step_scheduler", str(self.step_scheduler), ("step", "epoch"))
        if not isinstance(self.rules, Sequence) or not all(isinstance(rule, Rule) for rule in self.rules):
            yield f"rules must be a sequence of rules, such as (LinBP(start=-2),); got {self.rules!r}."
        if isinstance(self.evaluation, Mapping) and (not self.evaluation or "" in self.evaluation):
            yield "evaluation is a dict without a data set, or without a name of one: give {name: (x, y)}."
        for name in ("robust", "metrics", "evaluate_at"):
            if self.evaluation is None and getattr(self, name):
                yield f"{name} is measured on the evaluation set: give evaluation=(x, y) too."
        if self.folder is None and self.checkpoint_every is not None:
            yield "checkpoints need a place: give folder=... too."
        if self.folder is None and "tensorboard" in self.loggers:
            yield "TensorBoard's events need a place: give folder=... too."
        called = self.objective.forward if isinstance(self.objective, nn.Module) else self.objective
        if not _takes(called, self.model, None, None) or getattr(called, "__module__", None) == F.__name__:
            yield (
                "an objective is called as objective(model, batch, plain); of a loss of (output, y), one number per "
                f"sample, PerSample(loss) makes one. Got {self.objective!r}."
            )
        yield from self._problems_of_weights()

    def _problems_of_weights(self) -> Iterator[str]:
        if not isinstance(self.model, nn.Module):
            yield f"model must be an nn.Module, got {type(self.model).__name__}."
        if any(map(is_lazy, self.model.parameters())):
            yield "the model has lazy modules without a shape: call it once on a batch of data first."
        parameters = {id(p) for p in self.model.parameters()}
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        strange = sum(id(p) not in parameters for p in held)
        if strange:
            yield (
                f"{strange} of the {len(held)} tensors that the optimizer holds are no parameters of the model: make "
                "the optimizer from model.parameters(), after the model was moved, copied or sharded."
            )
        if not any(p.requires_grad for p in held):
            yield "all parameters of the optimizer are frozen: requires_grad_() those to be learned."
        for group in self.optimizer.param_groups:
            if not math.isfinite(group["lr"]):
                yield f"the learning rate of the optimizer must be finite, got {float(group['lr'])}."
        if self.device.type == "meta":
            yield "the model is on the device meta, which holds no numbers: move it with to_empty()."
        if isinstance(self.optimizer, LBFGS):
            yield "LBFGS calls the objective several times per step, which the trainer does not do."
        if precision(self.dtype) == torch.float16 and self.device.type != "cuda":
            yield "float16 is for CUDA; on the CPU use dtype=torch.bfloat16, or None."

    def _check_scheduler(self) -> None:
        if getattr(self.scheduler, "optimizer", self.optimizer) is not self.optimizer:
            raise BackpassError("the scheduler has another optimizer: make it from the one that the trainer gets.")
        if isinstance(self.scheduler, ReduceLROnPlateau) and self.step_scheduler == "step":
            raise BackpassError('ReduceLROnPlateau needs the loss of an epoch: leave step_scheduler="epoch".')
        if not isinstance(self.scheduler, Measuring):
            return
        if self.accumulate > 1:
            raise BackpassError(
                "a scheduler that measures on halves of the batch needs all of it: use accumulate=1, "
                "or a loop of your own."
            )
        if self.step_scheduler != "step":
            raise BackpassError('a scheduler that measures steps is called after each: give step_scheduler="step" too.')

    def _describe(self) -> dict[str, Any]:
        """Describe everything that the weights and the log of the run depend on, in JSON types."""
        scheduler = self.scheduler
        assert not isinstance(scheduler, str)  # noqa: S101  made above
        evaluated = {name: one.describe() for name, one in self.evaluated.items()}
        named = [one.name for one in fields(Settings) if one.name not in _NOT_DESCRIBED]
        named += ["step_scheduler", "objective", "prepare", "prepare_evaluation", "metrics", "robust"]
        return {
            "model": describe_model(unwrap(self.model)),
            "optimizer": describe_optimizer(self.optimizer),
            "scheduler": scheduler and {"type": type(scheduler).__qualname__, **describe(scheduler.state_dict())},
            "data": self.source.describe(),
            "evaluation": evaluated.get("", evaluated),
            "rules": [str(rule) for rule in self.rules],
            "batch_size": self.batch_size,
            "drop_last": self.drop_last,
            "dtype": describe(precision(self.dtype)),
            **{name: describe(getattr(self, name)) for name in named},
        }


def _takes(function: Callable[..., object], *arguments: object) -> bool:
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        return False
    return True


def attach(rule: Rule, model: nn.Module, optimizer: Optimizer) -> Attached:
    """Attach a rule to a model that an optimizer trains; `ProxProp(solve="step")` needs to know its steps."""
    if isinstance(rule, ProxProp) and rule.solve == "step":
        return rule.attach(model, optimizer=optimizer)
    return rule.attach(model)
