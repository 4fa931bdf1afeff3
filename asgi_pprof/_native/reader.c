#define _GNU_SOURCE
#include "reader.h"

#include <errno.h>
#include <unistd.h>

bool
reader_works(void)
{
    uint64_t there = 42, copy = 0;
    struct iovec to = {&copy, sizeof copy}, from = {&there, sizeof there};
    return process_vm_readv(getpid(), &to, 1, &from, 1, 0) == sizeof copy && copy == there;
}

void
reader_begin(Reader *reader)
{
    uint32_t count = reader->next_count;
    reader->cursor = reader->valid = 0;
    reader->next_count = reader->next_bytes = 0;
    if (reader->trusted || count == 0) {
        return;
    }
    struct iovec *from = reader->vectors;
    uint32_t wanted = 0;
    for (uint32_t i = 0; i < count; i++) {
        reader->pieces[i] = reader->next[i];
        reader->pieces[i].offset = wanted;
        from[i].iov_base = (void *)reader->next[i].address;
        from[i].iov_len = reader->next[i].size;
        wanted += reader->next[i].size;
    }
    struct iovec to = {reader->recalled, wanted};
    /* Stops before the first piece that is no longer there. */
    ssize_t got = process_vm_readv(reader->pid, &to, 1, from, count, 0);
    while (reader->valid < count && got >= (ssize_t)reader->pieces[reader->valid].size) {
        got -= reader->pieces[reader->valid++].size;
    }
}

bool
reader_copy(Reader *reader, const void *from, void *to, size_t size)
{
    struct iovec local = {to, size}, remote = {(void *)from, size};
    return process_vm_readv(reader->pid, &local, 1, &remote, 1, 0) == (ssize_t)size;
}

static void
remember(Reader *reader, const char *address, size_t size)
{
    if (reader->next_count < READER_PIECES && reader->next_bytes + size <= READER_BYTES) {
        reader->next[reader->next_count++] = (Piece){address, (uint32_t)size, 0};
        reader->next_bytes += (uint32_t)size;
    }
}

bool
reader_recall(Reader *reader, const void *from, void *to, size_t size)
{
    const char *address = from;
    for (uint32_t tried = 0; tried < reader->valid; tried++) {
        uint32_t at = reader->cursor + tried;
        const Piece *piece = &reader->pieces[at < reader->valid ? at : at - reader->valid];
        if (piece->address == address && piece->size == size) {
            reader->cursor = (uint32_t)(piece - reader->pieces) + 1;
            memcpy(to, reader->recalled + piece->offset, size);
            remember(reader, address, size);
            return true;
        }
    }
    if (!reader_copy(reader, from, to, size)) {
        return false;
    }
    remember(reader, address, size);
    return true;
}

static const char *
page_of(const char *address)
{
    return (const char *)((uintptr_t)address & ~(uintptr_t)(READER_PAGE - 1));
}

bool
reader_read_near(Reader *reader, const void *from, void *to, size_t size)
{
    const char *address = from, *page = page_of(address);
    if (reader->trusted || address < reader->near_from || address + size > reader->near_to ||
        page != page_of(address + size - 1)) {
        return reader_read(reader, from, to, size);
    }
    if (address < reader->page_start || address + size > reader->page_end) {
        /* Up to a round address, so that the next sample asks for the same piece. */
        size_t part = ((size_t)(address - page) + size + 511) & ~(size_t)511;
        if (!reader_read(reader, page, reader->page, part)) {
            return false;
        }
        reader->page_start = page;
        reader->page_end = page + part;
    }
    memcpy(to, reader->page + (address - page), size);
    return true;
}
