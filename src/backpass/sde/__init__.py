"""Adversarial training as a stochastic differential equation: dynamics, integration, weak error.

Needs torch alone.
"""

from backpass.sde.dynamics import AdversarialSDE
from backpass.sde.inner import InnerLoop
from backpass.sde.integrate import SDE, ItoSDE, Paths, integrate, run_chain
from backpass.sde.problem import from_module

__all__ = ["SDE", "AdversarialSDE", "InnerLoop", "ItoSDE", "Paths", "from_module", "integrate", "run_chain"]
