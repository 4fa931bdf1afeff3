#define _GNU_SOURCE
#include "reader.h"

#include <errno.h>
#include <unistd.h>

bool
reader_works(void)
{
    uint64_t value = 42, copy = 0;
    struct iovec to = {&copy, sizeof copy}, from = {&value, sizeof value};
    return process_vm_readv(getpid(), &to, 1, &from, 1, 0) == sizeof copy && copy == value;
}

void
reader_begin(Reader *reader)
{
    uint32_t wanted = 0;
    for (uint32_t i = 0; i < reader->count; i++) {
        if (reader->used >> i & 1) {
            reader->addresses[wanted] = reader->addresses[i];
            reader->vectors[wanted].iov_base = (void *)reader->addresses[i];
            reader->vectors[wanted++].iov_len = READER_BLOCK;
        }
    }
    reader->used = reader->count = 0;
    if (wanted != 0) {
        /* The copy ends before the first block that no longer exists. */
        struct iovec to = {reader->blocks, (size_t)wanted * READER_BLOCK};
        ssize_t got = process_vm_readv(reader->pid, &to, 1, reader->vectors, wanted, 0);
        reader->count = got > 0 ? (uint32_t)got / READER_BLOCK : 0;
    }
}

bool
reader_copy(Reader *reader, const void *from, void *to, size_t size)
{
    struct iovec local = {to, size}, remote = {(void *)from, size};
    return process_vm_readv(reader->pid, &local, 1, &remote, 1, 0) == (ssize_t)size;
}

/* Return the block at an address; NULL if it does not exist or there are too many blocks. */
static const char *
find_block(Reader *reader, uintptr_t address)
{
    uint32_t i = 0;
    while (i < reader->count && reader->addresses[i] != address) {
        i++;
    }
    if (i == reader->count) {
        if (i == READER_BLOCKS ||
            !reader_copy(reader, (const void *)address, reader->blocks[i], READER_BLOCK)) {
            return NULL;
        }
        reader->addresses[i] = address;
        reader->count++;
    }
    reader->used |= (uint64_t)1 << i;
    return reader->blocks[i];
}

bool
reader_copy_blocks(Reader *reader, const void *from, void *to, size_t size)
{
    uintptr_t address = (uintptr_t)from, end = address + size;
    char *out = to;
    while (address < end) {
        uintptr_t start = address & ~(uintptr_t)(READER_BLOCK - 1);
        size_t part = start + READER_BLOCK - address;
        if (part > end - address) {
            part = end - address;
        }
        const char *block = find_block(reader, start);
        if (block == NULL) {
            return reader_copy(reader, (const void *)address, out, end - address);
        }
        memcpy(out, block + (address - start), part);
        address += part;
        out += part;
    }
    return true;
}
