/* model.c - the transformer: configuration, weights, and one forward pass written once over the op table.
 *
 * Four families (llama, qwen2, qwen3, gemma3 text) differ only in what Config records: which norms, which biases, which
 * gate, which window. There is no padding and no rectangle: a batch is a forest of segments (nla.h). Nothing here knows
 * how an op is computed or on what.
 */
#include "nla.h"

#include <math.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include <stb/stb_ds.h>

/* ------------------------------------------------------------------------------------------------ configuration */

static const char *const family_names[] = {"llama", "qwen2", "qwen3", "gemma3_text"};

/* One config.json being read: `node` is the object that describes the text model. */
typedef struct {
    const Json *json;
    int node;
    Err *err;
    bool failed;
} ConfigReader;

static int config_value(const ConfigReader *r, const char *key) {
    int value = json_get(r->json, r->node, key);
    return json_type(r->json, value) == JSON_NULL ? -1 : value;
}

static void config_fail(ConfigReader *r, const char *key, const char *why) {
    fail(r->err, "%s: %s %s", r->json->file, key, why);
    r->failed = true;
}

/* An absent key or null takes the class default, as transformers does. */
static int config_int(ConfigReader *r, const char *key, int otherwise, int most) {
    int node = config_value(r, key);
    int64_t value = otherwise;
    if (node >= 0 && !json_int(r->json, node, &value)) {
        config_fail(r, key, "is not a whole number");
    } else if (value < 1 || value > most) {
        fail(r->err, "%s: %s is %lld; this program takes 1 to %d", r->json->file, key, (long long)value, most);
        r->failed = true;
    }
    return r->failed ? 1 : (int)value;
}

static double positive_number(ConfigReader *r, int object, const char *key, double otherwise) {
    int node = json_get(r->json, object, key);
    double value = otherwise;
    if (node >= 0 && json_type(r->json, node) != JSON_NULL && !json_double(r->json, node, &value)) {
        config_fail(r, key, "is not a number");
    } else if (!(value > 0 && value < 1e30)) {
        config_fail(r, key, "must be a positive number");
    }
    return r->failed ? 1 : value;
}

static bool config_flag(ConfigReader *r, const char *key, bool otherwise) {
    int node = config_value(r, key);
    bool value = otherwise;
    if (node >= 0 && !json_bool(r->json, node, &value)) {
        config_fail(r, key, "is not true or false");
    }
    return value;
}

/* What this program does not compute must be absent or null: silently leaving it out would give other numbers. */
static void refuse(ConfigReader *r, const char *key, const char *what) {
    int node = config_value(r, key);
    bool flag = false;
    if (node < 0 || (json_bool(r->json, node, &flag) && !flag)) {
        return;
    }
    fail(r->err, "%s: %s: %s is not supported", r->json->file, key, what);
    r->failed = true;
}

/* Reads one RoPE description: {rope_type|type, factor, ...}; `object` -1 means unscaled. */
static void read_rope(ConfigReader *r, int object, Rope *rope) {
    rope->linear_factor = 1;
    int type = json_get(r->json, object, "rope_type");
    type = type < 0 ? json_get(r->json, object, "type") : type;
    if (type < 0 || json_is(r->json, type, "default")) {
        return;
    }
    if (json_is(r->json, type, "linear")) {
        rope->linear_factor = positive_number(r, object, "factor", 1);
    } else if (json_is(r->json, type, "llama3")) {
        rope->llama3 = true;
        rope->factor = positive_number(r, object, "factor", 0);
        rope->low_freq_factor = positive_number(r, object, "low_freq_factor", 0);
        rope->high_freq_factor = positive_number(r, object, "high_freq_factor", 0);
        rope->original_max_positions = positive_number(r, object, "original_max_position_embeddings", 0);
        if (!r->failed && rope->high_freq_factor <= rope->low_freq_factor) {
            config_fail(r, "high_freq_factor", "must be larger than low_freq_factor");
        }
    } else {
        config_fail(r, "rope_type", "is none of default, linear, llama3; other scalings are not supported");
    }
}

/* Both spellings: `rope_parameters` (for Gemma one object per layer type), or rope_theta + rope_scaling
 * (+ rope_local_base_freq). Gemma's local layers are never scaled. */
static void read_ropes(ConfigReader *r, Config *c) {
    bool gemma = c->family == FAMILY_GEMMA3;
    double theta = gemma ? 1e6 : 1e4;
    int both = config_value(r, "rope_parameters"), global = both, local = -1;
    if (json_type(r->json, json_get(r->json, both, "full_attention")) == JSON_OBJECT) {
        global = json_get(r->json, both, "full_attention");
        local = json_get(r->json, both, "sliding_attention");
    }
    if (global >= 0) {
        c->rope[0].theta = positive_number(r, global, "rope_theta", positive_number(r, r->node, "rope_theta", theta));
        read_rope(r, global, &c->rope[0]);
    } else {
        c->rope[0].theta = positive_number(r, r->node, "rope_theta", theta);
        read_rope(r, config_value(r, "rope_scaling"), &c->rope[0]);
    }
    c->rope[1].theta = positive_number(r, r->node, "rope_local_base_freq", 1e4);
    c->rope[1].linear_factor = 1;
    if (local >= 0) {
        c->rope[1].theta = positive_number(r, local, "rope_theta", 1e4);
        read_rope(r, local, &c->rope[1]);
    }
}

/* Which layers see a window only. */
static void read_layer_kinds(ConfigReader *r, Config *c) {
    bool gemma = c->family == FAMILY_GEMMA3, qwen = c->family == FAMILY_QWEN2 || c->family == FAMILY_QWEN3;
    bool windows = gemma || (qwen && config_flag(r, "use_sliding_window", false));
    int window = windows ? config_int(r, "sliding_window", 4096, 1 << 30) : 0;
    int pattern = gemma ? config_int(r, "sliding_window_pattern", config_int(r, "_sliding_window_pattern", 6, 1024), 1024) : 0;
    int full_layers = 0;
    if (qwen && windows) { /* 0 is meaningful here: all layers slide */
        int64_t n = 28;
        int node = config_value(r, "max_window_layers");
        if (node >= 0 && (!json_int(r->json, node, &n) || n < 0 || n > 1024)) {
            config_fail(r, "max_window_layers", "is not a number of layers");
        }
        full_layers = (int)n;
    }
    int types = config_value(r, "layer_types");
    if (types >= 0 && json_size(r->json, types) != c->n_layers) {
        fail(r->err, "%s: layer_types lists %d layers, num_hidden_layers says %d", r->json->file,
             json_size(r->json, types), c->n_layers);
        r->failed = true;
        return;
    }
    c->layer = xcalloc((size_t)c->n_layers, sizeof(LayerKind));
    int type = json_first(r->json, types);
    for (int i = 0; i < c->n_layers; i++) {
        bool sliding = gemma ? (i + 1) % pattern != 0 : windows && i >= full_layers;
        if (types >= 0) {
            sliding = json_is(r->json, type, "sliding_attention");
            if (!sliding && !json_is(r->json, type, "full_attention")) {
                config_fail(r, "layer_types", "holds a type that is neither full_attention nor sliding_attention");
                return;
            }
            type = json_next(r->json, type);
        }
        if (sliding && window == 0) {
            config_fail(r, "layer_types", "names sliding layers, but this family has no sliding_window in use");
            return;
        }
        c->layer[i] = (LayerKind){.window = sliding ? window : 0, .rope = gemma && sliding};
    }
}

static void read_eos(const Json *json, int node, Config *c) {
    int list = json_get(json, node, "eos_token_id");
    int item = json_type(json, list) == JSON_ARRAY ? json_first(json, list) : list;
    while (item >= 0) {
        int64_t id;
        if (json_int(json, item, &id) && id >= 0 && id < INT32_MAX) {
            arrput(c->eos, (int)id);
        }
        item = item == list ? -1 : json_next(json, item);
    }
}

static int read_family(ConfigReader *r, Config *c) {
    int type = json_get(r->json, r->node, "model_type");
    for (int i = 0; i < 4; i++) {
        if (json_is(r->json, type, family_names[i])) {
            c->family = (Family)i;
            c->model_type = xstrdup(family_names[i]);
            return 0;
        }
    }
    char *name = json_string(r->json, type, NULL);
    fail(r->err, "%s: model_type is %s%s; supported are llama, qwen2, qwen3, gemma3, gemma3_text", r->json->file,
         name ? name : "missing", name ? "" : " or not a string");
    free(name);
    return -1;
}

