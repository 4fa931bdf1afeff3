/*
 * Two caches make it cheap to find a known place: one by the address of the code object, one by
 * function and instruction. An address is valid as long as its code object lives. So while a
 * table is open we replace the destructor of code objects: ours forgets the address, and then
 * calls the original.
 *
 * Finding a line takes time in proportion to the size of the code. So a place in large code has
 * the instruction, and its line is found when the place is described. If the code has been freed
 * by then, the line is not known.
 *
 * Sources: Objects/codeobject.c (code_dealloc), Objects/locations.md (line table).
 */
#include "names.h"

#include <pthread.h>
#include <stdlib.h>

#include "store.h"

enum { KIND_STRING, KIND_FUNCTION, KIND_PLACE, KIND_INSTRUCTION };

typedef struct {
    uint32_t name, file; /* ids of strings */
    int32_t first_line;
    /* Distinguishes functions with the same name and first line, as after a module is reloaded. */
    uint64_t table_hash;
} FunctionKey;

typedef struct {
    uint32_t function;
    int32_t line; /* or instruction */
} PlaceKey;

/* A position in a line table, and the instruction and the line there. */
typedef struct {
    size_t at;
    int64_t instruction;
    int32_t line, found; /* `found`: the line of the last instruction that has one */
} LinePoint;

/* A large code object that is alive and has places. */
typedef struct {
    _Atomic uintptr_t code; /* its address; 0: an empty slot */
    _Atomic uint32_t function;
    LinePoint *points; /* one for every LINE_WINDOW bytes; NULL until a line is asked for */
    size_t point_count;
} LargeCode;

#define ID_BITS 22 /* for at most 64 MiB, in units of 16 bytes */
#define ID_MASK ((1u << ID_BITS) - 1)
#define INSTRUCTION_BITS 20
#define CODE_CACHE 4096
#define PLACE_CACHE 16384
#define LARGE_TABLE 16384 /* bytes of a line table: some thousand lines */
#define LINE_WINDOW 4096
#define MAX_LARGE 256

struct NameTable {
    bool open;
    ByteStore store;
    /* By address of a code object. An entry has the rest of the address, and the function's id. */
    _Atomic uint64_t code_cache[CODE_CACHE];
    /* By function and instruction. An entry has both, and the id of the place. */
    _Atomic uint64_t place_cache[PLACE_CACHE];
    LargeCode large[MAX_LARGE];
};

#define TABLES 3
static NameTable tables[TABLES];
NameTable *const cpu_names = &tables[0], *const heap_names = &tables[1],
                 *const more_heap_names = &tables[2];

static destructor code_dealloc; /* never cleared: ours may still run in another interpreter */
static bool is_in_place;        /* whether our destructor is set, or another one on top of it */
/* Held while large code is read, and before it is freed, perhaps by another interpreter. */
static pthread_mutex_t large_mutex = PTHREAD_MUTEX_INITIALIZER;
static Reader describer = {.trusted = true};

static _Atomic uint64_t *
code_slot(NameTable *table, uintptr_t address)
{
    return &table->code_cache[(address >> 4) & (CODE_CACHE - 1)];
}

static uint32_t
known_function(NameTable *table, uintptr_t address)
{
    uint64_t entry = atomic_load_explicit(code_slot(table, address), memory_order_acquire);
    return entry >> 32 == address >> 16 ? (uint32_t)entry & ID_MASK : 0;
}

static void
remember_function(NameTable *table, uintptr_t address, uint32_t function)
{
    if (address >> 48 == 0) { /* bits 4 to 15 are the slot, 16 to 47 the entry's upper half */
        atomic_store_explicit(code_slot(table, address),
                              (uint64_t)(address >> 16) << 32 | function, memory_order_release);
    }
}

static void
forget_large(LargeCode *large)
{
    free(large->points);
    large->points = NULL;
    atomic_store(&large->function, 0);
    atomic_store(&large->code, 0);
}

