"""Rectified gradients as a rule, and the staircase-sign attack, for backpass."""

from backpass_extras.rectgrad import RectGrad
from backpass_extras.ssfgsm import SSFGSM

__all__ = ["SSFGSM", "RectGrad"]
