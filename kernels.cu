/* kernels.cu - every op of the table in CUDA: the GPU's engine, same names and contracts as cpu.c and cpu_backward.c.
 *
 * Activations are T: float (for diffing) or bf16 (storage only: every sum, softmax, norm and loss is fp32). Weights are kept on
 * the GPU as working copies in T, made where a weight is first used; norms' weights and biases as fp32.
 *
 * What must stay true: every sum has one fixed order. There are no atomics: work is divided by outputs, and long sums go through
 * chunks whose borders depend on sizes alone. Same seed, same GPU, same library: same bits.
 *
 * Order: number formats, sums; the engine's memory; recorded steps; working copies of weights; matrix products (tiles.cuh: a block's own;
 * quantised.cuh: weights of one byte); row by row ops; RoPE; attention (attention.cuh); losses and sampling; the optimizer; the table.
 * tests/cuda_shim.h compiles this file as plain C++ and runs its blocks on the CPU (NLA_SHIM): kernels are launched through LAUNCH, and
 * shared memory is asked for through SHARED and SHARED_DYNAMIC, for its sake.
 */
#include "quantise.h"

#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <map>
#include <vector>

#ifdef NLA_SHIM
#include "tests/cuda_shim.h"
#else
#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <mma.h>
#include <nvtx3/nvToolsExt.h>

#define SHARED(type, name, count) __shared__ type name[count]
#define SHARED_DYNAMIC(name) extern __shared__ __align__(128) char name[]
#define LAUNCH_NAME(kernel)
#define LAUNCH_KERNEL(kernel, grid, block, shared, stream, ...) (kernel)<<<(grid), (block), (shared), (stream)>>>(__VA_ARGS__)
#endif

typedef __nv_bfloat16 bf16;

/* ------------------------------------------------------------------------------------------------ number formats, sums */

__device__ static inline float widen(float x) { return x; }
__device__ static inline float widen(bf16 x) { return __bfloat162float(x); }
__device__ static inline float widen(__half x) { return __half2float(x); }
template <typename T> __device__ static inline T narrow(float x);
template <> __device__ inline float narrow<float>(float x) { return x; }
template <> __device__ inline bf16 narrow<bf16>(float x) { return __float2bfloat16(x); }

/* W numbers that are read and written as one access: 16 bytes, or one number where a row's width does not allow it. */
template <typename T, int W> struct alignas(sizeof(T) * W) Pack {
    T x[W];
};
template <typename T> constexpr int WIDE = 16 / (int)sizeof(T);

template <int W, typename T> __device__ static inline Pack<T, W> load(const T *p) { return *(const Pack<T, W> *)p; }
template <int W, typename T> __device__ static inline void store(T *p, const Pack<T, W> &v) { *(Pack<T, W> *)p = v; }

enum { WARP = 32 };
enum : unsigned { ALL_LANES = 0xffffffffu };

__device__ static inline float warp_sum(float x) {
    for (int i = WARP / 2; i > 0; i /= 2) {
        x += __shfl_xor_sync(ALL_LANES, x, i);
    }
    return x;
}

__device__ static inline float warp_max(float x) {
    for (int i = WARP / 2; i > 0; i /= 2) {
        x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, i));
    }
    return x;
}

/* The sum of one number a thread, for all threads of the block: within warps by exchange, then warp after warp. */
template <typename S> __device__ static inline S block_sum(S x) {
    SHARED(S, partial, WARP);
    for (int i = WARP / 2; i > 0; i /= 2) {
        x += __shfl_xor_sync(ALL_LANES, x, i);
    }
    if (threadIdx.x % WARP == 0) {
        partial[threadIdx.x / WARP] = x;
    }
    __syncthreads();
    S sum = 0;
    for (int i = 0; i < (int)blockDim.x / WARP; i++) {
        sum += partial[i];
    }
    __syncthreads(); /* before the next sum writes partial */
    return sum;
}

__device__ static inline float block_max(float x) {
    SHARED(float, partial, WARP);
    x = warp_max(x);
    if (threadIdx.x % WARP == 0) {
        partial[threadIdx.x / WARP] = x;
    }
    __syncthreads();
    float most = partial[0];
    for (int i = 1; i < (int)blockDim.x / WARP; i++) {
        most = fmaxf(most, partial[i]);
    }
    __syncthreads();
    return most;
}

/* ------------------------------------------------------------------------------------------------ the engine's memory */

namespace {

struct Piece { /* memory that alloc gave */
    size_t bytes;
    DType dtype;
};

/* A working copy of a weight: of the matrices of a stack one below the other, or of its biases end to end. */
struct Copy {
    const void *source[3];
    void *data;
    size_t bytes;
    bool stale; /* the source has changed since: engine memory that adamw or write changed */
};

struct CopyKey {
    const void *first;
    size_t count;
    WeightFormat format;
    bool operator<(const CopyKey &b) const {
        return first != b.first ? first < b.first : count != b.count ? count < b.count : format < b.format;
    }
};

/* A small host array on its way to the device: uploaded only when it is not what was uploaded from there last. */
struct Staged {
    const void *host; /* NULL: an array that an op makes */
    std::vector<char> content;
    void *device;
    size_t room;
    uint64_t used; /* when it was last asked for; a step's: 0 = not uploaded yet */
};

/* A step of decoding as a CUDA graph. A shape's first step runs op by op, which makes all copies of weights and all working memory that
 * it needs; its second is recorded; from then on one launch repeats it. What changes from step to step stands in `staged`, arrays of the
 * step's own, and is uploaded before each launch. Whatever moves memory or changes a weight's copy drops the step (drop_step). */
struct Step {
    std::vector<char> shape; /* of the last step; empty: there was none */
    std::vector<Staged> staged;
    bool recording;
    cudaGraphExec_t graph; /* NULL: not recorded */
};

enum Slot { WORK_A, WORK_B, WORK_PARTIAL, WORK_ROWS, WORK_GEMM, WORK_RESULT, WORK_SLOTS };

struct Cuda {
    cudaStream_t stream;
    std::map<const char *, Piece> piece;
    std::map<CopyKey, Copy> copy;
    std::vector<Staged> staged;
    uint64_t stagings;
    Step step;
    bool op_by_op; /* steps are never recorded: NLA_GRAPHS=0, for a profiler's sake */
    void *work[WORK_SLOTS];
    size_t work_room[WORK_SLOTS];
    MemoryUse memory;
    cudaEvent_t from, to; /* of a measurement */
    size_t shared_limit; /* bytes of shared memory that a block can have */
    void *plans; /* of matrix products: cuBLASLt's */
    char name[300];
    char failed[600]; /* the first failure; ops do nothing from then on */
};

enum { STAGED = 48, GEMM_WORKSPACE = 32 << 20 };

Cuda *cuda_of(Engine *e) { return (Cuda *)e->scratch; }

__attribute__((format(printf, 2, 3))) void set_failed(Cuda *c, const char *format, ...) {
    if (!c->failed[0]) {
        va_list args;
        va_start(args, format);
        vsnprintf(c->failed, sizeof c->failed, format, args);
        va_end(args);
    }
}

bool good(Cuda *c, cudaError_t status, const char *what) {
    if (status != cudaSuccess) {
        set_failed(c, "GPU: %s: %s", what, cudaGetErrorString(status));
    }
    return status == cudaSuccess;
}

} // namespace

