/* cuda_shim.cpp - the fibers, the memory and the checks of cuda_shim.h. */
#include "cuda_shim.h"

#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#ifndef __x86_64__
#include <ucontext.h>
#endif

#include <map>
#include <string>
#include <vector>

dim3 threadIdx, blockIdx, blockDim, gridDim;

static const char *running = ""; /* the kernel's name */

__attribute__((noreturn, format(printf, 1, 2))) static void found(const char *format, ...) {
    va_list args;
    va_start(args, format);
    fprintf(stderr, "cuda shim: %s, block (%u,%u), thread %u: ", running, blockIdx.x, blockIdx.y, threadIdx.x);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    abort();
}

static std::map<std::string, size_t> &launches(void) {
    static std::map<std::string, size_t> all;
    return all;
}

/* ------------------------------------------------------------------------------------------------ guarded memory */

enum : size_t { PAGE = 4096, RED = 64 }; /* RED: bytes beside an array that nobody may write */
enum { POISON = 0xff, CANARY = 0xa5 };

namespace {
/* Pages between two guard pages; what is used ends at the second one, but for what alignment takes. */
struct Region {
    char *map, *data;
    size_t map_bytes, bytes, room; /* room: bytes rounded up to the alignment */
};
} // namespace

static Region region_new(size_t bytes, size_t align) {
    Region r;
    r.bytes = bytes;
    r.room = (bytes + align - 1) / align * align;
    size_t pages = (r.room + RED + PAGE - 1) / PAGE;
    r.map_bytes = (pages + 2) * PAGE;
    void *map = mmap(NULL, r.map_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (map == MAP_FAILED || mprotect((char *)map + PAGE, pages * PAGE, PROT_READ | PROT_WRITE) != 0) {
        perror("cuda shim: mmap");
        abort();
    }
    r.map = (char *)map;
    r.data = r.map + (pages + 1) * PAGE - r.room;
    memset(r.data, POISON, bytes);
    memset(r.data + bytes, CANARY, r.room - bytes);
    memset(r.data - RED, CANARY, RED);
    return r;
}

static void check_bytes(const char *p, size_t n, const char *where, const Region &r) {
    for (size_t i = 0; i < n; i++) {
        if ((unsigned char)p[i] != CANARY) {
            found("wrote %s a buffer of %zu bytes, at offset %td", where, r.bytes, p + i - r.data);
        }
    }
}

static void region_check(const Region &r) {
    check_bytes(r.data - RED, RED, "before", r);
    check_bytes(r.data + r.bytes, r.room - r.bytes, "behind", r);
}

/* ------------------------------------------------------------------------------------------------ pinned memory */

namespace {
struct PinnedCopy {
    void *to;
    const void *from;
    size_t bytes;
};
} // namespace

static std::map<char *, Region> &pinned(void) {
    static std::map<char *, Region> all;
    return all;
}
static std::vector<PinnedCopy> on_their_way; /* from the first_waiting'th on */
static size_t first_waiting;
static bool refuse_pinned;

static void open_buffers(void);
static void close_buffers(void);

void shim_refuse_pinned(bool on) { refuse_pinned = on; }
size_t shim_pinned(void) { return pinned().size(); }

/* The first `copies` of all copies out of pinned memory are done now, in their order. */
static void finish_copies(size_t copies) {
    for (; first_waiting < copies; first_waiting++) {
        PinnedCopy &c = on_their_way[first_waiting];
        open_buffers();
        memcpy(c.to, c.from, c.bytes);
        close_buffers();
    }
}

static void finish_all_copies(void) { finish_copies(on_their_way.size()); }

cudaError_t cudaHostAlloc(void **p, size_t bytes, unsigned flags) {
    (void)flags;
    if (refuse_pinned) {
        return cudaErrorMemoryAllocation;
    }
    Region r = region_new(bytes, 16);
    pinned()[r.data] = r;
    *p = r.data;
    return cudaSuccess;
}

cudaError_t cudaFreeHost(void *p) {
    auto it = pinned().find((char *)p);
    running = "cudaFreeHost";
    if (it == pinned().end()) {
        found("%p is no pinned memory", p);
    }
    for (size_t i = first_waiting; i < on_their_way.size(); i++) {
        const char *from = (const char *)on_their_way[i].from;
        if (from >= it->second.data && from < it->second.data + it->second.bytes) {
            found("a copy out of it has not left yet");
        }
    }
    region_check(it->second);
    munmap(it->second.map, it->second.map_bytes);
    pinned().erase(it);
    return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    finish_copies(event.copies);
    return cudaSuccess;
}

/* Whether memory is pinned; all of it must be then. */
static bool is_pinned(const void *p, size_t bytes) {
    auto it = pinned().upper_bound((char *)p);
    if (it == pinned().begin() || (const char *)p >= (--it)->second.data + it->second.bytes) {
        return false;
    }
    if ((const char *)p + bytes > it->second.data + it->second.bytes) {
        found("%zu bytes at %p are not inside one piece of pinned memory", bytes, p);
    }
    return true;
}

/* ------------------------------------------------------------------------------------------------ graphs */

struct ShimGraph {
    std::vector<std::function<void()>> work;
};

static ShimGraph *recorded; /* NULL: work is done at once */

void shim_do(const std::function<void()> &work) {
    if (recorded) {
        recorded->work.push_back(work);
    } else {
        finish_all_copies();
        work();
    }
}

static void not_while_recording(const char *call) {
    if (recorded) {
        running = call;
        found("called while a graph is recorded");
    }
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
    (void)stream, (void)mode;
    not_while_recording("cudaStreamBeginCapture");
    recorded = new ShimGraph();
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    (void)stream;
    *graph = recorded;
    recorded = NULL;
    return *graph ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *made, cudaGraph_t graph, unsigned long long flags) {
    (void)flags;
    *made = new ShimGraph(*graph);
    return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
    (void)stream;
    not_while_recording("cudaGraphLaunch");
    launches()["graph"]++;
    finish_all_copies();
    for (const std::function<void()> &work : graph->work) {
        work();
    }
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete graph, cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) { return delete graph, cudaSuccess; }

/* ------------------------------------------------------------------------------------------------ device memory */

static std::map<char *, Region> &buffers(void) {
    static std::map<char *, Region> all;
    return all;
}

static bool protect_buffers;
static int open_depth; /* kernels and copies under way */
static int64_t allocations_left = -1;

static void set_access(int access) {
    for (auto &b : buffers()) {
        mprotect(b.second.map + PAGE, b.second.map_bytes - 2 * PAGE, access);
    }
}

static void open_buffers(void) {
    if (open_depth++ == 0 && protect_buffers) {
        set_access(PROT_READ | PROT_WRITE);
    }
}

static void close_buffers(void) {
    if (--open_depth == 0 && protect_buffers) {
        set_access(PROT_NONE);
    }
}

void shim_protect(bool on) {
    protect_buffers = on;
    set_access(on ? PROT_NONE : PROT_READ | PROT_WRITE);
}

void shim_fail_after(int64_t allocations) { allocations_left = allocations; }
size_t shim_buffers(void) { return buffers().size(); }

/* What a wrong address was near, before the signal ends the program. */
static void on_fault(int sig, siginfo_t *info, void *context) {
    (void)context;
    char *at = (char *)info->si_addr;
    signal(sig, SIG_DFL);
    if (sig == SIGILL) {
        found("undefined behaviour (-fsanitize): an access that is not aligned, or out of an array's bounds");
    }
    for (auto &b : buffers()) {
        const Region &r = b.second;
        if (at >= r.map && at < r.map + r.map_bytes) {
            bool inside = at >= r.data && at < r.data + r.bytes;
            found(inside ? "the host touched device memory of %zu bytes at offset %td" : "out of bounds of a buffer of %zu bytes, at offset %td",
                  r.bytes, at - r.data);
        }
    }
    found("touched %p, which is no device buffer", (void *)at);
}

static void watch_faults(void) {
    static bool watching;
    if (!watching) {
        struct sigaction action;
        memset(&action, 0, sizeof action);
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_NODEFER;
        sigaction(SIGSEGV, &action, NULL);
        sigaction(SIGILL, &action, NULL); /* what -fsanitize-undefined-trap-on-error makes */
        watching = true;
    }
}

cudaError_t cudaMalloc(void **p, size_t bytes) {
    watch_faults();
    if (allocations_left == 0 || bytes > (size_t)1 << 40) {
        return cudaErrorMemoryAllocation;
    }
    allocations_left -= allocations_left > 0;
    Region r = region_new(bytes, 16);
    buffers()[r.data] = r;
    if (protect_buffers && open_depth == 0) {
        mprotect(r.map + PAGE, r.map_bytes - 2 * PAGE, PROT_NONE);
    }
    *p = r.data;
    return cudaSuccess;
}

cudaError_t cudaFree(void *p) {
    if (p) {
        not_while_recording("cudaFree");
        finish_all_copies();
    }
    auto it = buffers().find((char *)p);
    if (p && it == buffers().end()) {
        running = "cudaFree";
        found("%p is no device buffer", p);
    }
    if (p) {
        munmap(it->second.map, it->second.map_bytes);
        buffers().erase(it);
    }
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
    *available = *total = (size_t)1 << 40; /* as cudaMalloc says */
    return cudaSuccess;
}

cudaError_t shim_record(cudaEvent_t *event) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    *event = cudaEvent_t{(double)t.tv_sec + 1e-9 * (double)t.tv_nsec, on_their_way.size()};
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    (void)stream;
    not_while_recording("cudaStreamSynchronize");
    finish_all_copies();
    return cudaSuccess;
}

