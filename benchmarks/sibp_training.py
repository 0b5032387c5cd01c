"""Early training with SIBP beside SGD, AdamW and ProxProp: MNIST and CIFAR-10, several seeds, paired intervals.

All methods of a seed share the initial weights and the order of the batches. Data: BACKPASS_DATA names a folder with
mnist/train-*.parquet, mnist/test-*.parquet (columns image{bytes}, label) and cifar10/ (columns img{bytes}, label).
Rates are chosen on the last images of the training set, on which nothing is trained; where the best rate lies on the
edge of a grid, the grid grows. Runs are kept in --partial as they finish, and a second call goes on from there.
Run: python benchmarks/sibp_training.py [--networks mnist-1 ...] [--partial FILE] [--out docs/results]
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from backpass.rules.proxprop import ProxProp
from backpass.rules.sibp import SIBP
from backpass.training import Batch, Trainer
from sibp_training_report import interval, report

BATCH = 100
HELD_OUT = 5000
MARKS = (100, 300, 600)
FACTS = """Batches of {batch}, one pass in an order of its own per seed; test accuracy in percent and test cross-entropy
with 95 % intervals over seeds (Student's t). The best rate of each method is chosen by its mean accuracy at the last
mark on {held_out} held-out training images, on which nothing is trained; grids grow until that rate lies inside. A run
whose loss exceeds 100 or is not finite counts as diverged, and a rate where none diverged goes first. MLPs start from
N(0, .05). SIBP: lam 1, one Gauss-Newton step, 5 conjugate-gradient iterations of which the last looks at the kinks, SGD
with rate 1; its rate is eta. ProxProp: tau 1, exact, all layers; its rate is that of SGD on its direction. CPU seconds
are of the training steps, one thread, on a shared machine. CIFAR-10 is a JPEG copy.
PyTorch {torch}, Python {python}."""


class Images(NamedTuple):
    """One split of a data set."""

    x: Tensor  # (N, features) or (N, C, H, W), float32 in [0, 1]
    y: Tensor  # (N,)


def load(name: str, split: str) -> Images:
    """Decoded once, then kept under the system's folder for temporary files."""
    cache = Path(tempfile.gettempdir()) / f"backpass-{name}-{split}.pt"
    if not cache.exists():
        import numpy as np
        import pyarrow.parquet as pq
        from PIL import Image

        if "BACKPASS_DATA" not in os.environ:
            raise SystemExit("set BACKPASS_DATA to the folder that holds mnist/ and cifar10/ as Parquet files.")
        pixels, labels = [], []
        for file in sorted((Path(os.environ["BACKPASS_DATA"]) / name).glob(f"{split}-*.parquet")):
            table = pq.read_table(file)
            for image in table["image" if name == "mnist" else "img"].to_pylist():
                pixels.append(torch.from_numpy(np.array(Image.open(io.BytesIO(image["bytes"])))))
            labels += table["label"].to_pylist()
        partial = cache.with_suffix(f".{os.getpid()}")
        torch.save((torch.stack(pixels), torch.tensor(labels)), partial)
        partial.rename(cache)
    pixels, labels = torch.load(cache)
    return Images((pixels if pixels.dim() == 4 else pixels.unsqueeze(-1)).permute(0, 3, 1, 2) / 255, labels)


def mlp(*widths: int) -> nn.Sequential:
    """ReLU network with weights from N(0, .05) and biases 0, as in the released algorithm."""
    layers: list[nn.Module] = [nn.Flatten()]
    for i, o in pairwise(widths):
        linear = nn.Linear(i, o)
        nn.init.normal_(linear.weight, 0, 0.05)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn() -> nn.Sequential:
    """Two strided convolutions and a linear layer, PyTorch's initial weights."""
    first, second = nn.Conv2d(3, 16, 5, stride=2, padding=2), nn.Conv2d(16, 32, 3, stride=2, padding=1)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(2048, 10))


class Setup(NamedTuple):
    """A network and how it is trained."""

    title: str
    data: str
    build: Callable[[], nn.Sequential]
    seeds: int
    marks: tuple[int, ...]
    etas: tuple[float, ...]


