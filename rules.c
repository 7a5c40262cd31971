/* rules.c - warm-start explanations without a model: what a reader can say of a prefix from its words alone.
 *
 * Three paragraphs, as the method asks of a writer: subject, register and topic; the construction that is still open, with
 * the last words quoted; the last token, its role and the kind of thing that may follow. An AR learns from them to rebuild
 * the activation, so what counts is what the text shows: the quotes are exact, and everything else is hedged or countable.
 *
 * rules_text.c reads the text. Here each sentence is written with a rank, and those that fit are kept. The wording is drawn
 * from alternatives ("one|another") by a generator that starts at `key`.
 */
#define _GNU_SOURCE /* stpcpy */
#include "rules.h"

#include <stdlib.h>
#include <string.h>

#include <utf8proc.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

enum {
    MIN_WORDS = 5,     /* fewer say too little */
    QUOTE_WORDS = 14,  /* of the last words, at most: a seventh of the words that the explanation may have */
    QUOTE_LEAST = 4,   /* and at least */
    BEFORE_WORDS = 12, /* of what came before them */
    QUOTE_BYTES = 120, /* of any quote, and so of one long word */
    QUOTE_ROOM = QUOTE_BYTES + 8,
};

/* ------------------------------------------------------------------------------------------------ writing */

typedef struct {
    char text[700];
    int paragraph, rank; /* rank 0 must stay; the highest goes first when there are too many words */
} Sentence;

typedef struct {
    uint64_t state;
    Sentence sentence[16];
    int n;
    int len; /* of the sentence being written, sentence[n] */
    int quote_words; /* how long the quote of the last words may be */
    int quoted_from; /* byte where it begins */
} Writer;

/* splitmix64: the next number below n */
static int draw(Writer *w, int n) {
    uint64_t z = w->state += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return (int)((z ^ (z >> 31)) % (uint64_t)n);
}

static void put(Writer *w, const char *text, int len) {
    Sentence *s = &w->sentence[w->n];
    int room = (int)sizeof s->text - 1 - w->len;
    if (len > room) len = room;
    memcpy(s->text + w->len, text, (size_t)len);
    w->len += len;
    s->text[w->len] = 0;
}

/* One of "this|that|the other", with %1 and %2 replaced. */
static void say(Writer *w, const char *alternatives, const char *one, const char *two) {
    int n = 1;
    for (const char *c = alternatives; *c; c++) n += *c == '|';
    const char *c = alternatives;
    for (int skip = draw(w, n); skip; c++) skip -= *c == '|';
    for (; *c && *c != '|'; c++) {
        const char *what = c[0] == '%' && c[1] == '1' ? one : c[0] == '%' && c[1] == '2' ? two : NULL;
        if (what) {
            put(w, what, (int)strlen(what));
            c++;
        } else {
            put(w, c, 1);
        }
    }
}

static void end_sentence(Writer *w, int paragraph, int rank) {
    Sentence *s = &w->sentence[w->n];
    put(w, ".", 1);
    if (is_lower(s->text[0])) s->text[0] = (char)(s->text[0] - 32);
    s->paragraph = paragraph;
    s->rank = rank;
    if (w->n < COUNT(w->sentence) - 1) w->n++;
    w->len = 0;
}

/* The bytes from..to of the text in quotation marks that do not stand in it, white space as single spaces; its beginning is
 * given up where all kinds of marks stand in it. At most QUOTE_BYTES: the end stays when tail, else the beginning. */
static void quote(const Text *t, int from, int to, bool tail, char out[QUOTE_ROOM]) {
    static const char *const marks[][2] = {{"\"", "\""}, {"\u201c", "\u201d"}, {"\u00ab", "\u00bb"}};
    while (to > from && is_space(t->s[to - 1])) to--;
    if (to - from > QUOTE_BYTES && tail) from = to - QUOTE_BYTES;
    if (to - from > QUOTE_BYTES) to = from + QUOTE_BYTES;
    while (from < to && ((unsigned char)t->s[from] & 0xC0) == 0x80) from++;
    while (to > from && to < t->len && ((unsigned char)t->s[to] & 0xC0) == 0x80) to--;
    int best = 0, start = to;
    for (int m = 0; m < COUNT(marks); m++) {
        int clear = to;
        for (int i = to - 1; i >= from; i--) {
            bool is =
                !strncmp(t->s + i, marks[m][0], strlen(marks[m][0])) || !strncmp(t->s + i, marks[m][1], strlen(marks[m][1]));
            if (is) break;
            if (((unsigned char)t->s[i] & 0xC0) != 0x80) clear = i;
        }
        if (clear < start) best = m, start = clear;
    }
    while (start < to && is_space(t->s[start])) start++;
    int n = (int)(stpcpy(out, marks[best][0]) - out);
    for (int i = start; i < to; i++) {
        if (is_space(t->s[i]) && i > start && is_space(t->s[i - 1])) continue;
        out[n++] = is_space(t->s[i]) ? ' ' : t->s[i];
    }
    stpcpy(out + n, marks[best][1]);
}

/* Quotes the pieces from i on: at most `words` words, not past the line break, not past piece `stop`. */
static void quote_pieces(const Text *t, int i, int stop, int words, char out[QUOTE_ROOM]) {
    int from = t->piece[i].at, to = piece_end(t, i), taken = 1;
    for (int k = i + 1; k <= stop && t->piece[k].kind != BREAK; k++) {
        taken += t->piece[k].spaced;
        if (taken > words) break;
        to = piece_end(t, k);
    }
    quote(t, from, to, false, out);
}

static void append(char *list, size_t room, const char *text) {
    size_t n = strlen(list);
    if (n + strlen(text) < room) stpcpy(list + n, text);
}

/* ------------------------------------------------------------------------------------------------ subject, form, register */

/* A subject's name is said when one of the words it needs is there; and of code not that it is about its own language. */
static bool may_name(const Text *t, int domain) {
    if (t->code && strstr(domains[domain].name, " language|")) return false;
    bool may = !domains[domain].needs;
    for (int i = 0; i < t->n && !may; i++) {
        may = (t->piece[i].known.domains >> domain & 1) && piece_in(t, i, domains[domain].needs);
    }
    return may;
}

/* The two subjects whose words weigh most. A word of k subjects counts 1/k for each, three times at most; a subject needs three
 * different words. */
static void find_subjects(const Text *t, int subject[2], double score[2]) {
    double sum[COUNT(domains)] = {0};
    int kinds[COUNT(domains)] = {0};
    unsigned char times[1 << 13] = {0};
    for (int i = 0; i < t->n; i++) {
        uint64_t set = t->piece[i].known.domains;
        int before = set ? times[t->piece[i].hash % COUNT(times)]++ : 3;
        if (before > 2) continue;
        double weight = 1.0 / __builtin_popcountll(set) * (t->piece[i].known.pos & (P_DULL | P_COMMON) ? 0.5 : 1);
        for (uint64_t left = set; left; left &= left - 1) {
            sum[__builtin_ctzll(left)] += weight;
            kinds[__builtin_ctzll(left)] += before == 0;
        }
    }
    for (int k = 0; k < 2; k++) {
        subject[k] = -1;
        score[k] = 0;
        for (int d = 0; d < COUNT(domains); d++) {
            if (sum[d] > score[k] && kinds[d] > 2 && may_name(t, d) && (k == 0 || d != subject[0]))
                subject[k] = d, score[k] = sum[d];
        }
    }
}

/* How many lines there are, and of which shapes. */
typedef struct {
    int all, option, bullet, field, attribution, directive, pod, term, manual, dialogue, table;
} Lines;

static int leading(const char *s, int len) {
    int n = 0;
    while (n < len && is_space(s[n])) n++;
    return n;
}

static bool is_bullet(const char *s, int len) {
    if (len > 2 && strchr("-*+o", s[0]) && s[1] == ' ' && s[2] != ' ') return true;
    int from = s[0] == '(' ? 1 : 0, n = from;
    while (n < len && n < 4 && is_digit(s[n])) n++;
    return n > from && n + 1 < len && (s[n] == '.' || s[n] == ')') && s[n + 1] == ' ';
}

