/* verify.c - `nla verify`: every op, and a whole model's forward pass, on the CPU engine and on the CUDA engine, compared. The op
 * cases are the tests' too (tests/test_kernels.c), which play them in tests/cuda_shim.h.
 *
 * An op's case is a function of a tape: it asks for inputs (the same numbers on every engine), runs the op and keeps its outputs.
 */
#include "nla.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <stb/stb_ds.h>

/* ------------------------------------------------------------------------------------------------ tapes */

static float next_float(OpTape *t) {
    return bf16_to_f32(f32_to_bf16((float)(2 * random_uniform(11, t->state++, 0, 0) - 1))); /* exact on every engine */
}

static float *host_floats(OpTape *t, size_t n) {
    float *x = xmalloc((n + 1) * sizeof(float));
    for (size_t i = 0; i < n; i++) {
        x[i] = next_float(t);
    }
    arrput(t->host, x);
    return x;
}

/* Memory of the engine: with nothing in it (NaN), or random numbers. */
static Act *room(OpTape *t, DType dtype, size_t n) {
    uint16_t *nan = xmalloc((2 * n + 1) * sizeof(uint16_t));
    Act *x = t->e->alloc(t->e, dtype, n);
    memset(nan, 0xff, 2 * n * sizeof(uint16_t));
    if (x) {
        t->e->put(t->e, x, nan, n * dtype_size(dtype));
    }
    free(nan);
    arrput(t->memory, x);
    return x;
}

static Act *given_as(OpTape *t, DType dtype, size_t n) {
    Act *x = room(t, dtype, n);
    t->e->write(t->e, x, 0, host_floats(t, n), n);
    return x;
}

static Act *act(OpTape *t, size_t n) { return room(t, t->e->act_dtype, n); }
static Act *given(OpTape *t, size_t n) { return given_as(t, t->e->act_dtype, n); }

/* A weight as a file holds it. */
static Tensor weight(OpTape *t, DType dtype, int rows, int columns) {
    size_t n = (size_t)rows * (size_t)(columns ? columns : 1);
    float *x = host_floats(t, n);
    uint16_t *half = xmalloc((n + 1) * sizeof(uint16_t));
    arrput(t->host, half);
    for (size_t i = 0; i < n; i++) { /* f16: signs and a few bits that make numbers near 1 */
        half[i] = dtype == DT_BF16 ? f32_to_bf16(x[i]) : (uint16_t)((x[i] < 0 ? 0x8000u : 0) | 0x3800u | (i * 37 % 1024 & 0x380));
    }
    return (Tensor){.dtype = dtype, .n_dims = columns ? 2 : 1, .shape = {rows, columns}, .bytes = n * dtype_size(dtype),
                    .data = dtype == DT_F32 ? (void *)x : (void *)half};
}

/* A gradient: fp32 memory of the engine that is added to. */
static Tensor gradient(OpTape *t, int rows, int columns) {
    size_t n = (size_t)rows * (size_t)(columns ? columns : 1);
    return (Tensor){.dtype = DT_F32, .n_dims = columns ? 2 : 1, .shape = {rows, columns}, .bytes = n * sizeof(float), .data = given_as(t, DT_F32, n)};
}

static void keep_floats(OpTape *t, const char *name, const float *x, size_t n, double bound) {
    arrput(t->kept, ((OpOutput){name, arrlenu(t->out), n, bound}));
    memcpy(arraddnptr(t->out, n), x, n * sizeof(float));
}

static void keep_halves(OpTape *t, const char *name, const uint16_t *x, size_t n, double bound) {
    float *wide = xmalloc((n + 1) * sizeof(float));
    for (size_t i = 0; i < n; i++) {
        wide[i] = bf16_to_f32(x[i]);
    }
    keep_floats(t, name, wide, n, bound);
    free(wide);
}

static void keep(OpTape *t, const char *name, const Act *x, size_t n, double bound) {
    float *host = xmalloc((n + 1) * sizeof(float));
    t->e->read(t->e, host, x, 0, n);
    keep_floats(t, name, host, n, bound);
    free(host);
}

/* fp32: 1e-5 of the largest expected number. bf16: an output is rounded to 8 bits, an error of 2^-9 of itself; `steps` is how many
 * roundings of that size lie on the way to it. */
static double bound(const OpTape *t, double steps) { return t->e->act_dtype == DT_F32 ? 1e-5 : steps / 256; }

/* ------------------------------------------------------------------------------------------------ row by row ops */

