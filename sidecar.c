/* sidecar.c - nla_meta.yaml: what an AV, an AR or a dataset says about itself, checked against the live tokenizer.
 *
 * Wrong ids here do not crash anything; they make explanations vague or about a CJK character, and cost a day. So every
 * id is computed anew from the templates with the tokenizer at hand and compared before work starts.
 */
#include "nla.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include <stb/stb_ds.h>

static const char INJECTION[] = "{injection_char}", EXPLANATION[] = "{explanation}";

/* Our own templates. The AV's puts the marker as late as the text allows: everything before it is computed once for all
 * vectors. The AR's ends in words that never change: the value is read at their last token. */
const char default_av_template[] =
    "A language model was reading a text. At one token its inner state was taken out: a single vector, which stands at the "
    "end of this message as one mark between tags.\n"
    "Say in plain words what that state held. Two or three short paragraphs, a blank line between them, one feature each: "
    "first what matters most for the tokens that come next, such as the topic, the kind of text, who speaks, what has been "
    "promised; last the token just read, its part in the sentence, and what must follow it. No lists, no headings.\n"
    "Write between <explanation> and </explanation>, and nothing else.\n\n"
    "<concept>{injection_char}</concept>";
const char default_ar_template[] = "What a language model's inner state held at one token of a text, in words:\n"
                                   "<explanation>\n{explanation}\n</explanation>\n"
                                   "The state itself, as a vector: <vector>";

/* ------------------------------------------------------------------------------------------------ reading */

static bool is_null(const Yaml *node) {
    return node->kind == YAML_SCALAR && !node->quoted &&
           (!*node->text || strcmp(node->text, "null") == 0 || strcmp(node->text, "~") == 0 || strcmp(node->text, "Null") == 0);
}

/* The first of the keys that is there: the newer name, then older ones. */
static const Yaml *first_of(const Yaml *map, const char *a, const char *b, const char *c) {
    const Yaml *node = yaml_get(map, a);
    node = node || !b ? node : yaml_get(map, b);
    return node || !c ? node : yaml_get(map, c);
}

static int bad_key(const Sidecar *s, const char *key, const char *why, Err *err) {
    return fail(err, "%s: %s %s", s->path, key, why);
}

static int read_id(const Sidecar *s, const char *key, int *id, Err *err) {
    const Yaml *node = yaml_get(s->yaml, key);
    int64_t value;
    *id = -1;
    if (!node || is_null(node)) {
        return 0;
    }
    if (!yaml_int(node, &value) || value < 0 || value >= 1 << 24) {
        return bad_key(s, key, "is not a token id", err);
    }
    *id = (int)value;
    return 0;
}

/* A number, null (raw: 0) or sqrt_d_model. */
static int read_scale(const Sidecar *s, const char *key, bool *given, float *scale, Err *err) {
    const Yaml *node = yaml_get(s->yaml, key);
    double value;
    *given = node != NULL;
    if (!node) {
        return 0;
    }
    if (is_null(node)) {
        *scale = 0;
    } else if (node->kind == YAML_SCALAR && strcmp(node->text, "sqrt_d_model") == 0) {
        *scale = sqrtf((float)s->d_model);
    } else if (yaml_double(node, &value) && value > 0 && value < 1e30) {
        *scale = (float)value;
    } else {
        return bad_key(s, key, "is not a positive number, null (inject raw) or sqrt_d_model", err);
    }
    return 0;
}

static int read_template(const Sidecar *s, const Yaml *node, const char *key, const char *hole, const char **text, Err *err) {
    if (!node || is_null(node)) {
        return 0;
    }
    const char *first = node->kind == YAML_SCALAR ? strstr(node->text, hole) : NULL;
    if (!first || strstr(first + 1, hole)) {
        return fail(err, "%s: %s must hold %s exactly once", s->path, key, hole);
    }
    *text = node->text;
    return 0;
}

