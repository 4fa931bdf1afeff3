/*
 * asgi_pprof._native: binds the C core to Python. All functions need the GIL of the main
 * interpreter, the only one that can import the module.
 *
 * Each file is built on the files that it includes, without a cycle. The allocator hooks and
 * the labels do not know the heap sampler: they call functions that it registers.
 *
 *   clocks:
 *   layout:
 *   pages:
 *   memory:        pages
 *   reader:
 *   blocks:        memory
 *   store:         memory
 *   lists:         layout
 *   malloc_arenas: layout
 *   small_blocks:  layout
 *   threads:       layout
 *   gc_timer:      clocks layout lists
 *   labels:        layout reader store
 *   names:         layout reader store
 *   hooks:         blocks layout threads
 *   asyncio_state: layout lists reader threads
 *   unwinder:      layout names reader
 *   frames:        layout lists threads unwinder
 *   cpu_sampler:   clocks labels layout lists memory names reader store unwinder
 *   buckets:       labels memory
 *   heap_sampler:  blocks buckets hooks labels layout lists names reader store unwinder
 *   module:        asyncio_state cpu_sampler frames gc_timer heap_sampler labels malloc_arenas
 *                  memory names pages reader small_blocks
 */
#include "asyncio_state.h"
#include "cpu_sampler.h"
#include "frames.h"
#include "gc_timer.h"
#include "heap_sampler.h"
#include "labels.h"
#include "memory.h"
#include "malloc_arenas.h"
#include "names.h"
#include "pages.h"
#include "reader.h"
#include "small_blocks.h"

#include <pthread.h>

#define NO_ARGUMENTS PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused)

static PyObject *
none_unless(bool failed)
{
    if (failed) {
        return NULL;
    }
    Py_RETURN_NONE;
}

static bool closed; /* the interpreter is ending */

static bool
refuse_when_closed(void)
{
    if (closed) {
        PyErr_SetString(PyExc_RuntimeError, "the interpreter is ending");
    }
    return closed;
}

