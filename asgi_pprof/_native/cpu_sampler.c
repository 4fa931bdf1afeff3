#define _GNU_SOURCE
#include "cpu_sampler.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <unistd.h>

#include "clocks.h"
#include "labels.h"
#include "lists.h"
#include "memory.h"
#include "names.h"
#include "reader.h"
#include "store.h"
#include "unwinder.h"

#ifndef sigev_notify_thread_id
#define sigev_notify_thread_id _sigev_un._tid
#endif

#define MAX_THREADS 16384
#define CHUNK 64 /* slots that are allocated at a time */
#define MAX_INTERPRETERS 64
#define WATCH_NS 40000000 /* so new threads are found within 50 ms */
#define WATCH_SHARE 50    /* the watcher sleeps this many times as long as it works: 2 % of a CPU */
#define ENDED_CHECKS 64   /* slots that each round checks for ended threads, and some more */
#define SAMPLE_UNITS (1u << 22) /* 64 MiB of address space */
#define SAMPLE_SLOTS (1u << 20)
#define NAMES_MIB 64
#define STOP_PATIENCE_S 5
#define LATE_NS 100000000 /* the kernel checks timers at least every 10 ms */

typedef struct {
    uint64_t label_set;
    uint32_t places[MAX_DEPTH + 1];
    uint32_t unused;
} SampleKey;

#define SAMPLE_KEY_SIZE(depth) (offsetof(SampleKey, places) + (depth) * sizeof(uint32_t))

/* The timer of one thread, and the memory that its signal handler uses. */
typedef struct {
    timer_t timer;
    _Atomic bool busy; /* its handler runs */
    _Atomic uint64_t samples, periods, unreadable, lost, skipped, unlabelled, own_ns;
    uint64_t before; /* the periods of threads that had this slot before */
    uint64_t since_ns, spent_ns; /* the thread's CPU time at its first signal, and in samples */
    Reader reader;
    PyThreadState state;
    Stack stack;
    SampleKey key;
} Slot;

/* Identifies a thread state: no later one has the same two numbers. */
typedef struct {
    int64_t interpreter;
    uint64_t state;
} StateId;

static struct {
    _Atomic bool on;
    _Atomic bool displaced;
    bool started; /* between start and stop */
    bool active;  /* until the end of cpu_stop: a fork may come in the middle of it */
    long period_ns;
    Budget budget;
    Slot *chunks[MAX_THREADS / CHUNK];
    pid_t threads[MAX_THREADS]; /* by slot; 0: it has no timer */
    StateId states[MAX_THREADS]; /* by slot: the state in which the thread's id was found */
    _Atomic int slot_count; /* slots used since the start */
    int unused[MAX_THREADS], unused_count; /* of these, those without a timer */
    int next_check; /* the next slot to check for an ended thread */
    StateId seen[MAX_INTERPRETERS];   /* by interpreter: the newest state that two walks passed */
    uint64_t passed[MAX_INTERPRETERS]; /* by interpreter: the newest that one walk passed */
    ByteStore samples;
    struct sigaction replaced;
    pthread_t watcher;
    pid_t watcher_id;
    bool has_watcher;
    bool stopping;
    pthread_mutex_t mutex; /* for the watcher's sleep, and held while it works */
    pthread_cond_t wake;
    uint64_t watcher_ns, unsampled;
    unsigned seed;
    Reader walker; /* for find_threads */
} cpu = {.mutex = PTHREAD_MUTEX_INITIALIZER};

static Slot *
slot_at(int index)
{
    return &cpu.chunks[index / CHUNK][index % CHUNK];
}

static uint64_t
thread_cpu_ns(void)
{
    return clock_ns(CLOCK_THREAD_CPUTIME_ID);
}

static void
add(_Atomic uint64_t *counter, uint64_t amount)
{
    atomic_fetch_add_explicit(counter, amount, memory_order_relaxed);
}

