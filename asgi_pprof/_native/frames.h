/*
 * Reads the stacks of threads and coroutines from their interpreter frames, under the GIL.
 *
 * No frame object is made: making one may collect garbage (CPython 3.11), whose finalizers let
 * other threads run, and by then the frame may have ended. All frames of one moment are copied
 * into memory of our own, with references of our own, before any Python object is made of them.
 * No other code runs in between.
 *
 * Sources: Python/pystate.c, _PyThread_CurrentFrames; Include/internal/pycore_frame.h;
 * Python/ceval.c, which says when a frame may be read.
 */
#ifndef ASGI_PPROF_FRAMES_H
#define ASGI_PPROF_FRAMES_H

#include "layout.h"

/* The stacks of threads by thread number: a mapping, which the garbage collector does not track. */
extern PyTypeObject ThreadStacks_Type;
/* The stack of one thread. */
extern PyTypeObject ThreadStack_Type;

/* The following are functions of the Python module, so their first argument is the module. */

/*
 * current_frames(idents=None, depth=129, locals_of=()): return a new ThreadStacks of the
 * threads that run Python code now. It is empty if the list of threads stays locked.
 *
 * Args:
 *   idents: A sequence of the threads' numbers; None for all.
 *   depth: How many frames of each are kept, from the innermost one on.
 *   locals_of: A tuple of tuples (code, name, ...). Of each thread, the innermost frame that
 *     runs one of these codes is found, and the values of the named variables are kept.
 */
PyObject *frames_current(PyObject *module, PyObject *args, PyObject *kwargs);

/*
 * running_frames(coroutine): return ((code, offset), ...) of a running coroutine, from the
 * innermost frame to its own; () if it does not run.
 */
PyObject *frames_running(PyObject *module, PyObject *coroutine);

/* generator_frame(generator or coroutine): return (code, offset); None if it has ended. */
PyObject *frames_of_generator(PyObject *module, PyObject *generator);

/* awaited(generator or coroutine): return the awaited object; None if it is not suspended there. */
PyObject *frames_awaited(PyObject *module, PyObject *generator);

/* generator_local(generator, name): return a variable's value; None if unset or unknown. */
PyObject *frames_generator_local(PyObject *module, PyObject *args);

#endif
