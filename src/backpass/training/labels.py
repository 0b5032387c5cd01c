"""Labels that no output of the model could ever match."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from backpass.errors import BackpassError
from backpass.preserved import preserved
from backpass.training.batches import Batch, unit_interval
from backpass.training.objective import PerSample
from backpass.training.settings import Settings

__all__ = ["check_labels"]


def check_labels(settings: Settings, model: nn.Module) -> None:
    """Compare all labels with the model's number of outputs, which costs two forward passes of two samples.

    Those of the evaluation set too: a mistake there would show only when an epoch's work is done.

    A loss of one's own (`PerSample`) says itself what a target may be; of a Dataset the labels are not known before.

    Raises:
        BackpassError: a label is negative, no integer, or has no output.
    """
    if isinstance(settings.objective, PerSample):
        return

    def prepare(x: Tensor, y: Tensor) -> Tensor:
        index = torch.arange(len(x), device=x.device)
        return settings.prepare(x, Batch(x=x, y=y, index=index, epoch=0, step=0, seed=settings.seed))

    _compare(settings.source.tensors, prepare, model, settings.device, "")
    if settings.evaluated is not None:
        prepare_evaluation = settings.prepare_evaluation or unit_interval
        of_evaluation = " of the evaluation set"
        _compare(settings.evaluated.tensors, lambda x, y: prepare_evaluation(x), model, settings.device, of_evaluation)


def _compare(
    tensors: tuple[Tensor, Tensor] | None,
    prepare: Callable[[Tensor, Tensor], Tensor],
    model: nn.Module,
    device: torch.device,
    where: str,
) -> None:
    if tensors is None:
        return
    y = tensors[1]
    if y.dim() != 1 or y.dtype not in (torch.int64, torch.uint8):
        raise BackpassError(
            f"labels{where} are integers of shape (N,), int64 or uint8; got {y.dtype} {tuple(y.shape)}: convert them "
            "(y.long()), or give objective=PerSample(loss) for targets of another kind."
        )
    x, labels = (one[:2].to(device) for one in tensors)
    with preserved(model), torch.no_grad():
        prepared = prepare(x, labels)
        try:
            output = model(prepared)
        except RuntimeError as error:
            raise BackpassError(
                f"the model does not take x{where}, for two samples {prepared.dtype} {tuple(prepared.shape)}: {error}"
            ) from error
    lowest, highest = int(y.min()), int(y.max())
    classes = output.shape[1] if isinstance(output, Tensor) and output.dim() == 2 else highest + 1
    if lowest < 0 or highest >= classes:
        raise BackpassError(
            f"labels{where} are in 0..{classes - 1} for a model of {classes} outputs, and these are {lowest} to "
            f"{highest}: number the classes from 0, or give the model more outputs."
        )
