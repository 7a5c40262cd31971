/* data.c - documents in, datasets out.
 *
 * Corpus reads documents one at a time from JSONL, text files, a directory of them or stdin, gzip or not. DatasetWriter
 * appends rows to a dataset directory of docs/formats.md: vectors go straight to disk, and the directory gets its name only
 * when everything in it is complete and synced. Dataset reads it back, mapped. What is done with them is in capture.c (text to
 * activations) and stages.c (activations to training rows).
 *
 * What must stay true: memory does not grow with the corpus or the dataset; nothing unreadable is skipped silently; a run that
 * fails leaves no half-written dataset under its final name.
 */
#define _GNU_SOURCE /* pipe2, environ */
#include "nla.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <signal.h>
#include <spawn.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <stb/stb_ds.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

/* A gzip bomb without a newline ends here, not at the last byte of RAM. */
static const size_t MAX_DOCUMENT = (size_t)1 << 30;
enum { READ_BYTES = 1 << 18 };

/* ------------------------------------------------------------------------------------------------ corpus: bytes */

typedef enum { JSONL, LINES, WHOLE, JSONL_OR_LINES } Form;

struct Corpus {
    char **path; /* stb: the files, in the order they are read */
    int next;    /* the one to open next; path[next - 1] is open */
    int fd;      /* -1: none is open */
    pid_t gzip;  /* the process that unpacks into fd, or 0 */
    Form form;
    int64_t line; /* lines read so far; WHOLE: documents */
    double size;  /* bytes of all files, 0 for stdin */
    double used;  /* bytes of them that are behind us; a gzipped file counts when it ends */
    char *buffer; /* [READ_BYTES], bytes at..filled not used yet */
    size_t at, filled;
    char *text;   /* stb: the line or file being read */
    Document doc; /* owned; what corpus_next lent last */
};

static const char *current(const Corpus *c) {
    return c->path[c->next - 1];
}

static const char *base_name(const char *path) {
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

/* Unpacks `packed` through `gzip -dc`, whose output *fd then is. No shell, and the file is its stdin, so that no file
 * name can be an option. Its own words go to /dev/null: the exit status tells, and our line names the file. */
static int start_gzip(const char *path, int packed, int *fd, pid_t *process, Err *err) {
    int ends[2];
    if (pipe2(ends, O_CLOEXEC)) return fail(err, "%s: no pipe for gzip: %s", path, strerror(errno));
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, packed, STDIN_FILENO);
    posix_spawn_file_actions_adddup2(&actions, ends[1], STDOUT_FILENO);
    posix_spawn_file_actions_addopen(&actions, STDERR_FILENO, "/dev/null", O_WRONLY, 0);
    char gzip[] = "gzip", option[] = "-dc", *arguments[] = {gzip, option, NULL};
    int error = posix_spawnp(process, gzip, &actions, NULL, arguments, environ);
    posix_spawn_file_actions_destroy(&actions);
    close(ends[1]);
    *fd = ends[0];
    if (!error) return 0;
    close(ends[0]);
    *process = 0;
    *fd = -1;
    return fail(err, "%s: cannot start gzip: %s", path, strerror(error));
}

static int wait_gzip(Corpus *c, Err *err) {
    int status;
    pid_t process = c->gzip;
    c->gzip = 0;
    while (waitpid(process, &status, 0) < 0)
        if (errno != EINTR) return fail(err, "%s: lost the gzip process: %s", current(c), strerror(errno));
    if (WIFEXITED(status) && WEXITSTATUS(status) == 0) return 0;
    return fail(err, "%s: gzip cannot unpack it; is the file complete?", current(c));
}

static void close_file(Corpus *c) {
    if (c->fd > STDIN_FILENO) close(c->fd);
    c->fd = -1;
    if (!c->gzip) return;
    Err ignored = {0};
    kill(c->gzip, SIGTERM); /* the corpus is closed before its end */
    wait_gzip(c, &ignored);
}

