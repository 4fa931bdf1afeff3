#include "hooks.h"

#include <math.h>
#include <pthread.h>
#include <time.h>

#include "blocks.h"
#include "threads.h"

#define NEVER (INT64_MAX / 2)
#define HOOKS 2

#if defined(__GLIBC__)
/* Reached in one instruction. musl refuses this model in libraries loaded later. */
#define THREAD_LOCAL __thread __attribute__((tls_model("initial-exec")))
#else
#define THREAD_LOCAL __thread
#endif

/* Each thread has its own counters, so that threads write to no shared memory. */
typedef struct Counters {
    int64_t left; /* bytes until the next sample, which is due below 0 */
    int64_t gap;  /* the initial value of `left` */
    uint64_t mallocs, frees;
    uint64_t bytes; /* allocated before the current gap */
    uint64_t random;
    bool registered;
    struct Counters *next, *previous;
} Counters;

typedef struct {
    PyMemAllocatorDomain domain;
    PyMemAllocatorEx ours, original;
    bool installed; /* whether we believe ours to be in the chain */
} Hook;

static Hook hooks[HOOKS];
static THREAD_LOCAL Counters counters;
static uint64_t hook_rate;
static const HookSampler *sampler; /* set before the first hook is installed; stays set */
static pthread_key_t key; /* its destructor runs at the end of a thread */
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER; /* guards what follows */
static Counters *threads;
static Counters ended; /* the sum of the threads that have ended */

static double
random_number(Counters *c)
{
    /* xorshift64*; more than 0, at most 1 */
    c->random ^= c->random >> 12;
    c->random ^= c->random << 25;
    c->random ^= c->random >> 27;
    return (double)((c->random * 0x2545f4914f6cdd1du >> 11) + 1) / 9007199254740992.0;
}

/* Draw the bytes until the next sample: exponential, so that all bytes are equally likely. */
static int64_t
draw_gap(Counters *c)
{
    if (hook_rate == 0) {
        return NEVER;
    }
    if (hook_rate == 1) {
        return -1; /* sample the next allocation, whatever its size */
    }
    double gap = -log(random_number(c)) * (double)hook_rate;
    return gap < (double)NEVER ? (int64_t)gap : NEVER;
}

static void
begin_gap(Counters *c)
{
    c->bytes += (uint64_t)(c->gap - c->left);
    c->gap = c->left = draw_gap(c);
}

static void
register_thread(Counters *c)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    c->random = ((uint64_t)(uintptr_t)c ^ ((uint64_t)now.tv_nsec << 32) ^ (uint64_t)now.tv_sec) | 1;
    random_number(c);
    c->registered = true;
    pthread_setspecific(key, c);
    pthread_mutex_lock(&mutex);
    c->previous = NULL;
    c->next = threads;
    if (threads != NULL) {
        threads->previous = c;
    }
    threads = c;
    pthread_mutex_unlock(&mutex);
}

static void
end_thread(void *argument)
{
    Counters *c = argument;
    pthread_mutex_lock(&mutex);
    if (c->next != NULL) {
        c->next->previous = c->previous;
    }
    if (c->previous != NULL) {
        c->previous->next = c->next;
    }
    else if (threads == c) {
        threads = c->next;
    }
    ended.mallocs += c->mallocs;
    ended.frees += c->frees;
    ended.bytes += c->bytes + (uint64_t)(c->gap - c->left);
    pthread_mutex_unlock(&mutex);
    memset(c, 0, sizeof *c);
}

/* Return whether to take the sample that is due. */
static __attribute__((noinline)) bool
draw(Counters *c)
{
    if (!c->registered) {
        register_thread(c);
        int64_t gap = draw_gap(c);
        c->gap += gap;
        c->left += gap;
        if (c->left >= 0) {
            return false;
        }
    }
    begin_gap(c);
    return hook_rate != 0;
}

/*
 * An allocation is counted before it is made. So for a small block the call of the original
 * comes last, and the compiler makes it a jump: to count afterwards costs twice as much (a loop
 * that makes lists and tuples takes 1.10 in place of 1.05 times as long as without hooks). A
 * larger block, which takes longer anyway, is counted back if there was no memory for it.
 */
#define SMALL 512

/* Count an allocation, and return whether a sample is due. */
static inline bool
count_allocation(size_t size)
{
    counters.mallocs++;
    counters.left -= (int64_t)size;
    return __builtin_expect(counters.left < 0, 0);
}

