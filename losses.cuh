/* losses.cuh - losses and their gradients for the CUDA engine: a part of kernels.cu, which includes it.
 */

/* ------------------------------------------------------------------------------------------------ losses */

static unsigned vocabulary_threads(int V) {
    unsigned n = (unsigned)((V + WARP - 1) / WARP) * WARP;
    return n > 1024 ? 1024 : n;
}

/* logp[i] of target[i]. Grid: a block a row, twice over it. Bound: memory, 8 bytes a logit. */
static __global__ void token_logprob_kernel(float *logp, const float *logits, const int *target, int V) {
    const float *row = logits + (size_t)blockIdx.x * (size_t)V;
    float largest = -INFINITY, part = 0;
    for (int t = (int)threadIdx.x; t < V; t += (int)blockDim.x) {
        largest = fmaxf(largest, row[t]);
    }
    largest = block_max(largest);
    for (int t = (int)threadIdx.x; t < V; t += (int)blockDim.x) {
        part += expf(row[t] - largest);
    }
    double total = block_sum((double)part);
    if (threadIdx.x == 0) {
        logp[blockIdx.x] = (float)((double)(row[target[blockIdx.x]] - largest) - log(total));
    }
}

static void cuda_token_logprob(Engine *e, float *logp, const Act *logits, const int *target, int n, int V) {
    RANGE();
    Cuda *c = cuda_of(e);
    float *result = (float *)work(c, WORK_RESULT, (size_t)n * sizeof(float));
    LAUNCH(c, token_logprob_kernel, (unsigned)n, vocabulary_threads(V), 0, result, (const float *)logits, stage(c, target, (size_t)n), V);
    copy_out(c, logp, result, (size_t)n * sizeof(float));
}

/* logits = dlogp (onehot - softmax), in place. Grid: (1024 logits, row). Bound: memory, 8 bytes a logit. */
static __global__ void token_logprob_backward_kernel(float *logits, const float *logp, const float *dlogp, const int *target,
                                                     const float *at_target, int V) {
    float *row = logits + (size_t)blockIdx.y * (size_t)V, lse = at_target[blockIdx.y] - logp[blockIdx.y], d = dlogp[blockIdx.y];
    for (int t = (int)(blockIdx.x * 1024 + threadIdx.x); t < V && t < (int)(blockIdx.x + 1) * 1024; t += (int)blockDim.x) {
        row[t] = -d * expf(row[t] - lse) + (t == target[blockIdx.y] ? d : 0.0f);
    }
}

/* The targets' logits, before another block overwrites them. Grid: 128 rows a block. */
static __global__ void target_logits_kernel(float *out, const float *logits, const int *target, int n, int V) {
    int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < n) {
        out[i] = logits[(size_t)i * (size_t)V + (size_t)target[i]];
    }
}

static void cuda_token_logprob_backward(Engine *e, Act *logits, const float *logp, const float *dlogp, const int *target, int n, int V) {
    RANGE();
    Cuda *c = cuda_of(e);
    float *at_target = (float *)work(c, WORK_RESULT, (size_t)n * sizeof(float));
    const int *targets = stage(c, target, (size_t)n);
    LAUNCH(c, target_logits_kernel, blocks_of((size_t)n, 128), 128, 0, at_target, (const float *)logits, targets, n, V);
    LAUNCH(c, token_logprob_backward_kernel, dim3(blocks_of((size_t)V, 1024), (unsigned)n), 256, 0, (float *)logits,
           stage(c, logp, (size_t)n), stage(c, dlogp, (size_t)n), targets, at_target, V);
}

/* mse of each row of predictions x, and dx = weight * its gradient (NULL: not wanted). Sums are fp64, as on the CPU: what tells a good
 * prediction from a better one is what its cosine lacks to 1. Grid: a block a row, twice over it, the second time from the cache.
 * Bound: memory, 2 sizeof(T) + 4 bytes a number. */
template <typename T>
__global__ void mse_nrm_kernel(double *mse, T *dx, const T *x, const float *gold, int D, double scale, double weight) {
    size_t at = (size_t)blockIdx.x * (size_t)D;
    double squares = 0, gold_squares = 0, dot = 0;
    for (int i = (int)threadIdx.x; i < D; i += (int)blockDim.x) {
        double a = (double)widen(x[at + (size_t)i]), b = (double)gold[at + (size_t)i];
        squares += a * a;
        gold_squares += b * b;
        dot += a * b;
    }
    squares = block_sum(squares);
    gold_squares = block_sum(gold_squares);
    dot = block_sum(dot);
    double both = sqrt(squares) * sqrt(gold_squares), cos = both > 0 ? dot / both : 0, factor = 2 * scale * scale / (double)D;
    if (threadIdx.x == 0) {
        mse[blockIdx.x] = factor * (1 - cos);
    }
    double along = both > 0 ? -factor * weight / both : 0, against = both > 0 ? factor * weight * cos / squares : 0;
    for (int i = (int)threadIdx.x; dx && i < D; i += (int)blockDim.x) {
        dx[at + (size_t)i] = narrow<T>((float)(along * (double)gold[at + (size_t)i] + against * (double)widen(x[at + (size_t)i])));
    }
}

template <typename T>
static void cuda_mse_nrm(Engine *e, double *mse, Act *dx, const Act *x, const Act *gold, int n, int D, double scale, double weight) {
    RANGE();
    Cuda *c = cuda_of(e);
    double *result = (double *)work(c, WORK_RESULT, (size_t)n * sizeof(double));
    if (n) {
        LAUNCH(c, mse_nrm_kernel<T>, (unsigned)n, row_threads(D), 0, result, (T *)dx, (const T *)x, (const float *)gold, D, scale, weight);
        copy_out(c, mse, result, (size_t)n * sizeof(double));
    }
}
