"""Measure, and print Markdown tables."""

from __future__ import annotations

import argparse
import sys

from tests.bench import accuracy, inprocess, overhead
from tests.bench.report import conditions, progress, say, spread, table


def idle(options: argparse.Namespace) -> None:
    """CPU per request with the middleware while nobody takes a profile"""
    pairs = overhead.compare_idle(options.rounds or 20, options.loop)
    _say_ratios(f"{overhead.TURNS * overhead.TURN} requests of each a round", pairs)


def profiling(options: argparse.Namespace) -> None:
    """CPU per request while a 100 Hz CPU profile is taken"""
    pairs = overhead.compare_profiling(options.rounds or 12, options.seconds, options.loop)
    _say_ratios(f"each of one profile of {options.seconds} s, encoded and sent", pairs)


def labels(options: argparse.Namespace) -> None:
    """The middleware's own code per request, in process"""
    rows = [
        (name, f"{median:.0f}", f"{least:.0f}")
        for name, median, least in inprocess.measure_costs(options.rounds or 15)
    ]
    say(table(("ns beyond a call without it", "median", "least"), rows))


def sample(options: argparse.Namespace) -> None:
    """One sample of the signal engine"""
    cost = overhead.measure_sample(options.seconds, options.loop)
    row = ("signal engine", cost.samples, f"{cost.depth:.1f}", f"{cost.cost_us:.1f}")
    say(table(("", "samples", "frames a stack", "us a sample"), [row]))


def accuracy_of_shares(options: argparse.Namespace) -> None:
    """CPU profile against the truth"""
    for title, endpoint, burner in (
        ("`async` endpoint", "loop", False),
        ("`def` endpoint: all its CPU time belongs to the pseudo-frames", "thread", False),
        ("`async` endpoint, a thread burns CPU beside the loop", "loop", True),
    ):
        progress(f"accuracy: {title}")
        _say_accuracy(title, accuracy.measure(endpoint, options.samples, options.loop, burner))


PARTS = {
    "idle": idle,
    "profiling": profiling,
    "labels": labels,
    "sample": sample,
    "accuracy": accuracy_of_shares,
}


def _say_ratios(what: str, pairs: list[overhead.Pair]) -> None:
    rows = []
    for name, values, form in (
        ("bare, us a request", [pair.bare_us for pair in pairs], ".1f"),
        ("with, us a request", [pair.profiled_us for pair in pairs], ".1f"),
        ("with / bare, paired", [pair.ratio for pair in pairs], ".3f"),
    ):
        first, median, third = spread(values)
        numbers = (median, first, third, min(values), max(values))
        rows.append((name, *(format(number, form) for number in numbers)))
    say(f"{len(pairs)} rounds, {what}; the servers take turns of {overhead.TURN} requests.", "")
    say(table(("", "median", "1st quartile", "3rd quartile", "least", "most"), rows))


def _say_accuracy(title: str, measured: accuracy.Accuracy) -> None:
    say(f"### {title}", "", f"{measured.samples} samples in named functions.")
    say(*(f"Comment: {comment}." for comment in measured.comments), "")
    rows = []
    # Where the profile has none of the functions, their shares are no errors of some size.
    seen = measured.samples > 0
    for counted, clocked in seen * list(zip(measured.counted, measured.clocked, strict=True)):
        truths = (counted.truth, clocked.truth, counted.estimate)
        errors = (counted.error, clocked.error)
        perfect = accuracy.standard_error(counted.truth, measured.samples)
        rows.append(
            (
                counted.name,
                *(f"{100 * share:.1f}" for share in truths),
                *(f"{100 * error:+.1f}" for error in errors),
                f"{100 * perfect:.1f}",
            )
        )
    for share in (measured.outside, measured.threads) if seen else (measured.threads,):
        truth, estimate = f"{100 * share.truth:.1f}", f"{100 * share.estimate:.1f}"
        rows.append((f"({share.name})", "", truth, estimate, "", f"{100 * share.error:+.1f}", ""))
    worst = (
        f"**{100 * accuracy.worst_error(shares):.1f}**"
        for shares in (measured.counted, measured.clocked)
    )
    if seen:
        rows.append(("worst error", "", "", "", *worst, ""))
    headings = "share in %|calls x cost|clocked|profile|error, points|to clocked|perfect sampler's"
    say(table(headings.split("|"), rows), "")


def main() -> None:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    add = parser.add_argument
    add("--part", choices=PARTS, action="append", help="what to measure; may be repeated (all)")
    add("--rounds", type=int, help="of idle, profiling and labels (20, 12, 15)")
    add("--seconds", type=int, default=5, help="length of a profile in profiling and sample (5)")
    add("--samples", type=int, default=1200, help="length of a profile in accuracy (1200)")
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
