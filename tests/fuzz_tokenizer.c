/* fuzz_tokenizer.c - libFuzzer: any bytes as tokenizer.json must be read or refused with a message, and what was read
 * must encode and decode without harm. */
#include "../nla.h"

#include <stdlib.h>
#include <string.h>

#include <stb/stb_ds.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static const char text[] =
        "Hello  the world's 123 don'T\n\n\tx\u00e9e\u0301 \u4eba\U0001f600\u180e<|im_end|> <bos>aaaaaaaaaa\xff";
    Err err = {0};
    Tokenizer *tok = tokenizer_parse((const char *)data, size, "fuzz", &err);
    if (!tok) {
        if (!err.msg[0] || strchr(err.msg, '\n')) abort();
        return 0;
    }
    int *ids = NULL;
    if (!tokenizer_encode(tok, text, sizeof text - 1, true, &ids, &err)) {
        for (int i = 0; i < arrlen(ids); i++)
            if (ids[i] < 0 || ids[i] >= tokenizer_vocab_size(tok)) abort();
    } else if (!err.msg[0] || arrlen(ids)) {
        abort();
    }
    free(tokenizer_decode(tok, ids, (int)arrlen(ids), false, NULL));
    arrfree(ids);
    tokenizer_free(tok);
    return 0;
}
