"""ProxProp on CIFAR-10 against tuned optimizers: the networks of Frerix et al. 2018, loss against epochs and seconds.

    BACKPASS_DATA=data python benchmarks/proxprop_training.py --out docs/results

``BACKPASS_DATA`` holds ``cifar10/train-*.parquet`` with the columns ``img`` (encoded bytes) and ``label``. Rates are
chosen on seed 0, by the training loss after the last epoch; the other seeds run at the chosen rate. Seconds are the
process's CPU seconds in training steps, on one thread; a run is stored when it ends, so that the script can resume.
"""

import argparse
import io
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pyarrow.parquet as parquet
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Muon, Optimizer
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

from backpass.rules.proxprop import ProxProp
from backpass.training import Progress, Trainer

BATCH = 500
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""97.5 % points of Student's t for samples of this size."""


def mlp() -> nn.Module:
    """The paper's 3072-4000-1000-4000-10."""
    sizes = (3072, 4000, 1000, 4000, 10)
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def convnet() -> nn.Module:
    """The paper's 5x5 convolutions with 16, 20, 20 channels, pools after the first two, and a linear layer."""
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 20, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(20, 20, 5, padding=2), nn.ReLU(), nn.Flatten(), nn.Linear(20 * 8 * 8, 10)),
    )


@dataclass(frozen=True)
class Method:
    """An optimizer with the rates to choose from, and perhaps a rule.

    Where the best rate is next to divergence, what is best on one seed may fail on the next: ``kept`` rates run on all
    seeds then, and the best mean counts.
    """

    rates: tuple[float, ...]
    optimizer: Callable[[nn.Module, float], list[Optimizer]]
    rule: ProxProp | None = None
    kept: int = 1


def sgd(model: nn.Module, rate: float) -> list[Optimizer]:
    return [SGD(model.parameters(), rate, momentum=0.95, nesterov=True)]


def adam(model: nn.Module, rate: float) -> list[Optimizer]:
    return [Adam(model.parameters(), rate)]


def adamw(model: nn.Module, rate: float) -> list[Optimizer]:
    return [AdamW(model.parameters(), rate)]


class Together(Optimizer):
    """Several optimizers that step together."""

    def __init__(self, optimizers: list[Optimizer]) -> None:
        super().__init__([p for one in optimizers for group in one.param_groups for p in group["params"]], {"lr": 0.0})
        self.optimizers = optimizers

    def step(self, closure: None = None) -> None:
        """Take a step of each."""
        for one in self.optimizers:
            one.step()


