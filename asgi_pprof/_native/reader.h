/*
 * Copies memory that may not exist.
 *
 * A signal may arrive while a pointer is half written, so a signal handler must not follow any
 * pointer. process_vm_readv(2) on our own process copies, and fails where a plain read would
 * crash. A call costs about 1.6 us, and each further piece in the same call 0.65 us (measured).
 * So memory is read in blocks, which neighbouring objects share. The blocks that one sample has
 * used are read in one call at the beginning of the next, because much of a stack stays the same.
 *
 * In an allocator hook the GIL is held and no pointer is half written. The hook's reader is
 * `trusted`: it copies without a system call.
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
#define READER_BLOCK 1024 /* bytes; divides a page, so a block exists completely or not at all */
#define READER_TEXT 1024

typedef struct {
    bool trusted;
    pid_t pid;
    uint32_t count;                      /* blocks that have been copied */
    uint64_t used;                       /* a bit for each block that this sample has used */
    uintptr_t addresses[READER_BLOCKS];
    /* The buffers are here, because a signal handler may have little stack. */
    struct iovec vectors[READER_BLOCKS];
    char blocks[READER_BLOCKS][READER_BLOCK];
    char raw[4 * READER_TEXT];
    char text[READER_TEXT];
} Reader;

/* Return whether this system lets a process read itself; if not, errno is set. */
bool reader_works(void);

/* Start a sample: read the blocks again that the last one has used. */
void reader_begin(Reader *reader);

/* Copy by one system call; false if there is no such memory. */
bool reader_copy(Reader *reader, const void *from, void *to, size_t size);

/* Copy from blocks, which are read as needed; false if there is no such memory. */
bool reader_copy_blocks(Reader *reader, const void *from, void *to, size_t size);

static inline bool
reader_copy_by(bool (*copy)(Reader *, const void *, void *, size_t), Reader *reader,
               const void *from, void *to, size_t size)
{
    if ((uintptr_t)from < 4096) {
        return false;
    }
    if (reader->trusted) {
        memcpy(to, from, size);
        return true;
    }
    return copy(reader, from, to, size);
}

/* Copy what every sample needs. */
static inline bool
reader_read(Reader *reader, const void *from, void *to, size_t size)
{
    return reader_copy_by(reader_copy_blocks, reader, from, to, size);
}

/* Copy what is needed once and then remembered. */
static inline bool
reader_read_once(Reader *reader, const void *from, void *to, size_t size)
{
    return reader_copy_by(reader_copy, reader, from, to, size);
}

#endif
