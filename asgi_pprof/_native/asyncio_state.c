#include "asyncio_state.h"
#include "lists.h"
#include "reader.h"
#include "threads.h"

#include <stdlib.h>
#include <unistd.h>

#if PY_VERSION_HEX >= 0x030d0000
#include <internal/pycore_tstate.h>
#endif

#if PY_VERSION_HEX >= 0x030e0000

typedef struct llist_node Node;

static size_t node_offset;       /* of the link in a task; 0 until asyncio_learn succeeds */
static PyTypeObject *task_type;  /* asyncio's own type, the base of all linked tasks */
static Reader reader;            /* for single copies only */

static bool
copy(const void *from, void *to, size_t size)
{
    reader.pid = getpid();
    return (uintptr_t)from >= 4096 && reader_copy(&reader, from, to, size);
}

static PyObject *
task_of(const Node *node)
{
    return (PyObject *)((uintptr_t)node - node_offset);
}

/* The first field of a future is its loop, which the garbage collector clears first. */
static PyObject *
loop_of(PyObject *task)
{
    return *(PyObject **)(task + 1);
}

bool
asyncio_learn(PyObject *task)
{
    if (node_offset != 0) {
        return true;
    }
    const _PyThreadStateImpl *thread = (_PyThreadStateImpl *)PyThreadState_Get();
    const Node *list = &thread->asyncio_tasks_head;
    Node head, before;
    if (!copy(list, &head, sizeof head)) {
        return false;
    }
    uintptr_t offset = (uintptr_t)head.prev - (uintptr_t)task;
    if (offset < sizeof(PyObject) + sizeof(PyObject *) || offset % _Alignof(Node) != 0 ||
        offset + sizeof(Node) > (size_t)Py_TYPE(task)->tp_basicsize) {
        return false;
    }
    const Node *node = head.prev;
    if (node->next != list || !copy(node->prev, &before, sizeof before) || before.next != node) {
        return false;
    }
    PyObject *loop = PyObject_GetAttrString(task, "_loop");
    Py_XDECREF(loop);
    if (loop == NULL || loop_of(task) != loop) {
        PyErr_Clear();
        return false;
    }
    task_type = (PyTypeObject *)Py_NewRef(Py_TYPE(task));
    node_offset = offset;
    return true;
}

/* References to tasks. No Python list may be made while the list of threads is locked. */
typedef struct {
    PyObject **items;
    size_t count, capacity;
    enum { SOUND, BROKEN, NO_MEMORY } state;
} Tasks;

static bool
append(Tasks *tasks, PyObject *task)
{
    if (tasks->count == tasks->capacity) {
        size_t capacity = tasks->capacity ? 2 * tasks->capacity : 1024;
        PyObject **items = realloc(tasks->items, capacity * sizeof *items);
        if (items == NULL) {
            tasks->state = NO_MEMORY;
            return false;
        }
        tasks->items = items;
        tasks->capacity = capacity;
    }
    tasks->items[tasks->count++] = Py_NewRef(task);
    return true;
}

/*
 * Add the tasks of a list; false if the list is broken or there is no memory. Each link must
 * point back at the one before it, so that a broken list ends the walk, which cannot be endless.
 */
static bool
add_list(Tasks *tasks, const Node *list)
{
    const Node *before = list;
    for (const Node *node = list->next; node != list; before = node, node = node->next) {
        if (node == NULL || node->prev != before) {
            tasks->state = BROKEN;
            return false;
        }
        PyObject *task = task_of(node);
        /* Skip a task that is being freed, or that the garbage collector takes apart. */
        if (Py_REFCNT(task) > 0 && loop_of(task) != NULL && !append(tasks, task)) {
            return false;
        }
    }
    return true;
}

static bool
is_task(const PyObject *at)
{
    PyObject object;
    if (!copy(at, &object, sizeof object)) {
        return false;
    }
    PyTypeObject *type = Py_TYPE(&object);
    for (int i = 0; type != task_type; i++) {
        if (i == 100 || !copy(&type->tp_base, &type, sizeof type)) {
            return false;
        }
    }
    return true;
}

/*
 * Return whether a list is one of tasks. The offset was learnt from a thread's list; that the
 * interpreter's list is where the header says can only be told from its content.
 */
static bool
is_list_of_tasks(const Node *list)
{
    Node head, first, last;
    return copy(list, &head, sizeof head) && copy(head.next, &first, sizeof first) &&
           copy(head.prev, &last, sizeof last) && first.prev == list && last.next == list &&
           (head.next == list || (is_task(task_of(head.next)) && is_task(task_of(head.prev))));
}

static void
add_all(Tasks *tasks)
{
    const Node *list = &PyInterpreterState_Main()->asyncio_tasks_head;
    if (!is_list_of_tasks(list)) {
        tasks->state = BROKEN;
        return;
    }
    bool on = add_list(tasks, list);
    for (PyThreadState *thread = threads_first(); on && thread != NULL; thread = thread->next) {
        list = &((_PyThreadStateImpl *)thread)->asyncio_tasks_head;
        /* It is NULL in a thread state that is not set up yet. */
        on = list->next == NULL || add_list(tasks, list);
    }
}

