/* Building Python lists. */
#ifndef ASGI_PPROF_LISTS_H
#define ASGI_PPROF_LISTS_H

#include "layout.h"

/*
 * Append an item that the caller has just made, and drop the caller's reference to it. The
 * list becomes NULL, with an exception set, if the item is NULL or there is no memory.
 */
static inline void
list_append_new(PyObject **list, PyObject *item)
{
    if (item == NULL || PyList_Append(*list, item) < 0) {
        Py_CLEAR(*list);
    }
    Py_XDECREF(item);
}

#endif
