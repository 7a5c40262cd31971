/* fuzz_text.c - libFuzzer: any text through the cut-down tokenizers of the four families. What must hold of
 * decode(encode(text)): encoding it again gives the same text; and for Llama 3, which has all bytes and no normaliser, it
 * is the text itself unless U+FFFD stands in it. Runs in the repository's root. */
#define _GNU_SOURCE /* memmem */
#include "../nla.h"

#include <stdlib.h>
#include <string.h>

#include <stb/stb_ds.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static Tokenizer *load(const char *name) {
    Err err = {0};
    char *dir = xprintf("tests/golden/tokenizer/%s", name);
    Tokenizer *tok = tokenizer_load(dir, &err);
    if (!tok) {
        fprintf(stderr, "%s\n", err.msg);
        abort();
    }
    free(dir);
    return tok;
}

static char *there_and_back(const Tokenizer *tok, const char *text, size_t len, size_t *out_len) {
    Err err = {0};
    int *ids = NULL;
    if (tokenizer_encode(tok, text, len, false, &ids, &err)) abort();
    char *out = tokenizer_decode(tok, ids, (int)arrlen(ids), false, out_len);
    for (int i = 0; i < arrlen(ids); i++)
        if (!tokenizer_piece(tok, ids[i], &(size_t){0})) abort();
    arrfree(ids);
    return out;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static const char *const name[] = {"smollm2", "llama3", "qwen3", "gemma3", "odd_nfc", "odd_split", "odd_fallback"};
    static Tokenizer *tok[7];
    for (int i = 0; i < 7; i++) {
        if (!tok[i]) tok[i] = load(name[i]);
        size_t once_len, twice_len;
        char *once = there_and_back(tok[i], (const char *)data, size, &once_len);
        char *twice = there_and_back(tok[i], once, once_len, &twice_len);
        bool lossless = i < 4; /* the odd ones take spaces, drop commas and lack most characters */
        if (lossless && (once_len != twice_len || (once_len && memcmp(once, twice, once_len)))) abort();
        bool exact = !strcmp(name[i], "llama3") && (once_len == 0 || !memmem(once, once_len, "\xEF\xBF\xBD", 3));
        if (exact && (once_len != size || (size && memcmp(once, data, size)))) abort();
        free(once);
        free(twice);
    }
    return 0;
}
