/*
 * CPU time by stack, of every Python thread: a timer on each thread's CPU clock
 * signals that thread, and the handler notes where it is.
 *
 * Sources: timer_create(2), sigevent(7); Linux, kernel/time/posix-cpu-timers.c;
 * Go, runtime/signal_unix.go and os_linux.go, which do the same.
 */
#ifndef ASGI_PPROF_CPU_SAMPLER_H
#define ASGI_PPROF_CPU_SAMPLER_H

#include "layout.h"

typedef struct {
    uint64_t samples;    /* signals */
    uint64_t periods;    /* what they stand for: signals come on the kernel's tick */
    uint64_t unreadable; /* periods whose stack could not be read */
    uint64_t lost;       /* periods for which there was no room */
    uint64_t own_ns;     /* CPU time of the handler */
    uint64_t watcher_ns; /* CPU time of the thread that looks for threads */
    uint64_t unsampled;  /* threads that got no timer */
    bool displaced;      /* somebody took SIGPROF meanwhile, so sampling ended */
} CpuStats;

/* Begin; with the GIL. False with an exception set: in use, or the system refuses. */
bool cpu_start(long hz);

/* End, and put everything back; what was sampled stays until cpu_free. With the GIL. */
void cpu_stop(void);
void cpu_free(void);

CpuStats cpu_stats(void);

/*
 * A new list of at most `limit` samples from the record `*id` on (0: the first):
 * (places, label set's number, periods). `*id` becomes where to go on.
 */
PyObject *cpu_read(uint32_t *id, int limit);

/* A new list of the native ids of the threads that have a timer now, and of our own. */
PyObject *cpu_threads(void);

void cpu_after_fork_in_child(void);

#endif