static void op_embed(OpTape *t, const int *s) { /* rows, width, vocabulary, dtype */
    int N = s[0], D = s[1], V = s[2], token[600];
    Tensor table = weight(t, (DType)s[3], V, D);
    Act *out = act(t, (size_t)(N * D));
    for (int i = 0; i < N; i++) {
        token[i] = (i * 31 + 7) % V;
    }
    t->e->embed(t->e, out, &table, token, N, D, 1.5f);
    keep(t, "embed", out, (size_t)(N * D), bound(t, 1.5)); /* the table's own rounding, when it is f16 */
    Tensor grad = gradient(t, V, D);
    Act *dx = given(t, (size_t)(N * D));
    token[0] = -1;
    for (int i = 1; i < N; i++) {
        token[i] = i * i % (V < 5 ? V : 5); /* several rows of one token */
    }
    t->e->embed_backward(t->e, &grad, dx, token, N, D, 1.5f);
    keep(t, "dtable", grad.data, (size_t)(V * D), 1e-5);
}

static void op_rmsnorm(OpTape *t, const int *s) { /* rows, width, plus one, dtype of w */
    int N = s[0], D = s[1];
    size_t n = (size_t)N * (size_t)D;
    Tensor w = weight(t, (DType)s[3], D, 0), dw = gradient(t, D, 0), none = {0};
    Act *x = given(t, n), *dy = given(t, n), *dx = given(t, n), *out = act(t, n), *dx2 = act(t, n);
    t->e->rmsnorm(t->e, out, x, &w, N, D, 1e-5f, s[2]);
    keep(t, "out", out, n, bound(t, 1));
    t->e->rmsnorm_backward(t->e, dx2, &dw, dy, x, &w, N, D, 1e-5f, s[2], false);
    keep(t, "dx", dx2, n, bound(t, 1));
    keep(t, "dw", dw.data, (size_t)D, 1e-5);
    t->e->rmsnorm_backward(t->e, dx, &none, dy, x, &w, N, D, 1e-5f, s[2], true);
    keep(t, "dx, added", dx, n, bound(t, 1));
    t->e->rmsnorm_backward(t->e, dy, NULL, dy, x, &w, N, D, 1e-5f, s[2], false);
    keep(t, "dx in dy's place", dy, n, bound(t, 1));
    t->e->rmsnorm(t->e, x, x, &w, N, D, 1e-5f, s[2]);
    keep(t, "out in x's place", x, n, bound(t, 1));
    t->e->add_rmsnorm(t->e, dx, out, dx, dx2, &w, N, D, 1e-5f, s[2]);
    keep(t, "sum", dx, n, bound(t, 3)); /* what it adds has been rounded twice */
    keep(t, "norm of the sum", out, n, bound(t, 6));
}

static void op_gated(OpTape *t, const int *s) { /* rows, width, gelu */
    int N = s[0], F = s[1];
    size_t n = (size_t)N * (size_t)F;
    Act *x = given(t, 2 * n), *dy = given(t, n), *out = act(t, n), *dx = act(t, 2 * n);
    float ends[] = {-100, -20, 20, 100};
    if (n > 8) {
        t->e->write(t->e, x, 0, ends, 4);
    }
    t->e->gated(t->e, out, x, N, F, s[2]);
    keep(t, "out", out, n, bound(t, 1));
    t->e->gated_backward(t->e, dx, dy, x, N, F, s[2]);
    keep(t, "dgate_up", dx, 2 * n, bound(t, 1));
}

static void op_rows(OpTape *t, const int *s) { /* rows, width, wanted */
    int N = s[0], D = s[1], n = s[2], row[64];
    size_t all = (size_t)N * (size_t)D, some = (size_t)n * (size_t)D;
    Act *x = given(t, all), *y = given(t, all), *sum = act(t, all), *few = act(t, some);
    for (int i = 0; i < n; i++) {
        row[i] = (i * 5 + 1) % N;
    }
    t->e->add(t->e, sum, x, y, all);
    keep(t, "sum", sum, all, bound(t, 1));
    t->e->gather(t->e, few, x, row, n, D);
    keep(t, "gathered", few, some, 0);
    for (int i = 0; i < n; i++) {
        row[i] = N - 1 - i;
    }
    t->e->scatter(t->e, y, few, row, n, D);
    keep(t, "scattered", y, all, 0);
    t->e->zero(t->e, x, (all / 2) * dtype_size(t->e->act_dtype));
    keep(t, "half zero", x, all, 0);
}

/* ------------------------------------------------------------------------------------------------ products */

static Linear stack(OpTape *t, const int *O, int n, int I, DType dtype, bool bias) {
    Linear w = {.n = n, .in = I};
    for (int i = 0; i < n; i++) {
        w.w[i] = weight(t, dtype, O[i], I);
        w.out += O[i];
        if (bias && i != 1) {
            w.b[i] = weight(t, dtype, O[i], 0);
        }
    }
    return w;
}

