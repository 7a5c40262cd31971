/* Every kernel of kernels.cu, run on the CPU by tests/cuda_shim.h, against the CPU engine's ops: forward and backward, fp32 and bf16,
 * odd sizes, threads in several orders. (tests/test_model.c, test_method.c and test_train.c are built once more for this engine,
 * as the suites shim_model, shim_method and shim_train.) */
#include "../nla.h"
#include "cuda_shim.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <stb/stb_ds.h>

/* engine_open of the suites that are built again. */
Engine *shim_engine(int threads, bool bf16_dot, Err *err);

Engine *shim_engine(int threads, bool bf16_dot, Err *err) {
    if (bf16_dot) {
        fail(err, "the shim is tested in fp32 here");
        return NULL;
    }
    setenv("NLA_SHIM", "1", 1);
    shim_order((uint64_t)threads); /* which results must not depend on */
    return engine_open_cuda(DT_F32, err);
}

static Engine *open_shim(DType act) {
    Err err = {0};
    setenv("NLA_SHIM", "1", 1);
    Engine *e = engine_open_cuda(act, &err);
    cr_assert(e, "%s", err.msg);
    return e;
}

/* ------------------------------------------------------------------------------------------------ the ops
 * verify.c's cases, played on the CPU engine and, in several orders of threads, on the shim. */

static void compare(const OpTape *want, const OpTape *have, const char *op) {
    cr_assert(arrlen(want->kept) == arrlen(have->kept));
    for (int i = 0; i < (int)arrlen(want->kept); i++) {
        const OpOutput *k = &have->kept[i];
        double expected, got, apart = op_difference(want, have, i, &expected, &got);
        cr_assert(apart <= k->bound, "op %s, %s: %.9g instead of %.9g, %.2e of the largest (bound %.1e)", op, k->name, got, expected, apart,
                  k->bound);
    }
}

static OpTape play(const OpCase *c, const int *size, Engine *e) {
    OpTape t = {.e = e};
    Err err = {0};
    c->play(&t, size);
    cr_assert(e->check(e, &err) == 0, "%s", err.msg);
    return t;
}

static void wipe(OpTape *t) {
    Engine *e = t->e;
    op_tape_close(t);
    e->close(e);
}

static void check_size(const OpCase *c, const int *size) {
    Err err = {0};
    OpTape cpu = play(c, size, engine_open(1, false, &err));
    for (int bf16 = 0; bf16 < 2; bf16++) {
        OpTape first = {0};
        for (uint64_t order = 0; order < 3; order++) {
            shim_order(order * 7919);
            OpTape gpu = play(c, size, open_shim(bf16 ? DT_BF16 : DT_F32));
            compare(&cpu, &gpu, c->name);
            if (order == 0) {
                first = gpu;
                continue;
            }
            cr_assert(memcmp(first.out, gpu.out, arrlenu(gpu.out) * sizeof(float)) == 0, "op %s: depends on the order of threads", c->name);
            wipe(&gpu);
        }
        wipe(&first);
    }
    wipe(&cpu);
}

static const OpCase *case_of(const char *name) {
    const OpCase *c = op_cases;
    while (c->name && strcmp(c->name, name) != 0) {
        c++;
    }
    cr_assert(c->name, "no op's case is called %s", name);
    return c;
}

static void check(const char *name) {
    const OpCase *c = case_of(name);
    for (int i = 0; i < OP_SIZES && c->size[i][0]; i++) {
        check_size(c, c->size[i]);
    }
    cr_assert(shim_buffers() == 0 && shim_pinned() == 0, "%s: %zu device buffers were not freed, %zu of the host", name, shim_buffers(), shim_pinned());
}

Test(kernels, embed) { check("embed"); }
Test(kernels, rmsnorm) { check("rmsnorm"); }
Test(kernels, gated) { check("gated"); }
Test(kernels, rows) { check("rows"); }
Test(kernels, linear) { check("linear"); }
Test(kernels, lora) { check("lora"); }
Test(kernels, weights_of_one_byte) { check("rounded"); }
Test(kernels, attention) { check("attention"); }
Test(kernels, attention_wide_heads) { check("wide attention"); }
Test(kernels, attention_of_single_tokens) { check("decoding"); }
Test(kernels, losses) { check("losses"); }
Test(kernels, scores) { check("scores"); }
Test(kernels, sample) { check("sample"); }
Test(kernels, adamw) { check("adamw"); }

