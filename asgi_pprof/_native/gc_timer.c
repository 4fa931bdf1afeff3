#include "gc_timer.h"

#include <structmember.h>

#include "clocks.h"
#include "lists.h"

#define RING 256 /* as Go's PauseNs and PauseEnd */
#define GENERATIONS 3
#define SLOTS 7 /* the last minute, and the slot that is being filled */
#define SLOT_NS 10000000000u
#define SHORTEST_BITS 6 /* all below 128 ns are rounded up to that at most */
#define DIVISION_BITS 3  /* each doubling of the duration has eight buckets */
#define BUCKETS (32u << DIVISION_BITS)

typedef struct {
    uint64_t duration_ns, ended_ns;
} Pause;

/* The pauses of one generation in one slot of time, by duration. */
typedef struct {
    uint64_t slot, longest_ns;
    uint32_t counts[BUCKETS];
} Histogram;

typedef struct {
    PyObject_HEAD
    uint64_t started_ns; /* 0: no collection is being timed */
    uint64_t count, total_ns, last_end_ns;
    Pause pauses[RING];
    Histogram recent[GENERATIONS][SLOTS];
} GcTimer;

static unsigned
bucket_of(uint64_t ns)
{
    unsigned bits = 63 - (unsigned)__builtin_clzll(ns | 1 << SHORTEST_BITS);
    unsigned part = (unsigned)(ns >> (bits - DIVISION_BITS)) & ((1 << DIVISION_BITS) - 1);
    unsigned bucket = (bits - SHORTEST_BITS) << DIVISION_BITS | part;
    return bucket < BUCKETS ? bucket : BUCKETS - 1;
}

/* Return the duration that is longer than all in a bucket. */
static uint64_t
bucket_end(unsigned bucket)
{
    unsigned doublings = bucket >> DIVISION_BITS;
    uint64_t part = bucket & ((1 << DIVISION_BITS) - 1);
    return (part + (1 << DIVISION_BITS) + 1) << (doublings + SHORTEST_BITS - DIVISION_BITS);
}

static void
add_recent(GcTimer *timer, PyObject *info, uint64_t now_ns, uint64_t duration_ns)
{
    PyObject *number = PyDict_Check(info) ? PyDict_GetItemString(info, "generation") : NULL;
    long generation = number != NULL && PyLong_Check(number) ? PyLong_AsLong(number) : -1;
    if (generation < 0 || generation >= GENERATIONS) {
        PyErr_Clear();
        return;
    }
    uint64_t slot = now_ns / SLOT_NS;
    Histogram *histogram = &timer->recent[generation][slot % SLOTS];
    if (histogram->slot != slot) {
        memset(histogram, 0, sizeof *histogram);
        histogram->slot = slot;
    }
    histogram->counts[bucket_of(duration_ns)]++;
    if (duration_ns > histogram->longest_ns) {
        histogram->longest_ns = duration_ns;
    }
}

static PyObject *
timer_call(PyObject *self, PyObject *args, PyObject *Py_UNUSED(kwargs))
{
    GcTimer *timer = (GcTimer *)self;
    PyObject *phase, *info;
    if (!PyArg_ParseTuple(args, "UO", &phase, &info)) {
        return NULL;
    }
    if (PyUnicode_CompareWithASCIIString(phase, "start") == 0) {
        timer->started_ns = clock_ns(CLOCK_MONOTONIC);
        Py_RETURN_NONE;
    }
    if (timer->started_ns != 0) { /* else the timer was added in the middle of this collection */
        Pause *pause = &timer->pauses[timer->count % RING];
        uint64_t now_ns = clock_ns(CLOCK_MONOTONIC);
        pause->duration_ns = now_ns - timer->started_ns;
        add_recent(timer, info, now_ns, pause->duration_ns);
        pause->ended_ns = timer->last_end_ns = clock_ns(CLOCK_REALTIME);
        timer->total_ns += pause->duration_ns;
    }
    timer->count++;
    timer->started_ns = 0;
    Py_RETURN_NONE;
}

