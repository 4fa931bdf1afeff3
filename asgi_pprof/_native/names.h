/*
 * Numbers places in code: (qualified name, file, first line, line).
 *
 * Names are copied the first time a place is seen, when its code object is certainly alive, so
 * a table refers to no object. Each sampler has its own tables, which last as long as its
 * samples. A table reserves address space, and touches only as much as it uses.
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
    PLACE_SKIPPED,    /* no stack was taken, since earlier samples had cost too much CPU */
    PLACE_LATE,       /* the signal came long after the time was used */
    PLACE_FIRST = 16, /* the first that is in code */
};

typedef struct NameTable NameTable;
extern NameTable *const cpu_names, *const heap_names, *const more_heap_names;

/*
 * Start to number places in this much address space, a power of two up to 64; pair with
 * names_close. Both need the GIL. False without memory.
 */
bool names_open(NameTable *table, uint32_t mebibytes);
void names_close(NameTable *table);

/*
 * Return the place of a frame: PLACE_NONE if `code` is no code object, PLACE_HIDDEN if the
 * frame is incomplete (pycore_frame.h, _PyFrame_IsIncomplete). Safe in a signal handler.
 */
uint32_t names_place(NameTable *table, Reader *reader, PyCodeObject *code,
                     const char *instruction);

/* Return the number of a place and its table, for names_describe. A place in cpu_names is its own
   number. */
uint32_t names_numbered(const NameTable *table, uint32_t place);

/*
 * Return a new tuple (name, file, first line, line); ValueError if the place is not in code. The
 * line is 0 if it is not known, because the code had thousands of lines and has been freed.
 */
PyObject *names_describe(unsigned long numbered);

/* Return the same place in another table; PLACE_LOST if that table is full. Needs the GIL. */
uint32_t names_move(NameTable *from, NameTable *to, uint32_t place);

void names_after_fork_in_child(void);

uint32_t names_count(const NameTable *table);

/* Return whether the table will soon be full. */
bool names_are_nearly_full(const NameTable *table);

#endif
