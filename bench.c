/* bench.c - how the program is diffed and measured: every intermediate of a forward pass written out under the names of
 * transformers' modules, and the speed of an op, of a forward pass, of decoding and of loading. It computes nothing of its own.
 */
#include "nla.h"

#include <stdlib.h>
#include <string.h>

#include <stb/stb_ds.h>

/* ------------------------------------------------------------------------------------------------ nla dump */

typedef struct {
    const char *only; /* substring of the names to keep, or NULL */
    int rows;
    Tensor *tensor; /* stb; names and data owned */
} Dump;

/* The buffer of the tensor of that name, made when it is first seen. Takes the name. */
static float *dump_place(Dump *d, char *name, int width) {
    for (int i = 0; i < (int)arrlen(d->tensor); i++) {
        if (strcmp(d->tensor[i].name, name) == 0) {
            free(name);
            return (float *)d->tensor[i].data;
        }
    }
    Tensor t = {.name = name, .dtype = DT_F32, .n_dims = 2, .shape = {d->rows, width},
                .bytes = (size_t)d->rows * (size_t)width * sizeof(float)};
    float *data = xmalloc(t.bytes);
    t.data = data;
    arrput(d->tensor, t);
    return data;
}

static void keep_output(void *context, Engine *e, const char *module, int layer, const Act *data, int first, int rows,
                        int width) {
    Dump *d = context;
    char *name = layer < 0 ? xstrdup(module) : xprintf("model.layers.%d%s%s", layer, *module ? "." : "", module);
    if (d->only && !strstr(name, d->only)) {
        free(name);
        return;
    }
    e->read(e, dump_place(d, name, width) + (size_t)first * (size_t)width, data, 0, (size_t)rows * (size_t)width);
}

static void ignore_logits(void *context, Engine *e, const Act *logits, int first, int n) {
    (void)context, (void)e, (void)logits, (void)first, (void)n; /* the tap has seen them */
}

static int dump_forward(Dump *d, const Loaded *l, const int *ids, int n, Err *err) {
    Forest f;
    if (forest_open(&f, (Model *)&l->model, l->model.config.n_layers, n, n, FORWARD, err) != 0) {
        return -1;
    }
    Batch b = {0};
    Tap tap = {d, keep_output};
    LogitSink sink = {NULL, ignore_logits};
    int seg = forest_add(&f, -1, n, err);
    batch_add(&b, &f, seg, ids, n, 2);
    int status = model_forward(&f, &b, l->model.lm_head.n ? &sink : NULL, &tap, err);
    batch_free(&b);
    forest_close(&f);
    return status;
}

int run_dump(const Settings *s, Err *err) {
    Loaded l;
    if (need(s->out, "out", s, err) != 0 || load_all(&l, s, !s->ids, err) != 0) {
        return -1;
    }
    int *ids = NULL, status = prompt_ids(&l, s, &ids, err);
    int64_t *input = NULL;
    Dump d = {.only = s->only, .rows = (int)arrlen(ids)};
    if (status == 0) {
        for (int i = 0; i < d.rows; i++) {
            arrput(input, (int64_t)ids[i]);
        }
        arrput(d.tensor, ((Tensor){.name = xstrdup("input_ids"), .dtype = DT_I64, .n_dims = 1, .shape = {d.rows},
                                   .data = input, .bytes = (size_t)d.rows * sizeof(int64_t)}));
        status = dump_forward(&d, &l, ids, d.rows, err);
    }
    if (status == 0) {
        status = safetensors_save(s->out, d.tensor, (int)arrlen(d.tensor), err);
    }
    if (status == 0) {
        note(s, "%s: %d tensors of %d tokens\n", s->out, (int)arrlen(d.tensor), d.rows);
        if (s->json) {
            printf("{\"tensors\": %d, \"tokens\": %d}\n", (int)arrlen(d.tensor), d.rows);
        }
    }
    for (int i = 0; i < (int)arrlen(d.tensor); i++) {
        free((char *)d.tensor[i].name);
        if (i > 0) {
            free((void *)d.tensor[i].data);
        }
    }
    arrfree(d.tensor);
    arrfree(input);
    arrfree(ids);
    unload(&l);
    return status;
}

/* ------------------------------------------------------------------------------------------------ nla bench */

/* Prints what `repeat` runs of one measurement took: median, least and most, and work done a second. */
static void report_times(const Settings *s, const char *name, double *seconds, int n, double work, const char *unit) {
    qsort(seconds, (size_t)n, sizeof *seconds, by_value);
    double median = n % 2 ? seconds[n / 2] : (seconds[n / 2 - 1] + seconds[n / 2]) / 2;
    if (s->json) {
        printf("{\"name\": \"%s\", \"median_s\": %.9f, \"min_s\": %.9f, \"max_s\": %.9f, \"rate\": %.6g, \"unit\": \"%s\"}\n",
               name, median, seconds[0], seconds[n - 1], work / median, unit);
    } else {
        printf("%-34s %10.3f ms  (%.3f to %.3f)  %10.1f %s\n", name, median * 1e3, seconds[0] * 1e3, seconds[n - 1] * 1e3,
               work / median, unit);
    }
    fflush(stdout);
}

