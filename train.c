/* train.c - how the two halves learn: what trains as flat memory under AdamW, the AV's pass over groups of responses, the AR's
 * over texts, and GRPO's arithmetic. A training run (files, evaluation, checkpoints) is in run.c.
 */
#include "nla.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <stb/stb_ds.h>

/* ------------------------------------------------------------------------------------------------ what trains */

static Named *trained_tensors(Model *m, bool lora, Linear *head) {
    Named *list = lora ? lora_tensors(m) : model_tensors(m);
    if (head) {
        arrput(list, ((Named){xstrdup("value_head.weight"), &head->w[0]}));
    }
    return list;
}

static void forget_tensors(Named *list) {
    for (int i = 0; i < (int)arrlen(list); i++) {
        list[i].tensor->data = NULL;
    }
    named_free(list);
}

/* A Model of the same shape with blocks and adapters of its own, so that its tensors can be gradients. */
static void copy_shape(Model *out, const Model *m) {
    *out = *m;
    out->block = xcalloc((size_t)m->config.n_layers, sizeof(Block));
    memcpy(out->block, m->block, (size_t)m->config.n_layers * sizeof(Block));
    for (int layer = 0; layer < m->config.n_layers; layer++) {
        Linear *const stack[] = {&out->block[layer].qkv, &out->block[layer].o, &out->block[layer].gate_up, &out->block[layer].down};
        for (int i = 0; i < 4; i++) {
            if (stack[i]->lora) {
                Lora *copy = xcalloc(1, sizeof(Lora));
                *copy = *stack[i]->lora;
                stack[i]->lora = copy;
            }
        }
    }
}

static void free_shape(Model *m) {
    for (int layer = 0; m->block && layer < m->config.n_layers; layer++) {
        free(m->block[layer].qkv.lora);
        free(m->block[layer].o.lora);
        free(m->block[layer].gate_up.lora);
        free(m->block[layer].down.lora);
    }
    free(m->block);
}

static size_t count_elements(const Named *list) {
    size_t count = 0;
    for (int i = 0; i < (int)arrlen(list); i++) {
        count += tensor_elements(list[i].tensor);
    }
    return count;
}

/* The gradient's tensors: those that train point into p->grad, the others at nothing. */
static void point_gradients(Params *p, Model *model, bool lora, const Linear *head) {
    copy_shape(&p->gradient, model);
    p->head = head ? *head : (Linear){0};
    Named *own = trained_tensors(&p->gradient, lora, head ? &p->head : NULL);
    forget_tensors(lora ? model_tensors(&p->gradient) : lora_tensors(&p->gradient));
    for (int i = 0; i < (int)arrlen(own); i++) {
        own[i].tensor->data = (float *)p->grad + p->offset[i];
        own[i].tensor->dtype = DT_F32;
    }
    if (model->config.tied && model->lm_head.n) {
        p->gradient.lm_head.w[0] = p->gradient.embed;
    }
    named_free(own);
}

/* A tensor's numbers, at `at` of the trained weights. */
static void take_weights(Params *p, size_t at, const Tensor *t) {
    size_t n = tensor_elements(t), size = dtype_size(p->weights);
    float *host = xmalloc(n * sizeof(float));
    (void)tensor_to_floats(host, t); /* a model's tensors have been checked to be of those types */
    if (p->weights == DT_BF16) {
        uint16_t *half = xmalloc(n * sizeof(uint16_t));
        for (size_t i = 0; i < n; i++) {
            half[i] = f32_to_bf16(host[i]);
        }
        p->engine->put(p->engine, (char *)p->weight + at * size, half, n * size);
        free(half);
    } else {
        p->engine->write(p->engine, p->weight, at, host, n);
    }
    free(host);
}

size_t params_bytes(const Model *model, bool lora, const Linear *head, DType weights, DType moments) {
    Named *list = trained_tensors((Model *)model, lora, (Linear *)head);
    size_t count = count_elements(list);
    named_free(list);
    return count * (dtype_size(weights) + sizeof(float) + 2 * dtype_size(moments));
}

