/* fuzz_json.c - any bytes are JSON or one error line; a tree can be walked, and its strings survive a write and a read. */
#include "../nla.h"

#include <stdlib.h>
#include <string.h>

static void require(bool claim) {
    if (!claim) abort();
}

static void check_string(const Json *json, int node) {
    size_t len, raw_len, written_len;
    char *text = json_string(json, node, &len), *written = NULL;
    const char *raw = json_raw(json, node, &raw_len);
    require(text && text[len] == '\0');
    require(!raw || (raw_len == len && !memcmp(raw, text, len)));

    FILE *out = open_memstream(&written, &written_len);
    json_write_string(out, text, len);
    fclose(out);
    Json again;
    Err err = {0};
    require(json_parse(&again, written, written_len, "again", &err) == 0);
    char *same = json_string(&again, 0, &raw_len);
    require(raw_len == len && !memcmp(same, text, len));
    json_free(&again);
    free(same);
    free(written);
    free(text);
}

/* Every node is reached exactly once, from containers through first and next. */
static int check_children(const Json *json, int node) {
    JsonType type = json_type(json, node);
    int children = 0, reached = 0;
    for (int k = json_first(json, node); k >= 0; k = json_next(json, k), children++) {
        require(k > node && k < json->n_nodes);
        require(type == JSON_ARRAY || json_type(json, k) == JSON_STRING);
        reached += type == JSON_OBJECT ? 2 : 1;
    }
    require(children == json_size(json, node));
    return reached;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    char *text = malloc(size + !size); /* exactly as long: one byte too far is seen */
    if (size) memcpy(text, data, size);
    Json json;
    Err err = {0};
    if (json_parse(&json, text, size, "fuzz", &err)) {
        require(err.msg[0] && !strchr(err.msg, '\n') &&
                strcmp(err.msg, "fuzz: jsmn and the check disagree (a bug in nla)"));
    } else {
        int reached = 1;
        for (int i = 0; i < json.n_nodes; i++) {
            int64_t whole;
            double real;
            bool truth;
            if (json_int(&json, i, &whole)) require(json_double(&json, i, &real));
            json_bool(&json, i, &truth);
            if (json_type(&json, i) == JSON_STRING) check_string(&json, i);
            reached += check_children(&json, i);
        }
        require(reached == json.n_nodes);
        json_get(&json, 0, "a");
    }
    json_free(&json);
    free(text);
    return 0;
}
