/* attention.cuh - attention over a forest for the CUDA engine, forward and back: a part of kernels.cu, which includes it where its number
 * formats, sums, memory and launches are known.
 */

/* ------------------------------------------------------------------------------------------------ attention
 * Flash attention over a forest. Rows of a tile are (query, head) pairs of one run and one key/value head, pair p being query
 * p / group, head p % group; columns are keys of one segment. A block walks the ancestors' keys from the root down with a running
 * maximum and sum. Tiles start at each segment's own start, so a row's additions depend only on its own chain of segments. */

namespace {

struct Item {
    int run, pair; /* pairs [pair, pair + rows) of a run, or keys from `pair` on of its segment */
};

struct Attend {
    const Segment *segment;
    const Run *run;
    const Item *item;
    int H, G, E, width; /* width: E rounded up to 16 */
    int rows, keys;     /* of a tile */
    int window;
    float scale;
};

enum { ATTEND_THREADS = 128 };

} // namespace

/* The segments from the root down to `seg`, in shared memory; how many. All threads call it. */
__device__ static inline int find_chain(int *chain, const Segment *segment, int seg) {
    int depth = 0;
    for (int s = seg; s >= 0 && depth < MAX_DEPTH; s = segment[s].parent) {
        depth++;
    }
    if (threadIdx.x == 0) {
        int at = depth;
        for (int s = seg; at > 0; s = segment[s].parent) {
            chain[--at] = s;
        }
    }
    __syncthreads();
    return depth;
}

/* Keys [from, to) of a tile that starts at `position` that the query at position `query` sees. */
__device__ static inline void visible(int *from, int *to, int query, int position, int n_keys, bool own, int window) {
    *to = own && query - position + 1 < n_keys ? query - position + 1 : n_keys;
    *from = window > 0 && query - window + 1 > position ? query - window + 1 - position : 0;
}

/* Whether any query of positions [first, last] sees a key of the tile. */
__device__ static inline bool worth(int first, int last, int position, int n_keys, bool own, int window) {
    return !(own && position > last) && !(window > 0 && first - (position + n_keys - 1) >= window);
}

/* One row of scores: they become weights relative to the new maximum, the sum and the output so far are scaled to it. A warp
 * calls it, lanes along the keys. */
template <typename T>
__device__ static inline void softmax_row(float *score, T *weight, float *o, float *largest, float *sum, int from, int to, const Attend &a) {
    int lane = (int)threadIdx.x % WARP;
    float most = *largest, total = 0;
    for (int j = lane; j < a.keys; j += WARP) {
        most = fmaxf(most, j >= from && j < to ? score[j] * a.scale : -INFINITY);
    }
    most = warp_max(most);
    for (int j = lane; j < a.keys; j += WARP) {
        float w = j >= from && j < to ? expf(score[j] * a.scale - most) : 0.0f;
        weight[j] = narrow<T>(w);
        total += w;
    }
    total = warp_sum(total);
    float shrink = *largest == -INFINITY ? 0.0f : expf(*largest - most);
    if (shrink != 1.0f) {
        for (int i = lane; i < a.width; i += WARP) {
            o[i] *= shrink;
        }
    }
    __syncwarp();
    if (lane == 0) {
        *sum = *sum * shrink + total;
        *largest = most;
    }
}

namespace {
/* A block's tiles: the output so far, a tile of scores, each row's largest score and sum; queries, keys (then values), weights. */
template <typename T> struct Tiles {
    float *o, *score, *largest, *sum;
    T *queries, *keys, *weight;
};
} // namespace

/* Their bytes of shared memory. */
template <typename T> __host__ __device__ static inline size_t attention_bytes(int rows, int keys, int width) {
    return (size_t)rows * (size_t)padded(width) * (sizeof(T) + sizeof(float)) + (size_t)keys * (size_t)padded(width) * sizeof(T) +
           (size_t)rows * (size_t)padded(keys) * (sizeof(T) + sizeof(float)) + 2 * (size_t)rows * sizeof(float);
}