static void
forget_code(NameTable *table, uintptr_t address, bool is_large)
{
    _Atomic uint64_t *slot = code_slot(table, address);
    uint64_t entry = atomic_load_explicit(slot, memory_order_relaxed);
    if (entry >> 32 == address >> 16) {
        atomic_compare_exchange_strong(slot, &entry, 0);
    }
    if (is_large) {
        pthread_mutex_lock(&large_mutex);
        for (int i = 0; i < MAX_LARGE; i++) {
            if (atomic_load(&table->large[i].code) == address) {
                forget_large(&table->large[i]);
            }
        }
        pthread_mutex_unlock(&large_mutex);
    }
}

static void
forget_and_dealloc(PyObject *object)
{
    const PyObject *lines = ((PyCodeObject *)object)->co_linetable;
    bool is_large = lines != NULL && PyBytes_GET_SIZE(lines) > LARGE_TABLE;
    for (int i = 0; i < TABLES; i++) {
        if (tables[i].open) {
            forget_code(&tables[i], (uintptr_t)object, is_large);
        }
    }
    code_dealloc(object);
}

static bool
any_is_open(void)
{
    return tables[0].open || tables[1].open || tables[2].open;
}

bool
names_open(NameTable *table, uint32_t mebibytes)
{
    uint32_t units = (mebibytes << 20) / STORE_UNIT;
    if (!store_open(&table->store, units / 8, units, PLACE_FIRST)) {
        return false;
    }
    /* The ids of the last opening are invalid, and its code objects may have been freed. */
    memset(table->code_cache, 0, sizeof table->code_cache);
    memset(table->place_cache, 0, sizeof table->place_cache);
    table->open = true;
    if (!is_in_place) {
        is_in_place = true;
        code_dealloc = PyCode_Type.tp_dealloc;
        PyCode_Type.tp_dealloc = forget_and_dealloc;
    }
    return true;
}

void
names_close(NameTable *table)
{
    store_close(&table->store);
    table->open = false;
    pthread_mutex_lock(&large_mutex);
    for (int i = 0; i < MAX_LARGE; i++) {
        forget_large(&table->large[i]);
    }
    pthread_mutex_unlock(&large_mutex);
    /* If another destructor has been put on top of ours, both must stay. */
    if (!any_is_open() && PyCode_Type.tp_dealloc == forget_and_dealloc) {
        PyCode_Type.tp_dealloc = code_dealloc;
        is_in_place = false;
    }
}

uint32_t
names_count(const NameTable *table)
{
    return atomic_load(&table->store.count);
}

bool
names_are_nearly_full(const NameTable *table)
{
    return store_is_nearly_full(&table->store);
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
intern_string(NameTable *table, Reader *reader, const PyObject *object, uint32_t *id)
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
    *id = store_intern(&table->store, KIND_STRING, reader->text, (uint32_t)size, 0);
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
    size_t end = size > LARGE_TABLE ? LINE_WINDOW : size;
    while (table.at < end && !table.failed) {
        hash = (hash ^ next_byte(&table)) * 0x100000001b3u; /* FNV-1a */
    }
    return hash;
}

/* Read one entry: it covers some instructions, which have one line or none. */
static void
next_entry(LineTable *table, LinePoint *point)
{
    unsigned first = next_byte(table), form = first >> 3 & 15;
    if (form == 13 || form == 14) {
        point->line += next_signed(table);
    }
    else if (form >= 10 && form <= 12) {
        point->line += (int32_t)form - 10;
    }
    if (form != 15 && !table->failed) {
        point->found = point->line;
    }
    point->instruction += (first & 7) + 1;
    while (table->at < table->size && !(peek_byte(table) & 0x80)) { /* columns */
        table->at++;
    }
    point->at = table->at;
}

static LinePoint
first_point(const PyCodeObject *code)
{
    return (LinePoint){0, 0, code->co_firstlineno, code->co_firstlineno};
}

/* Return an instruction's line; if it has none, that of the last instruction before with a line. */
static int32_t
find_line(Reader *reader, const PyCodeObject *code, size_t table_size, LinePoint from,
          int64_t instruction)
{
    LineTable table = open_lines(reader, code, table_size);
    table.at = from.at;
    while (table.at < table.size && from.instruction <= instruction && !table.failed) {
        next_entry(&table, &from);
    }
    return from.found;
}

