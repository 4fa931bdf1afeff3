"""
Whether one event loop turns, found out without having it do anything while it waits.

At each tick the watching thread looks at the frames of the loop's thread, which
tell since when it is in a turn, if it is in one (`loop_threads`). Only then is
the loop asked for a sign, by `call_soon_threadsafe`: the stretch is from the
beginning of the turn it was found in to that of the turn that gives the sign.

It is asked as well where it is not certain that it waits for events: its frames
are hidden (in a greenlet, by somebody's wrapper), it is of a kind that does not
tell, or the watching thread was kept itself; and every ten seconds or so, for it
may run again on another thread. Then the time between asking and answer is
certain, and no more is counted.

All but `answer` runs on the watching thread.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from contextvars import Context
from dataclasses import dataclass
from time import monotonic_ns as _clock_ns  # asyncio's and libuv's own
from typing import NamedTuple

from asgi_pprof.profile import Label, Location, pseudo_location
from asgi_pprof.runtime.frames import RawStack, ThreadStack, ThreadStacks, current_frames
from asgi_pprof.runtime.gc_pauses import gc_pauses, is_timing
from asgi_pprof.runtime.loop_threads import TURN_VARIABLES, turn_clock
from asgi_pprof.runtime.proc import LoopThread, Usage
from asgi_pprof.runtime.task_labels import fold_default_name, task_labels

NOT_RUNNING = pseudo_location("process not running")
COLLECTING = pseudo_location("garbage collection")
WAITING_FOR_GIL = pseudo_location("waiting for the GIL")

LAG_WINDOW_NS = 60_000_000_000
PUNCTUAL_NS = 5_000_000
_IDLE_NS = 1_000_000  # of the CPU between two looks; an idle uvicorn uses 0.5 ms in 225
_SHORTEST_TICK_NS = 5_000_000
_ASKED_ANYHOW_NS = 10_000_000_000
_MOST_RUNS_OF_A_STOPPED = 8  # SIGSTOP, SIGCONT and what was due; one at work has more
_COARSE_NS = 5_000_000  # libuv's clock may be the system's coarse one, of 250 Hz


@dataclass(slots=True)
class Pace:
    """The threshold and what follows from it, in nanoseconds; shared by all pulses."""

    threshold_ns: int

    def is_stall(self, delay_ns: int) -> bool:
        """Tell whether a stretch counts; none does at a threshold of 0, which is off."""
        return 0 < self.threshold_ns <= delay_ns

    @property
    def tick_ns(self) -> int:
        """How far apart looks are, so that one falls into each stall."""
        return max(min(self.threshold_ns, 100_000_000) * 3 // 4, _SHORTEST_TICK_NS)

    @property
    def idle_tick_ns(self) -> int:
        """The same while all loops have nothing to do; what then falls between is missed."""
        return max(min(self.threshold_ns, 100_000_000) * 9 // 4, _SHORTEST_TICK_NS)


class Waking(NamedTuple):
    """
    How the watching thread came to look.

    Args:
        now_ns: When it looks.
        due_ns: When it should have; the same if it is late by nothing worth mention.
        for_gil_ns: How long of that it waited for the GIL.
    """

    now_ns: int
    due_ns: int
    for_gil_ns: int

    @property
    def is_punctual(self) -> bool:
        """Whether nothing kept it from looking."""
        return self.now_ns == self.due_ns

    @property
    def starved_ns(self) -> int:
        """How long it was kept from looking by something else: it was not running."""
        return max(self.now_ns - self.due_ns - self.for_gil_ns, 0)


class Look(NamedTuple):
    """
    What a loop's thread was at: its stack, and the labels of its task.

    `turn_ns` is when the loop's turn began; 0 if that is not known.
    """

    stack: RawStack
    labels: tuple[Label, ...]
    turn_ns: int = 0


class Stall(NamedTuple):
    """A stretch in which the loop did not turn; without a look if it was over before one."""

    delay_ns: int
    look: Look | None
    cause: Location | None


@dataclass(slots=True)
class Sign:
    """A sign that was asked for, and what it says when it is given."""

    asked_ns: int
    look: Look
    looked_late: bool = False  # when the stretch had passed the threshold
    thread_id: int = 0
    ident: int = 0
    turn_ns: int = 0
    told_right: bool = True
    given_ns: int = 0

    @property
    def since_ns(self) -> int:
        """When the stretch began, by what is known so far."""
        return self.look.turn_ns or self.asked_ns

    def is_later(self, turn_ns: int, now_ns: int) -> bool:
        """
        Tell whether a turn is a later one than that of the look, and says so rightly.

        A turn seen after the asking that is another one began since. If it did
        not, a test has put a clock of its own into the loop.
        """
        since_ns = self.asked_ns - _COARSE_NS
        return 0 < self.look.turn_ns < turn_ns and since_ns <= turn_ns <= now_ns

    def stretch(self) -> tuple[int, int]:
        """
        Return when the loop was held, from and until, once the sign is given.

        What counts before the asking is what the loop's own clock says, if that
        can be believed; the time from asking to answer is certain.
        """
        if self.told_right and self.is_later(self.turn_ns, self.given_ns):
            return self.since_ns, self.turn_ns  # what came before us in our own turn is another's
        if self.told_right and self.look.turn_ns == self.turn_ns:
            return max(self.asked_ns, self.turn_ns), self.given_ns
        return self.asked_ns, self.given_ns


class LoopPulse:
    """
    One watched loop.

    Made on the loop's thread, while it runs.

    Args:
        loop: The loop; not kept alive.
        pace: The threshold.
        on_stall: Called with each stall, on the watching thread.
        wake: Called on the loop's thread at the end of a stretch over the threshold.
        open_thread: Gives what the system tells of a thread.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        pace: Pace,
        on_stall: Callable[[Stall], None],
        wake: Callable[[], None],
        open_thread: Callable[[int], LoopThread] = LoopThread,
    ) -> None:
        self.users = 0
        self.since_ns = _clock_ns()
        self.stalls = 0
        self.stall_ns = 0
        self.is_idle = False  # it did next to nothing since the look before
        self._loop = weakref.ref(loop)
        self._pace = pace
        self._on_stall = on_stall
        self._wake = wake
        self._open_thread = open_thread
        self._context = Context()  # not that of whoever attaches, with a request's labels
        self._ident = threading.get_ident()
        self._native_id = threading.get_native_id()
        self._thread: LoopThread | None = None
        self._turns = turn_clock(loop)
        self._answers: deque[tuple[int, int]] = deque(maxlen=LAG_WINDOW_NS // _SHORTEST_TICK_NS)
        self.begin()
        self._forget()

    def begin(self) -> None:
        """Count from now on: what a turn has lasted before is not counted."""
        self._counted_ns = _clock_ns()  # until when stalls have been counted

    def _forget(self) -> None:
        """Begin anew: nothing is known of the loop."""
        self._sign: Sign | None = None
        self._signed_ns = 0  # when it last gave one
        self._found: Look | None = None  # in a turn, and not asked yet
        self._waits = False  # for events, for certain
        self._rests = False  # and is not asked
        self._proven_usage = b""
        self._for_gil_ns = 0
        self._starved_ns = 0

    def loop(self) -> asyncio.AbstractEventLoop | None:
        """Return the loop, unless it is closed or gone."""
        loop = self._loop()
        return None if loop is None or loop.is_closed() else loop

    @property
    def due_ns(self) -> int | None:
        """When to look besides the ticks: as an unanswered stretch passes the threshold."""
        sign = self._sign
        if sign is None or sign.given_ns or sign.looked_late:
            return None
        return sign.since_ns + self._pace.threshold_ns

    def has_news(self) -> bool:
        """Tell whether a stretch over the threshold has ended and is not counted yet."""
        sign, found = self._sign, self._found
        if sign is None:  # the watching thread lets the GIL go between looking and asking
            return found is not None and self._pace.is_stall(_clock_ns() - found.turn_ns)
        if sign.given_ns:
            return self._is_long(sign, sign.given_ns)
        # One that is about to be given, as this loop turns again; others may hang for ever.
        return self._ident == threading.get_ident() and self._is_long(sign, _clock_ns())

    def _is_long(self, sign: Sign, now_ns: int) -> bool:
        return self._pace.is_stall(now_ns - sign.since_ns)

    def close(self) -> None:
        """Let go of what is open; it can be looked at again all the same."""
        if self._thread is not None:
            self._thread.close()
        self._thread = None
        self._forget()

    @property
    def ident(self) -> int:
        """The number of the thread that runs the loop, as far as is known."""
        return self._ident

    def look(self, waking: Waking, stacks: ThreadStacks) -> None:
        """
        See what the loop is at; pair with `judge`.

        Args:
            waking: How the watching thread came to look.
            stacks: What it saw: of a call in C that has kept the GIL until then, the
                loop's thread is still at that call, and goes on as soon as it can.
        """
        self._found, self._rests, self._waits = None, False, False
        loop, stack, sign = self.loop(), stacks.get(self._ident), self._sign
        if stack is None:
            self._signed_ns = 0  # its thread has ended
        elif loop is not None and loop.is_running():
            turn_ns = self._turns.turn_ns(loop, stack)
            if sign is None or sign.given_ns:
                self._found = _look(loop, stack, turn_ns) if turn_ns else None
                self._waits = not turn_ns and self._turns.is_waiting(stack)
                self._rests = self._waits and sign is None and self._turns.tells
            elif sign.is_later(turn_ns, waking.now_ns):
                self._found = _look(loop, stack, turn_ns)
            elif sign.look.turn_ns in (0, turn_ns) and not sign.looked_late:
                if self._is_long(sign, waking.now_ns):
                    sign.look = _look(loop, stack, sign.look.turn_ns)

    def is_at_rest(self, stacks: ThreadStacks) -> bool:
        """Tell whether a loop that rested still does, or again."""
        stack = stacks.get(self._ident)
        return stack is not None and self._turns.is_waiting(stack)

    def note_rest(self) -> None:
        """Take notice of that, and set `is_idle`; may let the GIL go."""
        before = self._proven_usage
        if self._thread is not None:
            self._note_proof(self._thread)
        cpu_ns = Usage.cpu_between(before, self._proven_usage)
        self.is_idle = cpu_ns is not None and cpu_ns < _IDLE_NS

    def judge(self, waking: Waking) -> bool:
        """
        Count what has ended, and ask the loop for a sign if it was found in a turn.

        Returns:
            False if the loop is closed or gone.
        """
        recently = waking.now_ns - self._signed_ns < _ASKED_ANYHOW_NS
        self.is_idle = False
        if self._rests and recently and waking.is_punctual:
            self.note_rest()
            return True
        loop = self.loop()
        if loop is None or not loop.is_running():
            self._forget()  # nobody expects it to turn: what is unanswered is no stall
            return loop is not None
        if self._thread is None:
            self._thread = self._open_thread(self._native_id)
        self._for_gil_ns += waking.for_gil_ns
        self._starved_ns += waking.starved_ns
        if self._sign is not None:
            if not self._sign.given_ns:
                self._still_wait_for(self._sign, waking.now_ns, self._thread)
                return True
            self._end_of(self._sign, self._thread)
            self._note_proof(self._thread)
            self._for_gil_ns, self._starved_ns = waking.for_gil_ns, waking.starved_ns
        else:
            self._count_unseen(waking, self._thread)
        if self._found is not None:
            self._ask(loop, waking, self._found)
            return True
        self._note_proof(self._thread)
        if not (self._waits and self._turns.tells and recently and waking.is_punctual):
            self._ask(loop, waking, Look((), ()))
        return True

    def _note_proof(self, thread: LoopThread) -> None:
        """Begin to measure at a moment at which the loop turned."""
        self._proven_usage = thread.usage()
        self._for_gil_ns = self._starved_ns = 0

    def _ask(self, loop: asyncio.AbstractEventLoop, waking: Waking, look: Look) -> None:
        now_ns = _clock_ns()
        if now_ns - waking.now_ns > PUNCTUAL_NS:
            # We had to wait for the GIL meanwhile, and it may be in another turn.
            look = Look((), ())
        sign = Sign(now_ns, look)
        sign.looked_late = self._is_long(sign, waking.now_ns)
        self._found = None
        try:
            loop.call_soon_threadsafe(self.answer, sign, context=self._context)
        except RuntimeError:
            return  # it was closed meanwhile
        self._sign = sign

    def _still_wait_for(self, sign: Sign, now_ns: int, thread: LoopThread) -> None:
        if self._found is not None:
            # The turn it was asked in is over; the sign will tell of this one.
            self._end(thread, sign.look, sign.since_ns, self._found.turn_ns)
            self._note_proof(thread)
            sign.look, sign.looked_late = self._found, False
        # Whether it could be looked at or not: only once.
        sign.looked_late |= self._is_long(sign, now_ns)

    def answer(self, sign: Sign) -> None:
        """Give the sign; runs on the loop."""
        loop = self._loop()
        if loop is None:
            return
        sign.thread_id, sign.ident = threading.get_native_id(), threading.get_ident()
        stack = current_frames((sign.ident,), locals_of=TURN_VARIABLES).get(sign.ident)
        sign.told_right = stack is not None and self._turns.learn(stack)
        sign.turn_ns = self._turns.turn_ns(loop, stack) if stack is not None else 0
        sign.given_ns = _clock_ns()
        if self._is_long(sign, sign.given_ns):
            self._wake()

    def _end_of(self, sign: Sign, thread: LoopThread) -> None:
        self._sign, self._signed_ns = None, sign.given_ns
        if sign.thread_id != self._native_id:
            # It runs in another thread than the one that was looked at.
            thread.close()
            self._native_id, self._ident = sign.thread_id, sign.ident
            self._thread = self._open_thread(sign.thread_id)
            return
        delay_ns = self._end(thread, sign.look, *sign.stretch())
        self._answers.append((sign.given_ns, max(delay_ns, sign.given_ns - sign.asked_ns)))

    def _end(self, thread: LoopThread, look: Look, began_ns: int, ended_ns: int) -> int:
        """Count a stretch if it is long enough, and return for how long it counts."""
        delay_ns = ended_ns - max(began_ns, self._counted_ns)
        if not self._pace.is_stall(delay_ns):
            return 0
        self._count(ended_ns, delay_ns, look, self._cause(thread, ended_ns, delay_ns))
        return delay_ns

    def _count_unseen(self, waking: Waking, thread: LoopThread) -> None:
        """
        Count a stretch in which the watching thread was kept from looking, if the loop was too.

        It was over when the loop got on, maybe before we did. That another thread
        kept the GIL from us says nothing of a loop that had nothing to do.
        """
        ended_ns = min(self._found.turn_ns, waking.now_ns) if self._found else waking.now_ns
        delay_ns = ended_ns - max(waking.due_ns, self._counted_ns)
        if not self._pace.is_stall(delay_ns):
            return
        cause = self._cause(thread, ended_ns, delay_ns)
        if cause in (NOT_RUNNING, WAITING_FOR_GIL):
            self._count(ended_ns, delay_ns, None, cause)
            self._answers.append((ended_ns, delay_ns))

    def _count(
        self, ended_ns: int, delay_ns: int, look: Look | None, cause: Location | None
    ) -> None:
        self._counted_ns = ended_ns
        self.stalls += 1
        self.stall_ns += delay_ns
        self._on_stall(Stall(delay_ns, look, cause))

    def _cause(self, thread: LoopThread, ended_ns: int, delay_ns: int) -> Location | None:
        """Return what kept the loop for most of a stretch, if it was not its own code and known."""
        half_ns = delay_ns // 2
        if _collecting_ns(ended_ns - delay_ns, ended_ns) >= half_ns:
            return COLLECTING
        used = Usage.since(self._proven_usage, thread.usage())
        if used is None:
            return None
        if self._starved_ns >= half_ns and used.runs <= _MOST_RUNS_OF_A_STOPPED:
            return NOT_RUNNING
        # Who waits for the GIL wakes once in a switch interval to ask for it. A
        # thread that is at work does so too where others take the CPU from it,
        # and one that reads a little at a time; but then we need not wait long.
        asking_ns = used.runs * int(sys.getswitchinterval() * 1e9)
        waits = asking_ns >= half_ns and used.cpu_ns + used.waited_ns < half_ns
        return WAITING_FOR_GIL if waits and self._for_gil_ns >= delay_ns // 4 else None

    def lateness(self, now_ns: int) -> list[tuple[int, int]]:
        """Return (when, how late) of the last minute's signs, one not yet given last."""
        answers = [each for each in list(self._answers) if now_ns - each[0] < LAG_WINDOW_NS]
        sign = self._sign
        if sign is not None and not sign.given_ns:
            answers.append((now_ns, now_ns - sign.asked_ns))
        return answers


def _collecting_ns(began_ns: int, ended_ns: int) -> int:
    """Return for how long garbage was collected between two moments, on any thread."""
    to_clock_ns = _clock_ns() - time.time_ns()
    return sum(
        pause_ns
        for pause_ns, end_ns in gc_pauses.pauses()
        if began_ns < end_ns + to_clock_ns <= ended_ns
    )


def _look(loop: asyncio.AbstractEventLoop, stack: ThreadStack, turn_ns: int) -> Look:
    places = stack.places()
    if is_timing(places[0][0]):
        places = places[1:]  # it takes the GIL's turn where a call in C collects
    return Look(places, _labels(loop), turn_ns)


def _labels(loop: asyncio.AbstractEventLoop) -> tuple[Label, ...]:
    try:
        task = asyncio.current_task(loop)
        if task is None:
            return ()
        labels = task_labels(task)
        fold_default_name(labels)
        return tuple(sorted(labels.items()))
    except Exception:
        return ()  # an application's own labels or task could do anything; the stack is kept
