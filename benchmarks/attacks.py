"""PGD beside a 15-line hand-written loop and other libraries: ratios of time, and of peak memory.

All contestants run interleaved in one process on one thread, so that the machine's mood hits all alike; what is
printed is the median over rounds of (contestant's time / hand loop's time in the same round).

    python benchmarks/attacks.py [--rounds 7] [--device cuda]
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable
from functools import partial

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, which measures memory, is talkative

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpass.attacks import APGD, PGD

Contestant = Callable[[], object]
STEP, STEPS = 2 / 255, 10


def network() -> nn.Module:
    """A convolutional network of 183k parameters, for images (N, 3, 32, 32)."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inside, outside, stride in ((3, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2)):
        layers += [nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside), nn.ReLU()]
    layers += [nn.Conv2d(128, 44, 3, 1, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(704, 10)]
    return nn.Sequential(*layers).eval()


def digits(count: int) -> tuple[Tensor, Tensor]:
    """scikit-learn's digits, enlarged to (N, 3, 32, 32)."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    images = torch.tensor(x[:count], dtype=torch.float32).view(-1, 1, 8, 8) / 16
    return F.interpolate(images, size=32, mode="bilinear").expand(-1, 3, -1, -1).contiguous(), torch.tensor(y[:count])


def train(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """One pass over the data: enough for attacks to have something to do."""
    optimizer = torch.optim.Adam(model.train().parameters(), 2e-3)
    for rows in torch.split(torch.arange(len(x)), 32):
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    optimizer.zero_grad()
    model.eval()


def hand_loop(model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int = STEPS) -> tuple[Tensor, Tensor]:
    """What one writes without a library: fifteen lines that also say which samples are fooled."""
    z = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1)
    for _ in range(steps):
        z.requires_grad_()
        loss = F.cross_entropy(model(z), y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, z)
        with torch.no_grad():
            z = z + STEP * gradient.sign()
            z = torch.min(torch.max(z, x - eps), x + eps)
            z = z.clamp(0, 1)
    with torch.no_grad():
        fooled = model(z).argmax(1) != y
    return z.detach(), fooled


def contestants(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, half_eps: dict[int, float]
) -> dict[str, Contestant]:
    """Everything that is timed, by name; the hand loop first."""
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    x_last = x.contiguous(memory_format=torch.channels_last)
    common = {"step": STEP, "steps": STEPS, "restarts": 1}
    full = PGD(eps=eps, **common, early_stop=False)
    half = PGD(eps=eps, **common, early_stop=False, dtype=torch.bfloat16)
    found = {
        "hand loop": lambda: hand_loop(model, x, y, eps)[0],
        "backpass PGD, early_stop=False": lambda: full(model, x, y).x_adv,
        "backpass PGD, bfloat16 and channels_last": lambda: half(last, x_last, y).x_adv,
        "backpass PGD, channels_last": lambda: full(last, x_last, y).x_adv,
        "backpass APGD, early_stop=False": lambda: APGD(eps=eps, steps=STEPS, early_stop=False)(model, x, y).x_adv,
    }
    for steps, radius in half_eps.items():
        attack = PGD(eps=radius, step=STEP, steps=steps, restarts=1)
        found |= {
            f"hand loop, {steps} steps, half fall": partial(hand_loop, model, x, y, radius, steps),
            f"backpass PGD, {steps} steps, half fall": partial(attack, model, x, y),
        }
    return found | peers(model, x, y, eps)


def peers(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> dict[str, Contestant]:
    """The other libraries that are installed."""
    found: dict[str, Contestant] = {}
    try:
        import torchattacks

        pgd = torchattacks.PGD(model, eps=eps, alpha=STEP, steps=STEPS)
        apgd = torchattacks.APGD(model, eps=eps, steps=STEPS)
        found |= {"torchattacks PGD": lambda: pgd(x, y), "torchattacks APGD": lambda: apgd(x, y)}
    except ImportError:
        pass
    try:
        import foolbox

        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device)
        linf = foolbox.attacks.LinfPGD(abs_stepsize=STEP, steps=STEPS)
        found["foolbox LinfPGD"] = lambda: linf(wrapped, x, y, epsilons=eps)[1]
    except ImportError:
        pass
    try:
        from art.attacks.evasion import ProjectedGradientDescentPyTorch
        from art.estimators.classification import PyTorchClassifier

        estimator = PyTorchClassifier(model, nn.CrossEntropyLoss(), tuple(x.shape[1:]), 10, clip_values=(0, 1))
        art = ProjectedGradientDescentPyTorch(
            estimator, eps=eps, eps_step=STEP, max_iter=STEPS, num_random_init=1, batch_size=len(x), verbose=False
        )
        found["ART PGD"] = lambda: torch.from_numpy(art.generate(x.cpu().numpy(), y.cpu().numpy()))
    except ImportError:
        pass
    return found


def eps_where_half_falls(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> float:
    """Bisection on eps, so that so many steps fool half of the samples."""
    low, high = 0.0, 0.3
    for _ in range(12):
        eps = 0.5 * (low + high)
        fallen = PGD(eps=eps, step=STEP, steps=steps, restarts=1)(model, x, y).success.float().mean()
        low, high = (eps, high) if fallen < 0.5 else (low, eps)
    return high


def seconds(run: Contestant, device: torch.device) -> float:
    """CPU time of one run, which other processes do not lengthen; on CUDA wall clock, the device's queue included."""
    if device.type == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def peak(run: Contestant, device: torch.device) -> float:
    """MiB above the start: the allocator's on CUDA, else the sum of all that torch has allocated."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - start) / 2**20
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    level = highest = 0
    for event in profiler.profiler.kineto_results.events():  # in order of time
        if event.name() == "[memory]":
            level += event.nbytes()
            highest = max(highest, level)
    return highest / 2**20


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(arguments.device)
    model = network()
    images, labels = digits(1200 + arguments.batch)
    train(model, images[:1200], labels[:1200])
    model, x, y = model.to(device), images[1200:].to(device), labels[1200:].to(device)
    accuracy = (model(x).argmax(1) == y).float().mean()
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {len(x)} images, accuracy {accuracy:.2f}, torch {torch.__version__}")
    half_eps = {steps: eps_where_half_falls(model, x, y, steps) for steps in (10, 20)}
    runs = contestants(model, x, y, 8 / 255, half_eps)
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(arguments.rounds):
        for name, run in runs.items():
            times[name].append(seconds(run, device))
    base = "hand loop"
    print(f"{'':44}{'ratio':>8}{'least':>8}{'most':>8}{'MiB':>9}")
    for name, taken in times.items():
        against = times[name.replace("backpass PGD", base) if name.endswith("half fall") else base]
        ratios = [mine / theirs for mine, theirs in zip(taken, against, strict=True)]
        row = (statistics.median(ratios), min(ratios), max(ratios))
        print(f"{name:44}" + "".join(f"{ratio:8.3f}" for ratio in row) + f"{peak(runs[name], device):9.1f}")
    print(f"one image batch is {x.numel() * x.element_size() / 2**20:.1f} MiB; half fall at eps = {half_eps}")


if __name__ == "__main__":
    main()
