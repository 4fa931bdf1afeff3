/* Nanoseconds of the system's clocks. Safe in a signal handler. */
#ifndef ASGI_PPROF_CLOCKS_H
#define ASGI_PPROF_CLOCKS_H

#include <stdint.h>
#include <time.h>

static inline uint64_t
clock_ns(clockid_t clock)
{
    struct timespec now;
    clock_gettime(clock, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

#endif
