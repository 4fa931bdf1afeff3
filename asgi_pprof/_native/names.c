/*
 * Two caches make it cheap to find a known place: one by the address of the code object, one by
 * function and instruction. An address is valid as long as its code object lives. So while a
 * sampler runs we replace the destructor of code objects: ours forgets the address, and then
 * calls the original.
 *
 * Sources: Objects/codeobject.c (code_dealloc), Objects/locations.md (line table).
 */
#include "names.h"

#include "store.h"

enum { KIND_STRING, KIND_FUNCTION, KIND_PLACE };

typedef struct {
    uint32_t name, file; /* ids of strings */
    int32_t first_line;
    /* Tells apart functions with one name and first line, as of a module that is reloaded. */
    uint64_t table_hash;
} FunctionKey;

typedef struct {
    uint32_t function;
    int32_t line;
} PlaceKey;

#define ID_BITS 22 /* 64 MiB in units of 16 bytes */
#define ID_MASK ((1u << ID_BITS) - 1)
#define INSTRUCTION_BITS 20
#define CODE_CACHE 4096
#define PLACE_CACHE 16384

static ByteStore store;
/* By the address of a code object: the rest of the address, and the id of its function. */
static _Atomic uint64_t code_cache[CODE_CACHE];
/* By function and instruction: both, and the id of the place. */
static _Atomic uint64_t place_cache[PLACE_CACHE];
static int users;
static destructor code_dealloc;

static _Atomic uint64_t *
code_slot(uintptr_t address)
{
    return &code_cache[(address >> 4) & (CODE_CACHE - 1)];
}

static uint32_t
known_function(uintptr_t address)
{
    uint64_t entry = atomic_load_explicit(code_slot(address), memory_order_acquire);
    return entry >> 32 == address >> 16 ? (uint32_t)entry & ID_MASK : 0;
}

static void
remember_function(uintptr_t address, uint32_t function)
{
    if (address >> 48 == 0) { /* bits 4 to 15 are the slot, 16 to 47 the entry's upper half */
        atomic_store_explicit(code_slot(address), (uint64_t)(address >> 16) << 32 | function,
                              memory_order_release);
    }
}

static void
forget_and_dealloc(PyObject *code)
{
    uintptr_t address = (uintptr_t)code;
    _Atomic uint64_t *slot = code_slot(address);
    uint64_t entry = atomic_load_explicit(slot, memory_order_relaxed);
    if (entry >> 32 == address >> 16) {
        atomic_compare_exchange_strong(slot, &entry, 0);
    }
    code_dealloc(code);
}

bool
names_open(void)
{
    if (store.slots == NULL && !store_open(&store, 1u << 18, 1u << ID_BITS, PLACE_FIRST)) {
        return false;
    }
    if (users++ == 0 && PyCode_Type.tp_dealloc != forget_and_dealloc) {
        /* Code objects may have been freed while no sampler ran. */
        for (size_t i = 0; i < CODE_CACHE; i++) {
            atomic_store_explicit(&code_cache[i], 0, memory_order_relaxed);
        }
        code_dealloc = PyCode_Type.tp_dealloc;
        PyCode_Type.tp_dealloc = forget_and_dealloc;
    }
    return true;
}

void
names_close(void)
{
    /* If another destructor has been put on top of ours, both must stay. */
    if (--users == 0 && PyCode_Type.tp_dealloc == forget_and_dealloc) {
        PyCode_Type.tp_dealloc = code_dealloc;
    }
}

uint32_t
names_refused(void)
{
    return atomic_load_explicit(&store.refused, memory_order_relaxed);
}

static size_t
utf8_encode(char *to, uint32_t c)
{
    if (c < 0x80) {
        to[0] = (char)c;
        return 1;
    }
    if (c < 0x800) {
        to[0] = (char)(0xc0 | c >> 6);
        to[1] = (char)(0x80 | (c & 0x3f));
        return 2;
    }
    if (c < 0x10000) { /* lone surrogates as well: decoded with "surrogatepass" */
        to[0] = (char)(0xe0 | c >> 12);
        to[1] = (char)(0x80 | (c >> 6 & 0x3f));
        to[2] = (char)(0x80 | (c & 0x3f));
        return 3;
    }
    to[0] = (char)(0xf0 | (c >> 18 & 7));
    to[1] = (char)(0x80 | (c >> 12 & 0x3f));
    to[2] = (char)(0x80 | (c >> 6 & 0x3f));
    to[3] = (char)(0x80 | (c & 0x3f));
    return 4;
}

