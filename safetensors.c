/* safetensors.c - the ground the rest stands on: error lines, memory, mapped files, JSON, safetensors (YAML is in yaml.c).
 *
 * It is the only place that reads bytes somebody else wrote and turns them into structures, apart from the meaning of
 * config.json and tokenizer.json, which live with their subjects. It depends on nothing else here. It is not a general
 * library: JSON is read-only but for strings, tensors are views into mapped files.
 *
 * Every input is taken as hostile. What must stay true: no read outside the mapping, no recursion as deep as the input
 * says, no step slower than n log n in the input's size, no allocation much larger than the input, and one line that
 * names the file, the field and the reason when something is refused.
 */
#define _GNU_SOURCE /* memmem */
#include "nla.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <limits.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static void *xrealloc(void *old, size_t bytes);
#define STBDS_REALLOC(context, old, bytes) xrealloc(old, bytes)
#define STBDS_FREE(context, old) free(old)
#define STB_DS_IMPLEMENTATION
#include <stb/stb_ds.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#define JSMN_STATIC
#define JSMN_PARENT_LINKS
#include <jsmn.h>

enum { MAX_NESTING = 64 };                             /* nesting of JSON; also the bits of Scan.objects */
enum { MAX_CHECKED_KEYS = 10000 };                     /* pairs of an object among which json_parse looks for repeats */
static const uint64_t MAX_HEADER_BYTES = 100 * 1000 * 1000; /* the limit of the safetensors library */

/* ------------------------------------------------------------------------------------------------ errors, memory */

/* C0 controls and DEL, and the C1 controls as UTF-8 writes them (C2 80..9F), which some terminals obey too. */
static void hide_controls(char *text) {
    for (unsigned char *p = (unsigned char *)text; *p; p++) {
        if (*p < 0x20 || *p == 0x7F) *p = '?';
        if (p[0] == 0xC2 && p[1] >= 0x80 && p[1] < 0xA0) p[0] = p[1] = '?';
    }
}

int(fail)(Err *err, const char *format, ...) { /* in brackets: nla.h has a macro of this name */
    if (err->msg[0]) return -1;
    va_list args;
    va_start(args, format);
    vsnprintf(err->msg, sizeof err->msg, format, args);
    va_end(args);
    hide_controls(err->msg);
    return -1;
}

static void *checked(void *memory, size_t bytes) {
    if (memory || !bytes) return memory;
    fprintf(stderr, "nla: error: out of memory: could not get %zu bytes\n", bytes);
    exit(1);
}

void *xmalloc(size_t bytes) {
    return checked(malloc(bytes), bytes);
}

void *xcalloc(size_t count, size_t bytes) {
    return checked(calloc(count, bytes), count && bytes > SIZE_MAX / count ? SIZE_MAX : count * bytes);
}

static void *xrealloc(void *old, size_t bytes) {
    return checked(realloc(old, bytes), bytes);
}

char *xstrdup(const char *text) {
    return xstrndup(text, strlen(text));
}

char *xstrndup(const char *text, size_t len) {
    char *copy = xmalloc(len + 1);
    if (len) memcpy(copy, text, len);
    copy[len] = '\0';
    return copy;
}

char *xprintf(const char *format, ...) {
    va_list args, again;
    va_start(args, format);
    va_copy(again, args);
    int len = vsnprintf(NULL, 0, format, args);
    size_t bytes = len < 0 ? 1 : (size_t)len + 1;
    char *text = xmalloc(bytes);
    text[0] = '\0';
    vsnprintf(text, bytes, format, again);
    va_end(again);
    va_end(args);
    return text;
}

/* ------------------------------------------------------------------------------------------------ repeated names */

NameHash name_hash(const char *name, size_t len, int place) {
    return (NameHash){.hash = XXH3_64bits(name, len), .place = place};
}

static int by_hash(const void *left, const void *right) {
    const NameHash *a = left, *b = right;
    if (a->hash != b->hash) return a->hash < b->hash ? -1 : 1;
    return (a->place > b->place) - (a->place < b->place);
}

int sort_and_find_repeat(NameHash *name, size_t n) {
    if (n) qsort(name, n, sizeof *name, by_hash);
    for (size_t i = 1; i < n; i++)
        if (name[i].hash == name[i - 1].hash) return name[i].place;
    return -1;
}

/* ------------------------------------------------------------------------------------------------ files */

/* The mappings that the SIGBUS handler knows. A slot is free while `path` is NULL; `start` and `end` are written before
 * `path` appears, so the handler, which may run at any moment in any thread, sees whole entries. When all slots are
 * taken, a mapping goes unlisted and its error line lacks the name. */
enum { MAX_GUARDED = 1024 };
static struct {
    _Atomic(const char *) path;
    _Atomic uintptr_t start, end;
} guarded[MAX_GUARDED];

static const char claimed[] = ""; /* stands in `path` between taking a slot and filling it */

static void guard_add(const File *file) {
    for (int i = 0; i < MAX_GUARDED; i++) {
        const char *nobody = NULL;
        if (!atomic_compare_exchange_strong(&guarded[i].path, &nobody, claimed)) continue;
        atomic_store(&guarded[i].start, (uintptr_t)file->data);
        atomic_store(&guarded[i].end, (uintptr_t)file->data + file->len);
        atomic_store(&guarded[i].path, file->path);
        return;
    }
}

static void guard_remove(const File *file) {
    for (int i = 0; i < MAX_GUARDED; i++)
        if (atomic_load(&guarded[i].path) == file->path) {
            atomic_store(&guarded[i].start, 0);
            atomic_store(&guarded[i].end, 0);
            atomic_store(&guarded[i].path, NULL);
        }
}

static const char *guard_find(uintptr_t address) {
    for (int i = 0; i < MAX_GUARDED; i++) {
        const char *path = atomic_load(&guarded[i].path);
        if (path && address >= atomic_load(&guarded[i].start) && address < atomic_load(&guarded[i].end)) return path;
    }
    return NULL;
}

static size_t append(char *line, size_t used, size_t size, const char *text) {
    while (*text && used < size - 1) line[used++] = *text++;
    line[used] = '\0';
    return used;
}

