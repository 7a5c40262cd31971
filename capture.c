/* capture.c - activations of texts: documents run through the target, several packed together, and the residual stream kept at
 * the wanted layers and positions. `nla capture` makes a dataset of any texts at once; `nla data extract` makes the rows that
 * training begins with, from a corpus of any size, and goes on where it was killed.
 *
 * What must stay true: a row depends on its document, the seed and the model alone, whatever else is in the corpus, the batch or
 * the shard; memory does not grow with the corpus, but for eight bytes a document (its id, to find repeats).
 */
#include "nla.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>

#include <stb/stb_ds.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

enum { PACKED_ROWS = 1024 }; /* tokens of short documents run together */

int parse_layers(const char *text, const Config *c, int **layers, Err *err) {
    if (!text) {
        arrput(*layers, 2 * c->n_layers / 3);
        return 0;
    }
    if (strcmp(text, "all") == 0) {
        for (int i = 0; i < c->n_layers; i++) {
            arrput(*layers, i);
        }
        return 0;
    }
    for (const char *p = text;;) {
        char *end;
        long k = strtol(p, &end, 10);
        if (end == p || (*end && *end != ',')) {
            return fail(err, "--layer takes a layer, several separated by commas, or all; not '%s'", text);
        }
        if (k < 0 || k >= c->n_layers) {
            return fail(err, "--layer %ld: the model has layers 0 to %d", k, c->n_layers - 1);
        }
        for (int i = 0; i < (int)arrlen(*layers); i++) {
            if ((*layers)[i] == k) {
                return fail(err, "--layer names layer %ld twice", k);
            }
        }
        arrput(*layers, (int)k);
        if (!*end) {
            return 0;
        }
        p = end + 1;
    }
}

/* A document that waits in the batch. */
typedef struct {
    char *id;
    int *ids;      /* stb: up to the last wanted position */
    int *position; /* stb: those wanted, ascending */
    int first;     /* its first row in the batch */
} Waiting;

typedef struct {
    const Loaded *l;
    const Settings *s;
    int *layer;             /* stb */
    DatasetWriter **writer; /* [layers] */
    int width, min_context;
    Forest forest;
    Batch batch;
    Waiting *waiting; /* stb */
    float **kept;     /* [layers]: stb, [rows wanted of the batch, width] */
    int64_t tokens, rows, short_documents, not_finite;
} Capture;

/* Keeps the wanted rows of the wanted layers' residual streams. */
static void keep_rows(void *context, Engine *e, const char *module, int layer, const Act *data, int first, int rows, int width) {
    (void)first;
    (void)rows;
    Capture *c = context;
    for (int i = 0; !*module && i < (int)arrlen(c->layer); i++) {
        for (int w = 0; c->layer[i] == layer && w < (int)arrlen(c->waiting); w++) {
            const Waiting *doc = &c->waiting[w];
            for (int p = 0; p < (int)arrlen(doc->position); p++) {
                size_t row = (size_t)(doc->first + doc->position[p]);
                e->read(e, arraddnptr(c->kept[i], (size_t)width), data, row * (size_t)width, (size_t)width);
            }
        }
    }
}

/* Positions of a document (stb, ascending) behind its first min_context tokens: all, the last, or N drawn without replacement by
 * a generator keyed on (seed, document) alone, so that the order of documents does not matter. Special tokens are never read. */
static int choose_positions(const Capture *c, const char *how, const char *id, const int *ids, int n, int **out, Err *err) {
    int *candidate = NULL;
    for (int i = c->min_context; i < n; i++) {
        if (!tokenizer_is_special(c->l->tok, ids[i])) {
            arrput(candidate, i);
        }
    }
    int count = (int)arrlen(candidate), wanted = count;
    if (strcmp(how, "last") == 0) {
        wanted = count > 0;
        for (int i = 0; i < wanted; i++) {
            candidate[0] = candidate[count - 1];
        }
    } else if (strcmp(how, "all") != 0) {
        char *end;
        long k = strtol(how, &end, 10);
        if (*end || end == how || k < 1 || k > 1000000) {
            arrfree(candidate);
            return fail(err, "--positions takes all, last or a number of positions a document, not '%s'", how);
        }
        wanted = k < count ? (int)k : count;
        uint64_t document = XXH3_64bits(id, strlen(id));
        for (int i = 0; i < wanted; i++) { /* Fisher-Yates, the first `wanted` places */
            int j = i + (int)(random_uniform((uint64_t)c->s->seed, document, (uint64_t)i, 0) * (count - i));
            int swap = candidate[i];
            candidate[i] = candidate[j];
            candidate[j] = swap;
        }
    }
    bool *chosen = xcalloc((size_t)n + 1, 1);
    for (int i = 0; i < wanted; i++) {
        chosen[candidate[i]] = true;
    }
    for (int i = 0; i < n; i++) {
        if (chosen[i]) {
            arrput(*out, i);
        }
    }
    free(chosen);
    arrfree(candidate);
    return 0;
}