/* The sizes, with each class's defaults. */
static void read_sizes(ConfigReader *r, Config *c) {
    static const struct {
        int vocab, hidden, ff, layers, heads, kv_heads, head_dim, positions;
    } defaults[] = {
        [FAMILY_LLAMA] = {32000, 4096, 11008, 32, 32, 0, 0, 2048},
        [FAMILY_QWEN2] = {151936, 4096, 22016, 32, 32, 32, 0, 32768},
        [FAMILY_QWEN3] = {151936, 4096, 22016, 32, 32, 32, 128, 32768},
        [FAMILY_GEMMA3] = {262208, 2304, 9216, 26, 8, 4, 256, 131072},
    };
    c->vocab_size = config_int(r, "vocab_size", defaults[c->family].vocab, 1 << 24);
    c->hidden_size = config_int(r, "hidden_size", defaults[c->family].hidden, 1 << 16);
    c->ff_size = config_int(r, "intermediate_size", defaults[c->family].ff, 1 << 20);
    c->n_layers = config_int(r, "num_hidden_layers", defaults[c->family].layers, 1024);
    c->n_heads = config_int(r, "num_attention_heads", defaults[c->family].heads, 1024);
    int kv = defaults[c->family].kv_heads;
    c->n_kv_heads = config_int(r, "num_key_value_heads", kv ? kv : c->n_heads, 1024);
    int width = defaults[c->family].head_dim;
    c->head_dim = config_int(r, "head_dim", width ? width : c->hidden_size / c->n_heads, 1024);
    c->max_positions = config_int(r, "max_position_embeddings", defaults[c->family].positions, 1 << 30);
    c->rms_norm_eps = (float)positive_number(r, r->node, "rms_norm_eps", 1e-6);
    if (r->failed) {
        return;
    }
    if (c->n_heads % c->n_kv_heads != 0) {
        config_fail(r, "num_attention_heads", "is not a multiple of num_key_value_heads");
    } else if (c->n_heads / c->n_kv_heads > 64) {
        config_fail(r, "num_attention_heads", "is more than 64 times num_key_value_heads");
    } else if (c->head_dim % 2 != 0) {
        config_fail(r, "head_dim", "is odd; RoPE turns pairs");
    }
}

static void read_details(ConfigReader *r, Config *c) {
    bool gemma = c->family == FAMILY_GEMMA3;
    c->embed_scale = gemma ? sqrtf((float)c->hidden_size) : 1;
    double scalar = gemma ? positive_number(r, r->node, "query_pre_attn_scalar", 256) : c->head_dim;
    c->attn_scale = (float)(1 / sqrt(scalar));
    bool attention_bias = config_flag(r, "attention_bias", false);
    if (c->family == FAMILY_QWEN2) { /* the class has them, whatever the file says */
        c->qkv_bias = true;
    } else {
        c->qkv_bias = c->o_bias = attention_bias;
    }
    c->mlp_bias = c->family == FAMILY_LLAMA && config_flag(r, "mlp_bias", false);
    c->qk_norm = c->family == FAMILY_QWEN3 || gemma;
    c->norm_plus_one = c->post_norms = c->gelu = gemma;
    int activation = config_value(r, gemma ? "hidden_activation" : "hidden_act");
    if (activation >= 0 && !json_is(r->json, activation, gemma ? "gelu_pytorch_tanh" : "silu")) {
        config_fail(r, gemma ? "hidden_activation" : "hidden_act",
                    gemma ? "is not gelu_pytorch_tanh, the only one this family has" : "is not silu, the only one this family has");
    }
    refuse(r, "attn_logit_softcapping", "soft-capping of attention");
    refuse(r, "final_logit_softcapping", "soft-capping of logits");
    refuse(r, "use_bidirectional_attention", "attention to later tokens");
    refuse(r, "quantization_config", "a quantised checkpoint (dequantise it first)");
    int partial = config_value(r, "partial_rotary_factor");
    double factor = 1;
    if (partial >= 0 && (!json_double(r->json, partial, &factor) || factor != 1)) {
        config_fail(r, "partial_rotary_factor", "other than 1 is not supported");
    }
}

int config_parse(Config *c, const char *text, size_t len, const char *file, Err *err) {
    *c = (Config){0};
    Json json;
    if (json_parse(&json, text, len, file, err) != 0) {
        return -1;
    }
    ConfigReader r = {&json, 0, err, false};
    if (json_type(&json, 0) != JSON_OBJECT) {
        r.failed = true;
        fail(err, "%s: is not a JSON object", file);
    }
    bool tied_outside = json_is(&json, json_get(&json, 0, "model_type"), "gemma3");
    if (tied_outside) { /* Gemma3ForConditionalGeneration: the text model's configuration is inside */
        c->tied = config_flag(&r, "tie_word_embeddings", true);
        read_eos(&json, 0, c);
        int inside = json_get(&json, 0, "text_config");
        r.node = inside;
        if (json_type(&json, inside) != JSON_OBJECT) {
            config_fail(&r, "text_config", "is missing (model_type gemma3 is a wrapper around it)");
        } else {
            c->family = FAMILY_GEMMA3;
            c->model_type = xstrdup("gemma3_text");
        }
    } else if (!r.failed) {
        r.failed = read_family(&r, c) != 0;
    }
    if (!r.failed) {
        read_sizes(&r, c);
    }
    if (!r.failed) {
        c->tied = config_flag(&r, "tie_word_embeddings", tied_outside ? c->tied : c->family == FAMILY_GEMMA3);
        read_details(&r, c);
        read_ropes(&r, c);
    }
    if (!r.failed) {
        read_layer_kinds(&r, c);
        read_eos(&json, r.node, c);
    }
    json_free(&json);
    if (r.failed) {
        config_free(c);
        return -1;
    }
    return 0;
}

static bool is_file(const char *path) {
    struct stat st;
    return stat(path, &st) == 0 && S_ISREG(st.st_mode);
}

/* generation_config.json may name more end tokens (Llama 3.1: three of them). */
static int read_generation_config(Config *c, const char *dir, Err *err) {
    char *path = xprintf("%s/generation_config.json", dir);
    File file;
    Json json;
    int status = 0;
    if (is_file(path)) {
        status = file_map(&file, path, err);
        if (status == 0) {
            status = json_parse(&json, file.data, file.len, path, err);
            if (status == 0) {
                read_eos(&json, 0, c);
                json_free(&json);
            }
            file_unmap(&file);
        }
    }
    free(path);
    return status;
}

int config_load(Config *c, const char *dir, Err *err) {
    *c = (Config){0};
    char *path = xprintf("%s/config.json", dir);
    File file;
    int status = file_map(&file, path, err);
    if (status == 0) {
        status = config_parse(c, file.data, file.len, path, err);
        file_unmap(&file);
    }
    free(path);
    if (status == 0 && read_generation_config(c, dir, err) != 0) {
        config_free(c);
        return -1;
    }
    return status;
}

void config_free(Config *c) {
    free(c->model_type);
    free(c->layer);
    arrfree(c->eos);
    *c = (Config){0};
}

/* ------------------------------------------------------------------------------------------------ engines */

Engine *cpu_engine_any(int threads, bool bf16_dot, Err *err);
Engine *cpu_engine_avx2(int threads, bool bf16_dot, Err *err);
Engine *cpu_engine_avx512(int threads, bool bf16_dot, Err *err);
Engine *cpu_engine_avx512bf16(int threads, bool bf16_dot, Err *err);

void memory_count(MemoryUse *m, MemoryKind kind, size_t more, size_t less) {
    size_t all = 0;
    m->now[kind] += more;
    m->now[kind] -= less;
    m->peak[kind] = m->now[kind] > m->peak[kind] ? m->now[kind] : m->peak[kind];
    for (int i = 0; i < MEMORY_KINDS; i++) {
        all += m->now[i];
    }
    m->most = all > m->most ? all : m->most;
}

double proc_bytes(const char *path, const char *field) {
    FILE *in = fopen(path, "r");
    char line[256];
    double kilobytes = 0;
    size_t n = strlen(field);
    while (in && fgets(line, sizeof line, in)) {
        if (strncmp(line, field, n) == 0 && line[n] == ':') {
            kilobytes = strtod(line + n + 1, NULL);
        }
    }
    if (in) {
        fclose(in);
    }
    return kilobytes * 1024;
}

size_t host_available(void) {
    return (size_t)proc_bytes("/proc/meminfo", "MemAvailable");
}

