/* Every op of the CPU engine, in each of its builds that this processor runs, against plain loops in double. */
#include "../quantise.h"

#include <criterion/criterion.h>
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static const char *const builds[] = {"any", "avx2", "avx512", NULL};

/* The engine of one build; NULL once all have been given. Several names may give the same build: no harm. */
static Engine *build_engine(int i, int threads) {
    static const int n = sizeof builds / sizeof *builds;
    if (i >= n) {
        return NULL;
    }
    if (builds[i]) {
        setenv("NLA_CPU", builds[i], 1);
    } else {
        unsetenv("NLA_CPU");
    }
    Err err = {0};
    Engine *e = engine_open(threads, false, &err);
    cr_assert(e, "%s", err.msg);
    return e;
}

static uint64_t random_state = 1;

static float random_float(void) {
    return (float)(2 * random_uniform(7, random_state++, 0, 0) - 1);
}

static float *random_floats(size_t n) {
    float *x = malloc((n + 1) * sizeof(float));
    for (size_t i = 0; i < n; i++) {
        x[i] = random_float();
    }
    return x;
}

/* |a - b| relative to the size of the terms that were added up. */
static void near(double a, double b, double scale, double bound, const char *what) {
    cr_assert(fabs(a - b) <= bound * (scale + 1e-30), "%s: %.9g, expected %.9g", what, a, b);
}

/* Every code stands for a number that has this code; a number's code is that of the nearest; equal distances go to the even one. */
Test(cpu, weights_of_one_byte_take_the_nearest_code) {
    for (int f = WEIGHTS_INT8; f <= WEIGHTS_FP8; f++) {
        WeightFormat format = (WeightFormat)f;
        for (int c = 0; c < 256; c++) {
            bool number = format == WEIGHTS_INT8 ? c != 128 : (c & 0x7f) != 0x7f && c != 0x80; /* not -128, not NaN, not -0 */
            cr_assert(!number || code_of(number_of((uint8_t)c, format), format) == c, "code %d", c);
        }
        cr_assert(number_of(1, WEIGHTS_FP8) == 0x1p-9f && number_of(0x7e, WEIGHTS_FP8) == 448 && number_of(0x38, WEIGHTS_FP8) == 1);
        for (int i = 0; i < 4000; i++) {
            float x = largest_code(format) * random_float() * (i % 2 ? 1.0f : 0.01f);
            float apart = fabsf(number_of(code_of(x, format), format) - x);
            for (int c = 0; c < 256; c++) {
                if (format == WEIGHTS_INT8 ? c == 128 : (c & 0x7f) == 0x7f) {
                    continue;
                }
                float other = fabsf(number_of((uint8_t)c, format) - x);
                cr_assert(apart <= other && (apart < other || code_of(x, format) % 2 == 0 || number_of((uint8_t)c, format) == number_of(code_of(x, format), format)),
                          "%.9g", (double)x);
            }
        }
    }
}

/* A product with rounded weights against doubles of the same rounding, and the largest of a row kept no longer than its matrix. */
Test(cpu, linear_rounds_its_weights_to_one_byte) {
    enum { N = 3, I = 70, O = 9 };
    for (int i = 0; i < 4; i++) {
        Engine *e = build_engine(i, 1);
        for (int f = WEIGHTS_INT8; e && f <= WEIGHTS_FP8; f++) {
            float *w = random_floats(O * I), *x = random_floats(N * I), y[N * O];
            for (int turn = 0; turn < 2; turn++) {
                Linear linear = {.n = 1, .in = I, .out = O, .format = (WeightFormat)f,
                                 .w = {{.dtype = DT_F32, .n_dims = 2, .shape = {O, I}, .data = w, .bytes = O * I * sizeof(float)}}};
                e->linear(e, y, x, &linear, N);
                for (int at = 0; at < N * O; at++) {
                    double sum = 0, largest = 0;
                    for (int k = 0; k < I; k++) {
                        largest = fmax(largest, fabs((double)w[at % O * I + k]));
                    }
                    for (int k = 0; k < I; k++) {
                        float by = to_codes((float)largest, linear.format), scale = from_codes((float)largest, linear.format);
                        sum += (double)x[at / O * I + k] * (double)number_of(code_of(w[at % O * I + k] * by, linear.format), linear.format) * (double)scale;
                    }
                    near((double)y[at], sum, 10, 1e-6, "rounded linear");
                }
                e->forget(e, w, O * I * sizeof(float));
                for (int k = 0; k < O * I; k++) {
                    w[k] *= 3;
                }
            }
            free(w);
            free(x);
        }
        if (e) {
            e->close(e);
        }
    }
}

