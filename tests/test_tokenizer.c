/* test_tokenizer.c - tokenizer.c against what HF makes of small tokenizers (tests/golden/tokenizer, written by
 * tests/tokenizer_parity.py --golden), against broken files, and against facts about the real ones where they are. */
#include "../nla.h"

#include <criterion/criterion.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <stb/stb_ds.h>

static const char *const families[] = {"smollm2", "qwen3", "llama3", "gemma3"};
static const char *const odd[] = {"odd_nfc", "odd_split", "odd_fallback"};
static const char *const chats[] = {"smollm2", "qwen2.5", "qwen3", "llama3", "llama3.1", "gemma3"};
#define LENGTH(array) (sizeof(array) / sizeof((array)[0]))

static Tokenizer *load(const char *dir) {
    Err err = {0};
    Tokenizer *tok = tokenizer_load(dir, &err);
    cr_assert(tok, "%s", err.msg);
    return tok;
}

static Tokenizer *load_golden(const char *name) {
    char *dir = xprintf("tests/golden/tokenizer/%s", name);
    Tokenizer *tok = load(dir);
    free(dir);
    return tok;
}

static int *encode(const Tokenizer *tok, const char *text, size_t len, bool special) {
    Err err = {0};
    int *ids = NULL;
    cr_assert(tokenizer_encode(tok, text, len, special, &ids, &err) == 0, "%s", err.msg);
    return ids;
}

/* ------------------------------------------------------------------------------------------------ golden files */

static void expect_ids(const char *where, const Json *row, const char *key, const int *ids) {
    int list = json_get(row, 0, key), i = 0;
    cr_assert(json_size(row, list) == (int)arrlen(ids), "%s: %s: %d ids, expected %d", where, key, (int)arrlen(ids),
              json_size(row, list));
    for (int v = json_first(row, list); v >= 0; v = json_next(row, v), i++) {
        int64_t id = -1;
        json_int(row, v, &id);
        cr_assert(ids[i] == id, "%s: %s[%d] is %d, expected %d", where, key, i, ids[i], (int)id);
    }
}

static void expect_text(const char *where, const Json *row, const char *key, const char *text, size_t len) {
    size_t expected_len;
    char *expected = json_string(row, json_get(row, 0, key), &expected_len);
    cr_assert(expected && len == expected_len && !memcmp(text, expected, len), "%s: %s is \"%s\", expected \"%s\"",
              where, key, text, expected);
    free(expected);
}

static void expect_encoding(const char *where, const Tokenizer *tok, const Json *row) {
    size_t len;
    char *text = json_string(row, json_get(row, 0, "text"), &len);
    int *plain = encode(tok, text, len, false), *ids = encode(tok, text, len, true);
    expect_ids(where, row, "plain", plain);
    expect_ids(where, row, "ids", ids);
    free(text);
    text = tokenizer_decode(tok, ids, (int)arrlen(ids), true, &len);
    expect_text(where, row, "decoded", text, len);
    free(text);
    text = tokenizer_decode(tok, ids, (int)arrlen(ids), false, &len);
    expect_text(where, row, "all", text, len);
    free(text);
    arrfree(plain);
    arrfree(ids);
}

static void expect_chat(const char *where, const Tokenizer *tok, const Json *row) {
    Err err = {0};
    ChatMessage message[8];
    int n = 0, list = json_get(row, 0, "messages");
    for (int m = json_first(row, list); m >= 0; m = json_next(row, m), n++) {
        int role = json_first(row, m);
        message[n] = (ChatMessage){json_string(row, role, NULL), json_string(row, json_next(row, role), NULL)};
    }
    bool generate = false;
    json_bool(row, json_get(row, 0, "generate"), &generate);
    char *date = json_string(row, json_get(row, 0, "date"), NULL);
    char *text = chat_render(tok, message, n, generate, *date ? date : NULL, &err);
    if (!text) text = xprintf("ERROR %s", err.msg);
    expect_text(where, row, "text", text, strlen(text));
    for (int i = 0; i < n; i++) {
        free((char *)(uintptr_t)message[i].role);
        free((char *)(uintptr_t)message[i].content);
    }
    free(date);
    free(text);
}