static bool usable(const float *v, int d) {
    double norm = vector_norm(v, d);
    return norm > 0 && norm <= (double)3.4e38f;
}

/* A position's row at every layer; at none when one layer's vector cannot be used, so that the layers keep the same rows. */
static int append_row(Capture *c, const Waiting *doc, int position, size_t at, Err *err) {
    int status = 0, prefix = position + 1;
    for (int i = 0; i < (int)arrlen(c->layer); i++) {
        if (!usable(c->kept[i] + at * (size_t)c->width, c->width)) {
            c->not_finite++;
            return 0;
        }
    }
    size_t len;
    char *text = tokenizer_decode(c->l->tok, doc->ids, prefix, true, &len);
    uint64_t row = row_id_of(doc->id, prefix);
    for (int i = 0; i < (int)arrlen(c->layer) && status == 0; i++) {
        status = dataset_append(c->writer[i], c->kept[i] + at * (size_t)c->width, prefix, row, doc->id, text, len, NULL, err);
    }
    free(text);
    c->rows++;
    return status;
}

static void forget_waiting(Capture *c) {
    for (int w = 0; w < (int)arrlen(c->waiting); w++) {
        free(c->waiting[w].id);
        arrfree(c->waiting[w].ids);
        arrfree(c->waiting[w].position);
    }
    arrsetlen(c->waiting, 0);
}

/* Runs what waits (only blocks 0..K of the highest K, and no logits) and appends its rows. */
static int run_waiting(Capture *c, Err *err) {
    if (!arrlen(c->waiting)) {
        return 0;
    }
    Tap tap = {c, keep_rows};
    int status = 0;
    size_t at = 0;
    for (int i = 0; i < (int)arrlen(c->layer); i++) {
        arrsetlen(c->kept[i], 0);
    }
    forest_cut(&c->forest, 0);
    batch_clear(&c->batch);
    for (int w = 0; w < (int)arrlen(c->waiting) && status == 0; w++) {
        Waiting *doc = &c->waiting[w];
        int n = (int)arrlen(doc->ids), seg = forest_add(&c->forest, -1, n, err);
        status = seg < 0 ? -1 : 0;
        if (status == 0) {
            doc->first = (int)arrlen(c->batch.token);
            batch_add(&c->batch, &c->forest, seg, doc->ids, n, 0);
            c->tokens += n;
        }
    }
    status = status == 0 ? model_forward(&c->forest, &c->batch, NULL, &tap, err) : -1;
    for (int w = 0; w < (int)arrlen(c->waiting) && status == 0; w++) {
        const Waiting *doc = &c->waiting[w];
        for (int p = 0; p < (int)arrlen(doc->position) && status == 0; p++) {
            status = append_row(c, doc, doc->position[p], at++, err);
        }
    }
    forget_waiting(c);
    return status;
}

static int rows_waiting(const Capture *c) {
    int rows = 0;
    for (int w = 0; w < (int)arrlen(c->waiting); w++) {
        rows += ((int)arrlen(c->waiting[w].ids) + CACHE_ALIGN - 1) / CACHE_ALIGN * CACHE_ALIGN;
    }
    return rows;
}