/* The tiles in shared memory, with `pairs` queries loaded, row r from source(r), and nothing seen yet. */
template <typename T, typename Source>
__device__ static inline Tiles<T> begin_tiles(char *memory, int pairs, const Attend &a, const Source &source) {
    int R = a.rows, ld = padded(a.width);
    Tiles<T> t;
    t.o = (float *)memory;
    t.score = t.o + R * ld;
    t.largest = t.score + R * padded(a.keys);
    t.sum = t.largest + R;
    t.queries = (T *)(t.sum + R);
    t.keys = t.queries + R * ld;
    t.weight = t.keys + a.keys * ld;
    load_tile(t.queries, R, pairs, a.E, a.width, source);
    for (int i = (int)threadIdx.x; i < R * ld; i += (int)blockDim.x) {
        t.o[i] = 0;
    }
    for (int r = (int)threadIdx.x; r < R; r += (int)blockDim.x) {
        t.largest[r] = -INFINITY;
        t.sum[r] = 0;
    }
    return t;
}

/* The queries meet n keys that stand from `at` on in the cache; see(r, from, to) tells which of them row r sees. Ends with a barrier. */
template <typename T, typename See>
__device__ static inline void attend_keys(const Tiles<T> &t, const T *k, const T *v, size_t at, int n, int pairs, const Attend &a,
                                          const See &see) {
    int R = a.rows, C = a.keys, W = a.width, ld = padded(W);
    size_t step = (size_t)a.G * (size_t)a.E;
    load_tile(t.keys, C, n, a.E, W, [&](int i) { return k + at + (size_t)i * step; });
    __syncthreads();
    tile_product<false, true>(t.score, t.queries, t.keys, TileShape{R, C, W, ld, ld, padded(C)}, false);
    __syncthreads();
    load_tile(t.keys, C, n, a.E, W, [&](int i) { return v + at + (size_t)i * step; });
    for (int r = (int)threadIdx.x / WARP; r < R; r += (int)blockDim.x / WARP) {
        int from = 0, to = 0;
        if (r < pairs) {
            see(r, &from, &to);
        }
        if (from < to) {
            softmax_row(t.score + r * padded(C), t.weight + r * padded(C), t.o + r * ld, &t.largest[r], &t.sum[r], from, to, a);
        } else { /* sees none of these keys */
            for (int i = (int)threadIdx.x % WARP; i < C; i += WARP) {
                t.weight[r * padded(C) + i] = narrow<T>(0);
            }
        }
    }
    __syncthreads();
    tile_product<false, false>(t.o, t.weight, t.keys, TileShape{R, W, C, padded(C), ld, ld}, true);
    __syncthreads();
}

/* ---- a step of decoding: every row is one token, and many rows have the same ancestors. The ancestors' keys are cut into chunks; a
 * block lets all rows below a segment meet one chunk of it and keeps what each has from there. attention_kernel then walks only a row's
 * own segment and joins the parts, from the root down: the order of a row's additions depends on its own chain alone, as ever. */

namespace {
struct Parts {
    float *out;   /* [rows, H, parts, E]: weighted values, not yet divided by the sum */
    float *about; /* [rows, H, parts, 2]: largest score, sum of weights */
    int parts;    /* room for those of a row; 0: there are none */
};

/* Keys [from, from + n) of a segment, and pairs [pair, pair + rows) of the runs below[first], ... under it. */
struct SharedKeys {
    int seg, from, n, first, pair, pairs, part;
};

enum { LEAST_CHUNK_KEYS = 256, MOST_PARTS = 8 }; /* MOST_PARTS: of a segment, so that parts stay few */

__host__ __device__ inline int chunk_keys(int len) {
    int keys = (len + 64 * MOST_PARTS - 1) / (64 * MOST_PARTS) * 64;
    return keys > LEAST_CHUNK_KEYS ? keys : LEAST_CHUNK_KEYS;
}

__host__ __device__ inline int parts_of(int len) { return (len + chunk_keys(len) - 1) / chunk_keys(len); }
} // namespace

/* Grid: (SharedKeys, key/value head). Reads a chunk's keys and values once for a tile of rows. Bound: reading keys while rows are few,
 * tensor cores when tiles are full. */
