"""Rules for transfer attacks at an equal number of gradients, on pretrained EfficientNet-Lite networks.

python benchmarks/transfer_budget.py run pieces 100    (goes on where an interrupted run stopped)
python benchmarks/transfer_budget.py report pieces docs/results/transfer-budget.json    (and the page beside it)

Images are made against lite0 and shown to lite1 and lite2. The photographs are those of foolbox, scikit-image,
scikit-learn and matplotlib that the three networks agree on; see `photographs` and `agreed`. The first
ten gradients of all runs come first, then rule by rule the others; every ten are kept.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backpass.attacks import IFGSM, MIFGSM, Iterative
from backpass.attacks.iterative import Ascent
from backpass.attacks.jobs import Jobs
from backpass.files import write_whole
from backpass.rules.registry import parse_rule
from backpass.version import __version__
from transfer_budget_page import page

RULES = {
    "BP": "bp",
    "SGM 0.5": "sgm:decay=0.5",
    "LinBP from 31": "linbp:start=31",
    "BPA from 16": "bpa:start=16",
    "LinBP from 16, per activation": "linbp:start=16,residual=per_activation",
    "LinBP from 24": "linbp:start=24",
    "LinBP from 16": "linbp:start=16",
    "LinBP from 8": "linbp:start=8",
}
"""Text form of each rule; EfficientNet-Lite0 has 33 activations."""
ATTACKS: dict[str, Iterative] = {
    "I-FGSM": IFGSM(eps=8 / 255, step=2 / 255, early_stop=False),
    "MI-FGSM": MIFGSM(eps=8 / 255, step=2 / 255, decay=1.0, early_stop=False),
}
MARKS = (1, 2, 5, *range(10, 101, 10))
"""Numbers of gradients after which the images are judged."""
LEAST = 0.3
"""Probability that each network gives at least to the common prediction of a photograph."""
SIDE = 224
FILES = {
    "foolbox": ["data/imagenet_*.jpg"],
    "skimage": [
        *("data/astronaut.png", "data/chelsea.png", "data/coffee.png", "data/camera.png", "data/rocket.jpg"),
        *("data/motorcycle_left.png", "data/coins.png", "data/hubble_deep_field.jpg", "data/moon.png"),
        *("data/brick.png", "data/grass.png", "data/gravel.png", "data/retina.jpg"),
    ],
    "sklearn": ["datasets/images/china.jpg", "datasets/images/flower.jpg"],
    "matplotlib": ["mpl-data/sample_data/grace_hopper.jpg"],
}


def photographs() -> dict[str, Tensor]:
    """Return the central squares of the packages' photographs, (3, 224, 224) in [0, 1]."""
    import numpy
    from PIL import Image

    found: dict[str, Tensor] = {}
    for package, patterns in FILES.items():
        folder = Path(str(import_module(package).__file__)).parent
        for file in sorted(file for pattern in patterns for file in folder.glob(pattern)):
            image = Image.open(file).convert("RGB")
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            square = image.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            found[f"{package}/{file.name}"] = torch.tensor(numpy.array(square)).permute(2, 0, 1) / 255
    return found


def networks() -> dict[str, nn.Module]:
    """Return the pretrained networks, each with its normalisation."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "efficientnet-lite"))
    made = import_module("networks")
    nets = {f"lite{size}": getattr(made, f"lite{size}")() for size in range(3)}
    return {name: nn.Sequential(Normalised(), net).eval().requires_grad_(False) for name, net in nets.items()}


class Normalised(nn.Module):
    """(x - 127 / 255) / (128 / 255), the networks' own input range."""

    def forward(self, x: Tensor) -> Tensor:
        """Return normalised images."""
        return (x * 255 - 127) / 128


def agreed(nets: dict[str, nn.Module], found: dict[str, Tensor]) -> tuple[list[str], Tensor, Tensor]:
    """Return names, images and labels of the photographs with a confident common prediction."""
    x = torch.stack(list(found.values()))
    with torch.no_grad():
        answers = [net(x).softmax(1).max(1) for net in nets.values()]
    labels = answers[0].indices
    keep = torch.stack([(one.indices == labels) & (one.values >= LEAST) for one in answers]).all(0)
    return [name for name, kept in zip(found, keep.tolist(), strict=True) if kept], x[keep], labels[keep]


