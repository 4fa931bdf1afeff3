"""Measure, and print Markdown tables."""

from __future__ import annotations

import argparse
import sys

from asgi_pprof.params import DEFAULT_HZ
from tests.bench import (
    accuracy,
    allocations,
    contention,
    heap,
    inprocess,
    overhead,
    pause,
    stalls,
    tasks,
    thread_stacks,
)
from tests.bench.report import conditions, progress, say, spread, table


def idle(options: argparse.Namespace) -> None:
    """CPU per request with the middleware while no profile is taken"""
    requests = 2 * overhead.TURNS * overhead.TURN
    for title, without, with_it in (
        ("the middleware without the heap sampler / the bare application", "bare", "without_heap"),
        ("with the heap sampler / without it", "without_heap", "default"),
        ("the middleware as it is by default / the bare application", "bare", "default"),
    ):
        progress(title)
        pairs = overhead.compare(without, with_it, options.rounds or 20, options.loop)
        _say_ratios(title, f"{requests} requests of each a round", pairs)


def profiling(options: argparse.Namespace) -> None:
    """CPU per request while a 100 Hz CPU profile is taken"""
    pairs = overhead.compare_profiling(options.rounds or 6, options.seconds, options.loop)
    what = f"each of two profiles of {options.seconds} s, encoded and sent"
    _say_ratios("during a profile / at rest", what, pairs)


def labels(options: argparse.Namespace) -> None:
    """The middleware's own code per request, in process"""
    rows = [
        (name, f"{median:.0f}", f"{least:.0f}")
        for name, median, least in inprocess.measure_costs(options.rounds or 15)
    ]
    say(table(("ns beyond a call without it", "median", "least"), rows))


def allocating(options: argparse.Namespace) -> None:
    """The heap sampler on code that does nothing but allocate"""
    rows = []
    for kind in allocations.KINDS:
        slowdown = allocations.measure_slowdown(kind, options.rounds or 60)
        first, median, third = spread(slowdown.ratios)
        numbers = (f"{ratio:.3f}" for ratio in (median, first, third))
        rows.append((kind.__name__, f"{slowdown.off_us:.0f}", *numbers))
        progress(f"{kind.__name__}: {median:.3f}")
    headings = ("", "us without it", "ratio with it, median", "1st quartile", "3rd quartile")
    say(table(headings, rows))


def sample(options: argparse.Namespace) -> None:
    """The cost of one CPU sample"""
    rows = []
    for what, cost in (
        ("a FastAPI request", overhead.measure_sample(options.seconds, options.loop)),
        ("30 calls deep", inprocess.measure_sample(30, options.seconds)),
    ):
        numbers = (cost.engine, cost.samples, f"{cost.depth:.1f}", f"{cost.cost_us:.1f}")
        rows.append((what, *numbers))
    say(table(("", "engine", "samples", "frames a stack", "us a sample"), rows))


def accuracy_of_shares(options: argparse.Namespace) -> None:
    """CPU profile compared with the truth"""
    for title, endpoint, burner in (
        ("`async` endpoint", "loop", False),
        ("`def` endpoint", "thread", False),
        ("`async` endpoint, a thread burns CPU beside the loop", "loop", True),
    ):
        runs = []
        for number in range(options.runs):
            run = accuracy.measure(endpoint, options.samples, options.loop, burner, options.hz)
            runs.append(run)
            worst = 100 * accuracy.worst_error(run.clocked)
            progress(f"{title}, run {number + 1}: {run.samples} samples, worst {worst:.1f} points")
        _say_accuracy(title, runs)


def heap_truth(options: argparse.Namespace) -> None:
    """Heap profile compared with the truth"""
    rounds = options.rounds or 20
    rows = []
    for holder in heap.HOLDERS:
        seen = [heap.measure(holder) for _ in range(rounds)]
        held = seen[0].held
        live = [each.live / held.live for each in seen] if held.live else []
        allocated = [each.allocated / held.allocated for each in seen] if held.allocated else []
        rows.append((holder.__name__, f"{held.live / 2**20:.0f}", *_mean(live), *_mean(allocated)))
        progress(f"heap: {holder.__name__}")
    say(f"Means of {rounds} samplers, each started anew, at the default rate.", "")
    headings = "|MiB live|profile / truth|standard error|alloc_space / truth|standard error"
    say(table(headings.split("|"), rows))


def _mean(ratios: list[float]) -> tuple[str, str]:
    if not ratios:
        return "", ""
    mean, error = heap.mean_and_error(ratios)
    return f"{mean:.3f}", f"{error:.3f}"


def pauses(options: argparse.Namespace) -> None:
    """Pauses of the event loop while heap profiles of 2 GiB are served"""
    rows = []
    for each in pause.measure(options.rounds or 10, options.loop):
        last = len(each.gaps) - 1
        numbers = [
            f"{gaps[round(part * last)]:.1f}"
            for gaps in (each.gaps, each.without_wait)
            for part in (0.99, 0.999, 1)
        ]
        rows.append((each.what, each.requests, len(each.gaps), *numbers))
    headings = "ms|requests|ticks|99 %|99.9 %|most|without waits for a CPU: 99 %|99.9 %|most"
    say(table(headings.split("|"), rows))


