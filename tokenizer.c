/* tokenizer.c - text to token ids and back, as Hugging Face `tokenizers` does it.
 *
 * Three files share the subject, and tokenizer.h is theirs alone:
 *     tokenizer_file.c   reads tokenizer.json and tokenizer_config.json into a Tokenizer
 *     tokenizer.c        encodes and decodes with it
 *     chat.c             writes a conversation as the model's chat template does
 *
 * Together they do what tokenizer.json says, for the byte pair encodings of SmolLM2, Qwen2/3, Llama 3 and Gemma 3.
 * Encoding runs
 *     text -> added tokens cut out -> normaliser -> pre-tokeniser (words) -> BPE merges within each word -> BOS
 * and gives the ids of `tokenizers` 0.23 for every text; tests/tokenizer_parity.py compares the two over all of Unicode.
 * It is not a trainer, keeps no offsets into the text, and does not truncate or pad.
 *
 * A Tokenizer does not change once it is loaded: any number of threads may use it.
 */
#define _GNU_SOURCE /* memmem */
#include "tokenizer.h"

#include <stdlib.h>
#include <string.h>

#include <stb/stb_ds.h>
#include <utf8proc.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

enum {
    MAX_TEXT = 1 << 28, /* bytes encoded at once; replacing may double them */
    SHORT_WORD = 48,    /* symbols up to which looking at all pairs beats a queue */
};

/* ------------------------------------------------------------------------------------------------ UTF-8 */

size_t read_char(const char *text, size_t len, int *cp) {
    const unsigned char *s = (const unsigned char *)text;
    if (s[0] < 0x80) {
        *cp = s[0];
        return 1;
    }
    *cp = -1;
    if (s[0] < 0xC2 || s[0] > 0xF4) return 1;
    size_t want = s[0] < 0xE0 ? 2 : s[0] < 0xF0 ? 3 : 4;
    /* the second byte rules out overlong forms, surrogates and what lies above U+10FFFF */
    unsigned low = s[0] == 0xE0 ? 0xA0 : s[0] == 0xF0 ? 0x90 : 0x80;
    unsigned high = s[0] == 0xED ? 0x9F : s[0] == 0xF4 ? 0x8F : 0xBF;
    unsigned value = s[0] & (0x7Fu >> want);
    for (size_t i = 1; i < want; i++) {
        if (i == len || s[i] < low || s[i] > high) return i;
        value = value << 6 | (s[i] & 0x3Fu);
        low = 0x80, high = 0xBF;
    }
    *cp = (int)value;
    return want;
}

size_t char_before(const char *text, size_t at) {
    do at--;
    while (at > 0 && ((unsigned char)text[at] & 0xC0) == 0x80);
    return at;
}

static size_t ascii_prefix(const char *text, size_t len) {
    size_t n = 0;
    for (uint64_t word; n + 8 <= len; n += 8) {
        memcpy(&word, text + n, 8);
        if (word & 0x8080808080808080u) break;
    }
    while (n < len && (unsigned char)text[n] < 0x80) n++;
    return n;
}

/* Length of the longest valid start of the text. */
static size_t valid_prefix(const char *text, size_t len) {
    size_t n = 0;
    int cp;
    while (n += ascii_prefix(text + n, len - n), n < len) {
        size_t step = read_char(text + n, len - n, &cp);
        if (cp < 0) break;
        n += step;
    }
    return n;
}

void append(char **out, const char *bytes, size_t n) {
    if (n) memcpy(arraddnptr(*out, n), bytes, n);
}

/* Appends the text to *out (stb) with U+FFFD for what is not UTF-8. */
static void append_repaired(char **out, const char *text, size_t len) {
    while (len) {
        size_t valid = valid_prefix(text, len);
        append(out, text, valid);
        text += valid;
        len -= valid;
        if (!len) break;
        int cp;
        size_t bad = read_char(text, len, &cp);
        append(out, "\xEF\xBF\xBD", 3);
        text += bad;
        len -= bad;
    }
}

/* ------------------------------------------------------------------------------------------------ Unicode versions */

/* `tokenizers` runs its regular expressions with Oniguruma, whose classes follow Unicode 16; PCRE2 10.42 follows Unicode
 * 14 and counts U+180E among \s. The categories of the code points in which they differ, made with
 *     tests/tokenizer_parity.py --unicode
 * Before matching, each of them is replaced by an older character of the same category and length in UTF-8 (stand_in),
 * which changes no offset and, since patterns name classes only, nothing else. A newer PCRE2 is not disturbed by it. */