/* A document joins those that wait; *ran: these had to be run first, to make room, so all documents before it are written. */
static int capture_document(Capture *c, const char *how, const Document *doc, bool *ran, Err *err) {
    int *ids = NULL, *position = NULL;
    int status = encode_prompt(c->l, c->s, doc->text, doc->len, &ids, err);
    int n = (int)arrlen(ids) < c->s->max_length ? (int)arrlen(ids) : c->s->max_length;
    status = status == 0 ? choose_positions(c, how, doc->id, ids, n, &position, err) : -1;
    *ran = false;
    if (status == 0 && arrlen(position)) {
        n = arrlast(position) + 1; /* nothing after the last wanted position matters */
        arrsetlen(ids, n);
        if (rows_waiting(c) + n > c->forest.cache_rows) {
            status = run_waiting(c, err);
            *ran = true;
        }
        arrput(c->waiting, ((Waiting){xstrdup(doc->id), ids, position, 0}));
        return status;
    }
    c->short_documents += status == 0;
    arrfree(ids);
    arrfree(position);
    return status;
}

static int capture_open(Capture *c, const Settings *s, const Loaded *l, int min_context, Err *err) {
    *c = (Capture){.l = l, .s = s, .width = l->model.config.hidden_size, .min_context = min_context};
    if (parse_layers(s->layers, &l->model.config, &c->layer, err) != 0) {
        return -1;
    }
    int highest = 0, layers = (int)arrlen(c->layer), room = s->max_length > PACKED_ROWS ? s->max_length : PACKED_ROWS;
    for (int i = 0; i < layers; i++) {
        highest = c->layer[i] > highest ? c->layer[i] : highest;
    }
    c->writer = xcalloc((size_t)layers, sizeof *c->writer);
    c->kept = xcalloc((size_t)layers, sizeof *c->kept);
    room = (room + CACHE_ALIGN - 1) / CACHE_ALIGN * CACHE_ALIGN;
    return forest_open(&c->forest, (Model *)&l->model, highest + 1, room, room, FORWARD, err);
}

static void capture_close(Capture *c) {
    for (int i = 0; i < (int)arrlen(c->layer); i++) {
        if (c->writer) {
            dataset_abandon(c->writer[i]);
            arrfree(c->kept[i]);
        }
    }
    forget_waiting(c);
    forest_close(&c->forest);
    batch_free(&c->batch);
    arrfree(c->waiting);
    arrfree(c->layer);
    free(c->writer);
    free(c->kept);
}

/* What a base dataset's sidecar says of where its rows come from. */
static Yaml *base_sidecar(const Capture *c, int layer, const char *positions, const char *by) {
    const Settings *s = c->s;
    Yaml *y = yaml_new(YAML_MAP);
    yaml_set(y, "kind", "nla_dataset", false);
    yaml_set(y, "schema_version", "1", false);
    yaml_set(y, "stage", "base", false);
    yaml_set(y, "row_count", "0", false);
    yaml_set(y, "extraction.base_model", s->model, true);
    if (s->weights) { /* int8, fp8: rounded ones gave these rows */
        yaml_set(y, "extraction.weights", s->weights, false);
    }
    yaml_set_number(y, "extraction.d_model", c->width);
    yaml_set_number(y, "extraction.layer_index", layer);
    yaml_set(y, "extraction.norm", "none", false);
    yaml_set(y, "extraction.corpus", s->in, true);
    yaml_set(y, "extraction.positions_per_doc", positions, false);
    yaml_set(y, "created_by", by, false);
    return y;
}

/* ------------------------------------------------------------------------------------------------ nla capture */

static int create_writers(Capture *c, Err *err) {
    const char *out = c->s->out;
    bool several = arrlen(c->layer) > 1;
    if (several && mkdir(out, 0777) != 0 && errno != EEXIST) {
        return fail(err, "%s: cannot make this directory: %s", out, strerror(errno));
    }
    for (int i = 0; i < (int)arrlen(c->layer); i++) {
        char *dir = several ? xprintf("%s/layer_%d", out, c->layer[i]) : xstrdup(out);
        c->writer[i] = dataset_create(dir, c->width, err);
        free(dir);
        if (!c->writer[i]) {
            return -1;
        }
    }
    return 0;
}

static int capture_corpus(Capture *c, Err *err) {
    const Settings *s = c->s;
    Corpus *corpus = corpus_open(s->in, err);
    Document doc;
    double start = now(), spoke = 0;
    int more = 0, status = corpus ? 0 : -1;
    bool ran;
    while (status == 0 && (more = corpus_next(corpus, &doc, err)) == 1) {
        status = capture_document(c, s->positions, &doc, &ran, err);
        progress(s, &spoke, start, (double)c->tokens, "tokens", corpus_fraction(corpus), false);
    }
    status = status == 0 && more == 0 ? run_waiting(c, err) : -1;
    if (status == 0) {
        progress(s, &spoke, start, (double)c->tokens, "tokens", 1, true);
    }
    corpus_close(corpus);
    return status;
}