static __attribute__((noinline, cold)) void
count_failure(size_t size)
{
    counters.mallocs--;
    counters.bytes -= size; /* may be below 0; the sum with the current gap is not */
}

static __attribute__((noinline)) void *
sampled_malloc(const PyMemAllocatorEx *original, size_t size)
{
    bool sampled = draw(&counters);
    void *address = original->malloc(original->ctx, size);
    if (address == NULL) {
        count_failure(size);
    }
    else if (sampled) {
        sampler->allocated(address, size);
    }
    return address;
}

static inline void *
hook_malloc(const PyMemAllocatorEx *original, size_t size)
{
    if (count_allocation(size)) {
        return sampled_malloc(original, size);
    }
    if (size <= SMALL) {
        return original->malloc(original->ctx, size);
    }
    void *address = original->malloc(original->ctx, size);
    if (__builtin_expect(address == NULL, 0)) {
        count_failure(size);
    }
    return address;
}

static __attribute__((noinline)) void *
sampled_calloc(const PyMemAllocatorEx *original, size_t count, size_t size)
{
    bool sampled = draw(&counters);
    void *address = original->calloc(original->ctx, count, size);
    if (address == NULL) {
        count_failure(count * size);
    }
    else if (sampled) {
        sampler->allocated(address, count * size);
    }
    return address;
}

static inline void *
hook_calloc(const PyMemAllocatorEx *original, size_t count, size_t size)
{
    if (count_allocation(count * size)) {
        return sampled_calloc(original, count, size);
    }
    if (count * size <= SMALL) {
        return original->calloc(original->ctx, count, size);
    }
    void *address = original->calloc(original->ctx, count, size);
    if (__builtin_expect(address == NULL, 0)) {
        count_failure(count * size);
    }
    return address;
}

/* The block stays as it was. */
static __attribute__((noinline, cold)) void
count_failed_realloc(const void *address, size_t size)
{
    count_failure(size);
    counters.frees -= address != NULL;
}

static __attribute__((noinline)) void *
sampled_realloc(const PyMemAllocatorEx *original, void *address, size_t size, bool due)
{
    bool sampled = due && draw(&counters), known = address != NULL && blocks_may_have(address);
    void *resized = original->realloc(original->ctx, address, size);
    /* Another interpreter may have got the old address by now, and the two blocks may be
       confused. They have one size class and are equally likely, so this does no harm. */
    if (resized == NULL) {
        count_failed_realloc(address, size);
    }
    else if (known) {
        sampler->resized(address, resized, size, sampled);
    }
    else if (sampled) {
        sampler->allocated(resized, size);
    }
    return resized;
}

static inline void *
hook_realloc(const PyMemAllocatorEx *original, void *address, size_t size)
{
    bool due = count_allocation(size);
    if (address != NULL) {
        counters.frees++;
        due |= blocks_may_have(address);
    }
    if (__builtin_expect(due, 0)) {
        return sampled_realloc(original, address, size, counters.left < 0);
    }
    if (size <= SMALL) {
        return original->realloc(original->ctx, address, size);
    }
    void *resized = original->realloc(original->ctx, address, size);
    if (__builtin_expect(resized == NULL, 0)) {
        count_failed_realloc(address, size);
    }
    return resized;
}

static __attribute__((noinline)) void
sampled_free(const PyMemAllocatorEx *original, void *address)
{
    sampler->freed(address); /* before another thread can get the address */
    original->free(original->ctx, address);
}

static inline void
hook_free(const PyMemAllocatorEx *original, void *address)
{
    counters.frees += address != NULL;
    if (__builtin_expect(blocks_may_have(address), 0)) {
        sampled_free(original, address);
    }
    else {
        original->free(original->ctx, address);
    }
}

/*
 * The allocators of a domain. They ignore their context, and are installed with the context of
 * the original: CPython stores the context and the functions one after the other, and an
 * interpreter with a GIL of its own may allocate in between.
 */
#define DEFINE_HOOKS(domain, index)                                                              \
    static void *domain##_malloc(void *Py_UNUSED(context), size_t size)                          \
    {                                                                                            \
        return hook_malloc(&hooks[index].original, size);                                        \
    }                                                                                            \
    static void *domain##_calloc(void *Py_UNUSED(context), size_t count, size_t size)            \
    {                                                                                            \
        return hook_calloc(&hooks[index].original, count, size);                                 \
    }                                                                                            \
    static void *domain##_realloc(void *Py_UNUSED(context), void *address, size_t size)          \
    {                                                                                            \
        return hook_realloc(&hooks[index].original, address, size);                              \
    }                                                                                            \
    static void domain##_free(void *Py_UNUSED(context), void *address)                           \
    {                                                                                            \
        hook_free(&hooks[index].original, address);                                              \
    }