/* As on an A100 (163 KB) and with barely enough: other tiles, the same numbers. */
Test(kernels, attention_takes_smaller_tiles_where_shared_memory_is_small) {
    shim_limit_shared(163 * 1024);
    check_size(case_of("attention"), (int[6]){2, 1, 256, 0, 0, 1});
    shim_limit_shared(60 * 1024);
    check_size(case_of("attention"), (int[6]){3, 1, 64, 0, 0, 0});
    shim_limit_shared(0);
}

/* ------------------------------------------------------------------------------------------------ the engine */

static Act *room(OpTape *t, DType dtype, size_t n) {
    Act *x = t->e->alloc(t->e, dtype, n);
    cr_assert(x);
    arrput(t->memory, x);
    return x;
}

/* Weights on the host may change between uses when that is announced, and trained ones whenever the optimizer runs. */
Test(kernels, copies_of_weights_follow_their_source) {
    for (int bf16 = 0; bf16 < 2; bf16++) {
        OpTape t = {.e = open_shim(bf16 ? DT_BF16 : DT_F32)};
        Engine *e = t.e;
        float w[2] = {1, 2}, y;
        Linear linear = {.n = 1, .in = 2, .out = 1, .w = {{.dtype = DT_F32, .n_dims = 2, .shape = {1, 2}, .data = w, .bytes = sizeof w}}};
        Act *x = room(&t, e->act_dtype, 2), *out = room(&t, e->act_dtype, 1);
        e->write(e, x, 0, (float[]){1, 1}, 2);
        e->linear(e, out, x, &linear, 1);
        e->read(e, &y, out, 0, 1);
        cr_assert(y == 3);
        e->forget(e, w, sizeof w);
        w[0] = 5;
        e->linear(e, out, x, &linear, 1);
        e->read(e, &y, out, 0, 1);
        cr_assert(y == 7);
        Act *trained = room(&t, DT_F32, 10), *g = room(&t, DT_F32, 10), *m = room(&t, DT_F32, 10), *v = room(&t, DT_F32, 10);
        float start[10] = {0, 0, 0, 0, 4, 8};
        e->write(e, trained, 0, start, 10);
        e->write(e, g, 0, (float[10]){0, 0, 0, 0, 1, 1}, 10);
        e->zero(e, m, 40);
        e->zero(e, v, 40);
        linear.w[0].data = (float *)trained + 4;
        e->linear(e, out, x, &linear, 1);
        e->read(e, &y, out, 0, 1);
        cr_assert(y == 12);
        e->adamw(e, trained, DT_F32, g, m, v, DT_F32, 10, &(AdamW){0.9f, 0.95f, 0, 0}, 1.0f, 1, 1, 0); /* each by 1 */
        e->linear(e, out, x, &linear, 1);
        e->read(e, &y, out, 0, 1);
        cr_assert(fabsf(y - 10) < 1e-4f, "%g", (double)y);
        wipe(&t);
    }
    cr_assert(shim_buffers() == 0);
}

/* A weight of several buffers' size, in the engine's format and in another, through pinned memory and, where none is to be had, without:
 * the same numbers. The buffers are gone after the pass. */
Test(kernels, weights_reach_the_gpu_in_parts) {
    enum { IN = 300, OUT = 70 };
    float *w = xmalloc(IN * OUT * sizeof(float)), x[IN], y[OUT];
    for (int i = 0; i < IN * OUT; i++) {
        w[i] = (float)((i * 7 + i / IN) % 61 - 30);
    }
    Linear linear = {.n = 1, .in = IN, .out = OUT,
                     .w = {{.dtype = DT_F32, .n_dims = 2, .shape = {OUT, IN}, .data = w, .bytes = IN * OUT * sizeof(float)}}};
    for (int how = 0; how < 4; how++) {
        shim_refuse_pinned(how >= 2);
        OpTape t = {.e = open_shim(how % 2 ? DT_BF16 : DT_F32)};
        Engine *e = t.e;
        Err err = {0};
        Act *in = room(&t, e->act_dtype, IN), *out = room(&t, DT_F32, OUT);
        for (int i = 0; i < IN; i++) {
            x[i] = (float)(i % 5 - 2);
        }
        e->write(e, in, 0, x, IN);
        e->linear(e, out, in, &linear, 1);
        cr_assert(shim_pinned() == (how < 2 ? 2 : 0));
        e->read(e, y, out, 0, OUT);
        for (int o = 0; o < OUT; o++) {
            float sum = 0; /* of whole numbers: exact */
            for (int i = 0; i < IN; i++) {
                sum += x[i] * w[o * IN + i];
            }
            cr_assert(y[o] == sum, "op linear, output %d: %g instead of %g", o, (double)y[o], (double)sum);
        }
        cr_assert(e->check(e, &err) == 0 && shim_pinned() == 0, "%s", err.msg);
        wipe(&t);
    }
    shim_refuse_pinned(false);
    free(w);
}

