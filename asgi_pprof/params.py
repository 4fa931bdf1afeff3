"""
Parses query strings by Go's rules.

The first value of a repeated key wins. Unknown keys are ignored, as are pairs that
Go's parser refuses (a bad escape, a semicolon).

Source: net/url ParseQuery; strconv Atoi and ParseInt; net/http/pprof.
"""

from __future__ import annotations

import re
from urllib.parse import unquote_plus

from asgi_pprof.errors import BadParameter

DEFAULT_HZ = 100  # as Go: shares of 1 % show in 30 s, at a cost too low to be noticed

_DEFAULT_CPU_SECONDS = 30
_MAX_HZ = 1000

_INT64_MAX = 2**63 - 1
_MAX_SECONDS = _INT64_MAX // 1_000_000_000  # about 292 years in nanoseconds
_INTEGER = re.compile(r"[+-]?[0-9]+")
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")


class Params:
    """The parameters of one request."""

    def __init__(self, query_string: bytes) -> None:
        self._values: dict[str, str] = {}
        for pair in query_string.decode("latin-1").split("&"):
            if ";" in pair or _BAD_ESCAPE.search(pair):
                continue
            key, _, value = pair.partition("=")
            self._values.setdefault(unquote_plus(key), unquote_plus(value))

    @property
    def debug(self) -> int:
        """Return 0 for protobuf, any other number for text; 0 if it is not a number."""
        return self._number("debug")

    @property
    def gc(self) -> bool:
        """Return whether to collect garbage first: `gc` is a number above 0."""
        return self._number("gc") > 0

    @property
    def cpu_seconds(self) -> int:
        """
        Return the duration of a CPU profile.

        It is 30 if `seconds` is missing, not positive or not a 64-bit integer, as in
        Go. Go overflows above 9,223,372,036 s; here that is the maximum.
        """
        return self._positive_seconds() or _DEFAULT_CPU_SECONDS

    @property
    def hz(self) -> int:
        """
        Return the number of samples per second of CPU time; Go has no such parameter.

        Raises:
            BadParameter: `hz` is not empty and not a number from 1 to 1000.
        """
        text = self._values.get("hz", "")
        if text == "":
            return DEFAULT_HZ
        hz = _parse_int64(text)
        if hz is None or not 1 <= hz <= _MAX_HZ:
            raise BadParameter(f'invalid value for "hz" - must be an integer from 1 to {_MAX_HZ}')
        return hz

    @property
    def delta(self) -> bool:
        """Return whether the difference of two snapshots is requested: `seconds` is not empty."""
        return self._values.get("seconds", "") != ""

    @property
    def delta_seconds(self) -> int:
        """
        Return the time between the two snapshots of a delta.

        Raises:
            BadParameter: `seconds` is not a positive integer.
        """
        seconds = self._positive_seconds()
        if seconds is None:
            raise BadParameter('invalid value for "seconds" - must be a positive integer')
        return seconds

    def _positive_seconds(self) -> int | None:
        seconds = _parse_int64(self._values.get("seconds", ""))
        return min(seconds, _MAX_SECONDS) if seconds is not None and seconds > 0 else None

    def _number(self, key: str) -> int:
        value = self._values.get(key, "")
        if not _INTEGER.fullmatch(value):
            return 0
        return max(-_INT64_MAX, min(_INT64_MAX, _int(value)))  # saturates, as in Go


def _parse_int64(text: str) -> int | None:
    if not _INTEGER.fullmatch(text):
        return None
    number = _int(text)
    return number if -_INT64_MAX - 1 <= number <= _INT64_MAX else None


def _int(digits: str) -> int:
    # int() refuses numbers of more than 4,300 digits, and is slow with fewer.
    # Numbers of 20 significant digits are beyond 64 bits already.
    sign = -1 if digits.startswith("-") else 1
    return sign * int(digits.lstrip("+-").lstrip("0")[:20] or "0")
