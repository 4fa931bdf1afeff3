"""How late an event loop's callbacks were in the last minute."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from time import monotonic_ns as _clock_ns

_WINDOW_NS = 60_000_000_000
_MOST_DELAYS = 12_000  # of scans that are 5 ms apart, each of which gives one


@dataclass(frozen=True, slots=True)
class LagFigures:
    """
    How late one loop's callbacks were, and its stalls since it is watched, without our own.

    The lateness is that of the last minute: how long a callback would have waited
    at any moment of it, 0 while the loop waited for events.
    """

    p50_ns: int
    p90_ns: int
    p99_ns: int
    max_ns: int
    stalls: int
    stall_ns: int


class Lateness:
    """The delays of one loop in the last minute. One thread adds, any thread may read."""

    def __init__(self) -> None:
        self._since_ns = _clock_ns()
        self._delays: deque[tuple[int, int]] = deque(maxlen=_MOST_DELAYS)

    def add(self, ended_ns: int, delay_ns: int) -> None:
        """Add a delay that has ended."""
        self._delays.append((ended_ns, delay_ns))

    def quantiles(self, now_ns: int, pending_ns: int, step_ns: int) -> tuple[int, int, int, int]:
        """
        Return the median, the 90th and 99th percentile and the maximum of the lateness.

        Args:
            now_ns: The end of the minute.
            pending_ns: A delay that has not ended; 0 if there is none.
            step_ns: How far apart the moments are at which the lateness is taken.
        """
        most = _WINDOW_NS // step_ns
        ended = [delay for end_ns, delay in list(self._delays) if now_ns - end_ns < _WINDOW_NS]
        # At each moment of a delay a callback is late by what is left of it.
        late = sorted(
            (left for delay in (*ended, pending_ns) for left in range(delay, 0, -step_ns)[:most]),
            reverse=True,
        )[:most]
        moments = max(min((now_ns - self._since_ns) // step_ns, most), len(late), 1)
        p50, p90, p99, longest = (
            late[rank] if (rank := int(moments * share)) < len(late) else 0
            for share in (0.5, 0.1, 0.01, 0)
        )
        return p50, p90, p99, longest
