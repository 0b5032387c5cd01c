"""Blocks of common networks, each with its forward written out for a hand-made backward pass: slow and obvious.

``block(x)`` is ordinary PyTorch. ``block.by_hand(x, ways)`` is the same function, with the operations whose backward
pass a rule re-defines taken from ``ways``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "BLOCKS",
    "Ways",
    "clamped",
    "decayed",
    "silu_relu",
    "soft_pool",
    "without_extreme_pairs",
    "without_extremes",
]


def same(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Ways:
    """The operations that rules re-define.

    Attributes:
        branch: applied to the branch of a sum, and to new features of a concatenation.
        relu: the activation of the convolutional blocks.
        pool: max pooling, 3 x 3 with stride 2 and padding 1.
        matrix: applied to the attention matrix.
        qkv: applied to the input of the layers of queries, keys and values, (samples, tokens, channels).
        mlp: applied to the input of an MLP, (samples, ..., channels).
    """

    branch: Callable[[Tensor], Tensor] = same
    relu: Callable[[Tensor], Tensor] = torch.relu
    pool: Callable[[Tensor], Tensor] = lambda x: F.max_pool2d(x, 3, 2, 1)
    matrix: Callable[[Tensor], Tensor] = same
    qkv: Callable[[Tensor], Tensor] = same
    mlp: Callable[[Tensor], Tensor] = same


def decayed(decay: float) -> Callable[[Tensor], Tensor]:
    return lambda x: decay * x + (1 - decay) * x.detach()


def silu_relu(x: Tensor) -> Tensor:
    return F.silu(x) + (torch.relu(x) - F.silu(x)).detach()


def soft_pool(temperature: float) -> Callable[[Tensor], Tensor]:
    def pool(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        rows, columns = (h - 1) // 2 + 1, (w - 1) // 2 + 1
        lines = []
        for i in range(rows):
            for j in range(columns):
                window = x[:, :, max(2 * i - 1, 0) : 2 * i + 2, max(2 * j - 1, 0) : 2 * j + 2].flatten(2)
                weights = torch.exp(temperature * (window - window.amax(-1, keepdim=True))).detach()
                soft = (weights / weights.sum(-1, keepdim=True) * window).sum(-1)
                lines.append(soft + (window.amax(-1) - soft).detach())
        return torch.stack(lines, -1).reshape(n, c, rows, columns)

    return pool


def clamped(relu: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The activation with negative gradients at its output dropped."""

    def function(x: Tensor) -> Tensor:
        y = relu(x)
        y.register_hook(lambda g: g.clamp(min=0))
        return y

    return function


