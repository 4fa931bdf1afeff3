#define _GNU_SOURCE
#include "heap_sampler.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "blocks.h"
#include "hooks.h"
#include "labels.h"
#include "lists.h"
#include "names.h"
#include "reader.h"
#include "store.h"
#include "unwinder.h"

#define MAX_PENDING 4096
#define MAX_WAITING 8192
#define WAITING_SLOTS (2 * MAX_WAITING)
#define MANY_DEAD 256 /* resolve_labels visits everything, so not for one dead set */
#define SMALL 512 /* pymalloc serves sizes up to this, in classes of 16 bytes */

/* Samples that wait for the label of their set: a temporary bucket. */
typedef struct {
    uint32_t stack, label; /* label 0: an empty slot */
    uint64_t size_class, objects, bytes;
} Waiting;

/* A label set that has samples. While it lives, its route may still become known. */
typedef struct {
    LabelSet *set; /* borrowed; NULL when it has died */
    uint32_t label; /* its label, once it has died */
    bool used;
} Pending;

typedef struct {
    uint32_t stack, label;
    uint64_t size_class;
} BucketKey;

typedef struct {
    uint64_t objects, bytes;
} Bucket;

typedef struct {
    uint64_t stack; /* with heap.generation in the upper half */
    uint64_t size_class, label;
    uint64_t alloc_objects, alloc_bytes, live_objects, live_bytes;
} Row;

static struct {
    bool on;
    uint64_t rate;
    pthread_mutex_t mutex; /* guards all that follows, and blocks.c; held for microseconds */
    uint32_t generation;   /* counts starts: ids are invalid after the next one */
    ByteStore stacks, buckets;
    Waiting *waiting; /* one of the two tables; the other is empty, for resolve_labels */
    Waiting tables[2][WAITING_SLOTS];
    uint32_t waiting_count;
    Pending pending[MAX_PENDING];
    uint32_t dead_sets; /* sets with samples that have died since the last resolve_labels */
    uint64_t lost, unlabelled, unreadable;
    Reader reader;
    PyThreadState state;
    Stack stack;
} heap = {.mutex = PTHREAD_MUTEX_INITIALIZER};

uint64_t
heap_size_class(uint64_t size)
{
    if (size <= SMALL) {
        return size <= 16 ? 16 : (size + 15) & ~(uint64_t)15;
    }
    unsigned bits = 64 - (unsigned)__builtin_clzll(size - 1);
    uint64_t step = (uint64_t)1 << (bits - 4);
    return (size + step - 1) & ~(step - 1);
}

static void
add_to_bucket(uint32_t stack, uint32_t label, uint64_t size_class, uint64_t objects, uint64_t bytes)
{
    BucketKey key = {stack, label, size_class};
    uint32_t id = store_intern(&heap.buckets, 0, &key, sizeof key, sizeof(Bucket));
    if (id == 0) {
        heap.lost += objects;
        return;
    }
    Bucket *bucket = record_extra(store_record(&heap.buckets, id));
    bucket->objects += objects;
    bucket->bytes += bytes;
}

static bool
add_waiting(const Waiting *samples)
{
    uint64_t hash = ((uint64_t)samples->stack << 32 | samples->label) * 0x9e3779b97f4a7c15u;
    hash = (hash ^ samples->size_class) * 0xff51afd7ed558ccdu;
    uint32_t at = (uint32_t)(hash >> 32) & (WAITING_SLOTS - 1);
    for (;; at = (at + 1) & (WAITING_SLOTS - 1)) {
        Waiting *slot = &heap.waiting[at];
        if (slot->label == 0) {
            if (heap.waiting_count == MAX_WAITING) {
                return false;
            }
            *slot = *samples;
            heap.waiting_count++;
            return true;
        }
        if (slot->stack == samples->stack && slot->label == samples->label &&
            slot->size_class == samples->size_class) {
            slot->objects += samples->objects;
            slot->bytes += samples->bytes;
            return true;
        }
    }
}

/* Return a label, or for a pending one the label of its set if that has died. */
static uint32_t
resolved_label(uint32_t label)
{
    if (label < HEAP_PENDING) {
        return label;
    }
    const Pending *pending = &heap.pending[label - HEAP_PENDING];
    return pending->set == NULL ? pending->label : label;
}