/*
 * Write the id of a string's UTF-8 to `id`, cut with "..." at about a thousand bytes; 0 if
 * there is no room. Return false if the object is no readable string.
 */
static bool
intern_string(Reader *reader, const PyObject *object, uint32_t *id)
{
    PyASCIIObject string;
    if (!reader_read_once(reader, object, &string, sizeof string) ||
        string.ob_base.ob_type != &PyUnicode_Type || !string_is_compact(&string) ||
        string.length < 0) {
        return false;
    }
    bool ascii = string_is_ascii(&string);
    unsigned kind = string_kind(&string);
    size_t length = (size_t)string.length;
    if (length > sizeof reader->raw / 4) {
        length = sizeof reader->raw / 4;
    }
    const char *data = (const char *)object +
                       (ascii ? sizeof(PyASCIIObject) : sizeof(PyCompactUnicodeObject));
    if ((kind != 1 && kind != 2 && kind != 4) ||
        !reader_read_once(reader, data, reader->raw, length * kind)) {
        return false;
    }
    size_t size = 0, at = 0;
    for (; at < length && size < sizeof reader->text - 8; at++) {
        uint32_t c = kind == 1   ? ((uint8_t *)reader->raw)[at]
                     : kind == 2 ? ((uint16_t *)reader->raw)[at]
                                 : ((uint32_t *)reader->raw)[at];
        size += utf8_encode(reader->text + size, c);
    }
    if (at < (size_t)string.length) {
        memcpy(reader->text + size, "...", 3);
        size += 3;
    }
    *id = store_intern(&store, KIND_STRING, reader->text, (uint32_t)size, 0);
    return true;
}

/* A line table, which is read one window at a time. */
typedef struct {
    Reader *reader;
    const char *data;
    size_t size, at, start, end; /* `start` to `end` are in the window */
    bool failed;
} LineTable;

static unsigned
peek_byte(LineTable *table)
{
    if (table->at >= table->end) {
        size_t rest = table->size - table->at;
        size_t window = rest < sizeof table->reader->raw ? rest : sizeof table->reader->raw;
        if (window == 0 || !reader_read_once(table->reader, table->data + table->at,
                                             table->reader->raw, window)) {
            table->failed = true;
            return 0x80; /* ends the entry that is being read */
        }
        table->start = table->at;
        table->end = table->at + window;
    }
    return (uint8_t)table->reader->raw[table->at - table->start];
}

static unsigned
next_byte(LineTable *table)
{
    unsigned byte = peek_byte(table);
    table->at++;
    return byte;
}

static int
next_signed(LineTable *table)
{
    unsigned value = 0, shift = 0, byte;
    do {
        byte = next_byte(table);
        value |= (byte & 0x3f) << shift;
        shift += 6;
    } while (byte & 0x40 && shift < 30);
    return value & 1 ? -(int)(value >> 1) : (int)(value >> 1);
}

static LineTable
open_lines(Reader *reader, const PyCodeObject *code, size_t size)
{
    return (LineTable){.reader = reader,
                       .data = (const char *)code->co_linetable + offsetof(PyBytesObject, ob_sval),
                       .size = size};
}

static uint64_t
hash_lines(Reader *reader, const PyCodeObject *code, size_t size)
{
    LineTable table = open_lines(reader, code, size);
    uint64_t hash = size;
    while (table.at < table.size && !table.failed) {
        hash = (hash ^ next_byte(&table)) * 0x100000001b3u; /* FNV-1a */
    }
    return hash;
}

