/* run.c - a training run: its settings, the steps of the three stages (AV and AR warm starts, RL), held-out evaluation,
 * metrics. What a step computes is in train.c; what is kept of it on disk in checkpoint.c.
 *
 * A step depends on (settings, step number, weights, moments) alone: the rows of step s and all random numbers are keyed by s,
 * so a run that goes on from a checkpoint is the run that was never interrupted.
 */
#define _GNU_SOURCE /* memmem's family through nla.h */
#include "nla.h"

#include <errno.h>
#include <math.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <stb/stb_ds.h>

/* ------------------------------------------------------------------------------------------------ settings */

enum { AV = 1 << STAGE_AV, AR = 1 << STAGE_AR, RL = 1 << STAGE_RL };
#define SETTING(kind, field, value, stages, help) {stages, {#field, value, OPTION_##kind, offsetof(RunSettings, field), 0, 0, help}}

const RunKey run_keys[] = {
    SETTING(TEXT, out, "DIR", ALL_STAGES, "directory of the run: settings, metrics, checkpoints"),
    SETTING(TEXT, av, "DIR", ALL_STAGES, "the AV to train, or to read with (ar: not used)"),
    SETTING(TEXT, ar, "DIR", ALL_STAGES, "the AR to train (av: only for FVE at evaluations)"),
    SETTING(TEXT, data, "DIR", ALL_STAGES, "dataset of the rows to train on; av and ar need explanations in it"),
    SETTING(TEXT, eval, "DIR", ALL_STAGES, "dataset of held-out rows (default none: no evaluation); ar needs explanations in it"),
    SETTING(COUNT, steps, "N", ALL_STAGES, "updates (default 100)"),
    SETTING(COUNT, batch, "N", AV | AR, "rows of a step (default 16)"),
    SETTING(COUNT, vectors, "N", RL, "vectors of a step (default 8)"),
    SETTING(COUNT, samples, "N", RL, "texts drawn for each (default 8)"),
    SETTING(COUNT, micro, "N", ALL_STAGES, "rows, or rl's vectors, computed at a time (default 16, rl 4)"),
    SETTING(NUMBER, lr, "X", ALL_STAGES, "highest learning rate (default 2e-5; adapters 2e-4)"),
    SETTING(NUMBER, lr_final, "X", ALL_STAGES, "where the cosine ends (default lr / 10); equal to lr: constant"),
    SETTING(NUMBER, ar_lr, "X", RL, "of the AR (default 5 lr)"),
    SETTING(COUNT, warmup, "N", ALL_STAGES, "steps to the highest rate (default steps / 20)"),
    SETTING(NUMBER, clip, "X", ALL_STAGES, "largest norm of the gradient (default 1)"),
    SETTING(NUMBER, weight_decay, "X", ALL_STAGES, "AdamW's (default 0)"),
    SETTING(TEXT, masters, "f32|bf16", ALL_STAGES, "the weights that train: f32, or bf16 rounded stochastically (default f32)"),
    SETTING(TEXT, moments, "f32|bf16", ALL_STAGES, "f32, or bf16 rounded stochastically (default f32)"),
    SETTING(FLAG, recompute, "true|false", ALL_STAGES, "run blocks twice instead of keeping what they computed"),
    SETTING(COUNT, lora_rank, "N", ALL_STAGES, "train adapters of this rank (default 0: all weights)"),
    SETTING(NUMBER, lora_alpha, "X", ALL_STAGES, "their alpha (default rank)"),
    SETTING(FLAG, lora_rslora, "true|false", ALL_STAGES, "scale alpha / sqrt(rank) instead of alpha / rank"),
    SETTING(TEXT, lora_modules, "LIST", ALL_STAGES, "on which of q,k,v,o,gate,up,down (default all)"),
    SETTING(COUNT, max_tokens, "N", ALL_STAGES, "longest text drawn (default 150)"),
    SETTING(NUMBER, kl, "X", RL, "coefficient of the KL to the starting AV (default 0.01)"),
    SETTING(COUNT, kl_estimator, "3|2|1", RL, "3, 2 or 1 (default 3: k3)"),
    SETTING(NUMBER, clip_ratio, "X", RL, "of the policy's ratio (default 0.2)"),
    SETTING(COUNT, updates, "N", RL, "AV updates on one set of texts (default 1)"),
    SETTING(FLAG, log_mse, "true|false", RL, "reward -log(mse_nrm) instead of -mse_nrm"),
    SETTING(NUMBER, length_penalty, "X", RL, "taken off the reward for each token (default 0)"),
    SETTING(FLAG, freeze_ar, "true|false", RL, "leave the AR as it is (a control: FVE then stays flat)"),
    SETTING(FLAG, permute, "true|false", ALL_STAGES, "train on vectors of other rows (the control that can only learn style)"),
    SETTING(COUNT, eval_every, "N", ALL_STAGES, "steps between evaluations (default steps / 10)"),
    SETTING(COUNT, eval_rows, "N", ALL_STAGES, "held-out rows of one, spread over the set (default 64)"),
    SETTING(COUNT, save_every, "N", ALL_STAGES, "steps between checkpoints (default steps / 10)"),
    SETTING(COUNT, keep, "N", ALL_STAGES, "latest checkpoints kept, beside the best (default 2)"),
    SETTING(COUNT, seed, "N", ALL_STAGES, "of everything random (default 0)"),
    {0},
};
const char *const stage_names[] = {"av", "ar", "rl"};

enum { EVAL_GROUP = 32 }; /* held-out vectors that are read together */

static const Option *find_key(const char *name, size_t len, Stage stage, Err *err) {
    char *given = xstrndup(name, len);
    const Option *found = NULL;
    Guess g = {.given = given};
    for (const RunKey *k = run_keys; k->option.name && !found; k++) {
        if (k->stages >> stage & 1) {
            found = strcmp(k->option.name, given) == 0 ? &k->option : NULL;
            guess(&g, k->option.name);
        }
    }
    if (!found) {
        fail(err, "train %s has no setting '%s'%s; see: nla help train", stage_names[stage], given, g.hint);
    }
    free(given);
    return found;
}

bool setting_of(const char *given, Stage stage) {
    size_t len = strcspn(given, "=");
    bool found = false;
    for (const RunKey *k = run_keys; k->option.name; k++) {
        found = found || (k->stages >> stage & 1 && strlen(k->option.name) == len && strncmp(k->option.name, given, len) == 0);
    }
    return found;
}

/* Takes a copy of the text. */
static int set_key(RunSettings *r, const Option *k, const char *text, const char *where, Err *err) {
    void *place = (char *)r + k->place;
    char *end = NULL;
    double n = strtod(text, &end);
    bool number = *text && !*end && isfinite(n);
    if (k->kind == OPTION_TEXT) {
        free(*(char **)place);
        *(char **)place = xstrdup(text);
    } else if (k->kind == OPTION_FLAG) {
        bool yes = strcmp(text, "true") == 0 || strcmp(text, "1") == 0, no = strcmp(text, "false") == 0 || strcmp(text, "0") == 0;
        if (!yes && !no) {
            return fail(err, "%s: %s is true or false, not '%s'", where, k->name, text);
        }
        *(bool *)place = yes;
    } else if (!number || n < 0 || (k->kind == OPTION_COUNT && (n != floor(n) || n > 2e9))) {
        return fail(err, "%s: %s is a %s, not '%s'", where, k->name, k->kind == OPTION_COUNT ? "whole number" : "number from 0 on", text);
    } else if (k->kind == OPTION_COUNT) {
        *(int *)place = (int)n;
    } else {
        *(double *)place = n;
    }
    return 0;
}