/* Refills the empty buffer: 1 there are bytes, 0 the end, -1 an error. */
static int fill(Corpus *c, Err *err) {
    ssize_t got;
    do got = read(c->fd, c->buffer, READ_BYTES);
    while (got < 0 && errno == EINTR);
    if (got < 0) return fail(err, "%s: %s", current(c), strerror(errno));
    c->at = 0;
    c->filled = (size_t)got;
    if (!c->gzip) c->used += (double)got;
    if (got == 0 && c->gzip) return wait_gzip(c, err);
    return got > 0;
}

/* Appends the buffer up to and including the next `end`, or all of it (end < 0), to text. */
static bool take(Corpus *c, int end) {
    const char *start = c->buffer + c->at;
    size_t there = c->filled - c->at;
    const char *found = end < 0 ? NULL : memchr(start, end, there);
    size_t n = found ? (size_t)(found - start) + 1 : there;
    memcpy(arraddnptr(c->text, n), start, n);
    c->at += n;
    return found;
}

/* Reads the next line, or all of the file (end < 0), into text: 1 read, 0 the file is at its end, -1 an error. */
static int read_text(Corpus *c, int end, Err *err) {
    arrsetlen(c->text, 0);
    for (int more = 1;;) {
        if (c->at == c->filled) more = fill(c, err);
        if (more < 0) return -1;
        if (more == 0) break;
        if (take(c, end)) break;
        if (arrlenu(c->text) > MAX_DOCUMENT)
            return fail(err, "%s: line %lld: longer than 1 GiB", current(c), (long long)c->line + 1);
    }
    return arrlenu(c->text) > 0;
}

static void cut_line_end(Corpus *c) {
    if (arrlen(c->text) && arrlast(c->text) == '\n') (void)arrpop(c->text);
    if (arrlen(c->text) && arrlast(c->text) == '\r') (void)arrpop(c->text);
}

/* ------------------------------------------------------------------------------------------------ corpus: documents */

static int lend(Corpus *c, char *id, char *text, size_t len) {
    free(c->doc.id);
    free(c->doc.text);
    c->doc = (Document){.id = id, .text = text, .len = len};
    return 1;
}

static char *line_id(const Corpus *c) {
    return xprintf("%s:%lld", base_name(current(c)), (long long)c->line);
}

static char *row_id(const Corpus *c, const Json *json) {
    int node = json_get(json, 0, "doc_id");
    if (node < 0) node = json_get(json, 0, "id");
    int64_t number;
    if (json_type(json, node) == JSON_STRING) return json_string(json, node, NULL);
    if (json_int(json, node, &number)) return xprintf("%lld", (long long)number);
    return line_id(c);
}

/* "doc_id, content, url", for the message about the key that is not there. */
static char *keys_of(const Json *json) {
    char *list = xstrdup("");
    int left = 12;
    for (int k = json_first(json, 0); k >= 0 && left--; k = json_next(json, k)) {
        char *key = json_string(json, k, NULL);
        char *longer = xprintf("%s%s%.40s", list, *list ? ", " : "", left ? key : "...");
        free(key);
        free(list);
        list = longer;
    }
    return list;
}

static int lend_row(Corpus *c, const Json *json, Err *err) {
    if (json_type(json, 0) != JSON_OBJECT) return fail(err, "%s: not a JSON object", json->file);
    int node = json_get(json, 0, "text");
    if (node < 0) node = json_get(json, 0, "prompt");
    size_t len;
    char *text = json_string(json, node, &len);
    if (text) return lend(c, row_id(c, json), text, len);
    if (node >= 0) return fail(err, "%s: the text is not a string", json->file);
    char *keys = keys_of(json);
    fail(err, "%s: no \"text\" or \"prompt\"; the keys are: %s", json->file, keys);
    free(keys);
    return -1;
}

static int parse_row(Corpus *c, Err *err) {
    Json json;
    char *place = xprintf("%s: line %lld", current(c), (long long)c->line);
    int status = json_parse(&json, c->text, arrlenu(c->text), place, err);
    if (!status) status = lend_row(c, &json, err);
    json_free(&json);
    free(place);
    return status;
}

