/* The whole model: PyTorch's intermediates on ten tiny checkpoints, and what must hold of the forest whatever the model. */
#include "../nla.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <stb/stb_ds.h>

static const char *const cases[] = {"llama3",       "llama_tied",     "qwen2",          "qwen3",         "gemma3_text",
                                    "gemma3_wrapper", "llama_new_rope", "gemma3_new_rope", "qwen3_sharded", "llama_f16"};
enum { N_CASES = sizeof cases / sizeof *cases };

typedef struct {
    Engine *engine;
    Model model;
    Safetensors golden;
    int ids[256], n;
} Fixture;

static void open_case(Fixture *f, const char *name, int threads) {
    Err err = {0};
    char path[256];
    f->engine = engine_open(threads, false, &err);
    cr_assert(f->engine, "%s", err.msg);
    snprintf(path, sizeof path, "tests/golden/%s", name);
    cr_assert(model_load(&f->model, path, f->engine, &err) == 0, "%s", err.msg);
    snprintf(path, sizeof path, "tests/golden/%s/golden.safetensors", name);
    cr_assert(safetensors_open(&f->golden, path, &err) == 0, "%s", err.msg);
    const Tensor *t = safetensors_find(&f->golden, "input_ids");
    cr_assert(t && t->dtype == DT_I64 && t->shape[0] <= 256);
    f->n = (int)t->shape[0];
    for (int i = 0; i < f->n; i++) {
        f->ids[i] = (int)((const int64_t *)t->data)[i];
    }
}

static void close_case(Fixture *f) {
    safetensors_close(&f->golden);
    model_free(&f->model);
    f->engine->close(f->engine);
}

/* Relative error of a module's output: norm of the difference over norm of PyTorch's. */
static void compare(void *context, Engine *e, const char *module, int layer, const Act *data, int first, int rows, int width) {
    const Fixture *f = context;
    char name[128];
    snprintf(name, sizeof name, layer < 0 ? "%s" : "model.layers.%2$d%3$s%1$s", module, layer, *module ? "." : "");
    const Tensor *t = safetensors_find(&f->golden, name);
    cr_assert(t, "%s: no golden tensor", name);
    cr_assert(t->shape[1] == width && first + rows <= t->shape[0]);
    float *x = malloc((size_t)(rows * width) * sizeof(float));
    e->read(e, x, data, 0, (size_t)(rows * width));
    double difference = 0, size = 0;
    for (int i = 0; i < rows * width; i++) {
        double g = (double)((const float *)t->data)[first * width + i];
        difference += ((double)x[i] - g) * ((double)x[i] - g);
        size += g * g;
    }
    free(x);
    /* 1e-5: fp32 sums in another order than PyTorch's; PyTorch itself is up to 2.3e-6 from a float64 forward here */
    cr_assert(difference <= 1e-10 * size, "%s %s: relative error %.2e", f->model.dir, name, sqrt(difference / size));
}

static void no_logits(void *context, Engine *e, const Act *logits, int first, int n) {
    (void)context, (void)e, (void)logits, (void)first, (void)n;
}

static void check_golden(void) {
    for (int c = 0; c < N_CASES; c++) {
        Fixture f;
        Forest forest;
        Batch batch = {0};
        Err err = {0};
        open_case(&f, cases[c], 2);
        Tap tap = {&f, compare};
        LogitSink sink = {NULL, no_logits};
        cr_assert(forest_open(&forest, &f.model, f.model.config.n_layers, f.n, f.n, FORWARD, &err) == 0);
        batch_add(&batch, &forest, forest_add(&forest, -1, f.n, &err), f.ids, f.n, 2);
        cr_assert(model_forward(&forest, &batch, &sink, &tap, &err) == 0, "%s", err.msg);
        batch_free(&batch);
        forest_close(&forest);
        close_case(&f);
    }
}

Test(model, every_module_equals_pytorch_in_every_family) {
    check_golden();
}

Test(model, every_module_equals_pytorch_on_older_processors) {
    setenv("NLA_CPU", "avx2", 1);
    check_golden();
    setenv("NLA_CPU", "any", 1);
    check_golden();
}

/* ------------------------------------------------------------------------------------------------ the forest */

typedef struct {
    float *row[512];
    int V;
} Logits;

