/* rules_text.c - the end of a text as rules.c needs it: cleaned, cut into pieces (words, numbers, marks, line breaks), each
 * looked up in the lexicon of rules_words.h; which lines are code; where the last sentence begins.
 *
 * English is read by word lists and endings, never parsed: a word may be several things at once, and whoever asks decides by its
 * neighbour, or says that it is unsure.
 */
#define _GNU_SOURCE /* memmem */
#include "rules.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include <utf8proc.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

enum {
    WINDOW = 3000, /* bytes of the text's end that are read */
    LONGEST = 24,  /* bytes of a word of the lexicon with its ending */
};

/* ------------------------------------------------------------------------------------------------ lexicon */

_Static_assert(COUNT(domains) <= 64 && COUNT(foreign) <= 32, "bits of Entry");

/* Open addressing; filled once, then only read. */
static Entry lexicon[1 << 13];
static pthread_once_t lexicon_once = PTHREAD_ONCE_INIT;

static Entry *lexicon_place(const char *word, int len) {
    size_t at = XXH3_64bits(word, (size_t)len) % COUNT(lexicon);
    while (lexicon[at].word && (lexicon[at].len != len || memcmp(lexicon[at].word, word, (size_t)len))) {
        at = (at + 1) % COUNT(lexicon);
    }
    return &lexicon[at];
}

static void lexicon_add(const char *words, unsigned pos, uint64_t domain, unsigned language) {
    for (const char *w = words; *w;) {
        int len = (int)strcspn(w, " ");
        Entry *e = lexicon_place(w, len);
        *e = (Entry){w, len, e->pos | pos, e->domains | domain, e->foreign | language};
        w += len + (w[len] == ' ');
    }
}

static void lexicon_fill(void) {
    for (int i = 0; i < COUNT(word_classes); i++) lexicon_add(word_classes[i].words, word_classes[i].pos, 0, 0);
    for (int i = 0; i < COUNT(domains); i++) lexicon_add(domains[i].words, 0, 1ull << i, 0);
    for (int i = 0; i < COUNT(foreign); i++) lexicon_add(foreign[i].words, 0, 0, 1u << i);
}

static const Entry *lexicon_find(const char *word, int len) {
    const Entry *e = len <= LONGEST ? lexicon_place(word, len) : NULL;
    return e && e->word ? e : NULL;
}

/* What an ending makes of the base it stands on; the base must be of the class `needs`. */
static const struct {
    const char *ending, *instead;
    unsigned needs, makes;
} inflections[] = {
    {"s", "", P_VERB, P_S},       {"es", "", P_VERB, P_S},      {"ies", "y", P_VERB, P_S},
    {"s", "", P_NOUN, P_PLURAL},  {"es", "", P_NOUN, P_PLURAL}, {"ies", "y", P_NOUN, P_PLURAL},
    {"d", "", P_VERB, P_ED},      {"ed", "", P_VERB, P_ED},     {"ied", "y", P_VERB, P_ED},
    {"ing", "", P_VERB, P_ING},   {"ing", "e", P_VERB, P_ING},  {"er", "", P_ADJ, P_ADJ},
    {"r", "", P_ADJ, P_ADJ},      {"est", "", P_ADJ, P_ADJ},    {"st", "", P_ADJ, P_ADJ},
    {"er", "", P_VERB, P_NOUN},   {"r", "", P_VERB, P_NOUN},    {"ers", "", P_VERB, P_PLURAL},
    {"rs", "", P_VERB, P_PLURAL}, {"ly", "", P_ADJ, P_ADV},     {"ily", "y", P_ADJ, P_ADV},
    {"s", "", 0, P_PLURAL},       {"'s", "", 0, P_POSS},
};

