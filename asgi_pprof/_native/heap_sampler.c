#define _GNU_SOURCE
#include "heap_sampler.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "blocks.h"
#include "buckets.h"
#include "hooks.h"
#include "labels.h"
#include "lists.h"
#include "names.h"
#include "reader.h"
#include "store.h"
#include "unwinder.h"

#define SMALL 512 /* pymalloc serves sizes up to this, in classes of 16 bytes */
#define NAMES_MIB 8 /* some 10,000 functions */
#define STACK_SLOTS (1u << 15)
#define STACK_UNITS (1u << 18) /* 4 MiB of address space: some 20,000 stacks */

/* Stacks, and the names of their places. There are two tables: when one is nearly full, the stacks
   that are still needed are moved to the other. */
typedef struct {
    ByteStore stacks;
    NameTable *names;
    uint32_t opened; /* the number of this opening; it makes earlier stack numbers invalid */
} Tables;

#define FEW_RECORDS 4096
#define MOVED_AT_ONCE 32 /* buckets */
#define TABLE_BIT 31 /* the bit of a bucket's stack that tells which table has the stack */
#define STACK_MASK ((1u << TABLE_BIT) - 1)

typedef struct {
    uint64_t stack; /* with its table's `opened` in the upper half */
    uint64_t size_class, label;
    uint64_t alloc_objects, alloc_bytes, live_objects, live_bytes;
} Row;