static void keep_logits(void *context, Engine *e, const Act *logits, int first, int n) {
    Logits *l = context;
    for (int i = 0; i < n; i++) {
        l->row[first + i] = malloc((size_t)l->V * sizeof(float));
        e->read(e, l->row[first + i], logits, (size_t)i * (size_t)l->V, (size_t)l->V);
    }
}

static void free_logits(Logits *l) {
    for (int i = 0; i < 512; i++) {
        free(l->row[i]);
    }
    *l = (Logits){.V = l->V};
}

/* Runs the batch and keeps the logits of its wanted rows. */
static void run(Forest *forest, Batch *batch, Logits *out) {
    Err err = {0};
    out->V = forest->model->config.vocab_size;
    LogitSink sink = {out, keep_logits};
    cr_assert(model_forward(forest, batch, &sink, NULL, &err) == 0, "%s", err.msg);
}

/* Norm of the difference over norm of b, over `rows` rows of logits. */
static double relative(float *const *a, float *const *b, int rows, int V) {
    double difference = 0, size = 0;
    for (int r = 0; r < rows; r++) {
        for (int i = 0; i < V; i++) {
            difference += ((double)a[r][i] - (double)b[r][i]) * ((double)a[r][i] - (double)b[r][i]);
            size += (double)b[r][i] * (double)b[r][i];
        }
    }
    return sqrt(difference / size);
}

/* A shared root, two children, a grandchild, against the three sequences laid out flat. */
Test(model, a_forest_equals_its_sequences_laid_out_flat) {
    for (int c = 0; c < N_CASES; c++) {
        Fixture f;
        Err err = {0};
        open_case(&f, cases[c], 2);
        const int *x = f.ids;
        Forest forest;
        Batch batch = {0};
        Logits tree = {0}, flat = {0};
        int L = f.model.config.n_layers;
        cr_assert(forest_open(&forest, &f.model, L, 256, 128, FORWARD, &err) == 0);
        int root = forest_add(&forest, -1, 13, &err), left = forest_add(&forest, root, 9, &err),
            right = forest_add(&forest, root, 7, &err), leaf = forest_add(&forest, right, 5, &err);
        batch_add(&batch, &forest, root, x, 13, 0);
        batch_add(&batch, &forest, left, x + 13, 9, 2);
        batch_add(&batch, &forest, right, x + 22, 7, 0);
        batch_add(&batch, &forest, leaf, x + 29, 5, 2);
        run(&forest, &batch, &tree);

        int sequence[2][25], length[2] = {22, 25};
        memcpy(sequence[0], x, 22 * sizeof(int));
        memcpy(sequence[1], x, 13 * sizeof(int));
        memcpy(sequence[1] + 13, x + 22, 12 * sizeof(int));
        int at = 0;
        for (int s = 0; s < 2; s++) {
            forest_cut(&forest, 0);
            batch_clear(&batch);
            batch_add(&batch, &forest, forest_add(&forest, -1, length[s], &err), sequence[s], length[s], 2);
            run(&forest, &batch, &flat);
            int tail = s == 0 ? 9 : 5;
            double r = relative(tree.row + at, flat.row + length[s] - tail, tail, flat.V);
            cr_assert(r < 1e-6, "%s: sequence %d differs by %.2e", cases[c], s, r); /* keys are added up in other tiles */
            at += tail;
            free_logits(&flat);
        }
        free_logits(&tree);
        batch_free(&batch);
        forest_close(&forest);
        close_case(&f);
    }
}

/* Token by token through the cache, in the company of other rows, or all at once: the same bits. */
Test(model, decoding_gives_the_same_bits_as_one_pass_whatever_rides_along) {
    for (int c = 0; c < N_CASES; c++) {
        Fixture f;
        Err err = {0};
        open_case(&f, cases[c], 2);
        Forest forest;
        Batch batch = {0};
        Logits whole = {0}, step = {0};
        cr_assert(forest_open(&forest, &f.model, f.model.config.n_layers, 512, 256, FORWARD, &err) == 0);
        batch_add(&batch, &forest, forest_add(&forest, -1, f.n, &err), f.ids, f.n, 2);
        run(&forest, &batch, &whole);
        int seg = forest_add(&forest, -1, f.n, &err), other = forest_add(&forest, -1, f.n, &err);
        for (int i = 0; i < f.n; i++) {
            batch_clear(&batch);
            if (i % 2) {
                batch_add(&batch, &forest, other, f.ids + (i * 7) % f.n, 1, 0);
            }
            batch_add(&batch, &forest, seg, f.ids + i, 1, 1);
            run(&forest, &batch, &step);
            cr_assert(memcmp(step.row[0], whole.row[i], (size_t)whole.V * sizeof(float)) == 0, "%s: token %d", cases[c], i);
            free_logits(&step);
        }
        free_logits(&whole);
        batch_free(&batch);
        forest_close(&forest);
        close_case(&f);
    }
}

