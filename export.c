/* export.c - model directories out: the start of an AV (a sidecar beside links to the base's files) and of an AR (blocks 0..K of
 * the base and an identity head), as Hugging Face directories. A directory appears under its name only when it is complete.
 */
#define _GNU_SOURCE /* asprintf's family through nla.h's xprintf, realpath */
#include "nla.h"

#include <dirent.h>
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <stb/stb_ds.h>

/* ------------------------------------------------------------------------------------------------ directories */

static bool ends_with(const char *name, const char *end) {
    size_t n = strlen(name), m = strlen(end);
    return n >= m && strcmp(name + n - m, end) == 0;
}

/* The files of a model directory that its own directory does not make: all but sidecars and hidden ones. */
static bool is_model_file(const char *name, bool weights) {
    bool weight = ends_with(name, ".safetensors") || ends_with(name, ".safetensors.index.json");
    bool known = ends_with(name, ".json") || ends_with(name, ".jinja") || ends_with(name, ".model") || ends_with(name, ".txt") || weight;
    return name[0] != '.' && known && strcmp(name, "get_model.json") != 0 && (weights || (!weight && strcmp(name, "config.json") != 0));
}

/* Links (weights too) or copies (without weights and config.json) the base's files. */
static int take_files(const char *dir, const char *base, bool link, Err *err) {
    char *real = realpath(base, NULL);
    DIR *d = real ? opendir(real) : NULL;
    int status = d ? 0 : fail(err, "%s: %s", base, strerror(errno));
    for (struct dirent *entry; status == 0 && (entry = readdir(d));) {
        if (!is_model_file(entry->d_name, link)) {
            continue;
        }
        char *from = xprintf("%s/%s", real, entry->d_name), *to = xprintf("%s/%s", dir, entry->d_name);
        File file;
        if (link) {
            status = symlink(from, to) == 0 ? 0 : fail(err, "%s: cannot link to %s: %s", to, from, strerror(errno));
        } else if ((status = file_map(&file, from, err)) == 0) {
            status = file_write(to, file.data, file.len, err);
            file_unmap(&file);
        }
        free(from);
        free(to);
    }
    if (d) {
        closedir(d);
    }
    free(real);
    return status;
}

static int save_sidecar(const char *dir, const Yaml *sidecar, Err *err) {
    char *path = xprintf("%s/nla_meta.yaml", dir);
    int status = yaml_save(sidecar, path, err);
    free(path);
    return status;
}

/* ------------------------------------------------------------------------------------------------ config.json, cut to K+1 layers */

static void write_value(FILE *out, const Json *json, int node, int layers);

/* Members of an object; num_hidden_layers and per-layer lists are cut. */
static void write_object(FILE *out, const Json *json, int node, int layers) {
    const char *comma = "";
    fputc('{', out);
    for (int k = json_first(json, node); k >= 0; k = json_next(json, k)) {
        size_t len;
        char *key = json_string(json, k, &len);
        fputs(comma, out);
        comma = ", ";
        json_write_string(out, key, len);
        fputs(": ", out);
        if (strcmp(key, "num_hidden_layers") == 0) {
            fprintf(out, "%d", layers);
        } else {
            write_value(out, json, k + 1, strcmp(key, "layer_types") == 0 ? -layers : layers);
        }
        free(key);
    }
    fputc('}', out);
}

/* layers < 0: the value is a list with one item a layer, of which -layers are kept. */
static void write_value(FILE *out, const Json *json, int node, int layers) {
    size_t len;
    int64_t whole;
    double number = 0;
    bool flag = false;
    switch (json_type(json, node)) {
    case JSON_OBJECT: write_object(out, json, node, layers); break;
    case JSON_ARRAY: {
        int i = 0;
        fputc('[', out);
        for (int v = json_first(json, node); v >= 0 && (layers > 0 || i < -layers); v = json_next(json, v), i++) {
            fputs(i ? ", " : "", out);
            write_value(out, json, v, layers > 0 ? layers : 1);
        }
        fputc(']', out);
        break;
    }
    case JSON_STRING: {
        char *text = json_string(json, node, &len);
        json_write_string(out, text, len);
        free(text);
        break;
    }
    case JSON_NUMBER:
        json_double(json, node, &number);
        if (json_int(json, node, &whole)) {
            fprintf(out, "%lld", (long long)whole);
        } else {
            fprintf(out, "%.17g", number);
        }
        break;
    case JSON_BOOL:
        json_bool(json, node, &flag);
        fputs(flag ? "true" : "false", out);
        break;
    default: fputs("null", out);
    }
}

