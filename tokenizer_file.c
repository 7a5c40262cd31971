/* tokenizer_file.c - reads tokenizer.json, tokenizer_config.json and chat_template.jinja into a Tokenizer.
 *
 * tokenizer.json is taken as data: the steps of its normaliser, pre-tokeniser, post-processor and decoder become the
 * lists and flags of struct Tokenizer (tokenizer.h), its vocabulary and merges hash tables. What a file asks for beyond
 * what tokenizer.c does (WordPiece, Unigram, Metaspace, dropout, ...) is refused by name, never guessed at; so is a
 * regular expression that may mean one thing to Oniguruma, which `tokenizers` runs, and another to PCRE2.
 */
#define _GNU_SOURCE /* memmem */
#include "tokenizer.h"

#include <ctype.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <stb/stb_ds.h>
#include <utf8proc.h>

enum {
    MAX_ID = 1 << 24,       /* ids above it are taken for a broken file: tables are indexed by id */
    MAX_ADDED_BYTES = 4096, /* longest added token: cutting them out takes text x this at worst */
    MAX_STEPS = 16,         /* normalisers, pre-tokenisers, decoders in a Sequence */
    MAX_PATTERN = 16384,    /* bytes of a regular expression */
};

/* Each Behavior as the file writes it. */
static const char *const behavior_name[] = {"Isolated", "Removed", "Contiguous", "MergedWithPrevious",
                                            "MergedWithNext"};

/* ------------------------------------------------------------------------------------------------ loading: tokens */

typedef struct {
    Tokenizer *tok;
    Json json;
    const char *file;
    Err *err;
    char *arena_end;
    int joined_id;      /* what the merge before makes */
    int steps;          /* of the Sequence at hand */
    bool decode_bytes;  /* the decoder is ByteLevel */
    bool joined;        /* the decoder has joined its tokens (ByteFallback, Fuse) */
    Normalize *replace; /* stb: the decoder's Replace steps */
    char *scratch;      /* stb */
} Loader;

static int refuse(const Loader *l, const char *field, const char *why) {
    return fail(l->err, "%s: %s: %s", l->file, field, why);
}

static bool absent(const Loader *l, int node) {
    JsonType type = json_type(&l->json, node);
    return type == JSON_NONE || type == JSON_NULL;
}

static bool has_type(const Loader *l, int node, const char *type) {
    return json_is(&l->json, json_get(&l->json, node, "type"), type);
}

static int refuse_type(const Loader *l, const char *field, int node) {
    char *type = json_string(&l->json, json_get(&l->json, node, "type"), NULL);
    fail(l->err, "%s: %s: the type \"%.60s\" is not implemented", l->file, field, type ? type : "(none)");
    free(type);
    return -1;
}

/* object[key], which may be absent or null. */
static int read_bool(const Loader *l, const char *field, int object, const char *key, bool otherwise, bool *value) {
    int node = json_get(&l->json, object, key);
    *value = otherwise;
    if (absent(l, node) || json_bool(&l->json, node, value)) return 0;
    return fail(l->err, "%s: %s.%s: must be true or false", l->file, field, key);
}

/* The text of a JSON string: in the file when it holds no escape, else in `own`. text is NULL when it is no string. */
typedef struct {
    const char *text;
    size_t len;
    char *own;
} Text;

static Text read_text(const Loader *l, int node) {
    Text t = {0};
    t.text = json_raw(&l->json, node, &t.len);
    if (!t.text) t.text = t.own = json_string(&l->json, node, &t.len);
    return t;
}

static const char *keep(Loader *l, const char *bytes, size_t len) {
    char *kept = l->arena_end;
    if (len) memcpy(kept, bytes, len);
    l->arena_end += len;
    return kept;
}

static int new_token(Loader *l, const char *field, const char *text, size_t len, int id) {
    Tokenizer *tok = l->tok;
    uint32_t hash = token_hash(text, len);
    TokenSlot *slot = token_slot(tok, hash, text, len);
    if (slot->id >= 0)
        return fail(l->err, "%s: %s: the token \"%.*s\" stands twice", l->file, field, (int)(len < 60 ? len : 60),
                    text);
    if (tok->token[id].text) return fail(l->err, "%s: %s: two tokens have the id %d", l->file, field, id);
    *slot = (TokenSlot){hash, id};
    const char *kept = keep(l, text, len);
    tok->token[id] = (Token){.text = kept, .piece = kept, .len = (uint32_t)len, .piece_len = (uint32_t)len};
    if (len > tok->longest) tok->longest = len;
    return 0;
}

static int read_id(Loader *l, const char *field, int node, int *largest) {
    int64_t id;
    if (!json_int(&l->json, node, &id)) return refuse(l, field, "an id is not an integer");
    if (id < 0 || id > MAX_ID)
        return fail(l->err, "%s: %s: the id %lld is not in 0..%d", l->file, field, (long long)id, MAX_ID);
    if ((int)id > *largest) *largest = (int)id;
    return 0;
}

