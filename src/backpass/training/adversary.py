"""Adversarial training: what a network learns from is searched for, near each sample, while it learns."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpass.attacks import FAB, Attack
from backpass.attacks.search import SearchAttack
from backpass.errors import BackpassError
from backpass.numbers import is_number, is_whole
from backpass.preserved import preserved
from backpass.rules import Rule
from backpass.training.adversarial_examples import AdversarialExamples, local_model
from backpass.training.batches import Batch
from backpass.training.objective import CrossEntropy, Evaluated, Plain, correct

__all__ = ["AdversarialTraining", "divergence"]


@dataclass(frozen=True)
class AdversarialTraining:
    r"""The objective of PGD adversarial training, and of TRADES where ``trades`` is given.

    PGD-AT: :math:`\min_\theta E\, \ell(f_\theta(x'), y)`, x' = argmax of the attack's loss in the ball around x.
    TRADES: :math:`\min_\theta E\, [\ell(f_\theta(x), y) + \beta\, KL(p_\theta(x) \| p_\theta(x'))]`, where x' maximises
    that divergence; the gradient flows through both of its arguments, x' is fixed.

    Two rules can act, independently: ``rule`` on the gradients that lead to x', and those of ``Trainer(rules=...)``
    on the gradients of the weights. With LinBP these are the strategies of Li et al.: 1 (the trainer's alone), 2
    (``rule`` alone), and both.

    An update costs the attack's own gradient passes and one more, for TRADES two more and a forward pass. TRADES puts
    x and x' through the network in one batch, of which BatchNorm takes the statistics.

    Args:
        attack: the inner maximiser. Each sample is searched once, and to the end: `restarts` and `early_stop` have
            no effect.
        rule: whose gradients the attack follows; None for plain backpropagation.
        trades: beta, positive; None for PGD-AT.
        warmup: epochs before the ball has its full size; in epoch e < warmup every length of the attack is multiplied
            by (e + 1) / (warmup + 1).
        label_smoothing: of the cross-entropy, in [0, 1].

    Raises:
        BackpassError: a setting is out of its range, or no such inner maximiser can be meant.

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
                f"the inner maximiser is an attack such as PGD(eps=8/255, steps=10), got {type(self.attack).__name__}."
            )
        if self.attack.targeted:
            raise BackpassError("adversarial training leads away from each sample's label: leave targeted=False.")
        if self.rule is not None and not isinstance(self.rule, Rule):
            raise BackpassError(f"rule is a rule such as LinBP(start=-2), or None; got {self.rule!r}.")
        if not is_whole(self.warmup, 0):
            raise BackpassError(f"warmup is a whole number of epochs, at least 0; got {self.warmup!r}.")
        if self.trades is not None:
            if not (is_number(self.trades) and self.trades > 0):
                raise BackpassError(f"trades is beta, a positive number such as 6, or None; got {self.trades!r}.")
            chooses = isinstance(self.attack, FAB) or self.attack.loss == "dlr-targeted"
            if chooses or not isinstance(self.attack, SearchAttack):
                raise BackpassError(
                    f"TRADES raises a divergence, and {type(self.attack).__name__} with loss {self.attack.loss!r} "
                    "chooses its losses itself: use PGD, IFGSM, MIFGSM, FGSM, APGD or Square."
                )
        self._cross_entropy  # noqa: B018  it checks label_smoothing

    @cached_property
    def examples(self) -> AdversarialExamples:
        """What searches for x'."""
        return AdversarialExamples(self.attack, self.rule, self.warmup)

    @cached_property
    def _cross_entropy(self) -> CrossEntropy:
        return CrossEntropy(label_smoothing=self.label_smoothing)

    def losses(self, output: Tensor, y: Tensor) -> Tensor:
        """The cross-entropy of each sample, (B,), by which an evaluation set is judged."""
        return self._cross_entropy.losses(output, y)

    def close(self) -> None:
        """Take the rule that makes examples off the model."""
        self.examples.close()

    def __call__(self, model: nn.Module, batch: Batch, plain: Plain) -> Evaluated:
        """The objective on a batch; `Evaluated.correct` and its metric are about x', of TRADES `correct` about x."""
        return self._pgd(model, batch, plain) if self.trades is None else self._trades(model, batch, plain)

    def _pgd(self, model: nn.Module, batch: Batch, plain: Plain) -> Evaluated:
        x_adv = self.examples(model, batch, plain)
        output = model(x_adv)
        losses = self.losses(output, batch.y)
        right = correct(output, batch.y)

        def again(model: nn.Module, rows: slice) -> Tensor:
            return self.losses(model(x_adv[rows]), batch.y[rows]).mean()

        return Evaluated(
            loss=losses.mean(),
            losses=losses.detach(),
            correct=right,
            metrics={} if right is None else {"adversarial_accuracy": right.float().mean()},
            again=again,
        )

    def _trades(self, model: nn.Module, batch: Batch, plain: Plain) -> Evaluated:
        reference = self._reference(model, batch)
        x_adv = self.examples(
            model, batch, plain, lambda logits, row: divergence(reference[row].to(logits.dtype), logits)
        )

        def losses(model: nn.Module, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
            clean, near = model(torch.cat([batch.x[rows], x_adv[rows]])).chunk(2)
            assert self.trades is not None  # noqa: S101  or this were not TRADES
            return self.losses(clean, batch.y[rows]) + self.trades * divergence(clean, near), clean, near

        each, clean, near = losses(model, slice(None))
        stands = near.detach().argmax(1) == batch.y
        return Evaluated(
            loss=each.mean(),
            losses=each.detach(),
            correct=correct(clean, batch.y),
            metrics={"adversarial_accuracy": stands.float().mean()},
            again=lambda model, rows: losses(model, rows)[0].mean(),
        )

    def _reference(self, model: nn.Module, batch: Batch) -> Tensor:
        """The logits (B, K) at x itself, of the model as the attack sees it."""
        inside = local_model(model)
        with preserved(inside), torch.no_grad():
            output: Tensor = inside(batch.x)
        return output


def divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(p || q) = sum_k p_k (log p_k - log q_k) of the softmax p of `reference` and q of `logits`.

    Args:
        reference: (B, K) logits.
        logits: (B, K) logits.

    Returns:
        (B,), at least 0, with graph in both.
    """
    log_p, log_q = F.log_softmax(reference.float(), 1), F.log_softmax(logits.float(), 1)
    return (log_p.exp() * (log_p - log_q)).sum(1)
