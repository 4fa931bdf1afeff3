#include "gc_timer.h"

#include <structmember.h>
#include <time.h>

#define RING 256 /* as Go's PauseNs and PauseEnd */

typedef struct {
    uint64_t duration_ns, ended_ns;
} Pause;

typedef struct {
    PyObject_HEAD
    uint64_t started_ns; /* 0: none is being timed */
    uint64_t count, total_ns, last_end_ns;
    Pause pauses[RING];
} GcTimer;

static uint64_t
read_clock(clockid_t clock)
{
    struct timespec now;
    clock_gettime(clock, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
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
        timer->started_ns = read_clock(CLOCK_MONOTONIC);
        Py_RETURN_NONE;
    }
    if (timer->started_ns != 0) { /* else it was switched on in the middle of this one */
        Pause *pause = &timer->pauses[timer->count % RING];
        pause->duration_ns = read_clock(CLOCK_MONOTONIC) - timer->started_ns;
        pause->ended_ns = timer->last_end_ns = read_clock(CLOCK_REALTIME);
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
    Pause pauses[RING]; /* of one moment: making tuples may collect garbage */
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
     PyDoc_STR("Collections, timed or not, with those that `begin` was told of.")},
    {"total_ns", T_ULONGLONG, offsetof(GcTimer, total_ns), READONLY,
     PyDoc_STR("Nanoseconds of all that were timed.")},
    {"last_end_ns", T_ULONGLONG, offsetof(GcTimer, last_end_ns), READONLY,
     PyDoc_STR("When the last one ended, by `time.time_ns`; 0 before the first.")},
    {NULL, 0, 0, 0, NULL},
};
static PyMethodDef methods[] = {
    {"begin", timer_begin, METH_O,
     PyDoc_STR("begin(count): go on from so many collections; none is being timed.")},
    {"pauses", timer_pauses, METH_NOARGS,
     PyDoc_STR("The last 256 as (nanoseconds, end by `time.time_ns`), in Go's ring.")},
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
