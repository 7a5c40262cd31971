/* The method against PyTorch, on four tiny AV/AR pairs in the reference's layout (tests/golden_method.py made them): old and
 * new sidecar keys, wrapper names, BOS, raw and scaled injection, a leftover final norm. */
#define _GNU_SOURCE /* memmem */
#include "../nla.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <stb/stb_ds.h>

static const char *const families[] = {"llama", "qwen2", "qwen3", "gemma3"};

typedef struct {
    Engine *engine;
    Safetensors golden;
    char dir[64], av[80], ar[80];
} Pair;

static void open_pair(Pair *p, int i) {
    Err err = {0};
    p->engine = engine_open(2, false, &err);
    snprintf(p->dir, sizeof p->dir, "tests/golden/pair_%s", families[i]);
    snprintf(p->av, sizeof p->av, "%s/av", p->dir);
    snprintf(p->ar, sizeof p->ar, "%s/ar", p->dir);
    char path[128];
    snprintf(path, sizeof path, "%s/golden.safetensors", p->dir);
    cr_assert(safetensors_open(&p->golden, path, &err) == 0, "%s", err.msg);
}

static void close_pair(Pair *p) {
    safetensors_close(&p->golden);
    p->engine->close(p->engine);
}

static const Tensor *golden(const Pair *p, const char *name) {
    const Tensor *t = safetensors_find(&p->golden, name);
    cr_assert(t, "%s: no %s", p->dir, name);
    return t;
}

static const float *floats(const Pair *p, const char *name) {
    cr_assert(golden(p, name)->dtype == DT_F32, "%s", name);
    return golden(p, name)->data;
}

/* 1e-5: fp32 sums in another order than PyTorch's, over a handful of layers. */
static void close_to(const float *a, const float *b, size_t n, const char *dir, const char *what) {
    double difference = 0, size = 0;
    for (size_t i = 0; i < n; i++) {
        difference += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
        size += (double)b[i] * (double)b[i];
    }
    cr_assert(difference <= 1e-10 * size, "%s: %s: relative error %.2e", dir, what, sqrt(difference / size));
}

typedef struct {
    const Pair *pair;
    int V, D, T;
    const float *logits;
    bool residuals;
} Expected;

static void check_logits(void *context, Engine *e, const Act *logits, int first, int n) {
    const Expected *x = context;
    cr_assert(first == 0 && n == 1);
    float *row = malloc((size_t)x->V * sizeof(float));
    e->read(e, row, logits, 0, (size_t)x->V);
    close_to(row, x->logits, (size_t)x->V, x->pair->dir, "logits after injection");
    free(row);
}

static void check_residual(void *context, Engine *e, const char *module, int layer, const Act *data, int first, int rows, int width) {
    (void)first;
    const Expected *x = context;
    if (*module || !x->residuals) {
        return;
    }
    float *out = malloc((size_t)(rows * width) * sizeof(float));
    e->read(e, out, data, 0, (size_t)(rows * width));
    close_to(out, floats(x->pair, "residuals_first_vector") + (size_t)layer * (size_t)(x->T * x->D), (size_t)(rows * width),
             x->pair->dir, "residual stream after injection");
    free(out);
}

Test(method, the_injected_forward_equals_pytorch_in_every_family) {
    for (int i = 0; i < 4; i++) {
        Pair p;
        Verbalizer v;
        Err err = {0};
        open_pair(&p, i);
        cr_assert(verbalizer_open(&v, p.av, NULL, NAN, p.engine, &err) == 0, "%s", err.msg);
        int T = (int)arrlen(v.prompt), D = v.model.config.hidden_size, V = v.model.config.vocab_size;
        const Tensor *ids = golden(&p, "prompt_ids");
        cr_assert(ids->shape[0] == T);
        for (int t = 0; t < T; t++) {
            cr_assert(((const int64_t *)ids->data)[t] == v.prompt[t], "%s: prompt token %d", p.dir, t);
        }
        cr_assert(*(const int64_t *)golden(&p, "marker_position")->data == v.marker_at);
        for (int r = 0; r < 3; r++) {
            Forest f;
            Batch b = {0};
            const float *vector = floats(&p, "vectors") + r * D;
            float *scaled = malloc((size_t)D * sizeof(float));
            double length = 0;
            for (int d = 0; d < D; d++) {
                length += (double)vector[d] * (double)vector[d];
            }
            for (int d = 0; d < D; d++) {
                scaled[d] = v.scale > 0 ? (float)((double)vector[d] * (double)v.scale / sqrt(length)) : vector[d];
            }
            Expected x = {&p, V, D, T, floats(&p, "logits") + r * V, r == 0};
            LogitSink sink = {&x, check_logits};
            Tap tap = {&x, check_residual};
            cr_assert(forest_open(&f, &v.model, v.model.config.n_layers, T, T, FORWARD, &err) == 0);
            batch_inject(&b, v.marker_at, scaled);
            batch_add(&b, &f, forest_add(&f, -1, T, &err), v.prompt, T, 1);
            cr_assert(model_forward(&f, &b, &sink, &tap, &err) == 0, "%s", err.msg);
            batch_free(&b);
            forest_close(&f);
            free(scaled);
        }
        verbalizer_close(&v);
        close_pair(&p);
    }
}