int params_open(Params *p, Model *model, bool lora, Linear *head, DType weights, DType moments, Err *err) {
    Engine *e = model->engine;
    *p = (Params){.engine = e, .weights = weights, .moments = moments};
    p->tensor = trained_tensors(model, lora, head);
    p->count = count_elements(p->tensor);
    p->bytes = p->count * (dtype_size(weights) + sizeof(float) + 2 * dtype_size(moments));
    p->weight = e->alloc(e, weights, p->count);
    p->grad = e->alloc(e, DT_F32, p->count);
    p->m = e->alloc(e, moments, p->count);
    p->v = e->alloc(e, moments, p->count);
    if (!p->weight || !p->grad || !p->m || !p->v) {
        fail(err, "not enough memory: %.2f GB for %zu trained numbers, their gradients and moments; train adapters (--lora-rank) "
             "or keep weights and moments in bf16 (masters=bf16 moments=bf16)", (double)p->bytes / 1e9, p->count);
        arrsetlen(p->tensor, 0);
        params_close(p);
        return -1;
    }
    size_t at = 0;
    for (int i = 0; i < (int)arrlen(p->tensor); i++) {
        Tensor *t = p->tensor[i].tensor;
        size_t n = tensor_elements(t);
        take_weights(p, at, t);
        e->forget(e, t->data, t->bytes);
        if (lora && (!head || t != &head->w[0])) {
            free((void *)t->data); /* the adapters' own memory, where they were until now */
        }
        t->dtype = weights;
        t->bytes = n * dtype_size(weights);
        arrput(p->offset, at);
        at += n;
    }
    e->zero(e, p->grad, p->count * sizeof(float));
    e->zero(e, p->m, p->count * dtype_size(moments));
    e->zero(e, p->v, p->count * dtype_size(moments));
    point_gradients(p, model, lora, head);
    for (int i = 0; i < (int)arrlen(p->tensor); i++) {
        p->tensor[i].tensor->data = (char *)p->weight + p->offset[i] * dtype_size(weights);
    }
    if (model->config.tied && model->lm_head.n) {
        model->lm_head.w[0] = model->embed;
    }
    return 0;
}

void params_close(Params *p) {
    if (!p->engine) {
        return;
    }
    forget_tensors(p->tensor);
    arrfree(p->offset);
    p->engine->free(p->engine, p->weight);
    p->engine->free(p->engine, p->grad);
    p->engine->free(p->engine, p->m);
    p->engine->free(p->engine, p->v);
    free_shape(&p->gradient);
    *p = (Params){0};
}

double learning_rate(const Schedule *s, int64_t step) {
    if (step <= s->warmup) {
        return s->peak * (double)step / s->warmup;
    }
    if (s->total <= s->warmup) {
        return s->peak;
    }
    double done = (double)(step - s->warmup) / (s->total - s->warmup);
    return s->final + (s->peak - s->final) / 2 * (1 + cos(3.14159265358979323846 * (done < 1 ? done : 1)));
}

bool params_step(Params *p, const Schedule *s, double *norm) {
    Engine *e = p->engine;
    *norm = sqrt(e->sum_squares(e, p->grad, p->count));
    bool finite = isfinite(*norm);
    if (finite) {
        double scale = s->clip > 0 && s->clip / (*norm + 1e-6) < 1 ? s->clip / (*norm + 1e-6) : 1;
        p->step++;
        e->adamw(e, p->weight, p->weights, p->grad, p->m, p->v, p->moments, p->count, &s->adamw, (float)learning_rate(s, p->step), p->step,
                 (float)scale, random_key(s->seed, (uint64_t)p->step, 0, 7));
    }
    e->zero(e, p->grad, p->count * sizeof(float));
    return finite;
}

/* An empty forest with room for a pass; it only grows. */
static int pass_room(Forest *f, Model *m, int rows, int cache, Passes passes, Err *err) {
    if (f->model && f->max_rows >= rows && f->cache_rows >= cache) {
        forest_cut(f, 0);
        return 0;
    }
    rows = f->max_rows > rows ? f->max_rows : rows;
    cache = f->cache_rows > cache ? f->cache_rows : cache;
    forest_close(f);
    return forest_open(f, m, m->config.n_layers, cache, rows, passes, err);
}

/* ------------------------------------------------------------------------------------------------ AV */

int av_end_of_turn(const Verbalizer *av) {
    static const char *const names[] = {"<|im_end|>", "<|eot_id|>", "<end_of_turn>"};
    for (int i = 0; i < 3; i++) {
        int id = tokenizer_id(av->tok, names[i]);
        if (id >= 0) {
            return id;
        }
    }
    return tokenizer_eos(av->tok);
}

