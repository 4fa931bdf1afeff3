"""The application may set SIGPROF, or start another program, while a profile is taken."""

from __future__ import annotations

import pytest

from asgi_pprof.native.core import native
from tests.programs import run_program

COMMON = """
import asyncio, os, signal, sys, threading, time
from asgi_pprof.collectors.cpu.collector import CpuCollector

def burn(seconds):
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        sum(range(1000))

async def profiled(work, seconds=1):
    profile = asyncio.create_task(CpuCollector().collect(seconds, asyncio.Event(), 1000))
    await asyncio.sleep(0.1)
    threading.Thread(target=burn, args=(0.3,)).start()
    burn(0.05)
    work()
    burn(0.1)
    return (await profile)()
"""

ENGINES = [pytest.param("1", id="native"), pytest.param("0", id="signal")]


def run(program, engine, **more):
    if engine == "1" and not native:
        pytest.skip("needs the C core")
    return run_program(COMMON + program, ASGI_PPROF_NATIVE=engine, **more)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("handler", ["signal.SIG_DFL", "signal.SIG_IGN", "lambda *_: None"])
def test_the_application_may_set_sigprof(engine, handler):
    """The profile ends there. No later signal of ours meets the default action, which kills."""
    program = f"""
for _ in range(5):
    profile = asyncio.run(profiled(lambda: signal.signal(signal.SIGPROF, {handler}), 0.4))
    assert any("stopped early" in each for each in profile.comments), profile.comments
    assert sum(each.values[1] for each in profile.samples) > 0
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
profile = asyncio.run(profiled(lambda: signal.signal(signal.SIGUSR1, signal.SIG_IGN), 0.4))
assert not any("stopped early" in each for each in profile.comments), profile.comments
print("alive")
"""
    assert run(program, engine) == "alive\n"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("call", ["execv(sys.executable, program)", "execlp(*program)"])
def test_a_program_started_by_exec_gets_no_signal(engine, call):
    """A timer of setitimer would go on in it, and SIGPROF has its default action there."""
    program = f"""
burns = "import time; end = time.process_time() + 0.3\\nwhile time.process_time() < end: pass"
program = [sys.executable, "-c", burns + "\\nprint('alive')"]
if "lp" in "{call}":
    program = [sys.executable, *program]
asyncio.run(profiled(lambda: os.{call}))
"""
    assert run(program, engine) == "alive\n"


@pytest.mark.parametrize("engine", ENGINES)
def test_an_exec_that_fails_does_no_harm(engine):
    """The profile has ended early, and the handler and the timer are restored."""
    program = """
def fails():
    try:
        os.execv("/nowhere", ["nowhere"])
    except FileNotFoundError:
        pass

profile = asyncio.run(profiled(fails, 0.4))
assert any("stopped early" in each for each in profile.comments), profile.comments
print(signal.getsignal(signal.SIGPROF) is signal.SIG_DFL, signal.getitimer(signal.ITIMER_PROF))
"""
    assert run(program, engine) == "True (0.0, 0.0)\n"
