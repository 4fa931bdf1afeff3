/*
 * The thread states of the main interpreter, the only one this module runs in.
 *
 * PyGILState_Ensure adds to the list of thread states without the GIL, so the list is walked
 * under its own lock. A thread's frames are read only with the GIL held as well. States of
 * other interpreters are never read: the GIL that guards them is not ours.
 */
#ifndef ASGI_PPROF_THREADS_H
#define ASGI_PPROF_THREADS_H

#include "layout.h"

/* Lock the list of thread states; needs the GIL. False if another thread keeps it locked. */
bool threads_lock(void);
void threads_unlock(void);

/*
 * Return whether all interpreters share the GIL that the caller holds, so that no other thread
 * runs Python code now. While the caller holds it, no interpreter with another GIL can start.
 */
bool threads_share_our_gil(void);

/* Return the first state of the list; its `next` is the second. Needs the lock. */
PyThreadState *threads_first(void);

#endif
