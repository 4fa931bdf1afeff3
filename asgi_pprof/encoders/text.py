"""
Encode profiles as text: debug=1, which pprof can parse, and debug=2, the dump.

A record line has return addresses, which are the locations' addresses plus one;
frame lines have the addresses themselves. Go does the same. The `+0x` offset
after a function is the distance in lines from the function's first line.

Source: runtime/pprof/pprof.go; text/tabwriter; runtime/traceback.go.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from asgi_pprof.offload import yield_gil
from asgi_pprof.profile import Goroutine, Location, Profile, Sample, Stack

_TAB_WIDTH = 8
_DUMP_HEAD = _DUMP_TAIL = 50  # runtime/traceback.go: inner and outer frames shown
_RUN = 1000  # samples that are sorted at once
_BARE_WORD = re.compile(r"[A-Za-z0-9./_]+")
_ESCAPES = {"\n": r"\n", "\r": r"\r", "\t": r"\t", "\\": r"\\", '"': r"\""}
_MORE_ESCAPES = {"\a": r"\a", "\b": r"\b", "\f": r"\f", "\v": r"\v"}


def count_text(name: str, profile: Profile) -> Iterator[str]:
    """
    Yield a profile of counts (goroutine, thread, threadcreate, custom) as debug=1 text.

    Counts of a delta are negative where there are fewer than before; those come last.

    Args:
        name: The profile's name; the parser allows no white space in it.
        profile: It has a single sample type.
    """
    yield f"{name} profile: total {sum(sample.values[0] for sample in profile.samples)}\n"
    yield _delta_line(profile)
    yield from count_records(profile.samples)
    yield comment_lines(profile)


def count_records(samples: Sequence[Sample]) -> Iterator[str]:
    """Yield a record for each sample, with its first value, the largest first."""
    for index in _order(samples, _by_count_then_text):
        sample = samples[index]
        yield _record_text(str(sample.values[0]), sample)


def heap_text(profile: Profile, estimates: Profile, trailer: str) -> Iterator[str]:
    """
    Yield a heap profile as debug=1 text, the largest records first.

    The largest by what they stand for: a sample of small blocks stands for many more.
    Where that is more than was sampled, a line says so.

    Args:
        profile: It has alloc_objects, alloc_space, inuse_objects and inuse_space. The
            records are in the order of the default sample type, if any, else of inuse_space.
        estimates: The same samples, scaled; the same profile if every block was sampled.
        trailer: The MemStats lines that follow the records.
    """
    alloc_objects, alloc_bytes, inuse_objects, inuse_bytes = _totals(profile.samples)
    if alloc_bytes == inuse_bytes:
        # pprof would read two equal pairs as the old format, which has no allocations.
        alloc_bytes += 1
    values = alloc_objects, alloc_bytes, inuse_objects, inuse_bytes
    # The parser divides the rate by 2.
    yield f"heap profile: {_heap_values(values)} @ heap/{2 * profile.period}\n"
    yield _delta_line(profile)
    is_sampled = estimates is not profile
    if is_sampled:
        yield _estimate_line(_totals(estimates.samples))
    kinds = [kind.type for kind in profile.sample_types]
    column = kinds.index(profile.default_sample_type or "inuse_space")
    for index in _order(estimates.samples, lambda sample: -sample.values[column]):
        sample = profile.samples[index]
        estimate = _estimate_line(estimates.samples[index].values) if is_sampled else ""
        yield _record_text(_heap_values(sample.values), Sample(sample.stack, ()), estimate)
    yield f"\n{trailer}{comment_lines(profile)}"


def _totals(samples: Sequence[Sample]) -> Sequence[int]:
    totals = [0, 0, 0, 0]
    for sample in samples:
        yield_gil()
        totals = [total + value for total, value in zip(totals, sample.values, strict=True)]
    return totals


def _heap_values(values: Sequence[int]) -> str:
    alloc_objects, alloc_bytes, inuse_objects, inuse_bytes = values
    return f"{inuse_objects}: {inuse_bytes} [{alloc_objects}: {alloc_bytes}]"


def _estimate_line(values: Sequence[int]) -> str:
    return f"# estimate: {_heap_values(values)}\n"


def contention_text(name: str, profile: Profile) -> Iterator[str]:
    """
    Yield a profile of waits or stalls as debug=1 text.

    A cycle is a nanosecond here, so `cycles/second` is 10^9.

    Args:
        name: "block", "mutex" or "stall"; stall has the same text as block.
        profile: It has a count and a delay in nanoseconds.
    """
    yield "--- mutex:\n" if name == "mutex" else "--- contention:\n"
    yield "cycles/second=1000000000\n"
    if name == "mutex":
        yield "sampling period=1\n"
    yield _delta_line(profile)
    for index in _order(profile.samples, lambda sample: -sample.values[1]):
        sample = profile.samples[index]
        yield _record_text(f"{sample.values[1]} {sample.values[0]}", sample)
    yield comment_lines(profile)


def goroutine_dump(goroutines: Iterable[Goroutine]) -> str:
    """Return goroutine?debug=2: each task with its state and stack, in the given order."""
    return "\n".join(map(goroutine_text, goroutines))


def align(text: str) -> str:
    """
    Return the text with its tab-separated cells aligned, as Go's tabwriter does.

    A column consists of consecutive lines that have a cell in it and another cell
    after that. It is as wide as its longest cell plus one, rounded up to whole
    tabs. The last cell of a line is never padded.

    Source: text/tabwriter with minwidth 1, tabwidth 8, padding 1, TabIndent.
    """
    lines = [line.split("\t") for line in text.split("\n")]
    _pad_columns(lines, 0, len(lines), 0)
    return "\n".join("".join(cells) for cells in lines)


def _pad_columns(lines: list[list[str]], start: int, end: int, column: int) -> None:
    row = start
    while row < end:
        if len(lines[row]) <= column + 1:
            row += 1
            continue
        stop = row
        while stop < end and len(lines[stop]) > column + 1:
            stop += 1
        _pad_columns(lines, row, stop, column + 1)
        longest = max(len(cells[column]) for cells in lines[row:stop])
        tabs = -(-(longest + 1) // _TAB_WIDTH)
        for cells in lines[row:stop]:
            cell = cells[column]
            cells[column] = cell + "\t" * (tabs - len(cell) // _TAB_WIDTH)
        row = stop


def _order(samples: Sequence[Sample], key: Callable[[Sample], Any]) -> Iterator[int]:
    """Yield the sorted samples' indices; the sort of a long list would keep the GIL too long."""
    runs = []
    for start in range(0, len(samples), _RUN):
        yield_gil()
        indices = range(start, min(start + _RUN, len(samples)))
        runs.append(sorted((key(samples[index]), index) for index in indices))
    return (index for _, index in heapq.merge(*runs))


