/* bench_e2e.c - `nla bench --e2e`: whole steps at the shape of any model, with random weights: AV and AR training steps, decoding, every
 * token of a text explained, an RL step with its phases. The steps are those of run.c and method.c; what is made here is what they
 * read: a directory of a tokenizer whose letters are tokens (so that texts have the lengths asked for), sidecars, rows, and a note that
 * makes model_load fill weights in memory.
 *
 * Beside each time stands its floor: the operations of the products and of attention at the rate of one large product, or the bytes
 * that must be read at the rate of a copy (nla bench --ops measures the same two), whichever takes longer.
 */
#include "nla.h"

#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <stb/stb_ds.h>

typedef struct {
    const Settings *s;
    Shape shape;
    Config config;
    Ceilings ceiling;
    Engine *engine;       /* of the part that is measured */
    char *dir;            /* of all that is made; removed at the end */
    const char **given;   /* stb: key=value of the command line */
    bool any;             /* a part was named */
} Bench;

/* ------------------------------------------------------------------------------------------------ what the steps read */

enum { START = 256, END, TEXT_END, MARKER, IDS }; /* ids behind those of the 256 bytes */

/* One byte as the byte alphabet of GPT-2 writes it, as JSON. */
static void put_byte(FILE *out, int byte) {
    static const int first[] = {33, 161, 174}, last[] = {126, 172, 255};
    int c = -1, moved = 256;
    for (int b = 0; b <= byte; b++) {
        bool itself = false;
        for (int i = 0; i < 3; i++) {
            itself = itself || (b >= first[i] && b <= last[i]);
        }
        c = itself ? b : moved;
        moved += !itself;
    }
    char text[3] = {(char)c};
    if (c >= 128) {
        text[0] = (char)(0xc0 | c >> 6);
        text[1] = (char)(0x80 | (c & 63));
    }
    json_write_string(out, text, strlen(text));
}

static void put_tokenizer(FILE *out) {
    static const char *const added[] = {"<|im_start|>", "<|im_end|>", "<|endoftext|>", "\u320e"};
    fputs("{\"added_tokens\": [", out);
    for (int i = 0; i < 4; i++) {
        fprintf(out, "%s{\"id\": %d, \"content\": \"%s\", \"single_word\": false, \"lstrip\": false, \"rstrip\": false, \"normalized\": false, "
                     "\"special\": %s}", i ? ", " : "", START + i, added[i], i < 3 ? "true" : "false");
    }
    fputs("], \"normalizer\": null, \"pre_tokenizer\": {\"type\": \"ByteLevel\", \"add_prefix_space\": false, \"trim_offsets\": true, "
          "\"use_regex\": false}, \"post_processor\": null, \"decoder\": {\"type\": \"ByteLevel\", \"add_prefix_space\": true, "
          "\"trim_offsets\": true, \"use_regex\": true}, \"model\": {\"type\": \"BPE\", \"unk_token\": null, \"byte_fallback\": false, "
          "\"fuse_unk\": false, \"vocab\": {", out);
    for (int b = 0; b < 256; b++) {
        fputs(b ? ", " : "", out);
        put_byte(out, b);
        fprintf(out, ": %d", b);
    }
    fputs("}, \"merges\": []}}\n", out);
}

static const char chatml[] =
    "{\"eos_token\": \"<|im_end|>\", \"chat_template\": \"{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + "
    "message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}\"}\n";

enum { AROUND_START = 6, AROUND_END = 13, TAGS = 30, LEAD = 20, TAIL = 6 }; /* tokens: of the chat, of an explanation's tags, of the AR's template */

static void put_letters(FILE *out, char letter, int n) {
    for (int i = 0; i < n; i++) {
        fputc(letter, out);
    }
}

/* The AV's prompt: all but a fifth of it before the marker, as the reference's (100 of 125 tokens). */
static void put_sidecar(FILE *out, const Bench *b, bool ar) {
    int inside = b->s->prompt_tokens - AROUND_START - AROUND_END - 1, before = b->s->prompt_tokens * 4 / 5 - AROUND_START;
    before = before > inside - 1 ? inside - 1 : before < 1 ? 1 : before;
    fprintf(out, "kind: nla_model\nschema_version: 1\nrole: %s\nd_model: %d\nextraction:\n  injection_scale: ", ar ? "ar" : "av",
            b->config.hidden_size);
    if (b->shape.scale > 0) {
        fprintf(out, "%g\n", (double)b->shape.scale);
    } else {
        fputs("null\n", out);
    }
    fprintf(out, "  mse_scale: sqrt_d_model\nar:\n  extraction_layer_index: %d\ntokens:\n  injection_char: \"\u320e\"\n"
                 "  injection_token_id: %d\n  injection_left_neighbor_id: %d\n  injection_right_neighbor_id: %d\n  critic_suffix_ids: [",
            b->shape.layer, MARKER, 'a', 'b');
    for (int i = 0; i < TAIL - 1; i++) {
        fprintf(out, i ? ", %d" : "%d", 'z');
    }
    fputs("]\nprompt_templates:\n  av: \"", out);
    put_letters(out, 'a', before);
    fputs("{injection_char}", out);
    put_letters(out, 'b', inside - before);
    fputs("\"\n  ar: \"", out);
    put_letters(out, 'x', LEAD);
    fputs("{explanation}", out);
    put_letters(out, 'z', TAIL);
    fputs("\"\n", out);
}

