/* report_page.c - writes pages for tests/report_test.sh and the README, from made-up data: report_page KIND FILE.
 *   sample  80 tokens of prose at three layers, every value invented (no model was run)
 *   hostile the same, with tokens and explanations that try to break out of the page or out of their line
 *   large   2,000 tokens at three layers
 *   bare    one layer, no scores */
#define _GNU_SOURCE
#include "../nla.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

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

int main(int argc, char **argv) {
    Err err = {0};
    char *json = NULL;
    size_t len = 0;
    if (argc != 3) return 2;
    FILE *out = open_memstream(&json, &len);
    if (!out) return 1;
    write_json(out, argv[1]);
    if (fclose(out)) return 1;
    int status = report_explain(argv[2], json, len, &err);
    if (status) fprintf(stderr, "%s\n", err.msg);
    free(json);
    return status ? 1 : 0;
}
