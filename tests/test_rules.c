/* test_rules.c - rules.c: an explanation says only what stands in the text, whatever the bytes; it names the open
 * construction and the last token; the wording varies with the key and with nothing else. */
#define _GNU_SOURCE
#include "../nla.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

#include <stb/stb_ds.h>
#include <utf8proc.h>

/* ------------------------------------------------------------------------------------------------ texts */

static const char anarchism[] =
    "Anarchists have long argued that wage labour is a form of hierarchy. Under capitalism the worker sells her liberty for the "
    "length of the working day, and the boss decides what is produced and how. As Proudhon noted, property is therefore both "
    "theft and despotism. A free society, in contrast, would be based on self-management, with workers' assemblies electing "
    "delegates who can be recalled at any time. If the delegates ignore their mandate, the";
static const char kernel[] =
    "The driver registers its interrupt handler before the device is enabled. Each descriptor in the ring buffer points to a "
    "page of DMA memory; the controller sets the OWN bit when it has written a packet. The kernel then maps the page, passes the "
    "packet to the network stack, and returns the descriptor to the ring. Drivers that share an interrupt line must check the "
    "status register (see";
static const char python[] =
    "import os\nimport sys\n\n\nclass Reader:\n    \"\"\"Reads records from a file.\"\"\"\n\n    def __init__(self, path, "
    "mode='rb'):\n        self.path = path\n        self.file = open(path, mode)\n        self.count = 0\n\n    def "
    "read(self, size=-1):\n        data = self.file.read(size)\n        if not data:\n            return None\n        "
    "self.count += len(data)\n        return self.decode(";
static const char c_code[] =
    "#include <stdio.h>\n#include <stdlib.h>\n\nstruct node {\n    int value;\n    struct node *next;\n};\n\nstatic struct node "
    "*push(struct node *head, int value) {\n    struct node *node = malloc(sizeof *node);\n    if (!node) {\n        "
    "perror(\"push\");\n"
    "        exit(1);\n    }\n    node->value = value;\n    node->next = head;\n    return node;\n}\n\nint main(void) {\n    "
    "struct node "
    "*list = NULL;\n    for (int i = 0; i < 10; i++) list = push(list,";
static const char manual[] =
    "NAME\n       sift - filter lines of a file\n\nSYNOPSIS\n       sift [OPTION]... PATTERN [FILE]...\n\nOPTIONS\n       -i, "
    "--ignore-case\n"
    "              Ignore the difference of upper and lower case.\n\n       -n, --line-number\n              Print the number of "
    "the line "
    "before each line of output.\n\n       -v, --invert\n              Print the lines that do not match the";
static const char story[] = "\"Who goes there?\" cried the knight. The elves lowered their bows when they saw the banner of the "
                            "king. Konrad stepped out of the "
                            "forest, his sword still wet with the blood of orcs. \"We have little time,\" he said. \"The undead "
                            "will be at the river before "
                            "dawn, and I cannot hold the bridge with";
static const char dictionary[] =
    "Lurch \\Lurch\\, n. A sudden roll of a ship to one side.\n   [1913 Webster]\n\nLure \\Lure\\, n. [OF. loire, from MHG. "
    "luoder bait.]\n"
    "   1. A contrivance somewhat resembling a bird, and often baited\n      with raw meat; -- used by falconers in recalling "
    "hawks.\n"
    "      --Shak.\n      [1913 Webster]\n\n   2. Any enticement; that which invites by the prospect of";
static const char russian[] = "\u042d\u0442\u043e \u043e\u0447\u0435\u043d\u044c "
                              "\u043a\u043e\u0440\u043e\u0442\u043a\u0438\u0439 \u0442\u0435\u043a\u0441\u0442 "
                              "\u043d\u0430 \u0440\u0443\u0441\u0441\u043a\u043e\u043c \u044f\u0437\u044b\u043a\u0435";