def muon(model: nn.Module, rate: float) -> list[Optimizer]:
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    return [Muon(matrices, rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"), AdamW(others, rate)]


MLP_METHODS = {
    "SGD": Method((0.01, 0.02, 0.05, 0.1), sgd, kept=2),
    "AdamW": Method((1e-4, 3e-4, 1e-3, 3e-3), adamw),
    "ProxProp + SGD": Method((0.1, 0.3, 1.0, 3.0), sgd, ProxProp(tau=0.05, stop=-1), kept=2),
    "ProxProp + Adam": Method((1e-4, 3e-4, 1e-3, 3e-3), adam, ProxProp(tau=0.05, stop=-1)),
    "CG-3 + SGD": Method((1.0,), sgd, ProxProp(tau=0.05, stop=-1, solver="cg", cg_steps=3)),
    "CG-10 + SGD": Method((1.0,), sgd, ProxProp(tau=0.05, stop=-1, solver="cg", cg_steps=10)),
    "Muon": Method((3e-4, 1e-3), muon),
}
CONVNET_METHODS = {
    "SGD": Method((0.003, 0.01, 0.03, 0.1), sgd, kept=2),
    "AdamW": Method((1e-3, 3e-3, 1e-2, 3e-2), adamw),
    "ProxProp + SGD": Method((0.03, 0.1, 0.3, 1.0), sgd, ProxProp(tau=1.0, stop=-1, damping="mean"), kept=2),
    "ProxProp + Adam": Method((1e-3, 3e-3, 1e-2, 3e-2), adam, ProxProp(tau=1.0, stop=-1)),
    "Toeplitz + Adam": Method((1e-3, 3e-3, 1e-2, 3e-2), adam, ProxProp(tau=1.0, stop=-1, solver="toeplitz")),
    "CG-3 + Adam": Method((1e-3, 1e-2), adam, ProxProp(tau=1.0, stop=-1, solver="cg", cg_steps=3)),
    "CG-10 + Adam": Method((1e-3, 1e-2), adam, ProxProp(tau=1.0, stop=-1, solver="cg", cg_steps=10)),
}
NETWORKS = {"MLP": (mlp, MLP_METHODS), "ConvNet": (convnet, CONVNET_METHODS)}


def cifar10(images: int) -> tuple[Tensor, Tensor]:
    """The first images of the training set, standardized per channel."""
    if "BACKPASS_DATA" not in os.environ:
        raise SystemExit("set BACKPASS_DATA to the folder that holds cifar10/train-*.parquet")
    pixels, labels = [], []
    for file in sorted(Path(os.environ["BACKPASS_DATA"], "cifar10").glob("train-*.parquet")):
        for row in parquet.read_table(file).slice(0, images - len(labels)).to_pylist():
            image = Image.open(io.BytesIO(row["img"]["bytes"])).convert("RGB")
            pixels.append(torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(32, 32, 3))
            labels.append(row["label"])
    x = torch.stack(pixels).permute(0, 3, 1, 2).float() / 255
    mean, std = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True)
    return (x - mean) / std, torch.tensor(labels)


def train(network: str, method: Method, rate: float, seed: int, data: tuple[Tensor, Tensor], epochs: int) -> dict:
    """Training loss over all images after each epoch, and the CPU seconds until then."""
    x, y = data
    torch.manual_seed(seed)
    model = NETWORKS[network][0]()
    losses, seconds = [mean_loss(model, x, y)], [0.0]
    start = time.process_time()

    def told(progress: Progress) -> str | None:
        nonlocal start
        if progress.record["kind"] != "epoch":
            return None
        spent = time.process_time() - start
        loss = mean_loss(model, x, y)
        if not math.isfinite(loss):
            return "the training loss is not finite"
        losses.append(loss)
        seconds.append(seconds[-1] + spent)
        start = time.process_time()
        return None

    sampler = SubsetRandomSampler(range(len(x)), generator=torch.Generator().manual_seed(seed))
    Trainer(
        model,
        Together(method.optimizer(model, rate)),
        DataLoader(TensorDataset(x, y), batch_size=BATCH, sampler=sampler),
        epochs=epochs,
        rules=() if method.rule is None else (method.rule,),
        diverged_above=None,
        log_every=len(x),
        on_progress=told,
    ).fit()
    rounded = {"loss": [round(loss, 4) for loss in losses], "seconds": [round(second, 2) for second in seconds]}
    return {"rate": rate, "seed": seed, **rounded}


@torch.no_grad()
def mean_loss(model: nn.Module, x: Tensor, y: Tensor) -> float:
    parts = zip(x.split(BATCH), y.split(BATCH), strict=True)
    return sum(F.cross_entropy(model(a), b, reduction="sum").item() for a, b in parts) / len(x)


def final(run: dict, epochs: int) -> float:
    """The last loss; infinite for a run that diverged, which has fewer."""
    return run["loss"][-1] if len(run["loss"]) == epochs + 1 else math.inf


def run_all(path: Path, images: int, epochs: int, seeds: int, networks: list[str], methods: list[str]) -> dict:
    """Every run that is not stored yet."""
    stored = json.loads(path.read_text()) if path.exists() else {}
    stored |= {"images": images, "epochs": epochs, "batch": BATCH, "torch": torch.__version__}
    runs = stored.setdefault("runs", {})
    data = cifar10(images)

    def once(network: str, name: str, rate: float, seed: int) -> dict:
        key = f"{network} | {name} | {rate:g} | {seed}"
        if key not in runs:
            runs[key] = train(network, NETWORKS[network][1][name], rate, seed, data, epochs)
            path.write_text(json.dumps(stored, indent=1, allow_nan=False))
            print(key, f"{runs[key]['loss'][-1]:.4f} after {runs[key]['seconds'][-1]:.1f} s", flush=True)
        return runs[key]

    for network in networks:
        for name, method in NETWORKS[network][1].items():
            if methods and name not in methods:
                continue
            tried = {rate: final(once(network, name, rate, 0), epochs) for rate in method.rates}
            for rate in sorted(tried, key=lambda rate: tried[rate])[: method.kept]:
                for seed in range(1, seeds):
                    once(network, name, rate, seed)
    return stored


def runs_at(runs: dict, network: str, name: str, rate: float) -> list[dict]:
    """The runs of a method at one rate, in the order of seeds."""
    own = [run for key, run in runs.items() if key.startswith(f"{network} | {name} | ") and run["rate"] == rate]
    return sorted(own, key=lambda run: run["seed"])


def summary(runs: dict, network: str, name: str, epochs: int, seeds: int) -> dict | None:
    """The rate with the best mean final loss of those that ran on all seeds, and its runs in the order of seeds."""
    by_rate = {rate: runs_at(runs, network, name, rate) for rate in NETWORKS[network][1][name].rates}
    full = {rate: own for rate, own in by_rate.items() if len(own) == seeds}
    if not full:
        return None
    best = min(full, key=lambda rate: statistics.fmean(final(run, epochs) for run in full[rate]))
    return {"rate": best, "runs": full[best]}


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % interval, by Student's t."""
    mean = statistics.fmean(values)
    return mean, T_975[len(values)] * statistics.stdev(values) / len(values) ** 0.5


def last_loss(run: dict) -> float:
    return run["loss"][-1]


def loss_at(run: dict, seconds: float) -> float:
    """The loss that a run had reached by then, between epochs interpolated in its logarithm."""
    times, losses = run["seconds"], run["loss"]
    for (t0, a), (t1, b) in pairwise(zip(times, losses, strict=True)):
        if t0 <= seconds <= t1:
            return math.exp(math.log(a) + (math.log(b) - math.log(a)) * (seconds - t0) / (t1 - t0))
    return losses[-1]


def difference(first: list[dict], second: list[dict], by: str) -> tuple[float, float]:
    """The paired difference of the loss over seeds, after the last epoch or after the same seconds."""
    pairs = list(zip(first, second, strict=True))
    if by == "epochs":
        return interval([a["loss"][-1] - b["loss"][-1] for a, b in pairs])
    common = [min(a["seconds"][-1], b["seconds"][-1]) for a, b in pairs]
    return interval([loss_at(a, t) - loss_at(b, t) for (a, b), t in zip(pairs, common, strict=True)])


def verdict(mean: float, half: float) -> str:
    """Return "same direction" if the first surely has the lower loss, "opposite direction" if the second has."""
    return "undecided" if abs(mean) < half else "same direction" if mean < 0 else "opposite direction"


def report(stored: dict, seeds: int) -> str:
    """A table, and what it says of the paper's claims."""
    runs, epochs = stored["runs"], stored["epochs"]
    lines = [
        "# ProxProp on CIFAR-10: training loss against epochs and seconds",
        "",
        f"{stored['images']} training images, batch {BATCH}, {epochs} epochs, {seeds} seeds, torch {stored['torch']}, "
        "one thread, CPU seconds of training steps (other programs ran beside). Rates are the best of those tried, "
        "by the loss at the end. Mean ± half of the 95 % interval. `benchmarks/proxprop_training.py` makes this page.",
    ]
    everything = {}
    for network, (_, methods) in NETWORKS.items():
        found = {name: one for name in methods if (one := summary(runs, network, name, epochs, seeds))}
        lines += ["", f"## {network}", "", "| method | rate (tried) | loss after 1 epoch | after the last | seconds |"]
        lines += ["| --- | --- | --- | --- | --- |"]
        for name, one in found.items():
            columns = [[run["loss"][1] for run in one["runs"]], [run["loss"][-1] for run in one["runs"]]]
            columns.append([run["seconds"][-1] for run in one["runs"]])
            cells = ["{:.3f} ± {:.3f}".format(*interval(values)) for values in columns[:2]]
            tried = ", ".join(f"{rate:g}" for rate in methods[name].rates)
            cells.append("{:.1f} ± {:.1f}".format(*interval(columns[2])))
            lines.append(f"| {name} | {one['rate']:g} ({tried}) | {' | '.join(cells)} |")
        everything[network] = found
    lines += ["", "## What this says", "", "Differences of the training loss, paired over seeds, in brackets.", ""]
    for sentence, network, ours, peer, by in CLAIMS:
        found = everything[network]
        if {ours, peer} <= found.keys():
            first, second = found[ours]["runs"], found[peer]["runs"]
            if by == "epochs at one rate":
                first = runs_at(runs, network, ours, found[peer]["rate"])
            mean, half = difference(first, second, by.split()[0])
            lines.append(f"- {network}: {sentence} **{verdict(mean, half)}** ({mean:+.3f} ± {half:.3f})")
    return "\n".join(lines) + "\n"


CLAIMS = (
    ("Per epoch the loss falls faster than with the gradient:", "MLP", "ProxProp + SGD", "SGD", "epochs"),
    ("Per epoch the loss falls faster than with the gradient:", "ConvNet", "ProxProp + SGD", "SGD", "epochs"),
    ("In time too the loss falls faster than with the gradient:", "MLP", "ProxProp + SGD", "SGD", "seconds"),
    ("In time too the loss falls faster than with the gradient:", "ConvNet", "ProxProp + SGD", "SGD", "seconds"),
    ("It works with Adam, better per epoch than AdamW:", "MLP", "ProxProp + Adam", "AdamW", "epochs"),
    ("It works with Adam, better per epoch than AdamW:", "ConvNet", "ProxProp + Adam", "AdamW", "epochs"),
    ("And better in time:", "MLP", "ProxProp + Adam", "AdamW", "seconds"),
    ("And better in time:", "ConvNet", "ProxProp + Adam", "AdamW", "seconds"),
    ("Toeplitz is better in time than AdamW:", "ConvNet", "Toeplitz + Adam", "AdamW", "seconds"),
    ("More conjugate-gradient steps are better per epoch:", "MLP", "CG-10 + SGD", "CG-3 + SGD", "epochs"),
    ("More conjugate-gradient steps are better per epoch:", "ConvNet", "CG-10 + Adam", "CG-3 + Adam", "epochs"),
    ("The exact step is better than ten of them:", "MLP", "ProxProp + SGD", "CG-10 + SGD", "epochs at one rate"),
    ("With SGD it is better per epoch than AdamW:", "MLP", "ProxProp + SGD", "AdamW", "epochs"),
    ("With SGD it is better in time than AdamW:", "MLP", "ProxProp + SGD", "AdamW", "seconds"),
    ("With Adam it is better per epoch than Muon:", "MLP", "ProxProp + Adam", "Muon", "epochs"),
    ("With Adam it is better in time than Muon:", "MLP", "ProxProp + Adam", "Muon", "seconds"),
)
"""The paper's claims, and the same against other peers: sentence, network, first, second, where they are compared."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--methods", nargs="+", default=[], help="only these; the page is written by a call without")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "proxprop-training.json"
    settings = (arguments.images, arguments.epochs, arguments.seeds, arguments.networks, arguments.methods)
    stored = run_all(path, *settings)
    if arguments.networks == list(NETWORKS) and not arguments.methods:
        (arguments.out / "proxprop-training.md").write_text(report(stored, arguments.seeds))


if __name__ == "__main__":
    main()