/* LAUNCH(engine, kernel, grid, block, bytes of dynamic shared memory, arguments): nothing after a failure. */
#define LAUNCH(c, kernel, grid, block, shared, ...)                                                                              \
    do {                                                                                                                         \
        LAUNCH_NAME(kernel);                                                                                                     \
        auto *launched = kernel;                                                                                                 \
        size_t shared_bytes = (shared);                                                                                          \
        if (!(c)->failed[0] && (shared_bytes <= 48 * 1024 ||                                                                     \
                                good((c), cudaFuncSetAttribute((const void *)launched, cudaFuncAttributeMaxDynamicSharedMemorySize, \
                                                               (int)shared_bytes), #kernel))) {                                  \
            LAUNCH_KERNEL(launched, (grid), (block), shared_bytes, (c)->stream, __VA_ARGS__);                                    \
            good((c), cudaGetLastError(), #kernel);                                                                              \
        }                                                                                                                        \
    } while (0)

/* An op's name on the profiler's time line, for as long as the op's function runs. */
#ifdef NLA_SHIM
#define RANGE()
#else
namespace {
struct Range {
    explicit Range(const char *name) { nvtxRangePushA(name); }
    ~Range() { nvtxRangePop(); }
    Range(const Range &) = delete;
    Range &operator=(const Range &) = delete;
};
} // namespace
#define RANGE() Range range(__func__)
#endif

static unsigned blocks_of(size_t count, size_t each) { return (unsigned)((count + each - 1) / each); }

/* Threads for a row of `width` numbers: whole warps, no more than there is work for. */
static unsigned row_threads(int width) {
    unsigned n = (unsigned)((width + WARP - 1) / WARP) * WARP;
    return n > 256 ? 256 : n;
}

static void *device_memory(size_t bytes) {
    void *p = NULL;
    if (cudaMalloc(&p, bytes ? bytes : 1) != cudaSuccess) {
        (void)cudaGetLastError(); /* what was asked for is too large: an error of the caller's, not of the engine */
        return NULL;
    }
    return p;
}

/* The piece of engine memory that holds this address; false: none does. */
static bool find_piece(const Cuda *c, const void *p, const char **start, Piece *piece) {
    auto next = c->piece.upper_bound((const char *)p);
    if (next == c->piece.begin()) {
        return false;
    }
    --next;
    *start = next->first;
    *piece = next->second;
    return (const char *)p < next->first + next->second.bytes;
}

static DType dtype_of(const Cuda *c, const void *p, DType otherwise) {
    const char *start;
    Piece piece;
    return find_piece(c, p, &start, &piece) ? piece.dtype : otherwise;
}

static void drop_step(Cuda *c) {
    Step *s = &c->step;
    if (s->graph) {
        cudaStreamSynchronize(c->stream);
        cudaGraphExecDestroy(s->graph);
    }
    for (Staged &x : s->staged) {
        cudaFree(x.device);
        memory_count(&c->memory, MEMORY_WORK, 0, x.room);
    }
    *s = Step();
}

/* What happens to the copies of weights in [from, from + bytes): dropped, or to be made anew at their next use. */
static void touch_copies(Cuda *c, const void *from, size_t bytes, bool drop) {
    const char *low = (const char *)from, *high = low + bytes;
    for (auto it = c->copy.begin(); it != c->copy.end();) {
        bool inside = false;
        for (int i = 0; i < 3; i++) {
            const char *s = (const char *)it->second.source[i];
            inside = inside || (s && s >= low && s < high);
        }
        it->second.stale = it->second.stale || inside;
        if (inside) {
            drop_step(c);
        }
        if (inside && drop) {
            cudaFree(it->second.data);
            memory_count(&c->memory, MEMORY_COPIES, 0, it->second.bytes);
            it = c->copy.erase(it);
        } else {
            ++it;
        }
    }
}

static Act *cuda_alloc(Engine *e, DType dtype, size_t count) {
    Cuda *c = cuda_of(e);
    size_t size = dtype_size(dtype);
    char *p = count > SIZE_MAX / 8 ? NULL : (char *)device_memory(count * size);
    if (p) {
        c->piece[p] = Piece{count > 0 ? count * size : 1, dtype};
        memory_count(&c->memory, MEMORY_GIVEN, c->piece[p].bytes, 0);
    }
    return p;
}

static void cuda_free(Engine *e, void *memory) {
    Cuda *c = cuda_of(e);
    auto it = c->piece.find((const char *)memory);
    if (it != c->piece.end()) {
        touch_copies(c, memory, it->second.bytes, true);
        memory_count(&c->memory, MEMORY_GIVEN, 0, it->second.bytes);
        drop_step(c);
        c->piece.erase(it);
        cudaFree(memory);
    }
}

/* Working memory of an op: as large as the largest asked for so far. What was in it is lost when it grows. */
static void *work(Cuda *c, Slot slot, size_t bytes) {
    if (bytes > c->work_room[slot]) {
        drop_step(c);
        cudaFree(c->work[slot]); /* waits for what still uses it */
        memory_count(&c->memory, MEMORY_WORK, 0, c->work_room[slot]);
        c->work[slot] = device_memory(bytes);
        c->work_room[slot] = c->work[slot] ? bytes : 0;
        memory_count(&c->memory, MEMORY_WORK, c->work_room[slot], 0);
        if (!c->work[slot]) {
            set_failed(c, "GPU: no memory for %.3f GB of working space; use smaller batches", (double)bytes / 1e9);
        }
    }
    return c->work[slot];
}

static void copy_in(Cuda *c, void *device, const void *host, size_t bytes) {
    if (!c->failed[0] && bytes) { /* from pageable memory: the host's bytes have been taken when this returns */
        good(c, cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, c->stream), "copy to the device");
    }
}

static void copy_out(Cuda *c, void *host, const void *device, size_t bytes) {
    if (c->failed[0] || !good(c, cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, c->stream), "copy from the device") ||
        !good(c, cudaStreamSynchronize(c->stream), "wait for the device")) {
        memset(host, 0xff, bytes); /* NaN, and token -1: nobody takes them for results */
    }
}

/* An array's place among `all`: where this host array was before, with room for it; else `otherwise`. */
static Staged *staged_place(std::vector<Staged> &all, const void *host, const void *content, size_t bytes, Staged *otherwise) {
    for (Staged &s : all) {
        bool same = s.content.size() == bytes && s.host == host;
        if (same && (host || memcmp(s.content.data(), content, bytes) == 0)) {
            return &s;
        }
    }
    return otherwise;
}

static void upload(Cuda *c, Staged *s, const void *content, size_t bytes) {
    if (bytes > s->room) {
        cudaFree(s->device);
        memory_count(&c->memory, MEMORY_WORK, 0, s->room);
        s->room = 2 * bytes;
        s->device = device_memory(s->room);
        if (!s->device) {
            set_failed(c, "GPU: no memory for an array of %zu bytes", s->room);
            s->room = 0;
        }
        memory_count(&c->memory, MEMORY_WORK, s->room, 0);
    }
    s->content.assign((const char *)content, (const char *)content + bytes);
    if (s->device && !c->step.recording) { /* else it is uploaded before the step runs */
        copy_in(c, s->device, s->content.data(), bytes);
    }
}

/* An array of the step that is being recorded. */
static const void *stage_in_step(Cuda *c, const void *host, const void *content, size_t bytes) {
    Staged *place = staged_place(c->step.staged, host, content, bytes, NULL);
    if (!place) {
        c->step.staged.push_back(Staged());
        place = &c->step.staged.back();
        place->host = host;
        upload(c, place, content, bytes);
    }
    return place->device;
}

static const void *stage_bytes(Cuda *c, const void *host, const void *content, size_t bytes) {
    if (c->step.recording) {
        return stage_in_step(c, host, content, bytes);
    }
    Staged *oldest = &c->staged[0];
    for (Staged &s : c->staged) {
        oldest = s.used < oldest->used ? &s : oldest;
    }
    Staged *place = staged_place(c->staged, host, content, bytes, oldest);
    bool same = place->host == host && place->content.size() == bytes && memcmp(place->content.data(), content, bytes) == 0;
    place->used = ++c->stagings;
    if (!same) {
        place->host = host;
        upload(c, place, content, bytes);
    }
    return place->device;
}

/* A small host array (token ids, positions, segments), on the device until STAGED - 1 others have been asked for: an op stages
 * fewer, so what it has staged stays. One that the caller has may change from step to step; one that an op makes (a vector) must
 * follow from the step's shape alone. */
template <typename S> static const S *stage(Cuda *c, const S *host, size_t count) {
    return (const S *)stage_bytes(c, host, host, count * sizeof(S));
}

template <typename S> static const S *stage(Cuda *c, const std::vector<S> &made) {
    return (const S *)stage_bytes(c, NULL, made.data(), made.size() * sizeof(S));
}

/* ---- steps */

static void run_step(Cuda *c) {
    for (Staged &s : c->step.staged) {
        if (s.host && memcmp(s.content.data(), s.host, s.content.size()) != 0) {
            memcpy(s.content.data(), s.host, s.content.size());
            s.used = 0;
        }
        if (s.used++ == 0) {
            copy_in(c, s.device, s.content.data(), s.content.size());
        }
    }
    good(c, cudaGraphLaunch(c->step.graph, c->stream), "a recorded step");
}

static bool cuda_begin_step(Engine *e, const void *shape, size_t bytes) {
    RANGE();
    Cuda *c = cuda_of(e);
    Step *s = &c->step;
    if (c->failed[0] || c->op_by_op) {
        return false;
    }
    if (s->shape.size() != bytes || memcmp(s->shape.data(), shape, bytes) != 0) {
        drop_step(c);
        s->shape.assign((const char *)shape, (const char *)shape + bytes);
        return false;
    }
    if (s->graph) {
        run_step(c);
        return true;
    }
    s->recording = good(c, cudaStreamBeginCapture(c->stream, cudaStreamCaptureModeRelaxed), "recording a step");
    return false;
}

static void cuda_end_step(Engine *e) {
    RANGE();
    Cuda *c = cuda_of(e);
    Step *s = &c->step;
    cudaGraph_t graph = NULL;
    if (!s->recording) {
        return;
    }
    s->recording = false;
    if (good(c, cudaStreamEndCapture(c->stream, &graph), "recording a step") &&
        good(c, cudaGraphInstantiate(&s->graph, graph, 0), "making a recorded step")) {
        cudaGraphDestroy(graph);
        run_step(c);
    }
}

static void cuda_read(Engine *e, float *host, const Act *x, size_t offset, size_t count) {
    Cuda *c = cuda_of(e);
    if (dtype_of(c, x, e->act_dtype) == DT_F32) {
        copy_out(c, host, (const float *)x + offset, count * sizeof(float));
        return;
    }
    std::vector<uint16_t> half(count);
    copy_out(c, half.data(), (const uint16_t *)x + offset, count * sizeof(uint16_t));
    for (size_t i = 0; i < count; i++) {
        host[i] = bf16_to_f32(half[i]);
    }
}

static void cuda_write(Engine *e, Act *x, size_t offset, const float *host, size_t count) {
    Cuda *c = cuda_of(e);
    if (dtype_of(c, x, e->act_dtype) == DT_F32) {
        copy_in(c, (float *)x + offset, host, count * sizeof(float));
        touch_copies(c, (float *)x + offset, count * sizeof(float), false);
        return;
    }
    std::vector<uint16_t> half(count);
    for (size_t i = 0; i < count; i++) {
        half[i] = f32_to_bf16(host[i]);
    }
    copy_in(c, (uint16_t *)x + offset, half.data(), count * sizeof(uint16_t));
}

static void cuda_put(Engine *e, void *x, const void *host, size_t bytes) {
    copy_in(cuda_of(e), x, host, bytes);
    touch_copies(cuda_of(e), x, bytes, false);
}

static const void *cuda_view(Engine *e, const void *x, size_t bytes) {
    Cuda *c = cuda_of(e);
    const char *start;
    Piece piece;
    if (!find_piece(c, x, &start, &piece)) {
        return x; /* the host's own */
    }
    void *seen = xmalloc(bytes + 1);
    copy_out(c, seen, x, bytes);
    return seen;
}

static void cuda_unview(Engine *e, const void *x, const void *seen) {
    (void)e;
    if (seen != x) {
        free((void *)seen);
    }
}

static void cuda_forget(Engine *e, const void *host, size_t bytes) {
    if (host) {
        touch_copies(cuda_of(e), host, bytes, true);
    }
}

static int cuda_check(Engine *e, Err *err) {
    Cuda *c = cuda_of(e);
    return c->failed[0] ? fail(err, "%s", c->failed) : 0;
}

static void cuda_zero(Engine *e, void *x, size_t bytes) {
    Cuda *c = cuda_of(e);
    if (!c->failed[0]) {
        good(c, cudaMemsetAsync(x, 0, bytes, c->stream), "zero");
        touch_copies(c, x, bytes, false);
    }
}

/* ---- measuring */

static void cuda_copy(Engine *e, void *out, const void *x, size_t bytes) {
    Cuda *c = cuda_of(e);
    if (!c->failed[0]) {
        good(c, cudaMemcpyAsync(out, x, bytes, cudaMemcpyDeviceToDevice, c->stream), "copy on the device");
    }
}

static size_t cuda_available(Engine *e) {
    size_t available = 0, total = 0;
    (void)e;
    return cudaMemGetInfo(&available, &total) == cudaSuccess ? available : 0;
}

static void cuda_start(Engine *e) {
    Cuda *c = cuda_of(e);
    if (!c->failed[0]) {
        good(c, cudaEventRecord(c->from, c->stream), "start of a measurement");
    }
}

static double cuda_stop(Engine *e) {
    Cuda *c = cuda_of(e);
    float milliseconds = 0;
    bool measured = !c->failed[0] && good(c, cudaEventRecord(c->to, c->stream), "end of a measurement") &&
                    good(c, cudaEventSynchronize(c->to), "wait for the device") &&
                    good(c, cudaEventElapsedTime(&milliseconds, c->from, c->to), "measurement");
    return measured ? (double)milliseconds * 1e-3 : NAN;
}

/* ---- working copies of weights */

/* out[i] = in[i] in another number format. Grid: 1024 numbers a block. Bound: memory, sizeof(S) + sizeof(T) bytes a number. */
template <typename T, typename S> __global__ void convert_kernel(T *out, const S *in, size_t count) {
    for (size_t i = (size_t)blockIdx.x * 1024 + threadIdx.x; i < count && i < ((size_t)blockIdx.x + 1) * 1024; i += blockDim.x) {
        out[i] = narrow<T>(widen(in[i]));
    }
}

template <typename T> static void convert(Cuda *c, T *out, const void *in, DType dtype, size_t count) {
    unsigned grid = blocks_of(count, 1024);
    if (count == 0) {
        return;
    }
    if (dtype == DT_F32) {
        LAUNCH(c, (convert_kernel<T, float>), grid, 256, 0, out, (const float *)in, count);
    } else if (dtype == DT_BF16) {
        LAUNCH(c, (convert_kernel<T, bf16>), grid, 256, 0, out, (const bf16 *)in, count);
    } else {
        LAUNCH(c, (convert_kernel<T, __half>), grid, 256, 0, out, (const __half *)in, count);
    }
}

template <typename T> constexpr DType DTYPE = sizeof(T) == 4 ? DT_F32 : DT_BF16;

enum : size_t { UPLOAD = 64 << 20 }; /* bytes of a weight that are on their way at once */

/* A tensor's numbers as T, from where the host or the engine has them. */
template <typename T> static void fill_copy(Cuda *c, T *out, const Tensor *t, size_t count) {
    const char *start;
    Piece piece;
    size_t size = dtype_size(t->dtype);
    if (find_piece(c, t->data, &start, &piece)) {
        convert<T>(c, out, t->data, t->dtype, count);
    } else if (t->dtype == DTYPE<T>) {
        copy_in(c, out, t->data, count * size);
    } else {
        size_t step = UPLOAD / size;
        for (size_t at = 0; at < count && !c->failed[0]; at += step) {
            size_t n = count - at < step ? count - at : step;
            void *stored = work(c, WORK_A, n * size);
            copy_in(c, stored, (const char *)t->data + at * size, n * size);
            convert<T>(c, out + at, stored, t->dtype, n);
        }
    }
}

/* The copy of n tensors of `count` numbers in all, stale when it has just been made. NULL: there is no memory for it. */
static Copy *find_copy(Cuda *c, const Tensor *t, int n, size_t count, size_t bytes, WeightFormat format) {
    const void *first = NULL;
    for (int i = 0; i < n; i++) {
        first = first ? first : t[i].data;
    }
    auto it = c->copy.find(CopyKey{first, count, format});
    if (it == c->copy.end()) {
        Copy made = {{NULL, NULL, NULL}, device_memory(bytes), bytes, true};
        if (!made.data) {
            set_failed(c, "GPU: no memory for the weights; use adapters, --weights int8, a smaller model or smaller batches");
            return NULL;
        }
        for (int i = 0; i < n; i++) {
            made.source[i] = t[i].data;
        }
        it = c->copy.insert({CopyKey{first, count, format}, made}).first;
        memory_count(&c->memory, MEMORY_COPIES, made.bytes, 0);
    }
    return &it->second;
}

/* Whether n tensors stand in the engine's memory as their copy would, aligned like it: trained weights of the engine's own format. */
template <typename T> static bool stands_as(const Cuda *c, const Tensor *t, int n, const size_t *counts) {
    const char *start;
    Piece piece;
    bool as = (uintptr_t)t->data % 16 == 0 && find_piece(c, t->data, &start, &piece);
    for (int i = 0; i < n; i++) {
        as = as && t[i].dtype == DTYPE<T> && (i == 0 || t[i].data == (const T *)t[i - 1].data + counts[i - 1]);
    }
    return as;
}

/* The copy of n tensors one behind the other; zeros where one has no data. */
template <typename T> static const T *working_copy(Cuda *c, const Tensor *t, int n, const size_t *counts) {
    size_t count = 0;
    for (int i = 0; i < n; i++) {
        count += counts[i];
    }
    if (stands_as<T>(c, t, n, counts)) {
        return (const T *)t->data;
    }
    Copy *copy = find_copy(c, t, n, count, count * sizeof(T), WEIGHTS_AS_STORED);
    if (copy && copy->stale) {
        T *out = (T *)copy->data;
        for (int i = 0; i < n; out += counts[i], i++) {
            if (t[i].data) {
                fill_copy<T>(c, out, &t[i], counts[i]);
            } else if (!c->failed[0]) {
                good(c, cudaMemsetAsync(out, 0, counts[i] * sizeof(T), c->stream), "zero");
            }
        }
        copy->stale = false;
    }
    return copy ? (const T *)copy->data : NULL;
}

/* A stack of matrices as one [out, in]; its biases as one [out] (NULL: none has any); one matrix; a norm's weights. */
template <typename T> static const T *matrices_of(Cuda *c, const Linear *w) {
    size_t counts[3];
    for (int i = 0; i < w->n; i++) {
        counts[i] = (size_t)w->w[i].shape[0] * (size_t)w->in;
    }
    return working_copy<T>(c, w->w, w->n, counts);
}

static const float *biases_of(Cuda *c, const Linear *w) {
    size_t counts[3];
    bool any = false;
    for (int i = 0; i < w->n; i++) {
        counts[i] = (size_t)w->w[i].shape[0];
        any = any || w->b[i].data;
    }
    return any ? working_copy<float>(c, w->b, w->n, counts) : NULL;
}

template <typename T> static const T *matrix_of(Cuda *c, const Tensor *t, size_t count) { return working_copy<T>(c, t, 1, &count); }

static const float *vector_of(Cuda *c, const Tensor *t, int n) { return t ? matrix_of<float>(c, t, (size_t)n) : NULL; }

/* x as T: itself, or converted into working memory (fp32 logits that a product of bf16 takes). */
template <typename T> static const T *as_act(Cuda *c, Slot slot, const Act *x, size_t count) {
    DType dtype = dtype_of(c, x, DTYPE<T>);
    if (dtype == DTYPE<T>) {
        return (const T *)x;
    }
    T *out = (T *)work(c, slot, count * sizeof(T));
    convert<T>(c, out, x, dtype, count);
    return out;
}

/* ------------------------------------------------------------------------------------------------ matrix products
 * C [M,N] = alpha op(A) op(B) + beta C, everything row-major: A is [M,K], or stored [K,M] when `ta`; B is [K,N], or stored [N,K]
 * when `tb`. A and B hold T, C float or T; sums are fp32. On the GPU cuBLASLt does it, in the shim a plain loop. */

namespace {
struct Gemm {
    int M, N, K;
    bool ta, tb;
    const void *a, *b;
    size_t lda, ldb; /* row strides of what is stored */
    void *c;
    size_t ldc;
    DType in, out; /* of A and B; of C */
    float alpha, beta;
};
} // namespace

#ifdef NLA_SHIM

static float shim_number(const void *p, DType dtype, size_t i) {
    return dtype == DT_F32 ? ((const float *)p)[i] : widen(((const bf16 *)p)[i]);
}

static void gemm_loops(const Gemm &g) {
    std::vector<float> a((size_t)g.M * (size_t)g.K), b((size_t)g.N * (size_t)g.K);
    for (size_t k = 0; k < (size_t)g.K; k++) {
        for (size_t m = 0; m < (size_t)g.M; m++) {
            a[m * (size_t)g.K + k] = shim_number(g.a, g.in, g.ta ? k * g.lda + m : m * g.lda + k);
        }
        for (size_t n = 0; n < (size_t)g.N; n++) {
            b[n * (size_t)g.K + k] = shim_number(g.b, g.in, g.tb ? n * g.ldb + k : k * g.ldb + n);
        }
    }
    for (size_t m = 0; m < (size_t)g.M; m++) {
        for (size_t n = 0; n < (size_t)g.N; n++) {
            const float *x = a.data() + m * (size_t)g.K, *y = b.data() + n * (size_t)g.K;
            float sum = 0;
            for (int k = 0; k < g.K; k++) {
                sum += x[k] * y[k];
            }
            size_t at = m * g.ldc + n;
            sum = g.alpha * sum + (g.beta != 0 ? g.beta * shim_number(g.c, g.out, at) : 0);
            if (g.out == DT_F32) {
                ((float *)g.c)[at] = sum;
            } else {
                ((bf16 *)g.c)[at] = __float2bfloat16(sum);
            }
        }
    }
}

static void gemm(Cuda *c, const Gemm &g) {
    if (!c->failed[0] && g.M > 0 && g.N > 0) {
        shim_library("gemm", [g] { gemm_loops(g); });
    }
}

static bool gemm_open(Cuda *c, Err *err) { return (void)c, (void)err, true; }
static void gemm_close(Cuda *c) { (void)c; }

#else

/* cuBLASLt is loaded when the engine is opened, so that the program starts where it is not installed. */
#define LT_FUNCTIONS(X)                                                                                                          \
    X(Create) X(Destroy) X(MatmulDescCreate) X(MatmulDescSetAttribute) X(MatmulDescDestroy) X(MatrixLayoutCreate)                \
    X(MatrixLayoutDestroy) X(MatmulPreferenceCreate) X(MatmulPreferenceSetAttribute) X(MatmulPreferenceDestroy)                  \
    X(MatmulAlgoGetHeuristic) X(Matmul)

namespace {
struct PlanKey {
    int M, N, K, kind;
    uint32_t align_a, align_b, align_c, unused;
    size_t lda, ldb, ldc;
    bool operator<(const PlanKey &o) const { return memcmp(this, &o, sizeof o) < 0; }
};

struct ProductPlan {
    cublasLtMatmulDesc_t product;
    cublasLtMatrixLayout_t a, b, c;
    cublasLtMatmulAlgo_t algo;
};

struct Plans {
    void *library;
#define LT_POINTER(name) decltype(&cublasLt##name) name;
    LT_FUNCTIONS(LT_POINTER)
    cublasLtHandle_t handle;
    std::map<PlanKey, ProductPlan> plan;
};
} // namespace

static bool gemm_open(Cuda *c, Err *err) {
    static const char *const names[] = {"libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"};
    Plans *p = new Plans();
    for (int i = 0; i < 3 && !p->library; i++) {
        p->library = dlopen(names[i], RTLD_NOW);
    }
    bool found = p->library != NULL;
#define LT_FIND(name) found = found && (p->name = (decltype(p->name))dlsym(p->library, "cublasLt" #name)) != NULL;
    LT_FUNCTIONS(LT_FIND)
    if (!found || p->Create(&p->handle) != CUBLAS_STATUS_SUCCESS) {
        fail(err, "--device cuda: cannot %s libcublasLt.so.13 (or .12) of the CUDA toolkit: %s", found ? "start" : "load",
             found ? "cublasLtCreate failed" : dlerror());
        if (p->library) {
            dlclose(p->library);
        }
        delete p;
        return false;
    }
    c->plans = p;
    return true;
}

static void gemm_close(Cuda *c) {
    Plans *p = (Plans *)c->plans;
    if (!p) {
        return;
    }
    for (auto &entry : p->plan) {
        p->MatmulDescDestroy(entry.second.product);
        p->MatrixLayoutDestroy(entry.second.a);
        p->MatrixLayoutDestroy(entry.second.b);
        p->MatrixLayoutDestroy(entry.second.c);
    }
    p->Destroy(p->handle);
    dlclose(p->library);
    delete p;
}

static cudaDataType_t lt_type(DType dtype) { return dtype == DT_F32 ? CUDA_R_32F : CUDA_R_16BF; }

/* Bytes that an address is a multiple of, up to what the library asks for at most. A gradient may start anywhere in flat memory. */
static uint32_t alignment_of(const void *p) {
    uint32_t bytes = 256;
    while ((uintptr_t)p % bytes) {
        bytes /= 2;
    }
    return bytes;
}

/* The library is column-major: what we store as rows it reads as columns, so it is asked for C^T = op(B)^T op(A)^T. fp32 inputs
 * are multiplied as fp32, never as TF32. */
static bool make_plan(Plans *p, const Gemm &g, ProductPlan *plan) {
    size_t room = GEMM_WORKSPACE;
    uint32_t align_left = alignment_of(g.b), align_right = alignment_of(g.a), align_c = alignment_of(g.c);
    int found = 0;
    cublasLtMatmulHeuristicResult_t best = {};
    cublasLtMatmulPreference_t wish = NULL;
    cublasOperation_t left = g.tb ? CUBLAS_OP_T : CUBLAS_OP_N, right = g.ta ? CUBLAS_OP_T : CUBLAS_OP_N;
    uint64_t M = (uint64_t)g.M, N = (uint64_t)g.N, K = (uint64_t)g.K;
    bool done =
        p->MatmulDescCreate(&plan->product, CUBLAS_COMPUTE_32F, CUDA_R_32F) == CUBLAS_STATUS_SUCCESS &&
        p->MatmulDescSetAttribute(plan->product, CUBLASLT_MATMUL_DESC_TRANSA, &left, sizeof left) == CUBLAS_STATUS_SUCCESS &&
        p->MatmulDescSetAttribute(plan->product, CUBLASLT_MATMUL_DESC_TRANSB, &right, sizeof right) == CUBLAS_STATUS_SUCCESS &&
        p->MatrixLayoutCreate(&plan->a, lt_type(g.in), g.tb ? K : N, g.tb ? N : K, (int64_t)g.ldb) == CUBLAS_STATUS_SUCCESS &&
        p->MatrixLayoutCreate(&plan->b, lt_type(g.in), g.ta ? M : K, g.ta ? K : M, (int64_t)g.lda) == CUBLAS_STATUS_SUCCESS &&
        p->MatrixLayoutCreate(&plan->c, lt_type(g.out), N, M, (int64_t)g.ldc) == CUBLAS_STATUS_SUCCESS &&
        p->MatmulPreferenceCreate(&wish) == CUBLAS_STATUS_SUCCESS &&
        p->MatmulPreferenceSetAttribute(wish, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &room, sizeof room) == CUBLAS_STATUS_SUCCESS &&
        p->MatmulPreferenceSetAttribute(wish, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &align_left, 4) == CUBLAS_STATUS_SUCCESS &&
        p->MatmulPreferenceSetAttribute(wish, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &align_right, 4) == CUBLAS_STATUS_SUCCESS &&
        p->MatmulPreferenceSetAttribute(wish, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &align_c, 4) == CUBLAS_STATUS_SUCCESS &&
        p->MatmulPreferenceSetAttribute(wish, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &align_c, 4) == CUBLAS_STATUS_SUCCESS &&
        p->MatmulAlgoGetHeuristic(p->handle, plan->product, plan->a, plan->b, plan->c, plan->c, wish, 1, &best, &found) ==
            CUBLAS_STATUS_SUCCESS && found > 0;
    if (wish) {
        p->MatmulPreferenceDestroy(wish);
    }
    plan->algo = best.algo;
    return done;
}

static void gemm(Cuda *c, const Gemm &g) {
    Plans *p = (Plans *)c->plans;
    if (c->failed[0] || g.M == 0 || g.N == 0) {
        return;
    }
    PlanKey key;
    memset(&key, 0, sizeof key);
    key.M = g.M;
    key.N = g.N;
    key.K = g.K;
    key.kind = g.ta + 2 * g.tb + 4 * (g.in == DT_F32) + 8 * (g.out == DT_F32);
    key.align_a = alignment_of(g.a);
    key.align_b = alignment_of(g.b);
    key.align_c = alignment_of(g.c);
    key.lda = g.lda;
    key.ldb = g.ldb;
    key.ldc = g.ldc;
    auto it = p->plan.find(key);
    if (it == p->plan.end()) {
        ProductPlan plan = {};
        if (!make_plan(p, g, &plan)) {
            set_failed(c, "cuBLASLt has no way to multiply [%d,%d] by [%d,%d]", g.M, g.K, g.K, g.N);
            return;
        }
        it = p->plan.insert({key, plan}).first;
    }
    void *space = work(c, WORK_GEMM, GEMM_WORKSPACE);
    const ProductPlan &plan = it->second;
    cublasStatus_t status = space ? p->Matmul(p->handle, plan.product, &g.alpha, g.b, plan.a, g.a, plan.b, &g.beta, g.c, plan.c, g.c,
                                              plan.c, &plan.algo, space, GEMM_WORKSPACE, c->stream)
                                  : CUBLAS_STATUS_ALLOC_FAILED;
    if (status != CUBLAS_STATUS_SUCCESS) {
        set_failed(c, "cuBLASLt: product of [%d,%d] and [%d,%d] failed with status %d", g.M, g.K, g.K, g.N, (int)status);
    }
}

#endif

/* y[n,o] += b[o]. Grid: a block a row. Bound: memory, 2 sizeof(T) bytes a number. */
template <typename T> __global__ void add_bias_kernel(T *y, const float *b, int O) {
    T *row = y + (size_t)blockIdx.x * (size_t)O;
    for (int o = (int)threadIdx.x; o < O; o += (int)blockDim.x) {
        row[o] = narrow<T>(widen(row[o]) + b[o]);
    }
}

#include "tiles.cuh"

#include "quantised.cuh"

template <typename T> static void cuda_linear(Engine *e, Act *out, const Act *x, const Linear *w, int N) {
    RANGE();
    Cuda *c = cuda_of(e);
    const float *b = biases_of(c, w);
    size_t I = (size_t)w->in, O = (size_t)w->out;
    DType to = dtype_of(c, out, DTYPE<T>);
    if (w->format == WEIGHTS_AS_STORED) {
        const T *W = matrices_of<T>(c, w), *in = as_act<T>(c, WORK_A, x, (size_t)N * I);
        gemm(c, Gemm{N, w->out, w->in, false, true, in, W, I, I, out, O, DTYPE<T>, to, 1, 0});
    } else {
        Quantised q = quantised_copy<T>(c, w);
        const T *in = as_act<T>(c, WORK_A, x, (size_t)N * I);
        if (N <= FEW_ROWS) {
            few_rows<T>(c, out, to, in, q, b, w, N);
            return;
        }
        many_rows<T>(c, out, to, in, q, w, N);
    }
    if (b && to == DT_F32) {
        LAUNCH(c, add_bias_kernel<float>, (unsigned)N, row_threads(w->out), 0, (float *)out, b, w->out);
    } else if (b) {
        LAUNCH(c, add_bias_kernel<T>, (unsigned)N, row_threads(w->out), 0, (T *)out, b, w->out);
    }
}

template <typename T> static void cuda_linear_backward(Engine *e, Act *dx, const Act *dy, const Linear *w, int N, bool add) {
    RANGE();
    Cuda *c = cuda_of(e);
    size_t I = (size_t)w->in, O = (size_t)w->out;
    const T *W = matrices_of<T>(c, w), *d = as_act<T>(c, WORK_A, dy, (size_t)N * O);
    gemm(c, Gemm{N, w->in, w->out, false, false, d, W, O, I, dx, I, DTYPE<T>, dtype_of(c, dx, DTYPE<T>), 1, add ? 1.0f : 0.0f});
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
            gemm(c, Gemm{O, dw->in, N, true, false, d + column, in, width, I, (void *)dw->w[m].data, I, DTYPE<T>, DT_F32, 1, 1});
        }
        if (dw->b[m].data) {
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
                         DTYPE<T>, DTYPE<T>, l->scale, 1});
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
            gemm(c, Gemm{N, l->rank, O, false, false, slice, up, (size_t)w->out, R, (T *)dt + low, width, DTYPE<T>, DTYPE<T>, l->scale, 0});
            gemm(c, Gemm{O, l->rank, N, true, false, slice, (const T *)t + low, (size_t)w->out, width, (void *)dlora->up[m].data, R,
                         DTYPE<T>, DT_F32, l->scale, 1});
            low += R;
        }
        column += (size_t)O;
    }
}

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