static void
add_sample(Slot *slot, uint64_t periods)
{
    memcpy(slot->key.places, slot->stack.places, slot->stack.depth * sizeof(uint32_t));
    uint32_t id = store_intern(&cpu.samples, 0, &slot->key, SAMPLE_KEY_SIZE(slot->stack.depth),
                               sizeof(uint64_t));
    if (id != 0) {
        add(record_extra(store_record(&cpu.samples, id)), periods);
    }
    else {
        add(&slot->lost, periods);
    }
    add(&slot->periods, periods);
}

/*
 * Add periods of which most are not of this stack's moment, since the signal came late: in a long
 * system call, or when SIGPROF was unblocked. They get an innermost place that says so.
 */
static void
add_late_sample(Slot *slot, uint64_t periods)
{
    add_sample(slot, 1);
    Stack *stack = &slot->stack;
    if (stack->depth <= MAX_DEPTH) {
        stack->depth++;
    }
    memmove(stack->places + 1, stack->places, (stack->depth - 1) * sizeof *stack->places);
    stack->places[0] = PLACE_LATE;
    add_sample(slot, periods - 1);
}

/* Return whether a sample may be taken; if not, count the periods under a name that says so. */
static bool
is_within_budget(Slot *slot, uint64_t now_ns, uint64_t periods)
{
    if (slot->since_ns == 0) {
        slot->since_ns = now_ns;
    }
    if (slot->spent_ns <= cpu.budget.credit_ns + (now_ns - slot->since_ns) / cpu.budget.share) {
        return true;
    }
    slot->key.label_set = 0;
    slot->stack.depth = 1;
    slot->stack.places[0] = PLACE_SKIPPED;
    add_sample(slot, periods);
    add(&slot->skipped, periods);
    return false;
}

static void
take_sample(Slot *slot, uint64_t periods)
{
    uint64_t begun = thread_cpu_ns();
    if (!is_within_budget(slot, begun, periods)) {
        return;
    }
    Reader *reader = &slot->reader;
    LabelSet found;
    reader_begin(reader);
    slot->key.label_set = 0;
    /* This only reads thread-local storage: no lock, no allocation. NULL once the thread's
       state is gone. */
    const PyThreadState *state = PyGILState_GetThisThreadState();
    if (state == NULL) {
        slot->stack.depth = 1;
        slot->stack.places[0] = PLACE_NO_FRAME;
    }
    else if (!unwind(cpu_names, reader, state, &slot->state, &slot->stack)) {
        add(&slot->unreadable, periods);
    }
    else if (labels_find(reader, &slot->state, &found) != NULL) {
        if (labels_mark(found.number)) {
            slot->key.label_set = found.number;
        }
        else {
            add(&slot->unlabelled, periods);
        }
    }
    if (periods * (uint64_t)cpu.period_ns <= LATE_NS) {
        add_sample(slot, periods);
    }
    else {
        add_late_sample(slot, periods);
    }
    add(&slot->samples, 1);
    uint64_t took_ns = thread_cpu_ns() - begun;
    slot->spent_ns += took_ns;
    add(&slot->own_ns, took_ns);
}

static void
on_signal(int number, siginfo_t *info, void *context)
{
    (void)number, (void)context;
    int saved = errno, index = info->si_value.sival_int;
    if (info->si_code == SI_TIMER && index >= 0 && index < atomic_load(&cpu.slot_count)) {
        Slot *slot = slot_at(index);
        uint64_t periods = 1 + (uint64_t)info->si_overrun;
        /* First set busy, then read cpu.on. cpu_stop first clears cpu.on, then reads busy. */
        if (atomic_exchange(&slot->busy, true)) {
            add(&slot->lost, periods); /* a late signal to the thread that had the slot before */
        }
        else {
            if (atomic_load(&cpu.on)) {
                take_sample(slot, periods);
            }
            atomic_store(&slot->busy, false);
        }
    }
    errno = saved;
}

static bool
timer_has_ended(timer_t timer)
{
    /* The kernel disarms the timer of a thread that has ended. */
    struct itimerspec left;
    return timer_gettime(timer, &left) < 0 ||
           (left.it_value.tv_sec == 0 && left.it_value.tv_nsec == 0);
}

