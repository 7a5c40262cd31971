/* rows.cuh - the CUDA engine's ops that take a row at a time, forward and back: embedding, norms, gates, sums, rows from here to there. A
 * part of kernels.cu, which includes it behind linear.cuh.
 */

/* ------------------------------------------------------------------------------------------------ row by row ops */

/* Grid: a block a token; threads walk the row. Bound: memory, 2 sizeof(T) bytes a number. */
template <typename T, int W> __global__ void embed_kernel(T *out, const T *table, const int *token, int D, float scale) {
    const T *in = table + (size_t)token[blockIdx.x] * (size_t)D;
    T *row = out + (size_t)blockIdx.x * (size_t)D;
    for (int i = (int)threadIdx.x * W; i < D; i += (int)blockDim.x * W) {
        Pack<T, W> p = load<W>(in + i);
        for (int j = 0; j < W; j++) {
            p.x[j] = narrow<T>(widen(p.x[j]) * scale);
        }
        store<W>(row + i, p);
    }
}

/* Whether rows of D numbers can be walked in packs. */
template <typename T> static bool wide(int D) { return D % WIDE<T> == 0; }

/* LAUNCH of a kernel over rows of D numbers, by packs where the width allows. */
#define LAUNCH_ROWS(c, kernel, rows, D, ...)                                                                                     \
    do {                                                                                                                         \
        if (wide<T>(D)) {                                                                                                        \
            LAUNCH(c, (kernel<T, WIDE<T>>), (unsigned)(rows), row_threads((D) / WIDE<T>), 0, __VA_ARGS__);                        \
        } else {                                                                                                                 \
            LAUNCH(c, (kernel<T, 1>), (unsigned)(rows), row_threads(D), 0, __VA_ARGS__);                                          \
        }                                                                                                                        \
    } while (0)

template <typename T> static void cuda_embed(Engine *e, Act *out, const Tensor *table, const int *token, int N, int D, float scale) {
    RANGE();
    Cuda *c = cuda_of(e);
    const T *rows = matrix_of<T>(c, table, (size_t)table->shape[0] * (size_t)D);
    float rounded = sizeof(T) == 4 ? scale : bf16_to_f32(f32_to_bf16(scale)); /* as HF does */
    LAUNCH_ROWS(c, embed_kernel, N, D, (T *)out, rows, stage(c, token, (size_t)N), D, rounded);
}

/* Grid: a block a row; twice over the row, the second time from the cache. Bound: memory, 2 sizeof(T) bytes a number. */
template <typename T, int W>
__global__ void rmsnorm_kernel(T *out, const T *x, const float *w, int D, float eps, float plus) {
    const T *in = x + (size_t)blockIdx.x * (size_t)D;
    T *row = out + (size_t)blockIdx.x * (size_t)D;
    float squares = 0;
    for (int i = (int)threadIdx.x * W; i < D; i += (int)blockDim.x * W) {
        Pack<T, W> p = load<W>(in + i);
        for (int j = 0; j < W; j++) {
            squares += widen(p.x[j]) * widen(p.x[j]);
        }
    }
    float inverse = 1.0f / sqrtf(block_sum(squares) / (float)D + eps);
    for (int i = (int)threadIdx.x * W; i < D; i += (int)blockDim.x * W) {
        Pack<T, W> p = load<W>(in + i);
        for (int j = 0; j < W; j++) {
            p.x[j] = narrow<T>(widen(p.x[j]) * inverse * (w[i + j] + plus));
        }
        store<W>(row + i, p);
    }
}

template <typename T>
static void cuda_rmsnorm(Engine *e, Act *out, const Act *x, const Tensor *w, int N, int D, float eps, int plus_one) {
    RANGE();
    Cuda *c = cuda_of(e);
    LAUNCH_ROWS(c, rmsnorm_kernel, N, D, (T *)out, (const T *)x, vector_of(c, w, D), D, eps, (float)plus_one);
}

/* dx (+)= r (w dy - x r^2 mean(w dy x)), and r of every row for the sum that gives dw. Grid: a block a row. dx may be dy: a thread
 * reads all it needs of a number before it writes it, and the mean comes first. Bound: memory, 3 to 4 sizeof(T) bytes a number. */
