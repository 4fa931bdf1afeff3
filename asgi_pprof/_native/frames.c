#include "frames.h"

#include <stdlib.h>

#include <internal/pycore_code.h>

#include "lists.h"
#include "threads.h"
#include "unwinder.h"

#define MAX_STEPS 20000 /* frames of one thread that are walked; about 0.2 ms */
#define MAX_LOCALS 4

typedef struct {
    PyCodeObject *code; /* strong */
    int offset;
} Place;

typedef struct {
    unsigned long ident;
    size_t first, count;          /* its range in the array of places */
    Py_ssize_t found;             /* frames above the one with the variables; -1: none has them */
    PyObject *names;              /* strong: the request's tuple of the code and the names */
    PyObject *values[MAX_LOCALS]; /* strong, or NULL */
} Thread;

typedef struct {
    PyObject_HEAD
    Thread *threads;
    Place *places;
    size_t thread_count, thread_capacity;
    size_t place_count, place_capacity;
} ThreadStacks;

typedef struct {
    PyObject_HEAD
    ThreadStacks *stacks;
    size_t index;
} ThreadStack;

/* What to read of which threads. */
typedef struct {
    unsigned long *idents; /* NULL: all threads */
    size_t ident_count;
    size_t depth;
    PyObject *locals_of; /* NULL or empty: no variables */
    const Frame *outermost; /* the frame to end with, or NULL */
} Request;

/* --- frames ------------------------------------------------------------------- */

static const Frame *
innermost_frame(const PyThreadState *state)
{
#if THREAD_HAS_CFRAME
    return THREAD_CFRAME(state) != NULL ? THREAD_CFRAME(state)->current_frame : NULL;
#else
    return THREAD_FRAME(state);
#endif
}

/*
 * Return the code of a frame; NULL if the code is being freed. Before 3.11.2 a returning frame
 * stays linked until its code has been released, which may run callbacks of weak references.
 */
static PyCodeObject *
living_code(const Frame *frame)
{
    PyObject *code = (PyObject *)frame_code(frame);
    return code != NULL && PyCode_Check(code) && Py_REFCNT(code) > 0 ? (PyCodeObject *)code : NULL;
}

static int
offset_in(const Frame *frame, const PyCodeObject *code)
{
    ptrdiff_t offset = frame_instruction(frame) - (const char *)code - (ptrdiff_t)CODE_SIZE;
    /* A frame before its first instruction is at -1. */
    return offset < 0 ? -1 : (int)offset;
}

/* Return whether a frame is being set up; CPython does not show it (_PyFrame_IsIncomplete). */
static bool
is_incomplete(const Frame *frame, const PyCodeObject *code)
{
    return frame->owner != FRAME_OWNED_BY_GENERATOR &&
           offset_in(frame, code) < code->_co_firsttraceable * (int)sizeof(_Py_CODEUNIT);
}

/*
 * Return whether a frame still has its variables. Before 3.11.2 a returning frame releases them
 * one by one, which may run finalizers, while the frame is still linked and its slots have the
 * old addresses. Its stack pointer is stored then. The stack pointer of a running frame is
 * stored only while the frame waits for a call within the same evaluation loop.
 *
 * Source: gh-99729; Python/ceval.c, 3.11, pop_frame and CALL; Python/frame.c, _PyFrame_Clear.
 */
static bool
has_locals(const Frame *frame, const Frame *called)
{
#if PY_VERSION_HEX < 0x030c0000
    return frame->stacktop < 0 || (called != NULL && !called->is_entry);
#else
    (void)frame, (void)called;
    return true;
#endif
}

/* Return how many of a frame's slots may be read. */
static Py_ssize_t
slots_set(const Frame *frame, Py_ssize_t slots)
{
#if PY_VERSION_HEX >= 0x030e0000
    const _PyStackRef *top = frame->stackpointer;
    bool cleared = top >= frame->localsplus && top < frame->localsplus + slots;
    return cleared ? top - frame->localsplus : slots;
#else
    /* -1 while the frame runs. */
    return frame->stacktop >= 0 && frame->stacktop < slots ? frame->stacktop : slots;
#endif
}