static PyObject *
timer_begin(PyObject *self, PyObject *argument)
{
    unsigned long long count = PyLong_AsUnsignedLongLong(argument);
    if (PyErr_Occurred()) {
        return NULL;
    }
    ((GcTimer *)self)->count = count;
    ((GcTimer *)self)->started_ns = 0;
    Py_RETURN_NONE;
}

static PyObject *
timer_pauses(PyObject *self, PyObject *Py_UNUSED(unused))
{
    Pause pauses[RING]; /* a copy of one moment: making tuples may collect garbage */
    memcpy(pauses, ((GcTimer *)self)->pauses, sizeof pauses);
    PyObject *tuple = PyTuple_New(RING);
    for (Py_ssize_t i = 0; tuple != NULL && i < RING; i++) {
        PyObject *pair = Py_BuildValue("(KK)", (unsigned long long)pauses[i].duration_ns,
                                       (unsigned long long)pauses[i].ended_ns);
        if (pair == NULL) {
            Py_CLEAR(tuple);
        }
        else {
            PyTuple_SET_ITEM(tuple, i, pair);
        }
    }
    return tuple;
}

/* Return a new tuple of one generation: its longest pause, and pairs of bucket end and count. */
static PyObject *
recent_pauses(const Histogram *histograms, uint64_t slot)
{
    uint64_t longest_ns = 0, counts[BUCKETS] = {0};
    for (int i = 0; i < SLOTS; i++) {
        if (slot - histograms[i].slot < SLOTS) {
            longest_ns = Py_MAX(longest_ns, histograms[i].longest_ns);
            for (unsigned bucket = 0; bucket < BUCKETS; bucket++) {
                counts[bucket] += histograms[i].counts[bucket];
            }
        }
    }
    PyObject *pairs = PyList_New(0);
    for (unsigned bucket = 0; pairs != NULL && bucket < BUCKETS; bucket++) {
        if (counts[bucket] != 0) {
            list_append_new(&pairs, Py_BuildValue("(KK)", (unsigned long long)bucket_end(bucket),
                                                  (unsigned long long)counts[bucket]));
        }
    }
    return pairs != NULL ? Py_BuildValue("(KN)", (unsigned long long)longest_ns, pairs) : NULL;
}

static PyObject *
timer_recent(PyObject *self, PyObject *Py_UNUSED(unused))
{
    GcTimer *timer = (GcTimer *)self;
    uint64_t slot = clock_ns(CLOCK_MONOTONIC) / SLOT_NS;
    PyObject *generations = PyList_New(0);
    for (int i = 0; generations != NULL && i < GENERATIONS; i++) {
        list_append_new(&generations, recent_pauses(timer->recent[i], slot));
    }
    return generations;
}

static PyMemberDef members[] = {
    {"count", T_ULONGLONG, offsetof(GcTimer, count), READONLY,
     PyDoc_STR("How many collections there have been, including those passed to `begin`.")},
    {"total_ns", T_ULONGLONG, offsetof(GcTimer, total_ns), READONLY,
     PyDoc_STR("Nanoseconds of all timed collections.")},
    {"last_end_ns", T_ULONGLONG, offsetof(GcTimer, last_end_ns), READONLY,
     PyDoc_STR("When the last timed collection ended, by `time.time_ns`; 0 before.")},
    {NULL, 0, 0, 0, NULL},
};
static PyMethodDef methods[] = {
    {"begin", timer_begin, METH_O,
     PyDoc_STR("begin(count): set the count of collections; none is being timed.")},
    {"pauses", timer_pauses, METH_NOARGS,
     PyDoc_STR("The last 256 as (nanoseconds, end by `time.time_ns`), a ring as Go's.")},
    {"recent", timer_recent, METH_NOARGS,
     PyDoc_STR("For each generation, of the last minute: the longest pause in nanoseconds, and"
               " [(nanoseconds, number of pauses that were shorter, but not by more than 1/8)].")},
    {NULL, NULL, 0, NULL},
};

PyTypeObject GcTimer_Type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "asgi_pprof._native.GcTimer",
    .tp_doc = PyDoc_STR("An entry of gc.callbacks that times collections."),
    .tp_basicsize = sizeof(GcTimer),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = PyType_GenericNew,
    .tp_call = timer_call,
    .tp_methods = methods,
    .tp_members = members,
};
