"""Adversarial training as a stochastic differential equation: dynamics, integration, weak error.

Needs torch alone.
"""

from backpass.sde.brownian import BrownianPath
from backpass.sde.certify import Certificate, certify
from backpass.sde.chain import Chain, run_chain
from backpass.sde.checks import Check, Estimate
from backpass.sde.control import LinearQuadratic, Schedule, optimal_lr
from backpass.sde.controlled import ControlledSDE
from backpass.sde.dynamics import AdversarialSDE
from backpass.sde.inner import InnerLoop
from backpass.sde.integrate import integrate
from backpass.sde.ito import SDE, ItoSDE, TorchSDE
from backpass.sde.long_run import Stationary, stationary
from backpass.sde.moments import GaussianRegression, Moments
from backpass.sde.momentum import MomentumSDE
from backpass.sde.paths import Paths
from backpass.sde.permuted_law import PermutedLaw, permuted_law
from backpass.sde.predict import Predictor, Setting, explore
from backpass.sde.problem import from_module
from backpass.sde.stationarity import fluctuation_dissipation, stationarity_test
from backpass.sde.svag import SVAG, svag_weights
from backpass.sde.weak_error import VARIANTS, Variant, WeakErrors, fit_slope, weak_error

__all__ = [
    "SDE",
    "SVAG",
    "VARIANTS",
    "AdversarialSDE",
    "BrownianPath",
    "Certificate",
    "Chain",
    "Check",
    "ControlledSDE",
    "Estimate",
    "GaussianRegression",
    "InnerLoop",
    "ItoSDE",
    "LinearQuadratic",
    "Moments",
    "MomentumSDE",
    "Paths",
    "PermutedLaw",
    "Predictor",
    "Schedule",
    "Setting",
    "Stationary",
    "TorchSDE",
    "Variant",
    "WeakErrors",
    "certify",
    "explore",
    "fit_slope",
    "fluctuation_dissipation",
    "from_module",
    "integrate",
    "optimal_lr",
    "permuted_law",
    "run_chain",
    "stationarity_test",
    "stationary",
    "svag_weights",
    "weak_error",
]