static PyObject *
slot_value(const Frame *frame, Py_ssize_t slot)
{
#if PY_VERSION_HEX >= 0x030e0000
    /* Tag 1 is a borrowed reference, or NULL if it is alone. Tags 2 and 3 are no references. */
    uintptr_t bits = frame->localsplus[slot].bits;
    return bits & 2 ? NULL : (PyObject *)(bits & ~(uintptr_t)3);
#else
    return frame->localsplus[slot];
#endif
}

/* Return a new reference to a fast local's value, or its cell's content; NULL if there is none. */
static PyObject *
local_of(const Frame *frame, const PyCodeObject *code, PyObject *name)
{
    Py_ssize_t slots = slots_set(frame, code->co_nlocalsplus);
    for (Py_ssize_t i = 0; i < slots; i++) {
        PyObject *each = PyTuple_GET_ITEM(code->co_localsplusnames, i);
        if (each != name && PyUnicode_Compare(each, name) != 0) {
            continue;
        }
        PyObject *value = slot_value(frame, i);
        int kind = PyBytes_AS_STRING(code->co_localspluskinds)[i];
        /* Until the function starts, the slot of a cell has the argument itself. */
        if (value != NULL && kind & (CO_FAST_CELL | CO_FAST_FREE) && PyCell_Check(value)) {
            value = PyCell_GET(value);
        }
        if (value != NULL) {
            return Py_NewRef(value);
        }
    }
    return NULL;
}

/* --- reading threads ------------------------------------------------------------ */

/* Make room for one more item; false without memory. */
static bool
reserve(void **items, size_t count, size_t *capacity, size_t size)
{
    if (count < *capacity) {
        return true;
    }
    size_t wanted = *capacity != 0 ? 2 * *capacity : 64;
    void *moved = realloc(*items, wanted * size);
    if (moved != NULL) {
        *items = moved;
        *capacity = wanted;
    }
    return moved != NULL;
}

static void
drop_last_thread(ThreadStacks *stacks)
{
    const Thread *thread = &stacks->threads[--stacks->thread_count];
    while (stacks->place_count > thread->first) {
        Py_DECREF(stacks->places[--stacks->place_count].code);
    }
}

static PyObject *
wanted_of(PyObject *locals_of, const PyCodeObject *code)
{
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(locals_of); i++) {
        PyObject *wanted = PyTuple_GET_ITEM(locals_of, i);
        if (PyTuple_GET_ITEM(wanted, 0) == (PyObject *)code) {
            return wanted;
        }
    }
    return NULL;
}

static void
keep_locals(Thread *thread, const Frame *frame, const PyCodeObject *code, PyObject *wanted)
{
    thread->names = Py_NewRef(wanted);
    for (Py_ssize_t i = 1; i < PyTuple_GET_SIZE(wanted); i++) {
        thread->values[i - 1] = local_of(frame, code, PyTuple_GET_ITEM(wanted, i));
    }
}

typedef enum { READ, REACHED, NO_MEMORY } Outcome;

/* Add a thread, unless it has no frame. */
static Outcome
read_thread(ThreadStacks *stacks, const PyThreadState *state, const Request *request)
{
    if (!reserve((void **)&stacks->threads, stacks->thread_count, &stacks->thread_capacity,
                 sizeof *stacks->threads)) {
        return NO_MEMORY;
    }
    Thread *thread = &stacks->threads[stacks->thread_count++];
    *thread = (Thread){.ident = state->thread_id, .first = stacks->place_count, .found = -1};
    bool looks_for_locals = request->locals_of != NULL && PyTuple_GET_SIZE(request->locals_of) != 0;
    const Frame *called = NULL;
    Py_ssize_t shown = 0;
    Outcome outcome = READ;
    for (const Frame *frame = innermost_frame(state); frame != NULL && outcome == READ;
         called = frame, frame = frame->previous) {
        bool is_full = thread->count == request->depth;
        if (shown == MAX_STEPS || (is_full && !looks_for_locals && request->outermost == NULL)) {
            break;
        }
        PyCodeObject *code = frame_is_entry(frame) ? NULL : living_code(frame);
        if (code == NULL || is_incomplete(frame, code)) {
            continue;
        }
        if (!is_full && !reserve((void **)&stacks->places, stacks->place_count,
                                 &stacks->place_capacity, sizeof *stacks->places)) {
            outcome = NO_MEMORY;
            break;
        }
        if (!is_full) {
            stacks->places[stacks->place_count++] =
                (Place){(PyCodeObject *)Py_NewRef(code), offset_in(frame, code)};
            thread->count++;
        }
        PyObject *wanted = looks_for_locals ? wanted_of(request->locals_of, code) : NULL;
        if (wanted != NULL) {
            thread->found = shown;
            looks_for_locals = false;
            if (has_locals(frame, called)) {
                keep_locals(thread, frame, code, wanted);
            }
        }
        shown++;
        if (frame == request->outermost) {
            outcome = REACHED;
        }
    }
    if (thread->count == 0 || (request->outermost != NULL && outcome != REACHED)) {
        drop_last_thread(stacks);
    }
    return outcome;
}

