/*
 * Reads what pymalloc has: CPython's allocator of blocks of up to 512 bytes, in arenas.
 *
 * Source: Objects/obmalloc.c, _PyObject_DebugMallocStats.
 */
#ifndef ASGI_PPROF_SMALL_BLOCKS_H
#define ASGI_PPROF_SMALL_BLOCKS_H

#include "layout.h"

/*
 * Arenas can be read some at a time since 3.12. On 3.11 they are private to one file, and
 * CPython's own text about all of them is the only way.
 */
#define SMALL_BLOCKS_IN_STEPS (PY_VERSION_HEX >= 0x030c0000)

#if SMALL_BLOCKS_IN_STEPS

/*
 * Read up to `limit` arenas, from number `first` on. Return a new tuple: the next number, 0 at
 * the end; how many blocks are larger and so malloc's; and bytes of native uint64: the bytes of
 * these arenas, of what has ever been used of them, of their pools with blocks in use, and the
 * blocks in use by size class. None if another allocator is used, which has no arenas. It takes
 * some us an arena, with the GIL.
 */
PyObject *small_blocks_read(uint32_t first, uint32_t limit);

#else

/* Return the text of sys._debugmallocstats(). It takes some us an arena, with the GIL. */
PyObject *small_blocks_text(void);

#endif

#endif