int av_response(const Verbalizer *av, const char *explanation, size_t len, int **ids, Err *err) {
    char *text = xprintf("<explanation>\n%.*s\n</explanation>", (int)len, explanation);
    int status = tokenizer_encode(av->tok, text, strlen(text), false, ids, err), end = av_end_of_turn(av);
    free(text);
    if (status == 0 && end < 0) {
        status = fail(err, "%s: the tokenizer has no end-of-turn token, so a response cannot be taught to end", av->model.dir);
    }
    if (status == 0) {
        arrput(*ids, end);
    }
    return status;
}

/* Rows of a pass: the prompt's start, a tail a vector, and each response behind the prompt's last token. */
static int av_rows(const Verbalizer *av, int groups, int responses, int tokens, int *cache) {
    int tail = (int)arrlen(av->prompt) - av->marker_at - 1, rows = av->marker_at + groups * tail + tokens;
    *cache = rows + CACHE_ALIGN * (1 + groups + responses);
    return rows;
}

size_t av_pass_bytes(const Verbalizer *av, int groups, int responses, int tokens, Passes passes) {
    int cache, rows = av_rows(av, groups, responses, tokens, &cache);
    return forest_bytes(&av->model, av->model.config.n_layers, cache, rows, passes);
}

/* The tokens of group g: its tail, then each response behind the prompt's last token, every one of them wanted. */
static int av_add_group(AvPass *p, const AvGroup *g, float *scaled, int root, Err *err) {
    const Verbalizer *av = p->av;
    int D = av->model.config.hidden_size, tail = (int)arrlen(av->prompt) - av->marker_at - 1;
    int seg = forest_add(&p->forest, root, tail, err);
    if (seg < 0 || scaled_vector(scaled, g->vector, D, av->scale, g->row, err) != 0) {
        return -1;
    }
    batch_inject(&p->batch, (int)arrlen(p->batch.token), scaled);
    batch_add(&p->batch, &p->forest, seg, av->prompt + av->marker_at, tail, 0);
    for (int s = 0; s < g->samples; s++) {
        int n = g->length[s], child = n > 0 ? forest_add(&p->forest, seg, n, err) : -1, *fed = NULL;
        if (child < 0) {
            return n > 0 ? -1 : fail(err, "row %lld: a response without tokens", (long long)g->row);
        }
        arrput(fed, arrlast(av->prompt));
        for (int i = 0; i < n; i++) {
            arrput(p->target, g->token[s][i]);
            arrput(fed, g->token[s][i]);
        }
        batch_add(&p->batch, &p->forest, child, fed, n, 2);
        arrfree(fed);
    }
    return 0;
}

typedef struct {
    const AvPass *pass;
    const TokenLoss *loss;
} Observed;

/* Without a way back the logits' log-probabilities go to the loss function and its derivative nowhere. */
static void observe(void *context, Engine *e, const Act *logits, int first, int n) {
    const Observed *o = context;
    float logp[LOGIT_ROWS], dlogp[LOGIT_ROWS];
    e->token_logprob(e, logp, logits, o->pass->target + first, n, o->pass->av->model.config.vocab_size);
    o->loss->tokens(o->loss->context, logp, dlogp, first, n);
}

int av_pass(AvPass *p, const AvGroup *group, int groups, const TokenLoss *loss, const Model *grad, Err *err) {
    Verbalizer *av = p->av;
    int D = av->model.config.hidden_size, tokens = 0, responses = 0, cache;
    for (int g = 0; g < groups; g++) {
        responses += group[g].samples;
        for (int s = 0; s < group[g].samples; s++) {
            tokens += group[g].length[s];
        }
    }
    int rows = av_rows(av, groups, responses, tokens, &cache);
    if (pass_room(&p->forest, &av->model, rows, cache, p->passes, err) != 0) {
        return -1;
    }
    float *scaled = xmalloc((size_t)groups * (size_t)D * sizeof(float));
    batch_clear(&p->batch);
    arrsetlen(p->target, 0);
    int root = av->marker_at > 0 ? forest_add(&p->forest, -1, av->marker_at, err) : -1, status = 0;
    if (root >= 0) {
        batch_add(&p->batch, &p->forest, root, av->prompt, av->marker_at, 0);
    }
    for (int g = 0; g < groups && status == 0; g++) {
        status = av_add_group(p, &group[g], scaled + (size_t)g * (size_t)D, root, err);
    }
    Observed o = {p, loss};
    LogitSink sink = {&o, observe};
    status = status == 0 ? model_forward(&p->forest, &p->batch, grad ? NULL : &sink, NULL, err) : -1;
    if (status == 0 && grad) {
        model_token_loss(&p->forest, &p->batch, p->target, loss, grad);
        model_backward(&p->forest, &p->batch, grad);
    }
    free(scaled);
    return status;
}

