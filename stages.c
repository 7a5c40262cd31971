/* stages.c - from activations to training rows: `nla data merge|split|permute|stats|build`. Each reads dataset directories and
 * writes new ones; none changes what it reads. (extract is in capture.c, explain in writers.c.)
 *
 * What must stay true: the same input and seed give the same bytes; rows stream through, so memory does not grow with their number
 * but for a few words a row where the whole set must be known (a permutation, a search for repeats).
 */
#define _GNU_SOURCE /* open_memstream */
#include "nla.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <stb/stb_ds.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

/* ------------------------------------------------------------------------------------------------ rows */

int row_open(Row *r, const Dataset *d, int64_t row, Err *err) {
    Json json;
    *r = (Row){0};
    if (dataset_row(d, row, &json, err) != 0) {
        return -1;
    }
    r->doc_id = json_string(&json, json_get(&json, 0, "doc_id"), NULL);
    r->text = json_string(&json, json_get(&json, 0, "text"), &r->text_len);
    r->explanation = json_string(&json, json_get(&json, 0, "explanation"), NULL);
    bool counted = d->n_raw_tokens != NULL || json_int(&json, json_get(&json, 0, "n_raw_tokens"), &r->n_raw_tokens);
    json_free(&json);
    if (!r->doc_id || !r->text || !counted) {
        fail(err, "%s: row %lld of rows.jsonl lacks %s", d->path, (long long)row,
             !r->doc_id ? "doc_id" : !r->text ? "text" : "n_raw_tokens");
        row_close(r);
        return -1;
    }
    r->n_raw_tokens = d->n_raw_tokens ? d->n_raw_tokens[row] : r->n_raw_tokens;
    r->id = d->row_id ? d->row_id[row] : row_id_of(r->doc_id, r->n_raw_tokens);
    r->prefix = XXH3_64bits(r->text, r->text_len);
    return 0;
}

void row_close(Row *r) {
    free(r->doc_id);
    free(r->text);
    free(r->explanation);
    *r = (Row){0};
}

static int append(DatasetWriter *w, const Row *r, const float *v, const char *explanation, Err *err) {
    return dataset_append(w, v, r->n_raw_tokens, r->id, r->doc_id, r->text, r->text_len, explanation, err);
}

/* Every row, in order, to the writer that writer_of names for it; with the vector of row from[i] instead of its own when `from` is given. */
static int copy_rows(const Dataset *d, DatasetWriter *(*writer_of)(void *context, const Row *row), void *context, const int64_t *from,
                     Err *err) {
    float *v = xmalloc((size_t)d->d_model * sizeof(float));
    int status = 0;
    for (int64_t i = 0; i < d->n && status == 0; i++) {
        Row row;
        if (!from) {
            dataset_passed(d, i);
        }
        dataset_vector(d, from ? from[i] : i, v);
        status = row_open(&row, d, i, err);
        if (status == 0) {
            status = append(writer_of(context, &row), &row, v, row.explanation, err);
            row_close(&row);
        }
    }
    free(v);
    return status;
}

static DatasetWriter *one_writer(void *context, const Row *row) {
    (void)row;
    return context;
}

int rows_open(Dataset *d, const char *path, Err *err) {
    if (dataset_open(d, path, err) != 0) {
        return -1;
    }
    if (!d->line || !d->has_meta) {
        dataset_close(d);
        return fail(err, "%s: a dataset directory is needed (rows.jsonl, nla_meta.yaml), not vectors alone", path);
    }
    if (d->n == 0) {
        dataset_close(d);
        return fail(err, "%s: holds no rows", path);
    }
    return 0;
}

/* ------------------------------------------------------------------------------------------------ what a sidecar says */

static double number_at(const Yaml *y, const char *key) {
    double value;
    return yaml_double(yaml_get(y, key), &value) ? value : NAN;
}

static const char *text_at(const Yaml *y, const char *key) {
    const Yaml *node = yaml_get(y, key);
    return node && node->kind == YAML_SCALAR && node->text ? node->text : "";
}