Engine *engine_open(int threads, bool bf16_dot, Err *err) {
    threads = threads > 0 ? threads : omp_get_max_threads();
#ifndef NLA_ONLY_ANY
    const char *most = getenv("NLA_CPU");
    int level = !most ? 3 : strcmp(most, "any") == 0 ? 0 : strcmp(most, "avx2") == 0 ? 1 : strcmp(most, "avx512") == 0 ? 2 : -1;
    if (level < 0) {
        fail(err, "NLA_CPU is '%s'; it takes any, avx2 or avx512", most);
        return NULL;
    }
    bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (level >= 3 && avx512 && __builtin_cpu_supports("avx512bf16")) {
        return cpu_engine_avx512bf16(threads, bf16_dot, err);
    }
    if (level >= 2 && avx512) {
        return cpu_engine_avx512(threads, bf16_dot, err);
    }
    if (level >= 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        return cpu_engine_avx2(threads, bf16_dot, err);
    }
#endif
    return cpu_engine_any(threads, bf16_dot, err);
}

/* ------------------------------------------------------------------------------------------------ weights */

typedef struct {
    Model *model;
    const char *prefix; /* "model." or a wrapper's */
    bool *used;         /* [tensors in the files] */
    Err *err;
    bool made;          /* there are no files: a tensor gets a place in `memory`, bf16; NULL: places are only counted */
    uint16_t *memory;
    size_t numbers;     /* given away */
} Loader;

/* The text model's tensors stand under one of these. */
static const char *const prefixes[] = {"model.", "language_model.model.", "model.language_model.", ""};

static int find_prefix(Loader *l) {
    for (size_t i = 0; i < sizeof prefixes / sizeof *prefixes; i++) {
        char *name = xprintf("%sembed_tokens.weight", prefixes[i]);
        bool found = safetensors_find(&l->model->files, name) != NULL;
        free(name);
        if (found && l->prefix) {
            return fail(l->err, "%s: holds two text models, under '%s' and under '%s'", l->model->dir, l->prefix, prefixes[i]);
        }
        l->prefix = found ? prefixes[i] : l->prefix;
    }
    if (!l->prefix) {
        return fail(l->err, "%s: no tensor model.embed_tokens.weight (nor under the prefix of a known wrapper)", l->model->dir);
    }
    return 0;
}

static int make_tensor(Loader *l, Tensor *out, int rows, int cols) {
    size_t n = (size_t)rows * (size_t)(cols ? cols : 1);
    *out = (Tensor){.dtype = DT_BF16, .n_dims = cols ? 2 : 1, .shape = {rows, cols}, .bytes = n * sizeof(uint16_t),
                    .data = l->memory ? l->memory + l->numbers : NULL};
    l->numbers += (n + 31) / 32 * 32; /* each at the start of a cache line */
    return 0;
}

/* Finds prefix + name and checks it: [rows], or [rows, cols] when cols > 0. */
static int take(Loader *l, Tensor *out, const char *prefix, const char *name, int rows, int cols) {
    if (l->made) {
        return make_tensor(l, out, rows, cols);
    }
    char *full = xprintf("%s%s", prefix, name);
    const Tensor *t = safetensors_find(&l->model->files, full);
    int status = -1;
    if (!t) {
        fail(l->err, "%s: tensor %s is missing", l->model->dir, full);
    } else if (t->dtype != DT_F32 && t->dtype != DT_BF16 && t->dtype != DT_F16) {
        fail(l->err, "%s: tensor %s has dtype %s; weights are F32, BF16 or F16", l->model->dir, full, dtype_name(t->dtype));
    } else if (t->n_dims != (cols ? 2 : 1) || t->shape[0] != rows || (cols && t->shape[1] != cols)) {
        char want[32], have[32 * MAX_DIMS] = "";
        snprintf(want, sizeof want, cols ? "%d x %d" : "%d", rows, cols);
        for (int i = 0; i < t->n_dims; i++) {
            size_t at = strlen(have);
            snprintf(have + at, sizeof have - at, "%s%lld", i ? " x " : "", (long long)t->shape[i]);
        }
        fail(l->err, "%s: tensor %s is [%s], config.json makes it [%s]", l->model->dir, full, have, want);
    } else {
        l->used[t - l->model->files.tensor] = true;
        *out = *t;
        status = 0;
    }
    free(full);
    return status;
}

/* One matrix more on a stack, with its bias when there is one. `name` is without ".weight". */
static int take_linear(Loader *l, Linear *linear, const char *prefix, const char *name, int out, int in, bool bias) {
    char *weight = xprintf("%s.weight", name), *b = xprintf("%s.bias", name);
    int status = take(l, &linear->w[linear->n], prefix, weight, out, in);
    if (status == 0 && bias) {
        status = take(l, &linear->b[linear->n], prefix, b, out, 0);
    }
    free(weight);
    free(b);
    linear->n++;
    linear->in = in;
    linear->out += out;
    return status;
}

static int load_block(Loader *l, int layer) {
    const Config *c = &l->model->config;
    Block *b = &l->model->block[layer];
    int D = c->hidden_size, E = c->head_dim, Q = c->n_heads * E, KV = c->n_kv_heads * E, F = c->ff_size;
    char *prefix = xprintf("%slayers.%d.", l->prefix, layer);
    bool bad = take(l, &b->attn_in_norm, prefix, "input_layernorm.weight", D, 0) != 0 ||
               take_linear(l, &b->qkv, prefix, "self_attn.q_proj", Q, D, c->qkv_bias) != 0 ||
               take_linear(l, &b->qkv, prefix, "self_attn.k_proj", KV, D, c->qkv_bias) != 0 ||
               take_linear(l, &b->qkv, prefix, "self_attn.v_proj", KV, D, c->qkv_bias) != 0 ||
               take_linear(l, &b->o, prefix, "self_attn.o_proj", D, Q, c->o_bias) != 0 ||
               take_linear(l, &b->gate_up, prefix, "mlp.gate_proj", F, D, c->mlp_bias) != 0 ||
               take_linear(l, &b->gate_up, prefix, "mlp.up_proj", F, D, c->mlp_bias) != 0 ||
               take_linear(l, &b->down, prefix, "mlp.down_proj", D, F, c->mlp_bias) != 0;
    if (!bad && c->qk_norm) {
        bad = take(l, &b->q_norm, prefix, "self_attn.q_norm.weight", E, 0) != 0 ||
              take(l, &b->k_norm, prefix, "self_attn.k_norm.weight", E, 0) != 0;
    }
    if (!bad && c->post_norms) {
        bad = take(l, &b->attn_out_norm, prefix, "post_attention_layernorm.weight", D, 0) != 0 ||
              take(l, &b->mlp_in_norm, prefix, "pre_feedforward_layernorm.weight", D, 0) != 0 ||
              take(l, &b->mlp_out_norm, prefix, "post_feedforward_layernorm.weight", D, 0) != 0;
    } else if (!bad) {
        bad = take(l, &b->mlp_in_norm, prefix, "post_attention_layernorm.weight", D, 0) != 0;
    }
    if (l->model->engine) { /* none: only the sizes are wanted */
        b->qkv.format = b->o.format = b->gate_up.format = b->down.format = l->model->engine->weights;
    }
    free(prefix);
    return bad ? -1 : 0;
}

/* The final norm and lm_head are absent from an AR; when lm_head is tied a stored copy is ignored, as in transformers. */
static int load_head(Loader *l) {
    Model *m = l->model;
    const Config *c = &m->config;
    char *norm = xprintf("%snorm.weight", l->prefix);
    bool has_norm = l->made || safetensors_find(&m->files, norm) != NULL;
    free(norm);
    if (has_norm && take(l, &m->final_norm, l->prefix, "norm.weight", c->hidden_size, 0) != 0) {
        return -1;
    }
    if (c->tied) {
        m->lm_head = (Linear){.n = 1, .w = {m->embed}, .in = c->hidden_size, .out = c->vocab_size};
        return 0;
    }
    const char *const heads[] = {"", "language_model."};
    for (int i = 0; i < 2 && has_norm; i++) {
        char *name = xprintf("%slm_head.weight", heads[i]);
        bool found = l->made || safetensors_find(&m->files, name) != NULL;
        free(name);
        if (found) {
            return take_linear(l, &m->lm_head, heads[i], "lm_head", c->vocab_size, c->hidden_size, false);
        }
    }
    return 0;
}