static int read_suffix(Sidecar *s, Err *err) {
    const Yaml *list = yaml_get(s->yaml, "tokens.critic_suffix_ids");
    if (!list || is_null(list)) {
        return 0;
    }
    for (int i = 0; list->kind == YAML_LIST && i < (int)arrlen(list->item); i++) {
        int64_t id;
        if (!yaml_int(list->item[i], &id) || id < 0 || id >= 1 << 24) {
            return bad_key(s, "tokens.critic_suffix_ids", "holds something that is not a token id", err);
        }
        arrput(s->suffix_ids, (int)id);
    }
    return arrlen(s->suffix_ids) ? 0 : bad_key(s, "tokens.critic_suffix_ids", "is not a list of token ids", err);
}

static int read_role(Sidecar *s, Err *err) {
    const Yaml *kind = yaml_get(s->yaml, "kind"), *role = yaml_get(s->yaml, "role");
    if (!kind || kind->kind != YAML_SCALAR || (strcmp(kind->text, "nla_model") != 0 && strcmp(kind->text, "nla_dataset") != 0)) {
        return bad_key(s, "kind", "is neither nla_model nor nla_dataset", err);
    }
    s->dataset = strcmp(kind->text, "nla_dataset") == 0;
    const char *name = role && role->kind == YAML_SCALAR ? role->text : "";
    s->av = strcmp(name, "av") == 0 || strcmp(name, "actor") == 0;
    s->ar = strcmp(name, "ar") == 0 || strcmp(name, "critic") == 0;
    return s->dataset || s->av || s->ar ? 0 : bad_key(s, "role", "is neither av (actor) nor ar (critic)", err);
}

static int read_fields(Sidecar *s, Err *err) {
    const Yaml *width = first_of(s->yaml, "d_model", "extraction.d_model", NULL), *mark = yaml_get(s->yaml, "tokens.injection_char");
    const Yaml *layer = first_of(s->yaml, "ar.extraction_layer_index", "critic.extraction_layer_index", "critic.num_hidden_layers");
    int64_t value;
    layer = layer ? layer : yaml_get(s->yaml, "extraction.layer_index");
    if (!width || !yaml_int(width, &value) || value < 1 || value > 1 << 16) {
        return bad_key(s, "d_model", width ? "is not a width" : "is missing", err);
    }
    s->d_model = (int)value;
    s->layer = -1;
    if (layer && !is_null(layer)) {
        if (!yaml_int(layer, &value) || value < 0 || value > 1024) {
            return bad_key(s, "the extraction layer", "is not a layer index", err);
        }
        s->layer = (int)value;
    }
    if (mark && mark->kind == YAML_SCALAR && !is_null(mark)) {
        s->marker = mark->text;
    }
    bool given;
    s->mse_scale = sqrtf((float)s->d_model);
    if (read_scale(s, "extraction.injection_scale", &s->has_injection_scale, &s->injection_scale, err) != 0 ||
        read_scale(s, "extraction.mse_scale", &given, &s->mse_scale, err) != 0 ||
        read_id(s, "tokens.injection_token_id", &s->marker_id, err) != 0 ||
        read_id(s, "tokens.injection_left_neighbor_id", &s->left_id, err) != 0 ||
        read_id(s, "tokens.injection_right_neighbor_id", &s->right_id, err) != 0 || read_suffix(s, err) != 0) {
        return -1;
    }
    s->mse_scale = s->mse_scale > 0 ? s->mse_scale : sqrtf((float)s->d_model);
    return read_template(s, first_of(s->yaml, "prompt_templates.av", "prompt_templates.actor", NULL), "prompt_templates.av", INJECTION,
                         &s->av_template, err) != 0 ||
                   read_template(s, first_of(s->yaml, "prompt_templates.ar", "prompt_templates.critic", NULL),
                                 "prompt_templates.ar", EXPLANATION, &s->ar_template, err) != 0
               ? -1
               : 0;
}

int sidecar_load(Sidecar *s, const char *path, Err *err) {
    struct stat st;
    *s = (Sidecar){0};
    s->path = stat(path, &st) == 0 && S_ISDIR(st.st_mode) ? xprintf("%s/nla_meta.yaml", path) : xstrdup(path);
    s->yaml = yaml_load(s->path, err);
    if (!s->yaml || read_role(s, err) != 0 || read_fields(s, err) != 0) {
        sidecar_free(s);
        return -1;
    }
    return 0;
}