/* Return a new list, which takes over the references. */
static PyObject *
list_of(Tasks *tasks)
{
    PyObject *list = PyList_New((Py_ssize_t)tasks->count);
    if (list != NULL) {
        memcpy(((PyListObject *)list)->ob_item, tasks->items, tasks->count * sizeof *tasks->items);
        tasks->count = 0;
    }
    return list;
}

PyObject *
asyncio_tasks(void)
{
    if (node_offset == 0 || !threads_lock()) {
        Py_RETURN_NONE;
    }
    Tasks tasks = {NULL, 0, 0, SOUND};
    add_all(&tasks);
    threads_unlock();
    PyObject *result = NULL;
    switch (tasks.state) {
    case SOUND:
        result = list_of(&tasks);
        break;
    case BROKEN:
        result = Py_NewRef(Py_None);
        break;
    case NO_MEMORY:
        PyErr_NoMemory();
    }
    while (tasks.count > 0) {
        Py_DECREF(tasks.items[--tasks.count]);
    }
    free(tasks.items);
    return result;
}

#else

bool
asyncio_learn(PyObject *Py_UNUSED(task))
{
    return false;
}

PyObject *
asyncio_tasks(void)
{
    Py_RETURN_NONE;
}

#endif

/* A thread's loop and task, from its state. Before 3.13 `loop` is the dict that has the loop. */
typedef struct {
    unsigned long ident;
    PyObject *loop;
    PyObject *task;
} Running;

static PyObject *
loop_or_dict(PyThreadState *thread)
{
#if PY_VERSION_HEX >= 0x030d0000
    return ((_PyThreadStateImpl *)thread)->asyncio_running_loop;
#else
    return thread->dict;
#endif
}

static PyObject *
running_task(PyThreadState *thread)
{
#if PY_VERSION_HEX >= 0x030e0000
    return ((_PyThreadStateImpl *)thread)->asyncio_running_task;
#else
    (void)thread;
    return NULL;
#endif
}

/* Return the loop, a new reference or NULL, from what loop_or_dict returned. */
static PyObject *
resolve_loop(PyObject *found)
{
#if PY_VERSION_HEX < 0x030d0000
    found = found != NULL ? PyDict_GetItemString(found, "__asyncio_running_event_loop__") : NULL;
#endif
#if PY_VERSION_HEX < 0x030c0000
    /* In 3.11 a holder refers to the loop, private to _asynciomodule.c: PyRunningLoopHolder. */
    typedef struct {
        PyObject_HEAD
        PyObject *loop;
        pid_t pid;
    } Holder;
    if (found != NULL) {
        const PyTypeObject *type = Py_TYPE(found);
        const Holder *holder = (Holder *)found;
        found = strcmp(type->tp_name, "_RunningLoopHolder") == 0 &&
                        type->tp_basicsize == sizeof(Holder) && holder->pid == getpid()
                    ? holder->loop
                    : NULL;
    }
#endif
    return found == Py_None ? NULL : Py_XNewRef(found);
}

/* Return whether thread states are laid out as compiled: our own must have our own loop. */
static bool
knows_own_loop(PyObject *own)
{
    PyObject *loop = resolve_loop(loop_or_dict(PyThreadState_Get()));
    Py_XDECREF(loop); /* only compared */
    return loop == (own == Py_None ? NULL : own);
}

/* Return the threads that run a loop, or might; NULL without memory. */
static Running *
copy_running(size_t *count)
{
    size_t threads = 0;
    for (PyThreadState *each = threads_first(); each != NULL; each = each->next) {
        threads++;
    }
    Running *running = calloc(threads, sizeof *running);
    *count = 0;
    for (PyThreadState *each = threads_first(); running && each != NULL; each = each->next) {
        if (loop_or_dict(each) != NULL) {
            running[(*count)++] = (Running){each->thread_id, Py_NewRef(loop_or_dict(each)),
                                            Py_XNewRef(running_task(each))};
        }
    }
    return running;
}

static void
append_running(PyObject **list, const Running *running)
{
    PyObject *loop = resolve_loop(running->loop);
    if (loop != NULL) {
        PyObject *task = running->task != NULL ? running->task : Py_None;
        list_append_new(list, Py_BuildValue("(kNO)", running->ident, loop, task));
    }
}

PyObject *
asyncio_running_loops(PyObject *own)
{
    if (!knows_own_loop(own) || !threads_lock()) {
        Py_RETURN_NONE;
    }
    size_t count;
    Running *running = copy_running(&count);
    threads_unlock();
    if (running == NULL) {
        return PyErr_NoMemory();
    }
    PyObject *list = PyList_New(0);
    for (size_t i = 0; i < count; i++) {
        if (list != NULL) {
            append_running(&list, &running[i]);
        }
        Py_DECREF(running[i].loop);
        Py_XDECREF(running[i].task);
    }
    free(running);
    return list;
}
