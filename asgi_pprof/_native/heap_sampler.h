/*
 * Samples memory by the stack that allocated it. Hooks around Python's allocators draw one
 * allocation in `rate` bytes on average. The sampler records its stack, and that it is freed.
 *
 * Sources: Go, runtime/mprof.go; hooks.h.
 */
#ifndef ASGI_PPROF_HEAP_SAMPLER_H
#define ASGI_PPROF_HEAP_SAMPLER_H

#include "layout.h"

typedef struct {
    uint64_t rate;                        /* mean bytes between samples; 0: off */
    uint64_t mallocs, frees, total_bytes; /* exact, since the start */
    uint64_t live;                        /* sampled blocks alive */
    uint64_t stacks;                      /* different stacks seen */
    uint64_t lost;                        /* samples for which there was no room */
    uint64_t unlabelled;                  /* past allocations that gave up their labels */
    uint64_t unnamed;                     /* samples without their stacks */
    uint64_t unreadable;
} HeapStats;

/* Start to sample; needs the GIL. False with an exception set. */
bool heap_start(uint64_t rate);
/* Stop, and remove the hooks. They stay, and only delegate, if other hooks are on top of them. */
void heap_stop(void);

/* Return whether the sampler is on and its hooks are called: another tool may remove them. */
bool heap_check(void);

HeapStats heap_stats(void);

/*
 * Return new bytes: one row for each stack, size class and label, of native uint64: stack, size
 * class, label, allocated objects and bytes, live objects and bytes. The numbers are as sampled,
 * not scaled. A label above HEAP_PENDING stands for a living label set: `heap_pending` returns
 * the set under this number.
 */
#define HEAP_PENDING ((uint64_t)1 << 63)
PyObject *heap_read(void);

/* Return a new list of (number, label set) of all living sets that have samples. */
PyObject *heap_pending(void);

/* Return a new tuple of a stack's places; PLACE_LOST if it is not known any more. */
PyObject *heap_stack(uint64_t stack);

/*
 * Remove the labels of allocations of which nothing is alive. Then return new bytes: one byte for
 * each label below `end`, which says whether a sample has it.
 */
PyObject *heap_used_labels(uint32_t end);

/*
 * Make room for new names and stacks if little is left: keep only those of live memory. One call
 * does at most `limit` buckets. Return whether another call is needed. Needs the GIL.
 */
bool heap_compact(uint32_t limit);

/* Return the largest size of a size's class. There are eight classes to a doubling. */
uint64_t heap_size_class(uint64_t size);

void heap_before_fork(void);
void heap_after_fork_in_parent(void);
void heap_after_fork_in_child(void);

#endif