template <typename T, int W>
__global__ void rmsnorm_backward_kernel(T *dx, const T *dy, const T *x, const float *w, int D, float eps, float plus, bool add) {
    size_t at = (size_t)blockIdx.x * (size_t)D;
    float squares = 0, dot = 0;
    for (int i = (int)threadIdx.x * W; i < D; i += (int)blockDim.x * W) {
        Pack<T, W> p = load<W>(x + at + i), d = load<W>(dy + at + i);
        for (int j = 0; j < W; j++) {
            squares += widen(p.x[j]) * widen(p.x[j]);
            dot += widen(p.x[j]) * widen(d.x[j]) * (w[i + j] + plus);
        }
    }
    squares = block_sum(squares);
    dot = block_sum(dot);
    float r = 1.0f / sqrtf(squares / (float)D + eps), pull = dot * r * r / (float)D;
    for (int i = (int)threadIdx.x * W; i < D; i += (int)blockDim.x * W) {
        Pack<T, W> p = load<W>(x + at + i), d = load<W>(dy + at + i), old = d;
        if (add) {
            old = load<W>(dx + at + i);
        }
        for (int j = 0; j < W; j++) {
            float g = r * ((w[i + j] + plus) * widen(d.x[j]) - pull * widen(p.x[j]));
            d.x[j] = narrow<T>(add ? widen(old.x[j]) + g : g);
        }
        store<W>(dx + at + i, d);
    }
}

/* r[n] = 1 / sqrt(mean x[n,:]^2 + eps). Grid: a block a row. Bound: memory, sizeof(T) bytes a number. */
template <typename T, int W> __global__ void row_scales_kernel(float *r, const T *x, int D, float eps) {
    const T *in = x + (size_t)blockIdx.x * (size_t)D;
    float squares = 0;
    for (int i = (int)threadIdx.x * W; i < D; i += (int)blockDim.x * W) {
        Pack<T, W> p = load<W>(in + i);
        for (int j = 0; j < W; j++) {
            squares += widen(p.x[j]) * widen(p.x[j]);
        }
    }
    squares = block_sum(squares);
    if (threadIdx.x == 0) {
        r[blockIdx.x] = 1.0f / sqrtf(squares / (float)D + eps);
    }
}

template <typename T> struct NormTerm {
    const T *dy, *x;
    const float *r;
    size_t D;
    __device__ float operator()(int row, int column) const {
        size_t at = (size_t)row * D + (size_t)column;
        return widen(dy[at]) * widen(x[at]) * r[row];
    }
};

template <typename T>
static void cuda_rmsnorm_backward(Engine *e, Act *dx, const Tensor *dw, const Act *dy, const Act *x, const Tensor *w, int N, int D,
                                  float eps, int plus_one, bool add) {
    RANGE();
    Cuda *c = cuda_of(e);
    if (dw && dw->data) { /* before dx is written, as dx may be dy */
        float *r = (float *)work(c, WORK_ROWS, (size_t)N * sizeof(float));
        LAUNCH_ROWS(c, row_scales_kernel, N, D, r, (const T *)x, D, eps);
        sum_columns(c, (float *)dw->data, NormTerm<T>{(const T *)dy, (const T *)x, r, (size_t)D}, N, D);
    }
    LAUNCH_ROWS(c, rmsnorm_backward_kernel, N, D, (T *)dx, (const T *)dy, (const T *)x, vector_of(c, w, D), D, eps, (float)plus_one, add);
}

/* act(g) = g s(y), s the logistic function and y = g (silu) or 2 sqrt(2/pi) (g + 0.044715 g^3) (gelu_tanh). */
__device__ static inline float gate_slope(float g, bool gelu) { return gelu ? 1.5957691216f * (g + 0.044715f * g * g * g) : g; }

/* Grid: a block a row. Bound: memory, 3 sizeof(T) bytes an output. */
template <typename T, int W> __global__ void gated_kernel(T *out, const T *gate_up, int F, bool gelu) {
    const T *gate = gate_up + (size_t)blockIdx.x * 2 * (size_t)F, *up = gate + F;
    T *row = out + (size_t)blockIdx.x * (size_t)F;
    for (int i = (int)threadIdx.x * W; i < F; i += (int)blockDim.x * W) {
        Pack<T, W> g = load<W>(gate + i), u = load<W>(up + i);
        for (int j = 0; j < W; j++) {
            float x = widen(g.x[j]);
            g.x[j] = narrow<T>(x / (1.0f + expf(-gate_slope(x, gelu))) * widen(u.x[j]));
        }
        store<W>(row + i, g);
    }
}