void av_pass_close(AvPass *p) {
    forest_close(&p->forest);
    batch_free(&p->batch);
    arrfree(p->target);
    *p = (AvPass){0};
}

/* ------------------------------------------------------------------------------------------------ AR */

static void free_vectors(ArPass *p) {
    Engine *e = p->ar ? p->ar->model.engine : NULL;
    if (e) {
        e->free(e, p->last);
        e->free(e, p->out);
        e->free(e, p->dout);
        e->free(e, p->gold);
    }
}

static int ar_room(ArPass *p, int rows, int texts, Err *err) {
    Engine *e = p->ar->model.engine;
    size_t width = (size_t)texts * (size_t)p->ar->model.config.hidden_size;
    if (texts > p->room) {
        free_vectors(p);
        p->last = e->alloc(e, e->act_dtype, width);
        p->out = e->alloc(e, e->act_dtype, width);
        p->dout = e->alloc(e, e->act_dtype, width);
        p->gold = e->alloc(e, DT_F32, width);
        p->room = texts;
        if (!p->last || !p->out || !p->dout || !p->gold) {
            return fail(err, "not enough memory for %d texts at once", texts);
        }
    }
    return pass_room(&p->forest, &p->ar->model, rows, rows + CACHE_ALIGN * (texts + 1), p->passes, err);
}

size_t ar_pass_bytes(const Reconstructor *ar, int texts, int tokens, Passes passes) {
    size_t vectors = (size_t)texts * (size_t)ar->model.config.hidden_size * (3 * dtype_size(ar->model.engine->act_dtype) + sizeof(float));
    return vectors + forest_bytes(&ar->model, ar->model.config.n_layers, tokens + CACHE_ALIGN * (texts + 1), tokens, passes);
}

static int ar_fill(ArPass *p, const char *const *text, const size_t *len, int n, Err *err) {
    Reconstructor *r = p->ar;
    int start = (int)arrlen(r->start), rows = start, **ids = xcalloc((size_t)n, sizeof(int *)), status = 0;
    for (int i = 0; i < n && status == 0; i++) {
        status = sidecar_text_ids(&r->meta, r->tok, text[i], len[i], &ids[i], err);
        rows += (int)arrlen(ids[i]) - (ar_shares_start(r, ids[i]) ? start : 0);
    }
    status = status == 0 ? ar_room(p, rows, n, err) : -1;
    batch_clear(&p->batch);
    arrsetlen(p->end_row, 0);
    int root = -1;
    if (status == 0 && start > 0) {
        root = forest_add(&p->forest, -1, start, err);
        batch_add(&p->batch, &p->forest, root, r->start, start, 0);
    }
    for (int i = 0; i < n && status == 0; i++) {
        int length = (int)arrlen(ids[i]);
        bool shared = ar_shares_start(r, ids[i]);
        int from = shared ? start : 0, seg = forest_add(&p->forest, shared ? root : -1, length - from, err);
        status = seg < 0 ? -1 : 0;
        if (status == 0) {
            batch_add(&p->batch, &p->forest, seg, ids[i] + from, length - from, 0);
            arrput(p->end_row, (int)arrlen(p->batch.token) - 1);
        }
    }
    for (int i = 0; i < n; i++) {
        arrfree(ids[i]);
    }
    free(ids);
    return status;
}

