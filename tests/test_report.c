/* test_report.c - report.c and charts.c: what stands in the files. What a browser makes of them is tests/report_test.sh.
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

/* ------------------------------------------------------------------------------------------------ evaluations, runs */

static const char small_eval[] =
    "{\"rows\":2,\"var_nrm\":0.5,\"position\":null,\"length\":[3,4],\"av\":\"</script><b>\",\"conditions\":{"
    "\"explained\":{\"fve_nrm\":0.5,\"low\":0.4,\"high\":0.6,\"what\":\"<!--<script>\",\"mse\":[0.2,null]}}}";

Test(report, a_page_of_an_evaluation_holds_its_json_and_nothing_that_html_reads) {
    Err err = {0};
    size_t len;
    cr_assert_eq(report_eval(page, small_eval, strlen(small_eval), &err), 0, "%s", err.msg);
    char *text = slurp(&len), *data = data_of(text);
    cr_assert_eq(strcspn(data, "<>&"), strlen(data));
    Json tree;
    cr_assert_eq(json_parse(&tree, data, strlen(data), "data", &err), 0, "%s", err.msg);
    cr_assert(json_is(&tree, json_get(&tree, 0, "av"), "</script><b>"));
    static const char *const outside[] = {"https:", " src=", "url(", "@import", "innerHTML", "eval("};
    for (size_t i = 0; i < sizeof outside / sizeof *outside; i++)
        cr_assert_eq(count(text, outside[i]), 0, "%s", outside[i]);
    json_free(&tree);
    free(data);
    free(text);
}

Test(report, what_is_not_a_result_of_eval_is_refused_and_nothing_written) {
    static const char *const bad[] = {
        "",
        "{",
        "[]",
        "{\"rows\":2,\"var_nrm\":0.5}",
        "{\"rows\":2,\"var_nrm\":0.5,\"conditions\":{}}",
        "{\"rows\":2,\"var_nrm\":0.5,\"conditions\":[{}]}",
        "{\"rows\":2,\"var_nrm\":0.5,\"conditions\":{\"explained\":1}}",
        "{\"rows\":2,\"var_nrm\":0,\"conditions\":{\"explained\":{}}}",
        "{\"rows\":\"2\",\"var_nrm\":0.5,\"conditions\":{\"explained\":{}}}",
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        Err err = {0};
        cr_assert_eq(report_eval(page, bad[i], strlen(bad[i]), &err), -1, "%s", bad[i]);
        cr_assert(err.msg[0] && !strchr(err.msg, '\n'), "%s: %s", bad[i], err.msg);
        cr_assert_neq(access(page, F_OK), 0, "%s", bad[i]);
    }
    Err err = {0};
    cr_assert_eq(report_eval("/nonexistent/nla/page.html", small_eval, strlen(small_eval), &err), -1);
    cr_assert(strstr(err.msg, "/nonexistent/nla/page.html"), "%s", err.msg);
}

static void put(const char *name, const char *text) { /* into dir; NULL removes it */
    char *path = xprintf("%s/%s", dir, name);
    unlink(path);
    FILE *out = text ? fopen(path, "w") : NULL;
    cr_assert(!text || (out && fputs(text, out) >= 0 && fclose(out) == 0));
    free(path);
}

/* The page of a run with these metrics, or NULL and err. To be freed. */
static char *run_page(const char *settings, const char *metrics, Err *err) {
    size_t len;
    *err = (Err){0};
    put("settings.yaml", settings);
    put("metrics.jsonl", metrics);
    unlink(page);
    int status = report_run(page, dir, err);
    put("settings.yaml", NULL);
    put("metrics.jsonl", NULL);
    return status ? NULL : slurp(&len);
}

Test(report, a_run_is_in_order_of_steps_the_later_of_two_lines_counts_and_a_cut_one_does_not) {
    Err err;
    char *text = run_page("lr: 1e-5\nlora:\n  rank: 8\nlist: [a, \"</script>\"]\n",
                          "{\"step\":2,\"loss\":1}\n{\"step\":1,\"loss\":9}\n{\"step\":2,\"eval\":{\"fve\":0.1}}\n"
                          "{\"step\":2,\"loss\":3}\n{\"step\":0,\"samples\":[]}\n{\"step\":2,\"eval\":{\"fve\":0.2}}\n{\"step\":3,\"lo",
                          &err);
    cr_assert(text, "%s", err.msg);
    char *data = data_of(text);
    cr_assert(strstr(data, "\"steps\": [\n{\"step\":1,\"loss\":9},\n{\"step\":2,\"loss\":3}]"), "%s", data);
    cr_assert(strstr(data, "\"evals\": [\n{\"step\":0,\"samples\":[]},\n{\"step\":2,\"eval\":{\"fve\":0.2}}]"), "%s", data);
    cr_assert(strstr(data, "\"lr\": \"1e-5\", \"lora.rank\": \"8\", \"list.0\": \"a\", \"list.1\": \"\\u003c/script\\u003e\"}"), "%s", data);
    Json tree;
    cr_assert_eq(json_parse(&tree, data, strlen(data), "data", &err), 0, "%s", err.msg);
    json_free(&tree);
    free(data);
    free(text);
    text = run_page("lr: 1\n", "{\"step\":1}", &err); /* whole, though its newline is not written yet */
    cr_assert(text && strstr(text, "\"steps\": [\n{\"step\":1}]"), "%s", err.msg);
    free(text);
}

Test(report, a_malformed_line_of_a_run_is_one_error_that_names_file_and_line) {
    static const char *const bad[] = {
        "{\"step\":2,\"lo\n",
        "\n",
        "[1]\n",
        "{\"loss\":1}\n",
        "{\"step\":\"2\"}\n",
        "{\"step\":-1}\n",
        "{\"step\":1.5}\n",
        "{\"step\":2,\"loss\":NaN}\n",
        "{\"step\":2,\"step\":3}\n",
        "{\"step\":2,\"eval\":3}\n",
        "{\"step\":2,\"samples\":{}}\n",
        "{\"step\":2}{\"step\":3}\n",
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        char *metrics = xprintf("{\"step\":1}\n%s{\"step\":9}\n", bad[i]);
        Err err;
        cr_assert(!run_page("lr: 1\n", metrics, &err), "%s", bad[i]);
        cr_assert(strstr(err.msg, "/metrics.jsonl, line 2: ") && !strchr(err.msg, '\n'), "%s: %s", bad[i], err.msg);
        cr_assert_neq(access(page, F_OK), 0, "%s", bad[i]);
        free(metrics);
    }
}

Test(report, a_run_without_its_files_says_which_is_missing) {
    Err err;
    cr_assert(!run_page(NULL, "{\"step\":1}\n", &err) && strstr(err.msg, "/settings.yaml"), "%s", err.msg);
    cr_assert(!run_page("lr: 1\n", NULL, &err) && strstr(err.msg, "/metrics.jsonl"), "%s", err.msg);
    cr_assert(!run_page("lr: 1\n", "", &err) && strstr(err.msg, "no whole line yet"), "%s", err.msg);
    cr_assert(!run_page("lr: 1\n", "{\"st", &err) && strstr(err.msg, "no whole line yet"), "%s", err.msg);
    cr_assert(!run_page("- 1\n", "{\"step\":1}\n", &err) && strstr(err.msg, "not a map"), "%s", err.msg);
    err = (Err){0};
    cr_assert(report_run(page, "/nonexistent/run", &err) && strstr(err.msg, "/nonexistent/run/settings.yaml"), "%s", err.msg);
}
