"""Adversarial training: PGD-AT and TRADES, with any attack, and any rule for its gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any
from weakref import finalize, ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpass.attacks import FAB, Attack, AutoAttack
from backpass.attacks.first_look import NotFiniteLogitsError
from backpass.attacks.losses import Loss
from backpass.attacks.search import SearchAttack
from backpass.errors import BackpassError
from backpass.numbers import is_number, is_whole
from backpass.preserved import preserved
from backpass.rules import Attached, Rule, unwrap
from backpass.training.batches import Batch
from backpass.training.objective import CrossEntropy, Evaluated, Plain, select
from backpass.training.processes import local_model
from backpass.training.randomness import mixed

__all__ = ["AdversarialExamples", "AdversarialTraining", "divergence"]

_LENGTHS = ("eps", "step", "start_eps", "noise")


@dataclass(frozen=True)
class AdversarialTraining:
    r"""Objective of PGD adversarial training, or of TRADES if ``trades`` is given.

    PGD-AT: :math:`\min_\theta E\, \ell(f_\theta(x'), y)`, where x' maximises the attack's loss in the ball around x.
    TRADES: :math:`\min_\theta E\, [\ell(f_\theta(x), y) + \beta\, KL(p_\theta(x) \| p_\theta(x'))]`, where x' maximises
    that divergence. The gradient flows through both of its arguments; x' is fixed.

    Two rules can act, independently: ``rule`` on the gradients that lead to x', and those of ``Trainer(rules=...)``
    on the gradients of the weights. With LinBP these are the strategies of Li et al.: 1 (the trainer's alone), 2
    (``rule`` alone), and both.

    An update costs the attack's own gradient passes and one more, for TRADES two more and a forward pass. TRADES
    computes x and x' in one batch, from which BatchNorm takes the statistics.

    Args:
        attack: inner maximiser. It runs once per sample without early stopping: `restarts` and `early_stop` have
            no effect. Its ``logits`` selects the logits in the model's output.
        rule: rule for the attack's gradients; None for plain backpropagation.
        trades: beta of TRADES, positive; None for PGD-AT.
        warmup: epochs before the ball has its full size; in epoch e < warmup every length of the attack is multiplied
            by (e + 1) / (warmup + 1).
        label_smoothing: label smoothing of the cross-entropy, in [0, 1].

    Raises:
        BackpassError: a setting is out of its range, or the attack cannot be the inner maximiser.

    Source:
        Madry et al. (2018), equation (2.1); Zhang et al., Theoretically principled trade-off between robustness and
        accuracy (2019), equation (5) with 1 / lambda = beta, and algorithm 1; Li et al. (arXiv 2112.11018),
        section 4.2.3.

    Example:
        >>> from backpass.attacks import PGD
        >>> objective = AdversarialTraining(PGD(eps=8 / 255, step=2 / 255, steps=10), trades=6.0)
    """

    attack: Attack
    rule: Rule | None = field(default=None, kw_only=True)
    trades: float | None = field(default=None, kw_only=True)
    warmup: int = field(default=0, kw_only=True)
    label_smoothing: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.attack, Attack):
            raise BackpassError(
                f"attack must be an attack such as PGD(eps=8/255, steps=10), got {type(self.attack).__name__}."
            )
        if self.attack.targeted:
            raise BackpassError("adversarial training leads away from each sample's label: leave targeted=False.")
        if self.rule is not None and not isinstance(self.rule, Rule):
            raise BackpassError(f"rule must be a rule such as LinBP(start=-2), or None; got {self.rule!r}.")
        if not is_whole(self.warmup, 0):
            raise BackpassError(f"warmup must be a whole number of epochs, at least 0; got {self.warmup!r}.")
        if self.trades is not None:
            if not (is_number(self.trades) and self.trades > 0):
                raise BackpassError(f"trades must be beta, a positive number such as 6, or None; got {self.trades!r}.")
            chooses = isinstance(self.attack, FAB) or self.attack.loss == "dlr-targeted"
            if chooses or not isinstance(self.attack, SearchAttack):
                raise BackpassError(
                    f"TRADES maximises a divergence, and {type(self.attack).__name__} with loss {self.attack.loss!r} "
                    "chooses its losses itself: use PGD, IFGSM, MIFGSM, FGSM, APGD or Square."
                )
        self.evaluation  # noqa: B018  it checks label_smoothing

    @cached_property
    def examples(self) -> AdversarialExamples:
        """Inner maximiser that computes x'."""
        return AdversarialExamples(self.attack, self.rule, self.warmup)

    @cached_property
    def evaluation(self) -> CrossEntropy:
        """Objective of the evaluation set: cross-entropy of the clean samples."""
        return CrossEntropy(label_smoothing=self.label_smoothing, logits=self.attack.logits)

    def check_targets(self, y: Tensor, output: Any, where: str) -> None:
        """Compare all labels with the output's number of classes.

        Raises:
            BackpassError: they do not fit, or are probabilities.
        """
        if y.is_floating_point():
            raise BackpassError(f"adversarial training needs integer labels{where}, got {y.dtype} {tuple(y.shape)}.")
        self.evaluation.check_targets(y, output, where)

    def close(self) -> None:
        """Remove the rule of the examples from the model."""
        self.examples.close()

    def __call__(self, model: nn.Module, batch: Batch, plain: Plain) -> Evaluated:
        """Evaluate the objective; accuracy and metric are those of x', the accuracy of TRADES that of x."""
        against: Loss | None = None
        if self.trades is not None:
            inside = local_model(model)
            with preserved(inside), torch.no_grad():
                reference = self._logits(inside, batch.x)

            def against(logits: Tensor, row: Tensor) -> Tensor:
                return divergence(reference[row].to(logits.dtype), logits)

        x_adv = self.examples(model, batch, plain, against)

        def evaluate(model: nn.Module, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
            """Return losses (B,), and the logits at x (for TRADES) and x'."""
            y = batch.y[rows]
            if self.trades is None:
                logits = self._logits(model, x_adv[rows])
                return self.evaluation.with_logits(logits, y, "none"), logits, logits
            clean, near = self._logits(model, torch.cat([batch.x[rows], x_adv[rows]])).chunk(2)
            losses = self.evaluation.with_logits(clean, y, "none") + self.trades * divergence(clean, near)
            return losses, clean, near

        losses, clean, near = evaluate(model, slice(None))
        right = near.detach().argmax(1) == batch.y
        return Evaluated(
            loss=losses.mean(),
            correct=clean.detach().argmax(1) == batch.y,
            metrics={"adversarial_accuracy": right.float().mean()},
            again=lambda model, rows: evaluate(model, rows)[0].mean(),
            # Examples by sign steps or by Square are not smooth functions of the parameters.
            moves=self.attack.norm != "linf" or isinstance(self.attack, FAB | AutoAttack),
        )

    def _logits(self, model: nn.Module, x: Tensor) -> Tensor:
        logits = select(model(x), self.attack.logits)
        if not isinstance(logits, Tensor):
            raise BackpassError(
                f"adversarial training needs logits (B, K), got {type(logits).__name__}: select them by the attack's "
                'logits, for instance PGD(..., logits="logits").'
            )
        return logits


def divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """Return KL(p || q) = sum_k p_k (log p_k - log q_k) of the softmax p of ``reference`` and q of ``logits``.

    Args:
        reference: (B, K) logits.
        logits: (B, K) logits.

    Returns:
        (B,), nonnegative, differentiable in both.
    """
    log_p, log_q = F.log_softmax(reference.float(), 1), F.log_softmax(logits.float(), 1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


class AdversarialExamples:
    """Compute the adversarial examples of a batch by one run of the attack.

    The model is in eval mode: BatchNorm uses its running statistics without updating them, and dropout is off. The
    random numbers of a sample depend on (attack.seed, batch.seed, batch.epoch, position in the data) only, so that the
    examples do not depend on resumption or on the number of processes.

    Args:
        attack: inner maximiser; its `restarts` and `early_stop` have no effect. AutoAttack, an ensemble of attacks, is
            run unchanged.
        rule: rule for its gradients; None for plain backpropagation.
        warmup: number of epochs in which all lengths of the attack rise linearly, see `scaled`.
    """

    def __init__(self, attack: Attack, rule: Rule | None, warmup: int) -> None:
        self.attack, self.rule, self.warmup = attack, rule, warmup
        self._attached: Attached | None = None
        self._model: Callable[[], nn.Module | None] = lambda: None
        self._rest = ExitStack()  # outside of attacks the rule stays attached, suspended

    def __call__(
        self,
        model: nn.Module,
        batch: Batch,
        plain: Plain,
        value: Loss | None = None,
    ) -> Tensor:
        """Return x_adv (B, ...) for ``batch.x``, or x itself where outputs are not finite.

        Args:
            model: the network; a DDP wrapper is removed.
            batch: samples to perturb.
            plain: returns a context without the rules that update the weights.
            value: function to maximise instead of the attack's loss, (logits (B, C), row (B,)) -> (B,).

        Raises:
            BackpassError: as in a call of the attack.
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
                x: Tensor = batch.x
                return x

    def close(self) -> None:
        """Remove the rule from the model; a later call attaches it again."""
        if self._attached is not None:
            self._rest.close()
            self._attached.remove()
            self._attached = None

    @contextmanager
    def _ruled(self, model: nn.Module) -> Iterator[None]:
        if self.rule is None:
            yield
            return
        if self._attached is None or self._model() is not unwrap(model):
            self.close()
            self._attached, self._model = self.rule.attach(model), ref(unwrap(model))
            finalize(self, self._attached.remove)
        self._rest.close()
        try:
            yield
        finally:
            self._rest.enter_context(self._attached.suspended())


def scaled(attack: Attack, factor: float) -> Attack:
    """Return the attack with its eps, step, start and noise multiplied by a factor in (0, 1]."""
    lengths: dict[str, Any] = {
        field.name: tuple(one * factor for one in value) if isinstance(value, tuple) else value * factor
        for field in fields(attack)
        if field.name in _LENGTHS and (value := getattr(attack, field.name)) is not None
    }
    return attack if factor == 1.0 else replace(attack, **lengths)