static size_t slots_for(size_t entries) {
    size_t slots = 16;
    while (slots < entries + entries / 2) slots *= 2;
    return slots;
}

/* Finds the largest id and makes the tables of that size. */
static int make_tables(Loader *l, int vocab, int added) {
    Tokenizer *tok = l->tok;
    int largest = -1;
    for (int k = json_first(&l->json, vocab); k >= 0; k = json_next(&l->json, k))
        if (read_id(l, "model.vocab", k + 1, &largest)) return -1;
    for (int a = json_first(&l->json, added); a >= 0; a = json_next(&l->json, a))
        if (read_id(l, "added_tokens.id", json_get(&l->json, a, "id"), &largest)) return -1;
    tok->n_ids = largest + 1;
    size_t slots = slots_for((size_t)json_size(&l->json, vocab) + (size_t)json_size(&l->json, added));
    tok->token = xcalloc((size_t)tok->n_ids + 1, sizeof *tok->token);
    tok->slot = xmalloc(slots * sizeof *tok->slot);
    memset(tok->slot, 0xFF, slots * sizeof *tok->slot);
    tok->slot_mask = slots - 1;
    /* each token's text and piece, not longer than in the file; the normalised texts and pieces of added tokens */
    size_t normalized = 2 * (size_t)MAX_ADDED_BYTES * (size_t)json_size(&l->json, added);
    tok->arena = l->arena_end = xmalloc(2 * l->json.len + normalized);
    return 0;
}

static int read_vocab(Loader *l, int vocab) {
    for (int k = json_first(&l->json, vocab); k >= 0; k = json_next(&l->json, k)) {
        int64_t id;
        json_int(&l->json, k + 1, &id);
        Text key = read_text(l, k);
        int rc = new_token(l, "model.vocab", key.text, key.len, (int)id);
        free(key.own);
        if (rc) return -1;
        l->tok->token[id].in_model = true;
    }
    return 0;
}

/* The byte alphabet: printable Latin-1 stands for itself, the other bytes for U+0100 on. */
static void byte_alphabet(int alphabet[256]) {
    for (int byte = 0, next = 0x100; byte < 256; byte++) {
        bool printable = (byte > 0x20 && byte < 0x7F) || (byte > 0xA0 && byte != 0xAD);
        alphabet[byte] = printable ? byte : next++;
    }
}

/* Which tokens the characters, the bytes and the "▁" are. */
static void index_characters(Tokenizer *tok) {
    int alphabet[256], cp;
    byte_alphabet(alphabet);
    for (int byte = 0; byte < 256; byte++) {
        char name[8];
        utf8proc_encode_char(alphabet[byte], (utf8proc_uint8_t *)tok->byte_char[byte]);
        tok->byte_id[byte] = find_in_model(tok, tok->byte_char[byte], strlen(tok->byte_char[byte]));
        tok->fallback_id[byte] = find_in_model(tok, name, (size_t)snprintf(name, sizeof name, "<0x%02X>", byte));
    }
    if (tok->byte_level) return;
    tok->mark_id = find_in_model(tok, "▁", strlen("▁"));
    tok->char_id = xcalloc(0x110000, sizeof *tok->char_id);
    for (int id = 0; id < tok->n_ids; id++) {
        const Token *token = &tok->token[id];
        if (!token->in_model || token->len == 0 || token->len > 4) continue;
        if (read_char(token->text, token->len, &cp) == token->len) tok->char_id[cp] = id + 1;
    }
}

/* ------------------------------------------------------------------------------------------------ loading: merges */

typedef struct {
    Text left, right;
    uint32_t left_hash, right_hash;
} Merge;

/* Splits an entry, "a b" or ["a", "b"]; free_merge in either case. */
static int read_merge(const Loader *l, int node, Merge *merge) {
    *merge = (Merge){0};
    if (json_type(&l->json, node) == JSON_ARRAY && json_size(&l->json, node) == 2) {
        int first = json_first(&l->json, node);
        merge->left = read_text(l, first);
        merge->right = read_text(l, json_next(&l->json, first));
    } else {
        Text *left = &merge->left;
        *left = read_text(l, node);
        const char *space = left->text ? memchr(left->text, ' ', left->len) : NULL;
        if (space) {
            size_t n = (size_t)(space - left->text);
            merge->right = (Text){space + 1, left->len - n - 1, NULL};
            left->len = n;
        }
        if (space && memchr(merge->right.text, ' ', merge->right.len)) merge->right.text = NULL;
    }
    if (!merge->left.text || !merge->right.text)
        return refuse(l, "model.merges", "an entry is neither \"a b\" nor [\"a\", \"b\"]");
    merge->left_hash = token_hash(merge->left.text, merge->left.len);
    merge->right_hash = token_hash(merge->right.text, merge->right.len);
    return 0;
}

static void free_merge(Merge *merge) {
    free(merge->left.own);
    free(merge->right.own);
}

