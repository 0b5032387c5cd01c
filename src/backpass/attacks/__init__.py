"""Adversarial attacks that leave no trace; rules attached to the model act on their gradients."""

from backpass.attacks.apgd import APGD
from backpass.attacks.attack import Attack
from backpass.attacks.autoattack import AutoAttack
from backpass.attacks.companions import Pool
from backpass.attacks.ensemble import Ensemble
from backpass.attacks.evaluation import evaluate
from backpass.attacks.fab import FAB
from backpass.attacks.fgsm import FGSM, IFGSM
from backpass.attacks.iterative import Iterative
from backpass.attacks.minimum import FMN
from backpass.attacks.momentum import MIFGSM
from backpass.attacks.names import make_attack
from backpass.attacks.paired import Paired
from backpass.attacks.pgd import PGD
from backpass.attacks.report import Rate, Report
from backpass.attacks.result import Result
from backpass.attacks.saving import Saved, load, save
from backpass.attacks.square import Square
from backpass.attacks.transferability import TransferReport, transfer

__all__ = [
    "APGD",
    "FAB",
    "FGSM",
    "FMN",
    "IFGSM",
    "MIFGSM",
    "PGD",
    "Attack",
    "AutoAttack",
    "Ensemble",
    "Iterative",
    "Paired",
    "Pool",
    "Rate",
    "Report",
    "Result",
    "Saved",
    "Square",
    "TransferReport",
    "evaluate",
    "load",
    "make_attack",
    "save",
    "transfer",
]
