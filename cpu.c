/* cpu.c - every forward op of the table in C (the gradients are in cpu_backward.c): the CPU engine, and the reference the CUDA
 * engine is verified against.
 *
 * It is compiled once per instruction set (build.sh); CPU_ENGINE names the one function each build exports, and
 * engine_open picks the widest that the processor runs. Arithmetic is fp32. Weights are read as they are stored (bf16,
 * f16, f32) and widened a few rows at a time inside the matrix product.
 *
 * What must stay true: an output element is computed by one thread, in an order of additions that depends only on the
 * row itself (its width, its place in its own segment). So results are bit-identical whatever the thread count, and a
 * row's forward does not depend on what else is in the batch.
 */
#include "cpu.h"

#ifndef CPU_ENGINE
#define CPU_ENGINE cpu_engine_any
#define CPU_BACKWARD cpu_backward_any
#endif

/* ------------------------------------------------------------------------------------------------ memory */

enum { HEAD = 64 }; /* bytes before a piece of memory, which hold its size */

static Act *cpu_alloc(Engine *e, DType dtype, size_t count) {
    size_t size = dtype_size(dtype), bytes = count * size;
    char *p = count > SIZE_MAX / sizeof(float) - 64 ? NULL : (char *)aligned_floats((bytes + HEAD + sizeof(float) - 1) / sizeof(float));
    if (!p) {
        return NULL;
    }
    memcpy(p, &bytes, sizeof bytes);
    memory_count(e->memory, MEMORY_GIVEN, bytes, 0);
    return p + HEAD;
}

static void cpu_free(Engine *e, void *memory) {
    if (memory) {
        char *p = (char *)memory - HEAD;
        size_t bytes;
        memcpy(&bytes, p, sizeof bytes);
        memory_count(e->memory, MEMORY_GIVEN, 0, bytes);
        free(p);
    }
}

static void cpu_copy(Engine *e, void *out, const void *x, size_t bytes) {
    size_t part = (bytes / (size_t)e->threads + 64) / 64 * 64;
#pragma omp parallel for num_threads(e->threads) schedule(static)
    for (int t = 0; t < e->threads; t++) {
        size_t from = (size_t)t * part;
        if (from < bytes) {
            memcpy((char *)out + from, (const char *)x + from, bytes - from < part ? bytes - from : part);
        }
    }
}

static size_t cpu_available(Engine *e) {
    (void)e;
    return host_available();
}

/* Weights are used where they are, and working memory is small. */
static size_t cpu_copy_bytes(Engine *e, const Tensor *t, int n, DType owned, bool precise) {
    (void)e, (void)t, (void)n, (void)owned, (void)precise;
    return 0;
}

static size_t cpu_work_bytes(Engine *e, const Config *c, int rows, bool training) {
    (void)e, (void)c, (void)rows, (void)training;
    return 0;
}

static void cpu_start(Engine *e) {
    ((Cpu *)e->scratch)->started = omp_get_wtime();
}

static double cpu_stop(Engine *e) {
    return omp_get_wtime() - ((Cpu *)e->scratch)->started;
}

static void cpu_read(Engine *e, float *host, const Act *x, size_t offset, size_t count) {
    (void)e;
    memcpy(host, (const float *)x + offset, count * sizeof(float));
}

static void cpu_write(Engine *e, Act *x, size_t offset, const float *host, size_t count) {
    (void)e;
    memcpy((float *)x + offset, host, count * sizeof(float));
}

static void cpu_put(Engine *e, void *x, const void *host, size_t bytes) {
    (void)e;
    memcpy(x, host, bytes);
}

static const void *cpu_view(Engine *e, const void *x, size_t bytes) {
    (void)e, (void)bytes;
    return x;
}

static void cpu_unview(Engine *e, const void *x, const void *seen) {
    (void)e, (void)x, (void)seen;
}

/* Weights are used where they are; but how large those of --weights are has been kept. */
static void cpu_forget(Engine *e, const void *host, size_t bytes) {
    Cpu *cpu = e->scratch;
    size_t kept = 0;
    for (size_t i = 0; i < cpu->n_rounded; i++) {
        const char *at = cpu->rounded[i].matrix;
        if (host && at >= (const char *)host && at < (const char *)host + bytes) {
            free(cpu->rounded[i].largest);
        } else {
            cpu->rounded[kept++] = cpu->rounded[i];
        }
    }
    cpu->n_rounded = kept;
}

static int cpu_check(Engine *e, Err *err) {
    (void)e, (void)err;
    return 0;
}

static void cpu_close(Engine *e) {
    Cpu *cpu = e->scratch;
    for (int t = 0; t < e->threads; t++) {
        Scratch *s = &cpu->thread[t];
        free(s->packed_x);
        free(s->strip);
        free(s->q);
        free(s->score);
        free(s->norm);
        free(s->work);
    }
    for (size_t i = 0; i < cpu->n_rounded; i++) {
        free(cpu->rounded[i].largest);
    }
    free(cpu->rounded);
    free(cpu->thread);
    free(cpu->item);
    free(cpu);
    free(e);
}