/* Only async-signal-safe calls here: no printf, no malloc, no locks. */
static void on_sigbus(int signal_number, siginfo_t *info, void *context) {
    (void)context;
    const char *path = guard_find((uintptr_t)info->si_addr);
    if (!path) { /* not a mapped file of ours: let it happen again, unhandled */
        signal(signal_number, SIG_DFL);
        return;
    }
    char line[PATH_MAX + 256];
    size_t used = append(line, 0, sizeof line, "nla: error: ");
    used = append(line, used, PATH_MAX, path);
    used = append(line, used, sizeof line - 1,
                  ": the file shrank while it was being read; leave it alone during the run and start again");
    hide_controls(line);
    line[used++] = '\n';
    if (write(STDERR_FILENO, line, used) < 0) _exit(1);
    _exit(1);
}

void file_guard(void) {
    struct sigaction action = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO};
    sigemptyset(&action.sa_mask);
    sigaction(SIGBUS, &action, NULL);
}

static int map_descriptor(File *file, int fd, const char *path, Err *err) {
    struct stat st;
    if (fstat(fd, &st)) return fail(err, "%s: %s", path, strerror(errno));
    if (S_ISDIR(st.st_mode)) return fail(err, "%s: is a directory where a file is needed", path);
    if (!S_ISREG(st.st_mode)) return fail(err, "%s: is not a regular file", path);
    if (st.st_size == 0) return 0;
    file->len = (size_t)st.st_size;
    void *data = mmap(NULL, file->len, PROT_READ, MAP_PRIVATE, fd, 0);
    if (data == MAP_FAILED) return fail(err, "%s: cannot map it: %s", path, strerror(errno));
    file->data = data;
    return 0;
}

int file_map(File *file, const char *path, Err *err) {
    *file = (File){0};
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* O_NONBLOCK: opening a named pipe must not wait */
    if (fd < 0) return fail(err, "%s: %s", path, strerror(errno));
    int status = map_descriptor(file, fd, path, err);
    close(fd);
    if (status) return -1;
    file->path = xstrdup(path);
    if (file->data) guard_add(file);
    return 0;
}

void file_unmap(File *file) {
    if (file->data) {
        guard_remove(file);
        munmap((void *)(uintptr_t)file->data, file->len);
    }
    free(file->path);
    *file = (File){0};
}

int file_sync_dir(const char *path, Err *err) {
    const char *slash = strrchr(path, '/');
    char *dir = slash == path ? xstrdup("/") : slash ? xstrndup(path, (size_t)(slash - path)) : xstrdup(".");
    int fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int status = fd < 0 || fsync(fd) ? fail(err, "%s: cannot sync the directory: %s", dir, strerror(errno)) : 0;
    if (fd >= 0) close(fd);
    free(dir);
    return status;
}

static int remove_entry(const char *path, const struct stat *st, int type, struct FTW *place) {
    (void)st;
    (void)type;
    (void)place;
    (void)remove(path);
    return 0;
}

void remove_tree(const char *path) {
    nftw(path, remove_entry, 16, FTW_DEPTH | FTW_PHYS);
}

char *path_beside(const char *path, const char *suffix) {
    size_t len = strlen(path);
    while (len > 1 && path[len - 1] == '/') len--;
    return xprintf("%.*s%s", (int)len, path, suffix);
}

int stage(Staging *s, const char *dir, Err *err) {
    *s = (Staging){.final = path_beside(dir, "")};
    s->temp = xprintf("%s.tmp-%ld", s->final, (long)getpid());
    int status = 0;
    if (access(s->final, F_OK) == 0) {
        status = fail(err, "%s: exists already; remove it or name another directory", s->final);
    } else if (mkdir(s->temp, 0777) != 0) {
        status = fail(err, "%s: cannot make this directory: %s", s->temp, strerror(errno));
    }
    if (status != 0) {
        free(s->temp);
        free(s->final);
    }
    return status;
}

int unstage(Staging *s, int status, Err *err) {
    if (status == 0 && rename(s->temp, s->final) != 0) {
        status = fail(err, "%s: cannot rename %s to it: %s", s->final, s->temp, strerror(errno));
    }
    if (status != 0) remove_tree(s->temp);
    free(s->temp);
    free(s->final);
    return status;
}

/* A file being written under a temporary name beside its own. */
typedef struct {
    const char *path; /* borrowed */
    char *temp;
    int fd;
} Output;

