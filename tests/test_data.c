/* test_data.c - data.c: corpora in every form with their errors, and datasets that are whole or not there.
 * All comparisons are exact. */
#define _GNU_SOURCE
#include "../nla.h"

#include <criterion/criterion.h>
#include <fcntl.h>
#include <ftw.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <stb/stb_ds.h>

/* ------------------------------------------------------------------------------------------------ help */

static char dir[64];
static char **strings; /* stb: freed when the test ends */

static void make_dir(void) {
    strcpy(dir, "/tmp/nla-data-XXXXXX");
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

TestSuite(data, .init = make_dir, .fini = remove_dir, .timeout = 120);

#define kept(...) keep(xprintf(__VA_ARGS__))

static char *keep(char *text) {
    arrput(strings, text);
    return text;
}

static char *in_dir(const char *name) {
    return kept("%s/%s", dir, name);
}

static char *put(const char *name, const char *text) {
    char *path = in_dir(name);
    FILE *file = fopen(path, "wb");
    cr_assert(file && fputs(text, file) >= 0 && !fclose(file), "%s", path);
    return path;
}

static char *gzipped(const char *name, const char *text) {
    char *command = kept("gzip -f '%s'", put(name, text));
    cr_assert(system(command) == 0);
    return kept("%s/%s.gz", dir, name);
}

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

/* The whole corpus as "id=text;id=text;", or what went wrong. */
static char *read_all(const char *path, Err *err) {
    char *seen = NULL;
    size_t len;
    FILE *out = open_memstream(&seen, &len);
    Corpus *corpus = corpus_open(path, err);
    Document doc;
    int status = corpus ? 1 : -1;
    while (status > 0 && (status = corpus_next(corpus, &doc, err)) > 0) {
        cr_expect(doc.text[doc.len] == '\0');
        fprintf(out, "%s=", doc.id);
        fwrite(doc.text, 1, doc.len, out);
        putc(';', out);
    }
    corpus_close(corpus);
    fclose(out);
    if (status == 0) return seen;
    free(seen);
    return NULL;
}

static void expect_documents(const char *path, const char *expected) {
    Err err = {0};
    char *seen = read_all(path, &err);
    cr_assert(seen, "%s", err.msg);
    cr_expect_str_eq(seen, expected);
    free(seen);
}

static void expect_refused(const char *path, const char *words) {
    Err err = {0};
    char *seen = read_all(path, &err);
    cr_expect(!seen, "accepted: %s", path);
    if (!seen) expect_words(err.msg, path, words);
    free(seen);
}

/* ------------------------------------------------------------------------------------------------ corpora */

Test(data, jsonl_gives_text_or_prompt_under_its_own_id_or_its_line) {
    char *path = put("c.jsonl", "{\"text\": \"one\", \"doc_id\": \"A\"}\n"
                                "\n"
                                "  \t\r\n"
                                "{\"id\": 42, \"text\": \"two\\n\\u00e9\"}\r\n"
                                "{\"prompt\": \"three\", \"id\": [1]}\n"
                                "{\"text\": \"\"}");
    expect_documents(path, "A=one;42=two\n\xC3\xA9;c.jsonl:5=three;c.jsonl:6=;");
    expect_documents(put("c.json", "{\"text\": \"x\"}\n"), "c.json:1=x;");
    expect_documents(put("none.jsonl", ""), "");
}

Test(data, a_bad_line_of_jsonl_is_an_error_with_file_and_line) {
    const char *cases[][2] = {
        {"{\"text\": \"ok\"}\n{\"text\": \"open\n", "line 2: invalid JSON at column 15: a string does not end"},
        {"{\"text\": \"ok\"}\n\n[1]\n", "line 3: not a JSON object"},
        {"{\"text\": \"ok\"}\n{\"text\": 5}\n", "line 2: the text is not a string"},
        {"{\"text\": null, \"prompt\": \"x\"}\n", "line 1: the text is not a string"},
        {"{\"url\": 1, \"content\": \"x\"}\n", "line 1: no \"text\" or \"prompt\"; the keys are: url, content"},
        {"{}\n", "line 1: no \"text\" or \"prompt\"; the keys are: "},
        {"plain words\n", "line 1: invalid JSON at column 1: expected a value"},
        {"{\"text\": \"a\"} {\"text\": \"b\"}\n", "line 1: invalid JSON at column 15: something follows"},
        {"{\"text\": \"\xFF\"}\n", "line 1: invalid JSON at column 11: a string is not valid UTF-8"},
        {"{\"text\": \"a\", \"text\": \"b\"}\n", "the key \"text\" stands twice"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) expect_refused(put("c.jsonl", cases[i][0]), cases[i][1]);
}

Test(data, only_the_first_keys_of_a_row_without_text_are_named) {
    char *text = NULL;
    size_t len;
    FILE *out = open_memstream(&text, &len);
    for (int i = 0; i < 500; i++) fprintf(out, "%c\"a key with a rather long name %d\": 1", i ? ',' : '{', i);
    fputs("}\n", out);
    fclose(out);
    expect_refused(put("c.jsonl", text), "a rather long name 10, ...");
    free(text);
}

Test(data, a_text_file_is_one_document_whatever_its_bytes) {
    expect_documents(put("a.txt", "one\n\ntwo\xFF\r\n"), "a.txt=one\n\ntwo\xFF\r\n;");
    expect_documents(put("empty.txt", ""), "empty.txt=;");
}

Test(data, a_directory_is_read_by_name_without_hidden_files_and_folders) {
    char *sub = in_dir("texts");
    cr_assert(mkdir(sub, 0700) == 0 && mkdir(in_dir("texts/inner"), 0700) == 0);
    expect_refused(sub, "no files in this directory");
    put("texts/b.txt", "B");
    put("texts/a.txt", "A");
    put("texts/.hidden", "H");
    put("texts/c.jsonl", "{\"text\": \"C\"}\n{\"text\": \"D\"}\n");
    gzipped("texts/d.txt", "E");
    expect_documents(sub, "a.txt=A;b.txt=B;c.jsonl:1=C;c.jsonl:2=D;d.txt.gz=E;");
    cr_assert(symlink("nowhere", in_dir("texts/z.txt")) == 0);
    expect_refused(in_dir("texts/z.txt"), "No such file");
    Err err = {0};
    cr_expect(!read_all(sub, &err));
    expect_words(err.msg, "texts/z.txt", "No such file");
}

static void give_stdin(const char *text) {
    int ends[2];
    cr_assert(pipe(ends) == 0 && write(ends[1], text, strlen(text)) == (ssize_t)strlen(text));
    close(ends[1]);
    dup2(ends[0], STDIN_FILENO);
    close(ends[0]);
}

Test(data, stdin_is_jsonl_when_it_starts_with_a_brace_and_lines_otherwise) {
    give_stdin("{\"text\": \"one\"}\n{\"text\": \"two\", \"id\": \"B\"}\n");
    expect_documents("-", "stdin:1=one;B=two;");
    give_stdin("first {line}\n\nthird\r\n");
    expect_documents("-", "stdin:1=first {line};stdin:3=third;");
    give_stdin("");
    expect_documents("-", "");
    give_stdin("{\"text\": \"one\"}\nnot json\n");
    Err err = {0};
    cr_expect(!read_all("-", &err));
    expect_words(err.msg, "stdin", "line 2: invalid JSON");
}

Test(data, gzip_is_unpacked_and_a_broken_one_is_an_error) {
    expect_documents(gzipped("c.jsonl", "{\"text\": \"one\"}\n{\"text\": \"two\"}\n"),
                     "c.jsonl.gz:1=one;c.jsonl.gz:2=two;");
    char *path = gzipped("a.txt", "some text that is long enough to be cut in the middle of it");
    expect_documents(path, "a.txt.gz=some text that is long enough to be cut in the middle of it;");
    cr_assert(truncate(path, 40) == 0);
    expect_refused(path, "gzip cannot unpack it; is the file complete?");
    expect_refused(put("no.txt.gz", "not gzip at all"), "gzip cannot unpack it");
}

Test(data, a_corpus_may_be_closed_before_its_end) {
    char *text = xmalloc(4 << 20);
    memset(text, 'x', 4 << 20);
    for (int i = 99; i < 4 << 20; i += 100) text[i] = '\n';
    text[(4 << 20) - 1] = '\0';
    char *path = gzipped("many.txt", text);
    Err err = {0};
    Corpus *corpus = corpus_open(path, &err);
    cr_assert(corpus, "%s", err.msg);
    corpus_close(corpus);
    path = gzipped("many.jsonl", "{\"text\": \"one\"}\n{\"text\": \"two\"}\n");
    corpus = corpus_open(path, &err);
    Document doc;
    cr_assert(corpus && corpus_next(corpus, &doc, &err) == 1);
    corpus_close(corpus);
    free(text);
}

Test(data, a_line_of_24_mb_is_one_document) {
    size_t len = 24000000;
    char *text = xmalloc(len + 64);
    size_t at = (size_t)sprintf(text, "{\"text\": \"");
    memset(text + at, 'y', len);
    strcpy(text + at + len, "\"}\n{\"text\": \"z\"}\n");
    char *path = put("long.jsonl", text);
    free(text);
    Err err = {0};
    Document doc;
    Corpus *corpus = corpus_open(path, &err);
    cr_assert(corpus && corpus_next(corpus, &doc, &err) == 1, "%s", err.msg);
    cr_expect(doc.len == len && doc.text[0] == 'y' && doc.text[len - 1] == 'y');
    cr_expect(corpus_next(corpus, &doc, &err) == 1 && doc.len == 1);
    cr_expect(corpus_next(corpus, &doc, &err) == 0);
    corpus_close(corpus);
}

Test(data, a_file_that_cannot_be_opened_is_an_error) {
    expect_refused("/nowhere/at/all.jsonl", "No such file or directory");
    char *path = put("secret.txt", "x");
    if (geteuid() == 0) return; /* root reads everything */
    chmod(path, 0);
    expect_refused(path, "Permission denied");
}

/* ------------------------------------------------------------------------------------------------ datasets */

enum { D = 6 };

static void append_rows(DatasetWriter *w, int n) {
    Err err = {0};
    for (int i = 0; i < n; i++) {
        float activation[D];
        for (int j = 0; j < D; j++) activation[j] = (float)i + (float)j / 8;
        const char text[] = "a \"text\"\n\xE3\x88\x8E\xFF\0end";
        cr_assert(dataset_append(w, activation, 100 + i, UINT64_MAX - (uint64_t)i, "doc\t1", text, sizeof text - 1,
                                 NULL, &err) == 0,
                  "%s", err.msg);
    }
}

static Yaml *dataset_sidecar(void) {
    Yaml *sidecar = yaml_new(YAML_MAP);
    yaml_set(sidecar, "kind", "nla_dataset", false);
    yaml_set(sidecar, "row_count", "unknown", false);
    return sidecar;
}

static DatasetWriter *created(const char *path) {
    Err err = {0};
    DatasetWriter *w = dataset_create(path, D, &err);
    cr_assert(w, "%s", err.msg);
    return w;
}

static void finish(DatasetWriter *w) {
    Err err = {0};
    Yaml *sidecar = dataset_sidecar();
    cr_assert(dataset_finish(w, sidecar, &err) == 0, "%s", err.msg);
    yaml_free(sidecar);
}

static void expect_vectors(const char *path, int n) {
    Err err = {0};
    Safetensors st;
    cr_assert(safetensors_open(&st, path, &err) == 0, "%s", err.msg);
    const Tensor *vector = safetensors_find(&st, "activation_vector"), *tokens = safetensors_find(&st, "n_raw_tokens"),
                 *row = safetensors_find(&st, "row_id");
    cr_assert(vector && tokens && row);
    cr_expect(vector->dtype == DT_F32 && vector->n_dims == 2 && vector->shape[0] == n && vector->shape[1] == D);
    cr_expect(tokens->dtype == DT_I64 && tokens->n_dims == 1 && tokens->shape[0] == n);
    cr_expect(row->dtype == DT_U64 && row->n_dims == 1 && row->shape[0] == n);
    for (int i = 0; i < n; i++) {
        for (int j = 0; j < D; j++) cr_assert(((const float *)vector->data)[i * D + j] == (float)i + (float)j / 8);
        cr_assert(((const int64_t *)tokens->data)[i] == 100 + i);
        cr_assert(((const uint64_t *)row->data)[i] == UINT64_MAX - (uint64_t)i);
    }
    safetensors_close(&st);
}

Test(data, a_finished_dataset_holds_every_row_and_its_count) {
    for (int n = 0; n <= 1001; n += 77) {
        char *path = kept("%s/set%d", dir, n), *slashed = kept("%s/", path);
        DatasetWriter *w = created(slashed);
        append_rows(w, n);
        cr_expect(access(path, F_OK) == -1, "the name appears only at the end");
        finish(w);
        cr_expect(count_entries(path) == 3);
        char *vectors = kept("%s/activations.safetensors", path), *rows = kept("%s/rows.jsonl", path),
             *meta = kept("%s/nla_meta.yaml", path);
        expect_vectors(vectors, n);
        Err err = {0};
        Yaml *sidecar = yaml_load(meta, &err);
        int64_t count = -1;
        cr_expect(sidecar && yaml_int(yaml_get(sidecar, "row_count"), &count) && count == n, "%s", err.msg);
        yaml_free(sidecar);
        Corpus *corpus = corpus_open(rows, &err);
        Document doc;
        int read = 0;
        for (; corpus_next(corpus, &doc, &err) == 1; read++) {
            cr_expect_str_eq(doc.id, "doc\t1");
            const char text[] = "a \"text\"\n\xE3\x88\x8E\xEF\xBF\xBD\0end";
            cr_expect(doc.len == sizeof text - 1 && !memcmp(doc.text, text, doc.len));
        }
        cr_expect(read == n && !err.msg[0], "%s", err.msg);
        corpus_close(corpus);
    }
}

Test(data, an_empty_directory_is_taken_and_a_full_one_is_refused) {
    char *path = in_dir("set");
    cr_assert(mkdir(path, 0700) == 0);
    DatasetWriter *w = created(path);
    append_rows(w, 3);
    finish(w);
    expect_vectors(in_dir("set/activations.safetensors"), 3);

    Err err = {0};
    cr_expect(!dataset_create(path, D, &err));
    expect_words(err.msg, path, "exists and is not empty");
    cr_expect(count_entries(dir) == 1);
}

Test(data, a_target_that_cannot_be_is_refused_at_the_start) {
    char *file = put("file", "x");
    struct {
        const char *path;
        int d;
        const char *words;
    } cases[] = {
        {file, D, "Not a directory"},
        {"/nowhere/at/all", D, "cannot create it: No such file"},
        {".", D, "give the dataset directory a name of its own"},
        {"/", D, "give the dataset directory a name of its own"},
        {"", D, "give the dataset directory a name of its own"},
        {"x/..", D, "give the dataset directory a name of its own"},
        {in_dir("odd"), 7, "d_model 7 is not even and positive"},
        {in_dir("none"), 0, "d_model 0 is not even and positive"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Err err = {0};
        cr_expect(!dataset_create(cases[i].path, cases[i].d, &err), "%s", cases[i].path);
        expect_words(err.msg, cases[i].path, cases[i].words);
    }
    cr_expect(count_entries(dir) == 1);
}

Test(data, an_abandoned_dataset_leaves_nothing) {
    DatasetWriter *w = created(in_dir("set"));
    append_rows(w, 50);
    dataset_abandon(w);
    cr_expect(count_entries(dir) == 0);
    dataset_abandon(NULL);
}

Test(data, a_name_taken_meanwhile_is_an_error_and_leaves_nothing_of_ours) {
    DatasetWriter *w = created(in_dir("set"));
    append_rows(w, 2);
    cr_assert(mkdir(in_dir("set"), 0700) == 0);
    put("set/theirs", "x");
    Err err = {0};
    Yaml *sidecar = dataset_sidecar();
    cr_expect(dataset_finish(w, sidecar, &err) == -1);
    expect_words(err.msg, in_dir("set"), "Directory not empty");
    yaml_free(sidecar);
    cr_expect(count_entries(dir) == 1 && count_entries(in_dir("set")) == 1);
}

/* A limit on the size of files stands in for a full disk: both make write() fail. */
Test(data, a_full_disk_is_an_error_with_its_reason_and_leaves_nothing) {
    char *path = in_dir("set");
    DatasetWriter *w = created(path);
    struct rlimit limit, small;
    getrlimit(RLIMIT_FSIZE, &limit);
    small = (struct rlimit){.rlim_cur = 1 << 16, .rlim_max = limit.rlim_max};
    signal(SIGXFSZ, SIG_IGN);
    setrlimit(RLIMIT_FSIZE, &small);
    Err err = {0};
    float activation[D] = {0};
    int status = 0;
    for (int i = 0; i < 100000 && !status; i++) status = dataset_append(w, activation, 1, 1, "d", "t", 1, NULL, &err);
    setrlimit(RLIMIT_FSIZE, &limit);
    cr_expect(status == -1);
    expect_words(err.msg, path, "cannot write: File too large");
    dataset_abandon(w);
    cr_expect(count_entries(dir) == 0);
}
