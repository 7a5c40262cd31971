/* cuda_shim.h - CUDA without a GPU: enough of the language and the runtime for kernels.cu to be compiled as C++ and run on the CPU.
 *
 * Blocks run one after another. The threads of a block are fibers that run one at a time, each until it meets a barrier or an
 * exchange within its warp, in an order that shim_order chooses: results must not depend on it. What is checked on the way:
 *   a barrier at which not all threads of the block arrive, or not all at the same one; a block that waits for itself;
 *   reads of what was never written: shared memory is filled with NaN before each block, device memory when it is allocated;
 *   writes and reads out of bounds: guard pages behind every buffer and behind dynamic shared memory, red zones elsewhere;
 *   device memory touched by the host (shim_protect), accesses that are not aligned (the compiler's -fsanitize=alignment).
 * A finding prints one line that names kernel, block and thread, and aborts.
 */
#ifndef CUDA_SHIM_H
#define CUDA_SHIM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

void shim_order(uint64_t seed);               /* of a block's threads from now on; 0: first to last */
void shim_protect(bool on);                   /* device memory cannot be touched but by kernels and copies */
void shim_limit_shared(size_t bytes);         /* what the device says a block can have; 0: as an H100 */
void shim_fail_after(int64_t allocations);    /* device allocations fail after so many more; -1: never */
size_t shim_launches(const char *kernel);     /* of kernels whose name starts so */
size_t shim_buffers(void);                    /* device allocations that have not been freed */
void shim_refuse_pinned(bool on);             /* pinned memory of the host cannot be had */
size_t shim_pinned(void);                     /* pieces of it that have not been freed */

#ifdef __cplusplus
}

#include <math.h>
#include <string.h>

#include <functional>
#include <tuple>
#include <type_traits>

/* ------------------------------------------------------------------------------------------------ the language */

#define __global__
#define __device__
#define __host__

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
extern dim3 threadIdx, blockIdx, blockDim, gridDim; /* of the fiber that runs */

