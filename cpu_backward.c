/* cpu_backward.c - the gradients of every op, and the optimizer, on the CPU. Each function names the op whose way back it is;
 * the formulas are in nla.h.
 *
 * What must stay true: every sum runs in one order that the thread count does not change. Work is therefore divided by outputs,
 * never by what is summed, and sums over all elements go through blocks of a fixed size.
 */
#include "cpu.h"

#ifndef CPU_BACKWARD
#define CPU_BACKWARD cpu_backward_any
#endif

void CPU_BACKWARD(Engine *e);

static Scratch *my_scratch(const Engine *e) {
    return &((Cpu *)e->scratch)->thread[omp_get_thread_num()];
}

static float *work_room(Scratch *s, size_t count) {
    s->work = grow(s->work, &s->work_room, count);
    return s->work;
}

/* ------------------------------------------------------------------------------------------------ the product of gradients
 * C (+)= alpha A B, where the forward's product has its summed dimension contiguous in both and this one does not: dx = dy W
 * sums over W's rows, dW = dy^T x over the batch's. A is packed in slivers of PRODUCT_ROWS rows, B in panels of
 * PRODUCT_COLUMNS columns; a tile of C stays in registers while it walks down both. */

enum {
    PRODUCT_ROWS = LANES == 16 ? 6 : 4,
    PRODUCT_VECTORS = LANES == 16 ? 4 : 2,
    PRODUCT_COLUMNS = PRODUCT_VECTORS * LANES,
    SUM_BLOCK = 256,               /* of the summed dimension: a sliver stays in L1, */
    ROW_BLOCK = 32 * PRODUCT_ROWS, /* ... this many rows and */
    COLUMN_BLOCK = 576             /* ... this many columns of it in L2 */
};

typedef struct {
    const float *a; /* A[m,k] = a[m*am + k*ak] */
    size_t am, ak;
    const Tensor *bt; /* B[k,n] = element k*ldb + n of a stored matrix */
    const float *b;   /* or b[k*ldb + n*bn] of floats; bn 0 stands for 1 */
    size_t ldb, bn;
    float *c; /* C[m,n] = c[m*ldc + n] */
    size_t ldc;
    int M, N, K;
    float alpha;
    bool add;
    bool bf16; /* round A and B to bf16; then alpha is 1 and bn is not used */
} Gemm;

/* A sliver of whole rows: the loop over them is unrolled, which the compiler cannot do for a count it does not know. */
INLINE void pack_sliver(float *out, const float *a, size_t am, size_t ak, int depth, float alpha) {
    for (int k = 0; k < depth; k++, out += PRODUCT_ROWS) {
        for (int i = 0; i < PRODUCT_ROWS; i++) {
            out[i] = alpha * a[(size_t)i * am + (size_t)k * ak];
        }
    }
}

#ifdef __AVX512BF16__
INLINE Vec dot_pairs(Vec sum, const float *pair, Vec row) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(*(const int *)(const void *)pair), (__m512bh)row);
}

/* 16 numbers of a row as bf16, those past n zero, each in 32 bits. */
INLINE __m512i bf16_of(const float *x, int n) {
    __mmask16 mask = (__mmask16)(n >= 16 ? 0xffffu : (1u << n) - 1);
    return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, x)));
}

INLINE __m512i stored_bf16(const uint16_t *x, int n) {
    __mmask16 mask = (__mmask16)(n >= 16 ? 0xffffu : (1u << n) - 1);
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x));
}

INLINE __m512i stored_f16(const uint16_t *x, int n) {
    __mmask16 mask = (__mmask16)(n >= 16 ? 0xffffu : (1u << n) - 1);
    return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, x))));
}

