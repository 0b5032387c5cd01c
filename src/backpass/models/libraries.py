"""Networks of other libraries by name: ``timm:NAME``, ``torchvision:NAME``, ``robustbench:NAME``."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import nn

from backpass.data.names import base_name
from backpass.data.normalisation import Normalisation
from backpass.errors import BackpassError

__all__ = ["LIBRARIES", "is_of_a_library", "library_network"]


def is_of_a_library(name: str) -> bool:
    """Return whether a specification names a network of another library."""
    library, colon, _ = name.partition(":")
    return bool(colon) and library in LIBRARIES


def library_network(name: str, *, pretrained: bool, data: str | None = None) -> tuple[nn.Module, Normalisation | None]:
    """Return a network of another library, and the normalisation that its own configuration states.

    Args:
        name: for instance ``timm:resnet50.a1_in1k``.
        pretrained: load the library's weights, which it may download.
        data: name of the data, by which robustbench keeps its networks.

    Raises:
        BackpassError: the library cannot be imported, or has no such network or weights.
    """
    library, _, own = name.partition(":")
    try:
        module = import_module(library)
    except Exception as error:  # a build for another torch raises RuntimeError or OSError
        raise BackpassError(
            f"{name!r} needs {library!r}, which cannot be imported: {_first_line(error)}. Install it, and what it "
            "needs, in versions that fit your torch."
        ) from error
    try:
        return LIBRARIES[library](module, own, pretrained, data)
    except BackpassError:
        raise
    except Exception as error:  # the library may raise anything, and fail to download
        raise BackpassError(
            f"{library} does not give {own!r}: {_first_line(error)}"
            + (". Weights of your own are given with --weights FILE." if pretrained else "")
        ) from error


def _first_line(error: Exception) -> str:
    return (f"{type(error).__name__}: {error}".strip().splitlines() or [""])[0].rstrip(".")


def _timm(timm: Any, name: str, pretrained: bool, data: str | None) -> tuple[nn.Module, Normalisation | None]:
    model = timm.create_model(name, pretrained=pretrained)
    found = import_module("timm.data").resolve_model_data_config(model)
    return model, Normalisation(tuple(map(float, found["mean"])), tuple(map(float, found["std"])))


def _torchvision(
    torchvision: Any, name: str, pretrained: bool, data: str | None
) -> tuple[nn.Module, Normalisation | None]:
    models = import_module("torchvision.models")
    weights = models.get_model_weights(name).DEFAULT
    model = models.get_model(name, weights=weights if pretrained else None)
    found = weights.transforms()
    return model, Normalisation(tuple(map(float, found.mean)), tuple(map(float, found.std)))


def _robustbench(
    robustbench: Any, name: str, pretrained: bool, data: str | None
) -> tuple[nn.Module, Normalisation | None]:
    if not pretrained:
        raise BackpassError("networks of robustbench come with their weights: leave --weights out.")
    own, _, threat = name.partition(",threat=")
    kept = base_name(data) if data else "cifar10"
    load = import_module("robustbench.utils").load_model
    return load(model_name=own, dataset=kept, threat_model=threat or "Linf"), None  # it normalises by itself


LIBRARIES = {"timm": _timm, "torchvision": _torchvision, "robustbench": _robustbench}
