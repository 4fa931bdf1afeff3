#define _GNU_SOURCE
#include "pages.h"

#include <sys/mman.h>
#include <unistd.h>

#define PAGES 16384 /* of one call */

size_t
pages_resident(const void *memory, size_t size)
{
    unsigned char in_memory[PAGES];
    size_t page = (size_t)sysconf(_SC_PAGESIZE), resident = 0;
    for (size_t at = 0; at < size; at += PAGES * page) {
        size_t length = size - at < PAGES * page ? size - at : PAGES * page;
        if (mincore((char *)memory + at, length, in_memory) == 0) {
            for (size_t i = 0; i < (length + page - 1) / page; i++) {
                resident += in_memory[i] & 1;
            }
        }
    }
    return resident * page;
}