int ar_pass(ArPass *p, const char *const *text, const size_t *len, const float *gold, int n, double weight, double *mse,
            const Params *params, Err *err) {
    Reconstructor *r = p->ar;
    Engine *e = r->model.engine;
    int D = r->model.config.hidden_size;
    if (n == 0) {
        return 0;
    }
    if (ar_fill(p, text, len, n, err) != 0 || model_forward(&p->forest, &p->batch, NULL, NULL, err) != 0) {
        return -1;
    }
    Forest *f = &p->forest;
    e->gather(e, p->last, f->kept ? f->kept[f->blocks].in : f->x, p->end_row, n, D);
    e->linear(e, p->out, p->last, &r->head, n);
    e->write(e, p->gold, 0, gold, (size_t)n * (size_t)D);
    e->mse_nrm(e, mse, params ? p->dout : NULL, p->out, p->gold, n, D, (double)r->meta.mse_scale, weight);
    if (params) {
        e->linear_weight_backward(e, &params->head, p->dout, p->last, n);
        e->linear_backward(e, p->out, p->dout, &r->head, n, false); /* in the place of the predictions, which are done with */
        e->zero(e, f->dx, arrlenu(p->batch.token) * (size_t)D * dtype_size(e->act_dtype));
        e->scatter(e, f->dx, p->out, p->end_row, n, D);
        model_backward(f, &p->batch, &params->gradient);
    }
    return 0;
}

void ar_pass_close(ArPass *p) {
    free_vectors(p);
    forest_close(&p->forest);
    batch_free(&p->batch);
    arrfree(p->end_row);
    *p = (ArPass){0};
}

/* ------------------------------------------------------------------------------------------------ GRPO */

double reward_of(const Reward *how, bool explained, double mse, int tokens) {
    double error = !explained ? 2 : mse > 1e-6 ? mse : 1e-6; /* no reward without bound for the log of nothing */
    return (how->log ? -log(error) : explained ? -mse : -2) - how->length_penalty * tokens;
}

void advantages(const double *reward, int n, double *advantage) {
    double mean = 0, squares = 0;
    for (int i = 0; i < n; i++) {
        mean += reward[i] / n;
    }
    for (int i = 0; i < n; i++) {
        squares += (reward[i] - mean) * (reward[i] - mean);
    }
    double deviation = n > 1 ? sqrt(squares / (n - 1)) : 0;
    bool equal = true;
    for (int i = 1; i < n; i++) {
        equal = equal && reward[i] == reward[0];
    }
    for (int i = 0; i < n; i++) {
        advantage[i] = equal ? 0 : (reward[i] - mean) / (deviation + 1e-6);
    }
}

static double clamp(double x, double most) {
    return x > most ? most : x < -most ? -most : x;
}

enum { EXPONENT = 10 }; /* one token far off must not blow up a step */

double grpo_token(const Grpo *g, double logp, double old, double ref, double advantage, double *policy, double *kl, double *dlogp) {
    double apart = logp - old, rho = exp(clamp(apart, EXPONENT));
    double cut = rho < 1 - g->clip ? 1 - g->clip : rho > 1 + g->clip ? 1 + g->clip : rho;
    bool clipped = -cut * advantage > -rho * advantage;
    *policy = clipped ? -cut * advantage : -rho * advantage;
    *dlogp = clipped || fabs(apart) > EXPONENT ? 0 : -rho * advantage;
    double d = ref - logp, within = clamp(d, EXPONENT), slope;
    if (g->estimator == 1) {
        *kl = -d;
        slope = 1;
    } else if (g->estimator == 2) {
        *kl = d * d / 2;
        slope = -d;
    } else {
        *kl = exp(within) - 1 - within;
        slope = fabs(d) > EXPONENT ? 0 : 1 - exp(within);
    }
    *dlogp += g->kl * slope;
    return *policy + g->kl * *kl;
}

void grpo_tokens(void *context, const float *logp, float *dlogp, int first, int n) {
    GrpoLoss *x = context;
    for (int i = 0; i < n; i++) {
        int t = x->at + first + i;
        double policy, kl, slope;
        grpo_token(&x->how, (double)logp[i], (double)x->old[t], (double)x->ref[t], (double)x->advantage[t], &policy, &kl, &slope);
        double apart = fabs((double)logp[i] - (double)x->old[t]);
        x->apart = apart > x->apart ? apart : x->apart;
        x->policy += (double)x->weight[t] * policy;
        x->kl += (double)x->weight[t] * kl;
        dlogp[i] = (float)((double)x->weight[t] * slope);
    }
}

void keep_logprobs(void *context, const float *logp, float *dlogp, int first, int n) {
    KeepLogprobs *x = context;
    (void)dlogp;
    memcpy(x->logp + x->at + first, logp, (size_t)n * sizeof(float));
}
