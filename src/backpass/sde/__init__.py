"""Adversarial training as a stochastic differential equation: dynamics, integration, weak error.

Needs torch alone.
"""

from backpass.sde.control import LinearQuadratic, Schedule, optimal_lr
from backpass.sde.dynamics import AdversarialSDE
from backpass.sde.inner import InnerLoop
from backpass.sde.integrate import SDE, ItoSDE, Paths, integrate, run_chain
from backpass.sde.long_run import Stationary, stationary
from backpass.sde.problem import from_module
from backpass.sde.stationarity import fluctuation_dissipation, stationarity_test

__all__ = [
    "SDE",
    "AdversarialSDE",
    "InnerLoop",
    "ItoSDE",
    "LinearQuadratic",
    "Paths",
    "Schedule",
    "Stationary",
    "fluctuation_dissipation",
    "from_module",
    "integrate",
    "optimal_lr",
    "run_chain",
    "stationarity_test",
    "stationary",
]