template <typename T>
__global__ void shared_keys_kernel(Parts parts, const T *q, const T *k, const T *v, Attend a, const SharedKeys *shared, const int *below) {
    SHARED_DYNAMIC(memory);
    int g = (int)blockIdx.y, group = a.H / a.G, ld = padded(a.width), first = 0x7fffffff;
    SharedKeys item = shared[blockIdx.x];
    Segment seg = a.segment[item.seg];
    auto run_of = [&](int r) { return a.run[below[item.first + (item.pair + r) / group]]; };
    auto row_of = [&](int r) { return (size_t)run_of(r).row * (size_t)a.H + (size_t)(g * group + (item.pair + r) % group); };
    auto position_of = [&](int r) { return a.segment[run_of(r).seg].position + run_of(r).first; };
    Tiles<T> t = begin_tiles<T>(memory, item.pairs, a, [&](int r) { return q + row_of(r) * (size_t)a.E; });
    for (int r = 0; a.window > 0 && r < item.pairs; r++) {
        first = position_of(r) < first ? position_of(r) : first;
    }
    for (int j = 0; j < item.n; j += a.keys) {
        int n = item.n - j < a.keys ? item.n - j : a.keys, position = seg.position + item.from + j;
        if (worth(first, first, position, n, false, a.window)) {
            attend_keys(t, k, v, ((size_t)(seg.row + item.from + j) * (size_t)a.G + (size_t)g) * (size_t)a.E, n, item.pairs, a,
                        [&](int r, int *from, int *to) { visible(from, to, position_of(r), position, n, false, a.window); });
        }
    }
    __syncthreads(); /* when no tile was worth it */
    for (int at = (int)threadIdx.x; at < item.pairs * a.E; at += (int)blockDim.x) {
        int r = at / a.E, x = at % a.E;
        parts.out[(row_of(r) * (size_t)parts.parts + (size_t)item.part) * (size_t)a.E + (size_t)x] = t.o[r * ld + x];
    }
    for (int r = (int)threadIdx.x; r < item.pairs; r += (int)blockDim.x) {
        float *about = parts.about + (row_of(r) * (size_t)parts.parts + (size_t)item.part) * 2;
        about[0] = t.largest[r];
        about[1] = t.sum[r];
    }
}

/* What a row has of its own keys, and its n parts, become one relative to the largest score of all. A warp calls it. */
__device__ static inline void join_parts(float *o, float *largest, float *sum, const Parts &parts, size_t row, int n, int E) {
    int lane = (int)threadIdx.x % WARP;
    const float *about = parts.about + row * (size_t)parts.parts * 2, *out = parts.out + row * (size_t)parts.parts * (size_t)E;
    float most = *largest;
    for (int i = 0; i < n; i++) {
        most = fmaxf(most, about[2 * i]);
    }
    float shrink = expf(*largest - most), total = *sum * shrink;
    for (int x = lane; x < E; x += WARP) {
        o[x] *= shrink;
    }
    for (int i = 0; i < n; i++) {
        float weight = expf(about[2 * i] - most); /* 0 where a window hides the whole chunk */
        total += about[2 * i + 1] * weight;
        for (int x = lane; x < E; x += WARP) {
            o[x] += out[(size_t)i * (size_t)E + (size_t)x] * weight;
        }
    }
    __syncwarp();
    if (lane == 0) {
        *sum = total;
        *largest = most;
    }
}

/* Grid: (item, key/value head). Reads q once and the chain's keys and values once a tile of rows, but for what `parts` holds already;
 * bound: tensor cores when a tile is full (4 E operations a pair and key), reading keys when it is not (decoding). */