static int output_open(Output *out, const char *path, Err *err) {
    static atomic_uint serial; /* two threads may write the same name */
    struct stat st;
    if (!stat(path, &st) && !S_ISREG(st.st_mode)) return fail(err, "%s: exists and is not a regular file", path);
    *out = (Output){.path = path};
    out->temp = xprintf("%s.tmp-%ld-%u", path, (long)getpid(), atomic_fetch_add(&serial, 1));
    out->fd = open(out->temp, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (out->fd >= 0) return 0;
    fail(err, "%s: cannot create it: %s", out->temp, strerror(errno));
    free(out->temp);
    return -1;
}

static void output_discard(Output *out) {
    if (out->fd >= 0) close(out->fd);
    unlink(out->temp);
    free(out->temp);
}

static int output_fail(Output *out, const char *doing, Err *err) {
    fail(err, "%s: cannot %s it: %s; nothing was changed", out->path, doing, strerror(errno));
    output_discard(out);
    return -1;
}

/* On failure the output is discarded already. */
static int output_write(Output *out, const void *data, size_t len, Err *err) {
    const char *at = data;
    while (len) {
        ssize_t wrote = write(out->fd, at, len < (size_t)1 << 30 ? len : (size_t)1 << 30);
        if (wrote < 0 && errno == EINTR) continue;
        if (wrote < 0) return output_fail(out, "write", err);
        at += wrote;
        len -= (size_t)wrote;
    }
    return 0;
}

/* fsync before the rename, else a crash could leave the new name on an empty file; close may report a late ENOSPC. */
static int output_commit(Output *out, Err *err) {
    if (fsync(out->fd)) return output_fail(out, "sync", err);
    int fd = out->fd;
    out->fd = -1;
    if (close(fd)) return output_fail(out, "close", err);
    if (rename(out->temp, out->path)) return output_fail(out, "rename", err);
    free(out->temp);
    return file_sync_dir(out->path, err);
}

int file_write(const char *path, const void *data, size_t len, Err *err) {
    Output out;
    if (output_open(&out, path, err)) return -1;
    if (output_write(&out, data, len, err)) return -1;
    return output_commit(&out, err);
}

/* ------------------------------------------------------------------------------------------------ JSON: the check */

/* jsmn makes the node table but takes much that is not JSON ("[1 2]", "{1}", "[nul]", bytes after the end). So the text
 * is first read once by this checker, which knows the whole grammar of RFC 8259, names what is wrong and counts the
 * nodes; jsmn then sees only valid JSON (its strict mode would refuse a lone number) and a table of the right size. */
typedef struct {
    const unsigned char *at, *end;
    const unsigned char *place; /* what is refused, and why; NULL while all is well */
    const char *why;
    uint64_t objects; /* bit d: the container at depth d is an object, else an array */
    int depth;
    int nodes;
} Scan;

typedef enum { EXPECT_VALUE, EXPECT_KEY, EXPECT_SEPARATOR, EXPECT_NOTHING } Expect;

static Expect refuse(Scan *s, const char *why) {
    if (!s->why) s->place = s->at, s->why = why;
    return EXPECT_NOTHING;
}

/* Length of the UTF-8 character at text[0..n), n > 0; when there is none, minus the length of what U+FFFD replaces (the
 * longest start of a character, as Python and Rust replace it). */
static int utf8_char(const unsigned char *text, size_t n) {
    unsigned char lead = text[0];
    if (lead < 0x80) return 1;
    if (lead < 0xC2 || lead > 0xF4) return -1;
    int len = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
    unsigned char low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;  /* no overlong forms */
    unsigned char high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF; /* no surrogates, none above U+10FFFF */
    for (int i = 1; i < len; i++) {
        if ((size_t)i >= n || text[i] < low || text[i] > high) return -i;
        low = 0x80, high = 0xBF;
    }
    return len;
}

static void scan_space(Scan *s) {
    while (s->at < s->end && (*s->at == ' ' || *s->at == '\n' || *s->at == '\r' || *s->at == '\t')) s->at++;
}

static void scan_escape(Scan *s) {
    s->at++;
    if (s->at < s->end && *s->at == 'u') {
        for (int i = 1; i <= 4; i++)
            if (s->end - s->at <= i || !isxdigit(s->at[i])) return (void)refuse(s, "\\u needs four hex digits");
        s->at += 5;
    } else if (s->at < s->end && *s->at && strchr("\"\\/bfnrt", *s->at)) {
        s->at++;
    } else {
        refuse(s, "unknown escape after a backslash");
    }
}

static bool plain_in_string(unsigned char c) {
    return c >= 0x20 && c < 0x80 && c != '"' && c != '\\';
}

static void scan_string(Scan *s) {
    s->at++;
    while (!s->why) {
        while (s->at < s->end && plain_in_string(*s->at)) s->at++;
        if (s->at == s->end) {
            refuse(s, "a string does not end");
        } else if (*s->at == '"') {
            s->at++;
            return;
        } else if (*s->at == '\\') {
            scan_escape(s);
        } else if (*s->at < 0x20) {
            refuse(s, "a control character in a string must be escaped");
        } else {
            int len = utf8_char(s->at, (size_t)(s->end - s->at));
            if (len < 0)
                refuse(s, "a string is not valid UTF-8");
            else
                s->at += len;
        }
    }
}

static void scan_digits(Scan *s) {
    if (s->at == s->end || !isdigit(*s->at)) refuse(s, "a number lacks a digit");
    while (s->at < s->end && isdigit(*s->at)) s->at++;
}

static void scan_number(Scan *s) {
    if (*s->at == '-') s->at++;
    bool zero = s->at < s->end && *s->at == '0';
    const unsigned char *first = s->at;
    scan_digits(s);
    if (zero && s->at - first > 1) refuse(s, "a number starts with 0");
    if (s->at < s->end && *s->at == '.') {
        s->at++;
        scan_digits(s);
    }
    if (s->at < s->end && (*s->at == 'e' || *s->at == 'E')) {
        s->at++;
        if (s->at < s->end && (*s->at == '+' || *s->at == '-')) s->at++;
        scan_digits(s);
    }
}

static void scan_word(Scan *s, const char *word) {
    size_t len = strlen(word);
    if ((size_t)(s->end - s->at) < len || memcmp(s->at, word, len))
        refuse(s, "expected a value");
    else
        s->at += len;
}

static Expect scan_open(Scan *s, bool object) {
    if (s->depth == MAX_NESTING) return refuse(s, "nested more than 64 deep");
    uint64_t bit = (uint64_t)1 << s->depth++;
    s->objects = object ? s->objects | bit : s->objects & ~bit;
    s->at++;
    scan_space(s);
    if (s->at < s->end && *s->at == (object ? '}' : ']')) return EXPECT_SEPARATOR;
    return object ? EXPECT_KEY : EXPECT_VALUE;
}

static Expect scan_value(Scan *s) {
    if (s->at == s->end) return refuse(s, "the text ends where a value is expected");
    s->nodes++;
    switch (*s->at) {
    case '{': return scan_open(s, true);
    case '[': return scan_open(s, false);
    case '"': scan_string(s); break;
    case 't': scan_word(s, "true"); break;
    case 'f': scan_word(s, "false"); break;
    case 'n': scan_word(s, "null"); break;
    default:
        if (*s->at != '-' && !isdigit(*s->at)) return refuse(s, "expected a value");
        scan_number(s);
    }
    return EXPECT_SEPARATOR;
}

static Expect scan_key(Scan *s) {
    if (s->at == s->end || *s->at != '"') return refuse(s, "expected a key in quotes");
    s->nodes++;
    scan_string(s);
    scan_space(s);
    if (s->why) return EXPECT_NOTHING;
    if (s->at == s->end || *s->at != ':') return refuse(s, "expected ':' after a key");
    s->at++;
    return EXPECT_VALUE;
}

static Expect scan_separator(Scan *s) {
    if (s->depth == 0) return s->at == s->end ? EXPECT_NOTHING : refuse(s, "something follows the end of the value");
    bool object = s->objects >> (s->depth - 1) & 1;
    if (s->at == s->end) return refuse(s, object ? "the text ends inside an object" : "the text ends inside an array");
    if (*s->at == ',') {
        s->at++;
        return object ? EXPECT_KEY : EXPECT_VALUE;
    }
    if (*s->at != (object ? '}' : ']')) return refuse(s, object ? "expected ',' or '}'" : "expected ',' or ']'");
    s->at++;
    s->depth--;
    return EXPECT_SEPARATOR;
}

static void scan_text(Scan *s) {
    Expect expect = EXPECT_VALUE;
    while (expect != EXPECT_NOTHING && !s->why) {
        scan_space(s);
        expect = expect == EXPECT_VALUE ? scan_value(s) : expect == EXPECT_KEY ? scan_key(s) : scan_separator(s);
    }
}

/* ------------------------------------------------------------------------------------------------ JSON: the tree */

static jsmntok_t *token(const Json *json, int node) {
    return (jsmntok_t *)json->node + node;
}

/* Where a message points: "line 3, column 7", or "column 7" in the first line (JSONL, safetensors headers). */
static int json_fail_at(const Json *json, const char *at, const char *why, Err *err) {
    size_t line = 1;
    const char *start = json->text;
    for (const char *p; (p = memchr(start, '\n', (size_t)(at - start))); start = p + 1) line++;
    size_t column = (size_t)(at - start) + 1;
    if (line == 1) return fail(err, "%s: invalid JSON at column %zu: %s", json->file, column, why);
    return fail(err, "%s: invalid JSON at line %zu, column %zu: %s", json->file, line, column, why);
}

/* Turns jsmn's links to the parent into links to the next sibling, -1 at the last, so that json_next is one step. A
 * value's parent is its key; only keys and elements have siblings. */
static void json_link(Json *json) {
    int open[MAX_NESTING], last[MAX_NESTING]; /* the containers around node i, and their latest child */
    int depth = 0;
    for (int i = 0; i < json->n_nodes; i++) {
        jsmntok_t *node = token(json, i);
        while (depth && node->start >= token(json, open[depth - 1])->end) depth--;
        if (depth && node->parent == open[depth - 1]) {
            if (last[depth - 1] >= 0) token(json, last[depth - 1])->parent = i;
            last[depth - 1] = i;
        }
        node->parent = -1;
        if (node->type == JSMN_OBJECT || node->type == JSMN_ARRAY) {
            open[depth] = i;
            last[depth++] = -1;
        }
    }
}

static NameHash json_key_hash(const Json *json, int key) {
    size_t len = 0;
    const char *raw = json_raw(json, key, &len);
    if (raw) return name_hash(raw, len, key);
    char *text = json_string(json, key, &len);
    NameHash hash = name_hash(text, len, key);
    free(text);
    return hash;
}

static int json_refuse_repeats(const Json *json, Err *err) {
    NameHash *names = NULL;
    int repeat = -1;
    for (int i = 0; i < json->n_nodes && repeat < 0; i++) {
        int pairs = token(json, i)->size;
        if (token(json, i)->type != JSMN_OBJECT || pairs < 2 || pairs > MAX_CHECKED_KEYS) continue;
        arrsetlen(names, 0);
        for (int key = json_first(json, i); key >= 0; key = json_next(json, key))
            arrput(names, json_key_hash(json, key));
        repeat = sort_and_find_repeat(names, arrlenu(names));
    }
    arrfree(names);
    if (repeat < 0) return 0;
    char *key = json_string(json, repeat, NULL);
    char *why = xprintf("the key \"%.200s\" stands twice in the object", key);
    json_fail_at(json, json->text + token(json, repeat)->start, why, err);
    free(why);
    free(key);
    return -1;
}

int json_parse(Json *json, const char *text, size_t len, const char *file, Err *err) {
    *json = (Json){.text = text, .len = len, .file = file};
    if (!text || !len) return fail(err, "%s: empty where JSON is expected", file);
    if (len > INT_MAX) return fail(err, "%s: %zu bytes of JSON; the limit is 2 GiB", file, len);
    const unsigned char *bytes = (const unsigned char *)text;
    Scan scan = {.at = bytes, .end = bytes + len};
    scan_text(&scan);
    if (scan.why) return json_fail_at(json, (const char *)scan.place, scan.why, err);

    json->node = malloc((size_t)scan.nodes * sizeof(jsmntok_t));
    if (!json->node) return fail(err, "%s: not enough memory for %d JSON nodes", file, scan.nodes);
    jsmn_parser parser;
    jsmn_init(&parser);
    json->n_nodes = jsmn_parse(&parser, text, len, token(json, 0), (unsigned)scan.nodes);
    int status = json->n_nodes == scan.nodes ? 0 : fail(err, "%s: jsmn and the check disagree (a bug in nla)", file);
    if (!status) json_link(json);
    if (!status) status = json_refuse_repeats(json, err);
    if (status) json_free(json);
    return status;
}

void json_free(Json *json) {
    free(json->node);
    *json = (Json){0};
}

JsonType json_type(const Json *json, int node) {
    if (node < 0 || node >= json->n_nodes) return JSON_NONE;
    switch (token(json, node)->type) {
    case JSMN_OBJECT: return JSON_OBJECT;
    case JSMN_ARRAY: return JSON_ARRAY;
    case JSMN_STRING: return JSON_STRING;
    default: break;
    }
    char c = json->text[token(json, node)->start];
    return c == 'n' ? JSON_NULL : c == 't' || c == 'f' ? JSON_BOOL : JSON_NUMBER;
}

int json_first(const Json *json, int node) {
    return json_size(json, node) ? node + 1 : -1;
}

int json_next(const Json *json, int node) {
    return node < 0 || node >= json->n_nodes ? -1 : token(json, node)->parent; /* see json_link */
}

int json_size(const Json *json, int node) {
    JsonType type = json_type(json, node);
    return type == JSON_OBJECT || type == JSON_ARRAY ? token(json, node)->size : 0;
}

static bool json_equals(const Json *json, int node, const char *text, size_t text_len) {
    if (json_type(json, node) != JSON_STRING) return false;
    size_t len = 0;
    const char *raw = json_raw(json, node, &len);
    if (raw) return len == text_len && !memcmp(raw, text, len);
    char *own = json_string(json, node, &len);
    bool equal = len == text_len && !memcmp(own, text, len);
    free(own);
    return equal;
}

bool json_is(const Json *json, int node, const char *text) {
    return json_equals(json, node, text, strlen(text));
}

int json_get(const Json *json, int object, const char *key) {
    if (json_type(json, object) != JSON_OBJECT) return -1;
    size_t len = strlen(key);
    for (int k = json_first(json, object); k >= 0; k = json_next(json, k))
        if (json_equals(json, k, key, len)) return k + 1;
    return -1;
}

bool json_int(const Json *json, int node, int64_t *value) {
    if (json_type(json, node) != JSON_NUMBER) return false;
    const char *at = json->text + token(json, node)->start, *end = json->text + token(json, node)->end;
    bool negative = *at == '-';
    int64_t sum = 0; /* kept negative: the negative side reaches one further */
    for (at += negative; at < end; at++) {
        if (!isdigit((unsigned char)*at)) return false;
        if (__builtin_mul_overflow(sum, 10, &sum) || __builtin_sub_overflow(sum, *at - '0', &sum)) return false;
    }
    if (!negative && sum == INT64_MIN) return false;
    *value = negative ? sum : -sum;
    return true;
}

bool json_double(const Json *json, int node, double *value) {
    if (json_type(json, node) != JSON_NUMBER) return false;
    const jsmntok_t *number = token(json, node);
    char *text = xstrndup(json->text + number->start, (size_t)(number->end - number->start)); /* strtod wants a NUL */
    double read = strtod(text, NULL);
    free(text);
    if (!isfinite(read)) return false;
    *value = read;
    return true;
}

bool json_bool(const Json *json, int node, bool *value) {
    if (json_type(json, node) != JSON_BOOL) return false;
    *value = json->text[token(json, node)->start] == 't';
    return true;
}

const char *json_raw(const Json *json, int node, size_t *len) {
    if (json_type(json, node) != JSON_STRING) return NULL;
    const char *start = json->text + token(json, node)->start;
    size_t n = (size_t)(token(json, node)->end - token(json, node)->start);
    if (memchr(start, '\\', n)) return NULL;
    *len = n;
    return start;
}

static unsigned hex4(const char *at) {
    unsigned value = 0;
    for (int i = 0; i < 4; i++) {
        unsigned c = (unsigned char)at[i];
        value = value * 16 + (c <= '9' ? c - '0' : (c | 0x20) - 'a' + 10);
    }
    return value;
}

static char *put_utf8(char *out, unsigned c) {
    if (c < 0x80) {
        *out++ = (char)c;
    } else if (c < 0x800) {
        *out++ = (char)(0xC0 | c >> 6);
        *out++ = (char)(0x80 | (c & 0x3F));
    } else if (c < 0x10000) {
        *out++ = (char)(0xE0 | c >> 12);
        *out++ = (char)(0x80 | (c >> 6 & 0x3F));
        *out++ = (char)(0x80 | (c & 0x3F));
    } else {
        *out++ = (char)(0xF0 | c >> 18);
        *out++ = (char)(0x80 | (c >> 12 & 0x3F));
        *out++ = (char)(0x80 | (c >> 6 & 0x3F));
        *out++ = (char)(0x80 | (c & 0x3F));
    }
    return out;
}

/* The character of the \u escape whose digits start at *at, with its second half when it is a pair; moves *at past it. */
static unsigned unescape_u(const char **at, const char *end) {
    unsigned c = hex4(*at);
    *at += 4;
    if (c < 0xD800 || c > 0xDFFF) return c;
    if (c < 0xDC00 && end - *at >= 6 && (*at)[0] == '\\' && (*at)[1] == 'u') {
        unsigned low = hex4(*at + 2);
        if (low >= 0xDC00 && low <= 0xDFFF) {
            *at += 6;
            return 0x10000 + ((c - 0xD800) << 10) + (low - 0xDC00);
        }
    }
    return 0xFFFD;
}

char *json_string(const Json *json, int node, size_t *len) {
    if (json_type(json, node) != JSON_STRING) return NULL;
    const char *at = json->text + token(json, node)->start, *end = json->text + token(json, node)->end;
    char *text = xmalloc((size_t)(end - at) + 1), *out = text; /* an escape never grows */
    while (at < end) {
        const char *escape = memchr(at, '\\', (size_t)(end - at));
        size_t plain = (size_t)((escape ? escape : end) - at);
        memcpy(out, at, plain);
        out += plain;
        at += plain;
        if (!escape) break;
        char c = at[1];
        at += 2;
        if (c == 'u')
            out = put_utf8(out, unescape_u(&at, end));
        else
            *out++ = c == 'b' ? '\b' : c == 'f' ? '\f' : c == 'n' ? '\n' : c == 'r' ? '\r' : c == 't' ? '\t' : c;
    }
    *out = '\0';
    if (len) *len = (size_t)(out - text);
    return text;
}

void json_write_string(FILE *out, const char *text, size_t len) {
    const unsigned char *at = (const unsigned char *)text, *end = at + len;
    putc('"', out);
    while (at < end) {
        const unsigned char *plain = at;
        while (at < end && plain_in_string(*at)) at++;
        fwrite(plain, 1, (size_t)(at - plain), out);
        if (at == end) break;
        int n = utf8_char(at, (size_t)(end - at));
        if (*at == '"' || *at == '\\')
            fprintf(out, "\\%c", *at);
        else if (*at == '\n')
            fputs("\\n", out);
        else if (*at == '\t')
            fputs("\\t", out);
        else if (*at < 0x20)
            fprintf(out, "\\u%04x", *at);
        else if (n < 0)
            fputs("\xEF\xBF\xBD", out);
        else
            fwrite(at, 1, (size_t)n, out);
        at += abs(n);
    }
    putc('"', out);
}

void json_text(FILE *out, const char *key, const char *text) {
    fprintf(out, ", \"%s\": ", key);
    if (text)
        json_write_string(out, text, strlen(text));
    else
        fputs("null", out);
}

void json_number(FILE *out, const char *key, double value) {
    fprintf(out, ", \"%s\": ", key);
    bool whole = fabs(value) < 1e15 && value == floor(value); /* a count keeps all its digits */
    if (isfinite(value))
        fprintf(out, whole ? "%.0f" : "%.6g", value);
    else
        fputs("null", out);
}

/* ------------------------------------------------------------------------------------------------ tensors: types */

/* The types of the safetensors library, by name. Only those with a DType can be computed with. */
static const struct {
    const char *name;
    DType dtype;
    unsigned bits;
} dtypes[] = {
    {"F32", DT_F32, 32},      {"BF16", DT_BF16, 16},    {"F16", DT_F16, 16},      {"I64", DT_I64, 64},
    {"I32", DT_I32, 32},      {"U64", DT_U64, 64},      {"U8", DT_U8, 8},         {"BOOL", DT_OTHER, 8},
    {"I8", DT_OTHER, 8},      {"I16", DT_OTHER, 16},    {"U16", DT_OTHER, 16},    {"U32", DT_OTHER, 32},
    {"F64", DT_OTHER, 64},    {"C64", DT_OTHER, 64},    {"F8_E4M3", DT_OTHER, 8}, {"F8_E5M2", DT_OTHER, 8},
    {"F8_E8M0", DT_OTHER, 8}, {"F6_E2M3", DT_OTHER, 6}, {"F6_E3M2", DT_OTHER, 6}, {"F4", DT_OTHER, 4},
};
enum { N_DTYPES = sizeof dtypes / sizeof dtypes[0] };

size_t dtype_size(DType dtype) {
    return dtype < DT_OTHER ? dtypes[dtype].bits / 8 : 0; /* the table starts in the order of the enum */
}

const char *dtype_name(DType dtype) {
    return dtype < DT_OTHER ? dtypes[dtype].name : "OTHER";
}

static float float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

float bf16_to_f32(uint16_t bits) {
    return float_of_bits((uint32_t)bits << 16);
}

/* Adding 0x7FFF and the bit that would become the lowest rounds halves to even. The carry may reach the exponent, which
 * is right: the next binade, or infinity. */
uint16_t f32_to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (isnan(value))
        return (uint16_t)(bits >> 16 | 0x0040); /* quiet, so that the cut payload cannot become infinity */
    return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

float f16_to_f32(uint16_t bits) {
    uint32_t sign = (uint32_t)(bits & 0x8000) << 16, magnitude = bits & 0x7FFF;
    if (magnitude >= 0x7C00) return float_of_bits(sign | 0x7F800000 | (magnitude & 0x3FF) << 13); /* infinity, NaN */
    if (magnitude >= 0x0400) return float_of_bits(sign | ((magnitude << 13) + (112u << 23)));     /* bias 15 -> 127 */
    float tiny = (float)magnitude * 0x1p-24f;                                                     /* subnormal, exact */
    return sign ? -tiny : tiny;
}

size_t tensor_elements(const Tensor *t) {
    size_t n = t->data ? 1 : 0;
    for (int i = 0; i < t->n_dims; i++) {
        n *= (size_t)t->shape[i];
    }
    return n;
}

int tensor_to_floats(float *out, const Tensor *t) {
    size_t n = tensor_elements(t);
    const uint16_t *half = t->data;
    if (t->dtype == DT_F32) {
        memcpy(out, t->data, n * sizeof(float));
    } else if (t->dtype == DT_BF16 || t->dtype == DT_F16) {
        for (size_t i = 0; i < n; i++) {
            out[i] = t->dtype == DT_BF16 ? bf16_to_f32(half[i]) : f16_to_f32(half[i]);
        }
    } else {
        return -1;
    }
    return 0;
}

/* ------------------------------------------------------------------------------------------------ tensors: reading */

/* One .safetensors file being read: 8 bytes of header length, the JSON header, the data. */
typedef struct {
    const char *path;
    Json json;
    const char *data; /* behind the header */
    uint64_t data_len;
} Header;

/* "FILE: tensor NAME: what is wrong with it" */
__attribute__((format(printf, 4, 5))) static int tensor_fail(const char *path, const Tensor *t, Err *err,
                                                             const char *format, ...) {
    char why[256];
    va_list args;
    va_start(args, format);
    vsnprintf(why, sizeof why, format, args);
    va_end(args);
    return fail(err, "%s: tensor %.200s: %s", path, t->name, why);
}

static int read_shape(const Header *h, int entry, Tensor *t, Err *err) {
    int shape = json_get(&h->json, entry, "shape"), n = json_size(&h->json, shape);
    if (json_type(&h->json, shape) != JSON_ARRAY) return tensor_fail(h->path, t, err, "\"shape\" is not a list");
    if (n > MAX_DIMS) return tensor_fail(h->path, t, err, "%d dimensions; the limit is %d", n, MAX_DIMS);
    for (int v = json_first(&h->json, shape); v >= 0; v = json_next(&h->json, v), t->n_dims++)
        if (!json_int(&h->json, v, &t->shape[t->n_dims]) || t->shape[t->n_dims] < 0)
            return tensor_fail(h->path, t, err, "dimension %d of \"shape\" is not a whole number from 0 to 2^63-1",
                               t->n_dims);
    return 0;
}

static int read_offsets(const Header *h, int entry, Tensor *t, Err *err) {
    int list = json_get(&h->json, entry, "data_offsets");
    int first = json_first(&h->json, list), second = json_next(&h->json, first);
    int64_t begin = -1, end = -1;
    bool two = json_type(&h->json, list) == JSON_ARRAY && json_size(&h->json, list) == 2;
    if (!two || !json_int(&h->json, first, &begin) || !json_int(&h->json, second, &end) || begin < 0 || end < 0)
        return tensor_fail(h->path, t, err, "\"data_offsets\" is not a list of two whole numbers from 0");
    if (begin > end || (uint64_t)end > h->data_len)
        return tensor_fail(h->path, t, err, "data_offsets [%lld, %lld] do not lie in the %llu bytes of data",
                           (long long)begin, (long long)end, (unsigned long long)h->data_len);
    t->data = h->data + begin;
    t->bytes = (size_t)(end - begin);
    return 0;
}

/* prod(shape) * bits, checked for overflow; a dimension of 0 makes 0 whatever the others are. */
static bool shape_bits(const Tensor *t, unsigned bits, uint64_t *total) {
    *total = bits;
    for (int i = 0; i < t->n_dims; i++)
        if (t->shape[i] == 0) *total = 0;
    for (int i = 0; i < t->n_dims; i++)
        if (__builtin_mul_overflow(*total, (uint64_t)t->shape[i], total)) return false;
    return true;
}

static int read_dtype(const Header *h, int entry, Tensor *t, Err *err) {
    int node = json_get(&h->json, entry, "dtype"), d = 0;
    if (json_type(&h->json, node) != JSON_STRING) return tensor_fail(h->path, t, err, "\"dtype\" is not a string");
    while (d < N_DTYPES && !json_is(&h->json, node, dtypes[d].name)) d++;
    t->dtype = d < N_DTYPES ? dtypes[d].dtype : DT_OTHER;
    if (d == N_DTYPES) return 0; /* a newer type: listed, never computed with */

    uint64_t bits;
    if (!shape_bits(t, dtypes[d].bits, &bits))
        return tensor_fail(h->path, t, err, "\"shape\" has more elements than memory can hold");
    if (bits % 8 || bits / 8 != t->bytes)
        return tensor_fail(h->path, t, err, "%s and its shape need %llu bytes, but data_offsets give %zu",
                           dtypes[d].name, (unsigned long long)(bits / 8), t->bytes);
    size_t element = dtypes[d].bits < 8 ? 1 : dtypes[d].bits / 8;
    if (t->bytes && (uintptr_t)t->data % element)
        return tensor_fail(h->path, t, err,
                           "its data is not aligned to its %s elements; save it again with a current "
                           "version of the safetensors library",
                           dtypes[d].name);
    return 0;
}

static int read_tensor(const Header *h, int key, Tensor *t, Err *err) {
    size_t len;
    char *name = json_string(&h->json, key, &len);
    t->name = name;
    if (strlen(name) != len) return tensor_fail(h->path, t, err, "its name goes on after a NUL");
    if (json_type(&h->json, key + 1) != JSON_OBJECT) return tensor_fail(h->path, t, err, "its entry is not an object");
    if (read_shape(h, key + 1, t, err) || read_offsets(h, key + 1, t, err)) return -1;
    return read_dtype(h, key + 1, t, err);
}

static int check_metadata(const Header *h, int node, Err *err) {
    if (json_type(&h->json, node) != JSON_OBJECT) return fail(err, "%s: \"__metadata__\" is not an object", h->path);
    for (int k = json_first(&h->json, node); k >= 0; k = json_next(&h->json, k))
        if (json_type(&h->json, k + 1) != JSON_STRING)
            return fail(err, "%s: \"__metadata__\" holds something other than strings", h->path);
    return 0;
}

static int by_place(const void *left, const void *right) {
    const Tensor *a = left, *b = right;
    if (a->data != b->data) return (const char *)a->data < (const char *)b->data ? -1 : 1;
    return (a->bytes > b->bytes) - (a->bytes < b->bytes); /* empty ones first, so that the others stay neighbours */
}

/* The data must be tiled: each tensor starts where the one before ends, the last ends with the file. */
static int check_tiling(const Header *h, const Tensor *tensor, size_t first, Err *err) {
    const char *at = h->data;
    for (size_t i = first; i < arrlenu(tensor); i++) {
        const char *start = tensor[i].data, *name = tensor[i].name;
        if (start < at) return fail(err, "%s: tensors %.200s and %.200s overlap", h->path, tensor[i - 1].name, name);
        if (start > at)
            return tensor_fail(h->path, &tensor[i], err, "%td bytes before it belong to no tensor", start - at);
        at += tensor[i].bytes;
    }
    ptrdiff_t left = h->data + h->data_len - at;
    return left ? fail(err, "%s: the last %td bytes belong to no tensor", h->path, left) : 0;
}

static int read_header(Safetensors *st, const Header *h, Err *err) {
    if (json_type(&h->json, 0) != JSON_OBJECT) return fail(err, "%s: the header is not a JSON object", h->path);
    size_t before = arrlenu(st->tensor);
    for (int k = json_first(&h->json, 0); k >= 0; k = json_next(&h->json, k)) {
        if (json_is(&h->json, k, "__metadata__")) {
            if (check_metadata(h, k + 1, err)) return -1;
            continue;
        }
        Tensor tensor = {0};
        int status = read_tensor(h, k, &tensor, err);
        arrput(st->tensor, tensor); /* also a refused one: it owns its name */
        if (status) return -1;
    }
    size_t n = arrlenu(st->tensor) - before;
    if (n) qsort(st->tensor + before, n, sizeof *st->tensor, by_place);
    return check_tiling(h, st->tensor, before, err);
}

static int read_file(Safetensors *st, const char *path, Err *err) {
    File file;
    if (file_map(&file, path, err)) return -1;
    arrput(st->file, file);
    if (file.len < 8) return fail(err, "%s: %zu bytes are too few for a safetensors file", path, file.len);
    uint64_t len = 0;
    for (int i = 7; i >= 0; i--) len = len << 8 | (unsigned char)file.data[i];
    if (len > file.len - 8)
        return fail(err, "%s: the header says %llu bytes, but the file has %zu; is the download complete?", path,
                    (unsigned long long)len, file.len);
    if (len > MAX_HEADER_BYTES)
        return fail(err, "%s: a header of %llu bytes; the limit is 100 MB", path, (unsigned long long)len);
    Header header = {.path = path, .data = file.data + 8 + len, .data_len = file.len - 8 - len};
    if (json_parse(&header.json, file.data + 8, (size_t)len, path, err)) return -1;
    int status = read_header(st, &header, err);
    json_free(&header.json);
    return status;
}

/* Sorts the names for safetensors_find; refuses one that stands twice. */
static int index_names(Safetensors *st, const char *path, Err *err) {
    for (int i = 0; i < arrlen(st->tensor); i++)
        arrput(st->index, name_hash(st->tensor[i].name, strlen(st->tensor[i].name), i));
    int repeat = sort_and_find_repeat(st->index, arrlenu(st->index));
    return repeat < 0 ? 0 : fail(err, "%s: the tensor %.200s is there twice", path, st->tensor[repeat].name);
}

static const NameHash *find_name(const Safetensors *st, const char *name) {
    NameHash wanted = name_hash(name, strlen(name), 0);
    size_t low = 0, high = arrlenu(st->index);
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (st->index[middle].hash < wanted.hash)
            low = middle + 1;
        else
            high = middle;
    }
    if (low == arrlenu(st->index) || st->index[low].hash != wanted.hash) return NULL;
    return strcmp(st->tensor[st->index[low].place].name, name) ? NULL : &st->index[low];
}

