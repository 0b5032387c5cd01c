"""RectGrad: rectified gradients."""

from dataclasses import dataclass

from torch import Tensor

from backpass.rules import ActivationRule, activations

__all__ = ["RectGrad"]


@dataclass(frozen=True, kw_only=True)
class RectGrad(ActivationRule):
    """y = relu(x) forward, exactly; dL/dx = dL/dy where y dL/dy > threshold, and 0 elsewhere.

    Args:
        threshold: of the product of value and gradient; 0 is guided backpropagation.

    Source: Kim, Seo, Jeon, Koo, Choe, Jeon, Why are saliency maps noisy? (2019); the threshold there is a quantile.
    """

    name = "rectgrad"
    functions = activations("relu")
    threshold: float = 0.0

    def backward(self, grad: Tensor, x: Tensor) -> Tensor:
        """Return the gradients that are large beside their activations."""
        return grad * (x.clamp(min=0) * grad > self.threshold)