static void op_linear(OpTape *t, const int *s) { /* rows, in, two outs, dtype, bias */
    int N = s[0], I = s[1], O[] = {s[2], s[3]};
    Linear w = stack(t, O, 2, I, (DType)s[4], s[5]), dw = {.n = 2, .in = I, .out = w.out};
    size_t in = (size_t)N * (size_t)I, out = (size_t)N * (size_t)w.out;
    Act *x = given(t, in), *dy = given(t, out), *y = act(t, out), *wide = room(t, DT_F32, out), *dx = act(t, in);
    double narrow = s[4] == DT_BF16 ? 1 : 2; /* weights in another format are rounded to bf16 first */
    t->e->linear(t->e, y, x, &w, N);
    keep(t, "y", y, out, bound(t, narrow));
    t->e->linear(t->e, wide, x, &w, N); /* fp32 outputs, as logits are: no rounding but that of the weights */
    keep(t, "y in fp32", wide, out, s[4] == DT_BF16 ? 1e-5 : bound(t, 1));
    t->e->linear_backward(t->e, dx, dy, &w, N, false);
    keep(t, "dx", dx, in, bound(t, narrow));
    t->e->linear_backward(t->e, dx, wide, &w, N, true);
    keep(t, "dx, added, of fp32", dx, in, bound(t, 2 * narrow));
    for (int i = 0; i < 2; i++) {
        dw.w[i] = i ? (Tensor){.shape = {O[i], I}} : gradient(t, O[i], I);
        dw.b[i] = s[5] && i == 0 ? gradient(t, O[i], 0) : (Tensor){0};
    }
    t->e->linear_weight_backward(t->e, &dw, dy, x, N);
    keep(t, "dw", dw.w[0].data, (size_t)O[0] * (size_t)I, 1e-5);
    if (s[5]) {
        keep(t, "db", dw.b[0].data, (size_t)O[0], 1e-5);
    }
}

/* Weights of a byte: few rows (a kernel of its own) and many (written out for the library). */
static void op_rounded(OpTape *t, const int *s) { /* rows, in, two outs, format, bias */
    int N = s[0], I = s[1], O[] = {s[2], s[3]};
    Linear w = stack(t, O, 2, I, DT_BF16, s[5]);
    size_t out = (size_t)N * (size_t)w.out;
    Act *x = given(t, (size_t)N * (size_t)I), *y = act(t, out), *wide = room(t, DT_F32, out);
    w.format = (WeightFormat)s[4];
    t->e->linear(t->e, y, x, &w, N);
    keep(t, "y", y, out, bound(t, 2)); /* many rows: code * scale is rounded to bf16 */
    t->e->linear(t->e, wide, x, &w, N);
    keep(t, "y in fp32", wide, out, N <= 64 ? 1e-5 : bound(t, 1));
}

static void op_lora(OpTape *t, const int *s) { /* rows, in, outs of three, rank */
    int N = s[0], I = s[1], O[] = {s[2], s[3], s[4]}, R = s[5], low = 2 * R;
    Linear w = stack(t, O, 3, I, DT_BF16, false);
    Lora lora = {.rank = R, .scale = 0.75f, .down = {.n = 2, .in = I, .out = low}}, dlora = lora;
    for (int i = 0, at = 0; i < 3; i += 2, at++) { /* the middle matrix has no adapter */
        lora.down.w[at] = weight(t, DT_F32, R, I);
        lora.up[i] = weight(t, DT_F32, O[i], R);
        dlora.down.w[at] = gradient(t, R, I);
        dlora.up[i] = gradient(t, O[i], R);
    }
    w.lora = &lora;
    size_t out = (size_t)(N * w.out), n = (size_t)(N * low);
    Act *y = given(t, out), *dy = given(t, out), *x = given(t, n), *dt = act(t, n);
    t->e->lora_up(t->e, y, x, &w, N);
    keep(t, "y", y, out, bound(t, 1));
    t->e->lora_up_backward(t->e, dt, &dlora, dy, x, &w, N);
    keep(t, "dt", dt, n, bound(t, 2));
    keep(t, "dup 0", dlora.up[0].data, (size_t)(O[0] * R), bound(t, 1));
    keep(t, "dup 2", dlora.up[2].data, (size_t)(O[2] * R), bound(t, 1));
}

/* ------------------------------------------------------------------------------------------------ attention */

static const Segment forest[] = {{-1, 0, 0, 70, 80}, {0, 70, 80, 5, 16}, {0, 70, 96, 90, 96}, {2, 160, 192, 3, 16}};
static const Run runs[] = {{0, 0, 70, 0}, {1, 70, 5, 0}, {2, 75, 90, 0}, {3, 165, 3, 0}};
enum { ROWS = 168, CACHE = 208 };

