"""Data sets, decoded once into uint8 tensors, and their augmentation."""

from backpass.data.augmentation import Augmentation
from backpass.data.digits import load_digits
from backpass.data.images import Images, Split
from backpass.data.lookup import Labelled, load_data

__all__ = ["Augmentation", "Images", "Labelled", "Split", "load_data", "load_digits"]
