"""Adversarial training as a stochastic differential equation: dynamics, integration, weak error.

Needs torch alone.
"""

from backpass.sde.control import LinearQuadratic, Schedule, optimal_lr
from backpass.sde.dynamics import AdversarialSDE
from backpass.sde.inner import InnerLoop
from backpass.sde.integrate import SDE, ItoSDE, Paths, integrate, run_chain
from backpass.sde.long_run import Stationary, stationary
from backpass.sde.moments import GaussianRegression, Moments
from backpass.sde.problem import from_module
from backpass.sde.stationarity import fluctuation_dissipation, stationarity_test
from backpass.sde.weak_error import VARIANTS, Variant, WeakErrors, fit_slope, weak_error

__all__ = [
    "SDE",
    "VARIANTS",
    "AdversarialSDE",
    "GaussianRegression",
    "InnerLoop",
    "ItoSDE",
    "LinearQuadratic",
    "Moments",
    "Paths",
    "Schedule",
    "Stationary",
    "Variant",
    "WeakErrors",
    "fit_slope",
    "fluctuation_dissipation",
    "from_module",
    "integrate",
    "optimal_lr",
    "run_chain",
    "stationarity_test",
    "stationary",
    "weak_error",
]