static int next_line(Corpus *c, Err *err) {
    for (;;) {
        int more = read_text(c, '\n', err);
        if (more <= 0) return more;
        c->line++;
        cut_line_end(c);
        size_t len = arrlenu(c->text), blank = 0;
        while (blank < len && (c->text[blank] == ' ' || c->text[blank] == '\t')) blank++;
        if (blank == len) continue;
        return c->form == JSONL ? parse_row(c, err) : lend(c, line_id(c), xstrndup(c->text, len), len);
    }
}

static int whole_file(Corpus *c, Err *err) {
    if (c->line++) return 0;
    if (read_text(c, -1, err) < 0) return -1;
    return lend(c, xstrdup(base_name(current(c))), xstrndup(c->text, arrlenu(c->text)), arrlenu(c->text));
}

/* ------------------------------------------------------------------------------------------------ corpus: files */

static bool ends_with(const char *text, size_t len, const char *end) {
    size_t n = strlen(end);
    return len >= n && !memcmp(text + len - n, end, n);
}

/* JSONL by name; .json too, as data sets on the hub are often called so. */
static Form form_of(const char *path) {
    size_t len = strlen(path);
    if (ends_with(path, len, ".gz")) len -= 3;
    bool json = ends_with(path, len, ".jsonl") || ends_with(path, len, ".ndjson") || ends_with(path, len, ".json");
    return json ? JSONL : WHOLE;
}

/* 1 the next file is open, 0 there is none, -1 an error. */
static int open_next(Corpus *c, Err *err) {
    if (c->next == arrlen(c->path)) return 0;
    const char *path = c->path[c->next++];
    c->line = 0;
    c->at = c->filled = 0;
    if (c->form == JSONL_OR_LINES) { /* stdin: its first byte tells */
        c->fd = STDIN_FILENO;
        int more = fill(c, err);
        c->form = more > 0 && c->buffer[0] == '{' ? JSONL : LINES;
        return more < 0 ? -1 : 1;
    }
    c->form = form_of(path);
    c->fd = open(path, O_RDONLY | O_CLOEXEC);
    if (c->fd < 0) return fail(err, "%s: %s", path, strerror(errno));
    if (!ends_with(path, strlen(path), ".gz")) return 1;
    int packed = c->fd;
    int status = start_gzip(path, packed, &c->fd, &c->gzip, err);
    close(packed);
    return status ? -1 : 1;
}

static int by_name(const void *left, const void *right) {
    return strcmp(*(char *const *)left, *(char *const *)right);
}

/* Hidden files and directories inside are left out. */
static int list_directory(Corpus *c, const char *dir, Err *err) {
    DIR *stream = opendir(dir);
    if (!stream) return fail(err, "%s: %s", dir, strerror(errno));
    for (struct dirent *entry; errno = 0, (entry = readdir(stream));) {
        if (entry->d_name[0] == '.') continue;
        char *path = xprintf("%s/%s", dir, entry->d_name);
        struct stat info;
        if (stat(path, &info) || !S_ISDIR(info.st_mode))
            arrput(c->path, path); /* a dangling link fails when opened */
        else
            free(path);
    }
    int error = errno;
    closedir(stream);
    if (error) return fail(err, "%s: %s", dir, strerror(error));
    if (!arrlen(c->path)) return fail(err, "%s: no files in this directory", dir);
    qsort(c->path, arrlenu(c->path), sizeof *c->path, by_name);
    return 0;
}

static int list_files(Corpus *c, const char *path, Err *err) {
    struct stat info;
    if (!strcmp(path, "-")) {
        c->form = JSONL_OR_LINES;
        arrput(c->path, xstrdup("stdin"));
        return 0;
    }
    if (stat(path, &info)) return fail(err, "%s: %s", path, strerror(errno));
    if (S_ISDIR(info.st_mode)) return list_directory(c, path, err);
    arrput(c->path, xstrdup(path));
    return 0;
}

Corpus *corpus_open(const char *path, Err *err) {
    Corpus *c = xcalloc(1, sizeof *c);
    c->fd = -1;
    c->form = WHOLE;
    c->buffer = xmalloc(READ_BYTES);
    if (list_files(c, path, err)) {
        corpus_close(c);
        return NULL;
    }
    struct stat info;
    for (int i = 0; i < arrlen(c->path) && c->form == WHOLE; i++)
        if (!stat(c->path[i], &info)) c->size += (double)info.st_size;
    return c;
}