void sidecar_free(Sidecar *s) {
    if (s->yaml) {
        yaml_free(s->yaml);
    }
    free(s->path);
    arrfree(s->suffix_ids);
    *s = (Sidecar){0};
}

/* ------------------------------------------------------------------------------------------------ templates to ids */

/* template with its hole filled. */
static char *fill(const char *template, const char *hole, const char *text, size_t len) {
    const char *at = strstr(template, hole);
    size_t before = (size_t)(at - template), after = strlen(at + strlen(hole));
    char *out = xmalloc(before + len + after + 1);
    memcpy(out, template, before);
    memcpy(out + before, text, len);
    memcpy(out + before + len, at + strlen(hole), after + 1);
    return out;
}

/* The AV template as one user message through the chat template, with the generation prompt. */
static int prompt_ids_of(const char *template, const char *marker, const Tokenizer *tok, const char *date, int **ids, Err *err) {
    char *text = fill(template, INJECTION, marker, strlen(marker));
    ChatMessage message = {"user", text};
    char *rendered = chat_render(tok, &message, 1, true, date, err);
    int status = rendered ? tokenizer_encode(tok, rendered, strlen(rendered), false, ids, err) : -1;
    free(rendered);
    free(text);
    return status;
}

/* "12 [29 149705 522]", for each place where the marker stands, for the message. */
static char *describe_candidates(const int *ids, int marker) {
    char *list = xstrdup("");
    int left = 5;
    for (int i = 0; i < (int)arrlen(ids) && left; i++) {
        if (ids[i] == marker) {
            char *more = xprintf("%s%sposition %d [%d %d %d]", list, *list ? ", " : "", i, i > 0 ? ids[i - 1] : -1, ids[i],
                                 i + 1 < (int)arrlen(ids) ? ids[i + 1] : -1);
            free(list);
            list = more;
            left--;
        }
    }
    return list;
}

int sidecar_prompt(const Sidecar *s, const Tokenizer *tok, const char *date, int **ids, int *marker_at, Err *err) {
    int matches = 0;
    if (!s->av_template || !s->marker || s->marker_id < 0 || s->left_id < 0 || s->right_id < 0) {
        return fail(err, "%s: an AV needs %s", s->path,
                    !s->av_template ? "prompt_templates.av"
                    : !s->marker    ? "tokens.injection_char"
                                    : "tokens.injection_token_id, injection_left_neighbor_id and injection_right_neighbor_id");
    }
    if (prompt_ids_of(s->av_template, s->marker, tok, date, ids, err) != 0) {
        return -1;
    }
    const int *x = *ids;
    for (int i = 1; i + 1 < (int)arrlen(x); i++) {
        if (x[i] == s->marker_id && x[i - 1] == s->left_id && x[i + 1] == s->right_id) {
            *marker_at = i;
            matches++;
        }
    }
    if (matches == 1) {
        return 0;
    }
    char *candidates = describe_candidates(x, s->marker_id);
    fail(err, "%s: the AV prompt holds the marker %d between %d and %d %d times, not once; it stands at: %s (%s)", s->path,
         s->marker_id, s->left_id, s->right_id, matches, *candidates ? candidates : "nowhere",
         !*candidates  ? "another tokenizer, or another marker character"
         : matches > 1 ? "the template holds the marker more than once"
                       : "the template drifted from the one these ids were taken from");
    free(candidates);
    return -1;
}

int sidecar_text_ids(const Sidecar *s, const Tokenizer *tok, const char *text, size_t len, int **ids, Err *err) {
    if (!s->ar_template) {
        return fail(err, "%s: an AR needs prompt_templates.ar", s->path);
    }
    char *filled = fill(s->ar_template, EXPLANATION, text, len);
    int start = (int)arrlen(*ids), status = tokenizer_encode(tok, filled, strlen(filled), true, ids, err);
    free(filled);
    const int *x = *ids;
    int n = (int)arrlen(x), m = (int)arrlen(s->suffix_ids);
    if (status == 0 && m > 0 && (n - start < m || memcmp(x + n - m, s->suffix_ids, (size_t)m * sizeof(int)) != 0)) {
        char have[128] = "", want[128] = "";
        for (int i = 0; x && i < m && i < 12; i++) {
            size_t h = strlen(have), w = strlen(want);
            snprintf(have + h, sizeof have - h, " %d", n - m + i >= start ? x[n - m + i] : -1);
            snprintf(want + w, sizeof want - w, " %d", s->suffix_ids[i]);
        }
        status = fail(err, "%s: the AR prompt ends in the ids%s, critic_suffix_ids says%s (another tokenizer, or the template drifted)",
                      s->path, have, want);
    }
    return status;
}