static int finish_captured(Capture *c, int i, Err *err) {
    const Settings *s = c->s;
    char stamp[32];
    time_t t = time(NULL);
    struct tm utc;
    Yaml *sidecar = base_sidecar(c, c->layer[i], s->positions, "nla capture");
    strftime(stamp, sizeof stamp, "%Y-%m-%dT%H:%M:%SZ", gmtime_r(&t, &utc));
    yaml_set(sidecar, "created_at", stamp, true);
    int status = dataset_finish(c->writer[i], sidecar, err);
    c->writer[i] = NULL;
    if (status == 0 && s->json) {
        printf("{\"layer\": %d, \"rows\": %s, \"width\": %d}\n", c->layer[i], yaml_get(sidecar, "row_count")->text, c->width);
    }
    yaml_free(sidecar);
    return status;
}

int run_capture(const Settings *s, Err *err) {
    Loaded l;
    if (need(s->in, "in", s, err) != 0 || need(s->out, "out", s, err) != 0 || load_all(&l, s, true, err) != 0) {
        return -1;
    }
    Capture c;
    int status = capture_open(&c, s, &l, 0, err);
    status = status == 0 ? create_writers(&c, err) : -1;
    status = status == 0 ? capture_corpus(&c, err) : -1;
    for (int i = 0; i < (int)arrlen(c.layer) && status == 0; i++) {
        status = finish_captured(&c, i, err);
    }
    if (status == 0 && c.not_finite > 0) {
        note(s, "%lld rows left out: their activations are not finite\n", (long long)c.not_finite);
    }
    capture_close(&c);
    unload(&l);
    return status;
}

/* ------------------------------------------------------------------------------------------------ nla data extract
 * It works in OUT.partial: data/ is to become OUT, columns_K stand beside until then, state.json says how far all of it is whole,
 * `lock` keeps a second run out. State is written every --save-every seconds, after what it speaks of; a run that goes on cuts the files
 * back to it. */

typedef struct {
    Capture c;
    char *part, *settings; /* OUT.partial; what the rows depend on, in words */
    int lock;
    bool mine;             /* the lock is held: what is in OUT.partial is this run's */
    int64_t from, to;      /* documents of the corpus */
    int64_t next;          /* documents before this one are written */
    int64_t repeated, text_bytes;
    struct {
        uint64_t key;
        char value;
    } *seen; /* stb map: hashes of the ids so far */
} Extract;

/* "30000" (the first ones) or "A:B" (those from A on, before B), counted from 0. */
static int parse_documents(const char *text, int64_t *from, int64_t *to, Err *err) {
    char *end;
    *from = 0;
    *to = INT64_MAX;
    if (!text) {
        return 0;
    }
    const char *colon = strchr(text, ':');
    long long a = strtoll(text, &end, 10), b = a;
    bool good = colon ? end == colon : end != text && !*end;
    if (colon && colon[1]) {
        b = strtoll(colon + 1, &end, 10);
        good = good && end != colon + 1 && !*end;
    } else if (colon) {
        b = INT64_MAX;
    }
    *from = colon ? a : 0;
    *to = b;
    if (!good || *from < 0 || *to <= *from) {
        return fail(err, "--documents takes a number of documents, or a range A:B counted from 0, not '%s'", text);
    }
    return 0;
}

static char *settings_in_words(const Extract *x) {
    const Settings *s = x->c.s;
    char *layers = xstrdup("");
    for (int i = 0; i < (int)arrlen(x->c.layer); i++) {
        char *more = xprintf("%s%s%d", layers, i ? "," : "", x->c.layer[i]);
        free(layers);
        layers = more;
    }
    char *words = xprintf("model %s, corpus %s, layer %s, %d positions a document after %d tokens, length %d, seed %lld%s%s%s%s%s", s->model, s->in,
                          layers, s->positions_per_doc, x->c.min_context, s->max_length, (long long)s->seed, s->bf16 ? ", bf16" : "",
                          s->weights ? ", weights " : "", s->weights ? s->weights : "", s->documents ? ", documents " : "", s->documents ? s->documents : "");
    free(layers);
    return words;
}