/* Pairs of two rows' numbers. */
INLINE void weave(float *out, __m512i first, __m512i second) {
    _mm512_storeu_si512(out, _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
}

/* pack_a in pairs of neighbours along k, the last one's second number zero when depth is odd. alpha is 1; A has its rows (ak 1) or its
 * columns (am 1) contiguous. room: [PRODUCT_ROWS, SUM_BLOCK / 2] */
static void pack_a_pairs(float *out, const Gemm *g, int m0, int rows, int k0, int depth, float *room) {
    int pairs = (depth + 1) / 2;
    for (int m = 0; m < rows; m += PRODUCT_ROWS, out += PRODUCT_ROWS * pairs) {
        int n = rows - m < PRODUCT_ROWS ? rows - m : PRODUCT_ROWS;
        const float *a = g->a + (size_t)(m0 + m) * g->am + (size_t)k0 * g->ak;
        if (g->ak != 1) {
            for (int k = 0; k < depth; k += 2) {
                __m512i first = bf16_of(a + (size_t)k * g->ak, n), second = bf16_of(a + (size_t)(k + 1) * g->ak, k + 1 < depth ? n : 0);
                __m512i woven = _mm512_or_si512(first, _mm512_slli_epi32(second, 16));
                _mm512_mask_storeu_epi32(out + k / 2 * PRODUCT_ROWS, (1 << PRODUCT_ROWS) - 1, woven);
            }
            continue;
        }
        for (int i = 0; i < n; i++) { /* round a row, then deal out its pairs */
            narrow((uint16_t *)(void *)(room + i * (SUM_BLOCK / 2)), a + (size_t)i * g->am, (size_t)depth);
        }
        for (int p = 0; p < pairs; p++) {
            for (int i = 0; i < PRODUCT_ROWS; i++) {
                out[p * PRODUCT_ROWS + i] = i < n ? room[i * (SUM_BLOCK / 2) + p] : 0;
            }
        }
    }
}

/* pack_b in pairs of neighbours along k; past the last column there are zeros. */
static void pack_b_pairs(float *out, const Gemm *g, int n0, int columns, int k0, int depth) {
    const float *floats = g->bt && g->bt->dtype == DT_F32 ? g->bt->data : g->b;
    const uint16_t *stored = g->bt ? g->bt->data : NULL;
    bool f16 = g->bt && g->bt->dtype == DT_F16;
    for (int n = 0; n < columns; n += PRODUCT_COLUMNS) {
        for (int k = 0; k < depth; k += 2) {
            size_t at = (size_t)(k0 + k) * g->ldb + (size_t)(n0 + n);
            for (int i = 0; i < PRODUCT_COLUMNS; i += 16, at += 16, out += 16) {
                int width = columns - n - i < 0 ? 0 : columns - n - i, second = k + 1 < depth ? width : 0;
                if (floats) {
                    weave(out, bf16_of(floats + at, width), bf16_of(floats + at + g->ldb, second));
                } else if (f16) {
                    weave(out, stored_f16(stored + at, width), stored_f16(stored + at + g->ldb, second));
                } else {
                    weave(out, stored_bf16(stored + at, width), stored_bf16(stored + at + g->ldb, second));
                }
            }
        }
    }
}
#else
INLINE Vec dot_pairs(Vec sum, const float *pair, Vec row) { /* never called: the engine has bf16_dot off */
    (void)pair, (void)row;
    return sum;
}
#endif

static void pack_a(float *out, const Gemm *g, int m0, int rows, int k0, int depth) {
    for (int m = 0; m < rows; m += PRODUCT_ROWS, out += (size_t)PRODUCT_ROWS * (size_t)depth) {
        int n = rows - m < PRODUCT_ROWS ? rows - m : PRODUCT_ROWS;
        const float *a = g->a + (size_t)(m0 + m) * g->am + (size_t)k0 * g->ak;
        if (n == PRODUCT_ROWS && g->am == 1) {
            pack_sliver(out, a, 1, g->ak, depth, g->alpha);
        } else if (n == PRODUCT_ROWS && g->ak == 1) {
            pack_sliver(out, a, g->am, 1, depth, g->alpha);
        } else {
            for (int k = 0; k < depth; k++) {
                for (int i = 0; i < PRODUCT_ROWS; i++) {
                    out[k * PRODUCT_ROWS + i] = i < n ? g->alpha * a[(size_t)i * g->am + (size_t)k * g->ak] : 0;
                }
            }
        }
    }
}

static void pack_b(float *out, const Gemm *g, int n0, int columns, int k0, int depth) {
    const float *floats = g->bt && g->bt->dtype == DT_F32 ? g->bt->data : g->b;
    for (int n = 0; n < columns; n += PRODUCT_COLUMNS) {
        size_t width = (size_t)(columns - n < PRODUCT_COLUMNS ? columns - n : PRODUCT_COLUMNS);
        for (int k = 0; k < depth; k++, out += PRODUCT_COLUMNS) {
            size_t row = (size_t)(k0 + k) * g->ldb, column = (size_t)(n0 + n);
            if (!floats) {
                widen(out, g->bt, row + column, width);
            } else if (g->bn > 1) {
                for (size_t i = 0; i < width; i++) {
                    out[i] = floats[row + (column + i) * g->bn];
                }
            } else if (width == PRODUCT_COLUMNS) { /* a length that the compiler knows: a few vector moves */
                memcpy(out, floats + row + column, PRODUCT_COLUMNS * sizeof(float));
            } else {
                memcpy(out, floats + row + column, width * sizeof(float));
            }
            if (width < PRODUCT_COLUMNS) {
                memset(out + width, 0, (PRODUCT_COLUMNS - width) * sizeof(float));
            }
        }
    }
}

/* PRODUCT_ROWS x nv registers of C, added to. bf16: an element of a sliver or a panel is a pair of neighbours in the sum. */
INLINE void product_tile(int nv, bool bf16, const float *a, const float *b, int depth, float *c, size_t ldc) {
    Vec sum[PRODUCT_ROWS][PRODUCT_VECTORS];
    for (int i = 0; i < PRODUCT_ROWS; i++) {
        for (int j = 0; j < nv; j++) {
            sum[i][j] = (Vec){0};
        }
    }
    for (int k = 0; k < depth; k++, a += PRODUCT_ROWS, b += PRODUCT_COLUMNS) {
        Vec row[PRODUCT_VECTORS];
        for (int j = 0; j < nv; j++) {
            row[j] = load(b + j * LANES);
        }
        for (int i = 0; i < PRODUCT_ROWS; i++) {
            for (int j = 0; j < nv; j++) {
                sum[i][j] = bf16 ? dot_pairs(sum[i][j], a + i, row[j]) : sum[i][j] + a[i] * row[j];
            }
        }
    }
    for (int i = 0; i < PRODUCT_ROWS; i++) {
        for (int j = 0; j < nv; j++) {
            float *to = c + (size_t)i * ldc + j * LANES;
            store(to, load(to) + sum[i][j]); /* at the end: a sum of short sums rounds less than a long one */
        }
    }
}

/* A tile of `columns` columns; an adapter's rank is often one register. */
static void product_columns(int columns, bool bf16, const float *a, const float *b, int depth, float *c, size_t ldc) {
#define TILE(n)                                                                                                        \
    case n:                                                                                                            \
        if (bf16) {                                                                                                    \
            product_tile(n, true, a, b, depth, c, ldc);                                                                \
        } else {                                                                                                       \
            product_tile(n, false, a, b, depth, c, ldc);                                                               \
        }                                                                                                              \
        break;
    switch ((columns + LANES - 1) / LANES) {
        TILE(1)
        TILE(2)
#ifdef __AVX512F__
        TILE(3)
        TILE(4)
#endif
    default: break;
    }
#undef TILE
}

/* A tile at the border of C goes through a whole one. */
static void border_tile(bool bf16, const float *a, const float *b, int depth, float *c, size_t ldc, int rows, int columns) {
    float whole[PRODUCT_ROWS * PRODUCT_COLUMNS] = {0};
    for (int i = 0; i < rows; i++) {
        memcpy(whole + i * PRODUCT_COLUMNS, c + (size_t)i * ldc, (size_t)columns * sizeof(float));
    }
    product_columns(columns, bf16, a, b, depth, whole, PRODUCT_COLUMNS);
    for (int i = 0; i < rows; i++) {
        memcpy(c + (size_t)i * ldc, whole + i * PRODUCT_COLUMNS, (size_t)columns * sizeof(float));
    }
}

/* Rows [from, to) of C, `block` at a time, of columns [n0, n0+columns): B is packed once for all of them. */
static void gemm_blocks(const Gemm *g, Scratch *s, int from, int to, int block, int n0, int columns) {
    size_t a_room = (size_t)ROW_BLOCK * SUM_BLOCK, b_room = (size_t)COLUMN_BLOCK * SUM_BLOCK, pairs_room = PRODUCT_ROWS * SUM_BLOCK / 2;
    float *a = work_room(s, a_room + b_room + pairs_room), *b = a + a_room;
    for (int i = from; i < to && !g->add; i++) {
        memset(g->c + (size_t)i * g->ldc + n0, 0, (size_t)columns * sizeof(float));
    }
    for (int k0 = 0; k0 < g->K; k0 += SUM_BLOCK) {
        int deep = g->K - k0 < SUM_BLOCK ? g->K - k0 : SUM_BLOCK, depth = g->bf16 ? (deep + 1) / 2 : deep;
#ifdef __AVX512BF16__
        if (g->bf16) {
            pack_b_pairs(b, g, n0, columns, k0, deep);
        }
#endif
        if (!g->bf16) {
            pack_b(b, g, n0, columns, k0, deep);
        }
        for (int m0 = from; m0 < to; m0 += block) {
            int rows = to - m0 < block ? to - m0 : block;
#ifdef __AVX512BF16__
            if (g->bf16) {
                pack_a_pairs(a, g, m0, rows, k0, deep, b + b_room);
            }
#endif
            if (!g->bf16) {
                pack_a(a, g, m0, rows, k0, deep);
            }
            for (int n = 0; n < columns; n += PRODUCT_COLUMNS) {
                int width = columns - n < PRODUCT_COLUMNS ? columns - n : PRODUCT_COLUMNS;
                for (int m = 0; m < rows; m += PRODUCT_ROWS) {
                    int height = rows - m < PRODUCT_ROWS ? rows - m : PRODUCT_ROWS;
                    const float *sliver = a + (size_t)m * (size_t)depth, *panel = b + (size_t)n * (size_t)depth;
                    float *c = g->c + (size_t)(m0 + m) * g->ldc + n0 + n;
                    if (height == PRODUCT_ROWS && width % LANES == 0) {
                        product_columns(width, g->bf16, sliver, panel, depth, c, g->ldc);
                    } else {
                        border_tile(g->bf16, sliver, panel, depth, c, g->ldc, height, width);
                    }
                }
            }
        }
    }
}

/* The size of equal blocks of at most `most`, whole tiles wide: no narrow last block that packs its other side for little. */
static int block_of(int n, int most, int tile) {
    int blocks = (n + most - 1) / most, each = (n + blocks - 1) / (blocks > 0 ? blocks : 1);
    return (each + tile - 1) / tile * tile;
}

static void gemm(const Engine *e, const Gemm *g) {
    if (g->M < 1 || g->N < 1) {
        return;
    }
    int column_block = block_of(g->N, COLUMN_BLOCK, PRODUCT_COLUMNS), across = (g->N + column_block - 1) / column_block;
    int shares = (e->threads + across - 1) / across; /* of the rows: one for a thread, so that each packs its columns of B once */
    int share = ((g->M + shares - 1) / shares + PRODUCT_ROWS - 1) / PRODUCT_ROWS * PRODUCT_ROWS, block = block_of(share, ROW_BLOCK, PRODUCT_ROWS);
    bool small = (double)g->M * g->N * g->K < WORTH_THREADS;
#pragma omp parallel for schedule(dynamic) num_threads(e->threads) if (!small)
    for (int task = 0; task < shares * across; task++) {
        int from = task / across * share, n0 = task % across * column_block, to = g->M - from < share ? g->M : from + share;
        if (from < to) {
            gemm_blocks(g, my_scratch(e), from, to, block, n0, g->N - n0 < column_block ? g->N - n0 : column_block);
        }
    }
}

/* db[o] += sum_n dy[n,o] */
static void bias_backward(const Engine *e, float *db, const float *dy, size_t ldy, int N, int O) {
#pragma omp parallel for schedule(static) num_threads(e->threads) if ((double)N * O > WORTH_THREADS)
    for (int o = 0; o < O; o += 64) {
        int width = O - o < 64 ? O - o : 64;
        for (int n = 0; n < N; n++) {
            for (int i = 0; i < width; i++) {
                db[o + i] += dy[(size_t)n * ldy + (size_t)(o + i)];
            }
        }
    }
}

static void cpu_linear_backward(Engine *e, Act *dx, const Act *dy, const Linear *w, int N, bool add) {
    size_t column = 0;
    for (int m = 0; m < w->n; m++) {
        int O = (int)w->w[m].shape[0];
        gemm(e, &(Gemm){.a = (const float *)dy + column, .am = (size_t)w->out, .ak = 1, .bt = &w->w[m], .ldb = (size_t)w->in, .c = dx,
                        .ldc = (size_t)w->in, .M = N, .N = w->in, .K = O, .alpha = 1, .add = add || m > 0,
                        .bf16 = e->bf16_dot});
        column += (size_t)O;
    }
}

static void cpu_linear_weight_backward(Engine *e, const Linear *dw, const Act *dy, const Act *x, int N) {
    size_t column = 0;
    for (int m = 0; m < dw->n; m++) {
        int O = (int)dw->w[m].shape[0];
        const float *slice = (const float *)dy + column;
        if (dw->w[m].data) {
            gemm(e, &(Gemm){.a = slice, .am = 1, .ak = (size_t)dw->out, .b = x, .ldb = (size_t)dw->in, .c = (float *)dw->w[m].data,
                            .ldc = (size_t)dw->in, .M = O, .N = dw->in, .K = N, .alpha = 1, .add = true, .bf16 = e->bf16_dot});
        }
        if (dw->b[m].data) {
            bias_backward(e, (float *)dw->b[m].data, slice, (size_t)dw->out, N, O);
        }
        column += (size_t)O;
    }
}

/* Matrix m's columns of y follow those of the matrices before it; its columns of t those of the adapted ones before it. */
static void cpu_lora_up(Engine *e, Act *y, const Act *t, const Linear *w, int N) {
    const Lora *l = w->lora;
    size_t column = 0, low = 0, R = (size_t)l->rank;
    for (int m = 0; m < w->n; m++) {
        int O = (int)w->w[m].shape[0];
        if (l->up[m].data) { /* adapters are F32; B = up^T is read across its rows */
            gemm(e, &(Gemm){.a = (const float *)t + low, .am = (size_t)l->down.out, .ak = 1, .b = l->up[m].data, .ldb = 1, .bn = R,
                            .c = (float *)y + column, .ldc = (size_t)w->out, .M = N, .N = O, .K = l->rank, .alpha = l->scale, .add = true});
            low += R;
        }
        column += (size_t)O;
    }
}

static void cpu_lora_up_backward(Engine *e, Act *dt, const Lora *dlora, const Act *dy, const Act *t, const Linear *w, int N) {
    const Lora *l = w->lora;
    size_t column = 0, low = 0, width = (size_t)l->down.out;
    for (int m = 0; m < w->n; m++) {
        int O = (int)w->w[m].shape[0];
        const float *slice = (const float *)dy + column;
        if (l->up[m].data) {
            gemm(e, &(Gemm){.a = slice, .am = (size_t)w->out, .ak = 1, .bt = &l->up[m], .ldb = (size_t)l->rank, .c = (float *)dt + low,
                            .ldc = width, .M = N, .N = l->rank, .K = O, .alpha = l->scale});
            gemm(e, &(Gemm){.a = slice, .am = 1, .ak = (size_t)w->out, .b = (const float *)t + low, .ldb = width,
                            .c = (float *)dlora->up[m].data, .ldc = (size_t)l->rank, .M = O, .N = l->rank, .K = N, .alpha = l->scale,
                            .add = true});
            low += (size_t)l->rank;
        }
        column += (size_t)O;
    }
}

/* ------------------------------------------------------------------------------------------------ row by row ops */

static void cpu_zero(Engine *e, void *x, size_t bytes) {
    (void)e;
    memset(x, 0, bytes);
}

static void cpu_scatter(Engine *e, Act *out, const Act *x, const int *row, int n, int D) {
    (void)e;
    for (int i = 0; i < n; i++) {
        memcpy((float *)out + (size_t)row[i] * (size_t)D, (const float *)x + (size_t)i * (size_t)D, (size_t)D * sizeof(float));
    }
}

static void cpu_embed_backward(Engine *e, const Tensor *dtable, const Act *dx, const int *token, int N, int D, float scale) {
#pragma omp parallel for schedule(static) num_threads(e->threads) if ((double)N * D > WORTH_THREADS)
    for (int d = 0; d < D; d += 64) {
        int width = D - d < 64 ? D - d : 64;
        for (int n = 0; n < N; n++) {
            if (token[n] < 0) {
                continue;
            }
            float *out = (float *)dtable->data + (size_t)token[n] * (size_t)D + d;
            const float *in = (const float *)dx + (size_t)n * (size_t)D + d;
            for (int i = 0; i < width; i++) {
                out[i] += scale * in[i];
            }
        }
    }
}

/* One row of the norm's gradient; returns r. w already holds the added 1. dx may be dy. */
INLINE float rmsnorm_row_backward(float *dx, const float *dy, const float *x, const float *w, int D, float eps, bool add) {
    float squares = 0, dot = 0;
    Vec square_sum = {0}, dot_sum = {0};
    int i = 0;
    for (; i + LANES <= D; i += LANES) {
        Vec v = load(x + i);
        square_sum += v * v;
        dot_sum += v * load(dy + i) * load(w + i);
    }
    squares = vec_sum(square_sum);
    dot = vec_sum(dot_sum);
    for (; i < D; i++) {
        squares += x[i] * x[i];
        dot += x[i] * dy[i] * w[i];
    }
    float r = 1.0f / sqrtf(squares / (float)D + eps), pull = dot * r * r / (float)D;
    for (i = 0; i < D; i++) {
        float g = r * (w[i] * dy[i] - pull * x[i]);
        dx[i] = add ? dx[i] + g : g;
    }
    return r;
}

static void cpu_rmsnorm_backward(Engine *e, Act *dx, const Tensor *dw, const Act *dy, const Act *x, const Tensor *w, int N, int D,
                                 float eps, int plus_one, bool add) {
    const float *weight = widened_norm(&((Cpu *)e->scratch)->thread[0], w, D, plus_one), *dys = dy, *xs = x;
    if (dw && dw->data) { /* before dx is written, as dx may be dy */
        float *r = xmalloc((size_t)N * sizeof(float)), *sum = (float *)dw->data;
#pragma omp parallel for schedule(static) num_threads(e->threads) if ((double)N * D * 4 > WORTH_THREADS)
        for (int n = 0; n < N; n++) {
            double length = 0;
            for (int i = 0; i < D; i++) {
                length += (double)xs[(size_t)n * (size_t)D + (size_t)i] * (double)xs[(size_t)n * (size_t)D + (size_t)i];
            }
            r[n] = (float)(1 / sqrt(length / D + (double)eps));
        }
#pragma omp parallel for schedule(static) num_threads(e->threads) if ((double)N * D * 4 > WORTH_THREADS)
        for (int d = 0; d < D; d += 64) {
            int width = D - d < 64 ? D - d : 64;
            for (int n = 0; n < N; n++) {
                size_t at = (size_t)n * (size_t)D + (size_t)d;
                for (int i = 0; i < width; i++) {
                    sum[d + i] += dys[at + (size_t)i] * xs[at + (size_t)i] * r[n];
                }
            }
        }
        free(r);
    }
#pragma omp parallel for schedule(static) num_threads(e->threads) if ((double)N * D * 8 > WORTH_THREADS)
    for (int n = 0; n < N; n++) {
        size_t at = (size_t)n * (size_t)D;
        rmsnorm_row_backward((float *)dx + at, dys + at, xs + at, weight, D, eps, add);
    }
}

static void cpu_gated_backward(Engine *e, Act *dgate_up, const Act *dout, const Act *gate_up, int N, int F, bool gelu) {
#pragma omp parallel for schedule(static) num_threads(e->threads) if ((double)N * F * 16 > WORTH_THREADS)
    for (int n = 0; n < N; n++) {
        const float *gate = (const float *)gate_up + (size_t)n * 2 * (size_t)F, *up = gate + F;
        const float *dy = (const float *)dout + (size_t)n * (size_t)F;
        float *dgate = (float *)dgate_up + (size_t)n * 2 * (size_t)F, *dup = dgate + F;
        for (int i = 0; i < F; i += LANES) {
            size_t bytes = (size_t)(F - i < LANES ? F - i : LANES) * sizeof(float);
            Vec g = {0}, u = {0}, d = {0};
            memcpy(&g, gate + i, bytes);
            memcpy(&u, up + i, bytes);
            memcpy(&d, dy + i, bytes);
            /* act(g) = g s(y), s the logistic function and y = g (silu) or 2 sqrt(2/pi) (g + 0.044715 g^3) (gelu_tanh);
             * act'(g) = s + g y' s (1 - s) */
            Vec y = gelu ? 1.5957691216f * (g + 0.044715f * g * g * g) : g;
            Vec slope = gelu ? 1.5957691216f * (1.0f + 0.134145f * g * g) : splat(1);
            Vec s = 1.0f / (1.0f + vec_exp(-y));
            Vec da = d * u * (s + g * slope * s * (1.0f - s)), du = d * g * s;
            memcpy(dgate + i, &da, bytes);
            memcpy(dup + i, &du, bytes);
        }
    }
}

/* ------------------------------------------------------------------------------------------------ RoPE */

/* The rotation's transpose: by the opposite angle. */
INLINE void rotate_back(float *out, const float *x, const float *cos, const float *sin, int E) {
    int half = E / 2;
    for (int i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        out[i] = a * cos[i] + b * sin[i];
        out[i + half] = b * cos[i] - a * sin[i];
    }
}

/* dnorm += sum over rows and heads of d x r, for heads [from, to) of qkv; d stands unrotated in dqkv. */
static void head_norm_backward(Engine *e, const Tensor *dnorm, float *dqkv, const float *qkv, const Tensor *norm, float eps,
                               int plus_one, int N, int from, int to, size_t width, int E) {
    const float *weight = widened_norm(&((Cpu *)e->scratch)->thread[0], norm, E, plus_one);
    int heads = to - from;
    float *r = xmalloc((size_t)N * (size_t)heads * sizeof(float)), *d = NULL;
    bool trains = dnorm && dnorm->data;
    if (trains) { /* rmsnorm_row_backward overwrites d, which the sum below needs */
        d = xmalloc((size_t)N * (size_t)heads * (size_t)E * sizeof(float));
    }
#pragma omp parallel for schedule(static) num_threads(e->threads) if ((double)N * heads * E * 8 > WORTH_THREADS)
    for (int n = 0; n < N; n++) {
        for (int h = 0; h < heads; h++) {
            size_t at = (size_t)n * width + (size_t)(from + h) * (size_t)E, i = (size_t)n * (size_t)heads + (size_t)h;
            if (trains) {
                memcpy(d + i * (size_t)E, dqkv + at, (size_t)E * sizeof(float));
            }
            r[i] = rmsnorm_row_backward(dqkv + at, dqkv + at, qkv + at, weight, E, eps, false);
        }
    }
    for (int n = 0; n < N && trains; n++) {
        for (int h = 0; h < heads; h++) {
            size_t i = (size_t)n * (size_t)heads + (size_t)h;
            const float *x = qkv + (size_t)n * width + (size_t)(from + h) * (size_t)E;
            for (int k = 0; k < E; k++) {
                ((float *)dnorm->data)[k] += d[i * (size_t)E + (size_t)k] * x[k] * r[i];
            }
        }
    }
    free(r);
    free(d);
}

static void cpu_rope_qkv_backward(Engine *e, Act *dqkv, const Tensor *dq_norm, const Tensor *dk_norm, const Act *dq, const Act *dk,
                                  const Act *dv, const Act *qkv, const Tensor *q_norm, const Tensor *k_norm, float eps, int plus_one,
                                  const Act *cos, const Act *sin, const int *position, int N, int H, int G, int E) {
    size_t width = (size_t)(H + 2 * G) * (size_t)E, half = (size_t)E / 2, KV = (size_t)G * (size_t)E;
#pragma omp parallel for schedule(static) num_threads(e->threads) if ((double)N * (double)width * 4 > WORTH_THREADS)
    for (int n = 0; n < N; n++) {
        float *out = (float *)dqkv + (size_t)n * width;
        const float *c = (const float *)cos + (size_t)position[n] * half, *s = (const float *)sin + (size_t)position[n] * half;
        for (int h = 0; h < H; h++) {
            rotate_back(out + (size_t)h * (size_t)E, (const float *)dq + ((size_t)n * (size_t)H + (size_t)h) * (size_t)E, c, s, E);
        }
        for (int g = 0; g < G; g++) {
            rotate_back(out + (size_t)(H + g) * (size_t)E, (const float *)dk + (size_t)n * KV + (size_t)g * (size_t)E, c, s, E);
        }
        memcpy(out + (size_t)(H + G) * (size_t)E, (const float *)dv + (size_t)n * KV, KV * sizeof(float));
    }
    if (q_norm) {
        head_norm_backward(e, dq_norm, dqkv, qkv, q_norm, eps, plus_one, N, 0, H, width, E);
        head_norm_backward(e, dk_norm, dqkv, qkv, k_norm, eps, plus_one, N, H, H + G, width, E);
    }
}

/* ------------------------------------------------------------------------------------------------ attention
 * Twice over the same tiles of P, each time with one owner for every sum: first the queries' gradient (a tile of queries walks
 * its ancestors' keys, as forward), then the keys' and values' (a tile of keys walks the queries of its segment and of all
 * descendants, in the batch's order). */

enum { BACK_ROWS = 96 }; /* (query, head) pairs at once; keys: KEY_TILE */

typedef struct {
    const float *q, *k, *v, *dout, *lse;
    float *delta; /* [N,H]: dout . out */
    float *dq, *dk, *dv;
    const Segment *segment;
    const Run *run;
    const int *run_of; /* [segments]: the run that holds a segment's tokens, or -1 */
    int n_runs, H, G, E, window;
    float scale;
} AttentionBack;

/* One tile of scores: rows are (query, head) pairs of one kv head, columns are keys [j, j+n) of one segment. */
typedef struct {
    float *q, *dout;   /* [BACK_ROWS, W]: W = E rounded up to whole vectors */
    float *k;          /* [KEY_TILE, W] */
    float *kt, *vt;    /* [W, KEY_TILE]: keys and values, turned */
    float *p, *ds;     /* [BACK_ROWS, KEY_TILE] */
    float *sum, *sum2; /* [max(BACK_ROWS, KEY_TILE), W] */
} Tile;

static Tile tile_of(const Engine *e, int E) {
    size_t W = round_up((size_t)E, LANES), rows = BACK_ROWS, keys = KEY_TILE, most = rows > keys ? rows : keys;
    float *at = work_room(my_scratch(e), 2 * rows * W + 3 * keys * W + 2 * rows * keys + 2 * most * W);
    Tile t = {0};
    float **const part[] = {&t.q, &t.dout, &t.k, &t.kt, &t.vt, &t.p, &t.ds, &t.sum, &t.sum2};
    const size_t size[] = {rows * W, rows * W, keys * W, keys * W, keys * W, rows * keys, rows * keys, most * W, most * W};
    for (int i = 0; i < 9; i++) {
        *part[i] = at;
        at += size[i];
    }
    return t;
}

/* C [rows, columns] (+)= A [rows, k] B [k, columns], A[i,k] = a[i*am + k*ak], columns a multiple of LANES. */
INLINE void small_product(int rows, int columns, const float *a, int am, int ak, const float *b, size_t ldb, int k, float *c, int ldc,
                          bool add) {
    for (int j = 0; j < columns; j += TILE_VECTORS * LANES) {
        int nv = (columns - j) / LANES < TILE_VECTORS ? (columns - j) / LANES : TILE_VECTORS;
        const float *column[TILE_VECTORS];
        for (int i = 0; i < nv; i++) {
            column[i] = b + j + i * LANES;
        }
        outer(rows, nv, a, am, ak, column, ldb, k, c + j, ldc, add);
    }
}

/* Keys [j, j+n) of a segment, which starts a block of the cache, as j does. */
static void read_keys(const AttentionBack *a, Tile *t, const Segment *s, int j, int n, int g) {
    size_t W = round_up((size_t)a->E, LANES), E = (size_t)a->E, KV = (size_t)a->G * E;
    if (n < KEY_TILE || W > E) { /* what is not there takes part in products, as zeros */
        memset(t->k, 0, KEY_TILE * W * sizeof(float));
        memset(t->vt, 0, KEY_TILE * W * sizeof(float));
        memset(t->kt, 0, KEY_TILE * W * sizeof(float));
    }
    for (int i = 0; i < n; i += LANES) {
        int width = n - i < LANES ? n - i : LANES, row = s->row + j + i;
        const float *key = key_block(a->k, row, g, a->G, a->E);
        for (size_t x = 0; x < E; x++) {
            memcpy(t->kt + x * KEY_TILE + (size_t)i, key + x * LANES, (size_t)width * sizeof(float));
        }
        for (int r = 0; r < width; r++) {
            const float *value = a->v + (size_t)(row + r) * KV + (size_t)g * E;
            for (size_t x = 0; x < E; x++) {
                t->k[(size_t)(i + r) * W + x] = key[x * LANES + (size_t)r];
                t->vt[x * KEY_TILE + (size_t)(i + r)] = value[x];
            }
        }
    }
}

/* Pairs: queries [first, first+n) of a run with the heads of kv head g. */
static void read_queries(const AttentionBack *a, Tile *t, const Run *run, int first, int n, int g) {
    size_t W = round_up((size_t)a->E, LANES), E = (size_t)a->E;
    int group = a->H / a->G;
    memset(t->q, 0, BACK_ROWS * W * sizeof(float));
    memset(t->dout, 0, BACK_ROWS * W * sizeof(float));
    for (int r = 0; r < n * group; r++) {
        size_t at = ((size_t)(run->row + first + r / group) * (size_t)a->H + (size_t)(g * group + r % group)) * E;
        memcpy(t->q + (size_t)r * W, a->q + at, E * sizeof(float));
        memcpy(t->dout + (size_t)r * W, a->dout + at, E * sizeof(float));
    }
}

/* P and dS of the tile; false when no query sees any of its keys. */
static bool score_tile(const AttentionBack *a, Tile *t, const Run *run, int first, int n, int g, const Segment *keys, bool own, int j,
                       int n_keys) {
    int group = a->H / a->G, rows = n * group, W = (int)round_up((size_t)a->E, LANES);
    int position = keys->position + j, query0 = a->segment[run->seg].position + run->first + first;
    if ((own && position > query0 + n - 1) || (a->window > 0 && query0 - (position + n_keys - 1) >= a->window)) {
        return false;
    }
    small_product(rows, KEY_TILE, t->q, W, 1, t->kt, KEY_TILE, a->E, t->p, KEY_TILE, false);
    small_product(rows, KEY_TILE, t->dout, W, 1, t->vt, KEY_TILE, a->E, t->ds, KEY_TILE, false);
    for (int r = 0; r < rows; r++) {
        size_t at = (size_t)(run->row + first + r / group) * (size_t)a->H + (size_t)(g * group + r % group);
        int query = query0 + r / group, to = own && query - position + 1 < n_keys ? query - position + 1 : n_keys;
        int from = a->window > 0 && query - a->window + 1 > position ? query - a->window + 1 - position : 0;
        float lse = a->lse[at], delta = a->delta[at], *p = t->p + r * KEY_TILE, *ds = t->ds + r * KEY_TILE;
        for (int c = 0; c < KEY_TILE; c += LANES) {
            Vec weight = vec_exp(load(p + c) * a->scale - lse);
            store(p + c, weight);
        }
        for (int c = 0; c < KEY_TILE; c++) {
            bool visible = c >= from && c < to;
            p[c] = visible ? p[c] : 0;
            ds[c] = visible ? p[c] * (ds[c] - delta) * a->scale : 0;
        }
    }
    return true;
}

static void query_gradient(const Engine *e, const AttentionBack *a, int r, int first, int n, int g) {
    Tile t = tile_of(e, a->E);
    const Run *run = &a->run[r];
    int group = a->H / a->G, W = (int)round_up((size_t)a->E, LANES), chain[MAX_DEPTH], depth = 0;
    read_queries(a, &t, run, first, n, g);
    memset(t.sum, 0, (size_t)BACK_ROWS * (size_t)W * sizeof(float));
    for (int seg = run->seg; seg >= 0 && depth < MAX_DEPTH; seg = a->segment[seg].parent) {
        chain[depth++] = seg;
    }
    while (depth > 0) {
        int seg = chain[--depth];
        const Segment *keys = &a->segment[seg];
        for (int j = 0; j < keys->len; j += KEY_TILE) {
            int n_keys = keys->len - j < KEY_TILE ? keys->len - j : KEY_TILE;
            read_keys(a, &t, keys, j, n_keys, g);
            if (score_tile(a, &t, run, first, n, g, keys, seg == run->seg, j, n_keys)) {
                small_product(n * group, W, t.ds, KEY_TILE, 1, t.k, (size_t)W, n_keys, t.sum, W, true);
            }
        }
    }
    for (int i = 0; i < n * group; i++) {
        size_t at = ((size_t)(run->row + first + i / group) * (size_t)a->H + (size_t)(g * group + i % group)) * (size_t)a->E;
        memcpy(a->dq + at, t.sum + (size_t)i * (size_t)W, (size_t)a->E * sizeof(float));
    }
}

static bool descends(const Segment *segment, int seg, int from) {
    while (seg >= 0 && seg != from) {
        seg = segment[seg].parent;
    }
    return seg == from;
}

static void key_gradient(const Engine *e, const AttentionBack *a, int r, int j, int g) {
    Tile t = tile_of(e, a->E);
    int seg = a->run[r].seg, group = a->H / a->G, W = (int)round_up((size_t)a->E, LANES), step = BACK_ROWS / group;
    const Segment *keys = &a->segment[seg];
    int n_keys = keys->len - j < KEY_TILE ? keys->len - j : KEY_TILE;
    step = step > 0 ? step : 1;
    read_keys(a, &t, keys, j, n_keys, g);
    memset(t.sum, 0, (size_t)KEY_TILE * (size_t)W * sizeof(float));
    memset(t.sum2, 0, (size_t)KEY_TILE * (size_t)W * sizeof(float));
    for (int other = r; other < a->n_runs; other++) { /* parents stand before children */
        const Run *run = &a->run[other];
        if (!descends(a->segment, run->seg, seg)) {
            continue;
        }
        for (int first = 0; first < run->n; first += step) {
            int n = run->n - first < step ? run->n - first : step, rows = n * group;
            read_queries(a, &t, run, first, n, g);
            if (!score_tile(a, &t, run, first, n, g, keys, run->seg == seg, j, n_keys)) {
                continue;
            }
            small_product(n_keys, W, t.ds, 1, KEY_TILE, t.q, (size_t)W, rows, t.sum, W, true);
            small_product(n_keys, W, t.p, 1, KEY_TILE, t.dout, (size_t)W, rows, t.sum2, W, true);
        }
    }
    for (int i = 0; i < n_keys; i++) {
        size_t at = ((size_t)(a->run[r].row + j + i) * (size_t)a->G + (size_t)g) * (size_t)a->E;
        memcpy(a->dk + at, t.sum + (size_t)i * (size_t)W, (size_t)a->E * sizeof(float));
        memcpy(a->dv + at, t.sum2 + (size_t)i * (size_t)W, (size_t)a->E * sizeof(float));
    }
}

typedef struct {
    int run, first, n, g; /* queries [first, first+n) of a run, or keys from `first` on when n is 0 */
} BackItem;

static void cpu_attention_backward(Engine *e, Act *dq, Act *dk, Act *dv, const Act *dout, const Act *out, const Act *lse, const Act *q,
                                   const Act *k, const Act *v, const Segment *segment, const Run *run, int n_runs, int H, int G, int E,
                                   float scale, int window) {
    int N = n_runs ? run[n_runs - 1].row + run[n_runs - 1].n : 0, step = BACK_ROWS / (H / G) > 0 ? BACK_ROWS / (H / G) : 1;
    float *delta = xmalloc((size_t)N * (size_t)H * sizeof(float));
    AttentionBack a = {.q = q, .k = k, .v = v, .dout = dout, .lse = lse, .delta = delta, .dq = dq, .dk = dk, .dv = dv,
                       .segment = segment, .run = run, .n_runs = n_runs, .H = H, .G = G, .E = E, .window = window, .scale = scale};
#pragma omp parallel for schedule(static) num_threads(e->threads)
    for (int i = 0; i < N * H; i++) {
        float sum = 0;
        for (int x = 0; x < E; x++) {
            sum += a.dout[(size_t)i * (size_t)E + (size_t)x] * ((const float *)out)[(size_t)i * (size_t)E + (size_t)x];
        }
        delta[i] = sum;
    }
    int room = 0, n_items = 0;
    for (int r = 0; r < n_runs; r++) {
        room += G * ((run[r].n + step - 1) / step + (run[r].n + KEY_TILE - 1) / KEY_TILE);
    }
    BackItem *item = xmalloc((size_t)(room + 1) * sizeof(BackItem));
    for (int r = 0; r < n_runs; r++) {
        for (int first = 0; first < run[r].n; first += step) {
            for (int g = 0; g < G; g++) {
                item[n_items++] = (BackItem){r, first, run[r].n - first < step ? run[r].n - first : step, g};
            }
        }
        for (int j = 0; j < run[r].n; j += KEY_TILE) {
            for (int g = 0; g < G; g++) {
                item[n_items++] = (BackItem){r, j, 0, g};
            }
        }
    }
#pragma omp parallel for schedule(dynamic) num_threads(e->threads)
    for (int i = 0; i < n_items; i++) {
        if (item[i].n) {
            query_gradient(e, &a, item[i].run, item[i].first, item[i].n, item[i].g);
        } else {
            key_gradient(e, &a, item[i].run, item[i].first, item[i].g);
        }
    }
    free(item);
    free(delta);
}

/* ------------------------------------------------------------------------------------------------ losses */

static void cpu_token_logprob(Engine *e, float *logp, const Act *logits, const int *target, int n, int V) {
#pragma omp parallel for schedule(static) num_threads(e->threads) if ((double)n * V * 8 > WORTH_THREADS)
    for (int i = 0; i < n; i++) {
        const float *row = (const float *)logits + (size_t)i * (size_t)V;
        float largest = row[0];
        for (int t = 1; t < V; t++) {
            largest = row[t] > largest ? row[t] : largest;
        }
        double total = 0;
        for (int t = 0; t < V; t += LANES) {
            Vec x = splat(-INFINITY);
            memcpy(&x, row + t, (size_t)(V - t < LANES ? V - t : LANES) * sizeof(float));
            total += (double)vec_sum(vec_exp(x - largest));
        }
        logp[i] = (float)((double)(row[target[i]] - largest) - log(total > 0 ? total : 1)); /* the largest alone gives 1 */
    }
}

static void cpu_token_logprob_backward(Engine *e, Act *logits, const float *logp, const float *dlogp, const int *target, int n, int V) {
#pragma omp parallel for schedule(static) num_threads(e->threads) if ((double)n * V * 8 > WORTH_THREADS)
    for (int i = 0; i < n; i++) {
        float *row = (float *)logits + (size_t)i * (size_t)V, lse = row[target[i]] - logp[i];
        for (int t = 0; t < V; t += LANES) {
            size_t bytes = (size_t)(V - t < LANES ? V - t : LANES) * sizeof(float);
            Vec x = splat(-INFINITY);
            memcpy(&x, row + t, bytes);
            x = -dlogp[i] * vec_exp(x - lse);
            memcpy(row + t, &x, bytes);
        }
        row[target[i]] += dlogp[i];
    }
}

/* d mse_nrm / d x = -2 s^2/D (gold / |x||gold| - cos x / |x|^2) */
static void mse_gradient(float *dx, const float *x, const float *gold, int D, double s, double weight) {
    double p = vector_norm(x, D), g = vector_norm(gold, D), cos = cosine(x, gold, D), c = -2 * s * s / D * weight;
    for (int i = 0; i < D; i++) {
        dx[i] = p > 0 && g > 0 ? (float)(c * ((double)gold[i] / (p * g) - cos * (double)x[i] / (p * p))) : 0;
    }
}

static void cpu_mse_nrm(Engine *e, double *mse, Act *dx, const Act *x, const Act *gold, int n, int D, double scale, double weight) {
#pragma omp parallel for schedule(static) num_threads(e->threads) if ((double)n * D * 16 > WORTH_THREADS)
    for (int i = 0; i < n; i++) {
        size_t at = (size_t)i * (size_t)D;
        const float *row = (const float *)x + at, *v = (const float *)gold + at;
        mse[i] = mse_nrm(row, v, D, scale);
        if (dx) {
            mse_gradient((float *)dx + at, row, v, D, scale, weight);
        }
    }
}

/* ------------------------------------------------------------------------------------------------ the optimizer */

enum { FLAT_BLOCK = 1 << 16 }; /* elements that one thread sums or updates at a time */

static double cpu_sum_squares(Engine *e, const Act *x, size_t count) {
    size_t blocks = (count + FLAT_BLOCK - 1) / FLAT_BLOCK;
    double *part = xcalloc(blocks + 1, sizeof(double)), total = 0;
#pragma omp parallel for schedule(static) num_threads(e->threads)
    for (size_t b = 0; b < blocks; b++) {
        size_t to = (b + 1) * FLAT_BLOCK < count ? (b + 1) * FLAT_BLOCK : count;
        for (size_t i = b * FLAT_BLOCK; i < to; i++) {
            part[b] += (double)((const float *)x)[i] * (double)((const float *)x)[i];
        }
    }
    for (size_t b = 0; b < blocks; b++) {
        total += part[b];
    }
    free(part);
    return total;
}

/* fp32 to bf16, up or down with the probability that keeps the mean: the dropped half of the bits against a random half. */
INLINE uint16_t round_stochastically(float x, uint32_t random) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (uint16_t)((bits + (random & 0xffff)) >> 16);
}

