/* method.c - the method itself: a vector goes into the AV's prompt, words come out, the AR makes a vector of them, and the
 * two vectors are compared.
 *
 * Order: decoding over the forest; verbalize (inject, decode, cut out the explanation); reconstruct; scores.
 */
#define _GNU_SOURCE /* memmem */
#include "nla.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <stb/stb_ds.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

/* ------------------------------------------------------------------------------------------------ decoding */

uint64_t random_key(uint64_t seed, uint64_t a, uint64_t b, uint64_t c) {
    uint64_t key[4] = {seed, a, b, c};
    return XXH3_64bits(key, sizeof key);
}

double random_uniform(uint64_t seed, uint64_t a, uint64_t b, uint64_t c) {
    return (double)(random_key(seed, a, b, c) >> 11) * 0x1p-53;
}

int feed(Forest *f, Batch *b, int seg, const int *ids, int n, const Tap *tap, Err *err) {
    for (int i = 0; i < n; i += f->max_rows) {
        batch_clear(b);
        batch_add(b, f, seg, ids + i, n - i < f->max_rows ? n - i : f->max_rows, 0);
        if (model_forward(f, b, NULL, tap, err) != 0) {
            return -1;
        }
    }
    return 0;
}

static bool is_end(const Decoder *d, int id) {
    for (int i = 0; i < (int)arrlen(d->eos); i++) {
        if (d->eos[i] == id) {
            return !d->how.ignore_eos;
        }
    }
    return false;
}

/* Appends a drawn token to its sample, and sees whether the sample is done. */
static void take_token(Decoder *d, Sample *x, int id, float logprob) {
    arrput(x->logprob, logprob);
    x->next = id;
    x->ended = is_end(d, id);
    if (!x->ended) {
        size_t n = 0;
        const char *piece = !d->tok || tokenizer_is_special(d->tok, id) ? NULL : tokenizer_piece(d->tok, id, &n);
        size_t from = arrlenu(x->text), tail = d->stop ? strlen(d->stop) : 0;
        arrput(x->ids, id);
        if (piece && n) {
            memcpy(arraddnptr(x->text, n), piece, n);
        }
        from = from > tail ? from - tail : 0; /* the stop string may have begun in earlier tokens */
        x->stopped = tail && arrlenu(x->text) > from && memmem(x->text + from, arrlenu(x->text) - from, d->stop, tail);
        if (d->token) {
            d->token(d->context, x, piece, piece ? n : 0);
        }
    }
    x->done = x->ended || x->stopped || (int)arrlen(x->ids) >= d->how.max_tokens;
}

/* A step's logits: draws a token for each live sample. */
static void draw_tokens(void *context, Engine *e, const Act *logits, int first, int n) {
    Decoder *d = context;
    const Sampler *s = &d->how.sampler;
    int token[LOGIT_ROWS];
    float logprob[LOGIT_ROWS];
    uint64_t key[LOGIT_ROWS] = {0};
    for (int i = 0; i < n; i++) {
        const Sample *x = &d->sample[d->live[first + i]];
        key[i] = random_key(s->seed, (uint64_t)x->row, (uint64_t)x->sample, (uint64_t)arrlen(x->ids));
    }
    e->sample(e, token, logprob, logits, n, d->vocab_size, s->temperature, s->top_k, s->top_p, key);
    for (int i = 0; i < n; i++) {
        take_token(d, &d->sample[d->live[first + i]], token[i], logprob[i]);
    }
}

int decoder_add(Decoder *d, Forest *f, int parent, int row, int last, int samples, Err *err) {
    for (int i = 0; i < samples; i++) {
        Sample s = {.row = row, .sample = i, .next = last, .seg = forest_add(f, parent, d->how.max_tokens, err)};
        if (s.seg < 0) {
            return -1;
        }
        arrput(d->live, (int)arrlen(d->sample));
        arrput(d->sample, s);
    }
    return 0;
}

int decoder_prompts(Decoder *d, Forest *f, Batch *b, int parent, int *const *prompt, int n, int first_row, int samples, Err *err) {
    batch_clear(b);
    for (int i = 0; i < n; i++) {
        int len = (int)arrlen(prompt[i]) - 1, seg = len > 0 ? forest_add(f, parent, len, err) : parent;
        if (len > 0 && seg < 0) {
            return -1;
        }
        for (int at = 0, take; at < len; at += take) { /* batches run over prompts' borders */
            int room = f->max_rows - (int)arrlen(b->token);
            take = len - at < room ? len - at : room;
            batch_add(b, f, seg, prompt[i] + at, take, 0);
            if (take == room) {
                if (model_forward(f, b, NULL, NULL, err) != 0) {
                    return -1;
                }
                batch_clear(b);
            }
        }
        if (decoder_add(d, f, seg, first_row + i, prompt[i][len], samples, err) != 0) {
            return -1;
        }
    }
    return arrlen(b->token) ? model_forward(f, b, NULL, NULL, err) : 0;
}

