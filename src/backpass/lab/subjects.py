"""What is attacked: a network with its weights, ready for images of pixels in [0, 1]."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from backpass.attacks.oracle import LogitsSelector, select_logits
from backpass.data import Labelled
from backpass.data.normalisation import Normalisation, known_normalisation, measured_normalisation
from backpass.errors import BackpassError
from backpass.lab.protocols import Rescaled
from backpass.models import Normalize
from backpass.models.libraries import is_of_a_library, library_network
from backpass.models.lookup import find
from backpass.models.weights import load_weights, weights_hash

__all__ = ["Subject", "load_named", "load_subject", "parse_device", "short_names"]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """A network to attack.

    Attributes:
        name: as it was asked for.
        network: the network itself, to which rules are attached.
        model: what takes pixels in [0, 1]; the network, or a normalisation and the network.
        weights: where they come from, in words.
        digest: twelve digits of a hash of the weights.
        trained: whether the weights came from a file.
    """

    name: str
    network: nn.Module
    model: nn.Module
    weights: str
    digest: str
    trained: bool

    @property
    def size(self) -> int:
        """The number of parameters."""
        return sum(parameter.numel() for parameter in self.network.parameters())

    def try_on(self, x: Tensor, data: str, classes: int | None = None, logits: LogitsSelector = None) -> int | None:
        """Call the network on a few images (N, C, H, W) and return its number of outputs, None where it has no logits.

        More outputs than the data has classes are warned of.

        Args:
            x: the images.
            data: name of the data, for messages.
            classes: number of classes of the data; None: not compared.
            logits: place of the logits in the network's output.

        Raises:
            BackpassError: the network does not take the images, or its output has no such place.
        """
        was = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            with torch.no_grad():
                output = select_logits(self.model(x.clone()), logits)
            if classes and isinstance(output, Tensor) and output.dim() == 2 and output.shape[1] > classes:
                _LOG.warning("%s has %d outputs, and %s %d classes.", self.name, output.shape[1], data, classes)
            return output.shape[1] if isinstance(output, Tensor) and output.dim() == 2 else None
        except BackpassError:
            raise
        except Exception as error:  # a user's own forward may raise anything
            raise BackpassError(
                f"{self.name!r} does not take the images of {data!r}, of shape {tuple(x.shape)}: {_first_line(error)}"
            ) from error
        finally:
            for module, training in was:
                module.training = training


def load_subject(
    name: str,
    weights: Path | None,
    *,
    device: torch.device,
    seed: int = 0,
    normalisation: Normalisation | None = None,
    data: Labelled | None = None,
) -> Subject:
    """The network of a name with the weights of a file.

    Args:
        name: a lab network, a user's own as ``module:callable``, which is imported and called, or one of another
            library as ``timm:NAME``, ``torchvision:NAME`` or ``robustbench:NAME``, normalised as it states.
        weights: a file of weights, or ``None`` for those that the network has when it is made.
        device: where it goes.
        seed: of the initial weights; the global random state is not touched.
        normalisation: what the network expects to be done to pixels, if it does not do so itself.
        data: what a lab network is made for: its images' shape, its classes and, until a file of weights says
            otherwise, its normalisation, the usual one or that of these images; ``None``: what it has by default.

    Raises:
        UnknownNameError: there is no such network.
        BackpassError: the network cannot be made, the file does not fit it, or it would normalise twice.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            if is_of_a_library(name):
                kept = None if data is None else data.name
                network, own_normalisation = library_network(name, pretrained=weights is None, data=kept)
                normalisation = normalisation or own_normalisation
            else:
                network = _make(name, data, seed)
        except BackpassError:
            raise
        except Exception as error:  # a user's own module may raise anything when it is imported or called
            raise BackpassError(f"{name!r} failed when it was imported or called: {_first_line(error)}") from error
    origin = "its own initial ones: no file of weights was given"
    if is_of_a_library(name):
        origin = f"those of {name.partition(':')[0]}"
    if weights is not None:
        load_weights(network, weights)
        origin = weights.name
    network.to(device).eval()
    model = network
    if normalisation is not None:
        own = next((m for m in network.modules() if isinstance(m, Normalize) and not m.changes_nothing), None)
        if own is not None:
            raise BackpassError(f"{name!r} normalises images itself, by {own}: leave --normalize out.")
        mean, std = (part.to(device) for part in normalisation.column)
        model = Rescaled(network, 1 / std, -mean / std)
    return Subject(
        name=name,
        network=network,
        model=model,
        weights=origin,
        digest=weights_hash(network),
        trained=weights is not None or is_of_a_library(name),
    )


def _make(name: str, data: Labelled | None, seed: int) -> nn.Module:
    if data is None:
        return find(name, seed=seed)[0]
    shape = tuple(data.images.pixels.shape[1:])
    own = known_normalisation(data.name) or measured_normalisation(data.images)
    return find(name, shape=shape, classes=data.classes, normalisation=own, seed=seed)[0]


def load_named(
    specs: Sequence[str],
    *,
    device: torch.device,
    seed: int,
    normalisation: Normalisation | None,
    data: Labelled | None = None,
) -> dict[str, Subject]:
    """Networks by their specification, ``SPEC`` or ``SPEC@FILE``; one that comes twice is loaded once.

    Raises:
        BackpassError: a network cannot be made, or a file does not fit its network.
    """
    found: dict[str, Subject] = {}
    for spec in specs:
        if spec not in found:
            name, at, file = spec.rpartition("@")
            parts = (name, Path(file)) if at else (spec, None)
            found[spec] = load_subject(*parts, device=device, seed=seed, normalisation=normalisation, data=data)
    return found


def short_names(specs: Iterable[str]) -> dict[str, str]:
    """For every ``SPEC@FILE`` the same without the file's folders, where that still tells them apart."""
    specs = list(specs)
    short = {spec: f"{name}@{Path(file).name}" for spec in specs for name, at, file in [spec.rpartition("@")] if at}
    names = [short.get(spec, spec) for spec in specs]
    return {spec: name if names.count(name) == 1 else spec for spec, name in zip(specs, names, strict=True)}


def parse_device(text: str) -> torch.device:
    """The device of a name such as ``cpu``, ``cuda`` or ``cuda:1``.

    Raises:
        BackpassError: there is no such device here.
    """
    try:
        device = torch.device(text)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise BackpassError(f"the device {text!r} cannot be used here: {_first_line(error)}") from error
    if device.type == "meta":
        raise BackpassError("the device 'meta' holds no numbers: choose cpu or cuda.")
    return device


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]