template <typename T> __global__ void attention_kernel(T *out, float *lse, const T *q, const T *k, const T *v, Attend a, Parts parts) {
    SHARED_DYNAMIC(memory);
    SHARED(int, chain, MAX_DEPTH);
    int R = a.rows, C = a.keys, ld = padded(a.width), g = (int)blockIdx.y, group = a.H / a.G, known = 0;
    Item item = a.item[blockIdx.x];
    Run run = a.run[item.run];
    int pairs = run.n * group - item.pair < R ? run.n * group - item.pair : R;
    int start = a.segment[run.seg].position + run.first; /* position of the run's first query */
    int first = start + item.pair / group, last = start + (item.pair + pairs - 1) / group;
    size_t E = (size_t)a.E;
    auto row_of = [&](int r) { /* of q and out */
        int p = item.pair + r;
        return (size_t)(run.row + p / group) * (size_t)a.H + (size_t)(g * group + p % group);
    };
    Tiles<T> t = begin_tiles<T>(memory, pairs, a, [&](int r) { return q + row_of(r) * E; });
    int depth = find_chain(chain, a.segment, run.seg);
    for (int link = 0; link < depth; link++) {
        Segment seg = a.segment[chain[link]];
        bool own = link == depth - 1;
        int n_seg = own ? last - seg.position + 1 : seg.len;
        known += parts.parts && !own ? parts_of(seg.len) : 0;
        for (int j = 0; j < n_seg && (own || !parts.parts); j += C) {
            int n = n_seg - j < C ? n_seg - j : C, position = seg.position + j;
            if (worth(first, last, position, n, own, a.window)) {
                attend_keys(t, k, v, ((size_t)(seg.row + j) * (size_t)a.G + (size_t)g) * E, n, pairs, a, [&](int r, int *from, int *to) {
                    visible(from, to, start + (item.pair + r) / group, position, n, own, a.window);
                });
            }
        }
    }
    for (int r = (int)threadIdx.x / WARP; known > 0 && r < pairs; r += (int)blockDim.x / WARP) {
        join_parts(t.o + r * ld, &t.largest[r], &t.sum[r], parts, row_of(r), known, a.E);
    }
    __syncthreads();
    for (int at = (int)threadIdx.x; at < pairs * a.E; at += (int)blockDim.x) {
        int r = at / a.E, x = at % a.E;
        out[row_of(r) * E + (size_t)x] = narrow<T>(t.o[r * ld + x] / t.sum[r]);
    }
    for (int r = (int)threadIdx.x; lse && r < pairs; r += (int)blockDim.x) {
        lse[row_of(r)] = t.largest[r] + logf(t.sum[r]);
    }
}

/* Tiles' sizes: the largest whose shared memory a block can have. */
template <typename Bytes> static bool choose_tiles(Cuda *c, Attend *a, int most, const Bytes &bytes) {
    for (int size = most; size >= 16; size /= 2) {
        a->rows = a->rows < size && a->rows > 0 ? a->rows : size;
        a->keys = size;
        if (bytes(a->rows, a->keys, a->width) + 1024 <= c->shared_limit) { /* 1024: what a block takes besides */
            return true;
        }
    }
    set_failed(c, "GPU: attention over heads of %d numbers does not fit into its shared memory of %zu bytes", a->E, c->shared_limit);
    return false;
}

/* The segments that the runs and their ancestors are, staged; and the runs. */
static void stage_forest(Cuda *c, Attend *a, const Segment *segment, const Run *run, int n_runs) {
    int segments = 0;
    for (int r = 0; r < n_runs; r++) {
        for (int s = run[r].seg; s >= 0; s = segment[s].parent) {
            segments = s >= segments ? s + 1 : segments;
        }
    }
    a->segment = stage(c, segment, (size_t)segments);
    a->run = stage(c, run, (size_t)n_runs);
}

static std::vector<Item> tiles_of(const Run *run, int n_runs, int per_token, int size) {
    std::vector<Item> items;
    for (int r = 0; r < n_runs; r++) {
        for (int p = 0; p < run[r].n * per_token; p += size) {
            items.push_back(Item{r, p});
        }
    }
    return items;
}

static Attend attend_of(int H, int G, int E, float scale, int window) {
    return Attend{NULL, NULL, NULL, H, G, E, (E + 15) / 16 * 16, 0, 0, window, scale};
}

/* A step's rows below each segment that stands above some: below[first[s]], ..., below[first[s + 1] - 1] are runs, in the batch's order. */
static void find_below(const Segment *segment, const Run *run, int n_runs, std::vector<int> *first, std::vector<int> *below) {
    std::vector<int> count;
    for (int r = 0; r < n_runs; r++) {
        for (int s = segment[run[r].seg].parent; s >= 0; s = segment[s].parent) {
            count.resize((size_t)s + 1 > count.size() ? (size_t)s + 1 : count.size());
            count[(size_t)s]++;
        }
    }
    first->assign(1, 0);
    for (int n : count) {
        first->push_back(first->back() + n);
    }
    below->resize((size_t)first->back());
    std::vector<int> at(*first);
    for (int r = 0; r < n_runs; r++) {
        for (int s = segment[run[r].seg].parent; s >= 0; s = segment[s].parent) {
            (*below)[(size_t)at[(size_t)s]++] = r;
        }
    }
}

