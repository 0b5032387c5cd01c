"""Adversarial training: PGD-AT and TRADES, with any attack, and any rule for its gradients."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpass.attacks import FAB, Attack, AutoAttack
from backpass.attacks.search import SearchAttack
from backpass.errors import BackpassError
from backpass.numbers import is_number, is_whole
from backpass.preserved import preserved
from backpass.rules import Rule
from backpass.training.adversarial_examples import AdversarialExamples, local_model
from backpass.training.batches import Batch
from backpass.training.objective import CrossEntropy, Evaluated, Plain, select

__all__ = ["AdversarialTraining", "divergence"]


@dataclass(frozen=True)
class AdversarialTraining:
    r"""Objective of PGD adversarial training, and of TRADES where ``trades`` is given.

    PGD-AT: :math:`\min_\theta E\, \ell(f_\theta(x'), y)`, where x' maximises the attack's loss in the ball around x.
    TRADES: :math:`\min_\theta E\, [\ell(f_\theta(x), y) + \beta\, KL(p_\theta(x) \| p_\theta(x'))]`, where x' maximises
    that divergence. The gradient flows through both of its arguments; x' is fixed.

    Two rules can act, independently: ``rule`` on the gradients that lead to x', and those of ``Trainer(rules=...)``
    on the gradients of the weights. With LinBP these are the strategies of Li et al.: 1 (the trainer's alone), 2
    (``rule`` alone), and both.

    An update costs the attack's own gradient passes and one more, for TRADES two more and a forward pass. TRADES
    computes x and x' in one batch, from which BatchNorm takes the statistics.

    Args:
        attack: inner maximiser. Each sample is searched once, and to the end: `restarts` and `early_stop` have no
            effect. Its ``logits`` selects the logits in the model's output.
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
        self._cross_entropy  # noqa: B018  it checks label_smoothing

    @cached_property
    def examples(self) -> AdversarialExamples:
        """Search for x'."""
        return AdversarialExamples(self.attack, self.rule, self.warmup)

    @cached_property
    def _cross_entropy(self) -> CrossEntropy:
        return CrossEntropy(label_smoothing=self.label_smoothing, logits=self.attack.logits)

    @property
    def logits(self) -> Any:
        """Selector of the logits in the model's output: the attack's."""
        return self.attack.logits

    def losses(self, output: Any, y: Tensor) -> Tensor:
        """Return the cross-entropy of each sample, (B,): the loss of an evaluation set."""
        return self._cross_entropy.losses(output, y)

    def correct(self, output: Any, y: Tensor) -> Tensor | None:
        """Compare predictions with labels, (B,) bool."""
        return self._cross_entropy.correct(output, y)

    def check_targets(self, y: Tensor, output: Any, where: str) -> None:
        """Compare all labels with the output's number of classes.

        Raises:
            BackpassError: they do not fit, or are probabilities.
        """
        if y.is_floating_point():
            raise BackpassError(f"adversarial training needs integer labels{where}, got {y.dtype} {tuple(y.shape)}.")
        self._cross_entropy.check_targets(y, output, where)

    def close(self) -> None:
        """Remove the rule of the examples from the model."""
        self.examples.close()

    def __call__(self, model: nn.Module, batch: Batch, plain: Plain) -> Evaluated:
        """Evaluate the objective; `Evaluated.correct` and its metric are about x', of TRADES `correct` about x."""
        reference: Tensor | None = None
        if self.trades is not None:
            inside = local_model(model)
            with preserved(inside), torch.no_grad():
                reference = select(inside(batch.x), self.logits)

        def against(logits: Tensor, row: Tensor) -> Tensor:
            assert reference is not None  # noqa: S101  TRADES alone calls this
            return divergence(reference[row].to(logits.dtype), logits)

        x_adv = self.examples(model, batch, plain, None if reference is None else against)

        def evaluate(model: nn.Module, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
            """Return losses (B,), and the logits at x (for TRADES) and x'."""
            y = batch.y[rows]
            if self.trades is None:
                output = model(x_adv[rows])
                losses = self.losses(output, y)
                logits = select(output, self.logits)
                return losses, logits, logits
            clean, near = select(model(torch.cat([batch.x[rows], x_adv[rows]])), self.logits).chunk(2)
            losses = self._cross_entropy.with_logits(clean, y) + self.trades * divergence(clean, near)
            return losses, clean, near

        losses, clean, near = evaluate(model, slice(None))
        right = near.detach().argmax(1) == batch.y
        return Evaluated(
            loss=losses.mean(),
            losses=losses.detach(),
            correct=clean.detach().argmax(1) == batch.y,
            metrics={"adversarial_accuracy": right.float().mean()},
            again=lambda model, rows: evaluate(model, rows)[0].mean(),
            # Examples of sign steps and of Square do not depend smoothly on the parameters.
            moves=self.attack.norm != "linf" or isinstance(self.attack, FAB | AutoAttack),
        )


def divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """Return KL(p || q) = sum_k p_k (log p_k - log q_k) of the softmax p of ``reference`` and q of ``logits``.

    Args:
        reference: (B, K) logits.
        logits: (B, K) logits.

    Returns:
        (B,), at least 0, with graph in both.
    """
    log_p, log_q = F.log_softmax(reference.float(), 1), F.log_softmax(logits.float(), 1)
    return (log_p.exp() * (log_p - log_q)).sum(1)
