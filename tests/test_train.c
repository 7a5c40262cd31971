/* Training against PyTorch (tests/golden_train.py): gradients, AdamW, LoRA and one RL step, in every family; and what must hold
 * whatever the batch is cut into. */
#include "../nla.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <stb/stb_ds.h>

static const char *const families[] = {"llama", "qwen2", "qwen3", "gemma3"};
enum { ROWS = 4, BATCH = 16, SAMPLES = 12, STEPS = 10 };

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
    int *response[BATCH]; /* stb */
    int length[BATCH];
    AvGroup group[BATCH];
    int rows, tokens;
} AvRows;

static void add_row(AvRows *r, int *response, const float *vector) {
    int i = r->rows++;
    r->response[i] = response;
    r->length[i] = (int)arrlen(response);
    r->tokens += r->length[i];
    r->group[i] = (AvGroup){.vector = vector, .row = i, .token = (const int *const *)&r->response[i], .length = &r->length[i],
                            .samples = 1};
}

/* Up to BATCH rows: the golden ones again, each time a few tokens shorter. */
static void add_shorter_rows(AvRows *r) {
    while (r->rows < BATCH) {
        const AvGroup *like = &r->group[r->rows % ROWS];
        int *response = NULL, n = *like->length - 2 * (r->rows / ROWS);
        cr_assert(n > 0);
        memcpy(arraddnptr(response, (size_t)n), *like->token, (size_t)n * sizeof(int));
        add_row(r, response, like->vector);
    }
}

static void open_av(AvRows *r, const Case *c, bool lora, Passes passes) {
    Err err = {0};
    char path[128];
    memset(r, 0, sizeof *r);
    snprintf(path, sizeof path, "%s/av", c->dir);
    cr_assert(verbalizer_open(&r->av, path, NULL, NAN, c->engine, &err) == 0, "%s", err.msg);
    if (lora) {
        snprintf(path, sizeof path, "%s/lora_av", c->dir);
        cr_assert(lora_load(&r->av.model, path, &err) == 0, "%s", err.msg);
    }
    r->pass = (AvPass){.av = &r->av, .passes = passes};
    for (int i = 0; i < ROWS; i++) {
        char name[32];
        snprintf(name, sizeof name, "response_ids_%d", i);
        const Tensor *want = golden(c, "", name);
        int *response = NULL;
        cr_assert(av_response(&r->av, c->text[i], c->len[i], &response, &err) == 0, "%s", err.msg);
        cr_assert(arrlen(response) == want->shape[0], "%s: %s", c->dir, name);
        for (int t = 0; t < (int)arrlen(response); t++) {
            cr_assert(response[t] == ((const int64_t *)want->data)[t]);
        }
        add_row(r, response, floats(c, "vectors") + i * r->av.model.config.hidden_size);
    }
}

static void close_av(AvRows *r) {
    av_pass_close(&r->pass);
    for (int i = 0; i < r->rows; i++) {
        arrfree(r->response[i]);
    }
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
    for (int i = 0; i < r->rows; i += micro) {
        cr_assert(av_pass(&r->pass, r->group + i, r->rows - i < micro ? r->rows - i : micro, &loss, grad, &err) == 0, "%s", err.msg);
    }
    return x.sum;
}

static const Schedule schedule = {.adamw = {0.9f, 0.95f, 1e-8f, 0.1f}, .peak = 1e-3, .final = 1e-4, .warmup = 3, .total = 10, .clip = 1};

/* The loss of all rows, its gradient added to p's. */
typedef double Step(void *rows, const Case *c, const Params *p);

/* Ten steps: the first one's gradients, every loss, rate and norm, and the weights at the end. */
static void check_steps(const Case *c, Params *p, const char *kind, Step *step_loss, void *rows) {
    char prefix[32], name[40];
    for (int step = 0; step < STEPS; step++) {
        double norm, loss = step_loss(rows, c, p);
        if (step == 0) {
            snprintf(prefix, sizeof prefix, "%s.grad.", kind);
            compare(c, p, p->grad, prefix, 1e-4, 0);
        }
        snprintf(name, sizeof name, "%s.loss", kind);
        near(loss, (double)floats(c, name)[step], 1e-5, name);
        near(learning_rate(&schedule, step + 1), (double)floats(c, "lr")[step], 1e-9, "learning rate");
        cr_assert(params_step(p, &schedule, &norm));
        snprintf(name, sizeof name, "%s.grad_norm", kind);
        near(norm, (double)floats(c, name)[step], 1e-4, name);
    }
    snprintf(prefix, sizeof prefix, "%s.after.", kind);
    compare(c, p, p->weight, prefix, 1e-4, 2e-5); /* Adam divides by gradients that are nothing but rounding, too */
}