static bool
is_asked_for(const Request *request, const PyThreadState *state)
{
    if (request->idents == NULL) {
        return true;
    }
    for (size_t i = 0; i < request->ident_count; i++) {
        if (request->idents[i] == state->thread_id) {
            return true;
        }
    }
    return false;
}

static void
clear(ThreadStacks *stacks)
{
    /* The object is emptied first: releasing a reference may run code that uses the object. */
    Thread *threads = stacks->threads;
    Place *places = stacks->places;
    size_t thread_count = stacks->thread_count, place_count = stacks->place_count;
    stacks->threads = NULL;
    stacks->places = NULL;
    stacks->thread_count = stacks->thread_capacity = 0;
    stacks->place_count = stacks->place_capacity = 0;
    for (size_t i = 0; i < place_count; i++) {
        Py_DECREF(places[i].code);
    }
    for (size_t i = 0; i < thread_count; i++) {
        Py_XDECREF(threads[i].names);
        for (int each = 0; each < MAX_LOCALS; each++) {
            Py_XDECREF(threads[i].values[each]);
        }
    }
    free(threads);
    free(places);
}

static ThreadStacks *
read_threads(const Request *request)
{
    ThreadStacks *stacks = PyObject_New(ThreadStacks, &ThreadStacks_Type);
    if (stacks == NULL) {
        return NULL;
    }
    memset((char *)stacks + sizeof(PyObject), 0, sizeof *stacks - sizeof(PyObject));
    Outcome outcome = READ;
    if (!threads_lock()) {
        return stacks; /* empty */
    }
    for (const PyThreadState *state = threads_first(); state != NULL && outcome == READ;
         state = state->next) {
        if (is_asked_for(request, state)) {
            outcome = read_thread(stacks, state, request);
        }
    }
    threads_unlock();
    if (outcome == NO_MEMORY) {
        Py_DECREF(stacks);
        PyErr_NoMemory();
        return NULL;
    }
    return stacks;
}

static bool
are_valid_locals(PyObject *locals_of)
{
    Py_ssize_t count = locals_of != NULL ? PyTuple_GET_SIZE(locals_of) : 0;
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *wanted = PyTuple_GET_ITEM(locals_of, i);
        if (!PyTuple_Check(wanted) || PyTuple_GET_SIZE(wanted) < 1 ||
            PyTuple_GET_SIZE(wanted) > MAX_LOCALS + 1 ||
            !PyCode_Check(PyTuple_GET_ITEM(wanted, 0))) {
            return false;
        }
        for (Py_ssize_t name = 1; name < PyTuple_GET_SIZE(wanted); name++) {
            if (!PyUnicode_Check(PyTuple_GET_ITEM(wanted, name))) {
                return false;
            }
        }
    }
    return true;
}

/* Take the thread numbers from a sequence; false with an exception set. */
static bool
take_idents(Request *request, PyObject *idents)
{
    PyObject *sequence = PySequence_Fast(idents, "idents are a sequence or None");
    if (sequence == NULL) {
        return false;
    }
    request->ident_count = (size_t)PySequence_Fast_GET_SIZE(sequence);
    request->idents = calloc(request->ident_count + 1, sizeof *request->idents);
    if (request->idents == NULL) {
        PyErr_NoMemory();
    }
    for (size_t i = 0; i < request->ident_count && !PyErr_Occurred(); i++) {
        PyObject *ident = PySequence_Fast_GET_ITEM(sequence, (Py_ssize_t)i);
        request->idents[i] = PyLong_AsUnsignedLong(ident);
    }
    Py_DECREF(sequence);
    return !PyErr_Occurred();
}

