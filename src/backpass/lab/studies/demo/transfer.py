"""Transferability of adversarial images between two networks, with plain gradients and under rules."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from backpass.attacks import PGD, transfer
from backpass.data import Split
from backpass.lab.studies.demo.part import Part, Report, compare, make
from backpass.report.claims import judge
from backpass.report.result import Curve, Finding, Series
from backpass.report.statistics import mean_interval
from backpass.report.wording import interval_text
from backpass.rules import parse_rule
from backpass.training import Trainer
from backpass.wording import listing

__all__ = ["Transfer"]

_RULES = {
    "plain": "bp",
    "LinBP": "linbp:start=layer2,residual=renormalized",
    "SGM": "sgm:decay=0.5",
    "BPA": "bpa",
}
_SOURCES = {
    "LinBP": "Guo, Li, Chen, NeurIPS 2020; Li et al., arXiv 2112.11018",
    "SGM": "Wu et al., ICLR 2020",
    "BPA": "Wang, Tong, He, NeurIPS 2023",
}


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """Settings: adversarial images of ``source`` are evaluated on ``target``, trained from other initial weights."""

    seeds: int = 5
    source: str = "resnet:width=8"
    target: str = "cnn"
    epochs: int = 8
    batch_size: int = 64
    rate: float = 3e-3
    eps: tuple[float, ...] = (0.1, 0.15, 0.2)
    steps: int = 10
    images: int = 200

    def run(self, split: Split, report: Report) -> Part:
        """Return the success of every rule's images on the target."""
        found: dict[str, list[list[float]]] = {rule: [] for rule in _RULES}
        images = split.test.x[: self.images], split.test.y[: self.images]
        rules = {name: parse_rule(text) for name, text in _RULES.items()}
        for seed in range(self.seeds):
            source, target = (
                self._train(name, split, 2 * seed + k) for k, name in enumerate((self.source, self.target))
            )
            rows: dict[str, list[float]] = {rule: [] for rule in _RULES}
            for eps in self.eps:
                attack = PGD(eps=eps, step=eps / 5, steps=self.steps, restarts=1, seed=seed)
                rates = transfer({"": source}, {"": target}, images, attack, rules=rules).rates
                for rule in _RULES:
                    rows[rule].append(100 * rates[f" {rule}"][""].value)
            for rule, row in rows.items():
                found[rule].append(row)
            report(f"transfer, pair {seed + 1} of {self.seeds}")
        plain = [row[-1] for row in found["plain"]]
        claims = [
            judge(
                f"transfer-{rule.lower()}",
                f"images made with {rule} fool the other network more often than those of plain gradients",
                ours=[row[-1] for row in found[rule]],
                theirs=plain,
                direction="higher",
                quantity=f"images fooled at eps {self.eps[-1]:g}, percentage points",
                reference=_SOURCES[rule],
            )
            for rule in list(_RULES)[1:]
        ]
        words = [
            f"with {rule} {compare(claim, 'higher', 'lower', ' points')}"
            for rule, claim in zip(_SOURCES, claims, strict=True)
        ]
        return Part(
            finding=Finding(
                "Attacks that transfer",
                f"Images made against a small residual network are shown to another network. At eps {self.eps[-1]:g}, "
                f"{interval_text(mean_interval(plain))} % of those of plain gradients fool it. Compared with this, "
                f"success is {listing(words)}.",
            ),
            series=Series(
                id="transfer",
                title="Attacks that transfer",
                description=f"PGD on {self.source}; success on {self.target}, trained from other weights, less the "
                "success of plain gradients. Above zero the rule's images fool more often.",
                x_label="eps (pixels in [0, 1])",
                y_label="images fooled, difference (points)",
                curves=[
                    Curve(label=rule, x=self.eps, runs=_less(found[rule], found["plain"])) for rule in list(_RULES)[1:]
                ],
            ),
            claims=claims,
            settings={
                "networks": f"{self.source}; {self.target}; {self.epochs} epochs of AdamW, one-cycle to {self.rate:g}",
                "attack": f"PGD, {self.steps} steps of eps / 5, one random start, {self.images} held-out images",
                **{name: text for name, text in _RULES.items() if name != "plain"},
            },
        )

    def _train(self, name: str, split: Split, seed: int) -> nn.Module:
        model = make(name, split, seed)
        Trainer(
            model,
            torch.optim.AdamW(model.parameters(), self.rate),
            (split.train.x, split.train.y),
            epochs=self.epochs,
            batch_size=self.batch_size,
            scheduler="one-cycle",
            seed=seed,
        ).fit()
        return model.eval()


def _less(ours: list[list[float]], theirs: list[list[float]]) -> list[list[float]]:
    return [[a - b for a, b in zip(*rows, strict=True)] for rows in zip(ours, theirs, strict=True)]
