/* eval.c - how much of an activation the words carry, on held-out rows, beside what would look like success without being it.
 *
 * Every condition is a text for each row: the AV's explanation, another row's, a constant, the explanation of the nearest
 * training activation, the true prefix itself, or the explanation with something done to it. The AR turns it into a
 * vector, which is scored against the row's own. FVE = 1 - mean(mse_nrm) / var_nrm; a row without an explanation counts
 * as orthogonal (mse_nrm 2), as in training. Intervals are 95% bootstrap over rows.
 */
#define _GNU_SOURCE /* memmem, strcasestr */
#include "nla.h"

#include <ctype.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <stb/stb_ds.h>

enum { RESAMPLES = 1000 };

typedef struct {
    const char *name, *what;
    char **text; /* [rows]; NULL: no text, a failed row */
    double *mse, *cos, *centred; /* [rows] */
    double fve, low, high; /* with its interval */
} Condition;

typedef struct {
    const Settings *s;
    Engine *engine;
    Verbalizer av;
    Reconstructor ar;
    Dataset held, train;
    bool has_train;
    int n, D;
    float *gold;      /* [n, D] */
    double *mean;     /* [D]: of the golds, for the centred cosine */
    double var_nrm, meannorm;
    char **prefix;    /* [n] */
    char **written;   /* [n]: explanations that came with the rows, NULL where there is none */
    double *position; /* [n]: n_raw_tokens, tokens up to the activation's own; NaN when the row does not say */
    double *length;   /* [n]: tokens of each explanation */
    int failed;
    Condition *condition; /* stb; the first is the AV's own */
} Eval;

/* ------------------------------------------------------------------------------------------------ the golds */

/* Row i of those evaluated, spread over the set: neighbours come from one document. */
static int64_t row_of(const Eval *e, int i) {
    return i * e->held.n / e->n;
}

static int read_golds(Eval *e, Err *err) {
    int64_t limit = e->s->rows > 0 && e->s->rows < e->held.n ? e->s->rows : e->held.n;
    if (limit < 2) {
        return fail(err, "%s: %lld rows are too few to evaluate on", e->s->acts, (long long)limit);
    }
    e->n = (int)limit;
    e->gold = xmalloc((size_t)e->n * (size_t)e->D * sizeof(float));
    e->prefix = xcalloc((size_t)e->n, sizeof(char *));
    e->written = xcalloc((size_t)e->n, sizeof(char *));
    e->position = xcalloc((size_t)e->n, sizeof(double));
    e->length = xcalloc((size_t)e->n, sizeof(double));
    e->mean = xcalloc((size_t)e->D, sizeof(double));
    Baseline base = {0};
    for (int i = 0; i < e->n; i++) {
        float *v = e->gold + (size_t)i * (size_t)e->D;
        int64_t at = row_of(e, i);
        dataset_vector(&e->held, at, v);
        e->position[i] = NAN;
        baseline_add(&base, v, e->D);
        for (int d = 0; d < e->D; d++) {
            e->mean[d] += (double)v[d] / e->n;
        }
        Json row;
        if (e->held.line) {
            if (dataset_row(&e->held, at, &row, err) != 0) {
                baseline_free(&base);
                return -1;
            }
            e->prefix[i] = json_string(&row, json_get(&row, 0, "text"), NULL);
            e->written[i] = json_string(&row, json_get(&row, 0, "explanation"), NULL);
            (void)json_double(&row, json_get(&row, 0, "n_raw_tokens"), &e->position[i]);
            json_free(&row);
        }
    }
    float *constant = xmalloc((size_t)e->D * sizeof(float));
    for (int d = 0; d < e->D; d++) {
        constant[d] = (float)(base.sum[d] / (double)base.n);
    }
    e->var_nrm = baseline_var(&base, e->D);
    for (int i = 0; i < e->n; i++) {
        e->meannorm += mse_nrm(constant, e->gold + (size_t)i * (size_t)e->D, e->D, sqrt(e->D)) / e->n;
    }
    free(constant);
    baseline_free(&base);
    return e->var_nrm > 0 ? 0 : fail(err, "%s: all activations point the same way, so there is no variance to explain", e->s->acts);
}

/* ------------------------------------------------------------------------------------------------ conditions */

