"""The loader of the C core returns the module, or says why it is missing."""

from __future__ import annotations

import os

import pytest

from asgi_pprof.native.core import LabelNode, native, reason
from tests.programs import run_program

needs_native = pytest.mark.skipif(not native, reason="needs the C core")

REPORT = """
from asgi_pprof import labels, PprofApp
from asgi_pprof.native.core import LabelNode, native, reason
from asgi_pprof.collectors.cpu import native_engine as cpu_native
from asgi_pprof.recorders import heap_sampler
from asgi_pprof.labels import current
with labels(tenant="acme"):
    pass
PprofApp().close()
assert native is None
assert LabelNode is object
print(reason)
print(cpu_native.why_not())
print(heap_sampler.why_off())
"""


def test_there_is_a_module_or_a_reason():
    """Without a module the reason is not empty; with one it is."""
    assert (native is None) == bool(reason)
    assert (LabelNode is object) == (native is None)
    assert (os.environ.get("ASGI_PPROF_NATIVE") == "0") <= (native is None)


def test_the_environment_switches_the_c_core_off():
    """With ASGI_PPROF_NATIVE=0 it is not loaded; both engines give the reason, the rest works."""
    said = run_program(REPORT, ASGI_PPROF_NATIVE="0").splitlines()
    assert said == ["switched off by ASGI_PPROF_NATIVE=0"] * 3


@needs_native
@pytest.mark.parametrize("value", ["1", "", "yes"])
def test_any_other_value_of_the_variable_is_ignored(value):
    """Only 0 switches the C core off."""
    program = "from asgi_pprof.native.core import native; assert native"
    run_program(program, ASGI_PPROF_NATIVE=value)


def test_a_module_that_does_not_import_is_none():
    """The reason is the import system's message, as for a module built for another libc."""
    program = """
import sys

class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "asgi_pprof._native":
            raise ImportError("undefined symbol: of_another_libc")

sys.meta_path.insert(0, Broken())
"""
    said = run_program(program + REPORT, ASGI_PPROF_NATIVE="1").splitlines()
    assert said == ["undefined symbol: of_another_libc"] * 3


def test_the_sources_folder_is_not_taken_for_the_module():
    """In a checkout that is not built, the name finds the folder and imports an empty package."""
    program = """
import importlib.machinery, sys

class Unbuilt:
    def find_spec(self, name, path=None, target=None):
        if name == "asgi_pprof._native":
            return importlib.machinery.ModuleSpec(name, None, is_package=True)

sys.meta_path.insert(0, Unbuilt())
"""
    said = run_program(program + REPORT, ASGI_PPROF_NATIVE="1").splitlines()
    assert said == ["not built for this Python"] * 3


@needs_native
def test_importing_it_changes_nothing():
    """It leaves threads, handlers and hooks as they are."""
    program = """
    import ctypes, gc, types
    from tests.state import clock_timers
    import signal, sys, os

    def state():
        destructor = ctypes.c_void_p.from_address(id(types.CodeType) + 48).value
        return signal.getsignal(27), os.listdir("/proc/self/task"), destructor, clock_timers()

    for name in [name for name in sys.modules if name.startswith("asgi_pprof")]:
        del sys.modules[name]
    before = state()
    import asgi_pprof.app
    from asgi_pprof.native.core import native
    assert state() == before
    assert native.heap_stats()["rate"] == 0
    assert native.heap_stats()["mallocs"] == 0
    """
    run_program(program)


@needs_native
@pytest.mark.parametrize("hz", [0, -1, 100_001, 2**70])
def test_invalid_frequencies_are_refused(hz):
    """The call raises, and nothing starts."""
    with pytest.raises((ValueError, OverflowError)):
        native.cpu_start(hz)
    native.cpu_stop()
    assert native.cpu_read(0, 10)[0] == []


@needs_native
@pytest.mark.parametrize("rate", [0, -1, 2**64])
def test_invalid_rates_are_refused(rate):
    """The call raises, and nothing starts."""
    with pytest.raises((ValueError, OverflowError)):
        native.heap_start(rate)
    assert native.heap_stats()["rate"] == 0