static FILE *open_in(const Bench *b, const char *part, const char *name, Err *err) {
    char *path = xprintf("%s/%s/%s", b->dir, part, name);
    FILE *out = fopen(path, "w");
    if (!out) {
        fail(err, "%s: cannot write: %s", path, strerror(errno));
    }
    free(path);
    return out;
}

static int shut(FILE *out, const Bench *b, Err *err) {
    bool good = !ferror(out);
    return fclose(out) == 0 && good ? 0 : fail(err, "%s: cannot write: %s", b->dir, strerror(errno));
}

/* All of an AV's or AR's directory but the weights. */
static int make_half(const Bench *b, const char *part, bool ar, Err *err) {
    static const char *const names[] = {"config.json", "tokenizer.json", "tokenizer_config.json", "nla_meta.yaml", "weights.random"};
    char *dir = xprintf("%s/%s", b->dir, part);
    int status = mkdir(dir, 0777) == 0 ? 0 : fail(err, "%s: cannot make it: %s", dir, strerror(errno));
    for (int i = 0; i < 5 && status == 0; i++) {
        FILE *out = open_in(b, part, names[i], err);
        if (!out) {
            status = -1;
            break;
        }
        if (i == 0) {
            fputs(b->shape.config, out);
        } else if (i == 1) {
            put_tokenizer(out);
        } else if (i == 2) {
            fputs(chatml, out);
        } else if (i == 3) {
            put_sidecar(out, b, ar);
        } else {
            fprintf(out, "%d %d %d\n", ar ? 2 : 1, !ar, ar ? b->shape.layer + 1 : 0);
        }
        status = shut(out, b, err);
    }
    if (status == 0 && ar) {
        int D = b->config.hidden_size;
        Config square = {.hidden_size = D, .vocab_size = D};
        Model head;
        char *path = xprintf("%s/value_head.safetensors", dir);
        status = model_make(&head, &square, dir, false, 3, b->engine, err);
        if (status == 0) {
            head.embed.name = "weight";
            status = safetensors_save(path, &head.embed, 1, err);
            model_free(&head);
        }
        free(path);
    }
    free(dir);
    return status;
}

static char *letters(int n) {
    char *text = xmalloc((size_t)n + 1);
    for (int i = 0; i < n; i++) {
        text[i] = (char)('c' + i % 20);
    }
    text[n] = 0;
    return text;
}

/* `rows` rows of random vectors, each with an explanation of `length` tokens. */
static int make_rows(const Bench *b, const char *part, int rows, int length, Err *err) {
    int D = b->config.hidden_size;
    char *dir = xprintf("%s/%s", b->dir, part), *text = letters(length);
    DatasetWriter *w = dataset_create(dir, D, err);
    float *v = xmalloc((size_t)D * sizeof(float));
    int status = w ? 0 : -1;
    for (int i = 0; i < rows && status == 0; i++) {
        for (int j = 0; j < D; j++) {
            v[j] = (float)(random_uniform(5, (uint64_t)i, (uint64_t)j, 0) + random_uniform(6, (uint64_t)i, (uint64_t)j, 0) - 1);
        }
        status = dataset_append(w, v, i + 1, (uint64_t)i, "random", "", 0, text, err);
    }
    if (status == 0) {
        Yaml *y = yaml_new(YAML_MAP);
        yaml_set(y, "kind", "nla_dataset", false);
        yaml_set_number(y, "d_model", D);
        status = dataset_finish(w, y, err);
        yaml_free(y);
    } else if (w) {
        dataset_abandon(w);
    }
    free(v);
    free(text);
    free(dir);
    return status;
}

/* ------------------------------------------------------------------------------------------------ operations
 * Of products (2 a weight and row) and attention (4 E a query head and key that it sees); the rest is small beside them. */

typedef struct {
    double operations, bytes;
} Work;

static double triangle(double n) { return n * (n + 1) / 2; }

static double block_weights(const Config *c) {
    double D = c->hidden_size, Q = (double)c->n_heads * c->head_dim, KV = (double)c->n_kv_heads * c->head_dim;
    return D * (2 * Q + 2 * KV + 3 * (double)c->ff_size);
}

static Work pass_work(const Config *c, int blocks, double rows, double pairs, double logits) {
    double head = (double)c->hidden_size * c->vocab_size, Q = (double)c->n_heads * c->head_dim;
    return (Work){blocks * (2 * rows * block_weights(c) + 4 * Q * pairs) + 2 * logits * head,
                  2 * (blocks * block_weights(c) + (logits > 0 ? head : 0))};
}