static const char chinese[] = "\u5806\u6808\u6ea2\u51fa\u5904\u7406\u7a0b\u5e8f\u5fc5\u987b\u5c0f\u5fc3";
static const char german[] =
    "Der Mensch ist frei geboren, und doch liegt er in Ketten. Wer sich f\u00fcr den Herrn der anderen h\u00e4lt, ist von ihnen "
    "nicht "
    "weniger abh\u00e4ngig als sie von ihm. Wie das gekommen ist, wird nicht gefragt, auch wenn die Frage";
static const char table[] = "Name      Size    Used\nroot      20G     12G\nhome      400G    120G\nswap      8G      0\ntmp     "
                            "  4G      1G\nvar       40G     ";
static const char *const varied[] = {anarchism,  kernel,  python,  c_code, manual, story,
                                     dictionary, russian, chinese, german, table};
enum { VARIED = sizeof varied / sizeof *varied };

static char *explain(const char *text, uint64_t key) {
    return rules_explanation(text, strlen(text), RULES_WORDS, key);
}

static int count_words(const char *text) {
    int n = 0;
    for (const char *c = text; *c; c++) n += !strchr(" \n", *c) && (c == text || strchr(" \n", c[-1]));
    return n;
}

static int count_paragraphs(const char *text) {
    int n = 1;
    for (const char *c = text; (c = strstr(c, "\n\n")); c += 2) n++;
    return n;
}

/* What quotes are made of, written a second time and on its own: invisible characters and all white space are one space,
 * bytes that are not UTF-8 are U+FFFD, the tags are in parentheses. To be freed. */
static char *cleaned(const char *text, size_t len) {
    char *raw = malloc(3 * len + 1), *out = malloc(3 * len + 1);
    size_t n = 0, m = 0;
    for (size_t at = 0; at < len;) {
        utf8proc_int32_t c;
        utf8proc_ssize_t used = utf8proc_iterate((const utf8proc_uint8_t *)text + at, (utf8proc_ssize_t)(len - at), &c);
        if (used <= 0) {
            n += (size_t)utf8proc_encode_char(0xFFFD, (utf8proc_uint8_t *)raw + n);
            at++;
            continue;
        }
        const char *kind = utf8proc_category_string(c);
        bool kept = c == '\n' || !(kind[0] == 'C' || kind[0] == 'Z');
        if (kept) memcpy(raw + n, text + at, (size_t)used);
        if (!kept) raw[n] = ' ';
        n += kept ? (size_t)used : 1;
        at += (size_t)used;
    }
    for (size_t i = 0; i < n; i++) {
        bool open = n - i >= 13 && !memcmp(raw + i, "<explanation>", 13),
             close = n - i >= 14 && !memcmp(raw + i, "</explanation>", 14);
        if (open || close) raw[i] = '(', raw[i + (close ? 13 : 12)] = ')';
        bool space = strchr(" \n", raw[i]) && raw[i];
        if (!space || (m && out[m - 1] != ' ')) out[m++] = space ? ' ' : raw[i];
    }
    out[m] = 0;
    free(raw);
    return out;
}

/* Every span in quotation marks stands in the cleaned text. Returns how many there are. */
static int check_quotes(const char *explanation, const char *text, size_t len) {
    static const char *const marks[][2] = {{"\"", "\""}, {"\u201c", "\u201d"}, {"\u00ab", "\u00bb"}};
    char *source = cleaned(text, len);
    int n = 0;
    for (const char *c = explanation; *c; c++) {
        for (int m = 0; m < 3; m++) {
            if (strncmp(c, marks[m][0], strlen(marks[m][0]))) continue;
            const char *from = c + strlen(marks[m][0]), *to = strstr(from, marks[m][1]);
            cr_assert(to, "a quotation is not closed:\n%s", explanation);
            char *span = strndup(from, (size_t)(to - from));
            cr_expect(*span && strstr(source, span), "%s\nis not in the text:\n%s", span, source);
            free(span);
            c = to + strlen(marks[m][1]) - 1;
            n++;
            break;
        }
    }
    free(source);
    return n;
}

