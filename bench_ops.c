/* bench_ops.c - `nla bench --ops`: what the machine can do (a copy, a large product), and how near to it every op of the engine's table
 * comes at the sizes of one model: as a decoding step calls it, and as a training pass does, there and back.
 *
 * An op's floor is what no engine could go below: its operations at the rate of the large product, or its least bytes (everything
 * read once, everything written once) at the rate of the copy, whichever takes longer.
 */
#include "nla.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <stb/stb_ds.h>

/* ------------------------------------------------------------------------------------------------ ceilings */

enum { MOST_PRODUCT = 8192, LEAST_PRODUCT = 256, MOST_COPY = 256 << 20, LEAST_COPY = 1 << 20 };
static const double long_enough = 0.02; /* seconds: what is measured grows until it takes this long */

/* The fastest of `times` runs of one product of n x n matrices, in seconds; the first warms up. -1: no memory. */
static double time_product(Engine *e, int n, int times) {
    Config c = {.n_layers = 0, .vocab_size = n, .hidden_size = n};
    Model m;
    Err ignored = {0};
    size_t count = (size_t)n * (size_t)n;
    Act *x = e->alloc(e, e->act_dtype, count), *y = e->alloc(e, e->act_dtype, count);
    double best = -1;
    if (x && y && model_make(&m, &c, "a product", false, 1, e, &ignored) == 0) { /* an embedding [n, n] is the matrix */
        float *host = xmalloc(count * sizeof(float));
        Linear w = {.n = 1, .in = n, .out = n, .w = {m.embed}};
        for (size_t i = 0; i < count; i++) {
            host[i] = bf16_to_f32(m.made[count - 1 - i]);
        }
        e->write(e, x, 0, host, count);
        free(host);
        for (int i = -1; i < times; i++) {
            e->start(e);
            e->linear(e, y, x, &w, n);
            double t = e->stop(e);
            best = i <= 0 || t < best ? t : best;
        }
        model_free(&m);
    }
    e->free(e, x);
    e->free(e, y);
    return best;
}

static double time_copy(Engine *e, Act *to, Act *from, size_t bytes, int times) {
    double best = 0;
    for (int i = -1; i < times; i++) {
        e->start(e);
        e->copy(e, to, from, bytes);
        double t = e->stop(e);
        best = i <= 0 || t < best ? t : best;
    }
    return best;
}

int ceilings_measure(Ceilings *c, Engine *e, Err *err) {
    double t = 0;
    *c = (Ceilings){.product = LEAST_PRODUCT, .copied = LEAST_COPY};
    while ((t = time_product(e, c->product, 5)) > 0 && t < long_enough && c->product < MOST_PRODUCT) {
        c->product *= 2;
    }
    if (!(t > 0)) {
        return e->check(e, err) != 0 ? -1 : fail(err, "not enough memory to multiply matrices of %d x %d", c->product, c->product);
    }
    c->operations = 2 * pow(c->product, 3) / t;
    Act *memory[2] = {e->alloc(e, DT_F32, MOST_COPY / 4), e->alloc(e, DT_F32, MOST_COPY / 4)};
    int status = memory[0] && memory[1] ? 0 : fail(err, "not enough memory to copy %d MB", MOST_COPY >> 20);
    if (status == 0) {
        e->zero(e, memory[1], MOST_COPY); /* so that the system has given it to us */
        while ((t = time_copy(e, memory[0], memory[1], c->copied, 5)) < long_enough && c->copied < MOST_COPY) {
            c->copied *= 2;
        }
        c->bytes = 2 * (double)c->copied / t;
        status = e->check(e, err);
    }
    e->free(e, memory[0]);
    e->free(e, memory[1]);
    return status;
}

double floor_of(const Ceilings *c, double operations, double bytes) {
    return fmax(operations / c->operations, bytes / c->bytes);
}

/* ------------------------------------------------------------------------------------------------ the rig */

typedef struct Case Case;

/* One block of a model, with a pass already made through it: every buffer holds what an op finds there. */
typedef struct {
    Engine *e;
    const Settings *s;
    const Ceilings *ceiling;
    int layers;              /* of the whole model: an op's calls a pass */
    Model *m;                /* of one block */
    Forest f;
    Batch b;
    int N, wanted;           /* rows of the batch; those whose logits are wanted */
    int n;                   /* of them at a time */
    double pairs, keys;      /* query rows by the keys each sees; keys that are read */
    Act *grad;               /* any weight's gradient */
    Act *flush[2];           /* copied between two measurements, so that none finds its data in a cache */
    Act *flat[4];            /* AdamW's weights, gradients and moments */
    size_t flat_n;
    int *token, *row;
    uint64_t *key;
    float *logp, *dlogp;
    double total, least;     /* seconds of all calls; of their floors */
} Rig;