static Condition *add_condition(Eval *e, const char *name, const char *what) {
    Condition c = {.name = name, .what = what};
    size_t n = (size_t)e->n;
    c.text = xcalloc(n, sizeof(char *));
    c.mse = xcalloc(n, sizeof(double));
    c.cos = xcalloc(n, sizeof(double));
    c.centred = xcalloc(n, sizeof(double));
    arrput(e->condition, c);
    return &arrlast(e->condition);
}

/* The AV's explanation of every row. */
static int tell(Eval *e, Err *err) {
    const Settings *s = e->s;
    Condition *c = add_condition(e, "explained", "the AV's explanation of the row's activation");
    Decoding how = decoding_of(s);
    double start = now(), spoke = 0;
    int group = s->batch, status = 0;
    for (int i = 0; i < e->n && status == 0; i += group) {
        int m = e->n - i < group ? e->n - i : group;
        Decoder d;
        status = verbalize(&e->av, &d, e->gold + (size_t)i * (size_t)e->D, m, i, 1, &how, err);
        for (int j = 0; j < m && status == 0; j++) {
            const char *from;
            size_t len;
            bool found = explanation_of(d.sample[j].text, arrlenu(d.sample[j].text), &from, &len);
            c->text[i + j] = found ? xstrndup(from, len) : NULL;
            e->length[i + j] = (double)arrlen(d.sample[j].ids);
            e->failed += !found;
        }
        decoder_free(&d);
        progress(s, &spoke, start, i + m, "activations read", (double)(i + m) / e->n, status == 0 && i + m == e->n);
    }
    return status;
}

/* A random order in which no row keeps its place. */
static int *derangement(const Eval *e, uint64_t key) {
    int *order = xcalloc((size_t)e->n, sizeof(int));
    for (int i = 0; i < e->n; i++) {
        order[i] = i;
    }
    for (int i = e->n - 1; i > 0; i--) { /* Sattolo's shuffle: one single cycle */
        int j = (int)(random_uniform((uint64_t)e->s->seed, key, (uint64_t)i, 0) * i), swap = order[i];
        order[i] = order[j];
        order[j] = swap;
    }
    return order;
}

static char *copy_text(const char *text) {
    return text ? xstrdup(text) : NULL;
}

/* The texts of condition `source`, each given to another row. */
static void add_permuted(Eval *e, int source, const char *name, const char *what, uint64_t key) {
    int *order = derangement(e, key);
    Condition *c = add_condition(e, name, what);
    for (int i = 0; i < e->n; i++) {
        c->text[i] = copy_text(e->condition[source].text[order[i]]);
    }
    free(order);
}

/* The training row whose activation is nearest by cosine, and its explanation. */
static int add_nearest(Eval *e, Err *err) {
    Condition *c = add_condition(e, "nearest", "the training explanation whose activation is most similar");
    double *best = xcalloc((size_t)e->n, sizeof(double));
    int64_t *row = xcalloc((size_t)e->n, sizeof(int64_t));
    float *v = xmalloc((size_t)e->D * sizeof(float));
    for (int64_t t = 0; t < e->train.n; t++) {
        dataset_vector(&e->train, t, v);
        for (int i = 0; i < e->n; i++) {
            double near = cosine(v, e->gold + (size_t)i * (size_t)e->D, e->D);
            if (t == 0 || near > best[i]) {
                best[i] = near;
                row[i] = t;
            }
        }
    }
    int status = 0;
    for (int i = 0; i < e->n && status == 0; i++) {
        Json j;
        status = dataset_row(&e->train, row[i], &j, err);
        if (status == 0) {
            c->text[i] = json_string(&j, json_get(&j, 0, "explanation"), NULL);
            json_free(&j);
        }
    }
    free(best);
    free(row);
    free(v);
    return status;
}

/* The text of each row, where every row has one. */
static void add_given(Eval *e, char *const *text, const char *name, const char *what) {
    for (int i = 0; i < e->n; i++) {
        if (!text[i]) {
            return;
        }
    }
    Condition *c = add_condition(e, name, what);
    for (int i = 0; i < e->n; i++) {
        c->text[i] = xstrdup(text[i]);
    }
}

/* ------------------------------------------------------------------------------------------------ what is done to a text */

