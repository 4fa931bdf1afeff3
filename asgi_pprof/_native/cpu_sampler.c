#define _GNU_SOURCE
#include "cpu_sampler.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <unistd.h>

#include "clocks.h"
#include "labels.h"
#include "lists.h"
#include "names.h"
#include "reader.h"
#include "store.h"
#include "unwinder.h"

#ifndef sigev_notify_thread_id
#define sigev_notify_thread_id _sigev_un._tid
#endif

#define MAX_THREADS 1024
#define MAX_INTERPRETERS 1024
#define WATCH_NS 40000000 /* so new threads are found within 50 ms */
#define SAMPLE_UNITS (1u << 22) /* 64 MiB of address space */
#define SAMPLE_SLOTS (1u << 20)
#define STOP_PATIENCE_S 5

typedef struct {
    uint64_t label_set;
    uint32_t places[MAX_DEPTH + 1];
    uint32_t unused;
} SampleKey;

#define SAMPLE_KEY_SIZE(depth) (offsetof(SampleKey, places) + (depth) * sizeof(uint32_t))

/* A thread that has a timer, and the memory that its handler works in. */
typedef struct {
    pid_t thread;
    timer_t timer;
    _Atomic bool busy; /* its handler runs */
    _Atomic uint64_t samples, periods, unreadable, lost, own_ns;
    Reader reader;
    PyThreadState state;
    Stack stack;
    SampleKey key;
} Slot;

