"""What a training step with ProxProp costs, and the ways to a convolution's Gram matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpass.rules.implicit.convolution import correlated_gram, patch_gram, unfolded_gram
from backpass.rules.proxprop import ProxProp
from side_by_side import Options, Row, Section, milliseconds, peak_mib, ratio, side_by_side

METHODS = {
    "plain": None,
    "exact, last layer plain": ProxProp(tau=0.05, stop=-1),
    "exact": ProxProp(tau=0.05),
    "exact, at the step": ProxProp(tau=0.05, solve="step"),
    "CG-3": ProxProp(tau=0.05, solver="cg", cg_steps=3),
    "CG-10": ProxProp(tau=0.05, solver="cg", cg_steps=10),
}
CONVNET_METHODS = {
    "plain": None,
    "exact": ProxProp(tau=1.0, stop=-1),
    "toeplitz": ProxProp(tau=1.0, stop=-1, solver="toeplitz"),
    "CG-3": ProxProp(tau=1.0, stop=-1, solver="cg", cg_steps=3),
}
ASKED = {("MLP", "exact"): 1.35, ("MLP", "exact, at the step"): 1.6}
NOTES = {("MLP", "exact, at the step"): "it needs a second product with the weights"}


def mlp(quick: bool) -> nn.Module:
    """The paper's 3072-4000-1000-4000-10, or a tenth of it."""
    sizes = (3072, 400, 100, 400, 10) if quick else (3072, 4000, 1000, 4000, 10)
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def convnet(quick: bool) -> nn.Module:
    """The paper's ConvNet, which is small already."""
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 20, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(20, 20, 5, padding=2), nn.ReLU(), nn.Flatten(), nn.Linear(20 * 8 * 8, 10)),
    )


def training_step(model: nn.Module, rule: ProxProp | None, x: Tensor, y: Tensor) -> Callable[[], None]:
    """One step of Nesterov SGD, as in the paper."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.95, nesterov=True)
    if rule is not None:
        rule.attach(model, optimizer if rule.solve == "step" else None)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def shifted_gram(x: Tensor, k: int) -> Tensor:
    """A^T A by one convolution weight gradient per kernel position; slower everywhere, so backpass does without it."""
    channels, height, width = x.shape[1], x.shape[2] - k + 1, x.shape[3] - k + 1
    shape = (channels, channels, k, k)
    return torch.stack(
        [
            torch.nn.grad.conv2d_weight(x, shape, x[:, :, i : i + height, j : j + width].contiguous())
            for i in range(k)
            for j in range(k)
        ]
    )


def network(
    title: str, make: Callable[[bool], nn.Module], methods: dict[str, ProxProp | None], options: Options, text: str
) -> Section:
    """Time and memory of a step of a whole network."""
    torch.manual_seed(0)
    batch = 50 if options.quick else 500
    x = torch.randn(batch, 3, 32, 32, device=options.device)
    y = torch.randint(0, 10, (batch,), device=options.device)
    steps = {name: training_step(make(options.quick).to(options.device), rule, x, y) for name, rule in methods.items()}
    times = side_by_side(steps, device=options.device, rounds=options.rounds(9))
    rows = [
        Row(
            name=name,
            figures={
                "ratio": ratio(times[name], times["plain"]),
                "ms": milliseconds(times[name]),
                "MiB": peak_mib(step, options.device),
            },
            asked=("ratio", ASKED[title, name]) if (title, name) in ASKED else None,
            note=NOTES.get((title, name), ""),
        )
        for name, step in steps.items()
    ]
    words = f"{text}, batch {batch}, a step of Nesterov SGD, over the plain step."
    return Section(title=f"ProxProp: {title}", text=words, rows=rows)


def gram_methods(options: Options) -> Iterator[Section]:
    """Every way to a convolution's A^T A, against the plain forward and backward pass of the layer alone."""
    torch.manual_seed(0)
    batch = 20 if options.quick else 500
    pair, one = (5, 5), (1, 1)
    for name, channels, size, outputs in (("first", 3, 32, 16), ("second", 16, 16, 20), ("third", 20, 8, 20)):
        x = torch.randn(batch, channels, size, size, device=options.device)
        weight = torch.randn(outputs, channels, 5, 5, device=options.device, requires_grad=True)
        wide = F.pad(x, (2,) * 4)
        grad = torch.randn(batch, outputs, size, size, device=options.device)
        leaf = x.clone().requires_grad_(name != "first")

        def plain(leaf=leaf, weight=weight, grad=grad) -> None:
            wanted = [t for t in (leaf, weight) if t.requires_grad]
            torch.autograd.grad(F.conv2d(leaf, weight, padding=2), wanted, grad)

        steps = {
            "plain layer": plain,
            "patches written out": lambda w=wide: unfolded_gram(w, pair, one, one, 1),
            "Fourier transforms, border taken out": lambda w=wide: correlated_gram(w, pair, 1),
            "shifted weight gradients": lambda w=wide: shifted_gram(w, 5),
            "toeplitz, not exact": lambda w=wide: correlated_gram(w, pair, 1, border=False),
            "what backpass chooses": lambda w=wide: patch_gram(w, pair, one, one, 1),
        }
        times = side_by_side(steps, device=options.device, rounds=options.rounds(3))
        yield Section(
            title=f"A^T A of the ConvNet's {name} convolution",
            text=f"{channels} to {outputs} channels, 5x5, {size}x{size} pixels, batch {batch}, over the layer's plain "
            "forward and backward pass.",
            rows=[
                Row(name=key, figures={"ratio": ratio(of, times["plain layer"]), "ms": milliseconds(of)})
                for key, of in times.items()
            ],
        )


def sections(options: Options) -> Iterator[Section]:
    """The paper's two networks, and the ConvNet's convolutions."""
    yield network("MLP", mlp, METHODS, options, "The paper's 3072-4000-1000-4000-10")
    yield network("ConvNet", convnet, CONVNET_METHODS, options, "The paper's 5x5 convolutions with 16, 20, 20 channels")
    yield from gram_methods(options)