DEFINE_HOOKS(mem, 0)
DEFINE_HOOKS(obj, 1)

static Hook hooks[HOOKS] = {
    {PYMEM_DOMAIN_MEM, {NULL, mem_malloc, mem_calloc, mem_realloc, mem_free}, {0}, false},
    {PYMEM_DOMAIN_OBJ, {NULL, obj_malloc, obj_calloc, obj_realloc, obj_free}, {0}, false},
};

static bool
is_ours(const PyMemAllocatorEx *allocator, const Hook *hook)
{
    return allocator->malloc == hook->ours.malloc;
}

static bool
is_called(const Hook *hook)
{
    uint64_t before = counters.mallocs;
    if (hook->domain == PYMEM_DOMAIN_MEM) {
        PyMem_Free(PyMem_Malloc(16));
    }
    else {
        PyObject_Free(PyObject_Malloc(16));
    }
    return counters.mallocs != before;
}

/*
 * Put a hook into the chain; false if that is not possible now. CPython stores an allocator's
 * pointers one by one, and a store may be torn, so no thread may be calling the allocator.
 */
static bool
install(Hook *hook)
{
    if (!hook->installed || !is_called(hook)) {
        if (!threads_share_our_gil()) {
            return false;
        }
        PyMem_GetAllocator(hook->domain, &hook->original);
        hook->ours.ctx = hook->original.ctx;
        PyMem_SetAllocator(hook->domain, &hook->ours);
        hook->installed = true;
    }
    return true;
}

static void
uninstall(Hook *hook)
{
    PyMemAllocatorEx current;
    PyMem_GetAllocator(hook->domain, &current);
    /* Ours must stay, and only delegate, if other hooks are on top of it, or if interpreters
       with another GIL may be calling it. */
    if (is_ours(&current, hook) && threads_share_our_gil()) {
        PyMem_SetAllocator(hook->domain, &hook->original);
        hook->installed = false;
    }
}

bool
hooks_install(uint64_t rate, const HookSampler *new_sampler)
{
    static bool has_key;
    if (!has_key && pthread_key_create(&key, end_thread) != 0) {
        PyErr_SetString(PyExc_OSError, "no thread-specific storage left");
        return false;
    }
    has_key = true;
    sampler = new_sampler;
    pthread_mutex_lock(&mutex);
    hook_rate = rate;
    ended = (Counters){0};
    for (Counters *c = threads; c != NULL; c = c->next) {
        c->mallocs = c->frees = c->bytes = 0;
        c->gap = c->left = draw_gap(c);
    }
    pthread_mutex_unlock(&mutex);
    for (int i = 0; i < HOOKS; i++) {
        if (!install(&hooks[i])) {
            PyErr_SetString(PyExc_RuntimeError, "interpreters with a GIL of their own run");
            return false;
        }
    }
    return true;
}

void
hooks_uninstall(void)
{
    for (int i = 0; i < HOOKS; i++) {
        uninstall(&hooks[i]);
    }
    hook_rate = 0;
}

bool
hooks_are_called(void)
{
    return is_called(&hooks[0]) && is_called(&hooks[1]);
}

HookTotals
hooks_totals(void)
{
    pthread_mutex_lock(&mutex);
    HookTotals totals = {ended.mallocs, ended.frees, ended.bytes};
    for (const Counters *c = threads; c != NULL; c = c->next) {
        totals.mallocs += c->mallocs;
        totals.frees += c->frees;
        totals.bytes += c->bytes + (uint64_t)(c->gap - c->left);
    }
    pthread_mutex_unlock(&mutex);
    return totals;
}

void
hooks_before_fork(void)
{
    pthread_mutex_lock(&mutex);
}

void
hooks_after_fork_in_parent(void)
{
    pthread_mutex_unlock(&mutex);
}

void
hooks_after_fork_in_child(void)
{
    /* The hooks stay, and only delegate: this is no place to change allocators. */
    hook_rate = 0;
    ended = (Counters){0};
    threads = NULL;
    if (counters.registered) {
        counters.next = counters.previous = NULL;
        threads = &counters;
    }
    pthread_mutex_unlock(&mutex);
}