static int refuse_merge(const Loader *l, int rank, const char *text, size_t len) {
    return fail(l->err, "%s: model.merges[%d]: \"%.*s\" is not in model.vocab", l->file, rank,
                (int)(len < 60 ? len : 60), text);
}

/* The model's token with this text, or -1. In real files it is nearly always that of the merge before or the next one,
 * which spares a search through memory that is not in the cache. */
static int find_joined(const Loader *l, const char *text, size_t len) {
    for (int id = l->joined_id; id <= l->joined_id + 1; id++) {
        const Token *token = token_of(l->tok, id);
        if (token && token->in_model && token->len == len && !memcmp(token->text, text, len)) return id;
    }
    return find_in_model(l->tok, text, len);
}

static int add_merge(Loader *l, const Merge *merge, int rank) {
    Tokenizer *tok = l->tok;
    Text left = merge->left, right = merge->right;
    int left_id = token_slot(tok, merge->left_hash, left.text, left.len)->id;
    if (left_id < 0 || !tok->token[left_id].in_model) return refuse_merge(l, rank, left.text, left.len);
    int right_id = token_slot(tok, merge->right_hash, right.text, right.len)->id;
    if (right_id < 0 || !tok->token[right_id].in_model) return refuse_merge(l, rank, right.text, right.len);
    arrsetlen(l->scratch, 0);
    append(&l->scratch, left.text, left.len);
    append(&l->scratch, right.text, right.len);
    int id = find_joined(l, l->scratch, arrlenu(l->scratch));
    if (id < 0) return refuse_merge(l, rank, l->scratch, arrlenu(l->scratch));
    l->joined_id = id;

    MergeSlot *slot =
        merge_slot(tok, left_id, right_id); /* a pair that stands twice has its later rank, as HF has it */
    *slot = (MergeSlot){(uint64_t)left_id << 32 | (uint64_t)right_id, (uint64_t)rank << 32 | (uint64_t)id};
    if (!tok->byte_level && left.len && right.len >= 3 && !memcmp(right.text, "▁", 3)) {
        size_t last = char_before(left.text, left.len);
        int before = find_in_model(tok, left.text + last, left.len - last);
        if (before >= 0) tok->token[before].before_mark = true;
    }
    return 0;
}

/* Half a million merges look up tokens all over memory: a batch of them asks for the cache lines before it needs them. */
static int add_batch(Loader *l, Merge *batch, int n, int first_rank) {
    Tokenizer *tok = l->tok;
    int rc = 0;
    for (int i = 0; i < n; i++) {
        int left = tok->slot[batch[i].left_hash & tok->slot_mask].id;
        int right = tok->slot[batch[i].right_hash & tok->slot_mask].id;
        if (left >= 0) __builtin_prefetch(&tok->token[left]);
        if (right >= 0) __builtin_prefetch(&tok->token[right]);
    }
    for (int i = 0; i < n && !rc; i++) rc = add_merge(l, &batch[i], first_rank + i);
    for (int i = 0; i < n; i++) free_merge(&batch[i]);
    return rc;
}

static int read_merges(Loader *l, int merges) {
    Tokenizer *tok = l->tok;
    size_t slots = slots_for((size_t)json_size(&l->json, merges));
    tok->merge = xmalloc(slots * sizeof(MergeSlot));
    memset(tok->merge, 0xFF, slots * sizeof(MergeSlot)); /* NO_MERGE everywhere */
    tok->merge_mask = slots - 1;
    Merge batch[32];
    int n = 0, rank = 0, rc = 0;
    for (int m = json_first(&l->json, merges); m >= 0 && !rc; m = json_next(&l->json, m)) {
        rc = read_merge(l, m, &batch[n++]);
        __builtin_prefetch(&tok->slot[batch[n - 1].left_hash & tok->slot_mask]);
        __builtin_prefetch(&tok->slot[batch[n - 1].right_hash & tok->slot_mask]);
        if (rc || n < LENGTH(batch)) continue;
        rc = add_batch(l, batch, n, rank);
        rank += n;
        n = 0;
    }
    if (!rc) return add_batch(l, batch, n, rank);
    for (int i = 0; i < n; i++) free_merge(&batch[i]);
    return -1;
}

static int refuse_unless_empty(const Loader *l, int model, const char *key) {
    int node = json_get(&l->json, model, key);
    if (absent(l, node) || json_is(&l->json, node, "")) return 0;
    return fail(l->err, "%s: model.%s: is not implemented", l->file, key);
}

