/* test_files.c - safetensors.c: what it refuses and in which words, and what survives a write and a read.
 * All comparisons are exact; there is no arithmetic here that could round. */
#define _GNU_SOURCE
#include "../nla.h"

#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <math.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <stb/stb_ds.h>

/* ------------------------------------------------------------------------------------------------ help */

static char dir[64];
static char **strings; /* stb: freed when the test ends */

static void make_dir(void) {
    strcpy(dir, "/tmp/nla-files-XXXXXX");
    cr_assert(mkdtemp(dir));
}

static int remove_one(const char *path, const struct stat *info, int type, struct FTW *walk) {
    (void)info, (void)type, (void)walk;
    return remove(path);
}

static void remove_dir(void) {
    nftw(dir, remove_one, 16, FTW_DEPTH | FTW_PHYS);
    for (int i = 0; i < arrlen(strings); i++) free(strings[i]);
    arrfree(strings);
}

TestSuite(files, .init = make_dir, .fini = remove_dir, .timeout = 120);

#define kept(...) keep(xprintf(__VA_ARGS__))

static char *keep(char *text) {
    arrput(strings, text);
    return text;
}

static char *in_dir(const char *name) {
    return kept("%s/%s", dir, name);
}

static void put(const char *path, const void *data, size_t len) {
    FILE *file = fopen(path, "wb");
    cr_assert(file && fwrite(data, 1, len, file) == len && !fclose(file), "%s", path);
}

static char *put_text(const char *name, const char *text) {
    char *path = in_dir(name);
    put(path, text, strlen(text));
    return path;
}

static void put_safetensors(const char *path, const char *header, size_t data_len) {
    size_t text = strlen(header), len = (text + 7) / 8 * 8;
    char *bytes = xcalloc(1, 8 + len + data_len);
    for (int i = 0; i < 8; i++) bytes[i] = (char)(len >> (8 * i) & 0xFF);
    memset(bytes + 8, ' ', len);
    memcpy(bytes + 8, header, text);
    put(path, bytes, 8 + len + data_len);
    free(bytes);
}

/* One line that names the file and says `words`. */
static void expect_words(const char *message, const char *file, const char *words) {
    cr_expect(strstr(message, words), "\n  said   \"%s\"\n  wanted \"%s\"", message, words);
    cr_expect(strstr(message, file), "\"%s\" does not name %s", message, file);
    cr_expect(!strchr(message, '\n'), "\"%s\" has more than one line", message);
}

static int count_entries(const char *path) {
    char *command = kept("ls -A %s | wc -l", path);
    FILE *pipe = popen(command, "r");
    int n = -1;
    cr_assert(pipe && fscanf(pipe, "%d", &n) == 1);
    pclose(pipe);
    return n;
}

/* ------------------------------------------------------------------------------------------------ errors */

Test(files, the_first_message_stays_and_control_characters_do_not) {
    Err err = {0};
    cr_expect(fail(&err, "a\tb\x1b[31m\x7f\n\xC2\x9B%d", 7) == -1);
    cr_expect(fail(&err, "second") == -1);
    cr_expect_str_eq(err.msg, "a?b?[31m????7", "%s", err.msg);
}

/* ------------------------------------------------------------------------------------------------ JSON */

typedef struct {
    const char *text;
    const char *words;
} Case;