/* A root of 70 tokens, two children, a grandchild: more than one tile, starts that are no multiple of it. */
static void op_attention(OpTape *t, const int *s) { /* heads, kv heads, head width, window, norms, one segment only */
    int H = s[0], G = s[1], E = s[2], window = s[3], n_runs = s[5] ? 1 : 4, N = s[5] ? 70 : ROWS, position[ROWS], cache_row[ROWS];
    float scale = 1.5f / sqrtf((float)E);
    size_t qkv_n = (size_t)(N * (H + 2 * G) * E), q_n = (size_t)(N * H * E), kv_n = (size_t)(N * G * E), half = (size_t)E / 2;
    for (int r = 0; r < n_runs; r++) {
        for (int i = 0; i < runs[r].n; i++) {
            position[runs[r].row + i] = forest[runs[r].seg].position + i;
            cache_row[runs[r].row + i] = forest[runs[r].seg].row + i;
        }
    }
    Tensor q_norm = weight(t, DT_F32, E, 0), k_norm = weight(t, DT_BF16, E, 0), dq_norm = gradient(t, E, 0), dk_norm = gradient(t, E, 0);
    const Tensor *qn = s[4] ? &q_norm : NULL, *kn = s[4] ? &k_norm : NULL;
    float *cosines = host_floats(t, 400 * half), *sines = host_floats(t, 400 * half);
    for (size_t i = 0; i < 400 * half; i++) {
        sines[i] = sinf(3 * cosines[i]);
        cosines[i] = cosf(3 * cosines[i]);
    }
    Act *c = room(t, DT_F32, 400 * half), *si = room(t, DT_F32, 400 * half);
    t->e->write(t->e, c, 0, cosines, 400 * half);
    t->e->write(t->e, si, 0, sines, 400 * half);
    Act *qkv = given(t, qkv_n), *dout = given(t, q_n), *q = act(t, q_n), *k = act(t, (size_t)(CACHE * G * E)), *v = act(t, (size_t)(CACHE * G * E)),
        *out = act(t, q_n), *lse = room(t, DT_F32, (size_t)(N * H)), *dq = act(t, q_n), *dk = act(t, kv_n), *dv = act(t, kv_n),
        *dqkv = act(t, qkv_n);
    t->e->rope_qkv(t->e, q, k, v, qkv, qn, kn, 1e-6f, 1, c, si, position, cache_row, N, H, G, E);
    keep(t, "q", q, q_n, bound(t, 1));
    t->e->attention(t->e, out, lse, q, k, v, forest, runs, n_runs, H, G, E, scale, window);
    /* q, k, the weights and the result are rounded */
    keep(t, "out", out, q_n, bound(t, 4));
    keep(t, "lse", lse, (size_t)(N * H), bound(t, 2));
    t->e->attention(t->e, out, NULL, q, k, v, forest, runs, n_runs, H, G, E, scale, window);
    keep(t, "out without lse", out, q_n, bound(t, 4));
    t->e->attention_backward(t->e, dq, dk, dv, dout, out, lse, q, k, v, forest, runs, n_runs, H, G, E, scale, window);
    keep(t, "dq", dq, q_n, bound(t, 6));
    keep(t, "dk", dk, kv_n, bound(t, 6));
    keep(t, "dv", dv, kv_n, bound(t, 6));
    Act *given_dq = given(t, q_n), *given_dk = given(t, kv_n), *given_dv = given(t, kv_n);
    t->e->rope_qkv_backward(t->e, dqkv, &dq_norm, &dk_norm, given_dq, given_dk, given_dv, qkv, qn, kn, 1e-6f, 1, c, si, position, N, H, G, E);
    keep(t, "dqkv", dqkv, qkv_n, bound(t, 1));
    if (s[4]) {
        keep(t, "dq_norm", dq_norm.data, (size_t)E, 2e-5);
        keep(t, "dk_norm", dk_norm.data, (size_t)E, 2e-5);
    }
}

/* Decoding: a step of rows that share ancestors, one of them long (its keys are walked in chunks), one all but hidden by the window. */
static const Segment tree[] = {{-1, 0, 0, 300, 304}, {0, 300, 304, 70, 80}, {0, 300, 384, 5, 16}, /* what they share */
                               {1, 370, 400, 3, 16}, {2, 305, 416, 12, 16}, {1, 370, 432, 1, 16}, {2, 305, 448, 16, 16}, {1, 370, 464, 9, 16},
                               {0, 300, 480, 7, 16}, {-1, 0, 496, 2, 16}, {1, 370, 512, 80, 80}, {1, 370, 592, 4, 16}};
enum { TREE = 12, SHARED = 3, TREE_ROWS = 608 };

static void op_decode(OpTape *t, const int *s) { /* heads, kv heads, head width, window, rows */
    int H = s[0], G = s[1], E = s[2], n = s[4], position[TREE_ROWS], cache_row[TREE_ROWS], rows = 0;
    size_t half = (size_t)E / 2, kv = (size_t)(TREE_ROWS * G * E), out_n = (size_t)(n * H * E);
    Run step[TREE - SHARED];
    for (int r = 0; r < TREE; r++) {
        for (int i = 0; i < tree[r].len; i++, rows++) {
            position[rows] = tree[r].position + i;
            cache_row[rows] = tree[r].row + i;
        }
    }
    size_t angles = TREE_ROWS * half;
    Act *c = given_as(t, DT_F32, angles), *si = given_as(t, DT_F32, angles), *qkv = given(t, (size_t)(rows * (H + 2 * G) * E)),
        *q = act(t, (size_t)(rows * H * E)), *k = act(t, kv), *v = act(t, kv), *out = act(t, out_n), *lse = room(t, DT_F32, (size_t)(n * H));
    t->e->rope_qkv(t->e, q, k, v, qkv, NULL, NULL, 0, 0, c, si, position, cache_row, rows, H, G, E);
    for (int r = 0; r < n; r++) { /* each segment's last token */
        step[r] = (Run){SHARED + r, r, 1, tree[SHARED + r].len - 1};
    }
    t->e->attention(t->e, out, lse, q, k, v, tree, step, n, H, G, E, 0.2f, s[3]);
    keep(t, "out", out, out_n, bound(t, 4));
    keep(t, "lse", lse, (size_t)(n * H), bound(t, 2));
}

