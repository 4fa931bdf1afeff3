"""
The index page.

Source: net/http/pprof, indexTmplExecute.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from string import Template
from urllib.parse import quote

Row = tuple[str, int, str, str]
"""The name, count and description of a profile, and a note such as how to switch it on."""

# Not a file beside this one: a frozen or zipped program has none.
_PAGE = Template("""\
<html>
<head>
<title>/debug/pprof/</title>
<style>
.profile-name{
	display:inline-block;
	width:6rem;
}
</style>
</head>
<body>
/debug/pprof/
<br>
<p>Set debug=1 as a query parameter to export in legacy text format</p>
<br>
Types of profiles available:
<table>
<thead><td>Count</td><td>Profile</td></thead>
$rows
</table>
<a href="goroutine?debug=2">full goroutine stack dump</a>
<br>
<p>
Profile Descriptions:
<ul>
$descriptions
</ul>
</p>
$stats</body>
</html>""")


def index_page(rows: Sequence[Row], stats: str = "") -> str:
    """
    Return the page with a row and a description for each profile, in the given order.

    Args:
        rows: The profiles.
        stats: Lines of text to show after Go's part of the page.
    """
    return _PAGE.substitute(
        rows="\n".join(
            f"<tr><td>{count}</td><td><a href='{_href(name)}?debug=1'>{_text(name)}</a></td></tr>"
            for name, count, _, _ in rows
        ),
        descriptions="\n".join(
            f"<li><div class=profile-name>{_text(name)}: </div>"
            f" {_text(description)}{_note(note)}</li>"
            for name, _, description, note in rows
        ),
        stats=f"<p><a href='stats'>stats</a>:</p>\n<pre>\n{_text(stats)}</pre>\n" if stats else "",
    )


def _note(note: str) -> str:
    return f" <em>({_text(note)})</em>" if note else ""


def _href(name: str) -> str:
    href = quote(name, safe="/:@!$&()*+,;=~-._", errors="backslashreplace")
    # A browser would read the part before a colon in the first segment as a scheme.
    return f"./{href}" if ":" in href.partition("/")[0] else href


def _text(text: str) -> str:
    # Like Go's html.EscapeString, which writes quotes as numbers.
    return escape(text, quote=False).replace("'", "&#39;").replace('"', "&#34;")