static void
release_slot(int index)
{
    timer_delete(slot_at(index)->timer);
    cpu.threads[index] = 0;
    cpu.unused[cpu.unused_count++] = index;
}

/* Return a slot without a timer, -1 if there is no room for one more. */
static int
unused_slot(void)
{
    /* A slot whose handler still runs is moved to the other end. */
    for (int i = 0; i < cpu.unused_count; i++) {
        int index = cpu.unused[--cpu.unused_count];
        if (!atomic_load(&slot_at(index)->busy)) {
            return index;
        }
        memmove(cpu.unused + 1, cpu.unused, (size_t)cpu.unused_count++ * sizeof(int));
        cpu.unused[0] = index;
    }
    int index = atomic_load(&cpu.slot_count);
    if (index == MAX_THREADS) {
        return -1;
    }
    if (cpu.chunks[index / CHUNK] == NULL) {
        /* Never unmapped, because a handler may run late. Unused pages are never touched. */
        void *memory = memory_map(CHUNK * sizeof(Slot));
        if (memory == NULL) {
            return -1;
        }
        cpu.chunks[index / CHUNK] = memory;
    }
    atomic_store(&cpu.slot_count, index + 1);
    return index;
}

/* Start a thread's timer. Its first signal comes after a random part of a period, so that
   short-lived threads are sampled without bias. */
static bool
arm(int index, pid_t thread)
{
    Slot *slot = slot_at(index);
    struct sigevent event = {.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = SIGPROF};
    event.sigev_value.sival_int = index;
    event.sigev_notify_thread_id = thread;
    clockid_t clock = (clockid_t)((~(unsigned)thread << 3) | 6); /* CPUCLOCK_PERTHREAD | _SCHED */
    if (timer_create(clock, &event, &slot->timer) < 0) {
        return false;
    }
    double part = (rand_r(&cpu.seed) + 1.0) / (RAND_MAX + 1.0);
    long first = (long)((double)cpu.period_ns * part);
    struct itimerspec times = {
        .it_interval = {cpu.period_ns / 1000000000, cpu.period_ns % 1000000000},
        .it_value = {first / 1000000000, first % 1000000000},
    };
    if (times.it_value.tv_sec == 0 && times.it_value.tv_nsec == 0) {
        times.it_value.tv_nsec = 1;
    }
    slot->reader.pid = getpid();
    slot->reader.trusted = false;
    slot->reader.count = 0;
    slot->since_ns = slot->spent_ns = 0;
    slot->before = atomic_load(&slot->periods);
    cpu.threads[index] = thread;
    if (timer_settime(slot->timer, 0, &times, NULL) < 0) {
        timer_delete(slot->timer);
        cpu.threads[index] = 0;
        return false;
    }
    return true;
}

static int
slot_of(pid_t thread)
{
    int count = atomic_load(&cpu.slot_count);
    for (int i = 0; i < count; i++) {
        if (cpu.threads[i] == thread) {
            return i;
        }
    }
    return -1;
}

/*
 * Give a thread a timer, unless it has one. Return whether this thread state need not be read
 * again. On 3.11 a state has the id of the thread that makes it until its own thread begins.
 */
static bool
sample_thread(pid_t thread, StateId state)
{
    int index = slot_of(thread);
    if (index >= 0) {
        if (cpu.states[index].interpreter == state.interpreter &&
            cpu.states[index].state == state.state) {
            return true;
        }
        if (!timer_has_ended(slot_at(index)->timer)) {
            StateId *known = &cpu.states[index];
            bool is_settled = PY_VERSION_HEX >= 0x030c0000 ||
                              state.interpreter != known->interpreter;
            if (!is_settled && state.state < known->state) {
                *known = state; /* the newer state is that of a thread which this one starts */
            }
            return is_settled;
        }
        release_slot(index); /* it is of an ended thread that had the same id */
    }
    index = unused_slot();
    if (index < 0) {
        cpu.unsampled++;
    }
    else if (arm(index, thread)) {
        cpu.states[index] = state;
    }
    else {
        cpu.unsampled += errno != EINVAL; /* EINVAL: the thread has ended */
        cpu.unused[cpu.unused_count++] = index;
    }
    return true;
}

