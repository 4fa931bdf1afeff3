/*
 * LabelSet, the base class of the label sets in the labels' context variable.
 *
 * A signal handler cannot keep an object alive, so a sample has the number of its label set.
 * Labels of living sets are read when the profile is read. A set that dies after it was sampled
 * is first passed to a Python function, which stores its labels.
 */
#ifndef ASGI_PPROF_LABELS_H
#define ASGI_PPROF_LABELS_H

#include "layout.h"
#include "reader.h"

typedef struct LabelSet {
    PyObject_HEAD
    uint64_t magic; /* tells a label set from anything else a context may hold */
    uint64_t number;
    uint32_t bucket; /* the first memory bucket that waits for this set's label; 0: none waits */
    uint32_t label;  /* the label that the set was last stored under; 0: none */
    struct LabelSet *next, *previous;
} LabelSet;

extern PyTypeObject LabelSet_Type;

/* Learn the variable, and the types of a context's mapping. Needs the GIL. */
bool labels_use(PyObject *variable);
/*
 * Set the function that stores the labels of a dying set. It is called with (set, number, whether
 * the set is marked, whether memory samples wait for its label), and returns that label.
 */
void labels_set_writer(PyObject *writer);

/*
 * Register the function to call when a set with a bucket has been stored under a label. It is
 * called again before the set's memory is freed, if the set has been given a bucket since. The
 * calls come during a deallocation, with the GIL held. There is only one such function.
 */
void labels_on_death(void (*callback)(LabelSet *set, uint32_t label));

/* Copy the set of a thread's context to `found`, and return its address; NULL for none. */
LabelSet *labels_find(Reader *reader, const PyThreadState *state, LabelSet *found);

/* Start and stop marking sets; false without memory. A set that dies unmarked is not stored. */
bool labels_open_marks(void);
void labels_close_marks(void);

/* Mark the set with this number, because a sample has the number; false if too many are marked. */
bool labels_mark(uint64_t number);

/*
 * Return whether a set's labels can be read. They cannot during its deallocation, nor once the
 * garbage collector has begun to clear it; but by then they have been stored already.
 */
bool labels_can_be_asked(const LabelSet *set);

/* Return a new list of all living sets that are marked. */
PyObject *labels_marked(void);

#endif
