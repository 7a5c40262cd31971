/* Training against PyTorch (tests/golden_train.py): gradients, AdamW, LoRA and one RL step, in every family; and what must hold
 * whatever the batch is cut into. */
#include "../nla.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <stb/stb_ds.h>

static const char *const families[] = {"llama", "qwen2", "qwen3", "gemma3"};
enum { ROWS = 4, SAMPLES = 12, STEPS = 10 };

typedef struct {
    Engine *engine;
    Safetensors golden;
    File file;
    Json json;
    char dir[64];
    char *text[SAMPLES];
    size_t len[SAMPLES];
} Case;

static void open_case(Case *c, int family, int threads, const char *texts) {
    Err err = {0};
    char path[128];
    c->engine = engine_open(threads, false, &err);
    snprintf(c->dir, sizeof c->dir, "tests/golden/pair_%s", families[family]);
    snprintf(path, sizeof path, "%s/train.safetensors", c->dir);
    cr_assert(safetensors_open(&c->golden, path, &err) == 0, "%s", err.msg);
    snprintf(path, sizeof path, "%s/train.json", c->dir);
    cr_assert(file_map(&c->file, path, &err) == 0 && json_parse(&c->json, c->file.data, c->file.len, path, &err) == 0, "%s", err.msg);
    int n = 0, list = json_get(&c->json, 0, texts);
    memset(c->text, 0, sizeof c->text);
    for (int v = json_first(&c->json, list); v >= 0; v = json_next(&c->json, v)) {
        c->text[n] = json_string(&c->json, v, &c->len[n]);
        n++;
    }
}

static void close_case(Case *c) {
    for (int i = 0; i < SAMPLES; i++) {
        free(c->text[i]);
    }
    json_free(&c->json);
    file_unmap(&c->file);
    safetensors_close(&c->golden);
    c->engine->close(c->engine);
}

static const Tensor *golden(const Case *c, const char *prefix, const char *name) {
    char full[256];
    snprintf(full, sizeof full, "%s%s", prefix, name);
    const Tensor *t = safetensors_find(&c->golden, full);
    cr_assert(t, "%s: no %s", c->dir, full);
    return t;
}

static const float *floats(const Case *c, const char *name) {
    return golden(c, "", name)->data;
}

/* Every trained tensor against the golden one of its name: |difference| <= relative |golden| + absolute. */
static void compare(const Case *c, const Params *p, const Act *flat, const char *prefix, double relative, double absolute) {
    for (int i = 0; i < (int)arrlen(p->tensor); i++) {
        const Tensor *want = golden(c, prefix, p->tensor[i].name);
        size_t n = tensor_elements(p->tensor[i].tensor);
        cr_assert(tensor_elements(want) == n, "%s", p->tensor[i].name);
        const float *a = (const float *)flat + p->offset[i], *b = want->data;
        double difference = 0, size = 0;
        for (size_t j = 0; j < n; j++) {
            difference += ((double)a[j] - (double)b[j]) * ((double)a[j] - (double)b[j]);
            size += (double)b[j] * (double)b[j];
        }
        cr_assert(sqrt(difference) <= relative * sqrt(size) + absolute * sqrt((double)n), "%s: %s%s: relative error %.2e of %.3g", c->dir,
                  prefix, p->tensor[i].name, sqrt(difference / size), sqrt(size));
    }
}

static void near(double a, double b, double tolerance, const char *what) {
    cr_assert(fabs(a - b) <= tolerance * (fabs(b) > 1 ? fabs(b) : 1), "%s: %.9g instead of %.9g", what, a, b);
}

/* ------------------------------------------------------------------------------------------------ AV */

typedef struct {
    Verbalizer av;
    AvPass pass;
    int *response[ROWS];
    int length[ROWS];
    AvGroup group[ROWS];
    int tokens;
} AvRows;

static void open_av(AvRows *r, const Case *c, bool lora, Passes passes) {
    Err err = {0};
    char path[128];
    memset(r, 0, sizeof *r);
    snprintf(path, sizeof path, "%s/av", c->dir);
    cr_assert(verbalizer_open(&r->av, path, NULL, NAN, c->engine, &err) == 0, "%s", err.msg);
    if (lora) {
        LoraConfig config;
        snprintf(path, sizeof path, "%s/lora_av", c->dir);
        cr_assert(lora_load(&r->av.model, path, &config, &err) == 0, "%s", err.msg);
        lora_config_free(&config);
    }
    r->pass = (AvPass){.av = &r->av, .passes = passes};
    for (int i = 0; i < ROWS; i++) {
        char name[32];
        snprintf(name, sizeof name, "response_ids_%d", i);
        const Tensor *want = golden(c, "", name);
        cr_assert(av_response(&r->av, c->text[i], c->len[i], &r->response[i], &err) == 0, "%s", err.msg);
        r->length[i] = (int)arrlen(r->response[i]);
        cr_assert(r->length[i] == want->shape[0], "%s: %s", c->dir, name);
        for (int t = 0; t < r->length[i]; t++) {
            cr_assert(r->response[i][t] == ((const int64_t *)want->data)[t]);
        }
        r->tokens += r->length[i];
        r->group[i] = (AvGroup){.vector = floats(c, "vectors") + i * r->av.model.config.hidden_size, .row = i,
                                .token = (const int *const *)&r->response[i], .length = &r->length[i], .samples = 1};
    }
}