/* The f16 pattern of k / 64, found by looking through all of them once. */
static uint16_t f16_of_64ths(int k) {
    static uint16_t pattern[129];
    static bool made;
    for (uint32_t bits = 0; !made && bits < 65536; bits++) {
        float x = f16_to_f32((uint16_t)bits) * 64;
        if (x >= -64 && x <= 64 && x == rintf(x)) {
            pattern[(int)x + 64] = (uint16_t)bits;
        }
    }
    made = true;
    return pattern[k + 64];
}

/* A random [rows, cols] matrix of that dtype; exact[] are the numbers it holds. */
static Tensor random_tensor(DType dtype, int rows, int cols, float **exact) {
    size_t n = (size_t)rows * (size_t)cols;
    float *x = random_floats(n);
    Tensor t = {.dtype = dtype, .n_dims = 2, .shape = {rows, cols}, .bytes = n * dtype_size(dtype)};
    uint16_t *half = malloc((n + 1) * 2);
    for (size_t i = 0; i < n && dtype == DT_BF16; i++) {
        half[i] = f32_to_bf16(x[i]);
        x[i] = bf16_to_f32(half[i]);
    }
    for (size_t i = 0; i < n && dtype == DT_F16; i++) {
        half[i] = f16_of_64ths((int)rintf(x[i] * 64));
        x[i] = rintf(x[i] * 64) / 64;
    }
    t.data = half;
    if (dtype == DT_F32) {
        float *copy = malloc((n + 1) * sizeof(float));
        memcpy(copy, x, n * sizeof(float));
        free(half);
        t.data = copy;
    }
    *exact = x;
    return t;
}

/* Leaves NaN wherever the engine's scratch can hold it: what a product does not write itself must not reach its result. */
static void poison(Engine *e) {
    enum { N = 130, I = 1024, O = 8 };
    float *x = malloc(N * I * sizeof(float)), *y = malloc(N * O * sizeof(float)), *w = malloc(O * I * sizeof(float));
    memset(x, 0xff, N * I * sizeof(float));
    memset(w, 0xff, O * I * sizeof(float));
    Linear linear = {.n = 1, .w = {{.dtype = DT_F32, .n_dims = 2, .shape = {O, I}, .data = w}}, .in = I, .out = O};
    e->linear(e, y, x, &linear, N);
    linear.w[0].dtype = DT_BF16; /* goes through the packed strip */
    e->linear(e, y, x, &linear, N);
    free(x);
    free(y);
    free(w);
}

/* fp32 sums of K products of numbers below 1: the error stays below a few units of K * 2^-24 of the terms' sum. */
static void check_linear(Engine *e, DType dtype, int N, int I, int O0, int O1, bool bias) {
    float *w0, *w1, *b0 = NULL, *x = random_floats((size_t)N * (size_t)I);
    Linear linear = {.n = 2, .in = I, .out = O0 + O1};
    linear.w[0] = random_tensor(dtype, O0, I, &w0);
    linear.w[1] = random_tensor(dtype, O1, I, &w1);
    if (bias) {
        linear.b[0] = random_tensor(dtype, O0, 1, &b0);
    }
    float *y = malloc((size_t)N * (size_t)(O0 + O1) * sizeof(float));
    poison(e);
    e->linear(e, y, x, &linear, N);
    for (int n = 0; n < N; n++) {
        for (int o = 0; o < O0 + O1; o++) {
            const float *w = o < O0 ? w0 + (size_t)o * (size_t)I : w1 + (size_t)(o - O0) * (size_t)I;
            double sum = bias && o < O0 ? (double)b0[o] : 0, size = fabs(sum);
            for (int i = 0; i < I; i++) {
                double term = (double)x[n * I + i] * (double)w[i];
                sum += term;
                size += fabs(term);
            }
            near((double)y[n * (O0 + O1) + o], sum, size, 1e-6, "linear");
        }
    }
    for (int n = 0; n < N; n += 3) { /* a row alone gives the same bits */
        float *alone = malloc((size_t)(O0 + O1) * sizeof(float));
        e->linear(e, alone, x + (size_t)n * (size_t)I, &linear, 1);
        cr_assert(memcmp(alone, y + (size_t)n * (size_t)(O0 + O1), (size_t)(O0 + O1) * sizeof(float)) == 0,
                  "row %d depends on its neighbours", n);
        free(alone);
    }
    free((void *)linear.w[0].data);
    free((void *)linear.w[1].data);
    free((void *)linear.b[0].data);
    free(w0);
    free(w1);
    free(b0);
    free(x);
    free(y);
}

