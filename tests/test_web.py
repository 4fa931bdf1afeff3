"""The index page is compared with pages of a real Go server."""

import html
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest

from asgi_pprof.web import index_page

pytestmark = pytest.mark.once

GOLDEN = Path(__file__).parent / "golden"
ROW = re.compile(r"<tr><td>(.*)</td><td><a href='(.*)\?debug=1'>(.*)</a></td></tr>")
DESCRIPTION = re.compile(r"<li><div class=profile-name>(.*): </div> (.*)</li>")


def rows(page):
    """Return (count, href, name) of every row."""
    return ROW.findall(page)


class Links(HTMLParser):
    """Collects the links, tags and text of a page as a browser would see them."""

    def __init__(self, page):
        super().__init__()
        self.hrefs, self.tags, self.text = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.hrefs += [value for key, value in attributes if key == "href"]

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("name", ["index.body", "custom_index.body"])
def test_the_page_is_gos_byte_for_byte(name):
    """Rows, links, descriptions and the page around them are equal."""
    page = (GOLDEN / name).read_text()
    counts = [int(count) for count, _, _ in rows(page)]
    descriptions = [tuple(map(html.unescape, pair)) for pair in DESCRIPTION.findall(page)]
    assert len(counts) == len(descriptions) >= 11
    ours = index_page(
        [
            (profile, count, description, "")
            for count, (profile, description) in zip(counts, descriptions, strict=True)
        ]
    )
    assert ours == page


def test_rows_keep_the_order_they_are_given():
    """The page does not sort; its caller knows all profiles."""
    page = index_page([("heap", 3, "Live.", ""), ("allocs", 0, "Past.", ""), ("b", 1, "", "")])
    assert rows(page) == [("3", "heap", "heap"), ("0", "allocs", "allocs"), ("1", "b", "b")]
    assert DESCRIPTION.findall(page) == [("heap", "Live."), ("allocs", "Past."), ("b", "")]


def test_a_note_follows_the_description():
    """A note says, for example, how to switch a profile on."""
    page = index_page([("block", 0, "Blocking.", 'off: use "block=1"')])
    assert (
        "<li><div class=profile-name>block: </div>"
        " Blocking. <em>(off: use &#34;block=1&#34;)</em></li>" in page
    )


def test_every_link_is_relative_and_asks_for_text():
    """The page works below any prefix, and a click shows readable text."""
    page = index_page([("heap", 0, "", ""), ("profile", 0, "", "")], "figure 1\n")
    assert Links(page).hrefs == ["heap?debug=1", "profile?debug=1", "goroutine?debug=2", "stats"]


def test_figures_follow_gos_part_of_the_page():
    """They are escaped, and the rest of the page does not change."""
    rows = [("heap", 3, "Live.", "")]
    plain, page = index_page(rows), index_page(rows, 'a{loop="<b>$rows&"} 1\nb 2\n')
    shown = "<pre>\na{loop=&#34;&lt;b&gt;$rows&amp;&#34;} 1\nb 2\n</pre>\n"
    end = "</body>\n</html>"
    assert page == plain.replace(end, f"<p><a href='stats'>stats</a>:</p>\n{shown}{end}")
    assert page != plain


@pytest.mark.parametrize(
    ("name", "text", "href"),
    [
        ("example.com/conns", "example.com/conns", "example.com/conns"),
        ("<b>", "&lt;b&gt;", "%3Cb%3E"),
        ("a'b", "a&#39;b", "a%27b"),
        ('a"b', "a&#34;b", "a%22b"),
        ("a&b", "a&amp;b", "a&b"),
        ("a b", "a b", "a%20b"),
        ("a?b", "a?b", "a%3Fb"),
        ("a#b", "a#b", "a%23b"),
        ("a%b", "a%b", "a%25b"),
        ("a+b", "a+b", "a+b"),
        ("a;b", "a;b", "a;b"),
        ("a/b:c", "a/b:c", "a/b:c"),
        ("a:b", "a:b", "./a:b"),
        ("javascript:alert(1)", "javascript:alert(1)", None),
        ("é", "é", "%C3%A9"),
        ("$rows", "$rows", "$rows"),
        ("${rows}", "${rows}", None),
    ],
)
def test_names_are_escaped_as_go_escapes_them(name, text, href):
    """This holds for text, link and description, and was compared with Go 1.27.3."""
    page = index_page([(name, 1, "", "")])
    ((_, shown_href, shown),) = rows(page)
    assert shown == text
    assert DESCRIPTION.findall(page) == [(text, "")]
    if href:
        assert shown_href == href


@pytest.mark.parametrize(
    "name",
    [
        "heap",
        "example.com/conns",
        "<b>",
        "a'b",
        "a b",
        "a%b",
        "a%2Fb",
        "a+b",
        "a/b:c",
        "a:b",
        "db:pool",
    ]
    + ["javascript:alert(1)", "é", "x\udcff"],
)
def test_a_browser_follows_a_link_to_the_profile_of_that_name(name):
    """Any name gives a path below this page, never another scheme or host."""
    page = index_page([(name, 1, "", "")])
    url = urlsplit(urljoin("http://localhost/debug/pprof/", Links(page).hrefs[0]))
    assert (url.scheme, url.netloc, url.query) == ("http", "localhost", "debug=1")
    path = unquote(url.path, errors="surrogateescape")
    assert path.removeprefix("/debug/pprof/") in (name, name.replace("\udcff", "\\udcff"))


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", "</ul><h1>", "&lt;", "$rows", "'\""])
def test_markup_in_descriptions_and_notes_is_only_text(text):
    """Markup is shown as text and adds no element."""
    plain = Links(index_page([("heap", 1, "x", "x")]))
    marked = Links(index_page([("heap", 1, text, text)]))
    assert marked.tags == plain.tags
    assert f" {text} " in marked.text
    assert f"({text})" in marked.text
