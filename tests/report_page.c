/* report_page.c - writes pages for tests/report_test.sh and the README, from made-up data: report_page KIND FILE.
 *   sample  80 tokens of prose at three layers, every value invented (no model was run)
 *   hostile the same, with tokens and explanations that try to break out of the page or out of their line
 *   large   2,000 tokens at three layers
 *   bare    one layer, no scores
 *   eval, eval_hostile, eval_bare               an evaluation; bare: two rows, two conditions, no positions
 *   run, run_hostile, run_bare, run_large       a training run, whose files are made in FILE.d; bare: two steps alone; large:
 *                                               20,000 steps */
#define _GNU_SOURCE
#include "../nla.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

/* clang-format off */
static const char *const prose[] = {
    "<|begin_of_text|>", "The", " light", "house", " keeper", " wrote", " the", " same", " line", " in", " his", " log",
    " every", " night", ":", " \"", "Lamp", " lit", ",", " sea", " calm", ".\"", " On", " the", " fourth", " of",
    " March", " the", " handwriting", " changed", ".", "\n\n", "Nobody", " noticed", " until", " the", " supply",
    " boat", " came", ",", " two", " weeks", " late", ",", " and", " found", " the", " lamp", " still", " burning", ",",
    " the", " table", " set", " for", " two", ",", "  ", "and", " the", " log", " open", " at", " a", " page", " that",
    " held", " a", " single", " word", ":", " \"", "Almost", ".\"", "\n", "It", " was", " in", " her", " hand",
};
enum { N_PROSE = sizeof prose / sizeof *prose };

static const char *const evil[] = {
    "</script><script>window.ran = 1</script>", "<!--<script>", "<img src=x onerror='window.ran = 2'>",
    "\xe2\x80\xa8\xe2\x80\xa9", "\" onclick=\"window.ran = 3", "\xe2\x80\xae zyx\xe2\x80\xac", "\xf0\x9f\xa6\x8a",
    "averyveryveryveryveryveryveryveryveryveryveryveryveryveryveryveryveryveryveryveryveryveryverylongtoken", "\x1b[31m",
    "\t", "", " \xd7\xa9\xd7\x9c\xd7\x95\xd7\x9d", "&lt;b&gt;", "</script/x", "]]>", "\\u003c/script>",
};
enum { N_EVIL = sizeof evil / sizeof *evil };
/* clang-format on */

static const char *text_of(int i, bool hostile) {
    if (hostile && i % N_PROSE >= 32 && i % N_PROSE < 32 + N_EVIL) return evil[i % N_PROSE - 32];
    return prose[i % N_PROSE];
}

static void string(FILE *out, const char *text) {
    json_write_string(out, text, strlen(text));
}

static char *explanation(int i, int layer, bool hostile) {
    static const char *const gist[3] = {
        "Surface form: a short declarative sentence of plain English prose, past tense, no dialogue yet.",
        "A maritime story: a lone keeper, a daily log, a lamp; literary fiction in a restrained, slightly ominous "
        "tone.",
        "The narrative is holding something back. A routine has been broken; step by step the reader is led on.",
    };
    static const char *const next[3] = {
        "a noun or a preposition is likely to follow.",
        "the sentence must go on with a detail of the scene, most likely an object in the room.",
        "what follows should name the next thing the crew saw, and raise the tension a little.",
    };
    const char *a = text_of(i > 1 ? i - 2 : 0, false), *b = text_of(i > 0 ? i - 1 : 0, false), *c = text_of(i, hostile);
    return xprintf("%s\n\nThe phrase \"%s%s%s\" continues a chain of plain facts, each calmer than it ought to be.\n\n"
                   "Final token \"%s\": it closes the thought so far; %s",
                   gist[layer], a, b, text_of(i, false), c, next[layer]);
}

static void reading(FILE *out, int i, int layer, bool hostile, bool scored) {
    double wave = 0.5 + 0.28 * sin(i * 0.37 + layer) + 0.14 * sin(i * 1.7 + 2 * layer) + 0.08 * sin(i * 5.1);
    double fve = (0.25 + 0.5 * wave + 0.12 * layer) * (i < 10 ? 0.1 * i - 0.15 : 1);
    double mse = (1 - fve) * 0.7335;
    fprintf(out, "{\"position\":%d,\"norm\":%.2f,\"outlier\":%s,\"early\":%s,\"samples\":[", i,
            i ? 38 + 17 * layer + 6 * wave : 2210.5, i ? "false" : "true", i < 10 ? "true" : "false");
    for (int s = 0; s < 3; s++) {
        bool failed = !s && (i == 41 || i == 70), truncated = failed && i == 41;
        char *text = explanation(i, layer, hostile),
             *raw = xprintf("<explanation>\n%s%s", text, failed ? "" : "\n</explanation>");
        fputs(s ? ",{\"explanation\":" : "{\"explanation\":", out);
        if (failed)
            fputs("null", out);
        else
            string(out, text);
        fputs(",\"text\":", out);
        string(out, raw);
        fprintf(out, ",\"truncated\":%s", truncated ? "true" : "false");
        if (failed || !scored)
            fputs(",\"fve\":null,\"cos\":null,\"mse_nrm\":null}", out);
        else
            fprintf(out, ",\"fve\":%.5f,\"cos\":%.5f,\"mse_nrm\":%.5f}", fve - 0.04 * s, 1 - mse / 2, mse + 0.03 * s);
        free(text);
        free(raw);
    }
    fputs("]}", out);
}

