"""Adversarial attacks that leave no trace; rules attached to the model act on their gradients."""

from backpass.attacks.attack import Attack
from backpass.attacks.pgd import PGD
from backpass.attacks.result import Result

__all__ = ["PGD", "Attack", "Result"]
