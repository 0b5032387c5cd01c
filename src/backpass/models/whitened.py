"""A convolutional network that learns CIFAR-10 in few epochs: its first layer whitens patches of the images."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from backpass.models.activations import activation as make_activation
from backpass.models.initialisation import initialise
from backpass.models.normalize import Normalize
from backpass.models.shapes import Shape, require_side

__all__ = ["WhitenedCNN", "whitened"]

_SIDE = 2  # pixels of a patch
_SCALE = 1 / 9  # of the logits
_BIAS_RATE = 64  # of the learning rate


class _Norm(nn.BatchNorm2d):
    """Batch normalization with scale 1, whose bias learns at 64 times the rate of SGD.

    The bias is sqrt(64) times its parameter: the chain rule gives the one root, the step the other.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, momentum=0.4)
        self.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias * _BIAS_RATE**0.5
        statistics = (self.running_mean, self.running_var, self.weight, bias)
        return nn.functional.batch_norm(x, *statistics, self.training, self.momentum or 0.0, self.eps)


class WhitenedCNN(nn.Sequential):
    """Images (N, C, H, W) in [0, 1] to logits (N, classes); made by `whitened`."""

    normalize: Normalize
    whiten: nn.Conv2d
    linear: nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return logits * _SCALE

    @torch.no_grad()
    def initialise_from(self, x: Tensor) -> None:
        """Set the first layer to the whitening filters of images (N, C, H, W) in [0, 1], and both their signs.

        Each filter is an eigenvector of the covariance of 2x2 patches over the square root of its eigenvalue, so that
        the outputs have unit variance and are uncorrelated.
        """
        self.normalize.eval()
        patches = self.normalize(x).unfold(2, _SIDE, 1).unfold(3, _SIDE, 1).movedim(1, 3).flatten(3).flatten(0, 2)
        patches = patches - patches.mean(0)
        values, vectors = torch.linalg.eigh((patches.T @ patches / len(patches)).double())
        filters = (vectors / (values + 5e-4).sqrt()).T.float()
        weight = self.whiten.weight
        weight.copy_(torch.cat([filters, -filters]).view_as(weight))


def whitened(
    shape: Shape, classes: int, generator: torch.Generator, *, width: int = 256, activation: str = "gelu"
) -> WhitenedCNN:
    """Whitening 2x2 convolution, then three blocks of two 3x3 convolutions with BatchNorm, each with one max pool.

    The convolutions begin as near-identities: their first filters pass each input channel on. The whitening weights
    are fixed, and `WhitenedCNN.initialise_from` sets them. The normalizations have no scale, and a bias that learns at
    64 times the rate.

    Args:
        shape: (C, H, W) of one image, at least 25x25.
        classes: number of logits.
        generator: generator of the weights.
        width: channels of the last two blocks; the first has a quarter.
        activation: name of all seven activations.

    Raises:
        BackpassError: the images are too small.
        UnknownNameError: the activation is unknown.

    Source: after the ideas of Page, How to train your ResNet (2018), and Jordan, 94% on CIFAR-10 in 3.29 seconds on a
        single GPU (arXiv 2404.00498), Sections 3.1 to 3.3.
    """
    require_side("whitened", shape, 25)
    channels, height, breadth = shape
    patch = channels * _SIDE**2
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        normalize=Normalize(channels),
        whiten=nn.Conv2d(channels, 2 * patch, _SIDE),
        act0=make_activation(activation),
    )
    before, side = 2 * patch, (height - 1, breadth - 1)
    for place, out in enumerate((width // 4, width, width), 1):
        for name, inputs in (("a", before), ("b", out)):
            layers[f"conv{place}{name}"] = nn.Conv2d(inputs, out, 3, padding=1, bias=False)
            if name == "a":
                layers[f"pool{place}"] = nn.MaxPool2d(2)
            layers[f"norm{place}{name}"] = _Norm(out)
            layers[f"act{place}{name}"] = make_activation(activation)
        before, side = out, (side[0] // 2, side[1] // 2)
    layers |= {"pool": nn.MaxPool2d(side), "flatten": nn.Flatten(), "linear": nn.Linear(width, classes, bias=False)}
    model = WhitenedCNN(layers)
    initialise(model, generator)
    for name, module in model.named_children():
        if isinstance(module, nn.Conv2d) and name != "whiten":
            nn.init.kaiming_uniform_(module.weight, a=5**0.5, generator=generator)
            with torch.no_grad():
                nn.init.dirac_(module.weight[: module.in_channels])
    nn.init.kaiming_uniform_(model.linear.weight, a=5**0.5, generator=generator)
    model.whiten.weight.requires_grad_(False)
    return model