static int read_config(RunSettings *r, Stage stage, const char *path, Err *err) {
    Yaml *y = yaml_load(path, err);
    int status = y ? 0 : -1;
    for (int i = 0; y && i < (int)arrlen(y->item) && status == 0; i++) {
        if (strcmp(y->key[i], "stage") == 0) { /* settings.yaml of a run says it */
            continue;
        }
        const Option *k = find_key(y->key[i], strlen(y->key[i]), stage, err);
        if (!k) {
            char message[sizeof err->msg];
            snprintf(message, sizeof message, "%s", err->msg);
            err->msg[0] = 0;
            status = fail(err, "%s: %.900s", path, message);
        } else if (y->item[i]->kind != YAML_SCALAR) {
            status = fail(err, "%s: %s must be one value", path, k->name);
        } else {
            status = set_key(r, k, y->item[i]->text, path, err);
        }
    }
    yaml_free(y);
    return status;
}

static void set_defaults(RunSettings *r, Stage stage) {
    bool lora = r->lora_rank > 0;
    r->steps = r->steps ? r->steps : 100;
    r->batch = r->batch ? r->batch : 16;
    r->vectors = r->vectors ? r->vectors : 8;
    r->samples = r->samples ? r->samples : 8;
    r->micro = r->micro ? r->micro : stage == STAGE_RL ? 4 : 16;
    r->lr = r->lr > 0 ? r->lr : lora ? 2e-4 : 2e-5;
    r->lr_final = r->lr_final >= 0 ? r->lr_final : r->lr / 10;
    r->ar_lr = r->ar_lr > 0 ? r->ar_lr : 5 * r->lr;
    r->warmup = r->warmup >= 0 ? r->warmup : (r->steps + 19) / 20;
    r->lora_alpha = r->lora_alpha > 0 ? r->lora_alpha : r->lora_rank;
    r->max_tokens = r->max_tokens ? r->max_tokens : 150;
    r->updates = r->updates ? r->updates : 1;
    r->eval_every = r->eval_every ? r->eval_every : (r->steps + 9) / 10;
    r->eval_rows = r->eval_rows ? r->eval_rows : 64;
    r->save_every = r->save_every ? r->save_every : (r->steps + 9) / 10;
    r->keep = r->keep ? r->keep : 2;
}

static int check_settings(const RunSettings *r, Stage stage, Err *err) {
    const struct {
        const char *value, *name;
        bool wanted;
    } paths[] = {{r->out, "out", true}, {r->data, "data", true}, {r->av, "av", stage != STAGE_AR}, {r->ar, "ar", stage != STAGE_AV}};
    for (int i = 0; i < 4; i++) {
        if (paths[i].wanted && !paths[i].value) {
            return fail(err, "train %s needs %s=PATH, in --config or behind it", stage_names[stage], paths[i].name);
        }
    }
    const char *const formats[][2] = {{"masters", r->masters}, {"moments", r->moments}};
    for (int i = 0; i < 2; i++) {
        if (formats[i][1] && strcmp(formats[i][1], "f32") != 0 && strcmp(formats[i][1], "bf16") != 0) {
            return fail(err, "%s is f32 or bf16, not '%s'", formats[i][0], formats[i][1]);
        }
    }
    if (r->kl_estimator < 1 || r->kl_estimator > 3) {
        return fail(err, "kl_estimator is 1, 2 or 3, not %d", r->kl_estimator);
    }
    if (stage == STAGE_RL && r->samples < 2) {
        return fail(err, "samples=%d: the advantage compares the texts of one vector, so there must be two or more", r->samples);
    }
    return 0;
}

int run_settings_read(RunSettings *r, Stage stage, const char *config, const char *const *given, int n, Err *err) {
    *r = (RunSettings){.lr_final = -1, .warmup = -1, .clip = 1, .kl = 0.01, .kl_estimator = 3, .clip_ratio = 0.2};
    int status = config ? read_config(r, stage, config, err) : 0;
    for (int i = 0; i < n && status == 0; i++) {
        const char *equals = strchr(given[i], '=');
        const Option *k = equals ? find_key(given[i], (size_t)(equals - given[i]), stage, err) : NULL;
        if (!equals) {
            status = fail(err, "'%s' is not a setting; they are written key=value", given[i]);
        } else {
            status = k ? set_key(r, k, equals + 1, "the command line", err) : -1;
        }
    }
    if (status == 0) {
        set_defaults(r, stage);
        status = check_settings(r, stage, err);
    }
    return status;
}

void run_settings_free(RunSettings *r) {
    for (const RunKey *k = run_keys; k->option.name; k++) {
        if (k->option.kind == OPTION_TEXT) {
            free(*(char **)((char *)r + k->option.place));
        }
    }
    *r = (RunSettings){0};
}

int run_settings_save(const RunSettings *r, Stage stage, const char *path, Err *err) {
    Yaml *y = yaml_new(YAML_MAP);
    yaml_set(y, "stage", stage_names[stage], false);
    for (const RunKey *k = run_keys; k->option.name; k++) {
        const Option *o = &k->option;
        const void *place = (const char *)r + o->place;
        char text[64];
        if (!(k->stages >> stage & 1) || (o->kind == OPTION_TEXT && !*(char *const *)place)) {
            continue;
        }
        if (o->kind == OPTION_TEXT) {
            yaml_set(y, o->name, *(char *const *)place, true);
            continue;
        }
        snprintf(text, sizeof text, "%.17g", o->kind == OPTION_NUMBER ? *(const double *)place : o->kind == OPTION_COUNT ? *(const int *)place : 0);
        yaml_set(y, o->name, o->kind == OPTION_FLAG ? (*(const bool *)place ? "true" : "false") : text, false);
    }
    int status = yaml_save(y, path, err);
    yaml_free(y);
    return status;
}

/* ------------------------------------------------------------------------------------------------ opening */

static volatile sig_atomic_t stop_asked;

static void ask_stop(int signal_number) {
    (void)signal_number;
    stop_asked = 1;
}

/* `times`: updates of these parameters in a step. */
static Schedule schedule_of(const RunSettings *s, double peak, int times) {
    return (Schedule){.adamw = {0.9f, 0.95f, 1e-8f, (float)s->weight_decay}, .peak = peak, .final = s->lr_final * peak / s->lr,
                      .warmup = s->warmup * times, .total = s->lr_final == s->lr ? 0 : s->steps * times, .clip = s->clip,
                      .seed = (uint64_t)s->seed};
}

/* Rows that can train: finite vectors, and an explanation where the stage needs one. */
static int choose_rows(const Dataset *d, bool explained, int64_t **rows, Err *err) {
    float *v = xmalloc((size_t)d->d_model * sizeof(float));
    int status = explained && !d->line ? fail(err, "%s: has no rows.jsonl, so no explanations to learn from", d->path) : 0;
    for (int64_t i = 0; i < d->n && status == 0; i++) {
        dataset_vector(d, i, v);
        double norm = vector_norm(v, d->d_model);
        if (!isfinite(norm) || norm == 0) {
            status = fail(err, "%s: the activation of row %lld is %s; take it out (nla data stats counts such rows)", d->path, (long long)i,
                          norm == 0 ? "zero" : "not finite");
        }
        bool usable = !explained;
        Json j;
        if (explained && status == 0 && (status = dataset_row(d, i, &j, err)) == 0) {
            usable = json_type(&j, json_get(&j, 0, "explanation")) == JSON_STRING;
            json_free(&j);
        }
        if (usable && status == 0) {
            arrput(*rows, i);
        }
    }
    free(v);
    if (status == 0 && arrlen(*rows) == 0) {
        status = fail(err, "%s: holds no row%s to train on", d->path, explained ? " with an explanation" : "");
    }
    return status;
}

static int check_layer(const Sidecar *meta, const Dataset *d, Err *err) {
    if (d->has_meta && d->meta.layer >= 0 && meta->layer >= 0 && d->meta.layer != meta->layer) {
        return fail(err, "%s was captured at layer %d, %s reads layer %d", d->path, d->meta.layer, meta->path, meta->layer);
    }
    return d->d_model == meta->d_model ? 0
                                       : fail(err, "%s: vectors have width %d, d_model of %s is %d", d->path, d->d_model, meta->path, meta->d_model);
}