static PyObject *
native_check(NO_ARGUMENTS)
{
    if (!reader_works()) {
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    Py_RETURN_NONE;
}

static PyObject *
native_use_labels(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *variable, *writer;
    if (!PyArg_ParseTuple(args, "O!O", &PyContextVar_Type, &variable, &writer) ||
        !labels_use(variable)) {
        return NULL;
    }
    labels_set_writer(writer);
    Py_RETURN_NONE;
}

static PyObject *
native_describe(PyObject *Py_UNUSED(module), PyObject *argument)
{
    unsigned long place = PyLong_AsUnsignedLong(argument);
    if (PyErr_Occurred()) {
        return NULL;
    }
    return names_describe(place);
}

static PyObject *
native_cpu_start(PyObject *Py_UNUSED(module), PyObject *args)
{
    long hz;
    unsigned long long credit_ns = 20000000, share = 8;
    if (!PyArg_ParseTuple(args, "l|KK", &hz, &credit_ns, &share)) {
        return NULL;
    }
    if (hz < 1 || hz > 100000) {
        return PyErr_Format(PyExc_ValueError, "hz is 1 to 100000, not %ld", hz);
    }
    return none_unless(refuse_when_closed() || !cpu_start(hz, (Budget){credit_ns, share}));
}

static PyObject *
native_cpu_stop(NO_ARGUMENTS)
{
    cpu_stop();
    Py_RETURN_NONE;
}

static PyObject *
native_cpu_yield(NO_ARGUMENTS)
{
    cpu_yield();
    Py_RETURN_NONE;
}

static PyObject *
native_cpu_free(NO_ARGUMENTS)
{
    cpu_free();
    Py_RETURN_NONE;
}

static PyObject *
native_cpu_read(PyObject *Py_UNUSED(module), PyObject *args)
{
    unsigned int position;
    int limit;
    if (!PyArg_ParseTuple(args, "Ii", &position, &limit)) {
        return NULL;
    }
    PyObject *samples = cpu_read(&position, limit);
    return samples != NULL ? Py_BuildValue("(NI)", samples, position) : NULL;
}

static PyObject *
native_cpu_threads(NO_ARGUMENTS)
{
    return cpu_threads();
}

static PyObject *
native_cpu_begin_thread(PyObject *Py_UNUSED(module), PyObject *argument)
{
    long thread = PyLong_AsLong(argument);
    if (thread == -1 && PyErr_Occurred()) {
        return NULL;
    }
    cpu_begin_thread((pid_t)thread);
    Py_RETURN_NONE;
}

static PyObject *
native_cpu_stats(NO_ARGUMENTS)
{
    CpuStats s = cpu_stats();
    return Py_BuildValue("{sKsKsKsKsKsKsKsKsKsO}",
                         "samples", (unsigned long long)s.samples,
                         "periods", (unsigned long long)s.periods,
                         "unreadable", (unsigned long long)s.unreadable,
                         "lost", (unsigned long long)s.lost,
                         "skipped", (unsigned long long)s.skipped,
                         "unlabelled", (unsigned long long)s.unlabelled,
                         "own_ns", (unsigned long long)s.own_ns,
                         "watcher_ns", (unsigned long long)s.watcher_ns,
                         "unsampled", (unsigned long long)s.unsampled,
                         "displaced", s.displaced ? Py_True : Py_False);
}

static PyObject *
native_heap_start(PyObject *Py_UNUSED(module), PyObject *argument)
{
    unsigned long long rate = PyLong_AsUnsignedLongLong(argument);
    if (PyErr_Occurred()) {
        return NULL;
    }
    if (rate == 0) {
        PyErr_SetString(PyExc_ValueError, "rate is at least 1");
        return NULL;
    }
    return none_unless(refuse_when_closed() || !heap_start(rate));
}

static PyObject *
native_heap_stop(NO_ARGUMENTS)
{
    heap_stop();
    Py_RETURN_NONE;
}

static PyObject *
native_heap_check(NO_ARGUMENTS)
{
    return PyBool_FromLong(heap_check());
}

static PyObject *
native_heap_read(NO_ARGUMENTS)
{
    return heap_read();
}

static PyObject *
native_heap_stack(PyObject *Py_UNUSED(module), PyObject *argument)
{
    unsigned long long stack = PyLong_AsUnsignedLongLong(argument);
    return PyErr_Occurred() ? NULL : heap_stack(stack);
}

static PyObject *
native_heap_pending(NO_ARGUMENTS)
{
    return heap_pending();
}

static PyObject *
native_heap_stats(NO_ARGUMENTS)
{
    HeapStats s = heap_stats();
    return Py_BuildValue("{sKsKsKsKsKsKsKsKsKsK}",
                         "rate", (unsigned long long)s.rate,
                         "mallocs", (unsigned long long)s.mallocs,
                         "frees", (unsigned long long)s.frees,
                         "total_bytes", (unsigned long long)s.total_bytes,
                         "live", (unsigned long long)s.live,
                         "lost", (unsigned long long)s.lost,
                         "unlabelled", (unsigned long long)s.unlabelled,
                         "unnamed", (unsigned long long)s.unnamed,
                         "unreadable", (unsigned long long)s.unreadable,
                         "stacks", (unsigned long long)s.stacks);
}

static PyObject *
native_memory(NO_ARGUMENTS)
{
    return PyLong_FromSize_t(memory_resident());
}

static PyObject *
native_heap_used_labels(PyObject *Py_UNUSED(module), PyObject *argument)
{
    unsigned long end = PyLong_AsUnsignedLong(argument);
    return PyErr_Occurred() ? NULL : heap_used_labels((uint32_t)end);
}

static PyObject *
native_heap_compact(PyObject *Py_UNUSED(module), PyObject *argument)
{
    unsigned long limit = PyLong_AsUnsignedLong(argument);
    return PyErr_Occurred() ? NULL : PyBool_FromLong(heap_compact((uint32_t)limit));
}

static PyObject *
native_size_class(PyObject *Py_UNUSED(module), PyObject *argument)
{
    unsigned long long size = PyLong_AsUnsignedLongLong(argument);
    return PyErr_Occurred() ? NULL : PyLong_FromUnsignedLongLong(heap_size_class(size));
}

static PyObject *
native_small_blocks(PyObject *Py_UNUSED(module), PyObject *args)
{
#if SMALL_BLOCKS_IN_STEPS
    unsigned int first, limit;
    return PyArg_ParseTuple(args, "II", &first, &limit) ? small_blocks_read(first, limit) : NULL;
#else
    return PyArg_ParseTuple(args, "") ? small_blocks_text() : NULL;
#endif
}

static PyObject *
native_malloc_arenas(PyObject *Py_UNUSED(module), PyObject *args)
{
    const char *candidates;
    Py_ssize_t size;
    unsigned int limit;
    if (!PyArg_ParseTuple(args, "y#I", &candidates, &size, &limit)) {
        return NULL;
    }
    return malloc_arenas_read((const uint64_t *)candidates, (size_t)size / sizeof(uint64_t),
                              limit);
}

static PyObject *
native_resident_bytes(PyObject *Py_UNUSED(module), PyObject *argument)
{
    char *bounds;
    Py_ssize_t size;
    if (PyBytes_AsStringAndSize(argument, &bounds, &size) < 0) {
        return NULL;
    }
    PyObject *result = PyBytes_FromStringAndSize(NULL, size / 2);
    if (result == NULL) {
        return NULL;
    }
    const uintptr_t *bound = (const uintptr_t *)bounds;
    uint64_t *resident = (uint64_t *)PyBytes_AS_STRING(result);
    Py_BEGIN_ALLOW_THREADS
    for (size_t i = 0; i < (size_t)size / (2 * sizeof *bound); i++) {
        resident[i] = pages_resident((const void *)bound[2 * i], bound[2 * i + 1] - bound[2 * i]);
    }
    Py_END_ALLOW_THREADS
    return result;
}

static PyObject *
native_marked_labels(NO_ARGUMENTS)
{
    return labels_marked();
}

static PyObject *
native_learn_tasks(PyObject *Py_UNUSED(module), PyObject *task)
{
    return PyBool_FromLong(asyncio_learn(task));
}

static PyObject *
native_asyncio_tasks(NO_ARGUMENTS)
{
    return asyncio_tasks();
}

static PyObject *
native_running_loops(PyObject *Py_UNUSED(module), PyObject *own)
{
    return asyncio_running_loops(own);
}

/* Called at exit: nothing may be sampled while the interpreter is finalized. */
static PyObject *
native_close(NO_ARGUMENTS)
{
    closed = true;
    cpu_stop();
    cpu_free();
    heap_stop();
    labels_set_writer(NULL);
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"check", native_check, METH_NOARGS,
     PyDoc_STR("Raise OSError if the system lets no process read its own memory.")},
    {"use_labels", native_use_labels, METH_VARARGS,
     PyDoc_STR("use_labels(variable, writer): the context variable of the label sets, and the"
               " function that stores dying ones: writer(set, number, marked, waited for)"
               " -> label.")},
    {"describe", native_describe, METH_O,
     PyDoc_STR("describe(place) -> (name, file, first line, line or 0)")},
    {"cpu_start", native_cpu_start, METH_VARARGS,
     PyDoc_STR("cpu_start(hz, credit_ns=20_000_000, share=8): raises RuntimeError if SIGPROF or"
               " its timer is in use. The others bound the cost: see Budget.")},
    {"cpu_stop", native_cpu_stop, METH_NOARGS,
     PyDoc_STR("Stop sampling; samples stay until cpu_free.")},
    {"cpu_yield", native_cpu_yield, METH_NOARGS,
     PyDoc_STR("Give SIGPROF back at once; cpu_stop must still be called.")},
    {"cpu_free", native_cpu_free, METH_NOARGS, PyDoc_STR("Drop the samples.")},
    {"cpu_read", native_cpu_read, METH_VARARGS,
     PyDoc_STR("cpu_read(position, limit) -> ([(places, label set's number, periods)],"
               " next position). The first position is 0.")},
    {"cpu_threads", native_cpu_threads, METH_NOARGS,
     PyDoc_STR("([(native id, periods sampled)] of the sampled threads, native id of the watcher"
               " that finds them)")},
    {"cpu_begin_thread", native_cpu_begin_thread, METH_O,
     PyDoc_STR("cpu_begin_thread(native_id): sample a thread that has just begun.")},
    {"cpu_stats", native_cpu_stats, METH_NOARGS,
     PyDoc_STR("Counters of the sampling, and its cost.")},
    {"heap_start", native_heap_start, METH_O,
     PyDoc_STR("heap_start(rate): take one sample in `rate` bytes on average.")},
    {"heap_stop", native_heap_stop, METH_NOARGS, PyDoc_STR("Stop sampling, and drop the samples.")},
    {"heap_check", native_heap_check, METH_NOARGS,
     PyDoc_STR("Return whether the sampler is on and its hooks are called: another tool may have"
               " removed them.")},
    {"heap_read", native_heap_read, METH_NOARGS,
     PyDoc_STR("Rows of seven native uint64: stack, size class, label, allocated objects"
               " and bytes, live objects and bytes, as sampled.")},
    {"heap_stack", native_heap_stack, METH_O, PyDoc_STR("heap_stack(stack) -> places")},
    {"heap_pending", native_heap_pending, METH_NOARGS,
     PyDoc_STR("[(label, label set)] of labels that are not stored yet.")},
    {"heap_used_labels", native_heap_used_labels, METH_O,
     PyDoc_STR("heap_used_labels(end) -> a byte for each label: whether any sample has it. Labels"
               " of allocations of which nothing is alive are removed first.")},
    {"heap_compact", native_heap_compact, METH_O,
     PyDoc_STR("heap_compact(limit): make room for new names and stacks if little is left;"
               " return whether another call is needed.")},
    {"heap_stats", native_heap_stats, METH_NOARGS,
     PyDoc_STR("Exact counters, and the numbers of lost samples, labels and stacks.")},
    {"memory", native_memory, METH_NOARGS,
     PyDoc_STR("The resident bytes of all tables of the C core.")},
    {"size_class", native_size_class, METH_O,
     PyDoc_STR("size_class(size) -> largest size of its class")},
    {"small_blocks", native_small_blocks, METH_VARARGS,
#if SMALL_BLOCKS_IN_STEPS
     PyDoc_STR("small_blocks(first, limit) -> (next arena or 0, larger blocks, bytes of native"
               " uint64: bytes of these arenas, ever used, in pools with blocks, blocks by size"
               " class); None without pymalloc")},
#else
     PyDoc_STR("small_blocks() -> the text of sys._debugmallocstats()")},