static int read_model(Loader *l, int model) {
    Tokenizer *tok = l->tok;
    if (refuse_unless_empty(l, model, "dropout") || refuse_unless_empty(l, model, "continuing_subword_prefix") ||
        refuse_unless_empty(l, model, "end_of_word_suffix") ||
        read_bool(l, "model", model, "byte_fallback", false, &tok->byte_fallback) ||
        read_bool(l, "model", model, "fuse_unk", false, &tok->fuse_unk) ||
        read_bool(l, "model", model, "ignore_merges", false, &tok->ignore_merges))
        return -1;
    int merges = json_get(&l->json, model, "merges"), unk = json_get(&l->json, model, "unk_token");
    if (json_type(&l->json, merges) != JSON_ARRAY) return refuse(l, "model.merges", "must be an array");
    index_characters(tok);
    if (!absent(l, unk)) {
        Text text = read_text(l, unk);
        if (text.text) tok->unk_id = find_in_model(tok, text.text, text.len);
        free(text.own);
        if (tok->unk_id < 0) return refuse(l, "model.unk_token", "is not in model.vocab");
    }
    return read_merges(l, merges);
}

/* ------------------------------------------------------------------------------------------------ loading: patterns */

/* The one caseless group that the families use. It is compared whole: Oniguruma folds case across several characters
 * ("ss" with "ß") where PCRE2 does not, but not in these. */
static const char contractions[] = "(?i:'s|'t|'re|'ve|'m|'ll|'d)";
/* What ByteLevel splits with when use_regex is true. */
static const char gpt2_regex[] = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";

/* Length of the escape at p when it means the same to both engines, else 0. \w, \b and \h do not. */
static size_t known_escape(const char *p) {
    if (!p[1] || (unsigned char)p[1] >= 0x80) return 0;
    if (strchr("sSdDrnt", p[1]) || ispunct((unsigned char)p[1])) return 2;
    if ((p[1] != 'p' && p[1] != 'P') || p[2] != '{' || !p[3] || !strchr("LMNPSZC", p[3])) return 0;
    if (p[4] == '}') return 5;
    return islower((unsigned char)p[4]) && p[5] == '}' ? 6 : 0;
}

static size_t known_group(const char *p) {
    static const char *const known[] = {"(?:", "(?=", "(?!", "(?>", "(?<=", "(?<!"};
    if (!strncmp(p, contractions, sizeof contractions - 1)) return sizeof contractions - 1;
    for (int i = 0; i < LENGTH(known); i++)
        if (!strncmp(p, known[i], strlen(known[i]))) return strlen(known[i]);
    return p[1] == '?' || p[1] == '*' ? 0 : 1;
}

/* Where a pattern may mean one thing to Oniguruma and another to PCRE2; NULL: nowhere. Known are literals, classes,
 * alternatives, groups, lookaround, * + ? {n,m} with their lazy and possessive forms. */
static const char *unknown_syntax(const char *pattern) {
    bool in_class = false;
    for (const char *p = pattern; *p;) {
        size_t n = 1;
        if (*p == '\\')
            n = known_escape(p);
        else if (in_class && (*p == '[' || (p[0] == '&' && p[1] == '&')))
            n = 0;
        else if (!in_class && *p == '(')
            n = known_group(p);
        else if (!in_class && (*p == '^' || *p == '$' || (*p == '{' && p[1] == ',')))
            n = 0;
        else if (!in_class && *p == '}' && (p[1] == '+' || p[1] == '?'))
            n = 0;
        if (!in_class && *p == '[') {
            if (p[1] == '^') n = 2;
            if (p[n] == ']') n = 0;
        }
        if (n == 0) return p;
        if (*p == '[')
            in_class = true;
        else if (*p == ']')
            in_class = false;
        p += n;
    }
    return NULL;
}

static int compile_regex(Loader *l, const char *field, const char *text, Pattern *pattern) {
    size_t len = strlen(text);
    const char *unknown = unknown_syntax(text);
    int code = 0;
    PCRE2_SIZE place = 0;
    if (len > MAX_PATTERN) return refuse(l, field, "the regular expression is too long");
    if (unknown)
        return fail(l->err, "%s: %s: in the regular expression, \"%.20s\" is not implemented", l->file, field, unknown);
    pattern->kind = PATTERN_REGEX;
    const uint32_t options = PCRE2_UTF | PCRE2_UCP | PCRE2_NO_AUTO_CAPTURE;
    pattern->regex = pcre2_compile((PCRE2_SPTR)text, len, options, &code, &place, NULL);
    if (!pattern->regex) {
        PCRE2_UCHAR why[120] = "";
        pcre2_get_error_message(code, why, sizeof why);
        return fail(l->err, "%s: %s: the regular expression: %s at byte %zu", l->file, field, (char *)why, place);
    }
    pattern->compiled = pcre2_jit_compile(pattern->regex, PCRE2_JIT_COMPLETE) == 0;
    return 0;
}

/* {"Regex": text} or {"String": text}; the caller's step owns what is read, also on failure. */
static int read_pattern(Loader *l, const char *field, int node, Pattern *pattern) {
    size_t len = 0;
    char *text = json_string(&l->json, json_get(&l->json, node, "Regex"), &len);
    if (text) {
        int rc = strlen(text) < len ? refuse(l, field, "a NUL in the regular expression")
                                    : compile_regex(l, field, text, pattern);
        free(text);
        return rc;
    }
    pattern->string = json_string(&l->json, json_get(&l->json, node, "String"), &pattern->string_len);
    if (!pattern->string || pattern->string_len == 0)
        return refuse(l, field, "pattern must be {\"Regex\": ...} or {\"String\": ...}, and not empty");
    return 0;
}