/* Calls expect() with each line of a JSONL file. */
static void each_row(const char *name, const char *file_name,
                     void (*expect)(const char *, const Tokenizer *, const Json *)) {
    Err err = {0};
    File file;
    Tokenizer *tok = load_golden(name);
    char *path = xprintf("tests/golden/tokenizer/%s/%s", name, file_name);
    cr_assert(file_map(&file, path, &err) == 0, "%s", err.msg);
    int line = 1;
    for (const char *at = file.data, *end = at + file.len, *stop; at < end; at = stop + 1, line++) {
        stop = memchr(at, '\n', (size_t)(end - at));
        char *where = xprintf("%s:%d", path, line);
        Json row;
        cr_assert(json_parse(&row, at, (size_t)(stop - at), where, &err) == 0, "%s", err.msg);
        expect(where, tok, &row);
        json_free(&row);
        free(where);
    }
    cr_assert(line > 1);
    file_unmap(&file);
    free(path);
    tokenizer_free(tok);
}

Test(tokenizer, ids_and_decoded_texts_of_the_four_families_equal_hf) {
    for (size_t i = 0; i < LENGTH(families); i++) each_row(families[i], "expected.jsonl", expect_encoding);
}

Test(tokenizer, flags_of_added_tokens_and_rare_steps_equal_hf) {
    for (size_t i = 0; i < LENGTH(odd); i++) each_row(odd[i], "expected.jsonl", expect_encoding);
}

Test(tokenizer, chat_renderings_equal_apply_chat_template) {
    for (size_t i = 0; i < LENGTH(chats); i++) each_row(chats[i], "chat.jsonl", expect_chat);
}

/* ------------------------------------------------------------------------------------------------ text and ids */

Test(tokenizer, what_is_not_utf8_is_read_as_u_fffd) {
    /* each with the number of U+FFFD that Python and Rust make of it */
    static const struct {
        const char *bytes;
        int replaced;
    } broken[] = {{"\xFF", 1},     {"\xC0\xAF", 2},        {"\xE0\x80\x80", 3}, {"\xE2\x82", 1},
                  {"\xE2\x28", 1}, {"\xED\xA0\x80", 3},    {"\xF0\x9F\x98", 1}, {"\xF4\x90\x80\x80", 4},
                  {"\x80", 1},     {"\xF0\x9F\xE2\x82", 2}};
    for (size_t f = 0; f < LENGTH(families); f++) {
        Tokenizer *tok = load_golden(families[f]);
        for (size_t i = 0; i < LENGTH(broken); i++) {
            char *text = xprintf("a%sb", broken[i].bytes), repaired[32] = "a";
            for (int n = 0; n < broken[i].replaced; n++) strcat(repaired, "\xEF\xBF\xBD");
            if (broken[i].bytes[1] != '(')
                strcat(repaired, "b");
            else
                strcat(repaired, "(b");
            int *ids = encode(tok, text, strlen(text), false),
                *expected = encode(tok, repaired, strlen(repaired), false);
            cr_assert(arrlen(ids) == arrlen(expected) && !memcmp(ids, expected, arrlenu(ids) * sizeof *ids),
                      "%s: case %zu", families[f], i);
            arrfree(ids);
            arrfree(expected);
            free(text);
        }
        tokenizer_free(tok);
    }
}

Test(tokenizer, decoding_joins_bytes_before_it_validates_them) {
    Tokenizer *tok = load_golden("llama3");
    int ids[] = {
        tokenizer_id(tok, "ä"), tokenizer_id(tok, "½"), tokenizer_id(tok, "ł"), tokenizer_id(tok, "ä"), -7, 1 << 30};
    size_t len;
    char *text = tokenizer_decode(tok, ids, 6, false, &len); /* E4 BD A0, then E4 alone; ids without a token */
    cr_assert_str_eq(text, "你\xEF\xBF\xBD");
    cr_assert(len == 6);
    free(text);
    tokenizer_free(tok);
}

Test(tokenizer, pieces_joined_are_the_decoded_text) {
    static const char text[] = "Hi  you're 12 é 人工\n<unused7> x";
    for (size_t f = 0; f < LENGTH(families); f++) {
        Tokenizer *tok = load_golden(families[f]);
        int *ids = encode(tok, text, strlen(text), false);
        char *joined = NULL;
        for (int i = 0; i < arrlen(ids); i++) {
            size_t len;
            const char *piece = tokenizer_piece(tok, ids[i], &len);
            cr_assert(piece);
            memcpy(arraddnptr(joined, len), piece, len);
        }
        cr_assert(arrlenu(joined) == strlen(text) && !memcmp(joined, text, strlen(text)), "%s", families[f]);
        arrfree(joined);
        arrfree(ids);
        tokenizer_free(tok);
    }
}