/* Trained weights in the engine's own format, one matrix of a stack behind the other, are used where they stand. */
Test(kernels, weights_that_train_in_bf16_need_no_copy) {
    OpTape t = {.e = open_shim(DT_BF16)};
    Engine *e = t.e;
    uint16_t w[4], ones[2] = {f32_to_bf16(1), f32_to_bf16(1)};
    float y[2], g[4] = {1, 1, 1, 1};
    for (int i = 0; i < 4; i++) {
        w[i] = f32_to_bf16((float)(1 << i));
    }
    Act *trained = room(&t, DT_BF16, 4), *x = room(&t, DT_BF16, 2), *out = room(&t, DT_F32, 2), *grad = room(&t, DT_F32, 4), *m = room(&t, DT_F32, 4),
        *v = room(&t, DT_F32, 4);
    Tensor one = {.dtype = DT_BF16, .n_dims = 2, .shape = {1, 2}, .data = trained, .bytes = 4};
    Linear stack = {.n = 2, .in = 2, .out = 2, .w = {one, one}};
    stack.w[1].data = (uint16_t *)trained + 2;
    e->put(e, trained, w, sizeof w);
    e->put(e, x, ones, sizeof ones);
    e->write(e, grad, 0, g, 4);
    e->zero(e, m, 16);
    e->zero(e, v, 16);
    size_t buffers = shim_buffers();
    e->linear(e, out, x, &stack, 1);
    e->read(e, y, out, 0, 2);
    cr_assert(y[0] == 3 && y[1] == 12);
    e->adamw(e, trained, DT_BF16, grad, m, v, DT_F32, 4, &(AdamW){0.9f, 0.95f, 0, 0}, 1.0f, 1, 1, 0); /* each by 1, which bf16 holds */
    e->linear(e, out, x, &stack, 1);
    e->read(e, y, out, 0, 2);
    cr_assert(fabsf(y[0] - 1) < 1e-4f && fabsf(y[1] - 10) < 1e-4f && shim_buffers() == buffers, "%g %g", (double)y[0], (double)y[1]);
    wipe(&t);
}

Test(kernels, a_failed_allocation_is_reported_and_nothing_runs_after_it) {
    OpTape t = {.e = open_shim(DT_F32)};
    Err err = {0};
    float numbers[8] = {0};
    Act *x = room(&t, DT_F32, 2), *y = room(&t, DT_F32, 4);
    Linear linear = {.n = 1, .in = 2, .out = 4, .w = {{.dtype = DT_BF16, .n_dims = 2, .shape = {4, 2}, .data = numbers, .bytes = 16}}};
    t.e->write(t.e, x, 0, numbers, 2);
    cr_assert(t.e->check(t.e, &err) == 0);
    shim_fail_after(0);
    cr_assert(t.e->alloc(t.e, DT_F32, 100) == NULL);
    cr_assert(t.e->check(t.e, &err) == 0, "an alloc that fails is its caller's to report");
    t.e->linear(t.e, y, x, &linear, 1); /* the copy of the weight */
    float out[4] = {0};
    t.e->read(t.e, out, y, 0, 4);
    cr_assert(isnan(out[0]));
    cr_assert(t.e->check(t.e, &err) == -1 && strstr(err.msg, "no memory for the weights"), "%s", err.msg);
    shim_fail_after(-1);
    wipe(&t);
}

/* ------------------------------------------------------------------------------------------------ recorded steps */

enum { DECODES = 3, SAID = 2000 };

/* Three times two prompts of three samples each below a common segment, drawn on an engine that it opens: every token and its
 * log-probability. The first time rows end at different steps; the third differs from the second in the prompts' lengths alone. */
