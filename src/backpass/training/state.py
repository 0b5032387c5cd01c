"""All that a run has to remember to go on as if it had never stopped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from backpass.errors import BackpassError
from backpass.rules import Attached, unwrap
from backpass.training.averaging import Averaging
from backpass.training.divergence import Divergence
from backpass.training.fingerprint import differences
from backpass.training.meter import Meter, Totals
from backpass.training.processes import from_all, rank, world
from backpass.training.settings import Settings
from backpass.training.update import Update
from backpass.version import __version__

__all__ = ["Position", "RunState"]


@dataclass
class Position:
    """Where a run is.

    Attributes:
        epoch: finished epochs.
        within: steps taken in the epoch that is running.
        step: steps taken in all.
        history: a record of each finished epoch.
    """

    epoch: int = 0
    within: int = 0
    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class RunState:
    """The parts of a run that change while it goes on."""

    settings: Settings
    position: Position
    update: Update
    attached: Sequence[Attached]
    averaging: Averaging | None
    meter: Meter
    totals: Totals
    divergence: Divergence

    @property
    def _model(self) -> nn.Module:
        return unwrap(self.settings.model)

    def state_dict(self) -> dict[str, Any]:
        """A checkpoint; every process must call this, and process 0 gets all."""
        settings, position, model = self.settings, self.position, self._model
        saved = model.state_dict()
        scaler = self.update.scaler
        return {
            "versions": {"backpass": __version__, "torch": str(torch.__version__)},
            "settings": {**settings.description, "processes": world(), "epochs": settings.epochs},
            "position": [position.epoch, position.within, position.step],
            "history": position.history,
            "model": saved,
            "buffers": {name: one for name, one in model.named_buffers() if name not in saved},
            "optimizer": settings.optimizer.state_dict(),
            "scheduler": settings.scheduler.state_dict() if settings.scheduler else None,
            "rules": [state() if (state := getattr(one, "state_dict", None)) else None for one in self.attached],
            "scaler": scaler.state_dict() if scaler else None,
            "average": self.averaging.state_dict() if self.averaging else None,
            "totals": self.totals.state_dict(),
            "first_loss": self.divergence.first,
            "processes": from_all(self._of_this_process()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint.

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
                "or of another version of backpass. Start anew in another folder, with the version at hand."
            ) from error

    def _load(self, state: dict[str, Any]) -> None:
        settings, position, model = self.settings, self.position, self._model
        self._refuse_others(state["settings"])
        position.epoch, position.within, position.step = state["position"]
        position.history[:] = state["history"]
        model.load_state_dict(state["model"])
        buffers = dict(model.named_buffers())
        for name, value in state["buffers"].items():
            buffers[name].copy_(value)
        settings.optimizer.load_state_dict(state["optimizer"])
        if settings.scheduler is not None:
            settings.scheduler.load_state_dict(state["scheduler"])
        for one, saved in zip(self.attached, state["rules"], strict=True):
            if saved is not None:
                one.load_state_dict(saved)  # type: ignore[attr-defined]
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
        epochs, average = before["epochs"], self.settings.averaged
        whole = average is not None and average.kind == "polyak"
        if self.settings.epochs < epochs or (whole and self.settings.epochs != epochs):
            others.append(f"epochs: was {epochs}, is {self.settings.epochs} (they may only grow)")
        if others:
            raise BackpassError(
                "the checkpoint is of a run with other settings: "
                + "; ".join(others)
                + ". Resume with those of the run "
                "(model, optimizer and scheduler made as they were made then), or train in another folder."
            )

    def _of_this_process(self) -> dict[str, Any]:
        device, objective = self.settings.device, self.settings.objective
        return {
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            "meter": self.meter.state_dict(),
            "objective": objective.state_dict() if hasattr(objective, "state_dict") else None,
        }

    def _restore_process(self, state: dict[str, Any]) -> None:
        torch.set_rng_state(state["random"])
        if state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"], self.settings.device)
        self.meter.load_state_dict(state["meter"])
        if state["objective"] is not None:
            self.settings.objective.load_state_dict(state["objective"])  # type: ignore[attr-defined]