Test(files, text_that_is_not_json_is_refused_with_its_place) {
    const Case cases[] = {
        {"", "empty where JSON is expected"},
        {"  ", "column 3: the text ends where a value is expected"},
        {"\xEF\xBB\xBF{}", "column 1: expected a value"},
        {"{", "column 2: expected a key in quotes"},
        {"[1", "column 3: the text ends inside an array"},
        {"{\"a\":1", "column 7: the text ends inside an object"},
        {"[1 2]", "column 4: expected ',' or ']'"},
        {"[1,]", "column 4: expected a value"},
        {"[,1]", "column 2: expected a value"},
        {"[1}", "column 3: expected ',' or ']'"},
        {"{\"a\":1]", "column 7: expected ',' or '}'"},
        {"{\"a\":1,}", "column 8: expected a key in quotes"},
        {"{\"a\"}", "column 5: expected ':' after a key"},
        {"{\"a\",\"b\"}", "column 5: expected ':' after a key"},
        {"{\"a\":}", "column 6: expected a value"},
        {"{1:2}", "column 2: expected a key in quotes"},
        {"{a:2}", "column 2: expected a key in quotes"},
        {"{\"a\":1}\n{", "line 2, column 1: something follows the end of the value"},
        {"1 2", "column 3: something follows the end of the value"},
        {"]", "column 1: expected a value"},
        {"nul", "column 1: expected a value"},
        {"nulls", "column 5: something follows"},
        {"True", "column 1: expected a value"},
        {"NaN", "column 1: expected a value"},
        {"-Infinity", "column 2: a number lacks a digit"},
        {"01", "column 3: a number starts with 0"},
        {"-", "column 2: a number lacks a digit"},
        {"+1", "column 1: expected a value"},
        {".5", "column 1: expected a value"},
        {"1.", "column 3: a number lacks a digit"},
        {"1.e5", "column 3: a number lacks a digit"},
        {"1e", "column 3: a number lacks a digit"},
        {"1e+", "column 4: a number lacks a digit"},
        {"0x10", "column 2: something follows"},
        {"'a'", "column 1: expected a value"},
        {"\"a", "column 3: a string does not end"},
        {"\"a\\", "column 4: unknown escape"},
        {"\"\\x41\"", "column 3: unknown escape"},
        {"\"\\'\"", "column 3: unknown escape"},
        {"\"\\u12\"", "column 3: \\u needs four hex digits"},
        {"\"\\u12G4\"", "column 3: \\u needs four hex digits"},
        {"\"\\u", "column 3: \\u needs four hex digits"},
        {"\"a\nb\"", "column 3: a control character in a string must be escaped"},
        {"\"a\tb\"", "column 3: a control character in a string must be escaped"},
        {"\"\x80\"", "column 2: a string is not valid UTF-8"},
        {"\"\xC0\x80\"", "column 2: a string is not valid UTF-8"},         /* overlong NUL */
        {"\"\xED\xA0\x80\"", "column 2: a string is not valid UTF-8"},     /* a surrogate */
        {"\"\xF4\x90\x80\x80\"", "column 2: a string is not valid UTF-8"}, /* above U+10FFFF */
        {"\"\xE2\x82\"", "column 2: a string is not valid UTF-8"},
        {"{\"a\":1,\"b\":2,\"a\":3}", "the key \"a\" stands twice"},
        {"{\"a\":1,\"\\u0061\":3}", "the key \"a\" stands twice"},
        {"[1, // one\n2]", "column 5: expected a value"},
        {"[\f1]", "column 2: expected a value"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Err err = {0};
        Json json;
        cr_expect(json_parse(&json, cases[i].text, strlen(cases[i].text), "x.json", &err) == -1, "%s", cases[i].text);
        expect_words(err.msg, "x.json", cases[i].words);
        json_free(&json);
    }
}

Test(files, a_nul_byte_does_not_end_json) {
    const char text[] = "{}\0garbage";
    Err err = {0};
    Json json;
    cr_expect(json_parse(&json, text, sizeof text - 1, "x.json", &err) == -1);
    expect_words(err.msg, "x.json", "column 3: something follows the end of the value");
}

Test(files, json_nests_64_deep_and_no_deeper) {
    for (int depth = 64; depth <= 65; depth++) {
        char text[131] = {0};
        memset(text, '[', (size_t)depth);
        memset(text + depth, ']', (size_t)depth);
        Err err = {0};
        Json json;
        int status = json_parse(&json, text, (size_t)depth * 2, "x.json", &err);
        cr_expect(status == (depth == 64 ? 0 : -1));
        if (status) expect_words(err.msg, "x.json", "column 65: nested more than 64 deep");
        json_free(&json);
    }
    size_t many = 5000000;
    char *text = xmalloc(many);
    memset(text, '[', many);
    Err err = {0};
    Json json;
    cr_expect(json_parse(&json, text, many, "x.json", &err) == -1);
    free(text);
}

Test(files, repeated_keys_are_refused_in_objects_of_up_to_10000_pairs) {
    for (int pairs = 10000; pairs <= 10001; pairs++) {
        char *text = NULL;
        size_t len;
        FILE *out = open_memstream(&text, &len);
        fputs("{\"k0\":0", out);
        for (int i = 1; i < pairs; i++) fprintf(out, ",\"k%d\":%d", i == pairs - 1 ? 5 : i, i);
        putc('}', out);
        fclose(out);
        Err err = {0};
        Json json;
        int status = json_parse(&json, text, len, "x.json", &err);
        cr_expect(status == (pairs == 10000 ? -1 : 0));
        if (status) expect_words(err.msg, "x.json", "the key \"k5\" stands twice");
        json_free(&json);
        free(text);
    }
}

Test(files, every_truncation_of_a_json_object_is_refused) {
    const char *text = "{\"a\": [1, -2.5e+3, \"x\\u0041\\n\\ud83d\\ude00\", true, null], \"b\": {\"c\": {}}}";
    for (size_t len = 0; len < strlen(text); len++) {
        char *part = xstrndup(text, len), *exact = xmalloc(len + !len); /* no NUL behind: ASan sees any byte too many */
        memcpy(exact, part, len);
        Err err = {0};
        Json json;
        cr_expect(json_parse(&json, exact, len, "x.json", &err) == -1, "%s", part);
        cr_expect(err.msg[0]);
        json_free(&json);
        free(part);
        free(exact);
    }
}

Test(files, a_json_tree_is_walked_by_first_and_next) {
    const char *text =
        "{\"a\": [1, {\"x\": [[], {}]}, [2, 3], \"s\"], \"b\": {}, \"c\": null, \"d\": {\"e\": {\"f\": true}}}";
    Err err = {0};
    Json j;
    cr_assert(json_parse(&j, text, strlen(text), "x.json", &err) == 0, "%s", err.msg);
    char seen[64] = "";
    for (int k = json_first(&j, 0); k >= 0; k = json_next(&j, k)) {
        char *key = json_string(&j, k, NULL);
        strcat(seen, key);
        free(key);
    }
    cr_expect_str_eq(seen, "abcd");
    int a = json_get(&j, 0, "a"), kinds[4], n = 0;
    for (int v = json_first(&j, a); v >= 0; v = json_next(&j, v)) kinds[n++] = (int)json_type(&j, v);
    cr_expect(n == 4 && kinds[0] == JSON_NUMBER && kinds[1] == JSON_OBJECT && kinds[2] == JSON_ARRAY &&
              kinds[3] == JSON_STRING);
    cr_expect(json_size(&j, a) == 4 && json_size(&j, 0) == 4);
    cr_expect(json_size(&j, json_get(&j, 0, "b")) == 0 && json_first(&j, json_get(&j, 0, "b")) == -1);
    bool value = false;
    cr_expect(json_bool(&j, json_get(&j, json_get(&j, json_get(&j, 0, "d"), "e"), "f"), &value) && value);
    cr_expect(json_get(&j, 0, "nothing") == -1 && json_get(&j, a, "x") == -1);
    cr_expect(json_type(&j, -1) == JSON_NONE && json_next(&j, -1) == -1 && json_first(&j, -1) == -1);
    cr_expect(json_string(&j, -1, NULL) == NULL && !json_is(&j, a, "a"));
    json_free(&j);
}

Test(files, json_numbers_are_read_only_where_they_fit) {
    const char *text = "[0, -0, 9223372036854775807, -9223372036854775808, 9223372036854775808, -9223372036854775809, "
                       "1.0, 1e2, 0.1, 1e308, 1e999, 123456789012345678901234567890, \"1\", true]";
    const char ints[] = "yyyynnnnnnnnnn", doubles[] = "yyyyyyyyyynynn";
    Err err = {0};
    Json j;
    cr_assert(json_parse(&j, text, strlen(text), "x.json", &err) == 0, "%s", err.msg);
    int i = 0;
    for (int v = json_first(&j, 0); v >= 0; v = json_next(&j, v), i++) {
        int64_t whole = -7;
        double real = -7;
        cr_expect(json_int(&j, v, &whole) == (ints[i] == 'y'), "int %d", i);
        cr_expect(json_double(&j, v, &real) == (doubles[i] == 'y'), "double %d", i);
        if (i == 2) cr_expect(whole == INT64_MAX);
        if (i == 3) cr_expect(whole == INT64_MIN);
        if (i == 8) cr_expect(real == 0.1);
        if (i == 10) cr_expect(real == -7);
    }
    json_free(&j);
}

static void expect_string(const char *json_text, const char *expected, size_t expected_len) {
    Err err = {0};
    Json j;
    cr_assert(json_parse(&j, json_text, strlen(json_text), "x.json", &err) == 0, "%s: %s", json_text, err.msg);
    size_t len = 0;
    char *text = json_string(&j, 0, &len);
    cr_expect(len == expected_len && !memcmp(text, expected, len), "%s gave %s", json_text, text);
    free(text);
    json_free(&j);
}

Test(files, json_escapes_are_undone_and_lone_surrogates_become_fffd) {
    expect_string("\"\\\"\\\\\\/\\b\\f\\n\\r\\t\"", "\"\\/\b\f\n\r\t", 8);
    expect_string("\"\\u0041\\u00e9\\u320E\\ud83D\\uDE00\"", "A\xC3\xA9\xE3\x88\x8E\xF0\x9F\x98\x80", 10);
    expect_string("\"a\\u0000b\"", "a\0b", 3);
    expect_string("\"\\ud800\"", "\xEF\xBF\xBD", 3);
    expect_string("\"\\udc00x\"", "\xEF\xBF\xBDx", 4);
    expect_string("\"\\ud800\\n\"", "\xEF\xBF\xBD\n", 4);
    expect_string("\"\\ud800\\u0041\"",
                  "\xEF\xBF\xBD"
                  "A",
                  4);
    expect_string("\"\\ud800\\ud83d\\ude00\"", "\xEF\xBF\xBD\xF0\x9F\x98\x80", 7);
}

Test(files, raw_json_strings_are_given_only_without_escapes) {
    const char *text = "[\"plain\", \"not\\n\", 5]";
    Err err = {0};
    Json j;
    cr_assert(json_parse(&j, text, strlen(text), "x.json", &err) == 0);
    size_t len = 0;
    int first = json_first(&j, 0), second = json_next(&j, first);
    const char *raw = json_raw(&j, first, &len);
    cr_expect(raw && len == 5 && !memcmp(raw, "plain", 5));
    cr_expect(!json_raw(&j, second, &len) && !json_raw(&j, json_next(&j, second), &len));
    cr_expect(json_is(&j, second, "not\n") && !json_is(&j, second, "not"));
    json_free(&j);
}

static char *written_string(const char *text, size_t len) {
    char *json = NULL;
    size_t size;
    FILE *out = open_memstream(&json, &size);
    json_write_string(out, text, len);
    fclose(out);
    return json;
}

Test(files, any_bytes_written_as_a_json_string_read_back_with_bad_utf8_replaced) {
    const char text[] = "q\" b\\ n\n t\t z\0 e\x1b d\x7f \xE3\x88\x8E \xF0\x9F\x98\x80";
    char *json = written_string(text, sizeof text - 1);
    expect_string(json, text, sizeof text - 1);
    free(json);
    /* Replaced as Python's errors="replace" does: one U+FFFD for each longest start of a character. */
    json = written_string("\xFF|\xE2\x82|\xF0\x9F\x98|\xED\xA0\x80|\xC3", 14);
    cr_expect_str_eq(json,
                     "\"\xEF\xBF\xBD|\xEF\xBF\xBD|\xEF\xBF\xBD|\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD|\xEF\xBF\xBD\"");
    free(json);
}

/* ------------------------------------------------------------------------------------------------ YAML */

Test(files, text_that_is_no_sidecar_is_refused_with_its_line) {
    const Case cases[] = {
        {"", "empty where YAML is expected"},
        {"# only a comment\n", "empty where YAML is expected"},
        {"--- \n", "the top level is not a map"},
        {"[1, 2]\n", "the top level is not a map"},
        {"just words\n", "the top level is not a map"},
        {"a: 1\n\tb: 2\n", "line 2: invalid YAML"},
        {"a:\n\t- 1\n", "line 2: invalid YAML"},
        {"a: &x 1\nb: *x\n", "line 2: aliases are not supported"},
        {"a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n", "line 2: aliases are not supported"},
        {"a: &a [*a]\n", "line 1: aliases are not supported"},
        {"a: 1\nb: 2\na: 3\n", "the key \"a\" stands twice in the map"},
        {"t: {a: 1, \"a\": 2}\n", "line 1: the key \"a\" stands twice"},
        {"a: 'open\nb: 2\n", "invalid YAML: while scanning a quoted scalar"},
        {"a: \"open\n", "invalid YAML: while scanning a quoted scalar"},
        {"a: \"\\q\"\n", "line 1: invalid YAML"},
        {"a: [1, 2\n", "invalid YAML"},
        {"a: {b: 1\n", "invalid YAML"},
        {"a: 1\n b: 2\n", "line 2: invalid YAML"},
        {"a: b: c\n", "line 1: invalid YAML"},
        {"- 1\na: 2\n", "line 2: invalid YAML"},
        {"a: 1\n---\nb: 2\n", "line 2: a second document starts"},
        {"? [a, b]\n: 1\n", "line 1: a key must be a scalar"},
        {"? {a: b}\n: 1\n", "line 1: a key must be a scalar"},
        {"a: !!python/object:os.system {}\n", "line 1: tags are not supported"},
        {"a: !!binary aGk=\n", "line 1: tags are not supported"},
        {"%TAG !x! y\n---\na: 1\n", "%TAG directives are not supported"},
        {"%YAML 1.1\r%TAG !x! y\n---\na: 1\n", "%TAG directives are not supported"},
        {"a: !mine 3\n", "line 1: tags are not supported"},
        {"a: \"\\0\"\n", "line 1: a scalar holds a NUL"},
        {"a: 1\nb: \xFF\xFE\n", "line 2: invalid YAML: invalid leading UTF-8 octet"},
        {"a: \xC0\x80\n", "line 1: invalid YAML"},
        {"a: \xED\xA0\x80\n", "line 1: invalid YAML"},
        {"a: 1\n\n\nb: \x01\n", "line 4: invalid YAML: control characters are not allowed"},
        {"a: %x\n", "line 1: invalid YAML"},
        {"a: @x\n", "line 1: invalid YAML"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Err err = {0};
        Yaml *root = yaml_parse(cases[i].text, strlen(cases[i].text), "nla_meta.yaml", &err);
        cr_expect(!root, "accepted: %s", cases[i].text);
        expect_words(err.msg, "nla_meta.yaml", cases[i].words);
        yaml_free(root);
    }
}

Test(files, yaml_nests_64_deep_and_no_deeper) {
    for (int depth = 64; depth <= 65; depth++) {
        char text[160] = "a: "; /* the map around is the first level */
        memset(text + 3, '[', (size_t)depth - 1);
        memset(text + 3 + depth - 1, ']', (size_t)depth - 1);
        Err err = {0};
        Yaml *root = yaml_parse(text, strlen(text), "x.yaml", &err);
        cr_expect((root != NULL) == (depth == 64));
        if (!root) expect_words(err.msg, "x.yaml", "nested more than 64 deep");
        yaml_free(root);
    }
}

Test(files, a_yaml_file_of_more_than_16_mib_is_refused_unread) {
    char *path = put_text("big.yaml", "a: 1\n");
    cr_assert(truncate(path, (off_t)17 << 20) == 0);
    Err err = {0};
    cr_expect(!yaml_load(path, &err));
    expect_words(err.msg, path, "the limit is 16 MiB");
}

static Yaml *parsed(const char *text) {
    Err err = {0};
    Yaml *root = yaml_parse(text, strlen(text), "x.yaml", &err);
    cr_assert(root, "%s", err.msg);
    return root;
}

Test(files, yaml_numbers_are_read_only_where_they_are_numbers) {
    Yaml *root = parsed("a: 150\nb: '150'\nc: 1e-05\nd: -7\ne: 010\nf: nan\ng: .5\nh: 99999999999999999999\n"
                        "i: 0x10\nj: 12 apples\nk: null\nl: [1]\nm: 3.0\nn: !!str 5\no: 0\n");
    int64_t whole = 0;
    double real = 0;
    cr_expect(yaml_int(yaml_get(root, "a"), &whole) && whole == 150);
    cr_expect(yaml_double(yaml_get(root, "a"), &real) && real == 150);
    cr_expect(!yaml_int(yaml_get(root, "b"), &whole) && !yaml_double(yaml_get(root, "b"), &real));
    cr_expect(yaml_double(yaml_get(root, "c"), &real) && real == 1e-05);
    cr_expect(yaml_int(yaml_get(root, "d"), &whole) && whole == -7);
    cr_expect(!yaml_int(yaml_get(root, "e"), &whole));
    cr_expect(!yaml_double(yaml_get(root, "f"), &real));
    cr_expect(yaml_double(yaml_get(root, "g"), &real) && real == 0.5);
    cr_expect(!yaml_int(yaml_get(root, "h"), &whole));
    for (const char *name = "ijkln"; *name; name++) {
        char key[] = {*name, 0};
        cr_expect(!yaml_int(yaml_get(root, key), &whole) && !yaml_double(yaml_get(root, key), &real), "%s", key);
    }
    cr_expect(!yaml_int(yaml_get(root, "m"), &whole) && yaml_double(yaml_get(root, "m"), &real) && real == 3);
    cr_expect(yaml_int(yaml_get(root, "o"), &whole) && whole == 0);
    cr_expect(!yaml_int(NULL, &whole) && !yaml_get(root, "a.b") && !yaml_get(root, "zz") && !yaml_get(NULL, "a"));
    yaml_free(root);
}

static void expect_same(const Yaml *a, const Yaml *b) {
    cr_assert(a->kind == b->kind);
    if (a->kind == YAML_SCALAR) {
        cr_expect_str_eq(a->text, b->text);
        cr_expect(a->quoted == b->quoted, "quotes of \"%s\"", a->text);
    }
    cr_assert(arrlen(a->item) == arrlen(b->item) && arrlen(a->key) == arrlen(b->key));
    for (int i = 0; i < arrlen(a->key); i++) cr_expect_str_eq(a->key[i], b->key[i]);
    for (int i = 0; i < arrlen(a->item); i++) expect_same(a->item[i], b->item[i]);
}

static char *saved(const Yaml *root, const char *path) {
    Err err = {0};
    cr_assert(yaml_save(root, path, &err) == 0, "%s", err.msg);
    File file;
    cr_assert(file_map(&file, path, &err) == 0, "%s", err.msg);
    char *text = xstrndup(file.data, file.len);
    file_unmap(&file);
    return text;
}

static const char sidecar[] = "kind: nla_model\n"
                              "d_model: 3584\n"
                              "unknown: {deep: [a, {b: c}], empty: [], none: {}}\n"
                              "extraction:\n"
                              "  injection_scale: 150\n"
                              "  mse_scale: \"sqrt_d_model\"\n"
                              "  nothing:\n"
                              "  tilde: ~\n"
                              "tokens:\n"
                              "  injection_char: '\xE3\x88\x8E'\n"
                              "  emoji: \"\xF0\x9F\x98\x80\"\n"
                              "  critic_suffix_ids: [1318, 29, 366, 1708, 29]\n"
                              "  version: \"150\"\n"
                              "prompt_templates:\n"
                              "  av: |\n"
                              "    First line: with colon\n"
                              "\n"
                              "      indented # no comment\n"
                              "    <explanation>{text}</explanation>\n"
                              "  ar: |-\n"
                              "    no newline at the end\n"
                              "    second\n"
                              "  folded: >\n"
                              "    one\n"
                              "    line\n"
                              "  spaces: \"  leading\\n  and trailing  \\n\\n\"\n"
                              "list:\n"
                              "- \"quoted\"\n"
                              "- plain\n"
                              "-\n"
                              "- [nested, [deeper]]\n"
                              "- k: v\n"
                              "  w: x\n";

Test(files, a_sidecar_keeps_unknown_keys_quotes_and_blocks_when_saved) {
    Yaml *root = parsed(sidecar);
    char *path = in_dir("nla_meta.yaml"), *text = saved(root, path);
    Err err = {0};
    Yaml *again = yaml_load(path, &err);
    cr_assert(again, "%s", err.msg);
    expect_same(root, again);
    cr_expect(strstr(text, "  av: |\n    First line: with colon\n\n      indented # no comment\n"), "%s", text);
    cr_expect(strstr(text, "  ar: |-\n    no newline at the end\n"), "%s", text);
    cr_expect(strstr(text, "  critic_suffix_ids: [1318, 29, 366, 1708, 29]\n"), "%s", text);
    cr_expect(strstr(text, "injection_char: \"\xE3\x88\x8E\"\n"), "%s", text);
    char *third = saved(again, path);
    cr_expect_str_eq(text, third);
    free(third);
    free(text);
    yaml_free(root);
    yaml_free(again);
}

Test(files, awkward_yaml_texts_survive_a_save) {
    const char *texts[] = {
        "",       " ",      "\n",       "\n\n",       " a\nb",   "a\n b",        "a\nb ",
        "a \nb",  "\ta\nb", "a\n\tb",   "a\r\nb",     "a: b",    "- a",          "#x",
        "a #b",   "'",      "\"",       "\\n",        "a\n\n\n", "\n\na",        "  \n a",
        "...\nx", "---\nx", "\xC2\x85", "%a\nb",      "a\n...",  "\xEF\xBB\xBF", "a\n\xE2\x80\xA8\n",
        "null",   "[",      "a\nb\n ",  "a\n  \nb\n", "\x7f",    "a\n\x1b",      "\xF0\x9F\x98\x80\nb\n"};
    char *path = in_dir("awkward.yaml");
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        Yaml *root = yaml_new(YAML_MAP);
        yaml_set(root, "outer.text", texts[i], true);
        yaml_set(root, "outer.after", "1", false);
        yaml_set(root, "last", texts[i], true);
        free(saved(root, path));
        Err err = {0};
        Yaml *again = yaml_load(path, &err);
        cr_expect(again, "text %zu: %s", i, err.msg);
        if (again) expect_same(root, again);
        yaml_free(root);
        yaml_free(again);
    }
}

Test(files, setting_a_dotted_path_makes_maps_and_replaces_what_stood_there) {
    Yaml *root = parsed("a: 1\nb: {c: 2, d: [1, 2]}\n");
    yaml_set(root, "b.c", "3", false);
    yaml_set(root, "b.d", "text", true);
    yaml_set(root, "a.x.y", "4", false);
    yaml_set(root, "new.one", "5", false);
    char *text = saved(root, in_dir("set.yaml"));
    cr_expect_str_eq(text, "a:\n  x:\n    y: 4\nb:\n  c: 3\n  d: \"text\"\nnew:\n  one: 5\n", "%s", text);
    free(text);
    yaml_free(root);
}

Test(files, a_yaml_text_that_is_not_utf8_is_not_saved) {
    Yaml *root = yaml_new(YAML_MAP);
    yaml_set(root, "bad", "\xFF", true);
    char *path = put_text("keep.yaml", "old: 1\n");
    Err err = {0};
    cr_expect(yaml_save(root, path, &err) == -1);
    expect_words(err.msg, path, "a value is not UTF-8");
    yaml_free(root);
    root = yaml_load(path, &err);
    cr_expect(root && yaml_get(root, "old"));
    yaml_free(root);
}

/* ------------------------------------------------------------------------------------------------ files */

Test(files, what_is_not_a_readable_regular_file_is_refused) {
    char *fifo = in_dir("fifo"), *loop = in_dir("loop");
    cr_assert(mkfifo(fifo, 0600) == 0 && symlink("loop", loop) == 0);
    const char *paths[] = {dir, fifo, loop, "/dev/zero", "/nowhere/at/all", ""};
    const char *words[] = {"is a directory where a file is needed",
                           "is not a regular file",
                           "symbolic links",
                           "is not a regular file",
                           "No such file",
                           "No such file"};
    for (int i = 0; i < 6; i++) {
        Err err = {0};
        File file;
        cr_expect(file_map(&file, paths[i], &err) == -1, "%s", paths[i]);
        expect_words(err.msg, paths[i], words[i]);
        file_unmap(&file);
    }
}

Test(files, an_empty_file_maps_as_null) {
    char *path = put_text("empty", "");
    Err err = {0};
    File file;
    cr_assert(file_map(&file, path, &err) == 0);
    cr_expect(!file.data && file.len == 0);
    file_unmap(&file);
}

/* Maps a file, cuts it to `left` bytes and reads byte `at`; what the child says on stderr is in `said`. */
static int read_shrunk(const char *path, off_t left, size_t at, char *said, size_t size) {
    int ends[2];
    cr_assert(pipe(ends) == 0);
    pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], STDERR_FILENO);
        file_guard();
        Err err = {0};
        File file, other;
        if (file_map(&other, path, &err) || file_map(&file, path, &err) || truncate(path, left)) _exit(9);
        file_unmap(&other); /* its place in the list is free again */
        volatile char byte = file.data[at];
        (void)byte;
        _exit(0);
    }
    close(ends[1]);
    ssize_t got = read(ends[0], said, size - 1);
    said[got > 0 ? got : 0] = '\0';
    close(ends[0]);
    int status;
    cr_assert(waitpid(child, &status, 0) == child);
    return status;
}