static int save_state(Extract *x, Err *err) {
    int status = 0;
    for (int i = 0; i < (int)arrlen(x->c.layer) && status == 0; i++) {
        status = dataset_sync(x->c.writer[i], &x->text_bytes, err);
    }
    if (status != 0) {
        return -1;
    }
    char *text = NULL;
    size_t len;
    FILE *out = open_memstream(&text, &len);
    fputs("{\"settings\": ", out);
    json_write_string(out, x->settings, strlen(x->settings));
    fprintf(out, ", \"next\": %lld, \"rows\": %lld, \"text_bytes\": %lld, \"tokens\": %lld, \"short_documents\": %lld, \"not_finite\": %lld",
            (long long)x->next, (long long)x->c.rows, (long long)x->text_bytes, (long long)x->c.tokens, (long long)x->c.short_documents,
            (long long)x->c.not_finite);
    fputs("}\n", out);
    fclose(out);
    char *path = xprintf("%s/state.json", x->part);
    status = file_write(path, text, len, err);
    free(path);
    free(text);
    return status;
}

/* 1: there is a state to go on from, 0: there is none, -1. */
static int load_state(Extract *x, Err *err) {
    char *path = xprintf("%s/state.json", x->part);
    File file;
    Json json = {0};
    int status = 0;
    if (access(path, F_OK) == 0) {
        status = file_map(&file, path, err);
        if (status == 0) {
            status = json_parse(&json, file.data, file.len, path, err);
            char *settings = status == 0 ? json_string(&json, json_get(&json, 0, "settings"), NULL) : NULL;
            bool whole = settings && json_int(&json, json_get(&json, 0, "next"), &x->next) &&
                         json_int(&json, json_get(&json, 0, "rows"), &x->c.rows) &&
                         json_int(&json, json_get(&json, 0, "text_bytes"), &x->text_bytes) &&
                         json_int(&json, json_get(&json, 0, "tokens"), &x->c.tokens) &&
                         json_int(&json, json_get(&json, 0, "short_documents"), &x->c.short_documents) &&
                         json_int(&json, json_get(&json, 0, "not_finite"), &x->c.not_finite);
            if (status == 0 && (!whole || x->next < 0 || x->c.rows < 0 || x->text_bytes < 0)) {
                status = fail(err, "%s: damaged; remove %s and begin again", path, x->part);
            } else if (status == 0 && strcmp(settings, x->settings) != 0) {
                status = fail(err, "%s: begun with %s; now: %s. Remove it or use those settings", x->part, settings, x->settings);
            }
            free(settings);
            json_free(&json);
            file_unmap(&file);
        }
        status = status == 0 ? 1 : -1;
    }
    free(path);
    return status;
}

/* OUT.partial, locked: new, or with --resume the one that is there. */
static int open_part(Extract *x, Err *err) {
    const Settings *s = x->c.s;
    struct stat st;
    char *data = xprintf("%s/data", x->part);
    bool published = access(data, F_OK) != 0; /* a kill after the renaming leaves the rest of OUT.partial */
    free(data);
    if (stat(s->out, &st) == 0 && (!S_ISDIR(st.st_mode) || rmdir(s->out) != 0)) { /* an empty directory may be replaced */
        if (published) {
            remove_tree(x->part);
        }
        return fail(err, "%s: exists; remove it or name another directory", s->out);
    }
    bool there = mkdir(x->part, 0777) != 0;
    if (there && errno != EEXIST) {
        return fail(err, "%s: cannot make this directory: %s", x->part, strerror(errno));
    }
    char *path = xprintf("%s/lock", x->part);
    x->lock = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    int status = x->lock >= 0 ? 0 : fail(err, "%s: cannot write: %s", path, strerror(errno));
    free(path);
    if (status == 0 && flock(x->lock, LOCK_EX | LOCK_NB) != 0) {
        return fail(err, "%s: another run is writing to it now", x->part);
    }
    x->mine = status == 0;
    int state = status == 0 && !published ? load_state(x, err) : status;
    if (state == 1 && !s->resume) {
        return fail(err, "%s: holds an unfinished run (%lld rows); go on with --resume, or remove it", x->part, (long long)x->c.rows);
    }
    return state < 0 ? -1 : 0;
}

