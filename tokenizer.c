/* tokenizer.c - text to token ids and back, as Hugging Face `tokenizers` does it, and the chat templates.
 *
 * It reads tokenizer.json and does what that file says, for the byte pair encodings of SmolLM2, Qwen2/3, Llama 3 and
 * Gemma 3. Encoding runs
 *     text -> added tokens cut out -> normaliser -> pre-tokeniser (words) -> BPE merges within each word -> BOS
 * and gives the ids of `tokenizers` 0.23 for every text; tests/tokenizer_parity.py compares the two over all of Unicode.
 * What a file asks for beyond that (WordPiece, Unigram, Metaspace, dropout, ...) is refused by name, never guessed at.
 * It is not a trainer, keeps no offsets into the text, and does not truncate or pad.
 *
 * The Jinja chat templates are not run: the end of this file knows the families by the marks in their templates.
 *
 * A Tokenizer does not change once it is loaded: any number of threads may use it.
 */
#define _GNU_SOURCE /* memmem */
#include "nla.h"

#include <ctype.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include <stb/stb_ds.h>
#include <utf8proc.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

enum {
    MAX_ID = 1 << 24,       /* ids above it are taken for a broken file: tables are indexed by id */
    MAX_ADDED_BYTES = 4096, /* longest added token: cutting them out takes text x this at worst */
    MAX_TEXT = 1 << 28,     /* bytes encoded at once; replacing may double them */
    MAX_STEPS = 16,         /* normalisers, pre-tokenisers, decoders in a Sequence */
    MAX_PATTERN = 16384,    /* bytes of a regular expression */
    SHORT_WORD = 48,        /* symbols up to which looking at all pairs beats a queue */
};

/* ------------------------------------------------------------------------------------------------ structure */

typedef struct {
    const char *text;  /* as in the file; NULL: no token has this id */
    const char *piece; /* the bytes it decodes to */
    uint32_t len, piece_len;
    bool special; /* left out by skip_special */
    bool is_byte; /* "<0xE4>" under a ByteFallback decoder */
    bool lstrip, rstrip, single_word;
    bool in_model;    /* of model.vocab; the others are added tokens only */
    bool before_mark; /* some merge joins this character to a "▁" after it */
} Token;

/* Open addressing over a power of two of slots, at most two thirds full. */
typedef struct {
    uint32_t hash;
    int id; /* -1: empty */
} TokenSlot;

typedef struct {
    uint64_t pair;  /* left id << 32 | right id */
    uint64_t merge; /* rank << 32 | id of the joined token: the smaller is done first */
} MergeSlot;
static const uint64_t NO_MERGE = UINT64_MAX; /* also the pair of an empty slot */

/* Finds the longest added token at a place. Node 0 stands for "none". */
typedef struct {
    int child, sibling, id; /* id -1: no token ends here */
    unsigned char byte;
} TrieNode;
typedef struct {
    TrieNode *node; /* stb */
    int first[256]; /* node of each first byte */
} Trie;

typedef struct {
    enum { PATTERN_STRING, PATTERN_REGEX, PATTERN_DIGIT } kind;
    char *string;
    size_t string_len;
    pcre2_code *regex;
    bool compiled; /* to machine code */
} Pattern;

typedef struct {
    enum { NORMALIZE_NFC, NORMALIZE_REPLACE } kind;
    Pattern pattern;
    char *content;
    size_t content_len;
} Normalize;

typedef enum { ISOLATED, REMOVED, CONTIGUOUS, MERGED_WITH_PREVIOUS, MERGED_WITH_NEXT, N_BEHAVIORS } Behavior;
static const char *const behavior_name[] = {"Isolated", "Removed", "Contiguous", "MergedWithPrevious",
                                            "MergedWithNext"};

typedef struct {
    enum { PREFIX_SPACE, SPLIT } kind;
    Pattern pattern;
    Behavior behavior;
    bool invert;
} Split;

struct Tokenizer {
    Token *token; /* [n_ids] by id */
    int n_ids;
    char *arena; /* all token bytes */
    TokenSlot *slot;
    size_t slot_mask, longest;
    MergeSlot *merge;
    size_t merge_mask;

    Trie added[2];        /* cut from the text before and after normalisation */
    Normalize *normalize; /* stb */
    Split *split;         /* stb */

