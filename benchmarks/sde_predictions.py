"""Predictions of adversarial training on MNIST at other learning rates and adversaries, against new runs.

    OMP_NUM_THREADS=1 python benchmarks/sde_predictions.py [SEED ...]

A LeNet-5 of tanh is trained without an adversary for 150 steps. `explore` then runs adversarial training at eight
settings around (eta, K, eta_inner) = (0.1, 3, 0.02) for 50 steps of 32 images, and predicts three other settings.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
import torch.nn.functional as F

from backpass.data import load_data
from backpass.models import build
from backpass.sde import InnerLoop
from backpass.sde.certify import OBSERVABLES, ensemble, process
from backpass.sde.predict import Setting, explore

BATCH, STEPS, PLAIN, RUNS = 32, 50, 150, 4
BASE = Setting(eta=0.1, steps=3, eta_inner=0.02)
OTHERS = (Setting(0.07, 3, 0.025), Setting(0.12, 4, 0.015), Setting(0.085, 2, 0.02))


def compare(seed: int) -> int:
    """Print the predictions beside the means of new runs, and return how many of the nine lie inside their bars."""
    images = load_data("mnist", split="train").first(4096).images
    x, y = images.x, images.y
    model = build("lenet5:activation=tanh", seed=seed)
    draws = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(PLAIN):
        rows = torch.randint(len(x), (BATCH,), generator=draws)
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    model.eval()
    adversary = InnerLoop(steps=BASE.steps, eta=BASE.eta_inner, direction="sign", eps=0.1)
    sde, theta = process(model, (x, y), BASE.eta, BATCH, adversary)
    probe = replace(sde, data=(x[:512], y[:512]))
    predictor = explore(sde, theta, STEPS, probe=probe, generator=draws)
    inside = 0
    for one in OTHERS:
        own = replace(sde, eta_outer=one.eta, steps=one.steps, eta_inner=one.eta_inner)
        steps = round(STEPS * BASE.eta / one.eta)
        found, _ = ensemble(own, theta, steps, RUNS, probe=probe, sampling="permuted", generator=draws)
        predicted = predictor.predict(*one, replicas=RUNS)
        for name in OBSERVABLES:
            bar, mean = predicted[name], float(found[name].double().mean())
            inside += bar.low <= mean <= bar.high
            print(f"{one}  {name:<17} predicted {bar.value:.4f} [{bar.low:.4f}, {bar.high:.4f}]  measured {mean:.4f}")
    print(f"seed {seed}: {inside} of {len(OTHERS) * len(OBSERVABLES)} inside their 95 % bars", flush=True)
    return inside


if __name__ == "__main__":
    torch.set_num_threads(1)
    for text in sys.argv[1:] or ["0"]:
        compare(int(text))
