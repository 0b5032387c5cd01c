"""Complete state of a run for exact resumption."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from backpass.errors import BackpassError
from backpass.rules import Attached, unwrap
from backpass.training.averaging import Averaging, read_average
from backpass.training.fingerprint import differences
from backpass.training.meter import Divergence, Meter
from backpass.training.processes import from_all, is_sharded, rank, world
from backpass.training.randomness import random_states, restore_random_states
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
    """Mutable state of a run."""

    settings: Trainer
    position: Position
    update: Update
    attached: Sequence[Attached]
    averaging: Averaging | None
    meter: Meter
    divergence: Divergence

    def description(self) -> dict[str, Any]:
        """Describe the run in JSON types; a checkpoint with another description is an error."""
        return {**self.settings.description, "processes": world(), "epochs": self.settings.epochs}

    def state_dict(self) -> dict[str, Any]:
        """Return a checkpoint; every process must call this, and process 0 gets everything."""
        settings, position, model = self.settings, self.position, unwrap(self.settings.model)
        if is_sharded(model):
            from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            weights, optimizer = get_state_dict(model, settings.optimizer, options=options)
        else:
            weights, optimizer = model.state_dict(), settings.optimizer.state_dict()
        device = settings.device
        own = {
            "random": random_states(),
            "random_cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            "parts": {name: part.state_dict() for name, part in self._own_parts().items()},
        }
        return {
            "versions": {"backpass": __version__, "torch": str(torch.__version__)},
            "settings": self.description(),
            "position": [position.epoch, position.within, position.step],
            "history": position.history,
            "evaluations": position.evaluations,
            "model": weights,
            "buffers": {name: one for name, one in model.named_buffers() if name not in weights},
            "optimizer": optimizer,
            "parts": {name: part.state_dict() for name, part in self._parts().items()},
            "first_loss": self.divergence.first,
            "processes": from_all(own),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint.

        Raises:
            BackpassError: it is of a run with other settings, which the message names, or lacks something.
        """
        try:
            self._refuse_others(state["settings"])
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
        position.epoch, position.within, position.step = state["position"]
        position.history[:], position.evaluations[:] = state["history"], state["evaluations"]
        if is_sharded(model):
            from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

            set_state_dict(
                model,
                settings.optimizer,
                model_state_dict=state["model"],
                optim_state_dict=state["optimizer"],
                options=StateDictOptions(full_state_dict=True),
            )
        else:
            model.load_state_dict(state["model"])
            settings.optimizer.load_state_dict(state["optimizer"])
        buffers = dict(model.named_buffers())
        for name, value in state["buffers"].items():
            buffers[name].copy_(value)
        self.divergence.first = state["first_loss"]
        own = state["processes"][rank()]
        for parts, states in ((self._parts(), state["parts"]), (self._own_parts(), own["parts"])):
            for name, part in parts.items():
                part.load_state_dict(states[name])
        restore_random_states(own["random"])
        if own["random_cuda"] is not None:
            torch.cuda.set_rng_state(own["random_cuda"], settings.device)

    def _parts(self) -> dict[str, Any]:
        """Return the other stateful parts that all processes share."""
        settings = self.settings
        parts: dict[str, Any] = {"scheduler": settings.scheduler, "order": settings.order}
        parts |= {"scaler": self.update.scaler, "average": self.averaging}
        parts |= {f"rule {place}": one for place, one in enumerate(self.attached)}
        return {name: part for name, part in parts.items() if hasattr(part, "state_dict")}

    def _own_parts(self) -> dict[str, Any]:
        """Return the stateful parts of this process only."""
        objective: Any = self.settings.objective
        return {"meter": self.meter} | ({"objective": objective} if hasattr(objective, "state_dict") else {})

    def _refuse_others(self, before: dict[str, Any]) -> None:
        now = self.description()
        others = differences({**before, "epochs": now["epochs"]}, now)
        average = self.settings.average
        of_all_steps = average is not None and read_average(average)[0] == "polyak"
        if now["epochs"] < before["epochs"] or (of_all_steps and now["epochs"] != before["epochs"]):
            others.append(f"epochs: was {before['epochs']}, is {now['epochs']} (they may only grow)")
        if others:
            raise BackpassError(
                "the checkpoint is of a run with other settings: "
                + "; ".join(others)
                + ". Resume with those of the run (make model, optimizer and scheduler as for its start), or train in "
                "another folder."
            )