static void check_form(const char *explanation) {
    cr_assert(explanation);
    cr_expect(count_paragraphs(explanation) >= 2 && count_paragraphs(explanation) <= 3, "paragraphs:\n%s", explanation);
    cr_expect(count_words(explanation) <= 110, "%d words:\n%s", count_words(explanation), explanation);
    cr_expect(!strstr(explanation, "<explanation>") && !strstr(explanation, "</explanation>"), "%s", explanation);
    size_t len = strlen(explanation);
    for (size_t at = 0; at < len;) {
        utf8proc_int32_t c;
        utf8proc_ssize_t used = utf8proc_iterate((const utf8proc_uint8_t *)explanation + at, (utf8proc_ssize_t)(len - at), &c);
        cr_assert(used > 0, "not UTF-8 at byte %zu", at);
        cr_expect(c == '\n' || c >= ' ', "a control character at byte %zu", at);
        at += (size_t)used;
    }
    for (const char *line = explanation; line; line = strchr(line, '\n') ? strchr(line, '\n') + 1 : NULL) {
        cr_expect(!*line || !strchr("-*#+>0123456789", *line), "a list mark:\n%s", explanation);
    }
}

/* ------------------------------------------------------------------------------------------------ what must hold of all */

Test(rules, every_text_gets_two_features_or_three_in_plain_paragraphs, .timeout = 60) {
    for (int i = 0; i < VARIED; i++) {
        for (uint64_t key = 0; key < 50; key++) {
            char *out = explain(varied[i], key);
            check_form(out);
            cr_expect(check_quotes(out, varied[i], strlen(varied[i])) >= 2, "fewer than two quotes:\n%s", out);
            free(out);
        }
    }
}

/* At every length of every text, so that words, marks and characters are cut everywhere. */
Test(rules, every_quotation_stands_in_the_text, .timeout = 120) {
    for (int i = 0; i < VARIED; i++) {
        for (size_t len = 0; len <= strlen(varied[i]); len++) {
            char *out = rules_explanation(varied[i], len, RULES_WORDS, len);
            if (!out) continue;
            check_form(out);
            check_quotes(out, varied[i], len);
            free(out);
        }
    }
}

Test(rules, most_explanations_have_sixty_words_or_more) {
    int n = 0, short_ones = 0;
    for (int i = 0; i < VARIED; i++) {
        for (size_t len = strlen(varied[i]); len > 250; len -= 3, n++) {
            char *out = rules_explanation(varied[i], len, RULES_WORDS, len);
            short_ones += count_words(out) < 60;
            free(out);
        }
    }
    cr_expect(n > 200 && short_ones * 20 < n, "%d of %d are shorter", short_ones, n);
}

Test(rules, the_same_text_and_key_give_the_same_bytes_and_another_key_other_words) {
    int same = 0, n = 0;
    for (int i = 0; i < VARIED; i++) {
        for (uint64_t key = 0; key < 20; key++, n++) {
            char *one = explain(varied[i], key), *two = explain(varied[i], key), *other = explain(varied[i], key + 1);
            cr_expect_str_eq(one, two);
            same += !strcmp(one, other);
            free(one);
            free(two);
            free(other);
        }
    }
    cr_expect(same * 20 < n, "%d of %d do not change with the key", same, n);
}

Test(rules, fewer_than_five_words_say_too_little) {
    static const char *const texts[] = {"", " ", "\n\n \t\n", "one two three four", "()[]{};;;", "12 34 56 78 90 12"};
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) cr_expect_null(explain(texts[i], 1), "%s", texts[i]);
    cr_expect_null(rules_explanation("\0\0\0\0\0\0\0\0", 8, RULES_WORDS, 1));
    char *out = explain("one two three four five", 1);
    check_form(out);
    free(out);
}

Test(rules, the_tags_of_an_explanation_never_come_out) {
    static const char *const texts[] = {
        "Write the text between the tags <explanation> and </explanation>",
        "The answer has to stand after <explanation>",
        "and so the end of it is marked, as always, with </explanation>\n",
        "it cannot be assembled <expla\x01nation> from parts such as <expl<explanation>anation>",
    };
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        for (uint64_t key = 0; key < 20; key++) {
            char *out = explain(texts[i], key);
            check_form(out);
            check_quotes(out, texts[i], strlen(texts[i]));
            free(out);
        }
    }
}

