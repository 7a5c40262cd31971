/* nla.c - the program: the command line, what all commands share, the commands of a plain language model (inspect, tokenize,
 * generate), the command table and main. Every other command stands in the file of its subject.
 *
 * Order: command line; loading; one section a command; the command table; main.
 */
#include "nla.h"

#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <stb/stb_ds.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

/* ------------------------------------------------------------------------------------------------ command line */

typedef enum { FLAG, COUNT, SEED, NUMBER, TEXT } OptionKind;

typedef struct {
    const char *name, *value; /* value: how help calls it */
    OptionKind kind;
    size_t place; /* offset in Settings */
    double least, most;
    const char *help;
} Option;

#define AT(field) offsetof(Settings, field)

static const Option common_options[] = {
    {"device", "cpu|cuda", TEXT, AT(device), 0, 0, "engine to compute on (default: cuda where there is one)"},
    {"threads", "N", COUNT, AT(threads), 0, 4096, "threads of the CPU engine (default: all)"},
    {"bf16", NULL, FLAG, AT(bf16), 0, 0, "round the inputs of matrix products to bf16 (AVX512-BF16 processors)"},
    {"fp32", NULL, FLAG, AT(fp32), 0, 0, "activations in fp32 on a GPU too, for diffing (default there: bf16)"},
    {"weights", "int8|fp8", TEXT, AT(weights), 0, 0, "inference with the blocks' matrices as one byte a weight, a scale an output"},
    {"seed", "N", SEED, AT(seed), 0, 0, "of everything random (default: 0)"},
    {"json", NULL, FLAG, AT(json), 0, 0, "results as JSON, one object or array a line"},
    {"quiet", NULL, FLAG, AT(quiet), 0, 0, "no progress or timing on stderr"},
    {0},
};

typedef struct {
    const char *name, *usage, *summary, *details;
    int (*run)(const Settings *s, Err *err);
    int least, most; /* arguments */
    Option option[20];
} Command;

static const Command *find_command(const char *name);

int edit_distance(const char *a, const char *b) {
    int n = (int)strlen(b), row[64];
    if (n > 63) {
        return 64;
    }
    for (int j = 0; j <= n; j++) {
        row[j] = j;
    }
    for (int i = 1; a[i - 1]; i++) {
        int corner = row[0];
        row[0] = i;
        for (int j = 1; j <= n; j++) {
            int replace = corner + (a[i - 1] != b[j - 1]);
            corner = row[j];
            int other = (row[j] < row[j - 1] ? row[j] : row[j - 1]) + 1;
            row[j] = replace < other ? replace : other;
        }
    }
    return row[n];
}

/* The next option of a command: its own first, then the common ones. */
static const Option *next_option(const Command *c, const Option *o) {
    o = o ? o + 1 : c->option;
    return o->name || o == &common_options[sizeof common_options / sizeof *common_options - 1] ? o : common_options;
}

static const Option *find_option(const Command *c, const char *name, size_t len) {
    for (const Option *o = next_option(c, NULL); o->name; o = next_option(c, o)) {
        if (strlen(o->name) == len && strncmp(o->name, name, len) == 0) {
            return o;
        }
    }
    return NULL;
}

static int unknown_option(const Command *c, const char *name, size_t len, Err *err) {
    char *given = xstrndup(name, len);
    const char *nearest = NULL;
    int least = 3;
    for (const Option *o = next_option(c, NULL); o->name; o = next_option(c, o)) {
        int d = edit_distance(given, o->name);
        if (d < least) {
            least = d;
            nearest = o->name;
        }
    }
    fail(err, "unknown option --%s%s%s%s; see: nla help %s", given, nearest ? " (did you mean --" : "",
         nearest ? nearest : "", nearest ? "?)" : "", c->name);
    free(given);
    return -1;
}

static int set_option(Settings *s, const Option *o, const char *value, Err *err) {
    char *place = (char *)s + o->place, *end = NULL;
    errno = 0;
    if (o->kind == TEXT) {
        *(const char **)(void *)place = value;
    } else if (o->kind == SEED) {
        long long n = strtoll(value, &end, 10);
        if (*end || end == value || errno) {
            return fail(err, "--%s takes a whole number, not '%s'", o->name, value);
        }
        *(int64_t *)(void *)place = n;
    } else {
        double n = strtod(value, &end);
        if (*end || end == value || errno || !(n >= o->least && n <= o->most) || (o->kind == COUNT && n != floor(n))) {
            return fail(err, "--%s takes a %s from %g to %g, not '%s'", o->name,
                        o->kind == COUNT ? "whole number" : "number", o->least, o->most, value);
        }
        if (o->kind == COUNT) {
            *(int *)(void *)place = (int)n;
        } else {
            *(double *)(void *)place = n;
        }
    }
    return 0;
}

/* --name value, --name=value, --flag; "--" ends options; a lone "-" is an argument. */
static int parse_options(Settings *s, const Command *c, int from, int argc, char **argv, Err *err) {
    for (int i = from; i < argc; i++) {
        const char *word = argv[i];
        if (strcmp(word, "--") == 0) {
            while (++i < argc) {
                arrput(s->argument, argv[i]);
            }
            break;
        }
        if (word[0] != '-' || !word[1]) {
            arrput(s->argument, word);
            continue;
        }
        if (word[1] != '-') {
            return fail(err, "unknown option %s (options start with two dashes; text that starts with a dash goes after --)",
                        word);
        }
        const char *name = word + 2, *equals = strchr(name, '=');
        size_t len = equals ? (size_t)(equals - name) : strlen(name);
        const Option *o = find_option(c, name, len);
        if (!o) {
            return unknown_option(c, name, len, err);
        }
        if (o->kind == FLAG) {
            if (equals) {
                return fail(err, "--%s takes no value", o->name);
            }
            *((char *)s + o->place) = true;
            continue;
        }
        if (!equals && i + 1 >= argc) {
            return fail(err, "--%s needs a value: --%s %s", o->name, o->name, o->value);
        }
        if (set_option(s, o, equals ? equals + 1 : argv[++i], err) != 0) {
            return -1;
        }
    }
    int n = (int)arrlen(s->argument);
    if (n < c->least || n > c->most) {
        return fail(err, n < c->least ? "an argument is missing; usage: nla %s" : "too many arguments; usage: nla %s", c->usage);
    }
    return 0;
}

/* ------------------------------------------------------------------------------------------------ shared by commands */

int group_size(const Settings *s) {
    return s->batch > s->samples ? s->batch / s->samples : 1;
}

Decoding decoding_of(const Settings *s) {
    return (Decoding){.sampler = {(float)s->temperature, s->top_k, (float)s->top_p, (uint64_t)s->seed},
                      .max_tokens = s->max_tokens, .ignore_eos = s->ignore_eos};
}