const Tensor *safetensors_find(const Safetensors *st, const char *name) {
    const NameHash *found = find_name(st, name);
    return found ? &st->tensor[found->place] : NULL;
}

/* ------------------------------------------------------------------------------------------------ tensors: shards */

typedef struct {
    char *name; /* file name in the directory */
    int first;  /* its tensors are tensor[first] to the next shard's first */
} Shard;

static Shard *shard_find(Shard *shard, const Json *json, int node) {
    for (ptrdiff_t i = arrlen(shard); i-- > 0;) /* the index names a shard many times in a row */
        if (json_is(json, node, shard[i].name)) return &shard[i];
    return NULL;
}

static bool plain_file_name(const char *name, size_t len) {
    return len && strlen(name) == len && !strchr(name, '/') && !strchr(name, '\\') && name[0] != '.';
}

static int shard_read(Safetensors *st, Shard **shards, const char *dir, const Json *json, int node, Err *err) {
    size_t len;
    char *name = json_string(json, node, &len);
    if (!name) return fail(err, "%s: a value of \"weight_map\" is not a string", json->file);
    Shard shard = {.name = name, .first = (int)arrlen(st->tensor)};
    arrput(*shards, shard);
    if (!plain_file_name(name, len))
        return fail(err, "%s: \"weight_map\" names \"%.200s\", which is not a plain file name", json->file, name);
    char *path = xprintf("%s/%s", dir, name);
    int status = read_file(st, path, err);
    free(path);
    return status;
}

