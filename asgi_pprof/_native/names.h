/*
 * Places in code, kept by number: (qualified name, file, first line, line).
 *
 * Names are copied the first time a place is seen, while the code object is
 * certainly alive; nothing here refers to an object. One table for the process:
 * it holds what both samplers have seen, as long as the process lives, in at
 * most 64 MiB of address space of which only what is used is ever touched.
 */
#ifndef ASGI_PPROF_NAMES_H
#define ASGI_PPROF_NAMES_H

#include "layout.h"
#include "reader.h"

/* Places that are no code. */
enum {
    PLACE_NONE,
    PLACE_TRUNCATED,  /* outer frames not recorded */
    PLACE_UNREADABLE, /* the stack could not be read */
    PLACE_NO_FRAME,   /* no Python frame at all */
    PLACE_LOST,       /* the table is full */
    PLACE_HIDDEN,     /* a frame that CPython does not show either */
    PLACE_FIRST = 16, /* the first that is code */
};

/* Begin to keep places; pair with names_close. Needs the GIL. False without memory. */
bool names_open(void);
void names_close(void);

/*
 * The place of a frame; PLACE_NONE if that is no code object, PLACE_HIDDEN if the frame
 * is not complete (pycore_frame.h, _PyFrame_IsIncomplete). Safe in a signal handler.
 */
uint32_t names_place(Reader *reader, PyCodeObject *code, const char *instruction);

/* A new tuple (name, file, first line, line); ValueError if the place is no code's. */
PyObject *names_describe(unsigned long place);

/* How many names did not fit. */
uint32_t names_refused(void);

#endif