/* A tensor of the text model that nothing asked for means that config.json describes another model (a bias it does not
 * mention, more layers than it counts): the numbers would be silently wrong. */
static int refuse_leftovers(Loader *l) {
    size_t n = strlen(l->prefix);
    for (int i = 0; i < (int)arrlen(l->model->files.tensor); i++) {
        const char *name = l->model->files.tensor[i].name;
        if (l->used[i] || strncmp(name, l->prefix, n) != 0 || strncmp(name + n, "layers.", 7) != 0 ||
            strstr(name, ".rotary_emb.")) {
            continue;
        }
        return fail(l->err, "%s: tensor %s has no place in the %s model of %d layers that config.json describes",
                    l->model->dir, name, l->model->config.model_type, l->model->config.n_layers);
    }
    return 0;
}

/* Random numbers for one tensor: norms about 1 (or 0, where the family adds it), matrices such that a product keeps its input's
 * size. Each number depends on its place alone. */
static void fill_weight(const Tensor *t, const uint16_t *memory, uint64_t seed, bool plus_one) {
    uint16_t *x = (uint16_t *)t->data;
    int64_t n = (int64_t)tensor_elements(t);
    uint64_t from = (uint64_t)(x - memory);
    float middle = t->n_dims == 1 && !plus_one ? 1 : 0, width = t->n_dims == 1 ? 0.1f : sqrtf(3 / (float)t->shape[1]);
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; i++) {
        uint64_t z = (from + (uint64_t)i + 1) * 0x9e3779b97f4a7c15u + seed; /* SplitMix64 */
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
        z = (z ^ z >> 27) * 0x94d049bb133111ebu;
        x[i] = f32_to_bf16(middle + width * ((float)(int32_t)(z >> 32) * 0x1p-31f));
    }
}

/* All tensors that config.json describes, from wherever the loader takes them. */
static int load_tensors(Loader *l, bool head) {
    Model *m = l->model;
    int status = take(l, &m->embed, l->prefix, "embed_tokens.weight", m->config.vocab_size, m->config.hidden_size);
    memset(m->block, 0, (size_t)m->config.n_layers * sizeof(Block));
    for (int i = 0; i < m->config.n_layers && status == 0; i++) {
        status = load_block(l, i);
    }
    return status == 0 && head ? load_head(l) : status;
}

size_t config_weights(const Config *c, bool head) {
    Model m = {.config = *c, .block = xcalloc((size_t)c->n_layers, sizeof(Block))};
    Loader l = {.model = &m, .prefix = "", .made = true};
    load_tensors(&l, head);
    free(m.block);
    return l.numbers * sizeof(uint16_t);
}

int model_make(Model *m, Config *config, const char *dir, bool head, uint64_t seed, Engine *engine, Err *err) {
    size_t bytes = config_weights(config, head);
    *m = (Model){.engine = engine, .config = *config, .dir = xstrdup(dir), .prefix = prefixes[0]};
    *config = (Config){0};
    m->block = xcalloc((size_t)m->config.n_layers, sizeof(Block));
    m->made = aligned_alloc(64, bytes);
    m->made_bytes = bytes;
    Loader l = {.model = m, .prefix = m->prefix, .made = true, .memory = m->made, .err = err};
    if (!m->made) {
        model_free(m);
        return fail(err, "not enough memory for %.2f GB of random weights", (double)bytes / 1e9);
    }
    load_tensors(&l, head);
    Named *list = model_tensors(m);
    for (int i = 0; i < (int)arrlen(list); i++) {
        fill_weight(list[i].tensor, m->made, seed, m->config.norm_plus_one);
    }
    named_free(list);
    return 0;
}

static int load_weights(Model *m, Err *err) {
    if (safetensors_open(&m->files, m->dir, err) != 0) {
        return -1;
    }
    Loader l = {.model = m, .err = err, .used = xcalloc((size_t)arrlen(m->files.tensor) + 1, 1)};
    m->block = xcalloc((size_t)m->config.n_layers, sizeof(Block));
    int status = find_prefix(&l);
    status = status == 0 ? load_tensors(&l, true) : -1;
    status = status == 0 ? refuse_leftovers(&l) : -1;
    m->prefix = l.prefix;
    free(l.used);
    return status;
}

/* A directory that `nla bench --e2e` made says in weights.random which numbers to make instead of reading them from a checkpoint. */
static bool makes_weights(const char *dir, uint64_t *seed, bool *head, int *blocks) {
    char *path = xprintf("%s/weights.random", dir);
    FILE *in = fopen(path, "r");
    unsigned long long number = 0;
    int with_head = 0;
    bool found = in && fscanf(in, "%llu %d %d", &number, &with_head, blocks) == 3;
    if (in) {
        fclose(in);
    }
    free(path);
    *seed = number;
    *head = with_head;
    return found;
}

int model_load(Model *m, const char *dir, Engine *engine, Err *err) {
    uint64_t seed;
    bool head;
    int blocks;
    if (makes_weights(dir, &seed, &head, &blocks)) {
        Config c;
        *m = (Model){0};
        if (config_load(&c, dir, err) != 0) {
            return -1;
        }
        c.n_layers = blocks > 0 && blocks < c.n_layers ? blocks : c.n_layers;
        return model_make(m, &c, dir, head, seed, engine, err);
    }
    *m = (Model){.engine = engine, .dir = xstrdup(dir)};
    if (config_load(&m->config, dir, err) != 0 || load_weights(m, err) != 0) {
        model_free(m);
        return -1;
    }
    return 0;
}

void model_free(Model *m) {
    lora_free(m);
    for (int i = 0; m->engine && i < (int)arrlen(m->files.file); i++) {
        m->engine->forget(m->engine, m->files.file[i].data, m->files.file[i].len);
    }
    if (m->engine && m->made) {
        m->engine->forget(m->engine, m->made, m->made_bytes);
    }
    free(m->made);
    free(m->block);
    free(m->dir);
    safetensors_close(&m->files);
    config_free(&m->config);
    *m = (Model){0};
}

static size_t linear_elements(const Linear *w) {
    size_t n = 0;
    for (int i = 0; i < w->n; i++) {
        n += tensor_elements(&w->w[i]) + tensor_elements(&w->b[i]);
    }
    return n;
}

size_t model_parameters(const Model *m) {
    size_t n = tensor_elements(&m->embed) + tensor_elements(&m->final_norm) + (m->config.tied ? 0 : linear_elements(&m->lm_head));
    for (int i = 0; i < m->config.n_layers; i++) {
        const Block *b = &m->block[i];
        n += linear_elements(&b->qkv) + linear_elements(&b->o) + linear_elements(&b->gate_up) + linear_elements(&b->down);
        n += tensor_elements(&b->attn_in_norm) + tensor_elements(&b->attn_out_norm) + tensor_elements(&b->mlp_in_norm) +
             tensor_elements(&b->mlp_out_norm) + tensor_elements(&b->q_norm) + tensor_elements(&b->k_norm);
    }
    return n;
}

/* Biases stand between the matrices of a stack where it trains, so that it is copied even when its format would do. */
static size_t stack_copies(Engine *e, const Linear *w, DType base, DType adapters) {
    bool biases = w->n > 1 && w->b[0].data;
    size_t bytes = w->n ? e->copy_bytes(e, w->w, w->n, biases ? DT_OTHER : base, false) + e->copy_bytes(e, w->b, w->n, w->n > 1 ? DT_OTHER : base, false) : 0;
    if (w->lora) {
        bytes += e->copy_bytes(e, w->lora->down.w, w->lora->down.n, w->lora->down.n > 1 ? DT_OTHER : adapters, false);
        for (int i = 0; i < w->n; i++) {
            bytes += e->copy_bytes(e, &w->lora->up[i], 1, adapters, false);
        }
    }
    return bytes;
}

size_t model_copies(const Model *m, const Linear *head, DType masters) {
    Engine *e = m->engine;
    DType base = m->lora.rank ? DT_OTHER : masters; /* with adapters it is they that train */
    size_t bytes = e->copy_bytes(e, &m->embed, 1, base, false) + e->copy_bytes(e, &m->final_norm, 1, base, true);
    if (m->lm_head.n && !m->config.tied) {
        bytes += e->copy_bytes(e, m->lm_head.w, 1, base, false);
    }
    bytes += head ? e->copy_bytes(e, head->w, 1, masters, false) : 0;
    for (int i = 0; i < m->config.n_layers; i++) {
        const Block *b = &m->block[i];
        const Tensor *const norm[] = {&b->attn_in_norm, &b->attn_out_norm, &b->mlp_in_norm, &b->mlp_out_norm, &b->q_norm, &b->k_norm};
        const Linear *const stack[] = {&b->qkv, &b->o, &b->gate_up, &b->down};
        for (int j = 0; j < 6; j++) {
            bytes += e->copy_bytes(e, norm[j], 1, base, true);
        }
        for (int j = 0; j < 4; j++) {
            bytes += stack_copies(e, stack[j], base, masters);
        }
    }
    return bytes;
}