static int check_weight_map(const Safetensors *st, Shard *shards, const Json *json, int map, Err *err) {
    for (int k = json_first(json, map); k >= 0; k = json_next(json, k)) {
        const Shard *shard = shard_find(shards, json, k + 1);
        char *name = json_string(json, k, NULL);
        const NameHash *found = find_name(st, name);
        bool last = shard + 1 == shards + arrlen(shards);
        bool there = found && found->place >= shard->first && (last || found->place < shard[1].first);
        if (!there)
            fail(err, "%s: the tensor %.200s is not in %.200s, where \"weight_map\" puts it", json->file, name,
                 shard->name);
        free(name);
        if (!there) return -1;
    }
    return 0;
}

static int read_shards(Safetensors *st, const char *dir, const Json *json, Err *err) {
    int map = json_get(json, 0, "weight_map"), status = 0;
    if (json_type(json, map) != JSON_OBJECT) return fail(err, "%s: no \"weight_map\" object", json->file);
    Shard *shards = NULL;
    for (int k = json_first(json, map); k >= 0 && !status; k = json_next(json, k))
        if (!shard_find(shards, json, k + 1)) status = shard_read(st, &shards, dir, json, k + 1, err);
    if (!status) status = index_names(st, dir, err);
    if (!status) status = check_weight_map(st, shards, json, map, err);
    for (int i = 0; i < arrlen(shards); i++) free(shards[i].name);
    arrfree(shards);
    return status;
}