Test(files, a_file_that_shrinks_while_mapped_ends_the_program_with_its_name) {
    char *path = in_dir("shrinks\x1b[2J"), said[1024];
    char *bytes = xcalloc(1, 1 << 20);
    put(path, bytes, 1 << 20);
    free(bytes);
    int status = read_shrunk(path, 4096, 500000, said, sizeof said);
    cr_expect(WIFEXITED(status) && WEXITSTATUS(status) == 1, "status %x", status);
    char *expected = kept("nla: error: %s/shrinks?[2J: the file shrank while it was being read; leave it alone during "
                          "the run and start again\n",
                          dir);
    cr_expect_str_eq(said, expected);
    status = read_shrunk(path, 4000, 100, said, sizeof said);
    cr_expect(WIFEXITED(status) && WEXITSTATUS(status) == 0 && !said[0], "what is left can be read");
}

Test(files, a_written_file_replaces_the_old_one_whole_and_leaves_no_temporary) {
    char *path = put_text("target", "old");
    Err err = {0};
    cr_assert(file_write(path, "new!", 4, &err) == 0, "%s", err.msg);
    File file;
    cr_assert(file_map(&file, path, &err) == 0);
    cr_expect(file.len == 4 && !memcmp(file.data, "new!", 4));
    file_unmap(&file);
    cr_expect(count_entries(dir) == 1);
}

