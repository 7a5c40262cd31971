/* explain.c - the round trip for a person: run the target over a text, take out the activation at every token, let the AV
 * say what is in it, let the AR rebuild it from the words, and show how much the words carried.
 */
#include "nla.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <stb/stb_ds.h>

enum { EARLY = 10 }; /* positions below this decode badly: a model has little in mind yet */

typedef struct {
    char *text; /* raw, NUL-terminated */
    char *explanation; /* NULL: failed */
    bool truncated;
    double fve, cos, mse; /* NaN: no score */
} Telling;

typedef struct {
    int position;
    double norm;
    bool outlier;
    Telling *telling; /* [samples] */
} Reading;

typedef struct {
    int layer;
    double var_nrm;
    float *vectors; /* [positions, D] */
    Reading *reading; /* [positions] */
} Rung;

typedef struct {
    const Settings *s;
    Engine *engine;
    Model target;
    Tokenizer *tok;
    Verbalizer av;
    Reconstructor ar;
    bool has_ar;
    int *ids;      /* stb: the text */
    int *position; /* stb: those that are read */
    Rung *rung;    /* stb: one a layer */
    char *baseline;
} Explain;

/* ------------------------------------------------------------------------------------------------ what is read */

/* all, last, N (one position) or A:B (from A up to, not including, B). */
static int choose_range(Explain *x, Err *err) {
    const char *how = x->s->positions;
    int n = (int)arrlen(x->ids), from = 0, to = n, used = 0;
    if (strcmp(how, "last") == 0) {
        from = n - 1;
    } else if (sscanf(how, "%d:%d%n", &from, &to, &used) == 2 && !how[used]) {
        to = to < n ? to : n;
    } else if (sscanf(how, "%d%n", &from, &used) == 1 && !how[used]) {
        to = from + 1;
    } else if (strcmp(how, "all") != 0) {
        return fail(err, "--positions takes all, last, one position N or a range A:B, not '%s'", how);
    }
    if (from < 0 || from >= to || to > n) {
        return fail(err, "--positions %s: the text has positions 0 to %d", how, n - 1);
    }
    for (int i = from; i < to; i++) {
        arrput(x->position, i);
    }
    return 0;
}

/* The text, and with --reply the target's own reply after it. */
static int read_text(Explain *x, Err *err) {
    Loaded l = {.engine = x->engine, .model = x->target, .tok = x->tok};
    if (prompt_ids(&l, x->s, &x->ids, err) != 0) {
        return -1;
    }
    int n = (int)arrlen(x->ids), status = 0;
    if (x->s->reply > 0) {
        Forest f;
        Batch b = {0};
        Decoder d = {.how = {.max_tokens = x->s->reply, .sampler = {.top_p = 1}}, .eos = x->target.config.eos,
                     .vocab_size = x->target.config.vocab_size, .tok = x->tok};
        status = forest_open(&f, &x->target, x->target.config.n_layers, n + x->s->reply + 2 * CACHE_ALIGN, n < 512 ? n : 512, FORWARD, err);
        if (status == 0) {
            int root = n > 1 ? forest_add(&f, -1, n - 1, err) : -1;
            status = n > 1 ? feed(&f, &b, root, x->ids, n - 1, NULL, err) : 0;
            status = status == 0 ? decoder_add(&d, &f, root, 0, x->ids[n - 1], 1, err) : -1;
            status = status == 0 && decode(&d, &f, &b, err) >= 0 ? 0 : -1;
            for (int i = 0; status == 0 && i < (int)arrlen(d.sample[0].ids); i++) {
                arrput(x->ids, d.sample[0].ids[i]);
            }
            decoder_free(&d);
            batch_free(&b);
            forest_close(&f);
        }
    }
    return status == 0 ? choose_range(x, err) : -1;
}

static void keep_rung(void *context, Engine *e, const char *module, int layer, const Act *data, int first, int rows, int width) {
    (void)first;
    Explain *x = context;
    for (int i = 0; !*module && i < (int)arrlen(x->rung); i++) {
        if (x->rung[i].layer == layer) {
            e->read(e, x->rung[i].vectors, data, 0, (size_t)rows * (size_t)width);
        }
    }
}