static int add_adapters(const RunSettings *s, Model *m, uint64_t seed, Err *err) {
    if (s->lora_rank == 0 || m->lora.rank) {
        return 0; /* all weights, or the adapter that is there goes on */
    }
    LoraConfig c = {.rank = s->lora_rank, .alpha = s->lora_alpha, .rslora = s->lora_rslora};
    if (lora_modules(&c, s->lora_modules ? s->lora_modules : "q,k,v,o,gate,up,down", err) != 0) {
        return -1;
    }
    lora_new(m, &c, seed);
    return 0;
}

static bool trains_av(const TrainRun *r) { return r->stage != STAGE_AR; }
static bool trains_ar(const TrainRun *r) { return r->stage == STAGE_AR || (r->stage == STAGE_RL && !r->s.freeze_ar); }
static DType format_of(const char *name) { return name && strcmp(name, "bf16") == 0 ? DT_BF16 : DT_F32; }

/* Opens what the stage needs: from the checkpoint when there is one to go on from, else from the settings. */
static int open_models(TrainRun *r, const char *checkpoint, Err *err) {
    const RunSettings *s = &r->s;
    char *av = checkpoint && trains_av(r) ? xprintf("%s/av", checkpoint) : s->av ? xstrdup(s->av) : NULL;
    char *ar = checkpoint && trains_ar(r) ? xprintf("%s/ar", checkpoint) : s->ar ? xstrdup(s->ar) : NULL;
    int status = 0;
    if (trains_av(r)) {
        status = verbalizer_open(&r->av, av, NULL, NAN, r->engine, err);
        r->has_av = status == 0;
    }
    if (status == 0 && ar) {
        status = reconstructor_open(&r->ar, ar, NULL, r->engine, err);
        r->has_ar = status == 0;
    }
    if (status == 0 && r->stage == STAGE_RL) {
        status = verbalizer_open(&r->ref, s->av, NULL, NAN, r->engine, err);
        r->has_ref = status == 0;
    }
    Passes passes = s->recompute ? TRAINING_RECOMPUTED : TRAINING;
    if (status == 0 && trains_av(r)) {
        status = add_adapters(s, &r->av.model, (uint64_t)s->seed, err);
        r->av_pass = (AvPass){.av = &r->av, .passes = passes};
        r->ref_pass = (AvPass){.av = &r->ref, .passes = FORWARD};
    }
    if (status == 0 && trains_ar(r)) {
        status = add_adapters(s, &r->ar.model, (uint64_t)s->seed + 1, err);
    }
    r->ar_pass = (ArPass){.ar = &r->ar, .passes = trains_ar(r) ? passes : FORWARD};
    free(av);
    free(ar);
    return status;
}

int train_params(TrainRun *r, Err *err) {
    DType masters = format_of(r->s.masters), moments = format_of(r->s.moments);
    int status = 0;
    if (trains_av(r)) {
        status = params_open(&r->av_params, &r->av.model, r->av.model.lora.rank > 0, NULL, masters, moments, err);
    }
    if (status == 0 && trains_ar(r)) {
        status = params_open(&r->ar_params, &r->ar.model, r->ar.model.lora.rank > 0, &r->ar.head, masters, moments, err);
    }
    return status;
}

static int open_data(TrainRun *r, Err *err) {
    const RunSettings *s = &r->s;
    const Sidecar *meta = r->has_av ? &r->av.meta : &r->ar.meta;
    if (dataset_open(&r->data, s->data, err) != 0 || check_layer(meta, &r->data, err) != 0 ||
        choose_rows(&r->data, r->stage != STAGE_RL, &r->rows, err) != 0) {
        return -1;
    }
    if (s->eval && (dataset_open(&r->held, s->eval, err) != 0 || check_layer(meta, &r->held, err) != 0 ||
                    choose_rows(&r->held, r->stage == STAGE_AR, &r->held_rows, err) != 0)) {
        return -1;
    }
    int64_t n = arrlen(r->held_rows), chosen = n < s->eval_rows ? n : s->eval_rows;
    for (int64_t i = 0; i < chosen; i++) { /* neighbours come from one document */
        arrput(r->eval_row, r->held_rows[i * n / chosen]);
    }
    if (r->has_av && r->has_ar && r->av.meta.d_model != r->ar.meta.d_model) {
        return fail(err, "%s has d_model %d, %s has %d", r->av.meta.path, r->av.meta.d_model, r->ar.meta.path, r->ar.meta.d_model);
    }
    return 0;
}

int train_open(TrainRun *r, const char *checkpoint, Err *err) {
    if (open_models(r, checkpoint, err) != 0 || open_data(r, err) != 0) {
        return -1;
    }
    const Dataset *d = r->held.path ? &r->held : &r->data;
    const int64_t *rows = r->held.path ? r->held_rows : r->rows;
    float *v = xmalloc((size_t)d->d_model * sizeof(float));
    Baseline base = {0};
    for (int64_t i = 0; i < arrlen(rows) && i < 4096; i++) {
        dataset_vector(d, rows[i], v);
        baseline_add(&base, v, d->d_model);
    }
    r->var_nrm = baseline_var(&base, d->d_model);
    baseline_free(&base);
    free(v);
    return 0;
}

void train_close(TrainRun *r) {
    av_pass_close(&r->av_pass);
    av_pass_close(&r->ref_pass);
    ar_pass_close(&r->ar_pass);
    params_close(&r->av_params);
    params_close(&r->ar_params);
    if (r->has_av) {
        verbalizer_close(&r->av);
    }
    if (r->has_ref) {
        verbalizer_close(&r->ref);
    }
    if (r->has_ar) {
        reconstructor_close(&r->ar);
    }
    if (r->data.path) {
        dataset_close(&r->data);
    }
    if (r->held.path) {
        dataset_close(&r->held);
    }
    if (r->metrics) {
        fclose(r->metrics);
    }
    arrfree(r->rows);
    arrfree(r->held_rows);
    arrfree(r->eval_row);
    free(r->order);
    run_settings_free(&r->s);
    if (r->engine) {
        r->engine->close(r->engine);
    }
}

/* ------------------------------------------------------------------------------------------------ rows of a step */

/* The row at place `at` of the endless sequence of shuffled epochs. */
static int64_t row_at(TrainRun *r, int64_t at) {
    int64_t n = arrlen(r->rows), epoch = n ? at / n : 0; /* choose_rows has refused an empty list */
    if (!r->order || r->epoch != epoch) {
        r->order = r->order ? r->order : xmalloc((size_t)n * sizeof(int64_t));
        r->epoch = epoch;
        for (int64_t i = 0; i < n; i++) {
            r->order[i] = r->rows[i];
        }
        for (int64_t i = n - 1; i > 0; i--) {
            int64_t j = (int64_t)(random_uniform((uint64_t)r->s.seed, (uint64_t)epoch, (uint64_t)i, 11) * (double)(i + 1)), swap = r->order[i];
            r->order[i] = r->order[j];
            r->order[j] = swap;
        }
    }
    return r->order[n ? at % n : 0];
}

/* The training row whose vector the control shows in a row's place, the same one every time. */
static int64_t other_row(const TrainRun *r, int64_t row) {
    int64_t n = arrlen(r->rows), at = (int64_t)(random_uniform((uint64_t)r->s.seed, (uint64_t)row, 0, 12) * (double)n);
    return r->rows[at] == row ? r->rows[(at + 1) % n] : r->rows[at];
}

static char *explanation_at(const Dataset *d, int64_t row, size_t *len, Err *err) {
    Json j;
    if (dataset_row(d, row, &j, err) != 0) {
        return NULL;
    }
    char *text = json_string(&j, json_get(&j, 0, "explanation"), len);
    json_free(&j);
    return text;
}