/* Move samples whose label set has died to their buckets, and free the set's number. */
static void
resolve_labels(void)
{
    Waiting *before = heap.waiting;
    heap.waiting = before == heap.tables[0] ? heap.tables[1] : heap.tables[0];
    heap.waiting_count = 0;
    for (uint32_t i = 0; i < WAITING_SLOTS; i++) {
        Waiting samples = before[i];
        uint32_t label = samples.label == 0 ? 0 : resolved_label(samples.label);
        if (label >= HEAP_PENDING) {
            add_waiting(&samples);
        }
        else if (samples.label != 0) {
            add_to_bucket(samples.stack, label, samples.size_class, samples.objects,
                          samples.bytes);
        }
    }
    memset(before, 0, sizeof heap.tables[0]);
    for (Block *block = blocks_next(NULL); block != NULL; block = blocks_next(block)) {
        block->label = resolved_label(block->label);
    }
    for (uint32_t i = 0; i < MAX_PENDING; i++) {
        heap.pending[i].used = heap.pending[i].set != NULL;
    }
    heap.dead_sets = 0;
}

static uint32_t
pending_label(LabelSet *set)
{
    /* Number 0 is never used: it means none. */
    for (int round = 0; set->pending == 0 && round < 2; round++) {
        for (uint32_t i = 1; i < MAX_PENDING; i++) {
            if (!heap.pending[i].used) {
                heap.pending[i] = (Pending){.set = set, .used = true};
                set->pending = i;
                break;
            }
        }
        if (set->pending == 0 && heap.dead_sets < MANY_DEAD) {
            break;
        }
        if (set->pending == 0) {
            resolve_labels();
        }
    }
    if (set->pending == 0) {
        heap.unlabelled++;
        return 0;
    }
    return HEAP_PENDING + set->pending;
}

static void
count_sample(uint32_t stack, uint32_t label, uint64_t size)
{
    Waiting sample = {stack, label, heap_size_class(size), 1, size};
    if (label >= HEAP_PENDING) {
        if (add_waiting(&sample)) {
            return;
        }
        if (heap.dead_sets >= MANY_DEAD) {
            resolve_labels();
            label = resolved_label(label);
            if (label >= HEAP_PENDING && add_waiting(&sample)) {
                return;
            }
        }
    }
    if (label >= HEAP_PENDING) {
        heap.unlabelled++;
        label = 0;
    }
    add_to_bucket(stack, label, sample.size_class, 1, size);
}

/* Record the calling thread's stack, and its label. */
static void
record_stack_and_label(uint32_t *stack, uint32_t *label)
{
    const PyThreadState *state = PyGILState_GetThisThreadState();
    LabelSet copy, *set = NULL;
    if (state == NULL) {
        heap.stack.depth = 1;
        heap.stack.places[0] = PLACE_NO_FRAME;
    }
    else if (unwind(heap_names, &heap.reader, state, &heap.state, &heap.stack)) {
        set = labels_find(&heap.reader, &heap.state, &copy);
    }
    else {
        heap.unreadable++;
    }
    *stack = store_intern(&heap.stacks, 0, heap.stack.places,
                          heap.stack.depth * (uint32_t)sizeof(uint32_t), 0);
    *label = set != NULL ? pending_label(set) : 0;
}

static void
on_allocated(void *address, size_t size)
{
    pthread_mutex_lock(&heap.mutex);
    if (heap.on) {
        Block block = {.address = (uintptr_t)address, .size = size, .captured_size = size};
        record_stack_and_label(&block.stack, &block.label);
        heap.lost += !blocks_insert(&block);
        count_sample(block.stack, block.label, size);
    }
    pthread_mutex_unlock(&heap.mutex);
}

static void
on_freed(void *address)
{
    pthread_mutex_lock(&heap.mutex);
    Block *block = blocks_find((uintptr_t)address);
    if (block != NULL) {
        blocks_remove(block);
    }
    pthread_mutex_unlock(&heap.mutex);
}

/*
 * A reallocated block stays in the sample with the probability that a new block of its size
 * would have, so that the estimate of live memory is unbiased however often a block grows. Its
 * stack is recorded again when its size has doubled, and not at each of the million
 * reallocations of a string that grows byte by byte.
 */
static void
on_resized(void *before, void *after, size_t size, bool drawn)
{
    pthread_mutex_lock(&heap.mutex);
    Block *known = blocks_find((uintptr_t)before);
    if (known != NULL && drawn && after == before && size < 2 * known->captured_size) {
        known->size = size;
        count_sample(known->stack, known->label, size);
    }
    else {
        Block block = {.captured_size = 0};
        if (known != NULL) {
            block = *known;
            blocks_remove(known);
        }
        if (drawn && heap.on) {
            block.address = (uintptr_t)after;
            block.size = size;
            if (size >= 2 * block.captured_size) {
                record_stack_and_label(&block.stack, &block.label);
                block.captured_size = size;
            }
            heap.lost += !blocks_insert(&block);
            count_sample(block.stack, block.label, size);
        }
    }
    pthread_mutex_unlock(&heap.mutex);
}

