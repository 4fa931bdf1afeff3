#include "labels.h"

#include <structmember.h>

#include "store.h"

#define MAGIC 0x61736769706c6273u
#define MARK_SLOTS (1u << 18)
#define MARK_UNITS (1u << 17) /* a unit for each set that a CPU profile's samples may have */

static PyObject *variable;
static int32_t variable_hash;
static PyTypeObject *bitmap_type, *array_type;
static PyObject *writer;
static void (*on_death)(LabelSet *set, uint32_t label);
static uint64_t last_number;
static LabelSet *living;
static ByteStore marks; /* the numbers of the sets that are marked */

static bool
is_marked(const LabelSet *set)
{
    return marks.slots != NULL && store_find(&marks, 0, &set->number, sizeof set->number) != 0;
}

static PyObject *
labelset_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    (void)args, (void)kwargs;
    LabelSet *self = (LabelSet *)type->tp_alloc(type, 0);
    if (self != NULL) {
        self->number = ++last_number;
        self->next = living;
        if (living != NULL) {
            living->previous = self;
        }
        living = self;
        self->magic = MAGIC;
    }
    return (PyObject *)self;
}

static void
report_death(LabelSet *set)
{
    if (set->bucket != 0) {
        on_death(set, set->label);
    }
}

static void
labelset_finalize(PyObject *object)
{
    LabelSet *self = (LabelSet *)object;
    bool marked = is_marked(self);
    if ((self->bucket == 0 && !marked) || writer == NULL) {
        return; /* labelset_dealloc does the rest */
    }
#if PY_VERSION_HEX >= 0x030c0000
    PyObject *raised = PyErr_GetRaisedException();
#else
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
#endif
    PyObject *called = Py_NewRef(writer); /* labels_set_writer may drop it meanwhile, at exit */
    PyObject *label = PyObject_CallFunction(called, "OKOO", object,
                                            (unsigned long long)self->number,
                                            marked ? Py_True : Py_False,
                                            self->bucket != 0 ? Py_True : Py_False);
    Py_DECREF(called);
    if (label != NULL) {
        self->label = (uint32_t)PyLong_AsUnsignedLong(label);
        Py_DECREF(label);
    }
    PyErr_Clear();
    report_death(self);
#if PY_VERSION_HEX >= 0x030c0000
    PyErr_SetRaisedException(raised);
#else
    PyErr_Restore(type, value, traceback);
#endif
}

static void
labelset_dealloc(PyObject *object)
{
    LabelSet *self = (LabelSet *)object;
    if (Py_TYPE(object) == &LabelSet_Type && PyObject_CallFinalizerFromDealloc(object) < 0) {
        return;
    }
    /* Since the labels were stored, a finalizer may have allocated memory under this set. */
    report_death(self);
    self->magic = 0;
    if (self->next != NULL) {
        self->next->previous = self->previous;
    }
    if (self->previous != NULL) {
        self->previous->next = self->next;
    }
    else if (living == self) {
        living = self->next;
    }
    Py_TYPE(object)->tp_free(object);
}

static PyMemberDef labelset_members[] = {
    {"number", T_ULONGLONG, offsetof(LabelSet, number), READONLY,
     PyDoc_STR("A number that no other set ever has.")},
    {NULL, 0, 0, 0, NULL},
};

PyTypeObject LabelSet_Type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "asgi_pprof._native.LabelSet",
    .tp_doc = PyDoc_STR("Base of label sets, which have numbers and which samplers find."),
    .tp_basicsize = sizeof(LabelSet),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_FINALIZE,
    .tp_members = labelset_members,
    .tp_new = labelset_new,
    .tp_finalize = labelset_finalize,
    .tp_dealloc = labelset_dealloc,
};

