"""
The query string, read by Go's rules: from raw bytes to checked values.

The first value of a repeated key wins, unknown keys are ignored, and a pair
that Go's parser refuses (a bad escape, a semicolon) is as if it were absent.

Source: net/url ParseQuery; strconv Atoi and ParseInt; net/http/pprof.
"""

from __future__ import annotations

import re
from urllib.parse import unquote_plus

from asgi_pprof.errors import BadParameter

DEFAULT_CPU_SECONDS = 30
DEFAULT_HZ = 100  # as Go: enough for 1 % shares in 30 s, far below what costs show
MAX_HZ = 1000

_INT64_MAX = 2**63 - 1
_MAX_SECONDS = _INT64_MAX // 1_000_000_000  # about 292 years: their nanoseconds still fit
_INTEGER = re.compile(r"[+-]?[0-9]+")
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")


class Params:
    """The parameters of one request, each read as its endpoint needs it."""

    def __init__(self, query_string: bytes) -> None:
        self._values: dict[str, str] = {}
        for pair in query_string.decode("latin-1").split("&"):
            if ";" in pair or _BAD_ESCAPE.search(pair):
                continue
            key, _, value = pair.partition("=")
            self._values.setdefault(unquote_plus(key), unquote_plus(value))

    @property
    def debug(self) -> int:
        """0 for protobuf, anything else for text; what is no number is 0."""
        return self._number("debug")

    @property
    def gc(self) -> bool:
        """Whether to collect garbage first: any number above 0."""
        return self._number("gc") > 0

    @property
    def cpu_seconds(self) -> int:
        """
        Return how long to profile the CPU, by the rules of `/profile`.

        What is missing, not positive or no 64-bit integer is 30, as in Go.
        Go overflows above 9,223,372,036 s; here that is the longest.
        """
        seconds = _parse_int64(self._values.get("seconds", ""))
        if seconds is None or seconds <= 0:
            return DEFAULT_CPU_SECONDS
        return min(seconds, _MAX_SECONDS)

    @property
    def hz(self) -> int:
        """
        Return how many samples to take in a second of CPU time; ours, not Go's.

        Raises:
            BadParameter: `hz` is there and no number from 1 to 1000.
        """
        text = self._values.get("hz", "")
        if text == "":
            return DEFAULT_HZ
        hz = _parse_int64(text)
        if hz is None or not 1 <= hz <= MAX_HZ:
            raise BadParameter(f'invalid value for "hz" - must be an integer from 1 to {MAX_HZ}')
        return hz

    @property
    def delta(self) -> bool:
        """Whether a difference of two snapshots is asked for: `seconds` is there and not empty."""
        return self._values.get("seconds", "") != ""

    @property
    def delta_seconds(self) -> int:
        """
        Return the time between the two snapshots of a delta.

        Raises:
            BadParameter: `seconds` is not a positive integer.
        """
        seconds = _parse_int64(self._values.get("seconds", ""))
        if seconds is None or seconds <= 0:
            raise BadParameter('invalid value for "seconds" - must be a positive integer')
        return min(seconds, _MAX_SECONDS)

    def _number(self, key: str) -> int:
        value = self._values.get(key, "")
        # A number of any length saturates in Go; only its sign matters here.
        if not _INTEGER.fullmatch(value):
            return 0
        return max(-_INT64_MAX, min(_INT64_MAX, _int(value)))


def _parse_int64(text: str) -> int | None:
    if not _INTEGER.fullmatch(text):
        return None
    number = _int(text)
    return number if -_INT64_MAX - 1 <= number <= _INT64_MAX else None


def _int(digits: str) -> int:
    # int() refuses numbers of more than 4,300 digits and is slow below that;
    # 20 significant digits are already beyond 64 bits.
    sign = -1 if digits.startswith("-") else 1
    return sign * int(digits.lstrip("+-").lstrip("0")[:20] or "0")
