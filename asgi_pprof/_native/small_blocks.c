#define _GNU_SOURCE
#include "small_blocks.h"

#if SMALL_BLOCKS_IN_STEPS

#include <internal/pycore_obmalloc.h>

typedef struct {
    uint64_t bytes, touched_bytes, used_bytes;
    uint64_t blocks[NB_SMALL_SIZE_CLASSES];
} Usage;

static void
add_arena(Usage *usage, const struct arena_object *arena)
{
    /* The first pool is aligned, and all pools before `pool_address` have been used. */
    uintptr_t pool = _Py_SIZE_ROUND_UP(arena->address, POOL_SIZE);
    uintptr_t end = (uintptr_t)arena->pool_address;
    usage->bytes += ARENA_SIZE;
    usage->touched_bytes += end - arena->address;
    for (; pool < end; pool += POOL_SIZE) {
        const struct pool_header *header = (const struct pool_header *)pool;
        if (header->ref.count != 0) {
            usage->used_bytes += POOL_SIZE;
            usage->blocks[header->szidx] += header->ref.count;
        }
    }
}

PyObject *
small_blocks_read(uint32_t first, uint32_t limit)
{
    Usage usage = {0};
#if PY_VERSION_HEX >= 0x030d0000
    const struct _obmalloc_state *state = PyInterpreterState_Main()->obmalloc;
    if (state == NULL || _PyRuntime.preconfig.allocator >= PYMEM_ALLOCATOR_MIMALLOC) {
        Py_RETURN_NONE;
    }
#else
    const struct _obmalloc_state *state = &PyInterpreterState_Main()->obmalloc;
#endif
    uint32_t end = state->mgmt.maxarenas;
    bool is_last = first > end || end - first <= limit;
    if (!is_last) {
        end = first + limit;
    }
    for (uint32_t i = first; i < end; i++) {
        if (state->mgmt.arenas[i].address != 0) {
            add_arena(&usage, &state->mgmt.arenas[i]);
        }
    }
    return Py_BuildValue("(Iny#)", is_last ? 0 : end, state->mgmt.raw_allocated_blocks, &usage,
                         (Py_ssize_t)sizeof usage);
}

#else

#include <stdio.h>
#include <stdlib.h>

#include <internal/pycore_pymem.h>

PyObject *
small_blocks_text(void)
{
    char *text = NULL;
    size_t size = 0;
    FILE *file = open_memstream(&text, &size);
    if (file == NULL) {
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    /* It writes nothing if objects come from another allocator, such as a hook. Objects are
       made with the GIL, the only one on 3.11, so none is made meanwhile. */
    PyMemAllocatorEx current;
    _PyMem_SetDefaultAllocator(PYMEM_DOMAIN_OBJ, &current);
#ifdef WITH_PYMALLOC
    _PyObject_DebugMallocStats(file);
#endif
    PyMem_SetAllocator(PYMEM_DOMAIN_OBJ, &current);
    fclose(file);
    PyObject *string = PyUnicode_DecodeLatin1(text, (Py_ssize_t)size, NULL);
    free(text);
    return string;
}

#endif
