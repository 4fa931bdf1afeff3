/*
 * LabelSet, the base of what the labels' context variable holds.
 *
 * A handler cannot keep an object alive, so it notes a set's number. Who wants
 * the labels later asks for the living sets; a set that dies after having been
 * seen in a sample is handed to Python once more, to be written down.
 */
#ifndef ASGI_PPROF_LABELS_H
#define ASGI_PPROF_LABELS_H

#include "layout.h"
#include "reader.h"

typedef struct LabelSet {
    PyObject_HEAD
    uint64_t magic; /* tells it from anything else a context may hold */
    uint64_t number;
    uint32_t pending; /* the number under which samples wait for its label; 0: none do */
    uint32_t label;   /* what it was last written down as */
    struct LabelSet *next, *previous;
} LabelSet;

extern PyTypeObject LabelSet_Type;

/* Learn the variable, and the types a context's mapping is made of. Needs the GIL. */
bool labels_use(PyObject *variable);
/* The function that writes a dying set down: called with (set, number, is it marked). */
void labels_set_writer(PyObject *writer);

/*
 * Call `resolve` with a set's number `pending`, unless that is 0, and its label (0: none) when
 * the set has been written down, and once more before its memory is freed if it has got another
 * such number since. One function, which must not need anything but the GIL.
 */
void labels_on_death(void (*resolve)(uint32_t pending, uint32_t label));

/* The set in a thread's context, copied to `found`; its address, NULL if there is none. */
LabelSet *labels_find(Reader *reader, const PyThreadState *state, LabelSet *found);

/* Note that a sample carries this number; and forget all such notes. */
void labels_mark(uint64_t number);
void labels_clear_marks(void);

/*
 * Whether a set can be asked for its labels: not while it is deallocated, nor once the
 * collector of garbage has begun to take it apart; it has been written down by then.
 */
bool labels_can_be_asked(const LabelSet *set);

/* A new list of all living sets that have been marked. */
PyObject *labels_marked(void);

#endif
