"""The result of an attack."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Result"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """The images found, and the verdict of the plain model on them.

    Attributes:
        x_adv: (N, ...) the adversarial images, inside the ball around x and inside the bounds.
        success: (N,) bool. The model, in eval mode and in float32 (float64 where it is float64), on `x_adv`
            predicts another class than y (targeted: predicts y), its logits are finite, and `x_adv` is inside the
            ball and the bounds. With ``eot > 1``, in every one of that many forward passes.
        loss: (N,) the attack's loss at `x_adv` and y, by the same forward pass.
        prediction: (N,) int64, the class that the model sees in `x_adv`.
        distance: (N,) float64, ||x_adv - x|| in the attack's norm where the prediction is another class than y
            (targeted: is y), also beyond eps; inf elsewhere.
        gradients: sample gradients computed, of all restarts together: one pass over a batch of B counts B.
        forwards: sample forward passes without a gradient, the final verdict included.
        ahead: (N, ...) the image after the step whose gradient was computed at `x_adv`; `x_adv` where there is none.
        halvings: APGD only, (N, K) int64: for each of its K checkpoints, the iteration at which the sample's step
            was halved there, or -1 where it was not (also when the sample had left, already fooled). None where
            the attack was given a start.
    """

    x_adv: Tensor
    success: Tensor
    loss: Tensor
    prediction: Tensor
    distance: Tensor
    gradients: int
    forwards: int
    ahead: Tensor
    halvings: Tensor | None = None

    def __repr__(self) -> str:
        return (
            f"Result(success of {int(self.success.sum()):,} of {len(self.success):,} samples, "
            f"{self.gradients:,} gradients, {self.forwards:,} forwards)"
        )