Test(cpu, linear_equals_plain_loops_at_odd_sizes_and_dtypes) {
    for (int i = 0; i < 4; i++) {
        Engine *e = build_engine(i, 2);
        check_linear(e, DT_F32, 1, 1, 1, 1, true);
        check_linear(e, DT_F32, 7, 40, 5, 2, true);
        check_linear(e, DT_BF16, 131, 67, 9, 30, false);
        check_linear(e, DT_BF16, 3, 2500, 4, 3, true); /* several pieces of k */
        check_linear(e, DT_F16, 13, 1031, 6, 1, true);
        check_linear(e, DT_F32, 250, 96, 64, 64, false);
        e->close(e);
    }
}

/* Large enough that every op below divides its work; 5 threads on fewer processors also shuffle who does what. */
Test(cpu, any_number_of_threads_gives_the_same_bits) {
    unsetenv("NLA_CPU");
    enum { N = 250, I = 1500, O = 96, H = 3, E = 32, F = O / 2 };
    float *w, *x = random_floats(N * I), *first[4] = {0};
    Linear linear = {.n = 1, .in = I, .out = O};
    linear.w[0] = random_tensor(DT_BF16, O, I, &w);
    float *cosines = random_floats(N * E / 2);
    int place[N];
    for (int i = 0; i < N; i++) {
        place[i] = i;
    }
    Segment segment = {-1, 0, 0, N, N};
    Run run = {0, 0, N, 0};
    for (int threads = 1; threads <= 5; threads += 2) {
        Err err = {0};
        Engine *e = engine_open(threads, false, &err);
        float *out[4], *k = calloc((N + 16) * E, 4), *v = calloc((N + 16) * E, 4), *q = malloc(N * H * E * 4);
        for (int i = 0; i < 4; i++) {
            out[i] = calloc(N * H * E, 4);
        }
        e->linear(e, out[0], x, &linear, N);
        e->rmsnorm(e, out[1], out[0], &(Tensor){.data = w, .dtype = DT_F32}, N, O, 1e-5f, 0);
        e->gated(e, out[2], out[0], N, F, true);
        e->rope_qkv(e, q, k, v, x, NULL, NULL, 0, 0, cosines, cosines, place, place, N, H, 1, E);
        e->attention(e, out[3], NULL, q, k, v, &segment, &run, 1, H, 1, E, 0.2f, 0);
        for (int i = 0; i < 4; i++) {
            if (threads == 1) {
                first[i] = out[i];
                continue;
            }
            cr_assert(memcmp(first[i], out[i], N * H * E * 4) == 0, "op %d, %d threads", i, threads);
            free(out[i]);
        }
        free(k);
        free(v);
        free(q);
        e->close(e);
    }
    for (int i = 0; i < 4; i++) {
        free(first[i]);
    }
    free(cosines);
    free((void *)linear.w[0].data);
    free(w);
    free(x);
}