#include "attention.cuh"

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

__device__ static inline uint32_t bits_of(float x) { return __float_as_uint(x); }

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

/* ------------------------------------------------------------------------------------------------ what it will take (--plan) */

/* As working_copy: a weight in the right format that is engine memory already is used where it is. */
static size_t cuda_copy_bytes(Engine *e, const Tensor *t, int n, DType owned, bool precise) {
    DType kept = precise ? DT_F32 : e->act_dtype;
    size_t count = 0;
    bool any = false;
    for (int i = 0; i < n; i++) {
        any = any || t[i].data;
        count += tensor_elements(&t[i]);
    }
    return !any || owned == kept ? 0 : count * dtype_size(kept);
}

/* The slots of `work` at their largest, and small host arrays on their way. */
static size_t cuda_work_bytes(Engine *e, const Config *c, int rows, bool training) {
    size_t N = (size_t)rows, V = (size_t)c->vocab_size, D = (size_t)c->hidden_size, H = (size_t)c->n_heads, G = (size_t)c->n_kv_heads;
    size_t most = LOGIT_ROWS, logits = (N < most ? N : most) * V * sizeof(bf16), upload = V * D * sizeof(bf16);
    size_t bytes = N * 8 * sizeof(int); /* tokens, positions, places, targets: staged with room to spare */
#ifndef NLA_SHIM
    bytes += GEMM_WORKSPACE;
#endif
    bytes += e->act_dtype == DT_F32 ? (upload < UPLOAD ? upload : (size_t)UPLOAD) : training ? logits : 0;
    if (training) {
        size_t chunk = (N + MOST_CHUNKS - 1) / MOST_CHUNKS, least = LEAST_CHUNK;
        chunk = chunk > least ? chunk : least; /* as sum_columns */
        size_t columns = c->qkv_bias && H * (size_t)c->head_dim > D ? H * (size_t)c->head_dim : D;
        bytes += (N + chunk - 1) / chunk * columns * sizeof(float) + N * (H + G) * sizeof(float);
    }
    return bytes;
}