double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

void note(const Settings *s, const char *format, ...) {
    if (!s->quiet) {
        va_list args;
        va_start(args, format);
        vfprintf(stderr, format, args);
        va_end(args);
    }
}

void progress(const Settings *s, double *last, double start, double count, const char *unit, double fraction, bool done) {
    bool terminal = isatty(STDERR_FILENO);
    double t = now(), seconds = t - start;
    if (s->quiet || (!done && t - (*last > 0 ? *last : start) < (terminal ? 1 : 10))) {
        return;
    }
    *last = t;
    fprintf(stderr, "%s%s: %.0f %s, %.0f/s", terminal ? "\r\033[K" : "", s->command, count, unit, count / (seconds + 1e-9));
    if (done) {
        fprintf(stderr, ", %.1f s", seconds);
    } else if (fraction > 0) {
        double left = seconds * (1 - fraction) / fraction;
        fprintf(stderr, ", %.0f%%, %.0f:%02d left", 100 * fraction, floor(left / 60), (int)fmod(left, 60));
    }
    fputs(done || !terminal ? "\n" : "", stderr);
}

int need(const char *value, const char *option, const Settings *s, Err *err) {
    return value ? 0 : fail(err, "--%s is needed; see: nla help %s", option, s->command);
}

void unload(Loaded *l) {
    model_free(&l->model);
    tokenizer_free(l->tok);
    if (l->engine) {
        l->engine->close(l->engine);
    }
    *l = (Loaded){0};
}

/* --weights; NULL: as they are stored. */
static int weight_format(const char *name, WeightFormat *format, Err *err) {
    *format = !name ? WEIGHTS_AS_STORED : strcmp(name, "int8") == 0 ? WEIGHTS_INT8 : WEIGHTS_FP8;
    return *format == WEIGHTS_FP8 && strcmp(name, "fp8") != 0 ? fail(err, "--weights takes int8 or fp8, not '%s'", name) : 0;
}

static int open_device(Engine **engine, const Settings *s, Err *err) {
    bool cuda = s->device && strcmp(s->device, "cuda") == 0;
    if (s->device && !cuda && strcmp(s->device, "cpu") != 0) {
        return fail(err, "--device takes cpu or cuda, not '%s'", s->device);
    }
#ifdef NLA_CUDA
    if (cuda || (!s->device && cuda_present())) {
        *engine = engine_open_cuda(s->fp32 ? DT_F32 : DT_BF16, err);
        return *engine ? 0 : -1;
    }
#else
    if (cuda) {
        return fail(err, "--device cuda: this build has the CPU engine only (build.sh found no nvcc)");
    }
#endif
    *engine = engine_open(s->threads, s->bf16, err);
    return *engine ? 0 : -1;
}

int open_engine(Engine **engine, const Settings *s, Err *err) {
    WeightFormat format;
    if (weight_format(s->weights, &format, err) != 0 || open_device(engine, s, err) != 0) {
        return -1;
    }
    (*engine)->weights = format;
    return 0;
}

int load_all(Loaded *l, const Settings *s, bool tokenizer, Err *err) {
    *l = (Loaded){0};
    double start = now();
    if (need(s->model, "model", s, err) != 0 || open_engine(&l->engine, s, err) != 0 ||
        model_load(&l->model, s->model, l->engine, err) != 0) {
        unload(l);
        return -1;
    }
    double mapped = now();
    if (tokenizer && !(l->tok = tokenizer_load(s->model, err))) {
        unload(l);
        return -1;
    }
    note(s, "%s: %.1f M parameters on %s, %d threads; weights mapped in %.3f s, tokenizer read in %.3f s\n", s->model,
         (double)model_parameters(&l->model) / 1e6, l->engine->name, l->engine->threads, mapped - start, now() - mapped);
    return 0;
}

/* All of stdin, NUL-terminated, to be freed. */
static char *read_stdin(size_t *len, Err *err) {
    char *text = NULL;
    char chunk[65536];
    size_t n;
    while ((n = fread(chunk, 1, sizeof chunk, stdin)) > 0) {
        memcpy(arraddnptr(text, n), chunk, n);
    }
    if (ferror(stdin)) {
        arrfree(text);
        fail(err, "cannot read standard input: %s", strerror(errno));
        return NULL;
    }
    *len = (size_t)arrlen(text);
    char *copy = xstrndup(*len ? text : "", *len);
    arrfree(text);
    return copy;
}

/* Text to ids: as it stands with the tokenizer's own special tokens, or as a user message through the chat template.
 * The template's own special tokens suffice there: a second BOS would spoil Gemma. */
int encode_prompt(const Loaded *l, const Settings *s, const char *text, size_t len, int **ids, Err *err) {
    if (!s->chat) {
        return tokenizer_encode(l->tok, text, len, true, ids, err);
    }
    ChatMessage message[2];
    int n = 0;
    if (s->system) {
        message[n++] = (ChatMessage){"system", s->system};
    }
    message[n++] = (ChatMessage){"user", text};
    char *rendered = chat_render(l->tok, message, n, true, s->date, err);
    int status = rendered ? tokenizer_encode(l->tok, rendered, strlen(rendered), false, ids, err) : -1;
    free(rendered);
    return status;
}

int prompt_ids(const Loaded *l, const Settings *s, int **ids, Err *err) {
    if (s->ids) {
        for (const char *p = s->ids; *p;) {
            char *end;
            long id = strtol(p, &end, 10);
            if (end == p || (*end && *end != ',') || id < 0 || id > INT32_MAX) {
                return fail(err, "--ids takes token ids separated by commas, not '%s'", s->ids);
            }
            arrput(*ids, (int)id);
            p = *end ? end + 1 : end;
        }
    } else {
        size_t len = 0;
        const char *given = arrlen(s->argument) ? s->argument[0] : "-";
        char *text = strcmp(given, "-") == 0 ? read_stdin(&len, err) : xstrdup(given);
        if (!text) {
            return -1;
        }
        len = strcmp(given, "-") == 0 ? len : strlen(text);
        int status = encode_prompt(l, s, text, len, ids, err);
        free(text);
        if (status != 0) {
            return -1;
        }
    }
    return arrlen(*ids) ? 0 : fail(err, "the text is empty: there is no token to run the model on");
}

static void print_ids(FILE *out, const int *ids, int n) {
    fputc('[', out);
    for (int i = 0; i < n; i++) {
        fprintf(out, i ? ", %d" : "%d", ids[i]);
    }
    fputc(']', out);
}

/* ------------------------------------------------------------------------------------------------ nla inspect */