/* The parts of a row below segment s that come from the segments above it. */
static int parts_above(const Segment *segment, int s) {
    int n = 0;
    for (s = segment[s].parent; s >= 0; s = segment[s].parent) {
        n += parts_of(segment[s].len);
    }
    return n;
}

/* What a step's rows have of their ancestors' keys, in working memory. */
template <typename T>
static Parts attend_shared(Cuda *c, Attend a, const T *q, const T *k, const T *v, const Segment *segment, const Run *run, int n_runs) {
    std::vector<int> first, below;
    std::vector<SharedKeys> items;
    int group = a.H / a.G, most = 0, N = 0;
    Parts parts = {NULL, NULL, 0};
    find_below(segment, run, n_runs, &first, &below);
    for (size_t s = 0; s + 1 < first.size(); s++) {
        most = (first[s + 1] - first[s]) * group > most ? (first[s + 1] - first[s]) * group : most;
    }
    for (int r = 0; r < n_runs; r++) {
        int n = parts_above(segment, run[r].seg);
        parts.parts = n > parts.parts ? n : parts.parts;
        N = run[r].row >= N ? run[r].row + 1 : N;
    }
    a.rows = most <= 16 ? 16 : 0;
    if (parts.parts == 0 || !choose_tiles(c, &a, 64, attention_bytes<T>)) {
        return parts;
    }
    for (int s = 0; s + 1 < (int)first.size(); s++) {
        int pairs = (first[(size_t)s + 1] - first[(size_t)s]) * group, len = segment[s].len, chunk = chunk_keys(len);
        for (int from = 0, part = parts_above(segment, s); from < len; from += chunk, part++) {
            for (int pair = 0; pair < pairs; pair += a.rows) {
                items.push_back(SharedKeys{s, from, len - from < chunk ? len - from : chunk, first[(size_t)s], pair,
                                           pairs - pair < a.rows ? pairs - pair : a.rows, part});
            }
        }
    }
    size_t rows = (size_t)N * (size_t)a.H * (size_t)parts.parts;
    parts.out = (float *)work(c, WORK_PARTIAL, rows * (size_t)(a.E + 2) * sizeof(float));
    parts.about = parts.out + rows * (size_t)a.E;
    LAUNCH(c, shared_keys_kernel<T>, dim3((unsigned)items.size(), (unsigned)a.G), ATTEND_THREADS,
           attention_bytes<T>(a.rows, a.keys, a.width), parts, q, k, v, a, stage(c, items), stage(c, below));
    return parts;
}

template <typename T>
static void cuda_attention(Engine *e, Act *out, Act *lse, const Act *q, const Act *k, const Act *v, const Segment *segment, const Run *run,
                           int n_runs, int H, int G, int E, float scale, int window) {
    RANGE();
    Cuda *c = cuda_of(e);
    Attend a = attend_of(H, G, E, scale, window);
    Parts parts = {NULL, NULL, 0};
    int longest = 0;
    for (int r = 0; r < n_runs; r++) {
        longest = run[r].n > longest ? run[r].n : longest;
    }
    a.rows = longest * (H / G) <= 16 ? 16 : 0; /* decoding: a tile of a token's heads */
    if (n_runs == 0 || !choose_tiles(c, &a, 64, attention_bytes<T>)) {
        return;
    }
    std::vector<Item> items = tiles_of(run, n_runs, H / G, a.rows);
    stage_forest(c, &a, segment, run, n_runs);
    if (longest == 1) {
        parts = attend_shared(c, a, (const T *)q, (const T *)k, (const T *)v, segment, run, n_runs);
    }
    a.item = stage(c, items);
    LAUNCH(c, attention_kernel<T>, dim3((unsigned)items.size(), (unsigned)G), ATTEND_THREADS, attention_bytes<T>(a.rows, a.keys, a.width),
           (T *)out, (float *)lse, (const T *)q, (const T *)k, (const T *)v, a, parts);
}

/* ---- the way back: twice over the same tiles of P, each time with one owner for every sum */

namespace {
template <typename T> struct AttendBack {
    const T *q, *k, *v, *dout;
    const float *lse, *delta;
    const int *first_descendant, *descendant; /* of each run: the runs of its segment and of those below it, in the batch's order */
    Attend a;
};
} // namespace

