"""Complete state of a run, from which it continues as if it had never stopped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from backpass.errors import BackpassError
from backpass.rules import Attached, unwrap
from backpass.training.averaging import Average, Averaging
from backpass.training.divergence import Divergence
from backpass.training.fingerprint import differences
from backpass.training.meter import Meter, Totals
from backpass.training.orders import random_states, restore_random_states
from backpass.training.processes import from_all, is_sharded, rank, world
from backpass.training.update import Update
from backpass.version import __version__

if TYPE_CHECKING:
    from backpass.training.trainer import Trainer

__all__ = ["Position", "RunState"]


@dataclass
class Position:
    """Position of a run.

    Attributes:
        epoch: finished epochs.
        within: steps taken in the present epoch.
        step: steps taken in all.
        history: a record of each finished epoch.
        evaluations: a record of each evaluation after a number of steps.
    """

    epoch: int = 0
    within: int = 0
    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class RunState:
    """The parts of a run that change while it runs."""

    settings: Trainer
    position: Position
    update: Update
    attached: Sequence[Attached]
    averaging: Averaging | None
    meter: Meter
    totals: Totals
    divergence: Divergence

    def state_dict(self) -> dict[str, Any]:
        """Return a checkpoint; every process must call this, and process 0 gets everything."""
        settings, position, model = self.settings, self.position, unwrap(self.settings.model)
        weights, optimizer = _sharded_states(model, settings) if is_sharded(model) else (None, None)
        saved = model.state_dict() if weights is None else weights
        scaler, scheduler = self.update.scaler, settings.scheduler
        assert not isinstance(scheduler, str)  # noqa: S101  the trainer has made it
        return {
            "versions": {"backpass": __version__, "torch": str(torch.__version__)},
            "settings": {**settings.description, "processes": world(), "epochs": settings.epochs},
            "position": [position.epoch, position.within, position.step],
            "history": position.history,
            "evaluations": position.evaluations,
            "model": saved,
            "buffers": {name: one for name, one in model.named_buffers() if name not in saved},
            "optimizer": settings.optimizer.state_dict() if optimizer is None else optimizer,
            "scheduler": scheduler.state_dict() if scheduler else None,
            "rules": [state() if (state := getattr(one, "state_dict", None)) else None for one in self.attached],
            "order": settings.order.state_dict(),
            "scaler": scaler.state_dict() if scaler else None,
            "average": self.averaging.state_dict() if self.averaging else None,
            "totals": self.totals.state_dict(),
            "first_loss": self.divergence.first,
            "processes": from_all(self._of_this_process()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint.

        Raises:
            BackpassError: it is of a run with other settings, which the message names, or lacks something.
        """
        try:
            self._load(state)
        except BackpassError:
            raise
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise BackpassError(
                f"the checkpoint lacks what a run needs ({type(error).__name__}: {error}): it is of another program "
                "or of another version of backpass. Start anew in another folder, with the installed version."
            ) from error

    def _load(self, state: dict[str, Any]) -> None:
        settings, position, model = self.settings, self.position, unwrap(self.settings.model)
        self._refuse_others(state["settings"])
        position.epoch, position.within, position.step = state["position"]
        position.history[:], position.evaluations[:] = state["history"], state["evaluations"]
        if is_sharded(model):
            _load_sharded(model, settings, state)
        else:
            model.load_state_dict(state["model"])
            settings.optimizer.load_state_dict(state["optimizer"])
        buffers = dict(model.named_buffers())
        for name, value in state["buffers"].items():
            buffers[name].copy_(value)
        if settings.scheduler is not None and not isinstance(settings.scheduler, str):
            settings.scheduler.load_state_dict(state["scheduler"])
        for one, saved in zip(self.attached, state["rules"], strict=True):
            if saved is not None:
                one.load_state_dict(saved)  # type: ignore[attr-defined]
        settings.order.load_state_dict(state["order"])
        if self.update.scaler is not None:
            self.update.scaler.load_state_dict(state["scaler"])
        if self.averaging is not None:
            self.averaging.load_state_dict(state["average"])
        self.totals.load_state_dict(state["totals"])
        self.divergence.first = state["first_loss"]
        self._restore_process(state["processes"][rank()])

    def _refuse_others(self, before: dict[str, Any]) -> None:
        now = {**self.settings.description, "processes": world()}
        others = differences({name: value for name, value in before.items() if name != "epochs"}, now)
        epochs, average = before["epochs"], self.settings.average
        of_all_steps = average is not None and Average.parse(average).kind == "polyak"
        if self.settings.epochs < epochs or (of_all_steps and self.settings.epochs != epochs):
            others.append(f"epochs: was {epochs}, is {self.settings.epochs} (they may only grow)")
        if others:
            raise BackpassError(
                "the checkpoint is of a run with other settings: "
                + "; ".join(others)
                + ". Resume with those of the run (make model, optimizer and scheduler as for its start), or train in "
                "another folder."
            )

    def _of_this_process(self) -> dict[str, Any]:
        device, objective = self.settings.device, self.settings.objective
        return {
            "random": random_states(),
            "random_cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            "meter": self.meter.state_dict(),
            "objective": objective.state_dict() if hasattr(objective, "state_dict") else None,
        }

    def _restore_process(self, state: dict[str, Any]) -> None:
        restore_random_states(state["random"])
        if state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"], self.settings.device)
        self.meter.load_state_dict(state["meter"])
        if state["objective"] is not None:
            self.settings.objective.load_state_dict(state["objective"])  # type: ignore[attr-defined]


def _sharded_states(model: nn.Module, settings: Trainer) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the whole states of a sharded model and its optimizer, on the CPU of process 0."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, optimizer = get_state_dict(model, settings.optimizer, options=options)
    return weights, optimizer


def _load_sharded(model: nn.Module, settings: Trainer, state: dict[str, Any]) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    set_state_dict(
        model,
        settings.optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=StateDictOptions(full_state_dict=True),
    )