/* There and back: the gradient of the input costs the product once more, that of the weights again; recomputing once more. */
static Work trained(Work w, const RunSettings *s) {
    double times = (s->lora_rank > 0 ? 2 : 3) + s->recompute;
    return (Work){times * w.operations, times * w.bytes};
}

static void add_work(Work *sum, Work more) {
    sum->operations += more.operations;
    sum->bytes += more.bytes;
}

/* All groups through an AV, `micro` at a time: the prompt's head once a pass, its tail once a group. */
static Work av_work(const Verbalizer *v, int groups, int samples, double tokens, int micro) {
    double head = v->marker_at, tail = (double)arrlen(v->prompt) - head - 1;
    Work sum = {0};
    for (int i = 0; i < groups; i += micro) {
        double g = groups - i < micro ? groups - i : micro, drawn = g * samples * tokens;
        double pairs = triangle(head) + g * (tail * head + triangle(tail)) + g * samples * (tokens * (head + tail) + triangle(tokens));
        add_work(&sum, pass_work(&v->model.config, v->model.config.n_layers, head + g * tail + drawn, pairs, drawn));
    }
    return sum;
}

static Work ar_work(const Reconstructor *r, int texts, double tokens, int micro) {
    double start = (double)arrlen(r->start), D = r->model.config.hidden_size;
    Work sum = {0};
    for (int i = 0; i < texts; i += micro) {
        double n = texts - i < micro ? texts - i : micro;
        add_work(&sum, pass_work(&r->model.config, r->model.config.n_layers, start + n * tokens,
                                 triangle(start) + n * (tokens * start + triangle(tokens)), 0));
        sum.operations += 2 * n * D * D;
    }
    return sum;
}

/* Decoding: each step reads all weights and the keys and values that there are, shared ones once. */
static Work decode_work(const Verbalizer *v, int vectors, int samples, double tokens) {
    const Config *c = &v->model.config;
    double rows = (double)vectors * samples, prompt = (double)arrlen(v->prompt), shared = v->marker_at + vectors * (prompt - v->marker_at);
    double key = 2.0 * c->n_layers * c->n_kv_heads * c->head_dim * (double)dtype_size(v->model.engine->act_dtype);
    Work once = pass_work(c, c->n_layers, rows, 0, rows);
    Work w = {tokens * once.operations, tokens * once.bytes + key * (tokens * shared + rows * triangle(tokens))};
    double Q = (double)c->n_heads * c->head_dim;
    w.operations += c->n_layers * 4 * Q * rows * (tokens * prompt + triangle(tokens));
    add_work(&w, pass_work(c, c->n_layers, shared, triangle(v->marker_at) + (shared - v->marker_at) * prompt, 0));
    return w;
}

/* ------------------------------------------------------------------------------------------------ results */

enum { PHASES = 8 };

/* What a part's steps took, phase by phase. */
typedef struct {
    const char *part, *name[PHASES];
    double *seconds[PHASES]; /* stb: one a step */
    Work work[PHASES];
    int n;
    double rows, tokens;     /* of a step */
} Phases;

static void phase(Phases *p, const char *name, double seconds, Work work, bool keep) {
    int i = 0;
    while (i < p->n && strcmp(p->name[i], name) != 0) {
        i++;
    }
    if (i == PHASES) {
        return; /* no part has so many */
    }
    if (i == p->n) {
        p->name[p->n++] = name;
    }
    p->work[i] = work;
    if (keep) {
        arrput(p->seconds[i], seconds);
    }
}

static double median_of(double *seconds) {
    int n = (int)arrlen(seconds);
    if (!seconds || n == 0) {
        return NAN;
    }
    qsort(seconds, (size_t)n, sizeof *seconds, by_value);
    return (seconds[(n - 1) / 2] + seconds[n / 2]) / 2;
}

static void print_phase(const Bench *b, const Phases *p, int i, double *all, double *least) {
    double *seconds = p->seconds[i], median = median_of(seconds), least_s = seconds ? seconds[0] : NAN, most_s = seconds ? arrlast(seconds) : NAN;
    double floor = floor_of(&b->ceiling, p->work[i].operations, p->work[i].bytes);
    *all += median;
    *least += floor;
    if (b->s->json) {
        printf("{\"part\": \"%s\", \"phase\": \"%s\"", p->part, p->name[i]);
        json_number(stdout, "median_s", median);
        json_number(stdout, "min_s", least_s);
        json_number(stdout, "max_s", most_s);
        json_number(stdout, "operations", p->work[i].operations);
        json_number(stdout, "floor_s", floor);
        json_number(stdout, "share", floor / median);
        fputs("}\n", stdout);
    } else {
        printf("  %-34s %10.3f s (%.3f to %.3f)  %10.3f TFLOP  floor %9.3f s  %4.0f%%\n", p->name[i], median, least_s,
               most_s, p->work[i].operations * 1e-12, floor, 100 * floor / median);
    }
}

