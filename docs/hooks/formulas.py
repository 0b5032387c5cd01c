"""Formulas as MathML when the site is built: the pages load nothing to show them."""

import html
import re
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """What arithmatex marks as inline and display formulas, written out."""
    return _FORMULA.sub(_written_out, content)


def _written_out(match: re.Match[str]) -> str:
    tag, bracket, latex = match.groups()
    display = "block" if bracket == "[" else "inline"
    return f'<{tag} class="arithmatex">{convert(html.unescape(latex), display=display)}</{tag}>'
