/* sampling.cuh - drawing tokens for the CUDA engine: a part of kernels.cu, which includes it behind losses.cuh.
 */

/* ------------------------------------------------------------------------------------------------ sampling
 * The draw of nla.h's `sample`: the same numbers as on the CPU, so the same token unless two are all but tied. What a sort would give
 * (the border of top-k, of top-p) is found bit by bit: 31 or 32 sums over the row, which stays in the cache. */

namespace {
struct Best {
    float value;
    int id;
};
} // namespace

__device__ static inline Best better(const Best &a, const Best &b) {
    return b.value > a.value || (b.value == a.value && b.id < a.id) ? b : a;
}

/* The block's largest value, the lowest id of equals; for all threads. */
__device__ static inline Best block_best(Best x) {
    SHARED(Best, partial, WARP);
    for (int i = WARP / 2; i > 0; i /= 2) {
        Best other = {__shfl_xor_sync(ALL_LANES, x.value, i), __shfl_xor_sync(ALL_LANES, x.id, i)};
        x = better(x, other);
    }
    if (threadIdx.x % WARP == 0) {
        partial[threadIdx.x / WARP] = x;
    }
    __syncthreads();
    Best best = partial[0];
    for (int i = 1; i < (int)blockDim.x / WARP; i++) {
        best = better(best, partial[i]);
    }
    __syncthreads();
    return best;
}

/* Bits that are ordered as the numbers are; -0 and 0 are one. */
__device__ static inline uint32_t ordered(float x) {
    uint32_t u = bits_of(x + 0.0f);
    return u & 0x80000000u ? ~u : u | 0x80000000u;
}

/* What of a row can be drawn: weights above a border, and of those on it the ones up to an id. */
namespace {
struct Draw {
    const float *logits;
    int V;
    float best, inverse;
    uint32_t least;  /* of ordered(logit): top-k */
    uint32_t border; /* of the weight's bits: top-p */
    int last;        /* ids of weights on the border are below it */
};
} // namespace

/* As cpu.c's vec_exp: nothing below the smallest normal number. */
__device__ static inline float weight_at(const Draw &d, int i) {
    float x = (d.logits[i] - d.best) * d.inverse;
    return ordered(d.logits[i]) < d.least || x < -87.3f ? 0.0f : expf(x);
}

/* How many logits are at least `border` (as ordered bits). */
__device__ static inline int count_from(const Draw &d, uint32_t border) {
    int n = 0;
    for (int i = (int)threadIdx.x; i < d.V; i += (int)blockDim.x) {
        n += ordered(d.logits[i]) >= border;
    }
    return block_sum(n);
}

/* The sum of all weights whose bits are above `border`. */
__device__ static inline double mass_above(const Draw &d, uint32_t border) {
    double sum = 0;
    for (int i = (int)threadIdx.x; i < d.V; i += (int)blockDim.x) {
        float w = weight_at(d, i);
        sum += bits_of(w) > border ? (double)w : 0.0;
    }
    return block_sum(sum);
}

/* How many weights with id below `last` are on the border. */
__device__ static inline int count_ties(const Draw &d, int last) {
    int n = 0;
    for (int i = (int)threadIdx.x; i < last && i < d.V; i += (int)blockDim.x) {
        n += bits_of(weight_at(d, i)) == d.border;
    }
    return block_sum(n);
}

/* The largest border that top_k logits reach. */
__device__ static inline void cut_top_k(Draw *d, int top_k) {
    uint32_t border = 0;
    for (uint32_t bit = 0x80000000u; bit; bit >>= 1) {
        border |= count_from(*d, border | bit) >= top_k ? bit : 0;
    }
    d->least = border;
}

/* Weights in falling order, equals by id, stay while what stands before them is less than top_p of all: those above the least
 * border with less than that above it, and on it the first few. */