static Lines count_lines(const Text *t) {
    Lines l = {0};
    for (int at = 0; at < t->len;) {
        const char *s = t->s + at, *newline = memchr(s, '\n', (size_t)(t->len - at));
        int len = newline ? (int)(newline - s) : t->len - at;
        at += len + 1;
        int skip = leading(s, len);
        s += skip, len -= skip;
        if (!len) continue;
        l.all++;
        l.option += len > 2 && s[0] == '-' && ((s[1] == '-' && is_lower(s[2])) || is_lower(s[1]) || is_upper(s[1]));
        l.bullet += is_bullet(s, len);
        l.attribution += len > 6 && !memcmp(s, "-- ", 3) && is_upper(s[3]);
        l.directive += line_starts(s, len, ".. ") || line_has(s, len, ":meth:`|:func:`|:class:`|:mod:`|:ref:`|:c:");
        l.pod += line_starts(s, len, "=head|=item|=over|=back") || line_has(s, len, "C<|L<|F<|B<");
        l.term += line_has(s, len,
                           "[1913 Webster]|[WordNet|[PJC]|Syn: |, n. |, a. |, v. t. |, n.:|, adj.|<programming|<hardware"
                           "|<networking|<operating|<language|<communications|See also {|Compare {|See {|: n. |: adj. |), n.|), "
                           "a.|), v. |, adv. |(Zool.)|(Bot.)|(Med.)|"
                           "[imp. & p. p.|n. pl.|[Obs.]|, n. [|, a. [|(Naut.)|(Chem.)|(Anat.)|> A |> An |> The |> [") ||
                  line_starts(s, len, ":");
        l.dialogue += (line_has(s, len, "!|?|...") && line_has(s, len, "you|You|I |my |we |We |us ")) || s[0] == '"';
        l.manual += skip == 0 && len < 14 &&
                    line_starts(s, len, "NAME|SYNOPSIS|DESCRIPTION|OPTIONS|EXAMPLES|SEE ALSO|RETURN VALUE|FILES");
        l.table += (line_has(s, len, "\t|   ") && len < 100) || (len > 4 && memchr(s, '|', (size_t)len) != NULL);
    }
    return l;
}

/* Counts of the words that give a register away. */
typedef struct {
    int i, we, you, they, past, present, must, question, shout, words;
} Voice;

static Voice hear(const Text *t) {
    Voice v = {.words = t->words};
    for (int i = 0; i < t->n; i++) {
        unsigned pos = pos_of(t, i);
        bool after_word = i > 0 && t->piece[i - 1].kind == WORD && t->piece[i - 1].len > 1 && !t->piece[i].spaced;
        if (after_word) v.question += piece_is(t, i, "?"), v.shout += piece_is(t, i, "!");
        if (t->piece[i].kind != WORD) continue;
        v.i += piece_is(t, i, "I") || piece_in(t, i, "my me i'm i've mine");
        v.we += piece_in(t, i, "we us our we're ours");
        v.you += piece_in(t, i, "you your you're yours thou thee");
        v.they += piece_in(t, i, "he she his her him they their");
        v.past += (pos & P_PAST) || piece_in(t, i, "was were had did");
        v.present += piece_in(t, i, "is are has does do can will may be");
        v.must += piece_in(t, i, "must shall should");
    }
    return v;
}

static const char *form_of(const Text *t, const Lines *l, const Voice *v, const char *language) {
    bool c_like = !strcmp(language, "C"), python = !strcmp(language, "Python");
    if (l->pod * 12 > l->all && l->pod > 1) return "documentation in POD markup|a POD manual";
    if (t->code && !strcmp(language, "C++")) return "C++ source code|a piece of C++ code|program text in C++";
    if (t->code && c_like) return "C source code|a piece of C code|program text in C";
    if (t->code && python) return "Python source code|a piece of Python code|program text in Python";
    if (t->code && !strcmp(language, "Perl")) return "Perl source code|a piece of Perl code";
    if (t->code && !strcmp(language, "shell")) return "shell commands|a shell script or a terminal session";
    if (t->code && !strcmp(language, "SQL")) return "SQL statements|SQL code and its output";
    if (t->code && !strcmp(language, "markup")) return "markup|text in a markup language";
    if (t->code) return "code or configuration|a listing, code or configuration";
    if (l->directive * 9 > l->all && l->directive > 1)
        return "reference documentation in reStructuredText|a reference manual with role markup";
    if (l->term * 14 > l->all && l->term > 1) return "dictionary entries|entries of a dictionary|a glossary or dictionary";
    if (l->option * 9 > l->all && l->option > 1) return "a reference of options|a manual page listing options";
    if (l->manual) return "a manual page|documentation of the manual-page kind";
    if (l->attribution * 14 > l->all && l->attribution > 1)
        return "short quotations with their authors|a collection of quotations";
    int spoken = v->i + v->you + v->we;
    if (v->words > 30 && spoken * 18 > v->words && (l->dialogue * 4 > l->all || (v->question + v->shout) * 25 > v->words))
        return "dialogue|spoken lines|people talking";
    if (l->table * 2 > l->all && l->all > 4) return "a table or listing|tabular text";
    if (l->bullet * 6 > l->all && l->bullet > 2) return "a list of points|prose broken into list items";
    if (spoken * 14 > v->words && (v->i + v->we) * 35 > v->words)
        return "speech or a personal account|someone speaking or writing of themselves";
    if (v->you * 40 > v->words || v->must * 45 > v->words) return "instructions|a guide for the reader|directions";
    if ((v->they + v->i) * 25 > v->words && v->past * 30 > v->words) return "narrative prose|a narrative|an account of events";
    return "explanatory prose|expository prose|plain exposition";
}

static const char *register_of(const Voice *v) {
    bool past = v->past > v->present + 2, present = v->present > 2 * v->past + 2;
    if (v->you * 40 > v->words && v->i * 40 > v->words) return "from I to you|in the first person to a listener";
    if (v->you * 40 > v->words) return "addressing the reader as you|speaking to a you";
    if (v->we * 40 > v->words)
        return past ? "in the plural we, of the past|in the first person plural, past tense"
                    : "in the first person plural|speaking as we";
    if (v->i * 35 > v->words) return past ? "in the first person, past tense" : "in the first person|said by an I";
    if (v->they * 30 > v->words)
        return past ? "in the third person, past tense|telling of persons in the past"
                    : "in the third person|telling of him, her or them";
    if (v->question * 60 > v->words && v->question > 1) return "full of questions|with several questions";
    if (v->must * 50 > v->words) return "in terms of duty and rule|prescriptive";
    if (past) return "impersonal, in the past tense|told in the past tense";
    if (present) return "impersonal, in the present tense|in an impersonal present tense";
    return "impersonal in tone|without a personal voice";
}

static const char *script_of(const Text *t) {
    for (int i = t->n - 1; i >= 0; i--) {
        utf8proc_int32_t c = 0;
        if (!t->piece[i].script) continue;
        utf8proc_iterate((const utf8proc_uint8_t *)t->s + t->piece[i].at, t->piece[i].len, &c);
        if (c >= 0x3040 && c < 0x3100) return "Japanese writing";
        if (c >= 0xAC00 && c < 0xD7B0) return "Korean letters";
        if (c >= 0x370 && c < 0x400) return "Greek letters";
        if (c >= 0x400 && c < 0x530) return "Cyrillic letters";
        if (c >= 0x590 && c < 0x600) return "Hebrew letters";
        if (c >= 0x600 && c < 0x780) return "Arabic letters";
        if (c >= 0x900 && c < 0xE00) return "Indic letters";
        if (c >= 0xE00 && c < 0xE80) return "Thai letters";
        if (c >= 0x2E80 && c < 0xA000) return "Chinese characters";
        return "letters that are not Latin";
    }
    return NULL;
}

/* Another language: its name, or NULL for English. Small words of it must outnumber the English ones. */
static const char *foreign_of(const Text *t) {
    int english = 0, script = 0, count[COUNT(foreign)] = {0};
    for (int i = 0; i < t->n; i++) {
        const Entry *e = &t->piece[i].known;
        script += t->piece[i].script;
        english += piece_in(t, i, "the of and to is that for with this be are by it was");
        for (unsigned left = e->foreign; left; left &= left - 1) count[__builtin_ctz(left)]++;
    }
    if (script * 3 > t->words) return script_of(t);
    for (int l = 0; l < COUNT(foreign); l++) {
        bool most = true;
        for (int k = 0; k < COUNT(foreign); k++) most &= count[l] >= count[k];
        if (most && count[l] > 4 && count[l] * 7 > t->words && count[l] > english * 2) return foreign[l].name;
    }
    return NULL;
}