/* ------------------------------------------------------------------------------------------------ the table */

template <typename T> static void fill_table(Engine *e) {
    e->embed = cuda_embed<T>;
    e->rmsnorm = cuda_rmsnorm<T>;
    e->linear = cuda_linear<T>;
    e->rope_qkv = cuda_rope_qkv<T>;
    e->attention = cuda_attention<T>;
    e->gated = cuda_gated<T>;
    e->add = cuda_add<T>;
    e->add_rmsnorm = cuda_add_rmsnorm<T>;
    e->gather = cuda_gather<T>;
    e->scatter = cuda_scatter<T>;
    e->embed_backward = cuda_embed_backward<T>;
    e->rmsnorm_backward = cuda_rmsnorm_backward<T>;
    e->linear_backward = cuda_linear_backward<T>;
    e->linear_weight_backward = cuda_linear_weight_backward<T>;
    e->lora_up = cuda_lora_up<T>;
    e->lora_up_backward = cuda_lora_up_backward<T>;
    e->rope_qkv_backward = cuda_rope_qkv_backward<T>;
    e->attention_backward = cuda_attention_backward<T>;
    e->gated_backward = cuda_gated_backward<T>;
}

static void cuda_close(Engine *e) {
    Cuda *c = cuda_of(e);
    cudaStreamSynchronize(c->stream);
    drop_step(c);
    for (auto &entry : c->copy) {
        cudaFree(entry.second.data);
    }
    for (auto &entry : c->piece) {
        cudaFree((void *)entry.first);
    }
    for (Staged &s : c->staged) {
        cudaFree(s.device);
    }
    for (void *p : c->work) {
        cudaFree(p);
    }
    gemm_close(c);
    cudaEventDestroy(c->from);
    cudaEventDestroy(c->to);
    cudaStreamDestroy(c->stream);
    delete c;
    free(e);
}