PyObject *
frames_current(PyObject *Py_UNUSED(module), PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"idents", "depth", "locals_of", NULL};
    PyObject *idents = Py_None, *locals_of = NULL;
    Py_ssize_t depth = MAX_DEPTH + 1; /* one more shows that it was cut */
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|OnO!", names, &idents, &depth, &PyTuple_Type,
                                     &locals_of)) {
        return NULL;
    }
    if (depth < 1 || !are_valid_locals(locals_of)) {
        return PyErr_Format(PyExc_ValueError,
                            "a depth of 1 or more and tuples of a code and at most %d names",
                            MAX_LOCALS);
    }
    Request request = {.depth = (size_t)depth, .locals_of = locals_of};
    bool taken = idents == Py_None || take_idents(&request, idents);
    PyObject *stacks = taken ? (PyObject *)read_threads(&request) : NULL;
    free(request.idents);
    return stacks;
}

/* --- ThreadStacks and ThreadStack --------------------------------------------------- */

/* Takes a copy, because making a tuple may collect garbage and so free the stacks' memory. */
static PyObject *
pair_of(Place place)
{
    return Py_BuildValue("(Ni)", Py_NewRef(place.code), place.offset);
}

/* Return a new tuple of a thread's places. */
static PyObject *
places_of(const ThreadStacks *stacks, size_t index)
{
    size_t count = index < stacks->thread_count ? stacks->threads[index].count : 0;
    PyObject *tuple = PyTuple_New((Py_ssize_t)count);
    for (size_t i = 0; tuple != NULL && i < count; i++) {
        /* A finalizer may have cleared the stacks meanwhile. */
        PyObject *pair = index < stacks->thread_count
                             ? pair_of(stacks->places[stacks->threads[index].first + i])
                             : PyTuple_New(0);
        if (pair == NULL) {
            Py_CLEAR(tuple);
        }
        else {
            PyTuple_SET_ITEM(tuple, (Py_ssize_t)i, pair);
        }
    }
    return tuple;
}

static PyObject *
stack_at(ThreadStacks *stacks, size_t index)
{
    ThreadStack *stack = PyObject_New(ThreadStack, &ThreadStack_Type);
    if (stack != NULL) {
        stack->stacks = (ThreadStacks *)Py_NewRef(stacks);
        stack->index = index;
    }
    return (PyObject *)stack;
}

static void
stack_dealloc(PyObject *self)
{
    Py_DECREF(((ThreadStack *)self)->stacks);
    PyObject_Free(self);
}

/* Return the thread; NULL if the stacks have been cleared. */
static const Thread *
thread_of(PyObject *self)
{
    const ThreadStack *stack = (ThreadStack *)self;
    return stack->index < stack->stacks->thread_count ? &stack->stacks->threads[stack->index]
                                                      : NULL;
}

static Py_ssize_t
stack_length(PyObject *self)
{
    const Thread *thread = thread_of(self);
    return thread != NULL ? (Py_ssize_t)thread->count : 0;
}

static PyObject *
stack_code(PyObject *self, PyObject *argument)
{
    Py_ssize_t depth = PyLong_AsSsize_t(argument);
    if (depth == -1 && PyErr_Occurred()) {
        return NULL;
    }
    if (depth < 0 || depth >= stack_length(self)) {
        Py_RETURN_NONE;
    }
    const ThreadStacks *stacks = ((ThreadStack *)self)->stacks;
    return Py_NewRef(stacks->places[thread_of(self)->first + (size_t)depth].code);
}

static PyObject *
stack_places(PyObject *self, PyObject *Py_UNUSED(unused))
{
    const ThreadStack *stack = (ThreadStack *)self;
    return places_of(stack->stacks, stack->index);
}

static PyObject *
stack_local(PyObject *self, PyObject *name)
{
    const Thread *thread = thread_of(self);
    if (thread != NULL && thread->names != NULL && PyUnicode_Check(name)) {
        for (Py_ssize_t i = 1; i < PyTuple_GET_SIZE(thread->names); i++) {
            if (thread->values[i - 1] != NULL &&
                PyUnicode_Compare(PyTuple_GET_ITEM(thread->names, i), name) == 0) {
                return Py_NewRef(thread->values[i - 1]);
            }
        }
    }
    Py_RETURN_NONE;
}

