/* writers.c - who explains the activations before an AV can: `nla data explain`. A writer sees a row's text up to the activation's
 * token, never what follows, and says what a model would have in mind there: rules (rules.c), a language model on disk, one behind an
 * API (data/explain_api.py), or a file that somebody else made. All give the same file: one JSON object a row with row_id, prefix
 * (XXH3 of the text), explanation and by, or why there is no explanation.
 *
 * The file is made as OUT.part, row after row; --resume goes on behind the last whole line.
 */
#define _GNU_SOURCE /* memmem, environ */
#include "nla.h"

#include <errno.h>
#include <spawn.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <stb/stb_ds.h>

/* ------------------------------------------------------------------------------------------------ cleaning */

static const char OPEN_TAG[] = "<explanation>", CLOSE_TAG[] = "</explanation>";

static const char *skip_space(const char *p, const char *end) {
    while (p < end && *p == ' ') {
        p++;
    }
    return p;
}

/* Behind "- ", "* ", "3. ", "2) ", "## " at the start of a line; the same place when there is no such mark. */
static const char *skip_mark(const char *p, const char *end) {
    const char *q = p;
    if (q < end && (*q == '-' || *q == '*' || *q == '+')) {
        q++;
    } else if (q + 2 < end && memcmp(q, "\xe2\x80\xa2", 3) == 0) { /* a bullet */
        q += 3;
    } else if (q < end && *q == '#') {
        while (q < end && *q == '#') {
            q++;
        }
    } else {
        while (q < end && *q >= '0' && *q <= '9') {
            q++;
        }
        q = q > p && q < end && (*q == '.' || *q == ')') ? q + 1 : p;
    }
    return q > p && q < end && *q == ' ' ? skip_space(q, end) : p;
}

/* One line without emphasis: **words**, *words* or _words_ where the marks stand at the borders of words, so that a quoted
 * `f(**options)` or a_name stays as it is. */
static void add_line(char **out, const char *p, const char *end) {
    while (p < end) {
        size_t marks = (size_t)(end - p) > 2 && p[0] == '*' && p[1] == '*' ? 2 : *p == '*' || *p == '_' ? 1 : 0;
        bool begins = marks && (!arrlen(*out) || strchr(" \n(", arrlast(*out))) && p + marks < end && !strchr(" *_", p[marks]);
        const char *close = begins ? memmem(p + marks, (size_t)(end - p) - marks, p, marks) : NULL;
        const char *behind = close ? close + marks : NULL;
        if (close && close[-1] != ' ' && (behind == end || strchr(" .,;:!?)", *behind))) {
            memcpy(arraddnptr(*out, (size_t)(close - p) - marks), p + marks, (size_t)(close - p) - marks);
            p = behind;
        } else {
            arrput(*out, *p++);
        }
    }
}

/* What stands between the tags; all of it when there are none. NULL: the closing one is missing. */
static const char *between_tags(const char *text, size_t *len) {
    const char *open = memmem(text, *len, OPEN_TAG, strlen(OPEN_TAG));
    const char *from = open ? open + strlen(OPEN_TAG) : text;
    size_t left = *len - (size_t)(from - text);
    const char *close = memmem(from, left, CLOSE_TAG, strlen(CLOSE_TAG));
    *len = close ? (size_t)(close - from) : left;
    return !close && open ? NULL : from;
}