static void write_subject(Writer *w, const Text *t) {
    int subject[2];
    double score[2];
    find_subjects(t, subject, score);
    Lines lines = count_lines(t);
    Voice voice = hear(t);
    const char *other = foreign_of(t);
    if (other) {
        say(w, "this is mostly in %1, not English|most of it is in %1 rather than English|the text is written in %1", other,
            NULL);
        end_sentence(w, 0, 0);
        return;
    }
    say(w, "this reads like |this is |the text is |we are reading |it looks like |", NULL, NULL);
    say(w, form_of(t, &lines, &voice, language_of(t)), NULL, NULL);
    if (t->examples && lines.term * 14 <= lines.all) say(w, " with lines of code| and code", NULL, NULL);
    if (score[0] > 2.5) {
        bool sure = score[0] > 6 && score[0] > 1.4 * score[1];
        say(w, sure ? " on | about | concerned with " : ", apparently on |, probably about |, it seems on ", NULL, NULL);
        say(w, domains[subject[0]].name, NULL, NULL);
        if (score[1] > 4 && score[1] > 0.6 * score[0]) {
            say(w, ", touching on | and also |, and besides on ", NULL, NULL);
            say(w, domains[subject[1]].name, NULL, NULL);
        }
    }
    if (!t->code) {
        put(w, ", ", 2);
        say(w, register_of(&voice), NULL, NULL);
    }
    end_sentence(w, 0, 0);
}

/* ------------------------------------------------------------------------------------------------ topic */

typedef struct {
    uint64_t hash;
    int piece, count; /* where it stood last, how often it stood */
    double weight;
    bool name; /* a capital inside a sentence, or an identifier */
} Topic;

enum { TOPICS = 1024, SHOWN = 6 };

static bool starts_sentence(const Text *t, int i) {
    return i == 0 || t->piece[i].first || piece_in(t, i - 1, ". ! ? : \" ``") || piece_is(t, i - 1, "\u201c");
}

/* How much a word at this place says of the topic: 0 for small words, less for common ones. */
static double topic_weight(const Text *t, int i) {
    const Piece *p = &t->piece[i];
    unsigned pos = p->known.pos;
    const unsigned small = P_DET | P_POSS | P_PREP | P_SUBJ | P_OBJ | P_PRON | P_BE | P_HAVE | P_DO | P_MODAL | P_COORD |
                           P_SUB | P_WH | P_NOT | P_NUMBER | P_DULL | P_INTJ | P_NAME;
    if (p->kind != WORD || p->len < 3 || p->len > 40 || p->script || (pos & small)) return 0;
    if ((pos & P_ADV) && !(pos & (P_NOUN | P_VERB))) return 0.15;
    double weight = pos & P_COMMON ? 0.35 : pos & (P_NOUN | P_VERB | P_ADJ | P_S | P_PLURAL | P_ED | P_ING) ? 0.8 : 1.2;
    if (!(pos & (P_NOUN | P_PLURAL | P_S)) && (pos & (P_VERB | P_ADJ | P_ED | P_ING | P_PAST | P_PART))) weight *= 0.5;
    if (p->known.domains) weight *= 1.3;
    if (is_capital(t, i) && !starts_sentence(t, i)) weight *= 1.3;
    if (memchr(t->s + p->at, '_', (size_t)p->len) && p->len > 5) weight *= 1.2;
    return weight;
}

/* Words of one base are one topic. */
static uint64_t topic_hash(const Text *t, int i) {
    const Piece *p = &t->piece[i];
    if (p->known.word) return XXH3_64bits(p->known.word, (size_t)p->known.len);
    bool plural = p->len > 3 && t->s[p->at + p->len - 1] == 's' && t->s[p->at + p->len - 2] != 's';
    return plural ? lower_hash(t->s + p->at, p->len - 1, &(Entry){0}) : p->hash;
}

static int gather_topics(const Text *t, Topic *topic) {
    int n = 0, slot[2 * TOPICS];
    memset(slot, -1, sizeof slot);
    for (int i = 0; i < t->last + 1 && n < TOPICS; i++) {
        double weight = topic_weight(t, i);
        bool cut = i == 0 && !t->whole, end = i == t->n - 1 && !t->spaces && !t->piece[i].known.pos;
        if (weight == 0 || cut || end) continue;
        uint64_t hash = topic_hash(t, i);
        size_t at = hash % COUNT(slot);
        while (slot[at] >= 0 && topic[slot[at]].hash != hash) at = (at + 1) % COUNT(slot);
        if (slot[at] < 0) {
            slot[at] = n;
            topic[n++] = (Topic){.hash = hash};
        }
        Topic *is = &topic[slot[at]];
        double recent = 40.0 / (40 + t->last - i);
        is->weight += weight * (is->count < 6 ? 0.35 + recent : recent);
        is->count++;
        is->piece = i;
    }
    return n;
}

static void piece_text(const Text *t, int i, char out[48]) {
    int len = t->piece[i].len < 40 ? t->piece[i].len : 40;
    memcpy(out, t->s + t->piece[i].at, (size_t)len);
    out[len] = 0;
}

/* "a, b and c" of the heaviest topics not taken yet; they are taken. Only those at or after piece `from`. */
static int list_topics(const Text *t, Topic *topic, int n, int from, int most, double least, char *out, size_t room) {
    int shown[SHOWN], count = 0;
    double top = 0;
    while (count < most) {
        int best = -1;
        for (int i = 0; i < n; i++) {
            if (topic[i].piece >= from && topic[i].weight > (best < 0 ? 0 : topic[best].weight)) best = i;
        }
        if (best < 0 || topic[best].weight < (count < 3 ? 0.4 * least : least) * top) break;
        if (topic[best].weight > top) top = topic[best].weight;
        shown[count++] = topic[best].piece;
        topic[best].weight = 0;
    }
    *out = 0;
    for (int i = 0; i < count; i++) {
        char word[48];
        piece_text(t, shown[i], word);
        if (i) append(out, room, i == count - 1 ? " and " : ", ");
        append(out, room, word);
    }
    return count;
}

static void write_topics(Writer *w, const Text *t) {
    Topic topic[TOPICS];
    char list[320];
    int n = gather_topics(t, topic);
    int shown = list_topics(t, topic, n, 0, SHOWN, 0.3, list, sizeof list);
    if (shown == 0) return;
    if (shown == 1) {
        say(w, "the word that stands out is %1|its one salient word is %1", list, NULL);
    } else {
        say(w, "its salient words are %1|the running topic is %1|it turns on %1|the words that stand out are %1|it keeps to %1|"
               "it revolves around %1|the matter in hand is %1", list, NULL);
    }
    end_sentence(w, 0, 1);
    if (list_topics(t, topic, n, t->last > 25 ? t->last - 25 : 0, 3, 0.45, list, sizeof list) < 1) return;
    say(w, "lately also %1|most recently it names %1|the latest to come up: %1|in the last lines, also %1", list, NULL);
    end_sentence(w, 0, 5);
}

/* ------------------------------------------------------------------------------------------------ what is open */

typedef struct {
    int bracket[24], n; /* pieces that open brackets not closed */
    int quote;          /* the piece that opens a quotation, or -1 */
    int tick;           /* the backtick that opens a name, or -1 */
} Open;

static void open_bracket(Open *o, const Text *t, int i) {
    static const char *const pairs[] = {"()", "[]", "{}"};
    for (int k = 0; k < 3; k++) {
        if (t->s[t->piece[i].at] == pairs[k][0] && o->n < COUNT(o->bracket)) o->bracket[o->n++] = i;
        if (t->s[t->piece[i].at] != pairs[k][1]) continue;
        for (int b = o->n - 1; b >= 0; b--) {
            if (t->s[t->piece[o->bracket[b]].at] != pairs[k][0]) continue;
            o->n = b;
            break;
        }
    }
}

/* Quotation marks do not run past a paragraph, nor in code past a line (but for triple ones); brackets in a string of code do not
 * count. A mark before white space cannot open, so a mark in inches does no harm. */
static Open find_open(const Text *t) {
    Open o = {.quote = -1, .tick = -1};
    for (int i = 0; i <= t->last; i++) {
        const Piece *p = &t->piece[i];
        bool last = i + 1 >= t->n, closing = !last && (t->piece[i + 1].spaced || t->piece[i + 1].kind == BREAK);
        if (p->kind == BREAK) {
            bool triple = o.quote >= 0 && piece_is(t, o.quote, "\"\"\"");
            if (p->lines > 1 && !t->code) o.n = 0;
            if ((p->lines > 1 || t->code) && !triple) o.quote = -1;
            if (p->lines > 1) o.tick = -1;
        }
        if (p->kind != MARK) continue;
        bool mark = piece_is(t, i, "\"") || piece_is(t, i, "\"\"\"");
        if (mark && o.quote >= 0) {
            if (t->piece[o.quote].len == p->len) o.quote = -1;
        } else if (piece_is(t, i, "\u201c") ||
                   (mark &&
                    (t->code || p->len == 3 || (!closing && (p->spaced || p->first || piece_in(t, i - 1, "( [ { --")))))) {
            o.quote = i;
        } else if (piece_is(t, i, "\u201d")) {
            o.quote = -1;
        } else if (piece_in(t, i, "` ``")) {
            o.tick = o.tick >= 0 ? -1 : i;
        }
        if (p->len == 1 && !(t->code && o.quote >= 0)) open_bracket(&o, t, i);
    }
    return o;
}

