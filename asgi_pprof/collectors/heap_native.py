"""The former name of `collectors.heap.sampler`, for programs that measure or break the sampler."""

from asgi_pprof.collectors.heap.sampler import _ROW as _ROW
from asgi_pprof.collectors.heap.sampler import DEFAULT_RATE as DEFAULT_RATE
from asgi_pprof.recorders import heap_sampler as heap_sampler