char *explanation_clean(const char *text, size_t len, const char **why) {
    const char *inside = between_tags(text, &len);
    if (!inside) {
        *why = "no closing tag";
        return NULL;
    }
    char *plain = xstrndup(inside, len), *out = NULL;
    for (size_t i = 0; i < len; i++) { /* NULs and other control characters are blanks */
        plain[i] = (unsigned char)plain[i] < ' ' && plain[i] != '\n' ? ' ' : plain[i];
    }
    const char *p = plain, *end = p + len;
    int paragraphs = 0;
    bool fresh = true, headed = false; /* the next words open a paragraph; a heading went before, which they join */
    while (p < end) {
        const char *line = memchr(p, '\n', (size_t)(end - p)), *next = line ? line + 1 : end, *from = skip_space(p, end);
        line = line ? line : end;
        while (line > from && line[-1] == ' ') {
            line--;
        }
        const char *words = skip_mark(from, line);
        if (from >= line) {
            fresh = true;
        } else {
            bool opens = !headed && (fresh || words > from);
            for (const char *gap = !arrlen(out) ? "" : opens ? "\n\n" : " "; *gap; gap++) {
                arrput(out, *gap);
            }
            paragraphs += opens;
            add_line(&out, words, line);
            fresh = false;
            headed = *from == '#' && words > from;
        }
        p = next;
    }
    *why = !arrlen(out) ? "empty" : paragraphs < 2 ? "fewer than two features" : memmem(out, arrlenu(out), OPEN_TAG, strlen(OPEN_TAG)) ? "a tag inside" : NULL;
    char *clean = *why ? NULL : xstrndup(out, arrlenu(out));
    arrfree(out);
    free(plain);
    return clean;
}

/* ------------------------------------------------------------------------------------------------ explanations on disk */

static bool hex_id(const Json *json, const char *key, uint64_t *id) {
    size_t len;
    const char *text = json_raw(json, json_get(json, 0, key), &len);
    char digits[17] = "", *end;
    if (!text || len == 0 || len > 16) {
        return false;
    }
    memcpy(digits, text, len);
    *id = strtoull(digits, &end, 16);
    return !*end;
}

static int index_line(ExplanationIndex *e, int file, size_t at, size_t len, int64_t line, Err *err) {
    Json json;
    uint64_t id;
    char *place = xprintf("%s: line %lld", e->file[file].path, (long long)line);
    int status = json_parse(&json, e->file[file].data + at, len, place, err);
    if (status == 0) {
        bool known = false, explained = json_type(&json, json_get(&json, 0, "explanation")) == JSON_STRING;
        static const char *const keys[] = {"row_id", "prefix"};
        for (int k = 0; k < 2; k++) {
            if (hex_id(&json, keys[k], &id)) {
                id = map_key(id);
                known = true;
                if (explained && hmgeti(e->place, id) < 0) {
                    ExplanationPlace where = {file, at};
                    hmput(e->place, id, where);
                }
            }
        }
        if (!known) {
            status = fail(err, "%s: needs \"row_id\" or \"prefix\" as 16 hex digits (nla data explain --by rules writes such a file)", place);
        }
        json_free(&json);
    }
    free(place);
    return status;
}

static int index_file(ExplanationIndex *e, const char *path, Err *err) {
    File file;
    if (file_map(&file, path, err) != 0) {
        return -1;
    }
    arrput(e->file, file);
    int64_t line = 0;
    for (size_t at = 0; at < file.len;) {
        const char *end = memchr(file.data + at, '\n', file.len - at);
        size_t len = end ? (size_t)(end - file.data) - at : file.len - at;
        line++;
        if (len > 0 && index_line(e, (int)arrlen(e->file) - 1, at, len, line, err) != 0) {
            return -1;
        }
        at += len + 1;
    }
    return 0;
}

int explanations_open(ExplanationIndex *e, const char *paths, Err *err) {
    *e = (ExplanationIndex){0};
    for (const char *p = paths;;) {
        size_t len = strcspn(p, ",");
        char *path = xstrndup(p, len);
        int status = index_file(e, path, err);
        free(path);
        if (status != 0) {
            explanations_close(e);
            return -1;
        }
        if (!p[len]) {
            return 0;
        }
        p += len + 1;
    }
}

void explanations_close(ExplanationIndex *e) {
    for (int i = 0; i < (int)arrlen(e->file); i++) {
        file_unmap(&e->file[i]);
    }
    arrfree(e->file);
    hmfree(e->place);
}

