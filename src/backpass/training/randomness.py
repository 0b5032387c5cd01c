"""Seeds, and the states of the global random generators."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["mixed", "random_states", "restore_random_states", "seeded"]


def mixed(*words: int) -> int:
    """Return one seed in [0, 2**63) made from several integers."""
    return int.from_bytes(hashlib.sha256(repr(words).encode()).digest()[:8], "big") >> 1


def random_states() -> dict[str, Any]:
    """Return the states of the CPU generators of torch, Python and NumPy, as tensors, numbers and lists."""
    version, words, gauss = random.getstate()
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "python": [version, list(words), gauss]}
    if "numpy" in sys.modules:
        _, keys, *rest = sys.modules["numpy"].random.get_state()
        states["numpy"] = [torch.from_numpy(keys.astype("int64")), *rest]
    return states


def restore_random_states(states: dict[str, Any]) -> None:
    """Set the generators to states that `random_states` returned."""
    torch.set_rng_state(states["torch"])
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    if "numpy" in states and "numpy" in sys.modules:
        keys, *rest = states["numpy"]
        sys.modules["numpy"].random.set_state(("MT19937", keys.numpy().astype("uint32"), *rest))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the CPU generators of torch, Python and NumPy, and put back their states afterwards."""
    before = random_states()
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)
    try:
        yield
    finally:
        restore_random_states(before)