struct Case {
    const char *name;
    void (*run)(const Rig *r, const Case *c);
    double calls, operations, bytes;
    const Linear *w;
    Act *x, *y;
};

static Tensor gradient_of(const Rig *r, const Tensor *t) {
    Tensor g = *t;
    g.dtype = DT_F32;
    g.data = t->data ? r->grad : NULL;
    return g;
}

static void run_embed(const Rig *r, const Case *c) {
    r->e->embed(r->e, c->y, &r->m->embed, r->token, r->N, r->m->config.hidden_size, 1);
}
static void run_rmsnorm(const Rig *r, const Case *c) {
    r->e->rmsnorm(r->e, c->y, c->x, &r->m->block[0].attn_in_norm, r->N, r->m->config.hidden_size, 1e-6f, r->m->config.norm_plus_one);
}
static void run_linear(const Rig *r, const Case *c) { r->e->linear(r->e, c->y, c->x, c->w, c->w == &r->m->lm_head ? r->n : r->N); }
static void run_rope(const Rig *r, const Case *c) {
    const Config *k = &r->m->config;
    const Block *b = &r->m->block[0];
    const Forest *f = &r->f;
    r->e->rope_qkv(r->e, f->q, f->k[0], f->v[0], c->x, k->qk_norm ? &b->q_norm : NULL, k->qk_norm ? &b->k_norm : NULL, 1e-6f, k->norm_plus_one,
                   f->cos[0], f->sin[0], f->position, f->cache_row, r->N, k->n_heads, k->n_kv_heads, k->head_dim);
}
static void run_attention(const Rig *r, const Case *c) {
    const Config *k = &r->m->config;
    const Forest *f = &r->f;
    r->e->attention(r->e, c->y, f->kept ? f->kept[0].lse : NULL, f->q, f->k[0], f->v[0], f->segment, r->b.run, (int)arrlen(r->b.run),
                    k->n_heads, k->n_kv_heads, k->head_dim, k->attn_scale, k->layer[0].window);
}
static void run_gated(const Rig *r, const Case *c) { r->e->gated(r->e, c->y, c->x, r->N, r->m->config.ff_size, r->m->config.gelu); }
static void run_add(const Rig *r, const Case *c) {
    r->e->add(r->e, c->y, c->x, c->y, (size_t)r->N * (size_t)r->m->config.hidden_size);
}
static void run_add_rmsnorm(const Rig *r, const Case *c) {
    r->e->add_rmsnorm(r->e, c->y, r->f.xn, c->x, c->y, &r->m->block[0].mlp_in_norm, r->N, r->m->config.hidden_size, 1e-6f,
                      r->m->config.norm_plus_one);
}
static void run_gather(const Rig *r, const Case *c) { r->e->gather(r->e, c->y, c->x, r->row, r->n, r->m->config.hidden_size); }
static void run_scatter(const Rig *r, const Case *c) { r->e->scatter(r->e, c->y, c->x, r->row, r->n, r->m->config.hidden_size); }
static void run_zero(const Rig *r, const Case *c) { r->e->zero(r->e, c->y, (size_t)c->bytes); }
static void run_sample(const Rig *r, const Case *c) {
    r->e->sample(r->e, r->token, r->logp, c->x, r->n, r->m->config.vocab_size, 1, 0, 1, r->key);
}
static void run_logprob(const Rig *r, const Case *c) {
    r->e->token_logprob(r->e, r->logp, c->x, r->token, r->n, r->m->config.vocab_size);
}
static void run_logprob_back(const Rig *r, const Case *c) {
    r->e->token_logprob_backward(r->e, c->x, r->logp, r->dlogp, r->token, r->n, r->m->config.vocab_size);
}
static void run_linear_back(const Rig *r, const Case *c) {
    r->e->linear_backward(r->e, c->y, c->x, c->w, c->w == &r->m->lm_head ? r->n : r->N, false);
}
static void run_weight_back(const Rig *r, const Case *c) { /* y: the gradient of the output */
    Linear dw = *c->w;
    for (int i = 0; i < dw.n; i++) {
        dw.w[i] = gradient_of(r, &c->w->w[i]);
        dw.b[i] = gradient_of(r, &c->w->b[i]);
    }
    r->e->linear_weight_backward(r->e, &dw, c->y, c->x, c->w == &r->m->lm_head ? r->n : r->N);
}
static void run_rmsnorm_back(const Rig *r, const Case *c) {
    const Tensor *w = &r->m->block[0].attn_in_norm;
    Tensor dw = gradient_of(r, w);
    r->e->rmsnorm_backward(r->e, c->y, &dw, r->f.dxn, c->x, w, r->N, r->m->config.hidden_size, 1e-6f, r->m->config.norm_plus_one, true);
}
static void run_gated_back(const Rig *r, const Case *c) {
    r->e->gated_backward(r->e, c->y, r->f.dgated, c->x, r->N, r->m->config.ff_size, r->m->config.gelu);
}
static void run_attention_back(const Rig *r, const Case *c) {
    const Config *k = &r->m->config;
    const Forest *f = &r->f;
    r->e->attention_backward(r->e, f->dq, f->dk, f->dv, c->x, f->kept[0].att, f->kept[0].lse, f->q, f->k[0], f->v[0], f->segment, r->b.run,
                             (int)arrlen(r->b.run), k->n_heads, k->n_kv_heads, k->head_dim, k->attn_scale, k->layer[0].window);
}
static void run_rope_back(const Rig *r, const Case *c) {
    const Config *k = &r->m->config;
    const Block *b = &r->m->block[0];
    const Forest *f = &r->f;
    Tensor dq_norm = gradient_of(r, &b->q_norm), dk_norm = gradient_of(r, &b->k_norm);
    r->e->rope_qkv_backward(r->e, c->y, &dq_norm, &dk_norm, f->dq, f->dk, f->dv, c->x, k->qk_norm ? &b->q_norm : NULL,
                            k->qk_norm ? &b->k_norm : NULL, 1e-6f, k->norm_plus_one, f->cos[0], f->sin[0], f->position, r->N, k->n_heads,
                            k->n_kv_heads, k->head_dim);
}
static void run_embed_back(const Rig *r, const Case *c) {
    Tensor dw = gradient_of(r, &r->m->embed);
    r->e->embed_backward(r->e, &dw, c->x, r->token, r->N, r->m->config.hidden_size, 1);
}
static void run_lora(const Rig *r, const Case *c) { r->e->lora_up(r->e, c->y, c->x, c->w, r->N); }
static void run_lora_back(const Rig *r, const Case *c) {
    Lora d = *c->w->lora;
    d.up[0] = gradient_of(r, &d.up[0]);
    r->e->lora_up_backward(r->e, r->f.low, &d, c->y, c->x, c->w, r->N);
}
static void run_mse(const Rig *r, const Case *c) { /* y: dx; golds are any numbers in fp32 */
    double mse[LOGIT_ROWS];
    r->e->mse_nrm(r->e, mse, c->y, c->x, r->flat[1], r->n, r->m->config.hidden_size, 1, 1);
}
static void run_squares(const Rig *r, const Case *c) {
    (void)c;
    (void)r->e->sum_squares(r->e, r->flat[1], r->flat_n);
}
static void run_adamw(const Rig *r, const Case *c) {
    static const AdamW how = {0.9f, 0.95f, 1e-8f, 0};
    DType moments = c->bytes < 24 * (double)r->flat_n ? DT_BF16 : DT_F32;
    r->e->adamw(r->e, r->flat[0], DT_F32, r->flat[1], r->flat[2], r->flat[3], moments, r->flat_n, &how, 1e-5f, 100, 1, 7);
}

