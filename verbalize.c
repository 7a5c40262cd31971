/* verbalize.c - the two halves of the method as commands: verbalize (activations of a dataset to words, a JSON line a sample)
 * and reconstruct (words to vectors, scored against the activations they are about).
 */
#include "nla.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <stb/stb_ds.h>

/* ------------------------------------------------------------------------------------------------ nla verbalize */

static void write_reading(FILE *out, const Settings *s, const Sample *x, const Json *row) {
    const char *start;
    size_t n, len = arrlenu(x->text);
    bool found = explanation_of(x->text, len, &start, &n);
    fprintf(out, "{\"row\": %d, \"sample\": %d, ", x->row, x->sample);
    for (int k = row ? json_first(row, 0) : -1; k >= 0; k = json_next(row, k)) { /* doc_id and n_raw_tokens go along */
        int64_t tokens;
        if (json_is(row, k, "doc_id")) {
            size_t id_len;
            char *id = json_string(row, k + 1, &id_len);
            fputs("\"doc_id\": ", out);
            json_write_string(out, id ? id : "", id ? id_len : 0);
            fputs(", ", out);
            free(id);
        } else if (json_is(row, k, "n_raw_tokens") && json_int(row, k + 1, &tokens)) {
            fprintf(out, "\"n_raw_tokens\": %lld, ", (long long)tokens);
        }
    }
    fputs("\"explanation\": ", out);
    if (found) {
        json_write_string(out, start, n);
    } else {
        fputs("null", out);
    }
    fputs(", \"text\": ", out);
    json_write_string(out, x->text, len);
    fprintf(out, ", \"tokens\": %d, \"logprob\": %.6f, \"failed\": %s, \"truncated\": %s", (int)arrlen(x->logprob), sample_logprob(x),
            found ? "false" : "true", x->ended || x->stopped ? "false" : "true");
    for (int i = 0; s->logprobs && i < (int)arrlen(x->logprob); i++) {
        fprintf(out, i ? ", %.6g" : ", \"logprobs\": [%.6g", (double)x->logprob[i]);
    }
    fputs(s->logprobs && arrlen(x->logprob) ? "]}\n" : "}\n", out);
}

static int verbalize_rows(Verbalizer *v, const Dataset *d, const Settings *s, FILE *out, Err *err) {
    int group = group_size(s), status = 0;
    double start = now(), spoke = 0;
    int64_t tokens = 0;
    Decoding how = decoding_of(s);
    float *vectors = xmalloc((size_t)group * (size_t)d->d_model * sizeof(float));
    for (int64_t i = 0; i < d->n && status == 0; i += group) {
        int n = (int)(d->n - i < group ? d->n - i : group);
        Decoder decoder;
        for (int j = 0; j < n; j++) {
            dataset_vector(d, i + j, vectors + (size_t)j * (size_t)d->d_model);
        }
        status = verbalize(v, &decoder, vectors, n, i, s->samples, &how, err);
        for (int j = 0; j < (int)arrlen(decoder.sample) && status == 0; j++) {
            Json row;
            bool has_row = d->line != NULL;
            status = has_row ? dataset_row(d, decoder.sample[j].row, &row, err) : 0;
            if (status == 0) {
                write_reading(out, s, &decoder.sample[j], has_row ? &row : NULL);
                tokens += arrlen(decoder.sample[j].logprob);
            }
            if (status == 0 && has_row) {
                json_free(&row);
            }
        }
        decoder_free(&decoder);
        progress(s, &spoke, start, (double)(i + n), "vectors", (double)(i + n) / (double)d->n, i + n == d->n && status == 0);
    }
    double t = now() - start;
    note(s, "%lld tokens drawn in %.2f s, %.1f tokens/s; %lld prompt tokens computed, %lld if each sample had its own prompt\n",
         (long long)tokens, t, (double)tokens / t, (long long)v->computed, (long long)v->flat);
    free(vectors);
    return status;
}