/* ------------------------------------------------------------------------------------------------ losses, sampling, optimizer */

static void op_losses(OpTape *t, const int *s) { /* rows, vocabulary */
    int n = s[0], V = s[1], target[64];
    size_t all = (size_t)n * (size_t)V;
    float logp[64], dlogp[64];
    Act *logits = given_as(t, DT_F32, all);
    for (int i = 0; i < n; i++) {
        target[i] = (i * 977 + V - 1) % V;
        dlogp[i] = 0.25f * (float)(i % 3 - 1);
    }
    t->e->token_logprob(t->e, logp, logits, target, n, V);
    keep_floats(t, "logp", logp, (size_t)n, V == 1 ? 1 : 1e-5);
    t->e->token_logprob_backward(t->e, logits, logp, dlogp, target, n, V);
    keep(t, "dlogits", logits, all, V == 1 ? 1 : 1e-5);
    double squares = t->e->sum_squares(t->e, logits, all);
    float sum = (float)squares;
    keep_floats(t, "sum of squares", &sum, 1, V == 1 ? 1 : 1e-5);
}

static void keep_doubles(OpTape *t, const char *name, const double *x, int n, double bound) {
    float some[64];
    for (int i = 0; i < n; i++) {
        some[i] = (float)x[i];
    }
    keep_floats(t, name, some, (size_t)n, bound);
}

static void op_scores(OpTape *t, const int *s) { /* rows, width */
    int n = s[0], D = s[1];
    size_t all = (size_t)n * (size_t)D;
    double mse[64];
    float *pred = host_floats(t, all), *gold = host_floats(t, all), *good = host_floats(t, all);
    Act *x = act(t, all), *golds = room(t, DT_F32, all), *dx = act(t, all);
    memcpy(good, gold, all * sizeof(float));
    for (int i = 0; i < n; i++) {
        good[i * D] /= 2;
    }
    t->e->write(t->e, golds, 0, gold, all);
    t->e->write(t->e, x, 0, good, all);
    t->e->mse_nrm(t->e, mse, NULL, x, golds, n, D, 3, 1);
    keep_doubles(t, "mse of good predictions", mse, n, 3e-7); /* sums and cosine in fp64: in fp32 1e-7 of 1, of which this is a small part */
    for (int i = 1; i < n; i += 3) { /* a vector that is zero */
        memset((i % 2 ? pred : gold) + (size_t)i * (size_t)D, 0, (size_t)D * sizeof(float));
    }
    t->e->write(t->e, golds, 0, gold, all);
    t->e->write(t->e, x, 0, pred, all);
    t->e->mse_nrm(t->e, mse, dx, x, golds, n, D, 3, -0.5);
    keep_doubles(t, "mse", mse, n, 1e-6);
    keep(t, "dx", dx, all, bound(t, 1));
}

/* A draw must be the CPU's but where two tokens are all but tied: none here. */
static void op_sample(OpTape *t, const int *s) { /* vocabulary, top_k, top_p in 1000ths, temperature in 100ths, ties */
    int V = s[0], token[40];
    float logprob[40], drawn[40], *x = host_floats(t, 40 * (size_t)V);
    uint64_t key[40];
    for (size_t i = 0; i < 40 * (size_t)V; i++) {
        x[i] = s[4] ? rintf(2 * x[i]) : 5 * x[i] + 1e-3f * (float)(i % 89);
    }
    for (int i = 0; i < 40; i++) {
        key[i] = random_key(3, (uint64_t)i, 1, 2);
    }
    Act *logits = room(t, DT_F32, 40 * (size_t)V);
    t->e->write(t->e, logits, 0, x, 40 * (size_t)V);
    t->e->sample(t->e, token, logprob, logits, 40, V, (float)s[3] / 100, s[1], (float)s[2] / 1000, key);
    for (int i = 0; i < 40; i++) {
        drawn[i] = (float)token[i];
    }
    keep_floats(t, "tokens", drawn, 40, 0);
    keep_floats(t, "logprob", logprob, 40, 1e-5);
    t->e->sample(t->e, token, NULL, logits, 40, V, 0, 0, 1, NULL);
    for (int i = 0; i < 40; i++) {
        drawn[i] = (float)token[i];
    }
    keep_floats(t, "greedy", drawn, 40, 0);
}