Test(files, a_write_that_fails_says_why_and_keeps_the_old_file) {
    char *path = put_text("target", "old");
    char *big = xcalloc(1, 1 << 20);
    struct rlimit limit, small;
    getrlimit(RLIMIT_FSIZE, &limit);
    small = (struct rlimit){.rlim_cur = 1 << 16, .rlim_max = limit.rlim_max};
    signal(SIGXFSZ, SIG_IGN);
    setrlimit(RLIMIT_FSIZE, &small);
    Err err = {0};
    int status = file_write(path, big, 1 << 20, &err);
    setrlimit(RLIMIT_FSIZE, &limit);
    cr_expect(status == -1);
    expect_words(err.msg, path, "cannot write it: File too large; nothing was changed");
    File file;
    Err none = {0};
    cr_assert(file_map(&file, path, &none) == 0);
    cr_expect(file.len == 3 && !memcmp(file.data, "old", 3));
    file_unmap(&file);
    cr_expect(count_entries(dir) == 1);
    free(big);
}

Test(files, writing_onto_a_directory_or_into_none_is_refused) {
    Err err = {0}, other = {0};
    cr_expect(file_write(dir, "x", 1, &err) == -1);
    expect_words(err.msg, dir, "exists and is not a regular file");
    cr_expect(file_write("/nowhere/at/all", "x", 1, &other) == -1);
    expect_words(other.msg, "/nowhere/at/all", "cannot create it: No such file or directory");
}

