/* rope.cuh - q, k and v of a row for the CUDA engine, forward and back: split, normed, rotated, kept in the cache. A part of kernels.cu,
 * which includes it behind linear.cuh.
 */

/* ------------------------------------------------------------------------------------------------ RoPE and the cache
 * Keys and values are kept as [row, G*E], rotated, as T. */

namespace {
struct RopeShape {
    int H, G, E;
    float eps, plus;
};
} // namespace

__device__ static inline size_t qkv_width(const RopeShape &s) { return (size_t)(s.H + 2 * s.G) * (size_t)s.E; }

/* r of a head for a norm of its own; 1 without. All lanes of a warp call it. */
template <typename T> __device__ static inline float head_scale(const T *x, const float *w, const RopeShape &s) {
    float squares = 0;
    for (int i = (int)threadIdx.x % WARP; w && i < s.E; i += WARP) {
        squares += widen(x[i]) * widen(x[i]);
    }
    return w ? 1.0f / sqrtf(warp_sum(squares) / (float)s.E + s.eps) : 1.0f;
}

/* Splits a row of qkv, norms and rotates its heads, stores keys and values in the cache. Grid: a block a row, a warp a head.
 * Bound: memory, 2 sizeof(T) bytes a number of qkv. */
template <typename T>
__global__ void rope_qkv_kernel(T *q, T *k, T *v, const T *qkv, const float *q_norm, const float *k_norm, const float *cos,
                                const float *sin, const int *position, const int *cache_row, RopeShape s) {
    int n = (int)blockIdx.x, half = s.E / 2, lane = (int)threadIdx.x % WARP;
    const float *c = cos + (size_t)position[n] * (size_t)half, *si = sin + (size_t)position[n] * (size_t)half;
    size_t E = (size_t)s.E, kept = (size_t)cache_row[n] * (size_t)s.G * E;
    for (int h = (int)threadIdx.x / WARP; h < s.H + 2 * s.G; h += (int)blockDim.x / WARP) {
        const T *x = qkv + (size_t)n * qkv_width(s) + (size_t)h * E;
        if (h >= s.H + s.G) {
            T *out = v + kept + (size_t)(h - s.H - s.G) * E;
            for (int i = lane; i < s.E; i += WARP) {
                out[i] = x[i];
            }
            continue;
        }
        const float *w = h < s.H ? q_norm : k_norm;
        T *out = h < s.H ? q + ((size_t)n * (size_t)s.H + (size_t)h) * E : k + kept + (size_t)(h - s.H) * E;
        float r = head_scale(x, w, s);
        for (int i = lane; i < half; i += WARP) {
            float a = widen(x[i]), b = widen(x[i + half]);
            if (w) {
                a *= r * (w[i] + s.plus);
                b *= r * (w[i + half] + s.plus);
            }
            out[i] = narrow<T>(a * c[i] - b * si[i]);
            out[i + half] = narrow<T>(b * c[i] + a * si[i]);
        }
    }
}

template <typename T>
static void cuda_rope_qkv(Engine *e, Act *q, Act *k, Act *v, const Act *qkv, const Tensor *q_norm, const Tensor *k_norm, float eps,
                          int plus_one, const Act *cos, const Act *sin, const int *position, const int *cache_row, int N, int H, int G,
                          int E) {
    RANGE();
    Cuda *c = cuda_of(e);
    LAUNCH(c, rope_qkv_kernel<T>, (unsigned)N, row_threads((H + 2 * G) * WARP), 0, (T *)q, (T *)k, (T *)v, (const T *)qkv,
           vector_of(c, q_norm, E), vector_of(c, k_norm, E), (const float *)cos, (const float *)sin, stage(c, position, (size_t)N),
           stage(c, cache_row, (size_t)N), (RopeShape{H, G, E, eps, (float)plus_one}));
}

namespace {
/* What the way back reads: gradients of rotated heads, and what had been normed. */
template <typename T> struct RopeBack {
    const T *dq, *dk, *dv, *qkv;
    const float *q_norm, *k_norm, *cos, *sin;
    const int *position;
    RopeShape s;
};
} // namespace

