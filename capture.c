/* capture.c - activations of texts: documents run through the target packed together, the residual stream kept at the wanted
 * layers and positions, as dataset directories.
 */
#include "nla.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <stb/stb_ds.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

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

typedef struct {
    int *layer;             /* stb */
    DatasetWriter **writer; /* [layers] */
    int width;
    /* of the document in the batch */
    int *position; /* stb: rows wanted, ascending */
    float **kept;  /* [layers]: stb, [positions, width] */
} Capture;

/* Keeps the wanted rows of the wanted layers' residual streams. */
static void keep_rows(void *context, Engine *e, const char *module, int layer, const Act *data, int first, int rows, int width) {
    (void)first;
    (void)rows;
    Capture *c = context;
    for (int i = 0; !*module && i < (int)arrlen(c->layer); i++) {
        for (int p = 0; c->layer[i] == layer && p < (int)arrlen(c->position); p++) {
            e->read(e, arraddnptr(c->kept[i], (size_t)width), data, (size_t)c->position[p] * (size_t)width, (size_t)width);
        }
    }
}

/* Which positions of a document: all, the last, or N drawn without replacement by a generator keyed on (seed, document)
 * alone, so that the order of documents does not matter. Special tokens are never read. */
static int choose_positions(const Loaded *l, const Settings *s, const char *id, const int *ids, int n, int **out, Err *err) {
    const char *how = s->positions;
    int *candidate = NULL;
    for (int i = 0; i < n; i++) {
        if (!tokenizer_is_special(l->tok, ids[i])) {
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
            int j = i + (int)(random_uniform((uint64_t)s->seed, document, (uint64_t)i, 0) * (count - i));
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

static int append_rows(Capture *c, const Loaded *l, const char *id, const int *ids, Err *err) {
    int status = 0;
    for (int p = 0; p < (int)arrlen(c->position) && status == 0; p++) {
        int prefix = c->position[p] + 1;
        size_t len;
        char *text = tokenizer_decode(l->tok, ids, prefix, true, &len);
        uint64_t row = XXH3_64bits_withSeed(id, strlen(id), (uint64_t)prefix);
        for (int i = 0; i < (int)arrlen(c->layer) && status == 0; i++) {
            status = dataset_append(c->writer[i], c->kept[i] + (size_t)p * (size_t)c->width, prefix, row, id, text, len, err);
        }
        free(text);
    }
    return status;
}

/* One document: only blocks 0..K of the highest K run, and no logits. */
static int capture_document(Capture *c, const Loaded *l, const Settings *s, Forest *f, Batch *b, const Document *doc,
                            int64_t *tokens, Err *err) {
    int *ids = NULL;
    Tap tap = {c, keep_rows};
    int status = encode_prompt(l, s, doc->text, doc->len, &ids, err);
    int n = (int)arrlen(ids) < s->max_length ? (int)arrlen(ids) : s->max_length;
    arrsetlen(c->position, 0);
    for (int i = 0; i < (int)arrlen(c->layer); i++) {
        arrsetlen(c->kept[i], 0);
    }
    if (status == 0 && n > 0) {
        status = choose_positions(l, s, doc->id, ids, n, &c->position, err);
    }
    if (status == 0 && arrlen(c->position)) {
        n = arrlast(c->position) + 1; /* nothing after the last wanted position matters */
        forest_cut(f, 0);
        int seg = forest_add(f, -1, n, err);
        status = seg < 0 ? -1 : feed(f, b, seg, ids, n, &tap, err);
        *tokens += n;
    }
    if (status == 0) {
        status = append_rows(c, l, doc->id, ids, err);
    }
    arrfree(ids);
    return status;
}

static Yaml *capture_sidecar(const Settings *s, const Model *m, int layer) {
    Yaml *y = yaml_new(YAML_MAP);
    char *number = xprintf("%d", layer), *width = xprintf("%d", m->config.hidden_size), stamp[32];
    time_t t = time(NULL);
    struct tm utc;
    strftime(stamp, sizeof stamp, "%Y-%m-%dT%H:%M:%SZ", gmtime_r(&t, &utc));
    char *id = xprintf("%s-L%d", s->out, layer);
    yaml_set(y, "kind", "nla_dataset", false);
    yaml_set(y, "schema_version", "1", false);
    yaml_set(y, "dataset_id", id, true);
    yaml_set(y, "stage", "base", false);
    yaml_set(y, "row_count", "0", false);
    yaml_set(y, "extraction.base_model", s->model, true);
    yaml_set(y, "extraction.d_model", width, false);
    yaml_set(y, "extraction.layer_index", number, false);
    yaml_set(y, "extraction.norm", "none", false);
    yaml_set(y, "extraction.corpus", s->in, true);
    yaml_set(y, "extraction.positions_per_doc", s->positions, false);
    yaml_set(y, "created_at", stamp, true);
    yaml_set(y, "created_by", "nla capture", false);
    free(number);
    free(width);
    free(id);
    return y;
}

static int capture_open(Capture *c, const Settings *s, Err *err) {
    bool several = arrlen(c->layer) > 1;
    if (several && mkdir(s->out, 0777) != 0 && errno != EEXIST) {
        return fail(err, "%s: cannot make this directory: %s", s->out, strerror(errno));
    }
    for (int i = 0; i < (int)arrlen(c->layer); i++) {
        char *dir = several ? xprintf("%s/layer_%d", s->out, c->layer[i]) : xstrdup(s->out);
        c->writer[i] = dataset_create(dir, c->width, err);
        free(dir);
        if (!c->writer[i]) {
            return -1;
        }
    }
    return 0;
}

static int capture_corpus(Capture *c, const Loaded *l, const Settings *s, Err *err) {
    Corpus *corpus = corpus_open(s->in, err);
    Forest f = {0};
    Batch b = {0};
    Document doc;
    int highest = 0, status = corpus ? 0 : -1;
    for (int i = 0; i < (int)arrlen(c->layer); i++) {
        highest = c->layer[i] > highest ? c->layer[i] : highest;
    }
    if (status == 0) {
        status = forest_open(&f, (Model *)&l->model, highest + 1, s->max_length, s->max_length, FORWARD, err);
    }
    int64_t tokens = 0;
    double start = now(), spoke = 0;
    int more = 0;
    while (status == 0 && (more = corpus_next(corpus, &doc, err)) == 1) {
        status = capture_document(c, l, s, &f, &b, &doc, &tokens, err);
        progress(s, &spoke, start, (double)tokens, "tokens", corpus_fraction(corpus), false);
    }
    if (status == 0 && more == 0) {
        progress(s, &spoke, start, (double)tokens, "tokens", 1, true);
    }
    forest_close(&f);
    batch_free(&b);
    if (corpus) {
        corpus_close(corpus);
    }
    return status == 0 && more == 0 ? 0 : -1;
}

int run_capture(const Settings *s, Err *err) {
    Loaded l;
    if (need(s->in, "in", s, err) != 0 || need(s->out, "out", s, err) != 0 || load_all(&l, s, true, err) != 0) {
        return -1;
    }
    Capture c = {.width = l.model.config.hidden_size};
    int status = parse_layers(s->layers, &l.model.config, &c.layer, err);
    int n = (int)arrlen(c.layer);
    c.writer = xcalloc((size_t)n + 1, sizeof *c.writer);
    c.kept = xcalloc((size_t)n + 1, sizeof *c.kept);
    if (status == 0) {
        status = capture_open(&c, s, err);
    }
    if (status == 0) {
        status = capture_corpus(&c, &l, s, err);
    }
    for (int i = 0; i < n; i++) {
        if (status == 0) {
            Yaml *sidecar = capture_sidecar(s, &l.model, c.layer[i]);
            status = dataset_finish(c.writer[i], sidecar, err);
            if (status == 0 && s->json) {
                printf("{\"layer\": %d, \"rows\": %s, \"width\": %d}\n", c.layer[i], yaml_get(sidecar, "row_count")->text, c.width);
            }
            yaml_free(sidecar);
        } else if (c.writer[i]) {
            dataset_abandon(c.writer[i]);
        }
        arrfree(c.kept[i]);
    }
    arrfree(c.layer);
    arrfree(c.position);
    free(c.writer);
    free(c.kept);
    unload(&l);
    return status;
}