static int read_index(Safetensors *st, const char *dir, const char *path, Err *err) {
    File file;
    Json json;
    if (file_map(&file, path, err)) return -1;
    int status = json_parse(&json, file.data, file.len, path, err);
    if (!status) status = read_shards(st, dir, &json, err);
    json_free(&json);
    file_unmap(&file);
    return status;
}

static int read_directory(Safetensors *st, const char *dir, Err *err) {
    char *single = xprintf("%s/model.safetensors", dir), *index = xprintf("%s/model.safetensors.index.json", dir);
    int status;
    if (!access(single, F_OK))
        status = read_file(st, single, err) || index_names(st, single, err) ? -1 : 0;
    else if (!access(index, F_OK))
        status = read_index(st, dir, index, err);
    else
        status = fail(err, "%s: neither model.safetensors nor model.safetensors.index.json is there", dir);
    free(single);
    free(index);
    return status;
}

int safetensors_open(Safetensors *st, const char *path, Err *err) {
    *st = (Safetensors){0};
    struct stat info;
    int status;
    if (stat(path, &info))
        status = fail(err, "%s: %s", path, strerror(errno));
    else if (S_ISDIR(info.st_mode))
        status = read_directory(st, path, err);
    else
        status = read_file(st, path, err) || index_names(st, path, err) ? -1 : 0;
    if (status) safetensors_close(st);
    return status;
}

