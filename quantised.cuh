/* quantised.cuh - products with weights of one byte (--weights, quantise.h) for the CUDA engine: a part of kernels.cu, which includes it.
 *
 * Few rows (decoding) are bound by reading the weights: a kernel of our own reads codes, half of bf16's bytes. For many rows a band of
 * the matrix is written out as T and cuBLASLt multiplies it.
 */

namespace {
struct Quantised {
    uint8_t *code; /* [out, in] */
    float *scale;  /* [out] */
};

enum { FEW_ROWS = 64, FEW_OUTPUTS = 64, FEW_K = 128, FEW_THREADS = 128, FEW_BLOCKS = 512 };
} // namespace

/* Codes and scale of each row. Grid: a block a row, twice over it. Bound: memory, 2 sizeof(T) + 1 bytes a weight; once a weight. */
template <typename T> __global__ void quantise_kernel(uint8_t *code, float *scale, const T *w, int I, WeightFormat format) {
    size_t at = (size_t)blockIdx.x * (size_t)I;
    float most = 0;
    for (int i = (int)threadIdx.x; i < I; i += (int)blockDim.x) {
        most = fmaxf(most, fabsf(widen(w[at + (size_t)i])));
    }
    most = block_max(most);
    float by = to_codes(most, format);
    for (int i = (int)threadIdx.x; i < I; i += (int)blockDim.x) {
        code[at + (size_t)i] = code_of(widen(w[at + (size_t)i]) * by, format);
    }
    if (threadIdx.x == 0) {
        scale[blockIdx.x] = from_codes(most, format);
    }
}

/* One matrix [O, I] of a stack, a band of rows at a time, from where the host or the engine has it. */
template <typename T> static void quantise(Cuda *c, const Quantised &to, const Tensor *t, size_t I, WeightFormat format) {
    size_t rows = (size_t)t->shape[0], band = UPLOAD / (I * sizeof(T)) ? UPLOAD / (I * sizeof(T)) : 1;
    for (size_t at = 0; at < rows && !c->failed[0]; at += band) {
        size_t n = rows - at < band ? rows - at : band;
        Tensor part = *t;
        part.data = (const char *)t->data + at * I * dtype_size(t->dtype);
        T *stored = (T *)work(c, WORK_B, n * I * sizeof(T));
        fill_copy<T>(c, stored, &part, n * I);
        LAUNCH(c, quantise_kernel<T>, (unsigned)n, row_threads((int)I), 0, to.code + at * I, to.scale + at, stored, (int)I, format);
    }
}

/* The stack's codes and scales, made at first use. */
template <typename T> static Quantised quantised_copy(Cuda *c, const Linear *w) {
    size_t I = (size_t)w->in, O = (size_t)w->out, codes = (O * I + 15) / 16 * 16;
    Copy *copy = find_copy(c, w->w, w->n, O * I, codes + O * sizeof(float), w->format);
    Quantised all = {NULL, NULL};
    if (!copy) {
        return all;
    }
    all.code = (uint8_t *)copy->data;
    all.scale = (float *)(all.code + codes);
    if (copy->stale) {
        Quantised part = all;
        for (int m = 0; m < w->n; m++) {
            quantise<T>(c, part, &w->w[m], I, w->format);
            part.code += (size_t)w->w[m].shape[0] * I;
            part.scale += w->w[m].shape[0];
        }
        copy->stale = false;
    }
    return all;
}

/* out[i] = code[i] scale[row of i]. Grid: a block a row. Bound: memory, 1 + sizeof(T) bytes a weight. */
template <typename T> __global__ void dequantise_kernel(T *out, const uint8_t *code, const float *scale, int I, WeightFormat format) {
    size_t at = (size_t)blockIdx.x * (size_t)I;
    for (int i = (int)threadIdx.x; i < I; i += (int)blockDim.x) {
        out[at + (size_t)i] = narrow<T>(number_of(code[at + (size_t)i], format) * scale[blockIdx.x]);
    }
}

/* y = x W^T + bias for any number of rows, a band of outputs at a time. */
template <typename T>
static void many_rows(Cuda *c, Act *out, DType to, const T *x, const Quantised &q, const T *bias, const Linear *w, int N) {
    size_t I = (size_t)w->in, O = (size_t)w->out, band = UPLOAD / (I * sizeof(T)) / 64 * 64;
    band = band > 0 ? band : 64;
    for (size_t o = 0; o < O; o += band) {
        size_t n = O - o < band ? O - o : band;
        T *matrix = (T *)work(c, WORK_B, n * I * sizeof(T));
        LAUNCH(c, dequantise_kernel<T>, (unsigned)n, row_threads(w->in), 0, matrix, q.code + o * I, q.scale + o, w->in, w->format);
        Gemm g = {N, (int)n, w->in, false, true, x, matrix, I, I, (char *)out + o * dtype_size(to), O, DTYPE<T>, to, 1, 0, NULL};
        gemm_and_bias<T>(c, g, bias ? bias + o : NULL);
    }
}