int sidecar_check(const Sidecar *s, const Tokenizer *tok, const Config *config, const char *dir, Err *err) {
    if (s->d_model != config->hidden_size) {
        return fail(err, "%s: d_model is %d, the model in %s has width %d", s->path, s->d_model, dir, config->hidden_size);
    }
    if (s->marker && s->marker_id >= 0) {
        int *ids = NULL, status = tokenizer_encode(tok, s->marker, strlen(s->marker), false, &ids, err);
        if (status == 0 && (arrlen(ids) != 1 || ids[0] != s->marker_id)) {
            status = fail(err, "%s: injection_char '%s' is token %d of %d in this tokenizer, injection_token_id says %d alone", s->path,
                          s->marker, arrlen(ids) ? ids[0] : -1, (int)arrlen(ids), s->marker_id);
        }
        arrfree(ids);
        if (status != 0) {
            return -1;
        }
    }
    int *ids = NULL, at, status = 0;
    if (s->av) {
        status = sidecar_prompt(s, tok, NULL, &ids, &at, err);
    } else if (s->ar) {
        status = sidecar_text_ids(s, tok, "A text about rivers.", 20, &ids, err);
        if (status == 0 && s->layer >= 0 && config->n_layers != s->layer + 1) {
            status = fail(err, "%s: the extraction layer is %d, so the AR has %d blocks; config.json in %s says num_hidden_layers %d",
                          s->path, s->layer, s->layer + 1, dir, config->n_layers);
        }
    }
    arrfree(ids);
    return status;
}

/* ------------------------------------------------------------------------------------------------ making one */

/* True when `text` is one token by itself and stands alone, between stable neighbours, in the AV prompt. */
static bool is_marker(const Tokenizer *tok, const char *av_template, const char *text) {
    Err ignored = {0};
    int *alone = NULL, *prompt = NULL, found = 0;
    bool good = tokenizer_encode(tok, text, strlen(text), false, &alone, &ignored) == 0 && arrlen(alone) == 1;
    if (good && prompt_ids_of(av_template, text, tok, NULL, &prompt, &ignored) == 0) {
        for (int i = 0; i < (int)arrlen(prompt); i++) {
            found += prompt[i] == alone[0];
        }
    }
    arrfree(alone);
    arrfree(prompt);
    return good && found == 1;
}

static char *utf8_of(int c) {
    return c < 0x800    ? xprintf("%c%c", 0xc0 | c >> 6, 0x80 | (c & 63))
           : c < 0x10000 ? xprintf("%c%c%c", 0xe0 | c >> 12, 0x80 | (c >> 6 & 63), 0x80 | (c & 63))
                         : xprintf("%c%c%c%c", 0xf0 | c >> 18, 0x80 | (c >> 12 & 63), 0x80 | (c >> 6 & 63), 0x80 | (c & 63));
}

char *marker_choose(const Tokenizer *tok, const char *av_template) {
    for (int c = 0x3200; c <= 0x33ff; c++) {
        char *text = utf8_of(c);
        if (is_marker(tok, av_template, text)) {
            return text;
        }
        free(text);
    }
    /* Else the rarest single-token character outside Latin, Greek and Cyrillic: merges are learned by frequency, so the
     * highest id. */
    char *best = NULL;
    int best_id = -1;
    for (int c = 0x530; c <= 0xffef; c = c == 0xd7ff ? 0xe000 : c + 1) {
        char *text = utf8_of(c);
        int *ids = NULL;
        Err ignored = {0};
        bool rarer = tokenizer_encode(tok, text, strlen(text), false, &ids, &ignored) == 0 && arrlen(ids) == 1 && ids[0] > best_id;
        if (rarer && is_marker(tok, av_template, text)) {
            free(best);
            best = text;
            best_id = ids[0];
        } else {
            free(text);
        }
        arrfree(ids);
    }
    return best;
}