enum {
    LU = UTF8PROC_CATEGORY_LU,
    LL = UTF8PROC_CATEGORY_LL,
    LM = UTF8PROC_CATEGORY_LM,
    LO = UTF8PROC_CATEGORY_LO,
    MN = UTF8PROC_CATEGORY_MN,
    MC = UTF8PROC_CATEGORY_MC,
    ND = UTF8PROC_CATEGORY_ND,
    NO = UTF8PROC_CATEGORY_NO,
    PD = UTF8PROC_CATEGORY_PD,
    PO = UTF8PROC_CATEGORY_PO,
    SM = UTF8PROC_CATEGORY_SM,
    SO = UTF8PROC_CATEGORY_SO,
    CF = UTF8PROC_CATEGORY_CF,
};
typedef struct {
    int first, last, category;
} Range;
/* clang-format off */
static const Range newer[] = {
    {0x897, 0x897, MN}, {0xCF3, 0xCF3, MC}, {0xECE, 0xECE, MN}, {0x180E, 0x180E, CF}, {0x1B4E, 0x1B4F, PO},
    {0x1B7F, 0x1B7F, PO}, {0x1C89, 0x1C89, LU}, {0x1C8A, 0x1C8A, LL}, {0x2427, 0x2429, SO}, {0x2FFC, 0x2FFF, SO},
    {0x31E4, 0x31E5, SO}, {0x31EF, 0x31EF, SO}, {0xA7CB, 0xA7CC, LU}, {0xA7CD, 0xA7CD, LL}, {0xA7DA, 0xA7DA, LU},
    {0xA7DB, 0xA7DB, LL}, {0xA7DC, 0xA7DC, LU}, {0x105C0, 0x105F3, LO}, {0x10D40, 0x10D49, ND}, {0x10D4A, 0x10D4D, LO},
    {0x10D4E, 0x10D4E, LM}, {0x10D4F, 0x10D4F, LO}, {0x10D50, 0x10D65, LU}, {0x10D69, 0x10D6D, MN},
    {0x10D6E, 0x10D6E, PD}, {0x10D6F, 0x10D6F, LM}, {0x10D70, 0x10D85, LL}, {0x10D8E, 0x10D8F, SM},
    {0x10EC2, 0x10EC4, LO}, {0x10EFC, 0x10EFF, MN}, {0x1123F, 0x11240, LO}, {0x11241, 0x11241, MN},
    {0x11380, 0x11389, LO}, {0x1138B, 0x1138B, LO}, {0x1138E, 0x1138E, LO}, {0x11390, 0x113B5, LO},
    {0x113B7, 0x113B7, LO}, {0x113B8, 0x113BA, MC}, {0x113BB, 0x113C0, MN}, {0x113C2, 0x113C2, MC},
    {0x113C5, 0x113C5, MC}, {0x113C7, 0x113CA, MC}, {0x113CC, 0x113CD, MC}, {0x113CE, 0x113CE, MN},
    {0x113CF, 0x113CF, MC}, {0x113D0, 0x113D0, MN}, {0x113D1, 0x113D1, LO}, {0x113D2, 0x113D2, MN},
    {0x113D3, 0x113D3, LO}, {0x113D4, 0x113D5, PO}, {0x113D7, 0x113D8, PO}, {0x113E1, 0x113E2, MN},
    {0x116D0, 0x116E3, ND}, {0x1171E, 0x1171E, MC}, {0x11B00, 0x11B09, PO}, {0x11BC0, 0x11BE0, LO},
    {0x11BE1, 0x11BE1, PO}, {0x11BF0, 0x11BF9, ND}, {0x11F00, 0x11F01, MN}, {0x11F02, 0x11F02, LO},
    {0x11F03, 0x11F03, MC}, {0x11F04, 0x11F10, LO}, {0x11F12, 0x11F33, LO}, {0x11F34, 0x11F35, MC},
    {0x11F36, 0x11F3A, MN}, {0x11F3E, 0x11F3F, MC}, {0x11F40, 0x11F40, MN}, {0x11F41, 0x11F41, MC},
    {0x11F42, 0x11F42, MN}, {0x11F43, 0x11F4F, PO}, {0x11F50, 0x11F59, ND}, {0x11F5A, 0x11F5A, MN},
    {0x1342F, 0x1342F, LO}, {0x13439, 0x1343F, CF}, {0x13440, 0x13440, MN}, {0x13441, 0x13446, LO},
    {0x13447, 0x13455, MN}, {0x13460, 0x143FA, LO}, {0x16100, 0x1611D, LO}, {0x1611E, 0x16129, MN},
    {0x1612A, 0x1612C, MC}, {0x1612D, 0x1612F, MN}, {0x16130, 0x16139, ND}, {0x16D40, 0x16D42, LM},
    {0x16D43, 0x16D6A, LO}, {0x16D6B, 0x16D6C, LM}, {0x16D6D, 0x16D6F, PO}, {0x16D70, 0x16D79, ND},
    {0x18CFF, 0x18CFF, LO}, {0x1B132, 0x1B132, LO}, {0x1B155, 0x1B155, LO}, {0x1CC00, 0x1CCEF, SO},
    {0x1CCF0, 0x1CCF9, ND}, {0x1CD00, 0x1CEB3, SO}, {0x1D2C0, 0x1D2D3, NO}, {0x1DF25, 0x1DF2A, LL},
    {0x1E030, 0x1E06D, LM}, {0x1E08F, 0x1E08F, MN}, {0x1E4D0, 0x1E4EA, LO}, {0x1E4EB, 0x1E4EB, LM},
    {0x1E4EC, 0x1E4EF, MN}, {0x1E4F0, 0x1E4F9, ND}, {0x1E5D0, 0x1E5ED, LO}, {0x1E5EE, 0x1E5EF, MN},
    {0x1E5F0, 0x1E5F0, LO}, {0x1E5F1, 0x1E5FA, ND}, {0x1E5FF, 0x1E5FF, PO}, {0x1F6DC, 0x1F6DC, SO},
    {0x1F774, 0x1F776, SO}, {0x1F77B, 0x1F77F, SO}, {0x1F7D9, 0x1F7D9, SO}, {0x1F8B2, 0x1F8BB, SO},
    {0x1F8C0, 0x1F8C1, SO}, {0x1FA75, 0x1FA77, SO}, {0x1FA87, 0x1FA89, SO}, {0x1FA8F, 0x1FA8F, SO},
    {0x1FAAD, 0x1FAAF, SO}, {0x1FABB, 0x1FABF, SO}, {0x1FAC6, 0x1FAC6, SO}, {0x1FACE, 0x1FACF, SO},
    {0x1FADA, 0x1FADC, SO}, {0x1FADF, 0x1FADF, SO}, {0x1FAE8, 0x1FAE9, SO}, {0x1FAF7, 0x1FAF8, SO},
    {0x1FBCB, 0x1FBEF, SO}, {0x2B739, 0x2B739, LO}, {0x2EBF0, 0x2EE5D, LO}, {0x31350, 0x323AF, LO},
};