/* The most that this process has held since reset_peak, mapped files it has touched included; 0 where the system does not say. */
static double peak_memory(void) {
    return proc_bytes("/proc/self/status", "VmHWM");
}

static void reset_peak(void) {
    FILE *out = fopen("/proc/self/clear_refs", "w");
    if (out) {
        fputs("5\n", out);
        fclose(out);
    }
}

static void print_phases(const Bench *b, Phases *p, const Plan *plan) {
    double all = 0, least = 0, peak = peak_memory(), held = (double)b->engine->memory->most;
    for (int i = 0; i < p->n; i++) {
        print_phase(b, p, i, &all, &least);
        arrfree(p->seconds[i]);
    }
    if (b->s->json) {
        printf("{\"part\": \"%s\", \"phase\": \"all\"", p->part);
        json_number(stdout, "median_s", all);
        json_number(stdout, "floor_s", least);
        json_number(stdout, "share", least / all);
        json_number(stdout, "rows", p->rows);
        json_number(stdout, "rows_per_s", p->rows / all);
        json_number(stdout, "tokens_per_s", p->tokens / all);
        json_number(stdout, "planned_engine", plan->engine);
        json_number(stdout, "peak_engine", held);
        json_number(stdout, "planned_process", plan->host + (strncmp(b->engine->name, "cuda", 4) == 0 ? 0 : plan->engine));
        json_number(stdout, "peak_process", peak);
        fputs("}\n", stdout);
    } else {
        printf("  %-34s %10.3f s; %.2f rows/s, %.1f tokens/s; floor %.3f s, %.0f%%\n", "all", all, p->rows / all, p->tokens / all, least,
               100 * least / all);
        printf("  memory of the engine: planned %.3f GB, at the most %.3f GB (%+.1f%%); process %.3f GB\n", plan->engine * 1e-9, held * 1e-9,
               100 * (held / plan->engine - 1), peak * 1e-9);
    }
    fflush(stdout);
}