/* A tile of codes as numbers: n rows of kc of them, rows I apart, zeros to the whole tile. */
template <typename T, int W>
__device__ static inline void load_codes(T *tile, const uint8_t *code, int n, int I, int kc, WeightFormat format) {
    constexpr int S = W < WIDE<T> ? W : WIDE<T>;
    for (int at = (int)threadIdx.x; at < FEW_OUTPUTS * (FEW_K / W); at += (int)blockDim.x) {
        int row = at / (FEW_K / W), x = at % (FEW_K / W) * W;
        Pack<uint8_t, W> p = {};
        if (row < n && x < kc) {
            p = load<W>(code + (size_t)row * (size_t)I + x);
        }
        for (int j = 0; j < W; j += S) {
            Pack<T, S> numbers;
            for (int i = 0; i < S; i++) {
                numbers.x[i] = narrow<T>(number_of(p.x[j + i], format));
            }
            store<S>(tile + row * padded(FEW_K) + x + j, numbers);
        }
    }
}

/* Bytes of shared memory of few_rows_kernel: R rows of x, a tile of weights, the sums. */
template <typename T> static size_t few_rows_bytes(int R) {
    return (size_t)R * padded(FEW_OUTPUTS) * sizeof(float) + (size_t)(R + FEW_OUTPUTS) * padded(FEW_K) * sizeof(T);
}

/* partial[chunk, n, o] = the sum over a chunk of the columns of x[n,:] code[o,:]. R: N rounded up to 16. Grid: (FEW_OUTPUTS outputs, chunk).
 * Bound: memory, a byte a weight; x and the partial sums stay in the cache. */
template <typename T>
__global__ void few_rows_kernel(float *partial, const T *x, const uint8_t *code, int N, int R, int I, int O, int chunk, WeightFormat format) {
    SHARED_DYNAMIC(memory);
    int ld = padded(FEW_K), lds = padded(FEW_OUTPUTS);
    int first = (int)blockIdx.x * FEW_OUTPUTS, n = O - first < FEW_OUTPUTS ? O - first : FEW_OUTPUTS;
    int from = (int)blockIdx.y * chunk, to = from + chunk < I ? from + chunk : I;
    float *sum = (float *)memory;
    T *rows = (T *)(sum + R * lds), *weights = rows + R * ld;
    for (int k = from; k < to; k += FEW_K) {
        int kc = to - k < FEW_K ? to - k : FEW_K;
        auto row = [&](int i) { return x + (size_t)i * (size_t)I + k; };
        if (I % 16 == 0) { /* every row starts where 16 bytes can be read at once */
            load_codes<T, 16>(weights, code + (size_t)first * (size_t)I + k, n, I, kc, format);
            load_packs<T, WIDE<T>>(rows, R, N, kc, FEW_K, row);
        } else {
            load_codes<T, 1>(weights, code + (size_t)first * (size_t)I + k, n, I, kc, format);
            load_packs<T, 1>(rows, R, N, kc, FEW_K, row);
        }
        __syncthreads();
        tile_product<false, true>(sum, rows, weights, TileShape{R, FEW_OUTPUTS, FEW_K, ld, ld, lds}, k > from);
        __syncthreads(); /* before the next tile is loaded, and before the sums are read */
    }
    for (int at = (int)threadIdx.x; at < N * n; at += (int)blockDim.x) {
        int i = at / n, o = at % n;
        partial[((size_t)blockIdx.y * (size_t)N + (size_t)i) * (size_t)O + (size_t)(first + o)] = sum[i * lds + o];
    }
}

/* y[n,o] = scale[o] * the chunks' sums in order, + bias. Grid: (256 outputs, row). Bound: memory, 4 bytes a chunk and output. */
template <typename Y, typename T>
__global__ void few_rows_total_kernel(Y *y, const float *partial, const float *scale, const T *bias, int O, int chunks) {
    int o = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    size_t at = (size_t)blockIdx.y * (size_t)O + (size_t)o;
    if (o < O) {
        float sum = 0;
        for (int i = 0; i < chunks; i++) {
            sum += partial[(size_t)i * (size_t)gridDim.y * (size_t)O + at];
        }
        y[at] = narrow<Y>(sum * scale[o] + (bias ? widen(bias[o]) : 0.0f));
    }
}

template <typename T>
static void few_rows(Cuda *c, Act *out, DType to, const T *x, const Quantised &q, const T *bias, const Linear *w, int N) {
    int I = w->in, O = w->out, R = (N + 15) / 16 * 16;
    unsigned across = blocks_of((size_t)O, FEW_OUTPUTS), wanted = blocks_of(FEW_BLOCKS, across); /* chunks that would keep a GPU busy */
    int chunk = (int)blocks_of(blocks_of((size_t)I, wanted), FEW_K) * FEW_K;
    chunk = chunk > 2 * FEW_K ? chunk : 2 * FEW_K;
    int chunks = (I + chunk - 1) / chunk;
    float *partial = (float *)work(c, WORK_PARTIAL, (size_t)chunks * (size_t)N * (size_t)O * sizeof(float));
    LAUNCH(c, few_rows_kernel<T>, dim3(across, (unsigned)chunks), FEW_THREADS, few_rows_bytes<T>(R), partial, x, (const uint8_t *)q.code, N,
           R, I, O, chunk, w->format);
    dim3 grid(blocks_of((size_t)O, 256), (unsigned)N);
    if (to == DT_F32) {
        LAUNCH(c, (few_rows_total_kernel<float, T>), grid, 256, 0, (float *)out, (const float *)partial, (const float *)q.scale, bias, O, chunks);
    } else {
        LAUNCH(c, (few_rows_total_kernel<T, T>), grid, 256, 0, (T *)out, (const float *)partial, (const float *)q.scale, bias, O, chunks);
    }
}