RATES = {"SGD": (0.1, 0.3, 0.5, 1.0, 2.0), "AdamW": (3e-4, 1e-3, 3e-3, 1e-2), "ProxProp": (3.0, 10.0, 30.0, 100.0)}
ETAS = (0.1, 0.25, 0.5, 1.0)
SETUPS = {
    "mnist-1": Setup("MNIST, 784-500-10", "mnist", lambda: mlp(784, 500, 10), 5, MARKS, ETAS),
    "mnist-3": Setup("MNIST, 784-500-500-500-10", "mnist", lambda: mlp(784, 500, 500, 500, 10), 5, MARKS, ETAS),
    "mnist-8": Setup("MNIST, 784-100x8-10", "mnist", lambda: mlp(784, *[100] * 8, 10), 5, MARKS, (0.05, *ETAS)),
    "cifar-cnn": Setup("CIFAR-10, CNN 16-32-10", "cifar10", cnn, 3, MARKS[:2], (0.1, 0.3, 1.0, 3.0)),
    "cifar-mlp": Setup(
        "CIFAR-10, 3072-2000-500-10", "cifar10", lambda: mlp(3072, 2000, 500, 10), 3, (100, 200), (0.1, 0.25, 0.5)
    ),
}
OTHER_RATES: dict[str, dict[str, tuple[float, ...]]] = {
    "cifar-cnn": {"SGD": (0.01, 0.03, 0.1, 0.3), "ProxProp": (10.0, 30.0, 100.0, 300.0)},
    "cifar-mlp": {"SGD": (0.01, 0.03, 0.1, 0.3), "AdamW": (1e-4, 3e-4, 1e-3), "ProxProp": (3.0, 10.0, 30.0, 100.0)},
}
GROWTH = 4
"""A grid grows at most so many times."""


def grids(key: str) -> dict[str, tuple[float, ...]]:
    """The rates that each method begins with."""
    return {**RATES, **OTHER_RATES.get(key, {}), "SIBP": SETUPS[key].etas}


def next_rate(rates: list[float], best: float) -> float | None:
    """The rate beyond the edge that ``best`` lies on, about three times further; None if it lies on none."""
    if best not in (min(rates), max(rates)):
        return None
    factor = 3.0 if best == max(rates) else 1 / 3
    return float(f"{best * factor:.1g}")


class Splits(NamedTuple):
    """What is trained on, what rates are chosen on, and what is reported."""

    train: Images
    held_out: Images
    test: Images


def splits(name: str) -> Splits:
    """The last of the training images are held out."""
    x, y = load(name, "train")
    kept = len(x) - HELD_OUT
    return Splits(Images(x[:kept], y[:kept]), Images(x[kept:], y[kept:]), load(name, "test"))