/* The piece before piece i that is no BREAK, or -1. */
static int previous(const Text *t, int i) {
    do i--;
    while (i >= 0 && t->piece[i].kind == BREAK);
    return i;
}

static int line_start(const Text *t, int i) {
    while (i > 0 && !t->piece[i].first) i--;
    return i;
}

/* Each of these writes a sentence about one construction and returns true, or writes nothing and returns false. */

static bool write_bracket(Writer *w, const Text *t, const Open *o) {
    if (!o->n || o->bracket[o->n - 1] == t->last) return false;
    char from[QUOTE_ROOM], depth[32] = "";
    int b = o->bracket[o->n - 1];
    bool brace = piece_is(t, b, "{"), round = piece_is(t, b, "(");
    int head = b > 0 && t->piece[b].first ? previous(t, b) : b; /* the brace may stand on a line of its own */
    if (brace && t->code && head >= 0) {
        quote_pieces(t, line_start(t, head), head, 9, from);
        if (o->n > 1) snprintf(depth, sizeof depth, ", %d deep", o->n);
        say(w,
            "the block that %1 opened is still open%2|it is inside the braces after %1, not closed%2|it is in the block of %1%2",
            from, depth);
        return true;
    }
    bool joined = b > 0 && !t->piece[b].spaced && !t->piece[b].first && t->piece[b - 1].kind == WORD;
    quote_pieces(t, joined ? b - 1 : b, t->last, 4, from);
    if (t->in_code && round && joined) {
        say(w, "the call or list of arguments %1 is not closed|it is inside the parenthesis of %1, still open", from, NULL);
    } else {
        say(w, "the %2 opened at %1 is not closed yet|a %2 is still open, from %1 on|it is inside a %2 that began %1", from,
            round ? "parenthesis" : brace ? "brace" : "square bracket");
    }
    return true;
}

static bool write_quotation(Writer *w, const Text *t, const Open *o) {
    char from[QUOTE_ROOM];
    if (o->quote >= 0 && o->quote < t->last) {
        quote_pieces(t, t->piece[o->quote + 1].kind == BREAK ? o->quote : o->quote + 1, t->last, 5, from);
        bool triple = piece_is(t, o->quote, "\"\"\"");
        say(w,
            triple    ? "a triple-quoted string or docstring that began with %1 is open|it is inside a docstring opened with %1"
            : t->code ? "a string literal that began with %1 is open|it is inside a string opened with %1"
                      : "a quotation that began with %1 is still open|it is inside quotation marks, opened at %1|the quoted "
                        "speech or title from %1 is not closed",
            from, NULL);
        return true;
    }
    if (o->tick < 0 || o->tick >= t->last || t->last - o->tick > 12) return false;
    quote_pieces(t, o->tick + 1, t->last, 4, from);
    say(w, "a name in backticks, begun %1, is not closed|it is inside backticks, from %1", from, NULL);
    return true;
}

static bool write_correlative(Writer *w, const Text *t) {
    static const char *const pair[][2] = {{"both", "and"},    {"either", "or"},  {"neither", "nor"},
                                          {"between", "and"}, {"whether", "or"}, {"only", "but"}};
    for (int i = t->last - 1; i >= t->sentence && i > t->last - 18; i--) {
        for (int k = 0; k < COUNT(pair); k++) {
            if (!piece_in(t, i, pair[k][0]) || t->piece[i + 1].kind != WORD ||
                piece_in(t, i + 1, "of them these those each is are was were"))
                continue;
            if (k == 5 && !piece_in(t, i - 1, "not")) continue;
            bool done = false;
            for (int j = i + 1; j <= t->last; j++) done |= piece_in(t, j, pair[k][1]) || (k != 4 && piece_in(t, j, "; :"));
            if (done) continue;
            char from[QUOTE_ROOM], word[48];
            quote_pieces(t, k == 5 ? i - 1 : i, t->last, 4, from);
            snprintf(word, sizeof word, "%s", pair[k][1]);
            say(w, k == 4 ? "the alternative opened by %1 may still get its %2|after %1 an %2 may come"
                          : "the pair opened by %1 still lacks its %2|%1 calls for %2, which has not come", from, word);
            return true;
        }
    }
    return false;
}

/* "If ..." at the head of the sentence, or after its list mark. */
static bool write_subordinate(Writer *w, const Text *t) {
    int from = t->sentence + (is_list_mark(t, t->sentence) ? 1 + (t->piece[t->sentence].kind == NUMBER) : 0), comma = -1;
    if (from >= t->last || !(pos_of(t, from) & P_SUB) || piece_in(t, from, "that so whereas yet where than") ||
        is_sentence_end(t, t->last))
        return false;
    for (int i = from, depth = 0; i <= t->last; i++) {
        depth += piece_in(t, i, "( [") - piece_in(t, i, ") ]");
        if ((piece_is(t, i, ",") && depth <= 0) || piece_in(t, i, "then")) comma = i;
        if (comma == i && i - from > 2) break;
    }
    char head[QUOTE_ROOM];
    quote_pieces(t, from, comma > from ? comma - 1 : t->last, 5, head);
    bool condition = piece_in(t, from, "if unless");
    if (comma < 0) {
        say(w,
            condition ? "the sentence opened with a condition, %1, and its consequence is still to come|the condition begun with "
                        "%1 still waits for its consequence"
                      : "the sentence opened with %1, and its main clause is still to come|the opening %1 still waits for the "
                        "main clause",
            head, NULL);
    } else if (t->last - comma < 10) {
        say(w,
            comma == t->last
                ? "the opening %1 has just ended and the main clause begins|after the opening %1 the main clause is due"
                : "after the opening %1 the main clause is under way|the main clause, after %1, has just begun",
            head, NULL);
    }
    return comma < 0 || t->last - comma < 10;
}

static bool write_relative(Writer *w, const Text *t) {
    for (int i = t->last - 1; i > t->sentence && i > t->last - 8; i--) {
        if (!(pos_of(t, i) & P_WH) && !piece_in(t, i, "that")) continue;
        bool after_noun = (pos_of(t, i - 1) & (P_NOUN | P_PLURAL | P_S)) || piece_is(t, i - 1, ",");
        if (!after_noun || has_verb(t, i + 1, t->last) != 0) return false;
        char from[QUOTE_ROOM];
        quote_pieces(t, i, t->last, 5, from);
        say(w, "the clause begun with %1 seems to have no verb yet|a clause, %1, still waits for its verb, it seems", from, NULL);
        return true;
    }
    return false;
}

static bool write_series(Writer *w, const Text *t) {
    int commas = 0, last = -1, first = -1, i;
    for (i = t->last; i >= t->sentence; i--) {
        if (piece_is(t, i, "\"")) break;
        if (!piece_is(t, i, ",")) continue;
        if ((last < 0 ? t->last - i : first - i) > 5) break;
        if (last < 0) last = i;
        first = i;
        commas++;
    }
    if (commas < 2) return false;
    bool closing = false;
    for (int j = last; j < t->last; j++) closing |= piece_in(t, j + 1, "and or");
    char from[QUOTE_ROOM];
    int at = first > t->sentence ? first - 1 : first;
    quote_pieces(t, at, t->last, 7, from);
    say(w, closing ? "a series separated by commas, %1, comes to its last item|the enumeration %1 is at its end"
                   : "a series separated by commas is running, %1|an enumeration is under way: %1", from, NULL);
    return true;
}

static bool write_item(Writer *w, const Text *t) {
    int at = line_start(t, t->last);
    bool here = is_list_mark(t, at), above = !here && is_list_mark(t, t->sentence);
    for (int i = t->sentence; i < t->last; i++) above = above && !piece_is(t, i, "*/");
    if (t->code || (!here && !above)) return false;
    char from[QUOTE_ROOM];
    quote_pieces(t, here ? at : t->sentence, t->last, 4, from);
    say(w, "this is a list item that began %1|it stands in a list item, %1|the item of the list is %1", from, NULL);
    return true;
}

static bool write_heading(Writer *w, const Text *t) {
    int at = line_start(t, t->last), blank = at > 0 && t->piece[at - 1].kind == BREAK && t->piece[at - 1].lines > 1;
    int end = t->n - 1, words = words_between(t, at, t->last);
    bool rule = piece_in(t, t->last, "--- ---- ----- ====== ==== === ~~~~ ....") ||
                (t->piece[t->last].len > 3 && t->piece[t->last].kind == MARK);
    if (t->in_code || rule || words > 8 || (at > 0 && !blank) || !is_capital(t, at) || t->piece[at].kind != WORD) return false;
    if (t->piece[end].kind != BREAK || t->piece[end].lines < 2 || piece_in(t, t->last, ". , ; : ! ?")) return false;
    char line[QUOTE_ROOM];
    quote_pieces(t, at, t->last, 8, line);
    say(w, "the line %1 stands alone, like a heading|%1 looks like a heading, with its text to come", line, NULL);
    return true;
}

