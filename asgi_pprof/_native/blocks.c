#define _GNU_SOURCE
#include "blocks.h"

#include <stddef.h>

#include "memory.h"

#define FIRST_SLOTS 4096u /* doubled when half full */
#define MAX_SLOTS (1u << 20)

_Atomic uint8_t blocks_filter[BLOCKS_FILTER];

static Block *slots;
static uint32_t slot_count, count;

static uint32_t
slot_of(uintptr_t address)
{
    return (uint32_t)(((uint64_t)(address >> 4) * 0x9e3779b97f4a7c15u) >> 32) & (slot_count - 1);
}

bool
blocks_open(void)
{
    slots = memory_map(FIRST_SLOTS * sizeof(Block));
    slot_count = slots != NULL ? FIRST_SLOTS : 0;
    count = 0;
    return slots != NULL;
}

void
blocks_close(void)
{
    if (slots != NULL) {
        memory_unmap(slots, slot_count * sizeof(Block));
        slots = NULL;
        slot_count = count = 0;
        for (size_t i = 0; i < BLOCKS_FILTER; i++) {
            if (atomic_load_explicit(&blocks_filter[i], memory_order_relaxed) != 0) {
                atomic_store_explicit(&blocks_filter[i], 0, memory_order_relaxed);
            }
        }
    }
}

static void
put(const Block *block)
{
    uint32_t at = slot_of(block->address);
    while (slots[at].address != 0) {
        at = (at + 1) & (slot_count - 1);
    }
    slots[at] = *block;
    count++;
}

static bool
grow(void)
{
    Block *before = slots, *after = NULL;
    uint32_t number = slot_count;
    if (number < MAX_SLOTS) {
        after = memory_map(2 * number * sizeof(Block));
    }
    if (after == NULL) {
        return count < number / 8 * 7;
    }
    slots = after;
    slot_count = 2 * number;
    count = 0;
    for (uint32_t i = 0; i < number; i++) {
        if (before[i].address != 0) {
            put(&before[i]);
        }
    }
    memory_unmap(before, number * sizeof(Block));
    return true;
}

bool
blocks_insert(const Block *block)
{
    if (count >= slot_count / 2 && !grow()) {
        return false;
    }
    put(block);
    _Atomic uint8_t *filter = blocks_filter_of(block->address);
    uint8_t known = atomic_load_explicit(filter, memory_order_relaxed);
    if (known < UINT8_MAX) { /* a counter at its maximum stays there */
        atomic_store_explicit(filter, known + 1, memory_order_relaxed);
    }
    return true;
}

Block *
blocks_find(uintptr_t address)
{
    if (slots == NULL || address == 0) { /* 0 marks empty slots; free(NULL) comes here */
        return NULL;
    }
    uint32_t at = slot_of(address);
    while (slots[at].address != address) {
        if (slots[at].address == 0) {
            return NULL;
        }
        at = (at + 1) & (slot_count - 1);
    }
    return &slots[at];
}

void
blocks_remove(Block *block)
{
    _Atomic uint8_t *filter = blocks_filter_of(block->address);
    uint8_t known = atomic_load_explicit(filter, memory_order_relaxed);
    if (known < UINT8_MAX) {
        atomic_store_explicit(filter, known - 1, memory_order_relaxed);
    }
    /* Close the gap: move up the blocks that it kept from their own slots. */
    uint32_t mask = slot_count - 1, at = (uint32_t)(block - slots);
    for (uint32_t next = (at + 1) & mask; slots[next].address != 0; next = (next + 1) & mask) {
        uint32_t home = slot_of(slots[next].address);
        if (((next - home) & mask) >= ((next - at) & mask)) {
            slots[at] = slots[next];
            at = next;
        }
    }
    slots[at].address = 0;
    count--;
}

uint32_t
blocks_count(void)
{
    return count;
}

Block *
blocks_next(const Block *block)
{
    for (uint32_t at = block != NULL ? (uint32_t)(block - slots) + 1 : 0; at < slot_count; at++) {
        if (slots[at].address != 0) {
            return &slots[at];
        }
    }
    return NULL;
}
