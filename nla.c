/* nla.c - the program: the command line, what all commands share, the commands of a plain language model (inspect, tokenize,
 * generate) and main. Every other command stands in the file of its subject; the table of them all is in help.c.
 *
 * Order: command line; loading; one section a command; main.
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

static int edit_distance(const char *a, const char *b) {
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

void guess(Guess *g, const char *name) {
    int apart = edit_distance(g->given, name);
    if (apart < (*g->hint ? g->apart : 3)) {
        g->apart = apart;
        snprintf(g->hint, sizeof g->hint, " (did you mean %s?)", name);
    }
}

const Command *find_command(const char *name) {
    const Command *c = commands;
    while (c->name && strcmp(c->name, name) != 0) {
        c++;
    }
    return c->name ? c : NULL;
}

bool is_first_word(const char *word) {
    size_t n = strlen(word);
    const Command *c = commands;
    while (c->name && (strncmp(c->name, word, n) != 0 || c->name[n] != ' ')) {
        c++;
    }
    return c->name;
}

/* The option of a command, its own or a common one, that "--name" or "--name=value" names. */
static const Option *find_option(const Command *c, const char *word, Err *err) {
    const Option *const lists[] = {c->option, common_options};
    char *given = xstrndup(word, strcspn(word, "="));
    const Option *found = NULL;
    Guess g = {.given = given};
    for (int i = 0; i < 2; i++) {
        for (const Option *o = lists[i]; o->name && !found; o++) {
            char *name = xprintf("--%s", o->name);
            found = strcmp(name, given) == 0 ? o : NULL;
            guess(&g, name);
            free(name);
        }
    }
    if (!found) {
        fail(err, "unknown option %s%s; see: nla help %s", given, g.hint, c->name);
    }
    free(given);
    return found;
}

static int set_option(Settings *s, const Option *o, const char *value, Err *err) {
    char *place = (char *)s + o->place, *end = NULL;
    errno = 0;
    if (o->kind == OPTION_TEXT) {
        *(const char **)(void *)place = value;
    } else if (o->kind == OPTION_SEED) {
        long long n = strtoll(value, &end, 10);
        if (*end || end == value || errno) {
            return fail(err, "--%s takes a whole number, not '%s'", o->name, value);
        }
        *(int64_t *)(void *)place = n;
    } else {
        double n = strtod(value, &end);
        if (*end || end == value || errno || !(n >= o->least && n <= o->most) || (o->kind == OPTION_COUNT && n != floor(n))) {
            return fail(err, "--%s takes a %s from %g to %g, not '%s'", o->name,
                        o->kind == OPTION_COUNT ? "whole number" : "number", o->least, o->most, value);
        }
        if (o->kind == OPTION_COUNT) {
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
        const char *equals = strchr(word, '=');
        const Option *o = find_option(c, word, err);
        if (!o) {
            return -1;
        }
        if (o->kind == OPTION_FLAG) {
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
        return fail(err, n < c->least ? "an argument is missing; usage: nla %s %s" : "too many arguments; usage: nla %s %s",
                    c->name, c->usage);
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
        fflush(stdout); /* both may go into one file */
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
        size_t forest = forest_bytes(&m, c->n_layers, 2048, 2048, FORWARD), token = 2 * (size_t)c->n_kv_heads * (size_t)c->head_dim *
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

int run_inspect(const Settings *s, Err *err) {
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

int run_tokenize(const Settings *s, Err *err) {
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

int run_generate(const Settings *s, Err *err) {
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

/* ------------------------------------------------------------------------------------------------ main */

/* The command that the line begins with, of one word or two; *words: how many. NULL: none, with the reason. */
static const Command *command_of(Settings *s, int argc, char **argv, int *words, Err *err) {
    bool two = argc > 2 && is_first_word(argv[1]);
    char *name = argc < 2 || strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0 ? xstrdup("help")
                 : two ? xprintf("%s %s", argv[1], argv[2])
                       : xstrdup(argv[1]);
    const Command *c = find_command(name);
    Guess g = {.given = name};
    for (const Command *k = commands; k->name; k++) {
        guess(&g, k->name);
    }
    if (c) {
        s->command = c->name;
    } else if (argc == 2 && is_first_word(name)) {
        fail(err, "%s what? nla help %s lists its commands", name, name);
    } else {
        fail(err, "there is no command '%s'%s; nla help lists them", name, g.hint);
    }
    *words = two ? 2 : 1;
    free(name);
    return c;
}

int nla_main(int argc, char **argv) {
    Err err = {0};
    Settings s = {.positions = "all", .positions_per_doc = 10, .min_context = 50, .parts = "av_sft:25,ar_sft:25,rl:50,held:4", .samples = 1,
                  .max_tokens = 200, .max_length = 2048, .batch = 32, .repeat = 5, .top_p = 1, .injection_scale = NAN, .save_every = 15,
                  .words = RULES_WORDS, .prompt_tokens = 125, .av_tokens = 247, .ar_tokens = 126, .text_tokens = 200};
    int words = 1, status = 2;
    const Command *c = command_of(&s, argc, argv, &words, &err);
    for (int i = 1 + words; c && i < argc; i++) { /* nla COMMAND --help */
        if (strcmp(argv[i], "--") == 0) {
            break;
        }
        if (strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0) {
            arrput(s.argument, c->name);
            find_command("help")->run(&s, &err);
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
