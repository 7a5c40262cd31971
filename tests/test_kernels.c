/* Every kernel of kernels.cu, run on the CPU by tests/cuda_shim.h, against the CPU engine's ops: forward and backward, fp32 and bf16,
 * odd sizes, threads in several orders. (tests/test_model.c, test_method.c and test_train.c are built once more for this engine,
 * as the suites shim_model, shim_method and shim_train.) */
#include "../nla.h"
#include "cuda_shim.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <stb/stb_ds.h>

/* engine_open of the suites that are built again. */
Engine *shim_engine(int threads, bool bf16_dot, Err *err);

Engine *shim_engine(int threads, bool bf16_dot, Err *err) {
    if (bf16_dot) {
        fail(err, "the shim is tested in fp32 here");
        return NULL;
    }
    setenv("NLA_SHIM", "1", 1);
    shim_order((uint64_t)threads); /* which results must not depend on */
    return engine_open_cuda(DT_F32, err);
}

static Engine *open_shim(DType act) {
    Err err = {0};
    setenv("NLA_SHIM", "1", 1);
    Engine *e = engine_open_cuda(act, &err);
    cr_assert(e, "%s", err.msg);
    return e;
}

/* ------------------------------------------------------------------------------------------------ tapes
 * An op's test is a function of a tape: it asks for inputs (the same numbers on every engine), runs the op and keeps its outputs.
 * It is played on the CPU engine and, in several orders of threads, on the shim; the outputs are compared. */

typedef struct {
    const char *name;
    size_t from, n;
    double bound; /* of |difference| / largest |expected| */
} Kept_;

typedef struct {
    Engine *e;
    uint64_t state;
    float *out;   /* stb */
    Kept_ *kept;  /* stb */
    Act **memory; /* stb: of the engine */
    void **host;  /* stb */
} Tape;

static float next_float(Tape *t) {
    return bf16_to_f32(f32_to_bf16((float)(2 * random_uniform(11, t->state++, 0, 0) - 1))); /* exact on every engine */
}

static float *host_floats(Tape *t, size_t n) {
    float *x = xmalloc((n + 1) * sizeof(float));
    for (size_t i = 0; i < n; i++) {
        x[i] = next_float(t);
    }
    arrput(t->host, x);
    return x;
}

/* Memory of the engine: with nothing in it (NaN), or random numbers. */
static Act *room(Tape *t, DType dtype, size_t n) {
    Act *x = t->e->alloc(t->e, dtype, n);
    cr_assert(x);
    arrput(t->memory, x);
    if (t->e->scratch && strncmp(t->e->name, "cpu", 3) == 0) {
        memset(x, 0xff, n * dtype_size(dtype));
    }
    return x;
}

static Act *given_as(Tape *t, DType dtype, size_t n) {
    Act *x = room(t, dtype, n);
    t->e->write(t->e, x, 0, host_floats(t, n), n);
    return x;
}

static Act *act(Tape *t, size_t n) { return room(t, t->e->act_dtype, n); }
static Act *given(Tape *t, size_t n) { return given_as(t, t->e->act_dtype, n); }