Test(model, any_number_of_threads_gives_the_same_bits) {
    for (int c = 0; c < N_CASES; c++) {
        Logits first = {0}, now = {0};
        for (int threads = 1; threads <= 5; threads += 2) {
            Fixture f;
            Err err = {0};
            open_case(&f, cases[c], threads);
            Forest forest;
            Batch batch = {0};
            cr_assert(forest_open(&forest, &f.model, f.model.config.n_layers, f.n, f.n, FORWARD, &err) == 0);
            batch_add(&batch, &forest, forest_add(&forest, -1, f.n, &err), f.ids, f.n, 2);
            run(&forest, &batch, threads == 1 ? &first : &now);
            for (int i = 0; i < f.n && threads > 1; i++) {
                cr_assert(memcmp(first.row[i], now.row[i], (size_t)now.V * sizeof(float)) == 0, "%s: %d threads", cases[c], threads);
            }
            free_logits(&now);
            batch_free(&batch);
            forest_close(&forest);
            close_case(&f);
        }
        free_logits(&first);
    }
}

Test(model, what_does_not_fit_is_an_error_and_changes_nothing) {
    Fixture f;
    Err err = {0};
    open_case(&f, "llama3", 1);
    Forest forest;
    Batch batch = {0};
    cr_assert(forest_open(&forest, &f.model, 1, 32, 8, FORWARD, &err) == 0);
    int seg = forest_add(&forest, -1, 10, &err);
    batch_add(&batch, &forest, seg, f.ids, 9, 0);
    cr_assert(model_forward(&forest, &batch, NULL, NULL, &err) == -1);
    cr_assert(strstr(err.msg, "a batch of 9 tokens"), "%s", err.msg);
    cr_assert(forest.segment[seg].len == 0);
    batch_clear(&batch);
    int bad[] = {1, f.model.config.vocab_size};
    batch_add(&batch, &forest, seg, bad, 2, 0);
    err = (Err){0};
    cr_assert(model_forward(&forest, &batch, NULL, NULL, &err) == -1);
    cr_assert(strstr(err.msg, "outside the vocabulary"), "%s", err.msg);
    err = (Err){0};
    cr_assert(forest_add(&forest, -1, 17, &err) == -1);
    cr_assert(strstr(err.msg, "is full"), "%s", err.msg);
    batch_free(&batch);
    forest_close(&forest);
    close_case(&f);
}

Test(model, the_forests_size_is_planned_before_it_is_made) {
    Fixture f;
    Err err = {0};
    open_case(&f, "gemma3_text", 1);
    Forest forest;
    cr_assert(forest_open(&forest, &f.model, 3, 100, 50, FORWARD, &err) == 0);
    cr_assert(forest_bytes(&f.model, 3, 100, 50, FORWARD) == forest.bytes);
    forest_close(&forest);
    close_case(&f);
}

/* ------------------------------------------------------------------------------------------------ config.json */

static void expect_config_error(const char *json, const char *words) {
    Config c;
    Err err = {0};
    cr_assert(config_parse(&c, json, strlen(json), "config.json", &err) == -1, "accepted: %s", json);
    cr_assert(strstr(err.msg, words), "%s: '%s' is not in '%s'", json, words, err.msg);
}

Test(model, class_defaults_fill_an_almost_empty_config) {
    Config c;
    Err err = {0};
    const char *gemma = "{\"model_type\": \"gemma3\", \"text_config\": {\"model_type\": \"gemma3_text\"}}";
    cr_assert(config_parse(&c, gemma, strlen(gemma), "config.json", &err) == 0, "%s", err.msg);
    cr_assert(c.vocab_size == 262208 && c.head_dim == 256 && c.n_heads == 8 && c.n_kv_heads == 4 && c.tied);
    cr_assert(c.layer[5].window == 0 && c.layer[4].window == 4096 && c.layer[4].rope == 1);
    cr_assert(c.rope[0].theta == 1e6 && c.rope[1].theta == 1e4 && c.attn_scale == 1.0f / 16);
    config_free(&c);
    const char *llama = "{\"model_type\": \"llama\", \"hidden_size\": 64, \"num_attention_heads\": 4, \"rope_scaling\": null}";
    cr_assert(config_parse(&c, llama, strlen(llama), "config.json", &err) == 0, "%s", err.msg);
    cr_assert(c.n_kv_heads == 4 && c.head_dim == 16 && !c.tied && c.rope[0].theta == 1e4);
    config_free(&c);
}