/* ------------------------------------------------------------------------------------------------ measuring */

static void print_case(const Rig *r, const char *part, const Case *c, double median, double least, double most) {
    double floor = floor_of(r->ceiling, c->operations, c->bytes);
    bool product = c->operations / r->ceiling->operations > c->bytes / r->ceiling->bytes;
    double rate = product ? c->operations / median * 1e-12 : c->bytes / median * 1e-9;
    if (r->s->json) {
        printf("{\"part\": \"%s\", \"op\": \"%s\", \"calls\": %.0f", part, c->name, c->calls);
        json_number(stdout, "median_s", median);
        json_number(stdout, "min_s", least);
        json_number(stdout, "max_s", most);
        json_number(stdout, "operations", c->operations);
        json_number(stdout, "bytes", c->bytes);
        json_number(stdout, "rate", rate);
        json_text(stdout, "unit", product ? "TFLOP/s" : "GB/s");
        json_number(stdout, "share", floor / median);
        json_number(stdout, "floor_s", floor);
        fputs("}\n", stdout);
    } else {
        printf("%-26s %6.0f %10.4f %10.4f %10.4f %9.3f %9.2f %9.3f %-7s %5.0f%% %10.4f\n", c->name, c->calls, median * 1e3, least * 1e3,
               most * 1e3, c->operations * 1e-9, c->bytes * 1e-6, rate, product ? "TFLOP/s" : "GB/s", 100 * floor / median, floor * 1e3);
    }
    fflush(stdout);
}

