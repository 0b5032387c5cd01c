"""Networks and data of the benchmarks of implicit steps: an MLP, a CNN with BatchNorm, a ViT and two GPTs."""

from __future__ import annotations

import io
import os
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import pyarrow.parquet as parquet
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn


def mlp() -> nn.Module:
    """784-256-256-10."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise((784, 256, 256, 10)):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn() -> nn.Module:
    """Three 3x3 convolutions with BatchNorm and pools."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise((3, 32, 64, 64)):
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, 10))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        qkv = self.qkv(self.norms[0](x)).view(n, t, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(a.transpose(1, 2).reshape(n, t, width))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class GPT(nn.Module):
    """Characters to logits of the next character, (n, symbols, t)."""

    def __init__(self, width: int, depth: int, symbols: int = 128, context: int = 64) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(symbols, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*[Block(width, max(width // 32, 1), causal=True) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, symbols, bias=False)
        for embedding in (self.token, self.place):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        h = self.token(x) + self.place(torch.arange(x.shape[1], device=x.device))
        return self.head(self.norm(self.blocks(h))).mT


class ViT(nn.Module):
    """4x4 patches of 32x32 images."""

    def __init__(self, width: int = 64, depth: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.place = nn.Parameter(torch.randn(64, width) * 0.02)
        self.blocks = nn.Sequential(*[Block(width, width // 32, causal=False) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patches(x).flatten(2).mT + self.place
        return self.head(self.norm(self.blocks(h)).mean(1))


@dataclass(frozen=True)
class Setting:
    """A network with its data.

    Attributes:
        make: makes the network.
        data: training and held-out (x, y) for a seed that chooses the held-out part.
        batch: samples per step; of the GPTs sequences of 64 characters.
    """

    make: Callable[[], nn.Module]
    data: Callable[[int], tuple[Tensor, ...]]
    batch: int


@cache
def images(name: str, count: int) -> tuple[Tensor, Tensor]:
    """The first images of a training set, standardized."""
    folder = Path(os.environ.get("BACKPASS_DATA", "data"), name)
    pixels, labels = [], []
    for file in sorted(folder.glob("train-*.parquet")):
        table = parquet.read_table(file).slice(0, count - len(labels))
        for row in table.to_pylist():
            image = Image.open(io.BytesIO(next(v for v in row.values() if isinstance(v, dict))["bytes"]))
            data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
            pixels.append(data.view(image.height, image.width, -1).permute(2, 0, 1))
            labels.append(row["label"])
    x = torch.stack(pixels).float() / 255
    return (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True), torch.tensor(labels)


def of_images(name: str, count: int = 12_000) -> Callable[[int], tuple[Tensor, ...]]:
    def split(seed: int) -> tuple[Tensor, ...]:
        x, y = images(name, count)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        held, rest = order[:2000], order[2000:]
        return x[rest], y[rest], x[held], y[held]

    return split


@cache
def text() -> Tensor:
    """The sources of Python's own library, 4 MB of them as ASCII codes."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    data = b"".join(file.read_bytes() for file in files)[:4_000_000]
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).long().clamp(max=127)


def of_text(seed: int) -> tuple[Tensor, ...]:
    """Sequences of 64 characters; the held-out ones are one piece of a tenth of the text."""
    data = text()
    pieces = data[: len(data) // 65 * 65].view(-1, 65)
    n = len(pieces) // 10
    first = seed % 10 * n
    held, rest = pieces[first : first + n][::8], torch.cat([pieces[:first], pieces[first + n :]])
    return rest[:, :-1], rest[:, 1:], held[:500, :-1], held[:500, 1:]


SETTINGS = {
    "MLP 784-256-256-10, batch 128": Setting(mlp, of_images("mnist"), 128),
    "CNN with BatchNorm, batch 128": Setting(cnn, of_images("cifar10"), 128),
    "ViT d64 L3, batch 64": Setting(ViT, of_images("cifar10"), 64),
    "GPT d64 L2, 1,024 tokens": Setting(lambda: GPT(64, 2), of_text, 16),
    "GPT d256 L4, 1,024 tokens": Setting(lambda: GPT(256, 4), of_text, 16),
}