static void write_json(FILE *out, const char *kind) {
    bool hostile = !strcmp(kind, "hostile"), scored = strcmp(kind, "bare") != 0;
    int n = !strcmp(kind, "large") ? 2000 : N_PROSE, n_layers = scored ? 3 : 1;
    fputs("{\"title\":", out);
    string(out, hostile ? evil[0]
                        : "\xe2\x80\x9cThe lighthouse keeper \xe2\x80\xa6\xe2\x80\x9d (a sample, every value made up)");
    fputs(",\"created\":\"2026-01-01 12:00 UTC\",\"settings\":{\"model\":\"made-up data, no model was run\",\"av\":",
          out);
    string(out, hostile ? evil[0] : "none");
    fprintf(out,
            ",\"ar\":%s,\"chat\":false,\"samples\":3,\"temperature\":1,\"seed\":7,\"max_tokens\":200,"
            "\"injection_scale\":null},\"baseline\":",
            scored ? "\"none\"" : "null");
    string(out, hostile ? evil[2] : "the readings on this page, layer by layer.");
    fputs(",\"tokens\":[", out);
    for (int i = 0; i < n; i++) {
        fputs(i ? ",{\"text\":" : "{\"text\":", out);
        string(out, text_of(i, hostile));
        fprintf(out, ",\"id\":%d,\"special\":%s}", 1000 + 37 * i, i % N_PROSE ? "false" : "true");
    }
    fputs("],\"layers\":[", out);
    for (int layer = 0; layer < n_layers; layer++) {
        fprintf(out, "%s{\"layer\":%d,\"var_nrm\":%s,\"mean_fve\":%s,\"readings\":[", layer ? "," : "", 10 + 10 * layer,
                scored ? "0.7335" : "null", scored ? (const char *[]){"0.44", "0.56", "0.68"}[layer] : "null");
        for (int i = 0, first = 1; i < n; i++) {
            if (i == 31 || i == 74) continue; /* newlines were not read */
            if (!first) putc(',', out);
            first = 0;
            reading(out, i, layer, hostile, scored && (layer || i != 20));
        }
        fputs("]}", out);
    }
    fputs("]}", out);
}

/* ------------------------------------------------------------------------------------------------ evaluations, runs */

/* A number in [0, 1) that looks drawn; the same for the same two numbers. */
static double noise(int i, int k) {
    double x = sin(i * 12.9898 + k * 78.233) * 43758.5453;
    return x - floor(x);
}

