"""Child processes are counted, and so are the jobs of process pools."""

from __future__ import annotations

import resource
import subprocess
import sys
import threading

import pytest

from asgi_pprof.runtime.children import read_children
from tests.programs import run_program
from tests.servers import until

MB = 2**20
BUSY = """
import time
ballast = b"x" * (64 << 20)
end = time.process_time() + 0.5
while time.process_time() < end:
    pass
print("ready", flush=True)
input()
"""


def start(**options):
    return subprocess.Popen(
        [sys.executable, "-c", BUSY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options
    )


def test_children_that_live_and_have_ended_are_counted():
    """A child's CPU time stays when it has ended; its memory does not."""
    before = read_children()
    children = [start() for _ in range(2)]
    try:
        for child in children:
            assert child.stdout.readline() == b"ready\n"
        now = read_children()
    finally:
        for child in children:
            child.communicate(b"\n", timeout=60)
    after = read_children()
    assert now.number - before.number == 2
    assert now.resident_bytes - before.resident_bytes > 2 * 64 * MB
    assert 1.0 <= now.cpu_s - before.cpu_s < 60
    assert after.number == before.number
    assert after.cpu_s >= now.cpu_s - 0.02  # of two roundings to the system's ticks
    assert after.resident_bytes - before.resident_bytes < 64 * MB


def test_a_child_that_nobody_has_waited_for_does_not_live():
    """Its CPU time is counted all the same."""
    before = read_children()
    child = start()
    assert child.stdout.readline() == b"ready\n"
    child.stdin.write(b"\n")
    child.stdin.flush()
    until(lambda: read_children().number == before.number)
    now = read_children()
    assert child.returncode is None
    assert now.cpu_s - before.cpu_s >= 0.5
    child.communicate(timeout=60)


def test_children_of_other_threads_are_counted():
    """/proc lists them by the thread that made them."""
    before, started, end = read_children(), threading.Event(), threading.Event()

    def run():
        child = start()
        started.set()
        end.wait()
        child.communicate(b"\n", timeout=60)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert started.wait(60)
        assert read_children().number - before.number == 1
    finally:
        end.set()
        thread.join()


def test_without_proc_nothing_is_known(monkeypatch):
    """There is no figure in place of a 0."""
    monkeypatch.setattr("asgi_pprof.runtime.children.native_thread_ids", list)
    assert read_children() is None


def test_jobs_of_a_process_pool_are_running_or_queued():
    """There are two processes and five jobs; then none, then no pool."""
    run_program(
        """
        import concurrent.futures, multiprocessing, time
        from asgi_pprof.runtime.children import process_pools
        from tests.servers import until

        assert list(process_pools()) == []
        pool = concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("spawn"))
        jobs = [pool.submit(time.sleep, 3600) for _ in range(5)]
        until(lambda: list(process_pools()) == [(2, 2, 3)])
        for process in list(pool._processes.values()):
            process.kill()
        concurrent.futures.wait(jobs, timeout=60)
        pool.shutdown()
        until(lambda: list(process_pools()) == [])
        """
    )


def test_the_cpu_time_is_the_systems():
    """Of a child that has been waited for it is what getrusage says."""
    children = [start()]
    children[0].communicate(b"\n", timeout=60)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    now = read_children()
    assert now.cpu_s == pytest.approx(used.ru_utime + used.ru_stime, abs=0.2) or now.number