/* Element i of the gradient of head h of row n, rotated back by the opposite angle. */
template <typename T> __device__ static inline float unrotated(const RopeBack<T> &b, int n, int h, int i) {
    int half = b.s.E / 2, j = i < half ? i : i - half;
    const T *d = h < b.s.H ? b.dq + ((size_t)n * (size_t)b.s.H + (size_t)h) * (size_t)b.s.E
                           : b.dk + ((size_t)n * (size_t)b.s.G + (size_t)(h - b.s.H)) * (size_t)b.s.E;
    float cos = b.cos[(size_t)b.position[n] * (size_t)half + (size_t)j], sin = b.sin[(size_t)b.position[n] * (size_t)half + (size_t)j];
    float low = widen(d[j]), high = widen(d[j + half]);
    return i < half ? low * cos + high * sin : high * cos - low * sin;
}

/* dqkv of a row; scale[n, h] = r of each normed head (NULL: there are no norms). Grid: a block a row, a warp a head. Bound: memory,
 * 3 sizeof(T) bytes a number of qkv. */
template <typename T> __global__ void rope_qkv_backward_kernel(T *dqkv, float *scale, RopeBack<T> b) {
    int n = (int)blockIdx.x, lane = (int)threadIdx.x % WARP, H = b.s.H, G = b.s.G, E = b.s.E;
    for (int h = (int)threadIdx.x / WARP; h < H + 2 * G; h += (int)blockDim.x / WARP) {
        size_t at = (size_t)n * qkv_width(b.s) + (size_t)h * (size_t)E;
        const float *w = h < H ? b.q_norm : h < H + G ? b.k_norm : NULL;
        const T *x = b.qkv + at;
        float r = head_scale(x, w, b.s), dot = 0;
        for (int i = lane; w && i < E; i += WARP) {
            dot += unrotated(b, n, h, i) * (w[i] + b.s.plus) * widen(x[i]);
        }
        float pull = w ? warp_sum(dot) * r * r / (float)E : 0;
        for (int i = lane; i < E; i += WARP) {
            float d = h < H + G ? unrotated(b, n, h, i)
                                : widen(b.dv[((size_t)n * (size_t)G + (size_t)(h - H - G)) * (size_t)E + (size_t)i]);
            dqkv[at + (size_t)i] = narrow<T>(w ? r * ((w[i] + b.s.plus) * d - pull * widen(x[i])) : d);
        }
        if (w && lane == 0) {
            scale[(size_t)n * (size_t)(H + G) + (size_t)h] = r;
        }
    }
}

/* A row of the sum for dq_norm or dk_norm is one head of one row of the batch. */
template <typename T> struct HeadNormTerm {
    RopeBack<T> b;
    const float *scale;
    int from, heads;
    __device__ float operator()(int row, int i) const {
        int n = row / heads, h = from + row % heads;
        float x = widen(b.qkv[(size_t)n * qkv_width(b.s) + (size_t)h * (size_t)b.s.E + (size_t)i]);
        return unrotated(b, n, h, i) * x * scale[(size_t)n * (size_t)(b.s.H + b.s.G) + (size_t)h];
    }
};

template <typename T>
static void cuda_rope_qkv_backward(Engine *e, Act *dqkv, const Tensor *dq_norm, const Tensor *dk_norm, const Act *dq, const Act *dk,
                                   const Act *dv, const Act *qkv, const Tensor *q_norm, const Tensor *k_norm, float eps, int plus_one,
                                   const Act *cos, const Act *sin, const int *position, int N, int H, int G, int E) {
    RANGE();
    Cuda *c = cuda_of(e);
    RopeBack<T> b = {(const T *)dq, (const T *)dk, (const T *)dv, (const T *)qkv, vector_of(c, q_norm, E), vector_of(c, k_norm, E),
                     (const float *)cos, (const float *)sin, stage(c, position, (size_t)N), {H, G, E, eps, (float)plus_one}};
    float *scale = (float *)work(c, WORK_ROWS, (size_t)N * (size_t)(H + G) * sizeof(float));
    LAUNCH(c, rope_qkv_backward_kernel<T>, (unsigned)N, row_threads((H + 2 * G) * WARP), 0, (T *)dqkv, scale, b);
    if (dq_norm && dq_norm->data) {
        sum_columns(c, (float *)dq_norm->data, HeadNormTerm<T>{b, scale, 0, H}, N * H, E);
    }
    if (dk_norm && dk_norm->data) {
        sum_columns(c, (float *)dk_norm->data, HeadNormTerm<T>{b, scale, H, G}, N * G, E);
    }
}
