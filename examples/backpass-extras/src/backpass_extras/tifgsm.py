"""Translation-invariant FGSM."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from backpass import BackpassError
from backpass.attacks import Iterative

__all__ = ["TIFGSM"]


@dataclass(frozen=True, kw_only=True)
class TIFGSM(Iterative):
    """z <- project(z + step * sign(K * grad loss(z))), K a Gaussian window: images that transfer better.

    Args:
        side: of the window K, in pixels, odd.
        width: the standard deviation of K, in pixels, above 0.

    Source: Dong, Pang, Su, Zhu, Evading defenses to transferable adversarial examples (2019), section 3.2.
    """

    side: int = 7
    width: float = 3.0

    def __post_init__(self) -> None:
        """Refuses a window that cannot be meant."""
        super().__post_init__()
        if self.side < 1 or self.side % 2 == 0 or not self.width > 0:
            raise BackpassError(f"side is odd and width above 0; got side={self.side}, width={self.width}.")

    def direction(self, oracle, gradient: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The gradient (B, C, H, W) smoothed within every channel, then the steepest direction in the norm."""
        place = torch.arange(self.side, device=gradient.device) - self.side // 2
        line = torch.softmax(-0.5 * (place / self.width) ** 2, 0).to(gradient.dtype)
        channels = gradient.shape[1]
        window = torch.outer(line, line).expand(channels, 1, -1, -1)
        smooth = F.conv2d(gradient, window, padding=self.side // 2, groups=channels)
        return oracle.threat.direction(smooth), None