/* Sentences in another order. A sentence ends at . ! ? or a blank line. */
static char *shuffle_sentences(const char *text, uint64_t key, uint64_t seed) {
    char **part = NULL, *out = NULL;
    const char *start = text;
    for (const char *c = text;; c++) {
        bool ends = *c && strchr(".!?\n", *c) && (!c[1] || isspace((unsigned char)c[1]));
        if (ends || !*c) {
            size_t len = (size_t)(c - start) + (*c != 0);
            while (len && isspace((unsigned char)*start)) {
                start++;
                len--;
            }
            if (len) {
                arrput(part, xstrndup(start, len));
            }
            start = c + 1;
        }
        if (!*c) {
            break;
        }
    }
    for (int i = (int)arrlen(part) - 1; i > 0; i--) {
        int j = (int)(random_uniform(seed, key, (uint64_t)i, 1) * (i + 1));
        char *swap = part[i];
        part[i] = part[j];
        part[j] = swap;
    }
    for (int i = 0; i < (int)arrlen(part); i++) {
        size_t len = strlen(part[i]);
        if (i) {
            arrput(out, ' ');
        }
        memcpy(arraddnptr(out, len), part[i], len);
        free(part[i]);
    }
    arrput(out, 0);
    char *copy = xstrdup(out);
    arrfree(out);
    arrfree(part);
    return copy;
}

static char *lower_case(const char *text) {
    char *out = xstrdup(text);
    for (char *c = out; *c; c++) {
        *c = (char)((unsigned char)*c < 128 ? tolower((unsigned char)*c) : *c);
    }
    return out;
}

/* Straight and curly quotation marks out; an apostrophe between letters stays. */
static char *without_quotes(const char *text) {
    static const char *const marks[] = {"\"", "\u201c", "\u201d", "\u2018", "\u00ab", "\u00bb", "`"};
    char *out = xmalloc(strlen(text) + 1), *to = out;
    for (const char *c = text; *c;) {
        size_t skip = 0;
        for (size_t m = 0; m < sizeof marks / sizeof *marks; m++) {
            skip = strncmp(c, marks[m], strlen(marks[m])) == 0 ? strlen(marks[m]) : skip;
        }
        bool inside = c > text && isalnum((unsigned char)c[-1]) && isalnum((unsigned char)c[1]);
        skip = *c == '\'' && !inside ? 1 : skip;
        if (skip) {
            c += skip;
        } else {
            *to++ = *c++;
        }
    }
    *to = 0;
    return out;
}

/* Every word is dropped with probability 0.2. */
static char *drop_words(const char *text, uint64_t key, uint64_t seed) {
    char *out = xmalloc(strlen(text) + 1), *to = out;
    uint64_t word = 0;
    for (const char *c = text; *c;) {
        size_t n = strcspn(c, " \n\t"), space = strspn(c + n, " \n\t");
        if (random_uniform(seed, key, word++, 2) >= 0.2) {
            memcpy(to, c, n + space);
            to += n + space;
        }
        c += n + space;
    }
    *to = 0;
    return out;
}

static void add_perturbed(Eval *e) {
    static const struct {
        const char *name, *what;
    } kinds[] = {{"shuffled", "its sentences in another order"},
                 {"lower-case", "in lower case"},
                 {"unquoted", "without quotation marks"},
                 {"thinned", "with 20% of its words dropped"}};
    for (size_t k = 0; k < sizeof kinds / sizeof *kinds; k++) {
        Condition *c = add_condition(e, kinds[k].name, kinds[k].what);
        for (int i = 0; i < e->n; i++) {
            const char *text = e->condition[0].text[i];
            uint64_t row = (uint64_t)i, seed = (uint64_t)e->s->seed;
            c->text[i] = !text    ? NULL
                         : k == 0 ? shuffle_sentences(text, row, seed)
                         : k == 1 ? lower_case(text)
                         : k == 2 ? without_quotes(text)
                                  : drop_words(text, row, seed);
        }
    }
}

/* ------------------------------------------------------------------------------------------------ scores */

static double centred_cosine(const Eval *e, const float *a, const float *b) {
    double ab = 0, aa = 0, bb = 0;
    for (int d = 0; d < e->D; d++) {
        double x = (double)a[d] - e->mean[d], y = (double)b[d] - e->mean[d];
        ab += x * y;
        aa += x * x;
        bb += y * y;
    }
    return aa > 0 && bb > 0 ? ab / sqrt(aa * bb) : 0;
}

