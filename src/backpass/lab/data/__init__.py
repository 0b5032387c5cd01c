"""Data sets, decoded once into uint8 tensors."""

from backpass.lab.data.digits import load_digits
from backpass.lab.data.images import Images, Split

__all__ = ["Images", "Split", "load_digits"]
