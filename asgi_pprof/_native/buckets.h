/*
 * Adds up sampled allocations, and those still alive, by stack, size class and label. There is
 * one table for the process; the heap sampler's lock guards all of it.
 *
 * A bucket's label is known when its label set has died. Until then the bucket belongs to the
 * set. The set lists its buckets, so that its death takes time for these buckets only.
 *
 * The table is bounded. When it is full, buckets of which nothing is alive lose their labels. If
 * that frees too little, those whose bytes are at most the mean lose their stacks. Sums are kept.
 */
#ifndef ASGI_PPROF_BUCKETS_H
#define ASGI_PPROF_BUCKETS_H

#include "labels.h"

#define NO_ROOM 1 /* the bucket of allocations for which there is no room; its stack is 0 */

typedef struct {
    uint32_t stack, label;
    LabelSet *set; /* NULL once the label is known */
    uint64_t size_class;
    uint64_t alloc_objects, alloc_bytes, live_objects, live_bytes;
    uint32_t next;        /* the next bucket with this hash, or the next unused one */
    uint32_t next_of_set, previous_of_set;
    uint32_t merged_into; /* not 0: this one counts only the live blocks that refer to it */
    bool used;
} Bucket;

typedef struct {
    uint64_t unlabelled; /* allocations that lost their labels */
    uint64_t unnamed;    /* allocations that lost their stacks or got no bucket */
} BucketLosses;

/* Start with an empty table; false without memory. */
bool buckets_open(void);
void buckets_close(void);

/* Return the bucket with this key: `set`, or `label` if `set` is NULL. Make it if there is none;
   return NO_ROOM if the table is full. */
uint32_t buckets_get(uint32_t stack, uint64_t size_class, LabelSet *set, uint32_t label);

/* Return a block's bucket, or the bucket that it was merged into. */
const Bucket *buckets_of_block(uint32_t bucket);

/* Count an allocation, and a live block if `is_alive`; count the end of a live block. */
void buckets_add(uint32_t bucket, uint64_t size, bool is_alive);
void buckets_remove(uint32_t bucket, uint64_t size);

/* Give a dead set's buckets their label. */
void buckets_label(LabelSet *set, uint32_t label);

/* Remove the labels of all buckets of which nothing is alive. */
void buckets_drop_labels(void);

/* Change a bucket's stack; merge it into the bucket that has the new key, if there is one. With
   stack 0, merge it into NO_ROOM. */
void buckets_move(uint32_t bucket, uint32_t stack);

/* Return the bucket at an index below `buckets_end`; NULL if it is unused or merged. */
const Bucket *buckets_at(uint32_t index);
uint32_t buckets_end(void);
uint32_t buckets_count(void);

BucketLosses buckets_losses(void);

#endif