static PyObject *
stack_found(PyObject *self, void *Py_UNUSED(closure))
{
    const Thread *thread = thread_of(self);
    return PyLong_FromSsize_t(thread != NULL ? thread->found : -1);
}

static PySequenceMethods stack_sequence = {.sq_length = stack_length};
static PyMethodDef stack_methods[] = {
    {"code", stack_code, METH_O, PyDoc_STR("code(depth) -> the code there, or None")},
    {"places", stack_places, METH_NOARGS, PyDoc_STR("((code, offset), ...), leaf first")},
    {"local", stack_local, METH_O, PyDoc_STR("local(name) -> its value, None if it has none")},
    {NULL, NULL, 0, NULL},
};
static PyGetSetDef stack_members[] = {
    {"found", stack_found, NULL,
     PyDoc_STR("Number of frames above the one with the variables; -1 if none has them."), NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

PyTypeObject ThreadStack_Type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "asgi_pprof._native.ThreadStack",
    .tp_doc = PyDoc_STR("The stack of one thread."),
    .tp_basicsize = sizeof(ThreadStack),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .tp_dealloc = stack_dealloc,
    .tp_as_sequence = &stack_sequence,
    .tp_methods = stack_methods,
    .tp_getset = stack_members,
};

static void
stacks_dealloc(PyObject *self)
{
    clear((ThreadStacks *)self);
    PyObject_Free(self);
}

static Py_ssize_t
stacks_length(PyObject *self)
{
    return (Py_ssize_t)((ThreadStacks *)self)->thread_count;
}

/* Return a thread's stack; NULL if there is none, or with an exception set. */
static PyObject *
find_stack(PyObject *self, PyObject *key)
{
    ThreadStacks *stacks = (ThreadStacks *)self;
    unsigned long ident = PyLong_AsUnsignedLong(key);
    if (ident == (unsigned long)-1 && PyErr_Occurred()) {
        return NULL;
    }
    for (size_t i = 0; i < stacks->thread_count; i++) {
        if (stacks->threads[i].ident == ident) {
            return stack_at(stacks, i);
        }
    }
    return NULL;
}

static PyObject *
stacks_subscript(PyObject *self, PyObject *key)
{
    PyObject *stack = find_stack(self, key);
    if (stack == NULL && !PyErr_Occurred()) {
        PyErr_SetObject(PyExc_KeyError, key);
    }
    return stack;
}

static PyObject *
stacks_get(PyObject *self, PyObject *key)
{
    PyObject *stack = find_stack(self, key);
    return stack != NULL || PyErr_Occurred() ? stack : Py_NewRef(Py_None);
}

static PyObject *
key_at(ThreadStacks *stacks, size_t index)
{
    return PyLong_FromUnsignedLong(stacks->threads[index].ident);
}

static PyObject *
item_at(ThreadStacks *stacks, size_t index)
{
    PyObject *key = key_at(stacks, index), *stack = key != NULL ? stack_at(stacks, index) : NULL;
    return Py_BuildValue("(NN)", key, stack);
}

static PyObject *
list_of(PyObject *self, PyObject *(*make)(ThreadStacks *, size_t))
{
    ThreadStacks *stacks = (ThreadStacks *)self;
    PyObject *list = PyList_New(0);
    for (size_t i = 0; list != NULL && i < stacks->thread_count; i++) {
        list_append_new(&list, make(stacks, i));
    }
    return list;
}

static PyObject *
stacks_values(PyObject *self, PyObject *Py_UNUSED(unused))
{
    return list_of(self, stack_at);
}

static PyObject *
stacks_items(PyObject *self, PyObject *Py_UNUSED(unused))
{
    return list_of(self, item_at);
}

static PyObject *
stacks_iter(PyObject *self)
{
    PyObject *keys = list_of(self, key_at), *iterator = keys != NULL ? PyObject_GetIter(keys) : NULL;
    Py_XDECREF(keys);
    return iterator;
}

static PyObject *
stacks_clear(PyObject *self, PyObject *Py_UNUSED(unused))
{
    clear((ThreadStacks *)self);
    Py_RETURN_NONE;
}

static PyMappingMethods stacks_mapping = {
    .mp_length = stacks_length,
    .mp_subscript = stacks_subscript,
};
static PyMethodDef stacks_methods[] = {
    {"get", stacks_get, METH_O, PyDoc_STR("get(ident) -> its stack, or None")},
    {"values", stacks_values, METH_NOARGS, PyDoc_STR("A list of the stacks.")},
    {"items", stacks_items, METH_NOARGS, PyDoc_STR("A list of (ident, stack).")},
    {"clear", stacks_clear, METH_NOARGS, PyDoc_STR("Release everything that was read.")},
    {NULL, NULL, 0, NULL},
};

PyTypeObject ThreadStacks_Type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "asgi_pprof._native.ThreadStacks",
    .tp_doc = PyDoc_STR("The stacks of this interpreter's threads, by thread number."),
    .tp_basicsize = sizeof(ThreadStacks),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .tp_dealloc = stacks_dealloc,
    .tp_iter = stacks_iter,
    .tp_as_mapping = &stacks_mapping,
    .tp_methods = stacks_methods,
};

