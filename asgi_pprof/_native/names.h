/*
 * Numbers places in code: (qualified name, file, first line, line).
 *
 * Names are copied the first time a place is seen, when its code object is certainly alive, so
 * the table refers to no object. Both samplers share one table, which lasts as long as the
 * process. It reserves 64 MiB of address space, and touches only as much as it uses.
 */
#ifndef ASGI_PPROF_NAMES_H
#define ASGI_PPROF_NAMES_H

#include "layout.h"
#include "reader.h"

/* Places that are not in code. */
enum {
    PLACE_NONE,
    PLACE_TRUNCATED,  /* outer frames not recorded */
    PLACE_UNREADABLE, /* the stack could not be read */
    PLACE_NO_FRAME,   /* no Python frame at all */
    PLACE_LOST,       /* the table is full */
    PLACE_HIDDEN,     /* a frame that CPython does not show either */
    PLACE_FIRST = 16, /* the first that is in code */
};

/* Start to number places; pair with names_close. Needs the GIL. False without memory. */
bool names_open(void);
void names_close(void);

/*
 * Return the place of a frame: PLACE_NONE if `code` is no code object, PLACE_HIDDEN if the
 * frame is incomplete (pycore_frame.h, _PyFrame_IsIncomplete). Safe in a signal handler.
 */
uint32_t names_place(Reader *reader, PyCodeObject *code, const char *instruction);

/* Return a new tuple (name, file, first line, line); ValueError if the place is not in code. */
PyObject *names_describe(unsigned long place);

/* Return how many names the table had no room for. */
uint32_t names_refused(void);

#endif
