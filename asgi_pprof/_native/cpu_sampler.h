/*
 * Samples CPU time by stack, in every Python thread. A timer on each thread's CPU clock signals
 * that thread, and the signal handler records the thread's stack.
 *
 * Sources: timer_create(2), sigevent(7); Linux, kernel/time/posix-cpu-timers.c;
 * Go, runtime/signal_unix.go and os_linux.go, which do the same.
 */
#ifndef ASGI_PPROF_CPU_SAMPLER_H
#define ASGI_PPROF_CPU_SAMPLER_H

#include "layout.h"

#include <sys/types.h>

typedef struct {
    uint64_t samples;    /* signals handled */
    uint64_t periods;    /* periods they stand for: the kernel checks timers only on its tick */
    uint64_t unreadable; /* periods whose stack could not be read */
    uint64_t lost;       /* periods for which there was no room */
    uint64_t skipped;    /* periods without a stack, because samples had cost too much */
    uint64_t unlabelled; /* periods without labels, because there were too many label sets */
    uint64_t own_ns;     /* CPU time of the handler */
    uint64_t watcher_ns; /* CPU time of the thread that finds new threads */
    uint64_t unsampled;  /* threads that got no timer */
    bool displaced;      /* sampling ended early: SIGPROF was taken, or given back by cpu_yield */
} CpuStats;

/*
 * The CPU time that samples may cost a thread: one `share`-th of the thread's own, and
 * `credit_ns` once, for names that are seen for the first time. Beyond that no stacks are taken.
 */
typedef struct {
    uint64_t credit_ns, share;
} Budget;

/* Start; needs the GIL. False with an exception set: already in use, or the system refuses. */
bool cpu_start(long hz, Budget budget);

/* Give SIGPROF back at once; cpu_stop must still be called. Needs the GIL. */
void cpu_yield(void);

/* Stop, and restore SIGPROF. Samples are kept until cpu_free. Both need the GIL. */
void cpu_stop(void);
void cpu_free(void);

CpuStats cpu_stats(void);

/*
 * Return a new list of at most `limit` samples, starting with record `*id` (0: the first):
 * (places, number of the label set, periods). `*id` becomes the record to continue with.
 */
PyObject *cpu_read(uint32_t *id, int limit);

/* Sample a thread that has just begun, if this is on; the watcher would find it in some 40 ms. */
void cpu_begin_thread(pid_t thread);

/*
 * Return a new tuple: a list of the threads that have a timer, each with its native id and the
 * periods of its samples, and the native id of our watcher.
 */
PyObject *cpu_threads(void);

void cpu_after_fork_in_child(void);

#endif
