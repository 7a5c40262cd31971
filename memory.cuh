/* memory.cuh - what the CUDA engine keeps on the GPU and how it gets there: pieces, working memory, small arrays of the host, steps of
 * decoding as CUDA graphs; how kernels are launched and failures kept. A part of kernels.cu, which includes it.
 */

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

/* Pinned memory of the host that weights go through: one buffer is filled while a copy leaves the other. */
struct Upload {
    void *buffer[2];     /* [UPLOAD]; NULL: not there now */
    cudaEvent_t left[2]; /* the last copy out of each */
    int next;            /* to be filled */
    bool refused;        /* there was no such memory: plain copies */
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
    Upload upload;
    cudaEvent_t from, to; /* of a measurement */
    size_t shared_limit; /* bytes of shared memory that a block can have */
    void *plans; /* of matrix products: cuBLASLt's */
    char name[300];
    char failed[600]; /* the first failure; ops do nothing from then on */
};

enum { STAGED = 48, GEMM_WORKSPACE = 32 << 20 };
#ifdef NLA_SHIM
enum : size_t { UPLOAD = 16 << 10 }; /* small: so that the tests' weights, too, come in several parts */
#else
enum : size_t { UPLOAD = 64 << 20 }; /* bytes of a weight that are on their way at once */
#endif

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
    if (!c->failed[0] && bytes) { /* from memory that is not pinned: the host's bytes have been taken when this returns */
        good(c, cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, c->stream), "copy to the device");
    }
}

static void close_upload(Cuda *c) {
    Upload *u = &c->upload;
    for (int i = 0; i < 2; i++) {
        if (u->buffer[i]) {
            good(c, cudaEventSynchronize(u->left[i]), "wait for a copy");
            cudaFreeHost(u->buffer[i]);
            u->buffer[i] = NULL;
        }
    }
}

static bool open_upload(Cuda *c) {
    Upload *u = &c->upload;
    for (int i = 0; i < 2 && !u->refused; i++) {
        u->refused = !u->buffer[i] && cudaHostAlloc(&u->buffer[i], UPLOAD, cudaHostAllocDefault) != cudaSuccess;
    }
    if (u->refused) {
        (void)cudaGetLastError();
        close_upload(c);
    }
    return !u->refused;
}

/* A weight's bytes from the host: while a copy leaves one buffer, the next of them are read (from the mapped file) into the other. The
 * buffers are freed by `check`, at the end of the pass whose ops used the weights first. */
static void copy_in_weights(Cuda *c, void *device, const void *host, size_t bytes) {
    Upload *u = &c->upload;
    if (c->failed[0] || !open_upload(c)) {
        copy_in(c, device, host, bytes);
        return;
    }
    for (size_t at = 0; at < bytes && good(c, cudaEventSynchronize(u->left[u->next]), "wait for a copy"); at += UPLOAD) {
        size_t n = bytes - at < UPLOAD ? bytes - at : (size_t)UPLOAD;
        memcpy(u->buffer[u->next], (const char *)host + at, n);
        copy_in(c, (char *)device + at, u->buffer[u->next], n);
        good(c, cudaEventRecord(u->left[u->next], c->stream), "a copy");
        u->next = 1 - u->next;
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
    close_upload(c);
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
