/* cpu.h - what the CPU engine's two files share (cpu.c: forward, cpu_backward.c: gradients and the optimizer): vectors of the
 * widest registers the build has, the threads' working memory, number formats, and the small product that attention uses.
 * Private to them: both are compiled once per instruction set. */
#ifndef CPU_H
#define CPU_H

#include "quantise.h"

#include <math.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

/* ------------------------------------------------------------------------------------------------ vectors
 * GCC's and Clang's vector types: one source for every width. LANES floats make one register; a tile of the matrix
 * product keeps TILE_ROWS x 4 of them as accumulators, which is what the register file holds. */

#if defined __AVX512F__
#define CPU_NAME "avx512"
enum { LANES = 16, TILE_ROWS = 6, TILE_VECTORS = 4 };
#elif defined __AVX2__
#define CPU_NAME "avx2"
enum { LANES = 8, TILE_ROWS = 2, TILE_VECTORS = 2 };
#else
#define CPU_NAME "any"
enum { LANES = 4, TILE_ROWS = 2, TILE_VECTORS = 2 };
#endif

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t VecInt __attribute__((vector_size(4 * LANES)));
typedef uint32_t VecBits __attribute__((vector_size(4 * LANES)));
typedef float Vec4 __attribute__((vector_size(16)));
typedef Vec VecAnywhere __attribute__((aligned(4), may_alias));
typedef Vec4 Vec4Anywhere __attribute__((aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))

INLINE Vec load(const float *p) { return *(const VecAnywhere *)p; }
INLINE void store(float *p, Vec v) { *(VecAnywhere *)p = v; }
INLINE Vec splat(float x) { return x - (Vec){0}; }
INLINE Vec choose(VecInt mask, Vec yes, Vec no) { return (Vec)((mask & (VecInt)yes) | (~mask & (VecInt)no)); }
INLINE Vec vec_max(Vec a, Vec b) { return choose(a > b, a, b); }