/* What an ending says of a word whose base is not known. */
static const struct {
    const char *ending;
    unsigned makes;
} endings[] = {
    {"tion", P_NOUN},     {"sion", P_NOUN},  {"ness", P_NOUN}, {"ment", P_NOUN},   {"ity", P_NOUN},    {"ism", P_NOUN},
    {"ist", P_NOUN},      {"ance", P_NOUN},  {"ence", P_NOUN}, {"ship", P_NOUN},   {"ology", P_NOUN},  {"tions", P_PLURAL},
    {"ments", P_PLURAL},  {"isms", P_PLURAL}, {"ists", P_PLURAL}, {"ities", P_PLURAL}, {"ly", P_ADV},  {"ous", P_ADJ},
    {"ful", P_ADJ},       {"less", P_ADJ},   {"able", P_ADJ},  {"ible", P_ADJ},    {"ical", P_ADJ},    {"ive", P_ADJ},
    {"ial", P_ADJ},       {"ual", P_ADJ},    {"onal", P_ADJ},  {"ary", P_ADJ},    {"ize", P_VERB},   {"ify", P_VERB},
    {"ish", P_ADJ},       {"ed", P_ED},      {"ing", P_ING},   {"'s", P_POSS},
};

static bool ends_with(const char *word, int len, const char *ending) {
    int n = (int)strlen(ending);
    return len > n + 1 && !memcmp(word + len - n, ending, (size_t)n);
}

/* Strips inflection i; a doubled consonant (stopp-ed) is halved. NULL: it does not apply. */
static const Entry *base_of(const char *word, int len, int i) {
    char base[LONGEST + 8];
    int cut = len - (int)strlen(inflections[i].ending), more = (int)strlen(inflections[i].instead);
    if (!ends_with(word, len, inflections[i].ending)) return NULL;
    memcpy(base, word, (size_t)cut);
    memcpy(base + cut, inflections[i].instead, (size_t)more);
    const Entry *e = lexicon_find(base, cut + more);
    bool doubled = !more && cut > 3 && base[cut - 1] == base[cut - 2] && inflections[i].ending[0] != 's';
    if (!e && doubled) e = lexicon_find(base, cut - 1);
    return e && (!inflections[i].needs || (e->pos & inflections[i].needs)) ? e : NULL;
}

/* All the lexicon knows of a word in lower case; word NULL when it and its bases are not there. */
static Entry look_up(const char *word, int len) {
    Entry all = {0};
    const Entry *e = lexicon_find(word, len);
    if (e) all = *e;
    if (len > LONGEST || (all.pos & ~(unsigned)(P_DULL | P_COMMON | P_CODE | P_NAME))) return all;
    bool based = false;
    for (int i = 0; i < COUNT(inflections); i++) {
        const Entry *base = base_of(word, len, i);
        if (!base) continue;
        if ((all.pos & (P_S | P_PLURAL)) && inflections[i].needs == 0) continue;
        if (!based) all.word = base->word, all.len = base->len;
        based = true;
        all.pos |= inflections[i].makes | (base->pos & (P_DULL | P_COMMON | P_TAKES));
        all.domains |= base->domains;
    }
    if (all.pos & ~(unsigned)(P_DULL | P_COMMON | P_TAKES | P_CODE)) return all;
    for (int i = 0; i < COUNT(endings); i++) {
        if (len > 4 && ends_with(word, len, endings[i].ending)) all.pos |= endings[i].makes;
    }
    return all;
}

/* ------------------------------------------------------------------------------------------------ the text, cleaned and cut */

/* U+FFFD for what is not UTF-8; a space for what cannot be seen (controls, formats, private use, not assigned). */
static int clean_char(char *out, const char *in, int left, int *used) {
    utf8proc_int32_t c;
    *used = (int)utf8proc_iterate((const utf8proc_uint8_t *)in, left, &c);
    if (*used <= 0) {
        *used = 1;
        return (int)utf8proc_encode_char(0xFFFD, (utf8proc_uint8_t *)out);
    }
    if (c == '\n' || c == '\t' || (c >= ' ' && c < 0x7F)) {
        *out = (char)c;
        return 1;
    }
    switch (utf8proc_category(c)) {
    case UTF8PROC_CATEGORY_CC: case UTF8PROC_CATEGORY_CF: case UTF8PROC_CATEGORY_CS: case UTF8PROC_CATEGORY_CO:
    case UTF8PROC_CATEGORY_CN: case UTF8PROC_CATEGORY_ZS: case UTF8PROC_CATEGORY_ZL: case UTF8PROC_CATEGORY_ZP:
        *out = ' ';
        return 1;
    default: memcpy(out, in, (size_t)*used); return *used;
    }
}

