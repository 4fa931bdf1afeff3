#include "unwinder.h"

#define MAX_STEPS (4 * MAX_DEPTH) /* counts entry frames as well, and ends a cycle */

/* Read the innermost frame of a thread, NULL for none; false if it cannot be read. */
static bool
first_frame(Reader *reader, const PyThreadState *state, const Frame **frame)
{
#if THREAD_HAS_CFRAME
    _PyCFrame cframe;
    if (!reader_read(reader, THREAD_CFRAME(state), &cframe, sizeof cframe)) {
        return false;
    }
    *frame = cframe.current_frame;
#else
    (void)reader;
    *frame = THREAD_FRAME(state);
#endif
    return true;
}

static bool
walk(NameTable *names, Reader *reader, const PyThreadState *state, Stack *stack)
{
    const Frame *at;
    if (!first_frame(reader, state, &at)) {
        return false;
    }
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

bool
unwind(NameTable *names, Reader *reader, const PyThreadState *state, PyThreadState *copy,
       Stack *stack)
{
    stack->depth = 0;
    memset(copy, 0, sizeof *copy);
    if (reader_read(reader, state, copy, THREAD_STATE_SIZE) && walk(names, reader, copy, stack)) {
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