Test(tokenizer, encoding_appends_and_takes_an_empty_text) {
    Tokenizer *tok = load_golden("gemma3");
    Err err = {0};
    int *ids = NULL;
    arrput(ids, 42);
    cr_assert(tokenizer_encode(tok, NULL, 0, true, &ids, &err) == 0);
    cr_assert(arrlen(ids) == 2 && ids[0] == 42 && ids[1] == tokenizer_bos(tok));
    cr_assert(ids[1] == tokenizer_id(tok, "<bos>") && tokenizer_is_special(tok, ids[1]));
    cr_assert(tokenizer_eos(tok) == tokenizer_id(tok, "<end_of_turn>"));
    size_t len;
    cr_assert(tokenizer_piece(tok, -1, &len) == NULL && tokenizer_piece(tok, tokenizer_vocab_size(tok), &len) == NULL);
    cr_assert(!tokenizer_is_special(tok, -1) && tokenizer_id(tok, "no such token") == -1);
    arrfree(ids);
    tokenizer_free(tok);
}

/* A megabyte that is one word to BPE: with a rescan of all pairs after each merge this would take hours. */
Test(tokenizer, a_long_word_takes_n_log_n) {
    size_t len = 1 << 20;
    char *text = xmalloc(len);
    for (size_t i = 0; i < len; i++) text[i] = "theinon"[i % 7];
    for (size_t f = 0; f < LENGTH(families); f++) {
        Tokenizer *tok = load_golden(families[f]);
        int *ids = encode(tok, text, len, false);
        size_t decoded_len;
        char *decoded = tokenizer_decode(tok, ids, (int)arrlen(ids), false, &decoded_len);
        cr_assert(decoded_len == len && !memcmp(decoded, text, len), "%s", families[f]);
        free(decoded);
        arrfree(ids);
        tokenizer_free(tok);
    }
    free(text);
}

typedef struct {
    const Tokenizer *tok;
    int *ids;
} Job;

static void *encode_job(void *argument) {
    Job *job = argument;
    for (int i = 0; i < 200; i++) {
        Err err = {0};
        tokenizer_encode(job->tok, "It's 42 \u00e9t\u00e9s\u2028 \u1c8a the<|im_end|>", 31, true, &job->ids, &err);
    }
    return NULL;
}

Test(tokenizer, threads_may_share_one) {
    Tokenizer *tok = load_golden("qwen3");
    pthread_t thread[4];
    Job job[4];
    for (int i = 0; i < 4; i++) {
        job[i] = (Job){tok, NULL};
        pthread_create(&thread[i], NULL, encode_job, &job[i]);
    }
    for (int i = 0; i < 4; i++) pthread_join(thread[i], NULL);
    for (int i = 0; i < 4; i++) {
        cr_assert(arrlen(job[i].ids) > 200 && arrlen(job[i].ids) == arrlen(job[0].ids));
        cr_assert(!memcmp(job[i].ids, job[0].ids, arrlenu(job[0].ids) * sizeof(int)));
    }
    for (int i = 0; i < 4; i++) arrfree(job[i].ids);
    tokenizer_free(tok);
}

/* ------------------------------------------------------------------------------------------------ broken files */

#define DECODER ",\"decoder\":{\"type\":\"Fuse\"}"
#define MODEL(vocab, merges) "\"model\":{\"type\":\"BPE\",\"vocab\":" vocab ",\"merges\":" merges "}"
#define PLAIN MODEL("{\"a\":0,\"b\":1}", "[]")
#define REGEX(regex)                                                                                                   \
    "{" PLAIN DECODER                                                                                                  \
    ",\"pre_tokenizer\":{\"type\":\"Split\",\"behavior\":\"Isolated\",\"pattern\":{\"Regex\":\"" regex "\"}}}"

static Tokenizer *parse(const char *json, Err *err) {
    return tokenizer_parse(json, strlen(json), "t.json", err);
}