void
cpu_begin_thread(pid_t thread)
{
    /* While the watcher works it has the lock, and it finds the thread itself. */
    if (cpu.started && pthread_mutex_trylock(&cpu.mutex) == 0) {
        if (!cpu.stopping && !atomic_load(&cpu.displaced) && slot_of(thread) < 0) {
            /* The highest number: the watcher has yet to learn that of the thread's state. */
            StateId unknown = {PyInterpreterState_GetID(PyInterpreterState_Get()), UINT64_MAX};
            sample_thread(thread, unknown);
        }
        pthread_mutex_unlock(&cpu.mutex);
    }
}

static StateId *
last_seen(int64_t interpreter)
{
    int i = 0;
    while (i < MAX_INTERPRETERS - 1 && cpu.seen[i].interpreter != interpreter &&
           cpu.seen[i].state != 0) {
        i++;
    }
    if (cpu.seen[i].interpreter != interpreter) {
        cpu.seen[i] = (StateId){interpreter, 0};
        cpu.passed[i] = 0;
    }
    return &cpu.seen[i];
}

/*
 * Sample the threads that an interpreter has started since the last walk; return the number of
 * states read. CPython puts a new state at the head of the list, and gives it the next number.
 *
 * No lock is held, and threads start and end meanwhile. So this copies memory as the signal
 * handler does, and an id is only a hint: the kernel refuses to make a timer for anything that
 * is not a thread of this process.
 */
static int
sample_new_threads(const PyInterpreterState *interpreter)
{
    const PyThreadState *at;
    PyThreadState state;
    int64_t id;
    if (!reader_copy(&cpu.walker, &interpreter->id, &id, sizeof id) ||
        !reader_copy(&cpu.walker, &interpreter->threads.head, &at, sizeof at)) {
        return 0;
    }
    StateId *seen = last_seen(id);
    uint64_t *passed = &cpu.passed[seen - cpu.seen];
    uint64_t newest = 0, previous = UINT64_MAX;
    int count = 0;
    bool is_whole = false;
    for (; count < 2 * MAX_THREADS; count++) {
        is_whole = at == NULL;
        if (is_whole || !reader_copy(&cpu.walker, at, &state, sizeof state) ||
            state.interp != interpreter || state.id == 0 || state.id >= previous) {
            break; /* the end of the list, or the freed state of a thread that has just ended */
        }
        is_whole = state.id <= seen->state;
        if (is_whole) {
            break;
        }
        previous = state.id;
        if (state.native_thread_id != 0 &&
            sample_thread((pid_t)state.native_thread_id, (StateId){id, state.id})) {
            newest = newest > state.id ? newest : state.id;
        }
        else {
            newest = 0; /* it has not begun: read it and all newer states again next time */
        }
        at = state.next;
    }
    /* A walk that broke off, or that ended early at a freed state, has missed threads. So a state
       counts as seen only when two walks have passed it. */
    if (is_whole) {
        uint64_t before = *passed;
        *passed = newest;
        if (before != 0) {
            seen->state = before > seen->state ? before : seen->state;
        }
    }
    return count;
}

/* Check some of the slots, and delete the timers of threads that have ended. */
static void
release_ended(int checks)
{
    int count = atomic_load(&cpu.slot_count);
    for (int i = 0; i < checks && i < count; i++) {
        cpu.next_check = (cpu.next_check + 1) % count;
        if (cpu.threads[cpu.next_check] != 0 && timer_has_ended(slot_at(cpu.next_check)->timer)) {
            release_slot(cpu.next_check);
        }
    }
}

static void
update_timers(void)
{
    const PyInterpreterState *interpreter = *(PyInterpreterState *volatile *)&_PyRuntime.interpreters.head;
    int found = 0;
    for (int i = 0; interpreter != NULL && i < MAX_INTERPRETERS; i++) {
        found += sample_new_threads(interpreter);
        if (!reader_copy(&cpu.walker, &interpreter->next, &interpreter, sizeof interpreter)) {
            break;
        }
    }
    release_ended(ENDED_CHECKS + 2 * found);
}