static bool wanted_case(const Rig *r, const Case *c) {
    int n = (int)arrlen(r->s->argument);
    for (int i = 0; i < n; i++) {
        if (strstr(c->name, r->s->argument[i])) {
            return true;
        }
    }
    return n == 0;
}

static void measure_case(Rig *r, const char *part, const Case *c) {
    int repeat = r->s->repeat;
    double *seconds = xcalloc((size_t)repeat, sizeof(double));
    for (int i = -1; i < repeat; i++) { /* -1 warms up: copies of weights are made, memory is touched */
        r->e->copy(r->e, r->flush[0], r->flush[1], r->ceiling->copied);
        r->e->start(r->e);
        c->run(r, c);
        seconds[i < 0 ? 0 : i] = r->e->stop(r->e);
    }
    qsort(seconds, (size_t)repeat, sizeof *seconds, by_value);
    double median = (seconds[(repeat - 1) / 2] + seconds[repeat / 2]) / 2;
    print_case(r, part, c, median, seconds[0], seconds[repeat - 1]);
    r->total += c->calls * median;
    r->least += c->calls * floor_of(r->ceiling, c->operations, c->bytes);
    free(seconds);
}

static void measure_cases(Rig *r, const char *part, const char *title, const Case *list, int n) {
    if (!r->s->json) {
        printf("\n%s\n%-26s %6s %10s %10s %10s %9s %9s %17s %6s %10s\n", title, "op", "calls", "median ms", "min", "max", "GFLOP", "MB",
               "rate", "share", "floor ms");
    }
    r->total = r->least = 0;
    for (int i = 0; i < n; i++) {
        if (wanted_case(r, &list[i])) {
            measure_case(r, part, &list[i]);
        }
    }
    if (r->s->json) {
        printf("{\"part\": \"%s\", \"op\": \"all calls\"", part);
        json_number(stdout, "median_s", r->total);
        json_number(stdout, "floor_s", r->least);
        fputs("}\n", stdout);
    } else {
        printf("all calls of these ops: %.3f ms, their floors %.3f ms (%.0f%%)\n", r->total * 1e3, r->least * 1e3, 100 * r->least / r->total);
    }
}

/* ------------------------------------------------------------------------------------------------ the cases */

/* Bytes of a weight as the engine reads it, of an activation. */
static double weight_size(const Rig *r) { return strncmp(r->e->name, "cuda", 4) == 0 ? (double)dtype_size(r->e->act_dtype) : 2; }
static double act_size(const Rig *r) { return (double)dtype_size(r->e->act_dtype); }

static Case linear_case(const Rig *r, const char *name, const Linear *w, Act *x, Act *y, double calls) {
    bool head = w == &r->m->lm_head;
    double N = head ? r->n : r->N, I = w->in, O = w->out, out = head ? 4 : act_size(r);
    return (Case){name, run_linear, calls, 2 * N * I * O, N * I * act_size(r) + N * O * out + I * O * weight_size(r), w, x, y};
}