static void print_rope(const char *name, const Rope *r) {
    printf("%-22s theta %g", name, r->theta);
    if (r->linear_factor != 1) {
        printf(", linear factor %g", r->linear_factor);
    }
    if (r->llama3) {
        printf(", llama3 factor %g, low %g, high %g, original %g", r->factor, r->low_freq_factor, r->high_freq_factor,
               r->original_max_positions);
    }
    putchar('\n');
}

static void print_config(const Config *c) {
    printf("%-22s %s\n%-22s %d\n%-22s %d\n%-22s %d query, %d key/value, width %d\n%-22s %d\n%-22s %d%s\n", "family",
           c->model_type, "layers", c->n_layers, "hidden_size", c->hidden_size, "heads", c->n_heads, c->n_kv_heads,
           c->head_dim, "feed-forward", c->ff_size, "vocabulary", c->vocab_size, c->tied ? " (lm_head tied)" : "");
    print_rope("rope", &c->rope[0]);
    int windows = 0, window = 0;
    for (int i = 0; i < c->n_layers; i++) {
        windows += c->layer[i].window > 0;
        window = c->layer[i].window > 0 ? c->layer[i].window : window;
    }
    if (windows) {
        printf("%-22s %d of %d layers see %d tokens back\n", "window", windows, c->n_layers, window);
        print_rope("rope, windowed layers", &c->rope[1]);
    }
    printf("%-22s %d (2/3 of the layers)\n", "default reading layer", 2 * c->n_layers / 3);
}

static void print_tensors(const Safetensors *st) {
    for (int i = 0; i < (int)arrlen(st->tensor); i++) {
        const Tensor *t = &st->tensor[i];
        printf("%-5s %-64s [", dtype_name(t->dtype), t->name);
        for (int j = 0; j < t->n_dims; j++) {
            printf(j ? ", %lld" : "%lld", (long long)t->shape[j]);
        }
        puts("]");
    }
}

static void print_yaml(const Yaml *node, int depth) {
    for (int i = 0; i < (int)arrlen(node->item); i++) {
        const Yaml *item = node->item[i];
        printf("%*s%s%s", depth * 2, "", node->kind == YAML_MAP ? node->key[i] : "-", node->kind == YAML_MAP ? ": " : " ");
        if (item->kind == YAML_SCALAR) {
            json_write_string(stdout, item->text, strlen(item->text));
            putchar('\n');
        } else {
            putchar('\n');
            print_yaml(item, depth + 1);
        }
    }
}

static int inspect_sidecar(const char *path, Err *err) {
    Yaml *yaml = yaml_load(path, err);
    if (!yaml) {
        return -1;
    }
    printf("sidecar %s\n", path);
    print_yaml(yaml, 1);
    yaml_free(yaml);
    return 0;
}

static int inspect_model(const Settings *s, const char *dir, Err *err) {
    Engine *engine = NULL;
    Model m;
    if (open_engine(&engine, s, err) != 0) {
        return -1;
    }
    int status = model_load(&m, dir, engine, err);
    if (status == 0) {
        const Config *c = &m.config;
        size_t weights = 0;
        for (int i = 0; i < (int)arrlen(m.files.tensor); i++) {
            weights += m.files.tensor[i].bytes;
        }
        size_t forest = forest_bytes(c, engine->act_dtype, c->n_layers, 2048, 2048, FORWARD), token = 2 * (size_t)c->n_kv_heads * (size_t)c->head_dim *
                                                                          (size_t)c->n_layers * sizeof(float);
        if (s->json) {
            printf("{\"family\": \"%s\", \"layers\": %d, \"hidden_size\": %d, \"heads\": %d, \"kv_heads\": %d, \"head_dim\": %d, "
                   "\"ff_size\": %d, \"vocab_size\": %d, \"parameters\": %zu, \"weight_bytes\": %zu, \"kv_bytes_per_token\": %zu, "
                   "\"forest_bytes_2048\": %zu, \"gpu_weight_bytes\": %zu}\n",
                   c->model_type, c->n_layers, c->hidden_size, c->n_heads, c->n_kv_heads, c->head_dim, c->ff_size,
                   c->vocab_size, model_parameters(&m), weights, token, forest, model_bytes(&m, DT_BF16, engine->weights));
        } else {
            print_config(c);
            printf("%-22s %zu (%s)\n", "parameters", model_parameters(&m), dtype_name(m.embed.dtype));
            printf("memory plan, CPU (GB)\n  %-38s %8.3f\n  %-38s %8.6f\n  %-38s %8.3f\n", "weights, mapped from the files",
                   (double)weights / 1e9, "keys and values of one token", (double)token / 1e9,
                   "cache and activations of 2,048 tokens", (double)forest / 1e9);
            static const char *const kept_as[] = {"weights, bf16", "weights, int8", "weights, fp8"};
            printf("on a GPU (GB)\n  %-38s %8.3f\n", kept_as[engine->weights],
                   (double)model_bytes(&m, DT_BF16, engine->weights) / 1e9);
            if (s->tensors) {
                print_tensors(&m.files);
            }
        }
        model_free(&m);
    }
    engine->close(engine);
    return status;
}

static bool exists(const char *dir, const char *name) {
    char *path = xprintf("%s/%s", dir, name);
    bool found = access(path, F_OK) == 0;
    free(path);
    return found;
}

static int inspect_tensors(const char *path, Err *err) {
    Safetensors st;
    if (safetensors_open(&st, path, err) != 0) {
        return -1;
    }
    print_tensors(&st);
    safetensors_close(&st);
    return 0;
}

static int run_inspect(const Settings *s, Err *err) {
    const char *path = s->argument[0];
    size_t n = strlen(path);
    struct stat st;
    if (stat(path, &st) != 0) {
        return fail(err, "%s: %s", path, strerror(errno));
    }
    if (n > 5 && strcmp(path + n - 5, ".yaml") == 0) {
        return inspect_sidecar(path, err);
    }
    if (!S_ISDIR(st.st_mode)) {
        return inspect_tensors(path, err);
    }
    bool model = exists(path, "config.json"), sidecar = exists(path, "nla_meta.yaml"),
         rows = exists(path, "activations.safetensors");
    if (!model && !sidecar && !rows) {
        return fail(err, "%s: holds neither config.json (a model) nor nla_meta.yaml (a dataset)", path);
    }
    int status = model ? inspect_model(s, path, err) : 0;
    if (status == 0 && rows) {
        char *file = xprintf("%s/activations.safetensors", path);
        status = inspect_tensors(file, err);
        free(file);
    }
    if (status == 0 && sidecar && !s->json) {
        char *file = xprintf("%s/nla_meta.yaml", path);
        status = inspect_sidecar(file, err);
        free(file);
    }
    return status;
}