@needs_native
def test_stopping_a_sampler_that_does_not_run_does_nothing():
    """Every function may be called at any time."""
    native.cpu_stop()
    native.cpu_free()
    native.heap_stop()
    assert native.heap_check() is False
    assert native.heap_read() == b""
    assert native.heap_pending() == []
    assert native.cpu_read(0, 10)[0] == []
    assert native.cpu_read(12345, 10)[0] == []
    assert native.marked_labels() == []
    assert native.heap_stack(12345) == (native.PLACE_LOST,)


@needs_native
def test_a_second_start_is_refused():
    """The first sampling continues."""
    native.cpu_start(100)
    try:
        with pytest.raises(RuntimeError, match="cpu profiling already in use"):
            native.cpu_start(100)
    finally:
        native.cpu_stop()
        native.cpu_free()
    native.heap_start(1000)
    try:
        with pytest.raises(RuntimeError, match="heap profiling already in use"):
            native.heap_start(5)
        assert native.heap_stats()["rate"] == 1000
    finally:
        native.heap_stop()


@needs_native
def test_only_the_main_interpreter_can_import_it():
    """In other interpreters the import fails with a reason; the main one is not affected."""
    program = """
    import sys
    try:
        import _interpreters as interpreters
    except ImportError:
        import _xxsubinterpreters as interpreters
    import asgi_pprof.native.core

    assert asgi_pprof.native.core.native
    run = getattr(interpreters, "exec", None) or interpreters.run_string
    # Isolated interpreters already refuse _tracemalloc.
    if sys.version_info >= (3, 13):
        other = interpreters.create("legacy")
    else:
        other = interpreters.create(**({"isolated": False} if sys.version_info >= (3, 12) else {}))
    failed = run(other, '''if True:
        from asgi_pprof.native.core import native, reason
        assert native is None
        assert "interpreter" in reason, reason
    ''')
    assert not failed, failed
    interpreters.destroy(other)
    """
    run_program(program, options=("-X", "dev"))


@needs_native
@pytest.mark.parametrize("ends", ["heap_stop", "heap_stop_and_start", "cpu_free", "drop_labels"])
def test_samples_may_be_read_while_finalizers_stop_the_sampling(ends):
    """On 3.11 making any object may collect garbage. The samples being read must stay valid."""
    run_program(
        """
        import gc, struct, sys, time
        from asgi_pprof.labels import labels
        from asgi_pprof.native.core import native

        def deep(depth):
            return deep(depth - 1) if depth else [bytes(100) for _ in range(5)]

        class Garbage:
            def __init__(self):
                self.me = self

            def __del__(self):
                global left
                left -= 1
                if left > 0:
                    Garbage()
                if ends.startswith("heap_stop"):
                    native.heap_stop()
                    if ends.endswith("start"):
                        native.heap_start(1)
                elif ends == "cpu_free":
                    native.cpu_free()
                elif held:
                    held.pop()
                time.sleep(0)

        def sample():
            native.heap_stop()
            native.heap_start(1)
            native.cpu_start(1000)
            end = time.process_time() + 0.05
            while time.process_time() < end:
                with labels(number=len(held)):
                    held.append(deep(len(held) % 60))
            native.cpu_stop()
            rows = struct.iter_unpack("=7Q", native.heap_read())
            return max((row[0] for row in rows), key=lambda stack: len(native.heap_stack(stack)))

        def read(function, *arguments):
            # No object is created between the threshold and the call.
            global left
            left = 5
            gc.collect()
            Garbage()
            gc.set_threshold(1, 1, 1)
            gc.enable()
            function(*arguments)
            gc.disable()
            gc.set_threshold(700, 10, 10)
            left = 0
            gc.collect()

        ends, held, left = sys.argv[1], [], 0
        gc.freeze()  # otherwise collecting the imported modules takes most of the time
        gc.disable()
        for number in range(5):
            stack = sample()
            read(native.heap_stack, stack)
            sample()
            read(native.cpu_read, number % 2, 1000)
            sample()
            read(native.heap_pending)
            read(native.marked_labels)
            read(native.heap_read)
        native.heap_stop()
        native.cpu_free()
        """,
        ends,
    )