/* The NFC of `tokenizers` (unicode-normalization-alignments) is older than utf8proc's: these marks, and all of `newer`,
 * stay where they are and join nothing. Made by the same command. */
static const Range inert[] = {
    {0x7FD, 0x7FD, 0}, {0x898, 0x89F, 0}, {0x8CA, 0x8D3, 0}, {0x9FE, 0x9FE, 0}, {0xC3C, 0xC3C, 0}, {0xD3B, 0xD3C, 0},
    {0xEBA, 0xEBA, 0}, {0x1715, 0x1715, 0}, {0x1ABF, 0x1ACE, 0}, {0x1DF6, 0x1DFA, 0}, {0xA82C, 0xA82C, 0},
    {0x10D24, 0x10D27, 0}, {0x10EAB, 0x10EAC, 0}, {0x10EFD, 0x10EFF, 0}, {0x10F46, 0x10F50, 0}, {0x10F82, 0x10F85, 0},
    {0x11070, 0x11070, 0}, {0x1133B, 0x1133B, 0}, {0x1145E, 0x1145E, 0}, {0x11839, 0x1183A, 0}, {0x11930, 0x11930, 0},
    {0x1193D, 0x1193E, 0}, {0x11943, 0x11943, 0}, {0x119E0, 0x119E0, 0}, {0x11A34, 0x11A34, 0}, {0x11A47, 0x11A47, 0},
    {0x11A99, 0x11A99, 0}, {0x11D42, 0x11D42, 0}, {0x11D44, 0x11D45, 0}, {0x11D97, 0x11D97, 0}, {0x11F41, 0x11F42, 0},
    {0x16FF0, 0x16FF1, 0}, {0x1E08F, 0x1E08F, 0}, {0x1E130, 0x1E136, 0}, {0x1E2AE, 0x1E2AE, 0}, {0x1E2EC, 0x1E2EF, 0},
    {0x1E4EC, 0x1E4EF, 0},
};
/* clang-format on */

static const Range *range_of(const Range *range, int n, int cp) {
    int low = 0, high = n;
    while (low < high) {
        int middle = (low + high) / 2;
        if (range[middle].last < cp)
            low = middle + 1;
        else
            high = middle;
    }
    return low < n && range[low].first <= cp ? &range[low] : NULL;
}

static int category_of(int cp) {
    const Range *range = range_of(newer, LENGTH(newer), cp);
    return range ? range->category : (int)utf8proc_category(cp);
}

/* A character that PCRE2 knows, of that category and with as many bytes. */
static int stand_in(int category, size_t bytes) {
    switch (category) {
    case LU: return bytes == 3 ? 0x1E00 : 0x10400;
    case LL: return bytes == 3 ? 0x1E01 : 0x10428;
    case MN: return bytes == 3 ? 0x0900 : 0x101FD;
    case MC: return bytes == 3 ? 0x0903 : 0x11000;
    case PO: return bytes == 3 ? 0x2016 : 0x10100;
    case SO: return bytes == 3 ? 0x2400 : 0x1F000;
    case CF: return bytes == 3 ? 0x2060 : 0x1D173;
    case LM: return 0x10780;
    case LO: return 0x10280;
    case ND: return 0x104A0;
    case NO: return 0x10107;
    case PD: return 0x10EAD;
    default: return 0x1D6C1; /* SM */
    }
}

/* The text as regular expressions are to see it: itself, or a copy in *copy (stb) with stand-ins. */
static const char *regex_subject(const char *text, size_t len, char **copy) {
    bool copied = false;
    int cp;
    for (size_t at = 0, step; at += ascii_prefix(text + at, len - at), at < len; at += step) {
        step = read_char(text + at, len - at, &cp);
        const Range *range = cp < newer[0].first ? NULL : range_of(newer, LENGTH(newer), cp);
        if (!range) continue;
        if (!copied) {
            arrsetlen(*copy, 0);
            append(copy, text, len);
            copied = true;
        }
        utf8proc_encode_char(stand_in(range->category, step), (utf8proc_uint8_t *)*copy + at);
    }
    return copied ? *copy : text;
}

