/* tokenizer.h - what tokenizer.c, tokenizer_file.c and chat.c share, and nobody else: struct Tokenizer with its tables,
 * and the functions that more than one of them needs. What others may call stands in nla.h. */
#ifndef TOKENIZER_H
#define TOKENIZER_H

#include "nla.h"

#include <string.h>

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

/* Number of elements of an array. */
#define LENGTH(array) ((int)(sizeof(array) / sizeof((array)[0])))

/* ------------------------------------------------------------------------------------------------ structure */

/* What is known of one id: a token of model.vocab, an added token, or both. */
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

/* Where a text is looked up: open addressing over a power of two of slots, at most two thirds full. */
typedef struct {
    uint32_t hash;
    int id; /* -1: empty */
} TokenSlot;

/* What two neighbours join to; the same kind of table. */
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

/* What a step looks for: a string, a regular expression, or one numeric character (Digits). */
typedef struct {
    enum { PATTERN_STRING, PATTERN_REGEX, PATTERN_DIGIT } kind;
    char *string;
    size_t string_len;
    pcre2_code *regex;
    bool compiled; /* to machine code */
} Pattern;

/* A step of the normaliser: NFC, or each match of the pattern becomes the content. */
typedef struct {
    enum { NORMALIZE_NFC, NORMALIZE_REPLACE } kind;
    Pattern pattern;
    char *content;
    size_t content_len;
} Normalize;

/* What becomes of a match when a text is split: see add_stretch. */
typedef enum { ISOLATED, REMOVED, CONTIGUOUS, MERGED_WITH_PREVIOUS, MERGED_WITH_NEXT, N_BEHAVIORS } Behavior;

/* A step of the pre-tokeniser: a space in front of the text, or a split; `invert`: the matches are the words. */
typedef struct {
    enum { PREFIX_SPACE, SPLIT } kind;
    Pattern pattern;
    Behavior behavior;
    bool invert;
} Split;

/* All that encoding, decoding and rendering read; tokenizer_file.c fills it, tokenizer_free frees all of it. */
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
size_t read_char(const char *text, size_t len, int *cp);
/* Start of the character that ends before `at`, in valid UTF-8. */
size_t char_before(const char *text, size_t at);
/* Unicode's White_Space: \s of Rust's regex crate. */
bool is_space(int cp);
/* Appends n bytes to *out (stb). */
void append(char **out, const char *bytes, size_t n);

/* ------------------------------------------------------------------------------------------------ token tables */

/* The token with this id, or NULL. Inline, as token_slot: loading calls the two millions of times, a tenth of its time. */
static inline const Token *token_of(const Tokenizer *tok, int id) {
    return id >= 0 && id < tok->n_ids && tok->token[id].text ? &tok->token[id] : NULL;
}

/* What token_slot takes as the hash of a text. */
uint32_t token_hash(const char *text, size_t len);
/* The slot that holds this text, or the empty one where it belongs. */
static inline TokenSlot *token_slot(const Tokenizer *tok, uint32_t hash, const char *text, size_t len) {
    for (size_t i = hash & tok->slot_mask;; i = (i + 1) & tok->slot_mask) {
        TokenSlot *slot = &tok->slot[i];
        if (slot->id < 0) return slot;
        const Token *token = &tok->token[slot->id];
        if (slot->hash == hash && token->len == len && !memcmp(token->text, text, len)) return slot;
    }
}

/* The id of the model's token, or -1: BPE does not make added tokens. */
int find_in_model(const Tokenizer *tok, const char *text, size_t len);
/* The slot that holds this pair of ids, or the empty one where it belongs. */
MergeSlot *merge_slot(const Tokenizer *tok, int left, int right);

/* ------------------------------------------------------------------------------------------------ normalising */

/* Replaces *text and *len, valid UTF-8, by the normalised text; *own (stb, NULL before) holds it when it is not the
 * same. */
int normalize_text(const Tokenizer *tok, const char **text, size_t *len, char **own, Err *err);

#endif