/* The tags that enclose an explanation must not stand in one. */
static void break_tags(Text *t) {
    static const char *const tag[] = {"<explanation>", "</explanation>"};
    for (int i = 0; i < COUNT(tag); i++) {
        size_t n = strlen(tag[i]);
        for (char *found = t->s; (found = memmem(found, (size_t)(t->s + t->len - found), tag[i], n));) {
            found[0] = '(';
            found[n - 1] = ')';
        }
    }
}

static void clean(Text *t, const char *text, size_t len) {
    t->whole = len <= WINDOW;
    const char *from = t->whole ? text : text + len - WINDOW, *end = text + len;
    for (int i = 0; !t->whole && i < 3 && from < end && ((unsigned char)*from & 0xC0) == 0x80; i++) from++;
    t->s = xmalloc(3 * (size_t)(end - from) + 1);
    while (from < end) {
        int used;
        t->len += clean_char(t->s + t->len, from, (int)(end - from), &used);
        from += used;
    }
    t->s[t->len] = 0;
    break_tags(t);
}


/* The character at `at`: bytes, and what it is. *alone: a character that is a word by itself, as Chinese writes. */
static int char_at(const Text *t, int at, bool *letter, bool *script, bool *alone) {
    utf8proc_int32_t c = 0;
    int n = (int)utf8proc_iterate((const utf8proc_uint8_t *)t->s + at, t->len - at, &c);
    *alone = (c >= 0x2E80 && c < 0x2FE0) || (c >= 0x3040 && c < 0xA000) || (c >= 0xF900 && c < 0xFB00) || c >= 0x20000;
    *script = c >= 0x370 && !(c >= 0x1E00 && c < 0x1F00);
    utf8proc_category_t k = c < 128 ? UTF8PROC_CATEGORY_CN : utf8proc_category(c);
    *letter = c < 128 ? is_lower((char)c) || is_upper((char)c) || c == '_'
                      : (k >= UTF8PROC_CATEGORY_LU && k <= UTF8PROC_CATEGORY_MC);
    *script = *script && *letter;
    *alone = *alone && *letter;
    return n > 0 ? n : 1;
}

/* Bytes of the word or number at `at`; an apostrophe between letters, a point between digits belong to it. */
static int word_length(const Text *t, int at, bool *script) {
    int end = at;
    bool letter, other, alone, number = is_digit(t->s[at]);
    *script = false;
    while (end < t->len) {
        int n = char_at(t, end, &letter, &other, &alone);
        if (alone) {
            *script = true;
            return end > at ? end - at : n;
        }
        bool joins = letter || is_digit(t->s[end]);
        if (!joins && end > at && end + 1 < t->len) {
            int curly = !strncmp(t->s + end, "\u2019", 3) ? 2 : 0;
            bool apostrophe = (t->s[end] == '\'' || curly) && (is_lower(t->s[end - 1]) || is_upper(t->s[end - 1]));
            bool point = number && (t->s[end] == '.' || t->s[end] == ',');
            char next = t->s[end + 1 + (apostrophe ? curly : 0)];
            joins = (apostrophe && (is_lower(next) || is_upper(next))) || (point && is_digit(next));
        }
        if (!joins) break;
        *script |= other;
        end += n;
    }
    return end - at;
}

/* Bytes of the mark at `at`: brackets and quotation marks are single, others run on (---, ::, ...), but for the triple quote of
 * Python, `` and the two-character operators of programs. */
static int mark_length(const Text *t, int at) {
    static const char *const pairs = "-> => >= <= != += -= := */ /* ** || ";
    const char *s = t->s + at;
    bool l, o, a;
    int n = char_at(t, at, &l, &o, &a), run = 1;
    while (n == 1 && run < t->len - at && s[run] == s[0]) run++;
    if (strchr("()[]{}<>", s[0])) run = 1;
    if (strchr("\"'", s[0])) run = run == 3 ? 3 : 1;
    if (n == 1 && run == 1 && at + 1 < t->len && s[1] != ' ') {
        char pair[4] = {s[0], s[1], ' ', 0};
        if (strstr(pairs, pair)) return 2;
    }
    return n > 1 ? n : run;
}