static struct {
    bool on;
    uint64_t rate;
    pthread_mutex_t mutex; /* guards all that follows, the buckets and the blocks; held for
                              microseconds, and while the buckets are copied */
    uint32_t openings; /* how often a table has been opened */
    Tables tables[2];
    uint32_t current; /* the table that new stacks go to */
    uint32_t moved;   /* the next bucket whose stack is moved to this table; 0: none is moved */
    uint32_t kept;    /* stacks and names in the current table when the last move ended */
    bool is_asked;    /* a pending call will make room */
    uint64_t lost, unreadable;
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

static uint32_t
intern_stack(uint32_t table, const uint32_t *places, uint32_t depth)
{
    uint32_t id = store_intern(&heap.tables[table].stacks, 0, places,
                               depth * (uint32_t)sizeof(uint32_t), 0);
    return id != 0 ? id | table << TABLE_BIT : 0;
}

/* Return the bucket of an allocation: the calling thread's stack, and its labels. */
static uint32_t
record_bucket(uint64_t size)
{
    const PyThreadState *state = PyGILState_GetThisThreadState();
    LabelSet copy, *set = NULL;
    if (state == NULL) {
        heap.stack.depth = 1;
        heap.stack.places[0] = PLACE_NO_FRAME;
    }
    else if (unwind(heap.tables[heap.current].names, &heap.reader, state, &heap.state,
                    &heap.stack)) {
        set = labels_find(&heap.reader, &heap.state, &copy);
    }
    else {
        heap.unreadable++;
    }
    uint32_t stack = intern_stack(heap.current, heap.stack.places, heap.stack.depth);
    return buckets_get(stack, heap_size_class(size), set, 0);
}

/* Copy the places of a stack in an open table, and return how many; 0 if it is not there. */
static uint32_t
copy_places(uint32_t stack, uint32_t *places)
{
    const ByteStore *stacks = &heap.tables[stack >> TABLE_BIT].stacks;
    uint32_t id = stack & STACK_MASK;
    if (stacks->slots == NULL || id == 0 || id >= atomic_load(&stacks->used)) {
        return 0;
    }
    const RecordHeader *record = store_record(stacks, id);
    uint32_t size = record_size(record);
    if (size > (MAX_DEPTH + 1) * sizeof(uint32_t)) {
        return 0;
    }
    memcpy(places, record_key(record), size);
    return size / (uint32_t)sizeof(uint32_t);
}

/* Return a stack's number in the current table, to which it is moved; 0 if there is no room. */
static uint32_t
to_current(uint32_t stack)
{
    uint32_t from = stack >> TABLE_BIT, places[MAX_DEPTH + 1];
    if (stack == 0 || from == heap.current) {
        return stack;
    }
    uint32_t depth = copy_places(stack, places);
    for (uint32_t i = 0; i < depth; i++) {
        if (places[i] >= PLACE_FIRST) {
            places[i] = names_move(heap.tables[from].names, heap.tables[heap.current].names,
                                   places[i]);
        }
    }
    return depth != 0 ? intern_stack(heap.current, places, depth) : 0;
}

static void
add_block(Block *block)
{
    bool is_kept = blocks_insert(block);
    heap.lost += !is_kept;
    buckets_add(block->bucket, block->size, is_kept);
}

static bool
is_nearly_full(const Tables *tables)
{
    return store_is_nearly_full(&tables->stacks) || names_are_nearly_full(tables->names);
}

static uint32_t
recorded(const Tables *tables)
{
    return atomic_load(&tables->stacks.count) + names_count(tables->names);
}

/* Return whether room must be made now, although no profile is being read. */
static bool
wants_room(void)
{
    const Tables *current = &heap.tables[heap.current];
    /* A move gains nothing soon after the last one: what was kept then was alive. */
    return !heap.is_asked && (heap.moved != 0 || (is_nearly_full(current) &&
                                                  recorded(current) - heap.kept > FEW_RECORDS));
}

static int
make_room(void *Py_UNUSED(context))
{
    pthread_mutex_lock(&heap.mutex);
    heap.is_asked = false;
    pthread_mutex_unlock(&heap.mutex);
    heap_compact(MOVED_AT_ONCE);
    return 0;
}

static void
on_allocated(void *address, size_t size)
{
    pthread_mutex_lock(&heap.mutex);
    if (heap.on) {
        Block block = {.address = (uintptr_t)address, .size = size, .captured_size = size};
        block.bucket = record_bucket(size);
        add_block(&block);
        if (wants_room()) {
            /* The work needs this interpreter's GIL, and must not be done inside an allocation. */
            heap.is_asked = Py_AddPendingCall(make_room, NULL) == 0;
        }
    }
    pthread_mutex_unlock(&heap.mutex);
}

static void
on_freed(void *address)
{
    pthread_mutex_lock(&heap.mutex);
    Block *block = blocks_find((uintptr_t)address);
    if (block != NULL) {
        buckets_remove(block->bucket, block->size);
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
    if (known != NULL && drawn && size < 2 * known->captured_size) {
        /* While stacks are being moved, a new bucket must have a stack of the current table. */
        const Bucket *owner = buckets_of_block(known->bucket);
        uint32_t bucket = buckets_get(to_current(owner->stack), heap_size_class(size), owner->set,
                                      owner->label);
        buckets_remove(known->bucket, known->size);
        Block block = *known;
        block.bucket = bucket;
        block.size = size;
        if (after == before) {
            *known = block;
            buckets_add(bucket, size, true);
        }
        else {
            block.address = (uintptr_t)after;
            blocks_remove(known);
            add_block(&block);
        }
    }
    else {
        if (known != NULL) {
            buckets_remove(known->bucket, known->size);
            blocks_remove(known);
        }
        if (drawn && heap.on) {
            Block block = {.address = (uintptr_t)after, .size = size, .captured_size = size};
            block.bucket = record_bucket(size);
            add_block(&block);
        }
    }
    pthread_mutex_unlock(&heap.mutex);
}

static const HookSampler hook_sampler = {on_allocated, on_freed, on_resized};

/* Called when a label set dies: from now on its samples have this label. */
static void
on_label_set_death(LabelSet *set, uint32_t label)
{
    pthread_mutex_lock(&heap.mutex);
    buckets_label(set, label);
    pthread_mutex_unlock(&heap.mutex);
}

static void
close_table(uint32_t table)
{
    if (heap.tables[table].stacks.slots != NULL) {
        store_close(&heap.tables[table].stacks);
        names_close(heap.tables[table].names);
    }
}

static bool
open_table(uint32_t table)
{
    heap.tables[table].names = table == 0 ? heap_names : more_heap_names;
    if (names_open(heap.tables[table].names, NAMES_MIB)) {
        if (store_open(&heap.tables[table].stacks, STACK_SLOTS, STACK_UNITS, 1)) {
            heap.tables[table].opened = ++heap.openings;
            return true;
        }
        names_close(heap.tables[table].names);
    }
    return false;
}

static void
clear_tables(void)
{
    buckets_close();
    blocks_close();
    close_table(0);
    close_table(1);
}

static bool
open_tables(void)
{
    heap.current = heap.moved = heap.kept = 0;
    if (open_table(0)) {
        if (blocks_open() && buckets_open()) {
            return true;
        }
        clear_tables();
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
        heap.lost = heap.unreadable = 0;
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
    BucketLosses losses = buckets_losses();
    HeapStats stats = {
        .rate = heap.on ? heap.rate : 0,
        .mallocs = totals.mallocs,
        .frees = totals.frees,
        .total_bytes = totals.bytes,
        .live = blocks_count(),
        .stacks = heap.on ? atomic_load(&heap.tables[heap.current].stacks.count) : 0,
        .lost = heap.lost,
        .unlabelled = heap.on ? losses.unlabelled : 0,
        .unnamed = heap.on ? losses.unnamed : 0,
        .unreadable = heap.unreadable,
    };
    pthread_mutex_unlock(&heap.mutex);
    return stats;
}

PyObject *
heap_read(void)
{
    Row *rows = NULL;
    size_t count = 0;
    bool failed = false;
    /* The GIL is released, so that other threads run while the mutex is waited for. Those that
       sample an allocation during the copy wait for the mutex and hold the GIL. */
    Py_BEGIN_ALLOW_THREADS
    pthread_mutex_lock(&heap.mutex);
    if (heap.on) {
        rows = malloc(((size_t)buckets_count() + 1) * sizeof(Row));
        failed = rows == NULL;
        for (uint32_t i = NO_ROOM; !failed && i < buckets_end(); i++) {
            const Bucket *bucket = buckets_at(i);
            if (bucket != NULL && bucket->alloc_objects != 0) {
                uint64_t label = bucket->set != NULL ? HEAP_PENDING | bucket->set->number
                                                     : bucket->label;
                uint64_t opened = heap.tables[bucket->stack >> TABLE_BIT].opened;
                rows[count++] = (Row){opened << 32 | bucket->stack, bucket->size_class, label,
                                      bucket->alloc_objects, bucket->alloc_bytes, bucket->live_objects,
                                      bucket->live_bytes};
            }
        }
    }
    pthread_mutex_unlock(&heap.mutex);
    Py_END_ALLOW_THREADS
    if (failed) {
        return PyErr_NoMemory();
    }
    PyObject *bytes = PyBytes_FromStringAndSize((const char *)rows,
                                                (Py_ssize_t)(count * sizeof(Row)));
    free(rows);
    return bytes;
}

PyObject *
heap_pending(void)
{
    PyObject *list = PyList_New(0);
    for (uint32_t i = NO_ROOM; list != NULL && heap.on && i < buckets_end(); i++) {
        const Bucket *bucket = buckets_at(i);
        LabelSet *set = bucket != NULL ? bucket->set : NULL;
        if (set == NULL || set->bucket != i || !labels_can_be_asked(set)) {
            continue; /* each set is listed once, at the first of its buckets */
        }
        /* Take the reference first: making the tuple may free label sets. */
        PyObject *kept = Py_NewRef(set);
        list_append_new(&list, Py_BuildValue("(KN)",
                                             (unsigned long long)(HEAP_PENDING | set->number),
                                             kept));
    }
    return list;
}

PyObject *
heap_used_labels(uint32_t end)
{
    PyObject *used = PyBytes_FromStringAndSize(NULL, end);
    if (used == NULL) {
        return NULL;
    }
    char *is_used = PyBytes_AS_STRING(used);
    memset(is_used, 0, end);
    pthread_mutex_lock(&heap.mutex);
    if (heap.on) {
        buckets_drop_labels();
    }
    for (uint32_t i = NO_ROOM; heap.on && i < buckets_end(); i++) {
        const Bucket *bucket = buckets_at(i);
        if (bucket != NULL && bucket->label < end) {
            is_used[bucket->label] = 1;
        }
    }
    pthread_mutex_unlock(&heap.mutex);
    return used;
}

PyObject *
heap_stack(uint64_t numbered)
{
    /* Copy first: making an object may run a finalizer that stops the sampler. */
    uint32_t places[MAX_DEPTH + 1], depth = 0, stack = (uint32_t)numbered;
    if (heap.on && numbered >> 32 == heap.tables[stack >> TABLE_BIT].opened) {
        depth = copy_places(stack, places);
    }
    if (depth == 0) {
        places[depth++] = PLACE_LOST;
    }
    for (uint32_t i = 0; i < depth; i++) {
        if (places[i] >= PLACE_FIRST) {
            places[i] = names_numbered(heap.tables[stack >> TABLE_BIT].names, places[i]);
        }
    }
    return places_tuple(places, depth);
}

static void
move_stack(uint32_t index, uint32_t from)
{
    const Bucket *bucket = buckets_at(index);
    if (bucket == NULL || bucket->stack == 0 || bucket->stack >> TABLE_BIT != from) {
        return;
    }
    buckets_move(index, bucket->live_objects != 0 ? to_current(bucket->stack) : 0);
}

bool
heap_compact(uint32_t limit)
{
    pthread_mutex_lock(&heap.mutex);
    uint32_t other = 1 - heap.current;
    bool is_moving = heap.on && heap.moved != 0;
    if (heap.on && !is_moving && is_nearly_full(&heap.tables[heap.current])) {
        close_table(other); /* its stacks were moved when the tables were last swapped */
        if (open_table(other)) {
            other = heap.current;
            heap.current = 1 - other;
            heap.moved = NO_ROOM + 1;
            is_moving = true;
        }
    }
    for (uint32_t i = 0; is_moving && i < limit; i++) {
        if (heap.moved >= buckets_end()) {
            heap.moved = 0;
            heap.kept = recorded(&heap.tables[heap.current]);
            is_moving = false;
        }
        else {
            move_stack(heap.moved++, other);
        }
    }
    pthread_mutex_unlock(&heap.mutex);
    return is_moving;
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
    heap.on = heap.is_asked = false;
    clear_tables();
    hooks_after_fork_in_child();
    pthread_mutex_unlock(&heap.mutex);
}