static void write_eval(FILE *out, const char *kind) {
    static const struct {
        const char *name, *what;
        double fve;
    } condition[] = {{"explained", "the AV's explanation of the row's activation", 0.52},
                     {"permuted-v", "the explanation of another row's vector", 0.03},
                     {"permuted-t", "another row's text, shuffled anew", 0.02},
                     {"constant", "the same words for every row", -0.04},
                     {"shuffled", "its sentences in another order", 0.47},
                     {"lower-case", "in lower case", 0.45},
                     {"unquoted", "without quotation marks", 0.36},
                     {"thinned", "with 20% of its words dropped", 0.41},
                     {"prefix", "the true text before the token, not the explanation", 0.68},
                     {"prefix-perm", "another row's true text", -0.11},
                     {"written", "the explanation that came with the row: written from its text", 0.58},
                     {"nearest", "the training explanation whose activation is most similar", 0.31}};
    bool hostile = !strcmp(kind, "eval_hostile"), bare = !strcmp(kind, "eval_bare");
    int n = bare ? 2 : 400, n_conditions = bare ? 2 : (int)(sizeof condition / sizeof *condition);
    fprintf(out, "{\"rows\": %d, \"var_nrm\": 0.7335, \"meannorm\": 0.712, \"failed\": 0.0175, \"mean_tokens\": 96.4", n);
    json_number(out, "keyword_recall", bare ? NAN : 0.31);
    json_number(out, "keyword_recall_permuted", bare ? NAN : 0.04);
    json_text(out, "created", hostile ? evil[0] : "2026-01-01 12:00 UTC");
    json_text(out, "av", hostile ? evil[0] : "made-up/av (no model was run)");
    json_text(out, "ar", hostile ? evil[5] : "made-up/ar");
    json_text(out, "acts", hostile ? evil[7] : "made-up/held_out");
    fputs(bare ? ", \"position\": null" : ", \"position\": [", out);
    for (int i = 0; i < n && !bare; i++) fprintf(out, i ? ",%d" : "%d", (int)(50 + 900 * pow(noise(i, 1), 3)));
    fputs(bare ? ", \"length\": [" : "], \"length\": [", out);
    for (int i = 0; i < n; i++) fprintf(out, i ? ",%d" : "%d", (int)(70 + 50 * noise(i, 2)));
    fputs("], \"samples\": [", out);
    for (int k = 0; k < 10 && !bare; k++) {
        fprintf(out, "%s{\"row\": %d", k ? ", " : "", 37 * k + 4);
        json_text(out, "prefix", hostile ? evil[k % 8] : "The keeper of the lighthouse climbed the stairs and lit the");
        json_text(out, "explanation", k == 9 ? NULL : hostile ? evil[(k + 3) % 8] : "A story of the sea.\n\nThe last token is \"the\", so a noun is due.");
        json_number(out, "fve", 0.9 - 0.12 * k);
        fputc('}', out);
    }
    fputs("], \"conditions\": {", out);
    for (int c = 0; c < n_conditions; c++) {
        fputs(c ? ", " : "", out);
        string(out, hostile && c > 3 ? evil[c] : condition[c].name);
        fprintf(out, ": {\"fve_nrm\": %.4f, \"low\": %.4f, \"high\": %.4f, \"fve_meannorm\": %.4f, \"mse_nrm\": %.4f, \"cos\": 0.81, "
                "\"centred_cos\": 0.72", condition[c].fve, condition[c].fve - 0.022, condition[c].fve + 0.02,
                condition[c].fve - 0.01, (1 - condition[c].fve) * 0.7335);
        json_text(out, "what", hostile ? evil[c] : condition[c].what);
        fputs(", \"mse\": [", out);
        for (int i = 0; i < n; i++) {
            double spread = noise(i, c + 3) + noise(i, c + 40) + noise(i, 90) - 1.5;
            double fve = condition[c].fve + 0.25 * spread + (c ? 0 : 0.1 * (noise(i, 1) - 0.5));
            fprintf(out, "%s%.4f", i ? "," : "", i % 57 == 5 && c < 8 ? 2.0 : (1 - fve) * 0.7335);
        }
        fputs("]}", out);
    }
    fputs("}}", out);
}

static void write_step(FILE *out, int i, int n, bool hostile) {
    double t = (double)i / n, z = noise(i, 1) - 0.5;
    fprintf(out, "{\"step\": %d, \"loss\": %.5f, \"grad_norm\": %.5f, \"lr\": %.8g", i, 1.5 + 2.6 * exp(-6 * t) + 0.3 * z,
            (0.6 + 0.4 * exp(-5 * t) + 0.3 * z) * (i % 997 == 333 ? 90 : 1), 2e-5 * (0.1 + 0.9 * 0.5 * (1 + cos(3.14159 * t))));
    fprintf(out, ", \"reward\": %.5f, \"fve\": %.5f, \"kl\": %.6f, \"tokens_mean\": %.2f, \"failed\": %.4f, \"skipped\": 0",
            -0.7 + 0.4 * t + 0.1 * z, 0.05 + 0.55 * t + 0.12 * z, 0.002 + 0.05 * t + 0.004 * z, 88 + 20 * t + 6 * z,
            0.2 * exp(-8 * t) + 0.01 * (z + 0.5));
    fprintf(out, ", \"tokens_per_s\": %.1f, \"group_std\": %.4f, \"note\": ", 12000 + 800 * z, 0.2 + 0.1 * z);
    string(out, hostile ? evil[i % N_EVIL] : "not a number, not drawn");
    if (hostile) {
        putc(',', out);
        string(out, evil[i % 8]);
        fprintf(out, ": %d, \"huge\": %s, \"__proto__\": 3", i, i % 2 ? "1e308" : "-1e308");
    }
    fputs("}\n", out);
}