int64_t decode(Decoder *d, Forest *f, Batch *b, Err *err) {
    LogitSink sink = {d, draw_tokens};
    int64_t rows = 0;
    while (arrlen(d->live)) {
        batch_clear(b);
        for (int i = 0; i < (int)arrlen(d->live); i++) {
            Sample *x = &d->sample[d->live[i]];
            batch_add(b, f, x->seg, &x->next, 1, 1);
        }
        if (model_forward(f, b, &sink, NULL, err) != 0) {
            return -1;
        }
        rows += arrlen(d->live);
        int kept = 0;
        for (int i = 0; i < (int)arrlen(d->live); i++) {
            if (!d->sample[d->live[i]].done) {
                d->live[kept++] = d->live[i];
            }
        }
        arrsetlen(d->live, kept);
    }
    return rows;
}

double sample_logprob(const Sample *x) {
    double sum = 0;
    for (int i = 0; i < (int)arrlen(x->logprob); i++) {
        sum += (double)x->logprob[i];
    }
    return sum;
}

void decoder_free(Decoder *d) {
    for (int i = 0; i < (int)arrlen(d->sample); i++) {
        arrfree(d->sample[i].ids);
        arrfree(d->sample[i].text);
        arrfree(d->sample[i].logprob);
    }
    arrfree(d->sample);
    arrfree(d->live);
}

/* ------------------------------------------------------------------------------------------------ AV: vector to text */

int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

double vector_norm(const float *v, int d) {
    double squares = 0;
    for (int i = 0; i < d; i++) {
        squares += (double)v[i] * (double)v[i];
    }
    return sqrt(squares);
}

int scaled_vector(float *out, const float *v, int d, float scale, int64_t row, Err *err) {
    double length = vector_norm(v, d);
    if (!isfinite(length) || length == 0) {
        return fail(err, "activation of row %lld is %s; it cannot be injected", (long long)row, length == 0 ? "zero" : "not finite");
    }
    for (int i = 0; i < d; i++) {
        out[i] = scale > 0 ? (float)((double)v[i] * ((double)scale / length)) : v[i];
    }
    return 0;
}

/* An AV ends its texts with the end-of-turn token that it was taught, which a base model's config does not count among its ends. */
static void learned_end(Verbalizer *v) {
    int **eos = &v->model.config.eos, end = av_end_of_turn(v);
    for (int i = 0; i < (int)arrlen(*eos); i++) {
        if ((*eos)[i] == end) {
            return;
        }
    }
    if (end >= 0) {
        arrput(*eos, end);
    }
}

int verbalizer_open(Verbalizer *v, const char *dir, const char *sidecar, double scale, Engine *engine, Err *err) {
    *v = (Verbalizer){0};
    if (adapted_load(&v->model, dir, 0, engine, err) != 0) {
        return -1;
    }
    v->tok = tokenizer_load(v->model.dir, err);
    if (!v->tok || sidecar_load(&v->meta, sidecar ? sidecar : dir, err) != 0) {
        verbalizer_close(v);
        return -1;
    }
    int status = !v->meta.av ? fail(err, "%s: role is not av", v->meta.path) : 0;
    if (status == 0 && isnan(scale) && !v->meta.has_injection_scale) {
        status = fail(err, "%s: extraction.injection_scale is missing; give it with --injection-scale", v->meta.path);
    }
    v->scale = isnan(scale) ? v->meta.injection_scale : (float)scale;
    if (status == 0) {
        status = sidecar_check(&v->meta, v->tok, &v->model.config, dir, err);
    }
    if (status == 0) {
        status = sidecar_prompt(&v->meta, v->tok, NULL, &v->prompt, &v->marker_at, err);
    }
    if (status == 0) {
        learned_end(v);
    }
    if (status != 0) {
        verbalizer_close(v);
    }
    return status;
}

void verbalizer_close(Verbalizer *v) {
    forest_close(&v->forest);
    batch_free(&v->batch);
    model_free(&v->model);
    tokenizer_free(v->tok);
    sidecar_free(&v->meta);
    arrfree(v->prompt);
    *v = (Verbalizer){0};
}