    bool byte_level;        /* words are bytes, written as the 256 characters of the byte alphabet */
    char byte_char[256][3]; /* UTF-8 of each byte's character */
    int byte_id[256];       /* and its token, or -1 */
    int *char_id;           /* otherwise [0x110000]: token of each character + 1, or 0 */
    int mark_id;            /* token of "▁", or -1 */
    bool ignore_merges, fuse_unk, byte_fallback;
    int unk_id;           /* or -1 */
    int fallback_id[256]; /* "<0x00>"... or -1 */
    bool decode_fallback; /* the decoder has ByteFallback */

    int *before, *after; /* stb: what the post-processor puts around the text */
    int eos;
    char *bos_text, *chat_template, *config_file; /* of tokenizer_config.json; NULL when absent */
    pcre2_match_context *limits;
};

/* ------------------------------------------------------------------------------------------------ UTF-8 */

/* Reads the character at text, len > 0, and returns its bytes. Where there is none, *cp is -1 and the result counts the
 * bytes that one U+FFFD stands for: the longest start of a valid sequence, as Python's and Rust's decoders replace. */
static size_t read_char(const char *text, size_t len, int *cp) {
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

/* Start of the character that ends before `at`, in valid UTF-8. */
static size_t char_before(const char *text, size_t at) {
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

static void append(char **out, const char *bytes, size_t n) {
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
#define LENGTH(array) ((int)(sizeof(array) / sizeof((array)[0])))

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

/* Unicode's White_Space: \s of Rust's regex crate. */
static bool is_space(int cp) {
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

static const Token *token_of(const Tokenizer *tok, int id) {
    return id >= 0 && id < tok->n_ids && tok->token[id].text ? &tok->token[id] : NULL;
}

/* Not inlined: gcc takes XXH3's steps for long texts for reads past the end of a caller's short buffer, and warns. */
__attribute__((noinline)) static uint32_t token_hash(const char *text, size_t len) {
    return (uint32_t)XXH3_64bits(text, len);
}

/* The slot that holds this text, or the empty one where it belongs. */
static TokenSlot *token_slot(const Tokenizer *tok, uint32_t hash, const char *text, size_t len) {
    for (size_t i = hash & tok->slot_mask;; i = (i + 1) & tok->slot_mask) {
        TokenSlot *slot = &tok->slot[i];
        if (slot->id < 0) return slot;
        const Token *token = &tok->token[slot->id];
        if (slot->hash == hash && token->len == len && !memcmp(token->text, text, len)) return slot;
    }
}

static int find_token(const Tokenizer *tok, const char *text, size_t len) {
    return token_slot(tok, token_hash(text, len), text, len)->id;
}

/* The id of the model's token, or -1: BPE does not make added tokens. */
static int find_in_model(const Tokenizer *tok, const char *text, size_t len) {
    int id = find_token(tok, text, len);
    return id >= 0 && tok->token[id].in_model ? id : -1;
}

static MergeSlot *merge_slot(const Tokenizer *tok, int left, int right) {
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

/* A token with `normalized` is looked for in the normalised text. `tokenizers` also decodes it so, and then does not know
 * it as special when that is another text. */
static int normalize_added_token(Loader *l, int id) {
    Tokenizer *tok = l->tok;
    Token *token = &tok->token[id];
    const char *text = token->text;
    size_t len = token->len;
    char *own = NULL;
    Encoder e;
    encoder_open(&e, tok, NULL, l->err);
    int rc = normalize(&e, &text, &len, &own);
    if (!rc && len > MAX_ADDED_BYTES) rc = refuse(l, "added_tokens", "a normalised content takes more than 4096 bytes");
    if (!rc && (len != token->len || memcmp(text, token->text, len))) {
        token->special = false;
        token->piece = keep(l, text, len);
        token->piece_len = (uint32_t)len;
    }
    if (!rc) trie_add(&tok->added[1], text, len, id);
    encoder_close(&e);
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

/* ------------------------------------------------------------------------------------------------ chat templates */

static void append_text(char **out, const char *text) {
    append(out, text, strlen(text));
}

/* Python's str.strip, which Jinja's trim is: Unicode spaces and the separators U+001C..U+001F. */
static void append_trimmed(char **out, const char *text) {
    size_t start = 0, end = strlen(text), step;
    int cp;
    for (; start < end; start += step) {
        step = read_char(text + start, end - start, &cp);
        if (!is_space(cp) && !(cp >= 0x1C && cp <= 0x1F)) break;
    }
    for (; end > start; end = step) {
        step = char_before(text, end);
        read_char(text + step, end - step, &cp);
        if (!is_space(cp) && !(cp >= 0x1C && cp <= 0x1F)) break;
    }
    append(out, text + start, end - start);
}

static bool has_role(const ChatMessage *message, const char *role) {
    return !strcmp(message->role, role);
}

/* The default system message, which the template's text names as '<|im_start|>system\n...<|im_end|>': to be freed, NULL
 * when there is none. Jinja's string literals escape \n, \' and \\. */
static char *default_system(const char *template) {
    static const char marker[] = "<|im_start|>system";
    for (const char *at = template; (at = strstr(at, marker)); at++) {
        const char *p = at + sizeof marker - 1, *end = strstr(p, "<|im_end|>");
        char quote = at > template ? at[-1] : '\0';
        bool literal = quote == '\'' || quote == '"';
        char *text = NULL;
        while (end && p < end && *p != (literal ? quote : '{')) {
            bool escape = literal && *p == '\\';
            p += escape;
            arrput(text, escape && *p == 'n' ? '\n' : *p);
            p++;
        }
        char *system = p == end && arrlen(text) && text[0] == '\n' ? xstrndup(text + 1, arrlenu(text) - 1) : NULL;
        arrfree(text);
        if (system) return system;
    }
    return NULL;
}

static void append_chatml(char **out, const char *role, const char *content) {
    append_text(out, "<|im_start|>");
    append_text(out, role);
    append_text(out, "\n");
    append_text(out, content);
    append_text(out, "<|im_end|>\n");
}

/* The place of the last user message that is not a tool's answer; n - 1 when there is none. */
static int last_query(const ChatMessage *message, int n) {
    static const char open[] = "<tool_response>", close[] = "</tool_response>";
    for (int i = n - 1; i >= 0; i--) {
        size_t len = strlen(message[i].content);
        bool tool = len >= sizeof close - 1 && !strncmp(message[i].content, open, sizeof open - 1) &&
                    !strcmp(message[i].content + len - (sizeof close - 1), close);
        if (has_role(&message[i], "user") && !tool) return i;
    }
    return n - 1;
}

/* Qwen3's assistant turn: the thoughts between <think> and </think> are cut off, and written again only in the turns
 * after the last question: in the very last one always, else when there are any. */
static void append_qwen3_assistant(char **out, const char *content, bool after_query, bool last) {
    static const char open[] = "<think>", close[] = "</think>";
    const char *thought = "", *answer = content, *end = strstr(content, close);
    size_t thought_len = 0;
    if (end) {
        for (const char *p = end; (p = strstr(p, close)); p += sizeof close - 1) answer = p + sizeof close - 1;
        answer += strspn(answer, "\n");
        for (; end > content && end[-1] == '\n'; end--) {}
        thought = content;
        for (const char *p = content; (p = strstr(p, open)) && p + sizeof open - 1 <= end;)
            thought = p += sizeof open - 1;
        for (; thought < end && *thought == '\n'; thought++) {}
        thought_len = (size_t)(end - thought);
    }
    append_text(out, "<|im_start|>assistant\n");
    if (after_query && (last || thought_len)) {
        append_text(out, "<think>\n");
        append(out, thought, thought_len);
        append_text(out, "\n</think>\n\n");
        answer += strspn(answer, "\n");
    }
    append_text(out, answer);
    append_text(out, "<|im_end|>\n");
}

static int render_chatml(const Tokenizer *tok, const ChatMessage *message, int n, bool generation_prompt, bool qwen3,
                         char **out) {
    char *system = has_role(&message[0], "system") ? NULL : default_system(tok->chat_template);
    int query = last_query(message, n);
    if (system) append_chatml(out, "system", system);
    free(system);
    for (int i = 0; i < n; i++) {
        if (qwen3 && has_role(&message[i], "assistant"))
            append_qwen3_assistant(out, message[i].content, i > query, i == n - 1);
        else
            append_chatml(out, message[i].role, message[i].content);
    }
    if (generation_prompt) append_text(out, "<|im_start|>assistant\n");
    return 0;
}

static void append_llama3(char **out, const char *role, const char *before, const char *content) {
    append_text(out, "<|start_header_id|>");
    append_text(out, role);
    append_text(out, "<|end_header_id|>\n\n");
    append_text(out, before);
    append_trimmed(out, content);
    append_text(out, "<|eot_id|>");
}

/* Llama 3.1 and later always open with a system turn that names the dates (`dated`); Llama 3 does not. */
static int render_llama3(const Tokenizer *tok, const ChatMessage *message, int n, bool generation_prompt, bool dated,
                         const char *date, char **out) {
    int first = 0;
    if (tok->bos_text) append_text(out, tok->bos_text);
    if (dated) {
        char *dates = xprintf("Cutting Knowledge Date: December 2023\nToday Date: %s\n\n", date ? date : "26 Jul 2024");
        if (has_role(&message[0], "system")) first = 1;
        append_llama3(out, "system", dates, first ? message[0].content : "");
        free(dates);
    }
    for (int i = first; i < n; i++) append_llama3(out, message[i].role, "", message[i].content);
    if (generation_prompt) append_text(out, "<|start_header_id|>assistant<|end_header_id|>\n\n");
    return 0;
}

static int render_gemma3(const Tokenizer *tok, const ChatMessage *message, int n, bool generation_prompt, char **out,
                         Err *err) {
    int first = has_role(&message[0], "system") ? 1 : 0;
    if (tok->bos_text) append_text(out, tok->bos_text);
    for (int i = first; i < n; i++) {
        bool even = (i - first) % 2 == 0;
        if (has_role(&message[i], "user") != even)
            return fail(err, "Conversation roles must alternate user/assistant/user/assistant/...");
        append_text(out, "<start_of_turn>");
        append_text(out, has_role(&message[i], "assistant") ? "model" : message[i].role);
        append_text(out, "\n");
        if (first && i == 1) {
            append_text(out, message[0].content);
            append_text(out, "\n\n");
        }
        append_trimmed(out, message[i].content);
        append_text(out, "<end_of_turn>\n");
    }
    if (generation_prompt) append_text(out, "<start_of_turn>model\n");
    return 0;
}

static bool names_any(const char *template, const char *const words[], int n) {
    for (int i = 0; i < n; i++)
        if (strstr(template, words[i])) return true;
    return false;
}

/* ChatML templates come in kinds; what is not Qwen3's must be the plain one, without any of these. */
static bool plain_chatml(const char *template) {
    static const char *const beyond[] = {"trim",    "strip(",    "raise_exception", "bos_token", "strftime",
                                         "<think>", "reasoning", "enable_thinking", "macro"};
    return !names_any(template, beyond, LENGTH(beyond));
}

/* Qwen3's template, but not those that make the model think or not think in other ways. */
static bool qwen3_chatml(const char *template) {
    return strstr(template, "ns.last_query_index") && strstr(template, "reasoning_content.strip('\\n')") &&
           strstr(template, "enable_thinking is false") && !strstr(template, "<|im_start|>assistant\\n<think>");
}

static int render(const Tokenizer *tok, const ChatMessage *message, int n, bool generation_prompt, const char *date,
                  char **out, Err *err) {
    const char *template = tok->chat_template;
    if (strstr(template, "<|im_start|>") && (plain_chatml(template) || qwen3_chatml(template)))
        return render_chatml(tok, message, n, generation_prompt, !plain_chatml(template), out);
    if (strstr(template, "<|start_header_id|>")) {
        bool dated = strstr(template, "Cutting Knowledge Date: December 2023\\nToday Date: ") ||
                     (strstr(template, "Cutting Knowledge Date: December 2023") && strstr(template, "Today Date: "));
        if (dated || !strstr(template, "Today Date"))
            return render_llama3(tok, message, n, generation_prompt, dated, date, out);
    }
    if (strstr(template, "<start_of_turn>") && strstr(template, "first_user_prefix"))
        return render_gemma3(tok, message, n, generation_prompt, out, err);
    return fail(err,
                "%s: chat_template: is none of those implemented: ChatML as SmolLM2, Qwen2.5 and Qwen3 have it, "
                "Llama 3 and 3.1, Gemma 3",
                tok->config_file);
}

char *chat_render(const Tokenizer *tok, const ChatMessage *message, int n, bool generation_prompt, const char *date,
                  Err *err) {
    static const char *const roles[] = {"system", "user", "assistant"};
    if (!tok->chat_template) {
        fail(err, "%s: chat_template: is missing", tok->config_file ? tok->config_file : "tokenizer_config.json");
        return NULL;
    }
    if (n < 1) {
        fail(err, "a conversation needs a message");
        return NULL;
    }
    for (int i = 0; i < n; i++) {
        int r = 0;
        while (r < LENGTH(roles) && strcmp(message[i].role, roles[r])) r++;
        if (r < LENGTH(roles)) continue;
        fail(err, "message %d: the role \"%.40s\" is none of system, user, assistant", i, message[i].role);
        return NULL;
    }
    char *out = NULL;
    int rc = render(tok, message, n, generation_prompt, date, &out, err);
    char *text = rc ? NULL : xstrndup(out, arrlenu(out));
    arrfree(out);
    return text;
}
