/*
 * Hooks around Python's allocators. They count every allocation, and draw the ones to sample.
 *
 * Source: Objects/obmalloc.c, PyMem_SetAllocator; Go, runtime/malloc.go, nextSample.
 */
#ifndef ASGI_PPROF_HOOKS_H
#define ASGI_PPROF_HOOKS_H

#include "layout.h"

typedef struct {
    uint64_t mallocs, frees, bytes;
} HookTotals;

/* Functions that the hooks call, with a GIL held, which may be another interpreter's. */
typedef struct {
    /* A drawn allocation has been made. */
    void (*allocated)(void *address, size_t size);
    /* A block that may be in the table of sampled blocks is about to be freed. */
    void (*freed)(void *address);
    /* Such a block has been reallocated; `drawn` says whether to sample the reallocation. */
    void (*resized)(void *before, void *after, size_t size, bool drawn);
} HookSampler;

/*
 * Set the counters to 0, and draw one allocation in `rate` bytes (0: none) in all threads, for
 * this sampler, which must stay valid for ever. Needs the GIL. False with an exception set:
 * RuntimeError while there are interpreters with another GIL.
 */
bool hooks_install(uint64_t rate, const HookSampler *sampler);
/*
 * Stop drawing, and remove the hooks. They stay, and only delegate, if other hooks are on top of
 * them, or while there are interpreters with another GIL.
 */
void hooks_uninstall(void);
/* Return whether the hooks are called: another tool may have removed them. */
bool hooks_are_called(void);

/* Return the exact totals since hooks_install. */
HookTotals hooks_totals(void);

void hooks_before_fork(void);
void hooks_after_fork_in_parent(void);
void hooks_after_fork_in_child(void);

#endif
