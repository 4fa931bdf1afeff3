#include "unwinder.h"

#define MAX_STEPS (4 * MAX_DEPTH) /* counts entry frames as well, and ends a cycle */

/* Follow the frames from the innermost one on, which may be NULL. */
static bool
walk(NameTable *names, Reader *reader, const Frame *at, Stack *stack)
{
    stack->depth = 0;
    for (int step = 0; at != NULL && step < MAX_STEPS; step++) {
        Frame frame;
        if (!reader_read(reader, at, &frame, FRAME_SIZE)) {
            return false;
        }
        at = frame.previous;
        if (frame_is_entry(&frame)) {
            continue;
        }
        uint32_t place = names_place(names, reader, frame_code(&frame),
                                     frame_instruction(&frame));
        if (place == PLACE_NONE) {
            return false;
        }
        if (place == PLACE_HIDDEN) {
            continue;
        }
        if (stack->depth == MAX_DEPTH) {
            stack->places[stack->depth++] = PLACE_TRUNCATED;
            return true;
        }
        stack->places[stack->depth++] = place;
    }
    if (stack->depth == 0) {
        stack->places[stack->depth++] = PLACE_NO_FRAME;
    }
    return at == NULL;
}

#if THREAD_HAS_CFRAME
/*
 * A call from C into Python first links its _PyCFrame, and then sets the frame in it. A thread
 * that is between the two is still in the function that called into C, whose frame is in the
 * _PyCFrame before. It was 1 to 2 % of the samples of code that sorts with a key in Python.
 */
static bool
walk_thread(NameTable *names, Reader *reader, const PyThreadState *state, Stack *stack)
{
    const _PyCFrame *at = THREAD_CFRAME(state);
    for (int tries = 0; at != NULL && tries < 2; tries++) {
        _PyCFrame cframe;
        if (!reader_read(reader, at, &cframe, sizeof cframe)) {
            return false;
        }
        if (walk(names, reader, cframe.current_frame, stack)) {
            return true;
        }
        at = cframe.previous;
    }
    return false;
}
#else
static bool
walk_thread(NameTable *names, Reader *reader, const PyThreadState *state, Stack *stack)
{
    return walk(names, reader, THREAD_FRAME(state), stack);
}
#endif

bool
unwind(NameTable *names, Reader *reader, const PyThreadState *state, PyThreadState *copy,
       Stack *stack)
{
    memset(copy, 0, sizeof *copy);
    if (reader_read(reader, state, copy, THREAD_STATE_SIZE) &&
        walk_thread(names, reader, copy, stack)) {
        return true;
    }
    stack->depth = 1;
    stack->places[0] = PLACE_UNREADABLE;
    return false;
}

PyObject *
places_tuple(const uint32_t *places, uint32_t depth)
{
    PyObject *tuple = PyTuple_New(depth);
    for (uint32_t i = 0; tuple != NULL && i < depth; i++) {
        PyObject *place = PyLong_FromUnsignedLong(places[i]);
        if (place == NULL) {
            Py_CLEAR(tuple);
        }
        else {
            PyTuple_SET_ITEM(tuple, i, place);
        }
    }
    return tuple;
}