static void close_av(AvRows *r) {
    av_pass_close(&r->pass);
    for (int i = 0; i < ROWS; i++) {
        arrfree(r->response[i]);
    }
    lora_free(&r->av.model);
    verbalizer_close(&r->av);
}

typedef struct {
    double sum;
    int tokens;
} CrossEntropy;

static void cross_entropy(void *context, const float *logp, float *dlogp, int first, int n) {
    (void)first;
    CrossEntropy *x = context;
    for (int i = 0; i < n; i++) {
        x->sum -= (double)logp[i] / x->tokens;
        dlogp[i] = -1.0f / (float)x->tokens;
    }
}

/* All rows, `micro` at a time. */
static double av_loss(AvRows *r, int micro, const Model *grad) {
    Err err = {0};
    CrossEntropy x = {0, r->tokens};
    TokenLoss loss = {&x, cross_entropy};
    for (int i = 0; i < ROWS; i += micro) {
        cr_assert(av_pass(&r->pass, r->group + i, ROWS - i < micro ? ROWS - i : micro, &loss, grad, &err) == 0, "%s", err.msg);
    }
    return x.sum;
}

static const Schedule schedule = {.adamw = {0.9f, 0.95f, 1e-8f, 0.1f}, .peak = 1e-3, .final = 1e-4, .warmup = 3, .total = 10, .clip = 1};

static void check_av(int family, bool lora) {
    Case c;
    AvRows r;
    Params p;
    Err err = {0};
    char prefix[32], name[40];
    const char *kind = lora ? "av_lora" : "av";
    open_case(&c, family, 2, "explanations");
    open_av(&r, &c, lora, TRAINING);
    cr_assert(params_open(&p, &r.av.model, lora, NULL, DT_F32, &err) == 0, "%s", err.msg);
    for (int step = 0; step < STEPS; step++) {
        double norm, loss = av_loss(&r, ROWS, &p.gradient);
        if (step == 0) {
            snprintf(prefix, sizeof prefix, "%s.grad.", kind);
            compare(&c, &p, p.grad, prefix, 1e-4, 0);
        }
        snprintf(name, sizeof name, "%s.loss", kind);
        near(loss, (double)floats(&c, name)[step], 1e-5, name);
        near(learning_rate(&schedule, step + 1), (double)floats(&c, "lr")[step], 1e-9, "learning rate");
        cr_assert(params_step(&p, &schedule, &norm));
        snprintf(name, sizeof name, "%s.grad_norm", kind);
        near(norm, (double)floats(&c, name)[step], 1e-4, name);
    }
    snprintf(prefix, sizeof prefix, "%s.after.", kind);
    compare(&c, &p, p.weight, prefix, 1e-4, 2e-5); /* Adam divides by gradients that are nothing but rounding, too */
    params_close(&p);
    close_av(&r);
    close_case(&c);
}

Test(train, av_gradients_and_ten_adamw_steps_equal_pytorch_in_every_family) {
    for (int i = 0; i < 4; i++) {
        check_av(i, false);
    }
}

Test(train, av_adapters_gradients_and_ten_steps_equal_pytorch_in_every_family) {
    for (int i = 0; i < 4; i++) {
        check_av(i, true);
    }
}

/* ------------------------------------------------------------------------------------------------ AR */

typedef struct {
    Reconstructor ar;
    ArPass pass;
} ArRows;

static void open_ar(ArRows *r, const Case *c, bool lora, Passes passes) {
    Err err = {0};
    char path[128];
    memset(r, 0, sizeof *r);
    snprintf(path, sizeof path, "%s/ar", c->dir);
    cr_assert(reconstructor_open(&r->ar, path, NULL, c->engine, &err) == 0, "%s", err.msg);
    if (lora) {
        LoraConfig config;
        snprintf(path, sizeof path, "%s/lora_ar", c->dir);
        cr_assert(lora_load(&r->ar.model, path, &config, &err) == 0, "%s", err.msg);
        lora_config_free(&config);
    }
    r->pass = (ArPass){.ar = &r->ar, .passes = passes};
}

static void close_ar(ArRows *r) {
    ar_pass_close(&r->pass);
    lora_free(&r->ar.model);
    reconstructor_close(&r->ar);
}