static double av_step(void *rows, const Case *c, const Params *p) {
    (void)c;
    return av_loss(rows, ROWS, &p->gradient);
}

static void check_av(int family, bool lora) {
    Case c;
    AvRows r;
    Params p;
    Err err = {0};
    open_case(&c, family, 2, "explanations");
    open_av(&r, &c, lora, TRAINING);
    cr_assert(params_open(&p, &r.av.model, lora, NULL, DT_F32, DT_F32, &err) == 0, "%s", err.msg);
    check_steps(&c, &p, lora ? "av_lora" : "av", av_step, &r);
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
        snprintf(path, sizeof path, "%s/lora_ar", c->dir);
        cr_assert(lora_load(&r->ar.model, path, &err) == 0, "%s", err.msg);
    }
    r->pass = (ArPass){.ar = &r->ar, .passes = passes};
}

static void close_ar(ArRows *r) {
    ar_pass_close(&r->pass);
    reconstructor_close(&r->ar);
}

static double ar_step(void *rows, const Case *c, const Params *p) {
    ArRows *r = rows;
    Err err = {0};
    double mse[ROWS], loss = 0;
    cr_assert(ar_pass(&r->pass, (const char *const *)c->text, c->len, floats(c, "vectors"), ROWS, 1.0 / ROWS, mse, p, &err) == 0, "%s",
              err.msg);
    for (int i = 0; i < ROWS; i++) {
        loss += mse[i] / ROWS;
    }
    return loss;
}