/* delta[n,h] = dout . out. Grid: 4 pairs a block, a warp a pair. Bound: memory, 2 sizeof(T) bytes a number. */
template <typename T> __global__ void attention_delta_kernel(float *delta, const T *dout, const T *out, size_t pairs, int E) {
    size_t pair = (size_t)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    float sum = 0;
    for (int i = (int)threadIdx.x % WARP; pair < pairs && i < E; i += WARP) {
        sum += widen(dout[pair * (size_t)E + (size_t)i]) * widen(out[pair * (size_t)E + (size_t)i]);
    }
    sum = warp_sum(sum);
    if (pair < pairs && threadIdx.x % WARP == 0) {
        delta[pair] = sum;
    }
}

namespace {
/* A block's tiles on the way back. acc is dq, or dk with dv behind it. */
template <typename T> struct BackTiles {
    float *acc, *acc2, *score, *dp;
    T *queries, *dout, *keys, *values, *p, *ds;
};
} // namespace

/* Shared memory of the way back; with `memory` NULL only its size is wanted. */
template <typename T> __host__ __device__ static inline size_t back_tiles(BackTiles<T> *t, char *memory, int R, int C, int W, bool keys) {
    size_t ld = (size_t)padded(W), acc = (size_t)(keys ? C : R) * ld, scores = (size_t)R * (size_t)padded(C);
    float *f = (float *)memory;
    size_t floats = acc * (keys ? 2 : 1) + 2 * scores, numbers = 2 * (size_t)(R + C) * ld + 2 * scores;
    if (memory) {
        t->acc = f;
        t->acc2 = keys ? f + acc : NULL;
        t->score = f + acc * (keys ? 2 : 1);
        t->dp = t->score + scores;
        t->queries = (T *)(f + floats);
        t->dout = t->queries + (size_t)R * ld;
        t->keys = t->dout + (size_t)R * ld;
        t->values = t->keys + (size_t)C * ld;
        t->p = t->values + (size_t)C * ld;
        t->ds = t->p + scores;
    }
    return floats * sizeof(float) + numbers * sizeof(T);
}

/* P and dS of a tile whose queries, keys, gradients and values stand in shared memory. Barriers at both ends. */
template <typename T>
__device__ static inline void score_gradients(const AttendBack<T> &b, const BackTiles<T> &t, const Run &run, int pair0, int pairs, int g,
                                              int position, int n_keys, bool own) {
    const Attend &a = b.a;
    int R = a.rows, C = a.keys, ld = padded(a.width), group = a.H / a.G, lds = padded(C);
    int start = a.segment[run.seg].position + run.first;
    __syncthreads();
    tile_product<false, true>(t.score, t.queries, t.keys, TileShape{R, C, a.width, ld, ld, lds}, false);
    tile_product<false, true>(t.dp, t.dout, t.values, TileShape{R, C, a.width, ld, ld, lds}, false);
    __syncthreads();
    for (int at = (int)threadIdx.x; at < R * C; at += (int)blockDim.x) {
        int r = at / C, j = at % C, from = 0, to = 0, p = pair0 + r;
        float weight = 0, ds = 0;
        if (r < pairs) {
            visible(&from, &to, start + p / group, position, n_keys, own, a.window);
        }
        if (j >= from && j < to) {
            size_t row = (size_t)(run.row + p / group) * (size_t)a.H + (size_t)(g * group + p % group);
            weight = expf(t.score[r * lds + j] * a.scale - b.lse[row]);
            ds = weight * (t.dp[r * lds + j] - b.delta[row]) * a.scale;
        }
        t.p[r * lds + j] = narrow<T>(weight);
        t.ds[r * lds + j] = narrow<T>(ds);
    }
    __syncthreads();
}

/* Queries' tiles: rows of q and dout of pairs [pair, pair + n) of a run. */
template <typename T>
__device__ static inline void load_queries(const AttendBack<T> &b, const BackTiles<T> &t, const Run &run, int pair, int n, int g) {
    const Attend &a = b.a;
    int group = a.H / a.G;
    auto offset = [&](int r) {
        int p = pair + r;
        return ((size_t)(run.row + p / group) * (size_t)a.H + (size_t)(g * group + p % group)) * (size_t)a.E;
    };
    load_tile(t.queries, a.rows, n, a.E, a.width, [&](int r) { return b.q + offset(r); });
    load_tile(t.dout, a.rows, n, a.E, a.width, [&](int r) { return b.dout + offset(r); });
}