/* The residual stream at every token, at every layer asked for. */
static int capture_rungs(Explain *x, Err *err) {
    int n = (int)arrlen(x->ids), highest = 0;
    for (int i = 0; i < (int)arrlen(x->rung); i++) {
        highest = x->rung[i].layer > highest ? x->rung[i].layer : highest;
        x->rung[i].vectors = xmalloc((size_t)n * (size_t)x->target.config.hidden_size * sizeof(float));
    }
    Forest f;
    Batch b = {0};
    Tap tap = {x, keep_rung};
    if (forest_open(&f, &x->target, highest + 1, n, n, FORWARD, err) != 0) {
        return -1;
    }
    int status = feed(&f, &b, forest_add(&f, -1, n, err), x->ids, n, &tap, err);
    batch_free(&b);
    forest_close(&f);
    return status;
}

/* ------------------------------------------------------------------------------------------------ scores */

/* var_nrm: over a dataset when one is given, else what the AR's training measured at that layer, else over this text's own activations
 * past the early ones. */
static int find_baseline(Explain *x, Rung *r, Err *err) {
    int D = x->target.config.hidden_size, n = (int)arrlen(x->ids), from = n > 2 * EARLY ? EARLY : 0;
    Baseline base = {0};
    free(x->baseline);
    x->baseline = NULL;
    if (!x->s->acts && x->has_ar && r->layer == x->ar.meta.layer &&
        yaml_double(yaml_get(x->ar.meta.yaml, "extraction.var_nrm"), &r->var_nrm) && r->var_nrm > 0) {
        x->baseline = xstrdup("the held-out activations of the AR's training");
        return 0;
    }
    if (x->s->acts) {
        Dataset d;
        if (dataset_open(&d, x->s->acts, err) != 0) {
            return -1;
        }
        if (d.d_model != D) {
            fail(err, "%s: vectors have width %d, the target %d", x->s->acts, d.d_model, D);
            dataset_close(&d);
            return -1;
        }
        float *v = xmalloc((size_t)D * sizeof(float));
        for (int64_t i = 0; i < d.n; i++) {
            dataset_vector(&d, i, v);
            baseline_add(&base, v, D);
        }
        x->baseline = xprintf("the %lld activations of %s", (long long)d.n, x->s->acts);
        free(v);
        dataset_close(&d);
    } else {
        for (int i = from; i < n; i++) {
            baseline_add(&base, r->vectors + (size_t)i * (size_t)D, D);
        }
        x->baseline = xprintf("this text's own activations at that layer, positions %d to %d", from, n - 1);
    }
    r->var_nrm = baseline_var(&base, D);
    baseline_free(&base);
    return 0;
}

/* A norm past three times the median is an outlier (an attention sink, most often). */
static void mark_outliers(const Explain *x, Rung *r) {
    int D = x->target.config.hidden_size, n = (int)arrlen(x->ids);
    double *norm = xcalloc((size_t)n, sizeof(double));
    for (int i = 0; i < n; i++) {
        norm[i] = vector_norm(r->vectors + (size_t)i * (size_t)D, D);
    }
    qsort(norm, (size_t)n, sizeof(double), by_value);
    for (int i = 0; i < (int)arrlen(x->position); i++) {
        r->reading[i].position = x->position[i];
        r->reading[i].norm = vector_norm(r->vectors + (size_t)x->position[i] * (size_t)D, D);
        r->reading[i].outlier = r->reading[i].norm > 3 * norm[n / 2];
    }
    free(norm);
}