static void op_adamw(OpTape *t, const int *s) { /* numbers, step */
    size_t n = (size_t)s[0];
    AdamW how = {0.9f, 0.95f, 1e-8f, 0.1f};
    Act *w = given_as(t, DT_F32, n), *g = given_as(t, DT_F32, n), *m = given_as(t, DT_F32, n), *v = room(t, DT_F32, n);
    float *square = host_floats(t, n);
    for (size_t i = 0; i < n; i++) {
        square[i] *= square[i];
    }
    t->e->write(t->e, v, 0, square, n);
    t->e->adamw(t->e, w, DT_F32, g, m, v, DT_F32, n, &how, 1e-3f, s[1], 0.5f, 77);
    keep(t, "w", w, n, 1e-5);
    keep(t, "m", m, n, 1e-5);
    keep(t, "v", v, n, 1e-5);
    Act *m2 = room(t, DT_BF16, n), *v2 = room(t, DT_BF16, n);
    t->e->zero(t->e, m2, n * sizeof(uint16_t));
    t->e->zero(t->e, v2, n * sizeof(uint16_t));
    t->e->adamw(t->e, w, DT_F32, g, m2, v2, DT_BF16, n, &how, 1e-3f, s[1], 0.5f, 77);
    keep(t, "w again", w, n, 1e-5);
    Act *w2 = room(t, DT_BF16, n), *m3 = room(t, DT_F32, n), *v3 = room(t, DT_F32, n);
    uint16_t *half = xcalloc(n + 1, sizeof(uint16_t));
    for (size_t i = 0; i < n; i++) {
        half[i] = f32_to_bf16(square[i]);
    }
    t->e->put(t->e, w2, half, n * sizeof(uint16_t));
    t->e->zero(t->e, m3, n * sizeof(float));
    t->e->zero(t->e, v3, n * sizeof(float));
    t->e->adamw(t->e, w2, DT_BF16, g, m3, v3, DT_F32, n, &how, 1e-3f, s[1], 0.5f, 77);
    const uint16_t *seen_w = t->e->view(t->e, w2, n * sizeof(uint16_t));
    keep_halves(t, "w, rounded stochastically", seen_w, n, 1.0 / 256); /* an fp32 rounding may turn a draw: one step of bf16 */
    t->e->unview(t->e, w2, seen_w);
    free(half);
    const uint16_t *seen = t->e->view(t->e, m2, n * sizeof(uint16_t)), *seen_v = t->e->view(t->e, v2, n * sizeof(uint16_t));
    keep_halves(t, "m, rounded stochastically", seen, n, 0); /* from the same fp32 numbers by the same draws: the same bits */
    keep_halves(t, "v, rounded stochastically", seen_v, n, 1.0 / 256);
    t->e->unview(t->e, m2, seen);
    t->e->unview(t->e, v2, seen_v);
}

/* ------------------------------------------------------------------------------------------------ the cases */

const OpCase op_cases[] = {
    {"embed", op_embed, {{1, 1, 1, DT_F32}, {7, 33, 11, DT_BF16}, {5, 64, 9, DT_F32}, {130, 40, 300, DT_F16}, {3, 1030, 4, DT_BF16}}},
    {"rmsnorm", op_rmsnorm, {{1, 1, 0, DT_F32}, {3, 37, 1, DT_BF16}, {130, 8, 0, DT_F32}, {5, 2050, 1, DT_F16}, {2, 4096, 0, DT_BF16}}},
    {"gated", op_gated, {{1, 1, 0}, {1, 1, 1}, {3, 37, 1}, {5, 64, 0}, {2, 1000, 1}}},
    {"rows", op_rows, {{1, 1, 1}, {9, 33, 4}, {20, 64, 7}, {3, 1027, 2}}},
    {"linear", op_linear, {{1, 1, 1, 1, DT_F32, 1}, {7, 40, 5, 2, DT_BF16, 1}, {70, 67, 9, 30, DT_F16, 0}, {3, 300, 4, 3, DT_F32, 1},
                           {300, 8, 24, 8, DT_BF16, 1}}},
    {"rounded", op_rounded, {{1, 16, 1, 1, WEIGHTS_INT8, 1}, {5, 300, 40, 50, WEIGHTS_FP8, 1}, {17, 272, 9, 70, WEIGHTS_INT8, 0},
                             {64, 528, 70, 3, WEIGHTS_FP8, 0}, {67, 40, 5, 90, WEIGHTS_INT8, 1}, {70, 33, 4, 4, WEIGHTS_FP8, 1}}},
    {"lora", op_lora, {{1, 3, 1, 2, 1, 1}, {9, 20, 7, 5, 33, 4}, {65, 16, 8, 8, 8, 3}}},
    {"attention", op_attention, {{4, 2, 10, 0, 1, 0}, {3, 1, 64, 0, 0, 0}, {4, 4, 16, 7, 1, 0}, {2, 2, 36, 66, 0, 0}, {1, 1, 2, 0, 0, 1}}},
    {"wide attention", op_attention, {{2, 1, 128, 0, 0, 0}, {1, 1, 256, 40, 1, 1}}},
    {"decoding", op_decode, {{4, 2, 64, 0, 9}, {7, 1, 20, 9, 8}, {24, 1, 16, 0, 5}, {14, 2, 36, 90, 9}, {2, 2, 16, 310, 7}, {1, 1, 8, 0, 1}}},
    {"losses", op_losses, {{1, 1}, {3, 37}, {64, 100}, {2, 4099}, {5, 40000}}},
    {"scores", op_scores, {{1, 2}, {5, 37}, {9, 64}, {3, 4099}, {33, 1030}}},
    {"sample", op_sample, {{7, 0, 1000, 100, 0}, {1003, 0, 1000, 70, 0}, {1003, 20, 1000, 130, 0}, {501, 0, 600, 100, 0},
                           {777, 50, 900, 100, 0}, {300, 7, 1000, 100, 1}, {300, 0, 500, 100, 1}, {90, 40, 300, 200, 1}, {333, 0, 1, 100, 0}}},
    {"adamw", op_adamw, {{1, 1}, {1025, 3}, {40000, 100}}},
    {0},
};

