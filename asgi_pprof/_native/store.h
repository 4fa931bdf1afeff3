/*
 * A set of byte strings that only grows. Equal strings have the same id.
 *
 * It is lock-free, so a signal handler may add to it while another thread does: a record is
 * written completely, and then published with one compare-and-swap. Address space is reserved
 * at the start, and memory used as needed. Once it is full, adding fails.
 */
#ifndef ASGI_PPROF_STORE_H
#define ASGI_PPROF_STORE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define STORE_UNIT 16 /* bytes; an id is a record's offset in units */

typedef struct {
    uint32_t hash;
    uint32_t size_and_kind; /* the key's size in the low 24 bits */
} RecordHeader;

typedef struct {
    _Atomic uint32_t *slots; /* ids, by hash */
    char *arena;
    uint32_t slot_count; /* a power of two */
    uint32_t units;
    _Atomic uint32_t used; /* units */
    _Atomic uint32_t count;
    _Atomic uint32_t refused;
} ByteStore;

/* Reserve address space; false without it. Ids below `first` are never given to a record. */
bool store_open(ByteStore *store, uint32_t slot_count, uint32_t units, uint32_t first);
void store_close(ByteStore *store);

/*
 * Return the id of these bytes; 0 if there is no room for them.
 *
 * After the key come `extra` bytes, zero at first, which the caller may change.
 */
uint32_t store_intern(ByteStore *store, unsigned kind, const void *key, uint32_t size, uint32_t extra);

/* Return the id of these bytes, 0 if they have not been added. */
uint32_t store_find(const ByteStore *store, unsigned kind, const void *key, uint32_t size);

static inline const RecordHeader *
store_record(const ByteStore *store, uint32_t id)
{
    return (const RecordHeader *)(store->arena + (size_t)id * STORE_UNIT);
}

static inline uint32_t
record_size(const RecordHeader *record)
{
    return record->size_and_kind & 0xffffff;
}

static inline unsigned
record_kind(const RecordHeader *record)
{
    return record->size_and_kind >> 24;
}

static inline const void *
record_key(const RecordHeader *record)
{
    return record + 1;
}

/* Return the extra bytes, which are aligned for any number. */
static inline void *
record_extra(const RecordHeader *record)
{
    return (char *)(record + 1) + ((record_size(record) + 7) & ~7u);
}

/* Return whether more than three quarters of the slots or of the memory are used. */
bool store_is_nearly_full(const ByteStore *store);

/* Return the id of the record added after this one; `id` must be that of a record. */
uint32_t store_next(const ByteStore *store, uint32_t id, uint32_t extra);

#endif
