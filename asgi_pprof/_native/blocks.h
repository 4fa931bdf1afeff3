/*
 * The sampled blocks that are alive, by address; one table for the process.
 *
 * All but the filter is guarded by the heap sampler's lock.
 */
#ifndef ASGI_PPROF_BLOCKS_H
#define ASGI_PPROF_BLOCKS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

typedef struct {
    uintptr_t address; /* 0: an empty slot */
    uint64_t size;
    uint64_t captured_size; /* what it was when its stack was taken */
    uint32_t stack, label;
} Block;

#define BLOCKS_FILTER (1u << 18)

/* How many sampled blocks have an address of this kind: `free` looks here first. */
extern _Atomic uint8_t blocks_filter[BLOCKS_FILTER];

static inline _Atomic uint8_t *
blocks_filter_of(uintptr_t address)
{
    /* Neighbours share a cache line; 16 is what all allocators align to. */
    return &blocks_filter[(address >> 4) & (BLOCKS_FILTER - 1)];
}

/* Whether a block may be in the table; false is certain. */
static inline bool
blocks_may_have(const void *address)
{
    return atomic_load_explicit(blocks_filter_of((uintptr_t)address), memory_order_relaxed) != 0;
}

/* Begin with an empty table; false without memory. */
bool blocks_open(void);
void blocks_close(void);

/* False if there is no room. May move all others. */
bool blocks_insert(const Block *block);
Block *blocks_find(uintptr_t address);
/* May move others. */
void blocks_remove(Block *block);

uint32_t blocks_count(void);
/* The block after this one, in no order; NULL after the last; the first after NULL. */
Block *blocks_next(const Block *block);

#endif
