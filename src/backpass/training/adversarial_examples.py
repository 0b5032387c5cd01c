"""Adversarial examples that a network is trained on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import fields, replace
from typing import Any
from weakref import finalize, ref

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from backpass.attacks import Attack
from backpass.attacks.checks import NotFiniteLogitsError
from backpass.attacks.losses import Loss
from backpass.attacks.search import SearchAttack
from backpass.errors import BackpassError
from backpass.rules import Attached, Rule, unwrap
from backpass.training.batches import Batch
from backpass.training.objective import Plain
from backpass.training.orders import mixed

__all__ = ["AdversarialExamples", "local_model", "scaled"]

_LENGTHS = ("eps", "step", "start_eps", "noise")


class AdversarialExamples:
    """Compute x_adv of a batch, the end of one search of the attack.

    The model is in eval mode meanwhile: BatchNorm uses its running statistics and does not move them, and nothing is
    dropped out. The random draws for a sample are made from (attack.seed, batch.seed, batch.epoch, its position in the
    data), so that a resumed run, and any number of processes, get the same examples.

    Args:
        attack: inner maximiser; its `restarts` and `early_stop` have no effect, because each sample is searched once
            and to the end. AutoAttack, which is no single search, is run as it is.
        rule: rule for its gradients; None for plain backpropagation.
        warmup: epochs in which eps, and every other length of the attack, rises in equal parts, as in `scaled`.
    """

    def __init__(self, attack: Attack, rule: Rule | None, warmup: int) -> None:
        self.attack, self.rule, self.warmup = attack, rule, warmup
        self._resting: _Resting | None = None

    def __call__(
        self,
        model: nn.Module,
        batch: Batch,
        plain: Plain,
        value: Loss | None = None,
    ) -> Tensor:
        """Return x_adv (B, ...) for ``batch.x``, or x itself where outputs are not finite, which the loss shows.

        Args:
            model: the network; a DDP wrapper is removed.
            batch: samples to perturb.
            plain: returns a context without the rules that update the weights.
            value: function to maximise instead of the attack's loss, (logits (B, C), row (B,)) -> (B,).

        Raises:
            BackpassError: as the attack does.
        """
        inside = local_model(model)
        attack = replace(
            scaled(self.attack, min(1.0, (batch.epoch + 1) / (self.warmup + 1))),
            seed=mixed(self.attack.seed, batch.seed, batch.epoch),
        )
        with plain(), self._ruled(inside):
            try:
                if isinstance(attack, SearchAttack):
                    return attack.search(inside, batch.x, batch.y, indices=batch.index, value=value)
                return attack(inside, batch.x, batch.y, indices=batch.index).x_adv
            except NotFiniteLogitsError:
                return batch.x

    def close(self) -> None:
        """Remove the rule from the model; a later call attaches it again."""
        if self._resting is not None:
            self._resting.attached.remove()
            self._resting = None

    def _ruled(self, model: nn.Module) -> AbstractContextManager[object]:
        if self.rule is None:
            return ExitStack()
        if self._resting is None or self._resting.model() is not unwrap(model):
            self.close()
            self._resting = _Resting(self.rule.attach(model))
            finalize(self, self._resting.attached.remove)
        return self._resting.awake()


class _Resting:
    """A rule that is attached for the whole training, and in force only while examples are made."""

    def __init__(self, attached: Attached) -> None:
        self.attached = attached
        self.model = ref(attached.model)
        self._rest = ExitStack()
        self._rest.enter_context(attached.suspended())

    @contextmanager
    def awake(self) -> Iterator[None]:
        self._rest.close()
        try:
            yield
        finally:
            self._rest.enter_context(self.attached.suspended())


def scaled(attack: Attack, factor: float) -> Attack:
    """Return the attack with its eps, step, start and noise multiplied by a factor in (0, 1]."""
    lengths: dict[str, Any] = {
        field.name: tuple(one * factor for one in value) if isinstance(value, tuple) else value * factor
        for field in fields(attack)
        if field.name in _LENGTHS and (value := getattr(attack, field.name)) is not None
    }
    return attack if factor == 1.0 else replace(attack, **lengths)


def local_model(model: nn.Module) -> nn.Module:
    """Return the model without a DDP wrapper, whose forward would wait for the other processes.

    Raises:
        BackpassError: ``model`` is no ``nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise BackpassError(f"expected an nn.Module, got {type(model).__name__}: pass the model itself.")
    original = getattr(model, "_orig_mod", None)
    if isinstance(original, DistributedDataParallel):
        model = original
    return local_model(model.module) if isinstance(model, DistributedDataParallel) else model