static void check_ar(int family, bool lora) {
    Case c;
    ArRows r;
    Params p;
    Err err = {0};
    open_case(&c, family, 2, "explanations");
    open_ar(&r, &c, lora, TRAINING);
    cr_assert(params_open(&p, &r.ar.model, lora, &r.ar.head, DT_F32, DT_F32, &err) == 0, "%s", err.msg);
    check_steps(&c, &p, lora ? "ar_lora" : "ar", ar_step, &r);
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

/* ------------------------------------------------------------------------------------------------ GRPO */

enum { VECTORS = 3, GROUP = 4 };

/* The fixed rollouts of golden_train.py: 3 groups of 4, ids as ints. */
typedef struct {
    int *id[SAMPLES], length[SAMPLES], tokens;
    AvGroup group[VECTORS];
} Drawn;

static void open_rollouts(Drawn *r, const Case *c, int D) {
    memset(r, 0, sizeof *r);
    for (int i = 0; i < SAMPLES; i++) {
        char name[32];
        snprintf(name, sizeof name, "rl.ids_%d", i);
        const Tensor *t = golden(c, "", name);
        for (int j = 0; j < t->shape[0]; j++) {
            arrput(r->id[i], (int)((const int64_t *)t->data)[j]);
        }
        r->length[i] = (int)t->shape[0];
        r->tokens += r->length[i];
    }
    for (int g = 0; g < VECTORS; g++) {
        r->group[g] = (AvGroup){.vector = floats(c, "rl.vectors") + g * D, .row = g, .token = (const int *const *)&r->id[g * GROUP],
                                .length = &r->length[g * GROUP], .samples = GROUP};
    }
}

static void close_rollouts(Drawn *r) {
    for (int i = 0; i < SAMPLES; i++) {
        arrfree(r->id[i]);
    }
}

/* One golden value a token, sample after sample. */
static float *per_token(const Case *c, const Drawn *r, const char *name) {
    float *out = xmalloc((size_t)r->tokens * sizeof(float));
    int at = 0;
    for (int i = 0; i < SAMPLES; i++) {
        char full[32];
        snprintf(full, sizeof full, "%s_%d", name, i);
        memcpy(out + at, floats(c, full), (size_t)r->length[i] * sizeof(float));
        at += r->length[i];
    }
    return out;
}

/* Log-probabilities against the golden ones; 1e-5 of their largest, as the logits. */
static void check_logprobs(AvRows *av, const Case *c, const Drawn *r, const char *name) {
    Err err = {0};
    float *want = per_token(c, r, name), *logp = xmalloc((size_t)r->tokens * sizeof(float));
    KeepLogprobs keep = {logp, 0};
    TokenLoss loss = {&keep, keep_logprobs};
    cr_assert(av_pass(&av->pass, r->group, VECTORS, &loss, NULL, &err) == 0, "%s", err.msg);
    for (int i = 0; i < r->tokens; i++) {
        near((double)logp[i], (double)want[i], 1e-5, name);
    }
    free(want);
    free(logp);
}

/* The golden advantages from the golden rewards, and everything else by the policy's pass and back. */
static void check_policy(AvRows *av, const Case *c, const Drawn *r, const char *old, const char *ref, const char *prefix, bool lora) {
    Err err = {0};
    Params p;
    char name[40];
    float *olds = per_token(c, r, old), *refs = per_token(c, r, ref), *advantage = xmalloc((size_t)r->tokens * sizeof(float)),
          *weight = xmalloc((size_t)r->tokens * sizeof(float));
    for (int i = 0, at = 0; i < SAMPLES; i++) {
        for (int j = 0; j < r->length[i]; j++, at++) {
            advantage[at] = floats(c, "rl.advantage")[i];
            weight[at] = 1.0f / (float)(SAMPLES * r->length[i]);
        }
    }
    GrpoLoss x = {.how = {0.2, 0.05, 3}, .old = olds, .ref = refs, .advantage = advantage, .weight = weight};
    TokenLoss loss = {&x, grpo_tokens};
    cr_assert(params_open(&p, &av->av.model, lora, NULL, DT_F32, DT_F32, &err) == 0, "%s", err.msg);
    for (int g = 0, tokens = 0; g < VECTORS; g += 2) { /* two microbatches, the last one short */
        int n = VECTORS - g < 2 ? VECTORS - g : 2;
        x.at = tokens;
        cr_assert(av_pass(&av->pass, r->group + g, n, &loss, &p.gradient, &err) == 0, "%s", err.msg);
        for (int i = g * GROUP; i < (g + n) * GROUP; i++) {
            tokens += r->length[i];
        }
    }
    snprintf(name, sizeof name, "%s.policy_loss", prefix);
    near(x.policy, (double)*floats(c, name), 1e-5, name);
    snprintf(name, sizeof name, "%s.kl", prefix);
    near(x.kl, (double)*floats(c, name), 1e-5, name);
    snprintf(name, sizeof name, "%s.grad.", prefix);
    compare(c, &p, p.grad, name, 1e-4, 0);
    params_close(&p);
    free(olds);
    free(refs);
    free(advantage);
    free(weight);
}

Test(train, the_policys_loss_and_gradient_of_an_rl_step_equal_pytorch_in_every_family) {
    for (int family = 0; family < 4; family++) {
        Case c;
        AvRows av, base;
        Drawn r;
        open_case(&c, family, 2, "explanations");
        open_av(&av, &c, true, TRAINING);
        open_av(&base, &c, false, TRAINING);
        open_rollouts(&r, &c, av.av.model.config.hidden_size);
        check_logprobs(&av, &c, &r, "rl.logp");
        check_logprobs(&base, &c, &r, "rl.ref");
        check_policy(&av, &c, &r, "rl.old", "rl.ref", "rl", true);
        if (family == 0) { /* the AV itself trained whole, the adapted one as reference */
            check_policy(&base, &c, &r, "rl_full.old", "rl.logp", "rl_full", false);
        }
        close_rollouts(&r);
        close_av(&av);
        close_av(&base);
        close_case(&c);
    }
}

Test(train, rewards_advantages_and_the_ars_share_of_an_rl_step_equal_pytorch_in_every_family) {
    for (int family = 0; family < 4; family++) {
        Case c;
        ArRows ar;
        Params p;
        Err err = {0};
        open_case(&c, family, 2, "rl_explanations");
        open_ar(&ar, &c, true, TRAINING);
        int D = ar.ar.model.config.hidden_size, n = 0, sample[SAMPLES];
        const char *text[SAMPLES];
        size_t len[SAMPLES];
        float *gold = xmalloc(SAMPLES * (size_t)D * sizeof(float));
        for (int i = 0; i < SAMPLES; i++) {
            bool valid = ((const int64_t *)golden(&c, "", "rl.status")->data)[i] == 0;
            cr_assert(valid == (c.text[i] != NULL));
            if (valid) {
                memcpy(gold + n * D, floats(&c, "rl.vectors") + i / GROUP * D, (size_t)D * sizeof(float));
                text[n] = c.text[i];
                len[n] = c.len[i];
                sample[n++] = i;
            }
        }
        double mse[SAMPLES], reward[SAMPLES], loss = 0;
        cr_assert(params_open(&p, &ar.ar.model, true, &ar.ar.head, DT_F32, DT_F32, &err) == 0, "%s", err.msg);
        cr_assert(ar_pass(&ar.pass, text, len, gold, n, 1.0 / n, mse, &p, &err) == 0, "%s", err.msg);
        compare(&c, &p, p.grad, "rl.ar_grad.", 1e-4, 0);
        const Tensor *length;
        for (int kind = 0; kind < 3; kind++) {
            static const char *const names[] = {"rl.reward", "rl.reward_log", "rl.reward_length"};
            for (int i = 0, v = 0; i < SAMPLES; i++) {
                char ids[32];
                snprintf(ids, sizeof ids, "rl.ids_%d", i);
                length = golden(&c, "", ids);
                bool valid = v < n && sample[v] == i;
                Reward how = {.log = kind == 1, .length_penalty = kind == 2 ? 0.001 : 0};
                reward[i] = reward_of(&how, valid, valid ? mse[v] : 0, (int)length->shape[0]);
                near(reward[i], (double)floats(&c, names[kind])[i], 1e-5, names[kind]);
                v += valid;
            }
            if (kind == 0) {
                double advantage[GROUP];
                for (int i = 0; i < SAMPLES; i++) {
                    if (i % GROUP == 0) {
                        advantages(reward + i, GROUP, advantage);
                    }
                    near(advantage[i % GROUP], (double)floats(&c, "rl.advantage")[i], 1e-4, "advantage");
                }
            }
        }
        for (int i = 0; i < n; i++) {
            near(mse[i], (double)floats(&c, "rl.mse")[sample[i]], 1e-5, "mse_nrm");
            loss += mse[i] / n;
        }
        near(loss, (double)*floats(&c, "rl.ar_loss"), 1e-5, "AR loss");
        free(gold);
        params_close(&p);
        close_ar(&ar);
        close_case(&c);
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
    add_shorter_rows(&s->rows);
    cr_assert(params_open(&s->p, &s->rows.av.model, false, NULL, DT_F32, DT_F32, &err) == 0, "%s", err.msg);
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
        compute(&one, family, 1, BATCH, TRAINING);
        compute(&three, family, 3, BATCH, TRAINING);
        compute(&again, family, 2, BATCH, TRAINING_RECOMPUTED);
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
        compute(&whole, family, 2, BATCH, TRAINING);
        static const int micros[] = {1, 4, 7}; /* 7: a last short one */
        for (int i = 0; i < 3; i++) {
            State parts;
            int micro = micros[i];
            compute(&parts, family, 2, micro, TRAINING);
            double worst, all = apart(&whole.p, parts.p.grad, whole.p.grad, &worst);
            /* 1e-5 for one tensor: a key's bias moves all scores alike, so its gradient is what cancellation leaves. The CUDA engine
             * adds a shared segment's gradients up in longer chains of roundings: 1.1e-6 was seen */
            double bound = strncmp(whole.c.engine->name, "cpu", 3) == 0 ? 1e-6 : 2e-6;
            cr_assert(all < bound && worst < 1e-5, "%s, %d rows at a time: %.2e, one tensor %.2e", families[family], micro, all, worst);
            forget(&parts);
        }
        forget(&whole);
    }
}

/* ------------------------------------------------------------------------------------------------ the optimizer's options */

/* A bf16 number is one of the two neighbours of what it stands for, the nearer one more often: no bias, where rounding to nearest
 * would lose every update smaller than half a step. */
Test(train, bf16_moments_are_rounded_stochastically_without_bias_and_by_key_alone) {
    enum { N = 1 << 16 };
    Err err = {0};
    AdamW how = {0.9f, 0.95f, 1e-8f, 0};
    float *w[3], *g = xcalloc(N, sizeof *g);
    uint16_t *m[3], *v[3];
    for (int i = 0; i < N; i++) {
        g[i] = 1;
    }
    for (int k = 0; k < 3; k++) { /* on one thread, on three, and with another key */
        Engine *e = engine_open(k == 1 ? 3 : 1, false, &err);
        w[k] = xcalloc(N, sizeof(float));
        m[k] = xcalloc(N, sizeof(uint16_t));
        v[k] = xcalloc(N, sizeof(uint16_t));
        for (int step = 1; step <= 100; step++) {
            e->adamw(e, w[k], DT_F32, g, m[k], v[k], DT_BF16, N, &how, 1e-3f, step, 1, random_key(k == 2, (uint64_t)step, 0, 0));
            double sum_m = 0, sum_v = 0, exact_m = 1 - pow(0.9, step), exact_v = 1 - pow(0.95, step);
            for (int i = 0; i < N; i++) {
                sum_m += (double)bf16_to_f32(m[k][i]);
                sum_v += (double)bf16_to_f32(v[k][i]);
            }
            /* The mean of 65,536 roundings of at most 2^-8, whose errors the next steps remember: some 2e-5; to nearest, m would
             * stop at 0.98 and v at 0.96. */
            cr_assert(fabs(sum_m / N - exact_m) < 2e-4 * exact_m && fabs(sum_v / N - exact_v) < 2e-4 * exact_v,
                      "step %d: m %.6f instead of %.6f, v %.6f instead of %.6f", step, sum_m / N, exact_m, sum_v / N, exact_v);
        }
        e->close(e);
    }
    cr_assert(memcmp(m[0], m[1], N * sizeof **m) == 0 && memcmp(v[0], v[1], N * sizeof **v) == 0 && memcmp(w[0], w[1], N * sizeof **w) == 0);
    cr_assert(memcmp(m[0], m[2], N * sizeof **m) != 0 && memcmp(v[0], v[2], N * sizeof **v) != 0);
    for (int k = 0; k < 3; k++) {
        free(w[k]);
        free(m[k]);
        free(v[k]);
    }
    free(g);
}

/* The same for the weights themselves: 100 updates of 1e-4 at 1, where neighbours are 2^-8 and 2^-7 apart, move the mean by 0.01;
 * rounded to nearest they would move nothing. */
Test(train, bf16_weights_are_rounded_stochastically_without_bias_and_by_key_alone) {
    enum { N = 1 << 16, UPDATES = 100 };
    Err err = {0};
    AdamW how = {0.9f, 0.95f, 1e-8f, 0};
    uint16_t *w[3];
    float *g = xcalloc(N, sizeof *g);
    for (int i = 0; i < N; i++) {
        g[i] = 1;
    }
    for (int k = 0; k < 3; k++) {
        Engine *e = engine_open(k == 1 ? 3 : 1, false, &err);
        float *m = xcalloc(N, sizeof *m), *v = xcalloc(N, sizeof *v);
        double sum = 0;
        w[k] = xcalloc(N, sizeof(uint16_t));
        for (int i = 0; i < N; i++) {
            w[k][i] = f32_to_bf16(1);
        }
        for (int step = 1; step <= UPDATES; step++) {
            e->adamw(e, w[k], DT_BF16, g, m, v, DT_F32, N, &how, 1e-4f, step, 1, random_key(k == 2, (uint64_t)step, 0, 0));
        }
        for (int i = 0; i < N; i++) {
            sum += (double)bf16_to_f32(w[k][i]);
        }
        /* a walk of 100 draws of one step of 2^-8 with probability 0.026 has deviation 0.006, the mean of 65,536 of them 2.5e-5 */
        cr_assert(fabs(sum / N - 0.99) < 1.5e-4, "%.6f", sum / N);
        free(m);
        free(v);
        e->close(e);
    }
    cr_assert(memcmp(w[0], w[1], N * sizeof **w) == 0);
    cr_assert(memcmp(w[0], w[2], N * sizeof **w) != 0);
    for (int k = 0; k < 3; k++) {
        free(w[k]);
    }
    free(g);
}

Test(train, every_estimator_of_the_kl_has_its_formula_and_its_derivative) {
    for (int estimator = 1; estimator <= 3; estimator++) {
        for (double d = -2; d <= 2; d += 0.37) { /* ref - logp; on-policy, so that the policy's share is -A and its slope -A */
            Grpo how = {.clip = 0.2, .kl = 0.3, .estimator = estimator};
            double logp = -1.5, ref = logp + d, policy, kl, slope, other, low, high, step = 1e-5;
            double loss = grpo_token(&how, logp, logp, ref, 0.7, &policy, &kl, &slope);
            near(kl, estimator == 1 ? -d : estimator == 2 ? d * d / 2 : exp(d) - 1 - d, 1e-12, "KL");
            near(policy, -0.7, 1e-12, "policy");
            near(loss, policy + 0.3 * kl, 1e-12, "loss");
            high = grpo_token(&how, logp + step, logp, ref, 0.7, &policy, &kl, &other);
            low = grpo_token(&how, logp - step, logp, ref, 0.7, &policy, &kl, &other);
            near(slope, (high - low) / (2 * step), 1e-8, "derivative");
        }
    }
}