double corpus_fraction(const Corpus *c) {
    return c->size > 0 ? (c->used < c->size ? c->used / c->size : 1) : -1;
}

int corpus_next(Corpus *c, Document *doc, Err *err) {
    for (;;) {
        int status = c->fd < 0 ? open_next(c, err) : 1;
        if (status <= 0) return status;
        status = c->form == WHOLE ? whole_file(c, err) : next_line(c, err);
        if (status < 0) return -1;
        if (status > 0) {
            *doc = c->doc;
            return 1;
        }
        struct stat info;
        if (ends_with(current(c), strlen(current(c)), ".gz") && !stat(current(c), &info)) c->used += (double)info.st_size;
        close_file(c);
    }
}

void corpus_close(Corpus *c) {
    if (!c) return;
    close_file(c);
    for (int i = 0; i < arrlen(c->path); i++) free(c->path[i]);
    arrfree(c->path);
    arrfree(c->text);
    free(c->buffer);
    free(c->doc.id);
    free(c->doc.text);
    free(c);
}

/* ------------------------------------------------------------------------------------------------ dataset writer */

static const char VECTORS[] = "activations.safetensors", ROWS[] = "rows.jsonl", SIDECAR[] = "nla_meta.yaml";
enum { HEADER_BYTES = 1024 }; /* kept free in front of the vectors; three tensors take under 400 */

uint64_t map_key(uint64_t hash) {
    return hash & 0x7fffffff7fffffffu;
}

uint64_t row_id_of(const char *doc_id, int64_t n_raw_tokens) {
    char *name = xprintf("%s#%lld", doc_id, (long long)n_raw_tokens);
    uint64_t id = XXH3_64bits(name, strlen(name));
    free(name);
    return id;
}

struct DatasetWriter {
    char *dir, *temp; /* temp: where it is until it is whole; dir itself when the caller renames it */
    char *columns_path;
    bool keep; /* what has been written outlives a failure: the caller goes on from it */
    int d_model;
    int64_t n;
    FILE *vectors, *rows, *columns;
};

/* What stands behind the vectors in the end, in a file beside until then: its place is known when the last row is. */
typedef struct {
    int64_t n_raw_tokens;
    uint64_t row_id;
} Column;

static int write_failed(const DatasetWriter *w, const char *name, Err *err) {
    return fail(err, "%s/%s: cannot write: %s", w->temp, name, strerror(errno));
}

static int check_target(const char *dir, Err *err) {
    const char *name = base_name(dir);
    if (!*name || !strcmp(name, ".") || !strcmp(name, ".."))
        return fail(err, "%s: give the dataset directory a name of its own", dir);
    DIR *stream = opendir(dir);
    if (!stream && errno == ENOENT) return 0;
    if (!stream) return fail(err, "%s: %s", dir, strerror(errno));
    bool empty = true;
    for (struct dirent *entry; (entry = readdir(stream));)
        if (strcmp(entry->d_name, ".") && strcmp(entry->d_name, "..")) empty = false;
    closedir(stream);
    return empty ? 0 : fail(err, "%s: exists and is not empty; remove it or name another directory", dir);
}

/* Opens a file of the dataset, made when it is not there, and cuts it to `bytes`, where writing goes on. */
static int open_part(const char *path, int64_t bytes, bool begun, FILE **file, Err *err) {
    struct stat info;
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (fd < 0 || fstat(fd, &info)) {
        fail(err, "%s: cannot write: %s", path, strerror(errno));
    } else if (begun && info.st_size < bytes) {
        fail(err, "%s: is shorter than what was recorded of it (%lld bytes of %lld); remove the unfinished run and begin again", path,
             (long long)info.st_size, (long long)bytes);
    } else if (ftruncate(fd, bytes) || lseek(fd, 0, SEEK_END) < 0 || !(*file = fdopen(fd, "r+"))) {
        fail(err, "%s: cannot write: %s", path, strerror(errno));
    } else {
        return 0;
    }
    if (fd >= 0) close(fd);
    return -1;
}