void *shim_shared(const void *site, size_t bytes); /* the block's array of that declaration */
char *shim_dynamic(void);
#define SHARED(type, name, count)                                                                                                \
    static char name##_site;                                                                                                     \
    type *name = (type *)shim_shared(&name##_site, sizeof(type) * (size_t)(count))
#define SHARED_DYNAMIC(name) char *name = shim_dynamic()

void shim_barrier(int line);
void shim_warp_barrier(int line);
/* Gives a lane's value to its warp; what all lanes gave, `stride` bytes apart. */
const char *shim_exchange(const void *value, size_t bytes, int line);
enum { SHIM_VALUE = 16 };

#define __syncthreads() shim_barrier(__LINE__)
#define __syncwarp() shim_warp_barrier(__LINE__)
#define __shfl_xor_sync(mask, value, lanes) shim_shuffle_xor(mask, value, lanes, __LINE__)

template <typename T> static inline T shim_shuffle_xor(unsigned mask, T value, int lanes, int line) {
    static_assert(sizeof(T) <= SHIM_VALUE, "a larger value is exchanged than the shim has room for");
    (void)mask;
    T other;
    const char *all = shim_exchange(&value, sizeof value, line);
    memcpy(&other, all + ((threadIdx.x % 32) ^ (unsigned)lanes) * SHIM_VALUE, sizeof other);
    return other;
}

/* ------------------------------------------------------------------------------------------------ numbers */

extern "C" {
float bf16_to_f32(uint16_t bits);
uint16_t f32_to_bf16(float value);
float f16_to_f32(uint16_t bits);
}

struct __nv_bfloat16 {
    uint16_t bits;
};
struct __half {
    uint16_t bits;
};
static inline float __bfloat162float(__nv_bfloat16 x) {
    uint32_t wide = (uint32_t)x.bits << 16;
    float f;
    memcpy(&f, &wide, sizeof f);
    return f;
}
static inline __nv_bfloat16 __float2bfloat16(float x) { return __nv_bfloat16{f32_to_bf16(x)}; }
static inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return __nv_bfloat16{bits}; }
static inline float __half2float(__half x) { return f16_to_f32(x.bits); }
static inline uint32_t __float_as_uint(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
static inline float __uint_as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* ------------------------------------------------------------------------------------------------ tensor cores
 * The 16 x 16 x 16 products of nvcuda::wmma, bf16 in and fp32 out. A lane keeps what it needs for 8 numbers of the result: row
 * lane / 2, columns lane % 2 * 8 on. */

void shim_check_tile(const void *p, unsigned ld, unsigned multiple); /* alignment, as the hardware wants it */

namespace nvcuda {
namespace wmma {
struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major, mem_col_major };

template <typename Use, int M, int N, int K, typename T, typename Layout = void> struct fragment;
template <typename Layout> struct fragment<matrix_a, 16, 16, 16, __nv_bfloat16, Layout> {
    float x[16];
};
template <typename Layout> struct fragment<matrix_b, 16, 16, 16, __nv_bfloat16, Layout> {
    float x[16][8];
};
template <> struct fragment<accumulator, 16, 16, 16, float, void> {
    float x[8];
};
typedef fragment<accumulator, 16, 16, 16, float, void> Sums;

static inline unsigned tile_row(void) { return threadIdx.x % 32 / 2; }
static inline unsigned tile_column(void) { return threadIdx.x % 2 * 8; }

template <typename Layout>
static inline void load_matrix_sync(fragment<matrix_a, 16, 16, 16, __nv_bfloat16, Layout> &f, const __nv_bfloat16 *p, unsigned ld) {
    shim_check_tile(p, ld, 8);
    for (unsigned k = 0; k < 16; k++) {
        f.x[k] = __bfloat162float(p[std::is_same<Layout, row_major>::value ? tile_row() * ld + k : k * ld + tile_row()]);
    }
}
template <typename Layout>
static inline void load_matrix_sync(fragment<matrix_b, 16, 16, 16, __nv_bfloat16, Layout> &f, const __nv_bfloat16 *p, unsigned ld) {
    shim_check_tile(p, ld, 8);
    for (unsigned k = 0; k < 16; k++) {
        for (unsigned j = 0; j < 8; j++) {
            unsigned n = tile_column() + j;
            f.x[k][j] = __bfloat162float(p[std::is_same<Layout, row_major>::value ? k * ld + n : n * ld + k]);
        }
    }
}
static inline void load_matrix_sync(Sums &f, const float *p, unsigned ld, layout_t) {
    shim_check_tile(p, ld, 4);
    for (unsigned j = 0; j < 8; j++) {
        f.x[j] = p[tile_row() * ld + tile_column() + j];
    }
}
static inline void store_matrix_sync(float *p, const Sums &f, unsigned ld, layout_t) {
    shim_check_tile(p, ld, 4);
    for (unsigned j = 0; j < 8; j++) {
        p[tile_row() * ld + tile_column() + j] = f.x[j];
    }
}
static inline void fill_fragment(Sums &f, float value) {
    for (float &x : f.x) {
        x = value;
    }
}
template <typename A, typename B>
static inline void mma_sync(Sums &d, const fragment<matrix_a, 16, 16, 16, __nv_bfloat16, A> &a,
                            const fragment<matrix_b, 16, 16, 16, __nv_bfloat16, B> &b, const Sums &c) {
    for (unsigned j = 0; j < 8; j++) {
        float sum = 0;
        for (unsigned k = 0; k < 16; k++) {
            sum += a.x[k] * b.x[k][j];
        }
        d.x[j] = c.x[j] + sum;
    }
}
} // namespace wmma
} // namespace nvcuda

/* ------------------------------------------------------------------------------------------------ launching */

