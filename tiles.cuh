/* tiles.cuh - a block's tiles in shared memory for the CUDA engine, how they are loaded and multiplied: a part of kernels.cu, which includes
 * it, for attention.cuh and quantised.cuh.
 */

namespace {
enum { PAD = 8 }; /* numbers that keep a tile's rows out of step with the banks */
__host__ __device__ inline int padded(int n) { return n + PAD; }
} // namespace

template <typename T, int W, typename Source>
__device__ static inline void load_packs(T *tile, int rows, int n, int E, int width, const Source &source) {
    for (int at = (int)threadIdx.x; at < rows * (width / W); at += (int)blockDim.x) {
        int i = at / (width / W), x = at % (width / W) * W;
        Pack<T, W> p;
        for (int j = 0; j < W; j++) {
            p.x[j] = narrow<T>(0);
        }
        store<W>(tile + i * padded(width) + x, i < n && x < E ? load<W>(source(i) + x) : p);
    }
}

/* A tile of `n` rows of `E` numbers, row i at source(i), zeros to whole tiles. */
template <typename T, typename Source>
__device__ static inline void load_tile(T *tile, int rows, int n, int E, int width, const Source &source) {
    if (E % WIDE<T> == 0) {
        load_packs<T, WIDE<T>>(tile, rows, n, E, width, source);
    } else {
        load_packs<T, 1>(tile, rows, n, E, width, source);
    }
}

/* ------------------------------------------------------------------------------------------------ products of tiles
 * A block's own small products, operands in shared memory: C [M,N] (+)= op(A) op(B), M, N, K multiples of 16. C is fp32. bf16
 * operands go through the tensor cores, 16 x 16 of C to a warp at a time; fp32 ones through plain loops, the same function's plain
 * twin. Leading dimensions are multiples of 8 numbers and tiles start at 32 bytes, as wmma wants. Barriers are the caller's. */

namespace {
struct TileShape {
    int M, N, K, lda, ldb, ldc;
};
} // namespace

template <bool TA, bool TB>
__device__ static inline void tile_product(float *c, const float *a, const float *b, const TileShape &s, bool add) {
    for (int at = (int)threadIdx.x; at < s.M * s.N; at += (int)blockDim.x) {
        int m = at / s.N, n = at % s.N;
        float sum = add ? c[m * s.ldc + n] : 0.0f;
        for (int k = 0; k < s.K; k++) {
            sum += (TA ? a[k * s.lda + m] : a[m * s.lda + k]) * (TB ? b[n * s.ldb + k] : b[k * s.ldb + n]);
        }
        c[m * s.ldc + n] = sum;
    }
}

template <bool TA, bool TB>
__device__ static inline void tile_product(float *c, const bf16 *a, const bf16 *b, const TileShape &s, bool add) {
    using namespace nvcuda;
    int across = s.N / 16, tiles = s.M / 16 * across;
    for (int t = (int)threadIdx.x / WARP; t < tiles; t += (int)blockDim.x / WARP) {
        int m = t / across * 16, n = t % across * 16;
        wmma::fragment<wmma::accumulator, 16, 16, 16, float> sum;
        if (add) {
            wmma::load_matrix_sync(sum, c + m * s.ldc + n, (unsigned)s.ldc, wmma::mem_row_major);
        } else {
            wmma::fill_fragment(sum, 0.0f);
        }
        for (int k = 0; k < s.K; k += 16) {
            wmma::fragment<wmma::matrix_a, 16, 16, 16, bf16, typename std::conditional<TA, wmma::col_major, wmma::row_major>::type> x;
            wmma::fragment<wmma::matrix_b, 16, 16, 16, bf16, typename std::conditional<TB, wmma::col_major, wmma::row_major>::type> y;
            wmma::load_matrix_sync(x, TA ? a + k * s.lda + m : a + m * s.lda + k, (unsigned)s.lda);
            wmma::load_matrix_sync(y, TB ? b + n * s.ldb + k : b + k * s.ldb + n, (unsigned)s.ldb);
            wmma::mma_sync(sum, x, y, sum);
        }
        wmma::store_matrix_sync(c + m * s.ldc + n, sum, (unsigned)s.ldc, wmma::mem_row_major);
    }
}