/* Rust's char::is_numeric (Unicode 17), which the Digits pre-tokeniser asks. */
static bool is_numeric(int cp) {
    if (cp < 0x80) return cp >= '0' && cp <= '9';
    if ((cp >= 0x11DE0 && cp <= 0x11DE9) || (cp >= 0x16FF4 && cp <= 0x16FF6)) return true;
    int category = category_of(cp);
    return category == ND || category == UTF8PROC_CATEGORY_NL || category == NO;
}

bool is_space(int cp) {
    if (cp < 0x80) return cp == ' ' || (cp >= 9 && cp <= 13);
    return cp == 0x85 || cp == 0xA0 || cp == 0x1680 || (cp >= 0x2000 && cp <= 0x200A) || cp == 0x2028 || cp == 0x2029 ||
           cp == 0x202F || cp == 0x205F || cp == 0x3000;
}

/* \w of Rust's regex crate: Alphabetic, marks, decimal digits, connectors and the two joiners. */
static bool is_word(int cp) {
    if (cp == 0x200C || cp == 0x200D) return true;
    if ((cp >= 0x24B6 && cp <= 0x24E9) || (cp >= 0x1F130 && cp <= 0x1F149) || (cp >= 0x1F150 && cp <= 0x1F169) ||
        (cp >= 0x1F170 && cp <= 0x1F189))
        return true; /* circled and squared letters: symbols, yet Alphabetic */
    switch (category_of(cp)) {
    case LU:
    case LL:
    case LM:
    case LO:
    case UTF8PROC_CATEGORY_LT:
    case MN:
    case MC:
    case UTF8PROC_CATEGORY_ME:
    case ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_PC: return true;
    default: return false;
    }
}

/* ------------------------------------------------------------------------------------------------ token tables */

/* Not inlined: gcc takes XXH3's steps for long texts for reads past the end of a caller's short buffer, and warns. */
__attribute__((noinline)) uint32_t token_hash(const char *text, size_t len) {
    return (uint32_t)XXH3_64bits(text, len);
}

static int find_token(const Tokenizer *tok, const char *text, size_t len) {
    return token_slot(tok, token_hash(text, len), text, len)->id;
}

int find_in_model(const Tokenizer *tok, const char *text, size_t len) {
    int id = find_token(tok, text, len);
    return id >= 0 && tok->token[id].in_model ? id : -1;
}

MergeSlot *merge_slot(const Tokenizer *tok, int left, int right) {
    uint64_t pair = (uint64_t)left << 32 | (uint64_t)right;
    size_t i = XXH3_64bits(&pair, sizeof pair) & tok->merge_mask;
    while (tok->merge[i].pair != pair && tok->merge[i].pair != NO_MERGE) i = (i + 1) & tok->merge_mask;
    return &tok->merge[i];
}

static uint64_t find_merge(const Tokenizer *tok, int left, int right) {
    return merge_slot(tok, left, right)->merge;
}

static int merged_id(uint64_t merge) {
    return (int)(uint32_t)merge;
}

/* The longest token at the start of the text: its length (0: none) and id. */
static size_t trie_longest(const Trie *trie, const char *text, size_t len, int *id) {
    size_t longest = 0;
    int at = len ? trie->first[(unsigned char)text[0]] : 0;
    for (size_t i = 1; at; i++) {
        if (trie->node[at].id >= 0) {
            longest = i;
            *id = trie->node[at].id;
        }
        if (i == len) break;
        at = trie->node[at].child;
        while (at && trie->node[at].byte != (unsigned char)text[i]) at = trie->node[at].sibling;
    }
    return longest;
}

/* ------------------------------------------------------------------------------------------------ patterns */

typedef struct {
    int id, previous, next; /* id -1: merged into its left neighbour */
} Symbol;

typedef struct {
    uint64_t order; /* rank << 32 | place: the leftmost of the best rank comes first */
    int id;
} Candidate;

/* Working memory of one call. */
typedef struct {
    const Tokenizer *tok;
    Err *err;
    int **ids; /* where they go */
    pcre2_match_data *match;
    int *word;               /* stb: symbols of the word at hand */
    char *spelled, *subject; /* stb */
    Symbol *symbol;          /* stb */
    Candidate *queue;        /* stb, a binary heap */
} Encoder;

static void encoder_open(Encoder *e, const Tokenizer *tok, int **ids, Err *err) {
    *e = (Encoder){.tok = tok, .err = err, .ids = ids, .match = pcre2_match_data_create(1, NULL)};
}

static void encoder_close(Encoder *e) {
    pcre2_match_data_free(e->match);
    arrfree(e->word);
    arrfree(e->spelled);
    arrfree(e->subject);
    arrfree(e->symbol);
    arrfree(e->queue);
}

/* A search through a text: the match it has found last, and where it goes on. */
typedef struct {
    size_t start, end, from;
    bool matched;
} Search;

static int run_regex(Encoder *e, const Pattern *pattern, const char *text, size_t len, size_t from) {
    PCRE2_SPTR subject = (PCRE2_SPTR)text;
    const uint32_t options = PCRE2_NO_UTF_CHECK; /* append_repaired has seen to it */
    int rc = PCRE2_ERROR_JIT_STACKLIMIT;
    if (pattern->compiled) rc = pcre2_jit_match(pattern->regex, subject, len, from, options, e->match, e->tok->limits);
    if (rc == PCRE2_ERROR_JIT_STACKLIMIT) /* no machine code, or the match is too deep for its stack */
        rc = pcre2_match(pattern->regex, subject, len, from, options | PCRE2_NO_JIT, e->match, e->tok->limits);
    return rc;
}