/* ------------------------------------------------------------------------------------------------ linear
 * y = x W^T. Both x and W have the summed dimension k contiguous, so a product is a bundle of dot products: lanes run
 * along k, a tile of TILE_ROWS rows of x and 4 rows of W keeps one accumulator register per output, and the lanes are
 * summed at the end. No transposition, W is read once in its stored order, and one row (decoding) and many rows
 * (prompts, training) run the same additions.
 *
 * Reuse: a block of x (BLOCK_ROWS x BLOCK_K) is packed into L2; a strip of 4 rows of W is widened into L1 and meets all
 * rows of the block. Bound: one multiply-add instruction per cycle, (TILE_ROWS + 4) loads for 4 TILE_ROWS of them. */

#ifdef __AVX512BF16__
INLINE Vec dot_bf16(Vec sum, const void *x, const void *w) {
    __m512i a = _mm512_loadu_si512(x), b = _mm512_loadu_si512(w);
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
#endif

/* Where a tile's sums go: added to `base` (a bias, or what earlier columns of k gave) and stored in `columns` outputs. */
typedef struct {
    float *out;
    size_t ldo;
    const float *bias; /* [4]; NULL: add to what is in out */
    int columns;
} Place;

INLINE void put_sums(Vec4 sum, float *out, const Place *place) {
    if (place->columns == 4) {
        *(Vec4Anywhere *)out = *(const Vec4Anywhere *)(place->bias ? place->bias : out) + sum;
        return;
    }
    for (int c = 0; c < place->columns; c++) {
        out[c] = (place->bias ? place->bias[c] : out[c]) + sum[c];
    }
}

/* The dot products of a packed tile of mr rows of x and 4 rows of w (ldw apart), k elements each (bf16: pairs in one float). */
INLINE void dot_tile(int mr, bool bf16, const float *x, const float *w, size_t ldw, int k, const Place *place) {
    Vec sum[TILE_ROWS][4];
    for (int i = 0; i < mr; i++) {
        for (int j = 0; j < 4; j++) {
            sum[i][j] = (Vec){0};
        }
    }
    for (int p = 0; p < k; p += LANES) {
        const float *wp = w + p, *xp = x + p * mr;
#ifdef __AVX512BF16__
        if (bf16) {
            for (int i = 0; i < mr; i++) {
                for (size_t j = 0; j < 4; j++) {
                    sum[i][j] = dot_bf16(sum[i][j], xp + i * LANES, wp + j * ldw);
                }
            }
            continue;
        }
#else
        (void)bf16;
#endif
        Vec w0 = load(wp), w1 = load(wp + ldw), w2 = load(wp + 2 * ldw), w3 = load(wp + 3 * ldw);
        for (int i = 0; i < mr; i++) {
            Vec xi = load(xp + i * LANES);
            sum[i][0] += xi * w0;
            sum[i][1] += xi * w1;
            sum[i][2] += xi * w2;
            sum[i][3] += xi * w3;
        }
    }
    for (int i = 0; i < mr; i++) {
        put_sums(sums4(sum[i][0], sum[i][1], sum[i][2], sum[i][3]), place->out + (size_t)i * place->ldo, place);
    }
}

static void dot_rows(int mr, bool bf16, const float *x, const float *w, size_t ldw, int k, const Place *place) {
#define TILE(n)                                                                                                        \
    case n:                                                                                                            \
        if (bf16) {                                                                                                    \
            dot_tile(n, true, x, w, ldw, k, place);                                                                    \
        } else {                                                                                                       \
            dot_tile(n, false, x, w, ldw, k, place);                                                                   \
        }                                                                                                              \
        break;
    switch (mr) {
        TILE(1)
        TILE(2)
#if defined __AVX512F__
        TILE(3)
        TILE(4)
        TILE(5)
        TILE(6)
#endif
    default: break;
    }
#undef TILE
}

/* Columns [k0, k0+kc) of `rows` rows of x, tile by tile: the rows of a tile take turns, a register's worth each, so that the
 * product reads one stream. Beyond kc there are zeros. */
static void pack_x(float *packed, const float *x, int rows, int K, int k0, int kc, int width, bool bf16) {
    int step = bf16 ? 2 * LANES : LANES; /* numbers in a register */
    for (int i = 0; i < rows; i++) {
        const float *in = x + (size_t)i * (size_t)K + k0;
        int tile = i / TILE_ROWS * TILE_ROWS, mr = rows - tile < TILE_ROWS ? rows - tile : TILE_ROWS;
        float *out = packed + (size_t)tile * (size_t)width + (size_t)(i - tile) * LANES;
        for (int p = 0; p < (bf16 ? 2 * width : width); p += step, out += (size_t)mr * LANES) {
            size_t n = p >= kc ? 0 : (size_t)(kc - p < step ? kc - p : step);
#ifdef __AVX512BF16__
            if (bf16) {
                memset(out, 0, LANES * sizeof(float));
                narrow((uint16_t *)(void *)out, in + p, n);
                continue;
            }
#endif
            if (n == LANES) {
                store(out, load(in + p));
            } else {
                memset(out, 0, LANES * sizeof(float));
                memcpy(out, in + p, n * sizeof(float));
            }
        }
    }
}

/* Weights of a row whose largest is `largest`, as --weights leaves them. */
static void round_weights(float *w, size_t n, float largest, WeightFormat format) {
    float by = to_codes(largest, format), scale = from_codes(largest, format);
    for (size_t i = 0; i < n; i++) {
        w[i] = number_of(code_of(w[i] * by, format), format) * scale;
    }
}

/* Rows o..o+4 of W, columns [k0, k0+kc), as pack_x; rows past the last are zero. `largest` of the rows, where weights are rounded. */
static void pack_strip(float *strip, const Tensor *w, int O, int o, int K, int k0, int kc, int width, bool bf16, const float *largest,
                       WeightFormat format) {
    for (int j = 0; j < 4; j++) {
        float *row = strip + (size_t)j * (size_t)width;
        if (o + j >= O) {
            memset(row, 0, (size_t)width * sizeof(float));
            continue;
        }
        size_t offset = (size_t)(o + j) * (size_t)K + (size_t)k0;
        memset(row + width - 16, 0, 16 * sizeof(float));
        if (bf16 && w->dtype == DT_BF16 && !largest) {
            memcpy(row, (const uint16_t *)w->data + offset, (size_t)kc * 2);
            continue;
        }
        float room[BLOCK_K], *wide = bf16 ? room : row;
        widen(wide, w, offset, (size_t)kc);
        if (largest) {
            round_weights(wide, (size_t)kc, largest[o + j], format);
        }
#ifdef __AVX512BF16__
        if (bf16) {
            narrow((uint16_t *)(void *)row, wide, (size_t)kc);
        }
#endif
    }
}

/* Asks for a part of the next strip (its columns [from, from+n) of 4 rows) before each tile of this one: all at once would
 * fill the processor's few slots for outstanding misses, and the product would wait behind them. */
static void prefetch_strip(const Tensor *w, int O, int o, int K, int from, int n) {
    size_t size = dtype_size(w->dtype);
    for (int j = 0; j < 4 && o + j < O; j++) {
        const char *row = (const char *)w->data + ((size_t)(o + j) * (size_t)K + (size_t)from) * size;
        for (size_t i = 0; i < (size_t)n * size; i += 64) {
            __builtin_prefetch(row + i, 0, 3);
        }
    }
}

typedef struct {
    float *out;
    const float *x;
    const Linear *w;
    bool bf16;
    const float *largest[3]; /* of each row of each matrix, where weights are rounded; else NULL */
} Product;

/* The packed rows (columns [k0, k0+kc) of x) against outputs [from, to) of matrix m, whose first is `column` of the stack. */
static void product_strips(const Product *p, Scratch *s, int m, int column, int row, int rows, int from, int to, int k0, int kc,
                           int width) {
    const Tensor *w = &p->w->w[m], *b = &p->w->b[m];
    int O = (int)w->shape[0], K = p->w->in;
    size_t ldo = (size_t)p->w->out, bytes = dtype_size(w->dtype);
    /* Four whole rows that are stored as the product reads them need no packing. */
    bool ready = p->largest[m] ? false : p->bf16 ? w->dtype == DT_BF16 && kc == 2 * width && K % 2 == 0 : w->dtype == DT_F32 && kc == width;
    for (int o = from; o < to; o += 4) {
        const float *strip = s->strip;
        size_t ldw = (size_t)width;
        if (ready && o + 4 <= O) {
            strip = (const float *)(const void *)((const char *)w->data + ((size_t)o * (size_t)K + (size_t)k0) * bytes);
            ldw = (size_t)K * bytes / sizeof(float);
        } else {
            pack_strip(s->strip, w, O, o, K, k0, kc, width, p->bf16, p->largest[m], p->w->format);
        }
        float bias[4] = {0};
        Place place = {.ldo = ldo, .bias = k0 == 0 ? bias : NULL, .columns = to - o < 4 ? to - o : 4};
        if (b->data && k0 == 0) {
            widen(bias, b, (size_t)o, (size_t)place.columns);
        }
        int part = (int)round_up((size_t)(kc * TILE_ROWS / (rows + TILE_ROWS - 1)), 32);
        for (int i = 0, next = 0; i < rows; i += TILE_ROWS, next += part) {
            if (next < kc) {
                prefetch_strip(w, to, o + 4, K, k0 + next, kc - next < part ? kc - next : part);
            }
            place.out = p->out + (size_t)(row + i) * ldo + column + o;
            dot_rows(rows - i < TILE_ROWS ? rows - i : TILE_ROWS, p->bf16, s->packed_x + (size_t)i * (size_t)width, strip, ldw, width,
                     &place);
        }
    }
}

/* One thread's share: rows [row, row+rows) of x and columns [from, to) of the stack. x is packed once for all matrices. */
static void product_block(const Product *p, Scratch *s, int row, int rows, int from, int to) {
    int K = p->w->in, pieces = (K + BLOCK_K - 1) / BLOCK_K;
    int step = (int)round_up((size_t)((K + pieces - 1) / pieces), 32);
    for (int k0 = 0; k0 < K; k0 += step) {
        int kc = K - k0 < step ? K - k0 : step, column = 0;
        int width = (int)round_up(p->bf16 ? (size_t)(kc + 1) / 2 : (size_t)kc, 16);
        pack_x(s->packed_x, p->x + (size_t)row * (size_t)K, rows, K, k0, kc, width, p->bf16);
        for (int m = 0; m < p->w->n; m++) {
            int O = (int)p->w->w[m].shape[0], first = from > column ? from - column : 0, last = to - column < O ? to - column : O;
            if (first < last) {
                product_strips(p, s, m, column, row, rows, first, last, k0, kc, width);
            }
            column += O;
        }
    }
}

/* The largest weight of each row [O] of a matrix, worked out when it is first asked for. */
static const float *largest_weights(Engine *e, const Tensor *w, int K) {
    Cpu *cpu = e->scratch;
    int O = (int)w->shape[0];
    for (size_t i = 0; i < cpu->n_rounded; i++) {
        if (cpu->rounded[i].matrix == w->data) {
            return cpu->rounded[i].largest;
        }
    }
    float *largest = xcalloc((size_t)O, sizeof(float));
#pragma omp parallel for num_threads(e->threads)
    for (int o = 0; o < O; o++) {
        float part[BLOCK_K];
        for (int k = 0; k < K; k += BLOCK_K) {
            int n = K - k < BLOCK_K ? K - k : BLOCK_K;
            widen(part, w, (size_t)o * (size_t)K + (size_t)k, (size_t)n);
            for (int i = 0; i < n; i++) {
                largest[o] = fmaxf(largest[o], fabsf(part[i]));
            }
        }
    }
    RoundedMatrix *more = xmalloc((cpu->n_rounded + 1) * sizeof *more);
    if (cpu->n_rounded) {
        memcpy(more, cpu->rounded, cpu->n_rounded * sizeof *more);
    }
    free(cpu->rounded);
    cpu->rounded = more;
    cpu->rounded[cpu->n_rounded++] = (RoundedMatrix){w->data, largest};
    return largest;
}

static void cpu_linear(Engine *e, Act *out, const Act *x, const Linear *w, int N) {
    Cpu *cpu = e->scratch;
    Product p = {out, x, w, e->bf16_dot, {NULL}};
    for (int m = 0; m < w->n && w->format != WEIGHTS_AS_STORED; m++) {
        p.largest[m] = largest_weights(e, &w->w[m], w->in);
    }
    int blocks = (N + BLOCK_ROWS - 1) / BLOCK_ROWS, rows = (N + blocks - 1) / blocks;
    /* Few row blocks: the outputs are divided too, so that all threads have work until the end. */
    int tasks = blocks == 1 ? 2 * e->threads : 8 * e->threads, pieces = (tasks + blocks - 1) / blocks;
    int piece = (int)round_up((size_t)((w->out + pieces - 1) / pieces), 4), per_block = (w->out + piece - 1) / piece;
    bool small = (double)N * w->in * w->out < WORTH_THREADS;
#pragma omp parallel for schedule(dynamic) num_threads(e->threads) if (!small)
    for (int task = 0; task < blocks * per_block; task++) {
        int row = task / per_block * rows, from = task % per_block * piece;
        int n = N - row < rows ? N - row : rows, to = w->out - from < piece ? w->out : from + piece;
        if (n > 0) {
            product_block(&p, &cpu->thread[omp_get_thread_num()], row, n, from, to);
        }
    }
}

/* ------------------------------------------------------------------------------------------------ row by row ops */

static void cpu_embed(Engine *e, Act *out, const Tensor *table, const int *token, int N, int D, float scale) {
    (void)e;
    for (int n = 0; n < N; n++) {
        float *row = (float *)out + (size_t)n * (size_t)D;
        widen(row, table, (size_t)token[n] * (size_t)D, (size_t)D);
        for (int i = 0; i < D; i++) {
            row[i] *= scale;
        }
    }
}

/* One row. w already holds the added 1. */
INLINE void rmsnorm_row(float *out, const float *x, const float *w, int D, float eps) {
    Vec squares = {0};
    int i = 0;
    for (; i + LANES <= D; i += LANES) {
        Vec v = load(x + i);
        squares += v * v;
    }
    float sum = vec_sum(squares);
    for (; i < D; i++) {
        sum += x[i] * x[i];
    }
    float inverse = 1.0f / sqrtf(sum / (float)D + eps);
    for (i = 0; i < D; i++) {
        out[i] = x[i] * inverse * w[i];
    }
}

static void cpu_rmsnorm(Engine *e, Act *out, const Act *x, const Tensor *w, int N, int D, float eps, int plus_one) {
    Cpu *cpu = e->scratch;
    const float *weight = widened_norm(&cpu->thread[0], w, D, plus_one);
#pragma omp parallel for schedule(static) num_threads(e->threads) if ((double)N * D * 4 > WORTH_THREADS)
    for (int n = 0; n < N; n++) {
        size_t at = (size_t)n * (size_t)D;
        rmsnorm_row((float *)out + at, (const float *)x + at, weight, D, eps);
    }
}

static void cpu_gated(Engine *e, Act *out, const Act *gate_up, int N, int F, bool gelu) {
#pragma omp parallel for schedule(static) num_threads(e->threads) if ((double)N * F * 16 > WORTH_THREADS)
    for (int n = 0; n < N; n++) {
        const float *gate = (const float *)gate_up + (size_t)n * 2 * (size_t)F, *up = gate + F;
        float *row = (float *)out + (size_t)n * (size_t)F;
        for (int i = 0; i < F; i += LANES) {
            int count = F - i < LANES ? F - i : LANES;
            Vec g = {0}, u = {0};
            if (count == LANES) {
                g = load(gate + i);
                u = load(up + i);
            } else {
                memcpy(&g, gate + i, (size_t)count * sizeof(float));
                memcpy(&u, up + i, (size_t)count * sizeof(float));
            }
            /* silu(x) = x / (1 + e^-x). gelu_tanh(x) = x (1 + tanh y) / 2 = x / (1 + e^-2y), y = sqrt(2/pi) (x + 0.044715 x^3) */
            Vec slope = gelu ? 1.5957691216f * (g + 0.044715f * g * g * g) : g;
            Vec y = g / (1.0f + vec_exp(-slope)) * u;
            memcpy(row + i, &y, (size_t)count * sizeof(float));
        }
    }
}

static void cpu_add(Engine *e, Act *out, const Act *x, const Act *y, size_t count) {
    float *sum = out;
    const float *a = x, *b = y;
#pragma omp parallel for schedule(static) num_threads(e->threads) if (count > 65536)
    for (size_t i = 0; i < count; i++) {
        sum[i] = a[i] + b[i];
    }
}

static void cpu_add_rmsnorm(Engine *e, Act *sum, Act *out, const Act *x, const Act *y, const Tensor *w, int N, int D, float eps,
                            int plus_one) {
    cpu_add(e, sum, x, y, (size_t)N * (size_t)D);
    cpu_rmsnorm(e, out, sum, w, N, D, eps, plus_one);
}

static void cpu_gather(Engine *e, Act *out, const Act *x, const int *row, int n, int D) {
    (void)e;
    for (int i = 0; i < n; i++) {
        memcpy((float *)out + (size_t)i * (size_t)D, (const float *)x + (size_t)row[i] * (size_t)D,
               (size_t)D * sizeof(float));
    }
}

/* ------------------------------------------------------------------------------------------------ RoPE and the cache
 * Values are kept as [row, G*E]. Keys are kept in blocks of LANES rows, [block, g, element, row in block]: a register
 * then holds one element of LANES keys, and scores need no summing across lanes. */

INLINE void rotate(float *out, const float *x, const float *cos, const float *sin, int E, int stride) {
    int half = E / 2;
    for (int i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        out[i * stride] = a * cos[i] - b * sin[i];
        out[(i + half) * stride] = b * cos[i] + a * sin[i];
    }
}

static void cpu_rope_qkv(Engine *e, Act *q, Act *k, Act *v, const Act *qkv, const Tensor *q_norm, const Tensor *k_norm,
                         float eps, int plus_one, const Act *cos, const Act *sin, const int *position,
                         const int *cache_row, int N, int H, int G, int E) {
    Cpu *cpu = e->scratch;
    size_t width = (size_t)(H + 2 * G) * (size_t)E, half = (size_t)E / 2;
#pragma omp parallel for schedule(static) num_threads(e->threads) if ((double)N * (double)width * 8 > WORTH_THREADS)
    for (int n = 0; n < N; n++) {
        Scratch *s = &cpu->thread[omp_get_thread_num()];
        const float *in = (const float *)qkv + (size_t)n * width;
        const float *c = (const float *)cos + (size_t)position[n] * half, *sn = (const float *)sin + (size_t)position[n] * half;
        float head[1024];
        const float *weight = q_norm ? widened_norm(s, q_norm, E, plus_one) : NULL;
        for (int h = 0; h < H + G; h++) {
            if (h == H && k_norm) {
                weight = widened_norm(s, k_norm, E, plus_one);
            }
            const float *x = in + (size_t)h * (size_t)E;
            if (weight) {
                rmsnorm_row(head, x, weight, E, eps);
                x = head;
            }
            if (h < H) {
                rotate((float *)q + ((size_t)n * (size_t)H + (size_t)h) * (size_t)E, x, c, sn, E, 1);
            } else {
                rotate(key_block(k, cache_row[n], h - H, G, E) + cache_row[n] % LANES, x, c, sn, E, LANES);
            }
        }
        memcpy((float *)v + (size_t)cache_row[n] * (size_t)G * (size_t)E, in + (size_t)(H + G) * (size_t)E,
               (size_t)G * (size_t)E * sizeof(float));
    }
}

/* ------------------------------------------------------------------------------------------------ attention
 * Flash attention over a forest: for a few queries of one run and the heads that share a key/value head, walk the keys
 * of the ancestors from the root down, KEY_TILE at a time, with a running maximum and sum. Tiles start at each segment's
 * own start, so a row's additions depend only on its own chain of segments. */

/* Softmax bookkeeping of one (query, head) over one tile: scores become weights relative to the new maximum; the sum so
 * far and the output so far are scaled to it. Keys outside [from, to) weigh nothing. */
INLINE void softmax_tile(float *score, int from, int to, float *largest, float *sum, float *o, int width) {
    if (from >= to) {
        memset(score, 0, KEY_TILE * sizeof(float));
        return;
    }
    Vec index = {0}, best = splat(-INFINITY);
    for (int i = 0; i < LANES; i++) {
        index[i] = (float)i;
    }
    for (int j = 0; j < KEY_TILE; j += LANES) {
        Vec at = index + (float)j;
        Vec s = choose((at >= (float)from) & (at < (float)to), load(score + j), splat(-INFINITY));
        store(score + j, s);
        best = vec_max(best, s);
    }
    float tile_largest = vec_largest(best);
    float now = tile_largest > *largest ? tile_largest : *largest;
    float shrink = *largest == -INFINITY ? 0.0f : expf(*largest - now);
    Vec total = {0};
    for (int j = 0; j < KEY_TILE; j += LANES) {
        Vec w = vec_exp(load(score + j) - now);
        store(score + j, w);
        total += w;
    }
    *sum = *sum * shrink + vec_sum(total);
    if (shrink != 1.0f) {
        for (int i = 0; i < width; i++) {
            o[i] *= shrink;
        }
    }
    *largest = now;
}

typedef struct {
    const float *q, *k, *v;
    float *out, *lse;
    const Segment *segment;
    const Run *run;
    int H, G, E, window;
    float scale;
} Attention;

/* The tiles of one segment, for the queries of one item. */
static void attend_segment(const Attention *a, const AttentionItem *item, Scratch *s, int seg, float *largest, float *sum) {
    const Run *run = &a->run[item->run];
    const Segment *keys = &a->segment[seg];
    int group = a->H / a->G, rows = item->n * group, E = a->E, width = (int)round_up((size_t)E, LANES);
    bool own = seg == run->seg;
    int first_query = a->segment[run->seg].position + run->first + item->first; /* position of the item's first query */
    int n_keys = own ? run->first + item->first + item->n : keys->len;
    for (int j = 0; j < n_keys; j += KEY_TILE) {
        int n = n_keys - j < KEY_TILE ? n_keys - j : KEY_TILE, position = keys->position + j;
        if (a->window > 0 && first_query - (position + n - 1) >= a->window) {
            continue; /* out of every query's window */
        }
        for (int t = 0; t < KEY_TILE / LANES; t += TILE_VECTORS) {
            const float *block[TILE_VECTORS];
            for (int b = 0; b < TILE_VECTORS; b++) { /* past the last key: any readable block will do, it is masked */
                int row = keys->row + j + (t + b) * LANES;
                block[b] = key_block(a->k, (t + b) * LANES < n ? row : keys->row + j, item->g, a->G, E);
            }
            outer(rows, TILE_VECTORS, s->q, width, 1, block, LANES, E, s->score + t * LANES, KEY_TILE, false);
        }
        for (int r = 0; r < rows; r++) {
            int query = first_query + r / group;
            int to = own && query - position + 1 < n ? query - position + 1 : n;
            int from = a->window > 0 && query - a->window + 1 > position ? query - a->window + 1 - position : 0;
            softmax_tile(s->score + (size_t)r * KEY_TILE, from, to, &largest[r], &sum[r], s->o + (size_t)r * (size_t)width,
                         width);
        }
        size_t ldv = (size_t)a->G * (size_t)E;
        const float *v = a->v + (size_t)(keys->row + j) * ldv + (size_t)item->g * (size_t)E;
        if (width != E) {
            for (int i = 0; i < n; i++) {
                memcpy(s->v + (size_t)i * (size_t)width, v + (size_t)i * ldv, (size_t)E * sizeof(float));
                memset(s->v + (size_t)i * (size_t)width + E, 0, (size_t)(width - E) * sizeof(float));
            }
            v = s->v;
            ldv = (size_t)width;
        }
        for (int c = 0; c < width; c += TILE_VECTORS * LANES) {
            int nv = (width - c) / LANES < TILE_VECTORS ? (width - c) / LANES : TILE_VECTORS;
            const float *column[TILE_VECTORS];
            for (int b = 0; b < nv; b++) {
                column[b] = v + c + b * LANES;
            }
            outer(rows, nv, s->score, KEY_TILE, 1, column, ldv, n, s->o + c, width, true);
        }
    }
}

static void attend(const Attention *a, const AttentionItem *item, Scratch *s) {
    const Run *run = &a->run[item->run];
    int group = a->H / a->G, rows = item->n * group, E = a->E, width = (int)round_up((size_t)E, LANES);
    float largest[QUERY_TILE], sum[QUERY_TILE];
    for (int r = 0; r < rows; r++) {
        size_t n = (size_t)(run->row + item->first + r / group), h = (size_t)(item->g * group + r % group);
        const float *q = a->q + (n * (size_t)a->H + h) * (size_t)E;
        for (int i = 0; i < E; i++) {
            s->q[(size_t)r * (size_t)width + (size_t)i] = q[i] * a->scale;
        }
        largest[r] = -INFINITY;
        sum[r] = 0;
    }
    memset(s->o, 0, (size_t)rows * (size_t)width * sizeof(float));
    int chain[MAX_DEPTH], depth = 0;
    for (int seg = run->seg; seg >= 0 && depth < MAX_DEPTH; seg = a->segment[seg].parent) {
        chain[depth++] = seg;
    }
    while (depth > 0) {
        attend_segment(a, item, s, chain[--depth], largest, sum);
    }
    for (int r = 0; r < rows; r++) {
        size_t n = (size_t)(run->row + item->first + r / group), h = (size_t)(item->g * group + r % group);
        float *out = a->out + (n * (size_t)a->H + h) * (size_t)E;
        for (int i = 0; i < E; i++) {
            out[i] = s->o[(size_t)r * (size_t)width + (size_t)i] / sum[r];
        }
        if (a->lse) {
            a->lse[n * (size_t)a->H + h] = largest[r] + logf(sum[r]);
        }
    }
}

static void cpu_attention(Engine *e, Act *out, Act *lse, const Act *q, const Act *k, const Act *v, const Segment *segment,
                          const Run *run, int n_runs, int H, int G, int E, float scale, int window) {
    Cpu *cpu = e->scratch;
    Attention a = {q, k, v, out, lse, segment, run, H, G, E, window, scale};
    int group = H / G, step = QUERY_TILE / group;
    size_t head = round_up((size_t)E, LANES), n_items = 0;
    double work = 0; /* multiply-adds, at most */
    for (int t = 0; t < e->threads; t++) {
        Scratch *s = &cpu->thread[t];
        s->q = grow(s->q, &s->head_room, (2 * QUERY_TILE + KEY_TILE) * head);
        s->o = s->q + QUERY_TILE * head;
        s->v = s->o + QUERY_TILE * head;
    }
    for (int r = 0; r < n_runs; r++) {
        n_items += (size_t)((run[r].n + step - 1) / step) * (size_t)G;
        work += 2.0 * run[r].n * (segment[run[r].seg].position + segment[run[r].seg].len) * H * E;
    }
    if (n_items > cpu->item_room) {
        free(cpu->item);
        cpu->item = xmalloc(n_items * sizeof(AttentionItem));
        cpu->item_room = n_items;
    }
    n_items = 0;
    for (int r = 0; r < n_runs; r++) {
        for (int first = 0; first < run[r].n; first += step) {
            for (int g = 0; g < G; g++) {
                int n = run[r].n - first < step ? run[r].n - first : step;
                cpu->item[n_items++] = (AttentionItem){r, first, n, g};
            }
        }
    }
#pragma omp parallel for schedule(dynamic) num_threads(e->threads) if (work > WORTH_THREADS)
    for (size_t i = 0; i < n_items; i++) {
        attend(&a, &cpu->item[i], &cpu->thread[omp_get_thread_num()]);
    }
}

/* ------------------------------------------------------------------------------------------------ sampling */

typedef struct {
    float weight;
    int id;
} Candidate;

/* Heavier first; among equals the lower id. */
static int by_weight(const void *a, const void *b) {
    const Candidate *x = a, *y = b;
    return x->weight != y->weight ? (x->weight < y->weight) - (x->weight > y->weight) : (x->id > y->id) - (x->id < y->id);
}

static int descending(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x < y) - (x > y);
}

