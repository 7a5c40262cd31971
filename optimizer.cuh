/* optimizer.cuh - AdamW and the gradient's norm for the CUDA engine: a part of kernels.cu, which includes it.
 */

/* ------------------------------------------------------------------------------------------------ the optimizer */

enum { FLAT_BLOCK = 1 << 14, FLAT_THREADS = 256 }; /* numbers that a block sums */

/* partial[block] = the sum of its numbers' squares. Grid: FLAT_BLOCK numbers a block. Bound: memory, 4 bytes a number. */
static __global__ void sum_squares_kernel(double *partial, const float *x, size_t count) {
    size_t from = (size_t)blockIdx.x * FLAT_BLOCK, to = from + FLAT_BLOCK < count ? from + FLAT_BLOCK : count;
    double sum = 0;
    for (size_t i = from + threadIdx.x; i < to; i += blockDim.x) {
        sum += (double)x[i] * (double)x[i];
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = sum;
    }
}

/* The sum of the partial sums. Grid: one block. */
static __global__ void total_kernel(double *total, const double *partial, size_t n) {
    double sum = 0;
    for (size_t i = threadIdx.x; i < n; i += blockDim.x) {
        sum += partial[i];
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) {
        *total = sum;
    }
}

static double cuda_sum_squares(Engine *e, const Act *x, size_t count) {
    RANGE();
    Cuda *c = cuda_of(e);
    size_t blocks = (count + FLAT_BLOCK - 1) / FLAT_BLOCK;
    double *partial = (double *)work(c, WORK_RESULT, (blocks + 1) * sizeof(double)), total = 0;
    if (count == 0) {
        return 0;
    }
    LAUNCH(c, sum_squares_kernel, (unsigned)blocks, FLAT_THREADS, 0, partial + 1, (const float *)x, count);
    LAUNCH(c, total_kernel, 1, FLAT_THREADS, 0, partial, partial + 1, blocks);
    copy_out(c, &total, partial, sizeof total);
    return total;
}

/* fp32 to bf16, up or down with the probability that keeps the mean: the dropped half of the bits against a random half. */
__device__ static inline bf16 round_stochastically(float x, uint32_t random) {
    return __ushort_as_bfloat16((unsigned short)((bits_of(x) + (random & 0xffff)) >> 16));
}

__device__ static inline uint32_t element_random(uint64_t key, uint64_t i) {
    uint64_t h = (i + 1) * 0x9e3779b97f4a7c15u ^ key;
    h = (h ^ (h >> 30)) * 0xbf58476d1ce4e5b9u;
    h = (h ^ (h >> 27)) * 0x94d049bb133111ebu;
    return (uint32_t)(h >> 32);
}

__device__ static inline void put_moments(float *m, float *v, float m1, float v1, uint64_t, uint64_t) {
    *m = m1;
    *v = v1;
}
__device__ static inline void put_moments(bf16 *m, bf16 *v, float m1, float v1, uint64_t key, uint64_t i) {
    uint32_t random = element_random(key, i);
    *m = round_stochastically(m1, random);
    *v = round_stochastically(v1, random >> 16);
}

__device__ static inline void put_weight(float *w, float x, uint64_t, uint64_t) { *w = x; }
__device__ static inline void put_weight(bf16 *w, float x, uint64_t key, uint64_t i) {
    *w = round_stochastically(x, element_random(~key, i));
}

namespace {
struct AdamwStep {
    AdamW how;
    float lr, correct1, correct2, g_scale;
    uint64_t key;
};
} // namespace

/* Grid: 4 numbers a thread, 256 threads a block. Bound: memory, 4 + 2 sizeof(P) + 4 sizeof(M) bytes a number. */
template <typename P, typename M> __global__ void adamw_kernel(P *w, const float *g, M *m, M *v, size_t count, AdamwStep s) {
    size_t from = (size_t)blockIdx.x * 1024;
    for (size_t i = from + threadIdx.x; i < count && i < from + 1024; i += blockDim.x) {
        float gradient = g[i] * s.g_scale;
        float m1 = s.how.beta1 * widen(m[i]) + (1 - s.how.beta1) * gradient;
        float v1 = s.how.beta2 * widen(v[i]) + (1 - s.how.beta2) * gradient * gradient;
        put_moments(&m[i], &v[i], m1, v1, s.key, i);
        float x = widen(w[i]);
        x -= s.lr * s.how.decay * x;
        put_weight(&w[i], x - s.lr * s.correct1 * m1 / (sqrtf(v1 * s.correct2) + s.how.eps), s.key, i);
    }
}

template <typename P>
static void update_weights(Cuda *c, P *w, const float *g, void *m, void *v, DType moments, size_t count, const AdamwStep &s) {
    if (moments == DT_BF16) {
        LAUNCH(c, (adamw_kernel<P, bf16>), blocks_of(count, 1024), 256, 0, w, g, (bf16 *)m, (bf16 *)v, count, s);
    } else {
        LAUNCH(c, (adamw_kernel<P, float>), blocks_of(count, 1024), 256, 0, w, g, (float *)m, (float *)v, count, s);
    }
}

static void cuda_adamw(Engine *e, void *w, DType weights, const Act *g, void *m, void *v, DType moments, size_t count, const AdamW *how,
                       float lr, int64_t step, float g_scale, uint64_t key) {
    RANGE();
    Cuda *c = cuda_of(e);
    AdamwStep s = {*how, lr, (float)(1 / (1 - pow((double)how->beta1, (double)step))),
                   (float)(1 / (1 - pow((double)how->beta2, (double)step))), g_scale, key};
    if (count == 0) {
        return;
    }
    if (weights == DT_BF16) {
        update_weights(c, (bf16 *)w, (const float *)g, m, v, moments, count, s);
    } else {
        update_weights(c, (float *)w, (const float *)g, m, v, moments, count, s);
    }
    touch_copies(c, w, count * dtype_size(weights), false);
}
