"""
Check that a profile contains nothing impossible.

Every function must exist in its file at its first line, and the sampled line must
be inside it. Chains of generated functions must be in order. Labels must be those
that the sampled code has set.
"""

from __future__ import annotations

import _imp
import gc
import re
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import CodeType, FunctionType

from asgi_pprof.profile import Location, Sample, Stack
from tests.soak import generated

_PSEUDO = re.compile(
    r"<(stack could not be read|no Python code|lost: too many different names"
    r"|truncated: outer frames not recorded|unknown|native thread .*|worker thread"
    r"|garbage collection|waiting for the GIL|process not running"
    r"|.*threads?\b.*: stack not sampled by the native engine)>"
)
_TENANT = re.compile(r".*\bwork_tenant_(\d)")
_LOSSES = {
    "<stack could not be read>": "unreadable",
    "<lost: too many different names>": "lost",
}
_MAX_ERRORS = 40
_FROZEN = {
    "importlib._bootstrap": "_frozen_importlib",
    "importlib._bootstrap_external": "_frozen_importlib_external",
}

Codes = dict[tuple[str, int], set[int]]
"""Lines by qualified name and first line."""


class Checker:
    """
    Checks profiles, and counts samples and errors. Several threads may use it.

    Args:
        scripts: Sources of code that may run under any file name.
    """

    def __init__(self, scripts: Iterable[str] = ()) -> None:
        self.errors: list[str] = []
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._codes: dict[str, Codes] = {}
        self._good: set[Location] = set()
        self._good_stacks: set[Stack] = set()
        # Only here, while no other thread runs: gc.get_objects also returns a tuple that
        # another thread is still filling, and this reference would make the filling fail.
        self._without_file: dict[str, list[CodeType]] = defaultdict(list)
        for each in gc.get_objects():
            if type(each) is FunctionType and each.__code__.co_filename.startswith("<"):
                self._without_file[each.__code__.co_filename].append(each.__code__)
        self._scripts = [compile(script, "<script>", "exec") for script in scripts]

    def fail(self, message: str) -> None:
        """Add an error to the report."""
        with self._lock:
            self.counts["errors"] += 1
            if len(self.errors) < _MAX_ERRORS:
                self.errors.append(message)

    def count(self, **numbers: int) -> None:
        """Add to the numbers of the summary."""
        with self._lock:
            self.counts.update(numbers)

    def check(self, samples: Iterable[Sample], kind: str) -> None:
        """Check the samples of a profile of this kind: "cpu" or "heap"."""
        for sample in samples:
            if sample.stack not in self._good_stacks:
                self._check_stack(sample, kind)
            self._check_labels(sample, kind)
            if min(sample.values) < 0:
                self.fail(f"{kind}: negative {sample.values}")
            number = sample.values[0]
            outcome = _LOSSES.get(sample.stack[0].function.name, "read")
            self.count(**{f"{kind} samples": number, f"{kind} {outcome}": number})

    def check_stacks(self, samples: Iterable[Sample], kind: str) -> None:
        """Check only the stacks, for profiles whose labels are not those of a context."""
        for sample in samples:
            if sample.stack not in self._good_stacks:
                self._check_stack(sample, kind)

    def _check_stack(self, sample: Sample, kind: str) -> None:
        errors = self.counts["errors"]
        if not sample.stack:
            self.fail(f"{kind}: an empty stack")
        for location in sample.stack:
            if location not in self._good:
                if problem := self._fault(location):
                    self.fail(f"{kind}: {problem}: {location} in {_text(sample)}")
                else:
                    self._good.add(location)
                    self.count(places=1)
        self.count(names=len(sample.stack))
        if problem := generated.order_fault([each.function.name for each in sample.stack]):
            self.fail(f"{kind}: {problem}: {_text(sample)}")
        if self.counts["errors"] == errors:
            self._good_stacks.add(sample.stack)

    def _check_labels(self, sample: Sample, kind: str) -> None:
        labels = dict(sample.labels)
        names = [each.function.name for each in sample.stack]
        tenants = {match[1] for name in names if (match := _TENANT.match(name))}
        if len(tenants) > 1:
            self.fail(f"{kind}: two tenants in {_text(sample)}")
        for tenant in tenants:
            said = labels.get("tenant")
            if said is None and kind == "heap":
                # Its label set was created and died while a snapshot was being copied.
                self.count(**{"heap unlabelled": sample.values[0]})
            elif said != tenant:
                self.fail(f"{kind}: tenant {tenant} is labelled {labels}: {_text(sample)}")
            elif ("tenant_thread" in " ".join(names)) != (labels.get("by") == "thread"):
                self.fail(f"{kind}: labelled {labels}: {_text(sample)}")
            else:
                self.count(labels=1)
        if "tenant" in labels and any(name.endswith("work_of_nobody") for name in names):
            self.fail(f"{kind}: work of nobody is labelled {labels}: {_text(sample)}")

    def _fault(self, location: Location) -> str:
        name, filename, first_line = location.function
        if filename == "":
            return "" if _PSEUDO.fullmatch(name) else "no such pseudo-location"
        if generated.is_generated(filename):
            return generated.fault(name, filename, first_line, location.line)
        if filename.endswith(".pyx"):
            return ""  # compiled by Cython; the source is not installed
        if filename.startswith("<") and re.search(r"(^|\.)<(module|lambda)>|__create_fn__", name):
            return ""  # code that runs once, as in site's files, namedtuple and dataclass
        for (qualname, first), lines in self._codes_of(filename).items():
            if first == first_line and _is_named(name, qualname):
                return "" if location.line in lines else "no line of that function"
        return "no such function"

    def _codes_of(self, filename: str) -> Codes:
        with self._lock:
            if filename not in self._codes:
                codes = self._codes.setdefault(filename, {})
                for code in [*self._find(filename), *self._scripts]:
                    for each in _with_inner(code):
                        lines = codes.setdefault((each.co_qualname, each.co_firstlineno), set())
                        lines.update(line for _, _, line in each.co_lines() if line is not None)
                        lines.add(each.co_firstlineno)
            return self._codes[filename]

    def _find(self, filename: str) -> Iterator[CodeType]:
        if not filename.startswith("<"):
            if (path := Path(filename)).is_file():
                yield compile(path.read_bytes(), filename, "exec", dont_inherit=True)
            return
        if filename.startswith("<frozen "):
            name = filename[len("<frozen ") : -1]
            for each in (name, _FROZEN.get(name, name)):
                if _imp.is_frozen(each):
                    yield _imp.get_frozen_object(each)
        yield from self._without_file.get(filename, ())


def _with_inner(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _with_inner(constant)


def _is_named(name: str, qualname: str) -> bool:
    return name == qualname or (
        name.endswith("." + qualname) and name[: -len(qualname) - 1] in sys.modules
    )


def _text(sample: Sample) -> str:
    places = (f"{each.function.name}:{each.line}" for each in sample.stack[:12])
    return " < ".join(places) + f" {sample.labels}"