/* Numbers spread over (-1, 1), the same every time. */
static void fill_random(float *x, size_t n, uint64_t key) {
    for (size_t i = 0; i < n; i++) {
        x[i] = (float)(2 * random_uniform(0, key, i, 0) - 1);
    }
}

/* y [N,O] = x [N,I] W^T on random data. --shape N,I,O; weights fp32, and bf16 with --bf16. */
static int bench_linear(const Settings *s, Engine *e, Err *err) {
    int N, I, O;
    if (sscanf(s->shape ? s->shape : "", "%d,%d,%d", &N, &I, &O) != 3 || N < 1 || I < 1 || O < 1 ||
        (double)N * I > 1e9 || (double)I * O > 1e9 || (double)N * O > 1e9) {
        return fail(err, "bench linear needs --shape ROWS,IN,OUT, such as --shape 2048,576,1536");
    }
    size_t weights = (size_t)I * (size_t)O, inputs = (size_t)N * (size_t)I;
    float *w = xmalloc(weights * sizeof(float)), *host = xmalloc(inputs * sizeof(float));
    uint16_t *narrow = xmalloc(weights * sizeof(uint16_t));
    fill_random(w, weights, 1);
    fill_random(host, inputs, 2);
    for (size_t i = 0; i < weights; i++) {
        narrow[i] = f32_to_bf16(w[i]);
    }
    Act *x = e->alloc(e, e->act_dtype, inputs), *y = e->alloc(e, e->act_dtype, (size_t)N * (size_t)O);
    int status = x && y ? 0 : fail(err, "not enough memory for --shape %s", s->shape);
    if (status == 0) {
        e->write(e, x, 0, host, inputs);
        Linear linear = {.n = 1, .in = I, .out = O,
                         .w = {{.dtype = s->bf16 ? DT_BF16 : DT_F32, .n_dims = 2, .shape = {O, I},
                                .data = s->bf16 ? (void *)narrow : (void *)w}}};
        double *seconds = xcalloc((size_t)s->repeat, sizeof(double));
        for (int i = -1; i < s->repeat; i++) { /* -1: warm-up */
            double start = now();
            e->linear(e, y, x, &linear, N);
            seconds[i < 0 ? 0 : i] = now() - start;
        }
        report_times(s, "linear", seconds, s->repeat, 2e-9 * N * I * O, "GFLOP/s");
        free(seconds);
    }
    e->free(e, x);
    e->free(e, y);
    e->forget(e, w, weights * sizeof(float));
    e->forget(e, narrow, weights * sizeof(uint16_t));
    free(w);
    free(host);
    free(narrow);
    return status;
}

/* 2,048 packed tokens (documents of --max-length), all blocks, logits of each document's last token. */
static int bench_forward(const Settings *s, const Loaded *l, Err *err) {
    int total = 2048, length = s->max_length < total ? s->max_length : total;
    Forest f;
    Batch b = {0};
    if (forest_open(&f, (Model *)&l->model, l->model.config.n_layers, total + CACHE_ALIGN * (total / length + 1), total, FORWARD, err) != 0) {
        return -1;
    }
    LogitSink sink = {NULL, ignore_logits};
    double *seconds = xcalloc((size_t)s->repeat, sizeof(double));
    int *ids = xcalloc((size_t)total, sizeof(int)), status = 0;
    for (int i = 0; i < total; i++) {
        ids[i] = (int)(random_uniform(0, 3, (uint64_t)i, 0) * l->model.config.vocab_size);
    }
    for (int i = -1; i < s->repeat && status == 0; i++) {
        forest_cut(&f, 0);
        batch_clear(&b);
        for (int at = 0; at < total; at += length) {
            int n = total - at < length ? total - at : length;
            batch_add(&b, &f, forest_add(&f, -1, n, err), ids + at, n, 1);
        }
        double start = now();
        status = model_forward(&f, &b, &sink, NULL, err);
        seconds[i < 0 ? 0 : i] = now() - start;
    }
    if (status == 0) {
        report_times(s, "forward of 2048 packed tokens", seconds, s->repeat, total, "tokens/s");
    }
    free(ids);
    free(seconds);
    batch_free(&b);
    forest_close(&f);
    return status;
}

