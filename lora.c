/* lora.c - low-rank adapters (LoRA): made new, read and written in PEFT's layout, merged into the weights. How they enter the
 * forward and backward passes is in model.c; here is only what they are and where they are kept.
 */
#include "nla.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include <stb/stb_ds.h>

double lora_scale(const LoraConfig *c) {
    return c->rslora ? c->alpha / sqrt(c->rank) : c->alpha / c->rank;
}

/* "q_proj" or "self_attn.q_proj" -> its number, or -1. */
static int module_number(const char *name) {
    for (int i = 0; i < MODULES; i++) {
        const char *whole = module_name(i), *last = strrchr(whole, '.') + 1;
        if (strcmp(name, whole) == 0 || strcmp(name, last) == 0) {
            return i;
        }
    }
    return -1;
}

int lora_modules(LoraConfig *c, const char *list, Err *err) {
    memset(c->module, 0, sizeof c->module);
    char *copy = xstrdup(list), *rest = NULL;
    int status = 0, n = 0;
    for (char *name = strtok_r(copy, ", ", &rest); name && status == 0; name = strtok_r(NULL, ", ", &rest)) {
        char *whole = strstr(name, "_proj") ? xstrdup(name) : xprintf("%s_proj", name);
        int i = module_number(whole);
        if (i < 0) {
            status = fail(err, "there is no matrix '%s'; adapters go on q, k, v, o, gate, up, down", name);
        } else {
            c->module[i] = true;
            n++;
        }
        free(whole);
    }
    free(copy);
    return status == 0 && n == 0 ? fail(err, "adapters go on some of q, k, v, o, gate, up, down; none is named") : status;
}

static Tensor new_tensor(int rows, int columns) {
    size_t bytes = (size_t)rows * (size_t)columns * sizeof(float);
    return (Tensor){.dtype = DT_F32, .n_dims = 2, .shape = {rows, columns}, .data = xcalloc(1, bytes), .bytes = bytes};
}

/* Zero adapters on the modules that the configuration names. */
static void attach(Model *m, const LoraConfig *c) {
    for (int layer = 0; layer < m->config.n_layers; layer++) {
        for (int i = 0; i < MODULES; i++) {
            int at;
            Linear *w = block_linear(&m->block[layer], i, &at);
            if (!c->module[i]) {
                continue;
            }
            w->lora = w->lora ? w->lora : xcalloc(1, sizeof(Lora));
            Lora *l = w->lora;
            l->rank = c->rank;
            l->scale = (float)lora_scale(c);
            l->down.w[l->down.n++] = new_tensor(c->rank, w->in);
            l->down.in = w->in;
            l->down.out += c->rank;
            l->up[at] = new_tensor((int)w->w[at].shape[0], c->rank);
        }
    }
}

void lora_new(Model *m, const LoraConfig *c, uint64_t seed) {
    m->lora = *c;
    m->lora.base = xstrdup(c->base ? c->base : m->dir);
    attach(m, c);
    Named *list = lora_tensors(m);
    for (int i = 0; i < (int)arrlen(list); i += 2) { /* A uniform in +-1/sqrt(I), B zero: it starts as nothing */
        const Tensor *a = list[i].tensor;
        double reach = 1 / sqrt((double)a->shape[1]);
        for (size_t j = 0; j < tensor_elements(a); j++) {
            ((float *)a->data)[j] = (float)(reach * (2 * random_uniform(seed, (uint64_t)i, j, 0) - 1));
        }
    }
    named_free(list);
}

void lora_free(Model *m) {
    for (int layer = 0; m->block && layer < m->config.n_layers; layer++) {
        for (int i = 0; i < MODULES; i++) {
            int at;
            Linear *w = block_linear(&m->block[layer], i, &at);
            if (w->lora) {
                for (int j = 0; j < 3; j++) {
                    Tensor *const part[] = {&w->lora->down.w[j], &w->lora->up[j]};
                    for (int k = 0; k < 2; k++) {
                        m->engine->forget(m->engine, part[k]->data, part[k]->bytes);
                        free((void *)part[k]->data);
                    }
                }
                free(w->lora);
                w->lora = NULL;
            }
        }
    }
    free(m->lora.base);
    m->lora = (LoraConfig){0};
}

/* ------------------------------------------------------------------------------------------------ files */

static int read_modules(LoraConfig *c, const Json *j, Err *err) {
    int list = json_get(j, 0, "target_modules");
    for (int v = json_first(j, list); v >= 0; v = json_next(j, v)) {
        char *name = json_string(j, v, NULL);
        int i = name ? module_number(name) : -1;
        if (i < 0) {
            fail(err, "%s: target_modules names '%s'; adapters go on q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj",
                 j->file, name ? name : "?");
            free(name);
            return -1;
        }
        c->module[i] = true;
        free(name);
    }
    return json_size(j, list) > 0 ? 0 : fail(err, "%s: target_modules is missing or empty", j->file);
}

static int read_config(LoraConfig *c, const char *dir, Err *err) {
    *c = (LoraConfig){0};
    char *path = xprintf("%s/adapter_config.json", dir);
    File file;
    Json j;
    int status = file_map(&file, path, err);
    if (status == 0) {
        int64_t rank = 0;
        bool flag = false;
        status = json_parse(&j, file.data, file.len, path, err);
        if (status == 0) {
            if (!json_int(&j, json_get(&j, 0, "r"), &rank) || rank < 1 || rank > 4096) {
                status = fail(err, "%s: r (the rank) must be a whole number from 1 to 4096", path);
            } else if (!json_double(&j, json_get(&j, 0, "lora_alpha"), &c->alpha) || !(c->alpha > 0)) {
                status = fail(err, "%s: lora_alpha must be a positive number", path);
            } else if (json_bool(&j, json_get(&j, 0, "use_dora"), &flag) && flag) {
                status = fail(err, "%s: use_dora is not supported", path);
            } else {
                status = read_modules(c, &j, err);
            }
            c->rank = (int)rank;
            json_bool(&j, json_get(&j, 0, "use_rslora"), &c->rslora);
            c->base = json_string(&j, json_get(&j, 0, "base_model_name_or_path"), NULL);
            json_free(&j);
        }
        file_unmap(&file);
    }
    free(path);
    return status;
}