template <typename T>
__device__ static inline void load_keys(const AttendBack<T> &b, const BackTiles<T> &t, const Segment &seg, int j, int n, int g) {
    const Attend &a = b.a;
    size_t at = ((size_t)(seg.row + j) * (size_t)a.G + (size_t)g) * (size_t)a.E, step = (size_t)a.G * (size_t)a.E;
    load_tile(t.keys, a.keys, n, a.E, a.width, [&](int i) { return b.k + at + (size_t)i * step; });
    load_tile(t.values, a.keys, n, a.E, a.width, [&](int i) { return b.v + at + (size_t)i * step; });
}

/* dq: a tile of queries walks its ancestors' keys, as forward. Grid: (item, key/value head). Bound: tensor cores, 6 E operations a
 * pair and key. */
template <typename T> __global__ void attention_dq_kernel(T *dq, AttendBack<T> b) {
    SHARED_DYNAMIC(memory);
    SHARED(int, chain, MAX_DEPTH);
    const Attend &a = b.a;
    BackTiles<T> t;
    back_tiles(&t, memory, a.rows, a.keys, a.width, false);
    int R = a.rows, C = a.keys, W = a.width, ld = padded(W), g = (int)blockIdx.y, group = a.H / a.G;
    Item item = a.item[blockIdx.x];
    Run run = a.run[item.run];
    int pairs = run.n * group - item.pair < R ? run.n * group - item.pair : R;
    int start = a.segment[run.seg].position + run.first, first = start + item.pair / group, last = start + (item.pair + pairs - 1) / group;
    load_queries(b, t, run, item.pair, pairs, g);
    for (int i = (int)threadIdx.x; i < R * ld; i += (int)blockDim.x) {
        t.acc[i] = 0;
    }
    int depth = find_chain(chain, a.segment, run.seg);
    for (int link = 0; link < depth; link++) {
        Segment seg = a.segment[chain[link]];
        bool own = link == depth - 1;
        for (int j = 0; j < seg.len; j += C) {
            int n = seg.len - j < C ? seg.len - j : C, position = seg.position + j;
            if (!worth(first, last, position, n, own, a.window)) {
                continue;
            }
            load_keys(b, t, seg, j, n, g);
            score_gradients(b, t, run, item.pair, pairs, g, position, n, own);
            tile_product<false, false>(t.acc, t.ds, t.keys, TileShape{R, W, C, padded(C), ld, ld}, true);
            __syncthreads();
        }
    }
    for (int at = (int)threadIdx.x; at < pairs * a.E; at += (int)blockDim.x) {
        int r = at / a.E, x = at % a.E, p = item.pair + r;
        size_t row = (size_t)(run.row + p / group) * (size_t)a.H + (size_t)(g * group + p % group);
        dq[row * (size_t)a.E + (size_t)x] = narrow<T>(t.acc[r * ld + x]);
    }
}

/* dk, dv: a tile of keys walks the queries of its segment and of all descendants, in the batch's order. Grid: (item, key/value
 * head). Bound: tensor cores, 8 E operations a pair and key. */
