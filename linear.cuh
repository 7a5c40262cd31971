/* linear.cuh - stacks of matrices and their adapters for the CUDA engine, forward and back, and sums over rows: a part of kernels.cu, which
 * includes it behind weights.cuh, gemm.cuh and quantised.cuh.
 */

template <typename T> static void cuda_linear(Engine *e, Act *out, const Act *x, const Linear *w, int N) {
    RANGE();
    Cuda *c = cuda_of(e);
    const T *b = biases_of<T>(c, w);
    size_t I = (size_t)w->in, O = (size_t)w->out;
    DType to = dtype_of(c, out, DTYPE<T>);
    if (w->format == WEIGHTS_AS_STORED) {
        const T *W = matrices_of<T>(c, w), *in = as_act<T>(c, WORK_A, x, (size_t)N * I);
        gemm_and_bias<T>(c, Gemm{N, w->out, w->in, false, true, in, W, I, I, out, O, DTYPE<T>, to, 1, 0, NULL}, b);
    } else {
        Quantised q = quantised_copy<T>(c, w);
        const T *in = as_act<T>(c, WORK_A, x, (size_t)N * I);
        if (N <= FEW_ROWS) {
            few_rows<T>(c, out, to, in, q, b, w, N);
        } else {
            many_rows<T>(c, out, to, in, q, b, w, N);
        }
    }
}

template <typename T> static void cuda_linear_backward(Engine *e, Act *dx, const Act *dy, const Linear *w, int N, bool add) {
    RANGE();
    Cuda *c = cuda_of(e);
    size_t I = (size_t)w->in, O = (size_t)w->out;
    const T *W = matrices_of<T>(c, w), *d = as_act<T>(c, WORK_A, dy, (size_t)N * O);
    gemm(c, Gemm{N, w->in, w->out, false, false, d, W, O, I, dx, I, DTYPE<T>, dtype_of(c, dx, DTYPE<T>), 1, add ? 1.0f : 0.0f, NULL});
}

/* ---- sums over rows: term(row, column) summed over all rows and added to sum[column], in chunks of rows, chunk after chunk */

/* partial[chunk, column]. Grid: (128 columns, chunk). Bound: memory, what term reads. */
template <typename Term> __global__ void column_partials_kernel(float *partial, Term term, int rows, int columns, int chunk) {
    int column = (int)(blockIdx.x * blockDim.x + threadIdx.x), from = (int)blockIdx.y * chunk;
    if (column < columns) {
        int to = from + chunk < rows ? from + chunk : rows;
        float sum = 0;
        for (int row = from; row < to; row++) {
            sum += term(row, column);
        }
        partial[(size_t)blockIdx.y * (size_t)columns + (size_t)column] = sum;
    }
}

/* sum[column] += the partials in order. Grid: 128 columns a block. */
static __global__ void column_totals_kernel(float *sum, const float *partial, int chunks, int columns) {
    int column = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (column < columns) {
        float total = 0;
        for (int i = 0; i < chunks; i++) {
            total += partial[(size_t)i * (size_t)columns + (size_t)column];
        }
        sum[column] += total;
    }
}

enum { MOST_CHUNKS = 256, LEAST_CHUNK = 64 };

template <typename Term> static void sum_columns(Cuda *c, float *sum, const Term &term, int rows, int columns) {
    int chunk = (rows + MOST_CHUNKS - 1) / MOST_CHUNKS > LEAST_CHUNK ? (rows + MOST_CHUNKS - 1) / MOST_CHUNKS : LEAST_CHUNK;
    int chunks = (rows + chunk - 1) / chunk;
    float *partial = (float *)work(c, WORK_PARTIAL, (size_t)chunks * (size_t)columns * sizeof(float));
    unsigned across = blocks_of((size_t)columns, 128);
    LAUNCH(c, column_partials_kernel<Term>, dim3(across, (unsigned)chunks), 128, 0, partial, term, rows, columns, chunk);
    LAUNCH(c, column_totals_kernel, across, 128, 0, sum, partial, chunks, columns);
}

template <typename T> struct BiasTerm {
    const T *dy;
    size_t ld;
    __device__ float operator()(int row, int column) const { return widen(dy[(size_t)row * ld + (size_t)column]); }
};

template <typename T> static void cuda_linear_weight_backward(Engine *e, const Linear *dw, const Act *dy, const Act *x, int N) {
    RANGE();
    Cuda *c = cuda_of(e);
    size_t column = 0, I = (size_t)dw->in, width = (size_t)dw->out;
    const T *d = NULL, *in = NULL;
    for (int m = 0; m < dw->n; m++) {
        int O = (int)dw->w[m].shape[0];
        if (!d && (dw->w[m].data || dw->b[m].data)) {
            d = as_act<T>(c, WORK_A, dy, (size_t)N * width);
            in = as_act<T>(c, WORK_B, x, (size_t)N * I);
        }
        if (dw->w[m].data) {
            gemm(c, Gemm{O, dw->in, N, true, false, d + column, in, width, I, (void *)dw->w[m].data, I, DTYPE<T>, DT_F32, 1, 1, NULL});
        }
        if (dw->b[m].data) { /* the library's epilogue BGRADB would overwrite what it is to be added to */
            sum_columns(c, (float *)dw->b[m].data, BiasTerm<T>{d + column, width}, N, O);
        }
        column += (size_t)O;
    }
}

template <typename T> static void cuda_lora_up(Engine *e, Act *y, const Act *t, const Linear *w, int N) {
    RANGE();
    Cuda *c = cuda_of(e);
    const Lora *l = w->lora;
    size_t column = 0, low = 0, R = (size_t)l->rank;
    for (int m = 0; m < w->n; m++) {
        int O = (int)w->w[m].shape[0];
        if (l->up[m].data) {
            const T *up = matrix_of<T>(c, &l->up[m], (size_t)O * R);
            gemm(c, Gemm{N, O, l->rank, false, true, (const T *)t + low, up, (size_t)l->down.out, R, (T *)y + column, (size_t)w->out,
                         DTYPE<T>, DTYPE<T>, l->scale, 1, NULL});
            low += R;
        }
        column += (size_t)O;
    }
}

template <typename T>
static void cuda_lora_up_backward(Engine *e, Act *dt, const Lora *dlora, const Act *dy, const Act *t, const Linear *w, int N) {
    RANGE();
    Cuda *c = cuda_of(e);
    const Lora *l = w->lora;
    size_t column = 0, low = 0, width = (size_t)l->down.out, R = (size_t)l->rank;
    for (int m = 0; m < w->n; m++) {
        int O = (int)w->w[m].shape[0];
        if (l->up[m].data) {
            const T *up = matrix_of<T>(c, &l->up[m], (size_t)O * R), *slice = (const T *)dy + column;
            gemm(c, Gemm{N, l->rank, O, false, false, slice, up, (size_t)w->out, R, (T *)dt + low, width, DTYPE<T>, DTYPE<T>, l->scale, 0, NULL});
            gemm(c, Gemm{O, l->rank, N, true, false, slice, (const T *)t + low, (size_t)w->out, width, (void *)dlora->up[m].data, R,
                         DTYPE<T>, DT_F32, l->scale, 1, NULL});
            low += R;
        }
        column += (size_t)O;
    }
}