/* Copies the file's tensors into the attached ones, by name; every one must be there, and nothing else. */
static int read_adapters(Model *m, const char *dir, Err *err) {
    char *path = xprintf("%s/adapter_model.safetensors", dir);
    Safetensors st;
    int status = safetensors_open(&st, path, err);
    if (status == 0) {
        Named *list = lora_tensors(m);
        for (int i = 0; i < (int)arrlen(list) && status == 0; i++) {
            const Tensor *from = safetensors_find(&st, list[i].name);
            Tensor *to = list[i].tensor;
            if (!from) {
                status = fail(err, "%s: tensor %s is missing", path, list[i].name);
            } else if (from->n_dims != 2 || from->shape[0] != to->shape[0] || from->shape[1] != to->shape[1]) {
                status = fail(err, "%s: tensor %s is not [%lld, %lld], which the base model and the rank make it", path, list[i].name,
                              (long long)to->shape[0], (long long)to->shape[1]);
            } else if (tensor_to_floats((float *)to->data, from) != 0) {
                status = fail(err, "%s: tensor %s has dtype %s; adapters are F32, BF16 or F16", path, list[i].name, dtype_name(from->dtype));
            }
        }
        if (status == 0 && arrlen(st.tensor) != arrlen(list)) {
            status = fail(err, "%s: holds %d tensors, the adapters that adapter_config.json names are %d", path, (int)arrlen(st.tensor),
                          (int)arrlen(list));
        }
        named_free(list);
        safetensors_close(&st);
    }
    free(path);
    return status;
}

int lora_load(Model *m, const char *dir, Err *err) {
    if (read_config(&m->lora, dir, err) != 0) {
        return -1;
    }
    attach(m, &m->lora);
    return read_adapters(m, dir, err);
}

static bool is_dir(const char *path) {
    struct stat st;
    return path && stat(path, &st) == 0 && S_ISDIR(st.st_mode);
}

int adapted_load(Model *m, const char *dir, int blocks, Engine *engine, Err *err) {
    char *config = xprintf("%s/adapter_config.json", dir), *base = NULL;
    struct stat st;
    bool adapter = stat(config, &st) == 0;
    int status = 0;
    LoraConfig c = {0};
    free(config);
    if (adapter && (status = read_config(&c, dir, err)) == 0) {
        base = c.base && *c.base && *c.base != '/' ? xprintf("%s/%s", dir, c.base) : NULL;
        const char *found = is_dir(c.base) ? c.base : is_dir(base) ? base : NULL;
        status = found ? model_load(m, found, engine, err)
                       : fail(err, "%s: its base model '%s' is not a directory here; write its path into base_model_name_or_path of "
                              "adapter_config.json", dir, c.base ? c.base : "");
    } else if (!adapter) {
        status = model_load(m, dir, engine, err);
    }
    if (status == 0 && blocks > 0 && adapter) {
        if (blocks > m->config.n_layers) {
            status = fail(err, "%s: reads layer %d, its base model has %d layers", dir, blocks - 1, m->config.n_layers);
        } else {
            m->config.n_layers = blocks;
        }
    }
    if (status == 0 && adapter) {
        status = lora_load(m, dir, err);
    }
    if (status != 0) {
        model_free(m);
    }
    free(base);
    free(c.base);
    return status;
}

int lora_save(Model *m, const LoraConfig *c, const char *dir, Err *err) {
    char *text = NULL, *path = xprintf("%s/adapter_config.json", dir);
    size_t len = 0;
    FILE *out = open_memstream(&text, &len);
    fputs("{\n  \"base_model_name_or_path\": ", out);
    json_write_string(out, c->base ? c->base : "", c->base ? strlen(c->base) : 0);
    fprintf(out, ",\n  \"bias\": \"none\",\n  \"fan_in_fan_out\": false,\n  \"inference_mode\": true,\n  \"lora_alpha\": %.17g,\n"
            "  \"lora_dropout\": 0.0,\n  \"peft_type\": \"LORA\",\n  \"r\": %d,\n  \"target_modules\": [", c->alpha, c->rank);
    bool first = true;
    for (int i = 0; i < MODULES; i++) {
        if (c->module[i]) {
            fprintf(out, "%s\"%s\"", first ? "" : ", ", strrchr(module_name(i), '.') + 1);
            first = false;
        }
    }
    fprintf(out, "],\n  \"task_type\": \"CAUSAL_LM\",\n  \"use_rslora\": %s\n}\n", c->rslora ? "true" : "false");
    fclose(out);
    int status = file_write(path, text, len, err);
    free(text);
    free(path);
    if (status == 0) {
        Named *list = lora_tensors(m);
        Tensor *tensor = NULL;
        for (int i = 0; i < (int)arrlen(list); i++) {
            arrput(tensor, *list[i].tensor);
            arrlast(tensor).name = list[i].name;
        }
        path = xprintf("%s/adapter_model.safetensors", dir);
        status = engine_save(m->engine, path, tensor, (int)arrlen(tensor), err);
        free(path);
        arrfree(tensor);
        named_free(list);
    }
    return status;
}