def many_tasks(options: argparse.Namespace) -> None:
    """Tracking tasks, and reading 100,000 of them"""
    rows: list[tuple[object, ...]] = []
    for loop in ("asyncio", "uvloop"):
        cost = tasks.measure_creation(loop, options.rounds or 40)
        more_us = f"{cost.tracked_us - cost.plain_us:.2f}"
        rows.append((loop, f"{cost.plain_us:.2f}", f"{cost.tracked_us:.2f}", more_us))
    say(table(("us to create a task", "without", "with tracking", "more"), rows), "")
    rows = []
    for alike in (True, False):
        for each in tasks.measure_reading(options.loop, tasks.MANY, alike):
            numbers = (each.seconds, each.gap_ms, each.idle_gap_ms, each.memory_mb)
            what = f"{each.what}, {'all at one place' if alike else 'at 1,000 places'}"
            rows.append((what, *(f"{number:.1f}" for number in numbers)))
    headings = f"{tasks.MANY} tasks|seconds|longest gap, ms|the same without a request|MB more"
    say(table(headings.split("|"), rows))


def contention_cost(options: argparse.Namespace) -> None:
    """CPU per request while contention is recorded"""
    for title, path in contention.PATHS.items():
        for name, pairs in contention.compare(path, options.rounds or 20, options.loop).items():
            _say_ratios(f"{title}: {name} / the bare application", "requests in turns", pairs)


def stall_watch_cost(options: argparse.Namespace) -> None:
    """CPU of an idle service whose loop is monitored for stalls"""
    say(table(stalls.HEADINGS, stalls.rows(options.rounds or 6, seconds=20)))


def reading_stacks(options: argparse.Namespace) -> None:
    """Reading the stacks of threads once"""
    rows = [
        (each.what, f"{each.python_us:.1f}", f"{each.native_us:.1f}")
        for each in thread_stacks.measure(options.rounds or 40)
    ]
    say(table(("us to read", "by frame objects", "in C"), rows))


PARTS = {
    "idle": idle,
    "profiling": profiling,
    "labels": labels,
    "allocating": allocating,
    "sample": sample,
    "accuracy": accuracy_of_shares,
    "heap": heap_truth,
    "pause": pauses,
    "tasks": many_tasks,
    "contention": contention_cost,
    "stalls": stall_watch_cost,
    "stacks": reading_stacks,
}


def _say_ratios(title: str, what: str, pairs: list[overhead.Pair]) -> None:
    rows = []
    for name, values, form in (
        ("without, us a request", [pair.without_us for pair in pairs], ".1f"),
        ("with, us a request", [pair.with_us for pair in pairs], ".1f"),
        ("with / without, paired", [pair.ratio for pair in pairs], ".3f"),
    ):
        first, median, third = spread(values)
        numbers = (median, first, third, min(values), max(values))
        rows.append((name, *(format(number, form) for number in numbers)))
    say(f"### {title}", "", f"{len(pairs)} rounds, {what}.", "")
    say(table(("", "median", "1st quartile", "3rd quartile", "least", "most"), rows), "")


def _say_accuracy(title: str, runs: list[accuracy.Accuracy]) -> None:
    mean = accuracy.mean_of(runs)
    samples = ", ".join(str(run.samples) for run in runs)
    say(f"### {title}", "", f"Mean of {len(runs)} runs; samples in named functions: {samples}.")
    say(*(f"Comment: {comment}." for comment in mean.comments), "")
    rows: list[tuple[str, ...]] = []
    # If the profile has none of the functions, the errors of their shares mean nothing.
    seen = mean.samples > 0
    for clocked, counted in seen * list(zip(mean.clocked, mean.counted, strict=True)):
        shares = (clocked.truth, counted.truth, clocked.estimate)
        errors = (clocked.error, counted.error)
        perfect = accuracy.standard_error(clocked.truth, mean.samples)
        rows.append(
            (
                clocked.name,
                *(f"{100 * share:.1f}" for share in shares),
                *(f"{100 * error:+.1f}" for error in errors),
                f"{100 * perfect:.1f}",
            )
        )
    if seen:
        for name, chosen in (("worst of the means", [mean]), ("worst of each run, mean", runs)):
            worst = (
                100 * sum(accuracy.worst_error(getattr(run, truth)) for run in chosen) / len(chosen)
                for truth in ("clocked", "counted")
            )
            rows.append((f"**{name}**", "", "", "", *(f"**{error:.1f}**" for error in worst), ""))
    for share in mean.others:
        truth, estimate = f"{100 * share.truth:.1f}", f"{100 * share.estimate:.1f}"
        rows.append((f"({share.name})", truth, "", estimate, f"{100 * share.error:+.1f}", "", ""))
    headings = "share in %|clocked|calls x cost|profile|error, points|to calls x cost|perfect"
    say(table(headings.split("|"), rows), "")


def main() -> None:
    """Run the selected parts."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    add = parser.add_argument
    add("--part", choices=PARTS, action="append", help="what to measure; may be repeated (all)")
    add("--rounds", type=int, help="rounds of all parts but sample and accuracy")
    add("--seconds", type=int, default=15, help="length of a profile in profiling and sample (15)")
    add("--samples", type=int, default=3000, help="length of a profile in accuracy (3000)")
    add("--runs", type=int, default=3, help="profiles of each kind in accuracy (3)")
    add("--hz", type=int, default=DEFAULT_HZ, help="samples a second in accuracy (100)")
    add("--loop", choices=("asyncio", "uvloop"), default="uvloop", help="event loop (uvloop)")
    options = parser.parse_args()
    say(conditions(sys.argv[1:]), "")
    for name in options.part or PARTS:
        progress(f"part {name}")
        say(f"## {PARTS[name].__doc__}", "")
        PARTS[name](options)
        say("")


if __name__ == "__main__":
    main()