/* Learn the types from a context that gets variables until its mapping's root is an array. */
static bool
learn_types(void)
{
    PyObject *variables[64] = {NULL}, *context = PyContext_New();
    bool learned = false;
    if (context == NULL || PyContext_Enter(context) < 0) {
        Py_XDECREF(context);
        return false;
    }
    int count = 0;
    for (; count < 64; count++) {
        variables[count] = PyContextVar_New("asgi_pprof", NULL);
        if (variables[count] == NULL) {
            break;
        }
        PyObject *token = PyContextVar_Set(variables[count], Py_None);
        if (token == NULL) {
            break;
        }
        Py_DECREF(token);
        PyHamtObject *mapping = ((PyContext *)context)->ctx_vars;
        if (count == 0) {
            bitmap_type = Py_TYPE(mapping->h_root);
        }
        else if (Py_TYPE(mapping->h_root) != bitmap_type) {
            array_type = Py_TYPE(mapping->h_root);
            learned = true;
            break;
        }
    }
    for (int i = 0; i <= count && i < 64; i++) {
        Py_XDECREF(variables[i]);
    }
    PyContext_Exit(context);
    Py_DECREF(context);
    if (!learned && !PyErr_Occurred()) {
        PyErr_SetString(PyExc_RuntimeError, "contexts are not as expected");
    }
    return learned;
}

bool
labels_use(PyObject *new_variable)
{
    Py_hash_t hash = PyObject_Hash(new_variable);
    if (hash == -1 || !learn_types()) {
        return false;
    }
    Py_XSETREF(variable, Py_NewRef(new_variable));
    variable_hash = hamt_hash(hash);
    return true;
}

void
labels_set_writer(PyObject *new_writer)
{
    Py_XSETREF(writer, Py_XNewRef(new_writer));
}

void
labels_on_death(void (*callback)(LabelSet *set, uint32_t label))
{
    on_death = callback;
}

static bool
read_value(Reader *reader, const void *node, PyObject **value)
{
    uint32_t hash = (uint32_t)variable_hash;
    for (int level = 0; level < 7; level++, hash >>= 5) {
        HamtBitmapNode bitmap;
        if (!reader_read(reader, node, &bitmap, offsetof(HamtBitmapNode, b_array))) {
            return false;
        }
        PyTypeObject *type = bitmap.ob_base.ob_base.ob_type;
        if (type == array_type) {
            PyHamtNode *const *slot = &((const HamtArrayNode *)node)->a_array[hash & 31];
            if (!reader_read(reader, slot, &node, sizeof node)) {
                return false;
            }
            continue;
        }
        uint32_t bit = 1u << (hash & 31);
        if (type != bitmap_type || !(bitmap.b_bitmap & bit)) {
            return false;
        }
        int index = 2 * __builtin_popcount(bitmap.b_bitmap & (bit - 1));
        PyObject *pair[2];
        if (!reader_read(reader, (const char *)node + offsetof(HamtBitmapNode, b_array) +
                                     (size_t)index * sizeof(PyObject *),
                         pair, sizeof pair)) {
            return false;
        }
        if (pair[0] != NULL) {
            *value = pair[1];
            return pair[0] == variable;
        }
        node = pair[1];
    }
    return false;
}

LabelSet *
labels_find(Reader *reader, const PyThreadState *state, LabelSet *found)
{
    PyContext context;
    PyHamtObject mapping;
    PyObject *value;
    if (variable == NULL || state->context == NULL ||
        !reader_read(reader, state->context, &context, sizeof context) ||
        !reader_read(reader, context.ctx_vars, &mapping, sizeof mapping) || mapping.h_count == 0 ||
        !read_value(reader, mapping.h_root, &value) || value == Py_None ||
        !reader_read(reader, value, found, sizeof *found) || found->magic != MAGIC) {
        return NULL;
    }
    return (LabelSet *)value;
}

bool
labels_open_marks(void)
{
    return store_open(&marks, MARK_SLOTS, MARK_UNITS, 1);
}

void
labels_close_marks(void)
{
    store_close(&marks);
}

bool
labels_mark(uint64_t number)
{
    return store_intern(&marks, 0, &number, sizeof number, 0) != 0;
}

bool
labels_can_be_asked(const LabelSet *set)
{
    /* A set without references waits for its deallocation (Objects/object.c, trashcan). */
    return Py_REFCNT(set) > 0 && !PyObject_GC_IsFinalized((PyObject *)set);
}

PyObject *
labels_marked(void)
{
    PyObject *list = PyList_New(0);
    for (LabelSet *set = living; list != NULL && set != NULL; set = set->next) {
        if (is_marked(set) && labels_can_be_asked(set) && PyList_Append(list, (PyObject *)set) < 0) {
            Py_CLEAR(list); /* this may free sets, so the walk must end */
            break;
        }
    }
    return list;
}
