"""profile: CPU time, sampled on the CPU clock of each thread, or of the process."""

from asgi_pprof.collectors.cpu.collector import CpuCollector as CpuCollector