uint64_t lower_hash(const char *s, int len, Entry *known) {
    char lower[64];
    if (len < 1 || len > COUNT(lower)) return XXH3_64bits(s, (size_t)len);
    int n = 0;
    for (int i = 0; i < len; i++) {
        bool curly = i + 2 < len && !memcmp(s + i, "\u2019", 3);
        lower[n++] = curly ? '\'' : is_upper(s[i]) ? (char)(s[i] + 32) : s[i];
        i += curly ? 2 : 0;
    }
    *known = look_up(lower, n);
    return XXH3_64bits(lower, (size_t)n);
}

static int columns(const char *s, int from, int to) {
    int n = 0;
    for (int i = from; i < to; i++) n = s[i] == '\n' ? 0 : s[i] == '\t' ? (n | 7) + 1 : n + 1;
    return n;
}

static void cut_pieces(Text *t) {
    t->piece = xcalloc((size_t)t->len + 1, sizeof *t->piece);
    t->last = -1;
    bool first = true;
    for (int at = 0; at < t->len;) {
        int space = at, lines = 0;
        while (at < t->len && is_space(t->s[at])) lines += t->s[at++] == '\n';
        if (lines) {
            t->piece[t->n++] = (Piece){.at = space, .len = at - space, .kind = BREAK, .lines = lines,
                                       .indent = columns(t->s, space, at)};
            first = true;
        } else if (at == t->len) {
            t->spaces = columns(t->s, space, at);
        }
        if (at == t->len) break;
        Piece *p = &t->piece[t->n];
        *p = (Piece){.at = at, .kind = is_digit(t->s[at]) ? NUMBER : WORD, .spaced = at > space, .first = first};
        p->len = word_length(t, at, &p->script);
        if (!p->len) {
            p->kind = MARK;
            p->len = mark_length(t, at);
        }
        p->hash = p->kind == WORD ? lower_hash(t->s + at, p->len, &p->known) : XXH3_64bits(t->s + at, (size_t)p->len);
        t->words += p->kind == WORD;
        t->last = t->n++;
        at += p->len;
        first = false;
    }
}

bool piece_is(const Text *t, int i, const char *text) {
    return i >= 0 && i < t->n && t->piece[i].len == (int)strlen(text) && !memcmp(t->s + t->piece[i].at, text, strlen(text));
}

bool piece_in(const Text *t, int i, const char *words) {
    if (i < 0 || i >= t->n || t->piece[i].kind == BREAK) return false;
    int len = t->piece[i].len;
    for (const char *w = words; *w;) {
        int n = (int)strcspn(w, " ");
        if (n == len && !strncasecmp(w, t->s + t->piece[i].at, (size_t)n)) return true;
        w += n + (w[n] == ' ');
    }
    return false;
}

/* ------------------------------------------------------------------------------------------------ code, or prose */

bool line_starts(const char *line, int len, const char *words) {
    for (const char *w = words; *w;) {
        int n = (int)strcspn(w, "|");
        if (n <= len && !memcmp(line, w, (size_t)n)) return true;
        w += n + (w[n] == '|');
    }
    return false;
}

bool line_has(const char *line, int len, const char *words) {
    for (const char *w = words; *w;) {
        size_t n = strcspn(w, "|");
        if (n && memmem(line, (size_t)len, w, n)) return true;
        w += n + (w[n] == '|');
    }
    return false;
}

/* What the line s[0..len) is: 1 code, 0 words, -1 neither (blank, or a comment that says nothing of itself). */
static int line_is_code(const char *s, int len) {
    while (len && is_space(*s)) s++, len--;
    while (len && is_space(s[len - 1])) len--;
    if (!len) return -1;
    if (line_starts(s, len, "//|/*|* |*/|** ")) return -1;
    if (line_starts(s, len,
                    "int |char |bool |const |#include|#define|#if|#endif|#else|#!/|>>> |def |elif |my $|my @|my (|static |extern "
                    "|typedef |struct "
                    "|const char|unsigned |@@|$ |INSERT INTO|CREATE TABLE|SELECT |ALTER TABLE|sudo |printf(|} else|except "
                    "|try:|else:|=cut|self.|return (|return;|use strict|git |import sys|import os"))
        return 1;
    int symbols = 0, letters = 0, gaps = 0;
    for (int i = 0; i < len; i++) {
        symbols += strchr("(){}[]=;<>$@&|*+\\_#%/", s[i]) != NULL;
        letters += is_lower(s[i]) || is_upper(s[i]);
        gaps += s[i] == ' ';
    }
    bool call = line_has(s, len, "(") && line_has(s, len, "()|(\"|('|(self|);|):|(&|(*|($");
    bool strong = line_has(s, len, " = |==|!=|->|::|+=|&&| => |$(|);|};|\\n\"") || call;
    bool end = strchr(";{}\\", s[len - 1]) || line_has(s + len - 1, 1, ",") ? symbols > 1 : false;
    if (strchr("{}", s[len - 1]) && len < 4) return 1;
    if (s[len - 1] == ';' && (symbols > 2 || (gaps < 1 && len > 3))) return 1;
    if (line_starts(s, len, "if |for |while |return |class |import |from |with |for(|if(|while(|raise |assert ") &&
        (s[len - 1] == ':' || s[len - 1] == '{' || symbols > 2))
        return 1;
    if (line_starts(s, len, "return |raise |break|continue|pass|yield ") && gaps < 4 && s[len - 1] != '.') return 1;
    int weight = symbols * 100 / (letters + symbols + 1);
    return (strong && weight > 6 && gaps < 14) || (end && weight > 10 && gaps < 12) || (weight > 22 && letters > 7);
}