/* The ids that end every filled AR template. The first is left out: it can merge with the explanation's last character. */
static int suffix_of(const char *template, const Tokenizer *tok, int **suffix, Err *err) {
    static const char *const samples[] = {"A text about rivers.", "x", "\"quoted\"", "the word (river)", "ends in 7"};
    int *first = NULL, same = 1 << 20;
    for (size_t i = 0; i < sizeof samples / sizeof *samples; i++) {
        int *ids = NULL, n = 0;
        char *filled = fill(template, EXPLANATION, samples[i], strlen(samples[i]));
        int status = tokenizer_encode(tok, filled, strlen(filled), true, &ids, err);
        free(filled);
        if (status != 0) {
            arrfree(first);
            return -1;
        }
        while (first && n < (int)arrlen(ids) && n < (int)arrlen(first) &&
               ids[arrlen(ids) - 1 - n] == first[arrlen(first) - 1 - n]) {
            n++;
        }
        same = first && n < same ? n : same;
        if (first) {
            arrfree(ids);
        } else {
            first = ids;
        }
    }
    for (int i = same - 1; i > 0; i--) {
        arrput(*suffix, first[arrlen(first) - i]);
    }
    arrfree(first);
    return arrlen(*suffix) ? 0 : fail(err, "the AR template has no fixed end: put words after {explanation}");
}

int sidecar_make(Yaml **out, bool ar, const Tokenizer *tok, const Config *config, const char *base, int layer,
                 float injection_scale, Err *err) {
    char *marker = marker_choose(tok, default_av_template);
    if (!marker) {
        return fail(err, "%s: no character is one rare token by itself, so there is none to mark the vector's place", base);
    }
    Yaml *y = yaml_new(YAML_MAP);
    yaml_set(y, "kind", "nla_model", false);
    yaml_set(y, "schema_version", "1", false);
    yaml_set(y, "role", ar ? "ar" : "av", false);
    yaml_set(y, "stage", "init", false);
    yaml_set(y, "base_checkpoint", base, true);
    yaml_set_number(y, "d_model", config->hidden_size);
    if (injection_scale > 0) {
        yaml_set_number(y, "extraction.injection_scale", (double)injection_scale);
    } else {
        yaml_set(y, "extraction.injection_scale", "null", false);
    }
    yaml_set(y, "extraction.mse_scale", "sqrt_d_model", false);
    yaml_set_number(y, "ar.extraction_layer_index", layer);
    int *alone = NULL, *prompt = NULL, *suffix = NULL;
    int status = tokenizer_encode(tok, marker, strlen(marker), false, &alone, err);
    if (status == 0) {
        status = prompt_ids_of(default_av_template, marker, tok, NULL, &prompt, err);
    }
    if (status == 0) {
        status = suffix_of(default_ar_template, tok, &suffix, err);
    }
    if (status == 0) {
        int at = 0;
        while (prompt[at] != alone[0]) {
            at++;
        }
        yaml_set(y, "tokens.injection_char", marker, true);
        yaml_set_number(y, "tokens.injection_token_id", alone[0]);
        yaml_set_number(y, "tokens.injection_left_neighbor_id", prompt[at - 1]);
        yaml_set_number(y, "tokens.injection_right_neighbor_id", prompt[at + 1]);
        yaml_set(y, "tokens.critic_suffix_ids", "", false);
        Yaml *list = yaml_get(y, "tokens.critic_suffix_ids");
        list->kind = YAML_LIST;
        free(list->text);
        list->text = NULL;
        for (int i = 0; i < (int)arrlen(suffix); i++) {
            Yaml *item = yaml_new(YAML_SCALAR);
            free(item->text);
            item->text = xprintf("%d", suffix[i]);
            arrput(list->item, item);
        }
        yaml_set(y, "prompt_templates.av", default_av_template, true);
        yaml_set(y, "prompt_templates.ar", default_ar_template, true);
        yaml_set(y, "created_by", "nla init", false);
    }
    arrfree(alone);
    arrfree(prompt);
    arrfree(suffix);
    free(marker);
    if (status != 0) {
        yaml_free(y);
        return -1;
    }
    *out = y;
    return 0;
}
