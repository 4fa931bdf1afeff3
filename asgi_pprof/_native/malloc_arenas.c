#define _GNU_SOURCE
#include "malloc_arenas.h"

#include <link.h>
#include <stdlib.h>
#include <sys/uio.h>
#include <unistd.h>

#define BINS 127
#define TRIES 3 /* to follow one list */
#define SEARCHES 10
#define STATE_SIZE 4096 /* more than a malloc_state */
#define FLAGS 7         /* of a chunk's size */
#define IS_MAPPED 2     /* one of the flags */
/* The threshold above which malloc maps a block for itself never rises beyond 32 MiB. */
#define MAPPED_SIZE (((size_t)32 << 20) + 123456)
#define MAPPED_EXTRA 65536 /* a page at most */

/* The head of a free chunk; of one in use only the size is there. */
typedef struct {
    uintptr_t size_before, size, next, previous;
} Chunk;

typedef struct {
    uintptr_t arena, previous;
    size_t size, usable;
} HeapInfo;

/* What is found once: malloc's structures do not move. */
static struct {
    bool known;
    int searches;
    uintptr_t data; /* the writable segment of glibc */
    size_t data_size;
    uintptr_t bins;             /* of the first arena */
    uintptr_t bins_offset;      /* of those in the structures of the other arenas */
    const size_t *mapped_bytes; /* malloc's own count */
} found;

typedef struct {
    uint64_t free_bytes;
    uint32_t left; /* chunks that may still be counted */
} Walk;

static bool
copy(uintptr_t from, void *to, size_t size)
{
    struct iovec local = {to, size}, remote = {(void *)from, size};
    return process_vm_readv(getpid(), &local, 1, &remote, 1, 0) == (ssize_t)size;
}

/* A list's head is treated as a chunk of which only the pointers exist. */
static uintptr_t
head_of(uintptr_t bin)
{
    return bin - offsetof(Chunk, next);
}

static bool
is_bin(uintptr_t bin, uintptr_t next, uintptr_t previous)
{
    uintptr_t head = head_of(bin);
    Chunk first, last;
    if (next == head || previous == head || next < 4096 || (next | previous) % 16 != 0) {
        return next == head && previous == head;
    }
    return copy(next, &first, sizeof first) && first.previous == head &&
           copy(previous, &last, sizeof last) && last.next == head;
}

/* Return the first of an arena's bins, which are somewhere in this memory; 0 if they are not. */
static uintptr_t
find_bins(uintptr_t start, size_t size)
{
    uintptr_t bin = 0;
    uintptr_t *words = malloc(size);
    size_t count = size / sizeof *words, run = 0;
    if (words != NULL && copy(start, words, size)) {
        for (size_t i = 0; i + 1 < count && run < BINS; i++) {
            if (is_bin(start + i * sizeof *words, words[i], words[i + 1])) {
                bin = run++ == 0 ? start + i * sizeof *words : bin;
                i++; /* the other pointer */
            }
            else {
                run = 0;
            }
        }
    }
    free(words);
    return run == BINS ? bin : 0;
}

extern const char *gnu_get_libc_version(void) __attribute__((weak));

static int
find_data(struct dl_phdr_info *info, size_t Py_UNUSED(size), void *Py_UNUSED(argument))
{
    bool is_libc = false;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const ElfW(Phdr) *segment = &info->dlpi_phdr[i];
        uintptr_t start = info->dlpi_addr + segment->p_vaddr;
        if (segment->p_type == PT_LOAD) {
            is_libc |= (uintptr_t)gnu_get_libc_version - start < segment->p_memsz;
            if (segment->p_flags & PF_W) {
                found.data = start;
                found.data_size = segment->p_memsz;
            }
        }
    }
    return is_libc;
}

/*
 * Find malloc's count of the bytes in blocks mapped for themselves: the word in glibc's data
 * that grows by such a block's size, and falls again as it is freed. So malloc is glibc's own.
 */
static const size_t *
find_mapped_bytes(void)
{
    const size_t *counter = NULL;
    size_t *before = malloc(3 * found.data_size), head = 0;
    if (before == NULL) {
        return NULL;
    }
    size_t count = found.data_size / sizeof(size_t), *during = before + count,
           *after = during + count;
    bool copied = copy(found.data, before, found.data_size);
    void *block = malloc(MAPPED_SIZE);
    copied = copied && copy(found.data, during, found.data_size) &&
             copy((uintptr_t)block - sizeof head, &head, sizeof head);
    free(block);
    if (copied && head & IS_MAPPED && copy(found.data, after, found.data_size)) {
        for (size_t i = 0; i < count && counter == NULL; i++) {
            size_t grown = during[i] - before[i];
            if (grown >= MAPPED_SIZE && grown < MAPPED_SIZE + MAPPED_EXTRA &&
                after[i] == before[i]) {
                counter = (const size_t *)found.data + i;
            }
        }
    }
    free(before);
    return counter;
}