/* Sets code, in_code and comment from the lines. The last line counts by itself only when there is enough of it. */
static void judge_lines(Text *t) {
    int code = 0, words = 0, recent = 0;
    bool block = false, wordy = false;
    for (int at = 0; at < t->len;) {
        const char *s = t->s + at, *newline = memchr(s, '\n', (size_t)(t->len - at));
        int len = newline ? (int)(newline - s) : t->len - at;
        int is = line_is_code(s, len), gaps = 0;
        for (int i = 1; i < len; i++) gaps += s[i] == ' ' && s[i - 1] != ' ';
        bool cut = at == 0 && !t->whole;
        if (!cut) code += is > 0, words += is == 0;
        if (is >= 0 && !cut) recent = ((recent << 1) | is) & 7;
        const char *open = memmem(s, (size_t)len, "/*", 2), *close = memmem(s, (size_t)len, "*/", 2);
        if (open || close) block = open && (!close || close < open);
        t->in_code = is > 0;
        wordy = is == 0 && gaps > 6;
        t->comment = block || (is < 0 && line_has(s, len, "//")) || line_has(s, len, " # | // ") || line_starts(s, len, "# |// ");
        at += len + 1;
    }
    t->code = code > words;
    t->examples = !t->code && code > 2 && code * 6 > words;
    t->in_code = t->in_code || (t->code && recent && !wordy);
    t->comment = t->comment && t->code;
    if (t->comment) t->in_code = false;
}

static const struct {
    const char *language, *cues;
} languages[] = {
    {"C", "#include|#define|#ifdef|#endif|->|/* | */|struct |int |char |void |static |size_t|const |;\n|);\n|{\n|}\n|NULL|#if "},
    {"C++",
     "std::|template|typename|namespace |operator|_M_|::|nullptr|class |const |;\n|);\n|{\n|}\n|&|<<|#include|public:|void "},
    {"Python", "def |self.|import |elif |None|True|False|>>>|:\n|\"\"\"|__init__|except |print(|lambda |raise |return |[|'"},
    {"Perl", "my $|=head|=item|@_|$_|qw(|=~|sub |use strict|->{|=cut|L<|C<|print \"|=over|foreach |@{"},
    {"shell", "#!/bin|$ |fi\n|done\n|echo |sudo |apt|grep |export |esac|${|$1|||  ||# |git |--|cat |cp |mount "},
    {"SQL", "SELECT |FROM |WHERE |INSERT |CREATE |TABLE |VALUES|INTEGER|text|ALTER |UPDATE |JOIN |NULL|;\n"},
    {"markup", "</|/>|<div|<a |<p>|<!--|=\"|xmlns|<?xml|&lt;|<td|<span"},
    {"configuration", "[| = |\n[|: |# |true|false|yes\n|no\n|=|enable|config"},
};

const char *language_of(const Text *t) {
    int best = 0, most = -1;
    for (int i = 0; i < COUNT(languages); i++) {
        int found = 0;
        for (const char *cue = languages[i].cues; *cue;) {
            size_t n = strcspn(cue, "|");
            int times = 0;
            const char *at = n ? t->s : NULL;
            while (at && times < 4 && (at = memmem(at, (size_t)(t->s + t->len - at), cue, n))) at += n, times++;
            found += times;
            cue += n + (cue[n] == '|');
        }
        if (found > most) most = found, best = i;
    }
    return languages[best].language;
}

