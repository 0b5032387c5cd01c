"""Backward rules: replacement backward passes for torch functions at selected sites of a model."""

from backpass.rules.activation_rule import ActivationRule
from backpass.rules.activations import activations
from backpass.rules.attaching.attached import Attached, attachments
from backpass.rules.attaching.wrappers import unwrap
from backpass.rules.bpa import BPA
from backpass.rules.guided import Deconvnet, GuidedBackprop
from backpass.rules.linbp import LinBP
from backpass.rules.listing import list_sites
from backpass.rules.pna import PNA
from backpass.rules.proxprop import ProxProp
from backpass.rules.registry import RULES, parse_rule
from backpass.rules.rule import BP, Rule
from backpass.rules.sgm import SGM
from backpass.rules.sibp import SIBP
from backpass.rules.sites import Site, SiteTable
from backpass.rules.tgr import TGR

__all__ = [
    "BP",
    "BPA",
    "PNA",
    "RULES",
    "SGM",
    "SIBP",
    "TGR",
    "ActivationRule",
    "Attached",
    "Deconvnet",
    "GuidedBackprop",
    "LinBP",
    "ProxProp",
    "Rule",
    "Site",
    "SiteTable",
    "activations",
    "attachments",
    "list_sites",
    "parse_rule",
    "unwrap",
]