/* ------------------------------------------------------------------------------------------------ number formats */

/* The value the bits stand for, from the definition: (-1)^s 2^(e-bias) 1.m, 2^(1-bias) 0.m, infinity, NaN. */
static double plain_value(uint32_t bits, int exponent_bits, int mantissa_bits) {
    int bias = (1 << (exponent_bits - 1)) - 1, top = (1 << exponent_bits) - 1;
    double mantissa = (double)(bits & ((1u << mantissa_bits) - 1)) / (double)(1 << mantissa_bits);
    int exponent = (int)(bits >> mantissa_bits) & top;
    double sign = bits >> (exponent_bits + mantissa_bits) & 1 ? -1 : 1;
    if (exponent == top) return mantissa != 0 ? NAN : sign * INFINITY;
    return sign * (exponent ? ldexp(1 + mantissa, exponent - bias) : ldexp(mantissa, 1 - bias));
}

static bool same_number(double a, double b) {
    return (isnan(a) && isnan(b)) || (a == b && signbit(a) == signbit(b));
}

Test(files, all_65536_f16_patterns_have_the_value_of_the_definition) {
    for (uint32_t bits = 0; bits < 65536; bits++)
        cr_assert(same_number(f16_to_f32((uint16_t)bits), plain_value(bits, 5, 10)), "0x%04x", bits);
}

