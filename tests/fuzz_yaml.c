/* fuzz_yaml.c - any bytes are a sidecar or one error line; what is read survives a save. */
#include "../nla.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <stb/stb_ds.h>

static char path[64];

static void require(bool claim) {
    if (!claim) abort();
}

static void remove_file(void) {
    unlink(path);
}

static void choose_path(void) {
    const char *memory = "/dev/shm"; /* fsync costs nothing there */
    snprintf(path, sizeof path, "%s/nla-fuzz-%ld.yaml", access(memory, W_OK) ? "/tmp" : memory, (long)getpid());
    atexit(remove_file);
}

/* libyaml puts some plain texts in quotes ("a\tb", "---"). That may happen only to what is a string anyway: numbers,
 * words and dates hold none but these characters, among them a letter or a digit, and do not start as a marker does. */
static bool only_a_string(const char *text) {
    const char *marks = ".:_+-<= ", *typed = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz.:_+-~<= ";
    if (!text[0]) return false; /* null */
    return !text[strspn(text, marks)] || text[strspn(text, typed)] || !strncmp(text, "---", 3) ||
           !strncmp(text, "...", 3);
}

static void require_same(const Yaml *a, const Yaml *b) {
    require(a->kind == b->kind && arrlen(a->item) == arrlen(b->item) && arrlen(a->key) == arrlen(b->key));
    if (a->kind == YAML_SCALAR)
        require(!strcmp(a->text, b->text) && (a->quoted == b->quoted || (b->quoted && only_a_string(a->text))));
    for (int i = 0; i < arrlen(a->key); i++) require(!strcmp(a->key[i], b->key[i]));
    for (int i = 0; i < arrlen(a->item); i++) require_same(a->item[i], b->item[i]);
}

static void check_save(const Yaml *root) {
    Err err = {0};
    if (yaml_save(root, path, &err)) {
        fprintf(stderr, "save: %s\n", err.msg);
        abort();
    }
    Yaml *again = yaml_load(path, &err);
    if (!again) {
        fprintf(stderr, "load: %s\n", err.msg);
        abort();
    }
    require_same(root, again);
    yaml_free(again);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (!path[0]) choose_path();
    char *text = malloc(size + !size);
    if (size) memcpy(text, data, size);
    Err err = {0};
    Yaml *root = yaml_parse(text, size, "fuzz", &err);
    free(text);
    if (!root) {
        require(err.msg[0] && !strchr(err.msg, '\n'));
        return 0;
    }
    check_save(root);
    int64_t whole;
    double real;
    yaml_int(yaml_get(root, "a.b"), &whole);
    yaml_double(yaml_get(root, "a"), &real);
    yaml_set(root, "a.b", "1", false);
    require(yaml_int(yaml_get(root, "a.b"), &whole) && whole == 1);
    yaml_free(root);
    return 0;
}
