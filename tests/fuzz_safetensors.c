/* fuzz_safetensors.c - any bytes are a .safetensors file or one error line; every tensor lies inside the file. */
#define _GNU_SOURCE /* memfd_create */
#include "../nla.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <stb/stb_ds.h>

static void require(bool claim) {
    if (!claim) abort();
}

static void check_tensor(const Safetensors *st, const Tensor *t) {
    const char *start = t->data, *file = st->file[0].data;
    require(safetensors_find(st, t->name) == t);
    require(start >= file + 8 && start + t->bytes <= file + st->file[0].len);
    require(t->n_dims >= 0 && t->n_dims <= MAX_DIMS);
    size_t bytes = dtype_size(t->dtype);
    if (!bytes) return;
    require(t->bytes == 0 || (uintptr_t)start % bytes == 0);
    for (int i = 0; i < t->n_dims; i++) bytes *= (size_t)t->shape[i];
    require(bytes == t->bytes);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static int fd = -1;
    static char path[64];
    if (fd < 0) {
        fd = memfd_create("fuzz", MFD_CLOEXEC);
        snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    }
    require(fd >= 0 && !ftruncate(fd, 0) && pwrite(fd, data, size, 0) == (ssize_t)size);
    Safetensors st;
    Err err = {0};
    if (safetensors_open(&st, path, &err)) {
        require(err.msg[0] && !strchr(err.msg, '\n'));
        return 0;
    }
    for (int i = 0; i < arrlen(st.tensor); i++) check_tensor(&st, &st.tensor[i]);
    safetensors_close(&st);
    return 0;
}