void dataset_tell(const Settings *s, const char *dir, const Yaml *sidecar) {
    double rows = number_at(sidecar, "row_count");
    char *path = xprintf("%s/activations.safetensors", dir);
    struct stat st;
    double bytes = stat(path, &st) == 0 ? (double)st.st_size : 0;
    free(path);
    path = xprintf("%s/rows.jsonl", dir);
    bytes += stat(path, &st) == 0 ? (double)st.st_size : 0;
    free(path);
    if (s->json) {
        printf("{\"dataset\": ");
        json_write_string(stdout, text_at(sidecar, "dataset_id"), strlen(text_at(sidecar, "dataset_id")));
        json_number(stdout, "rows", rows);
        json_number(stdout, "bytes", bytes);
        json_number(stdout, "layer", number_at(sidecar, "extraction.layer_index"));
        json_number(stdout, "norm_mean", number_at(sidecar, "extraction.norms.mean"));
        json_number(stdout, "norm_median", number_at(sidecar, "extraction.norms.median"));
        json_number(stdout, "var_nrm", number_at(sidecar, "extraction.var_nrm"));
        json_number(stdout, "suggested_injection_scale", number_at(sidecar, "extraction.suggested_injection_scale"));
        puts("}");
        return;
    }
    printf("%s: %.0f rows, %.3f GB\n", text_at(sidecar, "dataset_id"), rows, bytes / 1e9);
    printf("  norm: mean %.4g, deviation %.3g; least %.4g, 1%% %.4g, median %.4g, 99%% %.4g, most %.4g\n",
           number_at(sidecar, "extraction.norms.mean"), number_at(sidecar, "extraction.norms.deviation"), number_at(sidecar, "extraction.norms.least"),
           number_at(sidecar, "extraction.norms.percent_1"), number_at(sidecar, "extraction.norms.median"),
           number_at(sidecar, "extraction.norms.percent_99"), number_at(sidecar, "extraction.norms.most"));
    printf("  var_nrm %.4f (of these rows); suggested injection_scale %g\n", number_at(sidecar, "extraction.var_nrm"),
           number_at(sidecar, "extraction.suggested_injection_scale"));
}

/* ------------------------------------------------------------------------------------------------ a dataset made from others */

/* The parent's sidecar with another stage, naming its parent; yaml_free is the caller's. */
static Yaml *child_sidecar(const Dataset *parent, const char *stage, const char *by, Err *err) {
    Yaml *y = yaml_load(parent->meta.path, err);
    if (y) {
        char *id = xstrdup(text_at(y, "dataset_id"));
        yaml_set(y, "parent_datasets", id, true);
        yaml_set(y, "stage", stage, false);
        yaml_set(y, "created_by", by, false);
        free(id);
    }
    return y;
}

/* ------------------------------------------------------------------------------------------------ nla data merge */

static int slice_of(const Yaml *y, const char *path, int64_t *from, int64_t *to, Err *err) {
    long long a, b;
    if (sscanf(text_at(y, "extraction.corpus_slice"), "%lld:%lld", &a, &b) != 2) {
        return fail(err, "%s: its sidecar has no extraction.corpus_slice; merge takes what nla data extract wrote", path);
    }
    *from = a;
    *to = b;
    return 0;
}

/* What shards must share. */
static int same_settings(const Yaml *a, const Yaml *b, const char *path, Err *err) {
    static const char *const keys[] = {"stage", "extraction.base_model", "extraction.weights", "extraction.d_model", "extraction.layer_index",
                                       "extraction.corpus", "extraction.positions_per_doc", "extraction.min_context",
                                       "extraction.max_length", "extraction.seed"};
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
        if (strcmp(text_at(a, keys[i]), text_at(b, keys[i])) != 0) {
            return fail(err, "%s: %s is '%s', in the first shard '%s'", path, keys[i], text_at(b, keys[i]), text_at(a, keys[i]));
        }
    }
    return 0;
}