Test(method, greedy_texts_of_injected_vectors_equal_pytorch) {
    for (int i = 0; i < 4; i++) {
        Pair p;
        Verbalizer v;
        Decoder d;
        Err err = {0};
        open_pair(&p, i);
        cr_assert(verbalizer_open(&v, p.av, NULL, NAN, p.engine, &err) == 0, "%s", err.msg);
        Decoding how = {.max_tokens = 20, .ignore_eos = true, .sampler = {.top_p = 1}};
        cr_assert(verbalize(&v, &d, floats(&p, "vectors"), 3, 0, 1, &how, &err) == 0, "%s", err.msg);
        const int64_t *expected = golden(&p, "decoded")->data;
        for (int r = 0; r < 3; r++) {
            cr_assert(arrlen(d.sample[r].ids) == 20 && !d.sample[r].stopped);
            for (int t = 0; t < 20; t++) {
                cr_assert(d.sample[r].ids[t] == expected[r * 20 + t], "%s: vector %d token %d", p.dir, r, t);
            }
        }
        decoder_free(&d);
        verbalizer_close(&v);
        close_pair(&p);
    }
}

/* The shared prompt once, a segment a vector, a child a sample: what comes out is what each would say alone. */
Test(method, a_forest_of_samples_says_token_for_token_what_each_says_alone) {
    for (int i = 0; i < 4; i++) {
        Pair p;
        Verbalizer v;
        Decoder together, alone;
        Err err = {0};
        open_pair(&p, i);
        cr_assert(verbalizer_open(&v, p.av, NULL, NAN, p.engine, &err) == 0, "%s", err.msg);
        Decoding how = {.max_tokens = 15, .ignore_eos = true, .sampler = {.temperature = 1, .top_p = 1, .seed = 3}};
        const float *vectors = floats(&p, "vectors");
        int D = v.model.config.hidden_size;
        cr_assert(verbalize(&v, &together, vectors, 3, 0, 4, &how, &err) == 0, "%s", err.msg);
        for (int r = 0; r < 3; r++) {
            cr_assert(verbalize(&v, &alone, vectors + r * D, 1, r, 4, &how, &err) == 0);
            for (int s = 0; s < 4; s++) {
                const Sample *a = &together.sample[r * 4 + s], *b = &alone.sample[s];
                cr_assert(arrlen(a->ids) == arrlen(b->ids) && memcmp(a->ids, b->ids, arrlenu(a->ids) * sizeof(int)) == 0);
                cr_assert(memcmp(a->logprob, b->logprob, arrlenu(a->logprob) * sizeof(float)) == 0);
            }
            decoder_free(&alone);
        }
        cr_assert(memcmp(together.sample[0].ids, together.sample[1].ids, 15 * sizeof(int)) != 0, "two samples are the same");
        cr_assert(v.computed < v.flat / 4, "%lld prompt tokens computed, flat %lld", (long long)v.computed, (long long)v.flat);
        decoder_free(&together);
        verbalizer_close(&v);
        close_pair(&p);
    }
}