static void free_pattern(Pattern *pattern) {
    pcre2_code_free(pattern->regex);
    free(pattern->string);
}

/* ------------------------------------------------------------------------------------------------ loading: the steps */

/* Calls read() for node, or for each member of the Sequence that it is. */
static int read_sequence(Loader *l, const char *field, const char *list, int node,
                         int (*read)(Loader *l, const char *field, int node)) {
    if (absent(l, node)) return 0;
    if (!has_type(l, node, "Sequence"))
        return ++l->steps > MAX_STEPS ? refuse(l, field, "more than 16 steps") : read(l, field, node);
    int items = json_get(&l->json, node, list);
    if (json_type(&l->json, items) != JSON_ARRAY) return refuse(l, field, "a Sequence must have a list");
    for (int i = json_first(&l->json, items); i >= 0; i = json_next(&l->json, i))
        if (read_sequence(l, field, list, i, read)) return -1;
    return 0;
}

static int read_normalizer(Loader *l, const char *field, int node) {
    arrput(l->tok->normalize, (Normalize){0});
    Normalize *step = &arrlast(l->tok->normalize);
    if (has_type(l, node, "NFC")) return 0;
    if (!has_type(l, node, "Replace")) return refuse_type(l, field, node);
    step->kind = NORMALIZE_REPLACE;
    if (read_pattern(l, field, json_get(&l->json, node, "pattern"), &step->pattern)) return -1;
    step->content = json_string(&l->json, json_get(&l->json, node, "content"), &step->content_len);
    return step->content ? 0 : refuse(l, field, "content must be a string");
}

static int read_split(Loader *l, const char *field, int node) {
    Split *split = &arrlast(l->tok->split);
    int behavior = json_get(&l->json, node, "behavior"), b = 0;
    while (b < N_BEHAVIORS && !json_is(&l->json, behavior, behavior_name[b])) b++;
    if (b == N_BEHAVIORS) return refuse(l, field, "an unknown behavior");
    split->behavior = (Behavior)b;
    if (read_bool(l, field, node, "invert", false, &split->invert)) return -1;
    return read_pattern(l, field, json_get(&l->json, node, "pattern"), &split->pattern);
}

/* ByteLevel is the last step: the words after it are bytes. */
static int read_byte_level(Loader *l, const char *field, int node) {
    bool space, regex;
    if (read_bool(l, field, node, "add_prefix_space", true, &space) ||
        read_bool(l, field, node, "use_regex", true, &regex))
        return -1;
    l->tok->byte_level = true;
    if (space) arrput(l->tok->split, (Split){.kind = PREFIX_SPACE});
    if (!regex) return 0;
    arrput(l->tok->split, (Split){.kind = SPLIT});
    return compile_regex(l, field, gpt2_regex, &arrlast(l->tok->split).pattern);
}

static int read_pre_tokenizer(Loader *l, const char *field, int node) {
    if (l->tok->byte_level) return refuse(l, field, "a step after ByteLevel is not implemented");
    if (has_type(l, node, "ByteLevel")) return read_byte_level(l, field, node);
    if (!has_type(l, node, "Split") && !has_type(l, node, "Digits")) return refuse_type(l, field, node);
    arrput(l->tok->split, (Split){.kind = SPLIT});
    if (has_type(l, node, "Split")) return read_split(l, field, node);
    bool individual;
    if (read_bool(l, field, node, "individual_digits", false, &individual)) return -1;
    Split *split = &arrlast(l->tok->split);
    split->pattern.kind = PATTERN_DIGIT;
    split->behavior = individual ? ISOLATED : CONTIGUOUS;
    return 0;
}

/* The ids of one {"SpecialToken": {"id": name}} of a template. */
static int read_template_ids(Loader *l, const char *field, int template, int special, int **ids) {
    int entry = -1;
    char *name = json_string(&l->json, json_get(&l->json, special, "id"), NULL);
    if (name) entry = json_get(&l->json, json_get(&l->json, template, "special_tokens"), name);
    free(name);
    int list = json_get(&l->json, entry, "ids"), largest = 0;
    if (json_type(&l->json, list) != JSON_ARRAY) return refuse(l, field, "a special token without ids");
    for (int i = json_first(&l->json, list); i >= 0; i = json_next(&l->json, i)) {
        int64_t id;
        if (read_id(l, field, i, &largest)) return -1;
        json_int(&l->json, i, &id);
        if (!token_of(l->tok, (int)id)) return refuse(l, field, "an id that no token has");
        arrput(*ids, (int)id);
    }
    return 0;
}

