"""Small residual networks in the layout of torchvision."""

import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """ReLU(skip(z) + bn(conv(ReLU(bn(conv(z)))))), one in-place activation for both calls."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if inputs != outputs or stride != 1:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def branch(self, z: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.relu(self.bn1(self.conv1(z)))))

    def forward(self, z: Tensor) -> Tensor:
        identity = z
        out = self.relu(self.bn1(self.conv1(z)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(z)
        out += identity
        return self.relu(out)


class PreActivationBlock(nn.Module):
    """z + conv(ReLU(bn(conv(ReLU(bn(z)))))), functional activations and an out-of-place sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, 1, 1)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, 1, 1)
        self.shortcut = nn.Sequential()

    def branch(self, z: Tensor) -> Tensor:
        return self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(z))))))

    def forward(self, z: Tensor) -> Tensor:
        return self.shortcut(z) + self.branch(z)


class TinyResNet(nn.Module):
    """A stem, two basic blocks, a pre-activation block, a linear head; sites: 1 + 2 + 2 + 2."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 1, 1)
        self.relu = nn.ReLU()
        self.layer1 = BasicBlock(4, 4, 1)
        self.layer2 = BasicBlock(4, 8, 2)
        self.layer3 = PreActivationBlock(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.relu(self.stem(x)))))
        return self.fc(x.mean((2, 3)))