/* Rows of the cache, and the most of one pass. */
static int decoding_rows(const Verbalizer *v, int vectors, int samples, int max_tokens, int *work) {
    int tail = (int)arrlen(v->prompt) - v->marker_at, rows = v->marker_at + CACHE_ALIGN;
    *work = vectors * (samples > tail ? samples : tail);
    *work = *work > v->marker_at ? *work : v->marker_at;
    return rows + vectors * (tail + CACHE_ALIGN + samples * (max_tokens + CACHE_ALIGN));
}

size_t verbalizer_bytes(const Verbalizer *v, int vectors, int samples, int max_tokens) {
    int work, rows = decoding_rows(v, vectors, samples, max_tokens, &work);
    return forest_bytes(&v->model, v->model.config.n_layers, rows, work, FORWARD);
}

/* The forest, with the prompt up to the marker in it: it never depends on the vector, so it is computed once for all. */
static int prepare(Verbalizer *v, int vectors, int samples, int max_tokens, Err *err) {
    Forest *f = &v->forest;
    int work, rows = decoding_rows(v, vectors, samples, max_tokens, &work);
    if (f->cache_rows < rows || f->max_rows < work) {
        forest_close(f);
        if (forest_open(f, &v->model, v->model.config.n_layers, rows, work, FORWARD, err) != 0) {
            return -1;
        }
    }
    forest_cut(f, v->marker_at > 0);
    if (v->marker_at == 0 || arrlen(f->segment) > 0) {
        return 0;
    }
    v->computed += v->marker_at;
    return feed(f, &v->batch, forest_add(f, -1, v->marker_at, err), v->prompt, v->marker_at, NULL, err);
}

void verbalizer_renew(Verbalizer *v) {
    forest_cut(&v->forest, 0);
}

int verbalize(Verbalizer *v, Decoder *d, const float *vectors, int n, int64_t first_row, int samples, const Decoding *how,
              Err *err) {
    int D = v->model.config.hidden_size, length = (int)arrlen(v->prompt), tail = length - v->marker_at - 1;
    *d = (Decoder){.how = *how, .eos = v->model.config.eos, .vocab_size = v->model.config.vocab_size, .tok = v->tok,
                   .stop = how->whole ? NULL : "</explanation>"};
    float *scaled = xmalloc((size_t)n * (size_t)D * sizeof(float));
    int status = prepare(v, n, samples, how->max_tokens, err);
    batch_clear(&v->batch);
    for (int i = 0; i < n && status == 0; i++) {
        status = scaled_vector(scaled + (size_t)i * (size_t)D, vectors + (size_t)i * (size_t)D, D, v->scale, first_row + i, err);
        int seg = status == 0 ? forest_add(&v->forest, v->marker_at > 0 ? 0 : -1, tail, err) : -1;
        status = seg < 0 ? -1 : 0;
        if (status == 0) {
            batch_inject(&v->batch, (int)arrlen(v->batch.token), scaled + (size_t)i * (size_t)D);
            batch_add(&v->batch, &v->forest, seg, v->prompt + v->marker_at, tail, 0);
        }
    }
    if (status == 0) {
        status = model_forward(&v->forest, &v->batch, NULL, NULL, err);
        v->computed += (int64_t)n * tail;
        v->flat += (int64_t)n * samples * length;
    }
    int first_segment = v->marker_at > 0;
    for (int i = 0; i < n && status == 0; i++) {
        status = decoder_add(d, &v->forest, first_segment + i, (int)(first_row + i), v->prompt[length - 1], samples, err);
        v->computed += samples;
    }
    if (status == 0 && decode(d, &v->forest, &v->batch, err) < 0) {
        status = -1;
    }
    free(scaled);
    return status;
}

bool explanation_of(const char *text, size_t len, const char **start, size_t *n) {
    static const char open[] = "<explanation>", shut[] = "</explanation>";
    const char *from = len ? memmem(text, len, open, sizeof open - 1) : NULL;
    if (!from) {
        return false;
    }
    from += sizeof open - 1;
    const char *to = memmem(from, len - (size_t)(from - text), shut, sizeof shut - 1);
    while (to && from < to && strchr(" \n\t\r", *from)) {
        from++;
    }
    while (to && to > from && strchr(" \n\t\r", to[-1])) {
        to--;
    }
    *start = from;
    *n = to ? (size_t)(to - from) : 0;
    return to && to > from;
}

/* ------------------------------------------------------------------------------------------------ AR: text to vector */