/* --samples samples of one prompt of 100 tokens, --max-tokens each, end tokens ignored. */
static int bench_decode(const Settings *s, const Loaded *l, Err *err) {
    enum { PROMPT = 100 };
    Decoding how = decoding_of(s);
    how.ignore_eos = true;
    int ids[PROMPT], rows = s->samples, status = 0;
    for (int i = 0; i < PROMPT; i++) {
        ids[i] = (int)(random_uniform(0, 4, (uint64_t)i, 0) * l->model.config.vocab_size);
    }
    Forest f;
    Batch b = {0};
    if (forest_open(&f, (Model *)&l->model, l->model.config.n_layers, PROMPT + CACHE_ALIGN + rows * (s->max_tokens + CACHE_ALIGN),
                    rows > PROMPT ? rows : PROMPT, FORWARD, err) != 0) {
        return -1;
    }
    double *seconds = xcalloc((size_t)s->repeat, sizeof(double));
    for (int i = -1; i < s->repeat && status == 0; i++) { /* -1: warm-up */
        Decoder d = {.how = how, .vocab_size = l->model.config.vocab_size};
        forest_cut(&f, 0);
        double start = now();
        int root = forest_add(&f, -1, PROMPT - 1, err);
        status = feed(&f, &b, root, ids, PROMPT - 1, NULL, err);
        status = status == 0 ? decoder_add(&d, &f, root, 0, ids[PROMPT - 1], rows, err) : -1;
        status = status == 0 && decode(&d, &f, &b, err) >= 0 ? 0 : -1;
        seconds[i < 0 ? 0 : i] = now() - start;
        decoder_free(&d);
    }
    if (status == 0) {
        char name[64];
        snprintf(name, sizeof name, "decode of %d rows x %d tokens", rows, s->max_tokens);
        report_times(s, name, seconds, s->repeat, (double)rows * s->max_tokens, "tokens/s");
    }
    free(seconds);
    batch_free(&b);
    forest_close(&f);
    return status;
}

/* One sample of one vector with a prompt of its own, as if there were no forest. */
static int decode_alone(Verbalizer *v, Forest *f, Batch *b, Decoder *d, const float *vector, int row, int sample, Err *err) {
    int n = (int)arrlen(v->prompt) - 1;
    forest_cut(f, 0);
    batch_clear(b);
    int root = forest_add(f, -1, n, err);
    batch_inject(b, v->marker_at, vector);
    batch_add(b, f, root, v->prompt, n, 0);
    if (model_forward(f, b, NULL, NULL, err) != 0 || decoder_add(d, f, root, row, v->prompt[n], 1, err) != 0) {
        return -1;
    }
    arrlast(d->sample).sample = sample;
    return decode(d, f, b, err) < 0 ? -1 : 0;
}

static int decode_each_alone(Verbalizer *v, Decoder *d, const float *vectors, int n, int samples, Err *err) {
    int D = v->model.config.hidden_size, length = (int)arrlen(v->prompt), status = 0;
    Forest f;
    Batch b = {0};
    float *scaled = xmalloc((size_t)D * sizeof(float));
    if (forest_open(&f, &v->model, v->model.config.n_layers, length + d->how.max_tokens + 2 * CACHE_ALIGN, length, FORWARD, err) != 0) {
        free(scaled);
        return -1;
    }
    for (int i = 0; i < n * samples && status == 0; i++) {
        const float *vector = vectors + (size_t)(i / samples) * (size_t)D;
        status = scaled_vector(scaled, vector, D, v->scale, i / samples, err);
        status = status == 0 ? decode_alone(v, &f, &b, d, scaled, i / samples, i % samples, err) : -1;
    }
    batch_free(&b);
    forest_close(&f);
    free(scaled);
    return status;
}