static bool write_comment(Writer *w, const Text *t) {
    if (!t->comment && !(t->in_code && !t->code)) return false;
    say(w,
        t->comment ? "it is inside a comment of the code|this is a comment in the code"
                   : "the last line looks like code|the end stands in a line that looks like code",
        NULL, NULL);
    return true;
}

/* In code: the header of the indented block, as Python writes it. */
static bool write_block(Writer *w, const Text *t) {
    int at = line_start(t, t->last);
    if (!t->in_code || at == 0 || t->piece[at - 1].kind != BREAK) return false;
    int indent = t->n && t->piece[t->n - 1].kind == BREAK ? t->piece[t->n - 1].indent : t->piece[at - 1].indent;
    for (int i = at - 1; i > 0 && indent > 0; i--) {
        if (!t->piece[i].first || t->piece[i - 1].kind != BREAK || t->piece[i - 1].indent >= indent) continue;
        int end = i;
        while (end + 1 < t->n && t->piece[end + 1].kind != BREAK) end++;
        if (!piece_is(t, end, ":")) return false;
        char from[QUOTE_ROOM];
        quote_pieces(t, i, end, 8, from);
        say(w, "the line belongs to the block under %1|it is in the body of %1|the enclosing block is %1", from, NULL);
        return true;
    }
    return false;
}

/* How far the sentence has come; always something. */
static void write_stage(Writer *w, const Text *t) {
    char head[QUOTE_ROOM], count[16];
    int from = t->sentence, words = words_between(t, from, t->last);
    bool ended =
        is_sentence_end(t, t->last) || (t->last > 0 && piece_in(t, t->last, "\" ) \u201d") && is_sentence_end(t, t->last - 1));
    snprintf(count, sizeof count, "%d", words);
    quote_pieces(t, from, t->last, 4, head);
    bool far = t->piece[from].at < w->quoted_from && words > 4;
    if (t->in_code && t->last < t->n - 1) {
        say(w, "the line has ended|the last line of code is complete", NULL, NULL);
    } else if (t->in_code) {
        say(w,
            far         ? "the line, begun %1, goes on|the current line began %1"
            : words < 2 ? "the line has only begun|the line is at its first part"
                        : "the line has %2 parts so far|there are %2 parts on the line so far",
            head, count);
    } else if (ended && t->spaces + (t->n - 1 > t->last) >= 0) {
        say(w,
            far ? "a sentence of %2 words, begun %1, has just ended|the sentence that began %1 is complete, after %2 words"
            : words == 1 ? "a sentence of one word has just ended"
                         : "a sentence of %2 words has just ended|a sentence, %2 words long, is complete",
            head, count);
    } else if (words < 4) {
        say(w,
            words < 2 ? "a new sentence or line has just begun|the sentence is at its first word"
                      : "the sentence or line is only %2 words old|it has just begun, %2 words so far",
            head, count);
    } else {
        int verb = has_verb(t, from, t->last);
        say(w,
            far ? "the sentence began %1, %2 words back|%2 words back the sentence opened with %1"
                : "the sentence is %2 words long so far|the sentence has %2 words so far",
            head, count);
        say(w,
            verb == 1   ? "; its verb has come|, its verb included"
            : verb == 0 ? "; no verb has come yet|, without a verb so far"
                        : "",
            NULL, NULL);
    }
}

/* ------------------------------------------------------------------------------------------------ the last words */

/* The piece where the `most` words that end with piece `end` begin; fewer when they are long, or when a clause begins
 * between and two thirds of them are had. */
static int words_back(const Text *t, int end, int most) {
    int words = 0, clause = -1, start = end;
    for (int i = end; i >= 0; i--) {
        const Piece *p = &t->piece[i];
        bool apart = i == 0 || p->spaced || p->first || p->script;
        if (p->kind == BREAK || !apart) continue;
        words += i == 0 || p->spaced || p->first;
        if (words > most || piece_end(t, end) - p->at > QUOTE_BYTES - 2) break;
        start = i;
        bool fresh = i == 0 || opens_sentence(t, i) || (piece_in(t, i - 1, ", ; :") && p->spaced);
        if (3 * words >= 2 * most && fresh && p->kind == WORD) clause = i;
    }
    return clause >= 0 ? clause : start;
}

static void write_open(Writer *w, const Text *t) {
    char last[QUOTE_ROOM];
    int from = words_back(t, t->last, w->quote_words);
    Open o = find_open(t);
    w->quoted_from = t->piece[from].at;
    quote(t, t->piece[from].at, piece_end(t, t->last), true, last);
    say(w, "the last words are %1|it has just said %1|it breaks off after %1|the end reads %1|the text runs up to %1", last,
        NULL);
    end_sentence(w, 1, 0);
    int end = previous(t, from);
    if (end >= 0) {
        char before[QUOTE_ROOM];
        int start = words_back(t, end, BEFORE_WORDS);
        quote(t, t->piece[start].at, piece_end(t, end), true, before);
        say(w, "before that stood %1|before it came %1|just before: %1|what led up to it: %1", before, NULL);
        end_sentence(w, 1, 3);
        w->quoted_from = t->piece[start].at;
    }
    int written = 0;
    for (int k = 0; k < 10 && written < 2; k++) {
        bool is = k == 0   ? write_quotation(w, t, &o)
                  : k == 1 ? write_bracket(w, t, &o)
                  : k == 2 ? !t->in_code && write_correlative(w, t)
                  : k == 3 ? !t->in_code && write_subordinate(w, t)
                  : k == 4 ? !t->in_code && write_series(w, t)
                  : k == 5 ? !t->in_code && write_relative(w, t)
                  : k == 6 ? write_heading(w, t)
                  : k == 7 ? write_item(w, t)
                  : k == 8 ? write_block(w, t)
                           : write_comment(w, t);
        if (is) end_sentence(w, 1, written++ ? 4 : 2);
    }
    write_stage(w, t);
    end_sentence(w, 1, written ? 6 : 2);
}

/* ------------------------------------------------------------------------------------------------ the last token */

typedef enum {
    R_DEFINITE,
    R_INDEFINITE,
    R_DEMONSTRATIVE,
    R_POSSESSIVE,
    R_HER,
    R_DETERMINER,
    R_PREPOSITION,
    R_OF,
    R_PARTICLE,
    R_TO,
    R_COORDINATOR,
    R_SUBORDINATOR,
    R_PREP_OR_CONJ,
    R_RELATIVE,
    R_THAT,
    R_SUBJECT,
    R_OBJECT,
    R_PRONOUN,
    R_BE,
    R_HAVE,
    R_DO,
    R_MODAL,
    R_NOT,
    R_NUMERAL,
    R_ADVERB,
    R_ADJECTIVE,
    R_ADJ_OR_NOUN,
    R_VERB,
    R_TAKES,
    R_IMPERATIVE,
    R_VERB_S,
    R_PAST,
    R_PARTICIPLE,
    R_ED,
    R_ING,
    R_NOUN,
    R_PLURAL,
    R_NOUN_OR_VERB,
    R_DATE,
    R_NAME,
    R_ACRONYM,
    R_INTERJECTION,
    R_KEYWORD,
    R_IDENTIFIER,
    R_PART_OF_NAME,
    R_ADDRESS,
    R_RARE,
    R_LETTERS,
    R_SCRIPT,
    R_NUMBER,
    R_CONSTANT,
} Role;