/* Each pass's ops, in its order; `there` times each: a training pass calls some again on its way back. */
static int forward_cases(const Rig *r, Case *list) {
    const Config *c = &r->m->config;
    const Forest *f = &r->f;
    const Block *b = &r->m->block[0];
    const Kept none = {.in = f->x, .qkv = f->qkv, .att = f->att, .mid = f->x, .gate_up = f->gate_up}, k = f->kept ? f->kept[0] : none;
    double N = r->N, L = r->layers, a = act_size(r), w = weight_size(r), D = c->hidden_size, F = c->ff_size, V = c->vocab_size;
    double E = c->head_dim, Q = c->n_heads * E, KV = c->n_kv_heads * E, again = f->kept ? 2 : 1, norms = c->post_norms ? 4 : 2;
    double chunks = ceil((double)r->wanted / r->n), n = r->n;
    int i = 0;
    list[i++] = (Case){"embed", run_embed, 1, 0, N * D * (w + a), NULL, NULL, f->xn};
    list[i++] = (Case){"rmsnorm", run_rmsnorm, 1 + L * (2 * (again - 1) + norms - 2), 0, 2 * N * D * a, NULL, k.in, f->xn};
    list[i++] = linear_case(r, "linear q, k, v", &b->qkv, f->xn, k.qkv, L);
    list[i++] = (Case){"rope_qkv", run_rope, L * again, 0, 2 * N * (Q + 2 * KV) * a, NULL, k.qkv, NULL};
    list[i++] = (Case){"attention", run_attention, L, 4 * Q * r->pairs, 2 * N * Q * a + 2 * r->keys * KV * a, NULL, NULL, k.att};
    list[i++] = linear_case(r, "linear o", &b->o, k.att, f->proj, L);
    list[i++] = (Case){"add_rmsnorm", run_add_rmsnorm, 2 * L - 1, 0, 4 * N * D * a, NULL, k.in, f->proj};
    list[i++] = (Case){"add", run_add, 1, 0, 3 * N * D * a, NULL, f->xn, f->proj};
    list[i++] = linear_case(r, "linear gate, up", &b->gate_up, f->xn, k.gate_up, L);
    list[i++] = (Case){"gated", run_gated, L * again, 0, 3 * N * F * a, NULL, k.gate_up, f->gated};
    list[i++] = linear_case(r, "linear down", &b->down, f->gated, f->proj, L);
    list[i++] = (Case){"gather", run_gather, chunks, 0, 2 * n * D * a, NULL, k.in, f->proj};
    list[i++] = linear_case(r, "linear lm_head", &r->m->lm_head, f->xn, f->logits, chunks);
    if (f->kept) {
        list[i++] = (Case){"token_logprob", run_logprob, chunks, 0, n * V * 4, NULL, f->logits, NULL};
    } else {
        list[i++] = (Case){"sample", run_sample, chunks, 0, n * V * 4, NULL, f->logits, NULL};
    }
    return i;
}

/* dx = dy W and dw += dy^T x of one stack. */
static int linear_back_cases(const Rig *r, Case *list, const char *const name[2], const Linear *w, Act *x, Act *dx, Act *dy, double calls) {
    bool head = w == &r->m->lm_head;
    double N = head ? r->n : r->N, I = w->in, O = w->out, a = act_size(r), acts = N * I * a + N * O * (head ? 4 : a);
    list[0] = (Case){name[0], run_linear_back, calls, 2 * N * I * O, acts + I * O * weight_size(r), w, dy, dx};
    list[1] = (Case){name[1], run_weight_back, calls, 2 * N * I * O, acts + 8 * I * O, w, x, dy};
    return 2;
}

