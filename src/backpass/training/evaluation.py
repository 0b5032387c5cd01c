"""Loss, accuracy and further metrics of the evaluation sets, and robust accuracy."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils._pytree import tree_map

from backpass.errors import BackpassError
from backpass.preserved import preserved
from backpass.training.batches import Batch, Order, forward, unit_interval
from backpass.training.objective import CrossEntropy, correct, select
from backpass.training.processes import from_all, from_first, is_sharded, rank, summed, world
from backpass.training.sources import Source

if TYPE_CHECKING:
    from backpass.training.trainer import Trainer
    from backpass.training.update import Update

__all__ = ["Evaluation", "Metric", "check_targets"]

Metric = Callable[[Any, Tensor], float | Tensor]
"""(outputs (N, ...), targets (N, ...)) of the whole evaluation set -> a number."""


class Evaluation:
    """Evaluate a model in eval mode and restore its state: flags, running statistics, gradients, generators.

    Args:
        settings: settings of the run.
        model: model without a DDP wrapper, or the sharded model.
        update: has the contexts without rules and of autocast.
    """

    def __init__(self, settings: Trainer, model: nn.Module, update: Update) -> None:
        self._settings, self._model, self._plain, self._autocast = settings, model, update.plain, update.autocast
        objective = getattr(settings.objective, "evaluation", settings.objective)
        self._loss = getattr(objective, "losses", CrossEntropy().losses)
        self._correct = getattr(objective, "correct", correct)
        self._logits = getattr(objective, "logits", None)

    def __call__(self) -> dict[str, Any]:
        """Return loss, accuracy (of a classifier) and metrics of the evaluation set, or of each set by name."""
        several = {name: self._of(source) for name, source in self._settings.evaluated.items()}
        return several.get("", several)

    def _of(self, source: Source) -> dict[str, float]:
        outputs: list[tuple[Any, Tensor]] = []
        with preserved(self._model), torch.no_grad(), self._plain(), self._autocast():
            _share_buffers(self._model)
            sums = torch.zeros(4, dtype=torch.float64, device=self._settings.device)
            for x, y, counted in self._read(source):
                output = forward(self._model, x)
                if not counted:
                    continue
                right = self._correct(output, y)
                sums[0] += self._loss(output, y).sum(dtype=torch.float64)
                sums[1] += 0 if right is None else right.sum()
                sums[2:] += torch.tensor([right is not None, len(y)], device=sums.device)
                if self._settings.metrics:
                    outputs.append(tree_map(_on_cpu, (select(output, self._logits), y)))
            loss, hits, classified, count = summed(sums).tolist()
        means = {"loss": loss / count}
        if classified:
            means["accuracy"] = hits / count
        return {**means, **self._metrics(outputs)} if self._settings.metrics else means

    def _metrics(self, outputs: list[tuple[Any, Tensor]]) -> dict[str, float]:
        output, y = tree_map(_joined, *(one for part in from_all(outputs) for one in part))
        found = {name: function(output, y) for name, function in self._settings.metrics.items()}
        return _numbers(found, "a function of metrics returns a number")

    def robust(self) -> dict[str, float]:
        """Return the result of ``robust`` on the first evaluation set, in process 0; the others wait.

        Raises:
            BackpassError: the model is sharded, so that a single process cannot call it.
        """
        source, function = next(iter(self._settings.evaluated.values())), self._settings.robust
        tensors = source.tensors
        assert tensors is not None  # noqa: S101  the settings are checked
        assert function is not None  # noqa: S101
        if is_sharded(self._model):
            raise BackpassError(
                "robust is measured by one process, and no single process can call a model sharded by fully_shard: "
                "leave robust out, and evaluate the saved weights afterwards."
            )
        rows = torch.cat(list(_rows(source, len(source))))
        x, y = (one[rows.to(one.device)].to(self._settings.device) for one in tensors)
        with preserved(self._model), self._plain():
            _share_buffers(self._model)
            return from_first(
                lambda: _numbers(
                    function(self._model, self._prepare(x), y),
                    "robust returns a dict of numbers, such as {'robust_accuracy': 0.4}",
                )
            )

    def _read(self, source: Source) -> Iterator[tuple[Any, Tensor, bool]]:
        """Yield (x, y, counted) of this process; uncounted batches only keep sharded processes in step."""
        own_size = source.batch_size if source.batch_size not in (None, 1) else self._settings.batch_size
        size = -(-(own_size or 256) // world())
        batches = list(_rows(source, size))
        own = batches[rank() :: world()]
        steps = -(-len(batches) // world())
        rows = own + [batches[0]] * (steps - len(own)) if is_sharded(self._model) else own
        for place, (x, y) in enumerate(source.read(rows, 0, self._settings.device, 0)):
            yield self._prepare(x), y, place < len(own)

    def _prepare(self, x: Any) -> Any:
        x = (self._settings.prepare_evaluation or unit_interval)(x)
        if self._settings.channels_last and isinstance(x, Tensor) and x.dim() == 4:
            return x.contiguous(memory_format=torch.channels_last)
        return x


def check_targets(settings: Trainer, model: nn.Module) -> None:
    """Compare all targets with the output for two samples, if data and objective allow it.

    The evaluation set is checked too, because its errors would otherwise appear only after an epoch.

    Raises:
        BackpassError: the model does not take x, or the targets do not fit.
    """
    check = getattr(settings.objective, "check_targets", None)
    if check is None or is_sharded(model):
        return

    def prepare(x: Tensor, y: Tensor) -> Any:
        index = torch.arange(len(x), device=x.device)
        return settings.prepare(x, Batch(x=x, y=y, index=index, epoch=0, step=0, seed=settings.seed))

    of_evaluation = settings.prepare_evaluation or unit_interval
    places = [(settings.source, prepare, "")]
    places += [(one, lambda x, y: of_evaluation(x), " of the evaluation set") for one in settings.evaluated.values()]
    for source, prepared, where in places:
        if source.tensors is None:
            continue
        x, y = (one[:2].to(settings.device) for one in source.tensors)
        with preserved(model), torch.no_grad():
            images = prepared(x, y)
            try:
                output = model(images)
            except (RuntimeError, TypeError) as error:
                got = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else f"{images!r}"
                raise BackpassError(f"the model does not take x{where}, for two samples {got}: {error}") from error
        check(source.tensors[1], output, where)


def _rows(source: Source, size: int) -> Iterator[Tensor]:
    """Yield the positions of the evaluation set in batches: all in order, or in the order of its loader's sampler."""
    if source.sampler is None or source.sequential:
        yield from torch.split(torch.arange(len(source)), size)
        return
    order = Order(source, None if source.in_batches else 1, 0, drop_last=False)
    states = order.states()
    drawn = order.draw(0)
    order.restore(states)
    yield from torch.split(torch.cat(drawn), size)


def _on_cpu(value: Any) -> Any:
    if value is None:
        return None
    if not isinstance(value, Tensor):
        raise BackpassError(
            "metrics are given outputs of tensors, in dicts and tuples too; the model returns a "
            f"{type(value).__name__}: return a dict, or select the logits by objective=CrossEntropy(logits=...)."
        )
    return value.detach().float().cpu() if value.is_floating_point() else value.cpu()


def _joined(*parts: Any) -> Any:
    return None if parts[0] is None else torch.cat([one[None] if not one.dim() else one for one in parts])


def _numbers(measured: object, expected: str) -> dict[str, float]:
    if isinstance(measured, Mapping):
        try:
            return {str(name): float(value) for name, value in measured.items()}
        except (TypeError, ValueError, RuntimeError):
            pass
    raise BackpassError(f"{expected}; got {reprlib.repr(measured)}.")


def _share_buffers(model: nn.Module) -> None:
    """Broadcast the running statistics of process 0, which checkpoints store, to all processes."""
    if world() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)
