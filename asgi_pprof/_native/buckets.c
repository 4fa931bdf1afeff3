#define _GNU_SOURCE
#include "buckets.h"

#include <string.h>

#include "memory.h"

#define MAX_BUCKETS (1u << 15)
#define HEADS (1u << 13)
#define FEW 1024 /* a clean-up that leaves fewer free buckets than this has failed */

static Bucket *buckets;
static uint32_t heads[HEADS];
static uint32_t end, unused, count;
static uint32_t refusals; /* how many requests to refuse before the next clean-up */
static BucketLosses losses;

bool
buckets_open(void)
{
    buckets = memory_map(MAX_BUCKETS * sizeof(Bucket));
    if (buckets == NULL) {
        return false;
    }
    buckets[NO_ROOM].used = true;
    end = NO_ROOM + 1;
    unused = count = refusals = 0;
    losses = (BucketLosses){0, 0};
    return true;
}

void
buckets_close(void)
{
    if (buckets != NULL) {
        for (uint32_t i = NO_ROOM + 1; i < end; i++) {
            if (buckets[i].used && buckets[i].set != NULL) {
                buckets[i].set->bucket = 0;
            }
        }
        memory_unmap(buckets, MAX_BUCKETS * sizeof(Bucket));
        memset(heads, 0, sizeof heads);
        buckets = NULL;
        end = count = 0;
    }
}

static uint32_t *
head_of(const Bucket *bucket)
{
    uint64_t owner = bucket->set != NULL ? bucket->set->number << 1 | 1
                                         : (uint64_t)bucket->label << 1;
    uint64_t hash = ((uint64_t)bucket->stack ^ owner << 32 ^ owner >> 32) * 0x9e3779b97f4a7c15u;
    hash = (hash ^ bucket->size_class) * 0xff51afd7ed558ccdu;
    return &heads[(uint32_t)(hash >> 40) & (HEADS - 1)];
}

static uint32_t
find(const Bucket *wanted)
{
    uint32_t at = *head_of(wanted);
    while (at != 0 &&
           (buckets[at].stack != wanted->stack || buckets[at].size_class != wanted->size_class ||
            buckets[at].set != wanted->set || buckets[at].label != wanted->label)) {
        at = buckets[at].next;
    }
    return at;
}

static void
link_bucket(uint32_t index)
{
    uint32_t *head = head_of(&buckets[index]);
    buckets[index].next = *head;
    *head = index;
}

static void
unlink_bucket(uint32_t index)
{
    uint32_t *at = head_of(&buckets[index]);
    while (*at != index) {
        at = &buckets[*at].next;
    }
    *at = buckets[index].next;
}

static void
release(uint32_t index)
{
    buckets[index] = (Bucket){.next = unused};
    unused = index;
    count--;
    refusals = 0;
}

/* Merge a bucket into another; release it once no live block refers to it. */
static void
merge(uint32_t from, uint32_t into)
{
    Bucket *source = &buckets[from], *target = &buckets[into];
    target->alloc_objects += source->alloc_objects;
    target->alloc_bytes += source->alloc_bytes;
    target->live_objects += source->live_objects;
    target->live_bytes += source->live_bytes;
    source->set = NULL;
    source->merged_into = into;
    if (source->live_objects == 0) {
        release(from);
    }
}

/* Link a bucket whose key has changed, or merge it into the bucket that has this key. */
static void
link_or_merge(uint32_t index)
{
    uint32_t same = find(&buckets[index]);
    if (same != 0) {
        merge(index, same);
    }
    else {
        link_bucket(index);
    }
}

static void
drop_label(uint32_t index)
{
    Bucket *bucket = &buckets[index];
    losses.unlabelled += bucket->alloc_objects;
    unlink_bucket(index);
    bucket->label = 0;
    link_or_merge(index);
}

/* Return whether nothing of a bucket is alive. */
static bool
is_past(const Bucket *bucket)
{
    return bucket->used && bucket->merged_into == 0 && bucket->live_objects == 0;
}

void
buckets_drop_labels(void)
{
    for (uint32_t i = NO_ROOM + 1; i < end; i++) {
        if (is_past(&buckets[i]) && buckets[i].set == NULL && buckets[i].label != 0) {
            drop_label(i);
        }
    }
}

static void
remove_from_set(uint32_t index)
{
    Bucket *bucket = &buckets[index];
    uint32_t next = bucket->next_of_set, previous = bucket->previous_of_set;
    if (next != 0) {
        buckets[next].previous_of_set = previous;
    }
    *(previous != 0 ? &buckets[previous].next_of_set : &bucket->set->bucket) = next;
}