void op_tape_close(OpTape *t) {
    for (int i = 0; i < (int)arrlen(t->memory); i++) {
        t->e->free(t->e, t->memory[i]);
    }
    for (int i = 0; i < (int)arrlen(t->host); i++) {
        t->e->forget(t->e, t->host[i], 1); /* a tensor starts where its memory does */
        free(t->host[i]);
    }
    arrfree(t->memory);
    arrfree(t->host);
    arrfree(t->out);
    arrfree(t->kept);
    *t = (OpTape){0};
}

double op_difference(const OpTape *want, const OpTape *have, int output, double *expected, double *got) {
    const OpOutput *k = &have->kept[output];
    double largest = 0, worst = 0;
    for (size_t j = k->from; j < k->from + k->n; j++) {
        double a = (double)want->out[j], b = (double)have->out[j], apart = fabs(b - a);
        largest = fmax(largest, fabs(a));
        if (!(apart <= worst) || j == k->from) { /* a NaN counts, and stays */
            worst = apart;
            *expected = a;
            *got = b;
        }
        if (isnan(apart)) {
            return INFINITY;
        }
    }
    return worst > 0 ? worst / largest : 0;
}

/* ------------------------------------------------------------------------------------------------ nla verify */

/* What is compared: a line each, and how many are beyond their bounds. */
typedef struct {
    const Settings *s;
    int wrong;
} Findings;

static void finding(Findings *f, const char *name, const char *what, double apart, double bound) {
    bool wrong = !(apart <= bound);
    f->wrong += wrong;
    if (f->s->json) {
        printf("{\"op\": \"%s\", \"what\": \"%s\", \"difference\": %.3g, \"bound\": %.3g}\n", name, what, isfinite(apart) ? apart : 1e30, bound);
    } else {
        printf("%-16s %-28s %9.2e  %s %.1e\n", name, what, apart, wrong ? "BEYOND" : "within", bound);
    }
    fflush(stdout);
}

/* The largest difference of each output of a case over all its sizes. */
static int verify_case(Findings *f, const OpCase *c, Engine *cpu, Engine *gpu, Err *err) {
    double worst[16] = {0}, expected, got;
    OpOutput kept[16];
    int n = 0, status = 0;
    for (int i = 0; i < OP_SIZES && c->size[i][0] && status == 0; i++) {
        OpTape want = {.e = cpu}, have = {.e = gpu};
        c->play(&want, c->size[i]);
        c->play(&have, c->size[i]);
        status = gpu->check(gpu, err);
        for (int k = 0; k < (int)arrlen(have.kept) && k < 16; k++) {
            double apart = op_difference(&want, &have, k, &expected, &got) / (have.kept[k].bound > 0 ? have.kept[k].bound : 1e-30);
            worst[k] = k >= n || apart > worst[k] ? apart : worst[k];
            kept[k] = have.kept[k];
            n = k >= n ? k + 1 : n;
        }
        op_tape_close(&want);
        op_tape_close(&have);
    }
    for (int k = 0; k < n && status == 0; k++) { /* sizes may differ in bounds: what counts is the share of it */
        finding(f, c->name, kept[k].name, worst[k] * (kept[k].bound > 0 ? kept[k].bound : 1e-30), kept[k].bound);
    }
    return status;
}

/* A module's outputs on one engine, in the order they came. */
typedef struct {
    char **name;  /* stb, owned */
    float **data; /* stb, owned */
    size_t *n;    /* stb */
} Seen;