/* ------------------------------------------------------------------------------------------------ nla tokenize */

static int tokenize_one(const Loaded *l, const Settings *s, const char *text, size_t len, Err *err) {
    int *ids = NULL;
    int status = s->chat ? encode_prompt(l, s, text, len, &ids, err)
                         : tokenizer_encode(l->tok, text, len, !s->no_special, &ids, err);
    if (status == 0 && s->json) {
        print_ids(stdout, ids, (int)arrlen(ids));
        putchar('\n');
    }
    for (int i = 0; status == 0 && !s->json && i < (int)arrlen(ids); i++) {
        size_t n;
        const char *piece = tokenizer_piece(l->tok, ids[i], &n);
        printf("%7d  ", ids[i]);
        json_write_string(stdout, piece ? piece : "", piece ? n : 0);
        putchar('\n');
    }
    arrfree(ids);
    return status;
}

static int run_tokenize(const Settings *s, Err *err) {
    Loaded l = {0};
    if (need(s->model, "model", s, err) != 0 || !(l.tok = tokenizer_load(s->model, err))) {
        return -1;
    }
    const char *text = arrlen(s->argument) ? s->argument[0] : "-";
    int status = 0;
    if (strcmp(text, "-") != 0) {
        status = tokenize_one(&l, s, text, strlen(text), err);
    } else { /* a line at a time, without its newline */
        char *line = NULL;
        size_t room = 0;
        ssize_t n;
        while (status == 0 && (n = getline(&line, &room, stdin)) >= 0) {
            status = tokenize_one(&l, s, line, (size_t)n - (n > 0 && line[n - 1] == '\n'), err);
        }
        free(line);
    }
    unload(&l);
    return status;
}

/* ------------------------------------------------------------------------------------------------ nla generate */

/* Streams one sample's text: bytes are held back until they make whole characters. */
typedef struct {
    char held[4];
    int n_held;
} Stream;

static int utf8_length(unsigned char lead) {
    return lead < 0x80 ? 1 : lead >= 0xf0 ? 4 : lead >= 0xe0 ? 3 : lead >= 0xc0 ? 2 : 1;
}

static void stream_bytes(void *context, const Sample *x, const char *bytes, size_t n) {
    (void)x;
    Stream *s = context;
    for (size_t i = 0; i < n; i++) {
        s->held[s->n_held++] = bytes[i];
        if (s->n_held >= utf8_length((unsigned char)s->held[0])) {
            fwrite(s->held, 1, (size_t)s->n_held, stdout);
            s->n_held = 0;
        }
    }
    fflush(stdout);
}

static void print_sample(const Loaded *l, const Settings *s, const Sample *x, int prompt_tokens) {
    size_t len;
    char *text = tokenizer_decode(l->tok, x->ids, (int)arrlen(x->ids), true, &len);
    if (s->json) {
        printf("{\"row\": %d, \"sample\": %d, \"text\": ", x->row, x->sample);
        json_write_string(stdout, text, len);
        printf(", \"stop\": \"%s\", \"prompt_tokens\": %d, \"logprob\": %.6f, \"ids\": ", x->ended ? "end" : "length",
               prompt_tokens, sample_logprob(x));
        print_ids(stdout, x->ids, (int)arrlen(x->ids));
        puts("}");
    } else {
        fwrite(text, 1, len, stdout);
        putchar('\n');
    }
    free(text);
}

/* The prompts: TEXT, --ids, or the documents of --in. stb of stb. */
static int **read_prompts(const Loaded *l, const Settings *s, Err *err) {
    int **prompt = NULL, *ids = NULL;
    if (!s->in) {
        if (prompt_ids(l, s, &ids, err) != 0) {
            arrfree(ids);
            return NULL;
        }
        arrput(prompt, ids);
        return prompt;
    }
    Corpus *corpus = corpus_open(s->in, err);
    Document doc;
    int status = corpus ? 1 : -1;
    while (status == 1 && (status = corpus_next(corpus, &doc, err)) == 1) {
        ids = NULL;
        if (encode_prompt(l, s, doc.text, doc.len, &ids, err) != 0 || arrlen(ids) == 0) {
            fail(err, "%s: document %s has no tokens", s->in, doc.id);
            status = -1;
        }
        arrput(prompt, ids);
    }
    if (corpus) {
        corpus_close(corpus);
    }
    if (status == 0 && arrlen(prompt) == 0) {
        status = fail(err, "%s: holds no document", s->in);
    }
    if (status != 0) {
        for (int i = 0; i < (int)arrlen(prompt); i++) {
            arrfree(prompt[i]);
        }
        arrfree(prompt);
    }
    return prompt;
}

enum { PREFILL_ROWS = 1024 }; /* prompt tokens of one forward pass */

/* Decodes the samples of prompts [from, to) together and prints them. */
static int generate_group(const Loaded *l, const Settings *s, int **prompt, int from, int to, int64_t *tokens, Err *err) {
    int rows = 0, tokens_in = 0, samples = (to - from) * s->samples;
    for (int i = from; i < to; i++) {
        tokens_in += (int)arrlen(prompt[i]);
        rows += (int)arrlen(prompt[i]) + CACHE_ALIGN + s->samples * (s->max_tokens + CACHE_ALIGN);
    }
    int work = tokens_in < PREFILL_ROWS ? tokens_in : PREFILL_ROWS;
    Forest forest;
    if (forest_open(&forest, (Model *)&l->model, l->model.config.n_layers, rows, work > samples ? work : samples, FORWARD, err) != 0) {
        return -1;
    }
    Batch batch = {0};
    Stream stream = {0};
    bool streaming = samples == 1 && !s->json;
    Decoder d = {.how = decoding_of(s), .eos = l->model.config.eos, .vocab_size = l->model.config.vocab_size,
                 .tok = l->tok, .token = streaming ? stream_bytes : NULL, .context = &stream};
    int status = decoder_prompts(&d, &forest, &batch, -1, prompt + from, to - from, from, s->samples, err);
    int64_t computed = status == 0 ? decode(&d, &forest, &batch, err) : -1;
    *tokens += computed > 0 ? computed : 0;
    for (int i = 0; computed >= 0 && i < (int)arrlen(d.sample); i++) {
        if (streaming) {
            fwrite(stream.held, 1, (size_t)stream.n_held, stdout);
            putchar('\n');
        } else {
            print_sample(l, s, &d.sample[i], (int)arrlen(prompt[d.sample[i].row]));
        }
    }
    decoder_free(&d);
    batch_free(&batch);
    forest_close(&forest);
    return computed < 0 ? -1 : 0;
}