/* The same samples with nothing shared: each has the whole prompt to itself, in one segment. */
Test(method, a_forest_of_samples_equals_separate_decodes_of_flat_prompts) {
    for (int i = 0; i < 4; i++) {
        Pair p;
        Verbalizer v;
        Decoder together;
        Err err = {0};
        open_pair(&p, i);
        cr_assert(verbalizer_open(&v, p.av, NULL, NAN, p.engine, &err) == 0, "%s", err.msg);
        Decoding how = {.max_tokens = 12, .ignore_eos = true, .sampler = {.temperature = 1, .top_p = 1, .seed = 8}};
        const float *vectors = floats(&p, "vectors");
        int D = v.model.config.hidden_size, T = (int)arrlen(v.prompt);
        cr_assert(verbalize(&v, &together, vectors, 3, 0, 4, &how, &err) == 0, "%s", err.msg);
        Forest f;
        cr_assert(forest_open(&f, &v.model, v.model.config.n_layers, T + 5 * (how.max_tokens + CACHE_ALIGN), T, FORWARD, &err) == 0);
        for (int one = 0; one < 12; one++) {
            Decoder alone = {.how = how, .eos = v.model.config.eos, .vocab_size = v.model.config.vocab_size, .tok = v.tok};
            Batch b = {0};
            float *vector = malloc((size_t)D * sizeof(float));
            double scale = v.scale > 0 ? (double)v.scale / vector_norm(vectors + one / 4 * D, D) : 1;
            for (int d = 0; d < D; d++) {
                vector[d] = (float)((double)vectors[one / 4 * D + d] * scale);
            }
            forest_cut(&f, 0);
            int root = forest_add(&f, -1, T - 1, &err);
            batch_inject(&b, v.marker_at, vector);
            batch_add(&b, &f, root, v.prompt, T - 1, 0);
            cr_assert(model_forward(&f, &b, NULL, NULL, &err) == 0, "%s", err.msg);
            cr_assert(decoder_add(&alone, &f, root, one / 4, v.prompt[T - 1], one % 4 + 1, &err) == 0);
            alone.live[0] = one % 4; /* this sample only */
            arrsetlen(alone.live, 1);
            cr_assert(decode(&alone, &f, &b, &err) == 12);
            const Sample *x = &alone.sample[one % 4], *y = &together.sample[one];
            cr_assert(memcmp(x->ids, y->ids, 12 * sizeof(int)) == 0, "%s: vector %d sample %d", p.dir, one / 4, one % 4);
            decoder_free(&alone);
            batch_free(&b);
            free(vector);
        }
        forest_close(&f);
        decoder_free(&together);
        verbalizer_close(&v);
        close_pair(&p);
    }
}

static char *read_text(const Json *j, int node, size_t *len) {
    char *text = json_string(j, node, len);
    cr_assert(text);
    return text;
}

Test(method, reconstructed_vectors_and_scores_equal_pytorch) {
    for (int i = 0; i < 4; i++) {
        Pair p;
        Reconstructor r;
        Err err = {0};
        open_pair(&p, i);
        cr_assert(reconstructor_open(&r, p.ar, NULL, p.engine, &err) == 0, "%s", err.msg);
        char path[128];
        snprintf(path, sizeof path, "%s/texts.json", p.dir);
        File file;
        Json json;
        cr_assert(file_map(&file, path, &err) == 0 && json_parse(&json, file.data, file.len, path, &err) == 0, "%s", err.msg);
        char *text[3];
        size_t len[3];
        int D = r.model.config.hidden_size, n = 0;
        for (int v = json_first(&json, json_get(&json, 0, "explanations")); v >= 0; v = json_next(&json, v)) {
            text[n] = read_text(&json, v, &len[n]);
            n++;
        }
        cr_assert(n == 3);
        float *out = malloc((size_t)(3 * D) * sizeof(float)), *alone = malloc((size_t)D * sizeof(float));
        cr_assert(reconstruct(&r, (const char *const *)text, len, 3, out, &err) == 0, "%s", err.msg);
        close_to(out, floats(&p, "ar_out"), (size_t)(3 * D), p.dir, "reconstructed vectors");
        for (int k = 0; k < 3; k++) {
            cr_assert(reconstruct(&r, (const char *const *)text + k, len + k, 1, alone, &err) == 0);
            cr_assert(memcmp(alone, out + k * D, (size_t)D * sizeof(float)) == 0, "%s: text %d depends on its neighbours", p.dir, k);
            double mse = mse_nrm(out + k * D, floats(&p, "vectors") + k * D, D, (double)r.meta.mse_scale);
            double cos = cosine(out + k * D, floats(&p, "vectors") + k * D, D);
            cr_assert(fabs(mse - (double)floats(&p, "mse_nrm")[k]) < 1e-5 * fabs(mse), "%s: mse_nrm %g", p.dir, mse);
            cr_assert(fabs(cos - (double)floats(&p, "cos")[k]) < 1e-5, "%s: cos %g", p.dir, cos);
            free(text[k]);
        }
        free(out);
        free(alone);
        json_free(&json);
        file_unmap(&file);
        reconstructor_close(&r);
        close_pair(&p);
    }
}

