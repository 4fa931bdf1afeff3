"""goroutine and goroutineleak: all asyncio tasks, and those that nothing can wake any more."""

from asgi_pprof.collectors.goroutine.collector import TaskCollector as TaskCollector
from asgi_pprof.collectors.goroutine.leak_collector import LeakCollector as LeakCollector