static int read_post_processor(Loader *l, const char *field, int node) {
    Tokenizer *tok = l->tok;
    if (has_type(l, node, "ByteLevel")) return 0; /* moves offsets only */
    if (!has_type(l, node, "TemplateProcessing")) return refuse_type(l, field, node);
    int single = json_get(&l->json, node, "single");
    bool text_seen = false;
    if (json_type(&l->json, single) != JSON_ARRAY) return refuse(l, field, "single must be a list");
    if (arrlen(tok->before) || arrlen(tok->after)) return refuse(l, field, "two templates are not implemented");
    for (int i = json_first(&l->json, single); i >= 0; i = json_next(&l->json, i)) {
        int special = json_get(&l->json, i, "SpecialToken");
        int sequence = json_get(&l->json, json_get(&l->json, i, "Sequence"), "id");
        if (special >= 0) {
            if (read_template_ids(l, field, node, special, text_seen ? &tok->after : &tok->before)) return -1;
        } else if (json_is(&l->json, sequence, "A") && !text_seen) {
            text_seen = true;
        } else {
            return refuse(l, field, "single must hold special tokens and one Sequence A");
        }
    }
    return text_seen ? 0 : refuse(l, field, "single leaves out the text");
}

/* ------------------------------------------------------------------------------------------------ loading: decoder */

static int read_decoder(Loader *l, const char *field, int node) {
    if (l->decode_bytes || (has_type(l, node, "ByteLevel") && l->steps > 1))
        return refuse(l, field, "ByteLevel beside other steps is not implemented");
    if (has_type(l, node, "ByteLevel")) {
        l->decode_bytes = true;
        return 0;
    }
    if (has_type(l, node, "Fuse")) {
        l->joined = true;
        return 0;
    }
    bool fallback = has_type(l, node, "ByteFallback");
    if (!fallback && !has_type(l, node, "Replace")) return refuse_type(l, field, node);
    if (l->joined) return refuse(l, field, "a step after ByteFallback or Fuse is not implemented");
    if (fallback) {
        l->tok->decode_fallback = l->joined = true;
        return 0;
    }
    arrput(l->replace, (Normalize){.kind = NORMALIZE_REPLACE});
    Normalize *step = &arrlast(l->replace);
    if (read_pattern(l, field, json_get(&l->json, node, "pattern"), &step->pattern)) return -1;
    step->content = json_string(&l->json, json_get(&l->json, node, "content"), &step->content_len);
    /* not longer, so that the arena holds every piece */
    if (step->pattern.kind != PATTERN_STRING || !step->content || step->content_len > step->pattern.string_len)
        return refuse(l, field, "Replace is implemented for a string by one that is not longer");
    return 0;
}

/* Reads the text as the byte alphabet into scratch; false when it holds another character. */
static bool spell_bytes(Loader *l, const char *text, size_t len, const short byte_of[0x144]) {
    arrsetlen(l->scratch, 0);
    int cp;
    for (size_t at = 0; at < len;) {
        at += read_char(text + at, len - at, &cp);
        if (cp >= 0x144 || byte_of[cp] < 0) return false;
        arrput(l->scratch, (char)byte_of[cp]);
    }
    return true;
}

static void replace_all(Loader *l, const char *text, size_t len) {
    arrsetlen(l->scratch, 0);
    append(&l->scratch, text, len);
    for (int i = 0; i < arrlen(l->replace); i++) {
        const Normalize *step = &l->replace[i];
        for (size_t at = 0, n; (n = arrlenu(l->scratch)) > at;) {
            char *found = memmem(l->scratch + at, n - at, step->pattern.string, step->pattern.string_len);
            if (!found) break;
            memcpy(found, step->content, step->content_len);
            size_t end = (size_t)(found - l->scratch) + step->pattern.string_len;
            at = (size_t)(found - l->scratch) + step->content_len;
            memmove(l->scratch + at, l->scratch + end, n - end);
            arrsetlen(l->scratch, n - (end - at));
        }
    }
}

/* Makes each token's piece, so far the text that the decoder is given, what it adds to a decoded text. */
static void make_pieces(Loader *l) {
    Tokenizer *tok = l->tok;
    int alphabet[256];
    short byte_of[0x144];
    byte_alphabet(alphabet);
    memset(byte_of, 0xFF, sizeof byte_of);
    for (int byte = 0; byte < 256; byte++) byte_of[alphabet[byte]] = (short)byte;
    for (int id = 0; id < tok->n_ids; id++) {
        Token *token = &tok->token[id];
        if (!token->text) continue;
        const char *text = token->piece;
        size_t len = token->piece_len;
        if (l->decode_bytes && !spell_bytes(l, text, len, byte_of)) continue;
        if (!l->decode_bytes) replace_all(l, text, len);
        size_t n = arrlenu(l->scratch);
        const char *piece = l->scratch;
        token->is_byte = tok->decode_fallback && n == 6 && !memcmp(piece, "<0x", 3) && piece[5] == '>' &&
                         isxdigit((unsigned char)piece[3]) && isxdigit((unsigned char)piece[4]);
        if (token->is_byte) {
            char hex[3] = {piece[3], piece[4], '\0'}, byte = (char)strtol(hex, NULL, 16);
            token->piece = keep(l, &byte, 1);
            token->piece_len = 1;
        } else if (n != len || (n && memcmp(piece, text, n))) {
            token->piece = keep(l, piece, n);
            token->piece_len = (uint32_t)n;
        }
    }
}

