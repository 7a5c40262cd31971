/* rules.h - what rules_text.c finds in a text and rules.c writes about. Private to the two. */
#ifndef RULES_H
#define RULES_H

#include "nla.h"
#include "rules_words.h"

#define COUNT(array) ((int)(sizeof(array) / sizeof *(array)))

/* What the lexicon knows of a word. */
typedef struct {
    const char *word; /* into rules_words.h; NULL: a free place */
    int len;
    unsigned pos;        /* P_ bits */
    uint64_t domains;    /* bit d: it speaks for domains[d] */
    unsigned foreign;    /* bit l: a small word of foreign[l] */
} Entry;

typedef enum { WORD, NUMBER, MARK, BREAK } Kind;

typedef struct {
    int at, len;
    Kind kind;
    bool spaced;     /* white space before it */
    bool first;      /* of its line */
    bool script;     /* letters that are not Latin */
    int lines;       /* BREAK: how many */
    int indent;      /* BREAK: columns of white space after it */
    uint64_t hash;   /* of the text in lower case */
    Entry known;
} Piece;

typedef struct {
    char *s; /* UTF-8 without control characters but newline and tab, ends in a NUL */
    int len;
    bool whole; /* the text is not longer than the window */
    Piece *piece;
    int n;
    int words;     /* pieces that are words */
    int spaces;    /* columns of white space at the very end, after the last piece */
    int last;      /* the last piece that is no BREAK; -1: there is none */
    bool code;     /* most lines are code */
    bool examples; /* some are */
    bool in_code;  /* the last line is */
    bool comment;  /* the end stands in a comment of the code */
    int sentence;  /* the piece that opens the current sentence, or in code the current line */
} Text;

/* Reads the end of a text, at most 3,000 bytes of it; text_free when done. Nothing but the pieces is set when there is none. */
void text_read(Text *t, const char *text, size_t len);
void text_free(Text *t);

static inline bool is_space(char c) { return c == ' ' || c == '\t' || c == '\n'; }
static inline bool is_digit(char c) { return c >= '0' && c <= '9'; }
static inline bool is_lower(char c) { return c >= 'a' && c <= 'z'; }
static inline bool is_upper(char c) { return c >= 'A' && c <= 'Z'; }

static inline int piece_end(const Text *t, int i) { return t->piece[i].at + t->piece[i].len; }
static inline bool is_capital(const Text *t, int i) { return is_upper(t->s[t->piece[i].at]); }
static inline unsigned pos_of(const Text *t, int i) { return i >= 0 && i < t->n ? t->piece[i].known.pos : 0; }

/* The piece is exactly this text. Any i will do, here and in the functions below; one that is no piece is no match. */
bool piece_is(const Text *t, int i, const char *text);
/* As piece_is, for any word of "one two three"; letters in either case. */
bool piece_in(const Text *t, int i, const char *words);
/* XXH3 of the letters in lower case; *known is set to what the lexicon knows. */
uint64_t lower_hash(const char *s, int len, Entry *known);
/* The line starts with, or holds, one of "one|two|three". */
bool line_starts(const char *line, int len, const char *words);
bool line_has(const char *line, int len, const char *words);
/* The language whose cues are commonest in the text. */
const char *language_of(const Text *t);
/* Whether the piece ends a sentence, opens one, marks a list item; words from one piece to another, both included. */
bool is_sentence_end(const Text *t, int i);
bool is_list_mark(const Text *t, int i);
bool opens_sentence(const Text *t, int i);
int words_between(const Text *t, int from, int to);
/* A verb that can carry a sentence, after piece `from`: 1 there is one, 0 none, -1 some word may be one. */
int has_verb(const Text *t, int from, int to);

#endif