static void rows_free(Rows *x) {
    for (int i = 0; i < x->n; i++) {
        free(x->text[i]);
    }
    free(x->text);
    free(x->len);
    free(x->row);
    if (x->gold != x->vector) {
        free(x->gold);
    }
    free(x->vector);
}

static int rows_read(Rows *x, const Dataset *d, const int64_t *row, int n, bool texts, Err *err) {
    *x = (Rows){.n = n, .D = d->d_model};
    x->vector = x->gold = xmalloc((size_t)n * (size_t)x->D * sizeof(float));
    x->text = xcalloc((size_t)n, sizeof(char *));
    x->len = xcalloc((size_t)n, sizeof(size_t));
    x->row = xcalloc((size_t)n, sizeof(int64_t));
    for (int i = 0; i < n; i++) {
        x->row[i] = row[i];
        dataset_vector(d, row[i], x->vector + (size_t)i * (size_t)x->D);
        if (texts && !(x->text[i] = explanation_at(d, row[i], &x->len[i], err))) {
            return fail(err, "%s: row %lld has no explanation", d->path, (long long)row[i]);
        }
    }
    return 0;
}

/* The n rows of the step that is being made; in the control with vectors of other rows. */
static int step_rows(Rows *x, TrainRun *r, int n, bool texts, Err *err) {
    int64_t *row = xcalloc((size_t)n, sizeof(int64_t));
    for (int i = 0; i < n; i++) {
        row[i] = row_at(r, (r->step - 1) * n + i);
    }
    int status = rows_read(x, &r->data, row, n, texts, err);
    if (r->s.permute) {
        x->vector = xmalloc((size_t)n * (size_t)x->D * sizeof(float));
        for (int i = 0; i < n; i++) {
            dataset_vector(&r->data, other_row(r, row[i]), x->vector + (size_t)i * (size_t)x->D);
        }
    }
    free(row);
    return status;
}

/* ------------------------------------------------------------------------------------------------ AV and AR steps */

typedef struct {
    double sum;
    double weight; /* 1 / tokens of the whole step */
} CrossEntropy;

static void cross_entropy(void *context, const float *logp, float *dlogp, int first, int n) {
    CrossEntropy *x = context;
    (void)first;
    for (int i = 0; i < n; i++) {
        x->sum -= x->weight * (double)logp[i];
        dlogp[i] = (float)-x->weight;
    }
}

/* Mean cross entropy over the tokens of all responses, some rows at a time. grad NULL: no gradient. */
static int responses_loss(TrainRun *r, const Rows *x, const Model *grad, double *loss, int64_t *tokens, Err *err) {
    int **response = xcalloc((size_t)x->n, sizeof(int *)), *length = xcalloc((size_t)x->n, sizeof(int)), status = 0;
    AvGroup *group = xcalloc((size_t)x->n, sizeof(AvGroup));
    *tokens = 0;
    for (int i = 0; i < x->n && status == 0; i++) {
        status = av_response(&r->av, x->text[i], x->len[i], &response[i], err);
        length[i] = (int)arrlen(response[i]);
        *tokens += length[i];
        group[i] = (AvGroup){x->vector + (size_t)i * (size_t)x->D, x->row[i], (const int *const *)&response[i], &length[i], 1};
    }
    CrossEntropy c = {.weight = 1.0 / (double)(*tokens ? *tokens : 1)};
    TokenLoss each = {&c, cross_entropy};
    for (int i = 0; i < x->n && status == 0; i += r->s.micro) {
        status = av_pass(&r->av_pass, group + i, x->n - i < r->s.micro ? x->n - i : r->s.micro, &each, grad, err);
    }
    *loss = c.sum;
    for (int i = 0; i < x->n; i++) {
        arrfree(response[i]);
    }
    free(response);
    free(length);
    free(group);
    return status;
}

static int texts_loss(TrainRun *r, char *const *text, const size_t *len, const float *gold, int n, bool train, double *mse, Err *err) {
    int D = r->ar.model.config.hidden_size, status = 0, micro = r->stage == STAGE_RL ? r->s.micro * r->s.samples : r->s.micro;
    for (int i = 0; i < n && status == 0; i += micro) {
        status = ar_pass(&r->ar_pass, (const char *const *)text + i, len + i, gold + (size_t)i * (size_t)D, n - i < micro ? n - i : micro,
                         1.0 / n, mse + i, train ? &r->ar_params : NULL, err);
    }
    return status;
}

static double mean(const double *x, int n) {
    double sum = 0;
    for (int i = 0; i < n; i++) {
        sum += x[i] / n;
    }
    return sum;
}

/* mse_nrm of n texts, 2 where there is none (text[i] NULL), and the mean over those that are there; texts i, i+1, .. `share` of them have
 * one gold. */
static int texts_errors(TrainRun *r, char *const *text, const size_t *len, const float *gold, int n, int share, bool train, double *mse,
                        double *loss, Err *err) {
    size_t D = (size_t)r->ar.model.config.hidden_size, room = (size_t)n + 1;
    int valid = 0, *place = xcalloc(room, sizeof(int));
    char **given = xcalloc(room, sizeof(char *));
    size_t *given_len = xcalloc(room, sizeof(size_t));
    float *target = xmalloc(room * D * sizeof(float));
    double *some = xcalloc(room, sizeof(double));
    for (int i = 0; i < n; i++) {
        mse[i] = 2;
        if (text[i]) {
            memcpy(target + (size_t)valid * D, gold + (size_t)(i / share) * D, D * sizeof(float));
            given[valid] = text[i];
            given_len[valid] = len[i];
            place[valid++] = i;
        }
    }
    int status = texts_loss(r, given, given_len, target, valid, train, some, err);
    for (int i = 0; i < valid; i++) {
        mse[place[i]] = some[i];
    }
    *loss = valid ? mean(some, valid) : NAN;
    free(place);
    free(given);
    free(given_len);
    free(target);
    free(some);
    return status;
}

/* Applies an update, or counts it as skipped: a loss or a gradient that is not finite changes nothing. */
static void update(TrainRun *r, Params *p, const Schedule *schedule, double loss, double *norm) {
    Engine *e = r->engine;
    bool good = isfinite(loss);
    if (!good) {
        e->zero(e, p->grad, p->count * sizeof(float));
        *norm = NAN;
    } else {
        good = params_step(p, schedule, norm);
    }
    if (p == &r->av_params) {
        verbalizer_renew(&r->av);
    }
    r->skipped += !good;
    r->skipped_in_row = good ? 0 : r->skipped_in_row + 1;
}

int step_sft(TrainRun *r, Measures *m, Err *err) {
    const RunSettings *s = &r->s;
    Rows x;
    int status = step_rows(&x, r, s->batch, true, err);
    double loss = 0, norm = 0, *mse = xcalloc((size_t)s->batch, sizeof(double));
    int64_t tokens = 0;
    if (status == 0 && r->stage == STAGE_AV) {
        status = responses_loss(r, &x, &r->av_params.gradient, &loss, &tokens, err);
    } else if (status == 0) {
        status = texts_loss(r, x.text, x.len, x.vector, x.n, true, mse, err);
        loss = mean(mse, x.n);
        for (int i = 0; i < x.n; i++) {
            tokens += (int64_t)x.len[i]; /* bytes: the AR's rows are texts */
        }
    }
    if (status == 0) {
        Schedule schedule = schedule_of(s, s->lr, 1);
        update(r, r->stage == STAGE_AV ? &r->av_params : &r->ar_params, &schedule, loss, &norm);
        measure(m, "loss", loss);
        if (r->stage == STAGE_AR) {
            measure(m, "fve", 1 - loss / r->var_nrm);
        }
        measure(m, "grad_norm", norm);
        measure(m, "lr", learning_rate(&schedule, r->step));
        m->work = (double)tokens;
    }
    free(mse);
    rows_free(&x);
    return status;
}

