/*
 * The thread states of the main interpreter, in which alone this module runs.
 *
 * The list of them changes without the GIL: PyGILState_Ensure adds to it. So it is
 * walked under its own lock, and a thread's frames only with the GIL held as well.
 * States of other interpreters are never looked at: their GIL is not ours.
 */
#ifndef ASGI_PPROF_THREADS_H
#define ASGI_PPROF_THREADS_H

#include "layout.h"

/* Lock the list of threads; with the GIL. False if somebody else holds it for long. */
bool threads_lock(void);
void threads_unlock(void);

/*
 * Whether all Python code of the process runs under the GIL that the caller holds, and so
 * none does now; while the caller holds it no interpreter with another one can begin.
 */
bool threads_share_our_gil(void);

/* The first state of the list; go on with its `next`. Needs the lock. */
PyThreadState *threads_first(void);

#endif