static int open_parts(DatasetWriter *w, int64_t text_bytes, Err *err) {
    char *vectors = xprintf("%s/%s", w->temp, VECTORS), *rows = xprintf("%s/%s", w->temp, ROWS);
    bool begun = w->n > 0;
    int status = open_part(vectors, HEADER_BYTES + w->n * w->d_model * (int64_t)sizeof(float), begun, &w->vectors, err);
    if (!status) status = open_part(rows, text_bytes, begun, &w->rows, err);
    if (!status) status = open_part(w->columns_path, w->n * (int64_t)sizeof(Column), begun, &w->columns, err);
    free(vectors);
    free(rows);
    return status;
}

static char *without_slash(const char *dir) {
    size_t len = strlen(dir);
    while (len > 1 && dir[len - 1] == '/') len--;
    return xstrndup(dir, len);
}

/* The int64 behind the vectors must be aligned for any number of rows, and safetensors allows no gap. */
static int check_width(const char *dir, int d_model, Err *err) {
    return d_model < 1 || d_model % 2 ? fail(err, "%s: d_model %d is not even and positive", dir, d_model) : 0;
}

DatasetWriter *dataset_create(const char *dir, int d_model, Err *err) {
    DatasetWriter *w = xcalloc(1, sizeof *w);
    w->dir = without_slash(dir);
    w->d_model = d_model;
    int status = check_width(w->dir, d_model, err);
    if (!status) status = check_target(w->dir, err);
    char *temp = xprintf("%s.tmp-%ld", w->dir, (long)getpid());
    if (!status && mkdir(temp, 0777)) status = fail(err, "%s: cannot create it: %s", temp, strerror(errno));
    if (status) {
        free(temp);
    } else {
        w->temp = temp;
        w->columns_path = xprintf("%s.columns", temp);
        status = open_parts(w, 0, err);
    }
    if (!status) return w;
    dataset_abandon(w);
    return NULL;
}

DatasetWriter *dataset_continue(const char *dir, const char *columns, int d_model, int64_t rows, int64_t text_bytes, Err *err) {
    DatasetWriter *w = xcalloc(1, sizeof *w);
    w->dir = without_slash(dir);
    w->temp = xstrdup(w->dir);
    w->columns_path = xstrdup(columns);
    w->d_model = d_model;
    w->n = rows;
    w->keep = true;
    int status = check_width(w->dir, d_model, err);
    if (!status && mkdir(w->dir, 0777) && errno != EEXIST) status = fail(err, "%s: cannot create it: %s", w->dir, strerror(errno));
    if (!status) status = open_parts(w, text_bytes, err);
    if (!status) return w;
    dataset_abandon(w);
    return NULL;
}

int dataset_append(DatasetWriter *w, const float *activation, int64_t n_raw_tokens, uint64_t row, const char *doc_id,
                   const char *text, size_t text_len, const char *explanation, Err *err) {
    size_t d = (size_t)w->d_model;
    Column column = {n_raw_tokens, row};
    if (fwrite(activation, sizeof *activation, d, w->vectors) != d) return write_failed(w, VECTORS, err);
    fputs("{\"doc_id\": ", w->rows);
    json_write_string(w->rows, doc_id, strlen(doc_id));
    fprintf(w->rows, ", \"n_raw_tokens\": %lld, \"text\": ", (long long)n_raw_tokens);
    json_write_string(w->rows, text, text_len);
    if (explanation) json_text(w->rows, "explanation", explanation);
    fputs("}\n", w->rows);
    if (ferror(w->rows)) return write_failed(w, ROWS, err);
    if (fwrite(&column, sizeof column, 1, w->columns) != 1) return write_failed(w, "columns", err);
    w->n++;
    return 0;
}

static bool sync_file(FILE *file) {
    return !fflush(file) && !fsync(fileno(file));
}

int dataset_sync(DatasetWriter *w, int64_t *text_bytes, Err *err) {
    if (!sync_file(w->vectors)) return write_failed(w, VECTORS, err);
    if (!sync_file(w->rows)) return write_failed(w, ROWS, err);
    if (!sync_file(w->columns)) return write_failed(w, "columns", err);
    *text_bytes = ftello(w->rows);
    return 0;
}