static const struct {
    const char *name, *next;
} roles[] = {
    [R_DEFINITE] = {"the definite article",
                    "a noun is due, or an adjective before it|its noun, perhaps after an adjective, comes next"},
    [R_INDEFINITE] = {"the indefinite article",
                      "a singular noun or its adjective is due|a new singular noun comes next, perhaps described first"},
    [R_DEMONSTRATIVE] = {"a demonstrative", "either its noun or a verb follows|the noun it points to, or a verb, comes next"},
    [R_POSSESSIVE] = {"a possessive", "the thing owned should follow, as a noun|a noun, perhaps described, is due"},
    [R_HER] = {"a pronoun, object or possessive", "a noun follows if it is possessive, else the clause goes on"},
    [R_DETERMINER] = {"a determiner or quantifier", "the noun it counts, or of, may follow|a noun, or of, is likely next"},
    [R_PREPOSITION] = {"a preposition", "its object is due, a noun phrase|a noun phrase should follow as its object"},
    [R_OF] = {"the preposition of possession or kind",
              "a noun phrase is due|what it belongs to should come next, as a noun phrase"},
    [R_PARTICLE] = {"a particle or preposition", "a noun phrase may follow, or the clause may end here"},
    [R_TO] = {"before an infinitive or as a preposition",
              "a bare verb or a noun phrase is due|either a verb in base form or a goal comes next"},
    [R_COORDINATOR] =
        {"a coordinator",
         "a second part like the one before it is due|something of the same kind as what stood before should follow"},
    [R_SUBORDINATOR] = {"a conjunction that opens a clause",
                        "the subject of that clause is due|a subject, then its verb, should follow"},
    [R_PREP_OR_CONJ] = {"a preposition or conjunction", "a noun phrase or a whole clause may follow"},
    [R_RELATIVE] = {"a relative or question word",
                    "a verb or a subject should follow|its clause comes next, with a verb or a subject first"},
    [R_THAT] = {"a conjunction, relative or pointer", "a clause, a verb or a noun may follow"},
    [R_SUBJECT] = {"a pronoun as subject",
                   "its verb is due, perhaps after an adverb|a verb, perhaps an auxiliary, should follow"},
    [R_OBJECT] = {"a pronoun as object", "the clause may end here or go on with a preposition"},
    [R_PRONOUN] = {"a pronoun", "a verb follows if it is a subject, else the clause goes on"},
    [R_BE] = {"a form of to be", "a complement is due: a participle, an adjective, a noun phrase or not"},
    [R_HAVE] = {"a form of to have", "a past participle or an object is due"},
    [R_DO] = {"a form of to do", "not, a subject or a bare verb may follow"},
    [R_MODAL] = {"a modal verb", "a bare verb is due, perhaps after not or an adverb|be or another base form should follow"},
    [R_NOT] = {"a negation", "what is denied should follow: a verb, participle, adjective or phrase"},
    [R_NUMERAL] = {"a number word", "the thing counted may follow, as a noun"},
    [R_ADVERB] = {"an adverb", "a verb, an adjective or the rest of the clause may follow"},
    [R_ADJECTIVE] = {"an adjective",
                     "a noun is likely next, or the clause ends|its noun may follow, unless it closes the clause"},
    [R_ADJ_OR_NOUN] = {"an adjective or noun inside a noun phrase", "the head noun may still come, or the phrase is complete"},
    [R_VERB] = {"a verb in base form", "its object, a preposition or the end of the clause may follow"},
    [R_TAKES] = {"a verb in base form that takes an object", "an object is due, with an article or without"},
    [R_IMPERATIVE] = {"perhaps a command at the head of its clause",
                      "an object would follow a command, a verb would follow a noun"},
    [R_VERB_S] = {"a verb in the third person, or a plural", "an object, a complement or a preposition may follow"},
    [R_PAST] = {"a verb in the past tense", "its object, a clause or a preposition may follow"},
    [R_PARTICIPLE] = {"a past participle", "a preposition such as by, in or to may follow, or an object"},
    [R_ED] = {"a past tense or participle", "an object, a preposition or the end of the clause may follow"},
    [R_ING] = {"a form in -ing", "its object or a preposition may follow, or a noun that it describes"},
    [R_NOUN] =
        {"a noun",
         "a verb, a preposition, a further noun or a mark may follow|the phrase may end here, with a verb, of or a mark next"},
    [R_PLURAL] = {"a plural noun", "a verb, a preposition, a relative clause or a mark may follow"},
    [R_NOUN_OR_VERB] = {"a word that can be noun or verb",
                        "as a noun it may be followed by a verb or mark, as a verb by an object"},
    [R_DATE] = {"a month or day", "a number or a year may follow"},
    [R_NAME] = {"a capitalised name or term", "more of the name, a verb, a comma or a preposition may follow"},
    [R_ACRONYM] = {"a word in capitals", "a noun, a verb, a bracket or a mark may follow"},
    [R_INTERJECTION] = {"an interjection", "a comma or an exclamation mark may follow, then the sentence"},
    [R_KEYWORD] = {"a keyword of the language", "what its grammar asks for comes next: a name, an expression or a bracket"},
    [R_IDENTIFIER] = {"an identifier", "an operator, a bracket, a point or a separator may follow|a bracket, an operator, a "
                                       "comma or the line end may come next"},
    [R_PART_OF_NAME] = {"an identifier up to an underscore", "the rest of the name is likely|more of the name may follow"},
    [R_ADDRESS] = {"a part of an address", "more of the address or its end may follow|the address may go on, or end here"},
    [R_RARE] = {"a less common word, or the first part of one",
                "the rest of the word may follow, else a verb, a preposition or a mark"},
    [R_LETTERS] = {"a letter or two, maybe the start of a word",
                   "the rest of the word is likely|more letters of the word may follow"},
    [R_SCRIPT] = {"a letter or word in another script", "more of the same script is likely"},
    [R_CONSTANT] = {"a number in the code", "an operator, a bracket, a separator or more digits may follow"},
    [R_NUMBER] = {"a number", "a unit, a noun, more digits or a mark may follow"},
};

static const char keywords[] =
    "if else elif for while do return class def import from as with try except finally raise lambda yield in not and or is pass "
    "break continue "
    "global assert del struct enum union static const void int char unsigned long double float extern inline typedef sizeof "
    "switch case "
    "default goto my our sub use package foreach unless elsif fi then done esac function local echo export select where order "
    "group "
    "create table insert into values update set delete join on null true false none print include define endif ifdef ifndef";

/* The role of a word that only its neighbour decides: noun, verb, adjective, participle. */
static Role content_role(const Text *t, int i) {
    unsigned pos = pos_of(t, i), before = i > t->sentence ? pos_of(t, i - 1) : 0;
    bool noun = pos & (P_NOUN | P_PLURAL | P_S), verb = pos & P_VERB, adjective = pos & P_ADJ;
    bool article = piece_in(t, i - 1, "the a an"), to = piece_in(t, i - 1, "to");
    bool nominal = article || ((before & (P_DET | P_POSS | P_NUMBER | P_PREP)) && !to && !(before & P_SUB)) ||
                   ((before & P_ADJ) && !(before & (P_VERB | P_ADV)));
    if (pos & P_NAME) return R_DATE;
    if (verb && (to || (before & (P_MODAL | P_SUBJ | P_DO | P_NOT)))) return pos & P_TAKES ? R_TAKES : R_VERB;
    if ((pos & (P_ED | P_PART)) && (before & (P_BE | P_HAVE))) return R_PARTICIPLE;
    if (pos & P_ING) return R_ING;
    if (nominal && (noun || adjective)) {
        return noun && adjective                           ? R_ADJ_OR_NOUN
               : adjective                                 ? R_ADJECTIVE
               : pos & (P_PLURAL | P_S) && !(pos & P_NOUN) ? R_PLURAL
                                                           : R_NOUN;
    }
    if (pos & P_ED) return R_ED;
    if (pos & P_PAST) return R_PAST;
    if ((pos & P_PART) && !noun && !verb && !adjective) return R_PARTICIPLE;
    if (adjective) return noun ? R_ADJ_OR_NOUN : R_ADJECTIVE;
    if (verb && (i == t->sentence || t->piece[i].first) && is_capital(t, i)) return R_IMPERATIVE;
    if (verb) return noun ? R_NOUN_OR_VERB : pos & P_TAKES ? R_TAKES : R_VERB;
    if (pos & P_NOUN) return R_NOUN;
    if (pos & P_PLURAL) return R_PLURAL;
    if (pos & P_S) return R_VERB_S;
    if (pos & P_ADV) return R_ADVERB;
    return R_RARE;
}

static Role unknown_role(const Text *t, int i) {
    const Piece *p = &t->piece[i];
    const char *s = t->s + p->at;
    int upper = 0, other = 0;
    for (int k = 0; k < p->len; k++)
        upper += is_upper(s[k]), other += is_digit(s[k]) || s[k] == '_' || (k && is_upper(s[k]) && is_lower(s[k - 1]));
    if (upper > 1 && upper == p->len) return R_ACRONYM;
    if (other) return R_IDENTIFIER;
    if (p->len < 3 && i == t->n - 1 && !t->spaces) return R_LETTERS;
    return is_upper(s[0]) ? R_NAME : R_RARE;
}

/* Everything written together with the piece, back to white space. */
static int chunk_start(const Text *t, int i) {
    while (i > 0 && !t->piece[i].spaced && !t->piece[i].first) i--;
    return i;
}

static bool in_address(const Text *t, int i) {
    int from = t->piece[chunk_start(t, i)].at;
    return line_has(t->s + from, piece_end(t, i) - from, "://|www.");
}

