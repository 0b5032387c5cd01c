"""The training problem: a loss per sample of a flat parameter vector, and data."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from backpass.errors import BackpassError
from backpass.numbers import is_number

__all__ = ["Data", "Loss", "check_data", "check_losses", "check_rate", "check_theta", "from_module"]

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""loss(theta, x, y) -> (N,): parameters (P,), what the adversary moves (N, ...), and the rest of each sample (N, ...).

Value i must depend on sample i alone, and the function must work under `torch.func`.
"""

Data = tuple[Tensor, Tensor]
"""x (N, ...), which the adversary moves, and y (N, ...), which it does not: labels, targets, or inputs."""


def from_module(model: nn.Module, criterion: Callable[[Tensor, Tensor], Tensor]) -> tuple[Loss, Tensor]:
    """Make a loss of a flat parameter vector out of a network: loss(theta, x, y) = criterion(model_theta(x), y).

    theta holds the parameters that require a gradient, in the order of ``model.parameters()``, so that
    ``torch.nn.utils.vector_to_parameters(theta, (p for p in model.parameters() if p.requires_grad))`` writes a
    result back. The model itself is never changed.

    Args:
        model: in eval mode, where it has layers that differ; deterministic.
        criterion: of the output and y, one value per sample, (N,), for instance
            ``functools.partial(torch.nn.functional.cross_entropy, reduction="none")``.

    Returns:
        The loss, and the present parameters (P,).

    Raises:
        BackpassError: the model has no trainable parameter, or a layer that mixes or drops samples is training.
    """
    if not isinstance(model, nn.Module) or not callable(criterion):
        raise BackpassError(
            f"a network and a criterion of its output and y are needed; got {model!r} and {criterion!r}."
        )
    for path, module in model.named_modules():
        mixing = isinstance(module, nn.modules.batchnorm._BatchNorm | nn.modules.dropout._DropoutNd | nn.RReLU)
        if mixing and module.training:
            raise BackpassError(
                f"the loss of a sample must depend on it alone and on no chance, but {path!r} "
                f"({type(module).__name__}) is in training mode. Call model.eval() first."
            )
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise BackpassError("the model has no parameter that requires a gradient, so there is nothing to follow.")
    names, shapes = list(trainable), [p.shape for p in trainable.values()]
    sizes = [p.numel() for p in trainable.values()]
    theta0 = torch.cat([p.detach().reshape(-1) for p in trainable.values()])

    def loss(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        if theta.shape != theta0.shape:
            raise BackpassError(f"this model has {len(theta0)} parameters; got theta of shape {tuple(theta.shape)}.")
        parts = torch.split(theta, sizes)
        parameters = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return criterion(functional_call(model, parameters, (x,)), y)

    return loss, theta0


def check_data(data: object) -> int:
    """The number of samples N.

    Raises:
        BackpassError: the data are not a pair of tensors of the same, positive length, or not finite.
    """
    if not (isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(part, Tensor) for part in data)):
        got = ", ".join(type(part).__name__ for part in data) if isinstance(data, tuple | list) else type(data).__name__
        raise BackpassError(
            f"data must be a pair of tensors (x, y) with a row per sample, got {got}. Use torch.from_numpy for arrays "
            "and dataset.tensors of a TensorDataset. Without labels, pass y = torch.zeros(len(x))."
        )
    x, y = data
    if x.ndim == 0 or y.ndim == 0 or len(x) != len(y) or len(x) == 0:
        raise BackpassError(
            f"x and y need the same number of samples, at least one; got shapes {tuple(x.shape)} and {tuple(y.shape)}."
        )
    if not x.is_floating_point():
        raise BackpassError(f"x is what the adversary moves, so it must be floating point; got {x.dtype}.")
    for name, part in (("x", x), ("y", y)):
        if not torch.isfinite(part).all():
            raise BackpassError(f"{name} has {int((~torch.isfinite(part)).sum())} values that are NaN or infinite.")
    return len(x)


def check_losses(losses: Tensor, samples: int) -> Tensor:
    """The losses, if there is one per sample.

    Raises:
        BackpassError: there is another number of them.
    """
    if not isinstance(losses, Tensor) or losses.shape != (samples,):
        got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise BackpassError(
            f"the loss must give one value per sample, shape ({samples},); got {got}. Use reduction='none'."
        )
    return losses


def check_theta(theta: Tensor, like: Tensor) -> Tensor:
    """Parameters of one path (P,) or of several (M, P), of the data's dtype.

    Raises:
        BackpassError: another shape or dtype.
    """
    if not isinstance(theta, Tensor) or theta.ndim not in (1, 2) or theta.numel() == 0:
        got = tuple(theta.shape) if isinstance(theta, Tensor) else type(theta).__name__
        raise BackpassError(f"theta is a vector (P,), or one per path (M, P); got {got}.")
    if theta.device != like.device:
        raise BackpassError(f"theta is on {theta.device} but the data are on {like.device}: move one of them.")
    if theta.dtype != like.dtype:
        raise BackpassError(f"theta is {theta.dtype} but the data are {like.dtype}: convert one of them.")
    return theta


def check_rate(name: str, value: object, *, positive: bool = False) -> None:
    """Check a step size: a finite number >= 0, or a floating-point tensor () that holds one.

    Raises:
        BackpassError: the value is out of its range.
    """
    tensor = isinstance(value, Tensor) and value.is_floating_point() and value.ndim == 0
    number = float(value.detach()) if isinstance(value, Tensor) and tensor else value
    if not is_number(number) or number < 0 or (positive and number == 0):
        raise BackpassError(
            f"{name} must be a finite number {'> 0' if positive else '>= 0'}, or a tensor () to differentiate with "
            f"respect to it; got {value!r}."
        )