__device__ static inline void cut_top_p(Draw *d, float top_p) {
    double all = mass_above(*d, 0), limit = (double)top_p * all > 1e-300 ? (double)top_p * all : 1e-300;
    uint32_t below = 0; /* the largest border with too much above it */
    if (all < limit) {
        return;
    }
    for (uint32_t bit = 0x40000000u; bit; bit >>= 1) {
        below |= mass_above(*d, below | bit) >= limit ? bit : 0;
    }
    d->border = below + 1;
    double ties = ceil((limit - mass_above(*d, d->border)) / (double)__uint_as_float(d->border));
    int last = 0;
    for (int bit = 0x40000000; bit; bit >>= 1) { /* the largest number of ids that holds fewer than `ties` of them */
        last |= (last | bit) <= d->V && (double)count_ties(*d, last | bit) < ties ? bit : 0;
    }
    d->last = last + 1;
}

__device__ static inline uint32_t mix(uint32_t h) {
    h = (h ^ (h >> 16)) * 0x7feb352du;
    h = (h ^ (h >> 15)) * 0x846ca68bu;
    return h ^ (h >> 16);
}

/* A standard exponential number -ln(1 - u) keyed by (key, token), as cpu.c makes it. */
__device__ static inline float exponential(uint64_t key, int token) {
    uint32_t h = mix(mix((uint32_t)token + (uint32_t)key) + (uint32_t)(key >> 32));
    float u = (float)h * 0x1p-32f + 0x1p-33f;
    return u < 0.015625f ? u * (1.0f + u * (0.5f + u * (0.33333333f + u * 0.25f))) : -logf(fmaxf(1.0f - u, 0x1p-24f));
}

/* Grid: a block a row. Bound: the cache, 12 bytes a logit, and 4 more a bit of each border. */
static __global__ void sample_kernel(int *token, float *logprob, const float *logits, int V, float temperature, int top_k, float top_p,
                                     const uint64_t *key) {
    Draw d = {logits + (size_t)blockIdx.x * (size_t)V, V, 0, temperature > 0 ? 1.0f / temperature : 1.0f, 0, 0, V};
    Best best = {-INFINITY, V};
    for (int i = (int)threadIdx.x; i < V; i += (int)blockDim.x) {
        best = better(best, Best{d.logits[i], i});
    }
    best = block_best(best);
    d.best = best.value;
    double total = mass_above(d, 0);
    int drawn = best.id < V ? best.id : 0; /* V: all logits are NaN */
    if (temperature > 0) {
        if (top_k > 0 && top_k < V) {
            cut_top_k(&d, top_k);
        }
        if (top_p < 1) {
            cut_top_p(&d, top_p);
        }
        Best winner = {-1, V};
        for (int i = (int)threadIdx.x; i < V; i += (int)blockDim.x) {
            float w = weight_at(d, i);
            bool in = bits_of(w) > d.border || (bits_of(w) == d.border && i < d.last);
            winner = better(winner, Best{in ? w / exponential(key[blockIdx.x], i) : 0.0f, i});
        }
        winner = block_best(winner);
        drawn = winner.id < V ? winner.id : drawn;
    }
    if (threadIdx.x == 0) {
        token[blockIdx.x] = drawn;
        logprob[blockIdx.x] = (d.logits[drawn] - d.best) * d.inverse - (float)log(total);
    }
}

static void cuda_sample(Engine *e, int *token, float *logprob, const Act *logits, int n, int V, float temperature, int top_k, float top_p,
                        const uint64_t *key) {
    RANGE();
    Cuda *c = cuda_of(e);
    struct Drawn { /* both answers in one copy */
        int token[LOGIT_ROWS];
        float logprob[LOGIT_ROWS];
    } drawn;
    std::vector<uint64_t> none(LOGIT_ROWS, 0);
    for (int at = 0; at < n; at += LOGIT_ROWS) {
        int rows = n - at < LOGIT_ROWS ? n - at : LOGIT_ROWS;
        Drawn *result = (Drawn *)work(c, WORK_RESULT, sizeof(Drawn));
        LAUNCH(c, sample_kernel, (unsigned)rows, vocabulary_threads(V), 0, result->token, result->logprob,
               (const float *)logits + (size_t)at * (size_t)V, V, temperature, top_k, top_p,
               stage(c, key ? key + at : none.data(), (size_t)rows));
        copy_out(c, &drawn, result, sizeof drawn);
        for (int i = 0; i < rows; i++) {
            token[at + i] = c->failed[0] ? 0 : drawn.token[i];
            if (logprob) {
                logprob[at + i] = drawn.logprob[i];
            }
        }
    }
}