bool cuda_present(void) {
    int n = 0;
    return cudaGetDeviceCount(&n) == cudaSuccess && n > 0;
}

/* The device, its stream and its limits. */
static bool open_device(Cuda *c, DType act, Err *err) {
    int n = 0, shared = 0;
    cudaDeviceProp about;
    cudaError_t status = cudaGetDeviceCount(&n);
    if (status == cudaSuccess && n > 0) {
        status = cudaSetDevice(0);
    }
    status = status == cudaSuccess && n > 0 ? cudaGetDeviceProperties(&about, 0) : status;
    status = status == cudaSuccess && n > 0 ? cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0) : status;
    status = status == cudaSuccess && n > 0 ? cudaStreamCreateWithFlags(&c->stream, cudaStreamNonBlocking) : status;
    status = status == cudaSuccess && n > 0 ? cudaEventCreate(&c->from) : status;
    status = status == cudaSuccess && n > 0 ? cudaEventCreate(&c->to) : status;
    if (status != cudaSuccess || n == 0) {
        const char *why = n == 0 && status == cudaSuccess               ? "there is no GPU"
                          : status == (cudaError_t)cudaErrorInsufficientDriver ? "there is no NVIDIA driver, or it is too old for this build"
                                                                        : cudaGetErrorString(status);
        fail(err, "--device cuda: %s; use --device cpu", why);
        return false;
    }
    c->shared_limit = (size_t)shared;
    snprintf(c->name, sizeof c->name, "cuda %s %s", about.name, act == DT_F32 ? "fp32" : "bf16");
    return true;
}

