/*
 * Maps and counts the memory of our tables, which comes from no allocator that is sampled.
 *
 * An unused page of a mapping takes no memory, so tables are reserved at their maximum size.
 */
#ifndef ASGI_PPROF_MEMORY_H
#define ASGI_PPROF_MEMORY_H

#include <stddef.h>

/* Return new memory, all zeros; NULL if there is none. */
void *memory_map(size_t size);
void memory_unmap(void *memory, size_t size);

/* Return how many bytes of all that is mapped are resident. */
size_t memory_resident(void);

void memory_before_fork(void);
void memory_after_fork(void);

#endif