void safetensors_close(Safetensors *st) {
    for (int i = 0; i < arrlen(st->tensor); i++) free((void *)(uintptr_t)st->tensor[i].name);
    for (int i = 0; i < arrlen(st->file); i++) file_unmap(&st->file[i]);
    arrfree(st->tensor);
    arrfree(st->file);
    arrfree(st->index);
    *st = (Safetensors){0};
}

/* ------------------------------------------------------------------------------------------------ tensors: writing */

char *safetensors_header(const Tensor *tensor, int n, size_t pad_to, size_t *len) {
    char *text = NULL;
    size_t used = 0, offset = 0;
    FILE *out = open_memstream(&text, &used);
    if (!out) return NULL;
    fwrite("\0\0\0\0\0\0\0\0", 1, 8, out);               /* the length, below */
    fputs("{\"__metadata__\":{\"format\":\"pt\"}", out); /* transformers refuses files without it */
    for (int i = 0; i < n; i++) {
        putc(',', out);
        json_write_string(out, tensor[i].name, strlen(tensor[i].name));
        fprintf(out, ":{\"dtype\":\"%s\",\"shape\":[", dtype_name(tensor[i].dtype));
        for (int d = 0; d < tensor[i].n_dims; d++) fprintf(out, "%s%lld", d ? "," : "", (long long)tensor[i].shape[d]);
        fprintf(out, "],\"data_offsets\":[%zu,%zu]}", offset, offset + tensor[i].bytes);
        offset += tensor[i].bytes;
    }
    putc('}', out);
    fflush(out);
    size_t total = pad_to ? pad_to : (used + 7) / 8 * 8;
    bool fits = used <= total;
    for (size_t i = used; i < total; i++) putc(' ', out);
    if (fclose(out) || !fits) {
        free(text);
        return NULL;
    }
    for (int i = 0; i < 8; i++) text[i] = (char)((total - 8) >> (8 * i) & 0xFF);
    *len = total;
    return text;
}