/* 95% of the means of resampled rows, as FVE. */
static void bootstrap(const Eval *e, Condition *c) {
    double *fve = xcalloc(RESAMPLES, sizeof(double));
    for (int r = 0; r < RESAMPLES; r++) {
        double sum = 0;
        for (int i = 0; i < e->n; i++) {
            sum += c->mse[(int)(random_uniform((uint64_t)e->s->seed, (uint64_t)r, (uint64_t)i, 3) * e->n)];
        }
        fve[r] = 1 - sum / e->n / e->var_nrm;
    }
    qsort(fve, RESAMPLES, sizeof(double), by_value);
    c->low = fve[RESAMPLES / 40];
    c->high = fve[RESAMPLES - 1 - RESAMPLES / 40];
    free(fve);
}

static int score(Eval *e, Condition *c, Err *err) {
    const char **text = NULL;
    size_t *len = NULL;
    int *row = NULL, D = e->D;
    for (int i = 0; i < e->n; i++) {
        c->mse[i] = 2;
        if (c->text[i]) {
            arrput(text, c->text[i]);
            arrput(len, strlen(c->text[i]));
            arrput(row, i);
        }
    }
    int n = (int)arrlen(text);
    float *out = xmalloc((size_t)(n + 1) * (size_t)D * sizeof(float));
    int status = n ? reconstruct(&e->ar, text, len, n, out, err) : 0;
    double total = 0;
    for (int i = 0; i < n && status == 0; i++) {
        const float *gold = e->gold + (size_t)row[i] * (size_t)D, *pred = out + (size_t)i * (size_t)D;
        c->mse[row[i]] = mse_nrm(pred, gold, D, sqrt(D));
        c->cos[row[i]] = cosine(pred, gold, D);
        c->centred[row[i]] = centred_cosine(e, pred, gold);
    }
    for (int i = 0; i < e->n; i++) {
        total += c->mse[i];
    }
    c->fve = 1 - total / e->n / e->var_nrm;
    bootstrap(e, c);
    free(out);
    arrfree(text);
    arrfree(len);
    arrfree(row);
    return status;
}

static double average(const double *x, int n) {
    double sum = 0;
    for (int i = 0; i < n; i++) {
        sum += x[i];
    }
    return sum / n;
}

/* Of the words of five letters and more among the last 200 bytes of the prefix, the share that the text repeats. */
static double keyword_recall(const char *prefix, const char *text, bool *any) {
    size_t len = strlen(prefix), from = len > 200 ? len - 200 : 0;
    int words = 0, found = 0;
    for (const char *c = prefix + from; *c;) {
        size_t n = 0;
        while (isalpha((unsigned char)c[n])) {
            n++;
        }
        if (n >= 5 && n < 64) {
            char word[64];
            memcpy(word, c, n);
            word[n] = 0;
            words++;
            found += text && strcasestr(text, word) != NULL;
        }
        c += n ? n : 1;
    }
    *any = words > 0;
    return words ? (double)found / words : 0;
}

static double mean_recall(const Eval *e, const Condition *c) {
    double sum = 0;
    int rows = 0;
    for (int i = 0; i < e->n; i++) {
        bool any = false;
        double recall = e->prefix[i] ? keyword_recall(e->prefix[i], c->text[i], &any) : 0;
        sum += any ? recall : 0;
        rows += any;
    }
    return rows ? sum / rows : NAN;
}

/* ------------------------------------------------------------------------------------------------ the table */

/* [x0, x1, ...] after its name; NaN is written as null. */
static void json_array(FILE *out, const char *key, const double *x, int n) {
    fprintf(out, ", \"%s\": [", key);
    for (int i = 0; i < n; i++) {
        fprintf(out, isfinite(x[i]) ? "%s%.6g" : "%snull", i ? "," : "", x[i]);
    }
    fputc(']', out);
}

enum { SAMPLES = 10 };

typedef struct {
    double mse;
    int row;
} Ranked;

static int better_first(const void *a, const void *b) {
    const Ranked *x = a, *y = b;
    return x->mse != y->mse ? (x->mse > y->mse) - (x->mse < y->mse) : x->row - y->row;
}

