/*
 * GcTimer, an entry of `gc.callbacks` that times garbage collections.
 *
 * A callback runs in the middle of whatever allocates. One written in Python may let other
 * threads run there, and would do so in every application that uses us; so this one is in C.
 *
 * Sources: Modules/gcmodule.c, invoke_gc_callback; runtime/mstats.go, PauseNs and PauseEnd.
 */
#ifndef ASGI_PPROF_GC_TIMER_H
#define ASGI_PPROF_GC_TIMER_H

#include "layout.h"

extern PyTypeObject GcTimer_Type;

#endif