Test(model, a_config_that_would_give_other_numbers_is_refused_by_name) {
    expect_config_error("[]", "not a JSON object");
    expect_config_error("{}", "model_type is missing");
    expect_config_error("{\"model_type\": \"gpt2\"}", "model_type is gpt2");
    expect_config_error("{\"model_type\": \"gemma3\"}", "text_config is missing");
    expect_config_error("{\"model_type\": \"llama\", \"hidden_size\": \"wide\"}", "hidden_size is not a whole number");
    expect_config_error("{\"model_type\": \"llama\", \"hidden_size\": 0}", "hidden_size is 0");
    expect_config_error("{\"model_type\": \"llama\", \"hidden_size\": 1e99}", "hidden_size is not a whole number");
    expect_config_error("{\"model_type\": \"llama\", \"num_attention_heads\": 6, \"num_key_value_heads\": 4}", "not a multiple");
    expect_config_error("{\"model_type\": \"llama\", \"head_dim\": 7}", "head_dim is odd");
    expect_config_error("{\"model_type\": \"llama\", \"rms_norm_eps\": -1}", "rms_norm_eps must be a positive");
    expect_config_error("{\"model_type\": \"llama\", \"hidden_act\": \"relu\"}", "hidden_act is not silu");
    expect_config_error("{\"model_type\": \"gemma3_text\", \"final_logit_softcapping\": 30.0}", "soft-capping of logits");
    expect_config_error("{\"model_type\": \"llama\", \"quantization_config\": {}}", "quantised");
    expect_config_error("{\"model_type\": \"llama\", \"rope_scaling\": {\"rope_type\": \"yarn\", \"factor\": 4}}", "rope_type");
    expect_config_error("{\"model_type\": \"llama\", \"rope_scaling\": {\"rope_type\": \"llama3\"}}", "factor");
    expect_config_error("{\"model_type\": \"llama\", \"partial_rotary_factor\": 0.5}", "partial_rotary_factor");
    expect_config_error("{\"model_type\": \"qwen2\", \"num_hidden_layers\": 2, \"layer_types\": [\"full_attention\"]}",
                        "layer_types lists 1 layers");
    expect_config_error("{\"model_type\": \"qwen2\", \"num_hidden_layers\": 1, \"layer_types\": [\"linear_attention\"]}",
                        "neither full_attention nor sliding_attention");
    expect_config_error("{\"model_type\": \"llama\", \"num_hidden_layers\": 1, \"layer_types\": [\"sliding_attention\"]}",
                        "no sliding_window in use");
}

/* ------------------------------------------------------------------------------------------------ broken checkpoints */

/* A copy of a golden checkpoint with one thing done to its tensors, and what loading it says. */
static void expect_load_error(const char *from, void (*spoil)(Tensor **tensor), const char *words) {
    char dir[] = "/tmp/nla-test-XXXXXX", path[512];
    Err err = {0};
    cr_assert(mkdtemp(dir));
    Safetensors st;
    File config;
    snprintf(path, sizeof path, "tests/golden/%s/model.safetensors", from);
    cr_assert(safetensors_open(&st, path, &err) == 0, "%s", err.msg);
    snprintf(path, sizeof path, "tests/golden/%s/config.json", from);
    cr_assert(file_map(&config, path, &err) == 0);
    snprintf(path, sizeof path, "%s/config.json", dir);
    cr_assert(file_write(path, config.data, config.len, &err) == 0);
    file_unmap(&config);
    Tensor *tensor = NULL;
    for (int i = 0; i < (int)arrlen(st.tensor); i++) {
        arrput(tensor, st.tensor[i]);
    }
    spoil(&tensor);
    char model[512];
    snprintf(model, sizeof model, "%s/model.safetensors", dir);
    cr_assert(safetensors_save(model, tensor, (int)arrlen(tensor), &err) == 0, "%s", err.msg);
    arrfree(tensor);
    safetensors_close(&st);
    Engine *e = engine_open(1, false, &err);
    Model m;
    cr_assert(model_load(&m, dir, e, &err) == -1, "accepted, though it should say: %s", words);
    cr_assert(strstr(err.msg, words), "'%s' is not in '%s'", words, err.msg);
    e->close(e);
    unlink(model);
    unlink(path);
    rmdir(dir);
}

