"""The loop of a training run: epochs, records, checkpoints, and how it ends."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from backpass.errors import BackpassError
from backpass.rules import Attached, unwrap
from backpass.training.averaging import Averaging
from backpass.training.batches import Batches
from backpass.training.checkpoint import Checkpoints
from backpass.training.divergence import Divergence
from backpass.training.evaluation import Evaluation
from backpass.training.interruption import Interrupted, Interruption
from backpass.training.logs import Logs, Status
from backpass.training.meter import Meter, Totals
from backpass.training.processes import any_process, distributed, from_first, rank, world
from backpass.training.progress import Progress, TrainingResult
from backpass.training.settings import Settings
from backpass.training.state import Position, RunState
from backpass.training.update import Update

__all__ = ["Loop", "Resume"]

_LOG = logging.getLogger(__name__)

Resume = bool | Literal["auto"]


class Loop:
    """One call of `Trainer.fit`.

    Args:
        settings: of the run.
        attached: the rules in force on the model.
        interruption: tells that someone wants the run to stop.
    """

    def __init__(self, settings: Settings, attached: Sequence[Attached], interruption: Interruption) -> None:
        self._settings, self._interruption, self._begun = settings, interruption, time.perf_counter()
        self._device, self._alone = settings.device, world() == 1
        self._batches = Batches(
            source=settings.source,
            size=settings.batch_size,
            seed=settings.seed,
            drop_last=settings.drop_last,
            rank=rank(),
            processes=world(),
            parts=settings.accumulate,
            device=self._device,
            prepare=settings.prepare,
        )
        self._steps = settings.epochs * len(self._batches)
        core = unwrap(settings.model)
        called = _compiled(settings)
        meter = Meter(self._device)
        self._update = Update(settings, distributed(called, self._device), attached, meter)
        self._evaluate = Evaluation(settings, called, self._update.plain, self._update.autocast)
        self._averaging = Averaging(settings.averaged, core, self._steps) if settings.averaged else None
        self._position = Position()
        self._state = RunState(
            settings=settings,
            position=self._position,
            update=self._update,
            attached=attached,
            averaging=self._averaging,
            meter=meter,
            totals=Totals(),
            divergence=Divergence(settings.diverged_above),
        )
        folder = settings.path
        self._checkpoints = Checkpoints(folder / "checkpoints", settings.keep) if folder else None
        self._logs = Logs(folder if rank() == 0 else None, tensorboard=settings.tensorboard)
        self._diverged: str | None = None

    def run(self, resume: Resume) -> TrainingResult:
        """From the start, or the last checkpoint, to the end."""
        self._open(resume)
        position, epochs = self._position, self._settings.epochs
        try:
            self._status("running")
            while position.epoch < epochs and self._diverged is None:
                self._epoch()
            self._check_weights()
            self._status("diverged" if self._diverged else "finished")
        except BaseException:
            self._status("interrupted")
            raise
        finally:
            self._logs.close()
        return TrainingResult(
            history=position.history,
            diverged=self._diverged,
            steps=position.step,
            seconds=self._seconds(),
            averaged=self._averaged(),
            folder=self._settings.path,
        )

    def _check_weights(self) -> None:
        """What the very last step has done shows in no loss."""
        weights = [p for group in self._settings.optimizer.param_groups for p in group["params"]]
        if self._diverged is None and not all(bool(p.isfinite().all()) for p in weights):
            self._diverged = f"the weights after step {self._position.step} are not finite"
            _LOG.warning("the run has diverged: %s.", self._diverged)

    def _open(self, resume: Resume) -> None:
        """Restore a checkpoint, or write the first one, so that there is always one to resume from."""
        settings, checkpoints = self._settings, self._checkpoints
        description = {**settings.description, "epochs": settings.epochs, "processes": world()}
        if checkpoints is None:
            if resume is True:
                raise BackpassError("nothing to resume from: the trainer has no folder. Give folder=...")
            return
        there = from_first(lambda: bool(checkpoints.steps()))
        if there and resume is False:
            raise BackpassError(
                f"{settings.folder} holds a run already: go on with it by fit(resume=True), or give another folder."
            )
        offset = 0
        if resume is True or there:
            state = from_first(checkpoints.load)
            self._state.load_state_dict(state)
            offset = state.get("log_offset", 0)
        self._logs.open(offset, self._position.step, description)
        if not there:
            self._save()

    def _epoch(self) -> None:
        settings, position = self._settings, self._position
        last = len(self._batches)
        for parts in self._batches.epoch(position.epoch, position.within):
            self._update(parts, self._batches.samples(position.within))
            position.within += 1
            position.step += 1
            if self._averaging is not None:
                self._averaging.update(position.step)
            if settings.scheduler is not None and settings.step_scheduler == "step":
                settings.scheduler.step()
            if position.step % settings.log_every == 0 or position.within == last:
                self._record_steps()
                if self._diverged is not None:
                    return
            if position.within < last:
                self._save_within_epoch()
        self._finish_epoch()
        self._save()
        self._stop_if_asked()

    def _save_within_epoch(self) -> None:
        every = self._settings.checkpoint_every
        if every is not None and self._position.step % every == 0:
            self._save()
        # Processes must stop after the same step, and to agree costs an exchange.
        if self._alone or self._position.step % self._settings.log_every == 0:
            self._stop_if_asked()

    def _record_steps(self) -> None:
        reading, position = self._state.meter.read(), self._position
        norm = self._update.gradient_norm()
        self._state.totals.add(reading)
        record = {"kind": "step", "step": position.step, "epoch": position.epoch + 1, "loss": reading.loss}
        if reading.accuracy is not None:
            record["accuracy"] = reading.accuracy
        record |= {**reading.metrics, "lr": self._rates(), "gradient_norm": norm}
        self._record(record)
        self._diverged = self._state.divergence.check(reading.losses, position.step, norm)
        if self._diverged is not None:
            _LOG.warning("the run has diverged: %s.", self._diverged)
            self._record(
                {"kind": "diverged", "step": position.step, "epoch": position.epoch + 1, "reason": self._diverged}
            )

    def _finish_epoch(self) -> None:
        settings, position, averaging = self._settings, self._position, self._averaging
        position.epoch, position.within = position.epoch + 1, 0
        record: dict[str, Any] = {"kind": "epoch", "epoch": position.epoch, "step": position.step}
        record |= {**self._state.totals.means(), "lr": self._rates()}
        self._state.totals.clear()
        final = position.epoch == settings.epochs
        if settings.evaluated is not None and (final or position.epoch % settings.evaluate_every == 0):
            record["evaluation"] = self._evaluate(settings.evaluated)
            if averaging is not None and averaging.begun:
                with averaging.applied():
                    record["averaged"] = self._evaluate(settings.evaluated)
        due = final or position.epoch % settings.robust_every == 0
        if settings.robust is not None and settings.evaluated is not None and due:
            record["robust"] = self._evaluate.robust(settings.evaluated)
            if hasattr(settings.robust, "reason_to_stop"):
                self._diverged = settings.robust.reason_to_stop(record["robust"])
        position.history.append(record)
        if settings.scheduler is not None and settings.step_scheduler == "epoch":
            if isinstance(settings.scheduler, ReduceLROnPlateau):
                settings.scheduler.step(record.get("evaluation", record)["loss"])
            else:
                settings.scheduler.step()
        self._record(record)

    def _record(self, record: dict[str, Any]) -> None:
        settings, position = self._settings, self._position
        self._logs.record(record, self._seconds())
        if settings.on_progress is not None and rank() == 0:
            settings.on_progress(
                Progress(
                    epoch=record["epoch"],
                    epochs=settings.epochs,
                    step=position.step,
                    steps=self._steps,
                    seconds=self._seconds(),
                    record=record,
                )
            )

    def _rates(self) -> float | list[float]:
        rates = [float(group["lr"]) for group in self._settings.optimizer.param_groups]
        return rates[0] if len(rates) == 1 else rates

    def _save(self) -> None:
        if self._checkpoints is None:
            return
        state = self._state.state_dict()
        if rank() == 0:
            self._checkpoints.save(self._position.step, {**state, "log_offset": self._logs.offset()})

    def _stop_if_asked(self) -> None:
        name = self._interruption.received
        if not (name is not None if self._alone else any_process(name is not None, self._device)):
            return
        self._save()
        step = self._position.step
        if self._settings.folder is None:
            raise Interrupted(f"stopped by {name} after step {step}; without a folder nothing is saved.")
        raise Interrupted(
            f"stopped by {name or 'a signal to another process'} after step {step}, and saved in "
            f"{self._settings.folder}: go on with fit(resume=True) and the same settings."
        )

    def _status(self, status: Status) -> None:
        position = self._position
        numbers: dict[str, Any] = {"epoch": position.epoch, "step": position.step, "diverged": self._diverged}
        self._logs.status(status, {**numbers, "last": position.history[-1] if position.history else None})

    def _averaged(self) -> dict[str, torch.Tensor] | None:
        if self._averaging is None or not self._averaging.begun:
            return None
        with self._averaging.applied():
            state = unwrap(self._settings.model).state_dict()
            return {name: one.detach().clone() for name, one in state.items() if isinstance(one, torch.Tensor)}

    def _seconds(self) -> float:
        return time.perf_counter() - self._begun


def _compiled(settings: Settings) -> nn.Module:
    """The model as one process calls it."""
    model = settings.model
    if not settings.compile:
        return model
    options = {} if settings.compile is True else dict(settings.compile)
    return cast(nn.Module, torch.compile(model, **options))