/*
 * Find malloc's structures, in about a millisecond. With the GIL, so that no other Python thread
 * uses malloc: its lists must not change meanwhile.
 */
static bool
find(void)
{
    for (int i = 0; i < TRIES && !found.known && found.searches < SEARCHES; i++) {
        found.searches++;
        if (gnu_get_libc_version != NULL && dl_iterate_phdr(find_data, NULL)) {
            found.bins = find_bins(found.data, found.data_size);
            found.mapped_bytes = found.bins != 0 ? find_mapped_bytes() : NULL;
            found.known = found.mapped_bytes != NULL;
        }
    }
    return found.known;
}

/* Add the chunks of one list. Return false, and what was counted, if it changed on the way. */
static bool
walk_bin(Walk *walk, uintptr_t bin)
{
    Chunk chunk;
    uintptr_t head = head_of(bin), at = head;
    if (!copy(bin, &chunk.next, 2 * sizeof chunk.next)) {
        return false;
    }
    while (chunk.previous != head && walk->left != 0) {
        uintptr_t behind = at;
        at = chunk.previous;
        if (!copy(at, &chunk, sizeof chunk) || chunk.next != behind) {
            return false;
        }
        walk->free_bytes += chunk.size & ~(uintptr_t)FLAGS;
        walk->left--;
    }
    return true;
}

static void
walk_arena(Walk *walk, uintptr_t first_bin)
{
    uintptr_t top = 0;
    Chunk last;
    if (copy(head_of(first_bin), &top, sizeof top) && copy(top, &last, offsetof(Chunk, next))) {
        walk->free_bytes += last.size & ~(uintptr_t)FLAGS;
    }
    for (uintptr_t i = 0; i < BINS; i++) {
        Walk best = *walk;
        for (int tries = 0; tries < TRIES; tries++) {
            Walk part = *walk;
            bool complete = walk_bin(&part, first_bin + i * 2 * sizeof(uintptr_t));
            if (complete || part.free_bytes > best.free_bytes) {
                best = part;
            }
            if (complete) {
                break;
            }
        }
        *walk = best;
    }
}

static bool
read_heap(uintptr_t address, HeapInfo *heap)
{
    return copy(address, heap, sizeof *heap) && heap->size >= sizeof *heap &&
           heap->size <= heap->usable && heap->usable <= MALLOC_HEAP_ALIGNMENT &&
           heap->usable % 4096 == 0 && heap->arena % MALLOC_HEAP_ALIGNMENT < STATE_SIZE &&
           heap->previous % MALLOC_HEAP_ALIGNMENT == 0;
}

/* Return how many heaps there are; each is stored as its start and size. */
static size_t
walk_heaps(Walk *walk, const uint64_t *candidates, size_t count, uint64_t *heaps)
{
    size_t known = 0;
    for (size_t i = 0; i < count; i++) {
        HeapInfo heap;
        if (!read_heap(candidates[i], &heap)) {
            continue;
        }
        if (heap.arena - candidates[i] < MALLOC_HEAP_ALIGNMENT) { /* its first heap */
            if (found.bins_offset == 0) {
                uintptr_t bins = find_bins(heap.arena, STATE_SIZE);
                found.bins_offset = bins != 0 ? bins - heap.arena : 0;
            }
            if (found.bins_offset == 0) {
                continue;
            }
            walk_arena(walk, heap.arena + found.bins_offset);
        }
        heaps[2 * known] = candidates[i];
        heaps[2 * known++ + 1] = heap.size;
    }
    return known;
}

PyObject *
malloc_arenas_read(const uint64_t *candidates, size_t count, uint32_t limit)
{
    if (!find()) {
        Py_RETURN_NONE;
    }
    Walk walk = {0, limit};
    uint64_t *heaps = malloc((2 * count + 1) * sizeof *heaps);
    if (heaps == NULL) {
        return PyErr_NoMemory();
    }
    Py_BEGIN_ALLOW_THREADS
    walk_arena(&walk, found.bins);
    count = walk_heaps(&walk, candidates, count, heaps);
    Py_END_ALLOW_THREADS
    PyObject *result = Py_BuildValue("(KKNy#)", (unsigned long long)walk.free_bytes,
                                     (unsigned long long)*found.mapped_bytes,
                                     PyBool_FromLong(walk.left != 0), heaps,
                                     (Py_ssize_t)(2 * count * sizeof *heaps));
    free(heaps);
    return result;
}
