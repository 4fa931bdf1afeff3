/*
 * Reads state of asyncio that Python code cannot read: tasks and running loops.
 *
 * From CPython 3.14 on each thread's state has a linked list of the tasks made in that thread,
 * and the interpreter has one of the tasks of ended threads. The offset of the link in a task
 * is private to _asynciomodule.c, so it is measured: a task that has just been made is the last
 * one of its thread's list, and the link lies within it. The lists are checked while they are
 * walked. If one is not as expected, the result is None, and the caller uses Python's own
 * registries.
 *
 * The functions need the GIL, which guards lists and loops. They take the lock of the list of
 * threads, and never wait long for it.
 *
 * Source: Modules/_asynciomodule.c, register_task, set_running_loop;
 * InternalDocs/asyncio.md.
 */
#ifndef ASGI_PPROF_ASYNCIO_STATE_H
#define ASGI_PPROF_ASYNCIO_STATE_H

#include "layout.h"

/* Learn the offset of the link from a task just made in this thread; false if that fails. */
bool asyncio_learn(PyObject *task);

/*
 * Return a list of all registered living tasks, of all threads; None if CPython does not link
 * tasks, if asyncio_learn has not succeeded, or if a list is not as expected.
 */
PyObject *asyncio_tasks(void);

/*
 * Return the loop that each thread runs: [(thread, loop, task or None)], with tasks from 3.14
 * on. `own` is the loop of the calling thread or None: if that is not what the thread's state
 * says, the state is not as expected, and the result is None.
 */
PyObject *asyncio_running_loops(PyObject *own);

#endif