Test(tokenizer, broken_files_are_refused_with_the_field_and_the_reason) {
    static const struct {
        const char *json, *message;
    } broken[] = {
        {"", "t.json: empty"},
        {"[]", "model: must be an object"},
        {"{\"model\":{\"type\":\"Unigram\"}}", "model: the type \"Unigram\" is not implemented"},
        {"{\"model\":{\"vocab\":{}}}", "model.merges: must be an array"},
        {"{" MODEL("[]", "[]") "}", "model.vocab: must be an object"},
        {"{" MODEL("{\"a\":-1}", "[]") "}", "the id -1 is not in 0..16777216"},
        {"{" MODEL("{\"a\":16777217}", "[]") "}", "the id 16777217 is not in"},
        {"{" MODEL("{\"a\":1.5}", "[]") "}", "model.vocab: an id is not an integer"},
        {"{" MODEL("{\"a\":\"1\"}", "[]") "}", "model.vocab: an id is not an integer"},
        {"{" MODEL("{\"a\":1,\"b\":1}", "[]") "}", "two tokens have the id 1"},
        {"{" MODEL("{\"a\":0}", "[\"a x\"]") "}", "model.merges[0]: \"x\" is not in model.vocab"},
        {"{" MODEL("{\"a\":0}", "[[\"a\",\"a\"]]") "}", "model.merges[0]: \"aa\" is not in model.vocab"},
        {"{" MODEL("{\"a\":0}", "[[\"a\"]]") "}", "model.merges: an entry is neither"},
        {"{" MODEL("{\"a\":0}", "[\"a a a\"]") "}", "model.merges: an entry is neither"},
        {"{" MODEL("{\"a\":0}", "[[1,2]]") "}", "model.merges: an entry is neither"},
        {"{\"model\":{\"vocab\":{},\"merges\":[],\"dropout\":0.1}}", "model.dropout: is not implemented"},
        {"{\"model\":{\"vocab\":{},\"merges\":[],\"end_of_word_suffix\":\"</w>\"}}",
         "model.end_of_word_suffix: is not"},
        {"{\"model\":{\"vocab\":{},\"merges\":[],\"byte_fallback\":1}}", "model.byte_fallback: must be true or false"},
        {"{\"model\":{\"vocab\":{},\"merges\":[],\"unk_token\":\"<unk>\"}}", "model.unk_token: is not in model.vocab"},
        {"{" PLAIN "}", "decoder: null is not implemented"},
        {"{" PLAIN ",\"decoder\":{\"type\":\"WordPiece\"}}", "decoder: the type \"WordPiece\" is not implemented"},
        {"{" PLAIN DECODER ",\"normalizer\":{\"type\":\"NFKC\"}}", "normalizer: the type \"NFKC\" is not implemented"},
        {"{" PLAIN DECODER ",\"normalizer\":{\"type\":\"Replace\",\"pattern\":{\"String\":\"\"}}}",
         "normalizer: pattern"},
        {"{" PLAIN DECODER ",\"pre_tokenizer\":{\"type\":\"Metaspace\"}}", "pre_tokenizer: the type \"Metaspace\""},
        {"{" PLAIN DECODER ",\"pre_tokenizer\":{\"type\":\"Split\",\"behavior\":\"Foo\"}}", "an unknown behavior"},
        {"{" PLAIN DECODER ",\"post_processor\":{\"type\":\"BertProcessing\"}}", "post_processor: the type"},
        {"{" PLAIN DECODER ",\"added_tokens\":[{\"content\":\"x\"}]}", "added_tokens.id: an id is not an integer"},
        {"{" PLAIN DECODER ",\"added_tokens\":[{\"id\":1,\"content\":\"x\"}]}",
         "added_tokens: two tokens have the id 1"},
        {"{" PLAIN DECODER ",\"added_tokens\":[{\"id\":2,\"content\":\"a\"}]}",
         "added_tokens: the token \"a\" stands twice"},
        {"{" PLAIN DECODER ",\"added_tokens\":[{\"id\":2,\"content\":\"\"}]}", "added_tokens: content must be"},
        {REGEX("(a"), "the regular expression: missing closing parenthesis at byte 2"},
        {REGEX("\\\\w+"), "in the regular expression, \"\\w+\" is not implemented"},
        {REGEX("[a[b]]"), "in the regular expression, \"[b]]\" is not implemented"},
        {REGEX("(?i:ss)"), "in the regular expression, \"(?i:ss)\" is not implemented"},
        {REGEX("^a"), "in the regular expression, \"^a\" is not implemented"},
    };
    for (size_t i = 0; i < LENGTH(broken); i++) {
        Err err = {0};
        Tokenizer *tok = parse(broken[i].json, &err);
        cr_assert(!tok && strstr(err.msg, "t.json") && strstr(err.msg, broken[i].message),
                  "%s\ngave \"%s\", expected \"%s\"", broken[i].json, err.msg, broken[i].message);
    }
}