char *explanation_find(const ExplanationIndex *e, const Row *row, char **by, Err *err) {
    ExplanationMap *map = e->place;
    ptrdiff_t at = map ? hmgeti(map, map_key(row->id)) : -1;
    at = map && at < 0 ? hmgeti(map, map_key(row->prefix)) : at;
    if (at < 0) {
        return NULL;
    }
    const File *file = &e->file[map[at].value.file];
    size_t from = map[at].value.at;
    const char *end = memchr(file->data + from, '\n', file->len - from);
    Json json;
    if (json_parse(&json, file->data + from, end ? (size_t)(end - file->data) - from : file->len - from, file->path, err) != 0) {
        return NULL;
    }
    char *text = json_string(&json, json_get(&json, 0, "explanation"), NULL);
    *by = text ? json_string(&json, json_get(&json, 0, "by"), NULL) : NULL;
    *by = text && !*by ? xstrdup("file") : *by;
    json_free(&json);
    return text;
}

/* ------------------------------------------------------------------------------------------------ the file that is written */

typedef struct {
    const Settings *s;
    Dataset d;
    char *part;
    FILE *out;
    int64_t done, rows; /* rows written, rows wanted */
    int64_t explained;
    struct {
        char *key; /* why there is no explanation */
        int64_t value;
    } *dropped; /* stb map */
    double start, spoke;
} Writing;

static void count_line(Writing *w, const char *why) {
    w->done++;
    if (why) {
        int64_t before = shget(w->dropped, why); /* not inside shput, which has a place of its own in mind by then */
        shput(w->dropped, why, before + 1);
    } else {
        w->explained++;
    }
}

/* explanation NULL: `why` there is none. */
static int write_line(Writing *w, const Row *row, const char *explanation, const char *by, const char *why, Err *err) {
    fprintf(w->out, "{\"row_id\": \"%016llx\", \"prefix\": \"%016llx\"", (unsigned long long)row->id, (unsigned long long)row->prefix);
    json_text(w->out, "explanation", explanation);
    json_text(w->out, explanation ? "by" : "dropped", explanation ? by : why);
    fputs("}\n", w->out);
    count_line(w, explanation ? NULL : why);
    progress(w->s, &w->spoke, w->start, (double)w->done, "rows", (double)w->done / (double)w->rows, w->done == w->rows);
    return ferror(w->out) ? fail(err, "%s: cannot write: %s", w->part, strerror(errno)) : 0;
}

/* With --resume: counts the whole lines of OUT.part and checks that they are these rows'; the file is cut behind them. */
static int read_part(Writing *w, Err *err) {
    File file;
    size_t at = 0;
    if (file_map(&file, w->part, err) != 0) {
        return -1;
    }
    int status = 0;
    for (const char *end; status == 0 && (end = at < file.len ? memchr(file.data + at, '\n', file.len - at) : NULL);) {
        Json json;
        uint64_t id;
        status = json_parse(&json, file.data + at, (size_t)(end - file.data) - at, w->part, err);
        if (status != 0) {
            break;
        }
        if (w->done >= w->d.n || !hex_id(&json, "row_id", &id) || (w->d.row_id && id != w->d.row_id[w->done])) {
            status = fail(err, "%s: line %lld is not of row %lld of %s; remove it and begin again", w->part, (long long)w->done + 1,
                          (long long)w->done, w->d.path);
        } else {
            char *why = json_string(&json, json_get(&json, 0, "dropped"), NULL);
            count_line(w, why);
            free(why);
        }
        json_free(&json);
        at = (size_t)(end - file.data) + 1;
    }
    file_unmap(&file);
    return status == 0 && truncate(w->part, (off_t)at) != 0 ? fail(err, "%s: cannot write: %s", w->part, strerror(errno)) : status;
}