#endif
    {"malloc_arenas", native_malloc_arenas, METH_VARARGS,
     PyDoc_STR("malloc_arenas(candidates, limit) -> (free bytes, bytes in mapped blocks, whether"
               " all free chunks were counted, starts and sizes of heaps); None if they are not"
               " known")},
    {"resident_bytes", native_resident_bytes, METH_O,
     PyDoc_STR("resident_bytes(ranges) -> how many bytes of each are in RAM; both are bytes of"
               " native uint64, the ranges' starts and ends")},
    {"marked_labels", native_marked_labels, METH_NOARGS,
     PyDoc_STR("Living label sets that CPU samples may have.")},
    {"learn_tasks", native_learn_tasks, METH_O,
     PyDoc_STR("learn_tasks(task) -> whether asyncio_tasks can be used. `task` must be an"
               " _asyncio.Task just made in this thread.")},
    {"asyncio_tasks", native_asyncio_tasks, METH_NOARGS,
     PyDoc_STR("All registered tasks of all threads; None before 3.14, before learn_tasks"
               " has succeeded, or if a list is not as expected.")},
    {"running_loops", native_running_loops, METH_O,
     PyDoc_STR("running_loops(loop of this thread or None) -> [(thread, loop, task or"
               " None)]; None if thread states are not as expected.")},
    {"current_frames", (PyCFunction)(void (*)(void))frames_current,
     METH_VARARGS | METH_KEYWORDS,
     PyDoc_STR("current_frames(idents=None, depth=129, locals_of=()) -> ThreadStacks")},
    {"running_frames", frames_running, METH_O,
     PyDoc_STR("running_frames(coroutine) -> ((code, offset), ...) from the innermost frame"
               " to the coroutine's own; () if it does not run")},
    {"generator_frame", frames_of_generator, METH_O,
     PyDoc_STR("generator_frame(generator) -> (code, offset); None if it has ended")},
    {"awaited", frames_awaited, METH_O,
     PyDoc_STR("awaited(generator) -> the awaited object; None if it is not suspended there")},
    {"generator_local", frames_generator_local, METH_VARARGS,
     PyDoc_STR("generator_local(generator, name) -> its value; None if it has none")},
    {"close", native_close, METH_NOARGS, PyDoc_STR("Stop everything for good.")},
    {NULL, NULL, 0, NULL},
};