/* The base's config.json for `layers` layers; of a wrapper the text model's part alone. When the file leaves
 * num_hidden_layers to the class default, it is added. */
static int write_config(const char *dir, const char *base, const Model *m, int layers, Err *err) {
    char *from = xprintf("%s/config.json", base), *to = xprintf("%s/config.json", dir), *text = NULL;
    size_t len;
    File file;
    Json json;
    int status = file_map(&file, from, err);
    if (status == 0 && (status = json_parse(&json, file.data, file.len, from, err)) == 0) {
        int inside = json_get(&json, 0, "text_config"), node = json_type(&json, inside) == JSON_OBJECT ? inside : 0;
        FILE *out = open_memstream(&text, &len);
        write_object(out, &json, node, layers);
        bool whole = json_get(&json, node, "num_hidden_layers") >= 0, typed = json_get(&json, node, "model_type") >= 0;
        fseeko(out, -1, SEEK_CUR); /* over the closing brace */
        if (!whole) {
            fprintf(out, ", \"num_hidden_layers\": %d", layers);
        }
        if (!typed) {
            fprintf(out, ", \"model_type\": \"%s\"", m->config.model_type);
        }
        fputs("}\n", out);
        fclose(out);
        status = file_write(to, text, len, err);
        free(text);
        json_free(&json);
    }
    if (file.path) {
        file_unmap(&file);
    }
    free(from);
    free(to);
    return status;
}

/* ------------------------------------------------------------------------------------------------ starts */

int av_start(const char *dir, const char *base, const Yaml *sidecar, Err *err) {
    Staging s;
    int status = stage(&s, dir, err);
    if (status != 0) {
        return -1;
    }
    status = take_files(s.temp, base, true, err);
    if (status == 0) {
        status = save_sidecar(s.temp, sidecar, err);
    }
    return unstage(&s, status, err);
}

/* The model's tensors as they are in memory, under plain names whatever wrapper they came from. */
static int write_weights(const char *dir, const Model *m, Err *err) {
    Model plain = *m;
    plain.prefix = "model.";
    Named *named = model_tensors(&plain);
    Tensor *list = NULL;
    for (int i = 0; i < (int)arrlen(named); i++) {
        arrput(list, *named[i].tensor);
        arrlast(list).name = named[i].name;
    }
    char *path = xprintf("%s/model.safetensors", dir);
    int status = engine_save(m->engine, path, list, (int)arrlen(list), err);
    free(path);
    arrfree(list);
    named_free(named);
    return status;
}

static int write_head(Engine *e, const char *dir, const Tensor *head, Err *err) {
    Tensor t = *head;
    t.name = "weight";
    char *path = xprintf("%s/value_head.safetensors", dir);
    int status = engine_save(e, path, &t, 1, err);
    free(path);
    return status;
}

/* The identity: the AR starts by saying what the backbone's own stream says. Random weights would start near-orthogonal. */
static int write_identity_head(Engine *e, const char *dir, int D, Err *err) {
    float *w = xcalloc((size_t)D * (size_t)D, sizeof(float));
    for (int i = 0; i < D; i++) {
        w[(size_t)i * (size_t)D + (size_t)i] = 1;
    }
    Tensor t = {.dtype = DT_F32, .n_dims = 2, .shape = {D, D}, .data = w, .bytes = (size_t)D * (size_t)D * sizeof(float)};
    int status = write_head(e, dir, &t, err);
    free(w);
    return status;
}

int ar_start(const char *dir, const Model *m, int layer, const Yaml *sidecar, Err *err) {
    Staging s;
    int status = stage(&s, dir, err);
    if (status != 0) {
        return -1;
    }
    status = take_files(s.temp, m->dir, false, err);
    if (status == 0) {
        status = write_config(s.temp, m->dir, m, layer + 1, err);
    }
    if (status == 0) {
        Model cut = *m;
        cut.config.n_layers = layer + 1;
        cut.final_norm = (Tensor){0};
        cut.lm_head = (Linear){0};
        status = write_weights(s.temp, &cut, err);
    }
    if (status == 0) {
        status = write_identity_head(m->engine, s.temp, m->config.hidden_size, err);
    }
    if (status == 0) {
        status = save_sidecar(s.temp, sidecar, err);
    }
    return unstage(&s, status, err);
}

/* ------------------------------------------------------------------------------------------------ what was trained */