static const HookSampler hook_sampler = {on_allocated, on_freed, on_resized};

/* A label set dies: its samples have this label from now on. */
static void
on_label_set_death(uint32_t pending, uint32_t label)
{
    pthread_mutex_lock(&heap.mutex);
    heap.pending[pending].set = NULL;
    heap.pending[pending].label = label;
    heap.dead_sets++;
    pthread_mutex_unlock(&heap.mutex);
}

static void
clear_tables(void)
{
    store_close(&heap.stacks);
    store_close(&heap.buckets);
    blocks_close();
    if (heap.waiting_count != 0) {
        memset(heap.waiting, 0, sizeof heap.tables[0]);
        heap.waiting_count = 0;
    }
    heap.dead_sets = 0;
    for (uint32_t i = 0; i < MAX_PENDING; i++) {
        if (heap.pending[i].used && heap.pending[i].set != NULL) {
            heap.pending[i].set->pending = 0;
        }
        heap.pending[i] = (Pending){0};
    }
}

static bool
open_tables(void)
{
    heap.generation++;
    if (heap.waiting == NULL) {
        heap.waiting = heap.tables[0];
    }
    if (names_open(heap_names)) {
        if (blocks_open() && store_open(&heap.stacks, 1u << 19, 1u << 21, 1) &&
            store_open(&heap.buckets, 1u << 17, 1u << 19, 1)) {
            return true;
        }
        clear_tables();
        names_close(heap_names);
    }
    return false;
}

bool
heap_start(uint64_t rate)
{
    if (heap.on) {
        PyErr_SetString(PyExc_RuntimeError, "heap profiling already in use");
        return false;
    }
    labels_on_death(on_label_set_death);
    pthread_mutex_lock(&heap.mutex);
    bool opened = open_tables();
    if (opened) {
        heap.reader.trusted = true;
        heap.rate = rate;
        heap.lost = heap.unlabelled = heap.unreadable = 0;
        heap.on = true;
    }
    pthread_mutex_unlock(&heap.mutex);
    if (!opened) {
        PyErr_NoMemory();
        return false;
    }
    if (!hooks_install(rate, &hook_sampler)) {
        heap_stop();
        return false;
    }
    return true;
}

void
heap_stop(void)
{
    if (heap.on) {
        hooks_uninstall();
        pthread_mutex_lock(&heap.mutex);
        heap.on = false;
        clear_tables();
        pthread_mutex_unlock(&heap.mutex);
        names_close(heap_names);
    }
}

bool
heap_check(void)
{
    return heap.on && hooks_are_called();
}

HeapStats
heap_stats(void)
{
    HookTotals totals = hooks_totals();
    pthread_mutex_lock(&heap.mutex);
    HeapStats stats = {
        .rate = heap.on ? heap.rate : 0,
        .mallocs = totals.mallocs,
        .frees = totals.frees,
        .total_bytes = totals.bytes,
        .live = blocks_count(),
        .stacks = heap.on ? atomic_load(&heap.stacks.count) : 0,
        .lost = heap.lost,
        .unlabelled = heap.unlabelled,
        .unreadable = heap.unreadable,
    };
    pthread_mutex_unlock(&heap.mutex);
    return stats;
}

static int
compare_rows(const void *left, const void *right)
{
    return memcmp(left, right, offsetof(Row, alloc_objects));
}

static size_t
merge_rows(Row *rows, size_t count)
{
    if (count != 0) {
        qsort(rows, count, sizeof(Row), compare_rows);
    }
    size_t kept = 0;
    for (size_t i = 0; i < count; i++) {
        if (kept > 0 && compare_rows(&rows[kept - 1], &rows[i]) == 0) {
            Row *row = &rows[kept - 1];
            row->alloc_objects += rows[i].alloc_objects;
            row->alloc_bytes += rows[i].alloc_bytes;
            row->live_objects += rows[i].live_objects;
            row->live_bytes += rows[i].live_bytes;
        }
        else {
            rows[kept++] = rows[i];
        }
    }
    return kept;
}