static void
release_slots(void)
{
    int count = atomic_load(&cpu.slot_count);
    for (int i = 0; i < count; i++) {
        if (cpu.threads[i] != 0) {
            release_slot(i);
        }
    }
}

static bool
signal_is_ours(void)
{
    struct sigaction current;
    return sigaction(SIGPROF, NULL, &current) == 0 && current.sa_sigaction == on_signal;
}

static void *
watch(void *unused)
{
    (void)unused;
    pthread_setname_np(pthread_self(), "asgi_pprof");
    pthread_mutex_lock(&cpu.mutex);
    cpu.watcher_id = (pid_t)syscall(SYS_gettid);
    while (!cpu.stopping) {
        uint64_t begun = thread_cpu_ns();
        if (signal_is_ours()) {
            update_timers();
        }
        else { /* the application has taken SIGPROF, and must get no more of our signals */
            atomic_store(&cpu.displaced, true);
            release_slots();
            break;
        }
        uint64_t pause_ns = (thread_cpu_ns() - begun) * WATCH_SHARE;
        struct timespec until;
        clock_gettime(CLOCK_MONOTONIC, &until);
        pause_ns = (uint64_t)until.tv_nsec + (pause_ns > WATCH_NS ? pause_ns : WATCH_NS);
        until.tv_sec += (time_t)(pause_ns / 1000000000);
        until.tv_nsec = (long)(pause_ns % 1000000000);
        pthread_cond_timedwait(&cpu.wake, &cpu.mutex, &until);
    }
    cpu.watcher_ns = thread_cpu_ns();
    pthread_mutex_unlock(&cpu.mutex);
    return NULL;
}

static bool
start_watcher(void)
{
    sigset_t all, before;
    pthread_condattr_t clock;
    pthread_condattr_init(&clock);
    pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
    pthread_cond_init(&cpu.wake, &clock);
    pthread_condattr_destroy(&clock);
    cpu.stopping = false;
    /* The watcher must never handle a signal of the application. */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failed = pthread_create(&cpu.watcher, NULL, watch, NULL);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    cpu.has_watcher = failed == 0;
    errno = failed;
    return cpu.has_watcher;
}

static bool
refuse(PyObject *type, const char *reason)
{
    PyErr_SetString(type, reason);
    return false;
}

static bool
open_tables(void)
{
    if (names_open(cpu_names, NAMES_MIB)) {
        if (labels_open_marks()) {
            if (store_open(&cpu.samples, SAMPLE_SLOTS, SAMPLE_UNITS, 1)) {
                return true;
            }
            labels_close_marks();
        }
        names_close(cpu_names);
    }
    return false;
}

static void
forget_slots(void)
{
    int count = atomic_load(&cpu.slot_count);
    atomic_store(&cpu.slot_count, 0);
    for (int i = 0; i < count; i++) {
        Slot *slot = slot_at(i);
        slot->before = 0;
        slot->samples = slot->periods = slot->unreadable = slot->lost = slot->skipped =
            slot->unlabelled = slot->own_ns = 0;
        cpu.threads[i] = 0;
    }
    cpu.unused_count = cpu.next_check = 0;
    memset(cpu.seen, 0, sizeof cpu.seen);
    memset(cpu.passed, 0, sizeof cpu.passed);
}

