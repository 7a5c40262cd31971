/* gemm.cuh - the CUDA engine's large matrix products, with a bias or without, by cuBLASLt; in the shim by a plain loop. A part of
 * kernels.cu, which includes it behind weights.cuh.
 */

/* ------------------------------------------------------------------------------------------------ matrix products
 * C [M,N] = alpha op(A) op(B) + beta C + bias, everything row-major: A is [M,K], or stored [K,M] when `ta`; B is [K,N], or stored
 * [N,K] when `tb`; bias [N] is added to every row. A and B hold T, C and bias float or T; sums are fp32, and so is the bias added, before
 * C is rounded. On the GPU cuBLASLt does it, in the shim a plain loop. */

namespace {
struct Gemm {
    int M, N, K;
    bool ta, tb;
    const void *a, *b;
    size_t lda, ldb; /* row strides of what is stored */
    void *c;
    size_t ldc;
    DType in, out; /* of A and B; of C and the bias */
    float alpha, beta;
    const void *bias; /* NULL: none */
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
            sum = g.alpha * sum + (g.beta != 0 ? g.beta * shim_number(g.c, g.out, at) : 0) + (g.bias ? shim_number(g.bias, g.out, n) : 0);
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

/* As if the library had no way for odd widths, so that what is done then runs in the tests too. */
static bool gemm_takes_bias(Cuda *c, const Gemm &g) { return (void)c, g.N % 2 == 0; }

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
    uint32_t align_a, align_b, align_c, align_bias;
    size_t lda, ldb, ldc;
    bool operator<(const PlanKey &o) const { return memcmp(this, &o, sizeof o) < 0; }
};

struct ProductPlan {
    bool found; /* false: the library has no way */
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
        const cublasLtMatrixLayout_t layout[] = {entry.second.a, entry.second.b, entry.second.c};
        for (cublasLtMatrixLayout_t x : layout) {
            if (x) {
                p->MatrixLayoutDestroy(x);
            }
        }
        if (entry.second.product) {
            p->MatmulDescDestroy(entry.second.product);
        }
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

/* The library is column-major: what we store as rows it reads as columns, so it is asked for C^T = op(B)^T op(A)^T, and our N is its
 * rows, along which its epilogue adds a bias of C's format. fp32 inputs are multiplied as fp32, never as TF32. */
static bool make_plan(Plans *p, const Gemm &g, ProductPlan *plan) {
    size_t room = GEMM_WORKSPACE;
    uint32_t align_left = alignment_of(g.b), align_right = alignment_of(g.a), align_c = alignment_of(g.c);
    int found = 0;
    cublasLtMatmulHeuristicResult_t best = {};
    cublasLtMatmulPreference_t wish = NULL;
    cublasLtEpilogue_t epilogue = g.bias ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT;
    cublasOperation_t left = g.tb ? CUBLAS_OP_T : CUBLAS_OP_N, right = g.ta ? CUBLAS_OP_T : CUBLAS_OP_N;
    uint64_t M = (uint64_t)g.M, N = (uint64_t)g.N, K = (uint64_t)g.K;
    bool done =
        p->MatmulDescCreate(&plan->product, CUBLAS_COMPUTE_32F, CUDA_R_32F) == CUBLAS_STATUS_SUCCESS &&
        p->MatmulDescSetAttribute(plan->product, CUBLASLT_MATMUL_DESC_TRANSA, &left, sizeof left) == CUBLAS_STATUS_SUCCESS &&
        p->MatmulDescSetAttribute(plan->product, CUBLASLT_MATMUL_DESC_TRANSB, &right, sizeof right) == CUBLAS_STATUS_SUCCESS &&
        p->MatmulDescSetAttribute(plan->product, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue) == CUBLAS_STATUS_SUCCESS &&
        (!g.bias || p->MatmulDescSetAttribute(plan->product, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &g.bias, sizeof g.bias) == CUBLAS_STATUS_SUCCESS) &&
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

/* The plan of products of this shape, made at the first. The address of the bias is not part of it, only its alignment. */
static const ProductPlan &plan_of(Plans *p, const Gemm &g) {
    PlanKey key;
    memset(&key, 0, sizeof key);
    key.M = g.M;
    key.N = g.N;
    key.K = g.K;
    key.kind = g.ta + 2 * g.tb + 4 * (g.in == DT_F32) + 8 * (g.out == DT_F32) + 16 * (g.bias != NULL);
    key.align_a = alignment_of(g.a);
    key.align_b = alignment_of(g.b);
    key.align_c = alignment_of(g.c);
    key.align_bias = g.bias ? alignment_of(g.bias) : 0;
    key.lda = g.lda;
    key.ldb = g.ldb;
    key.ldc = g.ldc;
    auto it = p->plan.find(key);
    if (it == p->plan.end()) {
        ProductPlan plan = {};
        plan.found = make_plan(p, g, &plan);
        it = p->plan.insert({key, plan}).first;
    }
    return it->second;
}

static bool gemm_takes_bias(Cuda *c, const Gemm &g) { return g.M == 0 || g.N == 0 || plan_of((Plans *)c->plans, g).found; }

static void gemm(Cuda *c, const Gemm &g) {
    Plans *p = (Plans *)c->plans;
    if (c->failed[0] || g.M == 0 || g.N == 0) {
        return;
    }
    const ProductPlan &plan = plan_of(p, g);
    if (!plan.found) {
        set_failed(c, "cuBLASLt has no way to multiply [%d,%d] by [%d,%d]", g.M, g.K, g.K, g.N);
        return;
    }
    if (g.bias) { /* plans of one shape are used for many biases */
        p->MatmulDescSetAttribute(plan.product, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &g.bias, sizeof g.bias);
    }
    void *space = work(c, WORK_GEMM, GEMM_WORKSPACE);
    cublasStatus_t status = space ? p->Matmul(p->handle, plan.product, &g.alpha, g.b, plan.a, g.a, plan.b, &g.beta, g.c, plan.c, g.c,
                                              plan.c, &plan.algo, space, GEMM_WORKSPACE, c->stream)
                                  : CUBLAS_STATUS_ALLOC_FAILED;
    if (status != CUBLAS_STATUS_SUCCESS) {
        set_failed(c, "cuBLASLt: product of [%d,%d] and [%d,%d] failed with status %d", g.M, g.K, g.K, g.N, (int)status);
    }
}

#endif

/* y[n,o] += b[o], rows ld apart. Grid: a block a row. Bound: memory, 2 sizeof(Y) bytes a number. */
template <typename Y, typename T> __global__ void add_bias_kernel(Y *y, const T *b, int O, size_t ld) {
    Y *row = y + (size_t)blockIdx.x * ld;
    for (int o = (int)threadIdx.x; o < O; o += (int)blockDim.x) {
        row[o] = narrow<Y>(widen(row[o]) + widen(b[o]));
    }
}

/* gemm with a bias of T's (NULL: none): as the library writes C where it can, else by a kernel behind it. It cannot where C is fp32 and T is
 * bf16, as it takes a bias of C's format alone (such products are logits, to which no family adds any), or where it has no such product. */
template <typename T> static void gemm_and_bias(Cuda *c, Gemm g, const T *b) {
    g.bias = g.out == DTYPE<T> ? b : NULL;
    if (g.bias && !gemm_takes_bias(c, g)) {
        g.bias = NULL;
    }
    gemm(c, g);
    bool behind = b && !g.bias;
    if (behind && g.out == DT_F32) {
        LAUNCH(c, (add_bias_kernel<float, T>), (unsigned)g.M, row_threads(g.N), 0, (float *)g.c, b, g.N, g.ldc);
    } else if (behind) {
        LAUNCH(c, (add_bias_kernel<T, T>), (unsigned)g.M, row_threads(g.N), 0, (T *)g.c, b, g.N, g.ldc);
    }
}