/* ------------------------------------------------------------------------------------------------ the RL step */

void rollouts_free(Rollouts *o) {
    for (int i = 0; i < o->n; i++) {
        if (o->token) {
            arrfree(o->token[i]);
        }
        if (o->text) {
            free(o->text[i]);
        }
    }
    free(o->token);
    free(o->length);
    free(o->text);
    free(o->len);
    free(o->mse);
    free(o->reward);
    free(o->advantage);
    free(o->old);
    free(o->ref);
    free(o->advantages);
    free(o->weight);
    free(o->group);
    decoder_free(&o->d);
    rows_free(&o->x);
}

/* 1: draws the texts, keeping every token's log-probability. A text counts when it ended by itself with both tags. */
static int roll_out(TrainRun *r, Rollouts *o, Err *err) {
    const RunSettings *s = &r->s;
    int P = s->vectors, G = s->samples;
    int status = step_rows(&o->x, r, P, false, err);
    Decoding how = {.sampler = {.temperature = 1, .top_p = 1, .seed = random_key((uint64_t)s->seed, (uint64_t)r->step, 0, 13)},
                    .max_tokens = s->max_tokens, .whole = true};
    if (status != 0 || verbalize(&r->av, &o->d, o->x.vector, P, 0, G, &how, err) != 0) {
        return -1;
    }
    o->n = P * G;
    size_t n = (size_t)o->n;
    o->token = xcalloc(n, sizeof(int *));
    o->length = xcalloc(n, sizeof(int));
    o->text = xcalloc(n, sizeof(char *));
    o->len = xcalloc(n, sizeof(size_t));
    o->group = xcalloc((size_t)P, sizeof(AvGroup));
    for (int i = 0; i < o->n; i++) {
        const Sample *x = &o->d.sample[i];
        const char *start;
        size_t len;
        for (int t = 0; t < (int)arrlen(x->ids); t++) {
            arrput(o->token[i], x->ids[t]);
        }
        if (x->ended) {
            arrput(o->token[i], x->next);
        }
        o->length[i] = (int)arrlen(o->token[i]);
        o->tokens += o->length[i];
        bool explained = explanation_of(x->text, arrlenu(x->text), &start, &len);
        if (x->ended && explained) {
            o->text[i] = xstrndup(start, len);
            o->len[i] = len;
        }
        o->truncated += !x->ended;
        o->failed += x->ended && !explained;
    }
    for (int g = 0; g < P; g++) {
        o->group[g] = (AvGroup){o->x.vector + (size_t)g * (size_t)o->x.D, o->x.row[g], (const int *const *)&o->token[g * G], &o->length[g * G], G};
    }
    return 0;
}

/* 2, 5: the live AR reads the texts. Their errors are the rewards; their gradient is the AR's own, in the same pass. */
static int reward_texts(TrainRun *r, Rollouts *o, double *ar_loss, Err *err) {
    int G = r->s.samples;
    o->mse = xcalloc((size_t)o->n, sizeof(double));
    o->reward = xcalloc((size_t)o->n, sizeof(double));
    o->advantage = xcalloc((size_t)o->n, sizeof(double));
    int status = texts_errors(r, o->text, o->len, o->x.gold, o->n, G, !r->s.freeze_ar, o->mse, ar_loss, err);
    Reward how = {r->s.log_mse, r->s.length_penalty};
    for (int i = 0; i < o->n; i++) {
        o->reward[i] = reward_of(&how, o->text[i] != NULL, o->mse[i], o->length[i]);
    }
    for (int g = 0; g < o->n; g += G) { /* 3 */
        advantages(o->reward + g, G, o->advantage + g);
    }
    return status;
}

/* All texts through one AV, some vectors at a time; *at, the loss's own place among the tokens, moves along. */
static int rollouts_pass(const TrainRun *r, const Rollouts *o, AvPass *pass, const TokenLoss *each, int *at, const Model *grad, Err *err) {
    int P = r->s.vectors, G = r->s.samples, micro = r->s.micro, status = 0;
    for (int g = 0; g < P && status == 0; g += micro) {
        int groups = P - g < micro ? P - g : micro;
        status = av_pass(pass, o->group + g, groups, each, grad, err);
        for (int i = g * G; i < (g + groups) * G; i++) {
            *at += o->length[i];
        }
    }
    return status;
}

/* What the loss needs of every token: when drawn, under the frozen AV, its sample's advantage and weight. */
static int reference_texts(TrainRun *r, Rollouts *o, Err *err) {
    size_t n = (size_t)o->tokens;
    o->old = xmalloc((n + 1) * sizeof(float));
    o->ref = xmalloc((n + 1) * sizeof(float));
    o->advantages = xmalloc((n + 1) * sizeof(float));
    o->weight = xmalloc((n + 1) * sizeof(float));
    for (int i = 0, at = 0; i < o->n; i++) {
        for (int t = 0; t < o->length[i]; t++, at++) {
            o->old[at] = o->d.sample[i].logprob[t];
            o->advantages[at] = (float)o->advantage[i];
            o->weight[at] = 1.0f / (float)((double)o->n * o->length[i]);
        }
    }
    KeepLogprobs keep = {o->ref, 0};
    TokenLoss each = {&keep, keep_logprobs};
    return rollouts_pass(r, o, &r->ref_pass, &each, &keep.at, NULL, err);
}

/* 4: one update of the policy on the drawn texts. */
static int policy_update(TrainRun *r, const Rollouts *o, double *policy, double *kl, double *apart, double *norm, Err *err) {
    const RunSettings *s = &r->s;
    Schedule schedule = schedule_of(s, s->lr, s->updates);
    GrpoLoss x = {.how = {s->clip_ratio, s->kl, s->kl_estimator}, .old = o->old, .ref = o->ref, .advantage = o->advantages, .weight = o->weight};
    TokenLoss each = {&x, grpo_tokens};
    int status = rollouts_pass(r, o, &r->av_pass, &each, &x.at, &r->av_params.gradient, err);
    *policy = x.policy;
    *kl = x.kl;
    *apart = x.apart;
    if (status == 0) {
        update(r, &r->av_params, &schedule, x.policy + s->kl * x.kl, norm);
    }
    return status;
}

/* What the engine took since the last lap, or since start. */
static double lap(Engine *e) {
    double seconds = e->stop(e);
    e->start(e);
    return seconds;
}

int rl_draw(TrainRun *r, Rollouts *o, Measures *m, Err *err) {
    r->engine->start(r->engine);
    int status = roll_out(r, o, err);
    measure(m, "seconds_rollout", lap(r->engine));
    return status;
}

static void measure_rollouts(const TrainRun *r, const Rollouts *o, Measures *m) {
    double reward = mean(o->reward, o->n), spread = 0, length = 0;
    for (int i = 0; i < o->n; i++) {
        spread += (o->reward[i] - reward) * (o->reward[i] - reward) / o->n;
        length += (double)o->length[i] / o->n;
    }
    measure(m, "reward", reward);
    measure(m, "reward_std", sqrt(spread));
    measure(m, "mse_nrm", mean(o->mse, o->n));
    measure(m, "fve", 1 - mean(o->mse, o->n) / r->var_nrm);
    measure(m, "tokens_mean", length);
    measure(m, "failed", (double)o->failed / o->n);
    measure(m, "truncated", (double)o->truncated / o->n);
    m->work = o->tokens;
}