/* The k-th largest of n numbers (quickselect on a copy). */
static float kth_largest(const float *x, int n, int k) {
    float *copy = xmalloc((size_t)n * sizeof(float));
    memcpy(copy, x, (size_t)n * sizeof(float));
    int from = 0, to = n;
    while (to - from > 32) {
        float pivot = copy[from + (to - from) / 2];
        int i = from, j = to - 1;
        while (i <= j) {
            while (copy[i] > pivot) {
                i++;
            }
            while (copy[j] < pivot) {
                j--;
            }
            if (i <= j) {
                float swap = copy[i];
                copy[i++] = copy[j];
                copy[j--] = swap;
            }
        }
        if (k - 1 <= j) {
            to = j + 1;
        } else if (k - 1 >= i) {
            from = i;
        } else {
            from = to = k - 1;
        }
    }
    if (to > from) {
        qsort(copy + from, (size_t)(to - from), sizeof(float), descending);
    }
    float result = copy[k - 1];
    free(copy);
    return result;
}

/* Zeroes the weights that top_p leaves out. */
static void keep_top_p(float *weight, int V, float top_p) {
    Candidate *sorted = xmalloc((size_t)V * sizeof(Candidate));
    int n = 0;
    double total = 0, kept = 0;
    for (int i = 0; i < V; i++) {
        if (weight[i] > 0) {
            sorted[n++] = (Candidate){weight[i], i};
            total += (double)weight[i];
        }
    }
    qsort(sorted, (size_t)n, sizeof(Candidate), by_weight);
    for (int i = 0; i < n; i++) {
        if (i > 0 && kept >= (double)top_p * total) {
            weight[sorted[i].id] = 0;
        }
        kept += (double)sorted[i].weight;
    }
    free(sorted);
}