static Tensor *named(Tensor *tensor, const char *name) {
    for (int i = 0; i < (int)arrlen(tensor); i++) {
        if (strcmp(tensor[i].name, name) == 0) {
            return &tensor[i];
        }
    }
    cr_assert_fail("no %s", name);
    return NULL;
}

static void drop_one(Tensor **t) {
    *named(*t, "model.layers.1.mlp.up_proj.weight") = arrlast(*t);
    (void)arrpop(*t);
}
static void drop_bias(Tensor **t) {
    *named(*t, "model.layers.0.self_attn.k_proj.bias") = arrlast(*t);
    (void)arrpop(*t);
}
static void drop_embedding(Tensor **t) {
    *named(*t, "model.embed_tokens.weight") = arrlast(*t);
    (void)arrpop(*t);
}
static void reshape_one(Tensor **t) {
    Tensor *x = named(*t, "model.layers.0.mlp.down_proj.weight");
    int64_t rows = x->shape[0];
    x->shape[0] = x->shape[1];
    x->shape[1] = rows;
}
static void flatten_one(Tensor **t) {
    Tensor *x = named(*t, "model.layers.0.self_attn.o_proj.weight");
    x->shape[0] *= x->shape[1];
    x->n_dims = 1;
}
static void retype_one(Tensor **t) {
    Tensor *x = named(*t, "model.layers.0.self_attn.o_proj.weight");
    x->dtype = DT_I32;
}
static void double_text_model(Tensor **t) {
    Tensor x = *named(*t, "model.embed_tokens.weight");
    x.name = "language_model.model.embed_tokens.weight";
    arrput(*t, x);
}
static void one_layer_more(Tensor **t) {
    Tensor x = *named(*t, "model.layers.0.input_layernorm.weight");
    x.name = "model.layers.3.input_layernorm.weight";
    arrput(*t, x);
}
static void unexpected_bias(Tensor **t) {
    Tensor x = *named(*t, "model.layers.0.input_layernorm.weight");
    x.name = "model.layers.0.self_attn.o_proj.bias";
    arrput(*t, x);
}

Test(model, a_checkpoint_that_does_not_match_its_config_is_refused_by_tensor_name) {
    expect_load_error("llama3", drop_one, "tensor model.layers.1.mlp.up_proj.weight is missing");
    expect_load_error("qwen2", drop_bias, "tensor model.layers.0.self_attn.k_proj.bias is missing");
    expect_load_error("llama3", drop_embedding, "no tensor model.embed_tokens.weight");
    expect_load_error("llama3", reshape_one, "model.layers.0.mlp.down_proj.weight is [");
    expect_load_error("llama3", flatten_one, "config.json makes it [");
    expect_load_error("llama3", retype_one, "has dtype I32");
    expect_load_error("llama3", double_text_model, "holds two text models");
    expect_load_error("llama3", one_layer_more, "tensor model.layers.3.input_layernorm.weight has no place");
    expect_load_error("llama3", unexpected_bias, "o_proj.bias has no place");
}

/* Without lm_head or final norm (an AR) a model loads, gives its residual stream, and refuses logits. */
Test(model, logits_of_a_model_without_lm_head_are_an_error) {
    Fixture f;
    Err err = {0};
    open_case(&f, "llama3", 1);
    f.model.lm_head.n = 0;
    Forest forest;
    Batch batch = {0};
    LogitSink sink = {NULL, no_logits};
    cr_assert(forest_open(&forest, &f.model, 1, 16, 16, FORWARD, &err) == 0);
    batch_add(&batch, &forest, forest_add(&forest, -1, 4, &err), f.ids, 4, 1);
    cr_assert(model_forward(&forest, &batch, &sink, NULL, &err) == -1);
    cr_assert(strstr(err.msg, "no lm_head.weight"), "%s", err.msg);
    err = (Err){0};
    cr_assert(model_forward(&forest, &batch, NULL, NULL, &err) == 0);
    batch_free(&batch);
    forest_close(&forest);
    close_case(&f);
}