Engine *engine_open_cuda(DType act, Err *err) {
    Cuda *c = new Cuda();
    const char *graphs = getenv("NLA_GRAPHS");
    c->staged.resize(STAGED);
    c->op_by_op = graphs && strcmp(graphs, "0") == 0;
    if (!open_device(c, act, err) || !gemm_open(c, err)) {
        delete c;
        return NULL;
    }
    Engine *e = (Engine *)xcalloc(1, sizeof *e);
    e->name = c->name;
    e->act_dtype = act;
    e->threads = 1;
    e->scratch = c;
    e->alloc = cuda_alloc;
    e->free = cuda_free;
    e->read = cuda_read;
    e->write = cuda_write;
    e->put = cuda_put;
    e->view = cuda_view;
    e->unview = cuda_unview;
    e->forget = cuda_forget;
    e->check = cuda_check;
    e->begin_step = cuda_begin_step;
    e->end_step = cuda_end_step;
    e->close = cuda_close;
    e->start = cuda_start;
    e->stop = cuda_stop;
    e->copy = cuda_copy;
    e->available = cuda_available;
    e->memory = &c->memory;
    e->copy_bytes = cuda_copy_bytes;
    e->work_bytes = cuda_work_bytes;
    e->sample = cuda_sample;
    e->zero = cuda_zero;
    e->token_logprob = cuda_token_logprob;
    e->token_logprob_backward = cuda_token_logprob_backward;
    e->sum_squares = cuda_sum_squares;
    e->adamw = cuda_adamw;
    if (act == DT_F32) {
        fill_table<float>(e);
    } else {
        fill_table<bf16>(e);
    }
    return e;
}