INLINE VecBits mix(VecBits h) {
    h = (h ^ (h >> 16)) * 0x7feb352du;
    h = (h ^ (h >> 15)) * 0x846ca68bu;
    return h ^ (h >> 16);
}

/* Standard exponential numbers -ln(1 - u), one for each of LANES tokens from `first` on, keyed by (key, token). */
INLINE Vec exponential(uint64_t key, int first) {
    VecBits index = {0};
    for (int i = 0; i < LANES; i++) {
        index[i] = (uint32_t)(first + i);
    }
    VecBits h = mix(mix(index + (uint32_t)key) + (uint32_t)(key >> 32));
    Vec u = __builtin_convertvector(h, Vec) * 0x1p-32f + 0x1p-33f;
    Vec small = u * (1.0f + u * (0.5f + u * (0.33333333f + u * 0.25f))); /* where 1 - u would round away what counts */
    Vec large = -vec_log(vec_max(1.0f - u, splat(0x1p-24f)));
    return choose(u < 0.015625f, small, large);
}

/* Token i wins with probability weight[i] / sum: the largest weight[i] / exponential[i], the lower of equals. Unlike a walk
 * along the sum of the weights, where rounding moves 50,000 borders at once, only a near tie of two can change the winner. */
static int race(const float *weight, int V, uint64_t key) {
    Vec best = splat(-1), place = {0};
    for (int i = 0; i < V; i += LANES) { /* weights past V are 0 */
        Vec score = load(weight + i) / exponential(key, i);
        VecInt better = score > best;
        int block = i / LANES;
        place = choose(better, splat((float)block), place);
        best = choose(better, score, best);
    }
    float largest = vec_largest(best);
    int winner = V;
    for (int i = 0; i < LANES; i++) {
        int token = (int)place[i] * LANES + i;
        winner = best[i] == largest && token < winner ? token : winner;
    }
    return winner;
}

