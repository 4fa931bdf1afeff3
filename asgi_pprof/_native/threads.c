#include "threads.h"

#include <sched.h>

/*
 * Threads hold this lock for moments only, and never while they wait for the GIL. We only try to
 * take it and never block: CPython 3.13 does not export the kind of wait that keeps the GIL, and
 * a wait that releases the GIL can deadlock.
 */
#define LOCK_TRIES 1000

static bool
try_lock(void)
{
#if PY_VERSION_HEX >= 0x030d0000
    uint8_t unlocked = 0;
    return _Py_atomic_compare_exchange_uint8(&_PyRuntime.interpreters.mutex._bits, &unlocked, 1);
#else
    return PyThread_acquire_lock(_PyRuntime.interpreters.mutex, NOWAIT_LOCK);
#endif
}

bool
threads_lock(void)
{
    for (int i = 0; i < LOCK_TRIES; i++) {
        if (try_lock()) {
            return true;
        }
        sched_yield();
    }
    return false;
}

void
threads_unlock(void)
{
#if PY_VERSION_HEX >= 0x030d0000
    PyMutex_Unlock(&_PyRuntime.interpreters.mutex);
#else
    PyThread_release_lock(_PyRuntime.interpreters.mutex);
#endif
}

bool
threads_share_our_gil(void)
{
    bool shared = true;
#if PY_VERSION_HEX >= 0x030c0000
    if (!threads_lock()) {
        return false;
    }
    /* An interpreter that is just being made has no GIL yet. */
    const void *ours = PyInterpreterState_Main()->ceval.gil;
    for (PyInterpreterState *each = PyInterpreterState_Head(); each != NULL; each = each->next) {
        shared = shared && each->ceval.gil == ours;
    }
    threads_unlock();
#endif
    return shared;
}

PyThreadState *
threads_first(void)
{
    return PyInterpreterState_Main()->threads.head;
}