static Role word_role(const Text *t, int i, bool in_string) {
    static const struct {
        const char *words;
        Role role;
    } fixed[] = {
        {"the", R_DEFINITE},
        {"a an", R_INDEFINITE},
        {"this these those", R_DEMONSTRATIVE},
        {"that", R_THAT},
        {"to", R_TO},
        {"of", R_OF},
        {"not never", R_NOT},
        {"her", R_HER},
        {"up out off down over on about", R_PARTICLE},
        {"as since until till before after than like once", R_PREP_OR_CONJ},
        {"can may will might must", R_MODAL},
        {"so yet", R_ADVERB},
    };
    static const struct {
        unsigned pos;
        Role role;
    } classes[] = {
        {P_BE, R_BE},
        {P_HAVE, R_HAVE},
        {P_DO, R_DO},
        {P_MODAL, R_MODAL},
        {P_COORD, R_COORDINATOR},
        {P_WH, R_RELATIVE},
        {P_SUBJ, R_SUBJECT},
        {P_POSS, R_POSSESSIVE},
        {P_OBJ, R_OBJECT},
        {P_NUMBER, R_NUMERAL},
        {P_DET, R_DETERMINER},
        {P_PRON, R_PRONOUN},
        {P_SUB, R_SUBORDINATOR},
        {P_PREP, R_PREPOSITION},
        {P_INTJ, R_INTERJECTION},
    };
    const Piece *p = &t->piece[i];
    if (p->script) return R_SCRIPT;
    if (in_address(t, i)) return R_ADDRESS;
    if (p->kind == NUMBER) return t->in_code && !in_string ? R_CONSTANT : R_NUMBER;
    if (t->s[piece_end(t, i) - 1] == '_' && i == t->n - 1 && !t->spaces) return R_PART_OF_NAME;
    if (t->in_code && !in_string) {
        bool part = !p->spaced && !p->first;
        return !part && piece_in(t, i, keywords) ? R_KEYWORD : R_IDENTIFIER;
    }
    if (memchr(t->s + p->at, '_', (size_t)p->len)) return R_IDENTIFIER;
    for (int k = 0; k < COUNT(fixed); k++) {
        if (piece_in(t, i, fixed[k].words)) return fixed[k].role;
    }
    bool content = p->known.pos & (P_NOUN | P_VERB | P_ADJ);
    for (int k = 0; k < COUNT(classes); k++) {
        bool closed = !content || (classes[k].pos & (P_BE | P_HAVE | P_DO | P_MODAL | P_POSS | P_DET | P_NUMBER));
        if ((p->known.pos & classes[k].pos) && closed) return classes[k].role;
    }
    if (!(p->known.pos & ~(unsigned)(P_DULL | P_COMMON | P_CODE)) || (p->known.pos & P_CODE && !content))
        return unknown_role(t, i);
    return content_role(t, i);
}

static const struct {
    const char *mark, *name, *next, *in_code; /* in_code NULL: as next */
} marks[] = {
    {".", "a full stop", "a new sentence may begin|the next sentence, with a capital, may follow",
     "the member that it selects, or digits, may follow"},
    {",", "a comma", "the next item or the rest of the clause should follow", "the next argument or element is due"},
    {";", "a semicolon", "a further clause or item should follow", "the statement is complete and a new one may begin"},
    {":", "a colon", "an explanation, a list, an example or a value should follow",
     "a value, a type or an indented block should follow"},
    {"::", "a double colon", "an indented example or a qualified name may follow", "the qualified name should follow"},
    {"?", "a question mark", "an answer or the next sentence may follow", "the value if true should follow"},
    {"!", "an exclamation mark", "a new sentence or a closing quotation mark may follow", "what is negated should follow"},
    {"...", "an ellipsis", "the thought may be taken up again, or a new sentence begins", NULL},
    {"\u2026", "an ellipsis", "the thought may be taken up again, or a new sentence begins", NULL},
    {"(", "an opening parenthesis", "an aside, an example or a reference should follow, then its closing",
     "the arguments or an expression should follow, or the closing at once"},
    {")", "a closing parenthesis", "the sentence goes on after the aside, or a mark ends it",
     "a semicolon, colon, brace or operator may follow"},
    {"[", "an opening square bracket", "a note, a label or an option should follow",
     "an index or the elements of a list should follow"},
    {"]", "a closing square bracket", "the text goes on after the note or option",
     "an operator, a separator or a further bracket may follow"},
    {"{", "an opening brace", "a name or a reference may follow", "the body or the fields should follow, on a new line perhaps"},
    {"}", "a closing brace", "the text goes on, or a mark follows",
     "a new statement, else or a further closing brace may follow"},
    {"<", "an opening angle bracket or less-than sign", "a name, a tag or an address may follow",
     "an operand, a type or a tag may follow"},
    {">", "a closing angle bracket or greater-than sign", "the text after it may follow",
     "an operand or the content after a tag may follow"},
    {"-", "a hyphen or dash", "the second part of a compound, an option or an aside may follow",
     "an operand or an option should follow"},
    {"--", "a double hyphen", "a long option, an aside or a name may follow", NULL},
    {"\u2014", "a dash", "an aside or an afterthought should follow", NULL},
    {"\u2013", "a dash", "the end of a range or an aside should follow", NULL},
    {"->", "an arrow", "what it points to should follow", "the member's name should follow"},
    {"=>", "a double arrow", "what it leads to should follow", "the value for the key should follow"},
    {"=", "an equals sign", "a value should follow", "the value or expression should follow"},
    {"==", "a sign of equality", "the second operand should follow", NULL},
    {"/", "a slash", "the next part of a path or an alternative should follow", NULL},
    {"\\", "a backslash", "an escaped character or a name should follow", NULL},
    {"*", "an asterisk", "emphasised words, a list item or an operand may follow",
     "an operand, or the name of a pointer, may follow"},
    {"**", "a double asterisk", "words in bold, or their end, come next", "an exponent or a parameter's name may follow"},
    {"#", "a number sign", "a comment, a heading or a number may follow", NULL},
    {"$", "a dollar sign", "an amount or a variable's name should follow", "a variable's name should follow"},
    {"@", "an at sign", "the rest of an address or a name should follow", NULL},
    {"%", "a percent sign", "the text goes on after the amount, or a name follows",
     "a format letter or an operand should follow"},
    {"&", "an ampersand", "a second name or an entity may follow",
     "the name whose address is taken, or an operand, should follow"},
    {"|", "a vertical bar", "an alternative or the next column should follow", "the next command or operand should follow"},
    {"_", "an underscore", "more of a name should follow", NULL},
    {"`", "a backtick", "a name in code style, or what comes after it, is next", NULL},
    {"``", "a double backtick", "a literal name, or what comes after it, is next", NULL},
    {"'", "a single quotation mark or apostrophe",
     "a quoted word, the ending of a contraction, or what comes after a quotation, is next", NULL},
    {"\"\"\"", "a triple quotation mark", "a docstring or the code after it comes next", NULL},
    {"\u201c", "an opening quotation mark", "the quoted words should follow", NULL},
    {"\u201d", "a closing quotation mark", "the sentence goes on, or who said it is told", NULL},
    {"\u2019", "an apostrophe or closing quotation mark", "the ending of a contraction or the rest of the sentence may follow",
     NULL},
    {"\u2022", "a bullet", "the text of a list item should follow", NULL},
    {"\"\"", "an empty pair of quotation marks", "a separator or a bracket may follow", NULL},
    {"+", "a plus sign", "an operand should follow", NULL},
    {"~", "a tilde", "a name or a number may follow", NULL},
    {"^", "a caret", "an exponent, a name or a mark of place may follow", NULL},
    {"*/", "the end of a comment", "code comes next", NULL},
    {"/*", "the start of a comment", "a note in words should follow", NULL},
    {"\xEF\xBF\xBD", "a broken or unknown character", "nothing sure can be said of what follows", NULL},
};

static void mark_role(const Text *t, int i, bool in_string, const char **name, const char **next) {
    bool code = t->in_code && !in_string;
    *name = (unsigned char)t->s[t->piece[i].at] < 128 && t->piece[i].len > 1 ? "a run of marks" : "a symbol";
    *next = code ? "an operand or the rest of the expression may follow" : "the next word or line may follow";
    for (int k = 0; k < COUNT(marks); k++) {
        if (!piece_is(t, i, marks[k].mark)) continue;
        *name = marks[k].name;
        *next = code && marks[k].in_code ? marks[k].in_code : marks[k].next;
    }
    if (piece_is(t, i, ".") && !code) {
        bool end = is_sentence_end(t, i);
        *name = end ? "the full stop that ends a sentence" : "a full stop, perhaps of an abbreviation, initial or number";
        if (!end) *next = "the sentence may go on, or a new one begins";
    }
    if (piece_is(t, i, "\"")) {
        *name = in_string ? "an opening quotation mark" : "a closing quotation mark";
        *next = in_string ? "the quoted words should follow"
                : code    ? "a separator, a bracket or an operator may follow"
                          : "the sentence goes on, or a mark or a name follows";
    }
    const Piece *p = &t->piece[i];
    if (p->kind == MARK && p->len > 3 && p->at + p->len <= t->len && strchr("=-~*#_.^+", t->s[p->at])) {
        *name = "a row of marks, like a rule or an underline";
        *next = "the line ends, or the text under the rule begins";
    }
}