static int next_regex_match(Encoder *e, const Pattern *pattern, const char *text, size_t len, Search *search) {
    while (search->from <= len) {
        int rc = run_regex(e, pattern, text, len, search->from);
        if (rc == PCRE2_ERROR_NOMATCH) return 0;
        if (rc < 0) {
            PCRE2_UCHAR why[120] = "";
            pcre2_get_error_message(rc, why, sizeof why);
            return fail(e->err, "the tokenizer's regular expression gave up on this text: %s", (char *)why);
        }
        const PCRE2_SIZE *place = pcre2_get_ovector_pointer(e->match);
        /* as Oniguruma's iterator: no empty match right behind the last match */
        if (place[0] == place[1] && search->matched && place[1] == search->end) {
            int cp;
            if (search->from == len) return 0;
            search->from += read_char(text + search->from, len - search->from, &cp);
            continue;
        }
        *search = (Search){.start = place[0], .end = place[1], .from = place[1], .matched = true};
        return 1;
    }
    return 0;
}

/* Moves to the next match of the pattern: 1, 0 when there is none, -1 on an error. */
static int next_match(Encoder *e, const Pattern *pattern, const char *text, size_t len, Search *search) {
    if (pattern->kind == PATTERN_REGEX) return next_regex_match(e, pattern, text, len, search);
    if (pattern->kind == PATTERN_STRING) {
        const char *found = memmem(text + search->from, len - search->from, pattern->string, pattern->string_len);
        if (!found) return 0;
        search->start = (size_t)(found - text);
        search->end = search->from = search->start + pattern->string_len;
        return 1;
    }
    for (size_t step; search->from < len; search->from += step) {
        int cp;
        step = read_char(text + search->from, len - search->from, &cp);
        if (!is_numeric(cp)) continue;
        search->start = search->from;
        search->end = search->from += step;
        return 1;
    }
    return 0;
}

/* ------------------------------------------------------------------------------------------------ normalising */

/* True only when the text surely is in NFC: nothing in it decomposes, and nothing can join or pass what stands before
 * it. Below U+0300 all is composed. */
static bool surely_nfc(const char *text, size_t len) {
    int cp;
    for (size_t at = 0; at += ascii_prefix(text + at, len - at), at < len;) {
        at += read_char(text + at, len - at, &cp);
        if (cp < 0x300) continue;
        const utf8proc_property_t *property = utf8proc_get_property(cp);
        bool mark = property->category == MN || property->category == MC;
        bool jamo = cp >= 0x1100 && cp <= 0x11FF;
        if (mark || jamo || property->combining_class || property->decomp_seqindex != UINT16_MAX) return false;
    }
    return true;
}

static int append_nfc(Encoder *e, char **out, const char *text, size_t len) {
    if (!len) return 0;
    utf8proc_uint8_t *composed = NULL;
    utf8proc_ssize_t n = utf8proc_map((const utf8proc_uint8_t *)text, (utf8proc_ssize_t)len, &composed,
                                      UTF8PROC_STABLE | UTF8PROC_COMPOSE);
    if (n < 0) return fail(e->err, "NFC of %zu bytes of text: %s", len, utf8proc_errmsg(n));
    append(out, (const char *)composed, (size_t)n);
    free(composed);
    return 0;
}

/* NFC of the stretches between inert characters, which nothing passes or joins. */
static int normalize_nfc(Encoder *e, char **out, const char *text, size_t len) {
    size_t start = 0;
    int cp;
    for (size_t at = 0, step; at += ascii_prefix(text + at, len - at), at < len; at += step) {
        step = read_char(text + at, len - at, &cp);
        if (!range_of(inert, LENGTH(inert), cp) && !range_of(newer, LENGTH(newer), cp)) continue;
        if (append_nfc(e, out, text + start, at - start)) return -1;
        append(out, text + at, step);
        start = at + step;
    }
    return append_nfc(e, out, text + start, len - start);
}

static int normalize_replace(Encoder *e, const Normalize *step, char **out, const char *text, size_t len) {
    const char *subject = text;
    if (step->pattern.kind == PATTERN_REGEX) subject = regex_subject(text, len, &e->subject);
    size_t at = 0;
    int rc;
    Search search = {0};
    while ((rc = next_match(e, &step->pattern, subject, len, &search)) > 0) {
        append(out, text + at, search.start - at);
        append(out, step->content, step->content_len);
        at = search.end;
        if (arrlenu(*out) > 2 * (size_t)MAX_TEXT) return fail(e->err, "the normalised text takes more than 512 MiB");
    }
    append(out, text + at, len - at);
    return rc;
}

/* Replaces *text and *len by the normalised text; *own (stb) holds it when it is not the same. */
static int normalize(Encoder *e, const char **text, size_t *len, char **own) {
    for (int i = 0; i < arrlen(e->tok->normalize); i++) {
        const Normalize *step = &e->tok->normalize[i];
        if (step->kind == NORMALIZE_NFC && surely_nfc(*text, *len)) continue;
        char *out = NULL;
        int rc = step->kind == NORMALIZE_NFC ? normalize_nfc(e, &out, *text, *len)
                                             : normalize_replace(e, step, &out, *text, *len);
        arrfree(*own);
        *own = out;
        if (rc) return -1;
        *text = out;
        *len = arrlenu(out);
    }
    return 0;
}