/* One of the two columns of all rows. */
static bool write_column(DatasetWriter *w, size_t place) {
    Column some[512];
    rewind(w->columns);
    for (int64_t left = w->n; left > 0;) {
        size_t n = left < 512 ? (size_t)left : 512;
        if (fread(some, sizeof *some, n, w->columns) != n) return false;
        for (size_t i = 0; i < n; i++)
            if (fwrite((const char *)&some[i] + place, 8, 1, w->vectors) != 1) return false;
        left -= (int64_t)n;
    }
    return true;
}

/* The two columns behind the vectors, then the header into the room in front. */
static bool write_columns(DatasetWriter *w) {
    int64_t n = w->n;
    size_t rows = (size_t)n, len;
    Tensor tensor[] = {
        {.name = "activation_vector", .dtype = DT_F32, .n_dims = 2, .shape = {n, w->d_model}},
        {.name = "n_raw_tokens", .dtype = DT_I64, .n_dims = 1, .shape = {n}, .bytes = rows * sizeof(int64_t)},
        {.name = "row_id", .dtype = DT_U64, .n_dims = 1, .shape = {n}, .bytes = rows * sizeof(uint64_t)},
    };
    tensor[0].bytes = rows * (size_t)w->d_model * sizeof(float);
    if (fflush(w->columns)) return false;
    if (!write_column(w, offsetof(Column, n_raw_tokens)) || !write_column(w, offsetof(Column, row_id))) return false;
    char *header = safetensors_header(tensor, 3, HEADER_BYTES, &len);
    bool written = header && !fseeko(w->vectors, 0, SEEK_SET) && fwrite(header, 1, len, w->vectors) == len;
    free(header);
    return written;
}

static bool close_synced(FILE **file) {
    bool synced = sync_file(*file);
    bool closed = !fclose(*file);
    *file = NULL;
    return synced && closed;
}

static int save_sidecar(const DatasetWriter *w, Yaml *sidecar, Err *err) {
    char count[24];
    snprintf(count, sizeof count, "%lld", (long long)w->n);
    yaml_set(sidecar, "row_count", count, false);
    char *path = xprintf("%s/%s", w->temp, SIDECAR);
    int status = yaml_save(sidecar, path, err); /* it syncs the temporary directory, too: the other files' names */
    free(path);
    return status;
}

/* A round number a little above the mean norm: up to the next half of its power of ten (133 -> 150, 42 -> 45). */
static double suggested_scale(double mean) {
    double step = pow(10, floor(log10(mean))) / 2;
    return ceil(mean * 1.02 / step) * step;
}

/* Reads the vectors back for what the sidecar says of them: norms, var_nrm, and an id made of the stage and the rows' ids. */
static int describe(const DatasetWriter *w, Yaml *y, Err *err) {
    char *path = xprintf("%s/%s", w->temp, VECTORS);
    Dataset d;
    Norms norms;
    int status = dataset_open(&d, path, err);
    free(path);
    if (status) return -1;
    dataset_norms(&d, &norms);
    const Yaml *stage = yaml_get(y, "stage"), *layer = yaml_get(y, "extraction.layer_index");
    char *id = xprintf("%s-L%s-%016llx", stage && stage->text ? stage->text : "base", layer && layer->text ? layer->text : "?",
                       (unsigned long long)(d.row_id && d.n > 0 ? XXH3_64bits(d.row_id, (size_t)d.n * sizeof *d.row_id) : 0));
    yaml_set(y, "dataset_id", id, true);
    yaml_set_number(y, "extraction.norms.mean", norms.mean);
    yaml_set_number(y, "extraction.norms.deviation", norms.deviation);
    yaml_set_number(y, "extraction.norms.least", norms.least);
    yaml_set_number(y, "extraction.norms.percent_1", norms.low);
    yaml_set_number(y, "extraction.norms.median", norms.median);
    yaml_set_number(y, "extraction.norms.percent_99", norms.high);
    yaml_set_number(y, "extraction.norms.most", norms.most);
    yaml_set_number(y, "extraction.var_nrm", norms.var_nrm);
    yaml_set_number(y, "extraction.suggested_injection_scale", norms.mean > 0 ? suggested_scale(norms.mean) : 0);
    free(id);
    dataset_close(&d);
    return 0;
}