Test(files, all_65536_bf16_patterns_have_the_value_of_the_definition_and_come_back) {
    for (uint32_t bits = 0; bits < 65536; bits++) {
        float value = bf16_to_f32((uint16_t)bits);
        cr_assert(same_number(value, plain_value(bits, 8, 7)), "0x%04x", bits);
        uint16_t back = f32_to_bf16(value);
        if (isnan(value))
            cr_assert(isnan(bf16_to_f32(back)));
        else
            cr_assert(back == bits, "0x%04x came back as 0x%04x", bits, back);
    }
}

static float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Between every two neighbours: below half goes down, above half goes up, half goes to the even one. */
Test(files, f32_rounds_to_the_nearest_bf16_and_halves_to_even) {
    for (uint32_t bits = 0; bits < 65536; bits++) {
        if ((bits & 0x7F80) == 0x7F80) continue; /* infinities and NaN have no neighbour above */
        uint32_t wide = bits << 16;
        cr_assert(f32_to_bf16(float_of(wide + 0x0001)) == bits);
        cr_assert(f32_to_bf16(float_of(wide + 0x7FFF)) == bits);
        cr_assert(f32_to_bf16(float_of(wide + 0x8000)) == bits + (bits & 1));
        cr_assert(f32_to_bf16(float_of(wide + 0x8001)) == bits + 1);
        cr_assert(f32_to_bf16(float_of(wide + 0xFFFF)) == bits + 1);
    }
    cr_expect(isnan(bf16_to_f32(f32_to_bf16(float_of(0x7F800001)))), "a NaN whose payload is cut off stays one");
    cr_expect(isnan(bf16_to_f32(f32_to_bf16(float_of(0xFFFFFFFF)))));
}

/* ------------------------------------------------------------------------------------------------ safetensors */

#define ONE(fields) "{\"w\":{" fields "}}"

/* Headers in front of 16 bytes of data. */
Test(files, a_safetensors_header_that_lies_is_refused_by_field) {
    const Case cases[] = {
        {"[]", "the header is not a JSON object"},
        {"7", "the header is not a JSON object"},
        {"", "empty where JSON is expected"},
        {"{\"w\":", "the text ends where a value is expected"},
        {"{} {}", "something follows"},
        {"{\"w\":3}", "tensor w: its entry is not an object"},
        {"{\"__metadata__\":[]}", "\"__metadata__\" is not an object"},
        {"{\"__metadata__\":{\"format\":1}}", "\"__metadata__\" holds something other than strings"},
        {ONE("\"dtype\":\"F32\",\"data_offsets\":[0,16]"), "tensor w: \"shape\" is not a list"},
        {ONE("\"dtype\":\"F32\",\"shape\":4,\"data_offsets\":[0,16]"), "tensor w: \"shape\" is not a list"},
        {ONE("\"dtype\":\"F32\",\"shape\":[-4],\"data_offsets\":[0,16]"), "tensor w: dimension 0 of \"shape\""},
        {ONE("\"dtype\":\"F32\",\"shape\":[1,4.0],\"data_offsets\":[0,16]"), "tensor w: dimension 1 of \"shape\""},
        {ONE("\"dtype\":\"F32\",\"shape\":[4e0],\"data_offsets\":[0,16]"), "tensor w: dimension 0 of \"shape\""},
        {ONE("\"dtype\":\"F32\",\"shape\":[\"4\"],\"data_offsets\":[0,16]"), "tensor w: dimension 0 of \"shape\""},
        {ONE("\"dtype\":\"F32\",\"shape\":[18446744073709551620],\"data_offsets\":[0,16]"), "dimension 0 of \"shape\""},
        {ONE("\"dtype\":\"F32\",\"shape\":[1,1,1,1,1,1,1,1,4],\"data_offsets\":[0,16]"),
         "9 dimensions; the limit is 8"},
        {ONE("\"dtype\":\"F32\",\"shape\":[1099511627776,1099511627776],\"data_offsets\":[0,16]"), "more elements"},
        {ONE("\"dtype\":\"F32\",\"shape\":[4611686018427387908],\"data_offsets\":[0,16]"), "more elements"},
        {ONE("\"dtype\":\"F32\",\"shape\":[0,1099511627776,1099511627776],\"data_offsets\":[0,16]"), "need 0 bytes"},
        {ONE("\"dtype\":\"F32\",\"shape\":[5],\"data_offsets\":[0,16]"),
         "F32 and its shape need 20 bytes, but data_offsets give 16"},
        {ONE("\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[0,16]"), "need 4 bytes, but data_offsets give 16"},
        {ONE("\"dtype\":\"BF16\",\"shape\":[4],\"data_offsets\":[0,16]"), "BF16 and its shape need 8 bytes"},
        {ONE("\"dtype\":\"F8_E4M3\",\"shape\":[15],\"data_offsets\":[0,16]"), "F8_E4M3 and its shape need 15 bytes"},
        {ONE("\"dtype\":\"BOOL\",\"shape\":[17],\"data_offsets\":[0,16]"), "BOOL and its shape need 17 bytes"},
        {ONE("\"dtype\":\"F4\",\"shape\":[31],\"data_offsets\":[0,16]"), "F4 and its shape"},
        {ONE("\"dtype\":32,\"shape\":[4],\"data_offsets\":[0,16]"), "tensor w: \"dtype\" is not a string"},
        {ONE("\"shape\":[4],\"data_offsets\":[0,16]"), "tensor w: \"dtype\" is not a string"},
        {ONE("\"dtype\":\"F32\",\"shape\":[4]"), "tensor w: \"data_offsets\" is not a list of two"},
        {ONE("\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0]"), "\"data_offsets\" is not a list of two"},
        {ONE("\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,8,16]"), "\"data_offsets\" is not a list of two"},
        {ONE("\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[-1,15]"), "\"data_offsets\" is not a list of two"},
        {ONE("\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0.0,16]"), "\"data_offsets\" is not a list of two"},
        {ONE("\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,99999999999999999999]"),
         "\"data_offsets\" is not a list"},
        {ONE("\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":{\"0\":0,\"1\":16}"),
         "\"data_offsets\" is not a list of two"},
        {ONE("\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[16,0]"),
         "data_offsets [16, 0] do not lie in the 16 bytes"},
        {ONE("\"dtype\":\"F32\",\"shape\":[5],\"data_offsets\":[0,20]"),
         "data_offsets [0, 20] do not lie in the 16 bytes"},
        {ONE("\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[9223372036854775791,9223372036854775807]"),
         "do not lie in"},
        {ONE("\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]"), "the last 8 bytes belong to no tensor"},
        {ONE("\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8,16]"),
         "tensor w: 8 bytes before it belong to no tensor"},
        {"{}", "the last 16 bytes belong to no tensor"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[3],\"data_offsets\":[0,12]},"
         "\"b\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8,16]}}",
         "tensors a and b overlap"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,16]},"
         "\"b\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,16]}}",
         "overlap"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},"
         "\"b\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8,16]}}",
         "tensor b: 4 bytes before it belong to no tensor"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},"
         "\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8,16]}}",
         "the key \"a\" stands twice"},
        {ONE("\"dtype\":\"F32\",\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,16]"),
         "the key \"dtype\" stands twice"},
        {"{\"a\\u0000b\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,16]}}",
         "tensor a: its name goes on after a NUL"},
        {"{\"\x80\":{}}", "not valid UTF-8"},
        {ONE("\"dtype\":[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[["),
         "nested more than 64 deep"},
    };
    char *path = in_dir("x.safetensors");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        put_safetensors(path, cases[i].text, 16);
        Err err = {0};
        Safetensors st;
        cr_expect(safetensors_open(&st, path, &err) == -1, "accepted: %s", cases[i].text);
        expect_words(err.msg, path, cases[i].words);
        safetensors_close(&st);
    }
}