/* Rows to read: the middle one of each tenth, ordered by score, best first. */
static void json_samples(FILE *out, const Eval *e) {
    const Condition *c = &e->condition[0];
    Ranked *order = xcalloc((size_t)e->n, sizeof(Ranked));
    int shown = e->n < SAMPLES ? e->n : SAMPLES;
    for (int i = 0; i < e->n; i++) {
        order[i] = (Ranked){c->mse[i], i};
    }
    qsort(order, (size_t)e->n, sizeof(Ranked), better_first);
    fputs(", \"samples\": [", out);
    for (int k = 0; k < shown; k++) {
        int i = order[(2 * k + 1) * (int64_t)e->n / (2 * shown)].row;
        fprintf(out, "%s{\"row\": %lld", k ? ", " : "", (long long)row_of(e, i));
        json_text(out, "prefix", e->prefix[i]);
        json_text(out, "explanation", c->text[i]);
        json_number(out, "fve", 1 - c->mse[i] / e->var_nrm);
        fputc('}', out);
    }
    fputc(']', out);
    free(order);
}

/* Everything that was measured: what --json prints and what the page shows. To be freed. */
static char *results_json(const Eval *e, size_t *len) {
    char *text = NULL, date[32];
    FILE *out = open_memstream(&text, len);
    if (!out) {
        return NULL;
    }
    page_date(date);
    fprintf(out, "{\"rows\": %d", e->n);
    json_number(out, "var_nrm", e->var_nrm);
    json_number(out, "meannorm", e->meannorm);
    json_number(out, "failed", (double)e->failed / e->n);
    json_number(out, "mean_tokens", average(e->length, e->n));
    json_number(out, "keyword_recall", mean_recall(e, &e->condition[0]));
    json_number(out, "keyword_recall_permuted", mean_recall(e, &e->condition[1]));
    json_text(out, "created", date);
    json_text(out, "av", e->s->av);
    json_text(out, "ar", e->s->ar);
    json_text(out, "acts", e->s->acts);
    if (e->held.line) {
        json_array(out, "position", e->position, e->n);
    } else {
        json_text(out, "position", NULL);
    }
    json_array(out, "length", e->length, e->n);
    json_samples(out, e);
    fputs(", \"conditions\": {", out);
    for (int i = 0; i < (int)arrlen(e->condition); i++) {
        const Condition *c = &e->condition[i];
        fprintf(out, "%s\"%s\": {\"fve_nrm\": %.6g", i ? ", " : "", c->name, c->fve);
        json_number(out, "low", c->low);
        json_number(out, "high", c->high);
        json_number(out, "fve_meannorm", 1 - average(c->mse, e->n) / e->meannorm);
        json_number(out, "mse_nrm", average(c->mse, e->n));
        json_number(out, "cos", average(c->cos, e->n));
        json_number(out, "centred_cos", average(c->centred, e->n));
        json_text(out, "what", c->what);
        json_array(out, "mse", c->mse, e->n);
        fputc('}', out);
    }
    fputs("}}\n", out);
    if (fclose(out) != 0) {
        free(text);
        return NULL;
    }
    return text;
}

static void print_results(const Eval *e) {
    printf("%d rows of %s; var_nrm %.4f, meannorm %.4f, both on these rows\n", e->n, e->s->acts, e->var_nrm, e->meannorm);
    printf("explanations: %.1f%% failed, %.1f tokens on average\n\n", 100.0 * e->failed / e->n, average(e->length, e->n));
    printf("%-12s %7s  %-18s %8s %7s %8s  %s\n", "", "FVE", "95% interval", "of mean", "cos", "centred", "the AR reads");
    for (int i = 0; i < (int)arrlen(e->condition); i++) {
        const Condition *c = &e->condition[i];
        double other = 1 - average(c->mse, e->n) / e->meannorm, cos = average(c->cos, e->n), centred = average(c->centred, e->n);
        printf("%-12s %7.3f  (%.3f to %.3f)%*s %8.3f %7.3f %8.3f  %s\n", c->name, c->fve, c->low, c->high,
               (int)(18 - strlen("( to )") - (size_t)snprintf(NULL, 0, "%.3f%.3f", c->low, c->high)), "", other, cos, centred, c->what);
    }
    double recall = mean_recall(e, &e->condition[0]);
    if (isfinite(recall)) {
        printf("\nkeyword recall %.3f, of another row's explanation %.3f (words of 5 letters and more among the prefix's last 200 bytes)\n",
               recall, mean_recall(e, &e->condition[1]));
    }
}

