/*
 * Memory of our tables, apart from any allocator that is sampled: mapped, and counted.
 *
 * A mapping is address space until it is used, so the tables may be reserved for their maximum.
 */
#ifndef ASGI_PPROF_MEMORY_H
#define ASGI_PPROF_MEMORY_H

#include <stddef.h>

/* Return zeros; NULL without memory. */
void *memory_map(size_t size);
void memory_unmap(void *memory, size_t size);

/* Return how many bytes of all that is mapped are resident. */
size_t memory_resident(void);

void memory_before_fork(void);
void memory_after_fork(void);

#endif