static int continue_writers(Extract *x, Err *err) {
    Capture *c = &x->c;
    bool several = arrlen(c->layer) > 1;
    char *data = xprintf("%s/data", x->part);
    int status = several && mkdir(data, 0777) != 0 && errno != EEXIST ? fail(err, "%s: cannot make this directory: %s", data, strerror(errno)) : 0;
    for (int i = 0; i < (int)arrlen(c->layer) && status == 0; i++) {
        char *dir = several ? xprintf("%s/layer_%d", data, c->layer[i]) : xstrdup(data);
        char *columns = xprintf("%s/columns_%d", x->part, c->layer[i]);
        c->writer[i] = dataset_continue(dir, columns, c->width, c->rows, x->text_bytes, err);
        status = c->writer[i] ? 0 : -1;
        free(columns);
        free(dir);
    }
    free(data);
    return status;
}

/* Counts the documents and says what the rows may take on the disk; needs a corpus that can be read twice. */
static int say_need(Extract *x, int64_t *documents, Err *err) {
    const Settings *s = x->c.s;
    Corpus *corpus = corpus_open(s->in, err);
    Document doc;
    int64_t n = 0, taken = 0;
    double bytes = 0;
    int more = corpus ? 1 : -1;
    while (more == 1 && n < x->to && (more = corpus_next(corpus, &doc, err)) == 1) {
        double at_most = 8.0 * s->max_length; /* no prefix is longer than its tokens are, some 8 bytes at most in prose */
        bytes += n >= x->from ? ((double)doc.len < at_most ? (double)doc.len : at_most) : 0;
        taken += n >= x->from;
        n++;
    }
    corpus_close(corpus);
    if (more < 0) {
        return -1;
    }
    if (taken == 0) {
        return fail(err, "%s: no document%s%s", s->in, s->documents ? " in the range " : "", s->documents ? s->documents : "");
    }
    double rows = (double)taken * s->positions_per_doc * (double)arrlen(x->c.layer);
    double wanted = rows * (4.0 * x->c.width + 16) + bytes / 2 * s->positions_per_doc * (double)arrlen(x->c.layer);
    struct statvfs disk;
    double free_bytes = statvfs(x->part, &disk) == 0 ? (double)disk.f_bavail * (double)disk.f_frsize : 0;
    note(s, "%lld documents: at most %.0f rows, some %.2f GB on the disk, where %.1f GB are free%s\n", (long long)taken, rows, wanted / 1e9,
         free_bytes / 1e9, wanted > free_bytes ? " - they may not fit; take fewer --documents" : "");
    *documents = n;
    return 0;
}

/* True when a document of that id has been before. */
static bool seen_before(Extract *x, const char *id) {
    uint64_t hash = map_key(XXH3_64bits(id, strlen(id)));
    if (hmgeti(x->seen, hash) >= 0) {
        return true;
    }
    hmput(x->seen, hash, 1);
    return false;
}

static int extract_corpus(Extract *x, int64_t documents, Err *err) {
    const Settings *s = x->c.s;
    Corpus *corpus = corpus_open(s->in, err);
    Document doc;
    char *how = xprintf("%d", s->positions_per_doc);
    double start = now(), spoke = 0, saved = start;
    int64_t begun = x->c.tokens, first = x->next > x->from ? x->next : x->from, at = 0;
    int more = corpus ? 1 : -1, status = more == 1 ? 0 : -1;
    while (status == 0 && at < x->to && (more = corpus_next(corpus, &doc, err)) == 1) {
        bool ran = false, repeated = seen_before(x, doc.id);
        x->repeated += repeated && at >= x->from;
        if (at >= x->from && at >= x->next && !repeated) {
            status = capture_document(&x->c, how, &doc, &ran, err);
        }
        if (status == 0 && ran && now() - saved >= s->save_every) {
            x->next = at;
            status = save_state(x, err);
            saved = now();
        }
        at++;
        double part = documents > first && at > first ? (double)(at - first) / (double)(documents - first) : -1;
        progress(s, &spoke, start, (double)(x->c.tokens - begun), "tokens", part, false);
    }
    status = status == 0 && more >= 0 ? run_waiting(&x->c, err) : -1;
    x->next = at;
    status = status == 0 ? save_state(x, err) : -1;
    if (status == 0) {
        progress(s, &spoke, start, (double)(x->c.tokens - begun), "tokens", 1, true);
    }
    corpus_close(corpus);
    free(how);
    return status;
}