def train(setup: Setup, family: str, rate: float, seed: int, data: Splits) -> dict[str, Any]:
    """One run: accuracy and loss on the test images at the marks, and CPU seconds of the training steps alone.

    ``held_out`` is the accuracy on the held-out images after the last mark.
    """
    torch.manual_seed(seed)
    model = setup.build()
    if family == "AdamW":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), rate)
    else:
        optimizer = torch.optim.SGD(model.parameters(), 1.0 if family == "SIBP" else rate)
    rule = {"SIBP": lambda: SIBP(eta=rate), "ProxProp": lambda: ProxProp(tau=1.0)}.get(family)
    order = torch.randperm(len(data.train.x), generator=torch.Generator().manual_seed(seed))
    points: list[dict[str, Any]] = []
    begin, seconds = 0.0, 0.0

    def prepare(x: torch.Tensor, batch: Batch) -> torch.Tensor:
        nonlocal begin
        begin = time.process_time()
        return x

    def measured(batch: int) -> None:
        nonlocal seconds
        seconds += time.process_time() - begin
        if batch in setup.marks:
            points.append({"batches": batch, **measure(model, data.test), "seconds": round(seconds, 3)})

    images = TensorDataset(data.train.x, data.train.y)
    diverged = (
        Trainer(
            model,
            optimizer,
            DataLoader(images, batch_size=BATCH, sampler=order.tolist()),
            epochs=-(-setup.marks[-1] * BATCH // len(order)),
            max_steps=setup.marks[-1],
            rules=(rule(),) if rule else (),
            prepare=prepare,
            diverged_above=None,
            log_every=setup.marks[-1],
            on_step=measured,
        )
        .fit()
        .diverged
    )
    for batch in setup.marks[len(points) :]:
        points.append({"batches": batch, **measure(model, data.test), "seconds": round(seconds, 3)})
    held_out = measure(model, data.held_out)["accuracy"]
    loss = points[-1]["loss"]
    return {"points": points, "held_out": held_out, "diverged": bool(diverged) or loss is None or loss > 100}


@torch.no_grad()
def measure(model: nn.Module, images: Images) -> dict[str, Any]:
    logits = torch.cat([model(x) for x in images.x.split(1000)])
    loss = F.cross_entropy(logits, images.y).item()
    accuracy = (logits.argmax(1) == images.y).float().mean().item()
    return {"accuracy": round(100 * accuracy, 3), "loss": round(loss, 5) if math.isfinite(loss) else None}


Runs = dict[str, dict[str, Any]]


def run(keys: list[str], partial: Path) -> Runs:
    """All runs by ``network/family/rate/seed``; those in ``partial`` are taken from there."""
    lines = partial.read_text().splitlines() if partial.exists() else []
    done = {entry["run"]: entry for entry in map(json.loads, lines)}
    for key in keys:
        setup, data = SETUPS[key], splits(SETUPS[key].data)

        def at(family: str, rate: float, key: str = key, setup: Setup = setup, data: Splits = data) -> None:
            for seed in range(setup.seeds):
                name = f"{key}/{family}/{rate:g}/{seed}"
                if name not in done:
                    done[name] = {"run": name, **train(setup, family, rate, seed, data)}
                    with partial.open("a") as file:
                        file.write(json.dumps(done[name]) + "\n")

        for family, grid in grids(key).items():
            for rate in grid:
                at(family, rate)
            for _ in range(GROWTH):
                rates = rates_of(done, key, family)
                beyond = next_rate(rates, max(rates, key=lambda rate: merit(done, key, family, rate)))
                if beyond is None:
                    break
                at(family, beyond)
    return done


def runs_of(done: Runs, key: str, family: str, rate: float) -> list[dict[str, Any]]:
    """One for each seed, or none while some are missing."""
    names = [f"{key}/{family}/{rate:g}/{seed}" for seed in range(SETUPS[key].seeds)]
    return [done[name] for name in names] if all(name in done for name in names) else []


def rates_of(done: Runs, key: str, family: str) -> list[float]:
    """The rates that were run with every seed, in order."""
    rates = {float(name.split("/")[2]) for name in done if name.startswith(f"{key}/{family}/")}
    return sorted(rate for rate in rates if runs_of(done, key, family, rate))


def merit(done: Runs, key: str, family: str, rate: float) -> tuple[bool, float]:
    """What rates are chosen by: first that no run diverged, then the mean accuracy on the held-out images."""
    runs = runs_of(done, key, family, rate)
    return not any(r["diverged"] for r in runs), statistics.fmean(r["held_out"] for r in runs)


def summarize(done: Runs, keys: list[str]) -> dict[str, Any]:
    networks = {}
    for key in keys:
        setup, rows = SETUPS[key], []
        for family in grids(key):
            rates = rates_of(done, key, family)
            if not rates:
                continue
            chosen = max(rates, key=lambda rate: merit(done, key, family, rate))
            for rate in rates:
                runs = runs_of(done, key, family, rate)
                row: dict[str, Any] = {
                    "method": family,
                    "rate": rate,
                    "chosen": rate == chosen,
                    "held_out": round(merit(done, key, family, rate)[1], 3),
                    "diverged": sum(r["diverged"] for r in runs),
                    "at": {},
                }
                for k, mark in enumerate(setup.marks):
                    points = [r["points"][k] for r in runs]
                    losses = [p["loss"] for p in points]
                    row["at"][str(mark)] = {
                        "accuracies": [p["accuracy"] for p in points],
                        "losses": losses,
                        "accuracy": [round(v, 3) for v in interval([p["accuracy"] for p in points])],
                        "loss": None if None in losses else [round(v, 4) for v in interval(losses)],
                        "seconds": round(statistics.median(p["seconds"] for p in points), 2),
                    }
                rows.append(row)
        if {row["method"] for row in rows} == set(grids(key)):
            networks[key] = {"title": setup.title, "seeds": setup.seeds, "rows": rows}
    return networks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(SETUPS), default=list(SETUPS))
    parser.add_argument("--partial", type=Path, default=Path(tempfile.gettempdir()) / "backpass-sibp-training.jsonl")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--report-only", action="store_true", help="write the results of the runs that are kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    done = run([] if options.report_only else options.networks, options.partial)
    networks = summarize(done, options.networks)
    facts = FACTS.format(batch=BATCH, held_out=HELD_OUT, torch=torch.__version__, python=platform.python_version())
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "sibp-training.json").write_text(json.dumps({"facts": facts, "networks": networks}) + "\n")
    (options.out / "sibp-training.md").write_text(report(networks, facts, growth=GROWTH))


if __name__ == "__main__":
    main()