def hooked(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The identity, with its gradient changed."""

    def function(x: Tensor) -> Tensor:
        y = x.clone()
        y.register_hook(change)
        return y

    return function


def without_extremes(factor: float, count: int = 1) -> Callable[[Tensor], Tensor]:
    """TGR for (samples, ..., channels): a loop over channels."""

    def change(g: Tensor) -> Tensor:
        out = g * factor
        for sample in range(g.shape[0]):
            flat = out[sample].view(-1, g.shape[-1])
            for channel in range(g.shape[-1]):
                order = g[sample].reshape(-1, g.shape[-1])[:, channel].argsort().tolist()
                for token in order[:count] + order[-count:]:
                    flat[token, channel] = 0
        return out

    return hooked(change)


def without_extreme_pairs(factor: float, count: int = 1) -> Callable[[Tensor], Tensor]:
    """TGR for attention matrices (samples, heads, queries, keys): a loop over heads."""

    def change(g: Tensor) -> Tensor:
        out = g * factor
        for sample in range(g.shape[0]):
            for head in range(g.shape[1]):
                order = g[sample, head].flatten().argsort().tolist()
                for entry in order[:count] + order[-count:]:
                    query, key = divmod(entry, g.shape[-1])
                    out[sample, head, query] = 0
                    out[sample, head, :, key] = 0
        return out

    return hooked(change)


class ResNet(nn.Module):
    """A max pooling and two basic blocks, the second with a projection; sums and activations in place."""

    shape = (2, 3, 9, 9)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.first = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)])
        self.second = nn.ModuleList([nn.Conv2d(4, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding=1)])
        self.down = nn.Sequential(nn.AvgPool2d(2, 2, ceil_mode=True), nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6))
        self.relu, self.pool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.stem(x)))
        for (conv, norm, last), skip in ((self.first, nn.Identity()), (self.second, self.down)):
            out = last(self.relu(norm(conv(x))))
            out += skip(x)
            x = self.relu(out)
        return x

    def by_hand(self, x: Tensor, ways: Ways) -> Tensor:
        x = ways.pool(ways.relu(self.stem(x)))
        for (conv, norm, last), skip in ((self.first, same), (self.second, self.down)):
            x = ways.relu(skip(x) + ways.branch(last(ways.relu(norm(conv(x))))))
        return x


class DenseNet(nn.Module):
    """A dense block that concatenates the list of all features before each layer."""

    shape = (2, 3, 9, 9)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.layers = nn.ModuleList(nn.Conv2d(4 + 3 * i, 3, 3, padding=1) for i in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4 + 3 * i) for i in range(3))

    def forward(self, x: Tensor) -> Tensor:
        features = [F.max_pool2d(F.relu(self.stem(x)), kernel_size=3, stride=2, padding=1)]
        for conv, norm in zip(self.layers, self.norms, strict=True):
            features.append(conv(F.relu(norm(torch.cat(features, 1)))))
        return torch.cat(features, 1)

    def by_hand(self, x: Tensor, ways: Ways) -> Tensor:
        whole = ways.pool(ways.relu(self.stem(x)))
        for conv, norm in zip(self.layers, self.norms, strict=True):
            whole = torch.cat([whole, ways.branch(conv(ways.relu(norm(whole))))], 1)
        return whole


class MBConv(nn.Module):
    """An inverted bottleneck with squeeze-and-excitation; no activation at its end."""

    shape = (2, 4, 6, 6)

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.norm = nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8)
        self.depthwise, self.project = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 4, 1)
        self.squeeze, self.excite = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        z = F.relu(self.depthwise(F.relu(self.norm(self.expand(x)))))
        z = z * torch.sigmoid(self.excite(F.relu(self.squeeze(z.mean((2, 3), keepdim=True)))))
        return torch.add(x, self.project(z))

    def by_hand(self, x: Tensor, ways: Ways) -> Tensor:
        z = ways.relu(self.depthwise(ways.relu(self.norm(self.expand(x)))))
        z = z * torch.sigmoid(self.excite(ways.relu(self.squeeze(z.mean((2, 3), keepdim=True)))))
        return x + ways.branch(self.project(z))


class ViT(nn.Module):
    """A pre-norm transformer block, its attention called in one of several manners."""

    shape = (2, 5, 8)

    def __init__(self, manner: str) -> None:
        super().__init__()
        self.manner = manner
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, dropout=0.0)
        self.mix = nn.Linear(2, 2) if manner == "talking heads" else None
        self.norms = nn.ModuleList([nn.LayerNorm(8), nn.LayerNorm(8)])
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._attend(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))

    def _attend(self, z: Tensor) -> Tensor:
        if self.manner.startswith("module"):
            out: Tensor = self.attention(z, z, z, need_weights=self.manner == "module with weights")[0]
            return out
        q, k, v = self._heads(z)
        if self.manner == "sdpa":
            heads = F.scaled_dot_product_attention(q, k, v)
        elif self.manner == "matmul":
            heads = F.dropout((q @ k.transpose(-2, -1) / 2).softmax(dim=-1), 0.0) @ v
        elif self.manner == "talking heads":
            matrix = F.softmax(q @ k.transpose(-2, -1) / 2, dim=-1)
            heads = self.mix(matrix.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) @ v
        elif self.manner == "bmm from the right":
            matrix = torch.softmax(q @ k.transpose(-2, -1) / 2, -1, dtype=torch.float64).to(v.dtype).flatten(0, 1)
            heads = torch.bmm(v.flatten(0, 1).transpose(1, 2), matrix.transpose(1, 2)).transpose(1, 2).view(v.shape)
        else:
            matrix = torch.softmax(torch.einsum("bhqd,bhkd->bhqk", q, k) / 2, -1)
            heads = torch.einsum("bhqk,bhkd->bhqd", matrix, v)
        return self.attention.out_proj(heads.transpose(1, 2).flatten(2))

    def _heads(self, z: Tensor) -> tuple[Tensor, ...]:
        packed = F.linear(z, self.attention.in_proj_weight, self.attention.in_proj_bias)
        return tuple(part.reshape(*part.shape[:2], 2, 4).transpose(1, 2) for part in packed.chunk(3, -1))

    def by_hand(self, x: Tensor, ways: Ways) -> Tensor:
        q, k, v = self._heads(ways.qkv(self.norms[0](x)))
        scores = (q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1) / 2
        matrix = torch.exp(scores) / torch.exp(scores).sum(-1, keepdim=True)
        if self.mix is not None:
            matrix = self.mix(matrix.movedim(1, -1)).movedim(-1, 1)
        heads = (ways.matrix(matrix).unsqueeze(-1) * v.unsqueeze(-3)).sum(-2)
        x = x + ways.branch(self.attention.out_proj(heads.transpose(1, 2).flatten(2)))
        first, _, last = self.mlp
        return x + ways.branch(last(ways.relu(first(ways.mlp(self.norms[1](x))))))


class Swin(nn.Module):
    """A window attention block with a learned position bias, on windows of 2 x 2."""

    shape = (2, 4, 4, 8)

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.bias = nn.Parameter(torch.randn(2, 4, 4))
        self.norms = nn.ModuleList([nn.LayerNorm(8), nn.LayerNorm(8)])
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def _windows(self, x: Tensor) -> Tensor:
        return x.view(2, 2, 2, 2, 2, 8).permute(0, 1, 3, 2, 4, 5).reshape(8, 4, 8)

    def _image(self, windows: Tensor) -> Tensor:
        return windows.reshape(2, 2, 2, 2, 2, 8).permute(0, 1, 3, 2, 4, 5).reshape(2, 4, 4, 8)

    def _heads(self, z: Tensor) -> tuple[Tensor, ...]:
        return tuple(part.reshape(*part.shape[:2], 2, 4).transpose(1, 2) for part in self.qkv(z).chunk(3, -1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._heads(self._windows(torch.roll(self.norms[0](x), (-1, -1), (1, 2))))
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias.expand(8, -1, -1, -1))
        back = torch.roll(self._image(self.out(heads.transpose(1, 2).flatten(2))), (1, 1), (1, 2))
        x = x + back
        return x + self.mlp(self.norms[1](x))

    def by_hand(self, x: Tensor, ways: Ways) -> Tensor:
        q, k, v = self._heads(ways.qkv(self._windows(torch.roll(self.norms[0](x), (-1, -1), (1, 2)))))
        matrix = ways.matrix(torch.softmax((q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1) / 2 + self.bias, -1))
        heads = (matrix.unsqueeze(-1) * v.unsqueeze(-3)).sum(-2)
        x = x + ways.branch(torch.roll(self._image(self.out(heads.transpose(1, 2).flatten(2))), (1, 1), (1, 2)))
        return x + ways.branch(self.mlp(ways.mlp(self.norms[1](x))))


MANNERS = ("sdpa", "matmul", "bmm from the right", "einsum", "talking heads", "module", "module with weights")

BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "resnet": ResNet,
    "densenet": DenseNet,
    "mbconv": MBConv,
    "swin": Swin,
    **{f"vit, {manner}": lambda manner=manner: ViT(manner) for manner in MANNERS},
}