static void title(const Bench *b, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void title(const Bench *b, const char *format, ...) {
    if (!b->s->json) {
        va_list args;
        va_start(args, format);
        printf("\n%s: ", b->shape.name);
        vprintf(format, args);
        putchar('\n');
        va_end(args);
        fflush(stdout);
    }
}

/* ------------------------------------------------------------------------------------------------ does it fit */

/* Refuses what cannot fit, before anything large is made: `models` whole models' weights, and what trains of `trains` numbers. */
static int fits(const Bench *b, const char *part, double host, double engine, Err *err) {
    bool cuda = strncmp(b->engine->name, "cuda", 4) == 0;
    double there = (double)host_available(), there_engine = (double)b->engine->available(b->engine);
    host += cuda ? 0 : engine;
    if (there > 0 && host > there) {
        return fail(err, "--shape %s: %s needs %.1f GB of the machine's memory, %.1f GB are there; take a smaller shape, lora_rank=16, moments=bf16, "
                    "recompute=true, or fewer rows (batch, vectors, micro)", b->shape.name, part, host * 1e-9, there * 1e-9);
    }
    if (cuda && there_engine > 0 && engine > there_engine) {
        return fail(err, "--shape %s: %s needs %.1f GB of the GPU's memory, %.1f GB are there; take a smaller shape, lora_rank=16, moments=bf16, "
                    "recompute=true, or fewer rows (batch, vectors, micro)", b->shape.name, part, engine * 1e-9, there_engine * 1e-9);
    }
    return 0;
}

/* The weights of whole AVs and of ARs as they are made in the host's memory, and the least that the engine adds: their copies, and
 * what trains (`each` bytes a number; 0: nothing). */
static int weights_fit(const Bench *b, const char *part, int avs, int ars, int each, Err *err) {
    Config cut = b->config;
    cut.n_layers = b->shape.layer + 1;
    double av = (double)config_weights(&b->config, true), ar = (double)config_weights(&cut, false), host = avs * av + ars * ar;
    bool cuda = strncmp(b->engine->name, "cuda", 4) == 0;
    double trains = (avs > 0 ? av : 0) + (ars > 0 ? ar : 0), copies = cuda ? host * (double)dtype_size(b->engine->act_dtype) / 2 : 0;
    return fits(b, part, host, copies + trains / 2 * each, err);
}

/* ------------------------------------------------------------------------------------------------ training steps */

/* A run's settings: where things are, the sizes of performance.md's anchors, then what the command line says. */
static int settings_of(const Bench *b, RunSettings *s, Stage stage, Err *err) {
    const char **given = NULL;
    char *path[] = {xprintf("out=%s/out", b->dir), xprintf("av=%s/av", b->dir), xprintf("ar=%s/ar", b->dir),
                    xprintf("data=%s/%s", b->dir, stage == STAGE_AR ? "rows_ar" : "rows_av")};
    const char *const sizes[] = {"batch=256", "vectors=64", "samples=8", "max_tokens=150", "micro=16", "steps=1000"};
    for (int i = 0; i < 4; i++) {
        arrput(given, path[i]);
    }
    for (int i = 0; i < 6; i++) {
        if (setting_of(sizes[i], stage)) {
            arrput(given, strncmp(sizes[i], "micro", 5) == 0 && stage == STAGE_RL ? "micro=4" : sizes[i]);
        }
    }
    for (int i = 0; i < (int)arrlen(b->given); i++) {
        if (setting_of(b->given[i], stage)) {
            arrput(given, b->given[i]);
        }
    }
    int status = run_settings_read(s, stage, NULL, given, (int)arrlen(given), err);
    for (int i = 0; i < 4; i++) {
        free(path[i]);
    }
    arrfree(given);
    return status;
}

/* Models, plan, parameters; nothing large is made that cannot fit. The AVs have no end token: every text has the same length. */
static int open_run(Bench *b, TrainRun *r, const char *part, Plan *plan, Err *err) {
    r->best = -INFINITY;
    int status = settings_of(b, &r->s, r->stage, err);
    status = status == 0 ? open_engine(&r->engine, b->s, err) : -1;
    b->engine = r->engine;
    if (status == 0 && r->stage == STAGE_AV) { /* an AR would only score evaluations */
        free(r->s.ar);
        r->s.ar = NULL;
    }
    reset_peak();
    status = status == 0 ? train_open(r, NULL, err) : -1;
    if (status == 0) {
        arrsetlen(r->av.model.config.eos, 0);
        status = train_plan(r, plan, err);
    }
    status = status == 0 ? fits(b, part, 0, plan->engine, err) : -1;
    if (status == 0 && !b->s->json) {
        plan_print(plan);
    }
    return status == 0 ? train_params(r, err) : -1;
}

static int bench_sft(Bench *b, Stage stage, Err *err) {
    TrainRun r = {.stage = stage};
    Phases p = {.part = stage == STAGE_AV ? "av" : "ar"};
    Plan plan;
    int tokens = stage == STAGE_AV ? b->s->av_tokens : b->s->ar_tokens;
    title(b, "%s step, rows of %d tokens", stage == STAGE_AV ? "AV SFT" : "AR SFT", tokens);
    int status = open_run(b, &r, p.part, &plan, err);
    for (int i = -1; i < b->s->repeat && status == 0; i++) {
        Measures m = {0};
        r.step++;
        r.engine->start(r.engine);
        status = step_sft(&r, &m, err);
        double seconds = r.engine->stop(r.engine);
        Work w = stage == STAGE_AV ? av_work(&r.av, r.s.batch, 1, tokens - b->s->prompt_tokens, r.s.micro)
                                   : ar_work(&r.ar, r.s.batch, tokens - (double)arrlen(r.ar.start), r.s.micro);
        phase(&p, "step", seconds, trained(w, &r.s), i >= 0);
    }
    if (status == 0) {
        p.rows = r.s.batch;
        p.tokens = (double)r.s.batch * tokens;
        print_phases(b, &p, &plan);
    }
    train_close(&r);
    return status;
}

/* Random weights write no explanation, so every text is replaced by one as long as what was drawn: the AR has its full work. */
static void give_texts(const TrainRun *r, Rollouts *o) {
    for (int i = 0; i < o->n; i++) {
        free(o->text[i]);
        o->text[i] = letters(r->s.max_tokens);
        o->len[i] = (size_t)r->s.max_tokens;
    }
}

static double measured(const Measures *m, const char *name) {
    double value = NAN;
    for (int i = 0; i < m->n; i++) {
        value = strcmp(m->name[i], name) == 0 ? m->value[i] : value;
    }
    return value;
}

static int rl_step(const Bench *b, TrainRun *r, Phases *p, bool keep, Err *err) {
    const RunSettings *s = &r->s;
    Measures m = {0};
    Rollouts o = {0};
    (void)b;
    r->step++;
    int status = rl_draw(r, &o, &m, err);
    if (status == 0) {
        give_texts(r, &o);
        status = rl_learn(r, &o, &m, err);
    }
    if (status == 0) {
        Work again = av_work(&r->av, s->vectors, s->samples, s->max_tokens, s->micro);
        Work read = ar_work(&r->ar, o.n, s->max_tokens + TAIL + LEAD - (double)arrlen(r->ar.start), s->micro * s->samples);
        Work learn = trained(again, s), adamw = {0, 28.0 * (double)r->ar_params.count};
        learn.operations *= s->updates;
        phase(p, "rollout", measured(&m, "seconds_rollout"), decode_work(&r->av, s->vectors, s->samples, s->max_tokens), keep);
        phase(p, "reward, and the AR's gradient", measured(&m, "seconds_reward_and_ar"), s->freeze_ar ? read : trained(read, s), keep);
        phase(p, "reference", measured(&m, "seconds_reference"), again, keep);
        phase(p, "policy update", measured(&m, "seconds_policy"), learn, keep);
        phase(p, "AR update", measured(&m, "seconds_ar_update"), adamw, keep);
        p->rows = o.n;
        p->tokens = o.tokens;
    }
    rollouts_free(&o);
    return status;
}

static int bench_rl(Bench *b, Err *err) {
    TrainRun r = {.stage = STAGE_RL};
    Phases p = {.part = "rl"};
    Plan plan;
    title(b, "RL step");
    int status = open_run(b, &r, p.part, &plan, err);
    for (int i = -1; i < b->s->repeat && status == 0; i++) {
        status = rl_step(b, &r, &p, i >= 0, err);
    }
    if (status == 0) {
        print_phases(b, &p, &plan);
    }
    train_close(&r);
    return status;
}

/* ------------------------------------------------------------------------------------------------ reading */

/* Models that only read. */
typedef struct {
    RunSettings s;
    Verbalizer av;
    Reconstructor ar;
    Model target;
    bool has_av, has_ar, has_target;
} Readers;

static int open_readers(Bench *b, Readers *x, bool all, Plan *plan, int vectors, Err *err) {
    char *av = xprintf("%s/av", b->dir), *ar = xprintf("%s/ar", b->dir);
    Engine *e = NULL;
    int status = open_engine(&e, b->s, err);
    b->engine = e;
    reset_peak();
    status = status == 0 ? verbalizer_open(&x->av, av, NULL, NAN, e, err) : -1;
    x->has_av = status == 0;
    if (status == 0 && all) {
        status = reconstructor_open(&x->ar, ar, NULL, e, err);
        x->has_ar = status == 0;
        status = status == 0 ? model_load(&x->target, av, e, err) : -1;
        x->has_target = status == 0;
    }
    if (status == 0) {
        arrsetlen(x->av.model.config.eos, 0);
        *plan = (Plan){0};
        plan_part(plan, "AV: forest", (double)verbalizer_bytes(&x->av, vectors, 1, x->s.max_tokens), false);
        plan_part(plan, "AV: working copies of its weights", (double)model_copies(&x->av.model, NULL, DT_OTHER), false);
        plan_part(plan, "working memory of the ops", (double)e->work_bytes(e, &x->av.model.config, vectors, false), false);
        plan_part(plan, "weights", (double)x->av.model.made_bytes + (double)x->ar.model.made_bytes + (double)x->target.made_bytes, true);
        plan_part(plan, "weights on their way to the GPU", (double)e->upload_bytes, true);
    }
    free(av);
    free(ar);
    return status;
}

static void close_readers(const Bench *b, Readers *x) {
    if (x->has_av) {
        verbalizer_close(&x->av);
    }
    if (x->has_ar) {
        reconstructor_close(&x->ar);
    }
    if (x->has_target) {
        model_free(&x->target);
    }
    run_settings_free(&x->s);
    if (b->engine) {
        b->engine->close(b->engine);
    }
}

static float *random_vectors(int n, int D) {
    float *v = xmalloc((size_t)n * (size_t)D * sizeof(float));
    for (int64_t i = 0; i < (int64_t)n * D; i++) {
        v[i] = (float)(2 * random_uniform(9, (uint64_t)i, 0, 0) - 1);
    }
    return v;
}

/* Texts of n vectors, max_tokens each. */
static int draw(Readers *x, const float *vectors, int n, Err *err) {
    Decoding how = {.sampler = {.temperature = 1, .top_p = 1, .seed = 1}, .max_tokens = x->s.max_tokens, .whole = true};
    Decoder d = {0};
    int status = verbalize(&x->av, &d, vectors, n, 0, 1, &how, err);
    decoder_free(&d);
    verbalizer_renew(&x->av); /* so that every measurement computes the prompt */
    return status;
}

static int bench_decode_rows(Bench *b, Err *err) {
    Readers x = {0};
    Phases p = {.part = "decode"};
    Plan plan;
    b->engine = NULL;
    int status = settings_of(b, &x.s, STAGE_AV, err), n = x.s.batch;
    title(b, "AV decoding, %d rows of %d tokens behind a prompt of %d", n, x.s.max_tokens, b->s->prompt_tokens);
    status = status == 0 ? open_readers(b, &x, false, &plan, n, err) : -1;
    float *vectors = random_vectors(n, b->config.hidden_size);
    for (int i = -1; i < b->s->repeat && status == 0; i++) {
        b->engine->start(b->engine);
        status = draw(&x, vectors, n, err);
        phase(&p, "decoding", b->engine->stop(b->engine), decode_work(&x.av, n, 1, x.s.max_tokens), i >= 0);
    }
    if (status == 0) {
        p.rows = n;
        p.tokens = (double)n * x.s.max_tokens;
        print_phases(b, &p, &plan);
    }
    free(vectors);
    close_readers(b, &x);
    return status;
}

typedef struct {
    int layer;
    float *out;
} Captured;

static void keep_layer(void *context, Engine *e, const char *module, int layer, const Act *data, int first, int rows, int width) {
    const Captured *c = context;
    if (!*module && layer == c->layer) {
        e->read(e, c->out + (size_t)first * (size_t)width, data, 0, (size_t)rows * (size_t)width);
    }
}

/* The target's activations at every token of a text. */
static int capture_text(const Bench *b, Readers *x, Forest *f, Batch *batch, float *vectors, int n, Err *err) {
    Captured c = {b->shape.layer, vectors};
    Tap tap = {&c, keep_layer};
    int *ids = xcalloc((size_t)n, sizeof(int));
    for (int i = 0; i < n; i++) {
        ids[i] = (int)(random_uniform(4, (uint64_t)i, 0, 0) * x->target.config.vocab_size);
    }
    forest_cut(f, 0);
    int status = feed(f, batch, forest_add(f, -1, n, err), ids, n, &tap, err);
    free(ids);
    return status;
}

static int explain_step(const Bench *b, Readers *x, Forest *f, Batch *batch, Phases *p, int n, bool keep, Err *err) {
    Engine *e = b->engine;
    int D = b->config.hidden_size;
    float *vectors = xmalloc((size_t)n * (size_t)D * sizeof(float)), *out = xmalloc((size_t)n * (size_t)D * sizeof(float));
    char *text = letters(x->s.max_tokens);
    const char **texts = xcalloc((size_t)n, sizeof(char *));
    size_t *len = xcalloc((size_t)n, sizeof(size_t));
    for (int i = 0; i < n; i++) {
        texts[i] = text;
        len[i] = (size_t)x->s.max_tokens;
    }
    e->start(e);
    int status = capture_text(b, x, f, batch, vectors, n, err);
    phase(p, "target", e->stop(e), pass_work(&b->config, b->shape.layer + 1, n, triangle(n), 0), keep);
    e->start(e);
    status = status == 0 ? draw(x, vectors, n, err) : -1;
    phase(p, "AV decoding", e->stop(e), decode_work(&x->av, n, 1, x->s.max_tokens), keep);
    e->start(e);
    status = status == 0 ? reconstruct(&x->ar, texts, len, n, out, err) : -1;
    phase(p, "AR", e->stop(e), ar_work(&x->ar, n, x->s.max_tokens + LEAD + TAIL - (double)arrlen(x->ar.start), n), keep);
    free(vectors);
    free(out);
    free(text);
    free(texts);
    free(len);
    return status;
}

static int bench_explain(Bench *b, Err *err) {
    Readers x = {0};
    Phases p = {.part = "explain"};
    Plan plan;
    Forest f = {0};
    Batch batch = {0};
    int n = b->s->text_tokens;
    b->engine = NULL;
    int status = settings_of(b, &x.s, STAGE_AV, err);
    title(b, "every token of a text of %d explained, %d tokens each", n, x.s.max_tokens);
    status = status == 0 ? open_readers(b, &x, true, &plan, n, err) : -1;
    if (status == 0) {
        status = forest_open(&f, &x.target, b->shape.layer + 1, n, n, FORWARD, err);
        plan_part(&plan, "target: forest", (double)forest_bytes(&x.target, b->shape.layer + 1, n, n, FORWARD), false);
        plan_part(&plan, "target: working copies", (double)model_copies(&x.target, NULL, DT_OTHER), false);
        plan_part(&plan, "AR: forest", (double)reconstructor_bytes(&x.ar), false);
        plan_part(&plan, "AR: working copies", (double)model_copies(&x.ar.model, &x.ar.head, DT_OTHER), false);
    }
    for (int i = -1; i < b->s->repeat && status == 0; i++) {
        status = explain_step(b, &x, &f, &batch, &p, n, i >= 0, err);
    }
    if (status == 0) {
        p.rows = n;
        p.tokens = (double)n * x.s.max_tokens;
        print_phases(b, &p, &plan);
    }
    forest_close(&f);
    batch_free(&batch);
    close_readers(b, &x);
    return status;
}

/* ------------------------------------------------------------------------------------------------ the command */

static const char *const parts[] = {"av", "ar", "decode", "explain", "rl"};
enum { PARTS = 5 };

static bool is_part(const char *word, int part) { return strcmp(word, parts[part]) == 0; }

/* Words are parts or settings; a setting that no stage has is an error of the settings' own. */
static int read_words(Bench *b, Err *err) {
    for (int i = 0; i < (int)arrlen(b->s->argument); i++) {
        const char *word = b->s->argument[i];
        bool known = false;
        for (int k = 0; k < PARTS; k++) {
            known = known || is_part(word, k);
        }
        if (strchr(word, '=')) {
            RunSettings s;
            bool some = setting_of(word, STAGE_AV) || setting_of(word, STAGE_AR) || setting_of(word, STAGE_RL);
            int status = some ? 0 : run_settings_read(&s, STAGE_RL, NULL, &word, 1, err);
            if (status != 0) {
                run_settings_free(&s);
                return -1;
            }
            arrput(b->given, word);
        } else if (!known) {
            return fail(err, "bench --e2e measures av, ar, decode, explain, rl, and takes settings as key=value; not '%s'", word);
        }
        b->any = b->any || known;
    }
    return 0;
}

static bool chosen(const Bench *b, int part) {
    for (int i = 0; i < (int)arrlen(b->s->argument); i++) {
        if (is_part(b->s->argument[i], part)) {
            return true;
        }
    }
    return !b->any;
}

static int check_lengths(const Bench *b, Err *err) {
    const Settings *s = b->s;
    int least = s->prompt_tokens + TAGS + 1, ar_least = LEAD + TAIL + 1;
    if (s->av_tokens < least) {
        return fail(err, "--av-tokens %d: with a prompt of %d and the tags an AV's row has %d or more", s->av_tokens, s->prompt_tokens, least);
    }
    if (s->ar_tokens < ar_least) {
        return fail(err, "--ar-tokens %d: with its template an AR's row has %d or more", s->ar_tokens, ar_least);
    }
    return b->config.vocab_size >= IDS ? 0 : fail(err, "--shape %s: a vocabulary of %d is too small for the bytes and marks of a tokenizer (%d)",
                                                 b->shape.name, b->config.vocab_size, IDS);
}

/* Refuses at once what cannot fit. */
static int check_parts(const Bench *b, const RunSettings *s, Err *err) {
    static const struct {
        int avs, ars;
        bool trains;
    } need_of[PARTS] = {{1, 0, true}, {0, 1, true}, {1, 0, false}, {2, 1, false}, {2, 1, true}};
    int status = 0, each = s->lora_rank > 0 ? 0 : s->moments && strcmp(s->moments, "bf16") == 0 ? 12 : 16;
    for (int k = 0; k < PARTS && status == 0; k++) {
        if (chosen(b, k)) {
            status = weights_fit(b, parts[k], need_of[k].avs, need_of[k].ars, need_of[k].trains ? each : 0, err);
        }
    }
    return status;
}

/* Ceilings, and the directory that every part reads. */
static int prepare_bench(Bench *b, Err *err) {
    const char *temp = getenv("TMPDIR");
    RunSettings av = {0}, rl = {0};
    int status = open_engine(&b->engine, b->s, err);
    status = status == 0 ? settings_of(b, &av, STAGE_AV, err) : -1;
    status = status == 0 ? settings_of(b, &rl, STAGE_RL, err) : -1;
    status = status == 0 ? check_parts(b, &rl, err) : -1;
    status = status == 0 ? bench_ceilings(b->s, b->engine, &b->ceiling, err) : -1;
    char *dir = xprintf("%s/nla-bench-XXXXXX", temp ? temp : "/tmp");
    if (status == 0 && !mkdtemp(dir)) {
        status = fail(err, "%s: cannot make it: %s", dir, strerror(errno));
        free(dir);
    } else {
        b->dir = status == 0 ? dir : (free(dir), NULL);
    }
    int rows = av.batch > rl.vectors ? av.batch : rl.vectors;
    status = status == 0 && make_half(b, "av", false, err) == 0 && make_half(b, "ar", true, err) == 0 &&
                     make_rows(b, "rows_av", rows, b->s->av_tokens - b->s->prompt_tokens - TAGS, err) == 0 &&
                     make_rows(b, "rows_ar", rows, b->s->ar_tokens - LEAD - TAIL, err) == 0
                 ? 0
                 : -1;
    run_settings_free(&av);
    run_settings_free(&rl);
    if (b->engine) {
        b->engine->close(b->engine);
        b->engine = NULL;
    }
    return status;
}

int bench_e2e(const Settings *s, Err *err) {
    Bench b = {.s = s};
    char *owned = NULL;
    int status = need(s->shape, "shape", s, err) == 0 ? shape_find(&b.shape, &owned, s->shape, err) : -1;
    status = status == 0 ? config_parse(&b.config, b.shape.config, strlen(b.shape.config), b.shape.name, err) : -1;
    status = status == 0 ? read_words(&b, err) : -1;
    status = status == 0 ? check_lengths(&b, err) : -1;
    status = status == 0 ? prepare_bench(&b, err) : -1;
    for (int k = 0; k < PARTS && status == 0; k++) {
        if (chosen(&b, k)) {
            status = k == 0   ? bench_sft(&b, STAGE_AV, err)
                     : k == 1 ? bench_sft(&b, STAGE_AR, err)
                     : k == 2 ? bench_decode_rows(&b, err)
                     : k == 3 ? bench_explain(&b, err)
                              : bench_rl(&b, err);
        }
    }
    if (b.dir) {
        remove_tree(b.dir);
        free(b.dir);
    }
    config_free(&b.config);
    arrfree(b.given);
    free(owned);
    return status;
}