/* The layer's rows as a dataset in data/, still under OUT.partial, its norms in its sidecar. */
static int finish_layer(Extract *x, int i, Err *err) {
    Capture *c = &x->c;
    const Settings *s = c->s;
    char *positions = xprintf("%d", s->positions_per_doc), *slice = xprintf("%lld:%lld", (long long)x->from, (long long)x->next);
    char *seed = xprintf("%lld", (long long)s->seed);
    char *dir = arrlen(c->layer) > 1 ? xprintf("%s/data/layer_%d", x->part, c->layer[i]) : xprintf("%s/data", x->part);
    Yaml *sidecar = base_sidecar(c, c->layer[i], positions, "nla data extract");
    yaml_set(sidecar, "extraction.corpus_slice", slice, true);
    yaml_set_number(sidecar, "extraction.min_context", c->min_context);
    yaml_set_number(sidecar, "extraction.max_length", s->max_length);
    yaml_set(sidecar, "extraction.seed", seed, false);
    yaml_set_number(sidecar, "extraction.documents_too_short", (double)c->short_documents);
    yaml_set_number(sidecar, "extraction.documents_repeated", (double)x->repeated);
    yaml_set_number(sidecar, "extraction.rows_not_finite", (double)c->not_finite);
    int status = dataset_finish(c->writer[i], sidecar, err);
    c->writer[i] = NULL;
    if (status == 0) {
        dataset_tell(s, dir, sidecar);
    }
    yaml_free(sidecar);
    free(dir);
    free(seed);
    free(slice);
    free(positions);
    return status;
}

/* data/ becomes OUT at once, whatever the number of layers; then what stood beside it goes. */
static int publish(const Extract *x, Err *err) {
    char *data = xprintf("%s/data", x->part);
    int status = rename(data, x->c.s->out) == 0 ? file_sync_dir(x->c.s->out, err)
                                                : fail(err, "%s: cannot rename %s to it: %s", x->c.s->out, data, strerror(errno));
    free(data);
    for (int i = -2; status == 0 && i < (int)arrlen(x->c.layer); i++) {
        char *path = i < 0 ? xprintf("%s/%s", x->part, i == -2 ? "state.json" : "lock") : xprintf("%s/columns_%d", x->part, x->c.layer[i]);
        unlink(path);
        free(path);
    }
    if (status == 0) {
        rmdir(x->part);
    }
    return status;
}

static int extract(Extract *x, Err *err) {
    const Settings *s = x->c.s;
    int64_t documents = 0;
    if (parse_documents(s->documents, &x->from, &x->to, err) != 0) {
        return -1;
    }
    x->part = path_beside(s->out, ".partial");
    x->settings = settings_in_words(x);
    if (open_part(x, err) != 0 || (strcmp(s->in, "-") != 0 && say_need(x, &documents, err) != 0) || continue_writers(x, err) != 0 ||
        extract_corpus(x, documents, err) != 0) {
        return -1;
    }
    note(s, "%lld rows of %lld documents; %lld too short (no token behind the first %d), %lld with an id that came before, %lld rows not finite\n",
         (long long)x->c.rows, (long long)(x->next - x->from), (long long)x->c.short_documents, x->c.min_context, (long long)x->repeated,
         (long long)x->c.not_finite);
    if (x->c.rows == 0) {
        return fail(err, "%s: no row: every document has at most %d tokens, or none but special ones", s->in, x->c.min_context);
    }
    for (int i = 0; i < (int)arrlen(x->c.layer); i++) {
        if (finish_layer(x, i, err) != 0) {
            return -1;
        }
    }
    return publish(x, err);
}

int run_data_extract(const Settings *s, Err *err) {
    Loaded l;
    if (need(s->in, "in", s, err) != 0 || need(s->out, "out", s, err) != 0 || load_all(&l, s, true, err) != 0) {
        return -1;
    }
    Extract x = {.lock = -1};
    int status = capture_open(&x.c, s, &l, s->min_context, err);
    status = status == 0 ? extract(&x, err) : -1;
    capture_close(&x.c);
    if (status != 0 && x.mine && x.c.rows == 0) {
        remove_tree(x.part); /* nothing to go on from */
    }
    hmfree(x.seen);
    free(x.part);
    free(x.settings);
    if (x.lock >= 0) {
        close(x.lock);
    }
    unload(&l);
    return status;
}
