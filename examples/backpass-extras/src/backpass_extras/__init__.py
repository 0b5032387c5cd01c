"""Rectified gradients as a rule, and the translation-invariant attack, for backpass."""

from backpass_extras.rectgrad import RectGrad
from backpass_extras.tifgsm import TIFGSM

__all__ = ["TIFGSM", "RectGrad"]