typedef struct {
    Row *rows;
    size_t count, most;
} Rows;

static void
add_row(Rows *to, Row row)
{
    if (to->count < to->most) {
        row.stack |= (uint64_t)heap.generation << 32;
        to->rows[to->count++] = row;
    }
}

/* Copy everything as rows, several of which may have one key. The caller holds the lock. */
static void
copy_rows(Rows *to)
{
    uint32_t end = atomic_load(&heap.buckets.used);
    for (uint32_t id = 1; id < end; id = store_next(&heap.buckets, id, sizeof(Bucket))) {
        const RecordHeader *record = store_record(&heap.buckets, id);
        const BucketKey *key = record_key(record);
        const Bucket *bucket = record_extra(record);
        add_row(to, (Row){key->stack, key->size_class, key->label, bucket->objects, bucket->bytes,
                          0, 0});
    }
    for (uint32_t i = 0; i < WAITING_SLOTS; i++) {
        const Waiting *samples = &heap.waiting[i];
        if (samples->label != 0) {
            add_row(to, (Row){samples->stack, samples->size_class, samples->label,
                              samples->objects, samples->bytes, 0, 0});
        }
    }
    for (const Block *block = blocks_next(NULL); block != NULL; block = blocks_next(block)) {
        add_row(to, (Row){block->stack, heap_size_class(block->size), block->label, 0, 0, 1,
                          block->size});
    }
}

PyObject *
heap_read(void)
{
    Rows all = {NULL, 0, 0};
    size_t count;
    bool failed = false;
    /* Without the GIL: a thread that waits for the lock meanwhile holds the GIL. */
    Py_BEGIN_ALLOW_THREADS
    pthread_mutex_lock(&heap.mutex);
    if (heap.on) {
        resolve_labels();
        all.most = atomic_load(&heap.buckets.count) + heap.waiting_count + blocks_count();
        all.rows = malloc((all.most + 1) * sizeof(Row));
        failed = all.rows == NULL;
        if (!failed) {
            copy_rows(&all);
        }
    }
    pthread_mutex_unlock(&heap.mutex);
    count = merge_rows(all.rows, all.count);
    Py_END_ALLOW_THREADS
    if (failed) {
        return PyErr_NoMemory();
    }
    PyObject *bytes = PyBytes_FromStringAndSize((const char *)all.rows,
                                                (Py_ssize_t)(count * sizeof(Row)));
    free(all.rows);
    return bytes;
}

PyObject *
heap_pending(void)
{
    PyObject *list = PyList_New(0);
    for (uint32_t i = 1; list != NULL && i < MAX_PENDING; i++) {
        LabelSet *set = heap.pending[i].set;
        if (set == NULL || !labels_can_be_asked(set)) {
            continue;
        }
        /* The reference comes first: to make the tuple may end other sets. */
        PyObject *kept = Py_NewRef(set);
        list_append_new(&list, Py_BuildValue("(kN)", (unsigned long)(HEAP_PENDING + i), kept));
    }
    return list;
}

/* Copy the places of a stack, and return how many: 0 if sampling, and so their table, has ended. */
static uint32_t
copy_places(uint64_t numbered, uint32_t *places)
{
    uint32_t stack = (uint32_t)numbered, depth = 0;
    if (heap.on && numbered >> 32 == heap.generation && stack != 0 &&
        stack < atomic_load(&heap.stacks.used)) {
        const RecordHeader *record = store_record(&heap.stacks, stack);
        depth = record_size(record) / (uint32_t)sizeof(uint32_t);
        memcpy(places, record_key(record), depth * sizeof(uint32_t));
    }
    return depth;
}

PyObject *
heap_stack(uint64_t numbered)
{
    /* Copied before any object is made, which may run a finalizer that ends sampling. */
    uint32_t places[MAX_DEPTH + 1] = {PLACE_LOST};
    uint32_t depth = copy_places(numbered, places);
    return places_tuple(places, depth != 0 ? depth : 1);
}

void
heap_before_fork(void)
{
    pthread_mutex_lock(&heap.mutex);
    hooks_before_fork();
}

void
heap_after_fork_in_parent(void)
{
    hooks_after_fork_in_parent();
    pthread_mutex_unlock(&heap.mutex);
}

void
heap_after_fork_in_child(void)
{
    bool was_on = heap.on;
    heap.on = false;
    clear_tables();
    hooks_after_fork_in_child();
    pthread_mutex_unlock(&heap.mutex);
    if (was_on) {
        names_close(heap_names);
    }
}
