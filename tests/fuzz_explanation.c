/* fuzz_explanation.c - libFuzzer: what a writer's reply may be. What must hold of a cleaned explanation: two paragraphs or more, no
 * tag, no blank at its ends, and cleaning it again changes nothing that decides its use. */
#define _GNU_SOURCE /* memmem */
#include "../nla.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    const char *why = NULL;
    char *clean = explanation_clean((const char *)data, size, &why);
    if (!clean != !!why) abort();
    if (!clean) return 0;
    size_t len = strlen(clean);
    if (len == 0 || !strstr(clean, "\n\n") || strstr(clean, "\n\n\n") || memmem(clean, len, "<explanation>", 13)) abort();
    if (strchr(" \n", clean[0]) || strchr(" \n", clean[len - 1])) abort();
    free(clean);
    return 0;
}
