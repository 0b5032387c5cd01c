"""What ProxProp costs: CPU time of a training step against the plain step, interleaved in one process.

    python benchmarks/proxprop.py [--quick] [--device cuda] [--json FILE]

One thread. Every method takes its step once per round; a ratio is the median over rounds of its time over the plain
step's in the same round. Memory is the peak that one step allocates beyond what lay there before it.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from backpass.rules.layers.patches import correlated_gram, patch_gram, unfolded_gram
from backpass.rules.proxprop import ProxProp

METHODS = {
    "plain": None,
    "exact, last layer plain": ProxProp(tau=0.05, stop=-1),
    "exact": ProxProp(tau=0.05),
    "exact, union=True": ProxProp(tau=0.05, union=True),
    "CG-3": ProxProp(tau=0.05, solver="cg", cg_steps=3),
    "CG-10": ProxProp(tau=0.05, solver="cg", cg_steps=10),
}
CONVNET_METHODS = {
    "plain": None,
    "exact": ProxProp(tau=1.0, stop=-1),
    "toeplitz": ProxProp(tau=1.0, stop=-1, solver="toeplitz"),
    "CG-3": ProxProp(tau=1.0, stop=-1, solver="cg", cg_steps=3),
}
Measured = dict[str, dict[str, float]]


def mlp(quick: bool) -> nn.Module:
    """The paper's 3072-4000-1000-4000-10, or a tenth of it."""
    sizes = (3072, 400, 100, 400, 10) if quick else (3072, 4000, 1000, 4000, 10)
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def convnet(quick: bool) -> nn.Module:
    """The paper's ConvNet; it is small already."""
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 20, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(20, 20, 5, padding=2), nn.ReLU(), nn.Flatten(), nn.Linear(20 * 8 * 8, 10)),
    )


def clock(device: str) -> float:
    """Seconds: of this process's CPU, or of the wall where a GPU works."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def interleaved(steps: dict[str, Callable[[], object]], rounds: int, device: str) -> Measured:
    """Milliseconds and ratio to the first, medians over rounds after one to warm up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            start = clock(device)
            step()
            times[name].append(clock(device) - start)
    first = next(iter(times.values()))[1:]
    return {
        name: {
            "milliseconds": 1e3 * statistics.median(own[1:]),
            "ratio": statistics.median(a / b for a, b in zip(own[1:], first, strict=True)),
        }
        for name, own in times.items()
    }


def training_step(model: nn.Module, rule: ProxProp | None, x: Tensor, y: Tensor) -> Callable[[], None]:
    """One step of Nesterov SGD, as in the paper."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.95, nesterov=True)
    if rule is not None:
        rule.attach(model, optimizer if rule.union else None)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def peak_mib(step: Callable[[], object], device: str) -> float:
    """The most memory that a step holds beyond what lay there before it."""
    if device != "cpu":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    held = most = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most / 2**20


def network(make: Callable[[bool], nn.Module], methods: dict[str, ProxProp | None], arguments) -> Measured:
    """Time and memory of a step of a whole network."""
    torch.manual_seed(0)
    batch = 50 if arguments.quick else 500
    x = torch.randn(batch, 3, 32, 32, device=arguments.device)
    y = torch.randint(0, 10, (batch,), device=arguments.device)
    steps = {
        name: training_step(make(arguments.quick).to(arguments.device), rule, x, y) for name, rule in methods.items()
    }
    measured = interleaved(steps, arguments.rounds, arguments.device)
    for name, step in steps.items():
        measured[name]["MiB"] = peak_mib(step, arguments.device)
    return measured


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


def gram_methods(arguments) -> dict[str, Measured]:
    """Every way to a convolution's A^T A, against the plain forward and backward pass of the layer alone."""
    torch.manual_seed(0)
    batch = 20 if arguments.quick else 500
    tables, pair, one = {}, (5, 5), (1, 1)
    for name, channels, size, outputs in (("conv 1", 3, 32, 16), ("conv 2", 16, 16, 20), ("conv 3", 20, 8, 20)):
        x = torch.randn(batch, channels, size, size, device=arguments.device)
        weight = torch.randn(outputs, channels, 5, 5, device=arguments.device, requires_grad=True)
        wide = F.pad(x, (2,) * 4)
        grad = torch.randn(batch, outputs, size, size, device=arguments.device)
        leaf = x.clone().requires_grad_(name != "conv 1")

        def plain(leaf=leaf, weight=weight, grad=grad) -> None:
            wanted = [t for t in (leaf, weight) if t.requires_grad]
            torch.autograd.grad(F.conv2d(leaf, weight, padding=2), wanted, grad)

        steps = {
            "plain layer": plain,
            "unfolded": lambda w=wide: unfolded_gram(w, pair, one, one, 1),
            "correlation": lambda w=wide: correlated_gram(w, pair, one, 1),
            "shifted": lambda w=wide: shifted_gram(w, 5),
            "toeplitz (not exact)": lambda w=wide: correlated_gram(w, pair, one, 1, border=False),
            "chosen": lambda w=wide: patch_gram(w, pair, one, one, 1),
        }
        tables[name] = interleaved(steps, max(2, arguments.rounds // 3), arguments.device)
    return tables


def show(title: str, measured: Measured) -> None:
    print(f"\n{title}")
    for name, values in measured.items():
        memory = f"{values['MiB']:8.0f} MiB" if "MiB" in values else ""
        print(f"  {name:26s}{values['milliseconds']:10.1f} ms{values['ratio']:8.2f}x{memory}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes and two rounds: does it run?")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds = 2
    torch.set_num_threads(1)
    figures = {
        "MLP": network(mlp, METHODS, arguments),
        "ConvNet": network(convnet, CONVNET_METHODS, arguments),
        **gram_methods(arguments),
    }
    print(f"torch {torch.__version__}, {arguments.device}, batch {50 if arguments.quick else 500}, float32")
    for title, measured in figures.items():
        show(title, measured)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
