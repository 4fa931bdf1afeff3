/*
 * Reads what glibc's malloc has: its arenas, and what is free in them.
 *
 * mallinfo2 would say it, but holds each arena's lock while it visits every free chunk, at 1 us
 * and more each: 0.4 to 1 s for 250,000 (measured), in which all threads that need the lock
 * stand still, with the GIL if they have it. So the lists of free chunks are followed here
 * without any lock, by copies that fail where there is no memory.
 *
 * The layout of malloc's own structures is private, but these facts are old: an arena has 127
 * circular lists of free chunks in a row, each list's head is two pointers, and an empty list's
 * point to its head. The pointer to the arena's last chunk, which is free too, stands two words
 * before the first head. Only an arena in which all that holds is read.
 *
 * Source: glibc, malloc/malloc.c, malloc_chunk and malloc_state; malloc/arena.c, heap_info.
 */
#ifndef ASGI_PPROF_MALLOC_ARENAS_H
#define ASGI_PPROF_MALLOC_ARENAS_H

#include "layout.h"

/* Heaps of arenas other than the first begin at multiples of this. */
#define MALLOC_HEAP_ALIGNMENT ((uintptr_t)64 << 20)

/*
 * Return a new tuple: bytes that are free in all arenas; bytes in blocks that malloc has mapped
 * for themselves; whether all free chunks were counted, which at most `limit` are; and bytes of
 * native uint64, the start and the size of each heap of arenas other than the first. Tcaches and
 * fast bins, which have little, are not counted. It takes 1 us a free chunk, without the GIL.
 *
 * None if malloc is another one, or its structures are not as expected.
 *
 * Args:
 *     candidates: Native uint64: multiples of MALLOC_HEAP_ALIGNMENT in writable mappings.
 */
PyObject *malloc_arenas_read(const uint64_t *candidates, size_t count, uint32_t limit);

#endif