/* The bf16 path rounds both inputs to bf16 and nothing else. */
Test(cpu, bf16_dot_equals_products_of_rounded_inputs) {
    unsetenv("NLA_CPU");
    Err err = {0};
    Engine *e = engine_open(2, true, &err);
    if (!e) {
        cr_skip_test("%s", err.msg);
    }
    const DType dtypes[] = {DT_BF16, DT_F32};
    for (int d = 0; d < 2; d++) {
        int N = 9, I = d == 0 ? 1101 : 1100, O = 11; /* odd: rows of W start between two floats */
        float *w, *x = random_floats((size_t)(N * I)), *y = malloc((size_t)(N * O) * sizeof(float));
        Linear linear = {.n = 1, .in = I, .out = O};
        linear.w[0] = random_tensor(dtypes[d], O, I, &w);
        poison(e);
        e->linear(e, y, x, &linear, N);
        for (int n = 0; n < N; n++) {
            for (int o = 0; o < O; o++) {
                double sum = 0, size = 0;
                for (int i = 0; i < I; i++) {
                    double term = (double)bf16_to_f32(f32_to_bf16(x[n * I + i])) * (double)bf16_to_f32(f32_to_bf16(w[o * I + i]));
                    sum += term;
                    size += fabs(term);
                }
                near((double)y[n * O + o], sum, size, 1e-6, "bf16 linear");
            }
        }
        free((void *)linear.w[0].data);
        free(w);
        free(x);
        free(y);
    }
    e->close(e);
}

static double rounded(const float *x, int at) {
    return (double)bf16_to_f32(f32_to_bf16(x[at]));
}

/* So do the products of its gradients: sums over W's rows (dx) and over the batch (dw), of odd lengths. */
Test(cpu, bf16_gradients_equal_products_of_rounded_inputs) {
    unsetenv("NLA_CPU");
    Err err = {0};
    Engine *e = engine_open(2, true, &err);
    if (!e) {
        cr_skip_test("%s", err.msg);
    }
    const int sizes[][3] = {{13, 70, 301}, {300, 16, 7}, {1, 600, 33}}; /* N, I, O */
    const DType dtypes[] = {DT_F32, DT_BF16, DT_F16};
    for (int k = 0; k < 9; k++) {
        int N = sizes[k / 3][0], I = sizes[k / 3][1], O = sizes[k / 3][2];
        float *w, *x = random_floats((size_t)(N * I)), *dy = random_floats((size_t)(N * O)), *dx = random_floats((size_t)(N * I)),
                  *dw = random_floats((size_t)(O * I)), *old = malloc((size_t)(O * I) * sizeof(float));
        Linear linear = {.n = 1, .in = I, .out = O}, gradient = linear;
        linear.w[0] = random_tensor(dtypes[k % 3], O, I, &w);
        gradient.w[0] = (Tensor){.dtype = DT_F32, .n_dims = 2, .shape = {O, I}, .data = dw};
        memcpy(old, dw, (size_t)(O * I) * sizeof(float));
        poison(e);
        e->linear_backward(e, dx, dy, &linear, N, false);
        e->linear_weight_backward(e, &gradient, dy, x, N);
        for (int n = 0; n < N; n++) {
            for (int i = 0; i < I; i++) {
                double sum = 0, size = 0;
                for (int o = 0; o < O; o++) {
                    double term = rounded(dy, n * O + o) * rounded(w, o * I + i);
                    sum += term;
                    size += fabs(term);
                }
                near((double)dx[n * I + i], sum, size, 1e-6, "bf16 dx");
            }
        }
        for (int o = 0; o < O; o++) {
            for (int i = 0; i < I; i++) {
                double sum = (double)old[o * I + i], size = fabs(sum);
                for (int n = 0; n < N; n++) {
                    double term = rounded(dy, n * O + o) * rounded(x, n * I + i);
                    sum += term;
                    size += fabs(term);
                }
                near((double)dw[o * I + i], sum, size, 1e-6, "bf16 dw");
            }
        }
        free((void *)linear.w[0].data);
        free(w);
        free(x);
        free(dy);
        free(dx);
        free(dw);
        free(old);
    }
    e->close(e);
}

Test(cpu, rmsnorm_equals_its_formula) {
    for (int i = 0; i < 4; i++) {
        Engine *e = build_engine(i, 2);
        for (int one = 0; one < 2; one++) {
            enum { N = 20, D = 43 };
            float *w, *x = random_floats(N * D), y[N * D];
            Tensor t = random_tensor(DT_BF16, 1, D, &w);
            e->rmsnorm(e, y, x, &t, N, D, 1e-5f, one);
            for (int n = 0; n < N; n++) {
                double squares = 0;
                for (int d = 0; d < D; d++) {
                    squares += (double)x[n * D + d] * (double)x[n * D + d];
                }
                for (int d = 0; d < D; d++) {
                    double expected = (double)x[n * D + d] / sqrt(squares / D + 1e-5) * ((double)w[d] + one);
                    near((double)y[n * D + d], expected, fabs(expected), 1e-6, "rmsnorm");
                }
            }
            e->rmsnorm(e, x, x, &t, N, D, 1e-5f, one);
            cr_assert(memcmp(x, y, sizeof y) == 0, "in place gives other numbers");
            free((void *)t.data);
            free(w);
            free(x);
        }
        e->close(e);
    }
}