static int run_generate(const Settings *s, Err *err) {
    Loaded l;
    if (load_all(&l, s, true, err) != 0) {
        return -1;
    }
    int **prompt = read_prompts(&l, s, err), status = prompt ? 0 : -1;
    int64_t tokens = 0;
    double start = now();
    int group = group_size(s);
    for (int i = 0; i < (int)arrlen(prompt) && status == 0; i += group) {
        int to = i + group < (int)arrlen(prompt) ? i + group : (int)arrlen(prompt);
        status = generate_group(&l, s, prompt, i, to, &tokens, err);
    }
    if (status == 0) {
        double t = now() - start;
        note(s, "%lld tokens in %.2f s, %.1f tokens/s (prompts included)\n", (long long)tokens, t, (double)tokens / t);
    }
    for (int i = 0; i < (int)arrlen(prompt); i++) {
        arrfree(prompt[i]);
    }
    arrfree(prompt);
    unload(&l);
    return status;
}

/* ------------------------------------------------------------------------------------------------ nla help, and the table */

static int run_help(const Settings *s, Err *err);

#define MODEL_OPTION {"model", "DIR", TEXT, AT(model), 0, 0, "a Hugging Face model directory: config.json, safetensors, tokenizer.json"}
#define CHAT_OPTIONS                                                                                                   \
    {"chat", NULL, FLAG, AT(chat), 0, 0, "the text is a user message: render it with the model's chat template"},      \
    {"system", "TEXT", TEXT, AT(system), 0, 0, "system message before it (with --chat)"},                              \
    {"date", "DATE", TEXT, AT(date), 0, 0, "the date that Llama 3.1's template names (default: \"26 Jul 2024\")"}
#define SAMPLING_OPTIONS                                                                                               \
    {"max-tokens", "N", COUNT, AT(max_tokens), 1, 1e6, "longest reply (default: 200)"},                                \
    {"temperature", "T", NUMBER, AT(temperature), 0, 100, "0 takes the likeliest token (default: 0)"},                 \
    {"top-k", "N", COUNT, AT(top_k), 0, 1e9, "draw among the N likeliest (default: all)"},                             \
    {"top-p", "P", NUMBER, AT(top_p), 1e-6, 1, "draw among the likeliest that reach probability P (default: 1)"}