static int check_tensor(const char *path, const Tensor *t, Err *err) {
    uint64_t bits;
    if (t->dtype >= DT_OTHER) return tensor_fail(path, t, err, "this type cannot be written");
    if (!shape_bits(t, (unsigned)dtype_size(t->dtype) * 8, &bits) || bits / 8 != t->bytes)
        return tensor_fail(path, t, err, "its shape and its %zu bytes disagree", t->bytes);
    return 0;
}

/* Larger elements first, otherwise as given: with no holes allowed between tensors, this keeps all of them aligned. */
static void sort_tensors(Tensor *sorted, const Tensor *tensor, int n) {
    for (size_t size = 8; size; size /= 2)
        for (int i = 0; i < n; i++)
            if (dtype_size(tensor[i].dtype) == size) *sorted++ = tensor[i];
}

static int write_tensors(const char *path, const Tensor *tensor, int n, const char *header, size_t len, Err *err) {
    Output out;
    if (output_open(&out, path, err) || output_write(&out, header, len, err)) return -1;
    for (int i = 0; i < n; i++)
        if (output_write(&out, tensor[i].data, tensor[i].bytes, err)) return -1;
    return output_commit(&out, err);
}

int safetensors_save(const char *path, const Tensor *tensor, int n, Err *err) {
    for (int i = 0; i < n; i++)
        if (check_tensor(path, &tensor[i], err)) return -1;
    Tensor *sorted = xcalloc((size_t)n + 1, sizeof *sorted);
    sort_tensors(sorted, tensor, n);
    size_t len = 0;
    char *header = safetensors_header(sorted, n, 0, &len);
    int status = header ? write_tensors(path, sorted, n, header, len, err) : fail(err, "%s: out of memory", path);
    free(header);
    free(sorted);
    return status;
}
