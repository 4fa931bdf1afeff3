/*
 * LabelSet, the base class of the label sets in the labels' context variable.
 *
 * A signal handler cannot keep an object alive, so a sample has the number of its label set.
 * Whoever wants the labels later asks the living sets. A set that dies after it was sampled is
 * passed to Python first, which stores its labels.
 */
#ifndef ASGI_PPROF_LABELS_H
#define ASGI_PPROF_LABELS_H

#include "layout.h"
#include "reader.h"

typedef struct LabelSet {
    PyObject_HEAD
    uint64_t magic; /* tells a label set from anything else a context may hold */
    uint64_t number;
    uint32_t bucket; /* the first of the memory samples that wait for its label; 0: none do */
    uint32_t label;  /* the label it was last stored under; 0: none */
    struct LabelSet *next, *previous;
} LabelSet;

extern PyTypeObject LabelSet_Type;

/* Learn the variable, and the types of a context's mapping. Needs the GIL. */
bool labels_use(PyObject *variable);
/*
 * Set the function that stores a dying set: it is called with (set, number, is it marked, do
 * memory samples wait for it), and returns the label of those.
 */
void labels_set_writer(PyObject *writer);

/*
 * Register the function to call when a set with a bucket has been stored under a label. It is
 * called again before the set's memory is freed, if the set has been given a bucket since. With
 * the GIL, in the middle of a deallocation. There is only one.
 */
void labels_on_death(void (*callback)(LabelSet *set, uint32_t label));

/* Copy the set of a thread's context to `found`, and return its address; NULL for none. */
LabelSet *labels_find(Reader *reader, const PyThreadState *state, LabelSet *found);

/* Start and stop to mark sets; false without memory. A set that dies unmarked is forgotten. */
bool labels_open_marks(void);
void labels_close_marks(void);

/* Mark a set, by its number, because a sample has that number; false if there are too many. */
bool labels_mark(uint64_t number);

/*
 * Return whether a set can be asked for its labels. It cannot while it is deallocated, nor once
 * the garbage collector has begun to take it apart; but then it has been stored already.
 */
bool labels_can_be_asked(const LabelSet *set);

/* Return a new list of all living sets that are marked. */
PyObject *labels_marked(void);

#endif
