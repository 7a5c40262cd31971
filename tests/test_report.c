/* test_report.c - report.c: what stands in the file. What a browser makes of it is tests/report_test.sh.
 * All comparisons are exact. */
#define _GNU_SOURCE
#include "../nla.h"

#include <criterion/criterion.h>
#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

static char dir[64], page[96];

static void make_dir(void) {
    strcpy(dir, "/tmp/nla-report-XXXXXX");
    cr_assert(mkdtemp(dir));
    snprintf(page, sizeof page, "%s/page.html", dir);
}

static void remove_dir(void) {
    unlink(page);
    rmdir(dir);
}

TestSuite(report, .init = make_dir, .fini = remove_dir, .timeout = 60);

/* A small result whose only token has the text `token`, given as JSON with its quotes. */
static char *result(const char *token) {
    return xprintf(
        "{\"title\":%s,\"created\":\"now\",\"settings\":{\"av\":%s},\"baseline\":\"this page\","
        "\"tokens\":[{\"text\":%s,\"id\":1,\"special\":false}],"
        "\"layers\":[{\"layer\":3,\"var_nrm\":null,\"mean_fve\":null,\"readings\":[{\"position\":0,\"norm\":1,"
        "\"outlier\":false,\"early\":true,\"samples\":[{\"explanation\":%s,\"text\":%s,\"truncated\":false,"
        "\"fve\":null,\"cos\":null,\"mse_nrm\":null}]}]}]}",
        token, token, token, token, token);
}

static char *slurp(size_t *len) { /* NUL-terminated, to be freed */
    FILE *file = fopen(page, "rb");
    cr_assert(file, "no page was written");
    char *text = xcalloc(1, 1 << 20);
    *len = fread(text, 1, (1 << 20) - 1, file);
    fclose(file);
    return text;
}

static char *page_of(const char *token, size_t *len) {
    Err err = {0};
    char *json = result(token);
    cr_assert_eq(report_explain(page, json, strlen(json), &err), 0, "%s", err.msg);
    free(json);
    return slurp(len);
}

static int count(const char *text, const char *what) {
    int n = 0;
    for (const char *at = text; (at = strcasestr(at, what)); at++) n++;
    return n;
}

/* The embedded data, cut out of the page as a browser does: to the first end tag. To be freed. */
static char *data_of(const char *text) {
    const char *open = "<script type='application/json' id='data'>", *start = strstr(text, open);
    cr_assert(start);
    start += strlen(open);
    return xstrndup(start, (size_t)(strstr(start, "</script") - start));
}

Test(report, hostile_text_is_inert_and_unchanged) {
    static const struct {
        const char *json, *bytes; /* a token as JSON, and the bytes that it means */
        size_t len;
    } hostile[] = {
        {"\"</script><script>alert(1)</script>\"", "</script><script>alert(1)</script>", 34},
        {"\"</SCRIPT >\"", "</SCRIPT >", 10},
        {"\"<!--<script>\"", "<!--<script>", 12},
        {"\"-->]]>&lt;&amp;\"", "-->]]>&lt;&amp;", 15},
        {"\"\\\"' onload='x\\\\\"", "\"' onload='x\\", 13},
        {"\"\xe2\x80\xa8\xe2\x80\xa9\"", "\xe2\x80\xa8\xe2\x80\xa9", 6},
        {"\"\xe2\x80\xa7\xe2\x80\xaa\xe2\x80\"", "\xe2\x80\xa7\xe2\x80\xaa\xef\xbf\xbd", 9},
        {"\"\xf0\x9f\xa6\x8a\"", "\xf0\x9f\xa6\x8a", 4},
        {"\"a\\u0000b\\u003c\"", "a\0b<", 4},
    };
    size_t plain_len;
    char *plain = page_of("\"plain\"", &plain_len);
    for (size_t i = 0; i < sizeof hostile / sizeof *hostile; i++) {
        Err err = {0};
        char *json = result(hostile[i].json);
        int status = report_explain(page, json, strlen(json), &err);
        free(json);
        if (status) { /* invalid UTF-8 may be refused instead */
            cr_assert_eq(i, 6u, "%s: %s", hostile[i].json, err.msg);
            continue;
        }
        size_t len, got_len;
        char *text = slurp(&len), *data = data_of(text);
        cr_assert_eq(strlen(text), len, "%s: a NUL byte in the page", hostile[i].json);
        cr_assert_eq(count(text, "<script"), 2, "%s", hostile[i].json);
        cr_assert_eq(count(text, "</script"), 2, "%s", hostile[i].json);
        cr_assert_eq(count(text, "<!--"), count(plain, "<!--"), "%s", hostile[i].json);
        cr_assert_eq(strcspn(data, "<>&"), strlen(data), "%s", hostile[i].json);
        cr_assert(!strstr(data, "\xe2\x80\xa8") && !strstr(data, "\xe2\x80\xa9"), "%s", hostile[i].json);

        Json tree;
        cr_assert_eq(json_parse(&tree, data, strlen(data), "data", &err), 0, "%s", err.msg);
        char *got =
            json_string(&tree, json_get(&tree, json_first(&tree, json_get(&tree, 0, "tokens")), "text"), &got_len);
        cr_assert(got_len == hostile[i].len && !memcmp(got, hostile[i].bytes, got_len), "%s", hostile[i].json);
        free(got);
        json_free(&tree);
        free(data);
        free(text);
    }
    free(plain);
}