/* {sum of a, sum of b, sum of c, sum of d}: halves are added together, so four sums cost little more than one. */
#if defined __AVX512F__
INLINE Vec4 sums4(Vec a, Vec b, Vec c, Vec d) {
#define HALVES(x, y)                                                                                                   \
    __builtin_shufflevector(x, y, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +                            \
        __builtin_shufflevector(x, y, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31)
    Vec ab = HALVES(a, b), cd = HALVES(c, d);
#undef HALVES
    Vec s = __builtin_shufflevector(ab, cd, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
            __builtin_shufflevector(ab, cd, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    s += __builtin_shufflevector(s, s, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    s += __builtin_shufflevector(s, s, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    return __builtin_shufflevector(s, s, 0, 4, 8, 12);
}
#else
INLINE Vec4 quarter(Vec v) {
#if defined __AVX2__
    return __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
#else
    return v;
#endif
}
INLINE Vec4 sums4(Vec a, Vec b, Vec c, Vec d) {
    Vec4 p = quarter(a), q = quarter(b), r = quarter(c), s = quarter(d);
    Vec4 pq = __builtin_shufflevector(p, q, 0, 1, 4, 5) + __builtin_shufflevector(p, q, 2, 3, 6, 7);
    Vec4 rs = __builtin_shufflevector(r, s, 0, 1, 4, 5) + __builtin_shufflevector(r, s, 2, 3, 6, 7);
    return __builtin_shufflevector(pq, rs, 0, 2, 4, 6) + __builtin_shufflevector(pq, rs, 1, 3, 5, 7);
}
#endif

INLINE float vec_sum(Vec v) { return sums4(v, v, v, v)[0]; }

INLINE float vec_largest(Vec v) {
    float m = v[0];
    for (int i = 1; i < LANES; i++) {
        m = v[i] > m ? v[i] : m;
    }
    return m;
}

/* e^x to about 1 ulp: x = n ln2 + r with |r| <= ln2/2, a degree-6 polynomial for e^r, n added to the exponent.
 * Below -87.3 (the smallest normal result) it is 0; above 88.3 it stays at e^88.3. */
INLINE Vec vec_exp(Vec x) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer, kept in the low bits */
    Vec clamped = choose(x < 88.3f, x, splat(88.3f));
    Vec shifted = clamped * 1.44269504f + magic;
    Vec n = shifted - magic;
    Vec r = clamped - n * 0.693359375f - n * -2.12194440e-4f;
    Vec p = splat(1.3981999507e-3f);
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    VecBits exponent = ((VecBits)shifted - (VecBits)splat(magic)) << 23;
    Vec result = (Vec)((VecBits)p + exponent);
    return choose(x < -87.3f, splat(0), result);
}

/* ln x of positive normal numbers to about 1 ulp: x = 2^n m with m in [sqrt(1/2), sqrt(2)), a polynomial for ln m. */
INLINE Vec vec_log(Vec x) {
    VecInt bits = (VecInt)x - 0x3f3504f3; /* sqrt(1/2) */
    Vec n = __builtin_convertvector(bits >> 23, Vec);
    Vec m = (Vec)((bits & 0x007fffff) + 0x3f3504f3) - 1.0f, square = m * m;
    Vec p = splat(7.0376836292e-2f);
    p = p * m - 1.1514610310e-1f;
    p = p * m + 1.1676998740e-1f;
    p = p * m - 1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f;
    p = p * m - 1.6668057665e-1f;
    p = p * m + 2.0000714765e-1f;
    p = p * m - 2.4999993993e-1f;
    p = p * m + 3.3333331174e-1f;
    return p * m * square + n * -2.12194440e-4f - 0.5f * square + m + n * 0.693359375f;
}

INLINE size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

/* ------------------------------------------------------------------------------------------------ the engine's memory */

enum {
    BLOCK_ROWS = 120,   /* rows of x that are packed at once: they stay in the L2 cache, */
    BLOCK_K = 1024,     /* ... this many columns of them */
    KEY_TILE = 64,      /* keys that attention treats at once */
    QUERY_TILE = 96,    /* (query, head) pairs that share them */
    WORTH_THREADS = 200000 /* multiply-adds below which waking other threads costs more than it saves */
};

typedef struct {
    int run, first, n; /* rows run.row + first .. + n of the batch */
    int g;             /* key/value head */
} AttentionItem;

/* One thread's working memory, and the list of attention's work shared by all. */
typedef struct {
    float *packed_x;  /* [BLOCK_ROWS, BLOCK_K] */
    float *strip;     /* [4, BLOCK_K]: four rows of W, widened */
    float *q, *o;     /* [QUERY_TILE, E padded] */
    float *score;     /* [QUERY_TILE, KEY_TILE] */
    float *v;         /* [KEY_TILE, E padded], only when E is not a multiple of LANES */
    float *norm;      /* a norm's weights, widened */
    float *work;      /* of the gradients */
    size_t head_room, norm_room, work_room;
} Scratch;

/* A matrix whose weights are rounded (--weights): the largest of each row, which makes the row's scale. */
typedef struct {
    const void *matrix;
    float *largest;
} RoundedMatrix;

typedef struct {
    Scratch *thread;
    AttentionItem *item;
    size_t item_room;
    double started;
    MemoryUse memory;
    RoundedMatrix *rounded;
    size_t n_rounded;
} Cpu;

static inline float *aligned_floats(size_t count) {
    void *p = NULL;
    return posix_memalign(&p, 64, count * sizeof(float) + 64) == 0 ? p : NULL;
}

/* Scratch that depends on the model's widths grows when a wider model comes along. */
static inline float *grow(float *old, size_t *room, size_t count) {
    if (count <= *room) {
        return old;
    }
    free(old);
    float *p = xmalloc(count * sizeof(float));
    *room = count;
    return p;
}

/* ------------------------------------------------------------------------------------------------ number formats */

/* Widens n stored numbers, from element `offset` of the tensor on, to fp32. */
static inline void widen(float *out, const Tensor *t, size_t offset, size_t n) {
    if (t->dtype == DT_F32) {
        memcpy(out, (const float *)t->data + offset, n * sizeof(float));
    } else if (t->dtype == DT_BF16) {
        const uint16_t *in = (const uint16_t *)t->data + offset;
        uint32_t *bits = (uint32_t *)(void *)out;
        for (size_t i = 0; i < n; i++) {
            bits[i] = (uint32_t)in[i] << 16;
        }
    } else {
        const uint16_t *in = (const uint16_t *)t->data + offset;
        size_t i = 0;
#ifdef __F16C__
        for (; i + 8 <= n; i += 8) {
            _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)(in + i))));
        }
#endif
        for (; i < n; i++) {
            out[i] = f16_to_f32(in[i]);
        }
    }
}