static int open_writing(Writing *w, const Settings *s, Err *err) {
    *w = (Writing){.s = s, .start = now()};
    sh_new_strdup(w->dropped);
    if (rows_open(&w->d, s->acts, err) != 0) {
        return -1;
    }
    w->rows = s->rows > 0 && s->rows < w->d.n ? s->rows : w->d.n;
    w->part = path_beside(s->out, ".part");
    if (access(s->out, F_OK) == 0) {
        return fail(err, "%s: exists; remove it or name another file", s->out);
    }
    bool begun = access(w->part, F_OK) == 0;
    if (begun && !s->resume) {
        return fail(err, "%s: is there, of an unfinished run; go on with --resume, or remove it", w->part);
    }
    if (begun && read_part(w, err) != 0) {
        return -1;
    }
    w->out = fopen(w->part, "ae");
    return w->out ? 0 : fail(err, "%s: cannot write: %s", w->part, strerror(errno));
}

static int close_writing(Writing *w, int status, Err *err) {
    if (w->out) {
        bool whole = fflush(w->out) == 0 && fsync(fileno(w->out)) == 0;
        whole = fclose(w->out) == 0 && whole;
        status = status == 0 && !whole ? fail(err, "%s: cannot write: %s", w->part, strerror(errno)) : status;
    }
    if (status == 0 && rename(w->part, w->s->out) != 0) {
        status = fail(err, "%s: cannot rename %s to it: %s", w->s->out, w->part, strerror(errno));
    }
    if (status == 0) {
        printf("%lld rows explained, %lld dropped\n", (long long)w->explained, (long long)(w->done - w->explained));
        for (int i = 0; i < (int)shlen(w->dropped); i++) {
            printf("  %lld: %s\n", (long long)w->dropped[i].value, w->dropped[i].key);
        }
    }
    shfree(w->dropped);
    free(w->part);
    dataset_close(&w->d);
    return status;
}

/* ------------------------------------------------------------------------------------------------ rules, and a file */

static int write_by_rules(Writing *w, Err *err) {
    int status = 0;
    while (w->done < w->rows && status == 0) {
        Row row;
        dataset_passed(&w->d, w->done);
        status = row_open(&row, &w->d, w->done, err);
        if (status == 0) {
            char *text = rules_explanation(row.text, row.text_len, w->s->words, random_key((uint64_t)w->s->seed, row.id, 0, 0));
            status = write_line(w, &row, text, "rules", "too few words", err);
            free(text);
            row_close(&row);
        }
    }
    return status;
}

static int write_cleaned(Writing *w, const Row *row, const char *text, const char *by, Err *err) {
    const char *why = "nothing written for the row";
    char *clean = text ? explanation_clean(text, strlen(text), &why) : NULL;
    int status = write_line(w, row, clean, by, why, err);
    free(clean);
    return status;
}

static int write_by_file(Writing *w, const char *path, Err *err) {
    ExplanationIndex texts;
    int status = explanations_open(&texts, path, err);
    if (status != 0) {
        return -1;
    }
    while (w->done < w->rows && status == 0) {
        Row row;
        char *by = NULL;
        dataset_passed(&w->d, w->done);
        status = row_open(&row, &w->d, w->done, err);
        if (status == 0) {
            char *text = explanation_find(&texts, &row, &by, err);
            status = write_cleaned(w, &row, text, by, err);
            free(text);
            free(by);
            row_close(&row);
        }
    }
    explanations_close(&texts);
    return status;
}

/* ------------------------------------------------------------------------------------------------ a model on disk */

static const char INSTRUCTION[] =
    "You will see the beginning of a text. It breaks off at one token, perhaps inside a sentence or a word. Say what a language model "
    "that has read exactly this far has in mind at that token.\n\nWrite three short paragraphs of plain sentences, 80 to 100 words in "
    "all, with a blank line between them. First the kind of text and what it is about right now; name the things it names. Then what is "
    "still open: the sentence, quotation, list or argument, quoting its last words. Last the final token: quote it, say its part in the "
    "sentence, and what must follow. Judge from the beginning alone. No lists, no headings.\n\nThe beginning:\n\n";
static const char REPLY_START[] = "<explanation>\n";