/* The AV over the forest against one decode a sample: the same tokens, prompt tokens computed, time. */
static int bench_verbalize(const Settings *s, Engine *e, Err *err) {
    Verbalizer v = {0};
    Dataset data = {0};
    if (need(s->av, "av", s, err) != 0 || need(s->acts, "acts", s, err) != 0 ||
        verbalizer_open(&v, s->av, s->sidecar, s->injection_scale, e, err) != 0) {
        return -1;
    }
    int D = v.model.config.hidden_size, status = dataset_open(&data, s->acts, err), n = 0, same = 0;
    if (status == 0 && data.d_model != D) {
        status = fail(err, "%s: vectors have width %d, the AV in %s %d", s->acts, data.d_model, s->av, D);
    }
    n = status != 0 ? 0 : s->rows > 0 && s->rows < data.n ? s->rows : (int)(data.n < 64 ? data.n : 64);
    float *vectors = xmalloc((size_t)(n + 1) * (size_t)D * sizeof(float));
    for (int i = 0; i < n; i++) {
        dataset_vector(&data, i, vectors + (size_t)i * (size_t)D);
    }
    Decoding how = decoding_of(s);
    Decoder together = {0}, alone = {0};
    double start = now(), seconds[2] = {0};
    status = status == 0 ? verbalize(&v, &together, vectors, n, 0, s->samples, &how, err) : -1;
    seconds[0] = now() - start;
    start = now();
    if (status == 0) {
        alone = (Decoder){.how = how, .eos = together.eos, .vocab_size = together.vocab_size, .tok = v.tok, .stop = together.stop};
        status = decode_each_alone(&v, &alone, vectors, n, s->samples, err);
        seconds[1] = now() - start;
    }
    int64_t tokens = 0, total = (int64_t)n * s->samples;
    for (int i = 0; i < (int)arrlen(alone.sample) && status == 0; i++) {
        const Sample *a = &together.sample[i], *b = &alone.sample[i];
        size_t drawn = arrlenu(a->ids);
        same += arrlenu(b->ids) == drawn && (drawn == 0 || memcmp(a->ids, b->ids, drawn * sizeof(int)) == 0);
        tokens += arrlen(a->logprob);
    }
    if (status == 0) {
        report_times(s, "the forest", &seconds[0], 1, (double)tokens, "tokens/s");
        report_times(s, "one decode a sample", &seconds[1], 1, (double)tokens, "tokens/s");
        note(s, "%d of %lld texts the same, token for token; prompt tokens computed: %lld, one prompt a sample: %lld (%.1f times)\n",
             same, (long long)total, (long long)v.computed, (long long)v.flat, (double)v.flat / (double)v.computed);
        note(s, "time: %.2f times\n", seconds[1] / seconds[0]);
        status = same == total ? 0 : fail(err, "%lld texts differ between the forest and one decode a sample",
                                          (long long)total - same);
    }
    decoder_free(&together);
    decoder_free(&alone);
    free(vectors);
    dataset_close(&data);
    verbalizer_close(&v);
    return status;
}

/* Files to first use: weights mapped and checked, tokenizer built. */
static int bench_load(const Settings *s, Engine *e, Err *err) {
    double *model = xcalloc((size_t)s->repeat, sizeof(double)), *tokenizer = xcalloc((size_t)s->repeat, sizeof(double));
    int status = 0;
    for (int i = 0; i < s->repeat && status == 0; i++) {
        Model m;
        double start = now();
        status = model_load(&m, s->model, e, err);
        if (status == 0) {
            model_free(&m);
            model[i] = now() - start;
            start = now();
            Tokenizer *tok = tokenizer_load(s->model, err);
            tokenizer[i] = now() - start;
            status = tok ? 0 : -1;
            tokenizer_free(tok);
        }
    }
    if (status == 0) {
        report_times(s, "weights mapped and checked", model, s->repeat, 1, "loads/s");
        report_times(s, "tokenizer read", tokenizer, s->repeat, 1, "loads/s");
    }
    free(model);
    free(tokenizer);
    return status;
}

static int bench_table(const Settings *s, Err *err) {
    Engine *e = NULL;
    int status = open_engine(&e, s, err);
    status = status == 0 ? bench_ops(s, e, err) : -1;
    if (e) {
        e->close(e);
    }
    return status;
}

int run_bench(const Settings *s, Err *err) {
    if (s->ops || s->e2e) {
        return s->ops && s->e2e ? fail(err, "--ops and --e2e are two benches; ask for one") : s->ops ? bench_table(s, err) : bench_e2e(s, err);
    }
    if (arrlen(s->argument) > 1) {
        return fail(err, "bench measures one thing at a time; '%s' is one too many", s->argument[1]);
    }
    const char *what = arrlen(s->argument) ? s->argument[0] : "all";
    bool all = strcmp(what, "all") == 0;
    const char *const parts[] = {"linear", "load", "forward", "decode", "verbalize"};
    bool known = all;
    for (int i = 0; i < 5; i++) {
        known = known || strcmp(what, parts[i]) == 0;
    }
    if (!known) {
        return fail(err, "bench measures linear, load, forward, decode, verbalize or all; not '%s'", what);
    }
    Loaded l = {0};
    int status;
    if (strcmp(what, "linear") == 0) {
        status = open_engine(&l.engine, s, err);
        status = status == 0 ? bench_linear(s, l.engine, err) : -1;
    } else if (strcmp(what, "verbalize") == 0) {
        status = open_engine(&l.engine, s, err);
        status = status == 0 ? bench_verbalize(s, l.engine, err) : -1;
    } else {
        status = load_all(&l, s, false, err);
        if (status == 0 && (all || strcmp(what, "load") == 0)) {
            status = bench_load(s, l.engine, err);
        }
        if (status == 0 && (all || strcmp(what, "forward") == 0)) {
            status = bench_forward(s, &l, err);
        }
        if (status == 0 && (all || strcmp(what, "decode") == 0)) {
            status = bench_decode(s, &l, err);
        }
    }
    unload(&l);
    return status;
}