def _by_count_then_text(sample: Sample) -> tuple[int, str, str]:
    return -sample.values[0], _addresses(sample.stack), str(sample.labels)


def _addresses(stack: Stack) -> str:
    return " ".join(f"{location.address + 1:#x}" for location in stack)


def _delta_line(profile: Profile) -> str:
    if not profile.duration_ns:
        return ""
    return f"# difference of two snapshots, {profile.duration_ns / 1e9:.3f}s apart\n"


def comment_lines(profile: Profile) -> str:
    """Return the profile's comments; Go has none, and parsers skip lines that begin with #."""
    return "".join(f"# {one_line(comment)}\n" for comment in profile.comments)


def _record_text(head: str, sample: Sample, note: str = "") -> str:
    yield_gil()
    lines = [f"{head} @ {_addresses(sample.stack)}\n{note}"]
    if sample.labels:
        pairs = ", ".join(f"{_quote(key)}:{_quote(str(value))}" for key, value in sample.labels)
        lines.append(f"# labels: {{{pairs}}}\n")
    lines += (_frame_text(location) for location in sample.stack)
    # Each record is aligned by itself: columns end with the record, and a list of the
    # lines of all records would cause full garbage collections.
    return align("".join(lines) + "\n")


def _frame_text(location: Location) -> str:
    name, filename, _ = location.function
    return (
        f"#\t{location.address:#x}\t{one_line(name)}+{_offset(location):#x}"
        f"\t{one_line(filename)}:{location.line}\n"
    )


def goroutine_text(goroutine: Goroutine) -> str:
    """Return one task of the dump; tasks are separated by an empty line."""
    labels = ", ".join(f"{_word(key)}: {_word(str(value))}" for key, value in goroutine.labels)
    status = goroutine.state + (" (leaked)" if goroutine.leaked else "")
    if goroutine.minutes:
        status += f", {goroutine.minutes} minutes"
    head = f"goroutine {goroutine.id} [{status}]" + (f" {{{labels}}}" if labels else "")
    return f"{head}:\n{''.join(_dump_frames(goroutine.stack))}{_created_by(goroutine)}"


def _created_by(goroutine: Goroutine) -> str:
    if goroutine.created_by is None:
        return ""
    creator = f" in goroutine {goroutine.creator}" if goroutine.creator else ""
    name = one_line(goroutine.created_by.function.name)
    return f"created by {name}{creator}\n\t{_place(goroutine.created_by)}\n"


def _dump_frames(stack: Stack) -> Sequence[str]:
    elided = len(stack) - _DUMP_HEAD - _DUMP_TAIL
    if elided <= 0:
        return [_dump_frame(location) for location in stack]
    return [
        *(_dump_frame(location) for location in stack[:_DUMP_HEAD]),
        f"...{elided} frames elided...\n",
        *(_dump_frame(location) for location in stack[-_DUMP_TAIL:]),
    ]


def _dump_frame(location: Location) -> str:
    return f"{one_line(location.function.name)}(...)\n\t{_place(location)}\n"


def _place(location: Location) -> str:
    return f"{one_line(location.function.filename)}:{location.line} +{_offset(location):#x}"


def _offset(location: Location) -> int:
    return max(0, location.line - location.function.start_line)


def one_line(text: str) -> str:
    """Return the text without tabs and line breaks, which would look like more cells or lines."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _escape(char) for char in text)


def _word(text: str) -> str:
    # Dumps escape everything except printable ASCII.
    if _BARE_WORD.fullmatch(text):
        return text
    chars = (
        char if char.isascii() and char.isprintable() and char not in '"\\' else _escape(char)
        for char in text
    )
    return f'"{"".join(chars)}"'


def _quote(text: str) -> str:
    """Return the text as Go's %q prints it."""
    chars = (
        _MORE_ESCAPES.get(char)
        or (char if char.isprintable() and char not in '"\\' else _escape(char))
        for char in text
    )
    return f'"{"".join(chars)}"'


def _escape(char: str) -> str:
    code = ord(char)
    if char in _ESCAPES:
        return _ESCAPES[char]
    if code < 0x80:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