/* Rebuilds each explanation's vector and scores it against the one it came from. */
static int score_rung(Explain *x, Rung *r, Err *err) {
    int D = x->target.config.hidden_size, *owner = NULL, status = 0;
    const char **text = NULL;
    size_t *len = NULL;
    Telling **telling = NULL;
    for (int i = 0; i < (int)arrlen(x->position); i++) {
        for (int k = 0; k < x->s->samples; k++) {
            Telling *t = &r->reading[i].telling[k];
            if (t->explanation) {
                arrput(text, t->explanation);
                arrput(len, strlen(t->explanation));
                arrput(owner, x->position[i]);
                arrput(telling, t);
            }
        }
    }
    int n = (int)arrlen(text);
    float *out = xmalloc((size_t)(n + 1) * (size_t)D * sizeof(float));
    if (x->has_ar && n > 0) {
        status = reconstruct(&x->ar, text, len, n, out, err);
    }
    for (int i = 0; i < n && x->has_ar && status == 0; i++) {
        const float *gold = r->vectors + (size_t)owner[i] * (size_t)D, *pred = out + (size_t)i * (size_t)D;
        telling[i]->cos = cosine(pred, gold, D);
        telling[i]->mse = mse_nrm(pred, gold, D, sqrt(D));
        telling[i]->fve = r->var_nrm > 0 ? 1 - telling[i]->mse / r->var_nrm : NAN;
    }
    free(out);
    arrfree(owner);
    arrfree(text);
    arrfree(len);
    arrfree(telling);
    return status;
}

static void take_telling(Telling *t, const Sample *sample) {
    const char *start;
    size_t n, len = arrlenu(sample->text);
    bool found = explanation_of(sample->text, len, &start, &n);
    *t = (Telling){.text = xstrndup(len ? sample->text : "", len), .explanation = found ? xstrndup(start, n) : NULL,
                   .truncated = !sample->ended && !sample->stopped, .fve = NAN, .cos = NAN, .mse = NAN};
}

static int tell_rung(Explain *x, Rung *r, double *spoke, double start, Err *err) {
    const Settings *s = x->s;
    int D = x->target.config.hidden_size, n = (int)arrlen(x->position), group = group_size(s);
    int status = 0, rungs = (int)arrlen(x->rung), done = (int)(r - x->rung) * n;
    float *vectors = xmalloc((size_t)group * (size_t)D * sizeof(float));
    Decoding how = decoding_of(s);
    for (int i = 0; i < n && status == 0; i += group) {
        int m = n - i < group ? n - i : group;
        Decoder d;
        for (int j = 0; j < m; j++) {
            memcpy(vectors + (size_t)j * (size_t)D, r->vectors + (size_t)x->position[i + j] * (size_t)D, (size_t)D * sizeof(float));
        }
        status = verbalize(&x->av, &d, vectors, m, x->position[i], s->samples, &how, err);
        for (int j = 0; j < m * s->samples && status == 0; j++) {
            take_telling(&r->reading[i + j / s->samples].telling[j % s->samples], &d.sample[j]);
        }
        decoder_free(&d);
        double all = (double)n * rungs, count = done + i + m;
        progress(s, spoke, start, count, "activations read", count / all, status == 0 && count >= all);
    }
    free(vectors);
    return status;
}

/* ------------------------------------------------------------------------------------------------ the result */

static void write_tokens(const Explain *x, FILE *out) {
    for (int i = 0; i < (int)arrlen(x->ids); i++) {
        size_t n;
        const char *piece = tokenizer_piece(x->tok, x->ids[i], &n);
        fputs(i ? ", {\"text\": " : "{\"text\": ", out);
        json_write_string(out, piece ? piece : "", piece ? n : 0);
        fprintf(out, ", \"id\": %d, \"special\": %s}", x->ids[i], tokenizer_is_special(x->tok, x->ids[i]) ? "true" : "false");
    }
}

static void write_reading(const Explain *x, const Reading *r, FILE *out) {
    fprintf(out, "{\"position\": %d, \"norm\": %.6g, \"outlier\": %s, \"early\": %s, \"samples\": [", r->position, r->norm,
            r->outlier ? "true" : "false", r->position < EARLY ? "true" : "false");
    for (int k = 0; k < x->s->samples; k++) {
        const Telling *t = &r->telling[k];
        fprintf(out, "%s{\"truncated\": %s", k ? ", " : "", t->truncated ? "true" : "false");
        json_text(out, "explanation", t->explanation);
        json_text(out, "text", t->text);
        json_number(out, "fve", t->fve);
        json_number(out, "cos", t->cos);
        json_number(out, "mse_nrm", t->mse);
        fputc('}', out);
    }
    fputs("]}", out);
}