size_t model_bytes(const Model *m, DType act, WeightFormat format) {
    size_t matrices = 0, rows = 0, biases = 0, one = dtype_size(act);
    size_t tables = tensor_elements(&m->embed) + (m->config.tied ? 0 : linear_elements(&m->lm_head));
    for (int i = 0; i < m->config.n_layers; i++) {
        const Block *b = &m->block[i];
        const Linear *const stack[] = {&b->qkv, &b->o, &b->gate_up, &b->down};
        for (int j = 0; j < 4; j++) {
            size_t n = (size_t)stack[j]->in * (size_t)stack[j]->out;
            matrices += n;
            rows += (size_t)stack[j]->out;
            biases += linear_elements(stack[j]) - n;
        }
    }
    size_t norms = model_parameters(m) - matrices - tables - biases;
    return (tables + biases) * one + norms * sizeof(float) + (format == WEIGHTS_AS_STORED ? matrices * one : matrices + rows * sizeof(float));
}

/* ------------------------------------------------------------------------------------------------ tensors by name */

static const char *const module_names[] = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                                           "mlp.gate_proj",    "mlp.up_proj",      "mlp.down_proj"};

Linear *block_linear(Block *b, int module, int *place) {
    Linear *const stack[] = {&b->qkv, &b->qkv, &b->qkv, &b->o, &b->gate_up, &b->gate_up, &b->down};
    static const int places[] = {0, 1, 2, 0, 0, 1, 0};
    *place = places[module];
    return stack[module];
}

const char *module_name(int module) {
    return module_names[module];
}

static void put_name(Named **list, Tensor *t, char *name) {
    if (t->data) {
        arrput(*list, ((Named){name, t}));
    } else {
        free(name);
    }
}

static void block_tensors(Model *m, int layer, Named **list) {
    Block *b = &m->block[layer];
    char *prefix = xprintf("%slayers.%d.", m->prefix, layer);
    bool post = m->config.post_norms;
    for (int i = 0; i < MODULES; i++) {
        int at;
        Linear *w = block_linear(b, i, &at);
        put_name(list, &w->w[at], xprintf("%s%s.weight", prefix, module_names[i]));
        put_name(list, &w->b[at], xprintf("%s%s.bias", prefix, module_names[i]));
    }
    put_name(list, &b->attn_in_norm, xprintf("%sinput_layernorm.weight", prefix));
    put_name(list, &b->attn_out_norm, xprintf("%spost_attention_layernorm.weight", prefix));
    put_name(list, &b->mlp_in_norm, xprintf("%s%s.weight", prefix, post ? "pre_feedforward_layernorm" : "post_attention_layernorm"));
    put_name(list, &b->mlp_out_norm, xprintf("%spost_feedforward_layernorm.weight", prefix));
    put_name(list, &b->q_norm, xprintf("%sself_attn.q_norm.weight", prefix));
    put_name(list, &b->k_norm, xprintf("%sself_attn.k_norm.weight", prefix));
    free(prefix);
}

Named *model_tensors(Model *m) {
    Named *list = NULL;
    put_name(&list, &m->embed, xprintf("%sembed_tokens.weight", m->prefix));
    for (int i = 0; i < m->config.n_layers; i++) {
        block_tensors(m, i, &list);
    }
    put_name(&list, &m->final_norm, xprintf("%snorm.weight", m->prefix));
    if (!m->config.tied && m->lm_head.n) {
        bool wrapped = strcmp(m->prefix, "language_model.model.") == 0; /* the head stands beside the inner model */
        put_name(&list, &m->lm_head.w[0], xstrdup(wrapped ? "language_model.lm_head.weight" : "lm_head.weight"));
    }
    return list;
}

Tensor *lora_down(const Linear *w, int place) {
    int at = 0;
    if (!w->lora || !w->lora->up[place].data) {
        return NULL;
    }
    for (int i = 0; i < place; i++) {
        at += w->lora->up[i].data != NULL;
    }
    return &w->lora->down.w[at];
}

Named *lora_tensors(Model *m) {
    Named *list = NULL;
    /* PEFT names a module by its path in the class of transformers, where a wrapper's text model is model.language_model. */
    const char *path = strcmp(m->prefix, "model.") == 0 || !*m->prefix ? "model." : "model.language_model.";
    for (int layer = 0; layer < m->config.n_layers; layer++) {
        for (int i = 0; i < MODULES; i++) {
            int at;
            Linear *w = block_linear(&m->block[layer], i, &at);
            Tensor *down = lora_down(w, at);
            if (!down) {
                continue;
            }
            const char *root = "base_model.model.";
            put_name(&list, down, xprintf("%s%slayers.%d.%s.lora_A.weight", root, path, layer, module_names[i]));
            put_name(&list, &w->lora->up[at], xprintf("%s%slayers.%d.%s.lora_B.weight", root, path, layer, module_names[i]));
        }
    }
    return list;
}

void named_free(Named *list) {
    for (int i = 0; i < (int)arrlen(list); i++) {
        free(list[i].name);
    }
    arrfree(list);
}

/* ------------------------------------------------------------------------------------------------ RoPE tables */

/* inv_freq[i] = theta^(-2i/E), scaled. In fp32 where transformers works in fp32. Source: modeling_rope_utils.py */
static float rope_frequency(const Rope *rope, int i, int E) {
    float f = 1.0f / (float)pow(rope->theta, (double)((float)(2 * i) / (float)E));
    if (rope->llama3) {
        double length = 2 * 3.14159265358979323846 / (double)f;
        double low = rope->original_max_positions / rope->low_freq_factor;
        double high = rope->original_max_positions / rope->high_freq_factor;
        if (length > low) {
            return f / (float)rope->factor;
        }
        if (length >= high) {
            float smooth = (float)((rope->original_max_positions / length - rope->low_freq_factor) /
                                   (rope->high_freq_factor - rope->low_freq_factor));
            return (1 - smooth) * (f / (float)rope->factor) + smooth * f;
        }
        return f;
    }
    return f / (float)rope->linear_factor;
}

static void fill_rope(const Rope *rope, float *cosines, float *sines, int positions, int E) {
    int half = E / 2;
    for (int i = 0; i < half; i++) {
        float f = rope_frequency(rope, i, E);
        for (int p = 0; p < positions; p++) {
            float angle = f * (float)p;
            cosines[(size_t)p * (size_t)half + (size_t)i] = (float)cos((double)angle);
            sines[(size_t)p * (size_t)half + (size_t)i] = (float)sin((double)angle);
        }
    }
}

/* ------------------------------------------------------------------------------------------------ the forest */

/* Every buffer of a forest is asked for here, so that what is planned is what is allocated: without an engine, bytes are
 * counted and nothing is made. */
typedef struct {
    Forest *forest;
    Engine *engine;
    DType act;
    size_t bytes;
    bool failed;
} Buffers;

static void want_as(Buffers *b, DType dtype, Act **place, size_t count) {
    b->bytes += count * dtype_size(dtype);
    if (b->engine && !b->failed) {
        *place = b->engine->alloc(b->engine, dtype, count);
        b->failed = !*place;
        arrput(b->forest->memory, *place);
    }
}

static void want(Buffers *b, Act **place, size_t count) {
    want_as(b, b->act, place, count);
}