/* ------------------------------------------------------------------------------------------------ the last sentence */

bool is_sentence_end(const Text *t, int i) {
    if (!piece_in(t, i, ". ! ? ...") || t->piece[i].first || (i > 0 && t->piece[i - 1].first && t->piece[i - 1].kind == NUMBER))
        return false;
    bool numbered = i > 1 && t->piece[i - 1].kind == NUMBER &&
                    piece_in(t, i - 2, "table figure section chapter fig example part version no step");
    if (numbered) return false;
    bool initial = i > 0 && t->piece[i - 1].kind == WORD && t->piece[i - 1].len == 1 && !piece_is(t, i - 1, "I");
    return piece_in(t, i, "! ?") || !(initial || piece_in(t, i - 1, "mr mrs dr st vs eg ie cf etc al vol pp fig no see"));
}

bool is_list_mark(const Text *t, int i) {
    if (i < 0 || i + 1 >= t->n || !t->piece[i].first) return false;
    if (piece_in(t, i, "- * + \u2022 o")) return t->piece[i + 1].spaced;
    bool counter = t->piece[i].kind == NUMBER && t->piece[i].len < 4;
    return counter && piece_in(t, i + 1, ". )") && i + 2 < t->n && t->piece[i + 2].spaced;
}

bool opens_sentence(const Text *t, int i) {
    if (i == 0 || (t->piece[i - 1].kind == BREAK && t->piece[i - 1].lines > 1) || is_list_mark(t, i)) return true;
    if (t->in_code && t->piece[i].first) return true;
    int before = i - 1 - (t->piece[i - 1].kind == BREAK);
    bool closed = before > 0 && piece_in(t, before, "\" ) ''") && is_sentence_end(t, before - 1);
    bool apart = t->piece[i].spaced || t->piece[i].first;
    bool opener = is_capital(t, i) || t->piece[i].kind == NUMBER || piece_in(t, i, "\" ( `` \u201c `");
    return apart && opener && (closed || (before >= 0 && is_sentence_end(t, before)));
}

static void find_sentence(Text *t) {
    int i = t->last;
    while (i > 0 && (t->piece[i].kind == BREAK || !opens_sentence(t, i))) i--;
    t->sentence = i > 0 ? i : 0;
    while (t->sentence < t->last && !is_list_mark(t, t->sentence) &&
           piece_in(t, t->sentence, "/* /** * ** # // // --- ; : , ) .")) {
        t->sentence += 1 + (t->piece[t->sentence + 1].kind == BREAK);
    }
}

int words_between(const Text *t, int from, int to) {
    int n = 0;
    for (int i = from; i <= to && i < t->n; i++)
        n += t->piece[i].kind != BREAK && (i == from || t->piece[i].spaced || t->piece[i].first);
    return n;
}

int has_verb(const Text *t, int from, int to) {
    int may = 0;
    for (int i = from; i <= to; i++) {
        unsigned pos = pos_of(t, i), before = i > from ? pos_of(t, i - 1) : 0;
        bool nominal = (before & (P_DET | P_POSS | P_PREP)) || piece_in(t, i - 1, "the a an");
        if (t->piece[i].kind != WORD) continue;
        if (!nominal && (pos & (P_BE | P_HAVE | P_DO | P_MODAL)) && !piece_in(t, i, "be been being am having")) return 1;
        if (!nominal && (pos & P_PAST) && !(pos & P_PART)) return 1;
        if ((pos & (P_VERB | P_S)) && (before & P_SUBJ)) return 1;
        if (pos & (P_VERB | P_S | P_ED | P_PAST | P_PART)) may = -1;
        if (!pos) may = -1;
    }
    return may;
}

/* ------------------------------------------------------------------------------------------------ all of it */

void text_read(Text *t, const char *text, size_t len) {
    pthread_once(&lexicon_once, lexicon_fill);
    *t = (Text){0};
    clean(t, text, len);
    cut_pieces(t);
    if (t->last < 0) return;
    judge_lines(t);
    find_sentence(t);
}

void text_free(Text *t) {
    free(t->piece);
    free(t->s);
}
