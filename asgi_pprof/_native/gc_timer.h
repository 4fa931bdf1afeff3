/*
 * GcTimer, an entry of `gc.callbacks` that times collections.
 *
 * In C, because what is called there runs in the middle of whatever allocates: a function
 * in Python may let other threads run, and ours would do so in every application.
 *
 * Sources: Modules/gcmodule.c, invoke_gc_callback; runtime/mstats.go, PauseNs and PauseEnd.
 */
#ifndef ASGI_PPROF_GC_TIMER_H
#define ASGI_PPROF_GC_TIMER_H

#include "layout.h"

extern PyTypeObject GcTimer_Type;

#endif