static void check_ar(int family, bool lora) {
    Case c;
    ArRows r;
    Params p;
    Err err = {0};
    char prefix[32], name[40];
    const char *kind = lora ? "ar_lora" : "ar";
    open_case(&c, family, 2, "explanations");
    open_ar(&r, &c, lora, TRAINING);
    cr_assert(params_open(&p, &r.ar.model, lora, &r.ar.head, DT_F32, &err) == 0, "%s", err.msg);
    for (int step = 0; step < STEPS; step++) {
        double norm, mse[ROWS], loss = 0;
        cr_assert(ar_pass(&r.pass, (const char *const *)c.text, c.len, floats(&c, "vectors"), ROWS, 1.0 / ROWS, mse, &p, &err) == 0, "%s",
                  err.msg);
        for (int i = 0; i < ROWS; i++) {
            loss += mse[i] / ROWS;
        }
        if (step == 0) {
            snprintf(prefix, sizeof prefix, "%s.grad.", kind);
            compare(&c, &p, p.grad, prefix, 1e-4, 0);
        }
        snprintf(name, sizeof name, "%s.loss", kind);
        near(loss, (double)floats(&c, name)[step], 1e-5, name);
        cr_assert(params_step(&p, &schedule, &norm));
        snprintf(name, sizeof name, "%s.grad_norm", kind);
        near(norm, (double)floats(&c, name)[step], 1e-4, name);
    }
    snprintf(prefix, sizeof prefix, "%s.after.", kind);
    compare(&c, &p, p.weight, prefix, 1e-4, 2e-5);
    params_close(&p);
    close_ar(&r);
    close_case(&c);
}

Test(train, ar_gradients_and_ten_adamw_steps_equal_pytorch_in_every_family) {
    for (int i = 0; i < 4; i++) {
        check_ar(i, false);
    }
}

Test(train, ar_adapters_gradients_and_ten_steps_equal_pytorch_in_every_family) {
    for (int i = 0; i < 4; i++) {
        check_ar(i, true);
    }
}

/* ------------------------------------------------------------------------------------------------ what must not matter */

/* Relative difference of two gradients as a whole; *worst: of the tensor that differs most. */
static double apart(const Params *p, const float *a, const float *b, double *worst) {
    double all = 0, all_size = 0;
    *worst = 0;
    for (int i = 0; i < (int)arrlen(p->tensor); i++) {
        size_t n = tensor_elements(p->tensor[i].tensor);
        double difference = 0, size = 0;
        for (size_t j = p->offset[i]; j < p->offset[i] + n; j++) {
            difference += ((double)a[j] - (double)b[j]) * ((double)a[j] - (double)b[j]);
            size += (double)b[j] * (double)b[j];
        }
        *worst = size > 0 && sqrt(difference / size) > *worst ? sqrt(difference / size) : *worst;
        all += difference;
        all_size += size;
    }
    return sqrt(all / all_size);
}

/* An open training state whose gradients have been computed once. */
typedef struct {
    Case c;
    AvRows rows;
    Params p;
} State;

static void compute(State *s, int family, int threads, int micro, Passes passes) {
    Err err = {0};
    open_case(&s->c, family, threads, "explanations");
    open_av(&s->rows, &s->c, false, passes);
    cr_assert(params_open(&s->p, &s->rows.av.model, false, NULL, DT_F32, &err) == 0, "%s", err.msg);
    av_loss(&s->rows, micro, &s->p.gradient);
}

static void forget(State *s) {
    params_close(&s->p);
    close_av(&s->rows);
    close_case(&s->c);
}

Test(train, gradients_are_the_same_bits_on_any_number_of_threads_and_when_recomputed) {
    for (int family = 0; family < 4; family++) {
        State one, three, again;
        compute(&one, family, 1, ROWS, TRAINING);
        compute(&three, family, 3, ROWS, TRAINING);
        compute(&again, family, 2, ROWS, TRAINING_RECOMPUTED);
        size_t bytes = one.p.count * sizeof(float);
        cr_assert(memcmp(one.p.grad, three.p.grad, bytes) == 0, "%s: threads", families[family]);
        cr_assert(memcmp(one.p.grad, again.p.grad, bytes) == 0, "%s: recomputed", families[family]);
        cr_assert(again.rows.pass.forest.bytes < one.rows.pass.forest.bytes);
        forget(&one);
        forget(&three);
        forget(&again);
    }
}

Test(train, microbatches_of_uneven_rows_give_the_gradient_of_the_whole) {
    for (int family = 0; family < 4; family++) {
        State whole;
        compute(&whole, family, 2, ROWS, TRAINING);
        for (int micro = 1; micro < ROWS; micro++) { /* 3: a last short one */
            State parts;
            compute(&parts, family, 2, micro, TRAINING);
            double worst, all = apart(&whole.p, parts.p.grad, whole.p.grad, &worst);
            /* 1e-5 for one tensor: a key's bias moves all scores alike, so its gradient is what cancellation leaves */
            cr_assert(all < 1e-6 && worst < 1e-5, "%s, %d rows at a time: %.2e, one tensor %.2e", families[family], micro, all, worst);
            forget(&parts);
        }
        forget(&whole);
    }
}