int model_write(const char *dir, const char *base, Model *m, const Linear *head, const Yaml *sidecar, Err *err) {
    int status = 0;
    if (m->lora.rank) {
        status = lora_save(m, &m->lora, dir, err);
    } else {
        status = take_files(dir, base, false, err);
        status = status == 0 ? write_config(dir, base, m, m->config.n_layers, err) : -1;
        status = status == 0 ? write_weights(dir, m, err) : -1;
    }
    if (status == 0 && head) {
        status = write_head(m->engine, dir, &head->w[0], err);
    }
    return status == 0 && sidecar ? save_sidecar(dir, sidecar, err) : status;
}

/* ------------------------------------------------------------------------------------------------ nla init */

/* The length an injected vector gets when none is given: a round number a little above the mean norm of a dataset. */
static int suggested_scale(const char *acts, int width, float *scale, Err *err) {
    Dataset d;
    if (dataset_open(&d, acts, err) != 0) {
        return -1;
    }
    int status = d.d_model == width && d.n > 0 ? 0 : fail(err, "%s: holds %lld vectors of width %d, the model's width is %d", acts,
                                                          (long long)d.n, d.d_model, width);
    double total = 0;
    float *v = xmalloc((size_t)width * sizeof(float));
    for (int64_t i = 0; status == 0 && i < d.n; i++) {
        dataset_vector(&d, i, v);
        total += vector_norm(v, width);
    }
    double mean = total / (double)(d.n > 0 ? d.n : 1), unit = pow(10, floor(log10(mean > 0 ? mean : 1)) - 1);
    *scale = (float)(ceil(mean * 1.02 / unit) * unit); /* two digits */
    free(v);
    dataset_close(&d);
    return status == 0 && !(mean > 0 && isfinite(mean)) ? fail(err, "%s: the mean norm is %g", acts, mean) : status;
}

int run_init(const Settings *s, Err *err) {
    Loaded l;
    if (!s->av && !s->ar) {
        return fail(err, "name what to make: --av DIR, --ar DIR or both");
    }
    if (load_all(&l, s, true, err) != 0) {
        return -1;
    }
    int *layers = NULL, status = parse_layers(s->layers, &l.model.config, &layers, err);
    if (status == 0 && arrlen(layers) != 1) {
        status = fail(err, "--layer takes one layer here");
    }
    float scale = isnan(s->injection_scale) ? 0 : (float)s->injection_scale;
    if (status == 0 && s->av && isnan(s->injection_scale)) {
        status = s->acts ? suggested_scale(s->acts, l.model.config.hidden_size, &scale, err)
                         : fail(err, "an AV needs a length for the injected vector: --injection-scale N (0: raw), or --acts "
                                     "DIR to take it from captured activations");
    }
    for (int ar = 0; ar < 2 && status == 0; ar++) {
        const char *dir = ar ? s->ar : s->av;
        Yaml *sidecar;
        if (!dir) {
            continue;
        }
        status = sidecar_make(&sidecar, ar, l.tok, &l.model.config, s->model, layers[0], scale, err);
        if (status == 0) {
            status = ar ? ar_start(dir, &l.model, layers[0], sidecar, err) : av_start(dir, s->model, sidecar, err);
            if (status == 0) {
                note(s, "%s: %s start, layer %d, marker %s (%s)\n", dir, ar ? "AR" : "AV", layers[0],
                     yaml_get(sidecar, "tokens.injection_char")->text, yaml_get(sidecar, "tokens.injection_token_id")->text);
            }
            yaml_free(sidecar);
        }
    }
    arrfree(layers);
    unload(&l);
    return status;
}

/* ------------------------------------------------------------------------------------------------ nla export */

/* W + scale * up down of every adapted matrix, in memory of its own (added to *owned); the adapters are then gone. */
static void merge_adapters(Model *m, float ***owned) {
    for (int layer = 0; layer < m->config.n_layers; layer++) {
        for (int i = 0; i < MODULES; i++) {
            int at;
            Linear *w = block_linear(&m->block[layer], i, &at);
            const Tensor *down = lora_down(w, at);
            if (!down) {
                continue;
            }
            const float *a = down->data, *b = w->lora->up[at].data;
            size_t rows = (size_t)w->w[at].shape[0], columns = (size_t)w->in, rank = (size_t)w->lora->rank;
            float *sum = xmalloc(rows * columns * sizeof(float));
            (void)tensor_to_floats(sum, &w->w[at]);
            for (size_t o = 0; o < rows; o++) {
                for (size_t r = 0; r < rank; r++) {
                    float scaled = w->lora->scale * b[o * rank + r];
                    for (size_t c = 0; c < columns; c++) {
                        sum[o * columns + c] += scaled * a[r * columns + c];
                    }
                }
            }
            w->w[at].data = sum;
            w->w[at].dtype = DT_F32;
            w->w[at].bytes = rows * columns * sizeof(float);
            arrput(*owned, sum);
        }
    }
    lora_free(m);
}

