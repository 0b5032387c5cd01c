"""Training with any model, optimizer, scheduler, objective and rules."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from backpass.errors import BackpassError
from backpass.rules import Attached, ProxProp, Rule, unwrap
from backpass.training.batches import mixed
from backpass.training.interruption import Interruption
from backpass.training.labels import check_labels
from backpass.training.loop import Loop, Resume
from backpass.training.processes import joined, rank
from backpass.training.progress import TrainingResult
from backpass.training.settings import Settings

__all__ = ["Trainer", "attach"]


@dataclass(frozen=True, eq=False)
class Trainer(Settings):
    r"""Minimises an objective over batches B: theta <- step(theta, grad 1/|B| sum_{i in B} loss_i(theta)).

    Trains the model in place. With a folder, a run that was stopped at any moment goes on by ``fit(resume=True)`` and
    ends with the weights and the log of a run without a break: to the bit on the CPU.

    Args:
        model: any ``nn.Module``, on its device.
        optimizer: any torch optimizer (but LBFGS) of the model's parameters.
        data: (x, y) tensors on any device, memory-mapped too; a map-style ``Dataset`` of pairs; or a ``DataLoader``, of
            which the data set, the workers and ``collate_fn`` are used.
        epochs: passes over the data, at least 1.
        batch_size: samples per optimizer step, over all processes and accumulated parts; at most those of the data.
        objective: what is minimised: `CrossEntropy` of logits and labels, ``PerSample(loss)`` with any loss
            (output, y) -> (B,), `AdversarialTraining`, or an `Objective` of your own.
        rules: rules in force during the run, attached in this order, removed at its end. Suspended in evaluation.
        scheduler: any torch scheduler of the optimizer, or one with ``measure``, such as `ControlledLR`.
        step_scheduler: when it steps, after each ``"step"`` or ``"epoch"``.
        accumulate: parts in which a step's batch is computed, at least 1: less memory, the same gradient (BatchNorm
            sees the parts).
        drop_last: leave out an epoch's incomplete last batch; which samples it has differs from epoch to epoch.
        prepare: (x, batch) -> x on the model's device, for augmentation. By default uint8 images become floats in
            [0, 1], and floats stay as they are.
        seed: of the order of the samples and of random numbers in training (dropout). The global generators are
            afterwards as they were.
        dtype: of autocast: None (no autocast), ``torch.bfloat16``, or on CUDA ``torch.float16`` with scaled losses.
        compile: whether to ``torch.compile`` the model; or a dict of its arguments.
        clip_norm: upper limit of the gradient's l2 norm over all parameters, positive; None for none.
        normalize_gradient: use g / |g|, |g| over all parameters.
        average: averaged weights beside the model's own: ``"ema:d"``, 0 < d < 1, a <- d a + (1 - d) theta after each
            step; ``"polyak:f"``, 0 < f <= 1, the mean over the last part f of all steps; None.
        diverged_above: the run has diverged, and stops, where the mean loss of a record is more than this many times
            max(1, first loss); above 1; None asks only for finite losses and gradients.
        evaluation: data to judge the model on, as ``data``; None for no evaluation.
        evaluate_every: epochs from one evaluation to the next, at least 1; the last epoch always has one.
        prepare_evaluation: x -> x on the model's device; by default uint8 images become floats in [0, 1].
        robust: (model, x, y) -> dict of numbers, on the whole prepared evaluation set (tensors), in eval mode, called
            by process 0, for instance a `RobustEvaluation`. It may have ``reason_to_stop(numbers)``, which gives None
            or why the run ends there as diverged.
        robust_every: epochs from one such measurement to the next, at least 1; the last epoch always has one.
        folder: for checkpoints and logs, made if needed; None writes nothing.
        checkpoint_every: steps from one checkpoint to the next, at least 1; the end of an epoch always has one.
        keep: how many checkpoints stay, at least 1.
        log_every: steps per record of the log, at least 1. Losses are read from the device, and divergence is
            noticed, once per record.
        tensorboard: also write TensorBoard events, to ``folder/tensorboard``.
        on_progress: called with a `Progress` after each record, in process 0.

    Raises:
        BackpassError: a setting is out of its range, or two do not go together.

    Example:
        >>> import torch
        >>> from backpass import LinBP
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> data = torch.randn(64, 8), torch.randint(3, (64,))
        >>> Trainer(model, optimizer, data, epochs=2, batch_size=16, rules=(LinBP(start=-1),)).fit().steps
        8
    """

    def fit(self, *, resume: Resume = False) -> TrainingResult:
        """Train to the last epoch.

        Under ``torchrun`` all processes call this, each with its model on `local_device()`; the sum over processes of
        what they see is the batch of one process. Ctrl-C and SIGTERM save after the running step.

        Args:
            resume: go on from the last whole checkpoint in the folder; ``"auto"`` begins anew where there is none.

        Returns:
            What the run left behind; a run that diverged returns too, and says why.

        Raises:
            BackpassError: there is nothing to resume from, the checkpoint is of other settings, the folder holds a run
                already, or data and model do not fit.
            Interrupted: by Ctrl-C or SIGTERM, with how to go on; it is a ``KeyboardInterrupt``.
        """
        if resume not in (True, False, "auto"):
            raise BackpassError(f'resume is True, False or "auto", got {resume!r}.')
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(joined(self.device))
            interruption = stack.enter_context(Interruption())
            gpu = [self.device] if self.device.type == "cuda" else []
            stack.enter_context(torch.random.fork_rng(devices=gpu))
            torch.manual_seed(mixed(self.seed, rank()))
            model = unwrap(self.model)
            if not model.training:
                model.train()
            check_labels(self, model)
            if hasattr(self.objective, "close"):
                stack.callback(self.objective.close)
            attached = [stack.enter_context(attach(rule, self.model, self.optimizer)) for rule in self.rules]
            return Loop(self, attached, interruption).run(resume)


def attach(rule: Rule, model: nn.Module, optimizer: Optimizer) -> Attached:
    """The rule in force on a model that an optimizer trains, whose steps `ProxProp(solve="step")` has to know."""
    if isinstance(rule, ProxProp) and rule.solve == "step":
        return rule.attach(model, optimizer=optimizer)
    return rule.attach(model)