Test(report, a_page_names_nothing_outside_itself) {
    size_t len;
    char *text = page_of("\"plain\"", &len);
    static const char *const outside[] = {"http:", "https:", "//cdn", " src=", "url(", "@import", "innerHTML", "eval("};
    for (size_t i = 0; i < sizeof outside / sizeof *outside; i++)
        cr_assert_eq(count(text, outside[i]), 0, "%s", outside[i]);
    cr_assert_eq(count(text, "default-src 'none'"), 1);
    cr_assert(!strncmp(text, "<!DOCTYPE html>\n", 16) && !strcmp(text + len - 8, "</html>\n"));
    free(text);
}

static int files_in_dir(void) {
    int n = 0;
    DIR *d = opendir(dir);
    for (struct dirent *e; (e = readdir(d));) n += e->d_name[0] != '.' || strlen(e->d_name) > 2;
    closedir(d);
    return n;
}

Test(report, a_reader_sees_the_old_page_or_the_new_one) {
    size_t len;
    free(page_of("\"old\"", &len));
    int old = open(page, O_RDONLY);
    char *text = page_of("\"new\"", &len);
    cr_assert_eq(count(text, "\"new\""), 5);
    free(text);
    text = xcalloc(1, 1 << 20);
    cr_assert(read(old, text, (1 << 20) - 1) > 0 && count(text, "\"old\"") == 5 && count(text, "</html>") == 1);
    close(old);
    free(text);
    cr_assert_eq(files_in_dir(), 1, "a temporary file stays");
}

Test(report, a_full_disk_leaves_the_old_page) {
    size_t len;
    free(page_of("\"old\"", &len));
    signal(SIGXFSZ, SIG_IGN);
    struct rlimit before, small;
    getrlimit(RLIMIT_FSIZE, &before);
    small = before;
    small.rlim_cur = 1000;
    setrlimit(RLIMIT_FSIZE, &small);
    Err err = {0};
    char *json = result("\"new\"");
    int status = report_explain(page, json, strlen(json), &err);
    setrlimit(RLIMIT_FSIZE, &before);
    free(json);
    cr_assert_eq(status, -1);
    cr_assert(strstr(err.msg, page) && !strchr(err.msg, '\n'), "%s", err.msg);
    char *text = slurp(&len);
    cr_assert_eq(count(text, "\"old\""), 5);
    free(text);
    cr_assert_eq(files_in_dir(), 1, "a temporary file stays");
}

Test(report, a_path_that_cannot_be_written_is_one_line) {
    char *json = result("\"plain\"");
    const char *bad[] = {"/nonexistent/nla/page.html", dir, ""};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        Err err = {0};
        cr_assert_eq(report_explain(bad[i], json, strlen(json), &err), -1, "'%s'", bad[i]);
        cr_assert(err.msg[0] && !strchr(err.msg, '\n') && strstr(err.msg, bad[i]), "'%s': %s", bad[i], err.msg);
    }
    free(json);
}

Test(report, what_is_not_a_result_of_explain_is_refused_and_nothing_written) {
    static const char *const bad[] = {
        "",
        "{",
        "nul",
        "[]",
        "{}",
        "{\"tokens\":[]}",
        "{\"tokens\":[],\"layers\":[]}",
        "{\"tokens\":{},\"layers\":[{}]}",
        "{\"tokens\":[],\"layers\":[{}]} </script>",
        "{\"tokens\":[],\"layers\":[{\"a\":\"\n\"}]}",
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        Err err = {0};
        cr_assert_eq(report_explain(page, bad[i], strlen(bad[i]), &err), -1, "%s", bad[i]);
        cr_assert(err.msg[0] && !strchr(err.msg, '\n'), "%s: %s", bad[i], err.msg);
        cr_assert_neq(access(page, F_OK), 0, "%s", bad[i]);
    }
}
