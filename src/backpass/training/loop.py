"""Training loop: epochs, log records, evaluations, checkpoints and termination."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from backpass.errors import BackpassError
from backpass.rules import Attached, unwrap
from backpass.rules.implicit.systems import NotFiniteError
from backpass.rules.semi_implicit.backward import DivergedError
from backpass.training.averaging import Averaging
from backpass.training.batches import Batches
from backpass.training.checkpoint import Checkpoints
from backpass.training.evaluation import Evaluation
from backpass.training.interruption import Interrupted
from backpass.training.logs import Logs, Status
from backpass.training.meter import Divergence, Meter
from backpass.training.processes import any_process, distributed, from_first, is_sharded, rank, whole, world
from backpass.training.progress import Progress, TrainingResult
from backpass.training.settings import seconds_between
from backpass.training.state import Position, RunState
from backpass.training.update import Update

if TYPE_CHECKING:
    from backpass.training.trainer import Trainer

__all__ = ["Loop", "Resume"]

_LOG = logging.getLogger(__name__)

Resume = bool | Literal["auto"]


class Loop:
    """One call of `Trainer.fit`.

    Args:
        settings: settings of the run.
        attached: rules attached to the model.
        signals: names of the stop signals received.
    """

    def __init__(self, settings: Trainer, attached: Sequence[Attached], signals: Sequence[str]) -> None:
        self._settings, self._signals, self._begun = settings, signals, time.perf_counter()
        self._attached = attached
        self._device, self._alone = settings.device, world() == 1
        self._batches = Batches(settings, rank(), world())
        self._steps = settings.steps
        called = settings.model
        if settings.compile:
            if is_sharded(called):
                raise BackpassError("a model sharded by fully_shard cannot be compiled: leave out compile.")
            called = cast(nn.Module, torch.compile(called, **({} if settings.compile is True else settings.compile)))
        meter = Meter(self._device)
        self._update = Update(settings, distributed(called, self._device), attached, meter)
        self._evaluate = Evaluation(settings, called, self._update)
        average = settings.average
        self._averaging = None if average is None else Averaging(average, unwrap(called), self._steps)
        self._scheduler = cast(LRScheduler | None, settings.scheduler)
        self._position = Position()
        self._state = RunState(
            settings=settings,
            position=self._position,
            update=self._update,
            attached=attached,
            averaging=self._averaging,
            meter=meter,
            divergence=Divergence(settings.diverged_above),
        )
        folder = settings.path
        self._checkpoints = Checkpoints(folder / "checkpoints", settings.keep) if folder else None
        self._logs = Logs(folder, settings.loggers) if rank() == 0 else Logs(None, ())
        self._between, self._saved = seconds_between(settings.checkpoint_every), time.monotonic()
        self._diverged: str | None = None
        self._stopped: str | None = None

    def run(self, resume: Resume) -> TrainingResult:
        """Train to the end, from the start or from the last checkpoint."""
        self._open(resume)
        position = self._position
        try:
            self._status("running")
            if position.epoch >= self._settings.epochs or self._ended:
                for rule in self._attached:
                    rule.remove()  # otherwise it warns that the model was not called
            self._evaluate_at_mark()
            while position.epoch < self._settings.epochs and not self._ended:
                self._epoch()
            self._check_weights()
            self._status("diverged" if self._diverged else "stopped" if self._stopped else "finished")
        except BaseException:
            with suppress(BackpassError):  # the first error says more
                self._status("interrupted")
            raise
        finally:
            self._logs.close()
        return TrainingResult(
            history=position.history,
            evaluations=position.evaluations,
            diverged=self._diverged,
            stopped=self._stopped,
            steps=position.step,
            seconds=self._seconds(),
            averaged=self._averaged(),
            folder=self._settings.path,
        )

    @property
    def _ended(self) -> bool:
        return self._diverged is not None or self._stopped is not None or self._position.step >= self._steps

    def _check_weights(self) -> None:
        """Check the weights after the last step, whose divergence the log may not show yet."""
        weights = [p for group in self._settings.optimizer.param_groups for p in group["params"]]
        if self._diverged or not self._position.step:
            return
        if not all(bool(whole(p.isfinite().all())) for p in weights):
            self._end_as_diverged(f"the weights after step {self._position.step} are not finite")

    def _open(self, resume: Resume) -> None:
        """Restore a checkpoint, or write the first one, so that there is always one to resume from."""
        settings, checkpoints = self._settings, self._checkpoints
        description = self._state.description()
        settings.order.load_state_dict({})
        if checkpoints is None:
            if resume is True:
                raise BackpassError("nothing to resume from: the trainer has no folder. Give folder=...")
            self._logs.open(0, 0, description)
            return
        there = from_first(lambda: bool(checkpoints.steps()))
        if there and resume is False:
            raise BackpassError(
                f"{settings.folder} holds a run already: continue it by fit(resume=True), or give another folder."
            )
        offset = 0
        if resume is True or there:
            state = from_first(checkpoints.load)
            self._state.load_state_dict(state)
            offset = state.get("log_offset", 0)
        if rank() == 0:
            checkpoints.clean()
        self._logs.open(offset, self._position.step, description)
        if not there:
            self._save()

    def _epoch(self) -> None:
        settings, position = self._settings, self._position
        for parts, samples, last in self._batches.epoch(position.epoch, position.within, position.step):
            try:
                self._update(parts, samples)
            except (NotFiniteError, DivergedError) as error:
                if position.step == 0:
                    raise  # an error of network or data, not a divergence
                return self._end_as_diverged(str(error))
            position.within += 1
            position.step += 1
            if self._averaging is not None:
                self._averaging.update(position.step)
            if self._scheduler is not None and settings.step_scheduler == "step":
                self._scheduler.step()
            if settings.on_step is not None:
                settings.on_step(position.step)
            if position.step % settings.log_every == 0 or last or position.step >= self._steps:
                self._record_steps()
            if self._diverged is not None:
                return None  # the last checkpoint precedes the divergence
            self._evaluate_at_mark()
            if self._ended and not last:
                return self._save()
            if not last:
                self._save_within_epoch()
            if self._diverged is not None:
                return None
        self._finish_epoch()
        self._save()
        self._stop_if_asked()
        return None

    def _save_within_epoch(self) -> None:
        every = self._settings.checkpoint_every
        # Processes must save and stop after the same step, which costs a collective call.
        agreed = self._alone or self._position.step % self._settings.log_every == 0
        if self._between is not None:
            due = agreed and time.monotonic() - self._saved >= self._between
            if due if self._alone else agreed and any_process(due and rank() == 0, self._device):
                self._save()
        elif isinstance(every, int) and self._position.step % every == 0:
            self._save()
        if agreed:
            self._stop_if_asked()

    def _record_steps(self) -> None:
        (numbers, losses), norm, position = self._state.meter.read(), self._update.gradient_norm(), self._position
        record = {"kind": "step", "step": position.step, "epoch": position.epoch + 1, **numbers}
        self._record({**record, "lr": self._rates(), "gradient_norm": norm})
        diverged = self._state.divergence.check(losses, position.step, norm)
        if diverged is not None:
            self._end_as_diverged(diverged)

    def _end_as_diverged(self, reason: str) -> None:
        self._diverged = reason
        if self._settings.on_progress is None:  # who watches the run gets the record
            _LOG.warning("the run has diverged: %s.", reason)
        position = self._position
        self._record({"kind": "diverged", "step": position.step, "epoch": position.epoch + 1, "reason": reason})

    def _evaluate_at_mark(self) -> None:
        position = self._position
        done = any(one["step"] == position.step for one in position.evaluations)
        if position.step not in self._settings.evaluate_at or done:
            return
        record = {"kind": "evaluation", "step": position.step, "epoch": position.epoch + 1, **self._evaluations()}
        position.evaluations.append(record)
        self._record(record)

    def _evaluations(self) -> dict[str, Any]:
        found = {"evaluation": self._evaluate()}
        if self._averaging is not None and self._averaging.count:
            with self._averaging.applied():
                found["averaged"] = self._evaluate()
        return found

    def _finish_epoch(self) -> None:
        settings, position = self._settings, self._position
        position.epoch, position.within = position.epoch + 1, 0
        record: dict[str, Any] = {"kind": "epoch", "epoch": position.epoch, "step": position.step}
        record |= {**self._state.meter.epoch(), "lr": self._rates()}
        self._state.meter.forget_epoch()
        final, every = position.epoch == settings.epochs, settings.evaluate_every
        if settings.evaluated and every is not None and (final or position.epoch % every == 0):
            record |= self._evaluations()
        if settings.robust is not None and (final or position.epoch % settings.robust_every == 0):
            record["robust"] = self._evaluate.robust()
            if hasattr(settings.robust, "reason_to_stop"):
                self._diverged = settings.robust.reason_to_stop(record["robust"])
        position.history.append(record)
        if isinstance(self._scheduler, ReduceLROnPlateau):
            self._follow_plateau(self._scheduler, record)
        elif self._scheduler is not None and settings.step_scheduler == "epoch":
            self._scheduler.step()
        self._record(record)

    def _follow_plateau(self, scheduler: ReduceLROnPlateau, record: dict[str, Any]) -> None:
        """Step the scheduler by the first evaluation set, in epochs that have an evaluation; else by training."""
        evaluated = self._settings.evaluated
        if evaluated and self._settings.evaluate_every is not None:
            if "evaluation" not in record:
                return
            record = record["evaluation"] if "" in evaluated else next(iter(record["evaluation"].values()))
        metric = "accuracy" if scheduler.mode == "max" else "loss"
        if metric not in record:
            raise BackpassError(
                'ReduceLROnPlateau(mode="max") follows the accuracy, which this objective does not report: use '
                'mode="min", which follows the loss.'
            )
        scheduler.step(record[metric])

    def _record(self, record: dict[str, Any]) -> None:
        settings = self._settings

        def written() -> str | None:
            self._logs.record(record, self._seconds())
            if settings.on_progress is None:
                return None
            return settings.on_progress(
                Progress(
                    epoch=record["epoch"],
                    epochs=settings.epochs,
                    step=self._position.step,
                    steps=self._steps,
                    seconds=self._seconds(),
                    record=record,
                )
            )

        reason = from_first(written)
        if isinstance(reason, str):
            self._stopped = reason

    def _rates(self) -> float | list[float]:
        rates = [float(group["lr"]) for group in self._settings.optimizer.param_groups]
        return rates[0] if len(rates) == 1 else rates

    def _save(self) -> None:
        if self._checkpoints is None:
            return
        self._check_weights()
        if self._diverged is not None:
            return  # the last checkpoint precedes the divergence
        checkpoints, state = self._checkpoints, self._state.state_dict()
        from_first(lambda: str(checkpoints.save(self._position.step, {**state, "log_offset": self._logs.offset()})))
        self._saved = time.monotonic()

    def _stop_if_asked(self) -> None:
        name = next(iter(self._signals), None)
        if not (name is not None if self._alone else any_process(name is not None, self._device)):
            return
        self._save()
        if self._diverged is not None:
            return
        step = self._position.step
        if self._settings.folder is None:
            raise Interrupted(f"stopped by {name} after step {step}; without a folder nothing is saved.")
        raise Interrupted(
            f"stopped by {name or 'a signal to another process'} after step {step}, and saved in "
            f"{self._settings.folder}: continue with fit(resume=True) and the same settings."
        )

    def _status(self, status: Status) -> None:
        position = self._position
        numbers: dict[str, Any] = {"epoch": position.epoch, "step": position.step, "diverged": self._diverged}
        if self._stopped is not None:
            numbers["stopped"] = self._stopped
        self._logs.status(status, {**numbers, "last": position.history[-1] if position.history else None})

    def _averaged(self) -> dict[str, torch.Tensor] | None:
        if self._averaging is None or not self._averaging.count:
            return None
        with self._averaging.applied():
            state = unwrap(self._settings.model).state_dict()
            return {name: whole(one).detach().clone() for name, one in state.items() if isinstance(one, torch.Tensor)}

    def _seconds(self) -> float:
        return time.perf_counter() - self._begun
