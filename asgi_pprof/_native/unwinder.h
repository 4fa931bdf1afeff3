/*
 * From a thread's state over its interpreter frames to places, leaf first.
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
 * Give the stack of a thread; false, and the one place PLACE_UNREADABLE, if it
 * cannot be read. A thread without a frame has the place PLACE_NO_FRAME.
 *
 * `state` is where the thread's state is, and `copy` gets what it holds. Safe in
 * a signal handler on the thread itself; else the thread must hold the GIL and
 * be the calling one (a trusted reader).
 */
bool unwind(Reader *reader, const PyThreadState *state, PyThreadState *copy, Stack *stack);

/* A new tuple of places, of which the caller has a copy of its own. */
PyObject *places_tuple(const uint32_t *places, uint32_t depth);

#endif