/* The file results go to under its temporary name, or stdout. */
static FILE *open_results(const char *path, char **temp, Err *err) {
    *temp = NULL;
    if (!path || strcmp(path, "-") == 0) {
        return stdout;
    }
    *temp = xprintf("%s.tmp-%ld", path, (long)getpid());
    FILE *out = fopen(*temp, "w");
    if (!out) {
        fail(err, "%s: cannot write: %s", path, strerror(errno));
        free(*temp);
        *temp = NULL;
    }
    return out;
}

static int close_results(FILE *out, const char *path, char *temp, int status, Err *err) {
    if (!temp) {
        return status;
    }
    bool written = fflush(out) == 0 && fsync(fileno(out)) == 0;
    written = fclose(out) == 0 && written;
    if (status == 0 && (!written || rename(temp, path) != 0)) {
        status = fail(err, "%s: cannot write: %s", path, strerror(errno));
    }
    if (status != 0) {
        unlink(temp);
    }
    free(temp);
    return status;
}

int run_verbalize(const Settings *s, Err *err) {
    Engine *engine = NULL;
    Verbalizer v;
    Dataset d;
    char *temp;
    if (need(s->av, "av", s, err) != 0 || need(s->acts, "acts", s, err) != 0 || open_engine(&engine, s, err) != 0) {
        return -1;
    }
    int status = verbalizer_open(&v, s->av, s->sidecar, s->injection_scale, engine, err);
    if (status == 0) {
        status = dataset_open(&d, s->acts, err);
        if (status == 0 && d.d_model != v.model.config.hidden_size) {
            status = fail(err, "%s: vectors have width %d, the AV in %s %d", s->acts, d.d_model, s->av, v.model.config.hidden_size);
        }
        FILE *out = status == 0 ? open_results(s->out, &temp, err) : NULL;
        status = out ? close_results(out, s->out, temp, verbalize_rows(&v, &d, s, out, err), err) : -1;
        if (d.path) {
            dataset_close(&d);
        }
        verbalizer_close(&v);
    }
    engine->close(engine);
    return status;
}

/* ------------------------------------------------------------------------------------------------ nla reconstruct */

typedef struct {
    char **text;     /* stb: explanations */
    size_t *len;     /* stb */
    int64_t *row;    /* stb: of the vector each explains */
    int64_t *sample; /* stb */
    int64_t failed;  /* rows without an explanation: left out */
} Explanations;

static void explanations_free(Explanations *x) {
    for (int i = 0; i < (int)arrlen(x->text); i++) {
        free(x->text[i]);
    }
    arrfree(x->text);
    arrfree(x->len);
    arrfree(x->row);
    arrfree(x->sample);
}

/* JSONL of `nla verbalize`, or of anyone: "explanation" (null: failed) or "text"; row and sample default to the line and 0. */
static int read_explanation(Explanations *x, const Json *j, int64_t line, Err *err) {
    int node = json_get(j, 0, "explanation");
    node = node < 0 ? json_get(j, 0, "text") : node;
    int64_t row = line, sample = 0;
    size_t len;
    if (json_type(j, node) == JSON_NULL) {
        x->failed++;
        return 0;
    }
    char *text = json_string(j, node, &len);
    if (!text) {
        return fail(err, "%s: line %lld has no explanation (a string, or null)", j->file, (long long)line + 1);
    }
    json_int(j, json_get(j, 0, "row"), &row);
    json_int(j, json_get(j, 0, "sample"), &sample);
    arrput(x->text, text);
    arrput(x->len, len);
    arrput(x->row, row);
    arrput(x->sample, sample);
    return 0;
}

static int read_explanations(Explanations *x, const char *path, Err *err) {
    FILE *in = strcmp(path, "-") == 0 ? stdin : fopen(path, "r");
    char *text = NULL;
    size_t room = 0;
    ssize_t n;
    int64_t line = 0;
    int status = in ? 0 : fail(err, "%s: %s", path, strerror(errno));
    while (status == 0 && (n = getline(&text, &room, in)) >= 0) {
        Json j;
        status = json_parse(&j, text, (size_t)n, path, err);
        if (status == 0) {
            status = read_explanation(x, &j, line++, err);
            json_free(&j);
        }
    }
    if (status == 0 && ferror(in)) {
        status = fail(err, "%s: %s", path, strerror(errno));
    }
    free(text);
    if (in && in != stdin) {
        fclose(in);
    }
    return status == 0 && arrlen(x->text) == 0 ? fail(err, "%s: holds no explanation (%lld failed)", path, (long long)x->failed)
                                               : status;
}