static int backward_cases(const Rig *r, Case *list) {
    static const char *const names[5][2] = {{"linear_backward q, k, v", "weight_backward q, k, v"}, {"linear_backward o", "weight_backward o"},
                                            {"linear_backward gate, up", "weight_backward gate, up"}, {"linear_backward down", "weight_backward down"},
                                            {"linear_backward lm_head", "weight_backward lm_head"}};
    const Config *c = &r->m->config;
    const Forest *f = &r->f;
    const Block *b = &r->m->block[0];
    const Kept *k = &f->kept[0];
    double N = r->N, L = r->layers, a = act_size(r), D = c->hidden_size, F = c->ff_size, V = c->vocab_size, n = r->n, R = b->o.lora->rank;
    double E = c->head_dim, Q = c->n_heads * E, KV = c->n_kv_heads * E, chunks = ceil((double)r->wanted / r->n), flat = (double)r->flat_n;
    int i = 0;
    list[i++] = (Case){"token_logprob_backward", run_logprob_back, chunks, 0, 2 * n * V * 4, NULL, f->logits, NULL};
    i += linear_back_cases(r, list + i, names[4], &r->m->lm_head, f->xn, f->dxn, f->logits, chunks);
    list[i++] = (Case){"zero", run_zero, 1, 0, N * D * a, NULL, NULL, f->dx};
    list[i++] = (Case){"scatter", run_scatter, chunks, 0, 2 * n * D * a, NULL, f->dxn, f->dx};
    i += linear_back_cases(r, list + i, names[3], &b->down, f->gated, f->dgated, f->dx, L);
    list[i++] = (Case){"gated_backward", run_gated_back, L, 0, 5 * N * F * a, NULL, k->gate_up, f->dgate_up};
    i += linear_back_cases(r, list + i, names[2], &b->gate_up, f->xn, f->dxn, f->dgate_up, L);
    list[i++] = (Case){"rmsnorm_backward", run_rmsnorm_back, L * (c->post_norms ? 4 : 2), 0, 4 * N * D * a, NULL, k->in, f->dx};
    i += linear_back_cases(r, list + i, names[1], &b->o, k->att, f->datt, f->dx, L);
    list[i++] = (Case){"attention_backward", run_attention_back, L, 10 * Q * r->pairs, 4 * N * Q * a + 4 * r->keys * KV * a, NULL, f->datt, NULL};
    list[i++] = (Case){"rope_qkv_backward", run_rope_back, L, 0, 3 * N * (Q + 2 * KV) * a, NULL, k->qkv, f->dqkv};
    i += linear_back_cases(r, list + i, names[0], &b->qkv, f->xn, f->dxn, f->dqkv, L);
    list[i++] = (Case){"embed_backward", run_embed_back, 1, 0, N * D * (a + 8), NULL, f->dx, NULL};
    list[i++] = (Case){"mse_nrm", run_mse, 0, 0, n * D * (2 * a + 4), NULL, f->dx, f->dxn}; /* the AR's loss */
    /* What adapters add to one matrix, and an update's ops, on a part of the weights; they are in no pass of full fine-tuning. */
    list[i++] = (Case){"lora_up o", run_lora, 0, 2 * N * D * R, N * (2 * D + R) * a, &b->o, f->low, f->proj};
    list[i++] = (Case){"lora_up_backward o", run_lora_back, 0, 4 * N * D * R, N * (D + 2 * R) * a, &b->o, f->q, f->proj};
    list[i++] = (Case){"sum_squares", run_squares, 0, 0, flat * 4, NULL, NULL, NULL};
    list[i++] = (Case){"adamw, moments f32", run_adamw, 0, 0, flat * 28, NULL, NULL, NULL};
    list[i++] = (Case){"adamw, moments bf16", run_adamw, 0, 0, flat * 20, NULL, NULL, NULL};
    return i;
}

/* ------------------------------------------------------------------------------------------------ setting it up */

enum { CONTEXT = 128, CHILD = 128, DRAWN = 96, RANK = 16, FLAT = 1 << 24 };

static void fill_act(Engine *e, Act *x, size_t count, uint64_t key) {
    size_t part = count < 1 << 20 ? count : 1 << 20;
    float *host = xmalloc((part + 1) * sizeof(float));
    for (size_t i = 0; i < part; i++) {
        host[i] = (float)(2 * random_uniform(1, key, i, 0) - 1);
    }
    for (size_t at = 0; at < count; at += part) {
        e->write(e, x, at, host, count - at < part ? count - at : part);
    }
    free(host);
}

static void random_tokens(int *token, int n, int V, uint64_t key) {
    for (int i = 0; i < n; i++) {
        token[i] = (int)(random_uniform(2, key, (uint64_t)i, 0) * V);
    }
}

static void keep_rows(void *context, Engine *e, const Act *logits, int first, int n) {
    (void)context, (void)e, (void)logits, (void)first, (void)n;
}

/* Keys that each row of the last batch saw, in all, and the keys that there are. */
static void count_pairs(Rig *r) {
    int window = r->m->config.layer[0].window;
    r->pairs = r->keys = 0;
    for (int i = 0; i < r->N; i++) {
        int seen = r->f.position[i] + 1;
        r->pairs += window > 0 && seen > window ? window : seen;
    }
    for (int i = 0; i < (int)arrlen(r->f.segment); i++) {
        r->keys += r->f.segment[i].len;
    }
}

/* A training pass's batch: a root, and children behind it until there are `rows`. */
static int training_batch(Rig *r, int rows, Err *err) {
    int V = r->m->config.vocab_size, status = 0, children = (rows + CHILD - 1) / CHILD;
    status = forest_open(&r->f, r->m, 1, rows + CACHE_ALIGN * (children + 1), rows, TRAINING, err);
    for (int at = 0; at < rows && status == 0;) {
        int n = rows - at < CHILD ? rows - at : CHILD, seg = forest_add(&r->f, at > 0 ? 0 : -1, n, err);
        status = seg < 0 ? -1 : 0;
        random_tokens(r->token, n, V, (uint64_t)at);
        if (status == 0) {
            batch_add(&r->b, &r->f, seg, r->token, n, at > 0 || n == rows ? 2 : 0);
        }
        at += n;
    }
    return status;
}