/* ------------------------------------------------------------------------------------------------ loading: the file */

static void trie_add(Trie *trie, const char *text, size_t len, int id) {
    if (!trie->node) arrput(trie->node, ((TrieNode){.id = -1}));
    int at = 0;
    for (size_t i = 0; i < len; i++) {
        unsigned char byte = (unsigned char)text[i];
        int next = i == 0 ? trie->first[byte] : trie->node[at].child;
        while (next && trie->node[next].byte != byte) next = trie->node[next].sibling;
        if (!next) {
            next = (int)arrlen(trie->node);
            arrput(trie->node, ((TrieNode){.byte = byte, .id = -1, .sibling = i ? trie->node[at].child : 0}));
            if (i == 0)
                trie->first[byte] = next;
            else
                trie->node[at].child = next;
        }
        at = next;
    }
    trie->node[at].id = id;
}

/* A token with `normalized` is looked for in the normalised text. `tokenizers` also decodes it so, and then does not know
 * it as special when that is another text. */
static int normalize_added_token(Loader *l, int id) {
    Tokenizer *tok = l->tok;
    Token *token = &tok->token[id];
    const char *text = token->text;
    size_t len = token->len;
    char *own = NULL;
    int rc = normalize_text(tok, &text, &len, &own, l->err);
    if (!rc && len > MAX_ADDED_BYTES) rc = refuse(l, "added_tokens", "a normalised content takes more than 4096 bytes");
    if (!rc && (len != token->len || memcmp(text, token->text, len))) {
        token->special = false;
        token->piece = keep(l, text, len);
        token->piece_len = (uint32_t)len;
    }
    if (!rc) trie_add(&tok->added[1], text, len, id);
    arrfree(own);
    return rc;
}

static int read_added_token(Loader *l, int node) {
    Tokenizer *tok = l->tok;
    const char *field = "added_tokens";
    int64_t id;
    bool normalized, special;
    json_int(&l->json, json_get(&l->json, node, "id"), &id);
    Text content = read_text(l, json_get(&l->json, node, "content"));
    Token *token = &tok->token[id];
    int rc = 0;
    if (!content.text || content.len == 0 || content.len > MAX_ADDED_BYTES)
        rc = refuse(l, field, "content must be a string of 1 to 4096 bytes");
    else if (!token->in_model || token->len != content.len || memcmp(token->text, content.text, content.len))
        rc = new_token(l, field, content.text, content.len, (int)id);
    free(content.own);
    if (rc || read_bool(l, field, node, "special", false, &special) ||
        read_bool(l, field, node, "normalized", !special, &normalized) ||
        read_bool(l, field, node, "lstrip", false, &token->lstrip) ||
        read_bool(l, field, node, "rstrip", false, &token->rstrip) ||
        read_bool(l, field, node, "single_word", false, &token->single_word))
        return -1;
    token->special = special;
    if (normalized) return normalize_added_token(l, (int)id);
    trie_add(&tok->added[0], token->text, token->len, (int)id);
    return 0;
}

/* `truncation` and `padding` are passed over: transformers sets both anew for each call. */
static int read_tokenizer(Loader *l) {
    const Json *json = &l->json;
    int model = json_get(json, 0, "model"), vocab = json_get(json, model, "vocab");
    int added = json_get(json, 0, "added_tokens");
    if (json_type(json, model) != JSON_OBJECT) return refuse(l, "model", "must be an object");
    if (!absent(l, json_get(json, model, "type")) && !has_type(l, model, "BPE")) return refuse_type(l, "model", model);
    if (json_type(json, vocab) != JSON_OBJECT) return refuse(l, "model.vocab", "must be an object");
    if (!absent(l, added) && json_type(json, added) != JSON_ARRAY) return refuse(l, "added_tokens", "must be an array");

    if (read_sequence(l, "normalizer", "normalizers", json_get(json, 0, "normalizer"), read_normalizer)) return -1;
    l->steps = 0;
    if (read_sequence(l, "pre_tokenizer", "pretokenizers", json_get(json, 0, "pre_tokenizer"), read_pre_tokenizer))
        return -1;
    if (make_tables(l, vocab, added) || read_vocab(l, vocab) || read_model(l, model)) return -1;
    for (int a = json_first(json, added); a >= 0; a = json_next(json, a))
        if (read_added_token(l, a)) return -1;
    if (read_sequence(l, "post_processor", "processors", json_get(json, 0, "post_processor"), read_post_processor))
        return -1;
    l->steps = 0;
    if (read_sequence(l, "decoder", "decoders", json_get(json, 0, "decoder"), read_decoder)) return -1;
    if (l->steps == 0) return refuse(l, "decoder", "null is not implemented");
    make_pieces(l);
    return 0;
}