static int merge(const Settings *s, const char *out, Yaml **sidecar, Err *err) {
    static const char *const sums[] = {"extraction.documents_too_short", "extraction.documents_repeated", "extraction.rows_not_finite"};
    DatasetWriter *w = NULL;
    double sum[3] = {0};
    int64_t begin = 0, reached = 0;
    int status = 0;
    for (int i = 0; i < (int)arrlen(s->argument) && status == 0; i++) {
        Dataset d;
        int64_t from = 0, to = 0;
        if (rows_open(&d, s->argument[i], err) != 0) {
            status = -1;
            break;
        }
        status = slice_of(d.meta.yaml, s->argument[i], &from, &to, err);
        if (status == 0 && i == 0) {
            begin = from;
            *sidecar = yaml_load(d.meta.path, err);
            w = *sidecar ? dataset_create(out, d.d_model, err) : NULL;
            status = w ? 0 : -1;
        } else if (status == 0 && (status = same_settings(*sidecar, d.meta.yaml, s->argument[i], err)) == 0 && from != reached) {
            status = fail(err, "%s: begins at document %lld, the shard before it ended at %lld; name the shards in order", s->argument[i],
                          (long long)from, (long long)reached);
        }
        if (status == 0) {
            reached = to;
            for (int k = 0; k < 3; k++) {
                sum[k] += number_at(d.meta.yaml, sums[k]);
            }
            status = copy_rows(&d, one_writer, w, NULL, err);
        }
        dataset_close(&d);
    }
    if (status != 0) {
        dataset_abandon(w);
        return -1;
    }
    char *slice = xprintf("%lld:%lld", (long long)begin, (long long)reached);
    yaml_set(*sidecar, "extraction.corpus_slice", slice, true);
    free(slice);
    for (int k = 0; k < 3; k++) {
        yaml_set_number(*sidecar, sums[k], sum[k]);
    }
    return dataset_finish(w, *sidecar, err);
}

int run_data_merge(const Settings *s, Err *err) {
    Yaml *sidecar = NULL;
    int status = need(s->out, "out", s, err) == 0 ? merge(s, s->out, &sidecar, err) : -1;
    if (status == 0) {
        dataset_tell(s, s->out, sidecar);
    }
    yaml_free(sidecar);
    return status;
}

/* ------------------------------------------------------------------------------------------------ nla data split */

typedef struct {
    char *name;
    double share; /* upper end of its part of [0,1) */
    DatasetWriter *writer;
} Part;

/* "av_sft:25,ar_sft:25,rl:50,held:4": names and weights. */
static int parse_parts(const char *text, Part **parts, Err *err) {
    double sum = 0;
    for (const char *p = text; *p;) {
        size_t name = strspn(p, "abcdefghijklmnopqrstuvwxyz0123456789_-");
        char *end = NULL;
        double weight = name && p[name] == ':' ? strtod(p + name + 1, &end) : -1;
        if (!end || end == p + name + 1 || !(weight > 0 && weight < 1e9) || (*end && *end != ',')) {
            return fail(err, "--parts takes names and weights, such as av_sft:25,ar_sft:25,rl:50,held:4, not '%s'", text);
        }
        char *own = xstrndup(p, name);
        for (int i = 0; i < (int)arrlen(*parts); i++) {
            if (strcmp((*parts)[i].name, own) == 0) {
                free(own);
                return fail(err, "--parts names '%s' twice", (*parts)[i].name);
            }
        }
        sum += weight;
        arrput(*parts, ((Part){own, sum, NULL}));
        p = *end ? end + 1 : end;
    }
    if (!arrlen(*parts)) {
        return fail(err, "--parts is empty");
    }
    for (int i = 0; i < (int)arrlen(*parts); i++) {
        (*parts)[i].share /= sum;
    }
    return 0;
}

/* By the document's id and the seed alone: no document is in two parts, whatever else is there. */
static Part *part_of(Part *parts, const char *doc_id, uint64_t seed) {
    double u = random_uniform(seed, XXH3_64bits(doc_id, strlen(doc_id)), 0, 0);
    int i = 0;
    while (i + 1 < (int)arrlen(parts) && u >= parts[i].share) {
        i++;
    }
    return &parts[i];
}

typedef struct {
    Part *parts;
    uint64_t seed;
} Splitting;

static DatasetWriter *parts_writer(void *context, const Row *row) {
    const Splitting *x = context;
    return part_of(x->parts, row->doc_id, x->seed)->writer;
}

