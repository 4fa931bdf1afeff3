/*
 * What asyncio keeps where Python cannot read it: tasks and running loops.
 *
 * From CPython 3.14 on tasks are linked in lists of the thread that made them,
 * and those of ended threads in one of the interpreter. The place of the link in
 * a task is private to _asynciomodule.c, so it is measured: a task just made is
 * the last of its thread's list, and the link lies within it. What the lists say
 * of themselves is checked as they are walked; where they are not as expected
 * there is no answer, and Python's own registries serve.
 *
 * All of this needs the GIL, under which alone lists and loops change,
 * and the lock of the list of threads, for which nobody is waited for long.
 *
 * Source: Modules/_asynciomodule.c, register_task, set_running_loop;
 * InternalDocs/asyncio.md.
 */
#ifndef ASGI_PPROF_ASYNCIO_STATE_H
#define ASGI_PPROF_ASYNCIO_STATE_H

#include "layout.h"

/* Learn where tasks are linked from one just made in this thread; false if it cannot be told. */
bool asyncio_learn(PyObject *task);

/*
 * A list of all registered tasks that live, of all threads; None where they are
 * not in lists, the lists are not known, or are not sound.
 */
PyObject *asyncio_tasks(void);

/*
 * [(thread, loop, task or None)]: the loop each thread runs. None where it cannot
 * be told; `own` is what the calling thread runs, or None, by which that is known.
 * Tasks from 3.14 on.
 */
PyObject *asyncio_running_loops(PyObject *own);

#endif