/* silu and gelu_tanh over the whole range, with the ends where e^x leaves fp32. */
Test(cpu, gated_equals_silu_and_gelu_over_the_whole_range) {
    for (int b = 0; b < 4; b++) {
        Engine *e = build_engine(b, 1);
        enum { F = 4099 };
        float *in = malloc(2 * F * sizeof(float)), *out = malloc(F * sizeof(float));
        for (int gelu = 0; gelu < 2; gelu++) {
            for (int i = 0; i < F; i++) {
                in[i] = (float)(i - F / 2) * 0.06f;
                in[F + i] = random_float();
            }
            e->gated(e, out, in, 1, F, gelu);
            for (int i = 0; i < F; i++) {
                double g = (double)in[i], y = 0.7978845608028654 * (g + 0.044715 * g * g * g);
                double act = gelu ? 0.5 * g * (1 + tanh(y)) : g / (1 + exp(-g));
                /* 3e-7 of g: a rounding of 1 + e^-x may be all that is left of a vanishing activation */
                near((double)out[i], act * (double)in[F + i], fabs(act) + 3e-7 * fabs(g), 2e-6, "gated");
            }
        }
        free(in);
        free(out);
        e->close(e);
    }
}

/* q, k, v made by rope_qkv, then attention over a forest, against softmax over the explicit list of visible tokens. */
typedef struct {
    int H, G, E, window;
} Attended;