template <typename T> __global__ void attention_dkv_kernel(T *dk, T *dv, AttendBack<T> b) {
    SHARED_DYNAMIC(memory);
    const Attend &a = b.a;
    BackTiles<T> t;
    back_tiles(&t, memory, a.rows, a.keys, a.width, true);
    int R = a.rows, C = a.keys, W = a.width, ld = padded(W), g = (int)blockIdx.y, group = a.H / a.G;
    Item item = a.item[blockIdx.x];
    Run mine = a.run[item.run];
    Segment seg = a.segment[mine.seg];
    int j = item.pair, n = seg.len - j < C ? seg.len - j : C, position = seg.position + j;
    for (int i = (int)threadIdx.x; i < C * ld; i += (int)blockDim.x) {
        t.acc[i] = t.acc2[i] = 0;
    }
    load_keys(b, t, seg, j, n, g);
    for (int i = b.first_descendant[item.run]; i < b.first_descendant[item.run + 1]; i++) {
        Run run = a.run[b.descendant[i]];
        bool own = run.seg == mine.seg;
        int start = a.segment[run.seg].position + run.first;
        for (int pair = 0; pair < run.n * group; pair += R) {
            int pairs = run.n * group - pair < R ? run.n * group - pair : R;
            if (!worth(start + pair / group, start + (pair + pairs - 1) / group, position, n, own, a.window)) {
                continue;
            }
            load_queries(b, t, run, pair, pairs, g);
            score_gradients(b, t, run, pair, pairs, g, position, n, own);
            tile_product<true, false>(t.acc, t.ds, t.queries, TileShape{C, W, R, padded(C), ld, ld}, true);
            tile_product<true, false>(t.acc2, t.p, t.dout, TileShape{C, W, R, padded(C), ld, ld}, true);
            __syncthreads();
        }
    }
    for (int at = (int)threadIdx.x; at < n * a.E; at += (int)blockDim.x) {
        int i = at / a.E, x = at % a.E;
        size_t out = ((size_t)(mine.row + j + i) * (size_t)a.G + (size_t)g) * (size_t)a.E + (size_t)x;
        dk[out] = narrow<T>(t.acc[i * ld + x]);
        dv[out] = narrow<T>(t.acc2[i * ld + x]);
    }
}

/* For each run the runs that stand on its segment's tokens: descendant[first[r] .. first[r + 1]). */
static void find_descendants(const Segment *segment, const Run *run, int n_runs, std::vector<int> *first, std::vector<int> *descendant) {
    std::map<int, int> run_of; /* segment -> run */
    std::vector<std::vector<int>> below((size_t)n_runs);
    for (int r = 0; r < n_runs; r++) {
        run_of[run[r].seg] = r;
    }
    for (int r = 0; r < n_runs; r++) {
        for (int s = run[r].seg; s >= 0; s = segment[s].parent) {
            auto it = run_of.find(s);
            if (it != run_of.end()) {
                below[(size_t)it->second].push_back(r);
            }
        }
    }
    first->assign(1, 0);
    for (const std::vector<int> &list : below) {
        descendant->insert(descendant->end(), list.begin(), list.end());
        first->push_back((int)descendant->size());
    }
}

template <typename T>
static void cuda_attention_backward(Engine *e, Act *dq, Act *dk, Act *dv, const Act *dout, const Act *out, const Act *lse, const Act *q,
                                    const Act *k, const Act *v, const Segment *segment, const Run *run, int n_runs, int H, int G, int E,
                                    float scale, int window) {
    RANGE();
    Cuda *c = cuda_of(e);
    Attend a = attend_of(H, G, E, scale, window);
    auto query_bytes = [](int R, int C, int W) { return back_tiles<T>(NULL, NULL, R, C, W, false); };
    auto key_bytes = [](int R, int C, int W) { return back_tiles<T>(NULL, NULL, R, C, W, true); };
    if (n_runs == 0 || !choose_tiles(c, &a, 64, key_bytes)) {
        return;
    }
    size_t pairs = (size_t)(run[n_runs - 1].row + run[n_runs - 1].n) * (size_t)H;
    float *delta = (float *)work(c, WORK_ROWS, pairs * sizeof(float));
    LAUNCH(c, attention_delta_kernel<T>, blocks_of(pairs, 4), 4 * WARP, 0, delta, (const T *)dout, (const T *)out, pairs, E);
    std::vector<int> first, descendant;
    find_descendants(segment, run, n_runs, &first, &descendant);
    std::vector<Item> queries = tiles_of(run, n_runs, H / G, a.rows), keys = tiles_of(run, n_runs, 1, a.keys);
    stage_forest(c, &a, segment, run, n_runs);
    AttendBack<T> b = {(const T *)q, (const T *)k, (const T *)v, (const T *)dout, (const float *)lse, delta,
                       stage(c, first), stage(c, descendant), a};
    b.a.item = stage(c, queries);
    LAUNCH(c, attention_dq_kernel<T>, dim3((unsigned)queries.size(), (unsigned)G), ATTEND_THREADS, query_bytes(a.rows, a.keys, a.width),
           (T *)dq, b);
    b.a.item = stage(c, keys);
    LAUNCH(c, attention_dkv_kernel<T>, dim3((unsigned)keys.size(), (unsigned)G), ATTEND_THREADS, key_bytes(a.rows, a.keys, a.width), (T *)dk,
           (T *)dv, b);
}