/* A regular expression that goes on and on ends in an error, for each place where a match may start. Oniguruma gives up
 * after 10 million steps back (a run of as many spaces, for Qwen's); PCRE2 counts up to two for each. */
static pcre2_match_context *match_limits(void) {
    const uint32_t steps = 30 * 1000 * 1000;
    pcre2_match_context *limits = pcre2_match_context_create(NULL);
    pcre2_set_match_limit(limits, steps);
    pcre2_set_depth_limit(limits, steps);
    pcre2_set_heap_limit(limits, 256 * 1024); /* KiB */
    return limits;
}

static void free_steps(Normalize *step) {
    for (int i = 0; i < arrlen(step); i++) {
        free_pattern(&step[i].pattern);
        free(step[i].content);
    }
    arrfree(step);
}

Tokenizer *tokenizer_parse(const char *json, size_t len, const char *file, Err *err) {
    Loader l = {.file = file, .err = err};
    if (json_parse(&l.json, json, len, file, err)) return NULL;
    l.tok = xcalloc(1, sizeof *l.tok);
    l.tok->unk_id = l.tok->eos = l.tok->mark_id = -1;
    l.tok->limits = match_limits();
    int rc = read_tokenizer(&l);
    free_steps(l.replace);
    arrfree(l.scratch);
    json_free(&l.json);
    if (!rc) return l.tok;
    tokenizer_free(l.tok);
    return NULL;
}

void tokenizer_free(Tokenizer *tok) {
    if (!tok) return;
    free(tok->token);
    free(tok->arena);
    free(tok->slot);
    free(tok->merge);
    free(tok->char_id);
    for (int i = 0; i < 2; i++) arrfree(tok->added[i].node);
    free_steps(tok->normalize);
    for (int i = 0; i < arrlen(tok->split); i++) free_pattern(&tok->split[i].pattern);
    arrfree(tok->split);
    arrfree(tok->before);
    arrfree(tok->after);
    free(tok->bos_text);
    free(tok->chat_template);
    free(tok->config_file);
    pcre2_match_context_free(tok->limits);
    free(tok);
}

/* ------------------------------------------------------------------------------------------------ tokenizer_config */

/* A token of tokenizer_config.json, "text" or {"content": "text"}; NULL when there is none. */
static char *config_token(const Json *json, const char *key) {
    int node = json_get(json, 0, key);
    if (json_type(json, node) == JSON_OBJECT) node = json_get(json, node, "content");
    return json_string(json, node, NULL);
}

/* "text", or [{"name": "default", "template": "text"}, ...]. */
static char *config_template(const Json *json) {
    int node = json_get(json, 0, "chat_template");
    for (int t = json_type(json, node) == JSON_ARRAY ? json_first(json, node) : -1; t >= 0; t = json_next(json, t))
        if (json_is(json, json_get(json, t, "name"), "default")) node = json_get(json, t, "template");
    return json_string(json, node, NULL);
}

static int read_config(Tokenizer *tok, const char *path, Err *err) {
    File file = {0};
    Json json = {0};
    if (file_map(&file, path, err)) return -1;
    int rc = json_parse(&json, file.data, file.len, path, err);
    if (!rc) {
        char *eos = config_token(&json, "eos_token");
        if (eos) tok->eos = tokenizer_id(tok, eos);
        free(eos);
        tok->bos_text = config_token(&json, "bos_token");
        tok->chat_template = config_template(&json);
    }
    json_free(&json);
    file_unmap(&file);
    return rc;
}

/* The template's file of newer checkpoints, which goes before tokenizer_config.json. */
static int read_template(Tokenizer *tok, const char *path, Err *err) {
    File file = {0};
    if (file_map(&file, path, err)) return -1;
    free(tok->chat_template);
    tok->chat_template = xstrndup(file.data, file.len);
    file_unmap(&file);
    return 0;
}

Tokenizer *tokenizer_load(const char *dir, Err *err) {
    char *path = xprintf("%s/tokenizer.json", dir), *config = xprintf("%s/tokenizer_config.json", dir);
    char *template = xprintf("%s/chat_template.jinja", dir);
    File file = {0};
    Tokenizer *tok = file_map(&file, path, err) ? NULL : tokenizer_parse(file.data, file.len, path, err);
    file_unmap(&file);
    if (tok && ((!access(config, F_OK) && read_config(tok, config, err)) ||
                (!access(template, F_OK) && read_template(tok, template, err)))) {
        tokenizer_free(tok);
        tok = NULL;
    }
    if (tok) tok->config_file = xstrdup(config);
    free(path);
    free(config);
    free(template);
    return tok;
}
