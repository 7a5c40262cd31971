/* fuzz_rules.c - libFuzzer: any bytes as a prefix. What must hold: the same bytes twice, valid UTF-8, none of the tags, no more
 * than 110 words, and no word at all about what is not there: NULL only for fewer than five words. */
#include "../nla.h"

#include <stdlib.h>
#include <string.h>

#include <utf8proc.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    uint64_t key = size ? data[size - 1] : 0;
    char *one = rules_explanation((const char *)data, size, RULES_WORDS, key), *two = rules_explanation((const char *)data, size, RULES_WORDS, key);
    if (!one != !two || (one && strcmp(one, two))) abort();
    if (!one) return 0;
    if (strstr(one, "<explanation>") || strstr(one, "</explanation>") || !strstr(one, "\n\n")) abort();
    size_t len = strlen(one);
    int words = 0;
    for (size_t at = 0; at < len;) {
        utf8proc_int32_t c;
        utf8proc_ssize_t used = utf8proc_iterate((const utf8proc_uint8_t *)one + at, (utf8proc_ssize_t)(len - at), &c);
        if (used <= 0 || (c < ' ' && c != '\n')) abort();
        words += !strchr(" \n", one[at]) && (at == 0 || strchr(" \n", one[at - 1]));
        at += (size_t)used;
    }
    if (words > 110) abort();
    free(one);
    free(two);
    return 0;
}