/* Scores of the reconstructed vectors against the dataset they were read from. */
static int print_scores(const Settings *s, const Explanations *x, const float *out, int width, double mse_scale, Err *err) {
    Dataset d;
    if (dataset_open(&d, s->acts, err) != 0) {
        return -1;
    }
    int status = d.d_model == width ? 0 : fail(err, "%s: vectors have width %d, the AR gives %d", s->acts, d.d_model, width);
    double mse = 0, cos = 0;
    float *gold = xmalloc((size_t)width * sizeof(float));
    Baseline base = {0};
    for (int64_t i = 0; status == 0 && i < d.n; i++) {
        dataset_vector(&d, i, gold);
        baseline_add(&base, gold, width);
    }
    for (int i = 0; i < (int)arrlen(x->text) && status == 0; i++) {
        if (x->row[i] < 0 || x->row[i] >= d.n) {
            status = fail(err, "%s: row %lld is not among the %lld activations of %s", s->in, (long long)x->row[i], (long long)d.n, s->acts);
            break;
        }
        dataset_vector(&d, x->row[i], gold);
        mse += mse_nrm(out + (size_t)i * (size_t)width, gold, width, mse_scale);
        cos += cosine(out + (size_t)i * (size_t)width, gold, width);
    }
    if (status == 0) {
        double n = (double)arrlen(x->text), scale = mse_scale * mse_scale / width, var = baseline_var(&base, width) * scale;
        if (s->json) {
            printf("{\"texts\": %.0f, \"failed\": %lld, \"mse_nrm\": %.6f, \"cos\": %.6f, \"var_nrm\": %.6f, \"fve_nrm\": %.6f}\n", n,
                   (long long)x->failed, mse / n, cos / n, var, 1 - mse / n / var);
        } else {
            printf("%.0f texts, %lld failed: mse_nrm %.4f, cos %.4f, FVE %.4f (var_nrm %.4f over the %lld activations of %s)\n", n,
                   (long long)x->failed, mse / n, cos / n, 1 - mse / n / var, var, (long long)d.n, s->acts);
        }
    }
    baseline_free(&base);
    free(gold);
    dataset_close(&d);
    return status;
}

int run_reconstruct(const Settings *s, Err *err) {
    Engine *engine = NULL;
    Reconstructor r;
    Explanations x = {0};
    if (need(s->ar, "ar", s, err) != 0 || need(s->in, "in", s, err) != 0 || need(s->out, "out", s, err) != 0 ||
        open_engine(&engine, s, err) != 0) {
        return -1;
    }
    int status = reconstructor_open(&r, s->ar, s->sidecar, engine, err);
    if (status == 0) {
        int width = r.model.config.hidden_size;
        double start = now();
        status = read_explanations(&x, s->in, err);
        int n = (int)arrlen(x.text);
        float *out = xmalloc((size_t)(n + 1) * (size_t)width * sizeof(float));
        status = status == 0 ? reconstruct(&r, (const char *const *)x.text, x.len, n, out, err) : -1;
        if (status == 0) {
            Tensor t[] = {{.name = "activation_vector", .dtype = DT_F32, .n_dims = 2, .shape = {n, width}, .data = out,
                           .bytes = (size_t)n * (size_t)width * sizeof(float)},
                          {.name = "row", .dtype = DT_I64, .n_dims = 1, .shape = {n}, .data = x.row, .bytes = (size_t)n * 8},
                          {.name = "sample", .dtype = DT_I64, .n_dims = 1, .shape = {n}, .data = x.sample, .bytes = (size_t)n * 8}};
            note(s, "%d texts in %.2f s, %lld failed rows left out\n", n, now() - start, (long long)x.failed);
            status = safetensors_save(s->out, t, 3, err);
        }
        if (status == 0 && s->acts) {
            status = print_scores(s, &x, out, width, (double)r.meta.mse_scale, err);
        }
        free(out);
        explanations_free(&x);
        reconstructor_close(&r);
    }
    engine->close(engine);
    return status;
}