def advance(path: Path, run: tuple[str, str], nets: dict[str, nn.Module], x: Tensor, y: Tensor, upto: int) -> None:
    """Take one run's images further, up to so many gradients, and judge them at each mark."""
    piece: dict[str, Any] = {"done": 0, "z": None, "memory": None, "predicted": {}, "seconds": 0.0}
    if path.exists():
        piece = torch.load(path)
    attack, rule = ATTACKS[run[0]], RULES[run[1]]
    index = torch.arange(len(x))
    jobs = Jobs(x, y, index, index, torch.zeros_like(index), attack.threat(index))
    while piece["done"] < upto:
        began = time.process_time()
        attached = parse_rule(rule).attach(nets["lite0"])
        oracle = attack.make_oracle(nets["lite0"])
        oracle.looks_at_batches = False
        state = attack.begin(oracle, jobs)
        if piece["z"] is not None:
            state = Ascent(jobs=jobs, z=piece["z"], seen=piece["z"], memory=piece["memory"])
        # Small batches stay in the cache.
        rows = [state[some] for some in torch.arange(len(x)).split(4)]
        goal = next(mark for mark in MARKS if mark > piece["done"])
        for iteration in range(piece["done"], goal):
            rows = [attack.advance(oracle, one, iteration) for one in rows]
        attached.remove()
        piece["z"] = torch.cat([one.z for one in rows])
        piece["memory"] = None if rows[0].memory is None else torch.cat([one.memory for one in rows])
        piece["done"] = goal
        piece["seconds"] += time.process_time() - began
        with torch.no_grad():
            piece["predicted"][goal] = {name: net(piece["z"]).argmax(1).tolist() for name, net in nets.items()}
        file = io.BytesIO()
        torch.save(piece, file)
        write_whole(path, file.getvalue())


def run(folder: str, gradients: str = "100") -> None:
    """Advance all runs, to ten gradients first."""
    torch.set_num_threads(1)
    nets, found = networks(), photographs()
    names, x, y = agreed(nets, found)
    pieces = Path(folder)
    pieces.mkdir(parents=True, exist_ok=True)
    images = {"digest": _digest([x]), "of": len(found), "names": names, "labels": y.tolist()}
    weights = {name: _digest([tensor for _, tensor in sorted(net.state_dict().items())]) for name, net in nets.items()}
    torch.save({"images": images, "weights": weights}, pieces / "images.pt")
    for upto in (10, int(gradients)):
        for rule in RULES:
            for attack in ATTACKS:
                advance(pieces / f"{attack} {rule}.pt", (attack, rule), nets, x, y, upto)
                print(f"{attack}, {rule}: {upto} gradients, {time.process_time():.0f} CPU seconds in all", flush=True)


def report(folder: str, path: str) -> None:
    """Write the outcomes of the finished runs, image by image, and the page made of them."""
    common = torch.load(Path(folder) / "images.pt")
    labels, runs = common["images"]["labels"], []
    for attack in ATTACKS:
        for rule, text in RULES.items():
            piece = Path(folder) / f"{attack} {rule}.pt"
            if piece.exists():
                found = torch.load(piece)
                fooled = {
                    str(mark): {
                        net: [int(a != b) for a, b in zip(one, labels, strict=True)] for net, one in seen.items()
                    }
                    for mark, seen in found["predicted"].items()
                }
                one = {"attack": attack, "rule": rule, "text": text, "cpu seconds": round(found["seconds"])}
                runs.append({**one, "fooled": fooled})
    result = {
        "command": "python benchmarks/transfer_budget.py run pieces 100",
        "settings": {"eps": "8/255", "step": "2/255", "source": "lite0", "targets": ["lite1", "lite2"], "least": LEAST},
        **common,
        "environment": {"torch": torch.__version__, "backpass": __version__},
        "planned": [[attack, rule] for attack in ATTACKS for rule in RULES],
        "runs": runs,
    }
    write_whole(Path(path), json.dumps(result) + "\n")
    write_whole(Path(path).with_suffix(".md"), page(result))


def _digest(tensors: list[Tensor]) -> str:
    words = hashlib.sha256()
    for tensor in tensors:
        words.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return words.hexdigest()[:16]


if __name__ == "__main__":
    {"run": run, "report": report}[sys.argv[1]](*sys.argv[2:])