int value_head_load(Linear *head, Safetensors *file, const char *dir, int D, Err *err) {
    char *path = xprintf("%s/value_head.safetensors", dir);
    int status = safetensors_open(file, path, err);
    if (status == 0) {
        const Tensor *w = safetensors_find(file, "weight");
        if (!w || w->n_dims != 2 || w->shape[0] != D || w->shape[1] != D ||
            (w->dtype != DT_F32 && w->dtype != DT_BF16 && w->dtype != DT_F16)) {
            status = fail(err, "%s: must hold one tensor 'weight' of [%d, %d]", path, D, D);
        } else {
            *head = (Linear){.n = 1, .w = {*w}, .in = D, .out = D};
        }
    }
    free(path);
    return status;
}

/* The ids that every filled template starts with: those of its text before {explanation}, without the last, which could
 * merge with what follows. */
static int shared_start(Reconstructor *r, Err *err) {
    const char *hole = strstr(r->meta.ar_template, "{explanation}");
    int status = tokenizer_encode(r->tok, r->meta.ar_template, (size_t)(hole - r->meta.ar_template), true, &r->start, err);
    if (status == 0 && arrlen(r->start)) {
        (void)arrpop(r->start);
    }
    return status;
}

int reconstructor_open(Reconstructor *r, const char *dir, const char *sidecar, Engine *engine, Err *err) {
    *r = (Reconstructor){0};
    int status = sidecar_load(&r->meta, sidecar ? sidecar : dir, err);
    if (status != 0 || adapted_load(&r->model, dir, r->meta.layer + 1, engine, err) != 0) {
        sidecar_free(&r->meta);
        return -1;
    }
    r->model.final_norm = (Tensor){0}; /* left over in some checkpoints: an AR has neither */
    r->model.lm_head = (Linear){0};
    r->tok = tokenizer_load(r->model.dir, err);
    status = r->tok ? 0 : -1;
    if (status == 0 && !r->meta.ar) {
        status = fail(err, "%s: role is not ar", r->meta.path);
    }
    if (status == 0) {
        status = sidecar_check(&r->meta, r->tok, &r->model.config, dir, err);
    }
    if (status == 0) {
        status = value_head_load(&r->head, &r->head_file, dir, r->model.config.hidden_size, err);
    }
    if (status == 0) {
        status = shared_start(r, err);
    }
    if (status != 0) {
        reconstructor_close(r);
    }
    return status;
}

void reconstructor_close(Reconstructor *r) {
    if (r->model.engine) {
        r->model.engine->free(r->model.engine, r->last);
        r->model.engine->free(r->model.engine, r->out);
        for (int i = 0; i < (int)arrlen(r->head_file.file); i++) {
            r->model.engine->forget(r->model.engine, r->head_file.file[i].data, r->head_file.file[i].len);
        }
    }
    forest_close(&r->forest);
    batch_free(&r->batch);
    model_free(&r->model);
    tokenizer_free(r->tok);
    sidecar_free(&r->meta);
    safetensors_close(&r->head_file);
    arrfree(r->start);
    arrfree(r->end_row);
    *r = (Reconstructor){0};
}

/* Each text's last token, after the last block: no final norm. */
static void keep_last(void *context, Engine *e, const char *module, int layer, const Act *data, int first, int rows, int width) {
    (void)first, (void)rows;
    Reconstructor *r = context;
    if (!*module && layer == r->model.config.n_layers - 1 && arrlen(r->end_row)) {
        e->gather(e, r->last, data, r->end_row, (int)arrlen(r->end_row), width);
    }
}

enum { AR_ROWS = 2048, AR_TEXTS = 256 }; /* tokens and texts of one forward pass */

size_t reconstructor_bytes(const Reconstructor *r) {
    size_t width = (size_t)AR_TEXTS * (size_t)r->model.config.hidden_size;
    return 2 * width * dtype_size(r->model.engine->act_dtype) +
           forest_bytes(&r->model, r->model.config.n_layers, (int)arrlen(r->start) + AR_ROWS + CACHE_ALIGN * (AR_TEXTS + 1), AR_ROWS, FORWARD);
}

