/*
 * Reads memory that may not be there.
 *
 * A signal may land while a pointer is half written, so inside a handler no
 * pointer is followed: process_vm_readv(2) on our own process copies, and fails
 * where a plain read would crash. A call costs about 1.6 us and a further piece
 * in the same call 0.65 us (measured), so what one sample has read is read in
 * one go at the beginning of the next: much of a stack stays where it was.
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

#define READER_PIECES 64
#define READER_BYTES 24576
#define READER_PAGE 4096
#define READER_TEXT 1024

typedef struct {
    const char *address;
    uint32_t size;
    uint32_t offset; /* in `recalled` */
} Piece;

typedef struct {
    bool trusted;
    pid_t pid;
    uint32_t valid;  /* pieces at hand */
    uint32_t cursor; /* where the next one probably is */
    uint32_t next_count;
    uint32_t next_bytes;
    Piece pieces[READER_PIECES];
    Piece next[READER_PIECES];
    /* Where neighbours are read together, and what was read there last. */
    const char *near_from, *near_to, *page_start, *page_end;
    /* Room for all that is copied: a handler has no stack to spare. */
    struct iovec vectors[READER_PIECES];
    char recalled[READER_BYTES];
    char page[READER_PAGE];
    char raw[4 * READER_TEXT];
    char text[READER_TEXT];
} Reader;

/* Whether this system lets a process read itself so; sets errno if not. */
bool reader_works(void);

/* Begin a sample: bring what the last one has read. */
void reader_begin(Reader *reader);

/* Say where things lie close together, as frames do on a data stack. */
static inline void
reader_set_near(Reader *reader, const void *from, const void *to)
{
    reader->near_from = from;
    reader->near_to = to;
    reader->page_start = reader->page_end = NULL;
}

/* Copy, by system call; false where there is no such memory. */
bool reader_copy(Reader *reader, const void *from, void *to, size_t size);

/* The same for what the next sample will probably read as well. */
bool reader_recall(Reader *reader, const void *from, void *to, size_t size);

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
    return reader_recall(reader, from, to, size);
}

/* As reader_read, for one of several things that lie close together, read from the top down. */
bool reader_read_near(Reader *reader, const void *from, void *to, size_t size);

/* As reader_read, for what is read seldom. */
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