static void expect_length_refused(const char *path, uint64_t length, size_t file_len, const char *words) {
    unsigned char bytes[64] = {0};
    for (int i = 0; i < 8; i++) bytes[i] = (unsigned char)(length >> (8 * i) & 0xFF);
    bytes[8] = '{', bytes[9] = '}';
    put(path, bytes, sizeof bytes);
    cr_assert(truncate(path, (off_t)file_len) == 0);
    Err err = {0};
    Safetensors st;
    cr_expect(safetensors_open(&st, path, &err) == -1);
    expect_words(err.msg, path, words);
    safetensors_close(&st);
}

Test(files, a_header_length_that_cannot_be_is_refused) {
    char *path = in_dir("x.safetensors");
    expect_length_refused(path, 0, 0, "0 bytes are too few");
    expect_length_refused(path, 0, 7, "7 bytes are too few");
    expect_length_refused(path, 0, 64, "empty where JSON is expected");
    expect_length_refused(path, 57, 64, "the header says 57 bytes, but the file has 64");
    expect_length_refused(path, UINT64_MAX, 64, "the header says 18446744073709551615 bytes");
    expect_length_refused(path, UINT64_MAX - 7, 64, "the header says 18446744073709551608 bytes");
    expect_length_refused(path, 100000001, 200000000, "a header of 100000001 bytes; the limit is 100 MB"); /* sparse */
}

Test(files, a_misaligned_tensor_is_refused_by_name) {
    char *path = in_dir("x.safetensors");
    const char *header = "{\"b\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]},"
                         "\"w\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[2,10]}}";
    put_safetensors(path, header, 10);
    Err err = {0};
    Safetensors st;
    cr_expect(safetensors_open(&st, path, &err) == -1);
    expect_words(err.msg, path, "tensor w: its data is not aligned to its F32 elements");
}

/* A small file with several types, an escape in a name, a scalar and an empty tensor. */
static size_t small_file(char *path) {
    static const float w[6] = {1, -2, 3.5f, -0.0f, 1e-40f, INFINITY};
    static const uint16_t h[3] = {0x3F80, 0x7FC1, 0x8000};
    static const int64_t n[1] = {INT64_MIN};
    static const uint8_t u[3] = {0, 127, 255};
    Tensor tensor[] = {
        {.name = "u\n\"8\"", .dtype = DT_U8, .n_dims = 1, .shape = {3}, .data = u, .bytes = 3},
        {.name = "model.layers.0.w", .dtype = DT_F32, .n_dims = 2, .shape = {2, 3}, .data = w, .bytes = sizeof w},
        {.name = "h", .dtype = DT_BF16, .n_dims = 3, .shape = {1, 3, 1}, .data = h, .bytes = sizeof h},
        {.name = "empty", .dtype = DT_F32, .n_dims = 2, .shape = {0, 7}, .data = w, .bytes = 0},
        {.name = "\xE3\x88\x8E", .dtype = DT_I64, .n_dims = 0, .data = n, .bytes = sizeof n},
    };
    Err err = {0};
    cr_assert(safetensors_save(path, tensor, 5, &err) == 0, "%s", err.msg);
    Safetensors st;
    cr_assert(safetensors_open(&st, path, &err) == 0, "%s", err.msg);
    cr_expect(arrlen(st.tensor) == 5);
    for (int i = 0; i < 5; i++) {
        const Tensor *t = safetensors_find(&st, tensor[i].name);
        cr_assert(t, "%s", tensor[i].name);
        cr_expect(t->dtype == tensor[i].dtype && t->n_dims == tensor[i].n_dims && t->bytes == tensor[i].bytes);
        cr_expect(!memcmp(t->shape, tensor[i].shape, sizeof t->shape));
        cr_expect(!memcmp(t->data, tensor[i].data, t->bytes));
    }
    cr_expect(!safetensors_find(&st, "model") && !safetensors_find(&st, ""));
    size_t data = (size_t)((const char *)st.tensor[0].data - st.file[0].data), len = st.file[0].len;
    cr_expect(data % 8 == 0, "the data starts at %zu", data);
    safetensors_close(&st);
    return len;
}

Test(files, tensors_of_every_kind_are_bit_exact_after_a_save) {
    small_file(in_dir("small.safetensors"));
    cr_expect(count_entries(dir) == 1);
}

Test(files, every_truncation_and_every_changed_byte_of_a_small_file_is_survived) {
    char *path = in_dir("small.safetensors"), *part = in_dir("part.safetensors");
    size_t len = small_file(path);
    Err err = {0};
    File file;
    cr_assert(file_map(&file, path, &err) == 0);
    char *bytes = xmalloc(len);
    memcpy(bytes, file.data, len);
    file_unmap(&file);
    for (size_t i = 0; i < len; i++) {
        Err why = {0}, ignored = {0};
        Safetensors st;
        put(part, bytes, i);
        cr_expect(safetensors_open(&st, part, &why) == -1, "%zu bytes are accepted", i);
        expect_words(why.msg, part, ": ");
        bytes[i] ^= 0x15;
        put(part, bytes, len);
        if (safetensors_open(&st, part, &ignored)) cr_expect(ignored.msg[0]);
        safetensors_close(&st);
        bytes[i] ^= 0x15;
    }
    put(part, bytes, len);
    FILE *longer = fopen(part, "ab");
    putc('x', longer);
    fclose(longer);
    Safetensors st;
    cr_expect(safetensors_open(&st, part, &err) == -1);
    expect_words(err.msg, part, "the last 1 bytes belong to no tensor");
    free(bytes);
}

Test(files, types_without_arithmetic_and_types_of_the_future_are_listed) {
    char *path = in_dir("x.safetensors");
    put_safetensors(path,
                    "{\"b\":{\"dtype\":\"BOOL\",\"shape\":[3],\"data_offsets\":[0,3]},"
                    "\"f\":{\"dtype\":\"F8_E4M3\",\"shape\":[5],\"data_offsets\":[3,8]},"
                    "\"z\":{\"dtype\":\"Z9\",\"shape\":[1000,1000],\"data_offsets\":[8,16]}} ",
                    16);
    Err err = {0};
    Safetensors st;
    cr_assert(safetensors_open(&st, path, &err) == 0, "%s", err.msg);
    for (int i = 0; i < 3; i++) cr_expect(st.tensor[i].dtype == DT_OTHER);
    cr_expect(dtype_size(DT_OTHER) == 0 && dtype_size(DT_BF16) == 2 && !strcmp(dtype_name(DT_U64), "U64"));
    safetensors_close(&st);
}