static struct {
    _Atomic bool on;
    _Atomic bool displaced;
    bool started; /* between start and stop */
    bool active;  /* until the end of cpu_stop: a fork may come in the middle of it */
    long period_ns;
    Slot *slots;
    int slot_count; /* slots used since the start */
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
take_sample(Slot *slot, uint64_t periods)
{
    uint64_t begun = thread_cpu_ns();
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
    else if (!unwind(reader, state, &slot->state, &slot->stack)) {
        add(&slot->unreadable, periods);
    }
    else if (labels_find(reader, &slot->state, &found) != NULL) {
        slot->key.label_set = found.number;
        labels_mark(found.number);
    }
    memcpy(slot->key.places, slot->stack.places, slot->stack.depth * sizeof(uint32_t));
    uint32_t id = store_intern(&cpu.samples, 0, &slot->key, SAMPLE_KEY_SIZE(slot->stack.depth),
                               sizeof(uint64_t));
    if (id != 0) {
        add(record_extra(store_record(&cpu.samples, id)), periods);
    }
    else {
        add(&slot->lost, periods);
    }
    add(&slot->samples, 1);
    add(&slot->periods, periods);
    add(&slot->own_ns, thread_cpu_ns() - begun);
}

static void
on_signal(int number, siginfo_t *info, void *context)
{
    (void)number, (void)context;
    int saved = errno;
    Slot *slot = info->si_value.sival_ptr;
    if (info->si_code == SI_TIMER && slot >= cpu.slots && slot < cpu.slots + MAX_THREADS) {
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
release_slot(Slot *slot)
{
    timer_delete(slot->timer);
    slot->thread = 0;
}

/* Start a thread's timer. Its first signal comes after a random part of a period, so that
   short-lived threads are sampled without bias. */
static bool
arm(Slot *slot, pid_t thread)
{
    struct sigevent event = {.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = SIGPROF};
    event.sigev_value.sival_ptr = slot;
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
    slot->thread = thread;
    if (timer_settime(slot->timer, 0, &times, NULL) < 0) {
        release_slot(slot);
        return false;
    }
    return true;
}

static Slot *
slot_of(pid_t thread)
{
    for (int i = 0; i < cpu.slot_count; i++) {
        if (cpu.slots[i].thread == thread) {
            return &cpu.slots[i];
        }
    }
    return NULL;
}

static void
sample_thread(pid_t thread)
{
    Slot *slot = slot_of(0);
    if (slot != NULL && atomic_load(&slot->busy)) {
        slot = NULL; /* a handler still uses it */
    }
    if (slot == NULL && cpu.slot_count < MAX_THREADS) {
        slot = &cpu.slots[cpu.slot_count++];
    }
    if (slot == NULL || !arm(slot, thread)) {
        cpu.unsampled++;
    }
}

/*
 * Write the native ids of all threads that have a Python thread state, in any interpreter: at
 * most MAX_THREADS. Return how many. Nothing is locked, and threads come and go. So this reads
 * as carefully as a signal handler, and an id is only a hint: the kernel refuses to make a timer
 * for anything that is not a thread of this process.
 */
static int
find_threads(pid_t *threads)
{
    Reader *reader = &cpu.walker;
    int count = 0;
    const PyInterpreterState *interpreter = *(PyInterpreterState *volatile *)&_PyRuntime.interpreters.head;
    for (int i = 0; interpreter != NULL && i < MAX_INTERPRETERS; i++) {
        const PyThreadState *at;
        PyThreadState state;
        if (!reader_copy(reader, &interpreter->threads.head, &at, sizeof at)) {
            break;
        }
        for (int step = 0; at != NULL && step < 2 * MAX_THREADS && count < MAX_THREADS; step++) {
            if (!reader_copy(reader, at, &state, THREAD_STATE_SIZE)) {
                break;
            }
            if (state.native_thread_id != 0) {
                threads[count++] = (pid_t)state.native_thread_id;
            }
            at = state.next;
        }
        if (!reader_copy(reader, &interpreter->next, &interpreter, sizeof interpreter)) {
            break;
        }
    }
    return count;
}

static bool
contains(const pid_t *threads, int count, pid_t thread)
{
    for (int i = 0; i < count; i++) {
        if (threads[i] == thread) {
            return true;
        }
    }
    return false;
}

/* Give a timer to each new thread, and delete the timers of ended threads. */
static void
update_timers(void)
{
    static pid_t threads[MAX_THREADS];
    int count = find_threads(threads);
    cpu.unsampled = 0;
    for (int i = 0; i < cpu.slot_count; i++) {
        Slot *slot = &cpu.slots[i];
        if (slot->thread != 0 &&
            (timer_has_ended(slot->timer) || !contains(threads, count, slot->thread))) {
            release_slot(slot);
        }
    }
    for (int i = 0; i < count; i++) {
        if (slot_of(threads[i]) == NULL) {
            sample_thread(threads[i]);
        }
    }
}

static void
release_slots(void)
{
    for (int i = 0; i < cpu.slot_count; i++) {
        if (cpu.slots[i].thread != 0) {
            release_slot(&cpu.slots[i]);
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
        struct timespec until;
        clock_gettime(CLOCK_MONOTONIC, &until);
        until.tv_nsec += WATCH_NS;
        if (until.tv_nsec >= 1000000000) {
            until.tv_nsec -= 1000000000;
            until.tv_sec++;
        }
        pthread_cond_timedwait(&cpu.wake, &cpu.mutex, &until);
        if (cpu.stopping) {
            break;
        }
        if (signal_is_ours()) {
            update_timers();
        }
        else { /* the application has taken it: it must get no more signals from us */
            atomic_store(&cpu.displaced, true);
            release_slots();
            break;
        }
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

bool
cpu_start(long hz)
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
    if (cpu.slots == NULL) {
        /* Never unmapped: a handler may be late. Only the slots of threads are ever touched. */
        void *memory = mmap(NULL, MAX_THREADS * sizeof(Slot), PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) {
            PyErr_NoMemory();
            return false;
        }
        cpu.slots = memory;
    }
    cpu_free();
    if (!names_open()) {
        PyErr_NoMemory();
        return false;
    }
    if (!store_open(&cpu.samples, SAMPLE_SLOTS, SAMPLE_UNITS, 1)) {
        names_close();
        PyErr_NoMemory();
        return false;
    }
    for (int i = 0; i < cpu.slot_count; i++) {
        Slot *slot = &cpu.slots[i];
        slot->samples = slot->periods = slot->unreadable = slot->lost = slot->own_ns = 0;
    }
    cpu.slot_count = 0;
    cpu.period_ns = 1000000000 / hz;
    cpu.watcher_ns = cpu.unsampled = 0;
    cpu.walker.pid = getpid();
    cpu.seed = (unsigned)thread_cpu_ns();
    labels_clear_marks();
    atomic_store(&cpu.displaced, false);

    /* SA_ONSTACK, because Go's threads and faulthandler provide an alternate stack to run on. */
    struct sigaction ours = {.sa_flags = SA_SIGINFO | SA_RESTART | SA_ONSTACK};
    ours.sa_sigaction = on_signal;
    sigemptyset(&ours.sa_mask);
    sigaction(SIGPROF, &ours, &cpu.replaced);
    cpu.started = cpu.active = true;
    atomic_store(&cpu.on, true);
    update_timers();
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
        if (atomic_load(&cpu.slots[i].busy)) {
            return true;
        }
    }
    return false;
}

static void
stop_watcher(void)
{
    if (cpu.has_watcher) {
        pthread_mutex_lock(&cpu.mutex);
        cpu.stopping = true;
        pthread_cond_signal(&cpu.wake);
        pthread_mutex_unlock(&cpu.mutex);
        Py_BEGIN_ALLOW_THREADS
        pthread_join(cpu.watcher, NULL);
        Py_END_ALLOW_THREADS
        pthread_cond_destroy(&cpu.wake);
        cpu.has_watcher = false;
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
    release_slots();
    if (signal_is_ours()) {
        /* To ignore a signal discards one that is pending; the default action ends the process. */
        struct sigaction ignore = {.sa_handler = SIG_IGN};
        sigaction(SIGPROF, &ignore, NULL);
        sigaction(SIGPROF, &cpu.replaced, NULL);
    }
    atomic_store(&cpu.on, false);
    struct timespec pause = {0, 1000000};
    for (int i = 0; any_handler_runs() && i < STOP_PATIENCE_S * 1000; i++) {
        Py_BEGIN_ALLOW_THREADS
        nanosleep(&pause, NULL);
        Py_END_ALLOW_THREADS
    }
    cpu.active = false;
    names_close();
}

void
cpu_free(void)
{
    if (!cpu.active && cpu.samples.slots != NULL) {
        if (any_handler_runs()) {
            cpu.samples.slots = NULL; /* leak it rather than crash; this has never been seen */
        }
        store_close(&cpu.samples);
    }
}

CpuStats
cpu_stats(void)
{
    CpuStats stats = {.watcher_ns = cpu.watcher_ns,
                      .unsampled = cpu.unsampled,
                      .displaced = atomic_load(&cpu.displaced)};
    for (int i = 0; i < cpu.slot_count; i++) {
        Slot *slot = &cpu.slots[i];
        stats.samples += slot->samples;
        stats.periods += slot->periods;
        stats.unreadable += slot->unreadable;
        stats.lost += slot->lost;
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
        if (*periods != 0) { /* else two handlers added this at once; the other has the count */
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
    pid_t threads[MAX_THREADS + 1];
    int count = 0;
    pthread_mutex_lock(&cpu.mutex);
    threads[count++] = cpu.watcher_id;
    for (int i = 0; i < cpu.slot_count; i++) {
        threads[count] = cpu.slots[i].thread;
        count += threads[count] != 0;
    }
    pthread_mutex_unlock(&cpu.mutex);
    PyObject *list = PyList_New(0);
    for (int i = 0; list != NULL && i < count; i++) {
        list_append_new(&list, PyLong_FromLong(threads[i]));
    }
    return list;
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
    for (int i = 0; i < cpu.slot_count; i++) {
        cpu.slots[i].thread = 0;
        atomic_store(&cpu.slots[i].busy, false);
    }
    atomic_store(&cpu.on, false);
    cpu.started = cpu.active = cpu.has_watcher = false;
    pthread_mutex_init(&cpu.mutex, NULL);
    cpu_free();
    names_close();
}