void shim_run(const char *name, dim3 grid, dim3 block, size_t shared, void (*thread)(void *), void *context);
void shim_begin(const char *name); /* what stands for a library's kernel may touch device memory until shim_end */
void shim_end(void);

/* Work for the stream: done at once, or, while a graph is recorded, kept with its arguments as they are now and done whenever the graph is
 * launched: an argument that has gone stale by then is used as it was. */
void shim_do(const std::function<void()> &work);

template <typename Loops> static inline void shim_library(const char *name, Loops loops) {
    shim_do([name, loops] {
        shim_begin(name);
        loops();
        shim_end();
    });
}

template <typename Kernel, typename... Given>
static inline void shim_launch(const char *name, dim3 grid, dim3 block, size_t shared, Kernel kernel, Given... given) {
    auto all = std::make_tuple(kernel, given...);
    shim_do([name, grid, block, shared, all]() mutable {
        shim_run(
            name, grid, block, shared,
            [](void *context) {
                std::apply([](auto k, auto... arguments) { k(arguments...); }, *(decltype(all) *)context);
            },
            &all);
    });
}
#define LAUNCH_NAME(kernel) const char *shim_kernel_name = #kernel
#define LAUNCH_KERNEL(kernel, grid, block, shared, stream, ...)                                                                  \
    ((void)(stream), shim_launch(shim_kernel_name, grid, block, shared, kernel, __VA_ARGS__))

/* ------------------------------------------------------------------------------------------------ the runtime */

enum cudaError_t { cudaSuccess = 0, cudaErrorMemoryAllocation = 2, cudaErrorInvalidValue = 1, cudaErrorInsufficientDriver = 35 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2, cudaMemcpyDeviceToDevice = 3 };
enum { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaStreamNonBlocking };
typedef struct ShimStream *cudaStream_t;
struct cudaEvent_t { /* when it was recorded, and behind how many copies from pinned memory */
    double seconds;
    size_t copies;
};
struct cudaDeviceProp {
    char name[256];
};

cudaError_t cudaMalloc(void **p, size_t bytes);
cudaError_t cudaFree(void *p);
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream);
/* Pinned memory. A copy out of it is done as late as it may be: when an event behind it is waited for, or when the device does anything
 * else. What the host writes there meanwhile is what arrives. */
enum { cudaHostAllocDefault = 0, cudaEventDisableTiming = 2 };
cudaError_t cudaHostAlloc(void **p, size_t bytes, unsigned flags);
cudaError_t cudaFreeHost(void *p);
cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t stream);
cudaError_t cudaFuncSetAttribute(const void *kernel, int attribute, int value);
cudaError_t cudaDeviceGetAttribute(int *value, int attribute, int device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *about, int device);
const char *cudaGetErrorString(cudaError_t error);
static inline cudaError_t cudaGetLastError(void) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
static inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, int) { return *stream = NULL, cudaSuccess; }
static inline cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaGetDeviceCount(int *n); /* one when the environment has NLA_SHIM, so that nothing runs on it unasked; NLA_SHIM=protect: shim_protect too */
cudaError_t cudaMemGetInfo(size_t *available, size_t *total);
static inline cudaError_t cudaEventCreate(cudaEvent_t *event) { return *event = cudaEvent_t{0, 0}, cudaSuccess; }
static inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned) { return cudaEventCreate(event); }
static inline cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t shim_record(cudaEvent_t *event);
#define cudaEventRecord(event, stream) ((void)(stream), shim_record(&(event)))
static inline cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t from, cudaEvent_t to) {
    return *milliseconds = (float)((to.seconds - from.seconds) * 1e3), cudaSuccess;
}
static inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }

enum cudaStreamCaptureMode { cudaStreamCaptureModeRelaxed = 2 };
typedef struct ShimGraph *cudaGraph_t;
typedef struct ShimGraph *cudaGraphExec_t;
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *made, cudaGraph_t graph, unsigned long long flags);
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph);

#endif /* __cplusplus */
#endif