bool
cpu_start(long hz, Budget budget)
{
    struct sigaction current;
    struct itimerval timer;
    if (cpu.active) {
        return refuse(PyExc_RuntimeError, "cpu profiling already in use");
    }
    if (sigaction(SIGPROF, NULL, &current) < 0 || getitimer(ITIMER_PROF, &timer) < 0) {
        PyErr_SetFromErrno(PyExc_OSError);
        return false;
    }
    if (current.sa_handler != SIG_DFL && current.sa_handler != SIG_IGN) {
        return refuse(PyExc_RuntimeError, "the application handles SIGPROF");
    }
    if (timer.it_value.tv_sec != 0 || timer.it_value.tv_usec != 0) {
        return refuse(PyExc_RuntimeError, "the application uses ITIMER_PROF");
    }
    cpu_free();
    if (!open_tables()) {
        PyErr_NoMemory();
        return false;
    }
    forget_slots();
    cpu.period_ns = 1000000000 / hz;
    cpu.budget = budget;
    cpu.watcher_ns = cpu.unsampled = 0;
    cpu.walker.pid = getpid();
    cpu.seed = (unsigned)thread_cpu_ns();
    atomic_store(&cpu.displaced, false);

    /* SA_ONSTACK, because Go's threads and faulthandler provide an alternate stack to run on. */
    struct sigaction ours = {.sa_flags = SA_SIGINFO | SA_RESTART | SA_ONSTACK};
    ours.sa_sigaction = on_signal;
    sigemptyset(&ours.sa_mask);
    sigaction(SIGPROF, &ours, &cpu.replaced);
    cpu.started = cpu.active = true;
    atomic_store(&cpu.on, true);
    /* The watcher makes the timers of all other threads: a thousand timers take 20 ms. */
    const PyThreadState *state = PyThreadState_Get();
    sample_thread((pid_t)syscall(SYS_gettid), (StateId){state->interp->id, state->id});
    if (!start_watcher()) {
        PyErr_SetFromErrno(PyExc_OSError);
        cpu_stop();
        cpu_free();
        return false;
    }
    return true;
}

static bool
any_handler_runs(void)
{
    for (int i = 0; i < cpu.slot_count; i++) {
        if (atomic_load(&slot_at(i)->busy)) {
            return true;
        }
    }
    return false;
}

static void
stop_watcher(void)
{
    if (cpu.has_watcher) {
        Py_BEGIN_ALLOW_THREADS
        pthread_mutex_lock(&cpu.mutex);
        cpu.stopping = true;
        pthread_cond_signal(&cpu.wake);
        pthread_mutex_unlock(&cpu.mutex);
        pthread_join(cpu.watcher, NULL);
        Py_END_ALLOW_THREADS
        pthread_cond_destroy(&cpu.wake);
        cpu.has_watcher = false;
    }
}

static void
put_signal_back(void)
{
    if (signal_is_ours()) {
        /* Ignoring the signal discards a pending one, whose default action ends the process. */
        struct sigaction ignore = {.sa_handler = SIG_IGN};
        sigaction(SIGPROF, &ignore, NULL);
        sigaction(SIGPROF, &cpu.replaced, NULL);
    }
}

void
cpu_yield(void)
{
    if (cpu.active) {
        pthread_mutex_lock(&cpu.mutex);
        atomic_store(&cpu.displaced, true);
        release_slots();
        put_signal_back();
        pthread_mutex_unlock(&cpu.mutex);
    }
}

void
cpu_stop(void)
{
    if (!cpu.started) {
        return;
    }
    cpu.started = false;
    stop_watcher();
    Py_BEGIN_ALLOW_THREADS
    pthread_mutex_lock(&cpu.mutex);
    release_slots();
    pthread_mutex_unlock(&cpu.mutex);
    Py_END_ALLOW_THREADS
    put_signal_back();
    atomic_store(&cpu.on, false);
    struct timespec pause = {0, 1000000};
    for (int i = 0; any_handler_runs() && i < STOP_PATIENCE_S * 1000; i++) {
        Py_BEGIN_ALLOW_THREADS
        nanosleep(&pause, NULL);
        Py_END_ALLOW_THREADS
    }
    cpu.active = false;
}

void
cpu_free(void)
{
    if (!cpu.active && cpu.samples.slots != NULL) {
        if (any_handler_runs()) {
            cpu.samples.slots = NULL; /* leak it all rather than crash; this has never been seen */
            return;
        }
        store_close(&cpu.samples);
        labels_close_marks();
        names_close(cpu_names);
    }
}