static void
drop_stack(uint32_t index)
{
    losses.unnamed += buckets[index].alloc_objects;
    unlink_bucket(index);
    if (buckets[index].set != NULL) {
        remove_from_set(index);
    }
    merge(index, NO_ROOM);
}

/* Remove the stacks of those past buckets whose bytes are at most the mean of past buckets. */
static void
drop_stacks(void)
{
    uint64_t bytes = 0, past = 0;
    for (uint32_t i = NO_ROOM + 1; i < end; i++) {
        if (is_past(&buckets[i])) {
            bytes += buckets[i].alloc_bytes;
            past++;
        }
    }
    for (uint32_t i = NO_ROOM + 1; i < end && past != 0; i++) {
        if (is_past(&buckets[i]) && buckets[i].alloc_bytes <= bytes / past) {
            drop_stack(i);
        }
    }
}

static uint32_t
new_bucket(void)
{
    if (unused == 0 && end == MAX_BUCKETS) {
        if (refusals > 0) {
            refusals--;
            return 0;
        }
        buckets_drop_labels();
        if (count > MAX_BUCKETS - FEW) {
            drop_stacks();
        }
        if (count > MAX_BUCKETS - FEW) {
            refusals = MAX_BUCKETS;
        }
    }
    uint32_t index = unused;
    if (index != 0) {
        unused = buckets[index].next;
    }
    else if (end < MAX_BUCKETS) {
        index = end++;
    }
    count += index != 0;
    return index;
}

uint32_t
buckets_get(uint32_t stack, uint64_t size_class, LabelSet *set, uint32_t label)
{
    Bucket wanted = {.stack = stack, .size_class = size_class, .set = set, .label = label,
                     .used = true};
    uint32_t index = stack == 0 ? NO_ROOM : find(&wanted);
    if (index != 0) {
        return index;
    }
    index = new_bucket();
    if (index == 0) {
        return NO_ROOM;
    }
    if (set != NULL) {
        wanted.next_of_set = set->bucket;
        if (set->bucket != 0) {
            buckets[set->bucket].previous_of_set = index;
        }
        set->bucket = index;
    }
    buckets[index] = wanted;
    link_bucket(index);
    return index;
}

const Bucket *
buckets_of_block(uint32_t bucket)
{
    while (buckets[bucket].merged_into != 0) {
        bucket = buckets[bucket].merged_into;
    }
    return &buckets[bucket];
}

void
buckets_add(uint32_t bucket, uint64_t size, bool is_alive)
{
    losses.unnamed += bucket == NO_ROOM;
    buckets[bucket].alloc_objects++;
    buckets[bucket].alloc_bytes += size;
    if (is_alive) {
        buckets[bucket].live_objects++;
        buckets[bucket].live_bytes += size;
    }
}

void
buckets_remove(uint32_t bucket, uint64_t size)
{
    for (;;) {
        Bucket *each = &buckets[bucket];
        uint32_t into = each->merged_into;
        each->live_objects--;
        each->live_bytes -= size;
        if (into == 0) {
            return;
        }
        if (each->live_objects == 0) {
            release(bucket);
        }
        bucket = into;
    }
}

void
buckets_label(LabelSet *set, uint32_t label)
{
    uint32_t index = set->bucket;
    set->bucket = 0;
    while (index != 0) {
        uint32_t next = buckets[index].next_of_set;
        unlink_bucket(index);
        buckets[index].set = NULL;
        buckets[index].label = label;
        buckets[index].next_of_set = buckets[index].previous_of_set = 0;
        link_or_merge(index);
        index = next;
    }
}

void
buckets_move(uint32_t bucket, uint32_t stack)
{
    if (stack == 0) {
        drop_stack(bucket);
    }
    else {
        /* A bucket that is going to be merged must leave its set's list; others stay in it. */
        unlink_bucket(bucket);
        buckets[bucket].stack = stack;
        if (buckets[bucket].set != NULL && find(&buckets[bucket]) != 0) {
            remove_from_set(bucket);
        }
        link_or_merge(bucket);
    }
}

const Bucket *
buckets_at(uint32_t index)
{
    const Bucket *bucket = &buckets[index];
    return bucket->used && bucket->merged_into == 0 ? bucket : NULL;
}

uint32_t
buckets_end(void)
{
    return end;
}

uint32_t
buckets_count(void)
{
    return count;
}

BucketLosses
buckets_losses(void)
{
    return losses;
}