/* The instruction and the text as a user message, and the reply begun with the opening tag. */
static int ask(const Loaded *l, const Row *row, int **ids, Err *err) {
    char *text = xprintf("%s%s", INSTRUCTION, row->text);
    ChatMessage message = {"user", text};
    char *rendered = chat_render(l->tok, &message, 1, true, NULL, err);
    char *whole = rendered ? xprintf("%s%s", rendered, REPLY_START) : NULL;
    int status = whole ? tokenizer_encode(l->tok, whole, strlen(whole), false, ids, err) : -1;
    free(whole);
    free(rendered);
    free(text);
    return status;
}

/* Tokens that all prompts begin with: they become one segment. */
static int common_start(int **prompt) {
    int n = (int)arrlen(prompt[0]);
    for (int i = 1; i < (int)arrlen(prompt); i++) {
        int same = 0;
        while (same < n && same < (int)arrlen(prompt[i]) && prompt[i][same] == prompt[0][same]) {
            same++;
        }
        n = same;
    }
    return n;
}

/* What a sample wrote, with its tags; a reply that reached the length cap has no closing one. */
static char *reply_of(const Sample *x) {
    bool closed = x->stopped || x->ended;
    int n = (int)arrlen(x->text);
    bool tagged = x->stopped; /* the stop string is the closing tag itself */
    return xprintf("%s%.*s%s", REPLY_START, n, n ? x->text : "", closed && !tagged ? CLOSE_TAG : "");
}

/* The rows from w->done on, as many as are decoded together. */
static int write_group(Writing *w, const Loaded *l, int n, Err *err) {
    Row *row = xcalloc((size_t)n, sizeof *row);
    int **prompt = NULL, status = 0, tokens = 0;
    for (int i = 0; i < n && status == 0; i++) {
        arrput(prompt, NULL);
        status = row_open(&row[i], &w->d, w->done + i, err);
        status = status == 0 ? ask(l, &row[i], &prompt[i], err) : -1;
        tokens += (int)arrlen(prompt[i]) + 2 * CACHE_ALIGN + w->s->max_tokens;
    }
    Forest forest = {0};
    Batch batch = {0};
    Decoder d = {.how = decoding_of(w->s), .eos = l->model.config.eos, .vocab_size = l->model.config.vocab_size, .tok = l->tok,
                 .stop = CLOSE_TAG};
    status = status == 0 ? forest_open(&forest, (Model *)&l->model, l->model.config.n_layers, tokens + CACHE_ALIGN, 1024 > n ? 1024 : n,
                                       FORWARD, err) : -1;
    if (status == 0) {
        int start = n > 1 ? common_start(prompt) : 0, root = start > 0 ? forest_add(&forest, -1, start, err) : -1;
        status = start > 0 ? (root < 0 ? -1 : feed(&forest, &batch, root, prompt[0], start, NULL, err)) : 0;
        for (int i = 0; i < n && start > 0; i++) {
            arrdeln(prompt[i], 0, (size_t)start);
        }
        status = status == 0 ? decoder_prompts(&d, &forest, &batch, root, prompt, n, (int)w->done, 1, err) : -1;
    }
    status = status == 0 && decode(&d, &forest, &batch, err) >= 0 ? 0 : -1;
    for (int i = 0; i < n && status == 0; i++) {
        char *reply = reply_of(&d.sample[i]);
        status = write_cleaned(w, &row[i], reply, w->s->model, err);
        free(reply);
    }
    for (int i = 0; i < n; i++) {
        row_close(&row[i]);
    }
    for (int i = 0; i < (int)arrlen(prompt); i++) {
        arrfree(prompt[i]);
    }
    arrfree(prompt);
    free(row);
    decoder_free(&d);
    batch_free(&batch);
    forest_close(&forest);
    if (status == 0 && fflush(w->out) != 0) {
        status = fail(err, "%s: cannot write: %s", w->part, strerror(errno));
    }
    return status;
}