static void see(void *context, Engine *e, const char *module, int layer, const Act *data, int first, int rows, int width) {
    Seen *s = context;
    (void)first;
    size_t n = (size_t)rows * (size_t)width;
    arrput(s->name, *module ? xstrdup(module) : xstrdup("block"));
    arrput(s->data, xmalloc(n * sizeof(float)));
    arrput(s->n, n);
    e->read(e, arrlast(s->data), data, 0, n);
    (void)layer;
}

static void see_logits(void *context, Engine *e, const Act *logits, int first, int n) {
    (void)context, (void)e, (void)logits, (void)first, (void)n; /* the tap has seen them */
}

static void seen_free(Seen *s) {
    for (int i = 0; i < (int)arrlen(s->name); i++) {
        free(s->name[i]);
        free(s->data[i]);
    }
    arrfree(s->name);
    arrfree(s->data);
    arrfree(s->n);
}

enum { VERIFY_ROOT = 40, VERIFY_CHILD = 24 };

/* A root and two children of random tokens through a model. */
static int see_model(Seen *seen, const char *dir, Engine *e, Err *err) {
    Model m;
    Forest f;
    Batch b = {0};
    int id[VERIFY_ROOT], status = adapted_load(&m, dir, 0, e, err);
    if (status != 0) {
        return -1;
    }
    status = forest_open(&f, &m, m.config.n_layers, VERIFY_ROOT + 2 * VERIFY_CHILD + 4 * CACHE_ALIGN, VERIFY_ROOT + 2 * VERIFY_CHILD, FORWARD, err);
    if (status == 0) {
        int root = forest_add(&f, -1, VERIFY_ROOT, err), parent[] = {-1, root, root};
        for (int s = 0; s < 3; s++) {
            int n = s ? VERIFY_CHILD : VERIFY_ROOT;
            for (int i = 0; i < n; i++) {
                id[i] = (int)(random_uniform(1, (uint64_t)s, (uint64_t)i, 0) * m.config.vocab_size);
            }
            batch_add(&b, &f, s ? forest_add(&f, parent[s], n, err) : root, id, n, 2);
        }
        LogitSink sink = {NULL, see_logits};
        Tap tap = {seen, see};
        status = model_forward(&f, &b, m.lm_head.n ? &sink : NULL, &tap, err);
        forest_close(&f);
    }
    batch_free(&b);
    model_free(&m);
    return status;
}

/* Each kind of module's largest difference, relative to the largest number of that output. */
static int verify_model(Findings *f, const char *dir, Engine *cpu, Engine *gpu, Err *err) {
    static const char *const kinds[] = {"model.embed_tokens", "self_attn", "mlp", "block", "model.norm", "lm_head"};
    Seen want = {0}, have = {0};
    int status = see_model(&want, dir, cpu, err) == 0 && see_model(&have, dir, gpu, err) == 0 ? 0 : -1;
    for (int k = 0; k < 6 && status == 0; k++) {
        double worst = -1;
        for (int i = 0; i < (int)arrlen(want.name); i++) {
            double largest = 0, apart = 0;
            for (size_t j = 0; j < want.n[i] && strcmp(want.name[i], kinds[k]) == 0; j++) {
                double d = fabs((double)have.data[i][j] - (double)want.data[i][j]);
                largest = fmax(largest, fabs((double)want.data[i][j]));
                apart = isnan(d) ? INFINITY : fmax(apart, d);
                worst = fmax(worst, 0);
            }
            worst = largest > 0 ? fmax(worst, apart / largest) : worst;
        }
        if (worst >= 0) {
            /* fp32: rounding, through all blocks. bf16: 2^-9 at each of some 12 roundings a block, adding up as a random walk does */
            finding(f, "whole model", kinds[k], worst, gpu->act_dtype == DT_F32 ? 1e-4 : 6e-2);
        }
    }
    seen_free(&want);
    seen_free(&have);
    return status;
}

int run_verify(const Settings *s, Err *err) {
    Settings cuda = *s;
    Engine *cpu = engine_open(s->threads, false, err), *gpu = NULL;
    Findings f = {.s = s};
    cuda.device = "cuda";
    int status = cpu ? open_engine(&gpu, &cuda, err) : -1;
    if (status == 0) {
        cpu->weights = gpu->weights; /* the whole model with --weights */
        note(s, "%s against %s: the largest difference, relative to the largest number expected\n", gpu->name, cpu->name);
    }
    for (const OpCase *c = op_cases; c->name && status == 0; c++) {
        status = verify_case(&f, c, cpu, gpu, err);
    }
    if (status == 0 && s->model) {
        status = verify_model(&f, s->model, cpu, gpu, err);
    }
    if (gpu) {
        gpu->close(gpu);
    }
    if (cpu) {
        cpu->close(cpu);
    }
    return status == 0 && f.wrong ? fail(err, "%d of the outputs above are further apart than rounding explains", f.wrong) : status;
}
