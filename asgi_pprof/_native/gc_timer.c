#include "gc_timer.h"

#include <structmember.h>

#include "clocks.h"

#define RING 256 /* as Go's PauseNs and PauseEnd */

typedef struct {
    uint64_t duration_ns, ended_ns;
} Pause;

typedef struct {
    PyObject_HEAD
    uint64_t started_ns; /* 0: no collection is being timed */
    uint64_t count, total_ns, last_end_ns;
    Pause pauses[RING];
} GcTimer;

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
        pause->duration_ns = clock_ns(CLOCK_MONOTONIC) - timer->started_ns;
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
