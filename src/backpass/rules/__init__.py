"""Rules: replacement backward passes for some torch functions at chosen sites of a model."""

from backpass.rules.linbp import LinBP
from backpass.rules.listing import list_sites
from backpass.rules.rule import BP, Attached, Rule, attachments
from backpass.rules.sites import Site, SiteTable
from backpass.rules.text import RULES, format_rule, parse_rule
from backpass.rules.wrappers import unwrap

__all__ = [
    "BP",
    "RULES",
    "Attached",
    "LinBP",
    "Rule",
    "Site",
    "SiteTable",
    "attachments",
    "format_rule",
    "list_sites",
    "parse_rule",
    "unwrap",
]