static void write_break(Writer *w, const Text *t) {
    const Piece *p = &t->piece[t->n - 1];
    char before[QUOTE_ROOM], indent[64] = "";
    bool ended = is_sentence_end(t, t->last), blank = p->lines > 1;
    quote(t, t->piece[chunk_start(t, t->last)].at, piece_end(t, t->last), true, before);
    if (p->indent) snprintf(indent, sizeof indent, " and %d columns of indentation", p->indent);
    say(w,
        blank ? "the last token is the blank line after %1%2|the text ends on a blank line%2, after %1|after %1 comes an empty "
                "line%2, the last token"
              : "the last token is the line break after %1%2|it ends with a new line%2, after %1|after %1 comes a line break%2, "
                "the last token",
        before, indent);
    say(w,
        t->in_code ? blank ? "; a new block of code or a comment may follow"
                           : "; another line of code is due|; the next statement or a closing comes next"
        : blank
            ? "; a paragraph, a heading or an item of a list should follow|; something new begins: a paragraph, heading or list"
        : ended                     ? "; a new sentence, item or line may follow"
        : piece_is(t, t->last, ":") ? "; a list, an example or the explanation should follow"
        : piece_is(t, t->last, "-") ? "; the rest of a divided word may follow"
                                    : "; the sentence may go on in the next line, unless the lines are separate",
        NULL, NULL);
    end_sentence(w, 2, 0);
}

static void write_last(Writer *w, const Text *t) {
    const Piece *p = &t->piece[t->last];
    char last[QUOTE_ROOM], chunk[QUOTE_ROOM];
    if (t->piece[t->n - 1].kind == BREAK) {
        write_break(w, t);
        return;
    }
    Open o = find_open(t);
    const char *name, *next;
    if (p->kind == MARK) {
        mark_role(t, t->last, o.quote >= 0, &name, &next);
    } else {
        Role role = word_role(t, t->last, o.quote >= 0);
        name = roles[role].name;
        next = roles[role].next;
    }
    quote(t, p->at, piece_end(t, t->last), true, last);
    if (t->spaces) {
        say(w, "the text ends on white space after %1, |a blank stands last, after %1, ", last, NULL);
    } else {
        say(w, "the last token is %1, |it ends on %1, |at the very end stands %1, |the final token is %1, ", last, NULL);
    }
    say(w, name, NULL, NULL);
    int from = chunk_start(t, t->last);
    if (from < t->last && p->kind != MARK) {
        quote(t, t->piece[from].at, piece_end(t, t->last), true, chunk);
        say(w, ", joined up as %1|, part of %1", chunk, NULL);
    } else if (p->first && t->last > 0) {
        say(w, ", at the head of its line|, first on its line", NULL, NULL);
    }
    put(w, "; ", 2);
    say(w, next, NULL, NULL);
    end_sentence(w, 2, 0);
}

/* The longest run of pieces before `end` that also ends at the last piece: how many are equal. */
static int same_before(const Text *t, int end) {
    int n = 0;
    for (int a = t->last, b = end; b >= 0 && n < 8; a--, b--, n++) {
        if (t->piece[a].kind != t->piece[b].kind || t->piece[a].hash != t->piece[b].hash || t->piece[a].kind == BREAK) break;
    }
    return n;
}

/* An earlier word that begins like the unfinished last one. */
static int longer_word(const Text *t) {
    const Piece *p = &t->piece[t->last];
    for (int i = t->last - 1; i >= 0 && p->len > 1; i--) {
        const Piece *q = &t->piece[i];
        if (q->kind == WORD && q->len > p->len + 1 && !memcmp(t->s + q->at, t->s + p->at, (size_t)p->len)) return i;
    }
    return -1;
}

/* How the last token stood before: where the same words came, and what came after them. */
static void write_history(Writer *w, const Text *t) {
    int best = -1, most = 0, times = 0;
    const Piece *p = &t->piece[t->last];
    for (int i = 0; i < t->last; i++) {
        int same = same_before(t, i);
        times += same > 0;
        if (same && same >= most && t->piece[i + 1].kind != BREAK && i + 1 < t->last) best = i, most = same;
    }
    bool content = p->kind != MARK && !(p->known.pos & (P_DET | P_PREP | P_BE | P_COORD | P_PRON | P_SUBJ | P_HAVE | P_MODAL)) &&
                   !piece_in(t, t->last, "the a an to");
    char same[QUOTE_ROOM], after[QUOTE_ROOM], count[16];
    snprintf(count, sizeof count, "%d", times);
    if (best >= 0 && (most > 1 || content)) {
        int from = best - (most > 5 ? 4 : most - 1);
        while (from + 1 < best && (t->piece[from].kind == MARK && !t->piece[from].spaced)) from++;
        quote_pieces(t, from, best, 5, same);
        quote_pieces(t, best + 1, t->last, 4, after);
        if (most > 1) {
            say(w,
                "the words %1 came before, followed then by %2|earlier %1 was followed by %2|%1 stood before too, and went on "
                "with %2",
                same, after);
        } else {
            say(w,
                times > 1 ? "it came earlier, the last time before %1|when it came last it was followed by %1"
                          : "it came once before, followed by %1|it stood before, ahead of %1",
                after, NULL);
        }
        end_sentence(w, 2, 2);
    } else if (times && content) {
        say(w, times > 1 ? "it came %1 times before|the same has stood %1 times already" : "it came once before", count, NULL);
        end_sentence(w, 2, 4);
    } else if (p->kind == WORD && t->n - 1 == t->last && !t->spaces && !times) {
        int longer = longer_word(t);
        bool known = p->known.word != NULL;
        if (longer >= 0 && !known) {
            quote_pieces(t, longer, longer, 1, same);
            say(w, "it may be the start of %1, which came earlier|earlier stood %1, which begins so", same, NULL);
            end_sentence(w, 2, 1);
        } else if (content && t->whole && p->len > 2) {
            say(w, "it has not come before|it is new in this text|it comes here for the first time", NULL, NULL);
            end_sentence(w, 2, 5);
        }
    }
}

/* ------------------------------------------------------------------------------------------------ all together */

static int count_words(const char *text) {
    int n = 0;
    for (const char *c = text; *c; c++) n += *c != ' ' && (c == text || c[-1] == ' ');
    return n;
}

/* Leaves out the sentences of the highest rank, the later ones first, until the rest is at most `most` words long. */
static void shorten(Writer *w, int most) {
    for (;;) {
        int words = 0, worst = 0;
        for (int i = 0; i < w->n; i++) {
            words += count_words(w->sentence[i].text);
            if (w->sentence[i].rank >= w->sentence[worst].rank) worst = i;
        }
        if (words <= most || w->sentence[worst].rank == 0) return;
        memmove(&w->sentence[worst], &w->sentence[worst + 1], (size_t)(w->n - worst - 1) * sizeof *w->sentence);
        w->n--;
    }
}

static char *join(const Writer *w) {
    char *out = xmalloc((size_t)w->n * (sizeof w->sentence->text + 2) + 1), *to = out;
    for (int i = 0; i < w->n; i++) {
        if (i) to = stpcpy(to, w->sentence[i].paragraph == w->sentence[i - 1].paragraph ? " " : "\n\n");
        to = stpcpy(to, w->sentence[i].text);
    }
    *to = 0;
    return out;
}

char *rules_explanation(const char *text, size_t len, int words, uint64_t key) {
    Text t;
    char *out = NULL;
    text_read(&t, text, len);
    if (t.words >= MIN_WORDS) {
        Writer *w = xcalloc(1, sizeof *w);
        w->state = key;
        int share = words / 7;
        w->quote_words = share < QUOTE_LEAST ? QUOTE_LEAST : share > QUOTE_WORDS ? QUOTE_WORDS : share;
        write_subject(w, &t);
        write_topics(w, &t);
        write_open(w, &t);
        write_last(w, &t);
        write_history(w, &t);
        shorten(w, words);
        out = join(w);
        free(w);
    }
    text_free(&t);
    return out;
}
