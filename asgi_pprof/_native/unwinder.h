/*
 * Walks the interpreter frames of one thread, and returns their places, leaf first.
 */
#ifndef ASGI_PPROF_UNWINDER_H
#define ASGI_PPROF_UNWINDER_H

#include "layout.h"
#include "names.h"
#include "reader.h"

#define MAX_DEPTH 128 /* as Go's profstackdepth */

typedef struct {
    uint32_t depth;
    uint32_t places[MAX_DEPTH + 1]; /* one more for PLACE_TRUNCATED */
} Stack;

/*
 * Write the stack of a thread to `stack`. If it cannot be read, return false and write the one
 * place PLACE_UNREADABLE. A thread without a frame has the one place PLACE_NO_FRAME.
 *
 * `state` is the address of the thread's state, which is copied to `copy`. Safe in a signal
 * handler on that thread. Elsewhere that thread must be the calling one and hold the GIL (a
 * trusted reader).
 */
bool unwind(NameTable *names, Reader *reader, const PyThreadState *state, PyThreadState *copy,
            Stack *stack);

/* Return a new tuple of places. They must be a copy, which no garbage collection can free. */
PyObject *places_tuple(const uint32_t *places, uint32_t depth);

#endif