int rl_learn(TrainRun *r, Rollouts *o, Measures *m, Err *err) {
    Engine *e = r->engine;
    double ar_loss = 0, policy = 0, kl = 0, norm = 0, ar_norm = 0, apart = 0, later = 0;
    e->start(e);
    int status = reward_texts(r, o, &ar_loss, err);
    double rewarded = lap(e);
    status = status == 0 ? reference_texts(r, o, err) : -1;
    double referred = lap(e);
    for (int u = 0; u < r->s.updates && status == 0; u++) {
        status = policy_update(r, o, &policy, &kl, u == 0 ? &apart : &later, &norm, err);
    }
    double learned = lap(e);
    if (status == 0 && !r->s.freeze_ar && isfinite(ar_loss)) {
        Schedule schedule = schedule_of(&r->s, r->s.ar_lr, 1);
        update(r, &r->ar_params, &schedule, ar_loss, &ar_norm);
    }
    double updated = e->stop(e);
    if (status == 0) {
        measure_rollouts(r, o, m);
        measure(m, "ar_loss", ar_loss);
        measure(m, "policy_loss", policy);
        measure(m, "kl", kl);
        measure(m, "grad_norm", norm);
        measure(m, "ar_grad_norm", ar_norm);
        Schedule schedule = schedule_of(&r->s, r->s.lr, r->s.updates);
        measure(m, "lr", learning_rate(&schedule, r->av_params.step));
        measure(m, "logp_apart", apart);
        measure(m, "seconds_reward_and_ar", rewarded);
        measure(m, "seconds_reference", referred);
        measure(m, "seconds_policy", learned);
        measure(m, "seconds_ar_update", updated);
    }
    return status;
}

static int step_rl(TrainRun *r, Measures *m, Err *err) {
    Rollouts o = {0};
    int status = rl_draw(r, &o, m, err);
    status = status == 0 ? rl_learn(r, &o, m, err) : -1;
    rollouts_free(&o);
    return status;
}

/* ------------------------------------------------------------------------------------------------ evaluation */

static int metrics_written(TrainRun *r, Err *err) {
    return fflush(r->metrics) == 0 && !ferror(r->metrics)
               ? 0
               : fail(err, "%s/metrics.jsonl: cannot write: %s; the last checkpoint is intact", r->s.out, strerror(errno));
}

/* 1 - mean / var, with the interval that the mean's standard error gives. */
static void put_fve(FILE *out, const char *name, const double *mse, int n, double var, bool interval) {
    double m = mean(mse, n), squares = 0;
    for (int i = 0; i < n; i++) {
        squares += (mse[i] - m) * (mse[i] - m);
    }
    double error = n > 1 ? 1.96 * sqrt(squares / (n - 1) / n) / var : NAN;
    json_number(out, name, 1 - m / var);
    if (interval) {
        json_number(out, "low", 1 - m / var - error);
        json_number(out, "high", 1 - m / var + error);
    }
}

/* What the AV says of each vector, read at temperature 0; NULL where it failed. */
static int tell_rows(TrainRun *r, const Rows *x, char **text, size_t *length, double *failed, double *tokens, Err *err) {
    Decoding how = {.sampler = {.top_p = 1}, .max_tokens = r->s.max_tokens};
    int status = 0;
    *failed = *tokens = 0;
    for (int i = 0; i < x->n && status == 0; i += EVAL_GROUP) {
        int n = x->n - i < EVAL_GROUP ? x->n - i : EVAL_GROUP;
        Decoder d;
        status = verbalize(&r->av, &d, x->vector + (size_t)i * (size_t)x->D, n, 0, 1, &how, err);
        for (int j = 0; j < n && status == 0; j++) {
            const char *start;
            size_t len;
            bool found = explanation_of(d.sample[j].text, arrlenu(d.sample[j].text), &start, &len);
            text[i + j] = found ? xstrndup(start, len) : NULL;
            length[i + j] = found ? len : 0;
            *failed += !found / (double)x->n;
            *tokens += (double)arrlen(d.sample[j].ids) / x->n;
        }
        decoder_free(&d);
    }
    return status;
}

/* Each row's vector or text exchanged for the next one's: what a score is worth that does not depend on the row. */
static float *rotated(const Rows *x) {
    size_t D = (size_t)x->D, n = (size_t)x->n;
    float *out = xmalloc(n * D * sizeof(float));
    for (size_t i = 0; i < n; i++) {
        memcpy(out + i * D, x->vector + (i + 1) % n * D, D * sizeof(float));
    }
    return out;
}

static void put_samples(FILE *out, const TrainRun *r, const Rows *x, char *const *text, const double *mse) {
    fputs("}, \"samples\": [", out);
    for (int i = 0; i < x->n && i < 8; i++) {
        Json j;
        Err ignored = {0};
        fprintf(out, "%s{\"row\": %lld", i ? ", " : "", (long long)x->row[i]);
        if (r->held.line && dataset_row(&r->held, x->row[i], &j, &ignored) == 0) {
            size_t len;
            char *prefix = json_string(&j, json_get(&j, 0, "text"), &len);
            if (prefix) {
                fputs(", \"prefix\": ", out);
                json_write_string(out, prefix, len);
            }
            free(prefix);
            json_free(&j);
        }
        json_text(out, "explanation", text[i]);
        json_number(out, "fve", 1 - mse[i] / r->var_nrm);
        fputc('}', out);
    }
    fputc(']', out);
}

/* The AV's loss on held-out explanations and with vectors exchanged; nothing when a row has no explanation. */
static int evaluate_loss(TrainRun *r, FILE *out, int n, double *score, Err *err) {
    Rows x;
    Err none = {0};
    double loss, other;
    int64_t tokens;
    int status = 0;
    if (rows_read(&x, &r->held, r->eval_row, n, true, &none) == 0) {
        status = responses_loss(r, &x, NULL, &loss, &tokens, err);
        float *own = x.vector;
        x.vector = rotated(&x);
        status = status == 0 ? responses_loss(r, &x, NULL, &other, &tokens, err) : -1;
        free(x.vector);
        x.vector = own;
        if (status == 0) {
            json_number(out, "loss", loss);
            json_number(out, "loss_permuted", other);
            *score = -loss;
        }
    }
    rows_free(&x);
    return status;
}

/* FVE of texts and of texts exchanged, and some of them to read. */
static int evaluate_texts(TrainRun *r, FILE *out, const Rows *x, char *const *text, const size_t *len, double *score, Err *err) {
    double *mse = xcalloc((size_t)x->n, sizeof(double)), *other = xcalloc((size_t)x->n, sizeof(double)), ignored;
    float *turned = rotated(x);
    int status = texts_errors(r, text, len, x->vector, x->n, 1, false, mse, &ignored, err);
    status = status == 0 ? texts_errors(r, text, len, turned, x->n, 1, false, other, &ignored, err) : -1;
    if (status == 0) {
        put_fve(out, "fve", mse, x->n, r->var_nrm, true);
        put_fve(out, "fve_permuted", other, x->n, r->var_nrm, false);
        *score = 1 - mean(mse, x->n) / r->var_nrm;
        put_samples(out, r, x, text, mse);
    }
    free(turned);
    free(mse);
    free(other);
    return status;
}

/* One line of the metrics: how the models do on held-out rows as they are now. */
static int evaluate(TrainRun *r, double *score, Err *err) {
    int n = (int)arrlen(r->eval_row);
    Rows x;
    char *line = NULL, **text = xcalloc((size_t)n, sizeof(char *));
    size_t line_len = 0, *len = xcalloc((size_t)n, sizeof(size_t));
    FILE *out = open_memstream(&line, &line_len);
    int status = rows_read(&x, &r->held, r->eval_row, n, r->stage == STAGE_AR, err);
    fprintf(out, "{\"step\": %lld, \"eval\": {\"rows\": %d", (long long)r->step, n);
    *score = NAN;
    if (status == 0 && r->stage == STAGE_AV && r->held.line) {
        status = evaluate_loss(r, out, n, score, err);
    }
    if (status == 0 && r->stage != STAGE_AR && r->has_ar) {
        double failed = 0, tokens = 0;
        status = tell_rows(r, &x, text, len, &failed, &tokens, err);
        json_number(out, "failed", failed);
        json_number(out, "tokens_mean", tokens);
    }
    for (int i = 0; i < n && r->stage == STAGE_AR && status == 0; i++) {
        text[i] = xstrdup(x.text[i]);
        len[i] = x.len[i];
    }
    if (status == 0 && r->has_ar) {
        status = evaluate_texts(r, out, &x, text, len, score, err);
    } else {
        fputs("}", out);
    }
    fputs("}\n", out);
    fclose(out);
    if (status == 0) {
        fwrite(line, 1, line_len, r->metrics);
        status = metrics_written(r, err);
    }
    for (int i = 0; i < n; i++) {
        free(text[i]);
    }
    free(text);
    free(len);
    free(line);
    rows_free(&x);
    return status;
}