CpuStats
cpu_stats(void)
{
    CpuStats stats = {.watcher_ns = cpu.watcher_ns,
                      .unsampled = cpu.unsampled,
                      .displaced = atomic_load(&cpu.displaced)};
    for (int i = 0; i < cpu.slot_count; i++) {
        Slot *slot = slot_at(i);
        stats.samples += slot->samples;
        stats.periods += slot->periods;
        stats.unreadable += slot->unreadable;
        stats.lost += slot->lost;
        stats.skipped += slot->skipped;
        stats.unlabelled += slot->unlabelled;
        stats.own_ns += slot->own_ns;
    }
    return stats;
}

/*
 * Copy the sample at `*id`, and move `*id` to the next; false if there is none. The caller makes
 * an object of the copy, which may collect garbage and let other threads run, and these may free
 * the samples. So no pointer into them outlives this call, which first checks that they exist.
 */
static bool
next_sample(uint32_t *id, SampleKey *key, uint32_t *depth, uint64_t *periods)
{
    const ByteStore *samples = &cpu.samples;
    while (samples->slots != NULL && *id < atomic_load(&samples->used)) {
        const RecordHeader *record = store_record(samples, *id);
        *id = store_next(samples, *id, sizeof(uint64_t));
        *periods = atomic_load((const _Atomic uint64_t *)record_extra(record));
        if (*periods != 0) { /* 0: two handlers added this stack, and the other record counts */
            memcpy(key, record_key(record), record_size(record));
            *depth = (record_size(record) - (uint32_t)SAMPLE_KEY_SIZE(0)) / sizeof(uint32_t);
            return true;
        }
    }
    return false;
}

PyObject *
cpu_read(uint32_t *id, int limit)
{
    SampleKey key;
    uint32_t depth;
    uint64_t periods;
    PyObject *list = PyList_New(0);
    if (*id == 0) {
        *id = 1;
    }
    while (list != NULL && PyList_GET_SIZE(list) < limit &&
           next_sample(id, &key, &depth, &periods)) {
        PyObject *places = places_tuple(key.places, depth);
        PyObject *sample = places == NULL ? NULL
                                          : Py_BuildValue("(NKK)", places,
                                                          (unsigned long long)key.label_set,
                                                          (unsigned long long)periods);
        list_append_new(&list, sample);
    }
    return list;
}

PyObject *
cpu_threads(void)
{
    typedef struct {
        pid_t thread;
        uint64_t periods;
    } Sampled;
    /* Copy first: making objects may collect garbage, and a finalizer may stop the sampler. */
    pthread_mutex_lock(&cpu.mutex);
    int slots = atomic_load(&cpu.slot_count), count = 0;
    long watcher = cpu.watcher_id;
    Sampled *threads = malloc(((size_t)slots + 1) * sizeof *threads);
    for (int i = 0; threads != NULL && i < slots; i++) {
        if (cpu.threads[i] != 0) {
            uint64_t periods = atomic_load(&slot_at(i)->periods) - slot_at(i)->before;
            threads[count++] = (Sampled){cpu.threads[i], periods};
        }
    }
    pthread_mutex_unlock(&cpu.mutex);
    if (threads == NULL) {
        return PyErr_NoMemory();
    }
    PyObject *list = PyList_New(0);
    for (int i = 0; list != NULL && i < count; i++) {
        list_append_new(&list, Py_BuildValue("(lK)", (long)threads[i].thread,
                                             (unsigned long long)threads[i].periods));
    }
    free(threads);
    return list != NULL ? Py_BuildValue("(Nl)", list, watcher) : NULL;
}

void
cpu_after_fork_in_child(void)
{
    if (!cpu.active) {
        return;
    }
    /* A child inherits the handler, but neither timers nor the watcher. */
    if (signal_is_ours()) {
        sigaction(SIGPROF, &cpu.replaced, NULL);
    }
    int count = atomic_load(&cpu.slot_count);
    for (int i = 0; i < count; i++) {
        atomic_store(&slot_at(i)->busy, false);
    }
    forget_slots();
    atomic_store(&cpu.on, false);
    cpu.started = cpu.active = cpu.has_watcher = false;
    pthread_mutex_init(&cpu.mutex, NULL);
    cpu_free();
}