/* Room for a pass of `longest` tokens or more, with the template's start in the cache. */
static int ar_prepare(Reconstructor *r, int longest, Err *err) {
    Engine *e = r->model.engine;
    int rows = longest > AR_ROWS ? longest : AR_ROWS, start = (int)arrlen(r->start);
    size_t width = (size_t)AR_TEXTS * (size_t)r->model.config.hidden_size;
    if (r->forest.max_rows < rows) {
        forest_close(&r->forest);
        r->last = r->last ? r->last : e->alloc(e, e->act_dtype, width);
        r->out = r->out ? r->out : e->alloc(e, e->act_dtype, width);
        if (!r->last || !r->out) {
            return fail(err, "not enough memory to reconstruct %d texts at once", AR_TEXTS);
        }
        if (forest_open(&r->forest, &r->model, r->model.config.n_layers, start + rows + CACHE_ALIGN * (AR_TEXTS + 1), rows, FORWARD, err) != 0) {
            return -1;
        }
        arrsetlen(r->end_row, 0);
        if (start > 0 && feed(&r->forest, &r->batch, forest_add(&r->forest, -1, start, err), r->start, start, NULL, err) != 0) {
            return -1;
        }
        batch_clear(&r->batch);
    }
    return 0;
}

/* Runs the batch and writes one vector a text. */
static int ar_flush(Reconstructor *r, float *out, Err *err) {
    Engine *e = r->model.engine;
    int n = (int)arrlen(r->end_row), D = r->model.config.hidden_size;
    Tap tap = {r, keep_last};
    if (n == 0) {
        return 0;
    }
    if (model_forward(&r->forest, &r->batch, NULL, &tap, err) != 0) {
        return -1;
    }
    e->linear(e, r->out, r->last, &r->head, n);
    e->read(e, out, r->out, 0, (size_t)n * (size_t)D);
    batch_clear(&r->batch);
    arrsetlen(r->end_row, 0);
    forest_cut(&r->forest, arrlen(r->start) > 0);
    return 0;
}

bool ar_shares_start(const Reconstructor *r, const int *ids) {
    size_t start = arrlenu(r->start);
    return start > 0 && arrlenu(ids) > start && memcmp(ids, r->start, start * sizeof(int)) == 0;
}

int reconstruct(Reconstructor *r, const char *const *text, const size_t *len, int n, float *out, Err *err) {
    int start = (int)arrlen(r->start), D = r->model.config.hidden_size, done = 0, *ids = NULL, status = 0;
    batch_clear(&r->batch);
    arrsetlen(r->end_row, 0);
    for (int i = 0; i < n && status == 0; i++) {
        arrsetlen(ids, 0);
        status = sidecar_text_ids(&r->meta, r->tok, text[i], len[i], &ids, err);
        int length = (int)arrlen(ids), used = (int)arrlen(r->batch.token);
        bool shared = status == 0 && ar_shares_start(r, ids);
        int from = shared ? start : 0;
        if (status == 0 && (used + length - from > AR_ROWS || arrlen(r->end_row) == AR_TEXTS)) {
            status = ar_flush(r, out + (size_t)done * (size_t)D, err);
            done = i;
        }
        if (status == 0) { /* grows only for a text longer than AR_ROWS, and then the batch has just been emptied */
            status = ar_prepare(r, length, err);
        }
        int seg = status == 0 ? forest_add(&r->forest, shared ? 0 : -1, length - from, err) : -1;
        if (seg >= 0) {
            batch_add(&r->batch, &r->forest, seg, ids + from, length - from, 0);
            arrput(r->end_row, (int)arrlen(r->batch.token) - 1);
        } else {
            status = -1;
        }
    }
    if (status == 0) {
        status = ar_flush(r, out + (size_t)done * (size_t)D, err);
    }
    arrfree(ids);
    return status;
}

/* ------------------------------------------------------------------------------------------------ scores */

double cosine(const float *a, const float *b, int d) {
    double dot = 0, length = vector_norm(a, d) * vector_norm(b, d);
    for (int i = 0; i < d; i++) {
        dot += (double)a[i] * (double)b[i];
    }
    return length > 0 ? dot / length : 0;
}

double mse_nrm(const float *pred, const float *gold, int d, double mse_scale) {
    return 2 * (1 - cosine(pred, gold, d)) * mse_scale * mse_scale / d;
}

void baseline_add(Baseline *b, const float *v, int d) {
    double length = vector_norm(v, d);
    b->sum = b->sum ? b->sum : xcalloc((size_t)d, sizeof(double));
    for (int i = 0; i < d && length > 0; i++) {
        b->sum[i] += (double)v[i] / length;
    }
    b->n++;
}

/* All n_s(v) have length s, so the mean squared distance from their mean is s^2 - |mean|^2. */
double baseline_var(const Baseline *b, int d) {
    double squares = 0;
    for (int i = 0; i < d && b->n; i++) {
        squares += b->sum[i] / (double)b->n * (b->sum[i] / (double)b->n);
    }
    return 1 - squares;
}

void baseline_free(Baseline *b) {
    free(b->sum);
    *b = (Baseline){0};
}