INLINE uint32_t element_random(uint64_t key, uint64_t i) {
    uint64_t h = (i + 1) * 0x9e3779b97f4a7c15u ^ key;
    h = (h ^ (h >> 30)) * 0xbf58476d1ce4e5b9u;
    h = (h ^ (h >> 27)) * 0x94d049bb133111ebu;
    return (uint32_t)(h >> 32);
}

INLINE float number_at(const void *x, DType type, size_t i) {
    return type == DT_BF16 ? bf16_to_f32(((const uint16_t *)x)[i]) : ((const float *)x)[i];
}

INLINE void adamw_block(void *w, DType weights, const float *g, void *m, void *v, DType type, size_t from, size_t to, const AdamW *how,
                        float lr, float correct1, float correct2, float g_scale, uint64_t key) {
    for (size_t i = from; i < to; i++) {
        float gradient = g[i] * g_scale;
        float m1 = how->beta1 * number_at(m, type, i) + (1 - how->beta1) * gradient;
        float v1 = how->beta2 * number_at(v, type, i) + (1 - how->beta2) * gradient * gradient;
        if (type == DT_BF16) {
            uint32_t random = element_random(key, i);
            ((uint16_t *)m)[i] = round_stochastically(m1, random);
            ((uint16_t *)v)[i] = round_stochastically(v1, random >> 16);
        } else {
            ((float *)m)[i] = m1;
            ((float *)v)[i] = v1;
        }
        float x = number_at(w, weights, i);
        x -= lr * how->decay * x;
        x -= lr * correct1 * m1 / (sqrtf(v1 * correct2) + how->eps);
        if (weights == DT_BF16) {
            ((uint16_t *)w)[i] = round_stochastically(x, element_random(~key, i));
        } else {
            ((float *)w)[i] = x;
        }
    }
}