/* Prints first: a page that cannot be written does not lose what took long to measure. */
static int show(const Eval *e, Err *err) {
    const Settings *s = e->s;
    size_t len;
    char *json = results_json(e, &len);
    if (!json) {
        return fail(err, "not enough memory for the results as JSON");
    }
    if (s->json) {
        fwrite(json, 1, len, stdout);
    } else {
        print_results(e);
    }
    int status = s->html ? report_eval(s->html, json, len, err) : 0;
    free(json);
    if (status == 0 && s->html) {
        note(s, "%s: open it in a browser\n", s->html);
    }
    return status;
}

/* ------------------------------------------------------------------------------------------------ the command */

static int eval_open(Eval *e, Err *err) {
    const Settings *s = e->s;
    if (need(s->av, "av", s, err) != 0 || need(s->ar, "ar", s, err) != 0 || need(s->acts, "acts", s, err) != 0 ||
        open_engine(&e->engine, s, err) != 0 || verbalizer_open(&e->av, s->av, NULL, s->injection_scale, e->engine, err) != 0 ||
        reconstructor_open(&e->ar, s->ar, NULL, e->engine, err) != 0 || dataset_open(&e->held, s->acts, err) != 0) {
        return -1;
    }
    e->D = e->held.d_model;
    if (e->av.model.config.hidden_size != e->D || e->ar.model.config.hidden_size != e->D) {
        return fail(err, "%s: vectors have width %d, the AV %d, the AR %d", s->acts, e->D, e->av.model.config.hidden_size,
                    e->ar.model.config.hidden_size);
    }
    if (s->train) {
        e->has_train = dataset_open(&e->train, s->train, err) == 0;
        if (!e->has_train || e->train.d_model != e->D || e->train.n < 1) {
            return fail(err, "%s: vectors have width %d, those of %s %d", s->train, e->train.d_model, s->acts, e->D);
        }
    }
    return read_golds(e, err);
}

static void eval_close(Eval *e) {
    for (int i = 0; i < (int)arrlen(e->condition); i++) {
        Condition *c = &e->condition[i];
        for (int j = 0; j < e->n; j++) {
            free(c->text[j]);
        }
        free(c->text);
        free(c->mse);
        free(c->cos);
        free(c->centred);
    }
    for (int i = 0; i < e->n && e->prefix; i++) {
        free(e->prefix[i]);
        free(e->written[i]);
    }
    arrfree(e->condition);
    free(e->prefix);
    free(e->written);
    free(e->position);
    free(e->length);
    free(e->gold);
    free(e->mean);
    dataset_close(&e->held);
    if (e->has_train) {
        dataset_close(&e->train);
    }
    reconstructor_close(&e->ar);
    verbalizer_close(&e->av);
    if (e->engine) {
        e->engine->close(e->engine);
    }
}

int run_eval(const Settings *s, Err *err) {
    Eval e = {.s = s};
    int status = eval_open(&e, err);
    status = status == 0 ? tell(&e, err) : -1;
    if (status == 0) {
        add_permuted(&e, 0, "permuted-v", "the explanation of another row's vector", 1);
        add_permuted(&e, 0, "permuted-t", "another row's text, shuffled anew", 2);
        Condition *constant = add_condition(&e, "constant", "the same words for every row");
        for (int i = 0; i < e.n; i++) {
            constant->text[i] = xstrdup("The text goes on in the way it has gone so far.");
        }
        add_perturbed(&e);
        if (e.held.line) {
            Condition *prefix = add_condition(&e, "prefix", "the true text before the token, not the explanation");
            for (int i = 0; i < e.n; i++) {
                prefix->text[i] = copy_text(e.prefix[i]);
            }
            add_permuted(&e, (int)arrlen(e.condition) - 1, "prefix-perm", "another row's true text", 4);
            add_given(&e, e.written, "written", "the explanation that came with the row: written from its text");
        }
        status = e.has_train ? add_nearest(&e, err) : 0;
    }
    for (int i = 0; i < (int)arrlen(e.condition) && status == 0; i++) {
        status = score(&e, &e.condition[i], err);
    }
    status = status == 0 ? show(&e, err) : -1;
    eval_close(&e);
    return status;
}