static void
before_fork(void)
{
    heap_before_fork();
    memory_before_fork();
}

static void
after_fork_in_parent(void)
{
    memory_after_fork();
    heap_after_fork_in_parent();
}

static void
after_fork_in_child(void)
{
    memory_after_fork();
    names_after_fork_in_child();
    cpu_after_fork_in_child();
    heap_after_fork_in_child();
}

static int
execute(PyObject *module)
{
    static bool registered;
    if (PyInterpreterState_Get() != PyInterpreterState_Main()) {
        PyErr_SetString(PyExc_ImportError, "only the main interpreter can be profiled");
        return -1;
    }
    if (!registered) {
        if (pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child) != 0) {
            PyErr_NoMemory();
            return -1;
        }
        registered = true;
    }
    return PyModule_AddType(module, &LabelSet_Type) < 0 ||
                   PyModule_AddType(module, &ThreadStacks_Type) < 0 ||
                   PyModule_AddType(module, &ThreadStack_Type) < 0 ||
                   PyModule_AddType(module, &GcTimer_Type) < 0 ||
                   PyModule_AddIntMacro(module, PLACE_TRUNCATED) < 0 ||
                   PyModule_AddIntMacro(module, PLACE_UNREADABLE) < 0 ||
                   PyModule_AddIntMacro(module, PLACE_NO_FRAME) < 0 ||
                   PyModule_AddIntMacro(module, PLACE_LOST) < 0 ||
                   PyModule_AddIntMacro(module, PLACE_SKIPPED) < 0 ||
                   PyModule_AddIntMacro(module, PLACE_LATE) < 0
               ? -1
               : 0;
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, execute},
#if PY_VERSION_HEX >= 0x030c0000
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED},
#endif
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "asgi_pprof._native",
    .m_doc = PyDoc_STR("Samplers of CPU time and memory. Private to asgi_pprof."),
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC
PyInit__native(void)
{
    return PyModuleDef_Init(&definition);
}