#ifdef __AVX512BF16__
/* Rounds fp32 to bf16; the last 32-group is filled with zeros. */
static inline void narrow(uint16_t *out, const float *in, size_t n) {
    for (size_t i = 0; i < n; i += 16) {
        __mmask16 mask = (__mmask16)(n - i >= 16 ? 0xffffu : (1u << (n - i)) - 1);
        __m256bh half = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, in + i));
        _mm256_storeu_si256((__m256i *)(void *)(out + i), (__m256i)half);
    }
}
#endif

/* A norm's weights in fp32, with Gemma's 1 added. */
static inline const float *widened_norm(Scratch *s, const Tensor *w, int D, int plus_one) {
    s->norm = grow(s->norm, &s->norm_room, (size_t)D);
    widen(s->norm, w, 0, (size_t)D);
    for (int i = 0; plus_one && i < D; i++) {
        s->norm[i] += 1.0f;
    }
    return s->norm;
}

/* ------------------------------------------------------------------------------------------------ keys in blocks, small products
 * Keys are kept in blocks of LANES rows, [block, g, element, row in block]: a register then holds one element of LANES keys. */

INLINE float *key_block(const float *k, int row, int g, int G, int E) {
    return (float *)k + ((size_t)(row / LANES) * (size_t)G + (size_t)g) * (size_t)E * LANES;
}

/* c[i][v*LANES ..] = (accumulate ? c : 0) + sum_k a[i*am + k*ak] * b[v][k*ldb ..], mr rows, nv vectors. */
INLINE void outer_tile(int mr, int nv, const float *a, int am, int ak, const float *const *b, size_t ldb, int k, float *c, int ldc,
                       bool accumulate) {
    Vec sum[6][4];
    for (int i = 0; i < mr; i++) {
        for (int j = 0; j < nv; j++) {
            sum[i][j] = (Vec){0};
        }
    }
    for (int p = 0; p < k; p++) {
        Vec bp[4];
        for (int j = 0; j < nv; j++) {
            bp[j] = load(b[j] + (size_t)p * ldb);
        }
        for (int i = 0; i < mr; i++) {
            float x = a[i * am + p * ak];
            for (int j = 0; j < nv; j++) {
                sum[i][j] += x * bp[j];
            }
        }
    }
    for (int i = 0; i < mr; i++) {
        for (int j = 0; j < nv; j++) {
            float *to = c + i * ldc + j * LANES;
            store(to, accumulate ? load(to) + sum[i][j] : sum[i][j]); /* a sum of short sums rounds less than a long one */
        }
    }
}

/* All rows of a against nv <= TILE_VECTORS vectors of b. */
INLINE void outer_rows(int rows, int nv, const float *a, int am, int ak, const float *const *b, size_t ldb, int k, float *c,
                       int ldc, bool accumulate) {
    enum { ROWS = LANES == 16 ? 6 : 4 };
    int i = 0;
    for (; i + ROWS <= rows; i += ROWS) {
        outer_tile(ROWS, nv, a + i * am, am, ak, b, ldb, k, c + i * ldc, ldc, accumulate);
    }
    for (; i < rows; i++) {
        outer_tile(1, nv, a + i * am, am, ak, b, ldb, k, c + i * ldc, ldc, accumulate);
    }
}

INLINE void outer(int rows, int nv, const float *a, int am, int ak, const float *const *b, size_t ldb, int k, float *c, int ldc,
                  bool accumulate) {
    if (nv == TILE_VECTORS) {
        outer_rows(rows, TILE_VECTORS, a, am, ak, b, ldb, k, c, ldc, accumulate);
        return;
    }
    for (int j = 0; j < nv; j++) {
        outer_rows(rows, 1, a, am, ak, b + j, ldb, k, c + j * LANES, ldc, accumulate);
    }
}

#endif