Test(tokenizer, a_regex_that_backtracks_without_end_is_an_error_and_leaves_the_ids) {
    Err err = {0};
    Tokenizer *tok = parse(REGEX("(?:a|aa)+(?:a|aa)+(?:a|b?a)+[cd]"), &err);
    cr_assert(tok, "%s", err.msg);
    char text[2000];
    memset(text, 'a', sizeof text);
    int *ids = NULL;
    arrput(ids, 7);
    cr_assert(tokenizer_encode(tok, text, sizeof text, false, &ids, &err) == -1);
    cr_assert(strstr(err.msg, "regular expression gave up"), "%s", err.msg);
    cr_assert(arrlen(ids) == 1 && ids[0] == 7);
    arrfree(ids);
    tokenizer_free(tok);
}

Test(tokenizer, a_missing_directory_and_a_foreign_chat_template_are_named) {
    Err err = {0};
    cr_assert(!tokenizer_load("/nowhere", &err));
    cr_assert(strstr(err.msg, "/nowhere/tokenizer.json"), "%s", err.msg);

    ChatMessage message = {"user", "Hi"}, stranger = {"tool", "Hi"};
    Tokenizer *tok = load_golden("odd_nfc"); /* has no tokenizer_config.json */
    err = (Err){0};
    cr_assert(!chat_render(tok, &message, 1, true, NULL, &err));
    cr_assert(strstr(err.msg, "tokenizer_config.json: chat_template: is missing"), "%s", err.msg);
    tokenizer_free(tok);

    tok = load_golden("smollm2");
    err = (Err){0};
    cr_assert(!chat_render(tok, &stranger, 1, true, NULL, &err) && strstr(err.msg, "the role \"tool\""), "%s", err.msg);
    err = (Err){0};
    cr_assert(!chat_render(tok, &message, 0, true, NULL, &err));
    tokenizer_free(tok);
}

Test(tokenizer, chat_template_jinja_goes_before_the_configuration) {
    Err err = {0};
    char dir[] = "/tmp/nla_test_XXXXXX";
    cr_assert(mkdtemp(dir));
    static const char json[] = "{" PLAIN DECODER "}", config[] = "{\"chat_template\":\"<|im_start|>\"}",
                      other[] = "[INST]";
    char *path[] = {xprintf("%s/tokenizer.json", dir), xprintf("%s/tokenizer_config.json", dir),
                    xprintf("%s/chat_template.jinja", dir)};
    cr_assert(!file_write(path[0], json, strlen(json), &err) && !file_write(path[1], config, strlen(config), &err) &&
              !file_write(path[2], other, strlen(other), &err));
    ChatMessage message = {"user", "Hi"};
    Tokenizer *tok = load(dir);
    cr_assert(!chat_render(tok, &message, 1, true, NULL, &err));
    cr_assert(strstr(err.msg, "is none of those implemented"), "%s", err.msg);
    tokenizer_free(tok);
    unlink(path[2]);
    tok = load(dir);
    char *text = chat_render(tok, &message, 1, true, NULL, &err);
    cr_assert_str_eq(text, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
    free(text);
    tokenizer_free(tok);
    for (int i = 0; i < 3; i++) {
        unlink(path[i]);
        free(path[i]);
    }
    rmdir(dir);
}

/* ------------------------------------------------------------------------------------------------ the real files */

/* The markers of the released pairs, each one token, and the sizes of the vocabularies. */
Test(tokenizer, the_real_files_load_and_hold_the_known_markers) {
    static const struct {
        const char *dir, *marker;
        int id, size, bos;
    } real[] = {{"../shared/tokenizers/qwen3", "㈎", 149705, 151669, -1},
                {"../shared/tokenizers/llama3_1", "㎡", 105565, 128256, 128000},
                {"../shared/tokenizers/gemma3", "㈜", 246566, 262145, 2}};
    int present = 0;
    for (size_t i = 0; i < LENGTH(real); i++) {
        if (access(real[i].dir, R_OK)) continue;
        present++;
        Tokenizer *tok = load(real[i].dir);
        int *ids = encode(tok, real[i].marker, strlen(real[i].marker), false);
        cr_assert(arrlen(ids) == 1 && ids[0] == real[i].id, "%s: %d", real[i].dir, ids[0]);
        cr_assert(tokenizer_vocab_size(tok) == real[i].size, "%s: %d", real[i].dir, tokenizer_vocab_size(tok));
        cr_assert(tokenizer_bos(tok) == real[i].bos && tokenizer_eos(tok) > 0);
        arrfree(ids);
        tokenizer_free(tok);
    }
    if (!present) cr_skip_test("../shared/tokenizers is not there");
}