/* What a block keeps for the way back. When it is recomputed all blocks share one set but for the stream. */
static void want_kept(Buffers *b, const Config *c, bool recompute) {
    Forest *f = b->forest;
    size_t E = (size_t)c->head_dim, N = (size_t)f->max_rows, D = (size_t)c->hidden_size, F = (size_t)c->ff_size;
    size_t Q = (size_t)c->n_heads * E, KV = (size_t)c->n_kv_heads * E;
    for (int i = 0; i <= f->blocks; i++) {
        Kept *k = &f->kept[i];
        want(b, &k->in, N * D);
        if (i == f->blocks) {
            break;
        }
        if (recompute && i > 0) {
            Act *in = k->in;
            *k = f->kept[0];
            k->in = in;
            continue;
        }
        want(b, &k->qkv, N * (Q + 2 * KV));
        want(b, &k->att, N * Q);
        want_as(b, DT_F32, &k->lse, N * (size_t)c->n_heads);
        want(b, &k->mid, N * D);
        want(b, &k->gate_up, N * 2 * F);
        k->attn_out = k->mlp_out = f->proj;
        if (c->post_norms) {
            want(b, &k->attn_out, N * D);
            want(b, &k->mlp_out, N * D);
        }
    }
    want(b, &f->dx, N * D);
    want(b, &f->dxn, N * D);
    want(b, &f->dproj, N * D);
    want(b, &f->dgated, N * F);
    want(b, &f->dgate_up, N * 2 * F);
    want(b, &f->dqkv, N * (Q + 2 * KV));
    want(b, &f->dq, N * Q);
    want(b, &f->datt, N * Q);
    want(b, &f->dk, N * KV);
    want(b, &f->dv, N * KV);
}

/* The widest low-rank product of the model's adapters; 0 without any. */
static size_t lora_width(const Model *m) {
    int width = 0;
    for (int i = 0; m && i < m->config.n_layers; i++) {
        const Linear *const stack[] = {&m->block[i].qkv, &m->block[i].o, &m->block[i].gate_up, &m->block[i].down};
        for (int j = 0; j < 4; j++) {
            width = stack[j]->lora && stack[j]->lora->down.out > width ? stack[j]->lora->down.out : width;
        }
    }
    return (size_t)width;
}

static void want_all(Buffers *b, const Config *c, Passes passes) {
    Forest *f = b->forest;
    size_t E = (size_t)c->head_dim, N = (size_t)f->max_rows, D = (size_t)c->hidden_size, F = (size_t)c->ff_size;
    size_t Q = (size_t)c->n_heads * E, KV = (size_t)c->n_kv_heads * E, rows = (size_t)f->cache_rows, low = lora_width(f->model);
    for (int i = 0; i < f->blocks; i++) {
        want(b, &f->k[i], rows * KV);
        want(b, &f->v[i], rows * KV);
    }
    want(b, &f->xn, N * D);
    want(b, &f->q, N * Q);
    want(b, &f->proj, N * D);
    want(b, &f->gated, N * F);
    want_as(b, DT_F32, &f->logits, (size_t)(f->max_rows < LOGIT_ROWS ? f->max_rows : LOGIT_ROWS) * (size_t)c->vocab_size);
    if (low) {
        want(b, &f->low, N * low);
    }
    if (passes == FORWARD) { /* every block writes over the one before */
        want(b, &f->x, N * D);
        want(b, &f->qkv, N * (Q + 2 * KV));
        want(b, &f->att, N * Q);
        want(b, &f->gate_up, N * 2 * F);
    } else {
        want_kept(b, c, passes == TRAINING_RECOMPUTED);
        if (low) {
            want(b, &f->dlow, N * low);
        }
    }
    for (int i = 0; i < 2; i++) {
        want_as(b, DT_F32, &f->cos[i], rows * (E / 2));
        want_as(b, DT_F32, &f->sin[i], rows * (E / 2));
    }
    b->bytes += 2 * N * sizeof(int); /* places of the rows */
}

/* What forest_add can use of cache_rows is rounded to whole key blocks. */
static int whole_blocks(int rows) {
    return (rows + CACHE_ALIGN - 1) / CACHE_ALIGN * CACHE_ALIGN;
}

static size_t forest_buffers(Forest *f, const Config *c, Engine *e, DType act, Passes passes, bool *failed) {
    f->k = xcalloc((size_t)f->blocks + 1, sizeof(Act *));
    f->v = xcalloc((size_t)f->blocks + 1, sizeof(Act *));
    f->kept = passes == FORWARD ? NULL : xcalloc((size_t)f->blocks + 1, sizeof(Kept));
    Buffers b = {.forest = f, .engine = e, .act = act};
    want_all(&b, c, passes);
    *failed = b.failed;
    return b.bytes;
}

size_t forest_bytes(const Model *m, int blocks, int cache_rows, int max_rows, Passes passes) {
    Forest f = {.model = (Model *)m, .blocks = blocks, .cache_rows = whole_blocks(cache_rows), .max_rows = max_rows};
    bool failed;
    size_t bytes = forest_buffers(&f, &m->config, NULL, m->engine->act_dtype, passes, &failed);
    free(f.k);
    free(f.v);
    free(f.kept);
    return bytes;
}

int forest_open(Forest *f, Model *model, int blocks, int cache_rows, int max_rows, Passes passes, Err *err) {
    const Config *c = &model->config;
    cache_rows = whole_blocks(cache_rows);
    *f = (Forest){.model = model, .blocks = blocks, .cache_rows = cache_rows, .max_rows = max_rows, .n_positions = cache_rows};
    bool failed;
    f->bytes = forest_buffers(f, c, model->engine, model->engine->act_dtype, passes, &failed);
    if (failed) {
        fail(err, "not enough memory: %.2f GB for %d cached and %d computed tokens; ask for fewer rows or shorter texts",
             (double)f->bytes / 1e9, cache_rows, max_rows);
        forest_close(f);
        return -1;
    }
    size_t table = (size_t)cache_rows * (size_t)(c->head_dim / 2);
    float *cosines = xmalloc(2 * table * sizeof(float)), *sines = cosines + table;
    for (int i = 0; i < 2; i++) {
        fill_rope(&c->rope[i], cosines, sines, cache_rows, c->head_dim);
        model->engine->write(model->engine, f->cos[i], 0, cosines, table);
        model->engine->write(model->engine, f->sin[i], 0, sines, table);
    }
    free(cosines);
    f->position = xmalloc((size_t)max_rows * sizeof(int));
    f->cache_row = xmalloc((size_t)max_rows * sizeof(int));
    return 0;
}

void forest_close(Forest *f) {
    if (!f->model) {
        return;
    }
    Engine *e = f->model->engine;
    for (int i = 0; i < (int)arrlen(f->memory); i++) {
        e->free(e, f->memory[i]);
    }
    arrfree(f->memory);
    free(f->k);
    free(f->v);
    free(f->kept);
    free(f->position);
    free(f->cache_row);
    arrfree(f->segment);
    *f = (Forest){0};
}

void forest_cut(Forest *f, int segments) {
    if (segments < (int)arrlen(f->segment)) {
        f->used = f->segment[segments].row;
        arrsetlen(f->segment, segments);
    }
}

int forest_add(Forest *f, int parent, int cap, Err *err) {
    Segment s = {.parent = parent, .row = f->used, .cap = cap};
    int depth = 1;
    for (int p = parent; p >= 0; p = f->segment[p].parent) {
        s.position += f->segment[p].len;
        depth++;
    }
    if (cap < 1 || whole_blocks(cap) > f->cache_rows - f->used) {
        return fail(err, "the key/value cache of %d tokens is full: %d are in use and %d more were asked for", f->cache_rows,
                    f->used, cap);
    }
    if (depth > MAX_DEPTH) {
        return fail(err, "a segment has more than %d ancestors", MAX_DEPTH - 1);
    }
    f->used += whole_blocks(cap);
    arrput(f->segment, s);
    return (int)arrlen(f->segment) - 1;
}

/* ------------------------------------------------------------------------------------------------ the batch */

void batch_clear(Batch *b) {
    arrsetlen(b->token, 0);
    arrsetlen(b->run, 0);
    arrsetlen(b->out_row, 0);
    arrsetlen(b->inject, 0);
}

void batch_free(Batch *b) {
    arrfree(b->token);
    arrfree(b->run);
    arrfree(b->out_row);
    arrfree(b->inject);
}

void batch_inject(Batch *b, int row, const float *vector) {
    arraddnptr(b->inject, 1);
    arrlast(b->inject).row = row;
    arrlast(b->inject).vector = vector;
}

void batch_add(Batch *b, const Forest *f, int seg, const int *token, int n, int want_logits) {
    int row = (int)arrlen(b->token), first = f->segment[seg].len;
    for (int r = 0; r < (int)arrlen(b->run); r++) { /* tokens of this segment that this batch already holds */
        first += b->run[r].seg == seg ? b->run[r].n : 0;
    }
    arrput(b->run, ((Run){.seg = seg, .row = row, .n = n, .first = first}));
    for (int i = 0; i < n; i++) {
        arrput(b->token, token[i]);
        if (want_logits == 2 || (want_logits == 1 && i == n - 1)) {
            arrput(b->out_row, row + i);
        }
    }
}