static int split(const Settings *s, const Dataset *d, Part *parts, const char *out, Err *err) {
    int status = 0;
    for (int i = 0; i < (int)arrlen(parts) && status == 0; i++) {
        char *dir = xprintf("%s/%s", out, parts[i].name);
        parts[i].writer = dataset_create(dir, d->d_model, err);
        status = parts[i].writer ? 0 : -1;
        free(dir);
    }
    Splitting x = {parts, (uint64_t)s->seed};
    status = status == 0 ? copy_rows(d, parts_writer, &x, NULL, err) : -1;
    for (int i = 0; i < (int)arrlen(parts); i++) {
        if (status != 0) {
            dataset_abandon(parts[i].writer);
            continue;
        }
        Yaml *sidecar = child_sidecar(d, "base", "nla data split", err);
        status = -1;
        if (sidecar) {
            yaml_set(sidecar, "split.part", parts[i].name, true);
            yaml_set(sidecar, "split.of", s->parts, true);
            yaml_set_number(sidecar, "split.seed", (double)s->seed);
            status = dataset_finish(parts[i].writer, sidecar, err);
            printf("%s: %s rows\n", parts[i].name, text_at(sidecar, "row_count"));
        } else {
            dataset_abandon(parts[i].writer);
        }
        yaml_free(sidecar);
    }
    return status;
}

int run_data_split(const Settings *s, Err *err) {
    Dataset d;
    Part *parts = NULL;
    Staging place;
    if (need(s->acts, "acts", s, err) != 0 || need(s->out, "out", s, err) != 0) {
        return -1;
    }
    int status = parse_parts(s->parts, &parts, err);
    status = status == 0 ? rows_open(&d, s->acts, err) : -1;
    if (status == 0) {
        status = stage(&place, s->out, err);
        status = status == 0 ? unstage(&place, split(s, &d, parts, place.temp, err), err) : -1;
        dataset_close(&d);
    }
    for (int i = 0; i < (int)arrlen(parts); i++) {
        free(parts[i].name);
    }
    arrfree(parts);
    return status;
}

/* ------------------------------------------------------------------------------------------------ nla data permute */

typedef struct {
    uint64_t key;
    int64_t row;
} Shuffled;

static int by_key(const void *left, const void *right) {
    const Shuffled *a = left, *b = right;
    return a->key != b->key ? (a->key < b->key ? -1 : 1) : a->row < b->row ? -1 : a->row > b->row;
}

/* from[i]: the row whose vector row i gets. The rows in random order, each given the next one's: one cycle, so none keeps its own. */
static int64_t *one_cycle(int64_t n, uint64_t seed) {
    Shuffled *order = xcalloc((size_t)n, sizeof *order);
    int64_t *from = xcalloc((size_t)n, sizeof *from);
    for (int64_t i = 0; i < n; i++) {
        order[i] = (Shuffled){random_key(seed, (uint64_t)i, 0, 0), i};
    }
    qsort(order, (size_t)n, sizeof *order, by_key);
    for (int64_t i = 0; i < n; i++) {
        from[order[i].row] = order[(i + 1) % n].row;
    }
    free(order);
    return from;
}

static int permute(const Settings *s, const Dataset *d, Err *err) {
    if (d->n < 2) {
        return fail(err, "%s: one row has no other vector to take", d->path);
    }
    DatasetWriter *w = dataset_create(s->out, d->d_model, err);
    if (!w) {
        return -1;
    }
    int64_t *from = one_cycle(d->n, (uint64_t)s->seed);
    int status = copy_rows(d, one_writer, w, from, err);
    free(from);
    Yaml *sidecar = status == 0 ? child_sidecar(d, text_at(d->meta.yaml, "stage"), "nla data permute", err) : NULL;
    if (!sidecar) {
        dataset_abandon(w);
        return -1;
    }
    yaml_set(sidecar, "permuted", "true", false);
    yaml_set_number(sidecar, "permutation_seed", (double)s->seed);
    status = dataset_finish(w, sidecar, err);
    if (status == 0) {
        dataset_tell(s, s->out, sidecar);
    }
    yaml_free(sidecar);
    return status;
}

int run_data_permute(const Settings *s, Err *err) {
    Dataset d;
    if (need(s->acts, "acts", s, err) != 0 || need(s->out, "out", s, err) != 0 || rows_open(&d, s->acts, err) != 0) {
        return -1;
    }
    int status = permute(s, &d, err);
    dataset_close(&d);
    return status;
}

