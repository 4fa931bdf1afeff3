#define _GNU_SOURCE
#include "store.h"

#include <string.h>

#include "memory.h"

#define MAX_PROBES 64

static uint32_t
hash_of(unsigned kind, const void *key, uint32_t size)
{
    /* Multiplies and shifts eight bytes at a time: fast, and good enough for slots. */
    const char *bytes = key;
    uint64_t hash = 0x9e3779b97f4a7c15u ^ (kind * 0x100000001b3u) ^ size;
    for (uint32_t at = 0; at < size; at += 8) {
        uint64_t word = 0;
        memcpy(&word, bytes + at, size - at < 8 ? size - at : 8);
        hash = (hash ^ word) * 0xff51afd7ed558ccdu;
        hash ^= hash >> 32;
    }
    return (uint32_t)hash;
}

static uint32_t
units_of(uint32_t size, uint32_t extra)
{
    uint32_t bytes = (uint32_t)sizeof(RecordHeader) + ((size + 7) & ~7u) + extra;
    return (bytes + STORE_UNIT - 1) / STORE_UNIT;
}

bool
store_open(ByteStore *store, uint32_t slot_count, uint32_t units, uint32_t first)
{
    size_t slots = (size_t)slot_count * sizeof(uint32_t), arena = (size_t)units * STORE_UNIT;
    char *memory = memory_map(slots + arena);
    if (memory == NULL) {
        return false;
    }
    store->slots = (_Atomic uint32_t *)memory;
    store->arena = memory + slots;
    store->slot_count = slot_count;
    store->units = units;
    store->used = first;
    store->count = store->refused = 0;
    return true;
}

void
store_close(ByteStore *store)
{
    if (store->slots != NULL) {
        memory_unmap((void *)store->slots, (size_t)store->slot_count * sizeof(uint32_t) +
                                               (size_t)store->units * STORE_UNIT);
        store->slots = NULL;
    }
}

static bool
is_record(const RecordHeader *record, uint32_t hash, uint32_t size_and_kind, const void *key)
{
    return record->hash == hash && record->size_and_kind == size_and_kind &&
           memcmp(record_key(record), key, record_size(record)) == 0;
}

static uint32_t
write_record(ByteStore *store, uint32_t hash, uint32_t size_and_kind, const void *key, uint32_t extra)
{
    uint32_t size = size_and_kind & 0xffffff, units = units_of(size, extra);
    uint32_t id = atomic_load_explicit(&store->used, memory_order_relaxed);
    do {
        if (units > store->units - id) {
            return 0;
        }
    } while (!atomic_compare_exchange_weak_explicit(&store->used, &id, id + units,
                                                    memory_order_relaxed, memory_order_relaxed));
    RecordHeader *record = (RecordHeader *)store_record(store, id);
    record->hash = hash;
    memcpy(record + 1, key, size);
    /* Written last: a reader that follows `store_next` stops at a record without a size. */
    atomic_thread_fence(memory_order_release);
    record->size_and_kind = size_and_kind;
    return id;
}

uint32_t
store_intern(ByteStore *store, unsigned kind, const void *key, uint32_t size, uint32_t extra)
{
    uint32_t hash = hash_of(kind, key, size), size_and_kind = size | (uint32_t)kind << 24;
    uint32_t mask = store->slot_count - 1, ours = 0;
    for (uint32_t probe = 0; probe < MAX_PROBES; probe++) {
        _Atomic uint32_t *slot = &store->slots[(hash + probe) & mask];
        uint32_t id = atomic_load_explicit(slot, memory_order_acquire);
        if (id == 0) {
            if (ours == 0) {
                ours = write_record(store, hash, size_and_kind, key, extra);
                if (ours == 0) {
                    break;
                }
            }
            if (atomic_compare_exchange_strong_explicit(slot, &id, ours, memory_order_release,
                                                        memory_order_acquire)) {
                atomic_fetch_add_explicit(&store->count, 1, memory_order_relaxed);
                return ours;
            }
        }
        if (is_record(store_record(store, id), hash, size_and_kind, key)) {
            return id;
        }
    }
    atomic_fetch_add_explicit(&store->refused, 1, memory_order_relaxed);
    return 0;
}

uint32_t
store_find(const ByteStore *store, unsigned kind, const void *key, uint32_t size)
{
    uint32_t hash = hash_of(kind, key, size), size_and_kind = size | (uint32_t)kind << 24;
    for (uint32_t probe = 0; probe < MAX_PROBES; probe++) {
        _Atomic uint32_t *slot = &store->slots[(hash + probe) & (store->slot_count - 1)];
        uint32_t id = atomic_load_explicit(slot, memory_order_acquire);
        if (id == 0) {
            return 0;
        }
        if (is_record(store_record(store, id), hash, size_and_kind, key)) {
            return id;
        }
    }
    return 0;
}

uint32_t
store_next(const ByteStore *store, uint32_t id, uint32_t extra)
{
    return id + units_of(record_size(store_record(store, id)), extra);
}

bool
store_is_nearly_full(const ByteStore *store)
{
    return atomic_load(&store->count) > store->slot_count / 4 * 3 ||
           atomic_load(&store->used) > store->units / 4 * 3;
}
