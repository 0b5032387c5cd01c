"""Data sets, decoded once into uint8 tensors, and their augmentation."""

from backpass.lab.data.augmentation import Augmentation
from backpass.lab.data.digits import load_digits
from backpass.lab.data.images import Images, Split
from backpass.lab.data.lookup import Labelled, load_data

__all__ = ["Augmentation", "Images", "Labelled", "Split", "load_data", "load_digits"]