Test(method, an_explanation_stands_between_its_tags_and_is_trimmed) {
    static const struct {
        const char *text, *explanation; /* NULL: failed */
    } cases[] = {
        {"<explanation>\nA river.\n\nIt flows.\n</explanation>", "A river.\n\nIt flows."},
        {"so: <explanation>x</explanation> and more </explanation>", "x"},
        {"<explanation>never closed", NULL},
        {"never opened</explanation>", NULL},
        {"</explanation><explanation>wrong way", NULL},
        {"<explanation> \n </explanation>", NULL},
        {"", NULL},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const char *start;
        size_t n;
        bool found = explanation_of(cases[i].text, strlen(cases[i].text), &start, &n);
        cr_assert(found == (cases[i].explanation != NULL), "%s", cases[i].text);
        if (found) {
            cr_assert(n == strlen(cases[i].explanation) && memcmp(start, cases[i].explanation, n) == 0, "%s", cases[i].text);
        }
    }
}

/* ------------------------------------------------------------------------------------------------ where a text ends */

/* A base model's config does not count the chat's end-of-turn token among its ends; an AV made of it is taught that token all the same. */
Test(method, an_av_of_a_base_model_ends_its_texts) {
    static const char *const files[] = {"model.safetensors", "tokenizer.json", "tokenizer_config.json", "nla_meta.yaml"};
    char dir[] = "/tmp/nla-av-XXXXXX", path[64], source[512], cwd[400];
    Pair p;
    Verbalizer v;
    File config;
    Err err = {0};
    open_pair(&p, 0);
    cr_assert(mkdtemp(dir) && getcwd(cwd, sizeof cwd));
    for (int i = 0; i < 4; i++) {
        snprintf(source, sizeof source, "%s/%s/%s", cwd, p.av, files[i]);
        snprintf(path, sizeof path, "%s/%s", dir, files[i]);
        cr_assert(symlink(source, path) == 0);
    }
    snprintf(source, sizeof source, "%s/config.json", p.av);
    cr_assert(file_map(&config, source, &err) == 0, "%s", err.msg);
    char *text = strndup((const char *)config.data, config.len), *eos = strstr(text, "\"eos_token_id\": 402");
    cr_assert(eos);
    memcpy(eos, "\"eos_token_id\": 400", strlen("\"eos_token_id\": 400"));
    snprintf(path, sizeof path, "%s/config.json", dir);
    cr_assert(file_write(path, text, config.len, &err) == 0, "%s", err.msg);
    cr_assert(verbalizer_open(&v, dir, NULL, NAN, p.engine, &err) == 0, "%s", err.msg);
    const int *end = v.model.config.eos;
    cr_assert(arrlen(end) == 2 && end[0] == 400 && end[1] == av_end_of_turn(&v) && end[1] == 402);
    verbalizer_close(&v);
    free(text);
    file_unmap(&config);
    for (int i = 0; i < 4; i++) {
        snprintf(path, sizeof path, "%s/%s", dir, files[i]);
        unlink(path);
    }
    snprintf(path, sizeof path, "%s/config.json", dir);
    unlink(path);
    rmdir(dir);
    close_pair(&p);
}

/* ------------------------------------------------------------------------------------------------ refusals */

Test(method, a_zero_or_non_finite_vector_is_refused_by_row) {
    Pair p;
    Verbalizer v;
    Decoder d;
    Err err = {0};
    open_pair(&p, 0);
    cr_assert(verbalizer_open(&v, p.av, NULL, NAN, p.engine, &err) == 0, "%s", err.msg);
    int D = v.model.config.hidden_size;
    float *vectors = calloc((size_t)(2 * D), sizeof(float));
    vectors[0] = 1;
    Decoding how = {.max_tokens = 2, .sampler = {.top_p = 1}};
    cr_assert(verbalize(&v, &d, vectors, 2, 40, 1, &how, &err) == -1);
    cr_assert(strstr(err.msg, "row 41 is zero"), "%s", err.msg);
    decoder_free(&d);
    vectors[D + 3] = NAN;
    err = (Err){0};
    cr_assert(verbalize(&v, &d, vectors, 2, 40, 1, &how, &err) == -1);
    cr_assert(strstr(err.msg, "row 41 is not finite"), "%s", err.msg);
    decoder_free(&d);
    free(vectors);
    verbalizer_close(&v);
    close_pair(&p);
}