static int write_by_model(Writing *w, Err *err) {
    Loaded l;
    int status = load_all(&l, w->s, true, err);
    while (status == 0 && w->done < w->rows) {
        int64_t left = w->rows - w->done;
        status = write_group(w, &l, left < w->s->batch ? (int)left : w->s->batch, err);
    }
    unload(&l);
    return status;
}

/* ------------------------------------------------------------------------------------------------ a model behind an API */

/* data/explain_api.py beside the program, or where build.sh installs it; to be freed. */
static char *api_script(void) {
    char self[4096];
    ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    char *slash = n > 0 ? (self[n] = '\0', strrchr(self, '/')) : NULL;
    int len = slash ? (int)(slash - self) : 0;
    char *beside = slash ? xprintf("%.*s/data/explain_api.py", len, self) : xstrdup("data/explain_api.py");
    char *installed = xprintf("%.*s/../share/nla/explain_api.py", len, self);
    bool there = access(beside, R_OK) != 0 && access(installed, R_OK) == 0;
    free(there ? beside : installed);
    return there ? installed : beside;
}

/* Runs the script, whose own options are the words behind "--"; it asks, retries, keeps what was paid for and leaves its replies in
 * `raw`, which are then cleaned as any file is. */
static int ask_api(const Writing *w, char *raw, Err *err) {
    char *script = api_script(), python[] = "python3", **argument = NULL;
    pid_t process;
    int status = 0, ended = 0;
    arrput(argument, python);
    arrput(argument, script);
    arrput(argument, (char *)w->s->acts);
    arrput(argument, raw);
    for (int i = 0; i < (int)arrlen(w->s->argument); i++) {
        arrput(argument, (char *)w->s->argument[i]);
    }
    arrput(argument, NULL);
    if (access(script, R_OK) != 0) {
        status = fail(err, "%s: %s; --by api runs this script of nla's sources", script, strerror(errno));
    } else if ((ended = posix_spawnp(&process, python, NULL, NULL, argument, environ)) != 0) {
        status = fail(err, "cannot start python3 for --by api: %s", strerror(ended));
    } else {
        while (waitpid(process, &ended, 0) < 0 && errno == EINTR) {
        }
        if (!WIFEXITED(ended) || WEXITSTATUS(ended) != 0) {
            status = fail(err, "%s failed (its line above says why); what it has been answered is kept, so run this again", script);
        }
    }
    arrfree(argument);
    free(script);
    return status;
}

static int write_by_api(Writing *w, Err *err) {
    char *raw = path_beside(w->s->out, ".raw");
    int status = access(raw, F_OK) == 0 ? 0 : ask_api(w, raw, err);
    status = status == 0 ? write_by_file(w, raw, err) : -1;
    free(raw);
    return status;
}

int run_data_explain(const Settings *s, Err *err) {
    Writing w;
    static const char *const names[] = {"file", "model", "api", "rules"};
    int how = 0;
    if (need(s->acts, "acts", s, err) != 0 || need(s->by, "by", s, err) != 0 || need(s->out, "out", s, err) != 0) {
        return -1;
    }
    while (how < 4 && strcmp(s->by, names[how]) != 0) {
        how++;
    }
    if (how == 4) {
        return fail(err, "--by takes file, model, api or rules, not '%s'", s->by);
    }
    if ((how == 0 && need(s->in, "in", s, err) != 0) || (how == 1 && need(s->model, "model", s, err) != 0)) {
        return -1;
    }
    if (how != 2 && arrlen(s->argument)) {
        return fail(err, "'%s': only --by api takes words, for its script, behind --", s->argument[0]);
    }
    int status = open_writing(&w, s, err);
    if (status == 0) {
        status = how == 0   ? write_by_file(&w, s->in, err)
                 : how == 1 ? write_by_model(&w, err)
                 : how == 2 ? write_by_api(&w, err)
                            : write_by_rules(&w, err);
    }
    return close_writing(&w, status, err);
}
