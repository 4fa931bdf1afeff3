/*
 * The sampled allocations, added up by stack, size class and label, with those still alive. One
 * table for the process; the heap sampler's lock guards all of it.
 *
 * A bucket's label is known when its label set has died. Until then the bucket belongs to the
 * set, which lists its buckets, so that the end of a set costs no more than the set has used.
 *
 * The table is bounded. When it is full, allocations of which nothing is alive give up their
 * labels, then, the smaller half of them, their stacks; their sums stay.
 */
#ifndef ASGI_PPROF_BUCKETS_H
#define ASGI_PPROF_BUCKETS_H

#include "labels.h"

#define NO_ROOM 1 /* the bucket of all for which there is no other; it has stack 0 */

typedef struct {
    uint32_t stack, label;
    LabelSet *set; /* NULL once the label is known */
    uint64_t size_class;
    uint64_t alloc_objects, alloc_bytes, live_objects, live_bytes;
    uint32_t next;        /* the next with this hash, or the next unused one */
    uint32_t next_of_set, previous_of_set;
    uint32_t merged_into; /* then only the live blocks that still refer to it are counted */
    bool used;
} Bucket;

typedef struct {
    uint64_t unlabelled; /* allocations that gave up their labels */
    uint64_t unnamed;    /* allocations that gave up their stacks, and those without a bucket */
} BucketLosses;

/* Start with an empty table; false without memory. */
bool buckets_open(void);
void buckets_close(void);

/* Return the bucket of a set, or of a label if `set` is NULL; a new one, or NO_ROOM. */
uint32_t buckets_get(uint32_t stack, uint64_t size_class, LabelSet *set, uint32_t label);

/* Return the bucket that has what a block's bucket had: another one if that was merged. */
const Bucket *buckets_of_block(uint32_t bucket);

/* Count an allocation, and if it is alive, a block; and the end of a block. */
void buckets_add(uint32_t bucket, uint64_t size, bool is_alive);
void buckets_remove(uint32_t bucket, uint64_t size);

/* Give a dead set's buckets their label. */
void buckets_label(LabelSet *set, uint32_t label);

/* Take the labels from all allocations of which nothing is alive. */
void buckets_drop_labels(void);

/* Change a bucket's stack, and merge it with the one that has the new stack, if there is one. */
void buckets_move(uint32_t bucket, uint32_t stack);

/* Return the bucket at an index below `buckets_end`; NULL if it is not used or merged. */
const Bucket *buckets_at(uint32_t index);
uint32_t buckets_end(void);
uint32_t buckets_count(void);

BucketLosses buckets_losses(void);

#endif