/* ------------------------------------------------------------------------------------------------ the forward pass */

static int check_batch(const Forest *f, const Batch *b, const LogitSink *logits, Err *err) {
    const Model *m = f->model;
    int N = (int)arrlen(b->token);
    if (N > f->max_rows) {
        return fail(err, "a batch of %d tokens does not fit into working memory for %d", N, f->max_rows);
    }
    for (int i = 0; i < N; i++) {
        if (b->token[i] < 0 || b->token[i] >= m->config.vocab_size) {
            return fail(err, "%s: token id %d is outside the vocabulary of %d (does the tokenizer belong to this model?)",
                        m->dir, b->token[i], m->config.vocab_size);
        }
    }
    for (int r = 0; r < (int)arrlen(b->run); r++) {
        const Segment *s = &f->segment[b->run[r].seg];
        if (f->kept && b->run[r].first > 0) {
            return fail(err, "segment %d: training takes whole segments, not one that goes on in another batch", b->run[r].seg);
        }
        if (b->run[r].first + b->run[r].n > s->cap) {
            return fail(err, "segment %d has room for %d tokens, %d were given", b->run[r].seg, s->cap,
                        b->run[r].first + b->run[r].n);
        }
    }
    if (logits && (m->lm_head.n == 0 || !m->final_norm.data)) {
        return fail(err, "%s: has no %s, so it gives no logits (an AR has none)", m->dir,
                    m->final_norm.data ? "lm_head.weight" : "final norm");
    }
    return 0;
}

/* Appends the tokens to their segments and works out each row's position and place in the cache. A child's position was
 * fixed when it was added; it is taken anew here, as its parent may stand in the same batch. */
static void place_rows(Forest *f, const Batch *b) {
    for (int r = 0; r < (int)arrlen(b->run); r++) {
        const Run *run = &b->run[r];
        Segment *s = &f->segment[run->seg];
        if (s->parent >= 0) {
            s->position = f->segment[s->parent].position + f->segment[s->parent].len;
        }
        for (int i = 0; i < run->n; i++) {
            f->position[run->row + i] = s->position + run->first + i;
            f->cache_row[run->row + i] = s->row + run->first + i;
        }
        s->len = run->first + run->n;
    }
}

static void seen(const Tap *tap, Engine *e, const char *module, int layer, const Act *data, int first, int rows, int width) {
    if (tap && tap->seen) {
        tap->seen(tap->context, e, module, layer, data, first, rows, width);
    }
}

/* Where block `layer` writes: its own memory when there is a way back, one place for all blocks when there is none. */
static Kept kept(const Forest *f, int layer) {
    return f->kept ? f->kept[layer]
                   : (Kept){.in = f->x, .qkv = f->qkv, .att = f->att, .attn_out = f->proj, .mid = f->x, .gate_up = f->gate_up,
                            .mlp_out = f->proj};
}

static Act *stream_after(const Forest *f, int layer) {
    return f->kept ? f->kept[layer + 1].in : f->x;
}

/* out = x W^T + b, and what the adapters add. */
static void linear(const Forest *f, Act *out, const Act *x, const Linear *w, int N) {
    Engine *e = f->model->engine;
    e->linear(e, out, x, w, N);
    if (w->lora) {
        e->linear(e, f->low, x, &w->lora->down, N);
        e->lora_up(e, out, f->low, w, N);
    }
}

static void rope_qkv(const Forest *f, const Kept *k, int layer, int N) {
    const Config *c = &f->model->config;
    const Block *w = &f->model->block[layer];
    Engine *e = f->model->engine;
    int rope = c->layer[layer].rope;
    e->rope_qkv(e, f->q, f->k[layer], f->v[layer], k->qkv, c->qk_norm ? &w->q_norm : NULL, c->qk_norm ? &w->k_norm : NULL,
                c->rms_norm_eps, c->norm_plus_one, f->cos[rope], f->sin[rope], f->position, f->cache_row, N, c->n_heads,
                c->n_kv_heads, c->head_dim);
}

/* mid = in + attention(norm(in)); out = mid + mlp(norm(mid)). Gemma norms both results once more before adding them. A block that
 * follows another finds norm(in) in f->xn: adding and the norm behind it are one op. */
static void forward_block(Forest *f, const Batch *b, int layer, bool follows, const Tap *tap) {
    const Model *m = f->model;
    const Config *c = &m->config;
    const Block *w = &m->block[layer];
    const Kept k = kept(f, layer);
    Engine *e = m->engine;
    int N = (int)arrlen(b->token), D = c->hidden_size, one = c->norm_plus_one;
    size_t count = (size_t)N * (size_t)D;
    float eps = c->rms_norm_eps;
    Act *out = stream_after(f, layer);

    if (!follows) {
        e->rmsnorm(e, f->xn, k.in, &w->attn_in_norm, N, D, eps, one);
    }
    linear(f, k.qkv, f->xn, &w->qkv, N);
    rope_qkv(f, &k, layer, N);
    e->attention(e, k.att, k.lse, f->q, f->k[layer], f->v[layer], f->segment, b->run, (int)arrlen(b->run), c->n_heads, c->n_kv_heads,
                 c->head_dim, c->attn_scale, c->layer[layer].window);
    linear(f, k.attn_out, k.att, &w->o, N);
    seen(tap, e, "self_attn", layer, k.attn_out, 0, N, D);
    if (c->post_norms) {
        e->rmsnorm(e, f->proj, k.attn_out, &w->attn_out_norm, N, D, eps, one);
    }
    e->add_rmsnorm(e, k.mid, f->xn, k.in, f->proj, &w->mlp_in_norm, N, D, eps, one);
    linear(f, k.gate_up, f->xn, &w->gate_up, N);
    e->gated(e, f->gated, k.gate_up, N, c->ff_size, c->gelu);
    linear(f, k.mlp_out, f->gated, &w->down, N);
    seen(tap, e, "mlp", layer, k.mlp_out, 0, N, D);
    if (c->post_norms) {
        e->rmsnorm(e, f->proj, k.mlp_out, &w->mlp_out_norm, N, D, eps, one);
    }
    if (layer + 1 < f->blocks) {
        e->add_rmsnorm(e, out, f->xn, k.mid, f->proj, &m->block[layer + 1].attn_in_norm, N, D, eps, one);
    } else {
        e->add(e, out, k.mid, f->proj, count);
    }
    seen(tap, e, "", layer, out, 0, N, D);
}

/* Final norm and lm_head of the wanted rows, LOGIT_ROWS at a time. */
static void forward_logits(Forest *f, const Batch *b, const LogitSink *logits, const Tap *tap) {
    const Model *m = f->model;
    const Config *c = &m->config;
    Engine *e = m->engine;
    int D = c->hidden_size, wanted = (int)arrlen(b->out_row);
    const Act *x = stream_after(f, f->blocks - 1);
    for (int first = 0; first < wanted; first += LOGIT_ROWS) {
        int n = wanted - first < LOGIT_ROWS ? wanted - first : LOGIT_ROWS;
        e->gather(e, f->xn, x, b->out_row + first, n, D);
        e->rmsnorm(e, f->xn, f->xn, &m->final_norm, n, D, c->rms_norm_eps, c->norm_plus_one);
        seen(tap, e, "model.norm", -1, f->xn, first, n, D);
        e->linear(e, f->logits, f->xn, &m->lm_head, n);
        seen(tap, e, "lm_head", -1, f->logits, first, n, c->vocab_size);
        logits->rows(logits->context, e, f->logits, first, n);
    }
}

/* What two steps of decoding have in common when they differ only in tokens, positions and the lengths of the rows' own segments
 * (stb): where everything stands, and the forest. */
static int64_t *step_shape(const Forest *f, const Batch *b) {
    const void *const places[] = {f->model, f->x, f->segment, f->position, f->cache_row, b->token, b->run};
    int64_t *shape = NULL;
    for (int i = 0; i < 7; i++) {
        arrput(shape, (int64_t)(intptr_t)places[i]);
    }
    size_t from = arrlenu(shape);
    for (int i = 0; i < (int)arrlen(f->segment); i++) {
        const Segment *s = &f->segment[i];
        arrput(shape, s->parent);
        arrput(shape, s->row);
        arrput(shape, s->len);
    }
    for (int r = 0; r < (int)arrlen(b->run); r++) {
        shape[from + 3 * (size_t)b->run[r].seg + 2] = -1; /* its length grows */
        arrput(shape, b->run[r].seg);
        arrput(shape, b->run[r].row);
    }
    return shape;
}