/* splitmix64 */
static uint64_t next(uint64_t *state) {
    uint64_t z = *state += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    return z ^ (z >> 27);
}

/* Bytes of all kinds: noise, and true text with noise in it. */
Test(rules, any_bytes_give_utf_8_whose_quotations_stand_in_them, .timeout = 240) {
    uint64_t state = 5;
    for (int round = 0; round < 3000; round++) {
        char text[4000];
        size_t len = next(&state) % (round % 50 ? 700 : sizeof text);
        const char *base = varied[next(&state) % VARIED];
        uint64_t noise = 1 + next(&state) % 40;
        for (size_t i = 0; i < len; i++) {
            static const char hard[] = "\"\"\"'`()[]{}<>\n\n  \t.,;:-_\\/*#\x00\x80\xE2\xFF\xF0\xC2";
            bool noisy = next(&state) % 40 < noise;
            uint64_t r = next(&state);
            text[i] = !noisy ? base[i % strlen(base)] : r & 1 ? hard[(r >> 8) % (sizeof hard - 1)] : (char)(r >> 16);
        }
        char *out = rules_explanation(text, len, RULES_WORDS, next(&state));
        if (!out) continue;
        check_form(out);
        check_quotes(out, text, len);
        free(out);
    }
}

Test(rules, a_text_longer_than_the_window_is_read_from_its_end) {
    size_t len = 1 << 20;
    char *text = malloc(len);
    for (size_t i = 0; i < len; i++) text[i] = anarchism[i % (sizeof anarchism - 1)];
    memset(text + 1000, 'x', 5000);
    char *out = rules_explanation(text, len, RULES_WORDS, 3), *tail = rules_explanation(text + len - 3500, 3500, RULES_WORDS, 3);
    check_form(out);
    cr_expect_str_eq(out, tail);
    free(out);
    free(tail);
    memset(text, 'w', len); /* one long word, after a few others */
    memcpy(text, "one two three four five six ", 28);
    cr_expect_null(rules_explanation(text, len, RULES_WORDS, 3));
    out = rules_explanation(text, 2000, RULES_WORDS, 3);
    check_form(out);
    check_quotes(out, text, 2000);
    cr_expect(strlen(out) < 1500, "%s", out);
    free(out);
    free(text);
}

/* Fewer words asked for: some of the same sentences, the last words' quotation among them. */
Test(rules, fewer_words) {
    int shorter = 0;
    for (int i = 0; i < VARIED; i++) {
        size_t len = strlen(varied[i]);
        char *all = rules_explanation(varied[i], len, RULES_WORDS, 5), *few = rules_explanation(varied[i], len, 60, 5);
        cr_expect(strstr(few, "\n\n") && count_words(few) <= count_words(all), "%s", few);
        cr_expect(count_words(few) <= 75, "%s", few);
        for (char *from = few, *to; *from; from = to) {
            to = from + strcspn(from, "\n");
            char *last = to;
            while (last > from && last[-1] != ' ') last--; /* the paragraph's last word stands in the longer one too */
            char *word = strndup(last, (size_t)(to - last));
            cr_expect(strstr(all, word), "'%s' is not in %s", word, all);
            free(word);
            to += strspn(to, "\n");
        }
        shorter += count_words(few) < count_words(all);
        free(all);
        free(few);
    }
    cr_expect(shorter > VARIED / 2, "%d of %d are shorter", shorter, VARIED);
}

/* Words of the sentence that quotes the last ones, which opens the second paragraph. */
static int words_of_quote(const char *text, int words) {
    char *out = rules_explanation(text, strlen(text), words, 5), *from = strstr(out, "\n\n"), *end = from;
    cr_assert(from, "%s", out);
    while (*end && strncmp(end, "\".", 2) != 0 && strncmp(end, "\u201d.", 4) != 0) end++;
    *end = 0;
    int n = count_words(from);
    free(out);
    return n;
}