static void narrow(float *x, size_t n) { /* in place: a bf16 takes half of what it is read from */
    for (size_t i = 0; i < n; i++) {
        ((uint16_t *)(void *)x)[i] = f32_to_bf16(x[i]);
    }
}

/* Every tensor in `dtype`, in memory of its own where it was in another. */
static void convert(Model *m, DType dtype, float ***owned) {
    Named *list = model_tensors(m);
    for (int i = 0; i < (int)arrlen(list); i++) {
        Tensor *t = list[i].tensor;
        size_t n = tensor_elements(t);
        if (t->dtype == dtype) {
            continue;
        }
        float *wide = xmalloc(n * sizeof(float));
        (void)tensor_to_floats(wide, t);
        if (dtype == DT_BF16) {
            narrow(wide, n);
        }
        *t = (Tensor){.name = t->name, .dtype = dtype, .n_dims = t->n_dims, .shape = {t->shape[0], t->shape[1]}, .data = wide,
                      .bytes = n * dtype_size(dtype)};
        arrput(*owned, wide);
    }
    named_free(list);
}

/* The adapters as bf16, in the memory that is theirs. */
static void narrow_adapters(Model *m) {
    Named *list = lora_tensors(m);
    for (int i = 0; i < (int)arrlen(list); i++) {
        Tensor *t = list[i].tensor;
        narrow((float *)t->data, tensor_elements(t));
        t->dtype = DT_BF16;
        t->bytes = tensor_elements(t) * dtype_size(DT_BF16);
    }
    named_free(list);
}

/* The base that the written adapters name, if it is a directory from here or from `dir`, which lies where they will. */
static int name_base(LoraConfig *c, const char *base, const char *dir, Err *err) {
    struct stat st;
    char *beside = xprintf("%s/%s", dir, base);
    bool found = stat(base, &st) == 0 || (*base != '/' && stat(beside, &st) == 0);
    free(beside);
    if (!c->rank) {
        return fail(err, "--base is for adapters; these are whole weights");
    }
    if (!found) {
        return fail(err, "--base %s: no such directory, from here or from where the adapters will be", base);
    }
    free(c->base);
    c->base = xstrdup(base);
    return 0;
}

int run_export(const Settings *s, Err *err) {
    const char *dir = s->argument[0];
    bool wide = s->dtype && strcmp(s->dtype, "f32") == 0, bf16 = s->dtype && strcmp(s->dtype, "bf16") == 0;
    Engine *engine = NULL;
    Sidecar meta;
    Safetensors head = {0};
    Model m = {0};
    float **owned = NULL;
    if (need(s->out, "out", s, err) != 0) {
        return -1;
    }
    if (s->dtype && !wide && !bf16) {
        return fail(err, "--dtype is bf16 or f32, not '%s'", s->dtype);
    }
    int status = sidecar_load(&meta, dir, err);
    if (status != 0) {
        return -1;
    }
    status = open_engine(&engine, s, err);
    bool opened = status == 0 && adapted_load(&m, dir, meta.ar ? meta.layer + 1 : 0, engine, err) == 0;
    Linear value = {0};
    if (opened && meta.ar) {
        status = value_head_load(&value, &head, dir, m.config.hidden_size, err);
    }
    Staging stage_dir;
    if (opened && status == 0 && (status = stage(&stage_dir, s->out, err)) == 0) {
        if (s->merge) {
            merge_adapters(&m, &owned);
        }
        status = s->base ? name_base(&m.lora, s->base, stage_dir.temp, err) : 0;
        if (!m.lora.rank) {
            convert(&m, wide ? DT_F32 : DT_BF16, &owned);
        } else if (bf16) {
            narrow_adapters(&m);
        }
        if (status == 0) {
            status = model_write(stage_dir.temp, m.dir, &m, meta.ar ? &value : NULL, meta.yaml, err);
        }
        status = unstage(&stage_dir, status, err);
    }
    if (opened && status == 0) {
        note(s, "%s: %s\n", s->out, m.lora.rank ? "adapters in PEFT's layout" : "a Hugging Face directory");
    }
    for (int i = 0; i < (int)arrlen(owned); i++) {
        free(owned[i]);
    }
    arrfree(owned);
    if (opened) {
        model_free(&m);
    }
    if (head.file) {
        safetensors_close(&head);
    }
    if (engine) {
        engine->close(engine);
    }
    sidecar_free(&meta);
    return opened ? status : -1;
}