int normalize_text(const Tokenizer *tok, const char **text, size_t *len, char **own, Err *err) {
    Encoder e;
    encoder_open(&e, tok, NULL, err);
    int rc = normalize(&e, text, len, own);
    encoder_close(&e);
    return rc;
}

/* ------------------------------------------------------------------------------------------------ merging */

/* Byte pair encoding of e->word: again and again, the pair of lowest rank (the leftmost of equals) is joined. */
static void merge_short(const Tokenizer *tok, int *id, int n, int **ids) {
    uint64_t merge[SHORT_WORD]; /* of id[i] with id[i + 1] */
    for (int i = 0; i + 1 < n; i++) merge[i] = find_merge(tok, id[i], id[i + 1]);
    while (n > 1) {
        int best = 0;
        for (int i = 1; i + 1 < n; i++)
            if (merge[i] < merge[best]) best = i;
        if (merge[best] == NO_MERGE) break;
        id[best] = merged_id(merge[best]);
        n--;
        for (int i = best + 1; i < n; i++) id[i] = id[i + 1];
        for (int i = best + 1; i + 1 < n; i++) merge[i] = merge[i + 1];
        if (best > 0) merge[best - 1] = find_merge(tok, id[best - 1], id[best]);
        if (best + 1 < n) merge[best] = find_merge(tok, id[best], id[best + 1]);
    }
    memcpy(arraddnptr(*ids, (size_t)n), id, (size_t)n * sizeof *id);
}

static void queue_push(Encoder *e, int left, int right) {
    uint64_t merge = find_merge(e->tok, e->symbol[left].id, e->symbol[right].id);
    if (merge == NO_MERGE) return;
    Candidate new = {(merge >> 32) << 32 | (uint64_t)left, merged_id(merge)};
    size_t at = arrlenu(e->queue);
    arrput(e->queue, new);
    for (; at && e->queue[(at - 1) / 2].order > new.order; at = (at - 1) / 2) e->queue[at] = e->queue[(at - 1) / 2];
    e->queue[at] = new;
}

static Candidate queue_pop(Encoder *e) {
    Candidate *queue = e->queue, first = queue[0], last = arrpop(e->queue);
    size_t n = arrlenu(queue), at = 0;
    for (size_t child; (child = 2 * at + 1) < n; at = child) {
        if (child + 1 < n && queue[child + 1].order < queue[child].order) child++;
        if (queue[child].order >= last.order) break;
        queue[at] = queue[child];
    }
    if (n) queue[at] = last;
    return first;
}

/* The same in n log n: symbols in a linked list, candidate pairs in a queue. A candidate whose pair has meanwhile become
 * another is known by the token it would make. */
static void merge_long(Encoder *e, const int *id, int n) {
    arrsetlen(e->symbol, (size_t)n);
    arrsetlen(e->queue, 0);
    for (int i = 0; i < n; i++) e->symbol[i] = (Symbol){id[i], i - 1, i + 1 < n ? i + 1 : -1};
    for (int i = 0; i + 1 < n; i++) queue_push(e, i, i + 1);
    while (arrlen(e->queue)) {
        Candidate best = queue_pop(e);
        int place = (int)(uint32_t)best.order;
        Symbol *left = &e->symbol[place];
        if (left->id < 0 || left->next < 0) continue;
        Symbol *right = &e->symbol[left->next];
        uint64_t merge = find_merge(e->tok, left->id, right->id);
        if (merge == NO_MERGE || merged_id(merge) != best.id) continue;
        left->id = best.id;
        left->next = right->next;
        right->id = -1;
        if (left->next >= 0) e->symbol[left->next].previous = place;
        if (left->previous >= 0) queue_push(e, left->previous, place);
        if (left->next >= 0) queue_push(e, place, left->next);
    }
    for (int i = 0; i >= 0; i = e->symbol[i].next) arrput(*e->ids, e->symbol[i].id);
}

/* Merges and empties e->word. */
static void merge_word(Encoder *e) {
    int n = (int)arrlen(e->word);
    if (n == 0) return;
    if (n <= SHORT_WORD)
        merge_short(e->tok, e->word, n, e->ids);
    else
        merge_long(e, e->word, n);
    arrsetlen(e->word, 0);
}

/* A character without a token: its bytes' tokens when all are there, else the unknown token (waiting: returned true),
 * else nothing. `waiting`: an unknown token waits to be written, so that fuse_unk can write one for many. */
static bool unknown_char(Encoder *e, const char *text, size_t len, bool waiting) {
    const Tokenizer *tok = e->tok;
    bool fallback = tok->byte_fallback;
    for (size_t i = 0; i < len && fallback; i++) fallback = tok->fallback_id[(unsigned char)text[i]] >= 0;
    if (fallback) {
        for (size_t i = 0; i < len; i++) arrput(e->word, tok->fallback_id[(unsigned char)text[i]]);
        return waiting;
    }
    if (tok->unk_id < 0) return false;
    if (waiting && !tok->fuse_unk) arrput(e->word, tok->unk_id);
    return true;
}