/* A decoding step's: samples of one prompt, that have drawn DRAWN tokens, and each one more. */
static int decoding_batch(Rig *r, int rows, Err *err) {
    int V = r->m->config.vocab_size, work = rows > CONTEXT ? rows : CONTEXT, token[CONTEXT];
    int status = forest_open(&r->f, r->m, 1, CONTEXT + (rows + 1) * (DRAWN + 2 * CACHE_ALIGN), work, FORWARD, err);
    random_tokens(token, CONTEXT, V, 1);
    status = status == 0 ? feed(&r->f, &r->b, forest_add(&r->f, -1, CONTEXT, err), token, CONTEXT, NULL, err) : -1;
    for (int i = 0; i < rows && status == 0; i++) {
        int seg = forest_add(&r->f, 0, DRAWN + 1, err);
        random_tokens(token, DRAWN, V, (uint64_t)i + 2);
        status = seg < 0 ? -1 : feed(&r->f, &r->b, seg, token, DRAWN, NULL, err);
    }
    batch_clear(&r->b);
    random_tokens(r->token, rows, V, 0);
    for (int i = 0; i < rows && status == 0; i++) {
        batch_add(&r->b, &r->f, i + 1, &r->token[i], 1, 1);
    }
    return status;
}

/* Gradients of activations, logits and flat memory: random numbers where no pass has put any. */
static int fill_rig(Rig *r, Err *err) {
    const Config *c = &r->m->config;
    const Forest *f = &r->f;
    size_t N = (size_t)r->N, D = (size_t)c->hidden_size, F = (size_t)c->ff_size, E = (size_t)c->head_dim, Q = (size_t)c->n_heads * E;
    size_t KV = (size_t)c->n_kv_heads * E, V = (size_t)c->vocab_size, widest = D * (V > F ? V : F);
    struct {
        Act *x;
        size_t count;
    } part[] = {{f->dx, N * D}, {f->dxn, N * D}, {f->dproj, N * D}, {f->dgated, N * F}, {f->dgate_up, N * 2 * F}, {f->dqkv, N * (Q + 2 * KV)},
                {f->dq, N * Q}, {f->datt, N * Q}, {f->dk, N * KV}, {f->dv, N * KV}, {f->low, N * RANK}, {f->dlow, N * RANK}};
    for (size_t i = 0; i < sizeof part / sizeof *part && f->kept; i++) {
        fill_act(r->e, part[i].x, part[i].count, i);
    }
    for (int i = 0; i < r->n; i++) {
        r->logp[i] = -8;
        r->dlogp[i] = -0.01f;
        r->key[i] = random_key(3, (uint64_t)i, 0, 0);
    }
    if (!f->kept) {
        return 0;
    }
    r->grad = r->e->alloc(r->e, DT_F32, widest);
    for (int i = 0; i < 4; i++) {
        r->flat[i] = r->e->alloc(r->e, DT_F32, r->flat_n);
        if (!r->flat[i] || !r->grad) {
            return fail(err, "not enough memory for %.2f GB of gradients and %.2f GB of AdamW's numbers", (double)widest * 4e-9, (double)r->flat_n * 16e-9);
        }
        fill_act(r->e, r->flat[i], r->flat_n, (uint64_t)i + 20);
    }
    fill_act(r->e, r->grad, widest, 30);
    return 0;
}

