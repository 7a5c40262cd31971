/* weights.cuh - working copies of weights for the CUDA engine, made at first use and dropped or renewed when their source changes: a part
 * of kernels.cu, which includes it behind memory.cuh.
 */

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

/* A tensor's numbers as T, from where the host or the engine has them. */
template <typename T> static void fill_copy(Cuda *c, T *out, const Tensor *t, size_t count) {
    const char *start;
    Piece piece;
    size_t size = dtype_size(t->dtype);
    if (find_piece(c, t->data, &start, &piece)) {
        convert<T>(c, out, t->data, t->dtype, count);
    } else if (t->dtype == DTYPE<T>) {
        copy_in_weights(c, out, t->data, count * size);
    } else {
        size_t step = UPLOAD / size;
        for (size_t at = 0; at < count && !c->failed[0]; at += step) {
            size_t n = count - at < step ? count - at : step;
            void *stored = work(c, WORK_A, n * size);
            copy_in_weights(c, stored, (const char *)t->data + at * size, n * size);
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

/* A stack of matrices as one [out, in]; its biases as one [out] (NULL: none has any); one matrix; a norm's weights, always fp32. */
template <typename T> static const T *matrices_of(Cuda *c, const Linear *w) {
    size_t counts[3];
    for (int i = 0; i < w->n; i++) {
        counts[i] = (size_t)w->w[i].shape[0] * (size_t)w->in;
    }
    return working_copy<T>(c, w->w, w->n, counts);
}

template <typename T> static const T *biases_of(Cuda *c, const Linear *w) {
    size_t counts[3];
    bool any = false;
    for (int i = 0; i < w->n; i++) {
        counts[i] = (size_t)w->w[i].shape[0];
        any = any || w->b[i].data;
    }
    return any ? working_copy<T>(c, w->b, w->n, counts) : NULL;
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
