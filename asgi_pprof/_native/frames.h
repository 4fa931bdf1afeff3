/*
 * Where threads and coroutines are, read from interpreter frames under the GIL.
 *
 * No frame object is made: making one may collect garbage (CPython 3.11), whose
 * finalizers let other threads run, and the frame it is for may be gone by then.
 * All of a moment is copied into memory of our own, with references of our own, before
 * the first Python object is made of it; nothing in between runs anybody's code.
 *
 * Sources: Python/pystate.c, _PyThread_CurrentFrames; Include/internal/pycore_frame.h;
 * Python/ceval.c, which says when a frame may be read.
 */
#ifndef ASGI_PPROF_FRAMES_H
#define ASGI_PPROF_FRAMES_H

#include "layout.h"

/* What threads were at, by their number: a mapping, not tracked by the garbage collector. */
extern PyTypeObject ThreadStacks_Type;
/* One of them. */
extern PyTypeObject ThreadStack_Type;

/*
 * A new ThreadStacks of the threads that run Python code now; empty if the list of
 * threads stays locked.
 *
 * Args:
 *   idents: A sequence of the threads' numbers; None for all.
 *   depth: How many frames of each are kept, from the innermost one on.
 *   locals_of: A tuple of tuples (code, name, ...): of the innermost frame of one of
 *     these codes the values of these variables are kept.
 */
PyObject *frames_current(PyObject *idents, Py_ssize_t depth, PyObject *locals_of);

/* [(code, offset)] of a coroutine that runs: the frames from the innermost to its own; else (). */
PyObject *frames_running(PyObject *coroutine, Py_ssize_t depth);

/* (code, offset) of a generator or coroutine; None if it has ended. */
PyObject *frames_of_generator(PyObject *generator);

/* A new reference to what a suspended generator or coroutine awaits; None if it does not. */
PyObject *frames_awaited(PyObject *generator);

/* The value of a variable of a generator or coroutine; None if it is unset or there is none. */
PyObject *frames_generator_local(PyObject *generator, PyObject *name);

#endif
