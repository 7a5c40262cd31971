/* kernels.cu - every op of the table in CUDA: the GPU's engine, same names and contracts as cpu.c and cpu_backward.c.
 *
 * Activations are T: float (for diffing) or bf16 (storage only: every sum, softmax, norm and loss is fp32). Weights are kept on
 * the GPU as working copies in T, made where a weight is first used; norms' weights as fp32.
 *
 * What must stay true: every sum has one fixed order. There are no atomics: work is divided by outputs, and long sums go through
 * chunks whose borders depend on sizes alone. Same seed, same GPU, same library: same bits.
 *
 * It is one file in parts, each a subject, in this order:
 *   kernels.cu     number formats and sums; at the end what it will take (--plan), the table, opening and closing
 *   memory.cuh     the engine's memory, launching, small arrays of the host, recorded steps
 *   weights.cuh    working copies of weights
 *   gemm.cuh       large products: cuBLASLt     tiles.cuh  a block's own small ones     quantised.cuh  weights of one byte
 *   linear.cuh     stacks of matrices, adapters, sums over rows
 *   rows.cuh       embedding, norms, gates      rope.cuh   splitting and rotating q, k, v
 *   attention.cuh  losses.cuh  sampling.cuh  optimizer.cuh
 *
 * tests/cuda_shim.h compiles all of it as plain C++ and runs its blocks on the CPU (NLA_SHIM): kernels are launched through LAUNCH, and
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
__device__ static inline uint32_t bits_of(float x) { return __float_as_uint(x); }

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

#include "memory.cuh"
#include "weights.cuh"
#include "gemm.cuh"
#include "tiles.cuh"
#include "quantised.cuh"
#include "linear.cuh"
#include "rows.cuh"
#include "rope.cuh"
#include "attention.cuh"
#include "losses.cuh"
#include "sampling.cuh"
#include "optimizer.cuh"

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
    e->mse_nrm = cuda_mse_nrm<T>;
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
    close_upload(c);
    cudaEventDestroy(c->upload.left[0]);
    cudaEventDestroy(c->upload.left[1]);
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
    for (cudaEvent_t &left : c->upload.left) {
        status = status == cudaSuccess && n > 0 ? cudaEventCreateWithFlags(&left, cudaEventDisableTiming) : status;
    }
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
    e->upload_bytes = 2 * UPLOAD;
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
