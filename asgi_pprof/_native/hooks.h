/*
 * Hooks around Python's allocators: they count every allocation and draw the ones
 * that are sampled. What a sample is, heap_sampler.c says.
 *
 * Source: Objects/obmalloc.c, PyMem_SetAllocator; Go, runtime/malloc.go, nextSample.
 */
#ifndef ASGI_PPROF_HOOKS_H
#define ASGI_PPROF_HOOKS_H

#include "layout.h"

typedef struct {
    uint64_t mallocs, frees, bytes;
} HookTotals;

/* What the hooks tell the sampler; called without the GIL by threads that do not have it. */
typedef struct {
    /* An allocation that has been drawn. */
    void (*allocated)(void *address, size_t size);
    /* A block that may be in the table of blocks is about to be freed. */
    void (*freed)(void *address);
    /* Such a block has moved or changed its size; `drawn`: and is an allocation that has been. */
    void (*resized)(void *before, void *after, size_t size, bool drawn);
} HookSampler;

/*
 * Count from 0, and draw one allocation in `rate` bytes (0: none) in all threads. With the
 * GIL. False with an exception set: RuntimeError while interpreters with another GIL run.
 */
bool hooks_install(uint64_t rate, const HookSampler *sampler);
/*
 * Draw none, and take the hooks out, or let them pass on where others stand on them or
 * interpreters with another GIL run.
 */
void hooks_uninstall(void);
/* Whether the hooks are called: another tool may have removed them. */
bool hooks_are_called(void);

/* Since hooks_install; exact. */
HookTotals hooks_totals(void);

void hooks_before_fork(void);
void hooks_after_fork_in_parent(void);
void hooks_after_fork_in_child(void);

#endif
