"""Texts that a page, a plot, a terminal or a formula would take for something else than text."""

PAYLOADS = [
    "<script>document.title='RAN'</script>",
    '"><img src=x onerror="document.title=\'RAN\'">',
    "' onmouseover='document.title=`RAN`' x='",
    "</style></svg></title><script>document.title='RAN'</script>",
    "--> ]]> <svg/onload=document.title='RAN'>",
    "javascript:document.title='RAN'",
    "{{ 7 * 7 }}{% raw %}",
    "&lt;b&gt; &amp; &#60;",
    "#1f2328 url(#p) \\1 \\g<0> \\",
    "$x_$ $\\frac{",
    "_hidden",
    "a[/b] [red]b[/red] [link=x]y",
    ":cat: *x* `y` | z | [a](b) ![a](b) <b>",
    "\x1b]0;title\x07\x1b[2J\x9b31m\x00\x7f\r",
    "\udcff\ud800 \ufffe",
    "\u202edcba \u2028",
    "\N{CJK UNIFIED IDEOGRAPH-732B} \N{CAT FACE}",
    "",
    "w" * 300,
]