/* Mean FVE of the first samples past the early positions. */
static double mean_fve(const Explain *x, const Rung *r) {
    double sum = 0;
    int n = 0;
    for (int i = 0; i < (int)arrlen(x->position); i++) {
        double fve = r->reading[i].telling[0].fve;
        if (r->reading[i].position >= EARLY && isfinite(fve)) {
            sum += fve;
            n++;
        }
    }
    return n ? sum / n : NAN;
}

static char *result_json(const Explain *x, size_t *len) {
    const Settings *s = x->s;
    char *text = NULL, date[32];
    FILE *out = open_memstream(&text, len);
    page_date(date);
    fputs("{\"title\": \"What the model had in mind\"", out);
    json_text(out, "created", date);
    json_text(out, "baseline", x->baseline);
    fputs(", \"settings\": {\"program\": \"nla explain\"", out);
    json_text(out, "model", s->model);
    json_text(out, "av", s->av);
    json_text(out, "ar", s->ar);
    fprintf(out, ", \"chat\": %s, \"reply\": %d, \"samples\": %d, \"temperature\": %g, \"seed\": %lld, \"max_tokens\": %d",
            s->chat ? "true" : "false", s->reply, s->samples, s->temperature, (long long)s->seed, s->max_tokens);
    json_number(out, "injection_scale", x->av.scale > 0 ? (double)x->av.scale : NAN);
    fputs("}, \"tokens\": [", out);
    write_tokens(x, out);
    fputs("], \"layers\": [", out);
    for (int i = 0; i < (int)arrlen(x->rung); i++) {
        const Rung *r = &x->rung[i];
        fprintf(out, "%s{\"layer\": %d", i ? ", " : "", r->layer);
        json_number(out, "var_nrm", r->var_nrm);
        json_number(out, "mean_fve", mean_fve(x, r));
        fputs(", \"readings\": [", out);
        for (int j = 0; j < (int)arrlen(x->position); j++) {
            fputs(j ? ", " : "", out);
            write_reading(x, &r->reading[j], out);
        }
        fputs("]}", out);
    }
    fputs("]}\n", out);
    fclose(out);
    return text;
}

/* One block a token: what it is, its scores, and the explanation, indented. */
static void print_rung(const Explain *x, const Rung *r) {
    printf("layer %d, var_nrm %.4f over %s\n", r->layer, r->var_nrm, x->baseline);
    for (int i = 0; i < (int)arrlen(x->position); i++) {
        const Reading *reading = &r->reading[i];
        size_t n;
        const char *piece = tokenizer_piece(x->tok, x->ids[reading->position], &n);
        printf("\n%4d  ", reading->position);
        json_write_string(stdout, piece ? piece : "", piece ? n : 0);
        printf("  norm %.1f%s%s\n", reading->norm, reading->outlier ? " (outlier: decodes badly)" : "",
               reading->position < EARLY ? " (early: decodes badly)" : "");
        for (int k = 0; k < x->s->samples; k++) {
            const Telling *t = &reading->telling[k];
            if (isfinite(t->fve)) {
                printf("      FVE %.3f, cos %.3f\n", t->fve, t->cos);
            }
            if (!t->explanation) {
                printf("      failed (%s): ", t->truncated ? "cut off at the length limit" : "no closing tag");
            }
            fputs(t->explanation ? "      " : "", stdout);
            for (const char *c = t->explanation ? t->explanation : t->text; *c; c++) {
                putchar((unsigned char)*c < 32 && *c != '\n' ? ' ' : *c); /* no control sequence reaches the terminal */
                fputs(*c == '\n' ? "      " : "", stdout);
            }
            putchar('\n');
        }
    }
    if (isfinite(mean_fve(x, r))) {
        printf("\nmean FVE %.3f past the first %d positions\n", mean_fve(x, r), EARLY);
    }
}

/* ------------------------------------------------------------------------------------------------ the command */

