"""profile: what used the CPU, sampled on each thread's CPU clock, or on the process's."""

from asgi_pprof.collectors.cpu.collector import CpuCollector as CpuCollector