static void check_attention(Engine *e, Attended s) {
    /* a root of 70 tokens, two children, a grandchild: more than one tile, starts that are no multiple of it */
    Segment segment[] = {{-1, 0, 0, 70, 80}, {0, 70, 80, 5, 16}, {0, 70, 96, 90, 96}, {2, 160, 192, 3, 16}};
    Run run[] = {{0, 0, 70, 0}, {1, 70, 5, 0}, {2, 75, 90, 0}, {3, 165, 3, 0}};
    enum { N = 168, ROWS = 208 };
    size_t width = (size_t)(s.H + 2 * s.G) * (size_t)s.E, half = (size_t)s.E / 2, row_of[N];
    float *qkv = random_floats(N * width), *cosines = random_floats(N * half + 1000), *sines = random_floats(N * half + 1000);
    float *qw, *kw, *q = malloc(N * width * 4), *k = malloc(ROWS * width * 4), *v = malloc(ROWS * width * 4),
                    *out = malloc(N * width * 4);
    Tensor q_norm = random_tensor(DT_F32, 1, s.E, &qw), k_norm = random_tensor(DT_F32, 1, s.E, &kw);
    int position[N], cache_row[N], seg_of[N];
    memset(k, 0xff, ROWS * width * 4); /* unwritten rows are NaN: they must never reach a result */
    memset(v, 0xff, ROWS * width * 4);
    for (int r = 0; r < 4; r++) {
        for (int i = 0; i < run[r].n; i++) {
            int n = run[r].row + i;
            position[n] = segment[run[r].seg].position + i;
            cache_row[n] = segment[run[r].seg].row + i;
            seg_of[n] = run[r].seg;
            row_of[n] = (size_t)n;
        }
    }
    e->rope_qkv(e, q, k, v, qkv, &q_norm, &k_norm, 1e-6f, 1, cosines, sines, position, cache_row, N, s.H, s.G, s.E);
    e->attention(e, out, NULL, q, k, v, segment, run, 4, s.H, s.G, s.E, 0.3f, s.window);

    /* the same heads in double */
    double *rotated = calloc(N * width, sizeof(double));
    for (size_t n = 0; n < N; n++) {
        for (int h = 0; h < s.H + 2 * s.G; h++) {
            const float *x = qkv + n * width + (size_t)(h * s.E);
            double *y = rotated + n * width + (size_t)(h * s.E), squares = 0;
            for (int i = 0; i < s.E; i++) {
                squares += (double)x[i] * (double)x[i];
            }
            for (int i = 0; i < s.E; i++) {
                const float *w = h < s.H ? qw : kw;
                y[i] = h < s.H + s.G ? (double)x[i] / sqrt(squares / s.E + 1e-6) * (1 + (double)w[i]) : (double)x[i];
            }
            for (size_t i = 0; i < half && h < s.H + s.G; i++) {
                double c = (double)cosines[(size_t)position[n] * half + i], d = (double)sines[(size_t)position[n] * half + i];
                double a = y[i], b = y[i + half];
                y[i] = a * c - b * d;
                y[i + half] = b * c + a * d;
            }
        }
    }
    for (size_t n = 0; n < N; n++) {
        for (int h = 0; h < s.H; h++) {
            double weight[N] = {0}, total = 0, expected[256] = {0};
            int g = h / (s.H / s.G);
            for (size_t j = 0; j < N; j++) {
                bool ancestor = false;
                for (int a = segment[seg_of[n]].parent; a >= 0; a = segment[a].parent) {
                    ancestor = ancestor || a == seg_of[j];
                }
                bool visible = ancestor || (seg_of[j] == seg_of[n] && position[j] <= position[n]);
                if (!visible || (s.window && position[n] - position[j] >= s.window)) {
                    continue;
                }
                double dot = 0;
                for (int i = 0; i < s.E; i++) {
                    dot += rotated[n * width + (size_t)(h * s.E + i)] * rotated[j * width + (size_t)((s.H + g) * s.E + i)];
                }
                weight[j] = exp(0.3 * dot);
                total += weight[j];
            }
            for (size_t j = 0; j < N; j++) {
                for (int i = 0; i < s.E; i++) {
                    expected[i] += weight[j] / total * rotated[j * width + (size_t)((s.H + s.G + g) * s.E + i)];
                }
            }
            for (int i = 0; i < s.E; i++) {
                near((double)out[(row_of[n] * (size_t)s.H + (size_t)h) * (size_t)s.E + (size_t)i], expected[i], 1, 5e-6, "attention");
            }
        }
    }
    void *all[] = {qkv, cosines, sines, qw, kw, q, k, v, out, rotated, (void *)q_norm.data, (void *)k_norm.data};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        free(all[i]);
    }
}

Test(cpu, rope_and_attention_over_a_forest_equal_softmax_over_the_visible_tokens) {
    const Attended shapes[] = {{4, 2, 10, 0}, {3, 1, 64, 0}, {4, 4, 16, 7}, {8, 2, 36, 66}, {2, 1, 128, 0}};
    for (int i = 0; i < 4; i++) {
        Engine *e = build_engine(i, 2);
        for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
            check_attention(e, shapes[s]);
        }
        e->close(e);
    }
}

/* ------------------------------------------------------------------------------------------------ sampling */

Test(cpu, greedy_takes_the_lowest_id_among_the_largest) {
    Engine *e = build_engine(3, 1);
    float logits[2][5] = {{0, 3, 1, 3, 2}, {-5, -6, -7, -8, -5}}, logprob[2];
    int token[2];
    e->sample(e, token, logprob, logits, 2, 5, 0, 0, 1, NULL);
    cr_assert(token[0] == 1 && token[1] == 0);
    near((double)logprob[0], 3 - log(1 + exp(3) + exp(1) + exp(3) + exp(2)), 1, 1e-6, "logprob");
    e->close(e);
}

/* Which tokens can be drawn, and how often, over many keys. */
static void draw_many(Engine *e, const float *logits, int V, float temperature, int top_k, float top_p, double *share) {
    enum { DRAWS = 200000 };
    for (int i = 0; i < V; i++) {
        share[i] = 0;
    }
    for (int i = 0; i < DRAWS; i++) {
        uint64_t key = random_key(1, (uint64_t)i, 0, 0);
        int token;
        e->sample(e, &token, NULL, logits, 1, V, temperature, top_k, top_p, &key);
        share[token] += 1.0 / DRAWS;
    }
}

