"""Functions are found by file and line, here in a module that is really imported."""

import importlib.util
import sys
import textwrap

import pytest

from asgi_pprof.collectors.heap.sources import LineNames
from asgi_pprof.profile import Function, Location

SOURCE = """
import functools                            # module level

class Cart:                                 # the class statement
    currency = str("EUR")                   # class body

    def total(self):
        hold = [object()]                   # method
        return hold

    @functools.lru_cache
    @staticmethod
    def cached():
        return [object()]                   # decorated method

    @property
    def items(self):
        return [object()]                   # property

def build_page(*parts, sep=str("-")):       # def
    def build_part(part):
        return [part]                       # nested function
    return list(map(build_part, parts))     # after the nested function

def decorate(function):
    @functools.wraps(function)
    def decorated(*args):
        return function(*args)              # wrapper
    return decorated

@decorate
def build_decorated():
    return [object()]                       # decorated function

@functools.lru_cache(
    maxsize=None,
)
def build_cached(
    first=None,
    second=None,
):
    return [object()]                       # after a long signature

build_lambda = lambda: [object()]           # lambda
build_key = sorted([3, 1], key=lambda n: [n])  # lambda as an argument

def build_list():
    return [
        [number]                            # comprehension
        for number in range(3)
    ]

def build_lazily():
    return (
        [number]                            # generator expression
        for number in range(3)
    )

async def build_async():
    return [object()]                       # async function

def build_on_one_line(): return [object()]  # one line

TABLE = [
    object(),                               # module level, many lines
]

class Outer:
    class Inner:
        def build_inner(self):
            return [object()]               # nested class

def build_in_class():
    class Local:
        value = [object()]                  # local class
    return Local

if True:
    def build_conditional():
        return [object()]                   # conditional
"""
NAME = "asgi_pprof_test_shop"
INLINED = sys.version_info >= (3, 12)  # PEP 709: list comprehensions have no code of their own


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """Return the module above, imported from a file."""
    path = tmp_path / f"{NAME}.py"
    path.write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    spec = importlib.util.spec_from_file_location(NAME, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, NAME, module)
    spec.loader.exec_module(module)
    return module


def line_of(mark):
    """Return the number of the line with that comment."""
    (number,) = (
        number
        for number, line in enumerate(SOURCE.splitlines(), 1)
        if line.partition("# ")[2] == mark
    )
    return number


def start_of(text):
    """Return the number of the line that starts with this text."""
    lines = SOURCE.splitlines()
    (number,) = (number for number, line in enumerate(lines, 1) if line.strip().startswith(text))
    return number


@pytest.mark.parametrize(
    ("mark", "name"),
    [
        ("module level", "<module>"),
        ("the class statement", "<module>"),
        ("class body", "Cart"),
        ("method", "Cart.total"),
        ("decorated method", "Cart.cached"),
        ("property", "Cart.items"),
        ("def", "<module>"),
        ("nested function", "build_page.<locals>.build_part"),
        ("after the nested function", "build_page"),
        ("wrapper", "decorate.<locals>.decorated"),
        ("decorated function", "build_decorated"),
        ("after a long signature", "build_cached"),
        ("lambda", "<lambda>"),
        ("lambda as an argument", "<lambda>"),
        ("comprehension", "build_list" if INLINED else "build_list.<locals>.<listcomp>"),
        ("generator expression", "build_lazily.<locals>.<genexpr>"),
        ("async function", "build_async"),
        ("one line", "build_on_one_line"),
        ("module level, many lines", "<module>"),
        ("nested class", "Outer.Inner.build_inner"),
        ("local class", "build_in_class.<locals>.Local"),
        ("conditional", "build_conditional"),
    ],
)
def test_a_line_has_the_name_of_the_innermost_function_around_it(shop, mark, name):
    """The name has the module in front; file and line are the given ones."""
    place = LineNames().location(shop.__file__, line_of(mark))
    assert place.function.name == f"{NAME}.{name}"
    assert place.function.filename == shop.__file__
    assert place.line == line_of(mark)


@pytest.mark.parametrize(
    ("mark", "start"),
    [
        ("method", "def total"),
        ("nested function", "def build_part"),
        ("decorated function", "@decorate"),
        ("after a long signature", "@functools.lru_cache("),
        ("lambda", "build_lambda ="),
        ("async function", "async def build_async"),
    ],
)
def test_a_function_starts_where_its_code_does(shop, mark, start):
    """That is its first decorator if it has one, as in `co_firstlineno`."""
    place = LineNames().location(shop.__file__, line_of(mark))
    assert place.function.start_line == start_of(start)


def test_lines_name_functions_as_frames_do(shop):
    """Heap and CPU profiles show one function under one name and start."""
    code = shop.Cart.total.__code__
    place = LineNames().location(shop.__file__, line_of("method"))
    assert place.function == Function(
        f"{NAME}.{code.co_qualname}", code.co_filename, code.co_firstlineno
    )


def test_a_line_asked_for_again_is_the_same_location(shop):
    """Locations are cached within one collection."""
    line_names = LineNames()
    first = line_names.location(shop.__file__, line_of("method"))
    assert line_names.location(shop.__file__, line_of("method")) is first


@pytest.mark.parametrize("line", [0, 100_000])
def test_a_line_that_no_code_has_is_unknown(shop, line):
    """File and line are still there."""
    place = LineNames().location(shop.__file__, line)
    if line:
        assert place.function == Function(f"{NAME}.<unknown>", shop.__file__, 0)
    assert (place.function.filename, place.line) == (shop.__file__, line)


@pytest.mark.parametrize("filename", ["/nowhere/shop.py", "<string>", "", "<unknown>", "/"])
def test_a_file_that_is_not_there_is_unknown(filename):
    """Code of exec and of deleted modules has no file; the line is still there."""
    expected = Location(Function("<unknown>", filename, 0), 3)
    assert LineNames().location(filename, 3) == expected


@pytest.mark.parametrize(
    "source", [b"def (", b"\x00\x01", b"# coding: klingon\nx = 1", b"\xff\xff"]
)
def test_a_file_that_is_no_python_is_unknown(tmp_path, source):
    """Lines of a template engine may be those of a template."""
    path = tmp_path / "page.html"
    path.write_bytes(source)
    assert LineNames().location(str(path), 1).function == Function("<unknown>", str(path), 0)


def test_a_file_of_no_loaded_module_is_read(tmp_path):
    """The file may have been run by runpy; the function's name has no module in front."""
    path = tmp_path / "script.py"
    path.write_text(
        textwrap.dedent("""
        def build_cart():
            return [object()]
    """)
    )
    expected = Location(Function("build_cart", str(path), 2), 3)
    assert LineNames().location(str(path), 3) == expected


def test_a_module_whose_source_is_gone_is_unknown(tmp_path, monkeypatch):
    """The source was deleted after the import, and there is no bytecode."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    path = tmp_path / "deleted.py"
    path.write_text("def build_cart():\n    return 1\n")
    spec = importlib.util.spec_from_file_location("asgi_pprof_test_deleted", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    path.unlink()
    place = LineNames().location(str(path), 2)
    assert place.function.name.endswith("<unknown>")
    assert (place.function.filename, place.line) == (str(path), 2)