static void writer_free(DatasetWriter *w) {
    if (w->vectors) fclose(w->vectors);
    if (w->rows) fclose(w->rows);
    if (w->columns) fclose(w->columns);
    if (!w->keep && w->columns_path) unlink(w->columns_path);
    free(w->columns_path);
    free(w->temp);
    free(w->dir);
    free(w);
}

static int complete(DatasetWriter *w, Yaml *sidecar, Err *err) {
    if (!write_columns(w) || !close_synced(&w->vectors)) return write_failed(w, VECTORS, err);
    if (!close_synced(&w->rows)) return write_failed(w, ROWS, err);
    if (describe(w, sidecar, err) || save_sidecar(w, sidecar, err)) return -1;
    if (strcmp(w->temp, w->dir) && rename(w->temp, w->dir)) /* takes the place of an empty directory, of nothing else */
        return fail(err, "%s: cannot rename %s to it: %s", w->dir, w->temp, strerror(errno));
    return 0;
}

int dataset_finish(DatasetWriter *w, Yaml *sidecar, Err *err) {
    if (complete(w, sidecar, err)) {
        dataset_abandon(w);
        return -1;
    }
    int status = file_sync_dir(w->dir, err);
    writer_free(w);
    return status;
}

void dataset_abandon(DatasetWriter *w) {
    if (!w) return;
    const char *names[] = {VECTORS, ROWS, SIDECAR};
    bool remove = w->temp && !w->keep;
    for (int i = 0; remove && i < 3; i++) {
        char *path = xprintf("%s/%s", w->temp, names[i]);
        unlink(path);
        free(path);
    }
    if (remove) rmdir(w->temp);
    writer_free(w);
}

/* ------------------------------------------------------------------------------------------------ dataset reader */

enum { PASSED_ROWS = 4096 }; /* rows whose pages are given back at a time */

/* The pages of [from, to) that lie wholly inside it leave this process's memory; they come back when they are read. */
static void forget_pages(const void *from, const void *to) {
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), a = ((uintptr_t)from + page - 1) / page * page, b = (uintptr_t)to / page * page;
    if (b > a) madvise((void *)a, b - a, MADV_DONTNEED);
}

static int index_rows(Dataset *d, const char *path, Err *err) {
    size_t at = 0;
    while (at < d->rows.len) {
        const char *end = memchr(d->rows.data + at, '\n', d->rows.len - at);
        arrput(d->line, at);
        at = end ? (size_t)(end - d->rows.data) + 1 : d->rows.len;
        if (arrlen(d->line) % PASSED_ROWS == 0) forget_pages(d->rows.data, d->rows.data + at);
    }
    arrput(d->line, d->rows.len);
    forget_pages(d->rows.data, d->rows.data + d->rows.len);
    if (arrlen(d->line) - 1 == d->n) return 0;
    return fail(err, "%s: holds %td rows, the activations %lld", path, arrlen(d->line) - 1, (long long)d->n);
}

static int find_vectors(Dataset *d, const char *path, Err *err) {
    const Tensor *v = safetensors_find(&d->st, "activation_vector");
    if (!v || v->n_dims != 2 || (v->dtype != DT_F32 && v->dtype != DT_BF16))
        return fail(err, "%s: must hold activation_vector [rows, width] as F32 or BF16", path);
    if (v->shape[1] < 1 || v->shape[1] > 1 << 16)
        return fail(err, "%s: activation_vector has width %lld", path, (long long)v->shape[1]);
    d->vectors = v;
    d->n = v->shape[0];
    d->d_model = (int)v->shape[1];
    const Tensor *tokens = safetensors_find(&d->st, "n_raw_tokens"), *id = safetensors_find(&d->st, "row_id");
    if ((tokens && (tokens->dtype != DT_I64 || tokens->n_dims != 1 || tokens->shape[0] != d->n)) ||
        (id && (id->dtype != DT_U64 || id->n_dims != 1 || id->shape[0] != d->n)))
        return fail(err, "%s: n_raw_tokens must be I64 and row_id U64, [%lld] as activation_vector has rows", path, (long long)d->n);
    d->n_raw_tokens = tokens ? tokens->data : NULL;
    d->row_id = id ? id->data : NULL;
    return 0;
}