template <typename T> static void cuda_gated(Engine *e, Act *out, const Act *gate_up, int N, int F, bool gelu) {
    RANGE();
    LAUNCH_ROWS(cuda_of(e), gated_kernel, N, F, (T *)out, (const T *)gate_up, F, gelu);
}

/* act'(g) = s + g y' s (1 - s). Grid: a block a row. Bound: memory, 5 sizeof(T) bytes a number of dout. */
template <typename T, int W> __global__ void gated_backward_kernel(T *dgate_up, const T *dout, const T *gate_up, int F, bool gelu) {
    const T *gate = gate_up + (size_t)blockIdx.x * 2 * (size_t)F, *up = gate + F, *dy = dout + (size_t)blockIdx.x * (size_t)F;
    T *dgate = dgate_up + (size_t)blockIdx.x * 2 * (size_t)F, *dup = dgate + F;
    for (int i = (int)threadIdx.x * W; i < F; i += (int)blockDim.x * W) {
        Pack<T, W> g = load<W>(gate + i), u = load<W>(up + i), d = load<W>(dy + i), dg, du;
        for (int j = 0; j < W; j++) {
            float x = widen(g.x[j]), slope = gelu ? 1.5957691216f * (1.0f + 0.134145f * x * x) : 1.0f, dx = widen(d.x[j]);
            float s = 1.0f / (1.0f + expf(-gate_slope(x, gelu)));
            dg.x[j] = narrow<T>(dx * widen(u.x[j]) * (s + x * slope * s * (1.0f - s)));
            du.x[j] = narrow<T>(dx * x * s);
        }
        store<W>(dgate + i, dg);
        store<W>(dup + i, du);
    }
}

template <typename T> static void cuda_gated_backward(Engine *e, Act *dgate_up, const Act *dout, const Act *gate_up, int N, int F, bool gelu) {
    RANGE();
    LAUNCH_ROWS(cuda_of(e), gated_backward_kernel, N, F, (T *)dgate_up, (const T *)dout, (const T *)gate_up, F, gelu);
}

/* Grid: a pack a thread, 256 threads a block; the last block takes what is left one by one. Bound: memory, 3 sizeof(T) bytes. */
template <typename T> __global__ void add_kernel(T *out, const T *x, const T *y, size_t count) {
    constexpr int W = WIDE<T>;
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * W;
    if (i + W <= count) {
        Pack<T, W> a = load<W>(x + i), b = load<W>(y + i);
        for (int j = 0; j < W; j++) {
            a.x[j] = narrow<T>(widen(a.x[j]) + widen(b.x[j]));
        }
        store<W>(out + i, a);
    } else {
        for (; i < count; i++) {
            out[i] = narrow<T>(widen(x[i]) + widen(y[i]));
        }
    }
}

template <typename T> static void cuda_add(Engine *e, Act *out, const Act *x, const Act *y, size_t count) {
    RANGE();
    if (count) {
        LAUNCH(cuda_of(e), add_kernel<T>, blocks_of(count, 256 * WIDE<T>), 256, 0, (T *)out, (const T *)x, (const T *)y, count);
    }
}

/* sum = x + y rounded to T, and its norm: the numbers that add and rmsnorm give. Grid: a block a row; a thread reads again what it has
 * written itself. Bound: memory, 4 sizeof(T) bytes a number. */
