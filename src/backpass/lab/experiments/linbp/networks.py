"""How the attacked networks are trained: small ones in half a minute on one core, and the paper's to the end."""

from __future__ import annotations

from backpass.lab.experiments.linbp.victims import Training

__all__ = ["LARGE", "LARGE_SEEDS", "SMALL_CNN", "SMALL_RESNET", "large"]

SMALL_CNN = Training(model="cnn", limit=4000, epochs=10, lr=0.02, augment="flip")
SMALL_RESNET = Training(model="resnet:width=8", limit=5000, epochs=12, augment="flip")


def large(model: str) -> Training:
    """One of the paper's networks, trained on all images until it knows them."""
    return Training(model=model, epochs=200, batch_size=128, augment="crop,flip", dtype="bfloat16")


LARGE = (
    *map(large, ("vgg16", "resnet50", "densenet161", "mobilenetv2")),
    Training(
        model="wrn-28-10",
        epochs=100,
        batch_size=128,
        augment="crop,flip",
        adversary="pgd:eps=8/255,step=2/255,steps=10",
        dtype="bfloat16",
    ),
)
"""The last is trained on adversarial examples; the paper takes its robust one from RobustBench."""

LARGE_SEEDS = (0, 1, 2)
"""Fewer than of the small ones: each is hours of a GPU's work."""