static int explain_open(Explain *x, Err *err) {
    const Settings *s = x->s;
    if (need(s->model, "model", s, err) != 0 || need(s->av, "av", s, err) != 0 || open_engine(&x->engine, s, err) != 0 ||
        model_load(&x->target, s->model, x->engine, err) != 0 || !(x->tok = tokenizer_load(s->model, err)) ||
        verbalizer_open(&x->av, s->av, s->sidecar, s->injection_scale, x->engine, err) != 0) {
        return -1;
    }
    if (s->ar && reconstructor_open(&x->ar, s->ar, NULL, x->engine, err) != 0) {
        return -1;
    }
    x->has_ar = s->ar != NULL;
    int D = x->target.config.hidden_size;
    if (x->av.model.config.hidden_size != D || (x->has_ar && x->ar.model.config.hidden_size != D)) {
        return fail(err, "%s has width %d, the AV %d, the AR %d: they were not made for this model", s->model, D,
                    x->av.model.config.hidden_size, x->has_ar ? x->ar.model.config.hidden_size : D);
    }
    int *layers = NULL, status = 0;
    if (!s->layers && x->av.meta.layer >= 0) {
        arrput(layers, x->av.meta.layer);
    } else {
        status = parse_layers(s->layers, &x->target.config, &layers, err);
    }
    for (int i = 0; i < (int)arrlen(layers) && status == 0; i++) {
        if (layers[i] >= x->target.config.n_layers) {
            status = fail(err, "%s reads layer %d, the model has layers 0 to %d", s->av, layers[i], x->target.config.n_layers - 1);
        }
        arrput(x->rung, ((Rung){.layer = layers[i]}));
    }
    arrfree(layers);
    return status;
}

static void explain_close(Explain *x) {
    for (int i = 0; i < (int)arrlen(x->rung); i++) {
        for (int j = 0; x->rung[i].reading && j < (int)arrlen(x->position); j++) {
            Telling *t = x->rung[i].reading[j].telling;
            for (int k = 0; t && k < x->s->samples; k++) {
                free(t[k].text);
                free(t[k].explanation);
            }
            free(t);
        }
        free(x->rung[i].reading);
        free(x->rung[i].vectors);
    }
    arrfree(x->rung);
    arrfree(x->ids);
    arrfree(x->position);
    free(x->baseline);
    reconstructor_close(&x->ar);
    verbalizer_close(&x->av);
    tokenizer_free(x->tok);
    model_free(&x->target);
    if (x->engine) {
        x->engine->close(x->engine);
    }
}

static int explain_layers(Explain *x, Err *err) {
    double start = now(), spoke = 0;
    int n = (int)arrlen(x->position), status = 0;
    for (int i = 0; i < (int)arrlen(x->rung) && status == 0; i++) {
        Rung *r = &x->rung[i];
        r->reading = xcalloc((size_t)n, sizeof(Reading));
        for (int j = 0; j < n; j++) {
            r->reading[j].telling = xcalloc((size_t)x->s->samples, sizeof(Telling));
        }
        mark_outliers(x, r);
        status = find_baseline(x, r, err);
        status = status == 0 ? tell_rung(x, r, &spoke, start, err) : -1;
        status = status == 0 ? score_rung(x, r, err) : -1;
    }
    return status;
}

static int show(const Explain *x, Err *err) {
    size_t len;
    char *json = result_json(x, &len);
    int status = 0;
    if (x->s->html) {
        status = report_explain(x->s->html, json, len, err);
    }
    if (x->s->json) {
        fwrite(json, 1, len, stdout);
    }
    for (int i = 0; i < (int)arrlen(x->rung) && !x->s->json && status == 0; i++) {
        fputs(i ? "\n" : "", stdout);
        print_rung(x, &x->rung[i]);
    }
    free(json);
    if (status == 0 && x->s->html) {
        note(x->s, "%s: open it in a browser\n", x->s->html);
    }
    return status;
}

int run_explain(const Settings *s, Err *err) {
    Explain x = {.s = s};
    double start = now();
    int status = explain_open(&x, err);
    status = status == 0 ? read_text(&x, err) : -1;
    status = status == 0 ? capture_rungs(&x, err) : -1;
    status = status == 0 ? explain_layers(&x, err) : -1;
    status = status == 0 ? show(&x, err) : -1;
    if (status == 0) {
        note(s, "%d tokens, %d read at %d layers in %.1f s; %lld prompt tokens computed, %lld if each had its own prompt\n",
             (int)arrlen(x.ids), (int)arrlen(x.position), (int)arrlen(x.rung), now() - start, (long long)x.av.computed,
             (long long)x.av.flat);
    }
    explain_close(&x);
    return status;
}