template <typename T, int W>
__global__ void add_rmsnorm_kernel(T *sum, T *out, const T *x, const T *y, const float *w, int D, float eps, float plus) {
    size_t at = (size_t)blockIdx.x * (size_t)D;
    float squares = 0;
    for (int i = (int)threadIdx.x * W; i < D; i += (int)blockDim.x * W) {
        Pack<T, W> a = load<W>(x + at + i), b = load<W>(y + at + i);
        for (int j = 0; j < W; j++) {
            a.x[j] = narrow<T>(widen(a.x[j]) + widen(b.x[j]));
            squares += widen(a.x[j]) * widen(a.x[j]);
        }
        store<W>(sum + at + i, a);
    }
    float inverse = 1.0f / sqrtf(block_sum(squares) / (float)D + eps);
    for (int i = (int)threadIdx.x * W; i < D; i += (int)blockDim.x * W) {
        Pack<T, W> p = load<W>(sum + at + i);
        for (int j = 0; j < W; j++) {
            p.x[j] = narrow<T>(widen(p.x[j]) * inverse * (w[i + j] + plus));
        }
        store<W>(out + at + i, p);
    }
}

template <typename T>
static void cuda_add_rmsnorm(Engine *e, Act *sum, Act *out, const Act *x, const Act *y, const Tensor *w, int N, int D, float eps,
                             int plus_one) {
    RANGE();
    Cuda *c = cuda_of(e);
    LAUNCH_ROWS(c, add_rmsnorm_kernel, N, D, (T *)sum, (T *)out, (const T *)x, (const T *)y, vector_of(c, w, D), D, eps, (float)plus_one);
}

/* out[to[i],:] = x[from[i],:]; NULL: i itself. Grid: a block a row. Bound: memory, 2 sizeof(T) bytes a number. */
template <typename T, int W> __global__ void move_rows_kernel(T *out, const T *x, const int *to, const int *from, int D) {
    size_t i = blockIdx.x, into = to ? (size_t)to[i] : i, source = from ? (size_t)from[i] : i;
    for (int d = (int)threadIdx.x * W; d < D; d += (int)blockDim.x * W) {
        store<W>(out + into * (size_t)D + d, load<W>(x + source * (size_t)D + d));
    }
}

template <typename T> static void cuda_gather(Engine *e, Act *out, const Act *x, const int *row, int n, int D) {
    RANGE();
    Cuda *c = cuda_of(e);
    if (n) {
        LAUNCH_ROWS(c, move_rows_kernel, n, D, (T *)out, (const T *)x, (const int *)NULL, stage(c, row, (size_t)n), D);
    }
}

template <typename T> static void cuda_scatter(Engine *e, Act *out, const Act *x, const int *row, int n, int D) {
    RANGE();
    Cuda *c = cuda_of(e);
    if (n) {
        LAUNCH_ROWS(c, move_rows_kernel, n, D, (T *)out, (const T *)x, stage(c, row, (size_t)n), (const int *)NULL, D);
    }
}

/* dtable[id[t],:] += scale * the rows row[first[t]] .. row[first[t+1]-1] of dx, in order. Grid: a block a token that occurs.
 * Bound: memory, sizeof(T) bytes a number of dx and 8 a number of the table that is touched. */
template <typename T>
__global__ void embed_backward_kernel(float *dtable, const T *dx, const int *id, const int *first, const int *row, int D, float scale) {
    float *out = dtable + (size_t)id[blockIdx.x] * (size_t)D;
    for (int d = (int)threadIdx.x; d < D; d += (int)blockDim.x) {
        float sum = 0;
        for (int i = first[blockIdx.x]; i < first[blockIdx.x + 1]; i++) {
            sum += scale * widen(dx[(size_t)row[i] * (size_t)D + (size_t)d]);
        }
        out[d] += sum;
    }
}

template <typename T>
static void cuda_embed_backward(Engine *e, const Tensor *dtable, const Act *dx, const int *token, int N, int D, float scale) {
    RANGE();
    Cuda *c = cuda_of(e);
    std::map<int, std::vector<int>> rows_of; /* of each token that occurs, in order */
    for (int n = 0; n < N; n++) {
        if (token[n] >= 0) {
            rows_of[token[n]].push_back(n);
        }
    }
    std::vector<int> id, first(1, 0), row;
    for (auto &entry : rows_of) {
        id.push_back(entry.first);
        row.insert(row.end(), entry.second.begin(), entry.second.end());
        first.push_back((int)row.size());
    }
    if (!id.empty()) {
        LAUNCH(c, embed_backward_kernel<T>, (unsigned)id.size(), row_threads(D), 0, (float *)dtable->data, (const T *)dx,
               stage(c, id), stage(c, first), stage(c, row), D, scale);
    }
}
