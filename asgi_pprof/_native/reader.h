/*
 * Reads memory that may not be there.
 *
 * A signal may land while a pointer is half written, so inside a handler no
 * pointer is followed: process_vm_readv(2) on our own process copies, and fails
 * where a plain read would crash. A call costs about 1.6 us, and each further
 * piece in the same call 0.65 us (measured). So memory is read in blocks, which
 * neighbours share, and the blocks that one sample has used are read in one call
 * at the beginning of the next: much of a stack stays where it was.
 *
 * With the GIL held and the interpreter at rest (in an allocator hook) memory is
 * trusted, and plain copies do.
 */
#ifndef ASGI_PPROF_READER_H
#define ASGI_PPROF_READER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>

#define READER_BLOCKS 64
#define READER_BLOCK 1024 /* bytes; divides a page, so a block is there as a whole or not at all */
#define READER_TEXT 1024

typedef struct {
    bool trusted;
    pid_t pid;
    uint32_t count;                      /* blocks at hand */
    uint64_t used;                       /* a bit for each that this sample has used */
    uintptr_t addresses[READER_BLOCKS];
    /* Room for all that is copied: a handler has no stack to spare. */
    struct iovec vectors[READER_BLOCKS];
    char blocks[READER_BLOCKS][READER_BLOCK];
    char raw[4 * READER_TEXT];
    char text[READER_TEXT];
} Reader;

/* Whether this system lets a process read itself so; sets errno if not. */
bool reader_works(void);

/* Begin a sample: read again what the last one has used. */
void reader_begin(Reader *reader);

/* Copy by a system call; false where there is no such memory. */
bool reader_copy(Reader *reader, const void *from, void *to, size_t size);

/* Copy out of blocks. */
bool reader_copy_blocks(Reader *reader, const void *from, void *to, size_t size);

/* Copy what each sample looks at. */
static inline bool
reader_read(Reader *reader, const void *from, void *to, size_t size)
{
    if ((uintptr_t)from < 4096) {
        return false;
    }
    if (reader->trusted) {
        memcpy(to, from, size);
        return true;
    }
    return reader_copy_blocks(reader, from, to, size);
}

/* Copy what is looked at once and then known. */
static inline bool
reader_read_once(Reader *reader, const void *from, void *to, size_t size)
{
    if ((uintptr_t)from < 4096) {
        return false;
    }
    if (reader->trusted) {
        memcpy(to, from, size);
        return true;
    }
    return reader_copy(reader, from, to, size);
}

#endif