static void sample_row(const float *logits, int V, float temperature, int top_k, float top_p, uint64_t key, int *token,
                       float *logprob) {
    int best = 0;
    for (int i = 1; i < V; i++) {
        if (logits[i] > logits[best]) {
            best = i;
        }
    }
    float inverse = temperature > 0 ? 1.0f / temperature : 1.0f, *weight = xmalloc(((size_t)V + LANES) * sizeof(float));
    double total = 0;
    for (int i = 0; i < V; i += LANES) {
        Vec x = splat(-INFINITY);
        memcpy(&x, logits + i, (size_t)(V - i < LANES ? V - i : LANES) * sizeof(float));
        Vec w = vec_exp((x - logits[best]) * inverse);
        store(weight + i, w);
        total += (double)vec_sum(w);
    }
    *token = best;
    if (temperature > 0) {
        if (top_k > 0 && top_k < V) {
            float border = kth_largest(logits, V, top_k);
            for (int i = 0; i < V; i++) {
                weight[i] = logits[i] >= border ? weight[i] : 0;
            }
        }
        if (top_p < 1) {
            keep_top_p(weight, V, top_p);
        }
        *token = race(weight, V, key);
    }
    if (logprob) {
        *logprob = (logits[*token] - logits[best]) * inverse - (float)log(total);
    }
    free(weight);
}

