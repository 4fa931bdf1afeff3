"""
The index page.

Source: net/http/pprof, indexTmplExecute.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from urllib.parse import quote

Row = tuple[str, int, str, str]
"""Name, count, description, and a note such as how to switch it on."""

_PAGE = Template(Path(__file__).with_name("index.html").read_text(encoding="utf-8"))


def index_page(rows: Sequence[Row], stats: str = "") -> str:
    """
    Return the page with one row and one description a profile, in the order given.

    Args:
        rows: The profiles.
        stats: Lines of text to show behind everything that is Go's.
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
    # A colon in the first segment would make what is before it a scheme.
    return f"./{href}" if ":" in href.partition("/")[0] else href


def _text(text: str) -> str:
    # As Go's html.EscapeString, which writes quotes as numbers.
    return escape(text, quote=False).replace("'", "&#39;").replace('"', "&#34;")