static const Command commands[] = {
    {"inspect", "inspect PATH [--tensors] [--json]", "config, tensors, sidecar, parameter count and memory plan",
     "PATH is a model directory, a dataset directory, a .safetensors file or a .yaml sidecar.",
     run_inspect, 1, 1, {{"tensors", NULL, FLAG, AT(tensors), 0, 0, "list every tensor of a model"}}},
    {"tokenize", "tokenize --model DIR [--chat] [TEXT|-]", "text to token ids",
     "Without TEXT, or with -, every line of standard input is one text. Prints an id and its bytes a line; with --json one\n"
     "array of ids a text. Special tokens that the tokenizer adds (BOS) are added.",
     run_tokenize, 0, 1, {MODEL_OPTION, CHAT_OPTIONS,
     {"no-special", NULL, FLAG, AT(no_special), 0, 0, "leave out the special tokens the tokenizer adds"}}},
    {"generate", "generate --model DIR [--chat] [PROMPT|-] [--in FILE]", "continue a text",
     "Without PROMPT, or with -, the prompt is standard input. --in takes many prompts: JSONL (\"text\"), a text file, a directory.\n"
     "One reply is streamed as it is made. A draw depends on --seed, the prompt's place, the sample and the step alone.",
     run_generate, 0, 1, {MODEL_OPTION, CHAT_OPTIONS, SAMPLING_OPTIONS,
     {"samples", "N", COUNT, AT(samples), 1, 4096, "replies to each prompt; the prompt is computed once for all (default: 1)"},
     {"in", "FILE", TEXT, AT(in), 0, 0, "prompts: JSONL, text, directory of texts, or - for standard input"},
     {"ids", "LIST", TEXT, AT(ids), 0, 0, "the prompt as token ids, such as 1,22,333"},
     {"batch", "N", COUNT, AT(batch), 1, 65536, "replies decoded together (default: 32)"},
     {"ignore-eos", NULL, FLAG, AT(ignore_eos), 0, 0, "go on after an end token"}}},
    {"capture", "capture --model DIR --in FILE --out DIR [--layer K]", "activations of texts, as a dataset directory",
     "Reads documents (JSONL with a \"text\" field, a text file, a directory of them, - for standard input; .gz is unpacked) and writes\n"
     "the residual stream after block K (hidden_states[K+1] in transformers) as float32, raw. With several layers, one dataset each\n"
     "under DIR/layer_K. Rows: a token's activation, its prefix as text, the number of tokens up to it.",
     run_capture, 0, 0, {MODEL_OPTION, CHAT_OPTIONS,
     {"layer", "K", TEXT, AT(layers), 0, 0, "a layer, several (3,7,20) or all (default: two thirds of the way up)"},
     {"positions", "HOW", TEXT, AT(positions), 0, 0, "all, last, or N positions a document drawn by (seed, doc_id) (default: all)"},
     {"in", "FILE", TEXT, AT(in), 0, 0, "documents"}, {"out", "DIR", TEXT, AT(out), 0, 0, "the dataset directory to make"},
     {"max-length", "N", COUNT, AT(max_length), 1, 1e6, "tokens read of a document (default: 2048)"}}},
    {"init", "init --model DIR --layer K [--av DIR] [--ar DIR]", "the start of an AV and an AR from a target model",
     "The AV is a sidecar beside links to the model's files (no copy); the AR is blocks 0..K with an identity head. Both are Hugging\n"
     "Face directories. The marker, its neighbours and the AR's suffix are computed with the model's own tokenizer.",
     run_init, 0, 0, {MODEL_OPTION, {"layer", "K", TEXT, AT(layers), 0, 0, "the layer that is read (default: two thirds of the way up)"},
     {"av", "DIR", TEXT, AT(av), 0, 0, "the AV directory to make"}, {"ar", "DIR", TEXT, AT(ar), 0, 0, "the AR directory to make"},
     {"injection-scale", "N", NUMBER, AT(injection_scale), 0, 1e30, "length of the injected vector; 0: as it is"},
     {"acts", "DIR", TEXT, AT(acts), 0, 0, "captured activations whose mean norm sets that length"}}},
    {"verbalize", "verbalize --av DIR --acts DIR [--out FILE.jsonl]", "activations to words",
     "Reads every activation of a dataset with the AV. One JSON object a sample: explanation (null when a tag is missing: failed),\n"
     "text, tokens, logprob. A sample depends on --seed, its row and its number alone, never on what is decoded beside it.",
     run_verbalize, 0, 0, {{"av", "DIR", TEXT, AT(av), 0, 0, "the AV: a model directory with nla_meta.yaml"},
     {"acts", "DIR", TEXT, AT(acts), 0, 0, "a dataset directory, or a .safetensors file with activation_vector"},
     {"out", "FILE", TEXT, AT(out), 0, 0, "where to (default: standard output)"}, SAMPLING_OPTIONS,
     {"samples", "N", COUNT, AT(samples), 1, 4096, "texts for each activation (default: 1)"},
     {"batch", "N", COUNT, AT(batch), 1, 65536, "samples decoded together (default: 32)"},
     {"logprobs", NULL, FLAG, AT(logprobs), 0, 0, "the log-probability of every token too"},
     {"sidecar", "FILE", TEXT, AT(sidecar), 0, 0, "another nla_meta.yaml than the AV's own"},
     {"injection-scale", "N", NUMBER, AT(injection_scale), 0, 1e30, "another length of the injected vector than the sidecar's"}}},
    {"reconstruct", "reconstruct --ar DIR --in FILE.jsonl --out FILE.safetensors", "words to activations",
     "Reads the explanations that verbalize wrote (rows without one are left out) and writes activation_vector, row and sample.\n"
     "With --acts it also prints how close the vectors are to those they explain.",
     run_reconstruct, 0, 0, {{"ar", "DIR", TEXT, AT(ar), 0, 0, "the AR: a model directory with value_head.safetensors and nla_meta.yaml"},
     {"in", "FILE", TEXT, AT(in), 0, 0, "JSONL with \"explanation\" or \"text\"; - for standard input"},
     {"out", "FILE", TEXT, AT(out), 0, 0, "the safetensors file to write"},
     {"acts", "DIR", TEXT, AT(acts), 0, 0, "the activations that were explained, for scores"},
     {"sidecar", "FILE", TEXT, AT(sidecar), 0, 0, "another nla_meta.yaml than the AR's own"}}},
    {"explain", "explain --model DIR --av DIR [--ar DIR] [TEXT|-] [--chat] [--html FILE]", "the round trip: what a model has in mind at each token",
     "Takes the target's activation at every token of TEXT, lets the AV put it into words and the AR rebuild it from them, and prints\n"
     "each with its FVE (how much of the activation the words carried). --html writes the same as one self-contained page.",
     run_explain, 0, 1, {MODEL_OPTION, {"av", "DIR", TEXT, AT(av), 0, 0, "the AV"},
     {"ar", "DIR", TEXT, AT(ar), 0, 0, "the AR; without it there are words but no scores"}, CHAT_OPTIONS,
     {"reply", "N", COUNT, AT(reply), 0, 1e5, "let the model reply first, up to N tokens, and read those too"},
     {"layers", "A,B,C", TEXT, AT(layers), 0, 0, "layers to read (default: the AV's)"},
     {"positions", "HOW", TEXT, AT(positions), 0, 0, "all, last, one position N or a range A:B (default: all)"},
     {"html", "FILE", TEXT, AT(html), 0, 0, "write a page to look at"}, SAMPLING_OPTIONS,
     {"samples", "N", COUNT, AT(samples), 1, 64, "explanations of each activation (default: 1)"},
     {"batch", "N", COUNT, AT(batch), 1, 65536, "samples decoded together (default: 32)"},
     {"acts", "DIR", TEXT, AT(acts), 0, 0, "activations for FVE's denominator (default: the text's own)"},
     {"injection-scale", "N", NUMBER, AT(injection_scale), 0, 1e30, "another length of the injected vector than the sidecar's"}}},
    {"eval", "eval --av DIR --ar DIR --acts DIR [--train DIR] [--html FILE]", "FVE on held-out rows, with controls and perturbations",
     "Explains every row and rebuilds it from the words, then does the same with other texts in the explanation's place: another row's,\n"
     "a constant, the nearest training row's (--train), the true prefix, the explanation shuffled, lower-cased, unquoted, thinned.",
     run_eval, 0, 0, {{"av", "DIR", TEXT, AT(av), 0, 0, "the AV"}, {"ar", "DIR", TEXT, AT(ar), 0, 0, "the AR"},
     {"acts", "DIR", TEXT, AT(acts), 0, 0, "held-out activations, with rows.jsonl for the prefixes"},
     {"train", "DIR", TEXT, AT(train), 0, 0, "training rows with explanations, for the nearest-neighbour baseline"},
     {"rows", "N", COUNT, AT(rows), 2, 1e7, "use the first N rows"},
     {"html", "FILE", TEXT, AT(html), 0, 0, "write a page with charts"}, SAMPLING_OPTIONS,
     {"batch", "N", COUNT, AT(batch), 1, 65536, "explanations decoded together (default: 32)"},
     {"injection-scale", "N", NUMBER, AT(injection_scale), 0, 1e30, "another length of the injected vector than the sidecar's"}}},
    {"report", "report RUN [--html FILE]", "a page with the curves and samples of a training run",
     "RUN is a run's directory with settings.yaml and metrics.jsonl; it may still be going on. Prints the name of the page it wrote.",
     run_report, 1, 1, {{"html", "FILE", TEXT, AT(html), 0, 0, "where to (default: RUN/report.html)"}}},
    {"data extract", "data extract --model DIR --in CORPUS --out DIR [--layer K] [--resume]", "a corpus to activations, the rows that training begins with",
     "At up to --positions-per-doc tokens of every document, drawn by (seed, doc_id), never among its first --min-context ones and never\n"
     "a special one, keeps the residual stream after block K. The directory appears when all of it is there; until then OUT.partial\n"
     "holds what --resume goes on from after a kill. Shards (--documents A:B) merged by nla data merge are the one run, byte for byte.",
     run_data_extract, 0, 0, {MODEL_OPTION,
     {"layer", "K", TEXT, AT(layers), 0, 0, "a layer, several (3,7,20) or all (default: two thirds of the way up)"},
     {"in", "CORPUS", TEXT, AT(in), 0, 0, "JSONL with \"text\" (and \"doc_id\"), a text file, a directory of them, - for standard input"},
     {"out", "DIR", TEXT, AT(out), 0, 0, "the dataset directory to make; with several layers DIR/layer_K"},
     {"positions-per-doc", "N", COUNT, AT(positions_per_doc), 1, 1e6, "tokens read of a document, at most (default: 10)"},
     {"min-context", "N", COUNT, AT(min_context), 0, 1e6, "tokens at its start that are not read (default: 50)"},
     {"max-length", "N", COUNT, AT(max_length), 1, 1e6, "tokens of a document that are run (default: 2048)"},
     {"documents", "N|A:B", TEXT, AT(documents), 0, 0, "the first N documents, or those from A on, before B (default: all)"},
     {"save-every", "SECONDS", NUMBER, AT(save_every), 0, 1e6, "between two states that --resume can go on from (default: 15)"},
     {"resume", NULL, FLAG, AT(resume), 0, 0, "go on with the run that OUT.partial holds"}}},
    {"data merge", "data merge DIR... --out DIR", "shards of one corpus as one dataset",
     "DIR...: what nla data extract made of consecutive ranges of documents (--documents 0:1000, 1000:2000, ...), in order.",
     run_data_merge, 1, 10000, {{"out", "DIR", TEXT, AT(out), 0, 0, "the dataset directory to make"}}},
    {"data split", "data split --acts DIR --out DIR [--parts LIST]", "a dataset in parts, by document",
     "Every row of a document goes to the same part, by the document's id and --seed alone.",
     run_data_split, 0, 0, {{"acts", "DIR", TEXT, AT(acts), 0, 0, "the dataset"},
     {"out", "DIR", TEXT, AT(out), 0, 0, "directory to make, with a dataset for each part"},
     {"parts", "LIST", TEXT, AT(parts), 0, 0, "names and weights (default: av_sft:25,ar_sft:25,rl:50,held:4)"}}},
    {"data permute", "data permute --acts DIR --out DIR", "the control: the same rows with each other's vectors",
     "A random cycle through all rows, by --seed: no row keeps its own vector.",
     run_data_permute, 0, 0, {{"acts", "DIR", TEXT, AT(acts), 0, 0, "the dataset"}, {"out", "DIR", TEXT, AT(out), 0, 0, "the dataset directory to make"}}},
    {"data explain", "data explain --acts DIR --by file|model|api|rules --out FILE.jsonl", "warm-start explanations of rows, from their prefixes",
     "rules: from the words alone, without a model. model: an instruct model on disk (--model). file: what somebody else wrote (--in:\n"
     "JSONL with row_id or prefix, and explanation). api: through data/explain_api.py, whose options follow -- (see its --help).\n"
     "Lists, emphasis and tags are taken off; what lacks its closing tag or has fewer than two features is dropped and counted.",
     run_data_explain, 0, 1000, {{"acts", "DIR", TEXT, AT(acts), 0, 0, "the dataset whose rows are explained"},
     {"by", "HOW", TEXT, AT(by), 0, 0, "file, model, api or rules"},
     {"out", "FILE", TEXT, AT(out), 0, 0, "the file to make: JSONL with row_id, prefix, explanation, by"},
     {"in", "FILE", TEXT, AT(in), 0, 0, "explanations, for --by file; several separated by commas, of which the first counts"}, MODEL_OPTION,
     {"rows", "N", COUNT, AT(rows), 1, 1e9, "only the first N rows"},
     {"resume", NULL, FLAG, AT(resume), 0, 0, "go on with FILE.part, of a run that was killed"}, SAMPLING_OPTIONS,
     {"batch", "N", COUNT, AT(batch), 1, 65536, "rows that a model explains together (default: 32)"}}},
    {"data build", "data build --acts DIR --stage av_sft|ar_sft|rl [--explanations FILE] --out DIR", "training rows: a dataset with explanations and a complete sidecar",
     "av_sft and ar_sft keep the rows that somebody explained, rl all rows without. The sidecar gets the marker, its neighbours, the\n"
     "AR's suffix and the templates of the dataset's own model (or --model).",
     run_data_build, 0, 0, {{"acts", "DIR", TEXT, AT(acts), 0, 0, "the dataset"}, {"out", "DIR", TEXT, AT(out), 0, 0, "the dataset directory to make"},
     {"stage", "STAGE", TEXT, AT(stage), 0, 0, "av_sft, ar_sft or rl"},
     {"explanations", "FILE", TEXT, AT(explanations), 0, 0, "from nla data explain; several separated by commas, of which the first counts"}, MODEL_OPTION}},
    {"data stats", "data stats DIR...", "rows, documents, lengths, norms, repeats, and leakage between datasets", "",
     run_data_stats, 1, 1000, {{0}}},
    {"train", "train av|ar|rl [--config FILE] [key=value ...]", "teach an AV and an AR, or improve both by RL",
     "av: next-token cross entropy on explanations of activations. ar: mse_nrm of the vectors that explanations are turned into.\n"
     "rl: GRPO with the live AR as reward and a KL to the AV it started from; the AR learns on the same texts.\n"
     "A run is a directory: settings.yaml, metrics.jsonl (see nla report) and checkpoints, whose av/ and ar/ other commands open.\n"
     "Interrupted (Ctrl-C, kill) it saves and exits; with --resume it goes on, bit for bit as if it had not been.",
     run_train, 1, 100, {{"config", "FILE", TEXT, AT(config), 0, 0, "settings, as YAML"},
     {"resume", NULL, FLAG, AT(resume), 0, 0, "go on from the newest checkpoint (only out=DIR is needed then)"},
     {"plan", NULL, FLAG, AT(plan), 0, 0, "print the memory that these settings take, and stop"}}},
    {"export", "export DIR --out DIR [--merge] [--dtype bf16|f32]", "a trained AV or AR as a directory that others open",
     "DIR is an AV or an AR, such as RUN/checkpoint-100/av. Adapters stay adapters (PEFT's layout) unless they are merged into the\n"
     "weights; weights become a Hugging Face directory.",
     run_export, 1, 1, {{"out", "DIR", TEXT, AT(out), 0, 0, "the directory to make"},
     {"merge", NULL, FLAG, AT(merge), 0, 0, "add the adapters to the weights they are for"},
     {"dtype", "bf16|f32", TEXT, AT(dtype), 0, 0, "of the weights (default: bf16); adapters and the value head stay f32"}}},
    {"verify", "verify [--model DIR] [--fp32]", "op by op, the CUDA engine against the CPU engine",
     "Runs every op forward and back at several sizes, and a whole model's forward pass, on both engines; prints the largest difference of\n"
     "each output relative to the largest number expected, and exits with 1 when one is beyond its bound.",
     run_verify, 0, 0, {MODEL_OPTION}},
    {"dump", "dump --model DIR --out FILE [TEXT|-]", "every intermediate of one forward pass, for diffing",
     "Writes a safetensors file: input_ids, and under the names of transformers' modules their outputs for every token:\n"
     "model.embed_tokens, model.layers.N.self_attn, model.layers.N.mlp, model.layers.N (the residual stream after block N),\n"
     "model.norm, lm_head.",
     run_dump, 0, 1, {MODEL_OPTION, CHAT_OPTIONS, {"out", "FILE", TEXT, AT(out), 0, 0, "the safetensors file to write"},
     {"ids", "LIST", TEXT, AT(ids), 0, 0, "token ids instead of TEXT, such as 1,22,333"},
     {"only", "NAME", TEXT, AT(only), 0, 0, "keep only tensors whose name contains NAME"}}},
    {"bench", "bench [linear|load|forward|decode|verbalize|all] [--model DIR]", "speed, op by op and end to end",
     "linear: one matrix product, --shape ROWS,IN,OUT (needs no model). load: files to first use. forward: 2,048 packed tokens in\n"
     "documents of --max-length. decode: --samples replies of --max-tokens to one prompt of 100 random tokens. verbalize: --samples of\n"
     "each of --rows vectors over the forest, then each sample alone with its whole prompt; the texts must be the same.",
     run_bench, 0, 1, {MODEL_OPTION, SAMPLING_OPTIONS,
     {"av", "DIR", TEXT, AT(av), 0, 0, "the AV that verbalize reads with"},
     {"acts", "DIR", TEXT, AT(acts), 0, 0, "the vectors that it reads"},
     {"rows", "N", COUNT, AT(rows), 1, 4096, "use the first N of them (default: 64)"},
     {"sidecar", "FILE", TEXT, AT(sidecar), 0, 0, "another nla_meta.yaml than the AV's own"},
     {"injection-scale", "N", NUMBER, AT(injection_scale), 0, 1e30, "another length of the injected vector than the sidecar's"},
     {"samples", "N", COUNT, AT(samples), 1, 4096, "rows decoded together"},
     {"max-length", "N", COUNT, AT(max_length), 1, 1e6, "length of the packed documents (default: 2048)"},
     {"shape", "ROWS,IN,OUT", TEXT, AT(shape), 0, 0, "of the matrix product"},
     {"repeat", "N", COUNT, AT(repeat), 1, 1e6, "measurements; the median is shown (default: 5)"}}},
    {"help", "help [COMMAND]", "what there is, or all about one command", "", run_help, 0, 2, {{0}}},
    {0},
};

