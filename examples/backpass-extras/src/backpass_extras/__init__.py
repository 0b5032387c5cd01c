"""Guided backpropagation as a rule, and the translation-invariant attack, for backpass."""

from backpass_extras.guided import Guided
from backpass_extras.tifgsm import TIFGSM

__all__ = ["TIFGSM", "Guided"]