static void cpu_adamw(Engine *e, void *w, DType weights, const Act *g, void *m, void *v, DType moments, size_t count, const AdamW *how,
                      float lr, int64_t step, float g_scale, uint64_t key) {
    float correct1 = (float)(1 / (1 - pow((double)how->beta1, (double)step)));
    float correct2 = (float)(1 / (1 - pow((double)how->beta2, (double)step)));
#pragma omp parallel for schedule(static) num_threads(e->threads)
    for (size_t from = 0; from < count; from += FLAT_BLOCK) {
        size_t to = from + FLAT_BLOCK < count ? from + FLAT_BLOCK : count;
        if (moments == DT_F32 && weights == DT_F32) {
            adamw_block(w, DT_F32, g, m, v, DT_F32, from, to, how, lr, correct1, correct2, g_scale, key);
        } else {
            adamw_block(w, weights, g, m, v, moments, from, to, how, lr, correct1, correct2, g_scale, key);
        }
    }
}

void CPU_BACKWARD(Engine *e) {
    e->zero = cpu_zero;
    e->scatter = cpu_scatter;
    e->embed_backward = cpu_embed_backward;
    e->rmsnorm_backward = cpu_rmsnorm_backward;
    e->linear_backward = cpu_linear_backward;
    e->linear_weight_backward = cpu_linear_weight_backward;
    e->lora_up = cpu_lora_up;
    e->lora_up_backward = cpu_lora_up_backward;
    e->rope_qkv_backward = cpu_rope_qkv_backward;
    e->attention_backward = cpu_attention_backward;
    e->gated_backward = cpu_gated_backward;
    e->token_logprob = cpu_token_logprob;
    e->token_logprob_backward = cpu_token_logprob_backward;
    e->mse_nrm = cpu_mse_nrm;
    e->sum_squares = cpu_sum_squares;
    e->adamw = cpu_adamw;
}
