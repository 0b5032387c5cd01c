"""How an attack is measured: in which space it moves, how far, and from where it starts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from backpass.data.normalisation import Normalisation, known_normalisation
from backpass.errors import BackpassError, UnknownNameError
from backpass.wording import listing

__all__ = [
    "PROTOCOLS",
    "Normalisation",
    "Paper",
    "Protocol",
    "Rescaled",
    "Standard",
    "known_normalisation",
    "make_protocol",
]

PROTOCOLS = ("standard", "paper")


class Rescaled(nn.Module):
    """A model that first maps its input, x -> x * scale + shift for every channel.

    Args:
        model: takes what the map gives.
        scale: (C, 1, 1).
        shift: (C, 1, 1).
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, model: nn.Module, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Any:
        """The model on x * scale + shift, x: (N, C, H, W)."""
        return self.model(x * self.scale + self.shift)


@dataclass(frozen=True)
class Protocol(ABC):
    """Space in which an attack moves, and the meaning of eps there."""

    name = ""
    restarts = 1
    step = 2 / 255

    @abstractmethod
    def images(self, x: Tensor) -> Tensor:
        """From pixels (..., C, H, W) in [0, 1] to the space in which the attack moves."""

    @abstractmethod
    def pixels(self, z: Tensor) -> Tensor:
        """Back to pixels; outside [0, 1] where the protocol allows it."""

    @abstractmethod
    def model(self, model: nn.Module) -> nn.Module:
        """The model as the attack sees it, for inputs of its space; `model` takes pixels."""

    @abstractmethod
    def settings(self, eps: float, known: Container[str]) -> dict[str, Any]:
        """An attack's settings for the radius eps: those of `known` that the protocol decides."""

    @abstractmethod
    def explain(self, eps: Sequence[float], step: float | None) -> str:
        """Return the meaning of eps and step in pixels, in a few sentences."""


@dataclass(frozen=True)
class Standard(Protocol):
    """Pixels in [0, 1], every image valid, eps and step in units of the pixel range."""

    name = "standard"

    def images(self, x: Tensor) -> Tensor:  # noqa: D102
        return x

    def pixels(self, z: Tensor) -> Tensor:  # noqa: D102
        return z

    def model(self, model: nn.Module) -> nn.Module:  # noqa: D102
        return model

    def settings(self, eps: float, known: Container[str]) -> dict[str, Any]:  # noqa: D102
        return {"eps": eps, "bounds": (0.0, 1.0)}

    def explain(self, eps: Sequence[float], step: float | None) -> str:  # noqa: D102
        return "Pixels run from 0 to 1, adversarial images are valid images, and eps and step count in that range."


@dataclass(frozen=True)
class Paper(Protocol):
    """The protocol of Li et al. (arXiv 2112.11018) as their code has it: normalised space, ball of twice eps.

    Around the normalised image every value may move by 2 eps, the random start is uniform in +-eps, the step is
    2/255, all in normalised units; nothing is clipped to valid pixels; the best of 5 restarts counts.

    Args:
        normalisation: of the data.
    """

    normalisation: Normalisation

    name = "paper"
    restarts = 5

    def images(self, x: Tensor) -> Tensor:  # noqa: D102
        mean, std = self.normalisation.column
        return (x - mean.to(x.device)) / std.to(x.device)

    def pixels(self, z: Tensor) -> Tensor:  # noqa: D102
        mean, std = self.normalisation.column
        return z * std.to(z.device) + mean.to(z.device)

    def model(self, model: nn.Module) -> nn.Module:  # noqa: D102
        mean, std = self.normalisation.column
        device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
        return Rescaled(model, std.to(device), mean.to(device))

    def settings(self, eps: float, known: Container[str]) -> dict[str, Any]:
        """The ball of twice eps, and bounds so wide that nothing reaches them."""
        low = min(-m / s for m, s in zip(self.normalisation.mean, self.normalisation.std, strict=True))
        high = max((1 - m) / s for m, s in zip(self.normalisation.mean, self.normalisation.std, strict=True))
        # No wider than needed: the attacks' allowance for rounding grows with the bounds.
        room = 2 * eps + 0.01
        chosen = {"eps": 2 * eps, "bounds": (low - room, high + room), "start_eps": eps}
        return {name: value for name, value in chosen.items() if name in known}

    def explain(self, eps: Sequence[float], step: float | None) -> str:
        """The normalised units in pixels."""

        def in_pixels(length: float) -> str:
            return listing([f"{255 * length * s:.2f}" for s in self.normalisation.std])

        words = [
            "eps and step count in normalised units, and the ball is twice eps wide on either side "
            f"({self.normalisation}). In pixels of 0 to 255, by channel:"
        ]
        parts = [
            f"eps {255 * e:.3g}/255 is a radius of {in_pixels(2 * e)} and a start within {in_pixels(e)}" for e in eps
        ]
        if step is not None:
            parts.append(f"the step of {255 * step:.3g}/255 is {in_pixels(step)}")
        words.append("; ".join(parts) + ". Nothing is clipped to valid pixels.")
        return " ".join(words)


def make_protocol(name: str, data: str, normalisation: Normalisation | None) -> Protocol:
    """The protocol of a name.

    Args:
        name: ``"standard"`` or ``"paper"``.
        data: the data set's name, whose usual normalisation is taken where none is given.
        normalisation: the one to use.

    Raises:
        UnknownNameError: there is no such protocol.
        BackpassError: the protocol needs a normalisation and none is known.
    """
    if name not in PROTOCOLS:
        raise UnknownNameError("protocol", name, PROTOCOLS)
    if name == "standard":
        return Standard()
    found = normalisation or known_normalisation(data)
    if found is None:
        raise BackpassError(
            f"the protocol 'paper' attacks normalised images, and the normalisation of {data!r} is not known: give "
            "--mean and --std, as in --mean 0.49,0.48,0.45 --std 0.2,0.2,0.2."
        )
    return Paper(found)