Test(cpu, draws_follow_the_softmax_cut_by_top_k_then_top_p) {
    for (int b = 0; b < 4; b++) {
        Engine *e = build_engine(b, 1);
        const float logits[7] = {1, 2.5f, 0, 2.5f, -1, 2, 3};
        double p[7], total = 0, share[7];
        for (int i = 0; i < 7; i++) {
            total += p[i] = exp((double)logits[i] / 0.7);
        }
        draw_many(e, logits, 7, 0.7f, 0, 1, share);
        for (int i = 0; i < 7; i++) {
            near(share[i], p[i] / total, 1, 5e-3, "share"); /* 4.5 standard deviations of a share of 1/2 in 200,000 draws */
        }
        draw_many(e, logits, 7, 0.7f, 2, 1, share); /* ids 1 and 3 tie at the border: both stay */
        near(share[6], p[6] / (p[6] + p[1] + p[3]), 1, 5e-3, "top-k share");
        cr_assert(share[0] == 0 && share[5] == 0 && share[1] > 0 && share[3] > 0);
        draw_many(e, logits, 7, 0.7f, 0, 0.5f, share); /* 6 alone holds less: 6 and the lower of the equals */
        cr_assert(p[6] / total < 0.5 && (p[6] + p[1]) / total > 0.5);
        near(share[6] + share[1], 1, 1, 1e-9, "top-p share");
        draw_many(e, logits, 7, 0.7f, 3, 0.6f, share); /* top-p counts within what top-k left */
        near(share[6] + share[1], 1, 1, 1e-9, "both");
        e->close(e);
    }
}

static uint32_t mix(uint32_t h) {
    h = (h ^ (h >> 16)) * 0x7feb352du;
    h = (h ^ (h >> 15)) * 0x846ca68bu;
    return h ^ (h >> 16);
}

Test(cpu, a_draw_is_a_race_of_exponential_numbers_keyed_by_row_and_token) {
    enum { V = 1003, DRAWS = 500 };
    float *logits = random_floats(V);
    int other = 0;
    for (int b = 0; b < 4; b++) {
        Engine *e = build_engine(b, 1);
        for (int d = 0; d < DRAWS; d++) {
            uint64_t key = random_key(7, (uint64_t)d, 0, 0);
            int token, winner = 0;
            double best = -1, second = -1;
            e->sample(e, &token, NULL, logits, 1, V, 0.25f, 0, 1, &key);
            for (int i = 0; i < V; i++) {
                uint32_t h = mix(mix((uint32_t)i + (uint32_t)key) + (uint32_t)(key >> 32));
                double score = exp((double)logits[i] / 0.25) / -log1p(-((double)h + 0.5) * 0x1p-32);
                second = score > best ? best : score > second ? score : second;
                winner = score > best ? i : winner;
                best = score > best ? score : best;
            }
            other += token != winner;
            cr_assert(token == winner || best < second * (1 + 1e-5), "draw %d: token %d instead of %d", d, token, winner);
        }
        e->close(e);
    }
    cr_assert(other <= 1, "%d near ties in %d draws", other, 4 * DRAWS);
    free(logits);
}

Test(cpu, top_k_finds_its_border_among_many) {
    Engine *e = build_engine(3, 1);
    enum { V = 5000 };
    float *logits = random_floats(V);
    for (int k = 1; k < V; k += 997) {
        for (uint64_t key = 0; key < 50; key++) {
            int token, above = 0;
            e->sample(e, &token, NULL, logits, 1, V, 1, k, 1, &key);
            for (int i = 0; i < V; i++) {
                above += logits[i] > logits[token];
            }
            cr_assert(above < k, "token %d has %d better ones, top-k is %d", token, above, k);
        }
    }
    free(logits);
    e->close(e);
}

Test(cpu, an_engine_that_the_processor_lacks_is_an_error) {
    setenv("NLA_CPU", "sse9", 1);
    Err err = {0};
    cr_assert(engine_open(1, false, &err) == NULL);
    cr_assert(strstr(err.msg, "NLA_CPU is 'sse9'"), "%s", err.msg);
    setenv("NLA_CPU", "any", 1);
    err = (Err){0};
    cr_assert(engine_open(1, true, &err) == NULL);
    cr_assert(strstr(err.msg, "bf16"), "%s", err.msg);
}