/* A sidecar of the llama pair with one thing replaced, given on the "command line". */
static void expect_refusal(bool ar, const char *from, const char *to, const char *words) {
    char path[] = "/tmp/nla-sidecar-XXXXXX", source[96];
    int fd = mkstemp(path);
    Pair p;
    File file;
    Err err = {0};
    open_pair(&p, 0);
    snprintf(source, sizeof source, "%s/nla_meta.yaml", ar ? p.ar : p.av);
    cr_assert(fd >= 0 && file_map(&file, source, &err) == 0);
    const char *at = memmem(file.data, file.len, from, strlen(from));
    cr_assert(at, "%s is not in %s", from, source);
    FILE *out = fdopen(fd, "w");
    fwrite(file.data, 1, (size_t)(at - file.data), out);
    fputs(to, out);
    fwrite(at + strlen(from), 1, file.len - (size_t)(at - file.data) - strlen(from), out);
    fclose(out);
    Verbalizer v;
    Reconstructor r;
    int status = ar ? reconstructor_open(&r, p.ar, path, p.engine, &err) : verbalizer_open(&v, p.av, path, NAN, p.engine, &err);
    cr_assert(status == -1, "accepted: %s", to);
    cr_assert(strstr(err.msg, words), "'%s' is not in '%s'", words, err.msg);
    unlink(path);
    file_unmap(&file);
    close_pair(&p);
}

Test(method, a_sidecar_that_does_not_fit_is_refused_with_both_sides) {
    expect_refusal(false, "injection_token_id: ", "injection_token_id: 1", "injection_token_id says 1");
    expect_refusal(false, "injection_left_neighbor_id: ", "injection_left_neighbor_id: 9", "the template drifted");
    expect_refusal(false, "{injection_char}", "{injection_char}{injection_char}", "must hold {injection_char} exactly once");
    expect_refusal(false, "{injection_char}", "none", "must hold {injection_char} exactly once");
    expect_refusal(false, "Say in plain words", "Say <concept>\xe3\x88\x8e</concept> in plain words", "2 times, not once; it stands at: position");
    expect_refusal(false, "d_model: 40", "d_model: 41", "d_model is 41, the model in tests/golden/pair_llama/av has width 40");
    expect_refusal(false, "injection_scale: 4.5", "mse_scale: 4.5", "injection_scale is missing");
    expect_refusal(false, "injection_scale: 4.5", "injection_scale: -1", "injection_scale is not a positive number");
    expect_refusal(false, "role: av", "role: ar", "role is not av");
    expect_refusal(false, "kind: nla_model", "kind: model", "kind is neither");
    expect_refusal(true, "extraction_layer_index: 2", "extraction_layer_index: 1", "num_hidden_layers 3");
    expect_refusal(true, "{explanation}", "nothing", "must hold {explanation} exactly once");
    expect_refusal(true, "<vector>", "<vectors>", "critic_suffix_ids says");
}

Test(method, unknown_keys_of_a_sidecar_are_kept) {
    Sidecar s;
    Err err = {0};
    cr_assert(sidecar_load(&s, "tests/golden/pair_llama/av", &err) == 0, "%s", err.msg);
    cr_assert(yaml_get(s.yaml, "lab_notes.by"));
    char path[] = "/tmp/nla-sidecar-XXXXXX";
    close(mkstemp(path));
    cr_assert(yaml_save(s.yaml, path, &err) == 0);
    Sidecar again;
    cr_assert(sidecar_load(&again, path, &err) == 0, "%s", err.msg);
    cr_assert_str_eq(yaml_get(again.yaml, "lab_notes.by")->text, yaml_get(s.yaml, "lab_notes.by")->text);
    cr_assert_str_eq(again.av_template, s.av_template);
    cr_assert_str_eq(again.marker, s.marker);
    sidecar_free(&s);
    sidecar_free(&again);
    unlink(path);
}
