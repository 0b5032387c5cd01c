"""Labels that no output of the model could ever match."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from backpass.attacks.guard import leave_no_trace
from backpass.errors import BackpassError
from backpass.training.batches import Batch
from backpass.training.objective import PerSample
from backpass.training.settings import Settings

__all__ = ["check_labels"]


def check_labels(settings: Settings, model: nn.Module) -> None:
    """Compare all labels with the model's number of outputs, which costs a forward pass of two samples.

    A loss of one's own (`PerSample`) says itself what a target may be; of a Dataset the labels are not known before.

    Raises:
        BackpassError: a label is negative, no integer, or has no output.
    """
    tensors = settings.source.tensors
    if tensors is None or isinstance(settings.objective, PerSample):
        return
    y = tensors[1]
    if y.dim() != 1 or y.is_floating_point():
        raise BackpassError(
            f"labels are integers of shape (N,), got {y.dtype} {tuple(y.shape)}: convert them (y.long()), or give "
            "objective=PerSample(loss) for targets of another kind."
        )
    x, labels = (one[:2].to(settings.device) for one in tensors)
    batch = Batch(x=x, y=labels, index=torch.arange(len(x), device=x.device), epoch=0, step=0, seed=settings.seed)
    with leave_no_trace(model), torch.no_grad():
        output = model(settings.prepare(x, batch))
    lowest, highest = int(y.min()), int(y.max())
    classes = output.shape[1] if isinstance(output, Tensor) and output.dim() == 2 else highest + 1
    if lowest < 0 or highest >= classes:
        raise BackpassError(
            f"labels are in 0..{classes - 1} for a model of {classes} outputs, and these are {lowest} to {highest}: "
            "number the classes from 0, or give the model more outputs."
        )