static void
find_points(LargeCode *large, const PyCodeObject *code, size_t table_size)
{
    large->points = malloc((table_size / LINE_WINDOW + 2) * sizeof(LinePoint));
    if (large->points == NULL) {
        return;
    }
    LineTable table = open_lines(&describer, code, table_size);
    LinePoint point = first_point(code);
    large->points[0] = point;
    large->point_count = 1;
    while (table.at < table.size && !table.failed) {
        next_entry(&table, &point);
        if (point.at >= large->point_count * LINE_WINDOW) {
            large->points[large->point_count++] = point;
        }
    }
}

static int32_t
find_line_of_large(NameTable *table, uint32_t function, int64_t instruction)
{
    for (int i = 0; i < MAX_LARGE; i++) {
        LargeCode *large = &table->large[i];
        if (atomic_load(&large->function) != function) {
            continue;
        }
        const PyCodeObject *code = (const PyCodeObject *)atomic_load(&large->code);
        size_t size = (size_t)PyBytes_GET_SIZE(code->co_linetable);
        if (large->points == NULL) {
            find_points(large, code, size);
        }
        if (large->points == NULL) {
            return find_line(&describer, code, size, first_point(code), instruction);
        }
        size_t low = 0, high = large->point_count; /* the last point before the instruction */
        while (high - low > 1) {
            size_t middle = (low + high) / 2;
            *(large->points[middle].instruction <= instruction ? &low : &high) = middle;
        }
        return find_line(&describer, code, size, large->points[low], instruction);
    }
    return 0;
}

/* Return the line of an instruction in large code; 0 if the code has been freed. Needs the GIL. */
static int32_t
find_large_line(NameTable *table, uint32_t function, int64_t instruction)
{
    pthread_mutex_lock(&large_mutex);
    int32_t line = find_line_of_large(table, function, instruction);
    pthread_mutex_unlock(&large_mutex);
    return line;
}

void
names_after_fork_in_child(void)
{
    pthread_mutex_init(&large_mutex, NULL); /* the thread that held it does not exist here */
}

static void
remember_large(NameTable *table, uintptr_t address, uint32_t function)
{
    for (int i = 0; i < MAX_LARGE; i++) {
        LargeCode *large = &table->large[i];
        uintptr_t empty = 0;
        if (atomic_load(&large->code) == address) {
            return; /* it is known; only its slot in the code cache was used for another code */
        }
        if (atomic_compare_exchange_strong(&large->code, &empty, address)) {
            atomic_store(&large->function, function);
            return;
        }
    }
}

static _Atomic uint64_t *
place_slot(NameTable *table, uint64_t key)
{
    return &table->place_cache[(key * 0x9e3779b97f4a7c15u >> 40) & (PLACE_CACHE - 1)];
}

uint32_t
names_place(NameTable *names, Reader *reader, PyCodeObject *address, const char *instruction)
{
    const char *bytecode = (const char *)address + CODE_SIZE;
    /* Counted from 1, because a frame before its first instruction may be at -1. */
    int64_t at = (instruction - bytecode) / (int64_t)sizeof(_Py_CODEUNIT) + 1;
    bool cacheable = at >= 0 && at < 1 << INSTRUCTION_BITS;
    uint32_t function = known_function(names, (uintptr_t)address);
    if (function != 0 && cacheable) {
        uint64_t key = (uint64_t)function << INSTRUCTION_BITS | (uint64_t)at;
        uint64_t entry = atomic_load_explicit(place_slot(names, key), memory_order_acquire);
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
        if (!intern_string(names, reader, code.co_qualname, &key.name) ||
            !intern_string(names, reader, code.co_filename, &key.file)) {
            return PLACE_NONE;
        }
        key.table_hash = hash_lines(reader, &code, (size_t)table.ob_size);
        if (key.name == 0 || key.file == 0 ||
            (function = store_intern(&names->store, KIND_FUNCTION, &key, sizeof key, 0)) == 0) {
            return PLACE_LOST;
        }
        if (table.ob_size > LARGE_TABLE) {
            remember_large(names, (uintptr_t)address, function);
        }
        remember_function(names, (uintptr_t)address, function);
    }
    uint32_t id = PLACE_HIDDEN;
    if (at - 1 >= code._co_firsttraceable) {
        bool is_large = table.ob_size > LARGE_TABLE;
        PlaceKey place = {function, (int32_t)(at - 1)};
        if (!is_large) {
            place.line = find_line(reader, &code, (size_t)table.ob_size, first_point(&code),
                                   at - 1);
        }
        id = store_intern(&names->store, is_large ? KIND_INSTRUCTION : KIND_PLACE, &place,
                          sizeof place, 0);
        if (id == 0) {
            return PLACE_LOST;
        }
    }
    if (cacheable) {
        uint64_t known = (uint64_t)function << INSTRUCTION_BITS | (uint64_t)at;
        atomic_store_explicit(place_slot(names, known), known << ID_BITS | id, memory_order_release);
    }
    return id;
}