/* The token that the whole word is, or -1. */
static int whole_word(Encoder *e, const char *text, size_t len) {
    const Tokenizer *tok = e->tok;
    if (len > tok->longest) return -1;
    if (!tok->byte_level) return find_in_model(tok, text, len);
    arrsetlen(e->spelled, 2 * len);
    size_t n = 0;
    for (size_t i = 0; i < len; i++)
        for (const char *c = tok->byte_char[(unsigned char)text[i]]; *c; c++) e->spelled[n++] = *c;
    return find_in_model(tok, e->spelled, n);
}

/* For Gemma a document is one word. It is cut before each "▁" whose left neighbour no merge joins to a "▁": no merge can
 * reach across, so the ids are the same. */
static void encode_word(Encoder *e, const char *text, size_t len) {
    const Tokenizer *tok = e->tok;
    if (tok->ignore_merges) {
        int id = whole_word(e, text, len);
        if (id >= 0) {
            arrput(*e->ids, id);
            return;
        }
    }
    int previous = -1; /* the character before, when it is a token */
    bool waiting = false;
    for (size_t at = 0, step; at < len; at += step) {
        unsigned char byte = (unsigned char)text[at];
        int id, cp;
        if (tok->byte_level) {
            step = 1;
            id = tok->byte_id[byte];
        } else {
            step = read_char(text + at, len - at, &cp);
            id = tok->char_id[cp] - 1;
        }
        if (id < 0) {
            const char *spelled = tok->byte_level ? tok->byte_char[byte] : text + at;
            waiting = unknown_char(e, spelled, tok->byte_level ? strlen(spelled) : step, waiting);
            previous = -1;
            continue;
        }
        if (waiting) {
            arrput(e->word, tok->unk_id);
            waiting = false;
            previous = -1;
        }
        if (id == tok->mark_id && previous >= 0 && !tok->token[previous].before_mark) merge_word(e);
        arrput(e->word, id);
        previous = id;
    }
    if (waiting) arrput(e->word, tok->unk_id);
    merge_word(e);
}

/* ------------------------------------------------------------------------------------------------ encoding */

typedef struct {
    const char *text, *subject; /* the same, but for the stand-ins that regular expressions see */
    size_t len;
} Span;

/* A stretch of a span that waits for what follows to be joined to it, or passed on. */
typedef struct {
    size_t start, end;
    bool open, match;
} Stretch;

static int split_words(Encoder *e, int step, Span span);

static int pass_on(Encoder *e, int step, const Span *span, const Stretch *stretch) {
    if (!stretch->open || (stretch->match && e->tok->split[step].behavior == REMOVED)) return 0;
    size_t start = stretch->start;
    return split_words(e, step + 1, (Span){span->text + start, span->subject + start, stretch->end - start});
}

static int add_stretch(Encoder *e, int step, const Span *span, Stretch *last, Stretch next) {
    bool join = false;
    switch (e->tok->split[step].behavior) {
    case CONTIGUOUS: join = next.match == last->match; break;
    case MERGED_WITH_PREVIOUS: join = next.match && !last->match; break;
    case MERGED_WITH_NEXT: join = !next.match && last->match; break;
    default: break;
    }
    if (join && last->open) {
        last->end = next.end;
        last->match = next.match;
        return 0;
    }
    int rc = pass_on(e, step, span, last);
    *last = next;
    return rc;
}

static int split_by_pattern(Encoder *e, int step, Span span) {
    const Split *split = &e->tok->split[step];
    Search search = {0};
    Stretch last = {0};
    size_t at = 0;
    int rc;
    do {
        rc = next_match(e, &split->pattern, span.subject, span.len, &search);
        if (rc < 0) return -1;
        size_t start = rc ? search.start : span.len, end = rc ? search.end : span.len;
        if (start > at && add_stretch(e, step, &span, &last, (Stretch){at, start, true, split->invert})) return -1;
        if (rc && add_stretch(e, step, &span, &last, (Stretch){start, end, true, !split->invert})) return -1;
        at = end;
    } while (rc);
    return pass_on(e, step, &span, &last);
}

static int prefix_space(Encoder *e, int step, Span span) {
    if (span.text[0] == ' ') return split_words(e, step + 1, span);
    char *text = xmalloc(2 * (span.len + 1)), *subject = text + span.len + 1;
    text[0] = subject[0] = ' ';
    memcpy(text + 1, span.text, span.len);
    memcpy(subject + 1, span.subject, span.len);
    int rc = split_words(e, step + 1, (Span){text, subject, span.len + 1});
    free(text);
    return rc;
}

/* The pre-tokeniser from its step `step` on: each step sees each piece of the step before as a text of its own. */
static int split_words(Encoder *e, int step, Span span) {
    if (span.len == 0) return 0;
    if (step == arrlen(e->tok->split)) {
        encode_word(e, span.text, span.len);
        return 0;
    }
    return e->tok->split[step].kind == PREFIX_SPACE ? prefix_space(e, step, span) : split_by_pattern(e, step, span);
}

static int encode_normalized(Encoder *e, const char *text, size_t len) {
    return split_words(e, 0, (Span){text, regex_subject(text, len, &e->subject), len});
}