static const Command *find_command(const char *name) {
    for (const Command *c = commands; c->name; c++) {
        if (strcmp(c->name, name) == 0) {
            return c;
        }
    }
    return NULL;
}

/* Commands of two words: "data" alone is none. */
static bool is_first_word(const char *word) {
    size_t n = strlen(word);
    for (const Command *c = commands; c->name; c++) {
        if (strncmp(c->name, word, n) == 0 && c->name[n] == ' ') {
            return true;
        }
    }
    return false;
}

static void print_option(const Option *o) {
    char left[64];
    snprintf(left, sizeof left, "--%s%s%s", o->name, o->value ? " " : "", o->value ? o->value : "");
    printf("  %-24s %s\n", left, o->help);
}

static int run_help(const Settings *s, Err *err) {
    if (!arrlen(s->argument)) {
        puts("nla: natural language autoencoders. It reads what a language model holds in its residual stream.\n\n"
             "usage: nla COMMAND [options]      nla help COMMAND tells all about one\n");
        for (const Command *c = commands; c->name; c++) {
            printf("  %-13s %s\n", c->name, c->summary);
        }
        puts("\nResults go to stdout, progress and timing to stderr. Exit status: 0 done, 1 failed, 2 wrong usage.");
        return 0;
    }
    char *name = arrlen(s->argument) > 1 ? xprintf("%s %s", s->argument[0], s->argument[1]) : xstrdup(s->argument[0]);
    const Command *c = find_command(name);
    bool first = is_first_word(name);
    for (const Command *k = commands; first && k->name; k++) {
        if (strncmp(k->name, name, strlen(name)) == 0) {
            printf("  %-13s %s\n", k->name, k->summary);
        }
    }
    if (!c && !first) {
        fail(err, "there is no command '%s'; nla help lists them", name);
    }
    free(name);
    if (!c) {
        return first ? 0 : -1;
    }
    printf("usage: nla %s\n\n%s.\n%s%s\n", c->usage, c->summary, c->details, *c->details ? "\n" : "");
    for (const Option *o = c->option; o->name; o++) {
        print_option(o);
    }
    for (const Option *o = common_options; o->name; o++) {
        print_option(o);
    }
    if (c->run == run_train) {
        run_settings_help(stdout);
    }
    return 0;
}