int dataset_open(Dataset *d, const char *path, Err *err) {
    struct stat info;
    *d = (Dataset){0};
    if (stat(path, &info)) return fail(err, "%s: %s", path, strerror(errno));
    bool directory = S_ISDIR(info.st_mode);
    d->path = xstrdup(path);
    char *vectors = directory ? xprintf("%s/%s", path, VECTORS) : xstrdup(path), *rows = xprintf("%s/%s", path, ROWS);
    int status = safetensors_open(&d->st, vectors, err);
    if (!status) status = find_vectors(d, vectors, err);
    if (!status && directory) status = file_map(&d->rows, rows, err);
    if (!status && directory) status = index_rows(d, rows, err);
    if (!status && directory) {
        status = sidecar_load(&d->meta, path, err);
        d->has_meta = !status;
    }
    free(vectors);
    free(rows);
    if (status) dataset_close(d);
    return status;
}

void dataset_close(Dataset *d) {
    safetensors_close(&d->st);
    if (d->rows.path) file_unmap(&d->rows);
    if (d->has_meta) sidecar_free(&d->meta);
    arrfree(d->line);
    free(d->path);
    *d = (Dataset){0};
}

void dataset_vector(const Dataset *d, int64_t row, float *out) {
    size_t width = (size_t)d->d_model, at = (size_t)row * width;
    if (d->vectors->dtype == DT_F32)
        memcpy(out, (const float *)d->vectors->data + at, width * sizeof *out);
    else
        for (size_t i = 0; i < width; i++) out[i] = bf16_to_f32(((const uint16_t *)d->vectors->data)[at + i]);
}

void dataset_passed(const Dataset *d, int64_t row) {
    if (row % PASSED_ROWS != 0) return;
    size_t width = (size_t)d->d_model * dtype_size(d->vectors->dtype);
    const char *v = d->vectors->data;
    forget_pages(v, v + (size_t)row * width);
    if (d->line) forget_pages(d->rows.data, d->rows.data + d->line[row]);
}

int dataset_row(const Dataset *d, int64_t row, Json *json, Err *err) {
    if (!d->line) return fail(err, "%s: has no rows.jsonl, only vectors", d->path);
    return json_parse(json, d->rows.data + d->line[row], d->line[row + 1] - d->line[row], d->path, err);
}

void dataset_norms(const Dataset *d, Norms *out) {
    float *v = xmalloc((size_t)d->d_model * sizeof(float));
    double *norm = xcalloc((size_t)d->n + 1, sizeof *norm), sum = 0, squares = 0;
    Baseline base = {0};
    int64_t n = 0;
    *out = (Norms){0};
    for (int64_t i = 0; i < d->n; i++) {
        dataset_passed(d, i);
        dataset_vector(d, i, v);
        double length = vector_norm(v, d->d_model);
        out->zero += length == 0;
        out->not_finite += !isfinite(length);
        if (length > 0 && isfinite(length)) {
            norm[n++] = length;
            sum += length;
            baseline_add(&base, v, d->d_model);
        }
    }
    if (n > 0) {
        out->mean = sum / (double)n;
        for (int64_t i = 0; i < n; i++) squares += (norm[i] - out->mean) * (norm[i] - out->mean);
        qsort(norm, (size_t)n, sizeof *norm, by_value);
        out->deviation = sqrt(squares / (double)n);
        out->least = norm[0];
        out->low = norm[n / 100];
        out->median = norm[n / 2];
        out->high = norm[n - 1 - n / 100];
        out->most = norm[n - 1];
        out->var_nrm = baseline_var(&base, d->d_model);
    }
    baseline_free(&base);
    free(norm);
    free(v);
}
