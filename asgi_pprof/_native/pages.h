/*
 * Tells how much of some memory is in RAM.
 *
 * mincore(2) looks at page tables only, 64 MiB at a time. smaps(5) looks at every page and holds
 * the lock of the address space meanwhile: 2 GiB take 4 ms with mincore, and 50 to 500 ms with
 * smaps, in which no thread could map memory (measured).
 */
#ifndef ASGI_PPROF_PAGES_H
#define ASGI_PPROF_PAGES_H

#include <stddef.h>

/* Return how many bytes of this memory, which begins with a page, are in RAM. What is not mapped
   is not in RAM. */
size_t pages_resident(const void *memory, size_t size);

#endif
