/*
 * Memory by the stack that allocated it: hooks around Python's allocators take
 * one allocation in so many bytes, with its stack, and know when it is freed.
 *
 * Sources: Go, runtime/mprof.go; hooks.h.
 */
#ifndef ASGI_PPROF_HEAP_SAMPLER_H
#define ASGI_PPROF_HEAP_SAMPLER_H

#include "layout.h"

typedef struct {
    uint64_t rate; /* mean bytes between samples; 0: off */
    uint64_t mallocs, frees, total_bytes; /* exact, since the start */
    uint64_t live;                        /* sampled blocks alive */
    uint64_t stacks;                      /* different stacks seen */
    uint64_t lost;                        /* samples for which there was no room */
    uint64_t unlabelled;                  /* samples that lost their labels */
    uint64_t unreadable;
} HeapStats;

/* Begin to sample; with the GIL. False with an exception set. */
bool heap_start(uint64_t rate);
/* End, and take the hooks out, or let them pass everything on where others stand on them. */
void heap_stop(void);

/* Whether it is on and the hooks are still called: another tool may have removed them. */
bool heap_check(void);

HeapStats heap_stats(void);

/*
 * New bytes: one row a stack, size class and label, of native uint64: stack, size
 * class, label, allocated objects and bytes, live objects and bytes. All as
 * sampled, not scaled. A label above HEAP_PENDING is not known yet: it is that of
 * the label set `heap_pending` has under this number.
 */
#define HEAP_PENDING 0x80000000u
PyObject *heap_read(void);

/* A new list of (number, label set) of all living sets that samples wait for. */
PyObject *heap_pending(void);

/* A new tuple of the places of a stack; PLACE_LOST when sampling has begun anew since. */
PyObject *heap_stack(uint64_t stack);

/* The size of the class that a size belongs to: eight classes to a doubling. */
uint64_t heap_size_class(uint64_t size);

void heap_before_fork(void);
void heap_after_fork_in_parent(void);
void heap_after_fork_in_child(void);

#endif