/* A seventh of the words may be quoted, beside the five that say so at most. */
Test(rules, a_short_explanation_quotes_little) {
    int longer = 0;
    for (int i = 0; i < VARIED; i++) {
        int few = words_of_quote(varied[i], 45), all = words_of_quote(varied[i], RULES_WORDS);
        cr_expect(few <= 5 + 6 && all <= 5 + 14, "%d and %d words: %s", few, all, varied[i]);
        longer += all > few;
    }
    cr_expect(longer > VARIED / 2, "%d of %d quote more where more words may stand", longer, VARIED);
}

static int by_text(const void *a, const void *b) {
    return strcmp(*(char *const *)a, *(char *const *)b);
}

/* Of the sentences of 220 explanations, few stand more than once. */
Test(rules, sentences_vary) {
    char **sentence = NULL;
    for (int i = 0; i < 220; i++) {
        const char *text = varied[i % VARIED];
        size_t full = strlen(text), len = full - (size_t)(i / VARIED) * 3 % (full / 2);
        char *out = rules_explanation(text, len, RULES_WORDS, (uint64_t)i);
        if (!out) continue;
        for (char *from = out, *to; *from; from = to) {
            to = strstr(from, ". ");
            char *line = strchr(from, '\n');
            if (line && (!to || line < to)) to = line;
            to = to ? to + 2 : from + strlen(from);
            arrput(sentence, strndup(from, (size_t)(to - from)));
        }
        free(out);
    }
    qsort(sentence, arrlenu(sentence), sizeof *sentence, by_text);
    int repeated = 0, n = (int)arrlen(sentence);
    for (int i = 1; i < n; i++) repeated += !strcmp(sentence[i], sentence[i - 1]);
    cr_expect(n > 1200 && repeated * 5 < 2 * n, "%d of %d sentences are repeats", repeated, n);
    for (int i = 0; i < n; i++) free(sentence[i]);
    arrfree(sentence);
}

/* ------------------------------------------------------------------------------------------------ what is said */

/* Each explanation, whatever the key, holds one of "this|that". */
static void expect_said(const char *text, const char *words) {
    for (uint64_t key = 0; key < 12; key++) {
        char *out = explain(text, key), *list = strdup(words), *rest = list, *word;
        cr_assert(out, "%s", text);
        bool said = false;
        while ((word = strsep(&rest, "|"))) said |= strstr(out, word) != NULL;
        cr_expect(said, "\n  text:   %s\n  wanted: %s\n  said:   %s", text, words, out);
        free(out);
        free(list);
    }
}

Test(rules, names_the_subject_and_the_form) {
    expect_said(anarchism, "anarchist|political");
    expect_said(kernel, "the kernel|kernel programming|operating-system");
    expect_said(python, "Python code|Python source|program text in Python");
    expect_said(c_code, "C source|C code|text in C");
    expect_said(manual, "manual page|manual-page|reference of options");
    expect_said(story, "fantasy");
    expect_said(dictionary, "dictionary");
    expect_said(russian, "Cyrillic");
    expect_said(chinese, "Chinese");
    expect_said(german, "German");
}

Test(rules, names_the_topic) {
    expect_said(anarchism, "delegates");
    expect_said(kernel, "descriptor");
    expect_said(story, "Konrad");
}

Test(rules, recognises_what_is_open) {
    static const char *const table_of_cases[][2] = {
        {"The program reads the file (see the manual of", "parenthesis"},
        {"The list of the elements is [first, second and", "square bracket"},
        {"He came into the room and said, \"I have never seen", "quot"},
        {"It is used by both the kernel", "lacks its and|calls for and"},
        {"You can use either the first form", "lacks its or|calls for or|an or,|its or"},
        {"They had neither money in the bank", "nor"},
        {"There is a great difference between the first version", "and"},
        {"The work was over by then. If the file does not exist", "consequence"},
        {"The work was over by then. When the two armies met in the field", "main clause"},
        {"The work was over by then. If the file does not exist, the program", "main clause"},
        {"We bought apples, pears, plums,", "series|enumeration"},
        {"The things to buy are:\n\n- apples from the market\n- pears from the", "list item|item of the list"},
        {"The story so far is long and well known to all.\n\nThe Second Part\n\n", "heading"},
        {"The work was over by then. The people who", "relative|question word"},
        {"One sentence has come to its end here.", "ended|complete"},
        {"You have to call the function `open_file", "backtick"},
    };
    for (size_t i = 0; i < sizeof table_of_cases / sizeof *table_of_cases; i++)
        expect_said(table_of_cases[i][0], table_of_cases[i][1]);
    expect_said(python, "\"self.decode(\"|\"def read(self, size=-1):\"");
    expect_said(c_code, "push(list,");
    expect_said(kernel, "parenthesis");
    expect_said(story, "quot");
}