static void write_evaluation(FILE *out, int i, int n, bool hostile) {
    static const char *const gist[] = {"A story about the sea.", "A maritime story in plain prose, past tense.",
                                       "A maritime story in plain prose: a lone keeper, a daily log, a lamp.",
                                       "A restrained maritime story: a lone keeper, a daily log, a lamp that must not go out."};
    double t = (double)i / n, fve = 0.02 + 0.55 * t;
    fprintf(out, "{\"step\": %d, \"eval\": {\"rows\": 256, \"fve\": %.4f, \"low\": %.4f, \"high\": %.4f, \"fve_permuted\": %.4f, "
            "\"loss\": %.4f, \"loss_permuted\": %.4f, \"failed\": %.4f, \"tokens_mean\": %.1f}, \"samples\": [", i, fve, fve - 0.03,
            fve + 0.03, 0.01 + 0.02 * noise(i, 5), 1.62 + 2.6 * exp(-6 * t), 1.85 + 2.3 * exp(-6 * t), 0.2 * exp(-8 * t), 89 + 19 * t);
    for (int row = 0; row < 4; row++) {
        const char *stage = gist[(int)(3.99 * t)];
        char *text = xprintf("%s\n\nThe phrase \"%s%s\" is close; %s.", stage, prose[30 + row], prose[31 + row],
                             t < 0.5 ? "a noun should follow" : "what follows should name the next thing the crew saw");
        char *prefix = xprintf("%s It is said that the lighthouse keeper wrote the same line every night: \"Lamp lit, sea calm.\" On the "
                               "fourth of March the handwriting changed. Nobody noticed until the supply boat came, two weeks late, "
                               "and found the lamp still burning%s", row ? "" : prose[0], row == 1 ? "," : " and");
        fprintf(out, "%s{\"row\": %d, \"fve\": ", row ? ", " : "", 17 * row + 3);
        if (row == 2 && i == 0)
            fputs("null", out);
        else
            fprintf(out, "%.4f", fve + 0.2 * (noise(row, 7) - 0.5) + 0.05 * noise(i, row));
        json_text(out, "explanation", row == 2 && i == 0 ? NULL : hostile ? evil[row + 4 * (i > 0)] : text);
        if (row != 3) json_text(out, "prefix", hostile ? evil[row] : prefix);
        putc('}', out);
        free(text);
        free(prefix);
    }
    fputs("]}\n", out);
}

/* FILE.d/settings.yaml and FILE.d/metrics.jsonl, as `nla train` leaves them when it is killed while writing. */
static int run_page(const char *page, const char *kind, Err *err) {
    bool hostile = !strcmp(kind, "run_hostile"), bare = !strcmp(kind, "run_bare");
    int n = bare ? 2 : !strcmp(kind, "run_large") ? 20000 : 1000;
    char *run = xprintf("%s.d", page), *settings = xprintf("%s/settings.yaml", run), *metrics = xprintf("%s/metrics.jsonl", run);
    mkdir(run, 0777);
    FILE *out = fopen(settings, "w");
    if (!out) return 1;
    fputs("stage: rl\nav: made-up/av\nar: made-up/ar\nlr: 1e-05\nbatch: 64\nsamples: 8\nkl_coef: 0.01\n", out);
    if (hostile) fputs("\"</script><script>window.ran = 4</script>\": \"<img src=x onerror='window.ran = 5'>\"\n", out);
    fclose(out);
    if (!(out = fopen(metrics, "w"))) return 1;
    for (int i = 1; i <= n; i++) {
        if (!bare && (i == 1 || i % (n / 10) == 0)) write_evaluation(out, i == 1 ? 0 : i, n, hostile);
        write_step(out, i, n, hostile);
        if (i == 500) fputs("{\"step\": 400, \"loss\": 99}\n{\"step\": 400, \"loss\": 2.0, \"fve\": 0.3}\n", out); /* resumed */
    }
    fputs("{\"step\": 1001, \"lo", out);
    fclose(out);
    int status = report_run(page, run, err);
    free(run);
    free(settings);
    free(metrics);
    return status;
}

static int json_page(const char *page, const char *kind, Err *err) {
    char *json = NULL;
    size_t len = 0;
    bool eval = !strncmp(kind, "eval", 4);
    FILE *out = open_memstream(&json, &len);
    if (!out) return 1;
    (eval ? write_eval : write_json)(out, kind);
    if (fclose(out)) return 1;
    int status = (eval ? report_eval : report_explain)(page, json, len, err);
    free(json);
    return status;
}

int main(int argc, char **argv) {
    Err err = {0};
    if (argc != 3) return 2;
    int status = (!strncmp(argv[1], "run", 3) ? run_page : json_page)(argv[2], argv[1], &err);
    if (status) fprintf(stderr, "%s\n", err.msg);
    return status ? 1 : 0;
}