/* Whether the engine has done the whole step. Only steps of decoding are repeated: a token a row, nothing looked at on the way. */
static bool begin_step(const Forest *f, const Batch *b, const Tap *tap) {
    Engine *e = f->model->engine;
    bool step = e->begin_step && !tap && !f->kept && arrlen(b->inject) == 0 && arrlen(b->run) == arrlen(b->token);
    if (!step) {
        return false;
    }
    int64_t *shape = step_shape(f, b);
    bool done = e->begin_step(e, shape, arrlenu(shape) * sizeof(int64_t));
    arrfree(shape);
    return done;
}

static void forward_blocks(Forest *f, const Batch *b, const Tap *tap) {
    const Model *m = f->model;
    Engine *e = m->engine;
    int N = (int)arrlen(b->token), D = m->config.hidden_size;
    Act *x = kept(f, 0).in;
    e->embed(e, x, &m->embed, b->token, N, D, m->config.embed_scale);
    for (int i = 0; i < (int)arrlen(b->inject); i++) {
        e->write(e, x, (size_t)b->inject[i].row * (size_t)D, b->inject[i].vector, (size_t)D);
    }
    seen(tap, e, "model.embed_tokens", -1, x, 0, N, D);
    for (int layer = 0; layer < f->blocks; layer++) {
        forward_block(f, b, layer, layer > 0, tap);
    }
}

int model_forward(Forest *f, const Batch *b, const LogitSink *logits, const Tap *tap, Err *err) {
    Engine *e = f->model->engine;
    if (check_batch(f, b, logits, err) != 0) {
        return -1;
    }
    place_rows(f, b);
    if (!begin_step(f, b, tap)) {
        forward_blocks(f, b, tap);
        if (e->end_step) {
            e->end_step(e);
        }
    }
    if (logits) {
        forward_logits(f, b, logits, tap);
    }
    return e->check(e, err);
}

/* ------------------------------------------------------------------------------------------------ the way back */

/* dw += dy^T x; dx (+)= dy W; and the same of the adapters. */
static void linear_backward(const Forest *f, Act *dx, const Act *dy, const Act *x, const Linear *w, const Linear *dw, int N) {
    Engine *e = f->model->engine;
    e->linear_weight_backward(e, dw, dy, x, N);
    e->linear_backward(e, dx, dy, w, N, false);
    if (w->lora) {
        e->linear(e, f->low, x, &w->lora->down, N);
        e->lora_up_backward(e, f->dlow, dw->lora, dy, f->low, w, N);
        e->linear_weight_backward(e, &dw->lora->down, f->dlow, x, N);
        e->linear_backward(e, dx, f->dlow, &w->lora->down, N, true);
    }
}

/* forward_block from its last line to its first. f->dx is the gradient of its output, then of its input. What is cheap to
 * compute again (norms, the gate, the rotation) was not kept. */
static void backward_block(Forest *f, const Batch *b, int layer, const Model *grad) {
    const Model *m = f->model;
    const Config *c = &m->config;
    const Block *w = &m->block[layer], *dw = &grad->block[layer];
    const Kept k = kept(f, layer);
    Engine *e = m->engine;
    int N = (int)arrlen(b->token), D = c->hidden_size, H = c->n_heads, G = c->n_kv_heads, E = c->head_dim, one = c->norm_plus_one;
    int rope = c->layer[layer].rope;
    float eps = c->rms_norm_eps;
    const Act *dproj = f->dx;

    if (c->post_norms) {
        e->rmsnorm_backward(e, f->dproj, &dw->mlp_out_norm, f->dx, k.mlp_out, &w->mlp_out_norm, N, D, eps, one, false);
        dproj = f->dproj;
    }
    e->gated(e, f->gated, k.gate_up, N, c->ff_size, c->gelu);
    linear_backward(f, f->dgated, dproj, f->gated, &w->down, &dw->down, N);
    e->gated_backward(e, f->dgate_up, f->dgated, k.gate_up, N, c->ff_size, c->gelu);
    e->rmsnorm(e, f->xn, k.mid, &w->mlp_in_norm, N, D, eps, one);
    linear_backward(f, f->dxn, f->dgate_up, f->xn, &w->gate_up, &dw->gate_up, N);
    e->rmsnorm_backward(e, f->dx, &dw->mlp_in_norm, f->dxn, k.mid, &w->mlp_in_norm, N, D, eps, one, true);

    if (c->post_norms) {
        e->rmsnorm_backward(e, f->dproj, &dw->attn_out_norm, f->dx, k.attn_out, &w->attn_out_norm, N, D, eps, one, false);
    }
    linear_backward(f, f->datt, dproj, k.att, &w->o, &dw->o, N);
    rope_qkv(f, &k, layer, N);
    e->attention_backward(e, f->dq, f->dk, f->dv, f->datt, k.att, k.lse, f->q, f->k[layer], f->v[layer], f->segment, b->run,
                          (int)arrlen(b->run), H, G, E, c->attn_scale, c->layer[layer].window);
    e->rope_qkv_backward(e, f->dqkv, &dw->q_norm, &dw->k_norm, f->dq, f->dk, f->dv, k.qkv, c->qk_norm ? &w->q_norm : NULL,
                         c->qk_norm ? &w->k_norm : NULL, eps, one, f->cos[rope], f->sin[rope], f->position, N, H, G, E);
    e->rmsnorm(e, f->xn, k.in, &w->attn_in_norm, N, D, eps, one);
    linear_backward(f, f->dxn, f->dqkv, f->xn, &w->qkv, &dw->qkv, N);
    e->rmsnorm_backward(e, f->dx, &dw->attn_in_norm, f->dxn, k.in, &w->attn_in_norm, N, D, eps, one, true);
}

void model_token_loss(Forest *f, const Batch *b, const int *target, const TokenLoss *loss, const Model *grad) {
    const Model *m = f->model;
    const Config *c = &m->config;
    Engine *e = m->engine;
    int N = (int)arrlen(b->token), D = c->hidden_size, wanted = (int)arrlen(b->out_row);
    float logp[LOGIT_ROWS], dlogp[LOGIT_ROWS];
    e->zero(e, f->dx, (size_t)N * (size_t)D * dtype_size(e->act_dtype));
    for (int first = 0; first < wanted; first += LOGIT_ROWS) {
        int n = wanted - first < LOGIT_ROWS ? wanted - first : LOGIT_ROWS;
        e->gather(e, f->proj, stream_after(f, f->blocks - 1), b->out_row + first, n, D);
        e->rmsnorm(e, f->xn, f->proj, &m->final_norm, n, D, c->rms_norm_eps, c->norm_plus_one);
        e->linear(e, f->logits, f->xn, &m->lm_head, n);
        e->token_logprob(e, logp, f->logits, target + first, n, c->vocab_size);
        loss->tokens(loss->context, logp, dlogp, first, n);
        e->token_logprob_backward(e, f->logits, logp, dlogp, target + first, n, c->vocab_size);
        e->linear_weight_backward(e, &grad->lm_head, f->logits, f->xn, n);
        e->linear_backward(e, f->dxn, f->logits, &m->lm_head, n, false);
        e->rmsnorm_backward(e, f->dxn, &grad->final_norm, f->dxn, f->proj, &m->final_norm, n, D, c->rms_norm_eps, c->norm_plus_one, false);
        e->scatter(e, f->dx, f->dxn, b->out_row + first, n, D);
    }
}

void model_backward(Forest *f, const Batch *b, const Model *grad) {
    const Model *m = f->model;
    Engine *e = m->engine;
    int N = (int)arrlen(b->token);
    for (int layer = f->blocks - 1; layer >= 0; layer--) {
        if (layer < f->blocks - 1 && f->kept[layer].qkv == f->kept[layer + 1].qkv) { /* shared: written over since */
            forward_block(f, b, layer, false, NULL);
        }
        backward_block(f, b, layer, grad);
    }
    if (grad->embed.data) {
        int *token = xmalloc((size_t)N * sizeof(int));
        memcpy(token, b->token, (size_t)N * sizeof(int));
        for (int i = 0; i < (int)arrlen(b->inject); i++) {
            token[b->inject[i].row] = -1;
        }
        e->embed_backward(e, &grad->embed, f->dx, token, N, m->config.hidden_size, m->config.embed_scale);
        free(token);
    }
}
