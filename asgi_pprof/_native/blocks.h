/*
 * The table of sampled blocks that are alive, by address. One table for the process.
 *
 * The heap sampler's lock guards all of it but the filter.
 */
#ifndef ASGI_PPROF_BLOCKS_H
#define ASGI_PPROF_BLOCKS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

typedef struct {
    uintptr_t address; /* 0: an empty slot */
    uint64_t size;
    uint64_t captured_size; /* the block's size when its stack was recorded */
    uint32_t bucket;
} Block;

#define BLOCKS_FILTER (1u << 18)

/* Counts sampled blocks by a part of their address, so that `free` can skip most others. */
extern _Atomic uint8_t blocks_filter[BLOCKS_FILTER];

static inline _Atomic uint8_t *
blocks_filter_of(uintptr_t address)
{
    /* All allocators align to 16 bytes. Neighbours share a cache line. */
    return &blocks_filter[(address >> 4) & (BLOCKS_FILTER - 1)];
}

/* Return whether a block may be in the table; false is certain. */
static inline bool
blocks_may_have(const void *address)
{
    return atomic_load_explicit(blocks_filter_of((uintptr_t)address), memory_order_relaxed) != 0;
}

/* Start with an empty table; false without memory. */
bool blocks_open(void);
void blocks_close(void);

/* Add a block; false if there is no room. It may move all other blocks. */
bool blocks_insert(const Block *block);
Block *blocks_find(uintptr_t address);
/* Remove a block; this may move others. */
void blocks_remove(Block *block);

uint32_t blocks_count(void);
/* Return the next block, in no particular order: the first for NULL, NULL after the last. */
Block *blocks_next(const Block *block);

#endif
