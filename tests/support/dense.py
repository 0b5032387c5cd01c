"""LinBP by dense Jacobians: slow and obvious, to hold the rule against."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Parameters = dict[str, Tensor]


@dataclass
class Stage:
    """state -> affine(parameters, state), then the activation on the first ``active`` entries of each sample."""

    affine: Callable[[Parameters, Tensor], Tensor]
    activation: Callable[[Tensor], Tensor] | None = None
    active: int | None = None


def dense_gradients(
    model: nn.Module, stages: list[Stage], x: Tensor, start: int, stop: int, slope: float
) -> tuple[Tensor, Parameters, Tensor]:
    """Input gradient, weight gradients and output for the loss 1/2 |f(x)|^2, one sample at a time."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    input_gradients, outputs = [], []
    weight_gradients = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for sample in x:
        state, tape = sample.reshape(-1), []
        for stage in stages:
            z = stage.affine(parameters, state)
            tape.append((stage, state, z))
            state = _activate(stage, z)
        outputs.append(state)
        gradient, site = state, sum(stage.activation is not None for stage in stages)
        for stage, before, z in reversed(tape):
            if stage.activation is not None:
                site -= 1
                gradient = gradient * _local_derivative(stage, z, slope if start <= site < stop else None)
            by_parameter, by_state = torch.func.jacrev(stage.affine, argnums=(0, 1))(parameters, before)
            for name, jacobian in by_parameter.items():
                weight_gradients[name] += torch.tensordot(gradient, jacobian, dims=1)
            gradient = by_state.T @ gradient
        input_gradients.append(gradient)
    return torch.stack(input_gradients).reshape(x.shape), weight_gradients, torch.stack(outputs)


def _activate(stage: Stage, z: Tensor) -> Tensor:
    if stage.activation is None:
        return z
    n = len(z) if stage.active is None else stage.active
    return torch.cat([stage.activation(z[:n]), z[n:]])


def _local_derivative(stage: Stage, z: Tensor, slope: float | None) -> Tensor:
    n = len(z) if stage.active is None else stage.active
    derivative = torch.ones_like(z)
    derivative[:n] = torch.func.jacrev(stage.activation)(z[:n]).diagonal() if slope is None else slope
    return derivative