static void check_buffers(void) {
    for (auto &b : buffers()) {
        region_check(b.second);
    }
}

/* A copy must stay inside one device buffer. */
static void check_inside(const char *what, const void *p, size_t bytes) {
    auto it = buffers().upper_bound((char *)p);
    running = what;
    if (it == buffers().begin() || (const char *)p + bytes > (--it)->second.data + it->second.bytes) {
        found("%zu bytes at %p are not inside one device buffer", bytes, p);
    }
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
    (void)stream;
    not_while_recording("cudaMemcpyAsync"); /* a replay would read the host's memory again, whatever it holds by then */
    check_inside("cudaMemcpyAsync", kind == cudaMemcpyHostToDevice ? to : from, bytes);
    if (kind == cudaMemcpyDeviceToDevice) {
        check_inside("cudaMemcpyAsync", to, bytes);
    }
    if (kind == cudaMemcpyHostToDevice && is_pinned(from, bytes)) {
        on_their_way.push_back(PinnedCopy{to, from, bytes});
        return cudaSuccess;
    }
    finish_all_copies();
    open_buffers();
    memcpy(to, from, bytes);
    close_buffers();
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t stream) {
    (void)stream;
    shim_do([p, value, bytes] {
        check_inside("cudaMemsetAsync", p, bytes);
        open_buffers();
        memset(p, value, bytes);
        close_buffers();
    });
    return cudaSuccess;
}