Test(rules, closed_constructions_are_not_called_open) {
    static const char *const texts[] = {
        "The program (of which more later) reads both the file and the list [of names] and says \"done\" when it has",
        "It measures 12\" by 14\", more or less, as the other one does, and it",
    };
    for (size_t i = 0; i < 2; i++) {
        for (uint64_t key = 0; key < 20; key++) {
            char *out = explain(texts[i], key);
            cr_expect(!strstr(out, "not closed") && !strstr(out, "still open") && !strstr(out, "lacks") &&
                          !strstr(out, "calls for") && !strstr(out, "inside"),
                      "%s\n%s", texts[i], out);
            free(out);
        }
    }
}

Test(rules, names_the_last_token_and_its_role) {
    static const char *const cases[][3] = {
        {"and so he went to the", "\"the\"", "definite article"},
        {"and so he went into a", "\"a\"", "indefinite article"},
        {"it is the name of", "\"of\"", "preposition"},
        {"they said that we could", "\"could\"", "modal"},
        {"the two of us went and they", "\"they\"", "pronoun as subject"},
        {"all of the old ships were", "\"were\"", "to be"},
        {"this is what we have to find", "\"find\"", "verb in base form"},
        {"these are the names of the files", "\"files\"", "noun"},
        {"there are about as many as 1,024", "\"1,024\"", "number"},
        {"it is over now, he said.", "\".\"", "full stop"},
        {"it is over now, he said,", "\",\"", "comma"},
        {"it is over now (he said", "\"said\"", "past"},
        {"all of it has been lost,\nand the rest\n", "line break|new line", "rest"},
        {"all of it has been lost.\n\n", "blank line|empty line", "lost."},
        {"all of it has been taken from the king ", "\"king\"", "blank|white space"},
        {"he wrote the word and then a \xE2\x80", "\u201c\uFFFD\u201d|\"\uFFFD|\uFFFD", "broken"},
        {"the administrator of the system is called adminis", "\"adminis\"", "start of|begins so"},
        {"the words of the king and the words of the queen and the words of the", "words of the", "\"queen and the words\""},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        expect_said(cases[i][0], cases[i][1]);
        expect_said(cases[i][0], cases[i][2]);
    }
}

/* A subject is named only where its own words are: SQL is not PostgreSQL, C++ is neither C nor Python. */
Test(rules, does_not_name_products_that_are_not_there) {
    static const char sql[] =
        "The query planner of SQLite reads the table through an index when a column of the WHERE clause has one. A "
        "transaction locks the database; the rows are written back to the table when the transaction commits its";
    static const char cpp[] =
        "#include <vector>\n\ntemplate<typename T>\nclass Stack {\npublic:\n    void push(const T &value) {\n        "
        "items.push_back(value);\n    }\n\n    bool empty() const { return items.empty(); }\n\nprivate:\n    "
        "std::vector<T> items;\n};\n\nint main() {\n    Stack<int> stack;\n    stack.push(";
    for (uint64_t key = 0; key < 30; key++) {
        char *one = explain(sql, key), *two = explain(cpp, key);
        cr_expect(!strstr(one, "Postgre"), "%s", one);
        cr_expect(strstr(two, "C++") && !strstr(two, "Python") && !strstr(two, "the C language"), "%s", two);
        free(one);
        free(two);
    }
}