static void cpu_sample(Engine *e, int *token, float *logprob, const Act *logits, int n, int V, float temperature, int top_k,
                       float top_p, const uint64_t *key) {
#pragma omp parallel for schedule(dynamic) num_threads(e->threads) if (n > 1 && (double)n * V * 8 > WORTH_THREADS)
    for (int i = 0; i < n; i++) {
        sample_row((const float *)logits + (size_t)i * (size_t)V, V, temperature, top_k, top_p, key ? key[i] : 0,
                   &token[i], logprob ? &logprob[i] : NULL);
    }
}

/* ------------------------------------------------------------------------------------------------ the table */

Engine *CPU_ENGINE(int threads, bool bf16_dot, Err *err);
void CPU_BACKWARD(Engine *e); /* cpu_backward.c: the rest of the table */

Engine *CPU_ENGINE(int threads, bool bf16_dot, Err *err) {
#ifndef __AVX512BF16__
    if (bf16_dot) {
        fail(err, "this processor has no bf16 dot product (AVX512-BF16); run without --bf16");
        return NULL;
    }
#endif
    Engine *e = xcalloc(1, sizeof *e);
    Cpu *cpu = xcalloc(1, sizeof *cpu);
    *e = (Engine){
        .name = bf16_dot ? "cpu " CPU_NAME " bf16" : "cpu " CPU_NAME,
        .act_dtype = DT_F32,
        .bf16_dot = bf16_dot,
        .threads = threads,
        .scratch = cpu,
        .alloc = cpu_alloc,
        .free = cpu_free,
        .read = cpu_read,
        .write = cpu_write,
        .put = cpu_put,
        .view = cpu_view,
        .unview = cpu_unview,
        .forget = cpu_forget,
        .check = cpu_check,
        .close = cpu_close,
        .start = cpu_start,
        .stop = cpu_stop,
        .copy = cpu_copy,
        .available = cpu_available,
        .memory = &cpu->memory,
        .copy_bytes = cpu_copy_bytes,
        .work_bytes = cpu_work_bytes,
        .embed = cpu_embed,
        .rmsnorm = cpu_rmsnorm,
        .linear = cpu_linear,
        .rope_qkv = cpu_rope_qkv,
        .attention = cpu_attention,
        .gated = cpu_gated,
        .add = cpu_add,
        .add_rmsnorm = cpu_add_rmsnorm,
        .gather = cpu_gather,
        .sample = cpu_sample,
    };
    CPU_BACKWARD(e);
    cpu->thread = xcalloc((size_t)threads, sizeof(Scratch));
    for (int t = 0; t < threads; t++) {
        Scratch *s = &cpu->thread[t];
        s->packed_x = aligned_floats((BLOCK_ROWS + TILE_ROWS) * (BLOCK_K + 32));
        s->strip = aligned_floats(4 * (BLOCK_K + 32));
        s->score = aligned_floats(QUERY_TILE * KEY_TILE);
        if (!s->packed_x || !s->strip || !s->score) {
            fail(err, "not enough memory for the CPU engine's working space of %d threads; use fewer with --threads", threads);
            cpu_close(e);
            return NULL;
        }
    }
    return e;
}
