/*
 * The differences between CPython versions, in one place.
 *
 * The structures come from the interpreter's own internal headers, so their offsets are those
 * of the version that this is compiled for; layouts do not change within a minor version. The
 * functions here document the fields.
 *
 * 3.11  Include/internal/pycore_frame.h; the frame is found through tstate->cframe
 * 3.12  the same; frames on the C stack stand between calls (FRAME_OWNED_BY_CSTACK)
 * 3.13  f_executable and instr_ptr replace f_code and prev_instr; no cframe
 * 3.14  Include/internal/pycore_interpframe_structs.h; f_executable is a tagged reference
 * 3.15  as 3.14
 */
#ifndef ASGI_PPROF_LAYOUT_H
#define ASGI_PPROF_LAYOUT_H

#define Py_BUILD_CORE_MODULE 1
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <internal/pycore_context.h>
#include <internal/pycore_frame.h>
#include <internal/pycore_hamt.h>
#include <internal/pycore_interp.h>
#include <internal/pycore_runtime.h>
#if PY_VERSION_HEX >= 0x030e0000
#include <internal/pycore_interpframe_structs.h>
#endif

#if PY_VERSION_HEX < 0x030b0000 || PY_VERSION_HEX >= 0x03100000
#error "the layout of this CPython is not known"
#endif
#ifdef Py_GIL_DISABLED
#error "free-threaded builds are not supported"
#endif

typedef struct _PyInterpreterFrame Frame;

/* The part of a frame that is read: all but its locals. */
#define FRAME_SIZE offsetof(Frame, localsplus)
/* The part of a code object that is read: all but its bytecode. */
#define CODE_SIZE offsetof(PyCodeObject, co_code_adaptive)
/* The part of a thread state that is read: everything up to its context. */
#define THREAD_STATE_SIZE (offsetof(PyThreadState, context) + sizeof(PyObject *))

#if PY_VERSION_HEX >= 0x030d0000
#define THREAD_FRAME(state) ((state)->current_frame)
#define THREAD_HAS_CFRAME 0
#else
/* The C frame points to the current frame, and must be read separately. */
#define THREAD_CFRAME(state) ((state)->cframe)
#define THREAD_HAS_CFRAME 1
#endif

static inline PyCodeObject *
frame_code(const Frame *frame)
{
#if PY_VERSION_HEX >= 0x030e0000
    return (PyCodeObject *)(frame->f_executable.bits & ~(uintptr_t)7);
#elif PY_VERSION_HEX >= 0x030d0000
    return (PyCodeObject *)frame->f_executable;
#else
    return frame->f_code;
#endif
}

/* Return the address of the frame's current instruction; before 3.13, of the last one started. */
static inline const char *
frame_instruction(const Frame *frame)
{
#if PY_VERSION_HEX >= 0x030d0000
    return (const char *)frame->instr_ptr;
#else
    return (const char *)frame->prev_instr;
#endif
}

/* Return whether a frame belongs to no function: C code puts one before a call into Python. */
static inline bool
frame_is_entry(const Frame *frame)
{
#if PY_VERSION_HEX >= 0x030e0000
    return frame->owner >= FRAME_OWNED_BY_INTERPRETER;
#elif PY_VERSION_HEX >= 0x030c0000
    return frame->owner == FRAME_OWNED_BY_CSTACK;
#else
    (void)frame;
    return false;
#endif
}

/*
 * A string whose characters follow its header ("compact"), as those of all names in code do.
 * Source: Include/cpython/unicodeobject.h, PyASCIIObject.
 */
#define STRING_HEADER_SIZE sizeof(PyCompactUnicodeObject)

static inline bool
string_is_compact(const PyASCIIObject *string)
{
    return string->state.compact;
}

static inline bool
string_is_ascii(const PyASCIIObject *string)
{
    return string->state.ascii;
}

static inline unsigned
string_kind(const PyASCIIObject *string)
{
    return string->state.kind;
}

/*
 * The mapping of a context: a hash array mapped trie.
 * Source: Python/hamt.c, "HAMT" and hamt_node_*_find. Array nodes are private to
 * that file; the others have a header.
 */
#define HAMT_ARRAY_NODE_SIZE 32

typedef struct {
    PyObject_HEAD
    PyHamtNode *a_array[HAMT_ARRAY_NODE_SIZE];
    Py_ssize_t a_count;
} HamtArrayNode;

#if PY_VERSION_HEX < 0x030c0000
/* In 3.11 this one is private as well. */
typedef struct {
    PyObject_VAR_HEAD
    uint32_t b_bitmap;
    PyObject *b_array[1];
} HamtBitmapNode;
#else
typedef PyHamtNode_Bitmap HamtBitmapNode;
#endif

static inline int32_t
hamt_hash(Py_hash_t hash)
{
    return (int32_t)(hash & 0xffffffffl) ^ (int32_t)(hash >> 32);
}

#endif