/* --- coroutines and generators ------------------------------------------------------ */

/* Return the frame of a generator; NULL if it has ended, or with an exception set. */
static const Frame *
generator_frame(PyObject *object)
{
    if (!PyGen_CheckExact(object) && !PyCoro_CheckExact(object) && !PyAsyncGen_CheckExact(object)) {
        PyErr_SetString(PyExc_TypeError, "no generator or coroutine");
        return NULL;
    }
    PyGenObject *generator = (PyGenObject *)object;
    /* Every later state counts as ended: a generator ends in two steps, between which code runs. */
    return generator->gi_frame_state > FRAME_EXECUTING ? NULL : (Frame *)&generator->gi_iframe;
}

PyObject *
frames_of_generator(PyObject *Py_UNUSED(module), PyObject *generator)
{
    const Frame *frame = generator_frame(generator);
    PyCodeObject *code = frame != NULL ? living_code(frame) : NULL;
    if (code == NULL) {
        return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
    }
    return pair_of((Place){code, offset_in(frame, code)});
}

/*
 * Return whether a frame is suspended with what it awaits on its stack. CPython's attribute does
 * not check that: up to 3.12 it looks at the next instruction only, and then reads below the
 * stack of a frame that runs, or that is just releasing what it awaited (Objects/genobject.c,
 * _PyGen_yf and _gen_throw).
 */
static bool
holds_awaited(const PyGenObject *generator, const Frame *frame)
{
#if PY_VERSION_HEX >= 0x030d0000
    (void)frame;
    return FRAME_STATE_SUSPENDED(generator->gi_frame_state);
#else
    const PyCodeObject *code = living_code(frame);
    return generator->gi_frame_state == FRAME_SUSPENDED && code != NULL &&
           frame->stacktop > code->co_nlocalsplus;
#endif
}

PyObject *
frames_awaited(PyObject *Py_UNUSED(module), PyObject *generator)
{
    const Frame *frame = generator_frame(generator);
    if (frame == NULL || !holds_awaited((PyGenObject *)generator, frame)) {
        return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
    }
    return PyObject_GetAttrString(generator, PyCoro_CheckExact(generator)  ? "cr_await"
                                             : PyGen_CheckExact(generator) ? "gi_yieldfrom"
                                                                           : "ag_await");
}

PyObject *
frames_generator_local(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *generator, *name;
    if (!PyArg_ParseTuple(args, "OU", &generator, &name)) {
        return NULL;
    }
    const Frame *frame = generator_frame(generator);
    PyCodeObject *code = frame != NULL ? living_code(frame) : NULL;
    PyObject *value = code != NULL ? local_of(frame, code, name) : NULL;
    return value != NULL || PyErr_Occurred() ? value : Py_NewRef(Py_None);
}

PyObject *
frames_running(PyObject *Py_UNUSED(module), PyObject *coroutine)
{
    const Frame *frame = generator_frame(coroutine);
    if (frame == NULL || ((PyGenObject *)coroutine)->gi_frame_state != FRAME_EXECUTING) {
        return PyErr_Occurred() ? NULL : PyTuple_New(0);
    }
    Request request = {.depth = MAX_DEPTH + 1, .outermost = frame};
    ThreadStacks *stacks = read_threads(&request);
    PyObject *places = stacks != NULL ? places_of(stacks, 0) : NULL;
    Py_XDECREF(stacks);
    return places;
}