/* ------------------------------------------------------------------------------------------------ the run */

void measure(Measures *m, const char *name, double value) {
    if (m->n < (int)(sizeof m->value / sizeof *m->value)) {
        m->name[m->n] = name;
        m->value[m->n++] = value;
    }
}

static int write_step(TrainRun *r, const Measures *m, double seconds, Err *err) {
    fprintf(r->metrics, "{\"step\": %lld", (long long)r->step);
    for (int i = 0; i < m->n; i++) {
        json_number(r->metrics, m->name[i], m->value[i]);
    }
    json_number(r->metrics, "skipped", (double)r->skipped);
    json_number(r->metrics, r->stage == STAGE_AR ? "bytes_per_s" : "tokens_per_s", m->work / seconds);
    json_number(r->metrics, "seconds", seconds);
    fputs("}\n", r->metrics);
    return metrics_written(r, err);
}

static void say_step(TrainRun *r, const Settings *s, const Measures *m, double start, int64_t from) {
    double t = now(), done = (double)(r->step - from), left = (t - start) / done * (double)(r->s.steps - r->step);
    bool last = r->step == r->s.steps;
    if (s->quiet || (!last && t - r->spoke < (isatty(STDERR_FILENO) ? 0.5 : 10))) {
        return;
    }
    r->spoke = t;
    fprintf(stderr, "train %s: step %lld of %d", stage_names[r->stage], (long long)r->step, r->s.steps);
    for (int i = 0; i < m->n; i++) {
        static const char *const shown[] = {"loss", "reward", "fve", "ar_loss", "kl", "tokens_mean", "failed", "truncated", "grad_norm"};
        for (size_t j = 0; j < sizeof shown / sizeof *shown; j++) {
            if (strcmp(m->name[i], shown[j]) == 0) {
                fprintf(stderr, ", %s %.4g", m->name[i], m->value[i]);
            }
        }
    }
    fprintf(stderr, ", %.1f s a step, %.0f:%02d left\n", (t - start) / done, floor(left / 60), (int)fmod(left, 60));
}

static int one_step(TrainRun *r, const Settings *s, double start, int64_t from, Err *err) {
    Measures m = {0};
    double began = now();
    int status = r->stage == STAGE_RL ? step_rl(r, &m, err) : step_sft(r, &m, err);
    if (status != 0) {
        return -1;
    }
    if (write_step(r, &m, now() - began, err) != 0) {
        return -1;
    }
    say_step(r, s, &m, start, from);
    if (r->skipped_in_row >= 10) {
        return fail(err, "ten updates in a row were not finite and were skipped; lower lr (%g) or look at the data. The last checkpoint is intact",
                    r->s.lr);
    }
    return 0;
}

static int train(TrainRun *r, const Settings *s, Err *err) {
    double start = now(), score;
    int64_t from = r->step;
    int status = 0;
    if (r->held.path && r->step == 0) {
        status = evaluate(r, &score, err);
    }
    while (status == 0 && r->step < r->s.steps && !stop_asked) {
        r->step++;
        status = one_step(r, s, start, from, err);
        bool last = r->step == r->s.steps;
        if (status == 0 && r->held.path && (r->step % r->s.eval_every == 0 || last)) {
            status = evaluate(r, &score, err);
            if (status == 0 && isfinite(score) && !(score <= r->best)) {
                r->best = score;
                r->best_step = r->step;
            }
        }
        if (status == 0 && (r->step % r->s.save_every == 0 || last || stop_asked)) {
            status = checkpoint_save(r, err);
        }
    }
    if (status == 0) {
        note(s, "%s/checkpoint-%lld: %s after %lld steps%s\n", r->s.out, (long long)r->step, stop_asked ? "stopped" : "done",
             (long long)r->step, stop_asked ? "; go on with --resume" : "");
    }
    return status;
}

/* Leaves the lines of steps up to the one that is gone on from; a line cut short goes too. */
static int open_metrics(TrainRun *r, Err *err) {
    char *path = xprintf("%s/metrics.jsonl", r->s.out), *text = NULL;
    size_t len = 0;
    File file;
    Err none = {0};
    FILE *kept = open_memstream(&text, &len);
    if (r->step > 0 && file_map(&file, path, &none) == 0) {
        for (const char *line = file.data, *end = file.data + file.len, *next; line < end; line = next) {
            const char *newline = memchr(line, '\n', (size_t)(end - line));
            Json j;
            int64_t step = -1;
            next = newline ? newline + 1 : end;
            none.msg[0] = 0;
            if (newline && json_parse(&j, line, (size_t)(newline - line), path, &none) == 0) {
                json_int(&j, json_get(&j, 0, "step"), &step);
                json_free(&j);
            }
            if (step >= 0 && step <= r->step) {
                fwrite(line, 1, (size_t)(next - line), kept);
            }
        }
        file_unmap(&file);
    }
    fclose(kept);
    int status = file_write(path, text, len, err);
    r->metrics = status == 0 ? fopen(path, "a") : NULL;
    if (status == 0 && !r->metrics) {
        status = fail(err, "%s: cannot write: %s", path, strerror(errno));
    }
    free(text);
    free(path);
    return status;
}

static int longer_first(const void *a, const void *b) {
    return *(const int *)b - *(const int *)a;
}

/* Rows, or rl's vectors, of a pass. */
static int micro_of(const RunSettings *s, Stage stage) {
    int all = stage == STAGE_RL ? s->vectors : s->batch;
    return s->micro < all ? s->micro : all;
}

/* Tokens of the `micro` longest rows, the most that a microbatch can hold; of a sample of the rows when they are many. */
static int longest_rows(const TrainRun *r, Err *err) {
    int64_t n = arrlen(r->rows), step = n / 4096 + 1;
    int *lengths = NULL, *ids = NULL, status = 0, sum = 0, start = r->has_ar ? (int)arrlen(r->ar.start) : 0;
    for (int64_t i = 0; i < n && status == 0; i += step) {
        size_t len;
        char *text = explanation_at(&r->data, r->rows[i], &len, err);
        arrsetlen(ids, 0);
        status = !text ? -1
                 : r->stage == STAGE_AV ? av_response(&r->av, text, len, &ids, err)
                                        : sidecar_text_ids(&r->ar.meta, r->ar.tok, text, len, &ids, err);
        arrput(lengths, (int)arrlen(ids) - (r->stage == STAGE_AR ? start : 0));
        free(text);
    }
    int counted = (int)arrlen(lengths);
    if (counted > 0) {
        qsort(lengths, (size_t)counted, sizeof *lengths, longer_first);
    }
    for (int i = 0; i < micro_of(&r->s, r->stage) && counted > 0; i++) {
        sum += lengths[i < counted ? i : counted - 1];
    }
    arrfree(lengths);
    arrfree(ids);
    return status == 0 ? sum : -1;
}

/* Bytes that this process holds now, mapped files left out; 0 where the system does not say. */
static double own_memory(void) {
    return proc_bytes("/proc/self/status", "RssAnon");
}

void plan_part(Plan *p, const char *what, double bytes, bool host) {
    if (bytes > 0 && p->n < (int)(sizeof p->part / sizeof *p->part)) {
        p->part[p->n++] = (PlanPart){what, bytes, host};
        *(host ? &p->host : &p->engine) += bytes;
    }
}