static size_t shared_limit = 227 * 1024;
void shim_limit_shared(size_t bytes) { shared_limit = bytes ? bytes : 227 * 1024; }

cudaError_t cudaFuncSetAttribute(const void *kernel, int attribute, int value) {
    (void)kernel, (void)attribute;
    return (size_t)value <= shared_limit ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t cudaDeviceGetAttribute(int *value, int attribute, int device) {
    (void)attribute, (void)device;
    *value = (int)shared_limit;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int *n) {
    const char *asked = getenv("NLA_SHIM");
    *n = asked != NULL;
    if (asked && strcmp(asked, "protect") == 0) {
        shim_protect(true);
    }
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp *about, int device) {
    (void)device;
    snprintf(about->name, sizeof about->name, "shim");
    return cudaSuccess;
}

const char *cudaGetErrorString(cudaError_t error) {
    return error == cudaSuccess ? "no error" : error == cudaErrorMemoryAllocation ? "out of memory" : "invalid argument";
}

/* ------------------------------------------------------------------------------------------------ shared memory */

namespace {
struct Array {
    const void *site;
    char *data;
    size_t bytes;
};
} // namespace

enum : size_t { STATIC_SHARED = 64 * 1024 };

static std::vector<Array> arrays; /* of the block that runs: a few */
static char *static_shared;                  /* [STATIC_SHARED] */
static size_t static_used;
static Region dynamic_shared;

void *shim_shared(const void *site, size_t bytes) {
    for (const Array &a : arrays) {
        if (a.site == site) {
            return a.data;
        }
    }
    size_t room = (bytes + RED - 1) / RED * RED + RED;
    if (static_used + room + RED > STATIC_SHARED) {
        found("%zu bytes of static shared memory do not fit", bytes);
    }
    arrays.push_back(Array{site, static_shared + static_used + RED, bytes});
    static_used += room;
    memset(arrays.back().data, POISON, bytes);
    memset(arrays.back().data + bytes, CANARY, room - bytes);
    return arrays.back().data;
}

char *shim_dynamic(void) { return dynamic_shared.data; }

static void begin_shared(void) {
    arrays.clear();
    static_used = 0;
    memset(static_shared, CANARY, RED);
    memset(dynamic_shared.data, POISON, dynamic_shared.bytes);
}

static void check_shared(void) {
    for (const Array &a : arrays) {
        size_t room = (a.bytes + RED - 1) / RED * RED + RED;
        for (size_t gap = a.bytes; gap < room; gap++) {
            if ((unsigned char)a.data[gap] != CANARY) {
                found("wrote behind a shared array of %zu bytes, at offset %zu", a.bytes, gap);
            }
        }
    }
    region_check(dynamic_shared);
}

void shim_check_tile(const void *p, unsigned ld, unsigned multiple) {
    if ((uintptr_t)p % 32 || ld % multiple) {
        found("a tensor core's tile at %p with rows %u apart: must start at 32 bytes, rows at multiples of %u", p, ld, multiple);
    }
}

/* ------------------------------------------------------------------------------------------------ fibers */

enum : size_t { STACK = 128 * 1024 + 17 * 64 }; /* no power of two: all stacks' tops would share the same lines of the cache */
enum { MOST_THREADS = 1024, LANES = 32 };

namespace {
enum State { READY, AT_BARRIER, AT_WARP, DONE };

struct Fiber {
#ifdef __x86_64__
    void *stack_pointer;
#else
    ucontext_t context;
#endif
    State state;
    int line;   /* of the barrier it waits at */
    int parity; /* of its next exchange */
};

struct Warp {
    int waiting, line;
    char value[2][LANES][SHIM_VALUE]; /* two sets: a lane may give its next value while others still read */
};
} // namespace

static Fiber fiber[MOST_THREADS];
static Warp warp[MOST_THREADS / LANES];
static int ready[MOST_THREADS], n_ready, n_done, n_waiting, current;
static char *stacks;
static void (*body)(void *);
static void *body_context;
static uint64_t order_seed, order_state;

void shim_order(uint64_t seed) { order_seed = seed; }

static uint32_t next_random(void) {
    order_state = order_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(order_state >> 33);
}

#ifdef __x86_64__
/* Saves the registers that a function must keep and the stack pointer, and takes up where `to` was saved. */
extern "C" void shim_switch(void **from, void *to);
__asm__(".text\n.globl shim_switch\n.type shim_switch,@function\nshim_switch:\n"
        "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\n"
        "mov %rsp,(%rdi)\nmov %rsi,%rsp\n"
        "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n.size shim_switch,.-shim_switch\n");
static void *scheduler;
static void to_scheduler(void) { shim_switch(&fiber[current].stack_pointer, scheduler); }
static void to_fiber(void) { shim_switch(&scheduler, fiber[current].stack_pointer); }
#else
static ucontext_t scheduler;
static void to_scheduler(void) { swapcontext(&fiber[current].context, &scheduler); }
static void to_fiber(void) { swapcontext(&scheduler, &fiber[current].context); }
#endif

static void fiber_main(void) {
    body(body_context);
    fiber[current].state = DONE;
    n_done++;
    to_scheduler();
    abort(); /* nobody runs a fiber that is done */
}

static void fiber_new(int i) {
    Fiber *f = &fiber[i];
    char *top = stacks + (size_t)(i + 1) * STACK;
    f->state = READY;
    f->parity = 0;
#ifdef __x86_64__
    void **sp = (void **)(void *)top - 2; /* the address above the entry's: a called function's stack is 8 off a multiple of 16 */
    sp[0] = (void *)fiber_main;
    sp[1] = NULL;
    f->stack_pointer = sp - 6;
    memset(f->stack_pointer, 0, 6 * sizeof(void *));
#else
    getcontext(&f->context);
    f->context.uc_stack.ss_sp = top - STACK;
    f->context.uc_stack.ss_size = STACK;
    f->context.uc_link = NULL;
    makecontext(&f->context, fiber_main, 0);
#endif
}

void shim_barrier(int line) {
    fiber[current].state = AT_BARRIER;
    fiber[current].line = line;
    n_waiting++;
    to_scheduler();
}

void shim_warp_barrier(int line) {
    Warp *w = &warp[current / LANES];
    if (w->waiting > 0 && w->line != line) {
        found("waits for its warp at line %d, other lanes at line %d", line, w->line);
    }
    w->line = line;
    fiber[current].state = AT_WARP;
    if (++w->waiting == LANES) { /* the last of them: all go on */
        w->waiting = 0;
        for (int i = current / LANES * LANES; i < current / LANES * LANES + LANES; i++) {
            fiber[i].state = READY;
            ready[n_ready++] = i;
        }
    }
    to_scheduler();
}

const char *shim_exchange(const void *value, size_t bytes, int line) {
    Fiber *f = &fiber[current];
    Warp *w = &warp[current / LANES];
    int set = f->parity;
    f->parity ^= 1;
    memcpy(w->value[set][current % LANES], value, bytes);
    shim_warp_barrier(line);
    return w->value[set][0];
}

/* All live threads stand at a barrier, or the block waits for itself. */
static void release_barrier(int threads) {
    if (n_waiting == 0 || n_waiting + n_done < threads) {
        found("%d threads wait for others of their warp that never come", threads - n_done - n_waiting);
    }
    if (n_done > 0) {
        found("%d threads have ended, %d wait at the barrier of line %d", n_done, n_waiting, fiber[current].line);
    }
    for (int i = 0; i < threads; i++) {
        if (fiber[i].line != fiber[0].line) {
            found("thread 0 waits at the barrier of line %d, thread %d at that of line %d", fiber[0].line, i, fiber[i].line);
        }
        fiber[i].state = READY;
        ready[n_ready++] = i;
    }
    n_waiting = 0;
}

static void run_block(int threads) {
    begin_shared();
    n_ready = n_done = n_waiting = 0;
    for (int i = threads - 1; i >= 0; i--) {
        fiber_new(i);
        ready[n_ready++] = i;
    }
    memset(warp, 0, (size_t)(threads + LANES - 1) / LANES * sizeof *warp);
    while (n_done < threads) {
        if (n_ready == 0) {
            release_barrier(threads);
            for (int i = 0; order_seed == 0 && i < n_ready / 2; i++) { /* taken from the end */
                int swap = ready[i];
                ready[i] = ready[n_ready - 1 - i];
                ready[n_ready - 1 - i] = swap;
            }
        }
        int pick = order_seed ? (int)(next_random() % (uint32_t)n_ready) : n_ready - 1;
        current = ready[pick];
        ready[pick] = ready[--n_ready];
        threadIdx.x = (unsigned)current;
        to_fiber();
    }
    check_shared();
}

size_t shim_launches(const char *kernel) {
    size_t n = 0;
    for (auto &l : launches()) {
        n += strncmp(l.first.c_str(), kernel, strlen(kernel)) == 0 ? l.second : 0;
    }
    return n;
}

void shim_begin(const char *name) {
    running = name;
    launches()[name]++;
    open_buffers();
}

void shim_end(void) {
    check_buffers();
    close_buffers();
}

void shim_run(const char *name, dim3 grid, dim3 block, size_t shared, void (*thread)(void *), void *context) {
    name += *name == '(';
    shim_begin(name);
    if (!stacks) {
        stacks = (char *)mmap(NULL, MOST_THREADS * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        static_shared = (char *)aligned_alloc(RED, STATIC_SHARED);
    }
    if (block.x == 0 || block.x > MOST_THREADS || block.x % LANES || block.y != 1 || block.z != 1 || grid.x == 0 || grid.y == 0 ||
        grid.y > 65535 || shared > shared_limit) {
        found("a grid of (%u,%u) blocks of (%u,%u) threads with %zu bytes cannot be launched (or has part of a warp)", grid.x, grid.y,
              block.x, block.y, shared);
    }
    body = thread;
    body_context = context;
    gridDim = grid;
    blockDim = block;
    order_state = order_seed;
    dynamic_shared = region_new(shared, 128);
    for (blockIdx.y = 0; blockIdx.y < grid.y; blockIdx.y++) {
        for (blockIdx.x = 0; blockIdx.x < grid.x; blockIdx.x++) {
            run_block((int)block.x);
        }
    }
    munmap(dynamic_shared.map, dynamic_shared.map_bytes);
    shim_end();
}