/* ------------------------------------------------------------------------------------------------ nla data stats */

typedef struct {
    Dataset d;
    uint64_t *doc, *prefix, *vector, *id; /* [n]: hashes, sorted */
    double *tokens, *words;               /* [n]: of prefixes, sorted; words of explanations (stb) */
    int64_t documents, explained;
    Norms norms;
} Survey;

static int by_hash(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

/* Entries of a sorted list that stood before. */
static int64_t repeats(const uint64_t *hash, int64_t n) {
    int64_t count = 0;
    for (int64_t i = 1; i < n; i++) {
        count += hash[i] == hash[i - 1];
    }
    return count;
}

/* Different entries that two sorted lists share. */
static int64_t shared(const uint64_t *a, int64_t n, const uint64_t *b, int64_t m) {
    int64_t count = 0;
    for (int64_t i = 0, j = 0; i < n && j < m;) {
        if (a[i] != b[j]) {
            a[i] < b[j] ? i++ : j++;
            continue;
        }
        uint64_t same = a[i];
        count++;
        while (i < n && a[i] == same) {
            i++;
        }
        while (j < m && b[j] == same) {
            j++;
        }
    }
    return count;
}

static double count_words(const char *text) {
    double words = 0;
    for (bool in = false; *text; text++) {
        bool letter = *text != ' ' && *text != '\n' && *text != '\t';
        words += letter && !in;
        in = letter;
    }
    return words;
}

static int survey(Survey *x, const char *path, Err *err) {
    *x = (Survey){0};
    if (rows_open(&x->d, path, err) != 0) {
        return -1;
    }
    size_t n = (size_t)x->d.n, bytes = (size_t)x->d.d_model * sizeof(float);
    uint64_t **lists[] = {&x->doc, &x->prefix, &x->vector, &x->id};
    for (int k = 0; k < 4; k++) {
        *lists[k] = xcalloc(n, sizeof(uint64_t));
    }
    x->tokens = xcalloc(n, sizeof(double));
    float *v = xmalloc(bytes);
    for (size_t i = 0; i < n; i++) {
        Row row;
        dataset_passed(&x->d, (int64_t)i);
        if (row_open(&row, &x->d, (int64_t)i, err) != 0) {
            free(v);
            return -1;
        }
        dataset_vector(&x->d, (int64_t)i, v);
        x->doc[i] = XXH3_64bits(row.doc_id, strlen(row.doc_id));
        x->prefix[i] = row.prefix;
        x->vector[i] = XXH3_64bits(v, bytes);
        x->id[i] = row.id;
        x->tokens[i] = (double)row.n_raw_tokens;
        if (row.explanation) {
            arrput(x->words, count_words(row.explanation));
        }
        row_close(&row);
    }
    free(v);
    for (int k = 0; k < 4; k++) {
        qsort(*lists[k], n, sizeof(uint64_t), by_hash);
    }
    qsort(x->tokens, n, sizeof(double), by_value);
    x->explained = arrlen(x->words);
    if (x->explained) {
        qsort(x->words, (size_t)x->explained, sizeof(double), by_value);
    }
    x->documents = x->d.n - repeats(x->doc, x->d.n);
    dataset_norms(&x->d, &x->norms);
    return 0;
}

static void survey_free(Survey *x) {
    free(x->doc);
    free(x->prefix);
    free(x->vector);
    free(x->id);
    free(x->tokens);
    arrfree(x->words);
    dataset_close(&x->d);
}

static void tell_survey(const Settings *s, const Survey *x) {
    int64_t n = x->d.n, texts = repeats(x->prefix, n), vectors = repeats(x->vector, n), ids = repeats(x->id, n);
    const Norms *m = &x->norms;
    double words = x->explained ? x->words[x->explained / 2] : NAN;
    if (s->json) {
        printf("{\"dataset\": ");
        json_write_string(stdout, x->d.path, strlen(x->d.path));
        const char *const name[] = {"rows", "documents", "tokens_least", "tokens_median", "tokens_most", "explained", "explanation_words",
                                    "norm_mean", "norm_deviation", "norm_median", "var_nrm", "repeated_prefixes", "repeated_vectors",
                                    "repeated_ids", "zero", "not_finite"};
        double value[] = {(double)n, (double)x->documents, x->tokens[0], x->tokens[n / 2], x->tokens[n - 1], (double)x->explained, words,
                          m->mean, m->deviation, m->median, m->var_nrm, (double)texts, (double)vectors, (double)ids, (double)m->zero,
                          (double)m->not_finite};
        for (size_t i = 0; i < sizeof value / sizeof *value; i++) {
            json_number(stdout, name[i], value[i]);
        }
        puts("}");
        return;
    }
    printf("%s: %lld rows of %lld documents (%.1f each), layer %d, width %d\n", x->d.path, (long long)n, (long long)x->documents,
           (double)n / (double)x->documents, x->d.meta.layer, x->d.d_model);
    printf("  prefix: %.0f to %.0f tokens, median %.0f\n", x->tokens[0], x->tokens[n - 1], x->tokens[n / 2]);
    printf("  norm: mean %.4g, deviation %.3g; least %.4g, 1%% %.4g, median %.4g, 99%% %.4g, most %.4g; var_nrm %.4f\n", m->mean, m->deviation,
           m->least, m->low, m->median, m->high, m->most, m->var_nrm);
    if (x->explained) {
        printf("  explanations: %lld rows have one, of %.0f to %.0f words, median %.0f\n", (long long)x->explained, x->words[0],
               x->words[x->explained - 1], words);
    }
    printf("  repeated: %lld prefixes, %lld vectors, %lld row ids; unusable vectors: %lld zero, %lld not finite\n", (long long)texts,
           (long long)vectors, (long long)ids, (long long)m->zero, (long long)m->not_finite);
}

int run_data_stats(const Settings *s, Err *err) {
    int n = (int)arrlen(s->argument), opened = 0, status = 0;
    Survey *x = xcalloc((size_t)n, sizeof *x);
    for (; opened < n && status == 0; opened++) {
        status = survey(&x[opened], s->argument[opened], err);
        if (status == 0) {
            tell_survey(s, &x[opened]);
        }
    }
    for (int i = 0; i < n && status == 0; i++) {
        for (int j = i + 1; j < n; j++) {
            long long documents = shared(x[i].doc, x[i].d.n, x[j].doc, x[j].d.n), prefixes = shared(x[i].prefix, x[i].d.n, x[j].prefix, x[j].d.n);
            if (s->json) {
                printf("{\"between\": [");
                json_write_string(stdout, x[i].d.path, strlen(x[i].d.path));
                fputs(", ", stdout);
                json_write_string(stdout, x[j].d.path, strlen(x[j].d.path));
                printf("], \"shared_documents\": %lld, \"shared_prefixes\": %lld}\n", documents, prefixes);
            } else {
                printf("leakage between %s and %s: %lld documents, %lld prefixes\n", x[i].d.path, x[j].d.path, documents, prefixes);
            }
        }
    }
    for (int i = 0; i < opened; i++) {
        survey_free(&x[i]);
    }
    free(x);
    return status;
}

/* ------------------------------------------------------------------------------------------------ nla data build */

/* Moves a map of `from` into `to`, which may hold another of that name. */
static void adopt(Yaml *to, Yaml *from, const char *key) {
    for (int i = 0; i < (int)arrlen(from->item); i++) {
        if (strcmp(from->key[i], key) != 0) {
            continue;
        }
        yaml_set(to, key, "", false);
        Yaml *place = yaml_get(to, key), taken = *from->item[i];
        *from->item[i] = *place;
        *place = taken;
    }
}

/* Tokens and templates as an AV and an AR over this model are given them. */
static int add_templates(Yaml *y, const char *model, int layer, Err *err) {
    Config config;
    if (config_load(&config, model, err) != 0) {
        return -1;
    }
    Tokenizer *tok = tokenizer_load(model, err);
    Yaml *made = NULL;
    int status = tok ? sidecar_make(&made, false, tok, &config, model, layer, 0, err) : -1;
    if (status == 0) {
        adopt(y, made, "tokens");
        adopt(y, made, "prompt_templates");
    }
    yaml_free(made);
    tokenizer_free(tok);
    config_free(&config);
    return status;
}

typedef struct {
    int64_t written, silent; /* rows with an explanation, without one */
    struct {
        char *key; /* who wrote them */
        int64_t value;
    } *by; /* stb map */
} Built;

static int build_rows(DatasetWriter *w, const Dataset *d, const ExplanationIndex *texts, bool explained, Built *built, Err *err) {
    float *v = xmalloc((size_t)d->d_model * sizeof(float));
    int status = 0;
    for (int64_t i = 0; i < d->n && status == 0; i++) {
        Row row;
        char *by = NULL, *text = NULL;
        dataset_passed(d, i);
        status = row_open(&row, d, i, err);
        if (status == 0 && explained) {
            text = explanation_find(texts, &row, &by, err);
            if (!text && row.explanation) {
                text = xstrdup(row.explanation);
                by = xstrdup("the rows themselves");
            }
        }
        if (status == 0 && (text || !explained)) {
            dataset_vector(d, i, v);
            status = append(w, &row, v, text, err);
            built->written++;
            if (by) {
                int64_t before = shget(built->by, by); /* not inside shput, which has a place of its own in mind by then */
                shput(built->by, by, before + 1);
            }
        }
        built->silent += status == 0 && explained && !text;
        free(text);
        free(by);
        row_close(&row);
    }
    free(v);
    return status;
}

static int build(const Settings *s, const Dataset *d, const ExplanationIndex *texts, Err *err) {
    bool explained = strcmp(s->stage, "rl") != 0;
    const char *model = s->model ? s->model : text_at(d->meta.yaml, "extraction.base_model");
    Yaml *sidecar = child_sidecar(d, s->stage, "nla data build", err);
    DatasetWriter *w = NULL;
    Built built = {0};
    sh_new_strdup(built.by);
    int status = sidecar ? add_templates(sidecar, model, d->meta.layer, err) : -1;
    if (status == 0) {
        w = dataset_create(s->out, d->d_model, err);
        status = w ? build_rows(w, d, texts, explained, &built, err) : -1;
    }
    if (status == 0 && built.written == 0) {
        status = fail(err, "%s: no row has an explanation in %s; write them with: nla data explain", d->path,
                      s->explanations ? s->explanations : "its rows.jsonl");
    }
    if (status == 0 && explained) {
        yaml_set_number(sidecar, "api_summaries.rows_without", (double)built.silent);
        for (int i = 0; i < (int)shlen(built.by); i++) {
            char *key = xprintf("api_summaries.by.%s", built.by[i].key);
            for (char *p = key + strlen("api_summaries.by."); *p; p++) {
                *p = *p == '.' ? '_' : *p; /* a dot would open a map */
            }
            yaml_set_number(sidecar, key, (double)built.by[i].value);
            free(key);
        }
    }
    if (status == 0) {
        status = dataset_finish(w, sidecar, err);
        w = NULL;
    }
    if (status == 0) {
        dataset_tell(s, s->out, sidecar);
        note(s, "%lld rows%s, %lld left out: nobody explained them\n", (long long)built.written, explained ? " with an explanation" : "",
             (long long)built.silent);
    }
    dataset_abandon(w);
    shfree(built.by);
    yaml_free(sidecar);
    return status;
}

int run_data_build(const Settings *s, Err *err) {
    Dataset d;
    ExplanationIndex texts = {0};
    if (need(s->acts, "acts", s, err) != 0 || need(s->out, "out", s, err) != 0 || need(s->stage, "stage", s, err) != 0) {
        return -1;
    }
    if (strcmp(s->stage, "av_sft") != 0 && strcmp(s->stage, "ar_sft") != 0 && strcmp(s->stage, "rl") != 0) {
        return fail(err, "--stage takes av_sft, ar_sft or rl, not '%s'", s->stage);
    }
    if (rows_open(&d, s->acts, err) != 0) {
        return -1;
    }
    int status = s->explanations ? explanations_open(&texts, s->explanations, err) : 0;
    status = status == 0 ? build(s, &d, &texts, err) : -1;
    explanations_close(&texts);
    dataset_close(&d);
    return status;
}