static PyObject *
describe_string(const NameTable *table, uint32_t id)
{
    const RecordHeader *record = store_record(&table->store, id);
    return PyUnicode_DecodeUTF8(record_key(record), record_size(record), "surrogatepass");
}

uint32_t
names_numbered(const NameTable *table, uint32_t place)
{
    return place | (uint32_t)(table - tables) << ID_BITS;
}

static unsigned
kind_of(const NameTable *table, unsigned long place)
{
    if (table->store.slots == NULL || place < PLACE_FIRST ||
        place >= atomic_load(&table->store.used)) {
        return KIND_STRING;
    }
    /* A number may be from before the table was closed; then no record may begin there. */
    const RecordHeader *record = store_record(&table->store, (uint32_t)place);
    unsigned kind = record_kind(record);
    bool is_place = (kind == KIND_PLACE || kind == KIND_INSTRUCTION) &&
                    record_size(record) == sizeof(PlaceKey) &&
                    store_find(&table->store, kind, record_key(record), sizeof(PlaceKey)) == place;
    return is_place ? kind : KIND_STRING;
}

static uint32_t
move_string(const NameTable *from, NameTable *to, uint32_t id)
{
    const RecordHeader *record = store_record(&from->store, id);
    return store_intern(&to->store, KIND_STRING, record_key(record), record_size(record), 0);
}

uint32_t
names_move(NameTable *from, NameTable *to, uint32_t place)
{
    unsigned kind = kind_of(from, place);
    PlaceKey key = *(const PlaceKey *)record_key(store_record(&from->store, place));
    FunctionKey function;
    memcpy(&function, record_key(store_record(&from->store, key.function)), sizeof function);
    function.name = move_string(from, to, function.name);
    function.file = move_string(from, to, function.file);
    uint32_t before = key.function;
    if (function.name == 0 || function.file == 0 ||
        (key.function = store_intern(&to->store, KIND_FUNCTION, &function, sizeof function,
                                     0)) == 0) {
        return PLACE_LOST;
    }
    pthread_mutex_lock(&large_mutex);
    for (int i = 0; kind == KIND_INSTRUCTION && i < MAX_LARGE; i++) {
        if (atomic_load(&from->large[i].function) == before) {
            remember_large(to, atomic_load(&from->large[i].code), key.function);
        }
    }
    pthread_mutex_unlock(&large_mutex);
    uint32_t moved = store_intern(&to->store, kind, &key, sizeof key, 0);
    return moved != 0 ? moved : PLACE_LOST;
}

PyObject *
names_describe(unsigned long numbered)
{
    unsigned long number = numbered >> ID_BITS, place = numbered & ID_MASK;
    NameTable *table = &tables[number < TABLES ? number : 0];
    unsigned kind = kind_of(table, place);
    if (number >= TABLES || (kind != KIND_PLACE && kind != KIND_INSTRUCTION)) {
        return PyErr_Format(PyExc_ValueError, "no code has the place %lu", numbered);
    }
    PlaceKey key = *(const PlaceKey *)record_key(store_record(&table->store, (uint32_t)place));
    FunctionKey function;
    memcpy(&function, record_key(store_record(&table->store, key.function)), sizeof function);
    int line = kind == KIND_PLACE ? key.line : find_large_line(table, key.function, key.line);
    PyObject *name = describe_string(table, function.name);
    PyObject *file = describe_string(table, function.file); /* this collects no garbage */
    if (name == NULL || file == NULL) {
        Py_XDECREF(name);
        Py_XDECREF(file);
        return NULL;
    }
    return Py_BuildValue("(NNii)", name, file, function.first_line, line);
}