static int rig_open(Rig *r, int rows, bool training, Err *err) {
    r->token = xcalloc((size_t)rows + CHILD, sizeof(int));
    r->row = xcalloc((size_t)rows, sizeof(int));
    r->key = xcalloc((size_t)rows, sizeof(uint64_t));
    r->logp = xcalloc((size_t)rows, sizeof(float));
    r->dlogp = xcalloc((size_t)rows, sizeof(float));
    r->N = rows;
    int status = training ? training_batch(r, rows, err) : decoding_batch(r, rows, err);
    LogitSink sink = {NULL, keep_rows};
    r->wanted = (int)arrlen(r->b.out_row);
    r->n = r->wanted < LOGIT_ROWS ? r->wanted : LOGIT_ROWS;
    status = status == 0 ? model_forward(&r->f, &r->b, &sink, NULL, err) : -1;
    if (status == 0) {
        count_pairs(r);
        random_tokens(r->token, rows, r->m->config.vocab_size, 0);
        for (int i = 0; i < r->n; i++) {
            r->row[i] = r->b.out_row[i];
        }
        r->flush[0] = r->e->alloc(r->e, DT_F32, r->ceiling->copied / 4);
        r->flush[1] = r->e->alloc(r->e, DT_F32, r->ceiling->copied / 4);
        status = r->flush[0] && r->flush[1] ? fill_rig(r, err) : fail(err, "not enough memory to measure with");
    }
    return status;
}

static void rig_close(Rig *r) {
    Act *const memory[] = {r->grad, r->flush[0], r->flush[1], r->flat[0], r->flat[1], r->flat[2], r->flat[3]};
    for (int i = 0; i < 7; i++) {
        r->e->free(r->e, memory[i]);
    }
    forest_close(&r->f);
    batch_free(&r->b);
    free(r->token);
    free(r->row);
    free(r->key);
    free(r->logp);
    free(r->dlogp);
}

/* ------------------------------------------------------------------------------------------------ the command */

static int measure_rig(Rig *r, const char *shape, int rows, bool training, Err *err) {
    Case list[48];
    char title[200];
    int status = rig_open(r, rows, training, err), n = 0;
    if (status == 0) {
        n = forward_cases(r, list);
        n += training ? backward_cases(r, list + n) : 0;
        if (training) {
            snprintf(title, sizeof title, "%s: a training pass of %d rows there and back, %d logits at a time", shape, rows, r->n);
        } else {
            snprintf(title, sizeof title, "%s: a decoding step of %d rows, each sees %d tokens", shape, rows, CONTEXT + DRAWN + 1);
        }
        measure_cases(r, training ? "training" : "decoding", title, list, n);
        status = r->e->check(r->e, err);
    }
    rig_close(r);
    return status;
}

static void print_ceilings(const Settings *s, const Engine *e, const Ceilings *c) {
    if (s->json) {
        printf("{\"engine\": \"%s\", \"threads\": %d", e->name, e->threads);
        json_number(stdout, "copy_bytes_per_s", c->bytes);
        json_number(stdout, "copied", (double)c->copied);
        json_number(stdout, "product_operations_per_s", c->operations);
        json_number(stdout, "product", c->product);
        fputs("}\n", stdout);
    } else {
        printf("%s, %d threads: copy of %.0f MB %.1f GB/s, product of %d x %d x %d %.3f TFLOP/s\n", e->name, e->threads, (double)c->copied * 1e-6,
               c->bytes * 1e-9, c->product, c->product, c->product, c->operations * 1e-12);
    }
    fflush(stdout);
}

int bench_ceilings(const Settings *s, Engine *e, Ceilings *c, Err *err) {
    int status = ceilings_measure(c, e, err);
    if (status == 0) {
        print_ceilings(s, e, c);
    }
    return status;
}

int bench_ops(const Settings *s, Engine *e, Err *err) {
    Shape shape;
    Ceilings ceiling;
    Config c;
    Model m;
    LoraConfig lora = {.rank = RANK, .alpha = RANK};
    char *owned;
    int status = need(s->shape, "shape", s, err) == 0 ? shape_find(&shape, &owned, s->shape, err) : -1;
    if (status != 0) {
        return -1;
    }
    status = config_parse(&c, shape.config, strlen(shape.config), shape.name, err);
    int layers = status == 0 ? c.n_layers : 0;
    if (status == 0) {
        c.n_layers = 1;
        status = bench_ceilings(s, e, &ceiling, err);
        status = status == 0 ? model_make(&m, &c, shape.name, true, 1, e, err) : -1;
        config_free(&c);
    }
    if (status == 0) {
        Rig r = {.e = e, .s = s, .ceiling = &ceiling, .layers = layers, .m = &m, .flat_n = FLAT}, back = r;
        status = lora_modules(&lora, "o", err);
        status = status == 0 ? measure_rig(&r, shape.name, s->batch, false, err) : -1;
        lora_new(&m, &lora, 1);
        status = status == 0 ? measure_rig(&back, shape.name, s->rows > 0 ? s->rows : 2048, true, err) : -1;
        model_free(&m);
    }
    free(owned);
    return status;
}