static int say(Engine *e, float *said, int64_t *rows) {
    Err err = {0};
    Model m;
    Forest f;
    Batch b = {0};
    int prompt[24], n = 0, *eos = NULL;
    cr_assert(adapted_load(&m, "tests/golden/pair_gemma3/av", 0, e, &err) == 0, "%s", err.msg);
    cr_assert(forest_open(&f, &m, m.config.n_layers, 300, 64, FORWARD, &err) == 0, "%s", err.msg);
    for (int i = 0; i < m.config.vocab_size; i += 6) {
        arrput(eos, i);
    }
    for (int i = 0; i < 24; i++) {
        prompt[i] = (int)(random_uniform(9, (uint64_t)i, 0, 0) * m.config.vocab_size);
    }
    for (int turn = 0; turn < DECODES; turn++) {
        Decoder d = {.how = {.sampler = {1, 0, 1, 5}, .max_tokens = 9, .ignore_eos = turn > 0}, .eos = eos, .vocab_size = m.config.vocab_size};
        forest_cut(&f, 0);
        int root = forest_add(&f, -1, 20, &err), length = turn == 2 ? 5 : 3;
        cr_assert(feed(&f, &b, root, prompt, 20, NULL, &err) == 0, "%s", err.msg);
        for (int i = 0; i < 2; i++) {
            int tail = forest_add(&f, root, length, &err);
            cr_assert(feed(&f, &b, tail, prompt + i, length, NULL, &err) == 0 && decoder_add(&d, &f, tail, i, prompt[i + length], 3, &err) == 0);
        }
        *rows += decode(&d, &f, &b, &err);
        for (int i = 0; i < 6; i++) {
            for (int j = 0; j < (int)arrlen(d.sample[i].logprob); j++) {
                said[n++] = d.sample[i].logprob[j];
                said[n++] = j < (int)arrlen(d.sample[i].ids) ? (float)d.sample[i].ids[j] : -1;
            }
        }
        decoder_free(&d);
    }
    forest_close(&f);
    batch_free(&b);
    model_free(&m);
    arrfree(eos);
    e->close(e);
    return n;
}

/* The same numbers, bit for bit, as when every op of every step is launched by itself; and the CPU's tokens. */
Test(kernels, recorded_steps_are_the_steps_that_run_op_by_op) {
    for (int bf16 = 0; bf16 < 2; bf16++) {
        float want[SAID], have[SAID], cpu[SAID];
        int64_t rows = 0;
        Err err = {0};
        size_t graphs = shim_launches("graph");
        setenv("NLA_GRAPHS", "0", 1);
        int n = say(open_shim(bf16 ? DT_BF16 : DT_F32), want, &rows);
        cr_assert(shim_launches("graph") == graphs);
        unsetenv("NLA_GRAPHS");
        cr_assert(say(open_shim(bf16 ? DT_BF16 : DT_F32), have, &rows) == n);
        cr_assert(memcmp(want, have, (size_t)n * sizeof(float)) == 0);
        cr_assert(say(engine_open(1, false, &err), cpu, &rows) == n || bf16);
        for (int i = 0; i < n && !bf16; i++) {
            cr_assert(i % 2 ? have[i] == cpu[i] : fabsf(have[i] - cpu[i]) < 1e-4f, "%d: %g instead of %g", i, (double)have[i], (double)cpu[i]);
        }
        graphs = shim_launches("graph") - graphs; /* of the second and third time all steps but the first, of the first some */
        cr_assert(graphs > 16 && graphs < 16 + 9, "%zu steps were recorded ones", graphs);
    }
    cr_assert(shim_buffers() == 0);
}

/* A step of one product. */
static float step_of(Engine *e, const Linear *linear, const Act *x, Act *y) {
    float out;
    if (!e->begin_step(e, "shape", 5)) {
        e->linear(e, y, x, linear, 1);
        e->end_step(e);
    }
    e->read(e, &out, y, 0, 1);
    return out;
}

Test(kernels, a_step_is_recorded_anew_when_a_weight_or_memory_has_changed) {
    OpTape t = {.e = open_shim(DT_BF16)};
    Engine *e = t.e;
    float w[2] = {1, 2};
    Linear linear = {.n = 1, .in = 2, .out = 1, .w = {{.dtype = DT_F32, .n_dims = 2, .shape = {1, 2}, .data = w, .bytes = sizeof w}}};
    Act *x = room(&t, e->act_dtype, 2), *out = e->alloc(e, e->act_dtype, 1), *trained = room(&t, DT_F32, 2);
    e->write(e, x, 0, (float[]){1, 1}, 2);
    e->write(e, trained, 0, (float[]){4, 8}, 2);
    for (int i = 0; i < 5; i++) { /* op by op, as is the next since working memory has grown; recorded; twice replayed */
        cr_assert(step_of(e, &linear, x, out) == 3);
        cr_assert(shim_launches("graph") == (size_t)(i > 1 ? i - 1 : 0));
    }
    e->forget(e, w, sizeof w);
    w[0] = 5;
    for (int i = 0; i < 3; i++) {
        cr_assert(step_of(e, &linear, x, out) == 7);
    }
    e->free(e, out);
    out = e->alloc(e, e->act_dtype, 100);
    for (int i = 0; i < 3; i++) {
        cr_assert(step_of(e, &linear, x, out) == 7);
    }
    linear.w[0].data = trained;
    e->forget(e, w, sizeof w); /* another weight is another shape: here the shape is always the same */
    for (int i = 0; i < 3; i++) {
        cr_assert(step_of(e, &linear, x, out) == 12);
    }
    e->write(e, trained, 0, (float[]){6, 8}, 2);
    for (int i = 0; i < 3; i++) {
        cr_assert(step_of(e, &linear, x, out) == 14);
    }
    e->free(e, out);
    wipe(&t);
}