/* Return an instruction's line; if it has none, that of the last one before it that has. */
static int32_t
find_line(Reader *reader, const PyCodeObject *code, size_t table_size, int64_t instruction)
{
    LineTable table = open_lines(reader, code, table_size);
    int32_t line = code->co_firstlineno, found = line;
    int64_t position = 0;
    while (table.at < table.size && position <= instruction && !table.failed) {
        unsigned first = next_byte(&table), form = first >> 3 & 15;
        if (form == 13 || form == 14) {
            line += next_signed(&table);
        }
        else if (form >= 10 && form <= 12) {
            line += (int32_t)form - 10;
        }
        if (form != 15 && !table.failed) {
            found = line;
        }
        position += (first & 7) + 1;
        while (table.at < table.size && !(peek_byte(&table) & 0x80)) { /* columns */
            table.at++;
        }
    }
    return found;
}

static _Atomic uint64_t *
place_slot(uint64_t key)
{
    return &place_cache[(key * 0x9e3779b97f4a7c15u >> 40) & (PLACE_CACHE - 1)];
}

uint32_t
names_place(Reader *reader, PyCodeObject *address, const char *instruction)
{
    const char *bytecode = (const char *)address + CODE_SIZE;
    /* From 1, because a frame before its first instruction may be at -1. */
    int64_t at = (instruction - bytecode) / (int64_t)sizeof(_Py_CODEUNIT) + 1;
    bool cacheable = at >= 0 && at < 1 << INSTRUCTION_BITS;
    uint32_t function = known_function((uintptr_t)address);
    if (function != 0 && cacheable) {
        uint64_t key = (uint64_t)function << INSTRUCTION_BITS | (uint64_t)at;
        uint64_t entry = atomic_load_explicit(place_slot(key), memory_order_acquire);
        if (entry >> ID_BITS == key) {
            return (uint32_t)entry & ID_MASK;
        }
    }
    PyCodeObject code;
    PyVarObject table;
    if (!reader_read_once(reader, address, &code, CODE_SIZE) ||
        code.ob_base.ob_base.ob_type != &PyCode_Type || Py_REFCNT((PyObject *)&code) <= 0 ||
        !reader_read_once(reader, code.co_linetable, &table, sizeof table) ||
        table.ob_base.ob_type != &PyBytes_Type || table.ob_size < 0) {
        return PLACE_NONE;
    }
    if (function == 0) {
        FunctionKey key = {.first_line = code.co_firstlineno};
        if (!intern_string(reader, code.co_qualname, &key.name) ||
            !intern_string(reader, code.co_filename, &key.file)) {
            return PLACE_NONE;
        }
        key.table_hash = hash_lines(reader, &code, (size_t)table.ob_size);
        if (key.name == 0 || key.file == 0 ||
            (function = store_intern(&store, KIND_FUNCTION, &key, sizeof key, 0)) == 0) {
            return PLACE_LOST;
        }
        remember_function((uintptr_t)address, function);
    }
    uint32_t id = PLACE_HIDDEN;
    if (at - 1 >= code._co_firsttraceable) {
        PlaceKey place = {function, find_line(reader, &code, (size_t)table.ob_size, at - 1)};
        id = store_intern(&store, KIND_PLACE, &place, sizeof place, 0);
        if (id == 0) {
            return PLACE_LOST;
        }
    }
    if (cacheable) {
        uint64_t known = (uint64_t)function << INSTRUCTION_BITS | (uint64_t)at;
        atomic_store_explicit(place_slot(known), known << ID_BITS | id, memory_order_release);
    }
    return id;
}

static PyObject *
describe_string(uint32_t id)
{
    const RecordHeader *record = store_record(&store, id);
    return PyUnicode_DecodeUTF8(record_key(record), record_size(record), "surrogatepass");
}

PyObject *
names_describe(unsigned long place)
{
    if (store.slots == NULL || place < PLACE_FIRST || place >= atomic_load(&store.used) ||
        record_kind(store_record(&store, (uint32_t)place)) != KIND_PLACE) {
        return PyErr_Format(PyExc_ValueError, "no code has the place %lu", place);
    }
    const PlaceKey *key = record_key(store_record(&store, (uint32_t)place));
    const FunctionKey *function = record_key(store_record(&store, key->function));
    PyObject *name = describe_string(function->name), *file = describe_string(function->file);
    if (name == NULL || file == NULL) {
        Py_XDECREF(name);
        Py_XDECREF(file);
        return NULL;
    }
    return Py_BuildValue("(NNii)", name, file, function->first_line, key->line);
}