/* ------------------------------------------------------------------------------------------------ main */

/* The command that the line begins with, of one word or two; *words: how many. NULL: none, with the reason. */
static const Command *command_of(Settings *s, int argc, char **argv, int *words, Err *err) {
    bool two = argc > 2 && is_first_word(argv[1]);
    char *name = argc < 2 || strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0 ? xstrdup("help")
                 : two ? xprintf("%s %s", argv[1], argv[2])
                       : xstrdup(argv[1]);
    const Command *c = find_command(name);
    const char *nearest = NULL;
    for (const Command *k = commands; !c && k->name && !nearest; k++) {
        nearest = edit_distance(name, k->name) <= 2 ? k->name : NULL;
    }
    if (c) {
        s->command = c->name;
    } else if (argc == 2 && is_first_word(name)) {
        fail(err, "%s what? nla help %s lists its commands", name, name);
    } else {
        fail(err, "there is no command '%s'%s%s%s; nla help lists them", name, nearest ? " (did you mean " : "", nearest ? nearest : "",
             nearest ? "?)" : "");
    }
    *words = two ? 2 : 1;
    free(name);
    return c;
}

int nla_main(int argc, char **argv) {
    Err err = {0};
    Settings s = {.positions = "all", .positions_per_doc = 10, .min_context = 50, .parts = "av_sft:25,ar_sft:25,rl:50,held:4", .samples = 1,
                  .max_tokens = 200, .max_length = 2048, .batch = 32, .repeat = 5, .top_p = 1, .injection_scale = NAN, .save_every = 15};
    int words = 1, status = 2;
    const Command *c = command_of(&s, argc, argv, &words, &err);
    for (int i = 1 + words; c && i < argc; i++) { /* nla COMMAND --help */
        if (strcmp(argv[i], "--") == 0) {
            break;
        }
        if (strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0) {
            arrput(s.argument, c->name);
            run_help(&s, &err);
            arrfree(s.argument);
            return 0;
        }
    }
    if (c && parse_options(&s, c, 1 + words, argc, argv, &err) == 0) {
        status = c->run(&s, &err) == 0 ? 0 : 1;
    }
    arrfree(s.argument);
    if (fflush(stdout) != 0 && status == 0) {
        fail(&err, "cannot write to standard output: %s", strerror(errno));
        status = 1;
    }
    if (status != 0) {
        fflush(stdout);
        fprintf(stderr, "nla: error: %s\n", err.msg);
    }
    return status;
}

#ifndef NLA_NO_MAIN
int main(int argc, char **argv) {
    file_guard();
    return nla_main(argc, argv);
}
#endif