/* ------------------------------------------------------------------------------------------------ whole passes in bf16 */

typedef struct {
    float *logp; /* [tokens] */
    int tokens;
} Loss;

static void cross_entropy(void *context, const float *logp, float *dlogp, int first, int n) {
    Loss *x = context;
    for (int i = 0; i < n; i++) {
        x->logp[first + i] = logp[i];
        dlogp[i] = -1.0f / (float)x->tokens;
    }
}

enum { GROUPS = 2, SAMPLES = 2, LENGTH = 9, TOKENS = GROUPS * SAMPLES * LENGTH };

/* An AV's pass there and back on an engine that it opens: log-probabilities [TOKENS] and the flat gradient (to be freed). */
static float *av_there_and_back(Engine *e, const char *dir, float *logp, size_t *count) {
    Err err = {0};
    Verbalizer av;
    Params p;
    cr_assert(verbalizer_open(&av, dir, NULL, NAN, e, &err) == 0, "%s", err.msg);
    cr_assert(params_open(&p, &av.model, false, NULL, DT_F32, DT_F32, &err) == 0, "%s", err.msg);
    int D = av.model.config.hidden_size, V = av.model.config.vocab_size, id[GROUPS * SAMPLES][LENGTH], length[SAMPLES] = {LENGTH, LENGTH};
    float *vector = xmalloc((size_t)(GROUPS * D) * sizeof(float));
    const int *token[GROUPS * SAMPLES];
    for (int i = 0; i < GROUPS * D; i++) {
        vector[i] = (float)random_uniform(5, (uint64_t)i, 0, 0) - 0.5f;
    }
    for (int s = 0; s < GROUPS * SAMPLES; s++) {
        token[s] = id[s];
        for (int i = 0; i < LENGTH; i++) {
            id[s][i] = (int)(random_uniform(6, (uint64_t)s, (uint64_t)i, 0) * V);
        }
    }
    AvGroup group[GROUPS];
    for (int g = 0; g < GROUPS; g++) {
        group[g] = (AvGroup){.vector = vector + g * D, .row = g, .token = token + g * SAMPLES, .length = length, .samples = SAMPLES};
    }
    AvPass pass = {.av = &av, .passes = TRAINING};
    Loss x = {logp, TOKENS};
    TokenLoss loss = {&x, cross_entropy};
    cr_assert(av_pass(&pass, group, GROUPS, &loss, &p.gradient, &err) == 0, "%s", err.msg);
    *count = p.count;
    float *grad = xmalloc(p.count * sizeof(float));
    e->read(e, grad, p.grad, 0, p.count);
    av_pass_close(&pass);
    params_close(&p);
    verbalizer_close(&av);
    free(vector);
    e->close(e);
    return grad;
}

/* What rounding every activation and weight to 8 bits does to these models. PyTorch's own bf16 against its fp32 on them, on random tokens:
 * gradients 3.0 to 7.1% apart, log-probabilities 0.06 to 0.17. */
Test(kernels, a_pass_in_bf16_there_and_back_stays_near_fp32_in_every_family) {
    static const char *const pairs[] = {"tests/golden/pair_llama/av", "tests/golden/pair_qwen2/av", "tests/golden/pair_qwen3/av",
                                        "tests/golden/pair_gemma3/av"};
    for (int i = 0; i < 4; i++) {
        Err err = {0};
        float want[TOKENS], have[TOKENS];
        size_t n, m;
        float *a = av_there_and_back(engine_open(1, false, &err), pairs[i], want, &n);
        float *b = av_there_and_back(open_shim(DT_BF16), pairs[i], have, &m);
        double apart = 0, size = 0, most = 0;
        cr_assert(n == m);
        for (size_t j = 0; j < n; j++) {
            apart += ((double)b[j] - (double)a[j]) * ((double)b[j] - (double)a[j]);
            size += (double)a[j] * (double)a[j];
        }
        for (int j = 0; j < TOKENS; j++) {
            most = fmax(most, fabs((double)have[j] - (double)want[j]));
        }
        cr_assert(sqrt(apart / size) < 0.1 && most < 0.2, "%s: gradient %.2e apart, log-probabilities %.2e", pairs[i], sqrt(apart / size), most);
        free(a);
        free(b);
    }
}