/* Whether a single_word token may stand at [start, end). */
static bool stands_alone(const char *text, size_t len, size_t start, size_t end) {
    int cp;
    if (start > 0) {
        size_t before = char_before(text, start);
        read_char(text + before, start - before, &cp);
        if (is_word(cp)) return false;
    }
    if (end == len) return true;
    read_char(text + end, len - end, &cp);
    return !is_word(cp);
}

/* lstrip and rstrip: the token takes the spaces beside it, but none that the token before has taken. */
static void take_spaces(const Token *token, const char *text, size_t len, size_t taken, size_t *start, size_t *end) {
    int cp;
    while (token->lstrip && *start > taken) {
        size_t before = char_before(text, *start);
        read_char(text + before, *start - before, &cp);
        if (!is_space(cp)) break;
        *start = before;
    }
    while (token->rstrip && *end < len) {
        size_t step = read_char(text + *end, len - *end, &cp);
        if (!is_space(cp)) break;
        *end += step;
    }
}

/* Appends the ids of the added tokens in the text, and calls `between` for the texts between them. */
static int cut_added(Encoder *e, const Trie *trie, const char *text, size_t len,
                     int (*between)(Encoder *e, const char *text, size_t len)) {
    size_t done = 0; /* up to where ids are written */
    for (size_t at = 0; at < len;) {
        int id = -1;
        size_t n = trie_longest(trie, text + at, len - at, &id);
        if (n == 0) {
            at++;
            continue;
        }
        const Token *token = &e->tok->token[id];
        size_t start = at, end = at + n;
        at = end; /* also after a token that may not stand here: `tokenizers` goes on behind it */
        if (token->single_word && !stands_alone(text, len, start, end)) continue;
        take_spaces(token, text, len, done, &start, &end);
        if (start > done && between(e, text + done, start - done)) return -1;
        arrput(*e->ids, id);
        done = end;
    }
    return done < len ? between(e, text + done, len - done) : 0;
}

static int encode_raw(Encoder *e, const char *text, size_t len) {
    char *own = NULL;
    int rc = normalize(e, &text, &len, &own);
    if (!rc) rc = cut_added(e, &e->tok->added[1], text, len, encode_normalized);
    arrfree(own);
    return rc;
}

int tokenizer_encode(const Tokenizer *tok, const char *text, size_t len, bool special, int **ids, Err *err) {
    if (len > MAX_TEXT) return fail(err, "text of %zu bytes; the tokenizer takes up to %d at once", len, MAX_TEXT);
    if (len == 0) text = ""; /* for callers with NULL */
    char *repaired = NULL;
    if (valid_prefix(text, len) < len) {
        append_repaired(&repaired, text, len);
        text = repaired;
        len = arrlenu(repaired);
    }
    Encoder e;
    encoder_open(&e, tok, ids, err);
    size_t n = arrlenu(*ids);
    for (int i = 0; special && i < arrlen(tok->before); i++) arrput(*ids, tok->before[i]);
    int rc = cut_added(&e, &tok->added[0], text, len, encode_raw);
    for (int i = 0; special && i < arrlen(tok->after); i++) arrput(*ids, tok->after[i]);
    if (rc && *ids) arrsetlen(*ids, n);
    encoder_close(&e);
    arrfree(repaired);
    return rc;
}

/* ------------------------------------------------------------------------------------------------ decoding */

/* Ends a run of byte tokens: when it is not UTF-8, `tokenizers` writes one U+FFFD for each of its bytes. */
static void end_byte_run(char **out, size_t start) {
    size_t n = arrlenu(*out) - start;
    if (n == 0 || valid_prefix(*out + start, n) == n) return;
    arrsetlen(*out, start);
    for (size_t i = 0; i < n; i++) append(out, "\xEF\xBF\xBD", 3);
}

char *tokenizer_decode(const Tokenizer *tok, const int *ids, int n, bool skip_special, size_t *len) {
    char *joined = NULL, *out = NULL;
    size_t run = 0; /* where the run of byte tokens at the end of `joined` starts */
    for (int i = 0; i < n; i++) {
        const Token *token = token_of(tok, ids[i]);
        if (!token || (skip_special && token->special)) continue;
        if (!token->is_byte) end_byte_run(&joined, run);
        append(&joined, token->piece, token->piece_len);
        if (!token->is_byte) run = arrlenu(joined);
    }
    if (tok->decode_fallback) end_byte_run(&joined, run);
    append_repaired(&out, joined, arrlenu(joined));
    char *text = xstrndup(out ? out : "", arrlenu(out));
    if (len) *len = arrlenu(out);
    arrfree(joined);
    arrfree(out);
    return text;
}

const char *tokenizer_piece(const Tokenizer *tok, int id, size_t *len) {
    const Token *token = token_of(tok, id);
    if (!token) return NULL;
    *len = token->piece_len;
    return token->piece;
}

int tokenizer_vocab_size(const Tokenizer *tok) {
    return tok->n_ids;
}

int tokenizer_id(const Tokenizer *tok, const char *token) {
    return find_token(tok, token, strlen(token));
}

bool tokenizer_is_special(const Tokenizer *tok, int id) {
    const Token *token = token_of(tok, id);
    return token && token->special;
}

int tokenizer_bos(const Tokenizer *tok) {
    return arrlen(tok->before) ? tok->before[0] : -1;
}

int tokenizer_eos(const Tokenizer *tok) {
    return tok->eos;
}
