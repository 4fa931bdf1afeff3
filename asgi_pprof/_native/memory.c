#define _GNU_SOURCE
#include "memory.h"

#include <pthread.h>
#include <stdint.h>
#include <sys/mman.h>

#include "pages.h"

#define MAX_MAPPINGS 256 /* more are not counted; the tables and 16,384 threads need 80 */

static struct {
    char *start;
    size_t size;
} mappings[MAX_MAPPINGS];
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

void *
memory_map(size_t size)
{
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
        return NULL;
    }
    pthread_mutex_lock(&mutex);
    for (int i = 0; i < MAX_MAPPINGS; i++) {
        if (mappings[i].start == NULL) {
            mappings[i].start = memory;
            mappings[i].size = size;
            break;
        }
    }
    pthread_mutex_unlock(&mutex);
    return memory;
}

void
memory_unmap(void *memory, size_t size)
{
    /* Under the lock: nobody else's memory may come to this address while it is listed. */
    pthread_mutex_lock(&mutex);
    for (int i = 0; i < MAX_MAPPINGS; i++) {
        if (mappings[i].start == memory) {
            mappings[i].start = NULL;
        }
    }
    munmap(memory, size);
    pthread_mutex_unlock(&mutex);
}

size_t
memory_resident(void)
{
    size_t resident = 0;
    pthread_mutex_lock(&mutex);
    for (int i = 0; i < MAX_MAPPINGS; i++) {
        if (mappings[i].start != NULL) {
            resident += pages_resident(mappings[i].start, mappings[i].size);
        }
    }
    pthread_mutex_unlock(&mutex);
    return resident;
}

void
memory_before_fork(void)
{
    pthread_mutex_lock(&mutex);
}

void
memory_after_fork(void)
{
    pthread_mutex_unlock(&mutex);
}