/* A weight as a file holds it. */
static Tensor weight(Tape *t, DType dtype, int rows, int columns) {
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
static Tensor gradient(Tape *t, int rows, int columns) {
    size_t n = (size_t)rows * (size_t)(columns ? columns : 1);
    return (Tensor){.dtype = DT_F32, .n_dims = columns ? 2 : 1, .shape = {rows, columns}, .bytes = n * sizeof(float), .data = given_as(t, DT_F32, n)};
}

static void keep_floats(Tape *t, const char *name, const float *x, size_t n, double bound) {
    arrput(t->kept, ((Kept_){name, arrlenu(t->out), n, bound}));
    memcpy(arraddnptr(t->out, n), x, n * sizeof(float));
}

static void keep(Tape *t, const char *name, const Act *x, size_t n, double bound) {
    float *host = xmalloc((n + 1) * sizeof(float));
    t->e->read(t->e, host, x, 0, n);
    keep_floats(t, name, host, n, bound);
    free(host);
}

/* fp32: 1e-5 of the largest expected number. bf16: an output is rounded to 8 bits, an error of 2^-9 of itself; `steps` is how many
 * roundings of that size lie on the way to it. */
static double bound(const Tape *t, double steps) { return t->e->act_dtype == DT_F32 ? 1e-5 : steps / 256; }

static void wipe(Tape *t) {
    for (int i = 0; i < (int)arrlen(t->memory); i++) {
        t->e->free(t->e, t->memory[i]);
    }
    for (int i = 0; i < (int)arrlen(t->host); i++) {
        free(t->host[i]);
    }
    arrfree(t->memory);
    arrfree(t->host);
    arrfree(t->out);
    arrfree(t->kept);
    t->e->close(t->e);
}

typedef void Op(Tape *t, const int *size);

static void compare(const Tape *want, const Tape *have, const char *op) {
    cr_assert(arrlen(want->kept) == arrlen(have->kept));
    for (int i = 0; i < (int)arrlen(want->kept); i++) {
        const Kept_ *k = &have->kept[i];
        double largest = 0, worst = 0;
        size_t at = 0;
        for (size_t j = k->from; j < k->from + k->n; j++) {
            largest = fmax(largest, fabs((double)want->out[j]));
            double apart = fabs((double)have->out[j] - (double)want->out[j]);
            if (!(apart <= worst)) {
                worst = apart;
                at = j;
            }
        }
        cr_assert(worst <= k->bound * largest, "%s, %s[%zu]: %.9g instead of %.9g (largest %.3g, bound %.1e)", op, k->name, at - k->from,
                  (double)have->out[at], (double)want->out[at], largest, k->bound);
    }
}

/* Sizes are lists of up to 6 numbers that end with a list of zeros. */
static void check(const char *name, Op *op, const int (*sizes)[6]) {
    for (; (*sizes)[0]; sizes++) {
        Err err = {0};
        Tape cpu = {.e = engine_open(1, false, &err)};
        cr_assert(cpu.e, "%s", err.msg);
        op(&cpu, *sizes);
        for (int bf16 = 0; bf16 < 2; bf16++) {
            Tape first = {0};
            for (uint64_t order = 0; order < 3; order++) {
                Tape gpu = {.e = open_shim(bf16 ? DT_BF16 : DT_F32)};
                shim_order(order * 7919);
                op(&gpu, *sizes);
                cr_assert(gpu.e->check(gpu.e, &err) == 0, "%s", err.msg);
                compare(&cpu, &gpu, name);
                if (order == 0) {
                    first = gpu;
                    continue;
                }
                cr_assert(memcmp(first.out, gpu.out, arrlenu(gpu.out) * sizeof(float)) == 0, "%s: depends on the order of threads", name);
                wipe(&gpu);
            }
            wipe(&first);
        }
        wipe(&cpu);
    }
    cr_assert(shim_buffers() == 0, "%s: %zu device buffers were not freed", name, shim_buffers());
}

#define CHECK(op, ...) check(#op, op, (const int[][6]){__VA_ARGS__, {0}})

/* ------------------------------------------------------------------------------------------------ row by row ops */

static void op_embed(Tape *t, const int *s) { /* rows, width, vocabulary, dtype */
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

Test(kernels, embed) {
    CHECK(op_embed, {1, 1, 1, DT_F32}, {7, 33, 11, DT_BF16}, {5, 64, 9, DT_F32}, {130, 40, 300, DT_F16}, {3, 1030, 4, DT_BF16});
}

static void op_rmsnorm(Tape *t, const int *s) { /* rows, width, plus one, dtype of w */
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
}

Test(kernels, rmsnorm) {
    CHECK(op_rmsnorm, {1, 1, 0, DT_F32}, {3, 37, 1, DT_BF16}, {130, 8, 0, DT_F32}, {5, 2050, 1, DT_F16}, {2, 4096, 0, DT_BF16});
}

static void op_gated(Tape *t, const int *s) { /* rows, width, gelu */
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

Test(kernels, gated) { CHECK(op_gated, {1, 1, 0}, {1, 1, 1}, {3, 37, 1}, {5, 64, 0}, {2, 1000, 1}); }

static void op_rows(Tape *t, const int *s) { /* rows, width, wanted */
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

Test(kernels, rows) { CHECK(op_rows, {1, 1, 1}, {9, 33, 4}, {20, 64, 7}, {3, 1027, 2}); }

/* ------------------------------------------------------------------------------------------------ products */

static Linear stack(Tape *t, const int *O, int n, int I, DType dtype, bool bias) {
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

static void op_linear(Tape *t, const int *s) { /* rows, in, two outs, dtype, bias */
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

Test(kernels, linear) {
    CHECK(op_linear, {1, 1, 1, 1, DT_F32, 1}, {7, 40, 5, 2, DT_BF16, 1}, {70, 67, 9, 30, DT_F16, 0}, {3, 300, 4, 3, DT_F32, 1},
          {300, 8, 24, 8, DT_BF16, 1});
}

static void op_lora(Tape *t, const int *s) { /* rows, in, outs of three, rank */
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

Test(kernels, lora) { CHECK(op_lora, {1, 3, 1, 2, 1, 1}, {9, 20, 7, 5, 33, 4}, {65, 16, 8, 8, 8, 3}); }

/* ------------------------------------------------------------------------------------------------ attention */

static const Segment forest[] = {{-1, 0, 0, 70, 80}, {0, 70, 80, 5, 16}, {0, 70, 96, 90, 96}, {2, 160, 192, 3, 16}};
static const Run runs[] = {{0, 0, 70, 0}, {1, 70, 5, 0}, {2, 75, 90, 0}, {3, 165, 3, 0}};
enum { ROWS = 168, CACHE = 208 };

/* A root of 70 tokens, two children, a grandchild: more than one tile, starts that are no multiple of it. */
static void op_attention(Tape *t, const int *s) { /* heads, kv heads, head width, window, norms, one segment only */
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

Test(kernels, attention) {
    CHECK(op_attention, {4, 2, 10, 0, 1, 0}, {3, 1, 64, 0, 0, 0}, {4, 4, 16, 7, 1, 0}, {2, 2, 36, 66, 0, 0}, {1, 1, 2, 0, 0, 1});
}

Test(kernels, attention_wide_heads) { CHECK(op_attention, {2, 1, 128, 0, 0, 0}, {1, 1, 256, 40, 1, 1}); }

/* As on an A100 (163 KB) and with barely enough: other tiles, the same numbers. */
Test(kernels, attention_takes_smaller_tiles_where_shared_memory_is_small) {
    shim_limit_shared(163 * 1024);
    CHECK(op_attention, {2, 1, 256, 0, 0, 1});
    shim_limit_shared(60 * 1024);
    CHECK(op_attention, {3, 1, 64, 0, 0, 0});
    shim_limit_shared(0);
}

/* Decoding: each child appends one token to what the cache holds. */
static void op_decode(Tape *t, const int *s) { /* heads, kv heads, head width, window */
    int H = s[0], G = s[1], E = s[2], position[ROWS], cache_row[ROWS];
    size_t half = (size_t)E / 2, kv = (size_t)(CACHE * G * E);
    Act *c = given_as(t, DT_F32, 400 * half), *si = given_as(t, DT_F32, 400 * half), *qkv = given(t, (size_t)(ROWS * (H + 2 * G) * E)),
        *q = act(t, (size_t)(ROWS * H * E)), *k = act(t, kv), *v = act(t, kv), *out = act(t, (size_t)(3 * H * E));
    for (int r = 0; r < 4; r++) {
        for (int i = 0; i < runs[r].n; i++) {
            position[runs[r].row + i] = forest[runs[r].seg].position + i;
            cache_row[runs[r].row + i] = forest[runs[r].seg].row + i;
        }
    }
    t->e->rope_qkv(t->e, q, k, v, qkv, NULL, NULL, 0, 0, c, si, position, cache_row, ROWS, H, G, E);
    Run step[] = {{1, 0, 1, 4}, {3, 1, 1, 2}, {2, 2, 1, 89}}; /* each segment's last token */
    t->e->attention(t->e, out, NULL, q, k, v, forest, step, 3, H, G, E, 0.2f, s[3]);
    keep(t, "out", out, (size_t)(3 * H * E), bound(t, 4));
}

Test(kernels, attention_of_single_tokens) { CHECK(op_decode, {4, 2, 64, 0}, {7, 1, 20, 9}, {24, 1, 16, 0}); }

/* ------------------------------------------------------------------------------------------------ losses, sampling, optimizer */

static void op_losses(Tape *t, const int *s) { /* rows, vocabulary */
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

Test(kernels, losses) { CHECK(op_losses, {1, 1}, {3, 37}, {64, 100}, {2, 4099}, {5, 40000}); }

/* A draw must be the CPU's but where two tokens are all but tied: none here. */
static void op_sample(Tape *t, const int *s) { /* vocabulary, top_k, top_p in 1000ths, temperature in 100ths, ties */
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

Test(kernels, sample) {
    CHECK(op_sample, {7, 0, 1000, 100, 0}, {1003, 0, 1000, 70, 0}, {1003, 20, 1000, 130, 0}, {501, 0, 600, 100, 0}, {777, 50, 900, 100, 0},
          {300, 7, 1000, 100, 1}, {300, 0, 500, 100, 1}, {90, 40, 300, 200, 1}, {333, 0, 1, 100, 0});
}

static void op_adamw(Tape *t, const int *s) { /* numbers, step */
    size_t n = (size_t)s[0];
    AdamW how = {0.9f, 0.95f, 1e-8f, 0.1f};
    Act *w = given_as(t, DT_F32, n), *g = given_as(t, DT_F32, n), *m = given_as(t, DT_F32, n), *v = room(t, DT_F32, n);
    float *square = host_floats(t, n);
    for (size_t i = 0; i < n; i++) {
        square[i] *= square[i];
    }
    t->e->write(t->e, v, 0, square, n);
    t->e->adamw(t->e, w, g, m, v, DT_F32, n, &how, 1e-3f, s[1], 0.5f, 77);
    keep(t, "w", w, n, 1e-5);
    keep(t, "m", m, n, 1e-5);
    keep(t, "v", v, n, 1e-5);
    Act *m2 = room(t, DT_BF16, n), *v2 = room(t, DT_BF16, n);
    t->e->zero(t->e, m2, n * sizeof(uint16_t));
    t->e->zero(t->e, v2, n * sizeof(uint16_t));
    t->e->adamw(t->e, w, g, m2, v2, DT_BF16, n, &how, 1e-3f, s[1], 0.5f, 77);
    keep(t, "w again", w, n, 1e-5);
    const uint16_t *seen = t->e->view(t->e, m2, n * sizeof(uint16_t)), *seen_v = t->e->view(t->e, v2, n * sizeof(uint16_t));
    float *narrow = xmalloc(2 * n * sizeof(float));
    for (size_t i = 0; i < n; i++) {
        narrow[i] = bf16_to_f32(seen[i]);
        narrow[n + i] = bf16_to_f32(seen_v[i]);
    }
    keep_floats(t, "m, rounded stochastically", narrow, n, 0); /* from the same fp32 numbers by the same draws: the same bits */
    keep_floats(t, "v, rounded stochastically", narrow + n, n, 1.0 / 256);
    t->e->unview(t->e, m2, seen);
    t->e->unview(t->e, v2, seen_v);
    free(narrow);
}

Test(kernels, adamw) { CHECK(op_adamw, {1, 1}, {1025, 3}, {40000, 100}); }

/* ------------------------------------------------------------------------------------------------ the engine */

/* Weights on the host may change between uses when that is announced, and trained ones whenever the optimizer runs. */
Test(kernels, copies_of_weights_follow_their_source) {
    for (int bf16 = 0; bf16 < 2; bf16++) {
        Tape t = {.e = open_shim(bf16 ? DT_BF16 : DT_F32)};
        Engine *e = t.e;
        float w[2] = {1, 2}, y;
        Linear linear = {.n = 1, .in = 2, .out = 1, .w = {{.dtype = DT_F32, .n_dims = 2, .shape = {1, 2}, .data = w, .bytes = sizeof w}}};
        Act *x = act(&t, 2), *out = act(&t, 1);
        e->write(e, x, 0, (float[]){1, 1}, 2);
        e->linear(e, out, x, &linear, 1);
        e->read(e, &y, out, 0, 1);
        cr_assert(y == 3);
        e->forget(e, w, sizeof w);
        w[0] = 5;
        e->linear(e, out, x, &linear, 1);
        e->read(e, &y, out, 0, 1);
        cr_assert(y == 7);
        Act *trained = room(&t, DT_F32, 10), *g = room(&t, DT_F32, 10), *m = room(&t, DT_F32, 10), *v = room(&t, DT_F32, 10);
        float start[10] = {0, 0, 0, 0, 4, 8};
        e->write(e, trained, 0, start, 10);
        e->write(e, g, 0, (float[10]){0, 0, 0, 0, 1, 1}, 10);
        e->zero(e, m, 40);
        e->zero(e, v, 40);
        linear.w[0].data = (float *)trained + 4;
        e->linear(e, out, x, &linear, 1);
        e->read(e, &y, out, 0, 1);
        cr_assert(y == 12);
        e->adamw(e, trained, g, m, v, DT_F32, 10, &(AdamW){0.9f, 0.95f, 0, 0}, 1.0f, 1, 1, 0); /* each by 1 */
        e->linear(e, out, x, &linear, 1);
        e->read(e, &y, out, 0, 1);
        cr_assert(fabsf(y - 10) < 1e-4f, "%g", (double)y);
        wipe(&t);
    }
    cr_assert(shim_buffers() == 0);
}

Test(kernels, a_failed_allocation_is_reported_and_nothing_runs_after_it) {
    Tape t = {.e = open_shim(DT_F32)};
    Err err = {0};
    Act *x = given(&t, 8), *y = act(&t, 4);
    Tensor w = weight(&t, DT_F32, 4, 2);
    Linear linear = {.n = 1, .in = 2, .out = 4, .w = {w}};
    cr_assert(t.e->check(t.e, &err) == 0);
    shim_fail_after(0);
    cr_assert(t.e->alloc(t.e, DT_F32, 100) == NULL);
    cr_assert(t.e->check(t.e, &err) == 0, "an alloc that fails is its caller's to report");
    t.e->linear(t.e, y, x, &linear, 1); /* the copy of the weight */
    float out[4] = {0};
    t.e->read(t.e, out, y, 0, 4);
    cr_assert(isnan(out[0]));
    cr_assert(t.e->check(t.e, &err) == -1 && strstr(err.msg, "no memory for the weights"), "%s", err.msg);
    shim_fail_after(-1);
    wipe(&t);
}