static double mapped_bytes(const Model *m) {
    double bytes = 0;
    for (int i = 0; i < (int)arrlen(m->files.file); i++) {
        bytes += (double)m->files.file[i].len;
    }
    return bytes;
}

/* What the AV and its frozen twin take. Returns rows of the largest pass. */
static int plan_av(const TrainRun *r, Plan *p, int texts, int tokens) {
    const RunSettings *s = &r->s;
    const Model *m = &r->av.model;
    bool rl = r->stage == STAGE_RL;
    int micro = micro_of(s, r->stage);
    DType masters = format_of(s->masters);
    size_t params = params_bytes(m, m->lora.rank > 0, NULL, masters, format_of(s->moments)), drawing = 0;
    plan_part(p, "AV: trained weights, gradients, moments", (double)params, false);
    plan_part(p, "AV: a microbatch there and back", (double)av_pass_bytes(&r->av, micro, texts, tokens, r->av_pass.passes), false);
    plan_part(p, "AV: working copies of its weights", (double)model_copies(m, NULL, masters), false);
    if (rl) {
        plan_part(p, "reference AV: a microbatch", (double)av_pass_bytes(&r->ref, micro, texts, tokens, FORWARD), false);
        plan_part(p, "reference AV: working copies", (double)model_copies(&r->ref.model, NULL, DT_OTHER), false);
        drawing = verbalizer_bytes(&r->av, s->vectors, s->samples, s->max_tokens);
    }
    if (r->held.path && r->has_ar) {
        int64_t rows = arrlen(r->held_rows) < s->eval_rows ? arrlen(r->held_rows) : s->eval_rows;
        size_t reading = verbalizer_bytes(&r->av, (int)(rows < EVAL_GROUP ? rows : EVAL_GROUP), 1, s->max_tokens);
        drawing = reading > drawing ? reading : drawing;
    }
    plan_part(p, "drawing texts", (double)drawing, false);
    return r->av.marker_at + micro * (int)arrlen(r->av.prompt) + tokens;
}

/* `tokens`: of all texts of a pass, with what the template puts around them. Returns them. */
static int plan_ar(const TrainRun *r, Plan *p, int texts, int tokens) {
    const Model *m = &r->ar.model;
    DType masters = format_of(r->s.masters);
    if (trains_ar(r)) {
        plan_part(p, "AR: trained weights, gradients, moments", (double)params_bytes(m, m->lora.rank > 0, &r->ar.head, masters, format_of(r->s.moments)), false);
    }
    plan_part(p, trains_ar(r) ? "AR: a microbatch there and back" : "AR: a microbatch", (double)ar_pass_bytes(&r->ar, texts, tokens, r->ar_pass.passes),
              false);
    plan_part(p, "AR: working copies of its weights", (double)model_copies(m, &r->ar.head, trains_ar(r) ? masters : DT_OTHER), false);
    return tokens;
}

int train_plan(const TrainRun *r, Plan *p, Err *err) {
    const RunSettings *s = &r->s;
    bool rl = r->stage == STAGE_RL;
    int texts = micro_of(s, r->stage) * (rl ? s->samples : 1), tokens = rl ? texts * s->max_tokens : longest_rows(r, err), rows = 0;
    *p = (Plan){0};
    if (tokens < 0) {
        return -1;
    }
    if (trains_av(r)) {
        rows = plan_av(r, p, texts, tokens);
    }
    if (trains_ar(r) || (r->has_ar && r->held.path)) { /* the ids on both sides of a text, which could merge with it, are its own */
        int most = r->stage == STAGE_AR ? tokens : texts * (s->max_tokens + (int)arrlen(r->ar.meta.suffix_ids) + 2);
        int ar_rows = plan_ar(r, p, texts, (int)arrlen(r->ar.start) + most);
        rows = ar_rows > rows ? ar_rows : rows;
    }
    const Model *m = r->has_av ? &r->av.model : &r->ar.model;
    Config c = m->config;
    c.vocab_size = r->stage == STAGE_AR ? 0 : c.vocab_size; /* an AR makes no logits */
    plan_part(p, "working memory of the ops", (double)r->engine->work_bytes(r->engine, &c, rows, true), false);
    plan_part(p, "weights, mapped", mapped_bytes(m), true);
    plan_part(p, "weights on their way to the GPU", (double)r->engine->upload_bytes, true);
    plan_part(p, "tokenizer, rows and the program", own_memory(), true);
    return 0;
}

void plan_print(const Plan *p) {
    for (int i = 0; i < p->n; i++) {
        printf("%-42s %9.3f GB%s\n", p->part[i].what, p->part[i].bytes / 1e9, p->part[i].host ? "  (host)" : "");
    }
    printf("%-42s %9.3f GB, %.3f GB of them the host's\n", "in all", (p->engine + p->host) / 1e9, p->host / 1e9);
}

static int start_run(TrainRun *r, const Settings *s, Err *err) {
    char *checkpoint = NULL;
    struct stat st;
    if (s->weights) {
        return fail(err, "--weights rounds weights for inference; training needs them as they are stored: leave it out");
    }
    if (s->resume) { /* before anything is opened */
        checkpoint = checkpoint_latest(r, err);
        if (!checkpoint) {
            return -1;
        }
    } else if (checkpoint_any(r->s.out)) {
        return fail(err, "%s: holds checkpoints of a run; go on from them with --resume, or name another out", r->s.out);
    }
    int status = open_engine(&r->engine, s, err);
    status = status == 0 ? train_open(r, checkpoint, err) : -1;
    if (status == 0 && s->plan) {
        Plan plan;
        free(checkpoint);
        status = train_plan(r, &plan, err);
        if (status == 0) {
            plan_print(&plan);
        }
        return status == 0 ? 1 : -1;
    }
    status = status == 0 ? train_params(r, err) : -1;
    if (status == 0 && checkpoint) {
        status = checkpoint_load(r, checkpoint, err);
    } else if (status == 0 && mkdir(r->s.out, 0777) != 0 && (errno != EEXIST || stat(r->s.out, &st) != 0 || !S_ISDIR(st.st_mode))) {
        status = fail(err, "%s: cannot make this directory: %s", r->s.out, strerror(errno));
    }
    if (status == 0) {
        char *path = xprintf("%s/settings.yaml", r->s.out);
        status = run_settings_save(&r->s, r->stage, path, err);
        free(path);
    }
    free(checkpoint);
    return status == 0 ? open_metrics(r, err) : -1;
}

int run_train(const Settings *s, Err *err) {
    TrainRun r = {.best = -INFINITY};
    const char *name = s->argument[0], *config = s->config;
    char *saved = NULL;
    int stage = 0;
    while (stage < 3 && strcmp(name, stage_names[stage]) != 0) {
        stage++;
    }
    if (stage == 3) {
        return fail(err, "train takes av, ar or rl, not '%s'", name);
    }
    r.stage = (Stage)stage;
    if (s->seed) {
        return fail(err, "train takes its seed as a setting: seed=%lld, not --seed", (long long)s->seed);
    }
    for (int i = 1; s->resume && !config && i < (int)arrlen(s->argument); i++) {
        if (strncmp(s->argument[i], "out=", 4) == 0) { /* a run that goes on needs no settings but its own */
            saved = xprintf("%s/settings.yaml", s->argument[i] + 4);
            config = access(saved, F_OK) == 0 ? saved : NULL;
        }
    }
    int status = run_settings_read(&r.s, r.stage, config, s->argument + 1, (int)arrlen(s->argument) - 1, err);
    free(saved);
    status = status == 0 ? start_run(&r, s, err) : -1;
    if (status == 0) {
        struct sigaction action = {.sa_handler = ask_stop};
        sigaction(SIGINT, &action, NULL);
        sigaction(SIGTERM, &action, NULL);
        status = train(&r, s, err);
    }
    train_close(&r);
    return status < 0 ? -1 : 0;
}
