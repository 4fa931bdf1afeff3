/*
 * GcTimer, an entry of `gc.callbacks` that times garbage collections.
 *
 * A callback runs inside any code that allocates. A callback in Python may let other threads run
 * there, in every application that uses this package; so this one is written in C.
 *
 * Sources: Modules/gcmodule.c, invoke_gc_callback; runtime/mstats.go, PauseNs and PauseEnd.
 */
#ifndef ASGI_PPROF_GC_TIMER_H
#define ASGI_PPROF_GC_TIMER_H

#include "layout.h"

extern PyTypeObject GcTimer_Type;

#endif