Test(files, a_file_without_tensors_and_a_header_padded_to_size_are_fine) {
    char *path = in_dir("x.safetensors");
    Err err = {0};
    cr_assert(safetensors_save(path, NULL, 0, &err) == 0, "%s", err.msg);
    Safetensors st;
    cr_assert(safetensors_open(&st, path, &err) == 0, "%s", err.msg);
    cr_expect(arrlen(st.tensor) == 0 && !safetensors_find(&st, "w"));
    safetensors_close(&st);

    Tensor tensor = {.name = "w", .dtype = DT_F32, .n_dims = 1, .shape = {2}, .bytes = 8};
    size_t len = 0;
    char *header = safetensors_header(&tensor, 1, 512, &len);
    cr_assert(header && len == 512 && header[511] == ' ');
    free(header);
    cr_expect(!safetensors_header(&tensor, 1, 40, &len), "it does not fit into 40 bytes");
}

Test(files, a_tensor_whose_shape_and_bytes_disagree_is_not_saved) {
    float w[2] = {0};
    Tensor tensor = {.name = "w", .dtype = DT_F32, .n_dims = 1, .shape = {3}, .data = w, .bytes = 8};
    Err err = {0}, other = {0};
    char *path = in_dir("x.safetensors");
    cr_expect(safetensors_save(path, &tensor, 1, &err) == -1);
    expect_words(err.msg, path, "tensor w: its shape and its 8 bytes disagree");
    tensor.dtype = DT_OTHER;
    cr_expect(safetensors_save(path, &tensor, 1, &other) == -1);
    expect_words(other.msg, path, "tensor w: this type cannot be written");
    cr_expect(count_entries(dir) == 0);
}

/* ------------------------------------------------------------------------------------------------ directories, shards */

static void put_shard(const char *name, const char *tensor) {
    float value[2] = {1, 2};
    Tensor t = {.name = tensor, .dtype = DT_F32, .n_dims = 1, .shape = {2}, .data = value, .bytes = 8};
    Err err = {0};
    cr_assert(safetensors_save(in_dir(name), &t, 1, &err) == 0, "%s", err.msg);
}

Test(files, an_index_that_lies_is_refused_by_name) {
    const Case cases[] = {
        {"", "empty where JSON is expected"},
        {"{}", "no \"weight_map\" object"},
        {"[]", "no \"weight_map\" object"},
        {"{\"weight_map\":[\"a\"]}", "no \"weight_map\" object"},
        {"{\"weight_map\":{\"a\":1}}", "a value of \"weight_map\" is not a string"},
        {"{\"weight_map\":{\"a\":\"absent.safetensors\"}}", "absent.safetensors: No such file"},
        {"{\"weight_map\":{\"a\":\"../1.safetensors\"}}", "names \"../1.safetensors\", which is not a plain file name"},
        {"{\"weight_map\":{\"a\":\"/etc/passwd\"}}", "names \"/etc/passwd\", which is not a plain file name"},
        {"{\"weight_map\":{\"a\":\"sub/1.safetensors\"}}", "not a plain file name"},
        {"{\"weight_map\":{\"a\":\"..\"}}", "not a plain file name"},
        {"{\"weight_map\":{\"a\":\"\"}}", "not a plain file name"},
        {"{\"weight_map\":{\"a\":\"1.safetensors\\u0000\"}}", "not a plain file name"},
        {"{\"weight_map\":{\"a\":\"sub\"}}", "sub: is a directory where a file is needed"},
        {"{\"weight_map\":{\"a\":\"1.safetensors\",\"c\":\"1.safetensors\"}}",
         "the tensor c is not in 1.safetensors, where \"weight_map\" puts it"},
        {"{\"weight_map\":{\"a\":\"2.safetensors\",\"b\":\"1.safetensors\"}}",
         "the tensor a is not in 2.safetensors, where \"weight_map\" puts it"},
        {"{\"weight_map\":{\"a\":\"1.safetensors\",\"b\":\"copy.safetensors\"}}", "the tensor a is there twice"},
        {"{\"weight_map\":{\"a\":\"1.safetensors\"}", "invalid JSON"},
    };
    put_shard("1.safetensors", "a");
    put_shard("2.safetensors", "b");
    put_shard("copy.safetensors", "a");
    cr_assert(mkdir(in_dir("sub"), 0700) == 0);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        put_text("model.safetensors.index.json", cases[i].text);
        Err err = {0};
        Safetensors st;
        cr_expect(safetensors_open(&st, dir, &err) == -1, "accepted: %s", cases[i].text);
        expect_words(err.msg, dir, cases[i].words);
        safetensors_close(&st);
    }
}

Test(files, a_directory_is_read_through_its_index_and_through_symbolic_links) {
    put_shard("blob", "a");
    put_shard("2.safetensors", "b");
    cr_assert(symlink("blob", in_dir("1.safetensors")) == 0);
    put_text("model.safetensors.index.json", "{\"metadata\":{\"total_size\":16},\"weight_map\":"
                                             "{\"b\":\"2.safetensors\",\"a\":\"1.safetensors\"}}");
    Err err = {0};
    Safetensors st;
    cr_assert(safetensors_open(&st, dir, &err) == 0, "%s", err.msg);
    cr_expect(arrlen(st.file) == 2 && safetensors_find(&st, "a") && safetensors_find(&st, "b"));
    safetensors_close(&st);

    put_shard("model.safetensors", "single");
    cr_assert(safetensors_open(&st, dir, &err) == 0, "%s", err.msg);
    cr_expect(arrlen(st.file) == 1 && safetensors_find(&st, "single"), "model.safetensors comes before the index");
    safetensors_close(&st);
}

Test(files, a_directory_without_weights_or_with_a_directory_for_weights_is_refused) {
    Err err = {0}, other = {0}, third = {0};
    Safetensors st;
    cr_expect(safetensors_open(&st, dir, &err) == -1);
    expect_words(err.msg, dir, "neither model.safetensors nor model.safetensors.index.json is there");
    char *path = in_dir("model.safetensors");
    cr_assert(mkdir(path, 0700) == 0);
    cr_expect(safetensors_open(&st, dir, &other) == -1);
    expect_words(other.msg, path, "is a directory where a file is needed");
    cr_expect(safetensors_open(&st, "/nowhere/at/all", &third) == -1);
    expect_words(third.msg, "/nowhere/at/all", "No such file");
}
